"""One writer a folder, named when it refuses another; readers not kept out; what a killed writer leaves taken over."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from folders import write_folder
from processes import Child

import saelab as sl
from saelab.cli.app import dispatch
from saelab.labels.label_store import LabelStore
from saelab.stores.files import JOURNAL, STAGED, await_settled, is_empty, replace_folder, settle, write_json
from saelab.stores.jobs import LOCK, DeferredInterrupt, FolderInUse, Terminable, hold_folder
from saelab.training.checkpoint import find_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and signals as on Unix")
X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
CFG = sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2))
SMALL = sl.TrainConfig(n_tokens=128, batch_size=32, save_every_tokens=64)


def hold(folder: str, ready: str) -> None:
    with hold_folder(folder):
        Path(ready).touch()
        time.sleep(60)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with labels."""
    folder = tmp_path_factory.mktemp("one") / "store"
    harvest(folder, seed=0)
    with LabelStore.open(folder) as book:
        book.set(3, "rain", author="me")
    return folder


def harvest(folder: Path, seed: int, n: int = 200, **how: object) -> None:
    columns = {"token_ids": torch.arange(n, dtype=torch.int32) % 7, "doc_ids": (torch.arange(n) // 20).int()}
    columns["positions"] = (torch.arange(n) % 20).int()
    where = sl.stores.Provenance(
        model="m", weight_processing="none", hook_point="h", text="t", tokens_sha256=str(n), mask={}, dtype="float32",
        ctx_len=20, n_tokens=n, seed=None, versions={},
    )  # fmt: skip
    acts = sl.Activations.from_tensor(X[:n], where, **columns)
    sl.harvest(sl.SAE(CFG, seed), None, acts, folder, allow_mismatch=True, progress=False, **how)  # type: ignore[arg-type]


def test_another_process_is_refused_by_name_and_a_dead_one_is_not(tmp_path, store, capsys) -> None:
    out = tmp_path / "out"
    child = Child(tmp_path / "errors.txt", hold, str(out), str(tmp_path / "ready"))
    child.wait_until((tmp_path / "ready").exists)
    sae, opened = sl.SAE(CFG), sl.FeatureStore.load(store)
    attempts = {
        "train": lambda: sae.fit(X, SMALL, out=out, progress=False),
        "save": lambda: sae.save_pretrained(out),
        "convert": lambda: sae.save_pretrained(out, "saelens"),
        "harvest": lambda: harvest(out, 0),
        "report": lambda: sl.report(opened, out, features=[1], progress=False),
        "export": lambda: sl.interop.export_store(opened, out, "saedashboard", features=[1], progress=False),
    }
    said = (out / LOCK).read_text().split()
    assert said[0] == "process" and said[1].isdigit()
    for name, attempt in attempts.items():
        with pytest.raises(FolderInUse, match=rf"one writer at a time, and process {said[1]} on \S+ is writing there"):
            attempt()
        assert os.listdir(out) == [LOCK], name
    assert dispatch(["train", str(write_folder(tmp_path / "acts", X, 100)), "--d-sae", "64", "--out", str(out)]) == 2
    assert f"process {said[1]} on" in capsys.readouterr().err
    child.send(signal.SIGKILL)
    child.wait()
    assert os.listdir(out) == [LOCK]
    sae.save_pretrained(out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


def test_labeling_a_store_is_refused_while_it_is_written_and_reading_it_is_not(tmp_path, store, capsys) -> None:
    child = Child(tmp_path / "errors.txt", hold, str(store), str(tmp_path / "ready"))
    child.wait_until((tmp_path / "ready").exists)
    assert dispatch(["label", str(store), "--no-lens", "--no-progress"]) == 2
    assert "is writing there" in capsys.readouterr().err
    assert len(sl.FeatureStore.load(store)) == 200 and LabelStore.open(store)[3].text == "rain"
    child.send(signal.SIGKILL)
    child.wait()
    (store / LOCK).unlink()


def test_a_finished_folder_is_opened_where_nothing_may_be_written(tmp_path, store, monkeypatch) -> None:
    def refuse(path: Path, wait: bool) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr("saelab.stores.jobs.open_locked", refuse)
    monkeypatch.setattr("saelab.stores.files.open_locked", refuse)
    harvest(store, seed=0)
    with pytest.raises(PermissionError, match="may not be written to"):
        harvest(tmp_path, seed=0)


def test_the_lock_of_a_killed_writer_goes_when_its_finished_folder_is_opened_again(tmp_path) -> None:
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, ["The fox met the hen."] * 4, ctx_len=8)

    def collect() -> None:
        sl.collect(model, tokens, "blocks.1.hook_resid_post", tmp_path / "acts", progress=False)

    collect()
    (tmp_path / "acts" / LOCK).write_text("process 1 on nowhere\n")
    collect()
    assert not (tmp_path / "acts" / LOCK).exists()


def test_a_thread_may_hold_a_folder_again_and_another_may_not(tmp_path) -> None:
    refused: list[BaseException] = []

    def intrude() -> None:
        try:
            with hold_folder(tmp_path / "a" / ".." / "a"):
                pass
        except FolderInUse as error:
            refused.append(error)

    with hold_folder(tmp_path / "a"), hold_folder(tmp_path / "a"):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} on" in str(refused[0])
    assert os.listdir(tmp_path) == []  # made for nothing, so gone


def test_a_forked_process_holds_nothing(tmp_path) -> None:
    with hold_folder(tmp_path / "a"):
        ready, done = os.pipe()
        if not (child := os.fork()):
            os.close(done)
            os.read(ready, 1)
            os._exit(0)
        os.close(ready)
    with hold_folder(tmp_path / "a"):
        pass
    os.close(done)
    os.waitpid(child, 0)


def read_beside_a_writer(folder: str) -> None:
    """Write one SAE and another in turn for a second, and read all the while; without the tests' own type checks, which
    read weights where nobody asked for them.
    """
    saes = [sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=k)), seed=k) for k in (1, 2)]
    sums = {k: float(sae.W_dec.detach().sum()) for k, sae in zip((1, 2), saes, strict=True)}
    saes[0].save_pretrained(folder)
    end = time.monotonic() + 1

    def write() -> None:
        while time.monotonic() < end:
            for sae in saes:
                sae.save_pretrained(folder)
                time.sleep(0.005)  # on a busy machine a writer that never rests leaves no time to read

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while thread.is_alive():
        found = sl.SAE.from_pretrained(folder)
        k = found.cfg.activation.k  # type: ignore[attr-defined]
        assert float(found.W_dec.detach().sum()) == sums[k]
        seen.add(k)
    thread.join()
    assert seen == {1, 2}


