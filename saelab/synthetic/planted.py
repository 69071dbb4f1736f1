"""`PlantedWorld`: activations that are sparse sums of known directions, drawn without end.

The knobs are those of SynthSAEBench (arXiv:2602.14687): Zipfian rates, correlated firing, a hierarchy of features with
mutually exclusive children, overlap of the directions, spread of the magnitudes. Everything is drawn from a seed, a
batch from its number, so that no state has to be kept.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes

LARGEST_RATE = 0.9  # of a feature; and of all children of a parent together, where the parent fires
OFTEN = 0.1  # a feature that may fire more often is drawn token by token
BLOCK = 2**23  # pairs of a token and a feature, or of two features, that are held at a time
SEPARATION_STEPS = 500  # passes over all pairs of directions


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """Configuration of a `PlantedWorld`. The defaults are a small version of SynthSAEBench's world.

    >>> PlantedConfig(n_features=256, d_in=32, n_roots=0).n_nested
    0
    """

    n_features: int = 1024
    """number of planted features"""
    d_in: int = 128
    """width of the activations"""
    l0: float = 16.0
    """mean number of features that fire for a token"""
    zipf: float = 0.5
    """exponent of the rates: that of the i-th feature is proportional to (i + 1)^-zipf; 0 makes them equal"""
    correlation: float = 0.1
    """scale of the loadings on common factors; 0 for independent firing"""
    n_factors: int = 32
    """number of common factors"""
    n_roots: int = 8
    """number of trees of features; 0 for no hierarchy"""
    branching: int = 4
    """children of each feature in a tree that has some"""
    depth: int = 3
    """levels below a root"""
    overlap: float | None = None
    """largest |cosine| of two directions, reached by pushing them apart; None leaves them as drawn, uniformly"""
    magnitude: float = 1.0
    """mean size of a code that fires"""
    spread: float = 0.25
    """standard deviation of the sizes, of which none is below a tenth of `magnitude`"""
    signed_frac: float = 0.0
    """fraction of the features whose codes take both signs, at random"""
    noise: float = 0.0
    """standard deviation of Gaussian noise on each coordinate"""
    bias: float = 0.0
    """norm of a constant that is added to every activation"""

    def __post_init__(self) -> None:
        for name, least in (("n_features", 1), ("d_in", 1), ("n_factors", 0), ("n_roots", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value}.")
        if not 0 < self.l0 <= self.n_features * LARGEST_RATE:
            raise ValueError(
                f"`l0` must be above 0 and at most {LARGEST_RATE:g} n_features ({self.n_features * LARGEST_RATE:g}), "
                f"got {self.l0}."
            )
        for name in ("zipf", "correlation", "magnitude", "spread", "noise", "bias"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {getattr(self, name)}.")
        if not 0 <= self.signed_frac <= 1:
            raise ValueError(f"`signed_frac` must be in [0, 1], got {self.signed_frac}.")
        shape = self.branching, self.depth
        if self.n_roots and not all(isinstance(n, Integral) and n >= 1 for n in shape):
            raise ValueError(f"`branching` and `depth` must be whole numbers of at least 1, got {shape}.")
        if self.n_nested > self.n_features:
            raise ValueError(
                f"The trees must have at most n_features ({self.n_features}) features, got {self.n_nested}; lower "
                "`n_roots`, `branching` or `depth`."
            )
        if self.overlap is not None and not self.smallest_overlap < self.overlap <= 1:
            raise ValueError(
                f"`overlap` must be above {self.smallest_overlap:.3f}, the least for {self.n_features} directions in "
                f"{self.d_in} dimensions, and at most 1, got {self.overlap}."
            )

    @property
    def tree_size(self) -> int:
        """Number of features in one tree."""
        return sum(self.branching**level for level in range(self.depth + 1))

    @property
    def n_nested(self) -> int:
        """Number of features in trees, roots included."""
        return self.n_roots * self.tree_size

    @property
    def smallest_overlap(self) -> float:
        """Welch's bound: no set of directions has a smaller largest |cosine|."""
        n, d = self.n_features, self.d_in
        return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


