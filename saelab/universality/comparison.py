"""`compare`: match the features of two dictionaries, with p values from a permutation test.

The two sides are codes of two stores on common rows, or directions of two dictionaries. Baselines are the similarity
of untrained dictionaries, which universal features must exceed, and neurons or principal components of two activation
spaces, matched as features are. Several processes compare together.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.collecting.harvesting import sae_fingerprint
from saelab.functional.indices import find_runs
from saelab.functional.statistics import adjust
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.feature_store import FeatureStore
from saelab.training.ranks import RankGrid
from saelab.universality.comparison_sources import NULL, ComparisonSource, DirectionSource, NullConfig, StoreSource
from saelab.universality.matching import Comparison, Matches, assign, find_mutual, pooled_p, raise_floor
from saelab.universality.nearest import Nearest
from saelab.universality.similarity import ActivationAxes, ComparedCodes, Similarity, choose_similarity

UntrainedSources: TypeAlias = FeatureStore | SAE | tuple[FeatureStore | SAE | None, FeatureStore | SAE | None] | None
EXACT = 2**22  # pairs of features up to which the assignment considers all of them
Basis = Literal["neurons", "pca"]


def compare(
    a: FeatureStore | SAE,
    b: FeatureStore | SAE,
    *,
    untrained: UntrainedSources = None,
    similarity: Similarity | None = None,
    sides: bool = False,
    m: int = 10,
    min_count: int = 10,
    null: NullConfig = NULL,
    seed: int = 0,
    progress: bool = True,
    baselines: Mapping[str, FeatureStore | SAE] | None = None,
    mesh: Any = None,
) -> Comparison:
    """The best partner of every feature of one dictionary in another, with p values and false discovery rates.

    The dictionaries are two stores of the same text, or two SAEs of one activation space. Stores of different
    tokenizers are aligned by the characters of their documents.

    Null distribution: the rows of `b` are permuted `n_shifts` times, in blocks within documents that change places and
    are each rotated by a random step, which keeps runs and firing rates but no period of the text; the best partners of
    `n_null` features are then searched again (for directions: of random ones). p is pooled over features that fire
    about as often. q is the false discovery rate; a match is universal where q <= `fdr` and the similarity is at least
    `min_effect`. `n_shifts`, `n_null`, `fdr` and `min_effect` are fields of `null`, a `NullConfig`.

    This null is a weak one: an untrained dictionary shares much with any other of the same text. With `untrained`, its
    matches are reported next to those of a and b, and a universal match must also exceed the best similarities of 95 %
    of its features.

    Memory: the codes of the text (up to 2^26 at a time) and 10 best partners a feature, never d_a x d_b.

    Args:
        a: feature store or SAE.
        b: feature store of the same text, or SAE of the same activation space.
        untrained: untrained dictionary of b's shape on the same text (`sl.collecting.harvest_untrained`), or a pair of
            a's and b's, of which either may be None; None compares with none.
        similarity: for stores "correlation" (default), Pearson's r of the codes over all common tokens, zeros included;
            "documents", the same of codes averaged by document; "phi", the same of firing (0 or 1); "jaccard", |both
            fire| / |either fires|. For SAEs "decoder" (default) or "encoder", the cosine of directions. Signed codes
            are matched by |r|, and a negative r means flipped.
        sides: treat positive and negative codes of signed stores as features of their own, 2 j and 2 j + 1.
        m: nearest features considered for each.
        min_count: number of tokens on which a matched pair must fire together.
        null: permutations, false discovery rate and least similarity of a universal match.
        seed: seed of the permutations.
        progress: whether to show progress bars.
        baselines: other dictionaries by name that a's features are matched with in place of b, such as those of
            `fit_baselines`; stores where stores are compared.
        mesh: `DeviceMesh` of processes that compare together, each of which calls this with the same arguments; None is
            this process alone. Each compares a share of a's features with all of b and searches some of the
            permutations, and all return what one process would.

    Raises:
        ValueError: for a store and an SAE, an option out of range, and texts or spaces with nothing in common.
        RuntimeError: where another process failed.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=40))
    >>> found = compare(sae, sae, progress=False)
    >>> len(found.mutual), found.a.partners[:3].tolist()
    (40, [0, 1, 2])
    """
    ranks, stores = RankGrid.of(mesh), isinstance(a, FeatureStore)
    of_a, of_b = untrained if isinstance(untrained, tuple) else (None, untrained)
    others = {"untrained a": of_a, "untrained b": of_b, **(baselines or {})}
    with ranks.together():
        similarity = _check(a, b, list(others.values()), similarity, m, min_count)
    facts = {"compared": [_identify(one) for one in (a, b)], "baselines": {n: _identify(x) for n, x in others.items()}}
    options = {"similarity": similarity, "sides": sides, "m": m, "min_count": min_count, "null": null, "seed": seed}
    ranks.require_equal(facts | options)

    def judge(one: Any, other: Any) -> Comparison:
        work: ComparisonSource
        with ranks.together():
            if stores:
                work = StoreSource.make(one, other, similarity, sides, min_count, progress and ranks.is_first, ranks)
            else:
                work = DirectionSource.make(one, other, similarity, progress and ranks.is_first, ranks)
        return conclude(work, similarity, m, min_count, null, seed)

    floors = [judge(one, other) for one, other in ((of_a, b), (a, of_b)) if one is not None and other is not None]
    found = raise_floor(judge(a, b), floors)
    return replace(found, baselines={name: judge(a, one).a for name, one in (baselines or {}).items()})


def _check(
    a: FeatureStore | SAE,
    b: FeatureStore | SAE,
    others: "list[FeatureStore | SAE | None]",
    similarity: str | None,
    m: int,
    min_count: int,
) -> Similarity:
    """The similarity by which two dictionaries are compared; ValueError where they cannot be."""
    stores = isinstance(a, FeatureStore)
    if stores != isinstance(b, FeatureStore):
        raise ValueError("`compare` takes two feature stores or two SAEs, got one of each. Harvest the SAE first.")
    chosen = choose_similarity(similarity, stores)
    if min(m, min_count) < 1:
        raise ValueError(f"`m` and `min_count` must be at least 1, got {m} and {min_count}.")
    if any(isinstance(one, FeatureStore) != stores for one in others if one is not None):
        raise ValueError(
            "`untrained` and `baselines` must be stores where stores are compared and SAEs where SAEs are, got others."
        )
    return chosen


def _identify(one: FeatureStore | SAE | None) -> str | None:
    """Hash by which processes compare what they have."""
    if one is None:
        return None
    return one.fingerprint if isinstance(one, FeatureStore) else sae_fingerprint(one)


def conclude(
    work: ComparisonSource, similarity: str, m: int, min_count: int, null: NullConfig, seed: int
) -> Comparison:
    """The finished comparison of two sources: partners, p values and one-to-one assignment.

    Args:
        work: the two sides that are compared, with their similarities.
        similarity: name of the similarity, stored in the result.
        m: nearest features considered for each.
        min_count: number of rows on which a matched pair must fire together.
        null: permutations, false discovery rate and least similarity of a universal match.
        seed: seed of the permutations.
    """
    d_a, d_b = (len(fires) for fires in work.fires)
    exact = d_a * d_b <= EXACT
    wide = max(d_a, d_b) if exact else m
    nearest = work.nearest(wide)
    by_chance = work.search_chance(null, seed)
    sides = []
    for side, found in enumerate(nearest):
        chance = [(features, sizes) for which, features, sizes in by_chance if which == side]
        sides.append(_judge(work, side, found, chance, m, min_count, null))
    with work.ranks.together():
        pairs, values = assign(*nearest)
    both = work.count(pairs)
    kept = (both < 0) | (both >= min_count)
    return Comparison(
        similarity=similarity, a=sides[0], b=sides[1], mutual=find_mutual(sides[0].partners, sides[1].partners),
        pairs=pairs[kept], values=values[kept], exact=exact, signed=work.signed, m=m, n_shifts=null.n_shifts,
        fdr=null.fdr, min_effect=null.min_effect, seed=seed, **work.facts,
    )  # fmt: skip


def _judge(
    work: ComparisonSource,
    side: int,
    found: Nearest,
    chance: list[tuple[np.ndarray, np.ndarray]],
    m: int,
    min_count: int,
    null: NullConfig,
) -> Matches:
    """The partners of one side's features, with p and q from the null distribution."""
    partners, values, both = _choose(work, side, found, m, min_count)
    fires, rates, sizes = work.fires[side], work.rates[side], np.abs(values)
    by_chance = np.concatenate([np.nan_to_num(np.abs(sizes)) for _, sizes in chance] or [np.empty(0)])
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
        universal=known & (q <= null.fdr) & (np.nan_to_num(sizes) >= null.min_effect), chance=levels,
        nearest=Nearest(found.indices[:, :m], found.values[:, :m]),
    )  # fmt: skip


