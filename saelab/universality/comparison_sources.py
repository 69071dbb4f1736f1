"""`ComparisonSource`: the two sides of a comparison, their similarities, and their null distribution.

The sides are codes of two stores on common rows, or directions of two dictionaries. Of several processes each takes
every so many features of the first side, and some of the permutations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab.functional.indices import MovedBlocks, move_blocks
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.jobs import hidden
from saelab.stores.sharing import shareable, tell_apart
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together
from saelab.universality.alignment import AlignedRows, CommonRows, Overview, find_common_rows, format_counts
from saelab.universality.nearest import Nearest, find_nearest, join_nearest
from saelab.universality.similarity import (
    ComparedCodes,
    Moments,
    SimilarityBlock,
    correlation_blocks,
    cosine_blocks,
    count_pairs,
    rows_of_blocks,
)


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
    ranks: RankGrid
    """processes that compare together"""
    fires: tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]
    weights: tuple[Float[np.ndarray, "d_a"], Float[np.ndarray, "d_b"]]
    """weight of each feature in shares by variance"""
    facts: dict[str, Any]

    def blocks(self, features: Int[np.ndarray, "n"] | None = None) -> Iterator[SimilarityBlock]:
        """Similarities of some of a's features, or of all, with those of b, block by block; blocks count from 0."""
        raise NotImplementedError

    def chance(
        self, null: NullConfig, rng: np.random.Generator
    ) -> Iterator[tuple[int, np.ndarray, Callable[[], Nearest]]]:
        """The null distribution of best partners, for sides that have nothing in common.

        Yields:
            The side (0 or 1), some of its features, and a function that searches their best partners on the other side.
        """
        raise NotImplementedError

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Number of rows on which both features of each pair fire; -1 for directions."""
        return np.full(len(pairs), -1)

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """Number of firings of each feature, on which the null depends; 0 for directions."""
        return self.fires

    @property
    def share(self) -> Int[np.ndarray, "n"]:
        """The features of a that this process compares with all of b, in increasing order."""
        return np.arange(len(self.fires[0]))[self.ranks.own(len(self.fires[0]))]

    def nearest(self, m: int) -> tuple[Nearest, Nearest]:
        """The best partners of the features of both sides, searched with a progress bar over blocks.

        Args:
            m: number of partners kept for each feature.
        """
        from tqdm.auto import tqdm

        d_a, d_b = (len(fires) for fires in self.fires)
        own = self.share
        with self.ranks.together():
            listed = list(self.blocks(None if self.ranks.alone else own))
        with tqdm(listed, unit=" blocks", disable=hidden(self.progress)) as bar:
            found = find_nearest(bar, len(own), d_b, m, self.signed, self.ranks)
        return found if self.ranks.alone else join_nearest(found, own, min(m, d_a), self.ranks)

    def search_chance(self, null: NullConfig, seed: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The null distribution: side, features and best similarities of each permutation, searched by one process.

        Args:
            null: how chance is measured.
            seed: seed of the permutations, which all processes draw.
        """
        n, drawn, found = self.ranks.size, list[tuple[int, np.ndarray]](), [np.empty(0, np.float32)]

        def search() -> Steps:
            for i, (side, features, find) in enumerate(self.chance(null, np.random.default_rng(seed))):
                drawn.append((side, features))
                if i % n == self.ranks.index:
                    found.append(find().values[:, 0])
                    yield

        run_together(search(), self.ranks)
        values: list[np.ndarray] = [np.empty(0)] * len(drawn)
        for k, part in enumerate(self.ranks.gather_arrays(np.concatenate(found))):
            ends = np.cumsum([len(features) for _, features in drawn[k::n]], dtype=np.int64)
            values[k::n] = np.split(part, ends)[:-1]
        return [(*one, sizes) for one, sizes in zip(drawn, values, strict=True)]


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
        cls,
        a: FeatureStore,
        b: FeatureStore,
        similarity: str,
        sides: bool,
        min_count: int,
        progress: bool,
        ranks: RankGrid = ALONE,
    ) -> "StoreSource":
        """The codes of two stores on the rows that both have.

        Args:
            a: the first store.
            b: the second store, of the same text.
            similarity: "correlation", "documents", "phi" or "jaccard".
            sides: True treats positive and negative codes as features of their own.
            min_count: features with fewer firings match nothing.
            progress: whether to show progress bars.
            ranks: processes that compare together.
        """
        common = find_common_rows(a, b) or AlignedRows(a, b)
        starts = a.find_documents(common.rows if isinstance(common, AlignedRows) else common[0])
        codes = _common(a, b, common, similarity, sides, starts)
        facts = {
            "alignment": str(Overview(**format_counts(common))) if isinstance(common, AlignedRows) else "",
            "n_rows": codes[0].n_rows,
            "n_tokens": codes[0].n_tokens,
            "counted": a.counted,
            "sides": sides,
            "sources": tell_apart(a.folder, b.folder),
        }
        signed = similarity in ("correlation", "documents") and not sides and (a.signed or b.signed)
        documents = None if similarity == "documents" else starts
        return cls.of(codes, similarity, signed, min_count, progress, facts, documents, ranks)

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
        ranks: RankGrid = ALONE,
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
            ranks: processes that compare together.
        """
        seen = Moments.of(codes[0]), Moments.of(codes[1])
        return cls(
            signed=signed, progress=progress, ranks=ranks, fires=(seen[0].fires, seen[1].fires),
            weights=(seen[0].spread ** 2, seen[1].spread ** 2), facts=facts, a=codes[0], b=codes[1], seen=seen,
            min_count=min_count, jaccard=similarity == "jaccard", documents=documents,
        )  # fmt: skip

    def blocks(self, features: Int[np.ndarray, "n"] | None = None) -> Iterator[SimilarityBlock]:
        """Correlations or Jaccard indices, block by block of a's features."""
        a, seen = self.a, self.seen
        if features is not None:
            a, seen = a.only(features), (seen[0].only(features), seen[1])
        return correlation_blocks(a, self.b, seen, self.min_count, self.jaccard)

    def chance(
        self, null: NullConfig, rng: np.random.Generator
    ) -> Iterator[tuple[int, np.ndarray, Callable[[], Nearest]]]:
        """The null distribution: best partners of `n_null` features of each side after each of `n_shifts` permutations
        of rows.

        Rows move in blocks within documents; rows that are documents are permuted one by one.
        """
        n = self.a.n_rows
        for _ in range(null.n_shifts if n > 2 else 0):
            grouped = self.a.groups is not None  # rows are documents, which are exchangeable
            order = rng.permutation(n) if grouped else move_blocks(self.documents, n, rng)
            for side in (0, 1):
                known = np.flatnonzero(self.seen[side].scale(self.min_count))
                chosen = np.sort(rng.permutation(known)[: null.n_null])
                yield side, chosen, partial(self._search, side, chosen, order)

    def _search(self, side: int, chosen: np.ndarray, order: np.ndarray | MovedBlocks) -> Nearest:
        """The best partners of some features of one side on the other, whose rows are permuted."""
        one, other = (self.a, self.b)[side].only(chosen), (self.b, self.a)[side].moved(order)
        seen = self.seen[side].only(chosen), self.seen[1 - side]
        blocks = correlation_blocks(one, other, seen, self.min_count, self.jaccard)
        return find_nearest(blocks, len(chosen), other.width, 1, self.signed)[0]

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Number of rows on which both features of each pair fire."""
        with self.ranks.together():
            own = count_pairs(self.a, self.b, pairs[self.ranks.own(len(pairs))])
        found = np.empty(len(pairs), np.int64)
        for k, part in enumerate(self.ranks.gather_arrays(own)):
            found[k :: self.ranks.size] = part
        return found


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
    def make(cls, a: SAE, b: SAE, similarity: str, progress: bool, ranks: RankGrid = ALONE) -> "DirectionSource":
        """The directions of two SAEs; ValueError where they are not of one space.

        Args:
            a: the first SAE.
            b: the second SAE.
            similarity: "decoder" compares rows of W_dec, "encoder" columns of W_enc.
            progress: whether to show progress bars.
            ranks: processes that compare together.
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
        return cls(
            signed=signed, progress=progress, ranks=ranks, fires=fires, weights=weights, facts=facts, a=first, b=second
        )  # fmt: skip

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """Zeros: the null does not depend on the feature."""
        return np.zeros(len(self.a), np.int64), np.zeros(len(self.b), np.int64)

    @property
    def share(self) -> Int[np.ndarray, "n"]:
        """Every so many of the blocks of one process, whole: products of other blocks differ by rounding."""
        blocks = np.arange(len(self.a)) // rows_of_blocks(len(self.b))
        return np.flatnonzero(blocks % self.ranks.size == self.ranks.index)

    def blocks(self, features: Int[np.ndarray, "n"] | None = None) -> Iterator[SimilarityBlock]:
        """Cosines, block by block of a's features."""
        return cosine_blocks(self.a if features is None else self.a[features], self.b)

    def chance(
        self, null: NullConfig, rng: np.random.Generator
    ) -> Iterator[tuple[int, np.ndarray, Callable[[], Nearest]]]:
        """The null distribution: best partners of `n_null` random directions on each side, `n_shifts` times."""
        n = null.n_null
        for _ in range(null.n_shifts):
            for side, other in enumerate((self.b, self.a)):
                random = rng.standard_normal((n, other.shape[1]), np.float32)
                yield side, np.zeros(n, np.int64), partial(self._search, random, other)

    def _search(self, random: np.ndarray, other: np.ndarray) -> Nearest:
        return find_nearest(cosine_blocks(random, other), len(random), len(other), 1, self.signed)[0]
