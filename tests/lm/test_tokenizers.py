"""Tokens and text: what is shown can be given back, and characters of several tokens are whole."""

import re
from pathlib import Path

import pytest
from tokenizers_made import FURTHER, KINDS, TEXTS

import saelab
from saelab.lm.tokenizers import find_token_id, spell, token_bytes, token_strings
from saelab.stores.corpus import Spelling, group_words, name_bytes


@pytest.mark.parametrize("kind", [*KINDS, *FURTHER])
def test_every_token_is_found_by_what_is_shown_of_it(kind: str) -> None:
    tokenizer = (KINDS | FURTHER)[kind]()
    shown = token_strings(tokenizer, range(len(tokenizer)))
    assert all(shown.values()) and not any("\ufffd" in string for string in shown.values())
    for i, string in shown.items():
        alike = [j for j, other in shown.items() if other == string]
        if len(alike) == 1:
            assert find_token_id(tokenizer, string) == i, string
        else:
            with pytest.raises(ValueError, match=rf"{i}: .*Give an id: <{alike[0]}>"):
                find_token_id(tokenizer, string)
            assert find_token_id(tokenizer, f"<{i}>") == i


@pytest.mark.parametrize("kind", ["stories260k", "tales"])
def test_every_token_of_real_models_is_found(kind: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    from saelab.lm.models import WORLD_MODELS

    tokenizer = AutoTokenizer.from_pretrained(WORLD_MODELS / kind if kind == "tales" else shared_data / kind)
    shown = token_strings(tokenizer, range(len(tokenizer)))
    assert len(set(shown.values())) == len(shown)
    assert [find_token_id(tokenizer, string) for string in shown.values()] == list(shown)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "slow"])
def test_bytes_of_tokens_are_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        raw = token_bytes(tokenizer, ids)
        assert b"".join(raw[i] for i in ids).decode().removeprefix(" ") == text
        assert "".join(spell(tokenizer, ids).words).removeprefix(" ") == text


def test_words_that_read_alike_are_named() -> None:
    tokenizer = KINDS["byte fallback"]()
    assert token_strings(tokenizer, [3 + ord("A"), tokenizer.convert_tokens_to_ids("A")])[3 + ord("A")] == "<0x41>"
    he, behind = (tokenizer.convert_tokens_to_ids(name) for name in ("he", "▁he"))
    assert (find_token_id(tokenizer, "he"), find_token_id(tokenizer, " he")) == (he, behind)
    with pytest.raises(ValueError, match=r"one token.*'wash'"):
        find_token_id(tokenizer, "wash")


def test_spans_are_those_of_the_bytes() -> None:
    whole = "né世界\U0001f600!"
    raw = whole.encode()
    pieces = [raw[i : i + 2] for i in range(0, len(raw), 2)]
    spelling = Spelling(pieces)
    assert spelling.text == whole and "".join(spelling.words) == whole
    for at, char in enumerate(whole):
        first = len(whole[:at].encode()) // 2
        last = (len(whole[: at + 1].encode()) - 1) // 2
        assert spelling.tokens_of(at, at + 1) == slice(first, last + 1), char
        assert spelling.find(re.compile(re.escape(char))).nonzero()[0].tolist() == list(range(first, last + 1))
        assert all(char in spelling.touched[i] for i in range(first, last + 1))
    groups = [("".join(spelling.words[group]), group) for group in group_words(spelling.words)]
    assert [text for text, _ in groups if not text] == []
    assert [i for _, group in groups for i in range(len(pieces))[group]] == list(range(len(pieces)))


def test_bytes_of_no_character_are_numbers() -> None:
    cut = "世".encode()[:2]
    spelling = Spelling([b"a", cut, b"b"])
    assert spelling.text == "a<0xE4><0xB8>b" and name_bytes(cut) == "<0xE4><0xB8>"
    assert spelling.words == ("a", "<0xE4><0xB8>", "b")
    assert spelling.tokens_of(13, 14) == slice(2, 3) and spelling.tokens_of(2, 3) == slice(1, 2)


def test_the_id_of_a_string_is_asked_in_one_place() -> None:
    """What is shown can be given back everywhere only if nobody else reads a token from a text."""
    package = Path(saelab.__file__).parent
    asks = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"convert_tokens_to_ids|\bfind_token_id\(|\.vocab\[", path.read_text(encoding="utf-8"))
    }
    assert asks == {"lm/tokenizers.py", "interventions/prompt_metrics.py"}
