"""Baselines for `compare`: neurons or principal components of two activation spaces, matched as features are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float

from saelab.functional.permuting import find_runs
from saelab.stores.activations import Activations
from saelab.universality.codes import Codes
from saelab.universality.comparison import conclude
from saelab.universality.matches import Comparison
from saelab.universality.sources import StoreSource

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Basis = Literal["neurons", "pca"]
CHUNK = 65536


def compare_bases(
    a: Activations,
    b: Activations,
    basis: Basis = "neurons",
    *,
    m: int = 10,
    n_shifts: int = 8,
    n_null: int = 1024,
    fdr: float = 0.05,
    min_effect: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """The comparison of `compare` for neurons, or principal components, of two activation spaces instead of features.

    Their values on the same tokens are correlated, by size, with the same assignment, null distribution and effect size
    as for features. A dictionary adds something where its features recur more often than these do.

    Args:
        a: activations of one model at one hook point.
        b: activations on the same tokens, of another model or hook point.
        basis: "neurons" takes the axes of the space, "pca" the eigenvectors of the covariance.
        m: nearest axes considered for each.
        n_shifts: permutations of the rows of `b` that the null distribution is taken from.
        n_null: axes whose best partner is searched in each permutation.
        fdr: false discovery rate, in (0, 1), up to which a match is universal.
        min_effect: similarity that a universal match must reach.
        seed: seed of the permutations.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the basis does not exist, or the two sides are not of the same tokens.

    >>> acts = sl.Activations.from_tensor(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))
    >>> found = compare_bases(acts, acts, "pca", n_shifts=2, progress=False)
    >>> [round(float(value), 3) for value in found.values]
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if basis not in ("neurons", "pca"):
        raise ValueError(f"`basis` must be neurons or pca, got {basis!r}.")
    if len(a) != len(b) or not _same(a.token_ids, b.token_ids) or not _same(a.doc_ids, b.doc_ids):
        raise ValueError(
            f"`a` and `b` must be of the same tokens, got {len(a)} and {len(b)} rows, or others. Collect both with one "
            "mask on one text."
        )
    sides = Codes(_Axes.of(a, basis)), Codes(_Axes.of(b, basis))
    names = tuple(f"{basis} of {acts.hook_point or 'activations'}" for acts in (a, b))
    facts = {"sources": names, "sides": False, "n_rows": len(a), "n_tokens": len(a)}
    documents = None if a.doc_ids is None else find_runs(a.doc_ids.numpy())
    work = StoreSource.of(sides, "correlation", True, 1, progress, facts, documents)
    return conclude(work, "correlation", m, 1, n_shifts, n_null, fdr, min_effect, seed)


def _same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is None or y is None or torch.equal(x, y)


@dataclass(frozen=True, eq=False)
class _Axes:
    """Activations in a basis, readable as rows of codes."""

    acts: Activations
    mean: Float[torch.Tensor, "d"]
    directions: Float[torch.Tensor, "d d"]

    @classmethod
    def of(cls, acts: Activations, basis: str) -> "_Axes":
        """Activations in the basis of neurons, or of the covariance's eigenvectors."""
        total, squares = torch.zeros(acts.d_in).double(), torch.zeros(acts.d_in, acts.d_in).double()
        for start in range(0, len(acts), CHUNK):
            x = acts[start : start + CHUNK].double()
            total += x.sum(0)
            squares += x.T @ x
        mean = total / len(acts)
        directions = torch.eye(acts.d_in).double()
        if basis == "pca":
            directions = torch.linalg.eigh(squares / len(acts) - torch.outer(mean, mean)).eigenvectors.flip(1)
        return cls(acts, mean.float(), directions.float())

    @property
    def d_sae(self) -> int:
        """Number of directions."""
        return self.acts.d_in

    @property
    def l0(self) -> float:
        """Number of directions: no value is 0."""
        return float(self.acts.d_in)

    def __len__(self) -> int:
        return len(self.acts)

    def matrix(self, start: int = 0, stop: int | None = None) -> "csr_matrix":
        """Centred values of some rows."""
        from scipy.sparse import csr_matrix

        return csr_matrix(((self.acts[start:stop].float() - self.mean) @ self.directions).numpy())
