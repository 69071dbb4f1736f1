"""Do relevance rules estimate exact effects better than gradients? Place by place, on prompts that training never saw.

    python scripts/measure_relevance.py tales
    python scripts/measure_relevance.py tales --metric difference --n-prompts 24
    python scripts/measure_relevance.py PATH/TO/stories260k --text PATH/TO/tinystories.txt --places hook_resid_post

At each place a TopK dictionary is trained for a short time; each of its active features at every token is replaced by
zero, and the metric's exact change is compared with the estimates of `attribute`: gradient, integrated gradients, RelP
(attention patterns constant) and AttnLRP (relevance through softmax).

    pearson, spearman   with exact effects, mean over prompts and its standard deviation
    better              prompts in which the correlation is above the gradient's: Pearson / Spearman
    shuffled            rank correlation where estimates meet other features of their token: mean, and what 5 % exceed
    top 10              share of the ten largest exact effects that are among the ten largest estimates
    sum                 median over prompts of the sum of effects, errors included, over what replacing everything does
    slope               median over prompts of the regression coefficient of exact effects on estimates: 1 is the
                        right size
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tqdm.auto import tqdm

import saelab as sl
from saelab.interventions.attribution import Attribution, AttributionMethod, attribute
from saelab.lm.model_checks import Model
from saelab.synthetic.tales import generate_stories

FIRST = 90_000_000  # number of the first story: neither model nor dictionary has seen any from here on
METHODS = [method for method in get_args(AttributionMethod) if method != "exact"]
PLACES = ("hook_resid_post", "hook_mlp_out", "hook_attn_out")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tales, a Hub id or a folder")
    parser.add_argument("--text", type=Path, help="default: stories generated for the models of tales")
    parser.add_argument("--places", nargs="+", default=PLACES, help="hook points of a block")
    helped = "log-probability of the next token, or its logit less that of the likeliest other"
    parser.add_argument("--metric", choices=("next", "difference"), default="next", help=helped)
    parser.add_argument("--n-prompts", type=int, default=6)
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--n-tokens", type=int, default=200_000, help="to train on")
    return parser.parse_args()


def read_tokens(model: Model, args: argparse.Namespace) -> tuple[sl.Tokens, list[tuple[torch.Tensor, int]]]:
    """Tokens to train on; beginnings of other documents, each with the token behind it."""
    if args.text is None:
        train = generate_stories(args.n_tokens // 450 + 1, first=FIRST - 10_000_000).tokens()
        tokens = generate_stories(3 * args.n_prompts, first=FIRST).tokens()
    else:
        train = sl.tokenize(model, args.text, n_tokens=args.n_tokens // 3)
        tokens = sl.tokenize(model, args.text, args.length + 1, packed=False)[-3 * args.n_prompts :]
    whole = (tokens.attention_mask.sum(1) > args.length).nonzero()[:, 0].tolist()[: args.n_prompts]
    return train, [(tokens.ids[i, : args.length].long(), int(tokens.ids[i, args.length])) for i in whole]


def find_metric(model: Model, ids: torch.Tensor, behind: int, kind: str) -> int | tuple[int, int]:
    if kind == "next":
        return behind
    likely = sl.lm.logits(model, ids[None])[0, -1].topk(2).indices.tolist()
    return behind, next(token for token in likely if token != behind)


def attribute_all(
    model: Model, sae: sl.SAE, ids: torch.Tensor, metric: int | tuple[int, int]
) -> dict[str, Attribution]:
    """By method, with the same exact effects."""
    first = attribute(model, sae, ids, metric, check=True, progress=False)
    rest = {method: attribute(model, sae, ids, metric, method=method) for method in METHODS[1:]}
    return {METHODS[0]: first} | {name: replace(found, exact=first.exact) for name, found in rest.items()}


def format_rows(place: str, found: list[dict[str, Attribution]]) -> str:
    lines = []
    for method in METHODS:
        held = [one[method].agreement for one in found]
        bases = [one[METHODS[0]].agreement for one in found]
        figures = {name: np.array([getattr(a, name) for a in held]) for name in vars(held[0])}
        plain = {name: np.array([getattr(a, name) for a in bases]) for name in ("pearson", "spearman")}
        spread = "".join(f"{np.nanmean(figures[n]):>8.3f} ({np.nanstd(figures[n]):.3f})" for n in plain)
        better = "/".join(f"{int((figures[name] > plain[name]).sum())}" for name in plain)
        null = f"{np.nanmean(figures['shuffled']):>8.3f}{np.nanmean(figures['shuffled_95']):>7.3f}"
        total = np.nanmedian([one[method].completeness for one in found])
        slope = np.median([fit_slope(one[method]) for one in found])
        lines.append(
            f"{place:<26}{method:<12}{spread}{better if method != METHODS[0] else '':>8}{null}"
            f"{np.nanmean(figures['top']):>8.2f}{total:>8.2f}{slope:>8.2f}"
        )
    return "\n".join(lines)


def fit_slope(found: Attribution) -> float:
    return float(found.effects @ found.exact / (found.effects @ found.effects))


def main() -> None:
    args = parse()
    model = sl.load_model(args.model, progress=False)
    train, prompts = read_tokens(model, args)
    metrics = [find_metric(model, ids, behind, args.metric) for ids, behind in prompts]
    named = {"next": "log-probability of the next token", "difference": "logit of the next token less another's"}
    print(f"{args.model}, {named[args.metric]}: {len(prompts)} prompts of {args.length} tokens, set to zero")
    print(f"{'':<38}{'pearson':>16}{'spearman':>16}{'better':>8}{'shuffled':>15}{'top 10':>8}{'sum':>8}{'slope':>8}")
    for place in args.places:
        points = [f"blocks.{i}.{place}" for i in range(model.cfg.n_layers)]
        for point, acts in sl.collect(model, train, points, progress=False).items():
            sae = sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=1024, activation=sl.TopK(k=16)))
            sl.fit([sae], acts, sl.TrainConfig(n_tokens=args.n_tokens), progress=False)
            pairs = tqdm(list(zip(prompts, metrics, strict=True)), desc=point, leave=False)
            found = [attribute_all(model, sae, ids, metric) for (ids, _), metric in pairs]
            print(format_rows(point, found), flush=True)


if __name__ == "__main__":
    main()
