"""Tokenizers: token ids and strings that are unique per token, special tokens, and a word-level tokenizer.

Special tokens are those that the tokenizer itself defines, not those that the bridge has filled in; the bridge may
modify a copy of the tokenizer only. Strings include tokens that are parts of a character.
"""

import copy
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

from saelab.lm.model_checks import Model
from saelab.stores.corpus import BYTE, Spelling, name_bytes, read_name

FILLED = ("bos_token", "eos_token", "pad_token")
"""special tokens that transformer-lens adds to a tokenizer without them: EOS `<|endoftext|>`, BOS and padding
after it
"""
NUMBER = re.compile("<([0-9]{1,9})>")
AS_WRITTEN = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def own_special_tokens(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Ids by name (bos_token, eos_token, ...) of the special tokens that a tokenizer itself defines.

    The bridge gives every tokenizer a BOS, an EOS and a padding token. Those that the tokenizer was not made with do
    not count, nor does a name that is no token of the vocabulary, whose id is that of unknown words.

    >>> own_special_tokens(sl.lm.tiny_model().tokenizer)
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


def token_bytes(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, bytes]:
    """Bytes that each token adds to a text after another token; the text of several tokens is the concatenation of
    their bytes.

    Decoding a token alone would lose the space that some tokenizers keep apart, so each is decoded after an anchor
    token, whose own text is cut off. A token that is a part of a character has no text of its own: its bytes are read
    from its name in the vocabulary, and checked against what the tokenizer decodes. Special tokens are spelled as in
    the vocabulary; an id without a token, and one that adds nothing, has no bytes.

    >>> tokenizer = sl.lm.tiny_model().tokenizer
    >>> list(token_bytes(tokenizer, tokenizer("é")["input_ids"]).values())
    [b'<s>', b'\\xa9', b'\\xc3']
    """
    ids = sorted({int(i) for i in token_ids})
    known = [i for i in ids if i >= 0 and (getattr(tokenizer, "is_fast", False) or i < len(tokenizer))]
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor, **AS_WRITTEN)
    found = dict.fromkeys(ids, b"")
    for i in known:
        text = tokenizer.decode([*anchor, i], **AS_WRITTEN)
        is_behind = text.startswith(before)
        read = text[len(before) :] if is_behind else tokenizer.decode([i], **AS_WRITTEN)
        if is_behind and read and "\ufffd" not in read:
            found[i] = read.encode("utf-8", "replace")
        else:  # mostly parts of a character
            found[i] = _read_bytes(tokenizer.convert_ids_to_tokens(i), read, tokenizer.decode([i], **AS_WRITTEN))
    return found


def _read_bytes(piece: Any, read: str, alone: str) -> bytes:
    """Bytes of a token from its name, where the tokenizer decodes them identically; else those of its text."""
    for raw in _guess_bytes(piece):
        if any(raw.decode("utf-8", errors) in (read, alone) for errors in ("replace", "ignore")):
            return raw
    return read.encode("utf-8", "replace")


def _guess_bytes(piece: Any) -> list[bytes]:
    """Bytes that the name of a token may represent: bytes, <0xE4>, GPT-2's letters for bytes, or characters below
    256.
    """
    if isinstance(piece, bytes):
        return [piece]
    if not isinstance(piece, str) or not piece:
        return []
    found = []
    if match := BYTE.fullmatch(piece):
        found.append(bytes([int(match[1], 16)]))
    letters = _byte_letters()
    if all(c in letters for c in piece):
        found.append(bytes(letters[c] for c in piece))
    if all(ord(c) < 256 for c in piece):
        found.append(piece.encode("latin-1"))
    return found


