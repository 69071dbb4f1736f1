"""Folders that several processes write together: the bytes of one process, whatever happens on the way."""

import atexit
import importlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ranks
import torch
from ranks import N_RANKS, Pool, mesh_of
from sampled import one_in

import saelab as sl
from saelab.collecting import harvesting, reader, shared, writers
from saelab.lm.models import tiny_model
from saelab.stores.activations import Activations
from saelab.stores.validation import read_json
from saelab.training.ranks import ROUND

HOOK, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
SIZES = {"batch_size": 3, "shard_tokens": 50, "progress": False}
NORM_RULE = sl.TokenMask(positions=(1, 14), max_norm_ratio=1.1)
LATE = sl.TokenMask(positions=(12, None))
"""Keeps nothing of the short documents that the text ends with"""
N_LATE = 128
"""Rows that it keeps"""


@cache
def made() -> tuple[Any, sl.Tokens]:
    """A model and rows of tokens: 32 that are full, then 6 of eight tokens and padding."""
    model = tiny_model(n_layers=2)
    texts = [f"{i} cats sat on a mat for {i} days." for i in range(32)] + [f"cat {i:03}" for i in range(6)]
    return model, sl.tokenize(model, texts, ctx_len=16, packed=False)


@cache
def saes() -> dict[str, sl.SAE]:
    cfg = sl.SAEConfig(d_in=32, d_sae=300, activation=sl.AbsTopK(k=5))
    return {"a": sl.SAE(cfg, seed=0), "b": sl.SAE(cfg, seed=1)}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Files by name, hidden ones too; folders are None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def do(verb: str, folder: Path, mesh: Any = None, n_rows: int | None = None, **settings: Any) -> Any:
    """Collect, or harvest two SAEs, of a text or of activations collected before, or an untrained one."""
    model, tokens = made()
    if verb == "harvest untrained":
        store, sizes = harvested(settings.pop("mask", None)), (SIZES | settings | {"mesh": mesh})
        sizes |= {"resume": settings.get("resume", True)}
        with (
            patch.object(harvesting, "SHARD_TOKENS", sizes.pop("shard_tokens")),
            patch.object(harvesting, "FORWARD_TOKENS", 16 * sizes.pop("batch_size")),
        ):
            return sl.collecting.harvest_untrained(store, saes()["a"], model, folder, **sizes)
    settings = SIZES | ({"batch_size": 40} if verb == "harvest activations" else {}) | settings | {"mesh": mesh}
    if verb == "collect":
        return sl.collect(model, tokens[:n_rows], [HOOK, LATER], folder, **settings)
    if verb == "harvest":
        return sl.harvest(saes(), model, tokens[:n_rows], folder, hook_point=LATER, **settings)
    return sl.harvest(saes()["a"], model, acts(), folder, **settings)


@cache
def harvested(mask: sl.TokenMask | None) -> sl.FeatureStore:
    """The store of an SAE, whose rows an untrained one encodes; each process has a folder of its own."""
    model, tokens = made()
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = sl.harvest(saes()["a"], model, tokens, folder, hook_point=LATER, mask=mask, progress=False)
    assert isinstance(found, sl.FeatureStore)
    return found


@cache
def acts() -> Activations:
    model, tokens = made()
    return sl.collect(model, tokens, LATER, progress=False)


