"""Fine-tuning with the model in the loop: predictions against as many more tokens on reconstruction alone.

TopK SAEs of one model at equal L0: as trained; trained further by `finetune` on reconstruction and KL divergence; by
the same on reconstruction alone. On text that neither has seen: loss recovered, KL divergence, FVU.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import saelab as sl
from objectives.shared import format_table
from saelab.evaluation.finetuning import finetune

FIGURES = {"loss recovered": "loss_recovered", "KL": "kl", "FVU": "fvu", "L0": "l0"}


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="folder or name of the model")
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--hook-point", default="blocks.2.hook_resid_post")
    command.add_argument("--d-sae", type=int, default=1024)
    command.add_argument("--k", type=int, default=8)
    command.add_argument("--more", type=float, default=0.25, help="tokens of the second part, as a share of the first")
    command.add_argument("--kl-coefficients", type=float, nargs="+", default=[0.0, 1.0, 3.0])


def measure(args: argparse.Namespace) -> None:
    model = sl.load_model(args.model, progress=False)
    tokens = sl.tokenize(model, args.text, ctx_len=128, n_tokens=args.n_tokens + 40_000)
    seen, unseen = tokens[: len(tokens) - 300], tokens[len(tokens) - 300 :]
    acts = sl.collect(model, seen, args.hook_point, progress=False)
    rows: dict[str, list[dict[str, float]]] = {}
    n_more = int(args.more * args.n_tokens)
    for seed in args.seeds:
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k))
        run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
        trained = {"trained": sl.SAE(cfg, seed=seed).fit(acts, run, progress=False)}
        for kl in args.kl_coefficients:
            further = sl.TrainConfig(n_tokens=n_more, batch_size=2048, seed=seed)
            sae = deepcopy(trained["trained"])
            trained[f"and KL x {kl:g}"] = finetune(sae, model, seen, further, kl_coefficient=kl, progress=False)
        for name, sae in trained.items():
            found = sl.evaluate(sae, model, unseen, n_bootstrap=0, baselines=name == "trained", progress=False)
            rows.setdefault(name, []).append({label: getattr(found, field) for label, field in FIGURES.items()})
            if name == "trained":
                other = found.baselines["untrained"]
                rows.setdefault("untrained", []).append({label: other[field] for label, field in FIGURES.items()})
    about = f"{args.model}, {args.hook_point}, TopK {args.k}, {args.n_tokens:,} tokens, then {n_more:,}"
    print(f"{about}; {found.n_tokens:,} to measure on; seeds {args.seeds}")
    print(format_table(rows))
