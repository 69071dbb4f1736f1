"""delphi's latent cache as a feature store, against the codes that were planted in it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import saelab as sl
from saelab.collecting.writers import ShardWriter
from saelab.interop.delphi import convert_delphi, write_delphi

N_SEQ, CTX_LEN, D_SAE = 9, 6, 40
SPLITS = ((0, 12), (13, 25), (26, 39))
SMALL = {"shard_tokens": 4 * CTX_LEN, "progress": False}
CONFIG = {
    "dataset_repo": "some/stories", "dataset_split": "train[:1%]", "ctx_len": CTX_LEN, "n_tokens": 60, "n_splits": 3,
    "model_name": "some/model",
}  # fmt: skip


def plant(dtype=np.float16):
    """Signed sparse codes: some tokens have none, one latent never fires, one always."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((N_SEQ, CTX_LEN, D_SAE)) * (rng.random((N_SEQ, CTX_LEN, D_SAE)) < 0.15)
    dense[2, 3], dense[4], dense[..., 7], dense[..., 30] = 0, 0, 0, -1.5
    return dense.astype(dtype)


def ids():
    return np.random.default_rng(1).integers(0, 300, (N_SEQ, CTX_LEN))


def write_split(folder, dense, first, last, kind=np.uint16, tokens=None):
    """The codes of some latents as delphi lays them out: in the order of the text, latents counted from the first."""
    part = dense[..., first : last + 1]
    tensors = {"locations": np.argwhere(part).astype(kind, order="C"), "activations": part[part != 0]}
    save_file(tensors | ({} if tokens is None else {"tokens": tokens}), folder / f"{first}_{last}.safetensors")


@pytest.fixture
def cache(tmp_path):
    """A cache as delphi writes it, and beside it the codes in it."""
    return write_cache(tmp_path / "latents" / "layers.1", plant())


def write_cache(folder, dense, kind=np.uint16, with_tokens=True):
    folder.mkdir(parents=True)
    for first, last in SPLITS:
        write_split(folder, dense, first, last, kind, ids() if with_tokens else None)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class Letters:
    """A tokenizer whose token i reads as the character of that number."""

    name_or_path, is_fast = "letters", True

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, i):
        return chr(i)