def do_together(verb: str, folder: Path, shape: tuple[int, int], settings: dict[str, Any]) -> dict[str, Any]:
    """What this process did in a call of all. With `fail`, a function, a process and a number, that process's function
    fails after so many calls; `on_rank_2` are settings of process 2 alone; with `no_links` files have one name.
    """
    mesh, rank = mesh_of(*shape), torch.distributed.get_rank()
    settings = dict(settings)
    function, failing, after = settings.pop("fail", ("shared.save_tensors", -1, 0))
    special, no_links = settings.pop("on_rank_2", {}), settings.pop("no_links", False)
    forwards, joined, calls = [], [], []

    def counted(real: Any, into: list[int]) -> Any:
        return lambda *args, **kwargs: into.append(1) or real(*args, **kwargs)

    def limited(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if rank == failing and len(calls) > after:
                raise RuntimeError("the power went")
            return real(*args, **kwargs)

        return call

    module, name = importlib.import_module(f"saelab.collecting.{function.split('.')[0]}"), function.split(".")[1]
    with ExitStack() as stack:
        stack.enter_context(patch.object(reader, "capture", counted(reader.capture, forwards)))
        stack.enter_context(patch.object(shared, "save_tensors", counted(shared.save_tensors, joined)))
        stack.enter_context(patch.object(os, "link", refuse_links if no_links else os.link))
        stack.enter_context(patch.object(module, name, limited(getattr(module, name))))
        try:
            found, error = do(verb, folder, mesh, **settings | (special if rank == 2 else {})), ""
        except (ValueError, RuntimeError) as failed:
            found, error = {}, str(failed)
    n_rows = [len(one) for one in (found.values() if isinstance(found, dict) else [found])]
    return {"error": error, "n_forwards": len(forwards), "n_joined": len(joined), "n_rows": n_rows}


def refuse_links(*_: Any) -> None:
    raise OSError("no links here")


def prepare() -> None:
    acts()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes of the pool: sums of several threads have other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pool = Pool()
    with patch.object(ranks, "TIMEOUT", 120.0):  # for what is imported first
        pool.run(prepare)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one undisturbed process writes; each call with the same settings is made once."""

    @cache
    def of(verb: str, **settings: Any) -> dict[str, bytes | None]:
        folder = tmp_path_factory.mktemp("whole") / "out"
        do(verb, folder, **settings)
        return contents(folder)

    return of


def run(pool: Pool, verb: str, folder: Path, shape: tuple[int, int] = (2, 2), **settings: Any) -> list[dict[str, Any]]:
    return pool.run(do_together, verb, folder, shape, settings)


def succeed(pool: Pool, verb: str, folder: Path, shape: tuple[int, int] = (2, 2), **settings: Any) -> list[Any]:
    answers = run(pool, verb, folder, shape, **settings)
    assert [one["error"] for one in answers] == [""] * N_RANKS
    assert all(one["n_rows"] == answers[0]["n_rows"] and min(one["n_rows"]) > 0 for one in answers)
    return answers


CASES: list[tuple[str, dict[str, Any]]] = [
    ("collect", {}),
    ("collect", {"mask": NORM_RULE}),
    ("collect", {"mask": NORM_RULE, "shard_tokens": 7}),
    ("collect", {"mask": NORM_RULE, "shard_tokens": 10_000}),
    ("collect", {"shard_tokens": 11, "dtype": torch.bfloat16}),
    ("collect", {"shard_tokens": 1000}),
    ("collect", {"batch_size": 1, "shard_tokens": 15}),
    ("collect", {"batch_size": 14}),  # more processes than batches
    ("collect", {"batch_size": 100}),
    ("collect", {"mask": LATE, "shard_tokens": N_LATE}),  # the last batches have no rows, and the last shard is full
    ("collect", {"mask": LATE, "batch_size": 1, "shard_tokens": 30}),
    ("harvest", {}),
    ("harvest", {"mask": NORM_RULE, "dtype": "float32"}),
    ("harvest", {"mask": NORM_RULE, "shard_tokens": 7}),
    ("harvest", {"shard_tokens": 400}),
    ("harvest", {"batch_size": 100}),
    ("harvest activations", {}),
    ("harvest activations", {"shard_tokens": 300, "dtype": "float32"}),
    ("harvest untrained", {"shard_tokens": 70, "mask": NORM_RULE}),
    ("harvest untrained", {"batch_size": 100}),
    ("harvest untrained", {"shard_tokens": 300, "mask": LATE, "dtype": "float32"}),
]


@pytest.mark.parametrize(("verb", "settings"), one_in(3, CASES), ids=str)
def test_several_processes_write_the_bytes_of_one(
    pool: Pool, whole: Any, tmp_path: Path, verb: str, settings: dict[str, Any]
) -> None:
    shape = ((1, 4), (2, 2), (4, 1))[len(settings) % 3]
    succeed(pool, verb, tmp_path, shape, **settings)
    assert contents(tmp_path) == whole(verb, **settings)
    if verb == "collect":
        Activations.load(tmp_path, HOOK, verify=True)


def test_the_cases_are_what_they_say() -> None:
    model, tokens = made()
    folder_rows = len(sl.collect(model, tokens, HOOK, mask=LATE, progress=False))
    assert folder_rows == N_LATE and not LATE.apply(tokens[-6:]).keep.any()
    acts = sl.collect(model, tokens, [HOOK, LATER], mask=NORM_RULE, batch_size=3, progress=False)[HOOK]
    assert acts.provenance is not None and acts.provenance.removed["norm"] > 10


def test_each_batch_is_read_once_and_most_rows_are_written_once(pool: Pool, tmp_path: Path) -> None:
    answers = succeed(pool, "collect", tmp_path / "plain", batch_size=1, shard_tokens=10)
    _, tokens = made()
    n_of_first = 1  # the widths
    assert sum(one["n_forwards"] for one in answers) == len(tokens) + n_of_first
    assert [one["n_forwards"] for one in answers] == [9 + n_of_first, 10, 9, 10]
    assert 1 <= sum(one["n_joined"] for one in answers) <= N_RANKS - 1
    answers = succeed(pool, "collect", tmp_path / "norms", mask=NORM_RULE, shard_tokens=10)
    assert sum(one["n_joined"] for one in answers) > N_RANKS


@pytest.mark.parametrize("verb", ["collect", "harvest"])
def test_a_disk_without_links_gets_copies(pool: Pool, whole: Any, tmp_path: Path, verb: str) -> None:
    succeed(pool, verb, tmp_path, no_links=True)
    assert contents(tmp_path) == whole(verb)


INTERRUPTIONS: list[tuple[str, str, int, int, dict[str, Any]]] = [
    # verb, function that fails, in which process, after how many calls
    ("collect", "writers.save_tensors", 1, 0, {"mask": NORM_RULE}),
    ("collect", "writers.save_tensors", 2, 1, {}),
    ("collect", "reader.capture", 3, 2, {}),
    ("collect", "writers.read_rows", 0, 3, {"mask": NORM_RULE}),
    ("collect", "shared._put", 1, 0, {}),
    ("collect", "shared.save_tensors", 3, 0, {"mask": NORM_RULE}),
    ("collect", "shared.claim_folder", 2, 0, {}),
    ("harvest", "writers.save_tensors", 1, 1, {}),
    ("harvest", "harvesting.read_rows", 3, 2, {"mask": NORM_RULE}),
    ("harvest", "harvesting.save_statistics", 0, 1, {}),
    ("harvest untrained", "harvesting.make_untrained", 1, 0, {}),
    ("harvest untrained", "writers.save_tensors", 2, 1, {"mask": LATE}),
]


@pytest.mark.parametrize(("verb", "function", "rank", "after", "settings"), one_in(3, INTERRUPTIONS), ids=str)
def test_an_interrupted_call_goes_on(
    pool: Pool, whole: Any, tmp_path: Path, verb: str, function: str, rank: int, after: int, settings: dict[str, Any]
) -> None:
    settings = settings | {"shard_tokens": 20, "batch_size": 2}
    answers = run(pool, verb, tmp_path, fail=(function, rank, after), **settings)
    told = f"Stopped, as another process failed. process {rank} on "
    for i, one in enumerate(answers):
        assert one["error"] == "the power went" if i == rank else one["error"].startswith(told), one
    (tmp_path / ("a" if verb == "harvest" else "") / ".saelab-lock").touch()  # as a killed process leaves it
    assert contents(tmp_path) != whole(verb, **settings)
    again = succeed(pool, verb, tmp_path, **settings)
    assert contents(tmp_path) == whole(verb, **settings)
    early = ("writers.save_tensors", "reader.capture", "shared.claim_folder", "harvesting.make_untrained")
    if function not in early:  # all had been read
        n_calibration = 19 * (verb == "harvest" and "mask" in settings)
        assert [one["n_forwards"] for one in again] == [n_calibration, 0, 0, 0]


def test_others_stop_soon_where_one_fails(pool: Pool, tmp_path: Path) -> None:
    answers = run(pool, "collect", tmp_path, fail=("reader.capture", 3, 0), batch_size=1)
    assert [one["n_forwards"] for one in answers[1:3]] == [ROUND] * 2 and answers[3]["error"] == "the power went"


def test_a_finished_folder_is_opened_at_once(pool: Pool, whole: Any, tmp_path: Path) -> None:
    do("collect", tmp_path)
    answers = succeed(pool, "collect", tmp_path, fail=("reader.capture", 0, 0))
    assert not any(one["n_forwards"] for one in answers) and contents(tmp_path) == whole("collect")


def test_parts_of_a_finished_folder_are_removed(pool: Pool, whole: Any, tmp_path: Path) -> None:
    answers = run(pool, "collect", tmp_path, fail=("shared.remove_parts", 0, 0))
    assert answers[0]["error"] == "the power went"
    assert read_json(tmp_path / "manifest.json")["complete"] and (tmp_path / ".parts-4").is_dir()
    do("collect", tmp_path)
    assert contents(tmp_path) == whole("collect")


@pytest.mark.parametrize("n_shards", one_in(3, [1, 0, 4]))
@pytest.mark.parametrize("mask", [sl.TokenMask(), NORM_RULE])
def test_several_go_on_where_one_stopped(
    pool: Pool, whole: Any, tmp_path: Path, n_shards: int, mask: sl.TokenMask
) -> None:
    settings = {"shard_tokens": 35, "mask": mask}
    calls, save = [], writers.save_tensors

    def limited(*args: Any) -> str:
        calls.append(1)
        if len(calls) > n_shards:
            raise RuntimeError("the power went")
        return save(*args)

    with patch.object(writers, "save_tensors", limited), pytest.raises(RuntimeError, match="the power went"):
        do("collect", tmp_path, **settings)
    manifest = read_json(tmp_path / "manifest.json")
    assert len(manifest["shards"]) == n_shards and (n_shards == 0 or manifest["skip_rows"] > 0)
    succeed(pool, "collect", tmp_path, **settings)
    assert contents(tmp_path) == whole("collect", **settings)


@pytest.mark.parametrize("verb", ["collect", "harvest"])
def test_one_does_not_go_on_where_several_stopped(pool: Pool, whole: Any, tmp_path: Path, verb: str) -> None:
    run(pool, verb, tmp_path, fail=("writers.save_tensors", 2, 1), shard_tokens=20)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="was begun by 4 processes and can be resumed only by as many, got 1"):
        do(verb, tmp_path, shard_tokens=20)
    assert contents(tmp_path) == before
    do(verb, tmp_path, shard_tokens=20, resume=False)
    assert contents(tmp_path) == whole(verb, shard_tokens=20)


def test_several_begin_anew(pool: Pool, whole: Any, tmp_path: Path) -> None:
    do("collect", tmp_path, shard_tokens=13)
    assert "shard_tokens: there 13, now 50" in run(pool, "collect", tmp_path)[0]["error"]
    run(pool, "collect", tmp_path, resume=False, fail=("writers.save_tensors", 2, 0))
    run(pool, "collect", tmp_path, resume=False, mask=NORM_RULE, fail=("shared.save_tensors", 1, 0))
    succeed(pool, "collect", tmp_path, resume=False)
    assert contents(tmp_path) == whole("collect")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("collect", {"n_rows": 20}, "the same tokens_sha256"),
    ("harvest", {"n_rows": 20}, "the same tokens_sha256"),
    ("collect", {"mask": LATE}, "the same mask"),
    ("collect", {"batch_size": 4}, "the same batch_size"),
    ("collect", {"resume": False}, "the same resume"),
    ("harvest", {"dtype": "float32"}, "the same values"),
    ("harvest activations", {"batch_size": 3}, "the same batch_size"),
    ("harvest untrained", {"seed": 1}, "the same sae"),
]


@pytest.mark.parametrize(("verb", "changed", "named"), one_in(3, REFUSED), ids=str)
def test_other_arguments_in_one_process_are_refused_by_all(
    pool: Pool, tmp_path: Path, verb: str, changed: dict[str, Any], named: str
) -> None:
    answers = run(pool, verb, tmp_path, on_rank_2=changed)
    assert len({one["error"] for one in answers}) == 1
    assert f"All processes must have {named}" in answers[0]["error"] and "in process 2" in answers[0]["error"]
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("verb", ["collect", "harvest"])
def test_what_one_process_finds_wrong_is_told_to_all(pool: Pool, tmp_path: Path, verb: str) -> None:
    answers = run(pool, verb, tmp_path, on_rank_2={"shard_tokens": 0})
    assert "must be at least" in answers[2]["error"]
    assert all(
        "process 2 on" in one["error"] and "must be at least" in one["error"] for one in answers if one != answers[2]
    )
    assert contents(tmp_path) == {}


def test_a_folder_that_one_does_not_see_is_refused_by_all(pool: Pool, tmp_path: Path) -> None:
    places = [tmp_path / ("there" if rank == 2 else "here") for rank in range(N_RANKS)]
    for place in set(places):
        place.mkdir()
    told = pool.run(collect_in, places)
    assert len(set(told)) == 1 and "must be one folder that all processes see, got acts" in told[0]
    assert [path.name for path in (tmp_path / "here" / "acts").iterdir()] == ["manifest.json"]


def collect_in(places: list[Path]) -> str:
    """What is said of a folder by a relative name in the places of the processes."""
    home = os.getcwd()
    os.chdir(places[torch.distributed.get_rank()])
    try:
        do("collect", Path("acts"), mesh_of(2, 2))
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(home)
    return ""


def test_memory_is_that_of_one_process(pool: Pool) -> None:
    assert set(pool.run(collect_in_memory)) == {
        "`mesh` must go with `out`, as several processes collect into a folder, got out=None; give one that all of "
        "them see."
    }


def collect_in_memory() -> str:
    model, tokens = made()
    try:
        sl.collect(model, tokens, HOOK, progress=False, mesh=mesh_of(4, 1))
    except ValueError as error:
        return str(error)
    return ""
