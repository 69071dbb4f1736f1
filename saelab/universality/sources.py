"""The two sides of a comparison: codes of two stores on common rows, or directions of two dictionaries."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab.functional.permuting import move_blocks
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.stores.names import shareable
from saelab.stores.progress import hidden
from saelab.universality.aligned import AlignedRows
from saelab.universality.alignment import CommonRows, Overview, find_common_rows, tell_counts
from saelab.universality.codes import Codes
from saelab.universality.nearest import Nearest, find_nearest
from saelab.universality.products import Block, Moments, chunks, correlation_blocks, cosine_blocks, count_both


@dataclass(frozen=True, eq=False)
class Source:
    """Base class of the two sides of a comparison: two stores on common rows, or the directions of two SAEs."""

    signed: bool
    progress: bool
    fires: tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]
    weights: tuple[Float[np.ndarray, "d_a"], Float[np.ndarray, "d_b"]]
    """weight of each feature in shares by variance"""
    facts: dict[str, Any]

    def blocks(self) -> Iterator[Block]:
        """All similarities, block by block."""
        raise NotImplementedError

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
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

    def nearest(self, blocks: Iterator[Block], d_a: int, d_b: int, m: int) -> tuple[Nearest, Nearest]:
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
class StoreSource(Source):
    """Codes of two stores on common rows."""

    a: Codes
    b: Codes
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
            "alignment": str(Overview(**tell_counts(common))) if isinstance(common, AlignedRows) else "",
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
        codes: tuple[Codes, Codes],
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
            signed: True ranks similarities by size.
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

    def blocks(self) -> Iterator[Block]:
        """Correlations or Jaccard indices, block by block of a's features."""
        return correlation_blocks(self.a, self.b, self.seen, self.min_count, self.jaccard)

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """The null distribution: best partners of `n_null` features of each side after each of `n_shifts` permutations
        of rows.

        Rows move in blocks within documents; rows that are documents are permuted one by one.
        """
        n = self.a.n_rows
        for _ in range(n_shifts if n > 2 else 0):
            grouped = self.a.groups is not None  # rows are documents, which are exchangeable
            order = rng.permutation(n) if grouped else move_blocks(self.documents, n, rng)
            for side, (one, other) in enumerate(((self.a, self.b), (self.b, self.a))):
                known = np.flatnonzero(self.seen[side].scale(self.min_count))
                chosen = np.sort(rng.permutation(known)[:n_null])
                seen = self.seen[side].only(chosen), self.seen[1 - side]
                blocks = correlation_blocks(one.only(chosen), other.moved(order), seen, self.min_count, self.jaccard)
                yield side, chosen, find_nearest(blocks, len(chosen), other.width, 1, self.signed)[0]

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Number of rows on which both features of each pair fire."""
        found = np.zeros(len(pairs), np.int64)
        for start, stop in chunks(self.a, self.b) if len(pairs) else ():
            a, b = (side.matrix(start, stop).tocsc() for side in (self.a, self.b))
            found += count_both(a, b, pairs)
        return found


def _common(
    a: FeatureStore, b: FeatureStore, common: CommonRows | AlignedRows, similarity: str, sides: bool, starts: np.ndarray
) -> tuple[Codes, Codes]:
    """The codes of both stores on their common rows, averaged by document for similarity "documents"."""
    values: Any = "sides" if sides else "firing" if similarity in ("phi", "jaccard") else "codes"
    if isinstance(common, AlignedRows):
        first, second = Codes(a, values, rows=common.rows), Codes(b, values, weights=common)
    else:
        first, second = (Codes(store, values, rows=rows) for store, rows in zip((a, b), common, strict=True))
    if similarity != "documents":
        return first, second
    return replace(first, groups=starts), replace(second, groups=starts)


@dataclass(frozen=True, eq=False)
class DirectionSource(Source):
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
        fires = tuple((np.linalg.norm(x, axis=1) > 0).astype(np.int64) for x in (first, second))
        weights = tuple(np.ones(len(x)) for x in (first, second))
        signed = any(sae.cfg.activation.signed for sae in (a, b))
        facts = {"sources": (shareable(a.name_or_path) or str(a), shareable(b.name_or_path) or str(b)), "sides": False}
        return cls(signed=signed, progress=progress, fires=fires, weights=weights, facts=facts, a=first, b=second)  # type: ignore[arg-type]

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """Zeros: the null does not depend on the feature."""
        return np.zeros(len(self.a), np.int64), np.zeros(len(self.b), np.int64)

    def blocks(self) -> Iterator[Block]:
        """Cosines, block by block of a's features."""
        return cosine_blocks(self.a, self.b)

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """The null distribution: best partners of `n_null` random directions on each side, `n_shifts` times."""
        for _ in range(n_shifts):
            for side, other in enumerate((self.b, self.a)):
                random = rng.standard_normal((n_null, other.shape[1]), np.float32)
                found = find_nearest(cosine_blocks(random, other), n_null, len(other), 1, self.signed)[0]
                yield side, np.zeros(n_null, np.int64), found