def edit(path, **changes):
    """Replace tensors of a file."""
    save_file(load_file(path) | changes, path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_the_store_holds_exactly_the_planted_codes(tmp_path, kind, dtype):
    dense = plant(dtype)
    store = convert_delphi(write_cache(tmp_path / "layers.1", dense, kind), tmp_path / "store", **SMALL)
    flat = dense.reshape(-1, D_SAE).astype(np.float32)
    assert (len(store), store.d_sae, store.n_entries) == (N_SEQ * CTX_LEN, D_SAE, np.count_nonzero(flat))
    assert store.manifest.dtype == np.dtype(dtype).name and len(store.manifest.shards) == 3
    assert np.array_equal(store.matrix().toarray(), flat) and np.array_equal(store.columns().toarray(), flat)
    for i in (0, 15, 24, 53):
        assert np.array_equal(store.token(i).indices, flat[i].nonzero()[0])
    for j in (0, 7, 13, 30, 39):
        assert np.array_equal(store.feature(j).values, flat[flat[:, j] != 0, j])
    assert np.array_equal(store.statistics.fires, np.stack([(flat > 0).sum(0), (flat < 0).sum(0)], axis=1))
    assert store.signed
    store.verify()


def test_each_sequence_is_a_document_and_the_origin_is_told(cache, tmp_path):
    store = convert_delphi(cache, tmp_path / "store", tokenizer=Letters(), **SMALL)
    assert np.array_equal(store.token_ids, ids().ravel())
    assert np.array_equal(store.doc_ids, np.repeat(np.arange(N_SEQ), CTX_LEN))
    assert np.array_equal(store.text.positions, np.tile(np.arange(CTX_LEN), N_SEQ))
    assert store.text.window(CTX_LEN, 4, 20) == (CTX_LEN, 2 * CTX_LEN)
    assert store.text.words(0, CTX_LEN) == [chr(i) for i in ids()[0]]
    origin = store.provenance
    assert (origin.model, origin.hook_point, origin.ctx_len) == ("some/model", "layers.1", CTX_LEN)
    assert origin.text == "some/stories train[:1%]" and origin.n_tokens == len(store)
    assert store.manifest.sae["delphi"] == CONFIG
    named = convert_delphi(cache, tmp_path / "named", hook_point="blocks.1.hook_resid_post", **SMALL)
    assert named.provenance.hook_point == "blocks.1.hook_resid_post"


def test_the_analyses_read_it(cache, tmp_path):
    store = convert_delphi(cache, tmp_path / "store", **SMALL)
    assert sl.analysis.dead_features(store).of_kind("dead") == [7]
    found = sl.analysis.max_activating_examples(store, 30, n_top=2)
    assert [example.value for example in found.group("top", -1).examples] == [-1.5, -1.5]
    assert sl.analysis.list_features(store, sort="density").rows[0]["feature"] == 30


def test_one_file_and_zeros_change_nothing(cache, tmp_path):
    whole = tmp_path / "layers.2"
    whole.mkdir()
    dense = plant()
    where = np.concatenate([np.argwhere(dense), [[8, 5, 7]]]).astype(np.uint32, order="C")
    tensors = {"locations": where, "activations": np.append(dense[dense != 0], np.float16(0)), "tokens": ids()}
    save_file(tensors, whole / "0_39.safetensors")
    (whole / "config.json").write_text(json.dumps(CONFIG | {"n_splits": 1}))
    one, three = convert_delphi(whole, tmp_path / "one", **SMALL), convert_delphi(cache, tmp_path / "three", **SMALL)
    assert one.n_entries == three.n_entries
    for shard in one.manifest.shards:
        assert (one.folder / shard.file).read_bytes() == (three.folder / shard.file).read_bytes()


def test_shards_do_not_change_what_is_read(cache, tmp_path):
    flat = plant().reshape(-1, D_SAE).astype(np.float32)
    for shard_tokens in (1, 13, 10_000):
        store = convert_delphi(cache, tmp_path / str(shard_tokens), shard_tokens=shard_tokens, progress=False)
        assert np.array_equal(store.matrix().toarray(), flat)
    with pytest.raises(ValueError, match="`shard_tokens`"):
        convert_delphi(cache, tmp_path / "none", shard_tokens=0)


def test_tokens_that_were_not_saved_are_given(tmp_path):
    folder, given = write_cache(tmp_path / "layers.1", plant(), with_tokens=False), torch.from_numpy(ids())
    with pytest.raises(ValueError, match="saved without its tokens"):
        convert_delphi(folder, tmp_path / "store", **SMALL)
    assert np.array_equal(convert_delphi(folder, tmp_path / "store", tokens=given, **SMALL).token_ids, ids().ravel())
    for wrong, rule in ((given[:-2], "in the 7 sequences"), (given.T, "rows of 6"), (given.repeat(2, 1), "at most 60")):
        with pytest.raises(ValueError, match=rule):
            convert_delphi(folder, tmp_path / "wrong", tokens=wrong, **SMALL)
    with pytest.raises(ValueError, match="ids in 0"):
        convert_delphi(folder, tmp_path / "wrong", tokens=-given, **SMALL)


def test_an_interrupted_call_ends_with_the_same_bytes(cache, tmp_path, monkeypatch):
    whole = contents(convert_delphi(cache, tmp_path / "whole", **SMALL).folder)
    real, calls = ShardWriter._save, []

    def failing(self, manifest):
        calls.append(manifest)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        real(self, manifest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(ShardWriter, "_save", failing)
        convert_delphi(cache, tmp_path / "cut", **SMALL)
    with pytest.raises(ValueError, match="must be complete"):
        sl.FeatureStore.load(tmp_path / "cut")
    assert contents(convert_delphi(cache, tmp_path / "cut", **SMALL).folder) == whole
    with monkeypatch.context() as patch:  # opened, not made again
        patch.setattr("saelab.interop.delphi.DelphiCache.read", None)
        convert_delphi(cache, tmp_path / "cut", **SMALL)
    with pytest.raises(ValueError, match="shard_sequences: there 4, now 1"):
        convert_delphi(cache, tmp_path / "cut", shard_tokens=1, progress=False)
    edit(cache / "0_12.safetensors", activations=np.abs(load_file(cache / "0_12.safetensors")["activations"]))
    with pytest.raises(ValueError, match="files: there"):
        convert_delphi(cache, tmp_path / "cut", **SMALL)
    again = convert_delphi(cache, tmp_path / "cut", resume=False, **SMALL)
    assert (again.columns(0, 13).data > 0).all() and (again.columns(13, 40).data < 0).any()


def locations_with(path, entry, column, value):
    found = load_file(path)["locations"]
    found[entry, column] = value
    edit(path, locations=found)


def doubled(path):
    found = load_file(path)
    order = [0, *range(len(found["activations"]))]
    edit(path, locations=found["locations"][order], activations=found["activations"][order])


def reversed_entries(path):
    edit(path, locations=np.ascontiguousarray(load_file(path)["locations"][::-1]))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-5])


