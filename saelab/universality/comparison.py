"""`compare`: match the features of two dictionaries, with p values from a permutation test.

The two sides are codes of two stores on common rows, or directions of two dictionaries. Baselines are the similarity
of untrained dictionaries, which universal features must exceed, and neurons or principal components of two activation
spaces, matched as features are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.functional.indices import find_runs, move_blocks
from saelab.functional.statistics import adjust
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import shareable
from saelab.stores.jobs import hidden
from saelab.universality.alignment import AlignedRows, CommonRows, Overview, find_common_rows, format_counts
from saelab.universality.matching import (
    Comparison,
    Matches,
    Nearest,
    assign,
    find_mutual,
    find_nearest,
    pooled_p,
    raise_floor,
)
from saelab.universality.similarity import (
    ActivationAxes,
    ComparedCodes,
    Moments,
    Similarity,
    SimilarityBlock,
    choose_similarity,
    correlation_blocks,
    cosine_blocks,
    count_pairs,
)

UntrainedSources: TypeAlias = FeatureStore | SAE | tuple[FeatureStore | SAE | None, FeatureStore | SAE | None] | None
EXACT = 2**22  # pairs of features up to which the assignment considers all of them
Basis = Literal["neurons", "pca"]


@dataclass(frozen=True, kw_only=True)
class NullConfig:
    """Permutation test of a comparison: how chance is measured, and when a match is universal.

    p is at least 1 / (n_shifts x n_null + 1), so small dictionaries need more permutations.
    """

    n_shifts: int = 8
    """permutations that the null distribution is taken from; 0 for none"""
    n_null: int = 1024
    """features whose best partner is searched in each permutation"""
    fdr: float = 0.05
    """false discovery rate, in (0, 1), up to which a match is universal"""
    min_effect: float = 0.5
    """similarity that a universal match must reach"""

    def __post_init__(self) -> None:
        if self.n_shifts < 0 or self.n_null < 1 or not 0 < self.fdr < 1:
            raise ValueError(
                f"`n_shifts` must be at least 0, `n_null` at least 1 and `fdr` in 0..1, got {self.n_shifts}, "
                f"{self.n_null} and {self.fdr}."
            )


NULL = NullConfig()


@dataclass(frozen=True, eq=False)
class ComparisonSource:
    """Base class of the two sides of a comparison: two stores on common rows, or the directions of two SAEs."""

    signed: bool
    progress: bool
    fires: tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]
    weights: tuple[Float[np.ndarray, "d_a"], Float[np.ndarray, "d_b"]]
    """weight of each feature in shares by variance"""
    facts: dict[str, Any]

    def blocks(self) -> Iterator[SimilarityBlock]:
        """All similarities, block by block."""
        raise NotImplementedError

    def chance(self, null: NullConfig, rng: "np.random.Generator") -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """The null distribution of best partners, for sides that have nothing in common.

        Yields:
            The side (0 or 1), some of its features, and their best partners on the other side.
        """
        raise NotImplementedError

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Number of rows on which both features of each pair fire; -1 for directions."""
        return np.full(len(pairs), -1)

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """Number of firings of each feature, on which the null depends; 0 for directions."""
        return self.fires

    def nearest(self, blocks: Iterator[SimilarityBlock], d_a: int, d_b: int, m: int) -> tuple[Nearest, Nearest]:
        """The best partners of the features of both sides, searched with a progress bar over blocks.

        Args:
            blocks: similarities, block by block of features of a.
            d_a: number of features of a.
            d_b: number of features of b.
            m: number of partners kept for each feature.
        """
        from tqdm.auto import tqdm

        listed = list(blocks)
        return find_nearest(tqdm(listed, unit=" blocks", disable=hidden(self.progress)), d_a, d_b, m, self.signed)