def _choose(
    work: ComparisonSource, side: int, found: Nearest, m: int, min_count: int
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


def compare_neurons_or_pcs(
    a: Activations,
    b: Activations,
    basis: Basis = "neurons",
    *,
    m: int = 10,
    null: NullConfig = NULL,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """The comparison of `compare` for neurons, or principal components, of two activation spaces instead of features.

    Their values on the same tokens are correlated, in absolute value, with the same assignment, null distribution and
    effect size as for features. A dictionary adds something where its features recur more often than these do.

    Args:
        a: activations of one model at one hook point.
        b: activations on the same tokens, of another model or hook point.
        basis: "neurons" takes the axes of the space, "pca" the eigenvectors of the covariance.
        m: nearest axes considered for each.
        null: permutations of the rows of `b`, false discovery rate and least similarity of a universal match.
        seed: seed of the permutations.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the basis does not exist, or the two sides are not of the same tokens.

    >>> acts = sl.Activations.from_tensor(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))
    >>> [round(float(value), 3) for value in compare_neurons_or_pcs(acts, acts, "pca", progress=False).values]
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if basis not in ("neurons", "pca"):
        raise ValueError(f"`basis` must be neurons or pca, got {basis!r}.")
    columns = ((a.token_ids, b.token_ids), (a.doc_ids, b.doc_ids))
    if len(a) != len(b) or any(x is not None and y is not None and not torch.equal(x, y) for x, y in columns):
        raise ValueError(
            f"`a` and `b` must be of the same tokens, got {len(a)} and {len(b)} rows, or others. Collect both with one "
            "mask on one text."
        )
    sides = ComparedCodes(ActivationAxes.of(a, basis)), ComparedCodes(ActivationAxes.of(b, basis))
    names = tuple(f"{basis} of {acts.hook_point or 'activations'}" for acts in (a, b))
    facts = {"sources": names, "sides": False, "n_rows": len(a), "n_tokens": len(a)}
    documents = None if a.doc_ids is None else find_runs(a.doc_ids.numpy())
    work = StoreSource.of(sides, "correlation", True, 1, progress, facts, documents)
    return conclude(work, "correlation", m, 1, null, seed)
