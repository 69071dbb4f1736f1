"""What one waits for: help of every command, the names of saelab, a language model from a folder; as ratios.

    python benchmarks/waiting.py
    git worktree add /tmp/before c167cd5
    python benchmarks/waiting.py --before /tmp/before --turns 9 --json runs/waiting.json

Each figure is a process of its own, from its start to its end: CPU time of all threads, time on the clock, and peak
memory, as the system counts them. Help and imports are held against `import torch` (goals: 0.28, which is 0.35 s where
torch takes 1.25, and 1.15), loading against what Hugging Face takes for the same folder, imports included in both
(goal: 1.3); and, as a row without a goal, loading once more in the same process, without the imports. Processes take
turns, as other programs slow some of them down, and medians count. Compiled files are written first, as pip does it.
This process imports nothing large, as the system counts its memory as the least of those that it starts.

`--before` is the folder of another checkout, measured in the same turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / ".." / "shared" / "data" / "stories260k"
HELP_GOAL, IMPORT_GOAL, LOAD_GOAL = 0.28, 1.15, 1.3
WRONG = {"an unknown command": ["colect"], "a missing argument": ["train"], "a wrong number": ["plan", "--d-sae", "x"]}
IMPORTS = {
    "import saelab": "import saelab",
    "the SAE and activations": "from saelab import SAE, Activations",
    "all names": "from saelab import *",
}
HUGGING_FACE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
def load(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
"""
SAELAB = """
import sys, saelab
def load(folder):
    return saelab.load_model(folder, device="cpu", progress=False)
"""
ONCE = "load(sys.argv[1])"
AGAIN = """
import time
load(sys.argv[1])
seconds = []
for _ in range(5):
    start = time.process_time()
    load(sys.argv[1])
    seconds.append(time.process_time() - start)
print(sorted(seconds)[2])
"""
RANDOM_GPT2 = """
import sys
from transformers import GPT2Config, GPT2LMHeadModel
from saelab.lm.models import tiny_model
GPT2LMHeadModel(GPT2Config(n_layer=int(sys.argv[2]))).save_pretrained(sys.argv[1])
tiny_model(architecture="gpt2").tokenizer.save_pretrained(sys.argv[1])
"""
COMMANDS = """
from saelab.cli.app import app
import typer
group = typer.main.get_command(app)
print(*group.commands, *(f"labels store {name}" for name in group.commands["labels"].commands), sep="\\n")
"""


@dataclass(frozen=True)
class Taken:
    """What one process took."""

    cpu: float
    """seconds, of all threads"""
    wall: float
    """seconds"""
    peak: float
    """MiB"""


class Turns:
    """Processes that take turns, and what each took."""

    def __init__(self, compiled: Path) -> None:
        self.taken: dict[tuple[str, str], list[Taken]] = {}
        self.jobs: dict[tuple[str, str], tuple[Path, list[str]]] = {}
        self.compiled = compiled

    def add(self, what: str, build: str, root: Path, words: list[str]) -> None:
        """A process: what it does, for which build, whose folder, and the words after `python`."""
        self.jobs[what, build] = root, words

    def run(self, n: int) -> None:
        """Every process once, unmeasured, so that its files are compiled and cached; then in turn."""
        for turn in range(n + 1):
            for job, (root, words) in self.jobs.items():
                taken = take(root, words, self.compiled)
                if turn:
                    self.taken.setdefault(job, []).append(taken)
            print(f"turn {turn} of {n}", file=sys.stderr)

    def median(self, job: tuple[str, str], figure: str) -> float:
        """Of what the process took."""
        return statistics.median(getattr(taken, figure) for taken in self.taken[job])


