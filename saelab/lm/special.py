"""Special tokens: those that the tokenizer itself defines, not those that the bridge has filled in."""

from collections.abc import Iterable
from typing import Any

from saelab.lm.models import Model
from saelab.lm.tokenizers import marked_special, own_special_tokens


def find_bos(model: Model) -> int | None:
    """Id of the tokenizer's own BOS token; None where it has none or the id is outside of the model's vocabulary."""
    return next((i for i in _known(model, own_special_tokens(model.tokenizer).get("bos_token", ()))), None)


def find_ends(model: Model) -> frozenset[int]:
    """Ids of tokens that end a text: the tokenizer's own EOS, and those of the model's generation settings.

    ValueError for a model without such settings, as generation would not stop.

    >>> sorted(find_ends(sl.tiny_model()))
    [1]
    """
    settings: Any = getattr(model.original_model, "generation_config", None)
    if not hasattr(settings, "eos_token_id"):
        raise ValueError(
            "A model must say which tokens end a text in `generation_config.eos_token_id` (None: none), got a "
            f"{type(model.original_model).__name__} without. Give it a `transformers.GenerationConfig`."
        )
    value = settings.eos_token_id
    found = [] if value is None else [int(i) for i in (value if isinstance(value, list | tuple) else [value])]
    if model.tokenizer is not None:
        found += own_special_tokens(model.tokenizer).get("eos_token", ())
    return frozenset(found)


def find_special_ids(model: Model) -> tuple[int, ...]:
    """Ids of all tokens that the tokenizer marks as special, named or not, except the unknown token.

    Unknown words are ordinary text; where the same token is BOS or EOS too, as in GPT-2, it is special.

    >>> find_special_ids(sl.tiny_model())
    (0, 1, 2)
    """
    tokenizer: Any = model.tokenizer
    named = own_special_tokens(tokenizer)
    unknown = set(named.pop("unk_token", ()))
    ids = {i for several in named.values() for i in several} | (marked_special(tokenizer) - unknown)
    return tuple(sorted(_known(model, ids)))


def read_text(model: Model, ids: Iterable[int]) -> str:
    """Text of token ids without special tokens; unknown words stay, which `skip_special_tokens` would remove.

    >>> read_text(sl.tiny_model(), [0, 74, 75, 1])
    'hi'
    """
    special = set(find_special_ids(model))
    text: str = model.tokenizer.decode([i for i in map(int, ids) if i not in special])
    return text


def _known(model: Model, ids: Iterable[int]) -> list[int]:
    return [i for i in ids if i < model.cfg.d_vocab]
