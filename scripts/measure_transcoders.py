"""Transcoders of an MLP against an SAE of its output: FVU, and what the model's predictions lose when it is replaced.

    python scripts/measure_transcoders.py PATH/TO/stories260k --text PATH/TO/tinystories.txt

All have the same width and k and see the same tokens, one of each kind a seed. The transcoders read the residual stream
as the MLP's norm has scaled it, before the norm's weight, and write what the MLP writes. The SAE reads the answer, so
its numbers are no bar for them; their own baselines are, in brackets: untrained, random directions, and the best linear
map of rank L0 (of any rank next to a skip connection; for the SAE principal components).
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import saelab as sl
from saelab.sae.activation_functions import make_activation

READ, WRITTEN = "blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hub id or a folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--activation", default="topk")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--n-tokens", type=int, default=2_000_000, help="tokens each is trained on")
    parser.add_argument("--n-text", type=int, default=600_000, help="tokens that training sees over and over")
    parser.add_argument("--n-eval", type=int, default=50_000, help="tokens of other documents, to evaluate on")
    parser.add_argument("--n-seeds", type=int, default=3)
    return parser.parse_args()


def kinds(args: argparse.Namespace, d_in: int, d_out: int) -> dict[str, sl.SAEConfig]:
    """What is compared, by name."""
    activation = make_activation(args.activation, k=args.k)
    transcoder = sl.SAEConfig(d_in=d_in, d_sae=args.d_sae, d_out=d_out, activation=activation)
    return {
        "SAE of the output": replace(transcoder, d_in=d_out, d_out=None),
        "transcoder": transcoder,
        "skip transcoder": replace(transcoder, skip=True),
    }


def mean_and_range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def describe(name: str, found: Sequence[sl.evaluation.Evaluation]) -> str:
    """A row of the table: means over seeds."""

    def mean(field: str) -> float:
        return sum(getattr(one, field) for one in found) / len(found)

    def baselines(field: str, form: str) -> str:
        means = [sum(one.baselines[r][field] for one in found) / len(found) for r in found[0].baselines]
        return " / ".join(format(value, form) for value in means)

    recovered = mean_and_range([one.loss_recovered for one in found])
    cells = [
        name,
        f"{mean_and_range([one.fvu for one in found])} [{baselines('fvu', '.3f')}]",
        f"{mean('l0'):.1f}",
        f"{mean('dead_frac'):.3f}",
        " / ".join(f"{mean(field):.4f}" for field in ("ce_clean", "ce_sae", "ce_zero", "ce_mean")),
        f"{recovered} [{baselines('loss_recovered', '.3f')}]",
        f"{mean('kl'):.4f} [{baselines('kl', '.3f')}]",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    model = sl.load_model(args.model, progress=False)
    read, written = (name.format(args.layer) for name in (READ, WRITTEN))
    whole = sl.tokenize(model, args.text, ctx_len=128, n_tokens=args.n_text + args.n_eval)
    n_rows = args.n_eval // whole.ctx_len
    acts = sl.collect(model, whole[n_rows:], [read, written], progress=False)
    x, y = acts[read], acts[written]
    print(
        f"{read} to {written}: {len(x):,} tokens, trained on {args.n_tokens:,}, evaluated on "
        f"{n_rows * whole.ctx_len:,}; d_sae {args.d_sae}, {args.activation} k {args.k}, seeds 0 to {args.n_seeds - 1}"
    )
    print("| kind | FVU [baselines] | L0 | dead | CE clean / spliced / zero / mean | loss recovered | KL |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, cfg in kinds(args, x.d_in, y.d_in).items():
        run = sl.TrainConfig(n_tokens=args.n_tokens)
        data = y if cfg.d_out is None else (x, y)
        saes = [
            sl.SAE(cfg, seed=seed).fit(data, replace(run, seed=seed), progress=False) for seed in range(args.n_seeds)
        ]
        found = [sl.evaluate(sae, model, whole[:n_rows], n_bootstrap=0, progress=False) for sae in saes]
        print(describe(name, found), flush=True)


if __name__ == "__main__":
    main()
