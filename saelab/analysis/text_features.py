"""`read`: from texts to the features that fire on their tokens, with values and names, in one call."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.collecting.harvesting import sae_fingerprint
from saelab.functional.codes import SparseCodes
from saelab.lm.conversations import Conversation, Messages
from saelab.lm.documents import Row, keep_rows
from saelab.lm.hooks import FORWARD_TOKENS, capture, norms_of, require_finite
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokenizers import spell_rows
from saelab.lm.tokens import Tokens, tokenize
from saelab.sae.compatibility import Match, match_model, require_finite as require_finite_weights, require_threshold
from saelab.sae.sae import SAE
from saelab.stores.feature_names import FeatureNames, keep_names, name_sides, require_names
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    import pandas

ReadableText: TypeAlias = str | Messages | Conversation | Sequence[int] | Int[Tensor, "n"] | Int[np.ndarray, "n"]
"""a text, a conversation, or token ids"""
COLUMNS = ("text", "position", "token", "feature", "value", "name")
SHOWN_TOKENS, SHOWN_FEATURES = 40, 3
"""printed: tokens in all, and features of each"""


@dataclass(frozen=True, kw_only=True)
class ReadFeature:
    """Where a feature fires in some texts."""

    feature: int
    name: str
    """of the side that has the largest |z|; empty where it has none"""
    peak: float
    """the code of largest |z|, with its sign"""
    text: int
    """text of that code"""
    position: int
    """token of the text, from 0"""
    token: str
    n_tokens: int
    """tokens on which it fires"""
    n_texts: int
    """texts in which it fires"""


@dataclass(frozen=True, eq=False)
class TextFeatures(Result):
    """The features that fire on each token of some texts; no padding is among the tokens.

    `len()` is the number of texts, `read[i]` one of them alone, and iterating gives one after another.
    """

    token_ids: Int[np.ndarray, "n_tokens"]
    """all texts, one after another, special tokens included"""
    text_ids: Int[np.ndarray, "n_tokens"]
    """text of each token, from 0"""
    positions: Int[np.ndarray, "n_tokens"]
    """place of each token in its text, from 0"""
    tokens: tuple[str, ...]
    """what each token contributes to the text: joined they are the texts, with special tokens spelled as in the
    vocabulary; of a character made of several tokens the first has it
    """
    kept: Bool[np.ndarray, "n_tokens"]
    """tokens that the SAE was made for; no feature fires on the others"""
    codes: SparseCodes = field(repr=False)
    """codes, a row for each token"""
    hook_point: str
    """where the model was read"""
    n_texts: int
    labels: FeatureNames | None = field(default=None, repr=False)
    """what features are named by: a copy of the names of those that fire"""

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token, feature and code of all firings, by token, the largest |z| first."""
        offsets, features, z = (x.cpu().numpy() for x in (self.codes.offsets, self.codes.indices, self.codes.values))
        token = np.repeat(np.arange(len(self.tokens)), np.diff(offsets))
        order = np.lexsort((features, -np.abs(z), token))
        return token[order], features[order], z[order].astype(np.float64)

    @cached_property
    def _name(self) -> Any:
        return name_sides(self.labels, np.unique(self._entries[1]).tolist())

    def __len__(self) -> int:
        return self.n_texts

    def __getitem__(self, i: SupportsIndex) -> "TextFeatures":
        if not isinstance(i, SupportsIndex):
            raise TypeError(f"Text must be an integer, got {i!r}; for several write [found[i] for i in range(2)].")
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"Text must be in -{len(self)}..{len(self) - 1}, got {i}.")
        here = np.flatnonzero(self.text_ids == i % len(self))
        first, stop = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
        offsets = self.codes.offsets[first : stop + 1]
        a, b = int(offsets[0]), int(offsets[-1])
        codes = replace(
            self.codes,
            indices=self.codes.indices[a:b],
            values=self.codes.values[a:b],
            rows=self.codes.rows[a:b] - first,
            offsets=offsets - a,
            batch_shape=(stop - first,),
        )
        parts = {name: getattr(self, name)[first:stop] for name in ("token_ids", "positions", "tokens", "kept")}
        none = np.zeros(stop - first, self.text_ids.dtype)
        return replace(self, **parts, text_ids=none, codes=codes, n_texts=1)

    def __iter__(self) -> Iterator["TextFeatures"]:
        return (self[i] for i in range(len(self)))

    @property
    def l0(self) -> float:
        """Number of features that fire on a kept token, on average; NaN where none is kept."""
        return len(self.codes.values) / n if (n := int(self.kept.sum())) else float("nan")

    @cached_property
    def by_token(self) -> list[list[tuple[int, float]]]:
        """Feature and code of all that fire on each token, the largest |z| first."""
        found: list[list[tuple[int, float]]] = [[] for _ in self.tokens]
        for token, feature, z in zip(*(x.tolist() for x in self._entries), strict=True):
            found[token].append((feature, z))
        return found

    @cached_property
    def features(self) -> tuple[ReadFeature, ...]:
        """Every feature that fires, that with the largest |z| first."""
        token, features, z = self._entries
        order = np.lexsort((-np.abs(z), features))
        starts = np.flatnonzero(np.diff(features[order], prepend=-1))
        texts = [len(np.unique(self.text_ids[token[part]])) for part in np.split(order, starts[1:])] if len(z) else []
        counts = np.diff(np.append(starts, len(order)))
        found = []
        for i, n_tokens, n_texts in zip(order[starts].tolist(), counts.tolist(), texts, strict=True):
            at, feature, peak = int(token[i]), int(features[i]), float(z[i])
            found.append(
                ReadFeature(
                    feature=feature,
                    name=self._name(feature, peak),
                    peak=peak,
                    text=int(self.text_ids[at]),
                    position=int(self.positions[at]),
                    token=self.tokens[at],
                    n_tokens=n_tokens,
                    n_texts=n_texts,
                )
            )
        return tuple(sorted(found, key=lambda row: (-abs(row.peak), row.feature)))

    def name(self, feature: int, code: float = 1.0) -> str:
        """Name of a feature for codes of this sign; empty where it has none, and for features that do not fire."""
        named: str = self._name(feature, code)
        return named

    def to_pandas(self) -> "pandas.DataFrame":
        """A row for each firing: text, position, token, feature, value, name.

        >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=2)))
        >>> list(read(sae, model, "One", hook_point="blocks.1.hook_out", progress=False).to_pandas().columns)
        ['text', 'position', 'token', 'feature', 'value', 'name']
        """
        import pandas

        token, features, z = self._entries
        tokens = np.array(self.tokens, dtype=object)[token]
        names = [self._name(feature, code) for feature, code in zip(features.tolist(), z.tolist(), strict=True)]
        columns = (self.text_ids[token], self.positions[token], tokens, features, z, names)
        table = pandas.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
        return table.astype({"token": str, "name": str})  # without rows as with some

    def to_dict(self) -> dict[str, Any]:
        """Texts as lists of tokens, each with its features, as JSON values."""
        texts: list[list[dict[str, Any]]] = [[] for _ in range(len(self))]
        for i, token in enumerate(self.tokens):
            fired = [{"feature": f, "value": z, "name": self._name(f, z)} for f, z in self.by_token[i]]
            row = {"id": int(self.token_ids[i]), "token": token, "kept": bool(self.kept[i]), "features": fired}
            texts[int(self.text_ids[i])].append(row)
        return {"hook_point": self.hook_point, "d_sae": self.codes.d_sae, "texts": texts}

    def __str__(self) -> str:
        n = f"{len(self)} text{'s' if len(self) != 1 else ''}"
        said = f"{n}, {len(self.tokens):,} tokens ({int(self.kept.sum()):,} kept) at {self.hook_point}"
        lines = [f"{said}: {len(self.features):,} features fire, L0 {self.l0:.3g}"]
        shown = range(min(len(self.tokens), SHOWN_TOKENS))
        rows = [[str(self.positions[i]), repr(self.tokens[i]), self._describe(i)] for i in shown]
        for _, part in groupby(shown, key=lambda i: int(self.text_ids[i])):
            lines += format_table([rows[i] for i in part], left=(1, 2))
        if len(self.tokens) > SHOWN_TOKENS:
            lines.append(f"... and {len(self.tokens) - SHOWN_TOKENS:,} more tokens")
        return "\n".join(lines)

    def _describe(self, token: int) -> str:
        if not self.kept[token]:
            return "(left out)"
        fired = self.by_token[token]
        named = [" ".join(filter(None, [f"{f} {z:+.3g}", self._name(f, z)])) for f, z in fired[:SHOWN_FEATURES]]
        return "; ".join(named + ([f"{more} more"] if (more := len(fired) - SHOWN_FEATURES) > 0 else []))


