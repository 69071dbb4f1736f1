"""`ActivationReader`: run one batch through the model and return the activations of the tokens the mask keeps.

`TextSource` and `ActivationsSource` are what `harvest` encodes: such batches, or activations collected before;
`SameRowsSource` is what `harvest_untrained` does, the rows of a store.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from saelab.functional.autocast import autocast_dtype, computing_in
from saelab.functional.indices import PART
from saelab.lm.concurrent import Capture, make_captures, map_in_order
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import capture, find_hook_point, find_median_norms, norms_of, require_finite
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, sketch_weights
from saelab.lm.models import describe_model
from saelab.lm.tokenizers import token_strings
from saelab.lm.tokens import PADDING, Tokens
from saelab.lm.unwrapped import strip
from saelab.stores.activations import Activations
from saelab.stores.corpus import StoredText
from saelab.stores.manifest import Provenance, dtype_name
from saelab.stores.payload import PayloadKinds, number_documents, split_words
from saelab.training.ranks import RankGrid

DEFAULT_MASK = TokenMask()


@dataclass(frozen=True)
class ForwardRows:
    """Activations and tokens of the kept rows of one batch of sequences."""

    acts: dict[str, Tensor]
    """Activations by hook point, (n, d_in), finite, on the model's device."""
    columns: dict[str, Tensor]
    """Columns token_ids, doc_ids and positions of the rows, int32."""
    index: Tensor
    """Index of each row in the flattened batch (sequence * ctx_len + position)."""
    removed: dict[str, int]
    """Number of tokens removed by each rule of the mask."""