class PlantedWorld:
    """Activations `x = z D + bias + noise` with known sparse codes z and directions D, drawn token by token.

    A feature without a parent fires where a Gaussian of its own plus a mix of common factors exceeds a threshold. A
    child fires only where its parent does, and at most one child of a parent does. Feature i is the i-th most frequent
    of those without a parent; within a tree a child is rarer than its parent.

    Args:
        cfg: the knobs.
        seed: of directions, trees and loadings.

    >>> world = PlantedWorld(PlantedConfig(n_features=64, d_in=16, l0=4.0, n_roots=1, branching=2), seed=0)
    >>> x, z = world.sample(2000, seed=1)
    >>> x.shape, z.d_sae, 3 < z.l0.float().mean() < 5
    (torch.Size([2000, 16]), 64, tensor(True))
    """

    directions: Float[Tensor, "n_features d_in"]
    """unit rows"""
    rates: Float[np.ndarray, "n_features"]
    """probability that each feature fires"""
    parents: Int[np.ndarray, "n_features"]
    """parent of each feature, -1 for none"""

    def __init__(self, cfg: PlantedConfig | None = None, seed: int = 0) -> None:
        self.cfg, self.seed = cfg or PlantedConfig(), seed
        cfg, rng = self.cfg, np.random.default_rng([seed, 0])
        self.parents, levels = _plant_trees(cfg, rng)
        self.rates = _draw_rates(cfg, self.parents, levels)
        # from another stream than an SAE of the same seed, which would start at the planted directions
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = torch.randn(cfg.n_features, cfg.d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.directions = rows if cfg.overlap is None else _push_apart(rows, cfg.overlap)
        self.two_sided = torch.rand(cfg.n_features, generator=generator) < cfg.signed_frac
        constant = torch.randn(cfg.d_in, generator=generator)
        self.bias = cfg.bias * constant / constant.norm()
        loadings = rng.standard_normal((cfg.n_features, cfg.n_factors)) * cfg.correlation / math.sqrt(cfg.n_factors)
        size = np.sqrt((loadings**2).sum(1, keepdims=True))
        self._loadings = loadings * np.minimum(1, LARGEST_RATE / np.maximum(size, 1e-12))
        self._levels = levels

    def sample(
        self, n_tokens: int, seed: int | tuple[int, ...] = 0
    ) -> tuple[Float[Tensor, "n_tokens d_in"], SparseCodes]:
        """Activations and their codes, the same for the same seed.

        Args:
            n_tokens: number of tokens.
            seed: of what is drawn; other seeds give independent tokens.

        Raises:
            ValueError: for less than one token.
        """
        if n_tokens < 1:
            raise ValueError(f"`n_tokens` must be at least 1, got {n_tokens}.")
        rng = np.random.default_rng([self.seed, 1, *np.atleast_1d(seed).tolist()])
        cfg, (token, feature) = self.cfg, self._fire(n_tokens, rng)
        order = np.argsort(token * np.int64(cfg.n_features) + feature)
        tokens, features = torch.from_numpy(token[order]), torch.from_numpy(feature[order])
        size = cfg.magnitude + cfg.spread * torch.from_numpy(rng.standard_normal(len(tokens), np.float32))
        size = size.clamp(min=0.1 * cfg.magnitude)
        flipped = torch.from_numpy(rng.random(len(tokens)) < 0.5) & self.two_sided[features]
        codes = SparseCodes.from_rows(features, torch.where(flipped, -size, size), tokens, (n_tokens, cfg.n_features))
        x = codes.decode(self.directions) + self.bias
        if cfg.noise:
            x += cfg.noise * torch.from_numpy(rng.standard_normal((n_tokens, cfg.d_in), np.float32))
        return x, codes

    def batches(self, batch_size: int, seed: int = 0) -> "PlantedBatches":
        """Batches without end, for `SAE.fit`; batch i is `sample(batch_size, (seed, i))`.

        Args:
            batch_size: tokens per batch.
            seed: of the batches.
        """
        return PlantedBatches(self, batch_size, seed)

    @cached_property
    def children(self) -> Int[np.ndarray, "n_parents branching"]:
        """Children of each feature that has some, in the order of `np.flatnonzero(has_children)`."""
        nested = np.flatnonzero(self.parents >= 0)
        return nested[np.argsort(self.parents[nested], kind="stable")].reshape(-1, self.cfg.branching)

    def _fire(self, n_tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Token and feature of every code."""
        free = np.flatnonzero(self.parents < 0)
        factors = rng.standard_normal((n_tokens, self.cfg.n_factors)).astype(np.float32)
        parts = [
            self._fire_free(part, factors, rng) for part in np.array_split(free, -(-len(free) * n_tokens // BLOCK))
        ]
        tokens, features = (np.concatenate(column) for column in zip(*parts, strict=True))
        found = [(tokens, features)]
        owner = np.full(self.cfg.n_features, -1)
        if len(self.children):
            owner[self.parents[self.children[:, 0]]] = np.arange(len(self.children))
        for _ in range(self.cfg.depth if len(self.children) else 0):
            tokens, features = found[-1]
            tokens, families = tokens[owner[features] >= 0], owner[features[owner[features] >= 0]]
            ends = np.cumsum(self._shares[families], axis=1)
            choice = (rng.random((len(families), 1)) >= ends).sum(1)
            some = choice < self.cfg.branching
            found.append((tokens[some], self.children[families[some], choice[some]]))
        return np.concatenate([t for t, _ in found]), np.concatenate([f for _, f in found])

    @cached_property
    def _shares(self) -> Float[np.ndarray, "n_parents branching"]:
        """Probability that each child fires where its parent does."""
        return self.rates[self.children] / self.rates[self.parents[self.children[:, :1]]]

    def _fire_free(
        self, features: np.ndarray, factors: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes of features without a parent.

        Tokens of a rare feature are drawn at its largest rate, then thinned to their own: that costs as much as there
        are codes, not a draw for each token and feature.
        """
        from scipy.special import ndtr, ndtri

        loadings = self._loadings[features].astype(np.float32)
        mixed = loadings @ factors.T
        rest = np.sqrt(1 - (loadings.astype(np.float64) ** 2).sum(1))
        floor = ndtri(self.rates[features])  # fires where its own Gaussian is below (floor + mix) / rest
        largest = ndtr((floor + mixed.max(1)) / rest)
        often = np.flatnonzero(largest > OFTEN)
        rows, tokens = (
            rng.random((len(often), len(factors))) < ndtr((floor[often, None] + mixed[often]) / rest[often, None])
        ).nonzero()
        counts = rng.binomial(len(factors), np.where(largest > OFTEN, 0, largest))
        rare = np.repeat(np.arange(len(features)), counts)
        drawn = _draw_distinct(len(factors), rare, rng)
        rate = ndtr((floor[rare] + mixed[rare, drawn]) / rest[rare])
        kept = rng.random(len(rare)) * largest[rare] < rate
        return np.concatenate([tokens, drawn[kept]]), features[np.concatenate([often[rows], rare[kept]])]


class PlantedBatches:
    """Iterator over batches of a `PlantedWorld`; see `PlantedWorld.batches`."""

    def __init__(self, world: PlantedWorld, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.world, self.batch_size, self.seed, self._number = world, batch_size, seed, 0

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.world.cfg.d_in

    def __iter__(self) -> "PlantedBatches":
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        x, _ = self.world.sample(self.batch_size, (self.seed, self._number))
        self._number += 1
        return x

    def state_dict(self) -> dict[str, Any]:
        """Seed and number of the next batch."""
        return {"seed": self.seed, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`."""
        self.seed, self._number = int(state["seed"]), int(state["number"])


def _plant_trees(cfg: PlantedConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Parent and level of each feature; those outside of trees have no parent and level 0.

    Features are numbered so that a parent comes before its children.
    """
    parents, levels = np.full(cfg.n_features, -1), np.zeros(cfg.n_features, np.int64)
    if cfg.n_roots:
        members = rng.permutation(cfg.n_features)[: cfg.n_nested].reshape(cfg.n_roots, -1)
        members.sort(axis=1)
        ends = np.cumsum([cfg.branching**level for level in range(cfg.depth + 1)])
        place = np.arange(1, cfg.tree_size)
        parents[members[:, 1:]] = members[:, (place - 1) // cfg.branching]
        levels[members] = np.searchsorted(ends, np.arange(cfg.tree_size), side="right")
    return parents, levels


def _draw_rates(cfg: PlantedConfig, parents: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Rates with a mean sum of `l0`: Zipfian, but for children of one parent, whose sum stays below its rate."""
    plain = (np.arange(cfg.n_features) + 1.0) ** -cfg.zipf

    def limit(scale: float) -> np.ndarray:
        rates = np.minimum(scale * plain, LARGEST_RATE)
        for level in range(1, int(levels.max(initial=0)) + 1):
            here = np.flatnonzero(levels == level)
            sums = np.bincount(parents[here], rates[here], minlength=cfg.n_features)
            over = np.maximum(1, sums / (LARGEST_RATE * rates))
            rates[here] /= over[parents[here]]
        return rates

    low, high = 0.0, LARGEST_RATE / plain[-1]
    if limit(high).sum() < cfg.l0:
        raise ValueError(
            f"`l0` must be at most {limit(high).sum():.1f} for these trees, whose siblings exclude each other, got "
            f"{cfg.l0}; lower it or plant fewer trees."
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if limit(middle).sum() < cfg.l0 else (low, middle)
    return limit(high)


def _draw_distinct(n: int, owners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A number below n for each entry, distinct among those of one owner: repeated ones are drawn again."""
    numbers = rng.integers(n, size=len(owners))
    while True:
        keys = owners * np.int64(n) + numbers
        _, first = np.unique(keys, return_index=True)
        if len(first) == len(keys):
            return numbers
        again = np.ones(len(keys), bool)
        again[first] = False
        numbers[again] = rng.integers(n, size=int(again.sum()))


def _push_apart(rows: Tensor, overlap: float) -> Tensor:
    """The directions moved until no two have a larger |cosine| than `overlap`: each step takes away from every row what
    its cosines with others exceed a little less than that by.
    """
    goal, size = 0.97 * overlap, max(1, BLOCK // len(rows))
    for _ in range(SEPARATION_STEPS):
        worst, moved = 0.0, torch.empty_like(rows)
        for start in range(0, len(rows), size):
            cosines = rows[start : start + size] @ rows.T
            cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = 0
            worst = max(worst, float(cosines.abs().max()))
            excess = cosines - cosines.clamp(-goal, goal)
            moved[start : start + size] = rows[start : start + size] - 0.5 * excess @ rows
        if worst <= overlap:
            return rows
        rows = moved / moved.norm(dim=1, keepdim=True)
    raise ValueError(
        f"`overlap` must be one that {len(rows)} directions can have in {rows.shape[1]} dimensions: {overlap} was not "
        f"reached, the largest |cosine| is {worst:.3f}; give a larger one."
    )
