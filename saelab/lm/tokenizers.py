"""Special tokens that a tokenizer itself defines, and a copy of the tokenizer that the bridge may modify."""

import copy
from typing import Any

FILLED = ("bos_token", "eos_token", "pad_token")
"""special tokens that transformer-lens adds to a tokenizer without them: EOS `<|endoftext|>`, BOS and padding
after it
"""


def own_special_tokens(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Ids by name (bos_token, eos_token, ...) of the special tokens that a tokenizer itself defines.

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
    """Id of a token of the vocabulary, or None; for any other string a tokenizer returns the id of unknown words."""
    i = tokenizer.convert_tokens_to_ids(token)
    return int(i) if i is not None and tokenizer.convert_ids_to_tokens(int(i)) == token else None


def marked_special(tokenizer: Any) -> set[int]:
    """Ids of tokens that the tokenizer marks as special, named or not, without those that the bridge added."""
    own = {str(token) for token in (tokenizer.init_kwargs.get("added_tokens_decoder") or {}).values()}
    names = {str(getattr(tokenizer, name)) for name in FILLED if not tokenizer.init_kwargs.get(name)} - own
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ids = (_find_id(tokenizer, token) for token in (marked | set(tokenizer.all_special_tokens)) - names)
    return {i for i in ids if i is not None}


def copy_tokenizer(tokenizer: Any, name: str) -> Any:
    """A copy of the tokenizer for the bridge, which sets missing BOS, EOS and padding tokens on it; the original stays
    unchanged.

    The copy is marked as adding BOS, as otherwise the bridge would load the tokenizer again, by name; saelab adds BOS
    itself.
    """
    twin = copy.deepcopy(tokenizer)
    own = {key: getattr(twin, key, None) for key in FILLED}
    added = {"added_tokens_decoder": dict(twin.added_tokens_decoder)}
    twin.init_kwargs = {"name_or_path": name, **twin.init_kwargs, **added, **own, "add_bos_token": True}
    return twin