def with_activations(change):
    return lambda path: edit(path, activations=change(load_file(path)["activations"]))


DAMAGE = {
    "a position beyond the sequence": (lambda path: locations_with(path, 3, 1, CTX_LEN), r"13_25.*below \(4, 6, 13\)"),
    "a latent beyond the file's": (lambda path: locations_with(path, 3, 2, 13), r"13_25.*below \(4, 6, 13\)"),
    "a sequence beyond the text": (lambda path: locations_with(path, -1, 0, N_SEQ), "13_25.*9 sequences.*1 beyond"),
    "sequences out of order": (lambda path: locations_with(path, 3, 0, 6), "13_25.*in the order of the text"),
    "entries turned round": (reversed_entries, "13_25"),
    "an entry twice": (doubled, "layers.1 must hold one value.* 1 more"),
    "not finite": (with_activations(lambda x: np.where(x > 2, np.float16(np.inf), x)), "13_25.*must be finite"),
    "integers for values": (with_activations(lambda x: x.astype(np.int32)), "13_25.*of another program"),
    "fewer values": (with_activations(lambda x: x[1:]), "13_25.*of another program"),
    "other tokens": (lambda path: edit(path, tokens=ids() + 1), "13_25.*the same tokens"),
    "tokens of another shape": (lambda path: edit(path, tokens=ids()[:-1]), "13_25.*the same tokens"),
    "cut off": (cut_off, "13_25.*cut off"),
    "missing": (lambda path: path.unlink(), "26_39.*should begin with 13.*missing"),
    "overlapping": (
        lambda path: path.rename(path.with_name("12_25.safetensors")),
        "12_25.*should begin with 13.*overlaps",
    ),
    "the last missing": (lambda path: path.with_name("26_39.safetensors").unlink(), "the 3 files.*got 2"),
    "no model named": (lambda path: path.with_name("config.json").write_text("{}"), "`model_name`"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(cache, tmp_path, damage):
    break_it, message = DAMAGE[damage]
    break_it(cache / "13_25.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_delphi(cache, tmp_path / "store", **SMALL)


def test_the_folder_above_is_told_apart(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Did you mean one of: .*layers\.1\?"):
        convert_delphi(cache.parent, tmp_path / "store")
    (cache / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert_delphi(cache, tmp_path / "store")


@pytest.mark.parametrize("name", ["ctx_len", "cache_ctx_len"])
def test_rows_are_as_long_as_either_name_says(name, tmp_path):
    """delphi 0.1 calls the length of its rows `cache_ctx_len`, before it was `ctx_len`."""
    folder, given = write_cache(tmp_path / "layers.1", plant(), with_tokens=False), torch.from_numpy(ids())
    plain = {key: value for key, value in CONFIG.items() if key != "ctx_len"}
    (folder / "config.json").write_text(json.dumps(plain | {name: CTX_LEN}))
    store = convert_delphi(folder, tmp_path / "store", tokens=given, **SMALL)
    with pytest.raises(ValueError, match=f"in rows of {CTX_LEN} and"):
        convert_delphi(folder, tmp_path / "wrong", tokens=given.reshape(-1, CTX_LEN // 2), **SMALL)
    said = json.loads((write_delphi(store, tmp_path / "back") / "config.json").read_text())
    assert said["ctx_len"] == said["cache_ctx_len"] == CTX_LEN


def test_codes_beyond_float16_are_refused(tmp_path):
    dense = plant(np.float32)
    dense[1, 1, 5] = -70_000
    store = convert_delphi(write_cache(tmp_path / "layers.1", dense), tmp_path / "store", **SMALL)
    with pytest.raises(ValueError, match=r"float16, up to 65504, got 7e\+04"):
        write_delphi(store, tmp_path / "back")
    assert not list((tmp_path / "back").rglob("*.safetensors"))