@dataclass(frozen=True, kw_only=True)
class ActivationReader:
    """Reads activations at several hook points under one token mask, and counts the tokens that each rule removes."""

    model: Model
    """the language model"""
    hook_points: tuple[str, ...]
    """names of the hook points"""
    mask: TokenMask
    """tokens to keep"""
    dtype: torch.dtype
    """dtype of the rows"""
    median_norms: dict[str, float] | None = None
    """median activation norm by hook point, that the mask's norm rule compares with; None before `calibrated`"""
    autocast: torch.dtype | None = None
    """dtype of the model's products under `torch.autocast`; None is without it"""

    @classmethod
    def make(
        cls, model: AnyModel, tokens: Tokens, hook_points: Sequence[str], mask: TokenMask, dtype: torch.dtype | None
    ) -> "ActivationReader":
        """A reader of activations at the named hook points, after checking all arguments; under the `torch.autocast`
        that is in force now.

        Args:
            model: the language model.
            tokens: rows of token ids that will be read.
            hook_points: names of the hook points, all different.
            mask: tokens to keep.
            dtype: dtype of the rows; None is the model's.

        Raises:
            ValueError: for an unknown or repeated hook point, a dtype that is not floating point, and a mask that keeps
                nothing.
        """
        model = as_model(model)
        names = tuple(find_hook_point(model, name) for name in hook_points)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`hook_points` must be at least one and all different, got {list(names)}.")
        dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating dtype such as torch.bfloat16, got {dtype}.")
        autocast = autocast_dtype(_kind_of(model))
        reader = cls(model=model, hook_points=names, mask=mask, dtype=dtype, autocast=autocast)
        if reader.count_rows(tokens) == 0:
            raise ValueError(f"`mask` must keep at least one token, got none: {mask}.")
        return reader

    def count_rows(self, tokens: Tokens) -> int:
        """Number of rows that the mask keeps before its norm rule, which needs the activations."""
        return int(replace(self.mask, max_norm_ratio=None).apply(tokens).keep.sum())

    def foresee_rows(self, tokens: Tokens) -> int | None:
        """Number of rows that will be read of `tokens`; None where the mask's norm rule decides on the activations."""
        return self.count_rows(tokens) if self.mask.max_norm_ratio is None else None

    def widths(self, tokens: Tokens) -> dict[str, int]:
        """Width of the activations by hook point, from a forward pass over one sequence."""
        return {name: x.shape[-1] for name, x in self._capture(tokens[:1]).items()}

    def calibrated(self, tokens: Tokens, n_seq: int) -> "ActivationReader":
        """The same reader with the median norms that the mask's norm rule compares with, where the mask has that rule.

        The medians are taken over the kept tokens among the first 16384 of `tokens`, in forward passes of `n_seq`
        sequences.
        """
        if self.mask.max_norm_ratio is None or self.median_norms is not None:
            return self
        return replace(self, median_norms=find_median_norms(self._capture, tokens, self.mask, n_seq))

    def read(self, batch: Tokens) -> ForwardRows:
        """Kept rows of one batch, from one forward pass; ValueError naming the hook point where a row is not finite in
        the stored dtype.
        """
        return self._rows_of(batch, self._capture(batch))

    def read_all(self, batches: Iterable[Tokens]) -> Generator[ForwardRows, None, None]:
        """Kept rows of each batch, in order, as from `read`; a narrow model runs several batches at a time on a CPU.

        Close the iterator where it is not read to its end.
        """

        def read(run: Capture, batch: Tokens) -> ForwardRows:
            with computing_in(self.autocast, _kind_of(self.model)):
                acts = run(batch.ids)
            return self._rows_of(batch, acts)

        several = [partial(read, run) for run in make_captures(self.model, self.hook_points)]
        return map_in_order(several or [self.read], batches)

    def _rows_of(self, batch: Tokens, acts: dict[str, Tensor]) -> ForwardRows:
        """Kept rows of one batch from its activations."""
        kept = self.mask.apply(batch, **self._outliers(acts))
        index = kept.keep.flatten().nonzero().squeeze(1)
        positions = torch.arange(batch.ctx_len, dtype=torch.int32).expand_as(batch.ids)
        columns = {"token_ids": batch.ids, "doc_ids": batch.doc_ids, "positions": positions}
        rows = {name: _select(x.flatten(0, 1), index).to(self.dtype) for name, x in acts.items()}
        for name, x in rows.items():
            require_finite(name, x)
        return ForwardRows(
            rows, {name: _select(column.flatten(), index) for name, column in columns.items()}, index, kept.removed
        )

    def request(self, tokens: Tokens) -> dict[str, Any]:
        """What determines the rows that are read, as a dictionary for JSON.

        Model, weights, hook points, mask, dtype, and a hash of `tokens`.
        """
        model = describe_model(self.model)
        return {
            "model": model.name,
            "weight_processing": model.weight_processing,
            "weights": _fingerprint_model(self.model),
            "hook_points": list(self.hook_points),
            "tokens_sha256": tokens.sha256,
            "mask": _plain(self.mask.to_dict()),
            "dtype": dtype_name(self.dtype),
        } | ({} if self.autocast is None else {"autocast": dtype_name(self.autocast)})

    def origins(
        self, tokens: Tokens, n_tokens: int, removed: dict[str, int], seed: int | None = None
    ) -> dict[str, Provenance]:
        """Provenance of what was read, by hook point.

        Args:
            tokens: the rows of token ids that were read.
            n_tokens: number of rows kept so far.
            removed: number of tokens removed by each rule of the mask.
            seed: seed of the order of sequences; None for the text's own order.
        """
        medians = self.median_norms or {}
        first = self._provenance(tokens, n_tokens, removed, seed)
        return {name: first.at(name, medians.get(name)) for name in self.hook_points}

    def _provenance(self, tokens: Tokens, n_tokens: int, removed: dict[str, int], seed: int | None) -> Provenance:
        model = describe_model(self.model)
        return Provenance(
            model=model.name,
            weight_processing=model.weight_processing,
            hook_point=self.hook_points[0],
            text=tokens.source,
            tokens_sha256=tokens.sha256,
            mask=_plain(self.mask.to_dict()),
            dtype=dtype_name(self.dtype),
            ctx_len=tokens.ctx_len,
            n_tokens=n_tokens,
            seed=seed,
            versions=dict(model.versions),
            removed=removed,
            model_sketch=sketch_weights(self.model),
            autocast=None if self.autocast is None else dtype_name(self.autocast),
            backend=model.backend,
        )

    def _capture(self, batch: Tokens) -> dict[str, Tensor]:
        with computing_in(self.autocast, _kind_of(self.model)):
            return capture(self.model, batch.ids, self.hook_points)

    def _outliers(self, acts: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of `TokenMask.apply` for the norm rule: norms relative to the median, the largest over the hook
        points, so that an outlier at one is dropped at all.

        Rows that are not finite count as ordinary here, so that they are reported rather than masked.
        """
        if self.median_norms is None:
            return {}
        ratios = [norms_of(x) / self.median_norms[name] for name, x in acts.items()]
        return {"norms": torch.stack(ratios).amax(0), "median": 1.0}


@dataclass(frozen=True, eq=False)
class Batch:
    """Activations to encode, and their indices in the text."""

    acts: Mapping[str, Float[Tensor, "n d_in"]]
    """activations by hook point"""
    places: Int64[Tensor, "n"]
    """index of each row in the source's text"""
    removed: dict[str, int]
    """number of tokens left out, by rule"""
    pixels: UInt8[Tensor, "n height width channels"] | None = None
    """images of documents"""


@runtime_checkable
class HarvestSource(Protocol):
    """Protocol of inputs: rows in a fixed order, read `size` items (sequences, or rows) at a time."""

    n_items: int
    size: int
    payload: PayloadKinds | None

    def read_all(self, starts: Sequence[int]) -> Generator[Batch, None, None]:
        """Activations of the batches that start at some items, in order; close it where it is not read to its end."""

    def count(self, start: int, stop: int) -> int:
        """Number of tokens in items `start` to `stop`."""

    def count_rows(self, start: int, stop: int) -> int | None:
        """Number of rows of items `start` to `stop`; None where that is not known before they are read."""

    def text(self) -> StoredText:
        """The text that the rows' `places` refer to."""

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the rows at a hook point."""


class TextSource:
    """Rows of token ids, whose activations are read by forward passes of the model."""

    payload: PayloadKinds | None = None

    def __init__(self, reader: ActivationReader, tokens: Tokens, n_seq: int) -> None:
        self.reader, self.tokens = reader, tokens
        self.n_items, self.size = len(tokens), n_seq

    def read_all(self, starts: Sequence[int]) -> Generator[Batch, None, None]:
        """Activations of the batches that start at some sequences, from one forward pass each."""
        batches = (self.tokens[start : start + self.size] for start in starts)
        with closing(self.reader.read_all(batches)) as readings:
            for start, reading in zip(starts, readings, strict=True):
                yield self.batch_of(start, reading)

    def batch_of(self, start: int, reading: ForwardRows) -> Batch:
        """The batch that starts at a sequence, from what was read of it."""
        places = self._places[start * self.tokens.ctx_len + reading.index]
        return Batch(reading.acts, places, reading.removed)

    def count(self, start: int, stop: int) -> int:
        """Number of tokens in sequences `start` to `stop`."""
        return self.tokens[start:stop].n_tokens

    def count_rows(self, start: int, stop: int) -> int | None:
        """Number of rows of sequences `start` to `stop`; None where the mask has a norm rule."""
        return self.reader.foresee_rows(self.tokens[start:stop])

    def calibrate(self, ranks: RankGrid) -> None:
        """Set the median norms that the mask's norm rule compares with: in all processes those that the first finds."""
        found = ranks.on_first(lambda: json.dumps(self.reader.calibrated(self.tokens, self.size).median_norms))
        self.reader = replace(self.reader, median_norms=json.loads(found))

    @cached_property
    def _places(self) -> Tensor:
        """Index of each token among those that are not padding."""
        return self.tokens.attention_mask.flatten().cumsum(0) - 1

    def text(self) -> StoredText:
        """All tokens, including those that the mask leaves out."""
        return text_of(self.tokens, self.reader.model)

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""
        return self.reader.request(self.tokens) | {"batch_size": self.size}

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the rows at a hook point."""
        return self.reader.origins(self.tokens, n_tokens, removed)[hook_point]


def rebuild_tokens(text: StoredText) -> Tokens:
    """Rows of token ids as the model read them, from the text of a store; padded on the right. ValueError where the
    text has gaps.
    """
    positions = np.asarray(text.positions).astype(np.int64)
    begins = np.append(True, positions[1:] <= positions[:-1]) if len(positions) else np.zeros(0, bool)
    row, ctx_len = np.cumsum(begins) - 1, int(positions.max(initial=0)) + 1
    ids = np.zeros((int(row[-1]) + 1, ctx_len), np.int32)
    doc_ids = np.full_like(ids, PADDING)
    ids[row, positions], doc_ids[row, positions] = text.token_ids, text.doc_ids
    first = positions[begins]
    if (first != 0).any() or (positions != np.arange(len(row)) - np.flatnonzero(begins)[row]).any():
        raise ValueError("A store must hold its text in whole rows to be encoded again, got gaps; harvest from tokens.")
    return Tokens(ids=torch.from_numpy(ids), doc_ids=torch.from_numpy(doc_ids), source="a feature store")


class SameRowsSource(TextSource):
    """A text source restricted to the tokens at given indices of the text.

    Args:
        reader: reads activations of tokens.
        tokens: the text.
        n_seq: sequences of a forward pass.
        places: indices of tokens in the text, ascending.
    """

    def __init__(self, reader: ActivationReader, tokens: Tokens, n_seq: int, places: np.ndarray) -> None:
        super().__init__(reader, tokens, n_seq)
        self.kept = torch.zeros(tokens.n_tokens, dtype=torch.bool)
        self.kept[torch.from_numpy(np.asarray(places).astype(np.int64))] = True

    def batch_of(self, start: int, reading: ForwardRows) -> Batch:
        """Rows of the batch that the store has."""
        batch = super().batch_of(start, reading)
        here = self.kept[batch.places]
        acts = {name: x[here.to(x.device)] for name, x in batch.acts.items()}
        return replace(batch, acts=acts, places=batch.places[here])

    def count_rows(self, start: int, stop: int) -> int:
        """Number of rows that the store has of sequences `start` to `stop`."""
        first = self.count(0, start)
        return int(self.kept[first : first + self.count(start, stop)].sum())

    def sample(self, n_tokens: int) -> dict[str, Tensor]:
        """Activations of at most `n_tokens` rows by hook point, from the beginning of the text."""
        parts: list[dict[str, Tensor]] = []
        with closing(self.read_all(range(0, self.n_items, self.size))) as batches:
            for batch in batches:
                parts.append(dict(batch.acts))
                if sum(len(next(iter(part.values()))) for part in parts) >= n_tokens:
                    break
        return {name: torch.cat([part[name] for part in parts])[:n_tokens].float() for name in parts[0]}


class ActivationsSource:
    """Activations of one hook point, collected before; the stored text consists of their tokens only, so those that the
    mask removed are missing.
    """

    payload: PayloadKinds | None = None

    def __init__(self, acts: Activations, model: Model | None, n_rows: int) -> None:
        if acts.provenance is None or acts.token_ids is None or acts.doc_ids is None or acts.positions is None:
            raise ValueError(
                "Activations must know their tokens, documents, positions and origin to be harvested, got some that do "
                "not; give what `collect` returned."
            )
        self.acts, self.model, self._origin = acts, model, acts.provenance
        self.n_items, self.size = len(acts), n_rows

    def read_all(self, starts: Sequence[int]) -> Generator[Batch, None, None]:
        """The batches of activations that start at some rows."""
        for start in starts:
            x = self.acts[start : start + self.size]
            yield Batch({self.acts.hook_point: x.float()}, torch.arange(start, start + len(x)), {})

    def count(self, start: int, stop: int) -> int:
        """Number of rows from `start` to `stop`."""
        return stop - start

    def count_rows(self, start: int, stop: int) -> int | None:
        """Number of rows from `start` to `stop`."""
        return stop - start

    def text(self) -> StoredText:
        """The tokens of the rows."""
        columns = (self.acts.token_ids, self.acts.doc_ids, self.acts.positions)
        return make_text([column.numpy() for column in columns if column is not None], self.model)

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""
        return {"activations": self._origin.to_dict(), "rows": len(self.acts), "batch_size": self.size}

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the activations."""
        return self._origin


class DocumentsSource(ActivationsSource):
    """Rows that are documents; the stored text is theirs, in words."""

    def __init__(self, acts: Activations, n_rows: int) -> None:
        if acts.provenance is None or acts.payload is None:
            raise ValueError("Activations must know their origin to be harvested, got some without; take `embed`'s.")
        self.acts, self.model, self._origin, self.payload = acts, None, acts.provenance, acts.payload
        self.n_items, self.size = len(acts), n_rows

    def read_all(self, starts: Sequence[int]) -> Generator[Batch, None, None]:
        """The batches of documents that start at some rows."""
        places = torch.from_numpy(np.flatnonzero(self._text.positions == 0))
        for start in starts:
            x, pixels = self.acts[start : start + self.size], self.acts.read_pixels(start, start + self.size)
            yield Batch({self.acts.hook_point: x.float()}, places[start : start + len(x)], {}, pixels)

    @cached_property
    def _text(self) -> StoredText:
        if self.acts.read_texts(0, 0) is None:
            return number_documents(self.n_items)
        starts = range(0, self.n_items, PART)
        parts = (self.acts.read_texts(start, min(start + PART, self.n_items)) for start in starts)
        return split_words(text for part in parts for text in part or ())

    def text(self) -> StoredText:
        """The words of the documents."""
        return self._text


def text_of(tokens: Tokens, model: Model | None) -> StoredText:
    """All tokens but padding, with the strings of the model's tokenizer; without strings where there is none."""
    kept, positions = tokens.attention_mask.flatten(), torch.arange(tokens.ctx_len).expand_as(tokens.ids)
    return make_text([x.flatten()[kept].numpy() for x in (tokens.ids, tokens.doc_ids, positions)], model)


def make_text(columns: Sequence[np.ndarray], model: Model | None) -> StoredText:
    """A text of token ids, documents and positions, with strings as `text_of` gives them."""
    token_ids, doc_ids, positions = columns
    known = model is not None and model.tokenizer is not None
    strings = token_strings(model.tokenizer, np.unique(token_ids).tolist()) if known and model is not None else {}
    return StoredText(token_ids=token_ids, doc_ids=doc_ids, positions=positions, strings=strings)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash of the weights' names, shapes and dtypes and of about 64 evenly spaced values of each; differs between a
    model and its fine-tune.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        places = torch.arange(0, weight.numel(), max(1, weight.numel() // 64), device=weight.device)
        values = weight.detach().take(places).cpu()  # `flatten` would copy a transposed weight
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class WeightsFingerprint(str):
    """Fingerprint of a model's weights by Hugging Face's names, so that it is the same for either back end."""

    earlier: str | None = None
    """what was recorded of the same weights in a bridge before fingerprints were of Hugging Face's names"""


def _fingerprint_model(model: Model) -> WeightsFingerprint:
    named = dict(model.named_parameters())
    home = hook_points_of(model)
    if home.is_plain or not home.agrees:  # folded weights, or others that only a bridge has
        return WeightsFingerprint(fingerprint(named))
    made = WeightsFingerprint(fingerprint(dict(strip(model.original_model)[0].named_parameters())))
    made.earlier = fingerprint(named)
    return made


def _kind_of(model: Model) -> str:
    return next(model.parameters()).device.type


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    # Lists as after JSON, so that a stored mask equals a new one.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x if len(index) == len(x) else x.index_select(0, index.to(x.device))
