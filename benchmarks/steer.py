"""Steered generation against plain generation, and against TransformerLens with a hook.

    python benchmarks/steer.py
    python benchmarks/steer.py --d-model 768 --n-layers 12 --d-sae 24576 --turns 3

One token at a time with a key-value cache, on a random model of the given size: what every new token costs when a
feature is added, clamped (which needs the codes of the token) and added where another fires. The goal is at most 1.15
times plain generation. Turns are interleaved; each figure is the median over turns.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

import saelab as sl
from saelab.lm.generation import GREEDY

GOAL = 1.15


def find_ways(model: Any, sae: sl.SAE, point: str) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Blocks to generate in, by name."""
    at: dict[str, Any] = {"hook_point": point}
    return {
        "plain": nullcontext,
        "add": lambda: sl.steer(model, sae, {3: 4.0}, **at),
        "add 8 features": lambda: sl.steer(model, sae, dict.fromkeys(range(8), 4.0), **at),
        "clamp": lambda: sl.steer(model, sae, {3: 4.0}, mode="clamp", **at),
        "add when another fires": lambda: sl.steer(
            model, sae, {3: 4.0}, where=sl.interventions.ActivationCondition(sae, 5, hook_point=point), **at
        ),
    }


def time_ours(model: Any, block: Callable[[], AbstractContextManager[Any]], ids: torch.Tensor, n: int) -> float:
    start = time.perf_counter()
    with block():
        sl.generate(model, ids, n, sampling=GREEDY, stop_at_eos=False, progress=False)
    return time.perf_counter() - start


def time_theirs(model: Any, hooks: list[tuple[str, Callable[..., Any]]], ids: torch.Tensor, n: int) -> float:
    """TransformerLens' own generation under its own hooks."""
    start = time.perf_counter()
    with model.hooks(fwd_hooks=hooks):
        model.generate(ids, n, do_sample=False, stop_at_eos=False, verbose=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model instead of a random one")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--n-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model:
        model = sl.load_model(args.model, progress=False)
    else:
        model = sl.lm.tiny_model(d_model=args.d_model, n_layers=args.n_layers, ctx_len=512)
    sae = sl.SAE(sl.SAEConfig(d_in=model.cfg.d_model, d_sae=args.d_sae, activation=sl.AbsTopK(k=args.k)))
    point = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    ids = torch.randint(4, min(250, model.cfg.d_vocab), (args.batch, 8), generator=torch.Generator().manual_seed(0))
    push = 4 * sae.W_dec[3].detach()
    ways = find_ways(model, sae, point)
    times: dict[str, list[float]] = {name: [] for name in (*ways, "TransformerLens", "TransformerLens, hook adds")}
    for turn in range(args.turns + 1):  # the first warms up
        for name, block in ways.items():
            times[name].append(time_ours(model, block, ids, args.n_tokens))
        times["TransformerLens"].append(time_theirs(model, [], ids, args.n_tokens))
        hook = [(point, lambda x, hook: x + push)]
        times["TransformerLens, hook adds"].append(time_theirs(model, hook, ids, args.n_tokens))
        if turn == 0:
            times = {name: [] for name in times}
    print(
        f"d_model {model.cfg.d_model}, {model.cfg.n_layers} layers, d_sae {args.d_sae}, {args.batch} x {args.n_tokens} "
        f"tokens, {torch.get_num_threads()} threads, {args.turns} turns"
    )
    plain = times["plain"]
    for name, seconds in times.items():
        ratio = median(t / p for t, p in zip(seconds, plain, strict=True))
        goal = f"  (goal {GOAL})" if name in ways and name != "plain" else ""
        print(f"  {name:<28}{1e3 * median(seconds) / args.n_tokens:>8.2f} ms a token {ratio:>7.2f} times plain{goal}")
    if args.json:
        args.json.write_text(json.dumps({"times": times} | vars(args), default=str))


if __name__ == "__main__":
    main()
