"""`galaxy`: the cloud of an SAE's directions, how steep its spectrum is, and whether it clumps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.functional.statistics import correlation
from saelab.geometry.group_agreement import REACHES
from saelab.sae.sae import SAE
from saelab.stores.results import Result, find_row, format_spread, format_table

FIRST_RANK, LAST_RANK, LAST_SHARE = 10, 150, 0.8
FEWEST_RANKS = 5
ENTROPY_DIMS = 100
SHORTEST = 1e-2  # distances of unit rows below it count as it
BLOCK = 1024  # rows whose distances are held at once
MOST_ASKED = 4096  # rows whose nearest neighbor is looked for
OTHER_SEED = 1_000_003  # added to the seed of untrained rows: an SAE's own start from those of its seed
GAUSSIAN, ON_SPHERE, UNTRAINED = "Gaussian, same covariance", "the same, of norm 1", "untrained"
LIMITS = (
    "It cannot show a power law: a few tens of ranks fit several curves; entropies by nearest neighbors are biased in "
    "many dimensions, so read them beside the nulls alone; figures of another d_in are not comparable."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cloud:
    """Shape of a cloud of n rows of norm 1 in d dimensions."""

    slope: float
    """of the logarithm of the variances along principal components on that of their rank, ranks 10 to min(150, .8 d)"""
    r2_power: float
    """share of the variance of log variances that this line explains"""
    r2_exponential: float
    """the same of a line on the rank itself"""
    clustering: float
    """clustering entropy in nats: that of a Gaussian with these variances less that by nearest neighbors (Kozachenko
    and Leonenko), in up to 100 principal components; biased, so that only the difference from a null tells"""
    variances: Float[np.ndarray, "d"] = field(repr=False)
    """along principal components, as shares of their sum, the largest first"""


@dataclass(frozen=True, kw_only=True)
class GalaxyRow:
    """Shape of one dictionary's directions, beside nulls."""

    name: str
    n_rows: int
    """directions: those that are not 0 and were not dead at the end of training"""
    d: int
    cloud: Cloud
    nulls: dict[str, tuple[Cloud, ...]]
    """Gaussian rows of the same mean and covariance; these scaled to norm 1, as the directions are; and the directions
    of an untrained dictionary; for each draw"""

    def excess(self, null: str = ON_SPHERE) -> float:
        """Clustering entropy above the mean of a null's, in nats; above 0 is clumps."""
        return self.cloud.clustering - float(np.mean([one.clustering for one in self.nulls[null]]))

    @property
    def failed(self) -> tuple[str, ...]:
        """What explains the figures without the structure that they are read as."""
        found, own = [], self.cloud
        if own.r2_exponential >= own.r2_power:
            found.append(f"an exponential fits the spectrum better, R2 {own.r2_exponential:.3f} and {own.r2_power:.3f}")
        if (slope := float(np.mean([one.slope for one in self.nulls[UNTRAINED]]))) <= REACHES * own.slope:
            found.append(f"untrained directions reach a slope of {slope:.2f}, of {own.slope:.2f}")
        draws = [one.clustering for one in self.nulls[ON_SPHERE]]
        if self.excess() <= 3 * (float(np.std(draws)) + 1e-9):
            found.append(
                f"Gaussian rows of norm 1 have as much clustering, {np.mean(draws):.1f} of {own.clustering:.1f}"
            )
        return tuple(f"{self.name}: {one}" if self.name else one for one in found)


@dataclass(frozen=True, kw_only=True)
class Galaxy(Result):
    """Shape of the cloud of directions of one dictionary, or of several by name, such as by layer."""

    rows: tuple[GalaxyRow, ...]
    n_draws: int
    seed: int

    def at(self, name: str) -> GalaxyRow:
        """The row of one dictionary; KeyError for another name."""
        return find_row(self.rows, name=name)

    @property
    def failed(self) -> tuple[str, ...]:
        """What explains figures of each dictionary without structure."""
        return tuple(one for row in self.rows for one in row.failed)

    def __str__(self) -> str:
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(f"directions of norm 1; {self.n_draws} draws of each null, seed {self.seed}")
        table = [["", "rows", "d", "slope", "R2, power", "exponential", "clustering entropy"]]
        for row in self.rows:
            size = [f"{row.n_rows:,}", f"{row.d:,}"]
            table.append([row.name or "directions", *size, *_cells([row.cloud])])
            table += [[f"  {name}", "", "", *_cells(clouds)] for name, clouds in row.nulls.items()]
        return "\n".join([*lines, *format_table(table), LIMITS])


def _cells(clouds: Sequence[Cloud]) -> list[str]:
    cells = []
    for name, digits in (("slope", 3), ("r2_power", 3), ("r2_exponential", 3), ("clustering", 1)):
        cells.append(format_spread([getattr(one, name) for one in clouds], digits))
    return cells


