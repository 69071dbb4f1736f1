"""Alignment of two feature stores of the same documents, by the characters that their tokens cover."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Integer

from saelab.functional.marking import MarkedRows
from saelab.functional.permuting import ROWS_AT_ONCE, find_runs
from saelab.stores.corpus import StoredText
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result
from saelab.universality.aligned import AlignedRows
from saelab.universality.documents import MASKED, REASONS, find_ids

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CommonRows: TypeAlias = tuple[MarkedRows, MarkedRows] | tuple[None, None]


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
        lines += ["", f"{'':<4}{'rows':>12}{'aligned':>12}{'share':>8}"]
        for name, n_rows, n in zip("ab", self.n_rows, self.n_aligned, strict=True):
            lines.append(f"{name:<4}{n_rows:>12,}{n:>12,}{n / n_rows:>8.3f}")
        lines += ["", f"one to one: {self.one_to_one:.3f} of the aligned rows of a"]
        for what, found in (("documents of {} left out", self.left_out), ("rows of {} unaligned", self.unaligned)):
            for name, counts in found.items():
                lines.append(f"{what.format(name)}: " + ", ".join(f"{n:,} {why}" for why, n in counts.items()))
        return "\n".join(lines)


def tell_counts(found: AlignedRows) -> dict[str, Any]:
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

    >>> model, sae = sl.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)))
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
    return Alignment(rows=found.rows[:], rows_b=rows_b, weights=weights, **tell_counts(found))


def find_common_rows(a: FeatureStore, b: FeatureStore) -> CommonRows | None:
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


def _same_places(a: FeatureStore, b: FeatureStore) -> bool:
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
