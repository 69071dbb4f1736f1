"""Tokenizing text into rows of token ids, packed or one document per row, with the document of each token."""

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor

from saelab.lm.conversations import Conversation
from saelab.lm.documents import Row, describe_source, find_rows, keep_rows, open_part
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokenizers import find_bos, find_special_ids
from saelab.training.ranks import RankGrid

PADDING = -1
"""Document id of padding."""
BLOCK = 256  # rows that are read and tokenized at a time
TURNS = 4  # blocks of a process between messages, which tell of failures and whether there are tokens enough
N_SAMPLED = 64  # rows of a data set that processes compare
PROBE = "The quick brown fox jumps over 12,345 lazy dogs; \u00e9t\u00e9, \u4e2d\u6587."
_Document: TypeAlias = tuple[np.ndarray, bool]
"""token ids, and whether some were cut off"""


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
    model: AnyModel,
    texts: Any,
    ctx_len: int = 128,
    *,
    packed: bool = True,
    bos: bool | None = True,
    n_tokens: int | None = None,
    separator: str | None = "<|endoftext|>",
    field: str = "text",
    mesh: Any = None,
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
            `attention_mask` in the same row removes the padding; or a conversation: a list of messages such as
            {"role": "user", "content": "Hello"}, of which the tokenizer's chat template makes a text. Data sets usually
            have these with `field="messages"`.
        ctx_len: length of a row, in tokens.
        packed: whether rows hold documents one after another.
        bos: True puts BOS before every document that does not begin with it, False before none, None does as the
            tokenizer by itself. Conversations begin as their template has it.
        n_tokens: stop after exactly that many tokens (fewer if the text ends), BOS included; None takes all.
        separator: line that divides the documents of a text file; None makes each line a document.
        field: name of the column or key that holds the text.
        mesh: `DeviceMesh` of processes that each tokenize a share of the documents and call this with the same
            arguments; all return what one process returns. Each reads only its share of a `Dataset`, and of a parquet
            file or streaming data set with as many row groups or files, if all of it is taken; of everything else,
            and where `n_tokens` is given, each reads what one process would. None is this process alone.

    Raises:
        ValueError: for no tokens in any document, a row longer than the model's context, `bos=True` and a tokenizer
            without BOS, ids outside of the model's vocabulary, processes that have different texts or arguments, and
            as `read_documents`.
        TypeError, FileNotFoundError: as `read_documents`.
        RuntimeError: where another process failed.

    >>> tokens = sl.tokenize(sl.lm.tiny_model(), ["one", "two"], ctx_len=6)
    >>> tokens.doc_ids.tolist()
    [[0, 0, 0, 0, 1, 1], [1, 1, -1, -1, -1, -1]]
    """
    model = as_model(model)
    ranks = RankGrid.of(mesh)
    with ranks.together():
        _require_sizes(model, ctx_len, n_tokens)
        first = _bos_ids(model, bos)
        share = _share(texts, separator, field, n_tokens is None, ranks)
        source = describe_source(texts)
        facts = {} if ranks.alone else {"tokenizer": _sketch_tokenizer(model), "source": source, **share.facts}
    given = {"ctx_len": ctx_len, "packed": packed, "bos": bos, "n_tokens": n_tokens, "separator": separator}
    ranks.require_equal({**given, "field": field, **facts})
    documents = _encode_share(model, share, first, None if packed else ctx_len, ranks)
    pieces, n_truncated = _take(documents, n_tokens)
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
        source=source,
        bos=bool(first) and all(piece[0] == first[0] for piece in pieces if len(piece)),
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


@dataclass(frozen=True, eq=False)
class _TextShare:
    """A process's share of a text."""

    blocks: Iterator[tuple[list[Row], int]]
    """documents of up to `BLOCK` rows, and a checksum of all rows read so far where every process reads them all"""
    facts: Mapping[str, Any]
    """what must be the same in all processes"""
    is_part: bool = False
    """whether each process has one part of the text, instead of every n-th block"""


def _share(texts: Any, separator: str | None, field: str, whole: bool, ranks: RankGrid) -> _TextShare:
    """Every n-th block of a text, of which the beginning may be enough; or a part of one that is read to its end."""
    if not ranks.alone and whole and (part := open_part(texts, field, ranks.index, ranks.size)) is not None:
        first = [_as_bytes(row, field) for _, row in islice(find_rows(texts, separator, field), 1)]
        return _TextShare(
            _cut(part[0], field), part[1] | {"first row": [zlib.crc32(one) for one in first]}, is_part=True
        )
    if not ranks.alone and all(hasattr(texts, name) for name in ("select", "features", "__len__")):
        return _TextShare(_select(texts, field, ranks), _sample_rows(texts, field))
    return _TextShare(_take_turns(find_rows(texts, separator, field), field, ranks), {})


def _cut(rows: Iterator[tuple[str, Any]], field: str) -> Iterator[tuple[list[Row], int]]:
    while block := list(islice(rows, BLOCK)):
        yield list(keep_rows(block, field)), 0


