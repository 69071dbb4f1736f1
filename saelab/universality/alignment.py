"""`align_rows`: the rows of two stores of the same documents brought together by the characters that they cover."""

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Integer

from saelab.stores.corpus import StoredText
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result
from saelab.universality.documents import BEGINNING, BLUR, HIGH, MASKED, REASONS, Overlap, Spelled, find_overlap

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ROWS_AT_ONCE = 2**20
"""Tokens that are looked at at once."""
CommonRows: TypeAlias = tuple[Integer[np.ndarray, "n"], Integer[np.ndarray, "n"]] | tuple[None, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment(Result):
    """Which rows of store b cover the characters of store a's: `weights @ z_b` are codes of b for `rows` of a."""

    rows: Integer[np.ndarray, "n_aligned"]
    """rows of a that have a partner, in increasing order"""
    rows_b: Integer[np.ndarray, "n_aligned_b"]
    """rows of b that have a partner, in increasing order"""
    weights: "csr_matrix"
    """(n_aligned, rows of b), float32: of the characters of a's token that rows of b cover, the share of each"""
    exact: bool
    """whether both texts have the same tokens, so that `rows_b[i]` is the partner of `rows[i]`, and the only one"""
    n_rows: tuple[int, int]
    """of a and of b"""
    one_to_one: float
    """share of a's aligned rows whose characters are those of exactly one token of b"""
    n_documents: int
    """documents in common"""
    n_cut: int
    """of these, documents that end earlier on one side"""
    left_out: dict[str, dict[str, int]]
    """other documents of a and of b, by reason"""
    unaligned: dict[str, dict[str, int]]
    """rows of a and of b without a partner, by reason"""

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON; neither rows nor weights."""
        arrays = ("rows", "rows_b", "weights")
        counts = {name: value for name, value in vars(self).items() if name not in arrays}
        return counts | {"n_rows": list(self.n_rows), "n_aligned": [len(self.rows), len(self.rows_b)]}

    def __str__(self) -> str:
        lines = [f"documents in common: {self.n_documents:,}, of them cut short on one side: {self.n_cut:,}"]
        lines.append("the same tokens on both sides" if self.exact else "aligned by the characters of tokens")
        lines += ["", f"{'':<4}{'rows':>12}{'aligned':>12}{'share':>8}"]
        for name, n_rows, rows in zip("ab", self.n_rows, (self.rows, self.rows_b), strict=True):
            lines.append(f"{name:<4}{n_rows:>12,}{len(rows):>12,}{len(rows) / n_rows:>8.3f}")
        lines += ["", f"one to one: {self.one_to_one:.3f} of the aligned rows of a"]
        for what, found in (("documents of {} left out", self.left_out), ("rows of {} unaligned", self.unaligned)):
            for name, counts in found.items():
                lines.append(f"{what.format(name)}: " + ", ".join(f"{n:,} {why}" for why, n in counts.items()))
        return "\n".join(lines)


def align_rows(a: FeatureStore, b: FeatureStore) -> Alignment:
    """Align two stores of the same documents by what their tokens cover, whatever tokenizers, models and masks.

    Entry (i, j) of the weights is the share of a-token i's characters that b-token j covers; rows sum to 1 over what
    rows of b cover. White space and special tokens are no characters: spaces may stand in any token, and tokens of
    nothing else have no partner. Documents are found by their text, in any order; copies of one text are paired in
    their order, and where one side was cut the beginning is aligned. A document is left out where its text reads
    otherwise on the other side. A token that does not tell its text (<unk>) has no partner, nor what it stands for on
    the other side; such documents are found by their number, and what is around is aligned.

    Parts of characters, which read as U+FFFD, are told apart by counting bytes. Where such a token holds several bytes,
    the stretch from the ASCII character before it to the one behind has partners only if it is of a single token on one
    side; the parts on the other then count alike. Stores with the same tokens need none of this: every token, white
    and special ones too, is its own partner.

    Memory and time are linear in the tokens. ValueError where no row has a partner.

    >>> model, sae = sl.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)))
    >>> import tempfile
    >>> here = {"out": tempfile.mkdtemp(), "hook_point": "blocks.1.hook_out", "progress": False}
    >>> store = sl.harvest(sae, model, sl.tokenize(model, ["Once upon a time."] * 8), **here)
    >>> align_rows(store, store).exact
    True
    """
    if (common := find_common_rows(a, b)) is not None:
        return _align_equal(a, b, common)
    matching = _Matching((Spelled.read(a.text), Spelled.read(b.text)))
    matching.match()
    found, left_out = matching.found, matching.left_out()
    if not found:
        raise ValueError(
            f"`a` and `b` must have documents in common, got none (left out: {left_out}). "
            "Harvest both on one text, with tokenizers that tell how their tokens read."
        )
    n_cut = sum(not all(overlap.ends) for overlap in found.values())
    return _assemble(a, b, matching.pairs(), exact=False, n_documents=len(found), n_cut=n_cut, left_out=left_out)


def find_common_rows(a: FeatureStore, b: FeatureStore) -> CommonRows | None:
    """The rows of two stores of the same tokens that stand at places which both masks kept, None for all rows of both;
    nothing where their tokens differ. ValueError where the masks have no place in common.
    """
    if not _same_tokens(a.text, b.text):
        return None
    if np.array_equal(a.places, b.places):
        return None, None
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(a), ROWS_AT_ONCE):
        places = a.places[start : start + ROWS_AT_ONCE]
        at = np.minimum(np.searchsorted(b.places, places), len(b) - 1)
        same = np.flatnonzero(b.places[at] == places)
        found.append(((same + start).astype(np.int32), at[same].astype(np.int32)))
    rows, rows_b = (np.concatenate(side) for side in zip(*found, strict=True))
    if len(rows) == 0:
        raise ValueError(
            "`a` and `b` must have rows in common, got none, though they have the same tokens. Harvest with masks that "
            "keep the same text."
        )
    return rows, rows_b


def _same_tokens(a: StoredText, b: StoredText) -> bool:
    """Whether both texts are the same tokens, document by document; ids that only one side can read say nothing."""
    if len(a) != len(b):
        return False
    ids = np.zeros(0, np.int64)
    for start in range(0, len(a), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        if not all(np.array_equal(getattr(a, x)[part], getattr(b, x)[part]) for x in ("token_ids", "doc_ids")):
            return False
        ids = np.union1d(ids, a.token_ids[part])
    strings = ((a.strings.get(i), b.strings.get(i)) for i in ids.tolist())
    return all(mine == theirs or None in (mine, theirs) for mine, theirs in strings)


def _align_equal(a: FeatureStore, b: FeatureStore, common: CommonRows) -> Alignment:
    """Every row with the one at its place."""
    from scipy.sparse import csr_matrix

    rows, rows_b = (np.arange(len(a)) if one is None else one.astype(np.int64) for one in common)
    n, n_documents = len(rows), len(np.unique(a.text.doc_ids))
    missing = {name: len(store) - n for name, store in zip("ab", (a, b), strict=True)}
    return Alignment(
        rows=rows,
        rows_b=rows_b,
        weights=csr_matrix((np.ones(n, np.float32), rows_b, np.arange(n + 1)), shape=(n, len(b))),
        exact=True,
        n_rows=(len(a), len(b)),
        one_to_one=1.0,
        n_documents=n_documents,
        n_cut=0,
        left_out={},
        unaligned={name: {REASONS[MASKED]: k} for name, k in missing.items() if k},
    )


class _Pairs(NamedTuple):
    """Tokens of both sides that share characters."""

    places: tuple[np.ndarray, np.ndarray]
    shared: np.ndarray
    """characters"""
    sole: np.ndarray
    """pairs of tokens with the same characters, all of them"""
    why: tuple[np.ndarray, np.ndarray]
    """for every token of each side, why its row has no partner where it has none"""


@dataclass(eq=False)
class _Matching:
    """Finds the documents that both sides have."""

    sides: tuple[Spelled, Spelled]
    found: dict[tuple[int, int], Overlap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = [[i for i, raw in enumerate(side.documents) if raw] for side in self.sides]
        readable = [[i for i in every if not side.opaque[i]] for side, every in zip(self.sides, kinds, strict=True)]
        self._free = [dict.fromkeys(documents) for documents in readable]
        self._all = kinds

    def match(self) -> None:
        """Whole texts, then whole texts but for what cannot be read, then documents that were cut."""
        self._match_equal(lambda side, i: side.documents[i])
        self._match_equal(lambda side, i: side.documents[i].translate(BLUR))
        self._match_equal(lambda side, i: side.skeleton(i) or None)
        self._match_equal(lambda side, i: side.doc_ids[i])
        for short in (0, 1):
            self._match_beginnings(short)
        # what has unknown tokens, by the number of the document: its text is no key
        taken = [{pair[k] for pair in self.found} for k in (0, 1)]
        self._free = [dict.fromkeys(i for i in self._all[k] if i not in taken[k]) for k in (0, 1)]
        self._match_equal(lambda side, i: side.doc_ids[i])

    def _match_equal(self, key: Callable[[Spelled, int], Any]) -> None:
        """Documents with the same key, in their order; None is no key."""
        waiting: dict[Any, deque[int]] = defaultdict(deque)
        for j in self._free[1]:
            waiting[key(self.sides[1], j)].append(j)
        waiting.pop(None, None)
        for i in list(self._free[0]):
            queue = waiting[key(self.sides[0], i)]
            taken = next((j for j in queue if self._take(i, j)), None)
            if taken is not None:
                queue.remove(taken)

    def _match_beginnings(self, short: int) -> None:
        """Documents of one side with those of the other that begin like them, but for what cannot be read."""
        mine, other = self.sides[short], self.sides[1 - short]
        ordered = sorted((other.skeleton(j), j) for j in self._free[1 - short])
        keys = [skeleton for skeleton, _ in ordered]
        for i in list(self._free[short]):
            if skeleton := mine.skeleton(i):
                first, stop = bisect_left(keys, skeleton), bisect_left(keys, skeleton + HIGH[:1])
                longer = sorted(j for _, j in ordered[first:stop] if j in self._free[1 - short])
                any(self._take(*((j, i) if short else (i, j))) for j in longer)  # up to the first that fits

    def _take(self, i: int, j: int) -> bool:
        """Pair two documents if they agree."""
        overlap = find_overlap(*self.sides, i, j)
        if overlap is None or len(overlap.shares) == 0:
            return False
        self.found[i, j] = overlap
        del self._free[0][i], self._free[1][j]
        return True

    def _documents(self, side: int) -> list[int]:
        return [pair[side] for pair in sorted(self.found)]

    def left_out(self) -> dict[str, dict[str, int]]:
        """Documents that have no partner, by reason."""
        left = [sorted({*range(len(side.documents))} - {*self._documents(k)}) for k, side in enumerate(self.sides)]
        known = [{side.skeleton(i)[:BEGINNING] for i in left[k]} - {b""} for k, side in enumerate(self.sides)]
        whys = [Counter(side.why_left(i, known[1 - k]) for i in left[k]) for k, side in enumerate(self.sides)]
        return {name: dict(why) for name, why in zip("ab", whys, strict=True) if why}

    def pairs(self) -> _Pairs:
        """All tokens that share characters, and what became of the others."""
        overlaps = [self.found[pair] for pair in sorted(self.found)]
        at = [np.concatenate([overlap.at[k] for overlap in overlaps]) for k in (0, 1)]
        unclear = [np.concatenate([overlap.unclear[k] for overlap in overlaps]) for k in (0, 1)]
        a, b = (side.places[mine] for side, mine in zip(self.sides, at, strict=True))
        first = np.flatnonzero(np.append(True, (np.diff(a) != 0) | (np.diff(b) != 0)))
        shared = np.add.reduceat(np.concatenate([overlap.shares for overlap in overlaps]), first)
        places = a[first], b[first]
        sole = [side.whole(at[k])[mine] for k, (side, mine) in enumerate(zip(self.sides, places, strict=True))]
        sole += [np.bincount(mine)[mine] == 1 for mine in places]
        why = [side.judge(self._documents(k), at[k], unclear[k]) for k, side in enumerate(self.sides)]
        return _Pairs(places, shared, np.logical_and.reduce(sole), (why[0], why[1]))


def _assemble(a: FeatureStore, b: FeatureStore, pairs: _Pairs, **facts: Any) -> Alignment:
    """The weights between rows of the pairs of tokens."""
    from scipy.sparse import csr_matrix

    stores = a, b
    mine, theirs = (_rows_at(store)[places] for store, places in zip(stores, pairs.places, strict=True))
    kept = (mine >= 0) & (theirs >= 0)
    mine, theirs, shared = mine[kept], theirs[kept], pairs.shared[kept]
    rows, rows_b = np.flatnonzero(np.bincount(mine)), np.flatnonzero(np.bincount(theirs))
    unaligned = {
        name: _count_reasons(why[np.delete(store.places, own)])
        for name, store, why, own in zip("ab", stores, pairs.why, (rows, rows_b), strict=True)
    }
    if len(rows) == 0:
        raise ValueError(
            f"`a` and `b` must have rows in common, got none in {facts['n_documents']} common documents (without a "
            f"partner: {unaligned}). Harvest with masks that keep the same text."
        )
    weights = (shared / np.bincount(mine, shared)[mine]).astype(np.float32)
    numbers = np.searchsorted(rows, mine)
    return Alignment(
        rows=rows,
        rows_b=rows_b,
        weights=csr_matrix((weights, (numbers, theirs)), shape=(len(rows), len(b))),
        n_rows=(len(a), len(b)),
        one_to_one=float(pairs.sole[kept].sum() / len(rows)),
        unaligned={name: counts for name, counts in unaligned.items() if counts},
        **facts,
    )


def _rows_at(store: FeatureStore) -> np.ndarray:
    """The row of each token; -1 where the mask dropped it."""
    rows = np.full(len(store.text), -1)
    rows[store.places] = np.arange(len(store))
    return rows


def _count_reasons(why: np.ndarray) -> dict[str, int]:
    counts = np.bincount(why, minlength=len(REASONS)).tolist()
    return {reason: n for reason, n in zip(REASONS, counts, strict=True) if n}
