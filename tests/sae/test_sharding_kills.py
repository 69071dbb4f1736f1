"""A run of several processes of which one is killed ends in one line, goes on, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import saelab as sl

N_TOKENS, BATCH = 40_000, 100


@pytest.fixture(scope="module")
def acts(tiny, tiny_tokens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("acts") / "acts"
    sl.collect(tiny, tiny_tokens, "blocks.1.hook_resid_post", folder, progress=False)
    return folder


def start(acts: Path, out: Path, n_tokens: int = N_TOKENS) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "saelab", "train"]
    settings = ["--d-sae", "64", "--k", "4", "--n-tokens", str(n_tokens), "--batch-size", str(BATCH)]
    saving = ["--save-every-tokens", str(10 * BATCH), "--resume", "--no-progress", "--device", "cpu"]
    return subprocess.Popen(
        [*launcher, str(acts), *settings, *saving, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Processes that the launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.is_file() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_and_go_on(acts: Path, out: Path, n_kills: int, seed: int) -> list[float]:
    """Kill a process of the run again and again, at any time, until it has been n times; seconds that each end took."""
    rng, took = random.Random(seed), []
    while True:
        run = start(acts, out)
        if len(took) < n_kills:
            while run.poll() is None and not (pids := ranks_of(run)):
                time.sleep(0.05)
            begun = time.monotonic()
            # half of the kills anywhere from the start on, the others when steps are taken
            if rng.random() < 0.5:
                while run.poll() is None and not (out / "checkpoint" / "progress.json").is_file():
                    time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5) if (out / "checkpoint").is_dir() else rng.uniform(0, 8))
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
@pytest.mark.parametrize("n_kills", [1, 50])
def test_a_run_survives_the_death_of_its_processes(acts: Path, tmp_path: Path, n_kills: int) -> None:
    whole = start(acts, tmp_path / "whole")
    said = whole.communicate(timeout=120)[0]
    assert whole.returncode == 0, said
    took = kill_and_go_on(acts, tmp_path / "killed", n_kills, seed=n_kills)
    assert max(took, default=0) < 60
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert sl.SAE.from_pretrained(tmp_path / "killed").W_dec.shape == (64, 32)
    assert torch.isfinite(sl.SAE.from_pretrained(tmp_path / "killed").W_enc).all()