def _select(texts: Any, field: str, ranks: RankGrid) -> Iterator[tuple[list[Row], int]]:
    """This process's blocks of a data set whose rows can be read apart; the last may be empty."""
    n, turn = len(texts), ranks.size * BLOCK
    for start in range(ranks.index * BLOCK, -(-n // turn) * turn, turn):
        own = range(min(start, n), min(start + BLOCK, n))
        rows = find_rows(texts.select(own), None, field) if own else ()
        yield list(keep_rows(((f"item {i}", row) for i, (_, row) in zip(own, rows, strict=True)), field)), 0


def _take_turns(rows: Iterator[tuple[str, Any]], field: str, ranks: RankGrid) -> Iterator[tuple[list[Row], int]]:
    """This process's blocks of a text that every process reads; the last may be empty."""
    first, checksum = ranks.index * BLOCK, 0
    while turn := list(islice(rows, ranks.size * BLOCK)):
        for _, row in () if ranks.alone else turn:
            checksum = zlib.crc32(_as_bytes(row, field), checksum)
        yield list(keep_rows(turn[first : first + BLOCK], field)), checksum


def _sample_rows(texts: Any, field: str) -> dict[str, Any]:
    """Length and columns of a data set, and a checksum of evenly spaced rows."""
    places = sorted({i * len(texts) // N_SAMPLED for i in range(N_SAMPLED)}) if len(texts) else []
    checksum = 0
    for _, row in find_rows(texts.select(places), None, field):
        checksum = zlib.crc32(_as_bytes(row, field), checksum)
    return {"number of rows": len(texts), "columns": list(texts.column_names), "rows by their checksum": checksum}


def _as_bytes(row: Any, field: str) -> bytes:
    """A row's document as bytes that can be compared, whether it can be tokenized or not."""
    value = row.get(field) if isinstance(row, Mapping) else row
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return repr(value.tolist() if isinstance(value, np.ndarray | Tensor) else value).encode("utf-8", "surrogatepass")


def _sketch_tokenizer(model: Model) -> list[Any]:
    """Numbers that tell apart the tokenizers of two processes."""
    tokenizer: Any = model.tokenizer
    return [len(tokenizer), model.cfg.d_vocab, _fill_id(model), *_encode_texts(tokenizer, [PROBE])[0]]


def _encode_share(
    model: Model, share: _TextShare, first: list[int], longest: int | None, ranks: RankGrid
) -> Iterator[_Document]:
    """Iterator over the documents of all processes in the order of the text, tokenized on demand."""
    blocks = ((_encode(model, rows, first, longest), checksum) for rows, checksum in share.blocks)
    if ranks.alone:
        for documents, _ in blocks:
            yield from documents
        return
    parts: list[list[_Document]] = [[] for _ in range(ranks.size)]
    left = True
    while left:
        own: list[tuple[list[_Document], int]] = []
        with ranks.together():
            own = list(islice(blocks, TURNS))
        left = ranks.any(len(own) == TURNS)
        found = [_unpack(part.cpu().numpy()) for part in ranks.gather_parts(_pack(own).to(ranks.latents.device))]
        if share.is_part:
            for part, mine in zip(parts, found, strict=True):
                part += [document for documents, _ in mine for document in documents]
            continue
        read = [[checksum for _, checksum in mine] for mine in found]
        if other := next((rank for rank, mine in enumerate(read) if mine != read[0]), None):
            raise ValueError(
                f"All processes must have the same documents in `texts`, got others in process {other} than in process "
                "0; give all the same, in the same order."
            )
        for turn in zip(*found, strict=True):
            for documents, _ in turn:
                yield from documents
    yield from chain.from_iterable(parts)


def _encode(model: Model, rows: list[Row], first: list[int], longest: int | None) -> list[_Document]:
    """Token ids of documents, and whether each was cut."""
    made, found = iter(_encode_texts(model.tokenizer, [row for row in rows if isinstance(row, str)])), []
    for row in rows:
        if isinstance(row, Conversation):
            read: Any = row.encode(model.tokenizer)
        else:
            read = next(made) if isinstance(row, str) else row
        ids = _require_ids(model, np.array(read, np.int64))
        begins = isinstance(row, Conversation) or len(ids) == 0 or ids[: len(first)].tolist() == first
        whole = (ids if begins else np.concatenate([first, ids])).astype(np.int32)
        found.append((whole[:longest], longest is not None and len(whole) > longest))
    return found


def _pack(blocks: list[tuple[list[_Document], int]]) -> Tensor:
    """Blocks of documents with their checksums as one row of integers."""
    counts, checksums = [len(documents) for documents, _ in blocks], [checksum for _, checksum in blocks]
    every = [document for documents, _ in blocks for document in documents]
    head = [len(blocks), *counts, *(len(ids) for ids, _ in every), *(int(is_cut) for _, is_cut in every)]
    parts = [np.array(head, np.int32), np.array(checksums, np.uint32).view(np.int32), *(ids for ids, _ in every)]
    return torch.from_numpy(np.concatenate(parts))


def _unpack(row: np.ndarray) -> list[tuple[list[_Document], int]]:
    """The blocks in the output of `_pack`."""
    n_blocks = int(row[0])
    counts, row = row[1 : 1 + n_blocks].tolist(), row[1 + n_blocks :]
    lengths, is_cut, checksums, ids = np.split(row, np.cumsum([sum(counts), sum(counts), n_blocks]))
    every = zip(np.split(ids, np.cumsum(lengths)[:-1]), is_cut.astype(bool).tolist(), strict=False)
    return [(list(islice(every, n)), checksum) for n, checksum in zip(counts, checksums.tolist(), strict=True)]


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


def _take(documents: Iterator[_Document], n_tokens: int | None) -> tuple[list[np.ndarray], int]:
    """Documents until `n_tokens` are reached, and how many were cut."""
    pieces, room, n_truncated = [], n_tokens, 0
    for ids, is_cut in documents:
        n_truncated += is_cut
        pieces.append(ids[:room])
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
