"""What a model carries from one forward to the next (keys and values, or a state), and whether it is right."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saelab.lm.plain import evaluating

logger = logging.getLogger(__name__)

NAMES = ("cache", "past_key_values", "cache_params", "state")
"""what Hugging Face's models call it, as an argument of the forward and as a field of its output: the first from
transformers 5.24 on, the last two in state-space and recurrent models"""
_WORDS = ("cache", "past", "state", "mem")
STAYING = (None, "default", "linear", "yarn", "llama3", "proportional", "mrope")
"""position schemes that leave positions as they are, however long a text becomes. "longrope" turns all of them
otherwise once, at the length it was made for, "dynamic" at every step from there on, and a scheme that is not known is
taken for one like it: a text is then read anew from that length on, which is right with any"""


def find_given(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, None where there is none.

    ValueError where one goes by a name that is not known: it would be taken for none, and a token for the text's first.
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
    """ValueError for `n` ids that came without a cache, where mask or positions say that more of the text is before."""
    mask = kwargs.get("attention_mask")
    reach = {"attention_mask": mask.shape[-1] if isinstance(mask, Tensor) else 0}
    for name in ("position_ids", "cache_position"):
        places = kwargs.get(name)
        reach[name] = int(places.max()) + 1 if isinstance(places, Tensor) and places.numel() else 0
    if told := [f"`{name}` up to {end}" for name, end in reach.items() if end > n]:
        raise ValueError(
            f"A forward without a cache must bring its whole text, got {n} ids with {' and '.join(told)}: its past is "
            f"held by something that is not known (a cache is one of {NAMES}). Run with use_cache=False."
        )


def find_returned(out: Any) -> Any:
    """The cache in the output of a forward; ValueError where it has none."""
    fields = out.keys() if hasattr(out, "keys") else ()
    for name in NAMES:
        if name in fields and out[name] is not None:
            return out[name]
    raise ValueError(f"A forward with use_cache=True must return its cache as one of {NAMES}, got {list(fields)}.")


def count_columns(cache: Any) -> int | None:
    """Columns that a cache holds; None where it holds some, but does not count them (recurrent states).

    ValueError for a kind of cache that is not known.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # layers without attention alone
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
    """How a model goes on with a text, as far as that was seen to be right on the model itself."""

    argument: str | None
    """of its forward, which takes the cache; None where steps with a cache give other logits than without, or fail"""
    in_pieces: bool
    """with a cache several tokens may be read at once"""
    padded: bool
    """rows that are padded on the left give what they give alone"""
    placed: bool = False
    """its forward takes positions: some models (Qwen-VL, GLM-4V) else go by what they noted of the last picture"""

    def pads(self, model: nn.Module, n: int) -> bool:
        """Whether rows of unequal length may go together, none of them longer than `n` in the end."""
        border = find_border(model)
        return self.padded and (border is None or n <= border[0])

    def keeps(self, model: nn.Module, n_read: int, n_tokens: int) -> bool:
        """Whether a cache stays right while a text of `n_read` tokens becomes `n_tokens` longer."""
        border = find_border(model)
        if self.argument is None or border is None:
            return self.argument is not None
        length, goes_on = border
        return n_read + n_tokens <= length or (n_read > length and not goes_on)

    def go_on(self, out: Any, real: Tensor, begin: int, end: int) -> dict[str, Any]:
        """Arguments of the forward that goes on from an output with columns `begin` to `end` of rows."""
        assert self.argument is not None
        return {self.argument: find_returned(out)} | place_columns(real, begin, end, self.placed)


@torch.no_grad()
def measure_caching(model: nn.Module, ids: Tensor) -> Caching:
    """How a model may go on with a text, seen in some short forwards on `ids`, two rows of 16 tokens or so.

    One that may not use a cache, or must not be padded, is named in the log, once.
    """
    argument, n = _find_argument(model), ids.shape[1]
    head, left = -(-n // 2), n // 4  # tokens read at once before single steps, and padding
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
    """What the forward calls the cache that it takes."""
    wanted = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in wanted), None)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _read(
    model: nn.Module, ids: Tensor, argument: str | None, sizes: Sequence[int], real: Tensor | None = None
) -> Tensor:
    """Logits behind all tokens, read in pieces of some sizes; in one piece without a cache."""
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
    """Mask and positions of some columns of rows padded on the left; where nothing is padded none, which is faster.

    `placed`: positions all the same where the columns go on from others.
    """
    padded = not bool(real[:, :end].all())
    if not padded and not (placed and begin):
        return {}
    seen = real[:, :end].long()
    positions = {"position_ids": (seen.cumsum(1) - 1).clamp_min(0)[:, begin:]}
    return {"attention_mask": seen} | positions if padded else positions


def _try(read: Any) -> Tensor | None:
    """What a model says, None where it cannot: whatever its cache raises only says that it is not to be used."""
    try:
        found: Tensor = read()
    except Exception as error:
        logger.info("A way to go on with a text is not open: %s: %s", type(error).__name__, error)
        return None
    return found


def _agree(found: Tensor | None, expected: Tensor | None) -> bool:
    """Equal at every token, up to another order of rounding: 0.1 % of the logits' spread, 5 % in half precision."""
    if found is None or expected is None or found.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    expected = expected.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((found.double() - expected).norm(dim=-1) <= tolerance * spread).all())


def find_border(model: nn.Module) -> tuple[int, bool] | None:
    """The length from which on a text's positions are all turned otherwise, and whether they then go on changing.

    None for schemes that leave positions as they were. A cache that was filled before the border is wrong behind it,
    and so is one row beside a longer one that is there already.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for told in _read_schemes(text):
        kind = told.get("rope_type", told.get("type"))
        if kind not in STAYING:
            length = told.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(length or text.max_position_embeddings), kind != "longrope"
    return None


def _read_schemes(config: Any) -> list[Mapping[str, Any]]:
    """What a configuration says of rotary positions, one for all layers or by kind of layer."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        told = getattr(config, name, None)
        if isinstance(told, Mapping):
            found += [told, *(part for part in told.values() if isinstance(part, Mapping))]
    return found
