"""Alignment of two feature stores of the same documents, by the characters that their tokens cover.

Documents that two texts have in common are found by their characters, in batches. The alignment matrix between the
rows of the two stores is computed block by block; the tokenizers may differ.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Integer

from saelab.functional.indices import ROWS_AT_ONCE, MarkedRows, find_runs, number_rows
from saelab.stores.corpus import StoredText
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table
from saelab.universality.document_text import (
    BEGINNING,
    BLUR,
    HIGH,
    MASKED,
    REASONS,
    TOKENS_AT_ONCE,
    Spelled,
    SpelledText,
    TextRows,
    find_ids,
    find_overlap,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PREFIX = 256
"""Number of leading ASCII characters by which longer versions of a cut document are searched."""
Key = Callable[[Spelled, int], bytes | None]
CommonRows: TypeAlias = tuple[MarkedRows, MarkedRows] | tuple[None, None]


class Versions:
    """The common documents of two texts; for each document a digest is held instead of its text."""

    def __init__(self, sides: tuple[SpelledText, SpelledText]) -> None:
        self.sides = sides
        self.partners = np.full(len(sides[0]), -1, np.int32)
        """the document of b that each one of a has; -1 for none"""
        self.n_cut = 0
        """pairs of which one ends before the other"""
        self._open: list[dict[int, tuple[Spelled, int]]] = [{}, {}]
        filled, readable = zip(*(_sort_out(side) for side in sides), strict=True)
        self._free = [_list(documents) for documents in readable]
        self._match_readable()
        # documents with unknown tokens are matched by their number: their text is no key
        self._free = [_list(documents & ~self._taken(k)) for k, documents in enumerate(filled)]
        self._match_equal(_number)

    def _match_readable(self) -> None:
        """Match equal texts, then texts equal but for unknown parts of characters, then documents that were cut."""
        self._match_equal(lambda side, i: side.documents[i])
        self._match_equal(lambda side, i: side.documents[i].translate(BLUR))
        self._match_equal(lambda side, i: side.skeleton(i) or None)
        self._match_equal(_number)
        for short in (0, 1):
            self._match_beginnings(short)

    def _match_equal(self, key: Key) -> None:
        """Match documents with the same key, in their order; None is no key."""
        waiting: dict[bytes, list[int]] = defaultdict(list)
        for batch, spelled in self._spell(1):
            for j, digest in zip(batch, _digest(spelled, key), strict=True):
                if digest is not None:
                    waiting[digest].append(j)
        for batch, spelled in self._spell(0) if waiting else ():
            digests = _digest(spelled, key)
            wanted = Counter(digest for digest in digests if digest in waiting)
            self._hold(1, [j for digest, n in wanted.items() for j in islice(waiting[digest], n)])
            for i, digest in zip(batch, digests, strict=True):
                queue = waiting.get(digest, []) if digest is not None else []
                taken = next((j for j in queue if self._take(i, j)), None)
                if taken is not None:
                    queue.remove(taken)

    def _match_beginnings(self, short: int) -> None:
        """Match documents of one side with those of the other that begin like them, but for unknown parts of
        characters.
        """
        ordered = sorted(
            (spelled.skeleton(k)[:PREFIX], j)
            for batch, spelled in self._spell(1 - short, hold=False)
            for k, j in enumerate(batch)
        )
        keys = [skeleton for skeleton, _ in ordered]
        for batch, spelled in self._spell(short) if ordered else ():
            longer = []
            for k in range(len(batch)):
                key = spelled.skeleton(k)[:PREFIX]
                first, stop = bisect_left(keys, key), bisect_left(keys, key + HIGH[:1])
                longer.append(sorted(j for _, j in ordered[first:stop]) if key else [])
            self._hold(1 - short, sorted({found[0] for found in longer if found}))
            for k, i in enumerate(batch):
                any(self._take_longer(short, i, spelled.skeleton(k), j) for j in longer[k])  # up to the first that fits

    def _take_longer(self, short: int, i: int, skeleton: bytes, j: int) -> bool:
        """Match a document with an unmatched one of the other side that continues it."""
        if j not in self._free[1 - short]:
            return False
        other, k = self._find(1 - short, j)
        return other.skeleton(k).startswith(skeleton) and self._take(*((j, i) if short else (i, j)))

    def _take(self, i: int, j: int) -> bool:
        """Match two documents if they agree."""
        (a, mine), (b, theirs) = self._find(0, i), self._find(1, j)
        overlap = find_overlap(a, b, mine, theirs)
        if overlap is None or len(overlap.shares) == 0:
            return False
        self.partners[i] = j
        self.n_cut += not all(overlap.ends)
        del self._free[0][i], self._free[1][j]
        return True

    def _spell(self, side: int, hold: bool = True) -> Iterator[tuple[list[int], Spelled]]:
        """The unmatched documents of a side, batch by batch; each batch is held until the next."""
        for batch in self.sides[side].batches(list(self._free[side])):
            spelled = self.sides[side].spell(batch)
            if hold:
                self._open[side] = {i: (spelled, k) for k, i in enumerate(batch)}
            yield batch, spelled
        self._open[side] = {}

    def _hold(self, side: int, documents: list[int]) -> None:
        """Spell documents that are likely to be needed, and hold them."""
        spelled = self.sides[side].spell(documents)
        self._open[side] = {i: (spelled, k) for k, i in enumerate(documents)}

    def _find(self, side: int, document: int) -> tuple[Spelled, int]:
        if document in self._open[side]:
            return self._open[side][document]
        return self.sides[side].spell([document]), 0

    def _taken(self, side: int) -> Bool[np.ndarray, "n_docs"]:
        if side == 0:
            return self.partners >= 0
        taken = np.zeros(len(self.sides[1]), bool)
        taken[self.partners[self.partners >= 0]] = True
        return taken

    def without(self, side: int) -> list[int]:
        """The documents of a side that have no partner."""
        return np.flatnonzero(~self._taken(side)).tolist()

    def left_out(self) -> dict[str, dict[str, int]]:
        """How many documents have no partner, by reason."""
        known = [
            set(self._describe_left(k, lambda spelled, i: spelled.skeleton(i)[:BEGINNING])) - {b""} for k in (0, 1)
        ]
        whys = [Counter(self._describe_left(k, lambda one, i, k=k: one.why_left(i, known[1 - k]))) for k in (0, 1)]  # type: ignore[misc]
        return {
            name: {str(reason): n for reason, n in why.items()} for name, why in zip("ab", whys, strict=True) if why
        }

    def _describe_left(self, side: int, describe: Callable[[Spelled, int], str | bytes]) -> Iterator[str | bytes]:
        for batch in self.sides[side].batches(self.without(side)):
            spelled = self.sides[side].spell(batch)
            yield from (describe(spelled, i) for i in range(len(batch)))


def _sort_out(side: SpelledText) -> tuple[Bool[np.ndarray, "n_docs"], Bool[np.ndarray, "n_docs"]]:
    """Which documents have characters, and which of these are known completely."""
    filled, opaque = np.zeros((2, len(side)), bool)
    for batch in side.batches(range(len(side))):
        spelled = side.spell(batch)
        filled[batch], opaque[batch] = np.diff(spelled.starts) > 0, spelled.opaque
    return filled, filled & ~opaque


def _list(documents: Bool[np.ndarray, "n_docs"]) -> dict[int, None]:
    """Documents in their order, as a dictionary: removing one takes constant time."""
    return dict.fromkeys(np.flatnonzero(documents).tolist())


def _number(side: Spelled, i: int) -> bytes:
    return str(side.doc_ids[i]).encode()


def _digest(spelled: Spelled, key: Key) -> list[bytes | None]:
    """The keys of some documents, hashed to sixteen bytes each; None is no key."""
    keys: Iterable[bytes | None] = (key(spelled, i) for i in range(len(spelled.documents)))
    return [None if one is None else blake2b(one, digest_size=16).digest() for one in keys]


class TokenPairs(NamedTuple):
    """Tokens of some documents of both sides that share characters."""

    sides: tuple[Spelled, Spelled]
    at: tuple[np.ndarray, np.ndarray]
    """bytes that belong together, in the order of both"""
    unclear: tuple[np.ndarray, np.ndarray]
    """bytes whose partners are not known"""
    tokens: tuple[np.ndarray, np.ndarray]
    shared: np.ndarray
    """number of characters that both tokens cover"""

    @property
    def sole(self) -> Bool[np.ndarray, "n_pairs"]:
        """Pairs of tokens that cover exactly the same characters."""
        whole = [side.whole(at)[own] for side, at, own in zip(self.sides, self.at, self.tokens, strict=True)]
        return np.logical_and.reduce(whole + [np.bincount(own)[own] == 1 for own in self.tokens])


class AlignedRows:
    """Sparse alignment weights between the rows of two stores, computed slice by slice.

    `self[start:stop] @ z_b` are codes of b for `rows[start:stop]` of a. Memory: a few numbers per document and one bool
    per row of a. Documents of a are processed in groups that do not overlap, mostly one each, so that rows ascend.
    """

    def __init__(self, a: TextRows, b: TextRows) -> None:
        self.stores = a, b
        self.texts = SpelledText(a.text), SpelledText(b.text)
        versions = Versions(self.texts)
        self.left_out, self.n_cut, self.partners = versions.left_out(), versions.n_cut, versions.partners
        self.documents = np.flatnonzero(self.partners >= 0)
        if len(self.documents) == 0:
            raise ValueError(
                f"`a` and `b` must have documents in common, got none (left out: {self.left_out}). "
                "Harvest both on one text, with tokenizers that give the text of their tokens."
            )
        first, end = self.texts[0].span(self.documents)
        groups = np.flatnonzero(np.append(True, np.maximum.accumulate(end)[:-1] <= first[1:]))
        self._groups = np.append(groups, len(self.documents))
        self._n_tokens = np.cumsum(np.add.reduceat(self.texts[0].sizes[self.documents], groups))
        self._survey(a.where.find(first[groups])[0], [versions.without(k) for k in (0, 1)])

    def _survey(self, borders: Int[np.ndarray, "n_groups"], left: list[list[int]]) -> None:
        """Count the aligned rows of each group, and the unaligned ones by reason."""
        marks, counts = np.zeros(len(self.stores[0]), bool), np.zeros(len(borders), np.int64)
        whys = np.zeros((2, len(REASONS)), np.int64)
        n_sole = n_rows_b = 0
        for first, end in self.batches(0, len(borders)):
            pairs = self.pair(self.members(first, end))
            found = [store.where.find(side.places)[1] for store, side in zip(self.stores, pairs.sides, strict=True)]
            kept, (mine, theirs) = find_rows(pairs, found)
            n_sole += int(pairs.sole[kept].sum())
            rows, rows_b = number_rows(mine)[0], number_rows(theirs)[0]
            marks[rows], n_rows_b = True, n_rows_b + len(rows_b)
            counts[first:end] = np.diff(np.append(np.searchsorted(rows, borders[first:end]), len(rows)))
            for k, own in enumerate((rows, rows_b)):
                why = pairs.sides[k].judge(pairs.at[k], pairs.unclear[k])
                whys[k] += _count(why, (found[k] >= 0) & ~np.isin(found[k], own))
        for k, (text, store) in enumerate(zip(self.texts, self.stores, strict=True)):
            for batch in text.batches(left[k]):
                spelled = text.spell(batch)
                whys[k] += _count(spelled.why, store.where.find(spelled.places)[1] >= 0)
        self.rows, self._offsets = MarkedRows(marks), np.append(0, np.cumsum(counts))
        self.n_aligned, self.n_sole = (len(self.rows), n_rows_b), n_sole
        self.unaligned = {
            name: {reason: n for reason, n in zip(REASONS, own, strict=True) if n}
            for name, own in zip("ab", whys.tolist(), strict=True)
        }
        if len(self.rows) == 0:
            raise ValueError(
                f"`a` and `b` must have rows in common, got none in {len(self.documents)} common documents (without a "
                f"partner: {self.unaligned}). Harvest with masks that keep the same text."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of aligned rows of a, and of rows of b."""
        return len(self.rows), len(self.stores[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> "csr_matrix":
        from scipy.sparse import csr_matrix, vstack

        start, stop, _ = part.indices(len(self))
        if stop <= start:
            return csr_matrix((0, self.shape[1]), dtype=np.float32)
        first = int(np.searchsorted(self._offsets, start, "right")) - 1
        end = int(np.searchsorted(self._offsets, stop))
        parts = [self._weigh(self.members(*batch)) for batch in self.batches(first, end)]
        return vstack(parts, format="csr")[start - self._offsets[first] : stop - self._offsets[first]]

    def batches(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Groups of at most TOKENS_AT_ONCE tokens together, or a longer one alone."""
        while first < end:
            before = self._n_tokens[first - 1] if first else 0
            fits = int(np.searchsorted(self._n_tokens, before + TOKENS_AT_ONCE, "right"))
            stop = min(max(fits, first + 1), end)
            yield first, stop
            first = stop

    def members(self, first: int, end: int) -> Integer[np.ndarray, "n"]:
        """The documents of some groups."""
        return self.documents[self._groups[first] : self._groups[end]]

    def pair(self, documents: Integer[np.ndarray, "n"]) -> TokenPairs:
        """The tokens of some documents and of their partners that share characters."""
        a, b = self.texts[0].spell(documents.tolist()), self.texts[1].spell(self.partners[documents].tolist())
        overlaps = [find_overlap(a, b, k, k) for k in range(len(documents))]
        known = [overlap for overlap in overlaps if overlap is not None]
        assert len(known) == len(overlaps)  # they agreed when they were paired
        at = [np.concatenate([overlap.at[k] for overlap in known]) for k in (0, 1)]
        unclear = [np.concatenate([overlap.unclear[k] for overlap in known]) for k in (0, 1)]
        mine, theirs = a.tokens[at[0]], b.tokens[at[1]]
        first = np.flatnonzero(np.append(True, (np.diff(mine) != 0) | (np.diff(theirs) != 0)))
        shared = np.add.reduceat(np.concatenate([overlap.shares for overlap in known]), first)
        return TokenPairs((a, b), (at[0], at[1]), (unclear[0], unclear[1]), (mine[first], theirs[first]), shared)

    def _weigh(self, documents: Integer[np.ndarray, "n"]) -> "csr_matrix":
        """The weights of all aligned rows of some documents, which are whole groups."""
        from scipy.sparse import csr_matrix

        pairs = self.pair(documents)
        found = [store.where.find(side.places)[1] for store, side in zip(self.stores, pairs.sides, strict=True)]
        kept, (mine, theirs) = find_rows(pairs, found)
        rows, numbers = number_rows(mine)
        shared = pairs.shared[kept]
        weights = (shared / np.bincount(numbers, shared)[numbers]).astype(np.float32)
        return csr_matrix((weights, (numbers, theirs)), shape=(len(rows), self.shape[1]))


def find_rows(pairs: TokenPairs, found: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which pairs of tokens both masks kept, and the rows of these; `found` are those of all tokens."""
    rows = [own[tokens] for own, tokens in zip(found, pairs.tokens, strict=True)]
    kept = (rows[0] >= 0) & (rows[1] >= 0)
    return kept, [own[kept] for own in rows]


def _count(why: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.bincount(why[which], minlength=len(REASONS))


@dataclass(frozen=True, kw_only=True, eq=False)
class Overview(Result):
    """Counts of aligned and unaligned rows and documents of two stores."""

    exact: bool
    """whether both texts have the same tokens; then `rows_b[i]` is the only partner of `rows[i]`"""
    n_rows: tuple[int, int]
    """number of rows of a and of b"""
    n_aligned: tuple[int, int]
    """number of rows of a and of b that have a partner"""
    one_to_one: float
    """share of a's aligned rows whose characters are those of exactly one token of b"""
    n_documents: int
    """number of documents in common"""
    n_cut: int
    """number of common documents that end earlier on one side"""
    left_out: dict[str, dict[str, int]]
    """number of documents of a and of b without a partner, by reason"""
    unaligned: dict[str, dict[str, int]]
    """number of rows of a and of b without a partner, by reason"""

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON, without rows and weights."""
        counts = {field.name: getattr(self, field.name) for field in fields(Overview)}
        return counts | {"n_rows": list(self.n_rows), "n_aligned": list(self.n_aligned)}

    def __str__(self) -> str:
        lines = [f"documents in common: {self.n_documents:,}, of them cut short on one side: {self.n_cut:,}"]
        lines.append("the same tokens on both sides" if self.exact else "aligned by the characters of tokens")
        counts = zip("ab", self.n_rows, self.n_aligned, strict=True)
        table = [[name, f"{n_rows:,}", f"{n:,}", f"{n / n_rows:.3f}"] for name, n_rows, n in counts]
        lines += ["", *format_table([["", "rows", "aligned", "share"], *table])]
        lines += ["", f"one to one: {self.one_to_one:.3f} of the aligned rows of a"]
        for what, found in (("documents of {} left out", self.left_out), ("rows of {} unaligned", self.unaligned)):
            for name, reasons in found.items():
                lines.append(f"{what.format(name)}: " + ", ".join(f"{n:,} {why}" for why, n in reasons.items()))
        return "\n".join(lines)


def format_counts(found: AlignedRows) -> dict[str, Any]:
    """The fields of `Overview` for rows aligned by characters, as keyword arguments."""
    return {
        "exact": False,
        "n_rows": (len(found.stores[0]), len(found.stores[1])),
        "n_aligned": found.n_aligned,
        "one_to_one": found.n_sole / len(found),
        "n_documents": len(found.documents),
        "n_cut": found.n_cut,
        "left_out": found.left_out,
        "unaligned": {name: counts for name, counts in found.unaligned.items() if counts},
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment(Overview):
    """Row alignment of two stores: `weights @ z_b` are codes of b for `rows` of a."""

    rows: Integer[np.ndarray, "n_aligned"]
    """rows of a that have a partner, in increasing order"""
    rows_b: Integer[np.ndarray, "n_aligned_b"]
    """rows of b that have a partner, in increasing order"""
    weights: "csr_matrix"
    """(n_aligned, rows of b), float32: of the characters of a's token that rows of b cover, the share that each row
    covers"""


def align_rows(a: FeatureStore, b: FeatureStore) -> Alignment:
    """The alignment of two stores of the same documents by the characters that their tokens cover.

    Tokenizers, models and masks may differ. Entry (i, j) of the weights is the share of a-token i's characters that
    b-token j covers; each row sums to 1 over the characters that rows of b cover. White space and special tokens count
    as no characters, as tokenizers put spaces into different tokens, and tokens of nothing else have no partner.
    Documents are matched by their text, in any order; copies of one text are paired in their order, and where one side
    was cut the beginning is aligned. A document is left out where its text differs on the other side. A token whose
    text is not known (<unk>) has no partner, nor has the text on the other side that it stands for; such documents are
    matched by their number, and the text around the token is aligned.

    Parts of characters, which decode to U+FFFD, are distinguished by counting bytes. Where such a token holds several
    bytes, the stretch between the ASCII characters before and after it has partners only if it is of a single token on
    one side; the parts on the other side then have equal weights. Stores with the same tokens need none of this: every
    token, white space and special ones too, is its own partner.

    Memory and time are linear in the number of tokens. ValueError where no row has a partner.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)))
    >>> import tempfile
    >>> here = {"out": tempfile.mkdtemp(), "hook_point": "blocks.1.hook_out", "progress": False}
    >>> store = sl.harvest(sae, model, sl.tokenize(model, ["Once upon a time."] * 8), **here)
    >>> align_rows(store, store).exact
    True
    """
    if (common := find_common_rows(a, b)) is not None:
        return _align_equal(a, b, common)
    found = AlignedRows(a, b)
    weights = found[:]
    rows_b = np.unique(weights.indices).astype(np.int64)
    return Alignment(rows=found.rows[:], rows_b=rows_b, weights=weights, **format_counts(found))


def find_common_rows(a: TextRows, b: TextRows) -> CommonRows | None:
    """The rows of two stores of the same tokens at the positions that both masks kept, or None where their tokens
    differ.

    A pair of Nones stands for all rows of both. ValueError where the masks have no position in common.
    """
    if not _same_tokens(a.text, b.text):
        return None
    if _same_places(a, b):
        return None, None
    marks, marks_b = np.zeros(len(a), bool), np.zeros(len(b), bool)
    for start in range(0, len(a), ROWS_AT_ONCE):
        at = b.where.find(a.where[start : start + ROWS_AT_ONCE])[1]
        marks[start : start + ROWS_AT_ONCE] = at >= 0
        marks_b[at[at >= 0]] = True
    rows, rows_b = MarkedRows(marks), MarkedRows(marks_b)
    if len(rows) == 0:
        raise ValueError(
            "`a` and `b` must have rows in common, got none, though they have the same tokens. Harvest with masks that "
            "keep the same text."
        )
    return rows, rows_b


def _same_places(a: TextRows, b: TextRows) -> bool:
    parts = (slice(start, start + ROWS_AT_ONCE) for start in range(0, len(a), ROWS_AT_ONCE))
    return len(a) == len(b) and all(np.array_equal(a.where[part], b.where[part]) for part in parts)


def _same_tokens(a: StoredText, b: StoredText) -> bool:
    """Whether both texts are the same tokens, document by document; ids without a string on one side are ignored."""
    if len(a) != len(b):
        return False
    for start in range(0, len(a), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        if not all(np.array_equal(getattr(a, x)[part], getattr(b, x)[part]) for x in ("token_ids", "doc_ids")):
            return False
    strings = ((a.strings.get(i), b.strings.get(i)) for i in find_ids(a.token_ids).tolist())
    return all(mine == theirs or None in (mine, theirs) for mine, theirs in strings)


def _align_equal(a: FeatureStore, b: FeatureStore, common: CommonRows) -> Alignment:
    """Alignment of every row with the one at the same position."""
    from scipy.sparse import csr_matrix

    rows, rows_b = (np.arange(len(a)) if one is None else one[:] for one in common)
    n, n_documents = len(rows), len(np.unique(a.text.doc_ids[find_runs(a.text.doc_ids)]))
    missing = {name: len(store) - n for name, store in zip("ab", (a, b), strict=True)}
    return Alignment(
        rows=rows,
        rows_b=rows_b,
        weights=csr_matrix((np.ones(n, np.float32), rows_b, np.arange(n + 1)), shape=(n, len(b))),
        exact=True,
        n_rows=(len(a), len(b)),
        n_aligned=(n, n),
        one_to_one=1.0,
        n_documents=n_documents,
        n_cut=0,
        left_out={},
        unaligned={name: {REASONS[MASKED]: k} for name, k in missing.items() if k},
    )
