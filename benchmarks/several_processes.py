"""Memory, time and messages of a training step by several processes, beside one process with as many threads.

    .venv/bin/python benchmarks/several_processes.py --json runs/several_processes.json

One process with P threads, and P processes with one thread each that divide the latents, or the batch. They take turns:
a machine that slows down does so for all. Peak memory is the largest of any process at the end of training, in all and
beyond what Python, torch and the data take; bytes are what each process hands to its network calls, counted at these
calls and computed by the formula of docs/how-to/several_processes.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MARK = "measured: "


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", type=int, default=98304, help="latents of the SAE (default 98304)")
    parser.add_argument("--k", type=int, default=32, help="latents kept for a token (default 32)")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a turn, after two that are not (default 4)"
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--one", nargs=2, type=int, metavar=("N_DATA", "N_LATENTS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


class Counter:
    """Counts the bytes that this process hands to torch.distributed."""

    CALLS = ("all_reduce", "all_gather", "broadcast", "gather")

    def __init__(self) -> None:
        import torch.distributed as dist

        self.n_bytes = 0
        for name in self.CALLS:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            sent = args[1] if name == "all_gather" else args[0]
            self.n_bytes += sent.numel() * sent.element_size()
            return call(*args, **kwargs)

        return run


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace) -> None:
    """Train for some steps in this process, one of several or alone, and print what it took."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    import saelab as sl
    from saelab.training import RankGrid

    n_data, n_latents = args.one
    alone = n_data * n_latents == 1
    torch.set_num_threads(args.processes if alone else 1)
    mesh, counter = None, None
    if not alone:
        torch.distributed.init_process_group("gloo")
        counter = Counter()
        mesh = init_device_mesh("cpu", (n_data, n_latents), mesh_dim_names=("data", "latents"))
    own = None if mesh is None else RankGrid.of(mesh).latents.split(args.d_sae)
    x = torch.randn(2 * args.tokens, args.d_in, generator=torch.Generator().manual_seed(0))
    before = peak_mib()
    cfg = sl.SAEConfig(d_in=args.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k))
    sae = sl.SAE(cfg, seed=0, latents=own)
    seen: list[tuple[float, int, float]] = []
    n_steps = args.steps + 2

    def note(step: int) -> None:
        seen.append((time.perf_counter(), 0 if counter is None else counter.n_bytes, peak_mib()))
        if step == n_steps:
            told = {"seconds": (seen[-1][0] - seen[1][0]) / args.steps, "peak": peak_mib(), "before": before}
            told |= {"bytes": (seen[-1][1] - seen[1][1]) / args.steps}
            print(MARK + json.dumps(told), flush=True)
            os._exit(0)  # what follows, the whole SAE in one process, is no part of a step

    train_on = sl.training.loop.TrainingRun.train_on

    def noted(run: Any, batch: Any) -> None:
        train_on(run, batch)
        note(run.step)

    sl.training.loop.TrainingRun.train_on = noted  # type: ignore[method-assign]
    run = sl.TrainConfig(
        n_tokens=100 * n_steps * args.tokens,
        batch_size=args.tokens,
        n_held_out=0,
        log_every_tokens=10**9,
        save_every_tokens=10**9,
    )
    sae.fit(x, run, progress=False, mesh=mesh)


def ask(args: argparse.Namespace, n_data: int, n_latents: int) -> list[dict[str, float]]:
    """What each process of a run measured."""
    own = [str(Path(__file__)), "--one", str(n_data), str(n_latents)]
    own += [
        f"--{key.replace('_', '-')}={getattr(args, key)}"
        for key in ("tokens", "d_in", "d_sae", "k", "steps", "processes")
    ]
    n = n_data * n_latents
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--redirects", "0"]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": str(args.processes if n == 1 else 1), "TMPDIR": folder}
        found = subprocess.run([sys.executable, *launcher, *own], env=env, capture_output=True, text=True, check=False)
    rows = [json.loads(line.split(MARK)[1]) for line in found.stdout.splitlines() if MARK in line]
    if len(rows) != n:
        raise SystemExit(f"{n_data}x{n_latents}: {len(rows)} of {n} processes answered\n{found.stderr[-2000:]}")
    return rows


def formula(args: argparse.Namespace, n_data: int, n_latents: int) -> int:
    """Bytes that a process hands to its network calls in a step without dead latents."""
    rows, share = args.tokens // n_data, args.d_sae // n_latents
    total = 0
    if n_latents > 1:
        total += 4 * rows * args.k  # sizes of the best of each token
        total += 8  # their number
        total += 4 * rows * args.d_in  # decoded parts
        total += 4 * 2 * args.d_in  # gradient of b_dec, and its copy from the first
        total += 4 * 2 + 8 + 8  # norm, L0, smallest code, dead latents, flags
    if n_data > 1:
        total += 4 * (2 * share * args.d_in + share + args.d_in)  # gradients
        total += share  # which latents fired
    return total


def main() -> None:
    args = parse()
    if args.one:
        measure(args)
        return
    n = args.processes
    shapes = {"one process": (1, 1), f"latents in {n}": (1, n), f"batch in {n}": (n, 1)}
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in shapes}
    for turn in range(args.turns):
        for name, shape in shapes.items():
            found[name].append(ask(args, *shape))
            print(f"turn {turn + 1}: {name} {found[name][-1]}", file=sys.stderr)
    rows = []
    for name, shape in shapes.items():
        turns = found[name]
        rows.append(
            {
                "name": name,
                "seconds": median(max(one["seconds"] for one in turn) for turn in turns),
                "peak_mib": median(max(one["peak"] for one in turn) for turn in turns),
                "beyond_mib": median(max(one["peak"] - one["before"] for one in turn) for turn in turns),
                "bytes": median(max(one["bytes"] for one in turn) for turn in turns),
                "formula": formula(args, *shape),
            }
        )
    one = rows[0]
    print(
        f"{args.tokens} tokens, d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}; {n} threads, or {n} processes of one"
    )
    print(
        f"{'':<16}" + "".join(f"{name:>13}" for name in ("s a step", "ratio", "peak MiB", "ratio", "beyond", "ratio"))
    )
    for row in rows:
        cells = [f"{row['seconds']:.3f}", f"{row['seconds'] / one['seconds']:.2f}"]
        for key in ("peak_mib", "beyond_mib"):
            cells += [f"{row[key]:.0f}", f"{row[key] / one[key]:.2f}"]
        print(f"{row['name']:<16}" + "".join(f"{cell:>13}" for cell in cells))
        print(f"{'':<16}{row['bytes']:>13,.0f} bytes a step, by the formula {row['formula']:,}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
