"""Sparse codes in compressed rows: what an encoder gives, what a decoder takes, and what lies on disk."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.kernels import sparse_decode


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The non-zero codes of a batch, row after row.

    Entry e is `values[e]` of latent `indices[e]` in row `rows[e]`; row r owns the entries `offsets[r]` to `offsets[r
    + 1]`. Rows are the batch axes flattened; `batch_shape` keeps them.
    """

    indices: Int[Tensor, "nnz"]
    values: Float[Tensor, "nnz"]
    rows: Int[Tensor, "nnz"]
    offsets: Int[Tensor, "n_rows_1"]
    d_sae: int
    batch_shape: tuple[int, ...]

    @classmethod
    def from_rows(
        cls,
        indices: Int[Tensor, "nnz"],
        values: Float[Tensor, "nnz"],
        rows: Int[Tensor, "nnz"],
        shape: tuple[int, int],
    ) -> "SparseCodes":
        """Compress entries sorted by row; `shape` is (n_rows, d_sae).

        >>> SparseCodes.from_rows(torch.tensor([3, 1]), torch.ones(2), torch.tensor([0, 2]), (3, 4)).offsets
        tensor([0, 1, 1, 2])
        """
        offsets = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=rows.device))
        return cls(indices, values, rows, offsets, shape[1], (shape[0],))

    @classmethod
    def from_dense(cls, z: Float[Tensor, "*batch d_sae"]) -> "SparseCodes":
        """Keep the non-zero entries of dense codes, signed ones too.

        >>> SparseCodes.from_dense(torch.tensor([[0.0, -2.0], [1.0, 0.0]])).values
        tensor([-2.,  1.])
        """
        flat = z.reshape(-1, z.shape[-1])
        rows, indices = flat.nonzero(as_tuple=True)
        codes = cls.from_rows(indices, flat[rows, indices], rows, (flat.shape[0], flat.shape[1]))
        return replace(codes, batch_shape=tuple(z.shape[:-1]))

    def to_dense(self) -> Float[Tensor, "*batch d_sae"]:
        """The same codes as a dense tensor, `(*batch_shape, d_sae)`."""
        dense = self.values.new_zeros(len(self.offsets) - 1, self.d_sae)
        return dense.index_put((self.rows, self.indices), self.values).view(*self.batch_shape, self.d_sae)

    def columns(self, latents: Int[Tensor, "n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        """The codes of some latents as a dense tensor."""
        entries, which = (self.indices[:, None] == latents).nonzero(as_tuple=True)
        dense = self.values.new_zeros(len(self), len(latents))
        return dense.index_put((self.rows[entries], which), self.values[entries]).view(*self.batch_shape, len(latents))

    def decode(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`z W_dec`, differentiable, at the cost of the non-zero entries."""
        flat = sparse_decode(self.values, W_dec, self.indices, self.rows, self.offsets)
        return flat.view(*self.batch_shape, W_dec.shape[1])

    def prefix(self, n_latents: int) -> "SparseCodes":
        """The codes of the first `n_latents` latents only."""
        return self._keep(self.indices < n_latents)

    def select(self, latents: Bool[Tensor, "d_sae"]) -> "SparseCodes":
        """The codes of some latents only, those that are true."""
        return self._keep(latents[self.indices])

    def _keep(self, keep: Bool[Tensor, "nnz"]) -> "SparseCodes":
        part = self.from_rows(
            self.indices[keep], self.values[keep], self.rows[keep], (len(self.offsets) - 1, self.d_sae)
        )
        return replace(part, batch_shape=self.batch_shape)

    @property
    def l0(self) -> Int[Tensor, "n_rows"]:
        """How many latents fire in each row (z != 0)."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        mean_l0 = self.indices.numel() / max(1, len(self))
        return f"SparseCodes(batch_shape={self.batch_shape}, d_sae={self.d_sae}, l0={mean_l0:.4g})"
