"""Key-value caches and recurrent states: how a model passes them, and whether continuing from them is correct."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saelab.lm.unwrapped import evaluating

logger = logging.getLogger(__name__)

NAMES = ("cache", "past_key_values", "cache_params", "state")
"""names of the cache in Hugging Face's models, as an argument of the forward pass and as a field of its output: the
first from transformers 5.24 on, the last two in state-space and recurrent models
"""
_WORDS = ("cache", "past", "state", "mem")
STAYING = (None, "default", "linear", "yarn", "llama3", "proportional", "mrope")
"""rotary position types whose angles do not depend on the text's length. "longrope" changes all angles once, at the
length it was made for, "dynamic" at every step from there on, and an unknown type is treated like "dynamic": from that
length on the whole text is run again, which is right with any type
"""


def find_given(kwargs: Mapping[str, Any]) -> Any:
    """Cache among the arguments of a forward pass, or None.

    ValueError where there is a cache under an unknown name: it would be ignored, and a token taken for the text's
    first.
    """
    if unknown := [name for name, value in kwargs.items() if name not in NAMES and _holds_a_past(name, value)]:
        raise ValueError(
            f"The cache of a forward must go by one of the names {NAMES}, got {unknown}. Another release of "
            "transformers may use them; or run with use_cache=False."
        )
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def _holds_a_past(name: str, value: Any) -> bool:
    """Whether an argument can only be a cache: by its name or its methods, and not a switch, a number or one tensor."""
    plain = value is None or isinstance(value, bool | int | float | str | Tensor)
    return not plain and (hasattr(value, "get_seq_length") or any(word in name for word in _WORDS))


def require_whole(n: int, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for `n` ids without a cache, where mask or positions show that earlier tokens of the text are
    missing.
    """
    mask = kwargs.get("attention_mask")
    reach = {"attention_mask": mask.shape[-1] if isinstance(mask, Tensor) else 0}
    for name in ("position_ids", "cache_position"):
        places = kwargs.get(name)
        reach[name] = int(places.max()) + 1 if isinstance(places, Tensor) and places.numel() else 0
    if outside := [f"`{name}` up to {end}" for name, end in reach.items() if end > n]:
        raise ValueError(
            f"A forward without a cache must bring its whole text, got {n} ids with {' and '.join(outside)}: its past "
            f"is held by something that is not known (a cache is one of {NAMES}). Run with use_cache=False."
        )


def find_returned(out: Any) -> Any:
    """Cache in the output of a forward pass; ValueError where it has none."""
    fields = out.keys() if hasattr(out, "keys") else ()
    for name in NAMES:
        if name in fields and out[name] is not None:
            return out[name]
    raise ValueError(f"A forward with use_cache=True must return its cache as one of {NAMES}, got {list(fields)}.")