@cache
def _byte_letters() -> dict[str, int]:
    """Byte for each letter of byte-level vocabularies: printable ones represent themselves, the others begin at
    U+0100.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def token_strings(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """String of each token as it appears after another one, different for every token: "the" inside a sentence is "
    the".

    Bytes that are no character by themselves are shown as <0xE4>, also those of an ASCII character that has another
    token, and a token that adds nothing to a text as its number, <17>. `find_token_id` is the inverse.

    >>> tokenizer = sl.lm.tiny_model().tokenizer
    >>> list(token_strings(tokenizer, tokenizer("hi")["input_ids"]).values())
    ['<s>', 'h', 'i']
    """
    raws = token_bytes(tokenizer, token_ids)
    pieces = {i: tokenizer.convert_ids_to_tokens(i) for i, raw in raws.items() if len(raw) == 1}
    named = {i: name_bytes(raw) or f"<{i}>" for i, raw in raws.items()}
    for i, piece in pieces.items():
        if isinstance(piece, str) and BYTE.fullmatch(piece) and _find_named(tokenizer, _spellings(named[i])) - {i}:
            named[i] = piece
    return named


def is_blank(token: str) -> bool:
    """Whether a token is empty or consists of separators, control and formatting characters."""
    return all(unicodedata.category(char)[0] in "ZC" for char in token)


def is_punctuation(token: str) -> bool:
    """Whether what is visible of a token is punctuation, mathematical and currency signs included, emoji not.

    >>> [is_punctuation(token) for token in (" .", "<s>", "", "\u201c")]
    [True, False, False, True]
    """
    visible = [kind for char in token if (kind := unicodedata.category(char))[0] not in "ZC"]
    return bool(visible) and all(kind[0] == "P" or kind in ("Sm", "Sc", "Sk") for kind in visible)


def spell(tokenizer: Any, token_ids: Sequence[int]) -> Spelling:
    """Text of a row of tokens, and the part of it that each token contributes (`words`), which join to the text.

    >>> tokenizer = sl.lm.tiny_model().tokenizer
    >>> spell(tokenizer, tokenizer("né")["input_ids"]).words
    ('<s>', 'n', 'é', '')
    """
    return spell_rows(tokenizer, [token_ids])[0]


def spell_rows(tokenizer: Any, rows: Iterable[Sequence[int]]) -> list[Spelling]:
    """`spell` of each of several rows, in which every distinct token is decoded once.

    >>> tokenizer = sl.lm.tiny_model().tokenizer
    >>> [row.text for row in spell_rows(tokenizer, [tokenizer("né")["input_ids"], [72]])]
    ['<s>né', 'f']
    """
    rows = [[int(i) for i in row] for row in rows]
    known = token_bytes(tokenizer, {i for row in rows for i in row})
    return [Spelling([known[i] or f"<{i}>".encode() for i in row]) for row in rows]


def find_token_id(tokenizer: Any, text: str) -> int:
    """Id of the token with a given string, as `token_strings` shows it: " was" and "was" are two tokens.

    Where no token has exactly that string, it may be an id in angle brackets, <17>; else the single token that the
    tokenizer encodes the text to is returned.

    Raises:
        ValueError: where there is none, or where several tokens have the same string, which it names.

    >>> find_token_id(sl.lm.tiny_model().tokenizer, "a"), find_token_id(sl.lm.tiny_model().tokenizer, "<0xC3>")
    (67, 130)
    """
    found = sorted(i for i in _find_named(tokenizer, _spellings(text)) if token_strings(tokenizer, [i])[i] == text)
    if len(found) > 1:
        names = {i: tokenizer.convert_ids_to_tokens(i) for i in found}
        raise ValueError(
            f"A string must be read from one token, got {text!r}, which these are: {names}. Give an id: <{found[0]}>."
        )
    if not found and (match := NUMBER.fullmatch(text)) and int(match[1]) < len(tokenizer):
        return int(match[1])
    made = found or tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(made) == 1 and made[0] != tokenizer.unk_token_id:
        return int(made[0])
    everything = token_strings(tokenizer, range(len(tokenizer)))
    if len(found := [i for i, string in everything.items() if string == text]) == 1:
        return found[0]
    parts = list(spell(tokenizer, made).words)[:5]
    near = get_close_matches(text, everything.values(), n=5)
    raise ValueError(
        f"A string must be one token of the model, got {text!r}, which is {parts}; give an id, or a token as it reads, "
        f"spaces included. Near it: {near}."
    )


def _spellings(text: str) -> list[str]:
    """Names that vocabularies may have for a token with this string after another token."""
    raw = read_name(text)
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    names = [text, text.replace(" ", "\u2581"), "".join(letters[byte] for byte in raw), f"##{text}", text.strip()]
    names += [raw.decode("latin-1"), f"{text.strip()}</w>", *(f"<0x{byte:02X}>" for byte in raw[: len(raw) == 1])]
    return [*dict.fromkeys(names)]


def _find_named(tokenizer: Any, names: Iterable[str]) -> set[int]:
    """Ids of the tokens with these names, or of a number in angle brackets."""
    found = set()
    for name in names:
        i = tokenizer.convert_tokens_to_ids(name)
        if isinstance(i, int) and tokenizer.convert_ids_to_tokens(i) in (name, name.encode()):
            found.add(i)
        if (match := NUMBER.fullmatch(name)) and int(match[1]) < len(tokenizer):
            found.add(int(match[1]))
    return found


class SpecialWords(NamedTuple):
    """Words of the vocabulary that are special tokens."""

    bos: str
    eos: str
    pad: str
    unk: str


def word_tokenizer(words: Sequence[str], special: SpecialWords, *, no_space_before: str, no_space_after: str) -> Any:
    """A `PreTrainedTokenizerFast` whose token i is `words[i]`; texts begin with BOS.

    Words are runs of letters and digits; every other character is a token of its own. Decoding puts one space between
    tokens, with the exceptions below.

    Args:
        words: the vocabulary in order of ids, special tokens included.
        special: which of the words are BOS, EOS, padding and the unknown token.
        no_space_before: characters that are decoded without a space before them.
        no_space_after: characters that are decoded without a space after them.

    >>> words = ["<pad>", "<bos>", "<eos>", "<unk>", "Hello", "you", "."]
    >>> special = SpecialWords("<bos>", "<eos>", "<pad>", "<unk>")
    >>> tokenizer = word_tokenizer(words, special, no_space_before=".", no_space_after="")
    >>> tokenizer("Hello you.").input_ids, tokenizer.decode([4, 5, 6])
    ([1, 4, 5, 6], 'Hello you.')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    joined = [decoders.Replace(f" {mark}", mark) for mark in no_space_before]
    joined += [decoders.Replace(f"{mark} ", mark) for mark in no_space_after]
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), *joined])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special.bos} $A", special_tokens=[(special.bos, words.index(special.bos))]
    )
    names = {f"{name}_token": word for name, word in special._asdict().items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)


