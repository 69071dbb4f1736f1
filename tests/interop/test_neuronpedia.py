"""Feature stores as delphi, SAEDashboard and Neuronpedia read them; activations that SAELens and OpenMOSS cached."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saelab as sl
from saelab.interop.activation_caches import convert_activations
from saelab.interop.neuronpedia import export_store
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore

PLACE = "blocks.1.hook_resid_post"
N_SEQ, CTX_LEN, D_IN = 10, 6, 4


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=3)), seed=1)


@pytest.fixture(scope="module")
def store(sae: sl.SAE, tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    folder = tmp_path_factory.mktemp("interchange") / "store"
    return sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point=PLACE, progress=False)


# ---- stores
@pytest.mark.parametrize("n_splits", [1, 3])
def test_delphi_reads_every_code_with_its_sign(store: sl.FeatureStore, n_splits: int, tmp_path: Path) -> None:
    place = export_store(store, tmp_path / "cache", "delphi", n_splits=n_splits, pad_id=0)
    assert len(list(place.glob("*.safetensors"))) == n_splits and place.name == PLACE
    again = sl.interop.convert_delphi(place, tmp_path / "again", progress=False)
    assert store.signed and again.signed
    codes = again.matrix()[store.places]  # delphi has the tokens that our mask left out, without codes
    assert (codes != store.matrix()).nnz == 0 and again.n_entries == store.n_entries
    assert np.array_equal(again.token_ids[store.places], store.token_ids)
    config = json.loads((place / "config.json").read_text())
    assert (config["n_splits"], config["ctx_len"], config["model_name"]) == (n_splits, 32, store.provenance.model)


def test_delphi_needs_sequences_of_one_length(sae: sl.SAE, tiny: Any, tmp_path: Path) -> None:
    tokens = sl.tokenize(tiny, ["one", "a longer text"], ctx_len=8, packed=False)
    store = sl.harvest(sae, tiny, tokens, tmp_path / "s", hook_point=PLACE, progress=False)
    with pytest.raises(ValueError, match="`pad_id` must be given, as sequences are of different lengths"):
        export_store(store, tmp_path / "cache", "delphi")
    with pytest.raises(ValueError, match=r"`n_splits` must be in 1\.\.40"):
        export_store(store, tmp_path / "cache", "delphi", n_splits=41)


def test_saedashboard_gets_its_batches(store: sl.FeatureStore, sae: sl.SAE, tiny: Any, tmp_path: Path) -> None:
    features = [0, 3, 7]
    assert any(store.feature(i).values.min() < 0 < store.feature(i).values.max() for i in features)
    folder = export_store(store, tmp_path, "saedashboard", sae=sae, model=tiny, features=features, progress=False)
    batch = json.loads((folder / "batch-0.json").read_text())
    assert (batch["layer"], batch["sae_set"]) == (1, "saelab")
    assert [one["feature_index"] for one in batch["features"]] == features
    skipped = json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert skipped == np.flatnonzero(store.statistics.fires.sum(1) == 0).tolist()
    for one in batch["features"]:
        found = store.feature(one["feature_index"])
        assert one["frac_nonzero"] == pytest.approx(len(found) / len(store))
        assert sum(one["freq_hist_data_bar_heights"]) == len(found)
        assert sum(one["logits_hist_data_bar_heights"]) == tiny.cfg.d_vocab
        lens = sl.analysis.logit_lens(sae, tiny, [one["feature_index"]])[one["feature_index"]]
        assert one["pos_str"] == [text for text, _ in lens.promoted]
        row = sae.directions()[one["feature_index"]]
        assert one["neuron_alignment_indices"][0] == int(row.abs().argmax())
        windows = one["activations"]
        assert {len(w["tokens"]) - len(w["values"]) for w in windows} == {0}
        assert min(min(w["values"]) for w in windows) == min(found.values.min(), 0)  # both signs are shown
        assert max(max(w["values"]) for w in windows) == max(found.values.max(), 0)
        top = {(w["bin_min"], w["bin_max"]) for w in windows if w["bin_contains"] == -1}
        assert top <= {(-1, float(found.values.max()))} and bool(top) == bool(found.values.max() > 0)


def test_neuronpedia_gets_its_records(store: sl.FeatureStore, sae: sl.SAE, tmp_path: Path) -> None:
    with LabelStore.open(store) as book:
        book.set(3, "a name", author="me")
        book.add([Label(feature=5, text="No good rule", author="rules", kind="none")])  # no explanation
    root = export_store(store, tmp_path, "neuronpedia", sae=sae, source_set="mine", features=[3, 5], progress=False)
    assert root == tmp_path / store.provenance.model / "1-mine"

    def read(name: str) -> list[dict[str, Any]]:
        text = (root / name).read_bytes()
        text = gzip.decompress(text) if name.endswith(".gz") else text
        return [json.loads(line) for line in text.splitlines()]

    for head in ("release", "model", "sourceset", "source"):
        assert len(read(f"{head}.jsonl")) == 1
    assert read("source.jsonl")[0]["id"] == "1-mine" and "saelensConfig" not in read("source.jsonl")[0]
    features = read("features/batch-0.jsonl.gz")
    assert [one["index"] for one in features] == ["3", "5"]
    assert features[0]["maxActApprox"] == pytest.approx(float(store.feature(3).values.max()))
    assert features[0]["vector"] == pytest.approx(sae.directions()[3].tolist())
    assert features[0]["pos_str"] == []  # no model was given, so it is not known
    windows = read("activations/batch-0.jsonl.gz")
    assert len({one["id"] for one in windows}) == len(windows)
    boards = export_store(store, tmp_path / "boards", "saedashboard", sae=sae, features=[3, 5], progress=False)
    shown = [
        w["values"] for one in json.loads((boards / "batch-0.json").read_text())["features"] for w in one["activations"]
    ]
    assert [one["values"] for one in windows] == shown
    for one in windows:
        assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"] == max(one["values"])
    assert [one["description"] for one in read("explanations/batch-0.jsonl.gz")] == ["a name"]


def test_exports_refuse_what_they_cannot_do(store: sl.FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`features` must be in 0\.\.39"):
        export_store(store, tmp_path, "neuronpedia", features=[40])
    other = sl.SAE(sl.SAEConfig(d_in=32, d_sae=41))
    with pytest.raises(ValueError, match="must be the one that was harvested, 40 features"):
        export_store(store, tmp_path, "saedashboard", sae=other)


# ---- activations
def some_cache() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(50_000, 70_000, (N_SEQ, CTX_LEN), generator=g)
    ids[0, :2] = torch.tensor([50_256, 65_520])  # as float16 the one is 50240, the other infinite
    return torch.randn(N_SEQ, CTX_LEN, D_IN, generator=g), ids


def write_arrow(folder: Path, acts: torch.Tensor, ids: torch.Tensor, n_files: int) -> None:
    """The streams that `datasets.save_to_disk` writes, and the file that lists them."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    names = [f"data-{i:05d}-of-{n_files:05d}.arrow" for i in range(n_files)]
    for name, part, tokens in zip(names, acts.chunk(n_files), ids.chunk(n_files), strict=True):
        kind = pa.list_(pa.list_(pa.from_numpy_dtype(part.numpy().dtype)))
        columns = [
            pa.array([[*map(list, row)] for row in part.numpy()], kind),
            pa.array(tokens.tolist(), pa.list_(pa.int32(), CTX_LEN)),
        ]
        batch = pa.record_batch(columns, [PLACE, "token_ids"])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_10_token_ids_of_saelens_are_read_as_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    acts, ids = some_cache()
    write_arrow(tmp_path / "cache", acts.to(dtype), ids, 3)
    ours = convert_activations(tmp_path / "cache", tmp_path / "a", model="gpt2", shard_tokens=7, progress=False)
    assert ours.dtype == dtype and ours.hook_point == PLACE
    assert torch.equal(ours[:], acts.to(dtype).flatten(0, 1))
    assert ours.token_ids is not None and ours.token_ids.tolist() == ids.flatten().tolist()
    assert ours.doc_ids is not None and ours.positions is not None
    assert ours.doc_ids.tolist() == [i for i in range(N_SEQ) for _ in range(CTX_LEN)]
    assert ours.positions.tolist() == list(range(CTX_LEN)) * N_SEQ
    again = convert_activations(tmp_path / "cache", tmp_path / "a", model="gpt2", shard_tokens=7, progress=False)
    assert torch.equal(again[:], ours[:])
    with pytest.raises(ValueError, match="can be resumed only with the arguments"):
        convert_activations(tmp_path / "cache", tmp_path / "a", model="other", shard_tokens=7, progress=False)


