"""Sparse matrix products over the entries of compressed rows, and their transposes, by the kernels of the device.

gather_sum       out[r] = sum over entries e of row r:  values[e] * table[indices[e]]            (sparse x dense)
sampled_dot      out[e] = < left[rows[e]], table[indices[e]]>                     (dense x dense, at the entries)
weight_gradient  out[j] = sum over entries e of column j:  values[e] * left[rows[e]]   (sparse transposed x dense)

The third one's result is as large as a weight. A `SparseGradient` stands for it without being computed.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from saelab.functional.compiled import has_numba, use_numba
from saelab.functional.triton_choice import use_triton

ALIGNMENT = 64  # bytes; of a vector register, and of what PyTorch allocates
LEAST_SORTED = 2**16  # entries from which on a compiled sort is worth loading numba for
MOST_PRODUCTS = 3  # for each latent: with more it takes longer to compute a gradient twice than to store it
GATHERED = 2**15  # entries whose rows are in memory at a time, where they have to be gathered


def gather_sum(
    indices: Int[Tensor, "nnz"],
    values: Float[Tensor, "nnz"],
    offsets: Int[Tensor, "n_rows_1"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "n_rows d"]:
    """Weighted sums of rows of `table`: `out[r] = sum_e values[e] * table[indices[e]]` over the entries e of row r.

    Args:
        indices: row of `table` that each entry takes.
        values: weight of each entry.
        offsets: (n_rows + 1,) row r owns the entries `offsets[r]` to `offsets[r + 1]`.
        table: the dense matrix, such as W_dec.

    >>> gather_sum(torch.tensor([0, 2, 1]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]), torch.eye(3))
    tensor([[1., 0., 2.],
            [0., 3., 0.]])
    """
    if indices.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    if use_triton(values, table):
        from saelab.functional import triton_kernels

        return triton_kernels.gather_sum(indices, values, offsets, table)
    return embedding_bag(indices, table, offsets, per_sample_weights=values, mode="sum", include_last_offset=True)


def sampled_dot(
    rows: Int[Tensor, "nnz"],
    indices: Int[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d"],
    table: Float[Tensor, "n d"],
    order: Int[Tensor, "nnz"] | None = None,
) -> Float[Tensor, "nnz"]:
    """Inner products at the entries only: `out[e] = <left[rows[e]], table[indices[e]]>`.

    On CPU and CUDA this is the kernel behind the gradient of `embedding_bag`'s weights, which reads each row in
    place. Gathering the rows first moves several times the memory; it is done on other devices, where the kernel has
    changed, and where it would give equal rows unequal products (`_is_even`).

    Args:
        rows: row of `left` of each entry.
        indices: row of `table` of each entry.
        left: first factors, one row per token.
        table: second factors, one row per latent.
        order: permutation that sorts the entries by `indices`, if known; else it is computed. Entries are visited in
            this order because a batch of rows of `left` fits the cache and `table` does not.

    >>> sampled_dot(torch.tensor([0, 1]), torch.tensor([2, 0]), torch.eye(2, 3), torch.ones(3, 3))
    tensor([1., 1.])
    """
    if indices.numel() == 0:
        return table.new_zeros(0)
    if use_triton(left, table):
        from saelab.functional import triton_kernels

        return triton_kernels.sampled_dot(rows, indices, left, table, order)
    if use_numba(table, left):
        from saelab.functional import numba_kernels

        order = transpose_entries(indices, len(table))[0] if order is None else order
        return numba_kernels.sampled_dot(rows, indices, left, table, order)
    if table.device.type in ("cpu", "cuda") and has_dot_kernel(table.device.type) and _is_even(table):
        order = indices.argsort() if order is None else order
        products = _dot_by_kernel(rows[order], indices[order], left.contiguous(), table)
        return torch.empty_like(products).index_copy_(0, order, products)
    parts = zip(torch.split(rows, GATHERED), torch.split(indices, GATHERED), strict=True)
    return torch.cat([(left[row] * table[index]).sum(-1) for row, index in parts])


def _is_even(table: Tensor) -> bool:
    """Whether the kernel rounds the product of two rows in the same way wherever in the table they lie.

    On some processors the BLAS behind it sums from the first address that is a multiple of 64 bytes. All rows of a
    table start at the same distance from one where their length is a multiple of it.
    """
    return table.device.type != "cpu" or table.stride(0) * table.element_size() % ALIGNMENT == 0 or _ignores_alignment()


@functools.cache
def _ignores_alignment() -> bool:
    """Whether BLAS gives copies of a row the same product at every alignment; tried once per process (1 ms)."""
    for width in (31, 65, 129, 517):
        values = torch.randn(2, width, generator=torch.Generator().manual_seed(width))
        left, table = (value.repeat(32, 1) for value in values)
        every = torch.arange(32)
        products = _dot_by_kernel(every.repeat_interleave(32), every.repeat(32), left, table)
        if not bool((products == products[0]).all()):
            return False
    return True


def _dot_by_kernel(rows: Tensor, indices: Tensor, left: Tensor, table: Tensor) -> Tensor:
    bags = torch.zeros(1, dtype=indices.dtype, device=indices.device)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(left, table, indices, bags, rows, 0)
    return products


@functools.cache
def has_dot_kernel(device_type: str) -> bool:
    """Whether PyTorch's kernel for `sampled_dot` exists and is correct; tried once per process and device type (1 ms).

    The kernel is private to PyTorch, so another release may order its arguments differently.
    """
    rows, indices = (torch.tensor(ids, device=device_type) for ids in ([2, 0, 2, 1], [0, 1, 1, 4]))
    left, table = (torch.arange(4.0 * n, device=device_type).view(n, 4) - n for n in (3, 5))
    expected = (left[rows] * table[indices]).sum(-1)  # whole numbers: exact in any order
    try:
        return torch.equal(_dot_by_kernel(rows, indices, left, table), expected)
    except (AttributeError, RuntimeError):
        return False


def transpose_entries(
    indices: Int[Tensor, "nnz"], n_columns: int
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "n_columns_1"]]:
    """Compressed columns of the entries: the permutation that sorts them by column, and where each column starts in it.

    >>> transpose_entries(torch.tensor([2, 0, 2]), 3)
    (tensor([1, 0, 2]), tensor([0, 1, 1, 3]))
    """
    if len(indices) >= LEAST_SORTED and indices.device.type == "cpu" and has_numba():
        from saelab.functional import numba_kernels

        return numba_kernels.transpose_entries(indices, n_columns)
    columns, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(columns, torch.arange(n_columns + 1, device=indices.device, dtype=columns.dtype))
    return order, starts


class Entries(NamedTuple):
    """Positions of a batch's non-zero codes: latent `indices`, `rows` and `offsets`; `columns` is the result of
    `transpose_entries`, if known.
    """

    indices: Int[Tensor, "nnz"]
    rows: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "n_rows_1"]
    columns: tuple[Int[Tensor, "nnz"], Int[Tensor, "n_columns_1"]] | None = None

    def with_columns(self, n_columns: int) -> "Entries":
        """The same entries with `columns` computed, so that several products share the sort."""
        return self if self.columns else self._replace(columns=transpose_entries(self.indices, n_columns))

    @property
    def order(self) -> Int[Tensor, "nnz"] | None:
        """Permutation that sorts the entries by latent, if known."""
        return self.columns[0] if self.columns else None


@dataclass(eq=False)
class SparseGradient:
    """Gradient of a weight (n, d) as the products that it is the sum of.

    Row j is the sum of `values[e] * left[rows[e]]` over its entries e, `starts[j]` to `starts[j + 1]`, less its part
    along row j of `normals` (of unit norm) where there are such.

    >>> entries = Entries(torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))
    >>> SparseGradient.from_entries(entries, torch.tensor([2.0]), torch.ones(1, 3), n=2).to_dense()
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """

    starts: Int[Tensor, "n_1"]
    rows: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]
    left: Float[Tensor, "n_rows d"]
    normals: Float[Tensor, "n d"] | None = None
    squares: Float[Tensor, "n"] | None = None
    """squared norms of the rows, once they are known"""

    @classmethod
    def from_entries(
        cls,
        entries: Entries,
        values: Float[Tensor, "nnz"],
        left: Float[Tensor, "n_rows d"],
        n: int,
        normals: Float[Tensor, "n d"] | None = None,
    ) -> "SparseGradient":
        """The gradient whose value `weight_gradient` computes.

        Args:
            entries: positions of the values, of latents below n.
            values: value of each entry.
            left: dense rows.
            n: number of latents.
            normals: rows along which the gradient has no part; None is for none.
        """
        order, starts = entries.columns or transpose_entries(entries.indices, n)
        return cls(starts, entries.rows[order], values.detach()[order], left.detach(), normals)

    def __add__(self, other: "SparseGradient") -> "SparseGradient":
        n = len(self.starts) - 1
        latents = [torch.arange(n).repeat_interleave(each.starts.diff()) for each in (self, other)]
        order, starts = transpose_entries(torch.cat(latents), n)
        rows = torch.cat([self.rows, other.rows + len(self.left)])
        values, left = torch.cat([self.values, other.values]), torch.cat([self.left, other.left])
        return SparseGradient(starts, rows[order], values[order], left, self.normals)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, as kernels take them: (0, d) `normals` where there are none."""
        normals = self.left[:0] if self.normals is None else self.normals.detach()
        return self.starts, self.rows, self.values, self.left, normals

    def scaled(self, factor: Float[Tensor, ""]) -> "SparseGradient":
        """The gradient times a number."""
        return replace(self, values=self.values * factor, squares=None)

    def to_dense(self) -> Float[Tensor, "n d"]:
        """The gradient as a tensor."""
        made = _multiply_transposed(self.starts, self.rows, self.values, self.left)
        if self.normals is not None:
            made -= torch.linalg.vecdot(made, self.normals).unsqueeze(1) * self.normals
        return made

    def sampled_dot(self, table: Float[Tensor, "n d"], order: Int[Tensor, "nnz"]) -> Float[Tensor, "nnz"]:
        """Inner products `<left[rows[e]], table[latent]>` of the entries; the same pass over memory finds `squares`.

        Args:
            table: second factors, one row per latent.
            order: place of each product in the result.
        """
        from saelab.functional import numba_kernels

        self.squares, products = numba_kernels.decode_squares(self.parts, table)
        return torch.empty_like(products).index_copy_(0, order, products)

    def square_sum(self) -> Float[Tensor, ""]:
        """Squared norm of the gradient."""
        from saelab.functional import numba_kernels

        return (numba_kernels.gradient_squares(self.parts) if self.squares is None else self.squares).sum()