def find_bos(model: Model) -> int | None:
    """Id of the tokenizer's own BOS token; None where it has none or the id is outside of the model's vocabulary."""
    return next((i for i in _known(model, own_special_tokens(model.tokenizer).get("bos_token", ()))), None)


def find_ends(model: Model) -> frozenset[int]:
    """Ids of tokens that end a text: the tokenizer's own EOS, and those of the model's generation settings.

    ValueError for a model without such settings, as generation would not stop.

    >>> sorted(find_ends(sl.lm.tiny_model()))
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

    >>> find_special_ids(sl.lm.tiny_model())
    (0, 1, 2)
    """
    tokenizer: Any = model.tokenizer
    named = own_special_tokens(tokenizer)
    unknown = set(named.pop("unk_token", ()))
    ids = {i for several in named.values() for i in several} | (marked_special(tokenizer) - unknown)
    return tuple(sorted(_known(model, ids)))


def read_text(model: Model, ids: Iterable[int]) -> str:
    """Text of token ids without special tokens; unknown words stay, which `skip_special_tokens` would remove.

    >>> read_text(sl.lm.tiny_model(), [0, 74, 75, 1])
    'hi'
    """
    special = set(find_special_ids(model))
    text: str = model.tokenizer.decode([i for i in map(int, ids) if i not in special])
    return text


def _known(model: Model, ids: Iterable[int]) -> list[int]:
    return [i for i in ids if i < model.cfg.d_vocab]