@torch.no_grad()
def read(
    sae: SAE,
    model: AnyModel,
    texts: ReadableText | Iterable[ReadableText],
    *,
    labels: FeatureNames | None = None,
    hook_point: str | None = None,
    mask: TokenMask | None = None,
    bos: bool | None = True,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> TextFeatures:
    """The features of an SAE that fire on each token of texts, with their codes and, from labels, names.

    Rows of equal length share a forward pass and others do not, so that padding never reaches the model. Hook point
    and mask are those of the SAE's training. For a corpus use `harvest`, which keeps codes on disk.

    Args:
        sae: the SAE, or a transcoder, which reads its input.
        model: the language model that it was trained on.
        texts: a text or several. Each is a string, token ids, which are used as they are, or a conversation: a list of
            messages such as {"role": "user", "content": "Hello"}, of which the tokenizer's chat template makes a text.
        labels: names by feature, or a label store.
        hook_point: where the SAE reads; None is where it was trained.
        mask: tokens that features are wanted of; None is the mask of the SAE's training.
        bos: whether BOS is put before texts that do not begin with it; None does as the tokenizer by itself.
        allow_mismatch: accept a model, weight processing or hook point that differs from the SAE's training.
        progress: whether to show a progress bar.

    Raises:
        ValueError: no text, a blank one or one longer than the model's context; a crosscoder; an SAE that was trained
            on something else or has no threshold yet; a norm rule in `mask` without a norm to compare with; activations
            that are not finite.
        TypeError: what holds no texts, such as a table, or no names.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=2)))
    >>> found = read(sae, model, ["One", "Two cats"], hook_point="blocks.1.hook_out", progress=False)
    >>> len(found), found.tokens[:4], found.l0
    (2, ('<s>', 'O', 'n', 'e'), 2.0)
    """
    model = as_model(model)
    require_names(labels)
    require_threshold(sae)
    require_finite_weights(sae)
    _require_own(labels, sae)
    place = match_model(sae, model, hook_point, mask, allow_mismatch)
    if mask is not None and mask.max_norm_ratio is not None and place.hook_point not in place.median_norms:
        raise ValueError(
            f"`mask` must have no norm rule here, got max_norm_ratio={mask.max_norm_ratio}: it compares with the "
            "median norm that training with the same mask measured, and there is none. Leave it None."
        )
    rows = _encode_texts(model, _list_texts(texts), bos)
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths])
    kept, found = torch.zeros(int(starts[-1]), dtype=torch.bool), []
    with tqdm(total=len(kept), unit="token", desc="read", delay=2, disable=hidden(progress)) as bar:
        for own in _find_batches(lengths):
            batch = tokenize(model, [rows[i] for i in own], lengths[own[0]], packed=False, bos=False, separator=None)
            x = capture(model, batch.ids.long(), [place.hook_point])[place.hook_point]
            keep = _select(place, batch, x)
            require_finite(place.hook_point, x[keep.to(x.device)])
            codes = sae.encode_sparse(x[keep.to(x.device)].to(sae.device))
            numbers = torch.from_numpy(starts[own])[:, None] + torch.arange(batch.ctx_len)
            kept[numbers[keep]] = True
            found.append((numbers[keep][codes.rows.cpu()], codes.indices.cpu(), codes.values.float().cpu()))
            bar.update(batch.n_tokens)
    places, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = places.argsort(stable=True)
    return TextFeatures(
        token_ids=np.concatenate(rows),
        text_ids=np.repeat(np.arange(len(rows)), lengths),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        tokens=tuple(_spell(model, [row.tolist() for row in rows])),
        kept=kept.numpy(),
        codes=SparseCodes.from_rows(indices[order], values[order], places[order], (len(kept), sae.cfg.d_sae)),
        hook_point=place.hook_point,
        n_texts=len(rows),
        labels=keep_names(labels, indices.unique().tolist()),
    )