@dataclass(frozen=True, eq=False)
class StoreSource(ComparisonSource):
    """Codes of two stores on common rows."""

    a: ComparedCodes
    b: ComparedCodes
    seen: tuple[Moments, Moments]
    min_count: int
    jaccard: bool
    documents: Int[np.ndarray, "n_docs"] | None = None
    """first row of each document; None where rows are documents, or documents are not known"""

    @classmethod
    def make(
        cls, a: FeatureStore, b: FeatureStore, similarity: str, sides: bool, min_count: int, progress: bool
    ) -> "StoreSource":
        """The codes of two stores on the rows that both have.

        Args:
            a: the first store.
            b: the second store, of the same text.
            similarity: "correlation", "documents", "phi" or "jaccard".
            sides: True treats positive and negative codes as features of their own.
            min_count: features with fewer firings match nothing.
            progress: whether to show progress bars.
        """
        common = find_common_rows(a, b) or AlignedRows(a, b)
        starts = a.find_documents(common.rows if isinstance(common, AlignedRows) else common[0])
        codes = _common(a, b, common, similarity, sides, starts)
        facts = {
            "alignment": str(Overview(**format_counts(common))) if isinstance(common, AlignedRows) else "",
            "n_rows": codes[0].n_rows,
            "n_tokens": codes[0].n_tokens,
            "sides": sides,
            "sources": (str(a.folder), str(b.folder)),
        }
        signed = similarity in ("correlation", "documents") and not sides and (a.signed or b.signed)
        documents = None if similarity == "documents" else starts
        return cls.of(codes, similarity, signed, min_count, progress, facts, documents)

    @classmethod
    def of(
        cls,
        codes: tuple[ComparedCodes, ComparedCodes],
        similarity: str,
        signed: bool,
        min_count: int,
        progress: bool,
        facts: dict[str, Any],
        documents: Int[np.ndarray, "n_docs"] | None = None,
    ) -> "StoreSource":
        """The source of two code matrices whose rows already correspond.

        Args:
            codes: codes of a and of b.
            similarity: "correlation", "documents", "phi" or "jaccard".
            signed: True ranks similarities by absolute value.
            min_count: features with fewer firings match nothing.
            progress: whether to show progress bars.
            facts: further fields of the resulting `Comparison`.
            documents: first row of each document, within which the null moves rows; None for none.
        """
        seen = Moments.of(codes[0]), Moments.of(codes[1])
        return cls(
            signed=signed, progress=progress, fires=(seen[0].fires, seen[1].fires),
            weights=(seen[0].spread ** 2, seen[1].spread ** 2), facts=facts, a=codes[0], b=codes[1], seen=seen,
            min_count=min_count, jaccard=similarity == "jaccard", documents=documents,
        )  # fmt: skip

    def blocks(self) -> Iterator[SimilarityBlock]:
        """Correlations or Jaccard indices, block by block of a's features."""
        return correlation_blocks(self.a, self.b, self.seen, self.min_count, self.jaccard)

    def chance(self, null: NullConfig, rng: "np.random.Generator") -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """The null distribution: best partners of `n_null` features of each side after each of `n_shifts` permutations
        of rows.

        Rows move in blocks within documents; rows that are documents are permuted one by one.
        """
        n = self.a.n_rows
        for _ in range(null.n_shifts if n > 2 else 0):
            grouped = self.a.groups is not None  # rows are documents, which are exchangeable
            order = rng.permutation(n) if grouped else move_blocks(self.documents, n, rng)
            for side, (one, other) in enumerate(((self.a, self.b), (self.b, self.a))):
                known = np.flatnonzero(self.seen[side].scale(self.min_count))
                chosen = np.sort(rng.permutation(known)[: null.n_null])
                seen = self.seen[side].only(chosen), self.seen[1 - side]
                blocks = correlation_blocks(one.only(chosen), other.moved(order), seen, self.min_count, self.jaccard)
                yield side, chosen, find_nearest(blocks, len(chosen), other.width, 1, self.signed)[0]

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Number of rows on which both features of each pair fire."""
        return count_pairs(self.a, self.b, pairs)


def _common(
    a: FeatureStore, b: FeatureStore, common: CommonRows | AlignedRows, similarity: str, sides: bool, starts: np.ndarray
) -> tuple[ComparedCodes, ComparedCodes]:
    """The codes of both stores on their common rows, averaged by document for similarity "documents"."""
    values: Any = "sides" if sides else "firing" if similarity in ("phi", "jaccard") else "codes"
    if isinstance(common, AlignedRows):
        first, second = ComparedCodes(a, values, rows=common.rows), ComparedCodes(b, values, weights=common)
    else:
        first, second = (ComparedCodes(store, values, rows=rows) for store, rows in zip((a, b), common, strict=True))
    if similarity != "documents":
        return first, second
    return replace(first, groups=starts), replace(second, groups=starts)


@dataclass(frozen=True, eq=False)
class DirectionSource(ComparisonSource):
    """Decoder or encoder directions of two dictionaries of one activation space."""

    a: Float[np.ndarray, "d_a d"]
    b: Float[np.ndarray, "d_b d"]

    @classmethod
    def make(cls, a: SAE, b: SAE, similarity: str, progress: bool) -> "DirectionSource":
        """The directions of two SAEs; ValueError where they are not of one space.

        Args:
            a: the first SAE.
            b: the second SAE.
            similarity: "decoder" compares rows of W_dec, "encoder" columns of W_enc.
            progress: whether to show progress bars.
        """
        rows = [sae.W_dec if similarity == "decoder" else sae.W_enc.T for sae in (a, b)]
        d_a, d_b = (x.shape[1] for x in rows)
        if d_a != d_b:
            raise ValueError(
                f"Directions must be of one space to be compared, got d_in {d_a} and {d_b}. Harvest both SAEs on one "
                "text, and compare the stores."
            )
        first, second = (x.detach().float().cpu().numpy() for x in rows)
        live = [(np.linalg.norm(x, axis=1) > 0).astype(np.int64) for x in (first, second)]
        fires, weights = (live[0], live[1]), (np.ones(len(first)), np.ones(len(second)))
        signed = any(sae.cfg.activation.signed for sae in (a, b))
        facts = {"sources": (shareable(a.name_or_path) or str(a), shareable(b.name_or_path) or str(b)), "sides": False}
        return cls(signed=signed, progress=progress, fires=fires, weights=weights, facts=facts, a=first, b=second)

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """Zeros: the null does not depend on the feature."""
        return np.zeros(len(self.a), np.int64), np.zeros(len(self.b), np.int64)

    def blocks(self) -> Iterator[SimilarityBlock]:
        """Cosines, block by block of a's features."""
        return cosine_blocks(self.a, self.b)

    def chance(self, null: NullConfig, rng: "np.random.Generator") -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """The null distribution: best partners of `n_null` random directions on each side, `n_shifts` times."""
        n = null.n_null
        for _ in range(null.n_shifts):
            for side, other in enumerate((self.b, self.a)):
                random = rng.standard_normal((n, other.shape[1]), np.float32)
                found, _ = find_nearest(cosine_blocks(random, other), n, len(other), 1, self.signed)
                yield side, np.zeros(n, np.int64), found


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

    Raises:
        ValueError: for a store and an SAE, an option out of range, and texts or spaces with nothing in common.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=40))
    >>> found = compare(sae, sae, progress=False)
    >>> len(found.mutual), found.a.partners[:3].tolist()
    (40, [0, 1, 2])
    """
    stores = isinstance(a, FeatureStore)
    if stores != isinstance(b, FeatureStore):
        raise ValueError("`compare` takes two feature stores or two SAEs, got one of each. Harvest the SAE first.")
    similarity = choose_similarity(similarity, stores)
    if min(m, min_count) < 1:
        raise ValueError(f"`m` and `min_count` must be at least 1, got {m} and {min_count}.")
    of_a, of_b = untrained if isinstance(untrained, tuple) else (None, untrained)
    others = (of_a, of_b, *(baselines or {}).values())
    if any(isinstance(one, FeatureStore) != stores for one in others if one is not None):
        raise ValueError(
            "`untrained` and `baselines` must be stores where stores are compared and SAEs where SAEs are, got others."
        )

    def judge(one: Any, other: Any) -> Comparison:
        work: ComparisonSource
        if stores:
            work = StoreSource.make(one, other, similarity, sides, min_count, progress)
        else:
            work = DirectionSource.make(one, other, similarity, progress)
        return conclude(work, similarity, m, min_count, null, seed)

    floors = [judge(one, other) for one, other in ((of_a, b), (a, of_b)) if one is not None and other is not None]
    found = raise_floor(judge(a, b), floors)
    return replace(found, baselines={name: judge(a, one).a for name, one in (baselines or {}).items()})


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
    nearest = work.nearest(work.blocks(), d_a, d_b, wide)
    rng = np.random.default_rng(seed)
    by_chance = list(work.chance(null, rng))
    sides = []
    for side, found in enumerate(nearest):
        chance = [(features, other) for which, features, other in by_chance if which == side]
        sides.append(_judge(work, side, found, chance, m, min_count, null))
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
    chance: list[tuple[np.ndarray, Nearest]],
    m: int,
    min_count: int,
    null: NullConfig,
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
