"""Conversion between token ids and strings that are unique per token, including tokens that are parts of a
character.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from saelab.stores.spelling import BYTE, Spelling, name_bytes, read_name

NUMBER = re.compile("<([0-9]{1,9})>")
AS_WRITTEN = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def token_bytes(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, bytes]:
    """Bytes that each token adds to a text after another token; the text of several tokens is the concatenation of
    their bytes.

    Decoding a token alone would lose the space that some tokenizers keep apart, so each is decoded after an anchor
    token, whose own text is cut off. A token that is a part of a character has no text of its own: its bytes are read
    from its name in the vocabulary, and checked against what the tokenizer decodes. Special tokens are spelled as in
    the vocabulary; an id without a token, and one that adds nothing, has no bytes.

    >>> tokenizer = sl.tiny_model().tokenizer
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

    >>> tokenizer = sl.tiny_model().tokenizer
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


def spell(tokenizer: Any, token_ids: Sequence[int]) -> Spelling:
    """Text of a row of tokens, and the part of it that each token contributes (`words`), which join to the text.

    >>> tokenizer = sl.tiny_model().tokenizer
    >>> spell(tokenizer, tokenizer("né")["input_ids"]).words
    ('<s>', 'n', 'é', '')
    """
    known = token_bytes(tokenizer, token_ids)
    return Spelling([known[i] or f"<{i}>".encode() for i in map(int, token_ids)])


def find_token_id(tokenizer: Any, text: str) -> int:
    """Id of the token with a given string, as `token_strings` shows it: " was" and "was" are two tokens.

    Where no token has exactly that string, the single token that the tokenizer encodes the text to is returned.

    Raises:
        ValueError: where there is none, or where several tokens have the same string, which it names.

    >>> find_token_id(sl.tiny_model().tokenizer, "a"), find_token_id(sl.tiny_model().tokenizer, "<0xC3>")
    (67, 130)
    """
    found = sorted(i for i in _find_named(tokenizer, _spellings(text)) if token_strings(tokenizer, [i])[i] == text)
    if len(found) > 1:
        names = {i: tokenizer.convert_ids_to_tokens(i) for i in found}
        raise ValueError(f"A string must be read from one token, got {text!r}, which these are: {names}. Give an id.")
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
