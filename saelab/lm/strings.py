"""How tokens read, one by one and in a row, and which token a string means: one mapping, there and back."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from saelab.stores.spelling import BYTE, Spelling, name_bytes, read_name

NUMBER = re.compile("<([0-9]{1,9})>")
AS_WRITTEN = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def token_bytes(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, bytes]:
    """The bytes that each token adds to a text behind another token: what several of them say is their join.

    Decoding a token alone would lose the space that some tokenizers keep apart, so each is decoded behind an anchor,
    whose own text is cut off. A token that is a part of a character has no text of its own: its bytes are read from
    its name in the vocabulary, and held against what the tokenizer makes of it. Special tokens read as they are
    written; an id of no token, and one that adds nothing, has no bytes.

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
        else:  # a part of a character, mostly
            found[i] = _read_bytes(tokenizer.convert_ids_to_tokens(i), read, tokenizer.decode([i], **AS_WRITTEN))
    return found


def _read_bytes(piece: Any, read: str, alone: str) -> bytes:
    """The bytes of a token from its name, where the tokenizer reads them alike; else those of its text."""
    for raw in _guess_bytes(piece):
        if any(raw.decode("utf-8", errors) in (read, alone) for errors in ("replace", "ignore")):
            return raw
    return read.encode("utf-8", "replace")


def _guess_bytes(piece: Any) -> list[bytes]:
    """What the name of a token may stand for: bytes, <0xE4>, GPT-2's letters for bytes, or characters below 256."""
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
    """The letters by which byte-level tokenizers write bytes: printable ones as they are, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def token_strings(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """How each token reads behind another, so that no two read alike: "the" inside a sentence is " the".

    Bytes that are no character by themselves read as <0xE4>, also those of an ASCII character that has another token,
    and a token that adds nothing to a text reads as its number, <17>. `find_token_id` is the way back.

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
    """What the tokens of a row say together: their text, and their words, which join to it.

    >>> tokenizer = sl.tiny_model().tokenizer
    >>> spell(tokenizer, tokenizer("né")["input_ids"]).words
    ('<s>', 'n', 'é', '')
    """
    known = token_bytes(tokenizer, token_ids)
    return Spelling([known[i] or f"<{i}>".encode() for i in map(int, token_ids)])


def find_token_id(tokenizer: Any, text: str) -> int:
    """The token that reads like a text, as `token_strings` shows it: " was" and "was" are two tokens.

    Where none reads exactly so, the one token that the tokenizer makes of the text counts. ValueError where there is
    none, or where several read alike: it names them.

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
    """Names that vocabularies may have for a token that reads so behind another."""
    raw = read_name(text)
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    names = [text, text.replace(" ", "\u2581"), "".join(letters[byte] for byte in raw), f"##{text}", text.strip()]
    names += [raw.decode("latin-1"), f"{text.strip()}</w>", *(f"<0x{byte:02X}>" for byte in raw[: len(raw) == 1])]
    return [*dict.fromkeys(names)]


def _find_named(tokenizer: Any, names: Iterable[str]) -> set[int]:
    """The tokens of these names, and a number in angle brackets."""
    found = set()
    for name in names:
        i = tokenizer.convert_tokens_to_ids(name)
        if isinstance(i, int) and tokenizer.convert_ids_to_tokens(i) in (name, name.encode()):
            found.add(i)
        if (match := NUMBER.fullmatch(name)) and int(match[1]) < len(tokenizer):
            found.add(int(match[1]))
    return found
