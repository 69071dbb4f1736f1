"""Geometry of a wide dictionary: time and peak memory of `sl.lobes` and `sl.galaxy`.

    python benchmarks/geometry.py

Codes are drawn: documents of 200 tokens have one of 32 topics, of which a feature fires in its own eight times as often
as in others, at rates that fall as rank^-.6; directions of one topic share a part. Seconds are those of the process's
own work, wall beside them; memory is the peak of resident memory while the call runs, less that before it.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg  # noqa: F401 - what the work imports is not its time
import torch
from scipy.sparse import csr_matrix

import saelab as sl

N_TOPICS, LENGTH = 32, 200


def make(args: argparse.Namespace) -> tuple[csr_matrix, sl.SAE, np.ndarray]:
    """Codes, an SAE of such directions, and the document of each token."""
    rng, m = np.random.default_rng(args.seed), args.d_sae
    home, rate = rng.integers(N_TOPICS, size=m), rng.permutation(np.arange(1, m + 1) ** -0.6)
    columns = []
    for _ in range(args.n_tokens // LENGTH):
        p = rate * np.where(home == rng.integers(N_TOPICS), 8, 1)
        columns.append(rng.choice(m, size=LENGTH * args.k, p=p / p.sum()))
    rows = np.repeat(np.arange(len(columns) * LENGTH), args.k)
    entries = np.ones(len(rows), np.float32), (rows, np.concatenate(columns))
    sae = sl.SAE(sl.SAEConfig(d_in=args.d_in, d_sae=m, activation=sl.TopK(k=args.k)), seed=args.seed)
    shared = torch.from_numpy(rng.standard_normal((N_TOPICS, args.d_in))).float()
    with torch.no_grad():
        shared *= 0.3 * sae.W_dec.norm(dim=1).mean() / shared.norm(dim=1, keepdim=True)
        sae.W_dec.add_(shared[torch.from_numpy(home)])
    return csr_matrix(entries, (len(columns) * LENGTH, m)), sae, np.repeat(np.arange(len(columns)), LENGTH)


def read_memory() -> float:
    """Resident memory in GiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds and peak memory of one call."""
    before = read_memory()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], read_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    found = {"seconds of work": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    done.set()
    watcher.join()
    return found | {"GiB": peak[0] - before, "GiB of the process": peak[0]}


def main() -> None:
    """Measure both, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--k", type=int, default=32, help="codes of a token")
    parser.add_argument("--n-tokens", type=int, default=200_000)
    parser.add_argument("--work", nargs="+", choices=["lobes", "galaxy"], default=["lobes", "galaxy"])
    parser.add_argument("--affinity", default="cosine + 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    codes, sae, documents = make(args)
    work = {
        "lobes": lambda: sl.lobes(codes, sae, doc_ids=documents, affinity=args.affinity, seed=args.seed),
        "galaxy": lambda: sl.galaxy(sae, seed=args.seed),
    }
    for name in args.work:
        print(name, json.dumps({key: round(value, 2) for key, value in measure(work[name]).items()}), flush=True)


if __name__ == "__main__":
    main()
