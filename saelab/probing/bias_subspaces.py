"""`bias_subspace`, `neutralize`, `equalize`: directions along which paired words differ, taken out of vectors."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.probing.association_tests import read_rows
from saelab.probing.linear_directions import project_out
from saelab.stores.results import Result, format_spread

REACHES = 0.5  # of an effect, or of a share, from which a null counts as one that explains it


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasSubspace(Result):
    """Orthonormal directions along which the words of pairs differ."""

    basis: Float[np.ndarray, "n_directions d"] = field(repr=False)
    """the first words of the pairs lie further along each, on average"""
    shares: tuple[float, ...]
    """share of the squared differences that each direction holds"""
    repaired: tuple[float, ...]
    """share that the first direction holds when the same words are paired at random, for each draw"""
    n_pairs: int
    seed: int

    @property
    def failed(self) -> tuple[str, ...]:
        """Random pairs whose first direction holds as much, on average, as that of the pairs less a half."""
        null = float(np.mean(self.repaired))
        found = f"the first direction of words paired at random holds {null:.3f}, that of pairs {self.shares[0]:.3f}"
        return (found,) if null >= (1 - REACHES / 2) * self.shares[0] else ()

    def __str__(self) -> str:
        held = ", ".join(f"{share:.3f}" for share in self.shares)
        lines = [f"A null is not passed: {one}" for one in self.failed]
        return "\n".join(
            [
                *lines,
                f"{len(self.basis)} of {self.basis.shape[1]} directions hold {held} of the squared differences of "
                f"{self.n_pairs} pairs; the first of words paired at random {format_spread(self.repaired)} "
                f"({len(self.repaired)} draws, seed {self.seed})",
            ]
        )


def bias_subspace(
    vectors_a: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    vectors_b: Float[Tensor, "n d"] | Float[np.ndarray, "n d"],
    n_directions: int = 1,
    *,
    n_draws: int = 20,
    seed: int = 0,
) -> BiasSubspace:
    """The directions along which paired words differ most: principal axes of both words about the middle of each pair.

    Source: arXiv:1607.06520, section 5.1. A first direction always holds the largest share, so it is printed beside
    that of the same words paired at random.

    Args:
        vectors_a: (n_pairs, d) the first word of each pair.
        vectors_b: (n_pairs, d) the second.
        n_directions: how many.
        n_draws: random pairings.
        seed: of these.

    Raises:
        ValueError: sizes that disagree, fewer pairs than directions or than two, or words that are the same.

    >>> step = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    >>> x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    >>> bias_subspace(x + step, x - step).basis.round(3).tolist()
    [[0.0, 1.0, 0.0, 0.0]]
    """
    a, b = read_rows(vectors_a, "vectors_a"), read_rows(vectors_b, "vectors_b")
    if a.shape != b.shape or not 1 <= n_directions <= min(a.shape):
        raise ValueError(
            f"Both words of each pair must be given and `n_directions` be in 1..{min(a.shape)}, got shapes {a.shape} "
            f"and {b.shape} and {n_directions}."
        )
    if not (a != b).any():
        raise ValueError("Words of pairs must differ in their vectors; theirs are the same.")
    rng, both = np.random.default_rng(seed), np.vstack([a, b])
    axes, shares = _find_axes(a - b)
    repaired = []
    for _ in range(n_draws):
        first, second = np.split(rng.permutation(both), 2)
        repaired.append(float(_find_axes(first - second)[1][0]))
    basis = axes[:n_directions]
    signs = np.where(basis @ (a - b).mean(0) < 0, -1.0, 1.0)
    return BiasSubspace(
        basis=basis * signs[:, None],
        shares=tuple(shares[:n_directions].tolist()),
        repaired=tuple(repaired),
        n_pairs=len(a),
        seed=seed,
    )


def _find_axes(differences: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "m d"], Float[np.ndarray, "m"]]:
    _, sizes, axes = np.linalg.svd(differences, full_matrices=False)
    return axes, sizes**2 / max(float((sizes**2).sum()), 1e-300)


def neutralize(
    x: Float[Tensor, "*batch d"], subspace: BiasSubspace, center: Float[Tensor, "d"] | None = None
) -> Float[Tensor, "*batch d"]:
    """Vectors without their component in the subspace, which becomes that of `center` (None: 0).

    Source: arXiv:1607.06520, section 6, without the scaling to length 1 that follows there.
    """
    basis = torch.from_numpy(subspace.basis)
    return project_out(basis, torch.zeros(basis.shape[1]) if center is None else center)(x)


def equalize(
    vectors_a: Float[Tensor, "n d"], vectors_b: Float[Tensor, "n d"], subspace: BiasSubspace
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Both words of each pair at one distance from every neutral vector: they keep one common rest and length.

        mu = (a + b) / 2,  rest = mu - mu_B,  a' = rest + r (a_B - mu_B) / |a_B - mu_B|,  the same for b

    B marks components in the subspace, and r^2 = (|a|^2 + |b|^2) / 2 - |rest|^2 keeps the mean squared length of the
    pair; for vectors of length 1 this is the formula of arXiv:1607.06520, section 6.

    Raises:
        ValueError: for a pair whose words do not differ in the subspace.

    >>> subspace = bias_subspace(torch.eye(4)[:2], -torch.eye(4)[:2])
    >>> a, b = equalize(torch.tensor([[3.0, 1.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 2.0, 1.0]]), subspace)
    >>> torch.allclose(neutralize(a, subspace), neutralize(b, subspace)), torch.allclose(a.norm(), b.norm())
    (True, True)
    """
    if vectors_a.shape != vectors_b.shape:
        raise ValueError(
            f"Pairs must have two words each, got shapes {tuple(vectors_a.shape), tuple(vectors_b.shape)}."
        )
    a, b = exact(vectors_a), exact(vectors_b)
    basis = torch.from_numpy(subspace.basis).to(a)
    middle = (a + b) / 2
    rest = middle - (middle @ basis.T) @ basis
    step = ((a - b) / 2 @ basis.T) @ basis
    sizes = step.norm(dim=1, keepdim=True)
    if not (sizes > 1e-9 * a.norm(dim=1, keepdim=True)).all():
        raise ValueError(
            f"Words of pairs must differ in the subspace, not so pair {int(sizes.argmin())}; leave it out."
        )
    squared = (a.square().sum(1) + b.square().sum(1)) / 2 - rest.square().sum(1)  # at least 0: |mu|^2 is less
    step = step / sizes * squared.clamp(min=0).sqrt()[:, None]
    return (rest + step).to(vectors_a), (rest - step).to(vectors_b)
