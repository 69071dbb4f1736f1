"""The feature store, against dense codes and against itself after accidents."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.collecting.reader import fingerprint
from saelab.stores.feature_statistics import LOWEST, N_BINS
from saelab.stores.manifest import FeatureManifest
from saelab.stores.packing import pack_codes, round_values

HOOK = "blocks.1.hook_resid_post"
SMALL = {"hook_point": HOOK, "batch_size": 3, "shard_tokens": 100, "progress": False}
D_SAE = 48


def make_sae(activation=None, seed=0, d_sae=D_SAE):
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=d_sae, activation=activation or sl.AbsTopK(k=5)), seed)
    if sae.threshold is not None:
        sae.threshold.fill_(0.4)
    return sae


@pytest.fixture(scope="module")
def tokens(tiny):
    texts = ["The cat sees the dog.", "Owls hear what foxes say at night.", "No!", "A fox finds <b>bread</b>."] * 12
    return sl.tokenize(tiny, texts, ctx_len=24)[:-1]


@pytest.fixture(scope="module")
def acts(tiny, tokens):
    return sl.collect(tiny, tokens, HOOK, progress=False)


@pytest.fixture(scope="module")
def store(tiny, tokens, tmp_path_factory):
    return sl.harvest(make_sae(), tiny, tokens, tmp_path_factory.mktemp("store"), dtype="float32", **SMALL)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("activation", "dtype"),  # each dtype with signs and without
    [
        (sl.TopK(k=5), "float16"),
        (sl.BatchAbsTopK(k=4), "float16"),
        (sl.AbsTopK(k=5), "float32"),
        (sl.ReLU(), "float32"),
    ],
)
def test_every_way_of_reading_gives_the_dense_codes(tiny, tokens, acts, tmp_path, activation, dtype):
    sae = make_sae(activation)
    store = sl.harvest(sae, tiny, tokens, tmp_path / "store", dtype=dtype, **SMALL)
    dense = sae.encode(acts[:]).detach().numpy()
    if dtype == "float16":
        fired = dense != 0
        dense = dense.astype(np.float16).astype(np.float32)
        assert np.array_equal(dense != 0, fired)
    assert np.allclose(store.matrix().toarray(), dense, atol=1e-6)
    assert np.allclose(store.columns().toarray(), dense, atol=1e-6)
    assert np.array_equal(store.columns().toarray(), store.matrix().toarray())
    dense = store.matrix().toarray()
    for i in (0, 99, 100, 263, -1):
        found = store.token(i)
        assert np.array_equal(found.indices, dense[i].nonzero()[0])
        assert np.array_equal(found.values, dense[i][found.indices])
    for j in (0, 7, D_SAE - 1, -2):
        found = store.feature(j)
        assert np.array_equal(found.indices, dense[:, j].nonzero()[0])
        assert np.array_equal(found.values, dense[found.indices, j])
    assert np.array_equal(store.matrix(95, 310).toarray(), dense[95:310])
    assert np.array_equal(store.columns(10, 13).toarray(), dense[:, 10:13])
    assert store.matrix(5, 5).shape == (0, D_SAE)
    assert (store.n_entries, store.l0) == (np.count_nonzero(dense), np.count_nonzero(dense) / len(store))
    assert store.signed == (dense < 0).any()


@pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.AbsTopK(k=5)], ids=lambda a: type(a).__name__)
def test_statistics_equal_a_dense_computation(tiny, tokens, tmp_path, activation):
    store = sl.harvest(make_sae(activation), tiny, tokens, tmp_path / "store", **SMALL)
    dense, found = store.matrix().toarray().astype(np.float64), store.statistics
    for side, part in enumerate((np.maximum(dense, 0), np.maximum(-dense, 0))):
        assert np.array_equal(found.fires[:, side], (part > 0).sum(0))
        assert np.allclose(found.sums[:, side], part.sum(0), rtol=1e-6)
        assert np.allclose(found.squares[:, side], (part**2).sum(0), rtol=1e-6)
        assert np.array_equal(found.peaks[:, side], part.max(0))
        octaves = np.floor(np.log2(part, where=part > 0, out=np.full_like(part, -np.inf)))
        for b in range(N_BINS):
            assert np.array_equal(found.histogram[:, side, b], (octaves == b + LOWEST).sum(0))
    assert np.array_equal(found.histogram.sum(2), found.fires)


def test_rows_know_their_tokens(store, acts, tokens):
    assert np.array_equal(store.token_ids, acts.token_ids)
    assert np.array_equal(store.doc_ids, acts.doc_ids)
    assert np.array_equal(store.text.positions[store.places], acts.positions)
    assert len(store.text) == tokens.n_tokens > len(store)
    assert store.provenance == acts.provenance


def test_the_text_reads_as_it_was_written(store, tokens):
    start = int(np.flatnonzero(store.text.doc_ids == 1)[0])
    stop = int(np.flatnonzero(store.text.doc_ids == 1)[-1]) + 1
    assert "".join(store.text.words(start + 1, stop)) == "Owls hear what foxes say at night."


def test_a_window_stays_in_its_document_and_sequence(store, tokens):
    text, rows = store.text, torch.arange(len(tokens))[:, None].expand_as(tokens.ids).flatten().numpy()
    for place in range(0, len(text), 7):
        start, stop = text.window(place, 6, 4)
        assert start <= place < stop and place - start <= 6 and stop - place <= 5
        inside = (text.doc_ids == text.doc_ids[place]) & (rows[: len(text)] == rows[place])
        wanted = [i for i in range(max(0, place - 6), min(len(text), place + 5)) if inside[i]]
        assert list(range(start, stop)) == wanted


def test_split_keeps_documents_whole(store):
    train = store.split(0.5, seed=3)
    assert not set(store.doc_ids[train]) & set(store.doc_ids[~train])
    assert 0.3 < train.mean() < 0.7
    assert np.array_equal(train, store.split(0.5, seed=3)) and not np.array_equal(train, store.split(0.5, seed=4))


def test_several_saes_share_a_forward_and_equal_those_alone(tiny, tokens, tmp_path):
    saes = {"a": make_sae(seed=1), "b": make_sae(sl.TopK(k=2), d_sae=300)}
    both = sl.harvest(saes, tiny, tokens, tmp_path / "both", **SMALL)
    assert list(both) == ["a", "b"]
    for name, sae in saes.items():
        sl.harvest(sae, tiny, tokens, tmp_path / name, **SMALL)
        assert contents(tmp_path / name) == contents(tmp_path / "both" / name)


def test_a_store_of_collected_activations_is_opened_again(tiny, acts, tmp_path):
    assert acts.provenance.model_sketch is not None  # a tuple here, a list in a manifest
    first = sl.harvest(make_sae(), tiny, acts, tmp_path, progress=False)
    assert len(sl.harvest(make_sae(), tiny, acts, tmp_path, progress=False)) == len(first)


def test_collected_activations_give_the_same_codes(tiny, tokens, store, acts, tmp_path):
    found = sl.harvest(make_sae(), tiny, acts, tmp_path / "store", dtype="float32", progress=False)
    assert (abs(found.matrix() - store.matrix()) > 1e-6).nnz == 0
    assert np.array_equal(found.token_ids, store.token_ids) and np.array_equal(found.doc_ids, store.doc_ids)
    unread = sl.harvest(make_sae(), None, acts, tmp_path / "unread", progress=False)
    assert unread.text.words(0, 1) == [f"<{int(acts.token_ids[0])}>"]
    with pytest.raises(ValueError, match="must know their tokens"):
        sl.harvest(make_sae(), None, sl.Activations.from_tensor(acts[:]), tmp_path / "no", progress=False)
    with pytest.raises(ValueError, match="`hook_point` and `mask`"):
        sl.harvest(make_sae(), tiny, acts, tmp_path / "no", **SMALL)
    elsewhere = make_sae()
    elsewhere.provenance = acts.provenance.at("blocks.0.hook_resid_post")
    with pytest.raises(ValueError, match="hook point"):
        sl.harvest(elsewhere, tiny, acts, tmp_path / "no", progress=False)
    sl.harvest(elsewhere, tiny, acts, tmp_path / "yes", progress=False, allow_mismatch=True)
    with pytest.raises(ValueError, match="`model` must be given"):
        sl.harvest(make_sae(), None, tokens, tmp_path / "no", **SMALL)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shard_in_which_nothing_fires_is_a_shard(tiny, acts, tmp_path, dtype):
    silent = make_sae(sl.ReLU())
    silent.b_enc.data.fill_(-1e6)
    store = sl.harvest(silent, tiny, acts, tmp_path, dtype=dtype, shard_tokens=100, progress=False)
    store.verify()
    assert len(store) == len(acts) and store.n_entries == store.matrix().nnz == store.columns().nnz == 0
    assert len(store.feature(3)) == 0 and set(sl.analysis.dead_features(store).kinds) == {"dead"}


class PowerCut(RuntimeError):
    pass


@pytest.fixture(scope="module")
def two(tiny, tokens, tmp_path_factory):
    """Two SAEs by name, and what an undisturbed harvest writes of each."""
    saes, folder = {"a": make_sae(), "b": make_sae(sl.ReLU())}, tmp_path_factory.mktemp("two")
    sl.harvest(saes, tiny, tokens, folder, **SMALL)
    return saes, {name: contents(folder / name) for name in saes}


@pytest.mark.parametrize("saved", [1, 2, 3, 5])
def test_an_interrupted_harvest_ends_with_the_same_bytes(tiny, tokens, two, tmp_path, monkeypatch, saved):
    saes, whole = two
    real, calls = FeatureManifest.save, []

    def failing(self, folder):
        calls.append(folder)
        if len(calls) > 2 + saved:
            raise PowerCut
        real(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureManifest, "save", failing)
        with pytest.raises(PowerCut):
            sl.harvest(saes, tiny, tokens, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="must be complete"):
        sl.FeatureStore.load(tmp_path / "a")
    sl.harvest(saes, tiny, tokens, tmp_path, **SMALL)
    assert {name: contents(tmp_path / name) for name in saes} == whole


def test_a_finished_store_is_opened_and_another_is_refused(tiny, tokens, tmp_path, monkeypatch):
    sl.harvest(make_sae(), tiny, tokens, tmp_path, **SMALL)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("saelab.collecting.reader.ActivationReader._rows_of", None)
        sl.harvest(make_sae(), tiny, tokens, tmp_path, **SMALL)
    with pytest.raises(ValueError, match="sae: there"):
        sl.harvest(make_sae(seed=1), tiny, tokens, tmp_path, **SMALL)
    assert contents(tmp_path) == before
    assert sl.harvest(make_sae(seed=1), tiny, tokens, tmp_path, resume=False, **SMALL).n_tokens > 0
    assert contents(tmp_path) != before


def test_damage_is_found_and_named(tiny, tokens, tmp_path):
    store = sl.harvest(make_sae(), tiny, tokens, tmp_path, **SMALL)
    store.verify()
    for file in ("shard-00001.safetensors", "tokens.safetensors", "statistics.safetensors", "strings.json"):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(ValueError, match=file):
            sl.FeatureStore.load(tmp_path).verify()
        (tmp_path / file).write_bytes(whole)
    whole = (tmp_path / "shard-00001.safetensors").read_bytes()
    (tmp_path / "shard-00001.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.*cut off"):
        sl.FeatureStore.load(tmp_path)


def test_small_values_still_fire_and_large_ones_are_refused():
    values = np.array([1e-30, -1e-30, 3e-8, 1.0, -65504.0], np.float32)
    stored = round_values(values, "float16")
    assert np.array_equal(np.sign(stored), np.sign(values))
    random = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 10
    assert (
        np.abs(round_values(random, "float16").astype(np.float32) - random)
        <= np.maximum(np.abs(random) / 2**11, 2**-25)
    ).all()
    with pytest.raises(ValueError, match="float32"):
        round_values(np.array([7e4], np.float32), "float16")


def test_packing_sorts_latents_that_do_not_ascend():
    packed = pack_codes(np.array([0, 2, 2, 4]), np.array([5, 1, 0, 3]), np.arange(1, 5, dtype=np.float16), 6)
    assert packed["latents"].tolist() == [1, 5, 0, 3] and packed["values"].tolist() == [2.0, 1.0, 3.0, 4.0]
    assert packed["feature_tokens"].tolist() == [2, 0, 2, 0] and packed["latents"].dtype == np.uint8


def test_masks_must_agree_and_thresholds_be_there(tiny, tokens, acts, tmp_path):
    other = make_sae()
    other.provenance = acts.provenance
    masked = make_sae()
    masked.provenance = sl.collect(
        tiny, tokens, HOOK, mask=sl.TokenMask(positions=(2, None)), progress=False
    ).provenance
    with pytest.raises(ValueError, match="share one mask"):
        sl.harvest({"a": other, "b": masked}, tiny, tokens, tmp_path, progress=False)
    untrained = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.BatchTopK(k=4)))
    with pytest.raises(ValueError, match="threshold"):
        sl.harvest(untrained, tiny, tokens, tmp_path, **SMALL)


def test_a_fingerprint_is_of_evenly_spaced_values_in_the_order_of_rows():
    drawn = torch.randn(30, 70, generator=torch.Generator().manual_seed(0))
    weights = {"c": drawn, "a": drawn.T, "b": drawn[:, ::2].bfloat16(), "d": drawn[0, 0], "e": drawn[:0]}
    digest = hashlib.sha256()
    for name in "abcde":
        weight = weights[name].contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        step = max(1, weight.numel() // 64)
        digest.update(weight.reshape(-1)[::step].clone().view(torch.uint8).numpy().tobytes())
    assert fingerprint(weights) == digest.hexdigest()[:16]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="there is no list of this process' maps")
def test_statistics_are_read_from_a_map(store):
    read = sl.FeatureStore.load(store.folder)
    assert np.array_equal(read.statistics.fires, store.statistics.fires)
    assert str(store.folder / "statistics.safetensors") in Path("/proc/self/maps").read_text()
