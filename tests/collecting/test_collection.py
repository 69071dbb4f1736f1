"""Collecting: the right rows, exact bytes whatever happens on the way, and nothing half-written."""

import errno
import re
import signal
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Child

from saelab.collecting import collection, reader, writers
from saelab.collecting.collection import collect
from saelab.lm.hooks import capture
from saelab.lm.masks import TokenMask
from saelab.lm.models import tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.stores import files, manifest
from saelab.stores.activations import Activations
from saelab.stores.validation import read_json

HOOK, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
SIZES = {"batch_size": 4, "shard_tokens": 30, "progress": False}


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """One forward pass at a time, by `reader.capture`, which tests here replace."""
    monkeypatch.setattr(reader, "make_captures", lambda *_: [])


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=2)


@pytest.fixture(scope="module")
def tokens(model):
    return tokenize(model, [f"{i} cats sat on a mat." for i in range(12)], ctx_len=16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(model, tokens, tmp_path_factory):
    """What an undisturbed `collect` writes; each call with the same settings is made once."""

    @cache
    def collected(hook_points=HOOK, **settings) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp("whole")
        names = list(hook_points) if isinstance(hook_points, tuple) else hook_points
        collect(model, tokens, names, folder, **SIZES | settings)
        return contents(folder)

    return collected


def fail_after(monkeypatch, module, name, n, error):
    """Let `module.name` work n times, then raise."""
    real, calls = getattr(module, name), iter(range(10**6))

    def limited(*args, **kwargs):
        if next(calls) >= n:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to_disk", [True, False])
def test_rows_are_what_the_mask_keeps(model, tokens, tmp_path, dtype, to_disk):
    made = collect(model, tokens, [HOOK, LATER], tmp_path / "acts" if to_disk else None, dtype=dtype, **SIZES)
    keep = TokenMask().apply(tokens).keep
    expected = capture(model, tokens.ids, [HOOK, LATER])
    for name, acts in made.items():
        assert acts.dtype == (dtype or torch.float32) and acts.hook_point == acts.provenance.hook_point == name
        torch.testing.assert_close(acts[:].float(), expected[name][keep].to(acts.dtype).float(), atol=1e-5, rtol=1e-2)
        assert torch.equal(acts.token_ids, tokens.ids[keep]) and acts.token_ids.dtype == torch.int32
        assert torch.equal(acts.doc_ids, tokens.doc_ids[keep])
        assert torch.equal(acts.positions, torch.arange(16, dtype=torch.int32).expand(len(tokens), 16)[keep])
        assert acts.provenance.n_tokens == len(acts) and acts.provenance.tokens_sha256 == tokens.sha256
        assert sum(acts.provenance.removed.values()) + len(acts) == tokens.ids.numel()
        assert acts.provenance.removed["special"] == 12


def test_one_name_gives_one_result(model, tokens):
    assert isinstance(collect(model, tokens, HOOK, progress=False), Activations)
    assert list(collect(model, tokens, [HOOK], progress=False)) == [HOOK]


def test_one_forward_for_all_hook_points(model, tokens, monkeypatch):
    asked = []
    monkeypatch.setattr(reader, "capture", lambda m, ids, names: asked.append(list(names)) or capture(m, ids, names))
    collect(model, tokens, [HOOK, LATER], **SIZES)
    n_forwards = -(-len(tokens) // 4) + 1  # one more to learn the widths
    assert asked == [[HOOK, LATER]] * n_forwards


@pytest.mark.parametrize("shard_tokens", [3, 64, 10_000])
def test_shards_have_the_size_asked_for(model, tokens, tmp_path, shard_tokens):
    whole = collect(model, tokens, HOOK, batch_size=4, progress=False)
    acts = collect(model, tokens, HOOK, tmp_path, batch_size=4, shard_tokens=shard_tokens, progress=False)
    sizes = [shard["n_tokens"] for shard in read_json(tmp_path / "manifest.json")["shards"]]
    assert all(size == shard_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= shard_tokens
    assert torch.equal(acts[:], whole[:]) and torch.equal(acts.token_ids, whole.token_ids)
    Activations.load(tmp_path, verify=True)


@pytest.mark.parametrize("n_shards", [0, 1, 3])
@pytest.mark.parametrize("shard_tokens", [7, 30, 64])
def test_interrupted_anywhere_ends_with_the_same_bytes(
    model, tokens, whole, tmp_path, monkeypatch, n_shards, shard_tokens
):
    sizes = SIZES | {"shard_tokens": shard_tokens}
    mask = TokenMask(positions=(1, 14), max_norm_ratio=1.5)
    with monkeypatch.context() as patch:
        fail_after(patch, writers, "save_tensors", n_shards, RuntimeError("the power went"))
        with pytest.raises(RuntimeError, match="the power went"):
            collect(model, tokens, [HOOK, LATER], tmp_path, mask=mask, **sizes)
    with pytest.raises(ValueError, match="Run the same `collect` again"):
        Activations.load(tmp_path, HOOK)
    collect(model, tokens, [HOOK, LATER], tmp_path, mask=mask, **sizes)
    assert contents(tmp_path) == whole((HOOK, LATER), mask=mask, shard_tokens=shard_tokens)


def test_killed_between_shard_and_manifest(model, tokens, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, manifest.ActivationsManifest, "save", 3, RuntimeError("the power went"))
        with pytest.raises(RuntimeError):
            collect(model, tokens, HOOK, tmp_path, **SIZES)
    (tmp_path / ".shard-00007.safetensors.0123abcd.tmp").write_text("what a killed process leaves")
    collect(model, tokens, HOOK, tmp_path, **SIZES)
    assert contents(tmp_path) == whole()


def test_resuming_does_only_what_is_left(model, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, writers, "save_tensors", 4, RuntimeError("the power went"))
        with pytest.raises(RuntimeError):
            collect(model, tokens, HOOK, tmp_path, **SIZES)
    n_left = len(tokens) - read_json(tmp_path / "manifest.json")["next_seq"]
    asked = []
    monkeypatch.setattr(reader, "capture", lambda m, ids, names: asked.append(len(ids)) or capture(m, ids, names))
    collect(model, tokens, HOOK, tmp_path, **SIZES)
    assert sum(asked) == n_left < len(tokens)


def test_finished_folder_is_opened_at_once(model, tokens, tmp_path, monkeypatch):
    first = collect(model, tokens, HOOK, tmp_path, **SIZES)
    before = contents(tmp_path)
    monkeypatch.setattr(reader, "capture", None)
    assert torch.equal(collect(model, tokens, HOOK, tmp_path, **SIZES)[:], first[:])
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hook_points": LATER}, "hook_points"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"mask": TokenMask(special=False)}, "mask"),
        ({"shard_tokens": 31}, "shard_tokens"),
        ({"batch_size": 5}, "batch_size"),
        ({"tokens": slice(0, 8)}, "tokens_sha256"),
        ({"model": 1}, "weights"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_are_refused(model, tokens, tmp_path, monkeypatch, change, named, finished):
    with monkeypatch.context() as patch:
        if not finished:
            fail_after(patch, writers, "save_tensors", 2, RuntimeError("the power went"))
        try:
            collect(model, tokens, HOOK, tmp_path, **SIZES)
        except RuntimeError:
            assert not finished
    before = contents(tmp_path)
    arguments = {"model": model, "tokens": tokens, "hook_points": HOOK, "out": tmp_path, **SIZES, **change}
    if "model" in change:
        arguments["model"] = tiny_model(n_layers=2, seed=1)
    if "tokens" in change:
        arguments["tokens"] = tokens[change["tokens"]]
    with pytest.raises(ValueError, match=rf"others \(.*{named}: there .*, now .*resume=False"):
        collect(**arguments)
    assert contents(tmp_path) == before


def test_changed_weights_are_noticed(tokens, tmp_path):
    model = tiny_model(n_layers=2)
    collect(model, tokens, HOOK, tmp_path, **SIZES)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="weights: there"):
        collect(model, tokens, HOOK, tmp_path, **SIZES)


def test_beginning_anew(model, tokens, whole, tmp_path):
    collect(model, tokens, HOOK, tmp_path, **SIZES | {"shard_tokens": 20})
    collect(model, tokens, HOOK, tmp_path, resume=False, **SIZES)
    assert contents(tmp_path) == whole()


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_left_alone(model, tokens, tmp_path, resume):
    (tmp_path / "shard-00000.safetensors").write_text("thesis")
    with pytest.raises(ValueError, match="`out` must be empty or hold what `collect` wrote"):
        collect(model, tokens, HOOK, tmp_path, resume=resume, **SIZES)
    assert contents(tmp_path) == {"shard-00000.safetensors": b"thesis"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("max_norm_ratio", [None, 10.0])
def test_nan_is_refused_and_nothing_half_written(model, tokens, whole, tmp_path, monkeypatch, bad, max_norm_ratio):
    mask = TokenMask(max_norm_ratio=max_norm_ratio)

    def planted(m, ids, names):
        acts = capture(m, ids, names)
        if torch.equal(ids, tokens.ids[8:12]):
            ordinary = TokenMask().apply(tokens[8:12]).keep.nonzero()
            for seq, position in ordinary[[3, 20]].tolist():
                acts[LATER][seq, position, 5] = bad
        return acts

    with monkeypatch.context() as patch:
        patch.setattr(reader, "capture", planted)
        if max_norm_ratio:  # the medians are not what this test is about
            real = reader.ActivationReader.calibrated
            patch.setattr(reader.ActivationReader, "calibrated", lambda self, t, n: real(self, t[:8], n))
        with pytest.raises(ValueError, match=rf"finite in torch.float32; '{LATER}' has NaN or infinity in 2 of"):
            collect(model, tokens, [HOOK, LATER], tmp_path / "out", mask=mask, **SIZES)
    assert not list((tmp_path / "out").glob(".*"))
    assert read_json(tmp_path / "out" / "manifest.json")["complete"] is False
    if max_norm_ratio is None:
        collect(model, tokens, [HOOK, LATER], tmp_path / "out", mask=mask, **SIZES)
        assert contents(tmp_path / "out") == whole((HOOK, LATER), mask=mask)


def test_nan_at_a_masked_token_does_no_harm(model, tokens, monkeypatch):
    def planted(m, ids, names):
        acts = capture(m, ids, names)
        acts[HOOK][:, 0] = float("nan")
        return acts

    monkeypatch.setattr(reader, "capture", planted)
    assert collect(model, tokens, HOOK, mask=TokenMask(positions=(1, None)), **SIZES)[:].isfinite().all()


def test_a_batch_may_keep_nothing(model, tmp_path):
    tokens = tokenize(model, ["one", "a longer text"] + ["two"] * 8 + ["another longer text"], ctx_len=16, packed=False)
    mask = TokenMask(positions=(8, None))
    acts = collect(model, tokens, HOOK, tmp_path, mask=mask, **SIZES | {"batch_size": 2})
    assert acts.doc_ids.unique().tolist() == [1, 10]
    assert sum(acts.provenance.removed.values()) + len(acts) == tokens.ids.numel()


def test_overflow_of_float16_is_refused(model, tokens, monkeypatch):
    monkeypatch.setattr(
        reader, "capture", lambda m, ids, names: {n: x * 1e6 for n, x in capture(m, ids, names).items()}
    )
    with pytest.raises(ValueError, match=r"finite in torch\.float16.*bfloat16 or float32"):
        collect(model, tokens, HOOK, dtype=torch.float16, **SIZES)
    assert collect(model, tokens, HOOK, dtype=torch.bfloat16, **SIZES)[:].isfinite().all()


def test_outlier_at_one_hook_point_is_dropped_at_all(model, tokens, tmp_path, monkeypatch):
    sink = (tokens.ids == tokens.ids[0, 3]) & TokenMask().apply(tokens).keep  # an outlier wherever this token stands

    def planted(m, ids, names):
        acts = capture(m, ids, names)
        acts[HOOK][ids == tokens.ids[0, 3]] *= 100
        return acts

    monkeypatch.setattr(reader, "capture", planted)
    made = collect(model, tokens, [HOOK, LATER], tmp_path, mask=TokenMask(max_norm_ratio=20.0), **SIZES)
    for name, acts in made.items():
        assert acts.provenance.removed["norm"] == int(sink.sum()) > 0
        assert tokens.ids[0, 3] not in acts.token_ids
        median = read_json(tmp_path / "manifest.json")["median_norms"][name]
        assert acts.provenance.median_norm == median
        torch.testing.assert_close(median, float(acts[:].norm(dim=1).median()), rtol=0.1, atol=0)
    memory = collect(model, tokens, [HOOK, LATER], mask=TokenMask(max_norm_ratio=20.0), **SIZES)
    assert torch.equal(memory[HOOK][:], made[HOOK][:])
    assert memory[LATER].provenance == made[LATER].provenance


def test_full_disk_loses_nothing(model, tokens, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_after(patch, files.os, "fsync", 6, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="the disk is full") as caught:
            collect(model, tokens, HOOK, tmp_path / "cut", **SIZES)
    assert str(tmp_path / "cut") in str(caught.value)
    assert not list((tmp_path / "cut").glob(".*"))
    collect(model, tokens, HOOK, tmp_path / "cut", **SIZES)
    assert contents(tmp_path / "cut") == whole()


def test_unwritable_place_is_found_out_before_the_work(model, tokens, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    n_forwards = []
    monkeypatch.setattr(reader, "capture", lambda m, ids, names: n_forwards.append(1) or capture(m, ids, names))
    with pytest.raises(OSError, match="a file is in the way"):
        collect(model, tokens, HOOK, tmp_path / "file" / "acts", **SIZES)
    assert len(n_forwards) <= 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"hook_points": []}, "`hook_points` must be at least one"),
        ({"hook_points": [HOOK, HOOK]}, "all different"),
        ({"hook_points": "blocks.0.hook_resid_pots"}, "hook_resid_post"),
        ({"dtype": torch.int8}, "`dtype` must be a floating dtype"),
        ({"batch_size": 0}, "at least 1"),
        ({"shard_tokens": 0}, "`shard_tokens` must be at least 1"),
        ({"mask": TokenMask(positions=(50, None))}, "`mask` must keep at least one token"),
    ],
)
def test_wrong_use_is_named(model, tokens, tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        collect(**{"model": model, "tokens": tokens, "hook_points": HOOK, "out": tmp_path / "a", **SIZES, **arguments})
    assert not (tmp_path / "a").exists()


def test_progress_shows_the_rate_and_can_be_silenced(model, tokens, capfd):
    collect(model, tokens, HOOK, progress=True)
    assert "tokens/s" in capfd.readouterr().err
    collect(model, tokens, HOOK, progress=False)
    assert capfd.readouterr() == ("", "")


def collect_made_up(folder: Path, slow: float) -> None:
    """Collect 3200 rows, `slow` seconds a forward, without a language model; in a process of its own, as it is told
    there where activations come from.
    """

    def forward(model, ids, names):
        time.sleep(slow)
        return {name: torch.sin(model.weight * ids[..., None].float()) for name in names}

    reader.capture, reader.find_hook_point = forward, lambda model, name: name
    reader.make_captures = lambda *_: []
    reader.hook_points_of = lambda _: SimpleNamespace(is_plain=True, agrees=True)
    reader.as_model = collection.as_model = lambda model: model
    reader.describe_model = lambda _: SimpleNamespace(name="m", weight_processing="none", versions={}, backend=None)
    model = torch.nn.Linear(1, 8)
    model.weight = torch.nn.Parameter(torch.arange(1.0, 9.0), requires_grad=False)
    torch.nn.init.zeros_(model.bias)
    ids = torch.arange(200 * 16, dtype=torch.int32).view(200, 16)
    tokens = Tokens(ids=ids, doc_ids=ids // 40)
    collect(model, tokens, ["a", "b"], folder, batch_size=4, shard_tokens=100, progress=False)


def test_killed_thrice_ends_with_the_same_bytes(tmp_path):
    whole = Child(tmp_path / "errors-whole", collect_made_up, tmp_path / "whole", 0.0)
    cut = tmp_path / "cut"
    for number, signum in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGTERM)):
        process = Child(tmp_path / f"errors-{number}", collect_made_up, cut, 0.08)
        process.wait_until((cut / f"shard-{5 + 8 * number:05d}.safetensors").exists)
        process.send(signum)
        code, errors = process.wait()
        assert code == (-signum if signum == signal.SIGKILL else 1)
        if signum != signal.SIGKILL:
            said = int(re.search(rf"Stopped\. (\d+) tokens are saved in {cut}", errors).group(1))
            assert said == read_json(cut / "manifest.json")["n_tokens"] >= 500
    last = Child(tmp_path / "errors-last", collect_made_up, cut, 0.0)
    assert (whole.wait(), last.wait()) == ((0, ""), (0, ""))
    assert contents(cut) == contents(tmp_path / "whole")
