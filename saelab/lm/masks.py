"""`TokenMask`: rules for which tokens are used in collection, training, evaluation and analysis; and labels of tokens.

Labels on words or character ranges of a text are assigned to its tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.token_labels import TokenLabels
from saelab.lm.tokenizers import spell, token_bytes
from saelab.lm.tokens import Tokens, tokenize
from saelab.stores.results import Result, format_table

WordTokens = Literal["all", "first", "last"]
Names: TypeAlias = str | Iterable[str] | None
"""labels of a word: one, several, or none ("", None)"""
LabeledText: TypeAlias = Sequence[tuple[str, Names]] | tuple[str, Sequence[tuple[int, int, str]]]
"""A document: its words, each with its labels; or its text, with labels of character ranges (start, stop, label)."""


@dataclass(frozen=True, kw_only=True)
class MaskResult(Result):
    """Tokens that a mask keeps, and how many each rule removed.

    A token is counted for the first rule that removes it, so `n_kept` and the counts add up to the total, padding
    included.
    """

    keep: Bool[Tensor, "n_seq ctx_len"]
    """True at tokens that are kept"""
    removed: dict[str, int]
    """number of tokens removed by each rule"""

    @property
    def n_kept(self) -> int:
        """Number of tokens kept."""
        return int(self.keep.sum())

    def __str__(self) -> str:
        total = max(self.keep.numel(), 1)
        rows = [*self.removed.items(), ("kept", self.n_kept)]
        return "\n".join(format_table([[name, f"{n:,}", f"{n / total:.2%}"] for name, n in rows]))

    def to_dict(self) -> dict[str, Any]:
        """Counts only, as a dictionary for JSON: `removed` by rule and `n_kept`."""
        return {"removed": dict(self.removed), "n_kept": self.n_kept}


@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """Rules for excluding tokens, applied in this order: padding (always), special, positions, norm.

    Padding is recognized by document id -1 and never by token id, so a model whose padding token is also its EOS or BOS
    loses none of those. Special tokens are recognized by id, at any position.

    >>> tokens = sl.tokenize(sl.lm.tiny_model(), ["one", "two"], ctx_len=6)
    >>> sl.TokenMask(positions=(1, None)).apply(tokens).removed
    {'padding': 4, 'special': 2, 'positions': 1, 'norm': 0}
    """

    special: bool = True
    """Exclude BOS, EOS and the like (`Tokens.special_ids`)."""
    positions: tuple[int, int | None] = (0, None)
    """Keep positions start <= position < stop in a row; None is the row's end."""
    max_norm_ratio: float | None = None
    """Exclude activations whose norm exceeds this many times the median norm, such as attention sinks; None keeps
    them.
    """

    def __post_init__(self) -> None:
        start, stop = self.positions
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"`positions` must be (start, stop) with 0 <= start < stop, got {self.positions}.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 0:
            raise ValueError(f"`max_norm_ratio` must be positive or None, got {self.max_norm_ratio}.")

    def apply(
        self,
        tokens: Tokens,
        norms: Float[Tensor, "n_seq ctx_len"] | None = None,
        median: float | None = None,
    ) -> MaskResult:
        """Tokens to keep, and how many each rule removed.

        Args:
            tokens: rows of token ids.
            norms: Euclidean norms of the activations; needed with `max_norm_ratio`.
            median: norm that they are compared with; None is the median over the tokens that the other rules keep.

        Raises:
            ValueError: for `max_norm_ratio` without norms.
        """
        if self.max_norm_ratio is not None and norms is None:
            raise ValueError(f"`max_norm_ratio={self.max_norm_ratio}` needs the activations' norms, got none.")
        keep = torch.ones_like(tokens.doc_ids, dtype=torch.bool)
        removed, n_left = {}, keep.numel()
        for rule, narrow in self._rules(tokens, norms, median):
            keep = narrow(keep)
            n_before, n_left = n_left, int(keep.sum())
            removed[rule] = n_before - n_left
        return MaskResult(keep=keep, removed=removed)

    def _rules(
        self, tokens: Tokens, norms: Tensor | None, median: float | None
    ) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Name of each rule, and the function that applies it to the tokens kept so far."""
        return [
            ("padding", lambda keep: keep & tokens.attention_mask),
            ("special", lambda keep: keep & self._find_ordinary(tokens) if self.special else keep),
            ("positions", lambda keep: keep & self._find_inside(tokens) if self.positions != (0, None) else keep),
            ("norm", lambda keep: keep & self._find_usual(keep, norms, median) if norms is not None else keep),
        ]

    def _find_ordinary(self, tokens: Tokens) -> Tensor:
        # Special ids are few, and comparing with each is many times faster than `isin`, which runs in every batch.
        ordinary = torch.ones_like(tokens.ids, dtype=torch.bool)
        for special in tokens.special_ids:
            ordinary &= tokens.ids != special
        return ordinary

    def _find_inside(self, tokens: Tokens) -> Tensor:
        position = torch.arange(tokens.ctx_len)
        start, stop = self.positions
        return (position >= start) & (position < (tokens.ctx_len if stop is None else stop))

    def _find_usual(self, keep: Tensor, norms: Tensor, median: float | None) -> Tensor:
        if self.max_norm_ratio is None:
            return keep
        norms = norms.to(device=keep.device, dtype=torch.float32)
        if median is None:
            median = float(norms[keep].median()) if bool(keep.any()) else 0.0
        return norms <= self.max_norm_ratio * median

    def to_dict(self) -> dict[str, Any]:
        """All rules, as a dictionary for JSON and provenance."""
        return asdict(self)


class _Spans(NamedTuple):
    """A document's text, and its labeled character ranges."""

    text: str
    labels: list[tuple[int, int, str]]


