"""Activations on disk and in memory: the same rows either way, and damage is named."""

import json

import pytest
import torch

from saelab.stores.activations import Activations
from saelab.stores.manifest import Provenance
from tests.folders import HOOK, ORIGIN, write_folder

OTHER = "blocks.1.hook_resid_post"


@pytest.fixture
def x():
    return torch.randn(103, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 103, 200])
def test_folder_reads_like_the_tensor(tmp_path, x, shard_tokens, dtype):
    x = x.to(dtype)
    acts = Activations.load(write_folder(tmp_path, x, shard_tokens), verify=True)
    assert (acts.d_in, len(acts), acts.n_tokens, acts.dtype, acts.hook_point) == (3, 103, 103, dtype, HOOK)
    index = torch.tensor([102, 0, -1, 5, 5, 50])
    for key in (slice(None), slice(5, 60), slice(-3, None), slice(60, 5), slice(None, None, 7), index, 0, -1):
        assert torch.equal(acts[key], x[key]), key
    assert torch.equal(acts.token_ids, torch.arange(103, dtype=torch.int32))
    assert torch.equal(acts.doc_ids, torch.arange(103, dtype=torch.int32) // 10)
    assert torch.equal(acts.positions, torch.arange(103, dtype=torch.int32) % 4)


def test_views_nest(tmp_path, x):
    for acts in (Activations.load(write_folder(tmp_path, x, 10)), Activations.from_tensor(x)):
        view = acts.rows(10, 90).rows(5, 50)
        assert len(view) == 45 and torch.equal(view[:], x[15:60])
        assert torch.equal(view[torch.tensor([0, -1])], x[[15, 59]])
    with pytest.raises(ValueError, match="`start` and `stop`"):
        acts.rows(5, 500)


def test_rows_are_copies(x):
    before = x.clone()
    Activations.from_tensor(x)[2:5].zero_()
    assert torch.equal(x, before)


def test_index_outside_is_refused(x):
    acts = Activations.from_tensor(x)
    for key in (103, -104, torch.tensor([0, 103])):
        with pytest.raises(IndexError, match=r"-103\.\.102"):
            acts[key]
    assert sum(1 for _ in acts) == 103


def test_several_hook_points(tmp_path, x):
    write_folder(tmp_path, x, 20, (HOOK, OTHER))
    assert torch.equal(Activations.load(tmp_path, OTHER)[:], x * 2)
    assert Activations.load(tmp_path, OTHER).provenance == ORIGIN.at(OTHER)
    for wrong in (None, "nonsense"):
        with pytest.raises(ValueError, match="`hook_point` must be one of those"):
            Activations.load(tmp_path, wrong)


def test_large_token_ids_are_exact(x):
    ids = torch.tensor([50256, 65520, 151643], dtype=torch.int32)
    acts = Activations.from_tensor(x[:3].bfloat16(), token_ids=ids)
    assert acts.token_ids.tolist() == ids.tolist() and acts.doc_ids is None


def test_unfinished_folder_is_refused(tmp_path, x):
    with pytest.raises(ValueError, match="stopped after 103 tokens"):
        Activations.load(write_folder(tmp_path, x, 20, complete=False))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere': no such folder\. .* `saelab collect`"):
        Activations.load(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"must be one that `collect` wrote, got '.*': a folder without activations"
    ):
        Activations.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file': a file"):
        Activations.load(tmp_path / "file")


@pytest.mark.parametrize("n_bytes", [-1, 50, 0])
def test_truncated_shard_is_named(tmp_path, x, n_bytes):
    shard = write_folder(tmp_path, x, 20) / "shard-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match="shard-00003"):
        Activations.load(tmp_path)


def test_missing_shard_is_named(tmp_path, x):
    (write_folder(tmp_path, x, 20) / "shard-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard-00002"):
        Activations.load(tmp_path)


def test_flipped_bit_is_found_when_verifying(tmp_path, x):
    shard = write_folder(tmp_path, x, 20) / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    Activations.load(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00001.*checksum"):
        Activations.load(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_tokens", 99),
        ("dtype", "bfloat16"),
        ("dtype", 3),
        ("d_in", {HOOK: 4}),
        ("hook_points", [OTHER]),
        ("schema_version", 2),
        ("kind", "features"),
        ("shards", 5),
        ("shards", [{"file": "shard-00000.safetensors", "n_tokens": 103}]),
        ("provenance", {"model": "m"}),
        ("complete", None),
        ("d_in", None),
    ],
)
@pytest.mark.parametrize("remove", [False, True])
def test_edited_manifest_is_refused(tmp_path, x, key, value, remove):
    path = write_folder(tmp_path, x, 20) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = value
    if remove:
        del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest|provenance|complete"):
        Activations.load(tmp_path)


def test_opening_reads_no_rows(tmp_path, x, monkeypatch):
    write_folder(tmp_path, x, 1)
    monkeypatch.setattr("saelab.stores.row_columns.map_tensor", None)
    assert len(Activations.load(tmp_path)) == 103


def test_provenance_round_trip():
    assert Provenance.from_dict(ORIGIN.to_dict()) == ORIGIN
    with pytest.raises(ValueError, match="colour"):
        Provenance.from_dict(ORIGIN.to_dict() | {"colour": "red"})


def test_repr_says_what_it_is(x):
    assert repr(Activations.from_tensor(x)) == "Activations(103 tokens, d_in 3, torch.float32)"