SparseGradients = dict[nn.Parameter, SparseGradient]
"""gradients of parameters, which have none in `.grad`"""


@dataclass(eq=False)
class GradientMemory:
    """What one training step leaves to the next of the gradient of a weight (d_sae, d_in), and to its optimizer."""

    projected: bool = False
    """whether the optimizer is to have the gradient without its part along the weight's rows"""
    spare: Float[Tensor, "d_sae d_in"] | None = None
    """memory to write the gradient into, taken out when it is used: allocating costs more than the product"""
    sparse: bool = False
    """whether a step is taken: gradients that compiled kernels can take are kept in `found` and not computed, and those
    that they compute are projected and noted at once
    """
    found: SparseGradient | None = None
    """sum of the gradients that were kept"""
    noted: tuple[int, int, Float[Tensor, ""]] | None = None
    """address and version of the gradient that was written last, projected if asked for, and its squared norm"""

    def pop(self) -> Float[Tensor, "d_sae d_in"] | None:
        """The spare memory, once."""
        spare, self.spare, self.noted = self.spare, None, None
        return spare

    def note(self, grad: Float[Tensor, "d_sae d_in"], square: Float[Tensor, ""]) -> None:
        """Remember the squared norm of a gradient, which is projected already where that was asked for."""
        self.noted = grad.data_ptr(), grad._version, square

    def square_of(self, grad: Tensor | None) -> Float[Tensor, ""] | None:
        """Squared norm of a gradient that was noted and has not been changed since; else None."""
        if grad is None or self.noted is None or (grad.data_ptr(), grad._version) != self.noted[:2]:
            return None
        return self.noted[2]

    def keep(
        self,
        entries: Entries,
        values: Float[Tensor, "nnz"],
        left: Float[Tensor, "n_rows d_in"],
        weight: Float[Tensor, "d_sae d_in"],
    ) -> SparseGradient | None:
        """The gradient that `weight_gradient` computes, kept here as products; None where it is to be computed.

        Args:
            entries: positions of the values.
            values: value of each entry.
            left: dense rows.
            weight: what it is the gradient of.
        """
        if not (self.sparse and use_numba(weight, left) and len(values) <= MOST_PRODUCTS * len(weight)):
            return None
        made = SparseGradient.from_entries(entries, values, left, len(weight), weight if self.projected else None)
        self.found = made if self.found is None else self.found + made
        return made

    def take(self) -> SparseGradient | None:
        """What was kept, once."""
        found, self.found = self.found, None
        return found


