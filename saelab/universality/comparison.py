"""`compare`: which features of two dictionaries are the same, beside what chance would give."""

from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int

from saelab.labelling.significance import adjust
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.universality.floors import above, measure_floor
from saelab.universality.matches import Comparison
from saelab.universality.matching import assign, find_mutual, pooled_p
from saelab.universality.nearest import Nearest
from saelab.universality.partners import Matches
from saelab.universality.sources import DirectionSource, Source, StoreSource

Similarity = Literal["correlation", "documents", "phi", "jaccard", "decoder", "encoder"]
Untrained: TypeAlias = FeatureStore | SAE | tuple[FeatureStore | SAE | None, FeatureStore | SAE | None] | None
EXACT = 2**22
"""Pairs of features up to which the assignment considers all of them."""


def compare(
    a: FeatureStore | SAE,
    b: FeatureStore | SAE,
    *,
    untrained: Untrained = None,
    similarity: Similarity | None = None,
    sides: bool = False,
    m: int = 10,
    min_count: int = 10,
    n_shifts: int = 8,
    n_null: int = 1024,
    fdr: float = 0.05,
    min_effect: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """For every feature of two stores of the same text, or of two SAEs of one space, its best partner in the other.

    correlation (default for stores): Pearson's r of the codes over all common tokens, zeros too; documents: of their
    means by document; phi: of firing at all; jaccard: |both fire| / |either fires|; decoder (default for SAEs) and
    encoder: cosine of directions. Signed codes are matched by |r|, and a negative r means flipped; with `sides` the
    positive and negative codes of signed stores are features of their own, 2 j and 2 j + 1. Stores of different
    tokenizers are aligned by the characters of their documents.

    A match fires together on at least `min_count` tokens. Chance: the rows of `b` are put elsewhere `n_shifts` times,
    in blocks within documents that change places and are turned round one by one, which keeps runs and rates but no
    period of the text, and the best partners of `n_null` features are sought anew (for directions: of random ones). p
    is pooled over features that fire about as often and can be no less than 1 / (n_shifts x n_null + 1): small
    dictionaries need more shifts. q controls false discoveries; universal is what has q <= `fdr` and a similarity of at
    least `min_effect`.

    Chance is a low floor: an untrained dictionary shares much with any other of the same text. `untrained` is one of
    b's shape on the same text (`sl.harvest_untrained`), or a pair of a's and b's, of which either may be None. What it
    shares stands beside what a and b do, and what is universal must reach what 95 % of its features stay below, too.

    Memory: the codes of the text (up to 2^26 at a time) and 10 best partners a feature, never d_a x d_b. ValueError for
    sources of two kinds, a similarity they do not have, texts or spaces with nothing in common.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=40))
    >>> found = compare(sae, sae, progress=False)
    >>> len(found.mutual), found.a.partners[:3].tolist()
    (40, [0, 1, 2])
    """
    stores = isinstance(a, FeatureStore)
    if stores != isinstance(b, FeatureStore):
        raise ValueError("`compare` takes two feature stores or two SAEs, got one of each. Harvest the SAE first.")
    similarity = choose_similarity(similarity, stores)
    if min(m, min_count, n_null) < 1 or n_shifts < 0 or not 0 < fdr < 1:
        raise ValueError(
            f"`m`, `min_count`, `n_null` must be at least 1, `n_shifts` at least 0, `fdr` in 0..1, got {m}, "
            f"{min_count}, {n_null}, {n_shifts}, {fdr}."
        )
    of_a, of_b = untrained if isinstance(untrained, tuple) else (None, untrained)
    if any(isinstance(one, FeatureStore) != stores for one in (of_a, of_b) if one is not None):
        raise ValueError("`untrained` must be stores beside stores and SAEs beside SAEs, got another kind.")

    def judge(one: Any, other: Any) -> Comparison:
        work: Source
        if stores:
            work = StoreSource.make(one, other, similarity, sides, min_count, progress)
        else:
            work = DirectionSource.make(one, other, similarity, progress)
        return conclude(work, similarity, m, min_count, n_shifts, n_null, fdr, min_effect, seed)

    beside = [judge(one, other) for one, other in ((of_a, b), (a, of_b)) if one is not None and other is not None]
    return raise_floor(judge(a, b), beside)


def choose_similarity(similarity: str | None, stores: bool) -> Similarity:
    """The similarity that is asked for, or that of the kind; ValueError for one that stores, or SAEs, do not have."""
    kinds: tuple[Similarity, ...] = get_args(Similarity)
    allowed = kinds[:4] if stores else kinds[4:]
    found = next((kind for kind in allowed if similarity in (None, kind)), None)
    if found is None:
        raise ValueError(f"`similarity` must be one of {list(allowed)}, got {similarity!r}.")
    return found


def raise_floor(found: Comparison, beside: list[Comparison]) -> Comparison:
    """The same with comparisons in which one side is untrained as a second floor of what is universal."""
    if not beside:
        return found
    sides = []
    for name in ("a", "b"):
        side = getattr(found, name)
        floor = measure_floor(side, [getattr(one, name) for one in beside])
        sides.append(replace(side, universal=above(side, floor), untrained=floor))
    return replace(found, a=sides[0], b=sides[1])


def conclude(
    work: Source,
    similarity: str,
    m: int,
    min_count: int,
    n_shifts: int,
    n_null: int,
    fdr: float,
    min_effect: float,
    seed: int,
) -> Comparison:
    """Partners, chance and assignment."""
    d_a, d_b = (len(fires) for fires in work.fires)
    exact = d_a * d_b <= EXACT
    wide = max(d_a, d_b) if exact else m
    nearest = work.nearest(work.blocks(), d_a, d_b, wide)
    rng = np.random.default_rng(seed)
    by_chance = list(work.chance(n_shifts, n_null, rng))
    sides = []
    for side, found in enumerate(nearest):
        chance = [(features, other) for which, features, other in by_chance if which == side]
        sides.append(_judge(work, side, found, chance, m, min_count, fdr, min_effect))
    pairs, values = assign(*nearest)
    both = work.count(pairs)
    kept = (both < 0) | (both >= min_count)
    return Comparison(
        similarity=similarity, a=sides[0], b=sides[1], mutual=find_mutual(sides[0].partners, sides[1].partners),
        pairs=pairs[kept], values=values[kept], exact=exact, signed=work.signed, m=m, n_shifts=n_shifts, fdr=fdr,
        min_effect=min_effect, seed=seed, **work.facts,
    )  # fmt: skip


def _judge(
    work: Source,
    side: int,
    found: Nearest,
    chance: list[tuple[np.ndarray, Nearest]],
    m: int,
    min_count: int,
    fdr: float,
    min_effect: float,
) -> Matches:
    """The partners of one side, and what chance makes of them."""
    partners, values, both = _choose(work, side, found, m, min_count)
    fires, rates, sizes = work.fires[side], work.rates[side], np.abs(values)
    by_chance = np.concatenate([np.nan_to_num(np.abs(other.values[:, 0])) for _, other in chance] or [np.empty(0)])
    often = np.concatenate([rates[features] for features, _ in chance] or [np.empty(0, np.int64)])
    known = partners >= 0
    p, q = np.ones(len(fires)), np.ones(len(fires))
    p[known] = pooled_p(sizes[known], by_chance, rates[known], often)
    q[fires > 0] = adjust(p[fires > 0])
    levels = (float("nan"), float("nan"))
    if len(by_chance):
        levels = float(np.median(by_chance)), float(np.quantile(by_chance, 0.95))
    return Matches(
        fires=fires, variance=work.weights[side], partners=partners, similarity=values, n_both=both, p=p, q=q,
        universal=known & (q <= fdr) & (np.nan_to_num(sizes) >= min_effect), chance=levels,
        nearest=Nearest(found.indices[:, :m], found.values[:, :m]),
    )  # fmt: skip


def _choose(
    work: Source, side: int, found: Nearest, m: int, min_count: int
) -> tuple[Int[np.ndarray, "d"], Float[np.ndarray, "d"], Int[np.ndarray, "d"]]:
    """The best partner that each feature fires with often enough, its similarity, and how often."""
    indices, values = found.indices[:, :m], found.values[:, :m]
    both = np.full(indices.shape, -2)
    for ranks in (slice(0, 1), slice(1, m)):  # nearly always the first will do
        here = np.zeros(indices.shape, bool)
        here[:, ranks] = indices[:, ranks] >= 0
        here &= ~_enough(both, min_count).any(1, keepdims=True)
        features, at = np.nonzero(here)
        pairs = np.stack([features, indices[features, at]], 1)
        both[features, at] = work.count(pairs if side == 0 else pairs[:, ::-1])
    good = _enough(both, min_count)
    at, rows = good.argmax(1), np.arange(len(good))
    any_good = good.any(1)
    return (
        np.where(any_good, indices[rows, at], -1),
        np.where(any_good, values[rows, at], np.nan),
        np.where(any_good, both[rows, at], 0),
    )


def _enough(both: np.ndarray, min_count: int) -> np.ndarray:
    """-1 is for what cannot be counted, -2 for what was not yet."""
    return (both >= min_count) | (both == -1)
