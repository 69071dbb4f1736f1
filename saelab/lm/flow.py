"""`Flow`: tracking which tokens each forward pass processes, and their positions in the text."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.lm.cache import count_columns, find_given, require_whole
from saelab.lm.door import Door, door
from saelab.lm.models import Model
from saelab.lm.plain import OwnHook


@dataclass(frozen=True, eq=False)
class Passing:
    """Tokens of one forward pass: `n` new columns after `n_past` columns in the key-value cache."""

    ids: Int[Tensor, "batch n"]
    """token ids of the new columns"""
    positions: Int[Tensor, "batch n"]
    """positions in the text, from 0 at a row's first token that is not padding; -1 for padding"""
    n_past: int
    """number of columns in the cache"""
    n_prompt: int
    """number of columns of the text's first forward pass; later columns were generated"""
    lengths: Int[Tensor, "batch"]
    """number of tokens of each row's prompt, without padding"""

    @property
    def columns(self) -> Int[Tensor, "n"]:
        """Indices of the new columns in the text, padding included."""
        return torch.arange(self.n_past, self.n_past + self.ids.shape[1], device=self.ids.device)


@dataclass(eq=False)
class Flow(OwnHook):
    """Tracks the tokens of a model's forward passes, with or without a key-value cache, padded on either side.

    A forward pass continues the text of the one before where it brings a cache, or where each of its rows is a row of
    the one before plus one token, as in generation with and without a cache, beam search included. Any other forward
    pass begins a new text, and so does one with an empty cache.
    """

    home: Door
    """hook points of the model"""
    now: Passing | None = None
    """tokens of the running or last forward pass"""
    n_forwards: int = 0
    """number of forward passes so far"""
    seen: Tensor | None = None
    """ids of the text so far"""
    ends: Tensor | None = None
    """position of each row's last token"""
    prompt: tuple[int, Tensor] = field(default_factory=lambda: (0, torch.zeros(0)))
    """number of columns of the text's first forward pass, and tokens of each row in it"""

    def follow(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record a forward pass that begins (a pre-hook with keyword arguments); ValueError where its tokens cannot be
        tracked.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ValueError("Steering needs forwards that get token ids (batch, n), got one without `input_ids`.")
        if module is self.home.bridged and not self.home.bridge_is_right:
            raise ValueError(
                "Steering follows a bridge only where it computes what its model does, got one with other logits than "
                "Hugging Face's. Use `sl.logits` and `sl.generate`, which run Hugging Face's own modules."
            )
        kwargs = _name_arguments(module, args) | kwargs
        cache = find_given(kwargs)
        if cache is not None and self.home.caching(module).argument is None:  # even if it is empty
            raise ValueError(
                "A forward may go on from a cache only where that gives the logits of the whole text, got one through "
                "a model that loses it, as a TransformerBridge may with another release of transformers. Run with "
                "use_cache=False (`use_past_kv_cache=False` for the bridge's own `generate`), or use `sl.generate`."
            )
        if cache is None:
            require_whole(ids.shape[1], kwargs)
        n_past = self._count_past(cache)
        goes_on = self._goes_on(ids, n_past) and (n_past > 0 or cache is None)
        self.seen = torch.cat([self.seen, ids], 1) if goes_on and n_past and self.seen is not None else ids
        before = self.ends if goes_on and n_past else None
        positions = _find_positions(ids, n_past, kwargs.get("attention_mask"), before)
        self.ends = positions.max(1).values
        if not goes_on:
            self.prompt = n_past + ids.shape[1], positions.max(1).values + 1
        self.now = Passing(ids, positions, n_past, *self.prompt)
        self.n_forwards += 1

    def _count_past(self, cache: Any) -> int:
        n_past = count_columns(cache)
        if n_past is not None:
            return n_past
        if self.seen is None:
            raise ValueError(
                f"Steering must see a text from its first token where its state does not count them "
                f"({type(cache).__name__}), got a forward in the middle. Run the whole text inside the block."
            )
        return self.seen.shape[1]

    def _goes_on(self, ids: Tensor, n_past: int) -> bool:
        if self.seen is None or len(ids) != len(self.seen):
            return False
        if n_past > 0 or ids.shape[1] != self.seen.shape[1] + 1:
            return n_past > 0
        before = ids[:, :-1]
        same = before == self.seen
        strays = before[~same.all(1)]  # beam search reorders its rows
        return bool((strays[:, None] == self.seen).all(2).any(1).all())


def _name_arguments(module: torch.nn.Module, args: tuple) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if len(args) > 1 else {}


def _find_positions(ids: Tensor, n_past: int, attention_mask: Any, before: Tensor | None) -> Tensor:
    """Positions counted over real tokens. Without a mask all are real and follow those of the forward pass before.

    ValueError for a mask that does not show which columns are padding.
    """
    n = ids.shape[1]
    if attention_mask is None:
        first = torch.full((len(ids),), n_past) if before is None else before + 1
        return first.to(ids.device)[:, None] + torch.arange(n, device=ids.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] < n_past + n:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"Steering needs to know padding: `attention_mask` must be (batch, {n_past + n}), past and new columns, or "
            f"left out, got {got}."
        )
    real = attention_mask[:, : n_past + n].bool()
    return (real.cumsum(1) - 1).masked_fill(~real, -1)[:, n_past:].to(ids.device)


@contextmanager
def watch(model: Model) -> Iterator[Flow]:
    """Context manager that yields a `Flow` tracking every forward pass of the model, through the bridge or the plain
    Hugging Face model.
    """
    home = door(model)
    flow = Flow(home)
    with ExitStack() as stack:
        for module in (home.bridged, home.plain):
            if module is not None:
                stack.enter_context(module.register_forward_pre_hook(flow.follow, with_kwargs=True))
        yield flow