class _SelectRows(torch.autograd.Function):
    """Rows of a weight, whose gradient may be kept as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, latents: Tensor, memory: GradientMemory | None) -> Tensor:
        ctx.save_for_backward(weight, latents)
        ctx.memory = memory
        return weight.index_select(0, latents)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        weight, latents = ctx.saved_tensors
        memory: GradientMemory | None = ctx.memory
        grad = grad.contiguous()
        each = torch.arange(len(latents) + 1, device=latents.device)
        entries = Entries(latents, each[:-1], each)
        if memory is None or memory.keep(entries, grad.new_ones(len(latents)), grad, weight) is None:
            return torch.zeros_like(weight).index_add_(0, latents, grad), None, None
        return None, None, None


_select_rows: Callable[[Tensor, Tensor, GradientMemory | None], Tensor] = _SelectRows.apply


def select_rows(
    weight: Float[Tensor, "n d"], latents: Int[Tensor, "n_latents"], memory: GradientMemory | None = None
) -> Float[Tensor, "n_latents d"]:
    """Some rows of a weight, differentiable.

    Args:
        weight: the weight, one row per latent.
        latents: the rows, each once.
        memory: may keep the gradient of the rows, so that none of the weight's size is made.

    >>> select_rows(torch.eye(3), torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """
    return _select_rows(weight, latents, memory)


def weight_gradient(
    entries: Entries,
    values: Float[Tensor, "nnz"],
    left: Float[Tensor, "n_rows d_in"],
    d_sae: int,
    memory: GradientMemory | None = None,
) -> Float[Tensor, "d_sae d_in"]:
    """`Z^T left` for sparse codes Z: the gradient of W_dec, and that of W_enc transposed.

    Args:
        entries: positions of the non-zero entries of Z.
        values: the entries of Z.
        left: dense rows, one per row of Z.
        d_sae: number of columns of Z.
        memory: may hold a (d_sae, d_in) tensor to write the result into; else one is allocated.

    >>> entries = Entries(torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 1]))
    >>> weight_gradient(entries, torch.tensor([2.0]), torch.ones(1, 3), d_sae=2)
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """
    indices, rows = entries[0], entries[1]
    order, starts = entries.columns or transpose_entries(indices, d_sae)
    if left.device.type != "cpu":
        return gather_sum(rows[order], values[order], starts, left)
    return _multiply_transposed(starts, rows[order], values[order], left, memory.pop() if memory else None)


def _multiply_transposed(
    starts: Tensor, rows: Tensor, values: Tensor, left: Tensor, out: Tensor | None = None
) -> Tensor:
    """`Z^T left` of compressed columns."""
    _acknowledge_beta()
    shape = (len(starts) - 1, len(left))
    # spare memory or not, the sum must be made in the same order: a resumed run begins without
    out = left.new_empty(shape[0], left.shape[1]) if out is None else out
    transposed = torch.sparse_csr_tensor(starts, rows, values, shape, check_invariants=False)
    return torch.addmm(out, transposed, left, beta=0, out=out)


@functools.cache
def _acknowledge_beta() -> None:
    """Suppress PyTorch's warning, once per process, that compressed tensors are in beta; tests check what is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)
