"""Documents as rows: words that are the text again, codes that are looked up, words of rows, pictures of documents."""

import json

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.stores import row_words
from saelab.stores.files import save_tensors
from saelab.stores.payload import as_pixels, draw_file, pack_strings, split_words, unpack_strings
from saelab.stores.tensors import TensorFile

N, D = 230, 12
WORDS = ["cat", "Cat", " dog", "hen's", "sun", "\u732b\u72ac", "a_b", "7", "...", "\n", "x y", "<0x41>", "e\u0301"]


def make_texts(n: int = N, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 8))) + str(i % 3) for i in range(n)]


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=D, d_sae=40, activation=sl.AbsTopK(k=3)), seed=0)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def store(sae, x, tmp_path_factory) -> sl.FeatureStore:
    acts = sl.embed(x, make_texts(), progress=False)
    return sl.harvest(sae, None, acts, tmp_path_factory.mktemp("docs"), shard_tokens=64, progress=False)


def test_words_are_the_text_again():
    rng = np.random.default_rng(0)
    letters = [*"ab \n\t.,'_-\u2019\u732b\u00e9\u0301\U0001f600<>0\xa0\u2028", "\r\n", "  "]
    texts = ["".join(rng.choice(letters, rng.integers(1, 30))) for _ in range(500)]
    made = split_words(texts)
    starts = np.flatnonzero(made.positions == 0)
    assert len(starts) == len(texts) and np.array_equal(made.doc_ids[starts], np.arange(len(texts)))
    ends = [*starts[1:], len(made)]
    plain = [made.strings[i] for i in made.token_ids.tolist()]
    assert ["".join(plain[a:b]) for a, b in zip(starts, ends, strict=True)] == texts


def test_an_untrained_dictionary_reads_the_same_documents(store, sae, x, tiny, tmp_path):
    acts = sl.embed(x, make_texts(), progress=False)
    made = sl.collecting.harvest_untrained(store, sae, acts, tmp_path / "made", progress=False)
    assert made.of_documents and len(made) == N and abs(made.l0 - store.l0) < 1
    assert (made.matrix() != store.matrix()).nnz and np.array_equal(made.token_ids, store.token_ids)
    with pytest.raises(ValueError, match="activations of the store's 230 documents"):
        sl.collecting.harvest_untrained(store, sae, acts.rows(0, 9), tmp_path / "none", progress=False)
    with pytest.raises(ValueError, match="got a model"):
        sl.collecting.harvest_untrained(store, sae, tiny, tmp_path / "none", progress=False)


def test_strings_are_packed_and_read_from_any_place():
    texts = ["", "a", "\u00e9\u732b", "", "long " * 9]
    packed = pack_strings(texts)
    ends = packed["text_ends"]
    for start in range(len(texts)):
        begin = int(ends[start - 1]) if start else 0
        assert unpack_strings(packed["texts"][begin:], ends[start:], begin) == texts[start:]
    with pytest.raises(ValueError, match="must rise"):
        unpack_strings(packed["texts"], torch.tensor([5, 2]))


def test_codes_of_a_feature_are_found_among_those_of_documents(store, sae, x):
    dense = sae.encode(x).detach().numpy().astype(np.float16).astype(np.float32)
    assert np.array_equal(store.matrix().toarray(), dense)
    assert np.array_equal(store.columns().toarray(), dense)
    assert np.array_equal(store.columns(7, 9).toarray(), dense[:, 7:9])
    for j in range(store.d_sae):
        found = store.feature(j)
        assert np.array_equal(found.indices, np.flatnonzero(dense[:, j])) and np.array_equal(
            found.values, dense[found.indices, j]
        )
    assert all("feature_values" not in TensorFile.open(path).specs for path in store.folder.glob("shard-*"))
    assert np.array_equal(store.statistics.peaks[:, 1], np.maximum(-dense, 0).max(0))


