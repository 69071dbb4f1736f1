"""Commands cut off at each of their file events, in forked processes: what stands there, and what the same command
makes of it.

An event is a file opened for writing, made whole (`fsync`), renamed or removed, or a folder made or removed: counted by
Python's audit hook, before it happens. SQLite's own are not seen; a database is changed in one transaction.
"""

import io
import itertools
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from processes import COMMANDS

import saelab as sl
from saelab.analysis import TunedLens
from saelab.cli.app import dispatch
from saelab.labels.label_store import LabelStore

for module in COMMANDS:  # once, before processes are forked
    import_module(module)

HOOK = "blocks.1.hook_resid_post"
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "sqlite3.connect"}
FULL = {"open", "os.mkdir", "fsync", "fallocate"}
"""what fails on a full disk"""
KILLED, TIMEOUT = 99, 120


@dataclass(frozen=True)
class Case:
    """A command, the folder that it finds, and what a reader may find after it was cut off."""

    name: str
    words: list[str]
    """the command line, run in the folder"""
    templates: tuple[str, ...] = ()
    """what is copied into the folder first"""
    again: list[str] | None = None
    """the command after a cut, where it is another one"""
    call: Callable[[], object] | None = None
    """what is done in Python in place of a command"""
    read: Callable[[], object] = lambda: None
    """tells what stands there; ValueError or FileNotFoundError where it cannot be read"""


def count(watch: Path, stop_at: int, how: str) -> Callable[[], int]:
    """Count the events under a folder in this process from now on; at number `stop_at` the process ends (`how` kill),
    or from there on the disk is full.
    """
    numbers, seen = itertools.count(1), [0]

    def happen(name: str) -> None:
        seen[0] = number = next(numbers)
        if how == "kill" and number == stop_at:
            os._exit(KILLED)
        if how == "full" and number >= stop_at > 0 and name in FULL:
            raise OSError(28, "No space left on device")

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and _is_under(path, watch):
                happen("open")
        elif event in CHANGES and (isinstance(args[0], int) or _is_under(args[0], watch)):
            happen(event)

    def announce(name: str) -> None:
        real = getattr(os, name)

        def announced(*args: Any) -> Any:
            happen({"fsync": "fsync", "posix_fallocate": "fallocate"}[name])
            return real(*args)

        setattr(os, name, announced)

    sys.addaudithook(hear)
    announce("fsync")
    announce("posix_fallocate")
    return lambda: seen[0]


def _is_under(path: Any, watch: Path) -> bool:
    try:
        name = os.fsdecode(path)
    except TypeError:
        return False
    return not name.startswith("/") or name.startswith(f"{watch}/")


