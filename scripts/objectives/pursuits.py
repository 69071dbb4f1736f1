"""Latents that never fire and selectivity of wide dictionaries: pursuits by least squares against TopK.

Dictionaries of `--expansion` rows a dimension on tales, with as many codes a token. `dead` is the share of latents that
are zero on all held-out tokens (arXiv:2412.16247: 55 and 341 of 8,192 for ICFL, 7,640 and 8,026 for TopK, without and
with whitening). Selectivity of a latent for a topic is P(active | topic) less its mean, or its largest, over the other
topics: the best latent of each topic, chosen on one half of the held-out stories and read on the other, over topics.
"""

import argparse
import time

import torch

import saelab as sl
from objectives.shared import HOOK, format_table, tales_activations, train
from saelab.functional.metrics import FiringSums
from saelab.sae.fitting import measure as measure_fvu
from saelab.synthetic.tales import generate_stories

MEASURED = 71_000_000  # number of the first story to measure on
N_STORIES = 400


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--k", type=int, default=16)
    command.add_argument("--expansion", type=int, default=64)
    command.add_argument("--names", nargs="+", help="some of the rows; all without")


def measure(args: argparse.Namespace) -> None:
    acts, (x, topics) = tales_activations(), _read_topics()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, cfg in _configs(acts.d_in, args).items():
            if args.names and name not in args.names:
                continue
            began = time.perf_counter()
            sae = train({name: cfg}, acts, seed, args.n_tokens)[name]
            figures = _measure(sae, x, topics) | {"seconds": time.perf_counter() - began}
            rows.setdefault(name, []).append(figures)
            print(name, seed, figures, flush=True)
    print(f"{args.n_tokens:,} tokens of tales, {len(x):,} to measure on, d_sae {args.expansion} d, k {args.k}")
    print(format_table(rows))


def _configs(d_in: int, args: argparse.Namespace) -> dict[str, sl.SAEConfig]:
    axes = {"d_in": d_in, "d_sae": args.expansion * d_in}
    plain = (sl.ReconstructionLoss(),)
    signed, icfl, reset = sl.AbsTopK(k=args.k), sl.ICFL(latents_per_round=4), sl.sae.DuplicateReset()
    found = {
        "TopK": {"activation": sl.TopK(k=args.k), "objective": plain},
        "TopK, AuxK": {"activation": sl.TopK(k=args.k)},
        "AbsTopK": {"activation": signed, "objective": plain},
        "TopK, whitened": {"activation": sl.TopK(k=args.k), "objective": plain, "normalizer": "whiten"},
        "OMP": {"encoder": sl.OrthogonalMatchingPursuit(), "activation": signed, "objective": plain},
        "ICFL": {"encoder": icfl, "activation": signed, "objective": plain},
        "ICFL, resets": {"encoder": icfl, "activation": signed, "objective": plain, "duplicates": reset},
        "ICFL, whitened": {"encoder": icfl, "activation": signed, "objective": plain, "normalizer": "whiten"},
    }
    return {name: sl.SAEConfig(**axes, **more) for name, more in found.items()}


def _read_topics() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Activations of held-out stories, and the tokens of each topic."""
    stories = generate_stories(N_STORIES, first=MEASURED)
    tokens = stories.tokens()
    x = sl.lm.capture(sl.load_model("tales", progress=False), tokens.ids, [HOOK])[HOOK]
    real = (tokens.doc_ids >= 0) & (tokens.ids > 2)
    labels = stories.labels.spread(tokens.attention_mask)
    return x[real], {name: marks[real] for name, marks in labels.items() if name.startswith("topic")}


def _measure(sae: sl.SAE, x: torch.Tensor, topics: dict[str, torch.Tensor]) -> dict[str, float]:
    rates = []
    for half in (slice(0, len(x) // 2), slice(len(x) // 2, len(x))):
        by_topic = []
        for marks in topics.values():
            fires = FiringSums(sae.cfg.d_sae)
            chosen = x[half][marks[half]]
            for part in chosen.split(4096):
                fires.add(sae.encode_sparse(part))
            by_topic.append(fires.firings.double() / max(1, len(chosen)))
        rates.append(torch.stack(by_topic))
    found = measure_fvu(sae, x)
    return {
        "dead": found["dead_frac"],
        "FVU": found["fvu"],
        "L0": found["l0"],
        "selectivity, mean": _select(*rates, largest=False),
        "selectivity, max": _select(*rates, largest=True),
    }


def _select(choose: torch.Tensor, read: torch.Tensor, largest: bool) -> float:
    def selectivity(rates: torch.Tensor) -> torch.Tensor:
        rows = []
        for i in range(len(rates)):
            others = torch.cat([rates[:i], rates[i + 1 :]])
            rows.append(rates[i] - (others.amax(0) if largest else others.mean(0)))
        return torch.stack(rows)

    best = selectivity(choose).argmax(1, keepdim=True)
    return float(selectivity(read).gather(1, best).mean())
