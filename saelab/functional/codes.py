"""`SparseCodes`: the non-zero codes of a batch in compressed rows, as encoders return and decoders take them."""

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
        """Codes from entries that are sorted by row.

        Args:
            indices: latent of each entry, in 0..d_sae - 1.
            values: code of each entry.
            rows: row of each entry, ascending.
            shape: (n_rows, d_sae) of the dense codes; rows without an entry are empty.

        >>> SparseCodes.from_rows(torch.tensor([3, 1]), torch.ones(2), torch.tensor([0, 2]), (3, 4)).offsets
        tensor([0, 1, 1, 2])
        """
        offsets = torch.searchsorted(rows, torch.arange(shape[0] + 1, device=rows.device))
        return cls(indices, values, rows, offsets, shape[1], (shape[0],))

    @classmethod
    def from_dense(cls, z: Float[Tensor, "*batch d_sae"]) -> "SparseCodes":
        """The non-zero entries of dense codes, negative ones included.

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
        """Dense codes of the given latents, in the order given."""
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
        """The codes of the latents whose entry of the mask is True; all other codes are dropped."""
        return self._keep(latents[self.indices])

    def _keep(self, keep: Bool[Tensor, "nnz"]) -> "SparseCodes":
        part = self.from_rows(
            self.indices[keep], self.values[keep], self.rows[keep], (len(self.offsets) - 1, self.d_sae)
        )
        return replace(part, batch_shape=self.batch_shape)

    @property
    def l0(self) -> Int[Tensor, "n_rows"]:
        """Number of latents that fire (z != 0) in each row."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        mean_l0 = self.indices.numel() / max(1, len(self))
        return f"SparseCodes(batch_shape={self.batch_shape}, d_sae={self.d_sae}, l0={mean_l0:.4g})"
