"""What a tokenizer has of its own, and a copy of it that the bridge may fill in."""

import copy
from typing import Any

FILLED = ("bos_token", "eos_token", "pad_token")
"""what transformer-lens names on a tokenizer that has none: EOS `<|endoftext|>`, BOS and padding after it"""


def own_special_tokens(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Ids by name (bos_token, eos_token, ...) of the special tokens that a tokenizer has of its own.

    The bridge gives every tokenizer a BOS, an EOS and a padding token. Those that the tokenizer was not made with do
    not count, nor does a name that is no token of the vocabulary, whose id is that of unknown words.

    >>> own_special_tokens(sl.tiny_model().tokenizer)
    {'bos_token': (0,), 'eos_token': (1,), 'pad_token': (2,)}
    """
    found = {}
    for name, value in tokenizer.special_tokens_map.items():
        if name in FILLED and not tokenizer.init_kwargs.get(name):
            continue
        tokens = value if isinstance(value, list | tuple) else [value]
        ids = tuple(i for i in (_find_id(tokenizer, str(token)) for token in tokens) if i is not None)
        if ids:
            found[name] = ids
    return found


def _find_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token of the vocabulary: of any other, a tokenizer gives that of unknown words."""
    i = tokenizer.convert_tokens_to_ids(token)
    return int(i) if i is not None and tokenizer.convert_ids_to_tokens(int(i)) == token else None


def marked_special(tokenizer: Any) -> set[int]:
    """Tokens that the tokenizer marks as special, with a name of their own or without, but for what was filled in."""
    own = {str(token) for token in (tokenizer.init_kwargs.get("added_tokens_decoder") or {}).values()}
    names = {str(getattr(tokenizer, name)) for name in FILLED if not tokenizer.init_kwargs.get(name)} - own
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ids = (_find_id(tokenizer, token) for token in (marked | set(tokenizer.all_special_tokens)) - names)
    return {i for i in ids if i is not None}


def copy_tokenizer(tokenizer: Any, name: str) -> Any:
    """A copy for the bridge, which names BOS, EOS and padding on it where they are missing; it keeps what was there.

    The bridge would load a tokenizer anew, by name, unless it says that BOS is taken care of: saelab adds BOS itself.
    """
    twin = copy.deepcopy(tokenizer)
    own = {key: getattr(twin, key, None) for key in FILLED}
    added = {"added_tokens_decoder": dict(twin.added_tokens_decoder)}
    twin.init_kwargs = {"name_or_path": name, **twin.init_kwargs, **added, **own, "add_bos_token": True}
    return twin
