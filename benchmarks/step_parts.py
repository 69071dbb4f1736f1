"""Where the time of a training step goes: its parts in milliseconds, and in multiples of the int8 product alone.

    python benchmarks/step_parts.py --activations topk,matryoshka --before ../saelab-before

Parts are functions of saelab, timed while the step runs; a part that calls another is charged without it. The product
is that of all tokens with all latents by `torch._int_mm`, in int8 whatever the step uses, between the steps. ReLU and
JumpReLU are at their target L0; in `jumprelu-small` most entries are within the bandwidth (`peers.saelab`). With
`--before` another checkout takes turns with this one; functions that it does not have are left out of its table.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "quantization": ["screening:Screen.__init__", "screening:quantize_rows", "fused_screen:FusedScreen.__init__",
                     "fused_screen:FusedScreen._pack"],
    "product": ["screening:Screen.multiply"],
    "selection": ["screening:ScreenedRows.__init__", "screening:ScreenedRows.top", "screening:ScreenedRows.above",
                  "screening:Screen.top", "screening:Screen.above", "topk:search_topk", "topk:search_batch_topk",
                  "fused_screen:FusedScreen.top", "fused_screen:FusedScreen.above", "threshold_search:search_above",
                  "threshold_search:_screen", "saelab.sae.step_codes:search_near"],
    "product and selection": ["fused_screen:FusedScreen._search"],
    "search of leading directions": ["partial_screen:find_leading"],
    "rescoring": ["topk:score", "threshold_search:score"],
    "decoding": ["codes:_NestedDecode.forward"],
    "gradients": ["codes:_NestedDecode.backward", "codes:_Encode.backward"],
    "gradients of thresholds": ["silent_codes:_ThresholdError.backward", "silent_codes:_SilentPenalty.backward"],
    "projection and norms": ["saelab.sae.training_sae:TrainingSAE.constrain_gradients",
                             "saelab.sae.training_sae:TrainingSAE.constrain_weights"],
    "clipping": ["saelab.training.loop:clip_gradients"],
    "Adam": ["saelab.training.loop:step_adam"],
    "objective": ["saelab.sae.training_sae:TrainingSAE.code", "saelab.sae.training_sae:TrainingSAE.weigh"],
    "the rest": ["saelab.training.loop:TrainingRun.train_on"],
}  # fmt: skip
MARK = "measured: "


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--activations", default="topk,abstopk,batchtopk,matryoshka,jumprelu,jumprelu-small,relu", help="of %(default)s"
    )
    parser.add_argument("--n", type=int, default=4096, help="tokens in a step (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", type=int, default=24576, help="units of the SAE (default 24576)")
    parser.add_argument("--k", type=int, default=32, help="units kept for a token (default 32)")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of a turn (default 9)")
    parser.add_argument("--turns", type=int, default=2, help="turns (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--before", type=Path, help="checkout of another build")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def wrap_parts(seconds: Counter[str]) -> None:
    """Have every part's function add the time it takes, without that of other parts, to `seconds`."""
    inside: list[float] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **options)
            finally:
                taken = time.perf_counter() - start
                seconds[part] += taken - inside.pop()
                if inside:
                    inside[-1] += taken

        return call

    for part, names in PARTS.items():
        for name in names:
            module, _, path = name.partition(":")
            try:
                owner: Any = importlib.import_module(module if "." in module else f"saelab.functional.{module}")
                *classes, last = path.split(".")
                for each in classes:
                    owner = getattr(owner, each)
                found = owner.__dict__[last]
            except (ImportError, AttributeError, KeyError):
                continue
            function = timed(found.__func__ if isinstance(found, staticmethod) else found, part)
            setattr(owner, last, staticmethod(function) if isinstance(found, staticmethod) else function)


def measure(activation: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of the parts, the step and the product, in seconds."""
    import torch

    from peers import Sizes, saelab

    torch.set_num_threads(args.threads)
    seconds: Counter[str] = Counter()
    wrap_parts(seconds)
    data = torch.Generator().manual_seed(0)
    batches = [torch.randn(args.n, args.d_in, generator=data) for _ in range(3)]
    subject = saelab(activation, Sizes(args.n, args.d_in, args.d_sae, args.k))
    low_x, low_W = (torch.randint(-127, 128, (n, args.d_in), dtype=torch.int8) for n in (args.n, args.d_sae))
    out = torch.empty(512, args.d_sae, dtype=torch.int32)
    steps, products, parts = [], [], []
    for i in range(args.steps + 2):
        seconds.clear()
        start = time.perf_counter()
        subject.step(batches[i % 3])
        steps.append(time.perf_counter() - start)
        parts.append(dict(seconds))
        start = time.perf_counter()
        for rows in low_x.split(512):
            torch._int_mm(rows, low_W.T, out=out[: len(rows)])
        products.append(time.perf_counter() - start)
    names = [name for name in PARTS if any(name in part for part in parts)]
    of_parts = {name: median(part.get(name, 0.0) for part in parts[2:]) for name in names}
    return {"step": median(steps[2:]), "product alone": median(products[2:]), "parts": of_parts}


def run(checkout: Path, activation: str) -> dict[str, Any]:
    """The measurement in a process of its own, on another checkout's package."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, *sys.argv[1:], "--one", activation]
    output = subprocess.run(command, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.split(MARK)[1])


def middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over turns."""
    parts = {name: median(turn["parts"].get(name, 0.0) for turn in turns) for name in turns[0]["parts"]}
    return {name: median(turn[name] for turn in turns) for name in ("step", "product alone")} | {"parts": parts}


def show(build: str, activation: str, row: dict[str, Any]) -> None:
    product = row["product alone"]
    print(f"{activation}, {build}: {row['step']:.3f} s, {row['step'] / product:.2f} products of {product:.3f} s")
    for name, seconds in row["parts"].items():
        print(f"    {name:<30}{1e3 * seconds:8.1f} ms {seconds / product:6.2f}")


def main() -> None:
    args = parse()
    if args.one:
        print(MARK + json.dumps(measure(args.one, args)))
        return
    builds = {"this build": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    rows = []
    for activation in args.activations.split(","):
        turns = [{name: run(checkout, activation) for name, checkout in builds.items()} for _ in range(args.turns)]
        for name in builds:
            row = middle([turn[name] for turn in turns])
            show(name, activation, row)
            rows.append({"activation": activation, "build": name, **row})
    print(f"N={args.n} d_in={args.d_in} d_sae={args.d_sae} k={args.k} threads={args.threads}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