@pytest.mark.parametrize("flat", [True, False])
def test_chunks_of_openmoss_without_what_their_masks_leave_out(flat: bool, tmp_path: Path) -> None:
    acts, ids = some_cache()
    acts, mask = acts.bfloat16(), torch.ones(N_SEQ, CTX_LEN, dtype=torch.bool)
    mask[3, 2] = False
    place = tmp_path / "cache" / PLACE
    place.mkdir(parents=True)
    for i, part in enumerate(torch.arange(N_SEQ).chunk(3)):
        held = {"activation": acts[part], "tokens": ids[part], "mask": mask[part].long()}
        held = {name: (t.flatten(0, 1) if flat else t).contiguous() for name, t in held.items()}
        save_file(held, place / f"shard-0-chunk-{i:08d}.safetensors")
    for folder, given in ((tmp_path / "cache", PLACE), (place, None)):
        ours = convert_activations(folder, tmp_path / f"a{given}", model="gpt2", hook_point=given, progress=False)
        assert ours.hook_point == PLACE
        assert torch.equal(ours[:], acts[mask]) and ours.dtype == torch.bfloat16
        assert ours.provenance is not None and ours.provenance.removed == {"masked": 1}


def test_caches_that_cannot_be_read(tmp_path: Path) -> None:
    acts, ids = some_cache()
    convert = lambda name, **given: convert_activations(  # noqa: E731
        tmp_path / name, tmp_path / "out", model="gpt2", progress=False, **given
    )
    with pytest.raises(FileNotFoundError, match="has neither"):
        convert("nothing")
    write_arrow(tmp_path / "cut", acts, ids, 1)
    path = tmp_path / "cut" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match="must be a whole Arrow stream"):
        convert("cut")
    write_arrow(tmp_path / "astray", acts, ids, 1)
    (tmp_path / "astray" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../cut/data.arrow"}]}))
    with pytest.raises(ValueError, match="which leaves it"):
        convert("astray")
    write_arrow(tmp_path / "other", acts, ids, 1)
    with pytest.raises(ValueError, match="`hook_point` must be a column"):
        convert("other", hook_point="blocks.9.hook_resid_post")
    bad = acts.clone()
    bad[2, 1, 0] = float("nan")
    write_arrow(tmp_path / "nan", bad, ids, 1)
    with pytest.raises(ValueError, match=PLACE):
        convert("nan")