def tokenize_labeled(
    model: AnyModel,
    documents: Sequence[LabeledText],
    ctx_len: int = 128,
    *,
    part: str = "all",
    joined: str = " ",
    packed: bool = True,
    bos: bool | None = True,
) -> tuple[Tokens, TokenLabels]:
    """Tokens of labeled documents, and which labels are true of each: the data that probes are fitted to.

    A label applies to every token that holds a character of its word or range, white space not counted, however the
    tokenizer splits the text: a word of several tokens, a token of several words, a character of several tokens.
    Special tokens and padding have no label.

    Args:
        model: the language model, for its tokenizer.
        documents: lists of (word, labels), or pairs (text, [(start, stop, label), ...]) in characters.
        ctx_len: length of a row.
        part: which tokens of a word or range get its label: "all", the "first" or the "last".
        joined: text between words; "" for languages without spaces.
        packed: whether rows hold documents one after another, as in `tokenize`.
        bos: whether BOS is put before each document, as in `tokenize`.

    Raises:
        ValueError: for a blank document, a range outside its text, or a tokenizer whose tokens cannot be assigned to
            characters.

    >>> tokens, labels = tokenize_labeled(sl.lm.tiny_model(), [[("hi", ""), ("you", "pronoun")]], ctx_len=8)
    >>> labels["pronoun"].tolist()
    [[False, False, False, False, True, True, True, False]]
    """
    model = as_model(model)
    if part not in get_args(WordTokens):
        raise ValueError(f"`part` must be one of {list(get_args(WordTokens))}, got {part!r}.")
    texts = [_read_document(document, i, joined) for i, document in enumerate(documents)]
    tokens = tokenize(model, [one.text for one in texts], ctx_len, packed=packed, bos=bos)
    names = dict.fromkeys(name for one in texts for _, _, name in one.labels)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    doc_ids, ids = tokens.doc_ids.flatten().numpy(), tokens.ids.flatten().numpy()
    order = np.argsort(doc_ids, kind="stable")  # padding first, then each document's tokens in order
    bounds = np.searchsorted(doc_ids[order], np.arange(len(texts) + 1))
    for i, one in enumerate(texts):
        places = order[bounds[i] : bounds[i + 1]]
        for name, at in _lay(model.tokenizer, one, ids[places], part).items():
            found[name].append(places[at])
    at_tokens = {name: np.concatenate(parts) for name, parts in found.items()}
    return tokens, TokenLabels.place(at_tokens, tuple(tokens.ids.shape), doc_ids)


def _read_document(document: Any, i: int, joined: str) -> _Spans:
    if len(document) == 2 and isinstance(document[0], str):
        text, labels = document[0], [(int(a), int(b), str(name)) for a, b, name in document[1]]
    else:
        labels, text = [], ""
        for word, names in document:
            start = len(text) + len(joined) * bool(text)
            text = text + joined * bool(text) + word
            listed = [names] if isinstance(names, str) else names or ()
            labels += [(start, len(text), name) for name in listed if name and word.strip()]
    if not text.strip():
        raise ValueError(f"A labeled document must hold text, document {i} is blank; leave it out.")
    if wrong := [label for label in labels if not 0 <= label[0] < label[1] <= len(text)]:
        raise ValueError(f"A label must lie in its text of {len(text)} characters, got {wrong[0]} in document {i}.")
    return _Spans(text, labels)