def test_readers_beside_a_writer_find_one_sae_or_the_other(tmp_path) -> None:
    child = Child(tmp_path / "errors.txt", read_beside_a_writer, str(tmp_path / "sae"))
    assert child.wait() == (0, "")
    assert sorted(os.listdir(tmp_path / "sae")) == ["config.json", "model.safetensors"]


def test_a_writer_waits_for_a_reader_that_finishes_what_another_left(tmp_path, monkeypatch) -> None:
    """Readers keep nobody out, so not while they move a killed writer's last files either."""
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "sae", last="a") as temp:
        (temp / "a").write_text("new")
        monkeypatch.setattr("saelab.stores.files.settle", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.undo()
    assert (tmp_path / "sae" / STAGED / JOURNAL).is_file()
    settling, go_on = threading.Event(), threading.Event()

    def dawdle(folder: str) -> None:
        settling.set()
        go_on.wait()
        settle(folder)

    monkeypatch.setattr("saelab.stores.files.settle", dawdle)
    reader = threading.Thread(target=await_settled, args=(str(tmp_path / "sae"),))
    reader.start()
    settling.wait()
    threading.Timer(0.05, go_on.set).start()
    with hold_folder(tmp_path / "sae"):
        assert not (tmp_path / "sae" / STAGED).exists() and (tmp_path / "sae" / "a").read_text() == "new"
    reader.join()


def test_other_files_stay_and_stale_ones_go(tmp_path) -> None:
    for name in ("notes.md", "old-1.json", "config.json"):
        (tmp_path / name).write_text(name)
    with replace_folder(tmp_path, last="config.json", stale=("old-*.json",)) as temp:
        (temp / "deep").mkdir()
        (temp / "deep" / "a").write_text("new")
        (temp / "config.json").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "deep", "notes.md"]
    assert (tmp_path / "config.json").read_text() == (tmp_path / "deep" / "a").read_text() == "new"