def test_codes_that_differ_by_document_and_by_feature_are_refused(store, tmp_path):
    import shutil

    folder = shutil.copytree(store.folder, tmp_path / "store")
    path = folder / "shard-00000.safetensors"
    file = TensorFile.open(path)
    tensors = {name: file.read(name).clone() for name in file.specs}
    tensors["latents"][:3] = tensors["latents"][:3].flip(0)
    save_tensors(path, tensors)
    with pytest.raises(ValueError, match="same codes by token and by feature"):
        sl.FeatureStore.load(folder).columns()


def test_words_of_rows_are_those_of_their_documents(store, monkeypatch):
    texts = make_texts()
    expected = [sorted(set(split_plain(text))) for text in texts]

    def spell(rows: np.ndarray, ids: np.ndarray, n: int) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in range(n)]
        for row, i in zip(rows.tolist(), ids.tolist(), strict=True):
            found[row].append(store.text.strings[i].strip().casefold())
        return [sorted(one) for one in found]

    for size in (1 << 18, 50):
        monkeypatch.setattr(row_words, "ROWS_AT_ONCE", size)
        words = row_words.RowWords(store.text, store.where, len(store))
        assert spell(*words.read(0, N), N) == expected and spell(*words.read(100, N + 9), N - 100) == expected[100:]
        rows = np.array([0, 3, 63, 64, 65, 200, N - 1])
        assert spell(*words.at(rows), len(rows)) == [expected[i] for i in rows]
        assert [len(part) for part in words.at(rows[:0])] == [0, 0]
        for i, n in words.counts.items():
            assert n == sum(store.text.strings[i].strip().casefold() in one for one in expected)
    offsets, ids = words.of_firings(np.array([0, 2, 2, 3]), np.array([1, 4, 4]), 60, 70)
    assert spell(np.repeat([0, 1, 2], np.diff(offsets)), ids, 3) == [
        sorted(expected[61] + expected[64]),
        [],
        expected[64],
    ]


def split_plain(text: str) -> list[str]:
    """The words of a text, told without the pattern."""
    words, current = [], ""
    for c in [*text, " "]:
        if (c.isalnum() and c < "\u2e80") or (c in "'\u2019" and current):
            current += c
        else:
            words += [current.strip("'")] * bool(current)
            words += [c] * (c >= "\u2e80" and c.isalnum())
            current = ""
    return [word.casefold() for word in words]


def test_a_part_of_a_store_has_whole_documents(store):
    part = store.spread(130)
    assert 0 < len(part) < N and part.of_documents
    rows = [row for i in (0, len(store._shards) - 1) for row in range(store._starts[i], store._starts[i + 1])]
    texts = make_texts()
    shown = ["".join(part.text.words(*part.words.span(i, i + 1))) for i in range(len(part))]
    assert shown == [texts[row] for row in rows]
    assert np.array_equal(part.matrix().toarray(), store.matrix().toarray()[rows])


def test_an_example_is_a_document_with_its_code(store):
    texts, dense = make_texts(), store.matrix().toarray()
    found = sl.analysis.max_activating_examples(store, 5, n_top=3)
    top = found.group("top", 1 if dense[:, 5].max() > 0 else -1)
    for example in top.examples:
        assert example.words == (texts[example.token],) and example.value == dense[example.token, 5]
        assert example.doc_id == example.token and example.image == ""
    assert found.counted == "documents" and "230 documents" in str(found)
    short = sl.analysis.max_activating_examples(store, 5, n_top=3, before=1, after=0).groups[0].examples[0]
    whole = split_words([texts[short.token]])
    assert short.text == "".join(whole.words(0, min(2, len(whole)))) + "\u2026" * (len(whole) > 2)


