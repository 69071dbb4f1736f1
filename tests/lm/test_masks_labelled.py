"""Labels of words on tokens: as the characters say, whatever the tokenizer."""

from typing import Any

import numpy as np
import pytest
import torch
from test_tokenizers_special import llama
from tokenizers_made import KINDS, TEXTS

import saelab as sl
from saelab.lm.masks import locate_tokens
from saelab.lm.tokenizers import spell


def solid(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, space in front", "byte fallback", "slow"])
def test_characters_of_tokens_are_those_they_read_as(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in TEXTS[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts, stops = locate_tokens(tokenizer, text, ids)
        for start, stop, touched in zip(starts, stops, spell(tokenizer, ids).touched, strict=True):
            assert text[start:stop] == touched.strip(), (start, stop)


def test_a_tokenizer_that_changes_letters_tells_offsets_or_is_read_on() -> None:
    tokenizer = KINDS["WordPiece"]()
    text = TEXTS[0].upper()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts, stops = locate_tokens(tokenizer, text, ids)
    assert solid("".join(text[a:b] for a, b in zip(starts, stops, strict=True))) == solid(text)

    class Slow:
        """The same without offsets."""

        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __len__(self) -> int:
            return len(tokenizer)

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

    plain = text.replace("É", "E")
    found = locate_tokens(Slow(), plain, tokenizer(plain, add_special_tokens=False)["input_ids"])
    assert solid("".join(plain[a:b] for a, b in found.T)) == solid(plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_labels_are_true_of_the_tokens_of_their_words(kind: str, packed: bool) -> None:
    tokenizer = KINDS[kind]()
    model = sl.load_model(llama(len(tokenizer)), tokenizer=tokenizer)
    words = ["He", "was", "near", "the", "old", "river", "here"]
    documents = [[(word, "long" if len(word) > 3 else "") for word in words], [("the", ["short", "article"])]] * 3
    tokens, labels = sl.lm.tokenize_labeled(model, documents, 64, packed=packed, bos=False)
    assert set(labels) == {"long", "short", "article"} and torch.equal(labels["short"], labels["article"])
    assert not any((marks & ~tokens.attention_mask).any() for marks in labels.values())
    for doc in range(6):
        ids = tokens.ids[tokens.doc_ids == doc].tolist()
        long = labels["long"][tokens.doc_ids == doc].numpy()
        starts, stops = locate_tokens(tokenizer, " ".join(w for w, _ in documents[doc]), ids)
        truth = np.concatenate([[len(w) > 3] * (len(w) + 1) for w, _ in documents[doc]])
        for mark, start, stop in zip(long, starts, stops, strict=True):
            assert mark == truth[start:stop].any() if stop > start else not mark


def test_stretches_parts_and_cut_documents(tiny: Any) -> None:
    text = "né was 世界"
    tokens, labels = sl.lm.tokenize_labeled(tiny, [(text, [(0, 2, "name"), (7, 9, "world")])], 32)
    assert labels["name"].sum() == len("né".encode()) and labels["world"].sum() == len("世界".encode())
    assert labels["name"][0, 1] and not labels["name"][0, 0]  # behind BOS
    for part, place in (("first", 1), ("last", 3)):
        _, only = sl.lm.tokenize_labeled(tiny, [(text, [(0, 2, "name")])], 32, part=part)
        assert only["name"].nonzero().tolist() == [[0, place]]
    tokens, labels = sl.lm.tokenize_labeled(tiny, [[("one", "a"), ("two", "b")]], 4, packed=False)
    assert labels["a"].tolist() == [[False, True, True, True]] and not labels["b"].any() and tokens.n_truncated == 1
    _, labels = sl.lm.tokenize_labeled(tiny, [[("世", "a"), ("界", "b")]], 8, joined="")
    assert labels["a"].sum() == labels["b"].sum() == 3


def test_wrong_labels_are_named(tiny: Any) -> None:
    for document, message in (
        ([(" ", "a")], "blank"),
        (("text", [(2, 9, "a")]), r"\(2, 9, 'a'\)"),
        (("text", [(2, 2, "a")]), r"\(2, 2, 'a'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sl.lm.tokenize_labeled(tiny, [document])
    with pytest.raises(ValueError, match="part"):
        sl.lm.tokenize_labeled(tiny, [[("a", "b")]], part="middle")