def _require_own(labels: FeatureNames | None, sae: SAE) -> None:
    """Raise ValueError for the labels of another SAE's features."""
    recorded = str(getattr(labels, "sae", ""))
    made = [sae_fingerprint(one) for one in (sae, *(sae.whole or ()))] if recorded else [""]
    if recorded not in made:
        raise ValueError(
            f"`labels` must be of this SAE's features, got those of another ({recorded}, not {made[0]}). Give the "
            "labels of a store that was harvested with it."
        )


def _list_texts(texts: Any) -> list[Row]:
    """Texts as a list, also of a single one: strings, conversations and rows of token ids."""
    if isinstance(texts, Mapping | bytes | set | frozenset) or hasattr(texts, "columns"):
        advice = "give a list, such as one column of a table"
        raise TypeError(f"`texts` must be a text or a list of texts, got {type(texts).__name__}; {advice}.")
    alone = isinstance(texts, str) or Conversation.find(texts) is not None
    n_axes = texts.ndim if isinstance(texts, Tensor | np.ndarray) else None
    alone = alone or (n_axes == 1 and _holds_ids(texts))
    if not alone and (not isinstance(texts, Iterable) or n_axes == 0):
        raise TypeError(f"`texts` must be a text or a list of texts, got {type(texts).__name__}; give a list.")
    found = [texts] if alone else list(texts)
    if found and all(isinstance(one, int | np.integer) for one in found):
        found = [found]
    if not found:
        raise ValueError("`texts` must hold at least one text, got none.")
    rows = [list(keep_rows([(f"text {i}", one)], "text")) for i, one in enumerate(found)]
    if blank := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(
            f"A text must hold at least one token, text {blank[0]} is blank; to read BOS alone give its id."
        )
    return [row for (row,) in rows]


