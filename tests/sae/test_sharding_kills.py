"""Work of several processes of which one is killed ends in one line, goes on, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl

N_TOKENS, BATCH = 40_000, 100
HOOK = "blocks.1.hook_resid_post"
Start = Callable[[Path], "subprocess.Popen[str]"]


def launch(*words: object) -> "subprocess.Popen[str]":
    """Two processes that carry out one command line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "saelab"]
    return subprocess.Popen(
        [*launcher, *map(str, words), "--no-progress", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def acts(tiny: Any, tiny_tokens: sl.Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acts") / "acts"
    sl.collect(tiny, tiny_tokens, HOOK, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def commands(acts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Start]:
    """What starts each verb with a folder to write to."""
    folder = tmp_path_factory.mktemp("inputs")
    text, sae = folder / "text.txt", folder / "sae"
    rng, words = random.Random(0), ["cat", "dog", "owl", "fox", "sees", "hears", "the", "a", "red", "blue", "over"]
    text.write_text("\n<|endoftext|>\n".join(" ".join(rng.choices(words, k=40)) for _ in range(1500)))
    cfg = sl.SAEConfig(d_in=32, d_sae=256, activation=sl.AbsTopK(k=8))
    sl.SAE(cfg, seed=0).fit(
        sl.Activations.load(acts, HOOK), sl.TrainConfig(n_tokens=1000, batch_size=100)
    ).save_pretrained(sae)
    sizes = ["--batch-size", 1]
    shape = ["--d-sae", 64, "--k", 4, "--n-tokens", N_TOKENS, "--batch-size", BATCH]
    saving = ["--save-every-tokens", 10 * BATCH, "--resume"]
    return {
        "train": lambda out: launch("train", acts, *shape, *saving, "--out", out),
        "collect": lambda out: launch(
            "collect", "tiny", text, "--hook-point", HOOK, *sizes, "--shard-tokens", 2000, "--out", out
        ),
        "harvest": lambda out: launch("harvest", sae, "tiny", text, *sizes, "--out", out),
    }


def ranks_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """Processes that the launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.is_file() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def has_begun(out: Path) -> bool:
    """Whether work was done that another start can go on with."""
    return any(out.glob("checkpoint/progress.json")) or any(out.glob(".parts-*/*/*.safetensors"))


def kill_and_go_on(start: Start, out: Path, n_kills: int, seed: int) -> list[float]:
    """Kill a process of the work again and again, at any time, until it has been n times; seconds that each end
    took.
    """
    rng, took = random.Random(seed), []
    while True:
        run = start(out)
        if len(took) < n_kills:
            while run.poll() is None and not (pids := ranks_of(run)):
                time.sleep(0.05)
            begun = time.monotonic()
            # half of the kills anywhere from the start on, the others when steps are taken
            if rng.random() < 0.5:
                while run.poll() is None and not has_begun(out):
                    time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5) if has_begun(out) else rng.uniform(0, 8))
            if run.poll() is None:
                os.kill(rng.choice(pids), signal.SIGKILL)
                begun = time.monotonic()
        said = run.communicate(timeout=120)[0]
        if run.returncode == 0:
            return took
        took.append(time.monotonic() - begun)
        lines = [line for line in said.splitlines() if "The same command goes on" in line]
        assert len(lines) <= 1, said


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "n_kills"), [("train", 1), ("train", 50), ("collect", 1), ("collect", 12), ("harvest", 1), ("harvest", 4)]
)
def test_work_survives_the_death_of_its_processes(
    commands: dict[str, Start], tmp_path: Path, verb: str, n_kills: int
) -> None:
    whole = commands[verb](tmp_path / "whole")
    said = whole.communicate(timeout=120)[0]
    assert whole.returncode == 0, said
    took = kill_and_go_on(commands[verb], tmp_path / "killed", n_kills, seed=n_kills)
    assert max(took, default=0) < 60
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    if verb == "train":
        assert sl.SAE.from_pretrained(tmp_path / "killed").W_dec.shape == (64, 32)
        assert torch.isfinite(sl.SAE.from_pretrained(tmp_path / "killed").W_enc).all()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_memory_is_named(acts: Path, tmp_path: Path, rank: int) -> None:
    """One process may take 300 MiB more than it has when it begins; the dictionary takes 390."""
    script = tmp_path / "run.py"
    script.write_text(LIMITED.format(rank=rank))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), "train", str(acts)]
    settings = [
        "--d-sae",
        "3000000",
        "--k",
        "4",
        "--n-tokens",
        "1000",
        "--batch-size",
        "100",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*launcher, *settings, "--no-progress", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0
    named = [line for line in done.stderr.splitlines() if line.startswith(f"process {rank} on ")]
    assert len(named) == 1 and "allocate memory" in named[0] and "saelab plan" in named[0], done.stderr


LIMITED = """
import os, resource, runpy, sys
import torch.distributed
import saelab.sae.fitting
if os.environ["RANK"] == "{rank}":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
runpy.run_module("saelab", run_name="__main__")
"""