def count_columns(cache: Any) -> int | None:
    """Number of tokens that a cache holds; None where it holds some, but does not count them (recurrent states).

    ValueError for an unknown kind of cache.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # no layer has attention
            return None if cache.has_previous_state() else 0
    if isinstance(cache, list | tuple) and len(cache):
        first = cache[0]
        return None if isinstance(first, Tensor) else int(first[0].shape[-2])
    raise ValueError(
        f"A cache must be one of Hugging Face's, whose tokens can be counted, got {type(cache).__name__}; run with "
        "use_cache=False."
    )


@dataclass(frozen=True)
class Caching:
    """Which ways of continuing a text give the same logits as running it whole, as measured on the model itself."""

    argument: str | None
    """name of the argument of the forward pass that takes the cache; None where steps with a cache give other logits
    than without, or fail
    """
    in_pieces: bool
    """whether several tokens at once may be run with a cache"""
    padded: bool
    """whether rows padded on the left give the logits that they give alone"""
    placed: bool = False
    """whether the forward pass takes positions, which some models (Qwen-VL, GLM-4V) otherwise derive from the last
    picture they saw
    """

    def pads(self, model: nn.Module, n: int) -> bool:
        """Whether rows of unequal length may be batched, padded on the left, if none grows beyond `n` tokens."""
        border = find_border(model)
        return self.padded and (border is None or n <= border[0])

    def keeps(self, model: nn.Module, n_read: int, n_tokens: int) -> bool:
        """Whether a cache stays valid while a text of `n_read` tokens is continued by `n_tokens`."""
        border = find_border(model)
        if self.argument is None or border is None:
            return self.argument is not None
        length, goes_on = border
        return n_read + n_tokens <= length or (n_read > length and not goes_on)

    def go_on(self, out: Any, real: Tensor, begin: int, end: int) -> dict[str, Any]:
        """Keyword arguments of a forward pass over columns `begin:end` that continues from the output of the last one.

        Args:
            out: output of the forward pass before, with its cache.
            real: (batch, n) mask of tokens that are not padding, all columns so far.
            begin: first new column.
            end: column after the last new one.
        """
        assert self.argument is not None
        return {self.argument: find_returned(out)} | place_columns(real, begin, end, self.placed)


@torch.no_grad()
def measure_caching(model: nn.Module, ids: Tensor) -> Caching:
    """How the model may continue a text, from a few short forward passes on `ids`, two rows of about 16 tokens.

    A model that may not use a cache, or must not be padded, is logged once.
    """
    argument, n = _find_argument(model), ids.shape[1]
    head, left = -(-n // 2), n // 4  # tokens run at once before single steps; padded tokens
    with evaluating(model):
        whole = _try(lambda: _read(model, ids, None, [n]))
        alone = _try(lambda: _read(model, ids[1:, left:], None, [n - left]))
        steps = [head, *[1] * (n - head)]
        cached = argument is not None and _agree(_try(lambda: _read(model, ids, argument, steps)), whole)
        known = argument if cached else None
        pieces = cached and _agree(_try(lambda: _read(model, ids, known, [head, n - head])), whole)
        real = torch.ones_like(ids)
        real[1, :left] = 0
        ways = [[n], *([steps] if cached else [])]
        padded = all(
            _agree(_try(lambda way=way: _read(model, ids, known, way, real)[1:, left:]), alone) for way in ways
        )
    name = type(model).__name__
    if not cached:
        logger.warning("%s is run without a cache: steps with one give other logits than without, or fail.", name)
    if not padded:
        logger.warning("%s is run with rows of one length only: padding on the left changes its logits.", name)
    return Caching(known, pieces, padded, _takes_positions(model))


def _find_argument(model: nn.Module) -> str | None:
    """Name of the argument of the forward pass that takes a cache."""
    wanted = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in wanted), None)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _read(
    model: nn.Module, ids: Tensor, argument: str | None, sizes: Sequence[int], real: Tensor | None = None
) -> Tensor:
    """Logits of all tokens, run in pieces of the given sizes; a single piece uses no cache."""
    out, begin, found, placed = None, 0, [], _takes_positions(model)
    real = torch.ones_like(ids) if real is None else real
    for size in sizes:
        end = begin + size
        options: dict[str, Any] = {"use_cache": len(sizes) > 1} | place_columns(real, begin, end, placed)
        if out is not None and argument is not None:
            options[argument] = find_returned(out)
        out = model(ids[:, begin:end], **options)
        found.append(out.logits)
        begin = end
    return torch.cat(found, 1)


def place_columns(real: Tensor, begin: int, end: int, placed: bool = False) -> dict[str, Any]:
    """Attention mask and positions of some columns of left-padded rows; empty where nothing is padded, which is faster.

    Args:
        real: (batch, n) mask of tokens that are not padding.
        begin: first column to run.
        end: column after the last.
        placed: give positions even without padding, where the columns continue from others.
    """
    padded = not bool(real[:, :end].all())
    if not padded and not (placed and begin):
        return {}
    seen = real[:, :end].long()
    positions = {"position_ids": (seen.cumsum(1) - 1).clamp_min(0)[:, begin:]}
    return {"attention_mask": seen} | positions if padded else positions


def _try(read: Any) -> Tensor | None:
    """Logits, or None where the model raises: any error only means that this way of continuing is not used."""
    try:
        found: Tensor = read()
    except Exception as error:
        logger.info("A way to go on with a text is not open: %s: %s", type(error).__name__, error)
        return None
    return found


def _agree(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether logits are equal at every token up to rounding: 0.1 % of the logits' spread, 5 % in half precision."""
    if found is None or expected is None or found.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    expected = expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((found.double() - expected).norm(dim=-1) <= tolerance * spread).all())


def find_border(model: nn.Module) -> tuple[int, bool] | None:
    """Length at which all rotary angles change, and whether they keep changing afterward; None for angles that never
    change.

    A cache filled before that length is wrong after it, and so is a short row batched with one that is already longer.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for scheme in _read_schemes(text):
        kind = scheme.get("rope_type", scheme.get("type"))
        if kind not in STAYING:
            length = scheme.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(length or text.max_position_embeddings), kind != "longrope"
    return None


def _read_schemes(config: Any) -> list[Mapping[str, Any]]:
    """Rotary position settings of a configuration, one for all layers or per kind of layer."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        scheme = getattr(config, name, None)
        if isinstance(scheme, Mapping):
            found += [scheme, *(part for part in scheme.values() if isinstance(part, Mapping))]
    return found