def _holds_ids(array: Tensor | np.ndarray) -> bool:
    return isinstance(array, Tensor) or array.dtype.kind not in "OUT"


def _encode_texts(model: Model, texts: list[Row], bos: bool | None) -> list[np.ndarray]:
    """Token ids of each text; ValueError for one that is empty or does not fit the model's context."""
    strings = [text for text in texts if isinstance(text, str)]
    made = iter(_encode(model, strings, bos) if strings else ())
    rows: list[np.ndarray] = []
    for text in texts:
        ids = text.encode(model.tokenizer) if isinstance(text, Conversation) else text
        rows.append(np.asarray(next(made) if isinstance(ids, str) else ids, np.int64))
    longest = find_context(model)
    for i, row in enumerate(rows):
        if len(row) > longest:
            raise ValueError(
                f"A text must fit the model's context of {longest} tokens, text {i} has {len(row)}. Split it or use "
                "`harvest`, which packs documents into rows."
            )
        if not len(row):
            raise ValueError(f"A text must have at least one token, text {i} has none.")
    return rows


def _encode(model: Model, strings: list[str], bos: bool | None) -> tuple[Tensor, ...]:
    """Token ids of each string, all tokenized in one call: by itself each would cost several times as much."""
    packed = tokenize(model, strings, find_context(model), bos=bos, separator=None)
    owner = packed.doc_ids[packed.attention_mask]
    return packed.ids[packed.attention_mask].split(owner.bincount(minlength=len(strings)).tolist())


def _find_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts in batches of equal length, the shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for length, part in groupby(order, key=lengths.__getitem__):
        rows, size = list(part), max(1, FORWARD_TOKENS // length)
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _select(place: Match, batch: Tokens, x: Tensor) -> Tensor:
    """Tokens that the mask keeps; its norm rule applies where training measured the norm that it compares with."""
    median = place.median_norms.get(place.hook_point)
    if median is None or place.mask.max_norm_ratio is None:
        return replace(place.mask, max_norm_ratio=None).apply(batch).keep
    return place.mask.apply(batch, norms_of(x).cpu(), median).keep


def _spell(model: Model, rows: list[list[int]]) -> list[str]:
    if model.tokenizer is None:
        return [f"<{i}>" for row in rows for i in row]
    return [word for one in spell_rows(model.tokenizer, rows) for word in one.words]