def _spread(n: int, n_points: int) -> list[int]:
    return sorted({1 + i * (n - 1) // max(1, n_points - 1) for i in range(n_points)})


class Stage:
    """A folder in which commands run and are cut off, one after another, each in a process of its own."""

    def __init__(self, root: Path) -> None:
        import saelab.lm.models

        self.templates, self.work, self.said = root / "templates", root / "work", root / "said.txt"
        tiny = sl.lm.tiny_model()
        saelab.lm.models.tiny_model = lambda: tiny  # type: ignore[assignment]
        sys.argv = ["saelab"]

    def set_up(self, case: Case) -> None:
        """What the command finds."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in case.templates:
            source, _, target = name.partition(":")
            found = self.templates / source
            copy = shutil.copytree if found.is_dir() else shutil.copy2
            copy(found, self.work / (target or source))

    def run(self, case: Case, again: bool = False, stop_at: int = 0, how: str = "kill") -> tuple[int, int, str]:
        """Exit code, number of events and what was said."""
        words = case.again if again and case.again is not None else case.words
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            signal.alarm(TIMEOUT)
            code = 3
            try:
                os.chdir(self.work)
                file = open(self.said, "w", buffering=1)  # noqa: SIM115 - the process ends with it
                sys.stdout = sys.stderr = file
                counted = count(self.work, stop_at, how)
                code = self._do(case, words)
                os.write(write, str(counted()).encode())
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        with os.fdopen(read) as pipe:
            n = pipe.read()
        _, status = os.waitpid(child, 0)
        said = self.said.read_text() if self.said.exists() else ""
        return os.waitstatus_to_exitcode(status), int(n or 0), said

    def _do(self, case: Case, words: list[str]) -> int:
        if case.call is None:
            return dispatch(words)
        try:
            case.call()
        except (ValueError, OSError) as error:
            sys.stderr.write(f"failed: {error}\n")
            return 1
        return 0

    def look(self, case: Case) -> object:
        """What a reader finds in a copy, in a process of its own; an error that says so reads as "refused"."""
        copy = self.work.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.work, copy)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.chdir(copy)
            try:
                found = repr(case.read())
            except (ValueError, FileNotFoundError):
                found = "'refused'"
            except BaseException as error:
                found = repr(f"unclean: {error!r}")
            os.write(write, found.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        return found

    def contents(self) -> dict[str, object]:
        """Every file under the folder, hidden ones too; a book of labels by what it says."""
        files = [path for path in sorted(self.work.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.work)): _read(path) for path in files}

    def check(self, case: Case, how: str, n_points: int | None = None) -> tuple[int, list[str]]:
        """Cut a command off at its events, or some of them; returns how many there are, and what went wrong where."""
        self.set_up(case)
        old = self.look(case)
        code, n, said = self.run(case)
        if code:
            return 0, [f"{case.name} fails undisturbed: {said}"]
        new, whole = self.look(case), self.contents()
        problems = []
        for stop_at in range(1, n + 1) if n_points is None else _spread(n, n_points):
            self.set_up(case)
            code, _, said = self.run(case, stop_at=stop_at, how=how)
            where = f"{case.name}, {how} at {stop_at} of {n}: "
            if how == "kill" and code != KILLED:
                problems.append(f"{where}not killed but {code}: {said}")
            if how == "full" and code and "the disk is full" not in said:
                problems.append(f"{where}an unclear error: {said}")
            if (found := self.look(case)) not in (old, new, "'refused'"):
                problems.append(f"{where}a reader finds {found}, neither {old} nor {new}")
            code, _, said = self.run(case, again=True)
            if code:
                problems.append(f"{where}the same command is refused: {said}")
            elif (after := self.contents()) != whole:
                names = sorted(name for name in after.keys() | whole.keys() if after.get(name) != whole.get(name))
                problems.append(f"{where}differs in {names}")
        return n, problems


def _read(path: Path) -> object:
    if path.suffix != ".sqlite":
        return path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        labels = db.execute("SELECT feature, sign, text, kind, author, by_person, fixed FROM labels").fetchall()
        return labels + db.execute("SELECT * FROM about").fetchall()


def prepare(templates: str, wanted: Sequence[str]) -> None:
    """Make what commands find, and what that needs: a text, activations, SAEs, stores with labels, a report, scores."""
    torch.set_num_threads(1)
    Path(templates).mkdir(parents=True)
    os.chdir(templates)
    for name in wanted:
        _make(name)


def _make(name: str) -> None:
    if Path(name).exists():
        return
    words, needed = MAKING.get(name, ([], ()))
    for other in needed:
        _make(other)
    if name in WRITTEN:
        Path(name).write_text(WRITTEN[name])
    else:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = dispatch(words if words[0] == "label-head" else [*words, "--no-progress"])
        if code:
            raise RuntimeError(f"{words} failed: {said.getvalue()}")
    if name.startswith("store"):
        with LabelStore.open(name) as book:
            book.set(3, f"of {name}", author="me")


def _collected(out: str, size: str) -> list[str]:
    return ["collect", "tiny", "text.txt", "--hook-point", HOOK, "--n-tokens", "300", "--ctx-len", "16",
            "--shard-tokens", size, "--out", out]  # fmt: skip


def _embedded(out: str) -> list[str]:
    return ["embed", "tiny", "text.txt", "--hook-point", HOOK, "--pooling", "mean", "--shard-rows", "8", "--out", out]


def _harvested(sae: str, n: str, out: str) -> list[str]:
    return ["harvest", sae, "tiny", "text.txt", "--n-tokens", n, "--out", out]


TRAIN = ["--d-sae", "32", "--k", "4", "--n-tokens", "512", "--batch-size", "64", "--save-every-tokens", "256"]
TEXT = ("text.txt",)
ANIMALS = ["fox", "hen", "cow", "owl", "cat"]
WRITTEN = {
    "text.txt": "\n<|endoftext|>\n".join(f"The {a} met the {b}." for a in ANIMALS for b in ANIMALS if a != b),
    "labels.json": f'{{"odd": {[*range(1, 19, 2)]}, "early": {[*range(10)]}}}',
    "marks.json": f'{{"even": {[*range(0, 180, 2)]}}}',
    "pairs.jsonl": "\n".join(f'{{"positive": "A big {a}.", "negative": "A small {a}."}}' for a in ANIMALS),
}
"""files that no command writes"""
SCORES = ["evaluate", "sae-0", "tiny", "text.txt", "--n-tokens", "100", "--json", "eval.json", "--n-bootstrap", "2"]
HEAD = ["label-head", "store-all", "--labels", "labels.json", "--min-count", "2", "--train-frac", "0.5"]
MAKING: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "acts": (_collected("acts", "100"), TEXT),
    "acts-old": (_collected("acts-old", "70"), TEXT),
    "sae-0": (["train", "acts", *TRAIN, "--seed", "0", "--out", "sae-0"], ("acts",)),
    "sae-1": (["train", "acts", *TRAIN, "--seed", "1", "--out", "sae-1"], ("acts",)),
    "store-0": (_harvested("sae-0", "200", "store-0"), ("sae-0",)),
    "store-1": (_harvested("sae-1", "200", "store-1"), ("sae-1",)),
    "store-0-short": (_harvested("sae-0", "150", "store-0-short"), ("sae-0",)),
    "report": (["report", "store-0", "--out", "report", "--features", "1,2", "--title", "old"], ("store-0",)),
    "eval.json": (SCORES, ("sae-0",)),
    "store-all": (_harvested("sae-0", "400", "store-all"), ("sae-0",)),
    "head": ([*HEAD, "--epochs", "2", "--no-baselines", "--out", "head"], ("store-all", "labels.json")),
    "docs": (_embedded("docs"), TEXT),
    "sae-docs": (["train", "docs", *TRAIN, "--batch-size", "16", "--out", "sae-docs"], ("docs",)),
}


def told_sae(folder: str) -> Callable[[], object]:
    """The sum of an SAE's weights and its k."""
    return lambda: (lambda sae: (str(sae), float(sae.W_dec.detach().sum())))(sl.SAE.from_pretrained(folder))


def told_foreign(folder: str) -> Callable[[], object]:
    how = {"model": "tiny-llama", "hook_point": HOOK}
    return lambda: float(sl.SAE.from_pretrained(folder, **how).W_dec.detach().sum())


def told_acts(folder: str) -> Callable[[], object]:
    return lambda: (lambda acts: (len(acts), float(acts[:].sum())))(sl.Activations.load(folder, verify=True))


def told_store(folder: str) -> Callable[[], object]:
    def tell() -> object:
        store = sl.FeatureStore.load(folder)
        store.verify()
        return len(store), float(store.matrix().sum())

    return tell


def told_file(path: str) -> Callable[[], object]:
    return lambda: hash(Path(path).read_bytes())


def told_head() -> object:
    """What a label head says of the documents."""
    return sl.corpora.LabelHead.from_pretrained("out").predict(sl.FeatureStore.load("store-all")).tolist()


def told_report(folder: str) -> Callable[[], object]:
    def tell() -> object:
        page, kind = Path(folder, "index.html"), Path(folder, "report.json")
        return page.read_text(encoding="utf-8")[-400:], kind.read_text()

    return tell


def save_over() -> None:
    sl.SAE(sl.SAEConfig(d_in=32, d_sae=32, activation=sl.AbsTopK(k=2)), seed=5).save_pretrained("sae")


def save_index() -> None:
    sl.corpora.CodeIndex.build(sl.corpora.pool_documents(sl.FeatureStore.load("store-0"))).save("out.safetensors")


def told_index() -> object:
    """How many documents an index has, and what is near the first feature."""
    index = sl.corpora.CodeIndex.load("out.safetensors")
    return str(index), [one.tolist() for one in index.search(torch.eye(1, index.n_features).numpy(), top=2)]


def cases() -> list[Case]:
    """Every command that writes, with and without something in its place."""
    quiet = ["--no-progress"]
    collect = [*_collected("out", "100"), *quiet]
    train = ["train", "acts", *TRAIN, "--out", "out", *quiet]
    harvest = [*_harvested("sae-0", "200", "out"), *quiet]
    report = ["report", "store-0", "--out", "out", "--features", "1,3", "--title", "new", *quiet]
    evaluate = ["evaluate", "sae-0", "tiny", "text.txt", "--n-tokens", "120", "--n-bootstrap", "2", "--no-baselines"]
    steer = ["steer", "sae-0", "tiny", "One", "--feature", "3", "--n-tokens", "2", "--html", "out.html", *quiet]
    curve = ["steer-curve", "sae-0", "tiny", "--feature", "3", "--concept", "a", "--strengths", "-1,1", "--n", "1"]
    curve += ["--n-tokens", "2", "--store", "store-0", "--out", "out.html", "--json", "out.json"]
    compare = ["compare", "store-0", "store-1", "--shifts", "2"]
    dissect = ["dissect", "store-0", "--labels", "marks.json", "--quantile", "0.05", "--out", "out.json"]
    head = [*HEAD, "--epochs", "1", "--no-baselines", "--out", "out"]
    text, label = "text.txt", ["--no-lens", *quiet]
    found = [
        Case("save over an SAE", [], ("sae-0:sae",), call=save_over, read=told_sae("sae")),
        Case("convert", ["convert", "sae-0", "out"], ("sae-0",), read=told_sae("out")),
        Case("collect", collect, (text,), read=told_acts("out")),
        Case("collect --overwrite", [*collect, "--overwrite"], (text, "acts-old:out"), read=told_acts("out")),
        Case("embed", [*_embedded("out"), *quiet], (text,), read=told_acts("out")),
        Case("harvest of documents", ["harvest", "sae-docs", "docs", "--out", "out", *quiet], ("sae-docs", "docs"),
             read=told_store("out")),
        Case("train", [*train, "--resume"], ("acts",), read=told_sae("out")),
        Case("train, then --resume", train, ("acts",), again=[*train, "--resume"], read=told_sae("out")),
        Case("train --overwrite", [*train, "--overwrite"], ("acts", "sae-1:out"), read=told_sae("out")),
        Case("harvest", harvest, (text, "sae-0"), read=told_store("out")),
        Case(
            "harvest --overwrite", [*harvest, "--overwrite"], (text, "sae-0", "store-0-short:out"),
            read=told_store("out"),
        ),
        Case(
            "harvest --overwrite of another SAE", [*harvest, "--overwrite"], (text, "sae-0", "store-1:out"),
            read=told_store("out"),
        ),
        Case("evaluate", [*evaluate, "--json", "eval.json", *quiet], (text, "sae-0", "eval.json"),
             read=told_file("eval.json")),
        Case("report", report, ("store-0", "sae-0"), read=told_report("out")),
        Case("report over a report", report, ("store-0", "sae-0", "report:out"), read=told_report("out")),
        Case("report in a page", [*report[:3], "out.html", *report[4:]], ("store-0", "sae-0"),
             read=told_file("out.html")),
        Case("label", ["label", "store-0", *label], ("store-0",), read=told_store("store-0")),
        Case("labels set", ["labels", "store-0", "set", "3", "new", "--author", "me"], ("store-0",),
             read=lambda: LabelStore.open("store-0")[3].text),
        Case("labels export", ["labels", "store-0", "export", "out.json"], ("store-0",), read=told_file("out.json")),
        Case("compare", [*compare, "--out", "out.json", "--html", "out", *quiet],
             ("store-0", "store-1", "report:out"), read=told_report("out")),
        Case("diff", ["diff", "store-0", "store-0", "--out", "out.json"], ("store-0",), read=told_file("out.json")),
        Case("families", ["families", "store-0", "--max-density", "1", "--out", "out.json"], ("store-0",),
             read=told_file("out.json")),
        Case("dissect", dissect, ("store-0", "marks.json"), read=told_file("out.json")),
        Case("label-head", head, ("store-all", "labels.json"), read=told_head),
        Case("label-head over a head", head, ("store-all", "labels.json", "head:out"), read=told_head),
        Case("save an index of codes", [], ("store-0",), call=save_index, read=told_index),
        Case("monitor --save", ["monitor", "tiny", "pairs.jsonl", "--save", "out.json", *quiet], ("pairs.jsonl",),
             read=lambda: str(sl.steering.Trait.load("out.json"))),
        Case("steer", steer, ("sae-0",), read=told_file("out.html")),
        Case("steer-curve", [*curve, *quiet], ("sae-0", "store-0"), read=told_file("out.html")),
        Case("trace", ["trace", "tiny", "sae-0", "One", "--allow-missing", "--out", "out.json", *quiet], ("sae-0",),
             read=told_file("out.json")),
        Case("layers", ["layers", "tiny", text, "--length", "8", "--n-groups", "3", "--n-prompts", "9",
                        "--n-views", "2", "--out", "out.json", *quiet], (text,), read=told_file("out.json")),
        Case("lens", ["lens", "tiny", "One", "--fit", text, "--tuned", "out", "--n-steps", "1", *quiet], (text,),
             read=lambda: TunedLens.from_pretrained("out").b.tolist()),
    ]  # fmt: skip
    for form in ("saelens", "sparsify", "dictionary_learning"):
        words = ["convert", "sae-0", "out", "--format", form]
        found.append(Case(f"convert to {form}", words, ("sae-0",), read=told_foreign("out")))
    for form in ("delphi", "saedashboard"):
        words = ["export", "store-0", "--out", "out", "--format", form, "--pad-id", "0", "--features", "1,2", *quiet]
        found.append(Case(f"export to {form}", words, ("store-0", "sae-0")))
    return found


def check(root: str, points: dict[str, int | None], hows: Sequence[str]) -> None:
    """Cut cases off at all their events, or at so many of them; AssertionError where something went wrong."""
    chosen = [case for case in cases() if case.name in points]
    templates = [name.partition(":")[0] for case in chosen for name in case.templates]
    stage = Stage(Path(root))
    prepare(str(stage.templates), templates)
    problems: list[str] = []
    with open(Path(root, "counts.txt"), "w") as file:
        for case in chosen:
            for how in hows:
                n, found = stage.check(case, how, points[case.name])
                file.write(f"{case.name}: {n} events, {how}, {len(found)} problems\n")
                problems += found if n else [f"{case.name} has no event", *found]
    assert not problems, "\n".join(problems)
