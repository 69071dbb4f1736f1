"""Text encoders, vectors kept in a file, and labels searched by meaning."""

import logging
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from saelab.labels import EmbeddingFunction, LabelStore, SentenceEncoder, VectorIndex, encode_texts
from saelab.labels.encoders import PROBE
from saelab.labels.label import Label
from saelab.stores.files import save_tensors
from saelab.universality import search_labels

TOPICS = {"weather": ("rain", "storm", "snow"), "animals": ("cat", "dog"), "sea": ("river", "boat", "lake")}


class Topical:
    """Knows which topic a text is of, and counts what it is asked; a text of none has a direction of its own."""

    def __init__(self, turn: int = 0) -> None:
        self.turn, self.asked, self.queries = turn, [], []

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.asked += texts
        return [self.see(text) for text in texts]

    def encode_query(self, texts: list[str]) -> list[list[float]]:
        self.queries += texts
        return [self.see(text) for text in texts]

    def see(self, text: str) -> list[float]:
        words = text.split()
        vector = [float(any(word in (name, *known) for word in words)) for name, known in TOPICS.items()]
        return [*np.roll([*vector, 0.1], self.turn).tolist()]


@pytest.fixture
def book(tmp_path: Path):
    with LabelStore(tmp_path / "labels.sqlite") as opened:
        for feature, text in enumerate(("a cat", "rain again", "the boat", "weather of all kinds", "a dog")):
            opened.set(feature, text, author="me")
        opened.add([Label(feature=9, text="no good rule", kind="none", author="rules")])
        yield opened


def test_words_come_first_and_then_what_is_meant(book: LabelStore) -> None:
    encoder = Topical()
    assert [label.feature for label in book.search("weather")] == [3]
    assert [label.feature for label in book.search("weather", encoder=encoder, top=2)] == [3, 1]
    assert [label.feature for label in book.search("storm", encoder=encoder, top=2)] == [1, 3], "no word of it is there"
    assert {label.feature for label in book.search("dog", encoder=encoder, top=2)} == {4, 0}
    everything = book.search("lake", encoder=encoder)
    assert everything[0].feature == 2 and {label.feature for label in everything} == {0, 1, 2, 3, 4}, "9 has no meaning"
    assert [label.feature for label in book.search("a", encoder=encoder, top=1)] == [
        label.feature for label in book.search("a")
    ], "what has the words is never left out"
    assert search_labels(book, "weather", encoder, top=2).tolist() == [3, 1]


def test_each_label_is_encoded_once_and_kept(book: LabelStore) -> None:
    first = Topical()
    book.search("snow", encoder=first)
    assert sorted(first.asked[1:]) == sorted(label.text for label in book if label.kind != "none")
    n = len(first.asked)
    book.search("boat", encoder=first)
    assert n == 6 and first.asked[n:] == first.asked[:1], "the probe alone"
    again = Topical()
    book.set(0, "a storm", author="me")
    assert [label.feature for label in book.search("snow", encoder=again, top=3)] == [0, 1, 3]
    assert again.asked[1:] == ["a storm"] and again.queries == ["snow"]
    assert book.path.with_suffix(".vectors.safetensors").is_file()


def test_vectors_of_another_encoder_and_damaged_ones_are_made_anew(book: LabelStore, caplog) -> None:
    book.search("snow", encoder=Topical())
    other = Topical(turn=1)
    assert [label.feature for label in book.search("snow", encoder=other, top=2)] == [1, 3]
    assert len(other.asked) == 6
    path = book.path.with_suffix(".vectors.safetensors")
    for damage in (lambda data: data[:-40], lambda data: b"x" * 99):
        path.write_bytes(damage(path.read_bytes()))
        third = Topical(turn=1)
        with caplog.at_level(logging.INFO):
            assert [label.feature for label in book.search("snow", encoder=third, top=2)] == [1, 3]
        assert len(third.asked) == 6 and "made anew" in caplog.text
        caplog.clear()
    probe = torch.from_numpy(encode_texts(other, [PROBE]))
    save_tensors(path, {"keys": torch.zeros(3, 16).byte(), "vectors": torch.zeros(2, 4), "probe": probe})
    assert [label.feature for label in book.search("snow", encoder=Topical(turn=1), top=2)] == [1, 3]


def test_an_index_forgets_what_is_gone_and_keeps_its_file(tmp_path: Path) -> None:
    encoder, path = Topical(), tmp_path / "v.safetensors"
    index = VectorIndex(encoder, path)
    assert index.update(["rain", "a cat", "rain"]) == 2 == len(index)
    assert index.update(["a cat"]) == 0 and len(index) == 1 == len(VectorIndex(encoder, path))
    assert index.compare("dog", ["a cat"]).tolist() == pytest.approx([1.0])
    assert index.compare("dog", []).tolist() == []
    assert index.update([]) == 0 and len(VectorIndex(encoder, path)) == 0
    index.compare("snow", ["rain", "the boat"])
    index.compare("snow", ["a cat"])
    assert len(index) == 3 == len(VectorIndex(encoder, path)), "a comparison with some texts forgets no others"
    found = VectorIndex(encoder, tmp_path / "nowhere" / "file" / "v.safetensors")
    (tmp_path / "nowhere").write_text("a file where a folder would be")
    assert found.compare("snow", ["rain"]).tolist() == pytest.approx([1.0]), "what cannot be kept is made again"


@pytest.mark.parametrize(
    "wrong", [lambda texts: [1.0], lambda texts: np.zeros((1, 3)), lambda texts: [[np.nan] * 3] * len(texts)]
)
def test_an_encoder_must_return_a_row_for_each_text(wrong) -> None:
    with pytest.raises(ValueError, match="matrix of 2 rows"):
        encode_texts(wrong, ["a", "b"])


def test_vectors_have_norm_one_and_each_text_is_asked_once() -> None:
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts], dtype=torch.float64, requires_grad=True)

    rows = encode_texts(encode, ["aa", "b", "aa", ""])
    assert asked == ["aa", "b", ""] and np.linalg.norm(rows, axis=1) == pytest.approx([1.0] * 4)
    assert rows.dtype == np.float32 and np.array_equal(rows[0], rows[2])
    assert not encode_texts(lambda texts: np.zeros((len(texts), 2)), ["a"]).any(), "a zero vector stays one"
    assert isinstance(encode, EmbeddingFunction)


def test_a_sentence_transformer_is_asked_as_it_wants_to_be(monkeypatch) -> None:
    made = []

    class Model:
        def __init__(self, name, device, **options):
            made.append((name, device, options))

        def encode(self, texts, **options):
            assert options == {"show_progress_bar": False, "convert_to_numpy": True}
            return np.full((len(texts), 2), 3.0, np.float32)

    class Newer(Model):
        def encode_query(self, texts, **options):
            return -self.encode(texts, **options)

        encode_document = Model.encode

    module = ModuleType("sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    for kind, sign in ((Model, 1), (Newer, -1)):
        module.SentenceTransformer = kind
        encoder = SentenceEncoder("/home/ada/models/minilm", local_files_only=True)
        assert encode_texts(encoder, ["a"], queries=True)[0, 0] * sign > 0 < encode_texts(encoder, ["a"])[0, 0]
        assert encoder.name == "minilm" and "ada" not in repr(encoder)
    assert made[0] == ("/home/ada/models/minilm", None, {"local_files_only": True})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        SentenceEncoder("x")