@torch.no_grad()
def galaxy(saes: SAE | Mapping[str, SAE], *, n_draws: int = 3, seed: int = 0) -> Galaxy:
    """How steep the spectrum of an SAE's directions is, and how much they clump, beside Gaussian and untrained ones.

    Directions are scaled to norm 1. Source: arXiv:2410.19750, section 5: a slope of -.24 to -.47 by layer of Gemma-2-2B
    (ranks 10 to 150 of 2,304 dimensions), steepest in the middle, where clustering entropy is lowest.

    Args:
        saes: the SAE, or several by name, such as those of the layers in order.
        n_draws: draws of each null.
        seed: of the draws.

    Raises:
        ValueError: fewer than 18 dimensions or 18 live directions, or no draws.

    >>> found = galaxy(sl.SAE(sl.SAEConfig(d_in=32, d_sae=200), seed=0))
    >>> [round(abs(one.slope), 1) for one in (found.rows[0].cloud, found.rows[0].nulls["untrained"][0])]
    [0.5, 0.5]
    """
    named = {"": saes} if isinstance(saes, SAE) else dict(saes)
    if not named or n_draws < 1:
        raise ValueError(f"`saes` and `n_draws` must be at least one, got {len(named)} and {n_draws}.")
    rows = tuple(_measure(name, sae, n_draws, seed) for name, sae in named.items())
    return Galaxy(rows=rows, n_draws=n_draws, seed=seed)


def _measure(name: str, sae: SAE, n_draws: int, seed: int) -> GalaxyRow:
    rows = exact(sae.directions()).cpu()
    alive = rows.norm(dim=1) > 0
    alive[(sae.training_ or {}).get("dead", [])] = False
    rows = _scale(rows[alive])
    if _last_rank(rows) < FIRST_RANK + FEWEST_RANKS - 1:
        raise ValueError(
            f"`saes` must have at least 18 dimensions and 18 live directions, got {rows.shape[1]} and {len(rows)}."
        )
    nulls: dict[str, list[Cloud]] = {GAUSSIAN: [], ON_SPHERE: [], UNTRAINED: []}
    mean, (variances, axes) = rows.mean(0), _find_axes(rows)
    for draw in range(n_draws):
        generator = torch.Generator().manual_seed(seed + draw)
        drawn = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        drawn = mean + drawn * variances.sqrt() @ axes.T
        start = exact(SAE(sae.cfg, seed=seed + draw + OTHER_SEED).directions()).cpu()[alive]
        for null, cloud in ((GAUSSIAN, drawn), (ON_SPHERE, _scale(drawn)), (UNTRAINED, _scale(start))):
            nulls[null].append(_describe(cloud))
    kept = {null: tuple(clouds) for null, clouds in nulls.items()}
    return GalaxyRow(name=name, n_rows=len(rows), d=rows.shape[1], cloud=_describe(rows), nulls=kept)


def _scale(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True)


def _last_rank(rows: Float[Tensor, "n d"]) -> int:
    return min(LAST_RANK, int(LAST_SHARE * min(rows.shape[1], len(rows) - 1)))


def _find_axes(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Variances along principal components, the largest first, and these as columns."""
    centered = rows - rows.mean(0)
    variances, axes = torch.linalg.eigh(centered.T @ centered / (len(rows) - 1))
    return variances.flip(0).clamp(min=1e-12), axes.flip(1)


def _describe(rows: Float[Tensor, "n d"]) -> Cloud:
    variances, axes = _find_axes(rows)
    ranks = np.arange(FIRST_RANK, _last_rank(rows) + 1)
    y, logs = np.log10(variances.numpy()[ranks - 1]), np.log10(ranks)
    slope = float(np.polyfit(logs, y, 1)[0])
    d = min(ENTROPY_DIMS, rows.shape[1])
    gaussian = float((variances[:d].log() + 1 + math.log(2 * math.pi)).sum() / 2)
    return Cloud(
        slope=slope,
        r2_power=correlation(logs, y) ** 2,
        r2_exponential=correlation(ranks.astype(np.float64), y) ** 2,
        clustering=gaussian - neighbor_entropy((rows - rows.mean(0)) @ axes[:, :d]),
        variances=(variances / variances.sum()).numpy(),
    )


def neighbor_entropy(rows: Float[Tensor, "n d"], n_asked: int = MOST_ASKED) -> float:
    """Entropy in nats by distances to the nearest other row (Kozachenko and Leonenko 1987).

    `psi(n) - psi(1) + log(volume of the unit ball) + d mean(log distance)`, distances at least .01; the mean is that of
    at most `n_asked` evenly spaced rows, each among all.
    """
    n, d = rows.shape
    low, total = rows.float(), 0.0  # pairs in float32, the nearest one again in float64
    sizes = low.square().sum(1)
    asked = torch.from_numpy(np.arange(min(n, n_asked)) * n // min(n, n_asked))
    for part in asked.split(BLOCK):
        gaps = sizes - 2 * low[part] @ low.T
        gaps[torch.arange(len(part)), part] = math.inf
        nearest = (rows[part] - rows[gaps.argmin(1)]).norm(dim=1)
        total += float(nearest.clamp(min=SHORTEST).log().sum())
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    counts = torch.digamma(torch.tensor([n, 1], dtype=torch.float64))
    return float(counts[0] - counts[1]) + ball + d * total / len(asked)
