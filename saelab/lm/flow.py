"""`Flow`: which tokens a running forward carries, and where each stands in its text."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.lm.door import door
from saelab.lm.models import Model
from saelab.lm.plain import OwnHook


@dataclass(frozen=True, eq=False)
class Passing:
    """The tokens of one forward: `n` new columns behind `n_past` columns that the key-value cache holds."""

    ids: Int[Tensor, "batch n"]
    positions: Int[Tensor, "batch n"]
    """places in the text, from 0 at a row's first token that is not padding; -1 for padding"""
    n_past: int
    n_prompt: int
    """columns of the text's first forward: what is behind them was generated"""
    lengths: Int[Tensor, "batch"]
    """tokens of each row's prompt, padding not counted"""

    @property
    def columns(self) -> Int[Tensor, "n"]:
        """Of the text, padding counted."""
        return torch.arange(self.n_past, self.n_past + self.ids.shape[1], device=self.ids.device)


@dataclass(eq=False)
class Flow(OwnHook):
    """Follows a model's forwards, whoever runs them: with a key-value cache, without one, padded on either side.

    A forward goes on with the text of the one before where it brings a cache, or where its ids begin with all ids of
    the one before: so it is in generation, with and without a cache. Any other forward begins a new text.
    """

    now: Passing | None = None
    n_forwards: int = 0
    seen: Tensor | None = None
    """ids of the text so far"""
    prompt: tuple[int, Tensor] = field(default_factory=lambda: (0, torch.zeros(0)))

    def follow(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take note of a forward that begins (a pre-hook with keyword arguments)."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ValueError("Steering needs forwards that get token ids (batch, n), got one without `input_ids`.")
        n_past = _count_past(kwargs.get("past_key_values"))
        goes_on = self._goes_on(ids, n_past)
        self.seen = torch.cat([self.seen, ids], 1) if goes_on and n_past and self.seen is not None else ids
        positions = _find_positions(ids, n_past, kwargs.get("attention_mask"))
        if not goes_on:
            self.prompt = n_past + ids.shape[1], positions.max(1).values + 1
        self.now = Passing(ids, positions, n_past, *self.prompt)
        self.n_forwards += 1

    def _goes_on(self, ids: Tensor, n_past: int) -> bool:
        if self.seen is None or len(ids) != len(self.seen):
            return False
        n = self.seen.shape[1]
        return n_past > 0 or (ids.shape[1] > n and torch.equal(ids[:, :n], self.seen))


def _count_past(cache: Any) -> int:
    """Columns in a Hugging Face cache, of the new kind or the old tuples."""
    if cache is None:
        return 0
    return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2])


def _find_positions(ids: Tensor, n_past: int, attention_mask: Tensor | None) -> Tensor:
    """Places counted over real tokens; all are real where no mask over past and new columns is given."""
    n = ids.shape[1]
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.shape[1] < n_past + n:
        return torch.arange(n_past, n_past + n, device=ids.device).expand(len(ids), n)
    real = attention_mask[:, : n_past + n].bool()
    return (real.cumsum(1) - 1).masked_fill(~real, -1)[:, n_past:].to(ids.device)


@contextmanager
def watch(model: Model) -> Iterator[Flow]:
    """Inside the block the `Flow` knows of every forward of the model, through the bridge or its plain twin."""
    home, flow = door(model), Flow()
    with ExitStack() as stack:
        for module in (home.bridged, home.plain):
            if module is not None:
                stack.enter_context(module.register_forward_pre_hook(flow.follow, with_kwargs=True))
        yield flow