def settings(root: Path, compiled: Path) -> dict[str, str]:
    """The environment of a process that imports saelab from a folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(root), "PYTHONPYCACHEPREFIX": str(compiled), "HF_HUB_OFFLINE": "1"}


def take(root: Path, words: list[str], compiled: Path) -> Taken:
    """Run one process to its end; its output is thrown away."""
    start, quiet = time.perf_counter(), subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, *words], cwd=root, env=settings(root, compiled), stdout=quiet, stderr=quiet
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall, mebibyte = time.perf_counter() - start, 2**20 if sys.platform == "darwin" else 2**10
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):  # 2 is wrong use
        raise RuntimeError(f"{words} in {root} must end well, got exit code {process.returncode}.")
    return Taken(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / mebibyte)


def say(root: Path, words: list[str], compiled: Path) -> str:
    """What one process prints."""
    run = [sys.executable, *words]
    return subprocess.run(
        run, cwd=root, env=settings(root, compiled), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--turns", type=int, default=5, help="times that each process is run")
    parser.add_argument("--only", nargs="+", choices=("help", "imports", "loading"), help="default: all three")
    parser.add_argument("--n-layers", type=int, default=4, help="of the random model; 4 are 260 MB")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args()


def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """A row for each thing that is waited for and each build: ratios, the goal, and the figures behind them."""
    builds = {"here": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    chosen, turns = args.only or ("help", "imports", "loading"), Turns(scratch / "compiled")
    against: dict[str, str] = {}
    goals: dict[str, float | None] = {}
    again: dict[tuple[str, str], list[str]] = {}
    for build, root in builds.items():
        if "help" in chosen:
            said = say(root, ["-c", COMMANDS], turns.compiled).splitlines()
            lines = {" ".join(words): words for name in ["", *said] if (words := [*name.split(), "--help"])} | WRONG
            for name, line in lines.items():
                turns.add(name, build, root, ["-m", "saelab", *line])
                against[name], goals[name] = "torch", HELP_GOAL
        if "imports" in chosen:
            for name, code in IMPORTS.items():
                turns.add(name, build, root, ["-c", code])
                against[name], goals[name] = "torch", IMPORT_GOAL
    if "loading" in chosen:
        folders = {"random GPT-2": scratch / "gpt2"}
        say(ROOT, ["-c", RANDOM_GPT2, str(folders["random GPT-2"]), str(args.n_layers)], turns.compiled)
        folders |= {"stories260k": REAL.resolve()} if REAL.is_dir() else {}
        for name, folder in folders.items():
            turns.add(f"{name}, Hugging Face", "", ROOT, ["-c", HUGGING_FACE + ONCE, str(folder)])
            again[name, ""] = ["-c", HUGGING_FACE + AGAIN, str(folder)]
            for build, root in builds.items():
                turns.add(f"load {name}", build, root, ["-c", SAELAB + ONCE, str(folder)])
                again[name, build] = ["-c", SAELAB + AGAIN, str(folder)]
                against[f"load {name}"], goals[f"load {name}"] = f"{name}, Hugging Face", LOAD_GOAL
    turns.add("torch", "", ROOT, ["-c", "import torch"])
    turns.run(args.turns)
    rows = []
    for (what, build), _ in turns.jobs.items():
        if what in against:
            base = against[what], ""
            own = {figure: turns.median((what, build), figure) for figure in ("cpu", "wall", "peak")}
            ratios = {figure: value / turns.median(base, figure) for figure, value in own.items()}
            rows.append({"what": what, "build": build, "goal": goals[what], "ratios": ratios, "taken": own})
    once_more = {job: float(say(builds.get(job[1], ROOT), words, turns.compiled)) for job, words in again.items()}
    for (name, build), seconds in once_more.items():
        if build:
            own, ratios = {"cpu": seconds}, {"cpu": seconds / once_more[name, ""]}
            rows.append({"what": f"load {name} again", "build": build, "goal": None, "ratios": ratios, "taken": own})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text: ratios of CPU time, of time and of peak memory, and CPU seconds."""
    head = ["waiting for", "build", "cpu", "time", "peak", "goal", "cpu seconds", ""]
    lines = [head]
    for row in rows:
        ratios = [
            f"{row['ratios'][figure]:.2f}" if figure in row["ratios"] else "-" for figure in ("cpu", "wall", "peak")
        ]
        met = "" if row["goal"] is None else "met" if row["ratios"]["cpu"] <= row["goal"] else "MISSED"
        goal = "-" if row["goal"] is None else f"{row['goal']:.2f}"
        lines.append([row["what"], row["build"], *ratios, goal, f"{row['taken']['cpu']:.3f}", met])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """Measure, print the table, write JSON."""
    args = parse()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(args, Path(scratch))
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
