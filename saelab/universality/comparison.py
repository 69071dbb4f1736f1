"""Matching of features between two dictionaries, with p values from a permutation test."""

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
"""Number of pairs of features up to which the assignment considers all of them."""


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
    """The best partner of every feature of one dictionary in another, with p values and false discovery rates.

    The dictionaries are two stores of the same text, or two SAEs of one activation space. Stores of different
    tokenizers are aligned by the characters of their documents.

    Null distribution: the rows of `b` are permuted `n_shifts` times, in blocks within documents that change places and
    are each rotated by a random step, which keeps runs and firing rates but no period of the text; the best partners of
    `n_null` features are then searched again (for directions: of random ones). p is pooled over features that fire
    about as often and is at least 1 / (n_shifts x n_null + 1), so small dictionaries need more permutations. q is the
    false discovery rate; a match is universal where q <= `fdr` and the similarity is at least `min_effect`.

    This null is a weak one: an untrained dictionary shares much with any other of the same text. With `untrained`, its
    matches are reported next to those of a and b, and a universal match must also exceed the best similarities of 95 %
    of its features.

    Memory: the codes of the text (up to 2^26 at a time) and 10 best partners a feature, never d_a x d_b.

    Args:
        a: feature store or SAE.
        b: feature store of the same text, or SAE of the same activation space.
        untrained: untrained dictionary of b's shape on the same text (`sl.harvest_untrained`), or a pair of a's and
            b's, of which either may be None; None compares with none.
        similarity: for stores "correlation" (default), Pearson's r of the codes over all common tokens, zeros included;
            "documents", the same of codes averaged by document; "phi", the same of firing (0 or 1); "jaccard", |both
            fire| / |either fires|. For SAEs "decoder" (default) or "encoder", the cosine of directions. Signed codes
            are matched by |r|, and a negative r means flipped.
        sides: True treats positive and negative codes of signed stores as features of their own, 2 j and 2 j + 1.
        m: nearest features considered for each.
        min_count: number of tokens on which a matched pair must fire together.
        n_shifts: permutations that the null distribution is taken from.
        n_null: features whose best partner is searched in each permutation.
        fdr: false discovery rate, in (0, 1), up to which a match is universal.
        min_effect: similarity that a universal match must reach.
        seed: seed of the permutations.
        progress: whether to show progress bars.

    Raises:
        ValueError: one source is a store and the other an SAE, the similarity does not exist for them, an option is out
            of range, or the texts or spaces have nothing in common.

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
    """The similarity that is asked for, or the default; ValueError for one that stores, or SAEs, do not have."""
    kinds: tuple[Similarity, ...] = get_args(Similarity)
    allowed = kinds[:4] if stores else kinds[4:]
    found = next((kind for kind in allowed if similarity in (None, kind)), None)
    if found is None:
        raise ValueError(f"`similarity` must be one of {list(allowed)}, got {similarity!r}.")
    return found


def raise_floor(found: Comparison, beside: list[Comparison]) -> Comparison:
    """The same comparison, universal matches limited to those above the similarity level of untrained dictionaries.

    `beside` are comparisons in which one side is untrained; empty leaves the comparison as it is.
    """
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
    """The finished comparison of two sources: partners, p values and one-to-one assignment.

    Args:
        work: the two sides that are compared, with their similarities.
        similarity: name of the similarity, stored in the result.
        m: nearest features considered for each.
        min_count: number of rows on which a matched pair must fire together.
        n_shifts: permutations that the null distribution is taken from.
        n_null: features whose best partner is searched in each permutation.
        fdr: false discovery rate, in (0, 1), up to which a match is universal.
        min_effect: similarity that a universal match must reach.
        seed: seed of the permutations.
    """
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
    """The partners of one side's features, with p and q from the null distribution."""
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
    for ranks in (slice(0, 1), slice(1, m)):  # the first is nearly always enough
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
    """Whether counts reach `min_count`; -1 marks what cannot be counted, -2 what was not counted yet."""
    return (both >= min_count) | (both == -1)
