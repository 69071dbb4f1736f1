"""Tokenizing text into rows of token ids, packed or one document per row, with the document of each token."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from saelab.lm.documents import Row, describe_source, read_rows
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokenizers import find_bos, find_special_ids

PADDING = -1
"""Document id of padding."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tokens:
    """Rows of token ids for a model, padded on the right, and where they came from.

    `len(tokens)` is the number of rows; `tokens[i]`, `tokens[i:j]` and `tokens[list_of_rows]` are Tokens again.
    """

    ids: Int32[Tensor, "n_seq ctx_len"]
    """Token ids; at padding an arbitrary id of the vocabulary."""
    doc_ids: Int32[Tensor, "n_seq ctx_len"]
    """Index of the document that each token belongs to, from 0; -1 is padding, whatever the id there."""
    special_ids: tuple[int, ...] = ()
    """Ids of BOS, EOS, padding and the like (not of unknown words), in increasing order."""
    source: str = "unknown"
    """Where the text came from."""
    bos: bool = False
    """Whether every document begins with BOS."""
    packed: bool = True
    """Whether rows hold documents one after another, rather than one document each."""
    n_truncated: int = 0
    """Number of documents that were cut because they were longer than a row (0 when packed)."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.doc_ids.shape or self.ids.ndim != 2:
            raise ValueError(
                "`ids` and `doc_ids` must have one shape (n_seq, ctx_len), "
                f"got {tuple(self.ids.shape)} and {tuple(self.doc_ids.shape)}."
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: int | slice | list[int] | Tensor) -> "Tokens":
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"Row must be in -{len(self)}..{len(self) - 1}, got {rows}.")
            rows = [rows]
        return replace(self, ids=self.ids[rows], doc_ids=self.doc_ids[rows])

    def __repr__(self) -> str:
        return f"Tokens(n_seq={len(self)}, ctx_len={self.ctx_len}, n_tokens={self.n_tokens}, source={self.source!r})"

    @property
    def ctx_len(self) -> int:
        """Length of a row."""
        return self.ids.shape[1]

    @property
    def attention_mask(self) -> Bool[Tensor, "n_seq ctx_len"]:
        """True at tokens, False at padding."""
        return self.doc_ids != PADDING

    @property
    def predicts(self) -> Bool[Tensor, "n_seq ctx_len"]:
        """True where the next token of the row belongs to the same document: the predictions that a loss is averaged
        over.

        The first token of the next document in a packed row cannot be predicted from the one before.

        >>> sl.tokenize(sl.lm.tiny_model(), ["a", "b"], ctx_len=4).predicts.tolist()
        [[True, False, True, False]]
        """
        found = torch.zeros_like(self.doc_ids, dtype=torch.bool)
        found[:, :-1] = (self.doc_ids[:, 1:] == self.doc_ids[:, :-1]) & self.attention_mask[:, 1:]
        return found

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return int(self.attention_mask.sum())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 hash of ids, document ids and shape."""
        digest = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        for part in (self.ids, self.doc_ids):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def tokenize(
    model: Model,
    texts: Any,
    ctx_len: int = 128,
    *,
    packed: bool = True,
    bos: bool | None = True,
    n_tokens: int | None = None,
    separator: str | None = "<|endoftext|>",
    field: str = "text",
) -> Tokens:
    """Token ids of documents in rows of `ctx_len`, from the model's own tokenizer.

    Packed rows join all documents and only the last row has padding; a row may begin inside a document, and the model
    attends across document borders. Otherwise each document has a row of its own and is cut to its length
    (`Tokens.n_truncated` counts those). A document for which the tokenizer produces no token is numbered, but has no
    row.

    Args:
        model: the language model, for its tokenizer and context length.
        texts: a file, a list, a column, a table or a data set, as in `saelab.lm.documents.read_documents`. A document
            may also be token ids: a list, array or tensor of integers, or a row with `field="input_ids"`, from which an
            `attention_mask` in the same row removes the padding.
        ctx_len: length of a row, in tokens.
        packed: whether rows hold documents one after another.
        bos: True puts BOS before every document that does not begin with it, False before none, None does as the
            tokenizer by itself.
        n_tokens: stop after exactly that many tokens (fewer if the text ends), BOS included; None takes all.
        separator: line that divides the documents of a text file; None makes each line a document.
        field: name of the column or key that holds the text.

    Raises:
        ValueError: for no tokens in any document, a row longer than the model's context, `bos=True` and a tokenizer
            without BOS, ids outside of the model's vocabulary, and as `read_documents`.
        TypeError, FileNotFoundError: as `read_documents`.

    >>> tokens = sl.tokenize(sl.lm.tiny_model(), ["one", "two"], ctx_len=6)
    >>> tokens.doc_ids.tolist()
    [[0, 0, 0, 0, 1, 1], [1, 1, -1, -1, -1, -1]]
    """
    _require_sizes(model, ctx_len, n_tokens)
    first = _bos_ids(model, bos)
    documents = _encode(model, read_rows(texts, separator=separator, field=field), first)
    pieces, n_truncated = _take(documents, None if packed else ctx_len, n_tokens)
    if not any(map(len, pieces)):
        raise ValueError(
            f"`texts` must hold at least one document that is not blank to the tokenizer, got none in {len(pieces)}. "
            "Check file and `field`."
        )
    ids, doc_ids = _lay_out(pieces, ctx_len, packed, fill=_fill_id(model))
    return Tokens(
        ids=torch.from_numpy(ids),
        doc_ids=torch.from_numpy(doc_ids),
        special_ids=find_special_ids(model),
        source=describe_source(texts),
        bos=bool(first),
        packed=packed,
        n_truncated=n_truncated,
    )