@pytest.mark.parametrize("journal", [{"last": "", "stale": ["../precious"]}, {"last": 3, "stale": []}, [], "{"])
def test_a_journal_that_is_none_of_ours_is_refused(tmp_path, journal) -> None:
    (tmp_path / "precious").write_text("kept")
    staged = tmp_path / "out" / STAGED
    staged.mkdir(parents=True)
    write_json(staged / JOURNAL, journal) if journal != "{" else (staged / JOURNAL).write_text("{")
    for go_on in (settle, await_settled):
        with pytest.raises(ValueError, match=STAGED):
            go_on(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_link_is_no_replacement(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    write_json(tmp_path / "elsewhere" / JOURNAL, {"last": "", "stale": []})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / STAGED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Remove it"):
        settle(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "precious").exists() and not is_empty(tmp_path)


def test_a_reader_that_may_not_write_says_so(tmp_path, monkeypatch) -> None:
    (tmp_path / STAGED).mkdir()
    write_json(tmp_path / STAGED / JOURNAL, {"last": "", "stale": []})
    monkeypatch.setattr("saelab.stores.files.settle", lambda folder: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(ValueError, match="Open it once where it may be written"):
        await_settled(tmp_path)


def test_checkpoints_that_lie_hidden_are_found(tmp_path) -> None:
    whole, again, fresh = (sl.SAE(CFG) for _ in range(3))
    whole.fit(X, SMALL, out=tmp_path / "whole", progress=False)
    fresh.fit(
        X, sl.TrainConfig(n_tokens=64, batch_size=32, save_every_tokens=64), out=tmp_path / "half", progress=False
    )
    out = tmp_path / "cut"
    out.mkdir()
    os.rename(tmp_path / "half" / "checkpoint", out / ".checkpoint.01234567.tmp")  # as saelab 0.1 left them
    os.rename(tmp_path / "whole" / "checkpoint", out / ".checkpoint.89abcdef.tmp")
    steps = json.loads((find_checkpoint(out) / "progress.json").read_text())["step"]
    assert steps == 4 and os.listdir(out) == ["checkpoint"]
    again.fit(X, SMALL, out=out, resume=True, progress=False)
    assert torch.equal(again.W_dec, whole.W_dec)


def labels_of(book: Path) -> list[str]:
    with LabelStore(book) as opened:
        return [label.text for label in opened.labels()]


def test_labels_outlive_the_store_of_their_sae(tmp_path, caplog) -> None:
    harvest(tmp_path, seed=0, n=100)
    with LabelStore.open(tmp_path) as book:
        book.set(3, "rain", author="me")
    harvest(tmp_path, seed=0, n=200, resume=False)
    assert (
        len(sl.FeatureStore.load(tmp_path)) == 200 and LabelStore.open(tmp_path)[3].text == "rain" and not caplog.text
    )
    harvest(tmp_path, seed=1, n=200, resume=False)
    aside = list(tmp_path.glob("labels-*.sqlite"))
    assert len(aside) == 1 and labels_of(aside[0]) == ["rain"] and len(LabelStore.open(tmp_path)) == 0
    assert str(aside[0]) in caplog.text and "kept" in caplog.text
    with LabelStore.open(tmp_path) as book:
        book.set(5, "sun", author="me")
    harvest(tmp_path, seed=0, n=200, resume=False)
    assert labels_of(tmp_path / "labels.sqlite") == ["rain"]
    assert [labels_of(file) for file in tmp_path.glob("labels-*.sqlite")] == [["sun"]]


def test_labels_that_are_being_written_stop_an_overwrite_before_it_begins(tmp_path, monkeypatch) -> None:
    harvest(tmp_path, seed=0, n=100)
    monkeypatch.setattr("saelab.collecting.writers.PATIENCE", 0.1)
    with LabelStore.open(tmp_path) as book:
        book.set(3, "rain", author="me")
        with book.changing(), pytest.raises(TimeoutError, match="written by another process"):
            harvest(tmp_path, seed=1, resume=False)
    assert len(sl.FeatureStore.load(tmp_path)) == 100 and LabelStore.open(tmp_path)[3].text == "rain"


@pytest.mark.parametrize("damage", ["flipped", "cut off", "missing"])
def test_what_is_advised_for_a_damaged_folder_helps(tmp_path, tiny, tiny_tokens, damage) -> None:
    how = {"batch_size": 8, "shard_tokens": 500, "progress": False}
    point, ids = "blocks.0.hook_resid_post", tiny_tokens[:32]
    sl.collect(tiny, ids, point, tmp_path, **how)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 8
    shard.unlink() if damage == "missing" else shard.write_bytes(data[:-9] if damage == "cut off" else data)
    with pytest.raises((ValueError, FileNotFoundError), match="with resume=False") as caught:
        sl.Activations.load(tmp_path, verify=True)
    assert shard.name in str(caught.value)
    if damage != "flipped":  # the same call finds it, too
        with pytest.raises((ValueError, FileNotFoundError), match="with resume=False"):
            sl.collect(tiny, ids, point, tmp_path, **how)
    sl.collect(tiny, ids, point, tmp_path, resume=False, **how)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_signals_are_deferred_in_the_main_thread_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with DeferredInterrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with pytest.raises(KeyboardInterrupt), Terminable(), Terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    found = []
    with DeferredInterrupt():
        inside = signal.getsignal(signal.SIGTERM)

        def enter() -> None:
            with DeferredInterrupt(), Terminable():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert found == [inside]
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with DeferredInterrupt() as interrupt, Terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert not interrupt.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_for_signals(kind: str, ready: str) -> None:
    with DeferredInterrupt() if kind == "deferred" else Terminable() as block:
        try:
            Path(ready).touch()
            while not getattr(block, "requested", False):
                time.sleep(0.01)
        except KeyboardInterrupt:
            pass
        Path(ready).with_name("noticed").touch()
        time.sleep(60)


@pytest.mark.parametrize("kind", ["deferred", "terminable"])
def test_the_second_sigterm_ends_the_process(kind, tmp_path) -> None:
    ready = tmp_path / "ready"
    child = Child(tmp_path / "errors.txt", wait_for_signals, kind, str(ready))
    child.wait_until(ready.exists)
    child.send(signal.SIGTERM)
    child.wait_until((tmp_path / "noticed").exists)
    child.send(signal.SIGTERM)
    assert child.wait()[0] == -signal.SIGTERM
