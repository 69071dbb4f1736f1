"""What `compare` works on: codes of two stores on common rows, or directions of two dictionaries."""

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
    """What is compared: two stores on common rows, or the directions of two SAEs."""

    signed: bool
    progress: bool
    fires: tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]
    weights: tuple[Float[np.ndarray, "d_a"], Float[np.ndarray, "d_b"]]
    """what each feature counts for, by variance"""
    facts: dict[str, Any]

    def blocks(self) -> Iterator[Block]:
        """All similarities."""
        raise NotImplementedError

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
        """Side, features and their best partners where nothing is in common."""
        raise NotImplementedError

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Rows on which both fire; -1 for directions."""
        return np.full(len(pairs), -1)

    @property
    def rates(self) -> tuple[Int[np.ndarray, "d_a"], Int[np.ndarray, "d_b"]]:
        """What chance depends on: firings; directions have none."""
        return self.fires

    def nearest(self, blocks: Iterator[Block], d_a: int, d_b: int, m: int) -> tuple[Nearest, Nearest]:
        """The best partners of both sides, with a bar over blocks."""
        from tqdm.auto import tqdm

        listed = list(blocks)
        return find_nearest(tqdm(listed, unit=" blocks", disable=hidden(self.progress)), d_a, d_b, m, self.signed)


@dataclass(frozen=True, eq=False)
class StoreSource(Source):
    """Codes on common rows."""

    a: Codes
    b: Codes
    seen: tuple[Moments, Moments]
    min_count: int
    jaccard: bool
    documents: Int[np.ndarray, "n_docs"] | None = None
    """the row that each begins with; None where rows are documents, or nobody knows"""

    @classmethod
    def make(
        cls, a: FeatureStore, b: FeatureStore, similarity: str, sides: bool, min_count: int, progress: bool
    ) -> "StoreSource":
        """On the rows that two stores have in common."""
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
        """On rows that are there already."""
        seen = Moments.of(codes[0]), Moments.of(codes[1])
        return cls(
            signed=signed, progress=progress, fires=(seen[0].fires, seen[1].fires),
            weights=(seen[0].spread ** 2, seen[1].spread ** 2), facts=facts, a=codes[0], b=codes[1], seen=seen,
            min_count=min_count, jaccard=similarity == "jaccard", documents=documents,
        )  # fmt: skip

    def blocks(self) -> Iterator[Block]:
        return correlation_blocks(self.a, self.b, self.seen, self.min_count, self.jaccard)

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
        n = self.a.n_rows
        for _ in range(n_shifts if n > 2 else 0):
            grouped = self.a.groups is not None  # documents are alike in nothing but their order
            order = rng.permutation(n) if grouped else move_blocks(self.documents, n, rng)
            for side, (one, other) in enumerate(((self.a, self.b), (self.b, self.a))):
                known = np.flatnonzero(self.seen[side].scale(self.min_count))
                chosen = np.sort(rng.permutation(known)[:n_null])
                seen = self.seen[side].only(chosen), self.seen[1 - side]
                blocks = correlation_blocks(one.only(chosen), other.moved(order), seen, self.min_count, self.jaccard)
                yield side, chosen, find_nearest(blocks, len(chosen), other.width, 1, self.signed)[0]

    def count(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        found = np.zeros(len(pairs), np.int64)
        for start, stop in chunks(self.a, self.b) if len(pairs) else ():
            a, b = (side.matrix(start, stop).tocsc() for side in (self.a, self.b))
            found += count_both(a, b, pairs)
        return found


def _common(
    a: FeatureStore, b: FeatureStore, common: CommonRows | AlignedRows, similarity: str, sides: bool, starts: np.ndarray
) -> tuple[Codes, Codes]:
    """Both stores on the rows that they have in common, or on the documents that begin with some of these."""
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
    """Rows of two dictionaries of one space."""

    a: Float[np.ndarray, "d_a d"]
    b: Float[np.ndarray, "d_b d"]

    @classmethod
    def make(cls, a: SAE, b: SAE, similarity: str, progress: bool) -> "DirectionSource":
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
        return np.zeros(len(self.a), np.int64), np.zeros(len(self.b), np.int64)

    def blocks(self) -> Iterator[Block]:
        return cosine_blocks(self.a, self.b)

    def chance(self, n_shifts: int, n_null: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray, Nearest]]:
        for _ in range(n_shifts):
            for side, other in enumerate((self.b, self.a)):
                random = rng.standard_normal((n_null, other.shape[1]), np.float32)
                found = find_nearest(cosine_blocks(random, other), n_null, len(other), 1, self.signed)[0]
                yield side, np.zeros(n_null, np.int64), found
