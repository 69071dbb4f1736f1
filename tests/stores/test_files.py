"""Atomic files: whole or absent, clear when the disk says no."""

import errno
import os
import stat

import pytest
import safetensors.torch
import torch

from saelab.stores import files
from saelab.stores.files import checksum, remove_leftovers, replace_folder, save_tensors, write_atomic, write_json
from saelab.stores.tensors import load_tensors, map_tensor, read_header
from saelab.stores.validation import read_json

TENSORS = {
    "bf16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "int": torch.tensor([50256, 65520, 151643], dtype=torch.int32),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.arange(12.0).view(3, 4).T,
}


@pytest.mark.parametrize("order", [1, -1])
def test_other_readers_agree(tmp_path, order):
    crc = save_tensors(tmp_path / "a.safetensors", dict(list(TENSORS.items())[::order]), {"by": "us"})
    assert crc == checksum(tmp_path / "a.safetensors")
    theirs, ours = safetensors.torch.load_file(tmp_path / "a.safetensors"), load_tensors(tmp_path / "a.safetensors")
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(ours[name], tensor), name
        assert theirs[name].dtype == ours[name].dtype == tensor.dtype
    assert read_header(tmp_path / "a.safetensors")[1] == {"by": "us"}


def test_reads_files_of_other_writers(tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "a.safetensors")
    for name, tensor in load_tensors(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, TENSORS[name]), name


def test_same_tensors_same_bytes(tmp_path):
    metadata = {f"key{i}": "v" for i in range(8)}
    save_tensors(tmp_path / "a", TENSORS, metadata)
    save_tensors(tmp_path / "b", TENSORS, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_mapping_reads_lazily_and_never_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(1000, 8)})
    before = path.read_bytes()
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    maps = [map_tensor(path, read_header(path)[0]["x"]) for _ in range(20)]
    if n_open:
        assert len(os.listdir("/proc/self/fd")) == n_open
    maps[0].fill_(1.0)
    assert path.read_bytes() == before and maps[1].sum() == 0


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut off|must be a safetensors file"):
        read_header(path)


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": float("nan"), "b": (1, float("inf")), "c": tmp_path})
    assert read_json(tmp_path / "deep" / "a.json") == {"a": None, "b": [1, None], "c": str(tmp_path)}


def test_json_errors_say_which_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"bad.json must hold JSON"):
        read_json(tmp_path / "bad.json")


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a", {"x": torch.ones(3)})
    before = (tmp_path / "a").read_bytes()

    def no_space(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="the disk is full") as caught:
        save_tensors(tmp_path / "a", {"x": torch.zeros(3)})
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == before


def test_unwritable_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError, match="may not be written to"):
            write_atomic(tmp_path / "a", b"x")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_file_in_the_way_of_a_folder(tmp_path):
    write_atomic(tmp_path / "a", b"x")
    with pytest.raises(OSError, match="a file is in the way"):
        write_atomic(tmp_path / "a" / "b", b"x")


def test_folder_is_replaced_whole(tmp_path):
    for name in ("one", "two"):
        with replace_folder(tmp_path / "out") as temp:
            (temp / name).write_text(name)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["two"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    with replace_folder(tmp_path / "out") as temp:
        (temp / "one").write_text("one")
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out") as temp:
        (temp / "two").write_text("two")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["one"]


def test_leftovers_of_a_killed_process_go(tmp_path):
    write_atomic(tmp_path / "a", b"x")
    (tmp_path / ".b.0123.tmp").write_text("half")
    (tmp_path / ".c.0123.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
