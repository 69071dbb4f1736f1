"""Seconds and memory of one full training step, in saelab and in its peers, on the same data with the same threads.

    .venv-bench/bin/python benchmarks/train_step.py --activations topk,abstopk --json runs/train_step.json

Every (library, activation) runs in a process of its own, so that its peak memory is its own too. The libraries take
turns of a few steps each: a machine that slows down does so for all, and a step follows a step, as it does in training.
`make bench` makes the environment.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from peers import PEERS, SAELAB, Library, Sizes

LIBRARIES = {"saelab": SAELAB, **PEERS}
N_BATCHES = 4
MARK = "measured: "


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", type=int, default=24576, help="units of the SAE (default 24576)")
    parser.add_argument("--k", type=int, default=32, help="units kept for a token (default 32)")
    parser.add_argument("--activations", default="topk,abstopk,batchtopk,matryoshka", help="also: relu, jumprelu")
    parser.add_argument("--libraries", default=",".join(LIBRARIES), help="default: all of %(default)s")
    parser.add_argument("--turn", type=int, default=3, help="steps a library takes in a turn (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns, after one that is not (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default 0)")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "ACTIVATION"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def sizes_of(args: argparse.Namespace) -> Sizes:
    return Sizes(args.n, args.d_in, args.d_sae, args.k)


def serve(library: Library, activation: str, args: argparse.Namespace) -> None:
    """Build one subject in this process, then time one call for each name read: `step`, or the encoder's `product`."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # some peers draw their weights from the global generator
    data = torch.Generator().manual_seed(args.seed)
    batches = [torch.randn(args.n, args.d_in, generator=data) for _ in range(N_BATCHES)]
    subject = library.build(activation, sizes_of(args))
    for i, line in enumerate(sys.stdin):
        run = subject.product if line.strip() == "product" else subject.step
        start = time.perf_counter()
        if run is not None:
            run(batches[i % len(batches)])
        seconds = time.perf_counter() - start if run is not None else None
        print(MARK + json.dumps({"seconds": seconds, "peak_gib": peak_gib()}), flush=True)


def peak_gib() -> float:
    """The most memory this process has held; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if platform.system() == "Darwin" else 20)


class Server:
    """One library at work on one activation in a process of its own, asked for one call at a time.

    This process never imports torch: a child's peak starts at its parent's.
    """

    def __init__(self, name: str, activation: str) -> None:
        self.row: dict[str, Any] = {"library": name, "activation": activation}
        self.times: dict[str, list[float]] = {"step": [], "product": []}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name, activation]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=self.errors)

    def time(self, what: str) -> None:
        """Have one call made and its seconds written down; a process that has died stays silent."""
        if "error" in self.row:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            line = next(line for line in self.process.stdout if line.startswith(MARK))
        except (StopIteration, BrokenPipeError):
            self.errors.seek(0)
            found = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", self.errors.read(), re.MULTILINE)
            self.row["error"] = found[-1][:200] if found else f"exit code {self.process.wait()}"
            return
        answer = json.loads(line.removeprefix(MARK))
        self.row["peak_gib"] = answer["peak_gib"]
        if answer["seconds"] is not None:
            self.times[what].append(answer["seconds"])

    def finish(self, warmup: int) -> dict[str, Any]:
        """End the process; the medians of what it was asked for after the first `warmup` calls."""
        self.process.communicate()
        if "error" not in self.row:
            self.row["seconds"] = median(self.times["step"][warmup:])
            product = self.times["product"][warmup:]
            self.row["product_frac"] = median(product) / self.row["seconds"] if product else None
        return self.row


def compare(names: list[str], activation: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the libraries in turns of a few steps."""
    servers = [Server(name, activation) for name in names]
    for what in ("step", "product"):
        for _ in range(1 + args.repeats):
            for server in servers:
                if what == "step" or server.row["library"] == "saelab":
                    for _ in range(args.turn):
                        server.time(what)
    return [server.finish(args.turn) for server in servers]


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each row's time and memory as a multiple of saelab's for the same activation (None where there is none)."""
    ours = {row["activation"]: row for row in rows if row["library"] == "saelab" and "error" not in row}
    for row in rows:
        own = ours.get(row["activation"])
        for key, of in (("times_saelab", "seconds"), ("memory_times_saelab", "peak_gib")):
            row[key] = row[of] / own[of] if own and of in row else None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = ("s/step", "x saelab", "peak GiB", "x saelab", "product")
    head = f"{'activation':<11} {'library':<20} " + " ".join(
        f"{n:>{w}}" for n, w in zip(names, (8, 9, 9, 9, 8), strict=True)
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        start = f"{row['activation']:<11} {row['library']:<20} "
        if "error" in row:
            lines.append(f"{start}failed: {row['error']}")
            continue
        cells = [
            f"{row['seconds']:8.3f}",
            cell(row["times_saelab"], "9.2f"),
            f"{row['peak_gib']:9.2f}",
            cell(row["memory_times_saelab"], "9.2f"),
            cell(row["product_frac"], "8.0%"),
        ]
        lines.append(start + " ".join(cells))
    return "\n".join(lines)


def cell(value: float | None, spec: str) -> str:
    return f"{value:{spec}}" if value is not None else "-".rjust(int(spec.split(".")[0]))


def chosen(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{what} must be among {', '.join(known)}; got {', '.join(unknown)}.")
    return names


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    known = tuple(dict.fromkeys(a for library in LIBRARIES.values() for a in library.activations))
    activations = chosen(args.activations, known, "--activations")
    names = chosen(args.libraries, tuple(LIBRARIES), "--libraries")
    for name in names:
        if not LIBRARIES[name].installed:
            package = LIBRARIES[name].package
            print(f"{name} is not installed here; `make bench` makes an environment with it ({package}).")
    rows = []
    for activation in activations:
        able = [n for n in names if LIBRARIES[n].installed and activation in LIBRARIES[n].activations]
        print(f"{activation}: {', '.join(able)} ...", file=sys.stderr, flush=True)
        rows += compare(able, activation, args)
    return with_ratios(rows)


def main() -> None:
    args = parse()
    if args.one:
        name, activation = args.one
        serve(LIBRARIES[name], activation, args)
        return
    rows = benchmark(args)
    print(f"N={args.n} d_in={args.d_in} d_sae={args.d_sae} k={args.k} threads={args.threads} repeats={args.repeats}")
    print(table(rows))
    seconds = {row["activation"]: row.get("seconds") for row in rows if row["library"] == "saelab"}
    if seconds.get("matryoshka") and seconds.get("topk"):
        print(f"saelab: a Matryoshka step takes {seconds['matryoshka'] / seconds['topk']:.2f} TopK steps")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(sizes_of(args)), "threads": args.threads, "repeats": args.repeats, "seed": args.seed}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
