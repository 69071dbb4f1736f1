"""Inputs of `harvest`: text with its model, or activations collected before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab.collecting.reader import Reader
from saelab.lm.models import Model
from saelab.lm.strings import token_strings
from saelab.lm.tokens import Tokens
from saelab.stores.activations import Activations
from saelab.stores.corpus import StoredText
from saelab.stores.provenance import Provenance


@dataclass(frozen=True, eq=False)
class Batch:
    """Activations to encode, and their indices in the text."""

    acts: Mapping[str, Float[Tensor, "n d_in"]]
    """activations by hook point"""
    places: Int64[Tensor, "n"]
    """index of each row in the source's text"""
    removed: dict[str, int]
    """number of tokens left out, by rule"""


@runtime_checkable
class Source(Protocol):
    """Protocol of inputs: rows in a fixed order, read `size` units (sequences, or rows) at a time."""

    n_units: int
    size: int

    def read(self, start: int) -> Batch:
        """Activations of the batch that starts at a unit."""

    def count(self, start: int, stop: int) -> int:
        """Number of tokens in units `start` to `stop`."""

    def text(self) -> StoredText:
        """The text that the rows' `places` refer to."""

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the rows at a hook point."""


class TextSource:
    """Rows of token ids, whose activations are read by forward passes of the model."""

    def __init__(self, reader: Reader, tokens: Tokens, n_seq: int) -> None:
        self.reader, self.tokens = reader, tokens
        self.n_units, self.size = len(tokens), n_seq

    def read(self, start: int) -> Batch:
        """Activations of the batch that starts at a sequence, from one forward pass."""
        reading = self.reader.read(self.tokens[start : start + self.size])
        places = self._places[start * self.tokens.ctx_len + reading.index]
        return Batch(reading.acts, places, reading.removed)

    def count(self, start: int, stop: int) -> int:
        """Number of tokens in sequences `start` to `stop`."""
        return self.tokens[start:stop].n_tokens

    @cached_property
    def _places(self) -> Tensor:
        """Index of each token among those that are not padding."""
        return self.tokens.attention_mask.flatten().cumsum(0) - 1

    def text(self) -> StoredText:
        """All tokens, including those that the mask leaves out."""
        kept, tokens = self.tokens.attention_mask.flatten(), self.tokens
        positions = torch.arange(tokens.ctx_len).expand_as(tokens.ids)
        columns = (tokens.ids, tokens.doc_ids, positions)
        return _make_text([column.flatten()[kept].numpy() for column in columns], self.reader.model)

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""
        return self.reader.request(self.tokens) | {"batch_size": self.size}

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the rows at a hook point."""
        return self.reader.origins(self.tokens, n_tokens, removed)[hook_point]


class ActivationsSource:
    """Activations of one hook point, collected before; the stored text consists of their tokens only, so those that the
    mask removed are missing.
    """

    def __init__(self, acts: Activations, model: "Model | None", n_rows: int) -> None:
        if acts.provenance is None or acts.token_ids is None or acts.doc_ids is None or acts.positions is None:
            raise ValueError(
                "Activations must know their tokens, documents, positions and origin to be harvested, got some that do "
                "not; give what `collect` returned."
            )
        self.acts, self.model, self._origin = acts, model, acts.provenance
        self.n_units, self.size = len(acts), n_rows

    def read(self, start: int) -> Batch:
        """The batch of activations that starts at a row."""
        x = self.acts[start : start + self.size]
        return Batch({self.acts.hook_point: x.float()}, torch.arange(start, start + len(x)), {})

    def count(self, start: int, stop: int) -> int:
        """Number of rows from `start` to `stop`."""
        return stop - start

    def text(self) -> StoredText:
        """The tokens of the rows."""
        columns = (self.acts.token_ids, self.acts.doc_ids, self.acts.positions)
        return _make_text([column.numpy() for column in columns if column is not None], self.model)

    def request(self) -> dict[str, Any]:
        """The arguments that determine the rows, as a dictionary for JSON."""
        return {"activations": self._origin.to_dict(), "rows": len(self.acts), "batch_size": self.size}

    def origin(self, hook_point: str, n_tokens: int, removed: dict[str, int]) -> Provenance:
        """Provenance of the activations."""
        return self._origin


def _make_text(columns: Sequence[np.ndarray], model: "Model | None") -> StoredText:
    token_ids, doc_ids, positions = columns
    known = model is not None and model.tokenizer is not None
    strings = token_strings(model.tokenizer, np.unique(token_ids).tolist()) if known and model is not None else {}
    return StoredText(token_ids=token_ids, doc_ids=doc_ids, positions=positions, strings=strings)