def _require_sizes(model: Model, ctx_len: int, n_tokens: int | None) -> None:
    longest = find_context(model)
    if model.tokenizer is None:
        raise ValueError("`tokenize` needs a model with a tokenizer, got one without. Load it with its tokenizer.")
    if not 1 <= ctx_len <= longest:
        raise ValueError(f"`ctx_len` must be in 1..{longest} (the model's context), got {ctx_len}.")
    if n_tokens is not None and n_tokens < 1:
        raise ValueError(f"`n_tokens` must be at least 1 or None for all, got {n_tokens}.")


def _bos_ids(model: Model, bos: bool | None) -> list[int]:
    """Ids put before every document: [BOS] or nothing."""
    tokenizer: Any = model.tokenizer
    own = find_bos(model)
    if bos is None:
        bos = own is not None and tokenizer("a")["input_ids"][:1] == [own]
    if bos and own is None:
        raise ValueError("`bos=True` needs a tokenizer with a BOS token, got one without. Use bos=False.")
    return [own] if bos and own is not None else []


def _fill_id(model: Model) -> int:
    pad_id = getattr(model.tokenizer, "pad_token_id", None)
    return pad_id if pad_id is not None and pad_id < model.cfg.d_vocab else 0


def _encode(model: Model, documents: Iterator[Row], first: list[int]) -> Iterator[np.ndarray]:
    """Iterator over the ids of each document, tokenized 256 at a time and on demand."""
    while block := list(islice(documents, 256)):
        made = iter(_encode_texts(model.tokenizer, [row for row in block if isinstance(row, str)]))
        for row in block:
            ids = _require_ids(model, np.array(next(made), np.int64) if isinstance(row, str) else row)
            begins = len(ids) == 0 or ids[: len(first)].tolist() == first
            yield (ids if begins else np.concatenate([first, ids])).astype(np.int32)


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )
    rows: list[list[int]] = encoded["input_ids"]
    return rows


def _require_ids(model: Model, ids: np.ndarray) -> np.ndarray:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.cfg.d_vocab:
        raise ValueError(
            f"Token ids must be in 0..{model.cfg.d_vocab - 1}, got {int(ids.min())}..{int(ids.max())}. Were they made "
            "with another tokenizer, with tokens that were added behind the model's, or padded? Give `attention_mask` "
            "with padded ids."
        )
    return ids.astype(np.int64)


def _take(documents: Iterator[np.ndarray], longest: int | None, n_tokens: int | None) -> tuple[list[np.ndarray], int]:
    """Documents cut to `longest` until `n_tokens` are reached, and how many were cut."""
    pieces, room, n_truncated = [], n_tokens, 0
    for ids in documents:
        n_truncated += longest is not None and len(ids) > longest
        pieces.append(ids[:longest][:room])
        if room is not None:
            room -= len(pieces[-1])
            if room == 0:
                break
    return pieces, n_truncated


def _lay_out(pieces: list[np.ndarray], ctx_len: int, packed: bool, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids and of document ids."""
    lengths = np.array([len(piece) for piece in pieces])
    numbers = np.arange(len(pieces), dtype=np.int32)
    if not packed:  # no row for documents without tokens
        numbers, lengths = numbers[lengths > 0], lengths[lengths > 0]
    n_seq = -(-int(lengths.sum()) // ctx_len) if packed else len(lengths)
    if packed:
        used = np.arange(n_seq * ctx_len).reshape(n_seq, ctx_len) < lengths.sum()
    else:
        used = np.arange(ctx_len) < lengths[:, None]
    ids = np.full((n_seq, ctx_len), fill, dtype=np.int32)
    doc_ids = np.full((n_seq, ctx_len), PADDING, dtype=np.int32)
    ids[used] = np.concatenate(pieces)
    doc_ids[used] = np.repeat(numbers, lengths)
    return ids, doc_ids