def _lay(tokenizer: Any, one: _Spans, ids: Int[np.ndarray, "n"], part: str) -> dict[str, Int[np.ndarray, "n_true"]]:
    """For each label, the indices of a document's tokens that have it; the document may have a BOS before it, or lack
    its end.
    """
    whole = tokenizer(one.text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    n_before = len(ids) - len(whole) if len(ids) > len(whole) else int(ids[: len(whole)].tolist() != whole[: len(ids)])
    starts, stops = locate_tokens(tokenizer, one.text, whole)[:, : len(ids) - n_before]
    found: dict[str, list[Int[np.ndarray, n]]] = {}
    for start, stop, name in one.labels:
        at = np.flatnonzero((stops > start) & (starts < stop) & (stops > starts)) + n_before
        found.setdefault(name, []).append({"all": at, "first": at[:1], "last": at[-1:]}[part])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def locate_tokens(tokenizer: Any, text: str, ids: Sequence[int]) -> Int[np.ndarray, "2 n"]:
    """Character range of each token in a text: first character, and the one after the last; surrounding white space is
    excluded.

    Found from the bytes of the tokens where these equal the text; else, where the tokenizer changes characters, from
    its offset mapping, or by searching for each token after the one before. ValueError where none of these works.

    >>> tokenizer = sl.lm.tiny_model().tokenizer
    >>> locate_tokens(tokenizer, "é t", tokenizer("é t", add_special_tokens=False)["input_ids"]).tolist()
    [[0, 0, 1, 2], [1, 1, 1, 3]]
    """
    found = _locate_by_bytes(tokenizer, text, ids)
    if found is None and getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        found = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    if found is None:
        found = _locate_by_reading(tokenizer, text, ids)
    white = np.cumsum([0, *(not c.isspace() for c in text)])  # number of non-space characters before each index
    solid = np.flatnonzero(np.diff(white))
    if len(solid) == 0:
        return found
    starts, stops = found
    n_before, n_until = white[starts], white[stops]
    empty = n_before == n_until
    firsts = solid[np.minimum(n_before, len(solid) - 1)]
    lasts = solid[np.maximum(n_until - 1, 0)] + 1
    return np.stack([np.where(empty, starts, firsts), np.where(empty, starts, lasts)])


def _locate_by_bytes(tokenizer: Any, text: str, ids: Sequence[int]) -> Int[np.ndarray, "2 n"] | None:
    """Character ranges by bytes; None where the bytes of the tokens are not those of the text, up to a space
    before it.
    """
    known = token_bytes(tokenizer, ids)
    pieces, raw = [known[int(i)] for i in ids], text.encode()
    joined = b"".join(pieces)
    ahead = len(joined) - len(raw)
    if ahead not in (0, 1) or joined != b" " * ahead + raw:
        return None
    ends = np.cumsum([len(piece) for piece in pieces]) - ahead
    begins = np.maximum(ends - [len(piece) for piece in pieces], 0)
    sizes = [len(c.encode()) for c in text]
    char_of = np.append(np.repeat(np.arange(len(text)), sizes), len(text))
    last = char_of[np.maximum(ends - 1, 0)] + 1
    return np.stack([char_of[begins], np.where(ends > begins, last, char_of[begins])])


def _locate_by_reading(tokenizer: Any, text: str, ids: Sequence[int]) -> Int[np.ndarray, "2 n"]:
    """Character ranges by searching for each token after the one before it, ignoring case."""
    folded, at = [c.casefold()[:1] for c in text], 0
    places = []
    for word in spell(tokenizer, ids).words:
        wanted = "".join(c.casefold()[:1] for c in word.strip())
        start = "".join(folded).find(wanted, at)
        if start < 0:
            raise ValueError(
                f"The characters of each token must be known, got {word!r}, which is not in {text[at : at + 40]!r}. "
                "Take the tokenizer's fast version."
            )
        places.append((start, start + len(wanted)))
        at = start + len(wanted)
    return np.array(places, np.int64).reshape(-1, 2).T