@pytest.mark.parametrize("kind", ["pixels", "paths"])
def test_examples_show_pictures(sae, x, tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (N, 6, 5)).astype(np.uint8)
    for i in range(N if kind == "paths" else 0):
        (tmp_path / f"{i}.gif").write_bytes(b"GIF89a" + bytes([i % 256]))
    images = pixels if kind == "pixels" else [tmp_path / f"{i}.gif" for i in range(N)]
    acts = sl.embed(x, images=images, progress=False)
    store = sl.harvest(sae, None, acts.rows(10, N), tmp_path / "store", shard_tokens=50, progress=False)
    for row in (0, 49, 50, N - 11):
        expected = sl.embed(x, images=images, progress=False).rows(10, N)
        if kind == "pixels":
            from saelab.stores.payload import draw_pixels

            assert store.draw_document(row) == draw_pixels(expected.read_pixels(row, row + 1)[0].numpy())
        else:
            assert store.draw_document(row) == draw_file(tmp_path / f"{row + 10}.gif") != ""
    card = sl.analysis.describe_feature(store, int(store.statistics.fires.sum(1).argmax()), n_top=2)
    examples = card.examples.groups[0].examples
    assert all(example.image.startswith("data:image/") for example in examples) and len(examples) == 2
    html = card._repr_html_()
    assert html.count("<img src=") == sum(len(group.examples) for group in card.examples.groups)


def test_only_small_files_of_images_are_shown(tmp_path):
    for name, data, shown in (
        ("a.png", b"\x89PNG\r\n\x1a\nx", True),
        ("b.jpg", b"\xff\xd8\xffx", True),
        ("c.png", b"root:x:0", False),
        ("d.png", b"\x89PNG\r\n\x1a\n" + bytes(1 << 18), False),
    ):
        (tmp_path / name).write_bytes(data)
        assert bool(draw_file(tmp_path / name)) is shown, name
    assert draw_file(tmp_path) == draw_file(tmp_path / "none") == draw_file("\0") == ""


def test_pixels_are_bytes():
    floats = np.array([[[0.0, 0.5], [0.25, 1.0]]])
    assert as_pixels(floats)[0, :, :, 0].tolist() == [[0, 128], [64, 255]]
    assert as_pixels(np.full((2, 3, 3), 7.0)).max() == 0
    assert as_pixels(np.array([[[0, 200]]])).ravel().tolist() == [0, 200]
    with pytest.raises(ValueError, match="finite"):
        as_pixels(np.full((1, 2, 2), np.nan))


def test_a_manifest_says_what_rows_are(store, tmp_path):
    import shutil

    held = json.loads((store.folder / "manifest.json").read_text())
    assert held["payload"] == {"texts": []}
    for payload, match in (({"sounds": []}, "`payload` must be among"), ({"pixels": [2]}, "`payload` must be among")):
        folder = shutil.copytree(store.folder, tmp_path / str(len(payload)) / next(iter(payload)))
        changed = {key: value for key, value in (held | {"payload": payload}).items() if key != "crc32"}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            sl.FeatureStore.load(folder)
    folder = shutil.copytree(store.folder, tmp_path / "tokens")
    changed = {key: value for key, value in (held | {"payload": None}).items() if key != "crc32"}
    (folder / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="'feature_values' should be"):
        sl.FeatureStore.load(folder)


def test_a_store_of_tokens_from_before_has_no_payload(tiny, tmp_path):
    acts = sl.collect(tiny, sl.tokenize(tiny, ["One day."] * 9, 8), "blocks.1.hook_out", tmp_path, progress=False)
    held = json.loads((tmp_path / "manifest.json").read_text())
    del held["payload"], held["crc32"]
    (tmp_path / "manifest.json").write_text(json.dumps(held))
    found = sl.Activations.load(tmp_path)
    assert found.payload is None and found.texts is None and torch.equal(found[:], acts[:])


def test_texts_of_joined_sources_are_those_of_the_first(x):
    texts = make_texts()
    one, other = (sl.embed(y, texts, progress=False) for y in (x, 2 * x))
    joined = sl.Activations.join(
        {"one": one, "other": other}, {"one": torch.tensor([4, 0]), "other": torch.tensor([4, 0])}
    )
    assert joined.texts == [texts[4], texts[0]] and sl.Activations.join({"a": one, "b": other}).texts == texts
