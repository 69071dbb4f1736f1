"""Directions of traits: do they hold of other texts, and what does steering leave behind over turns?

    python scripts/measure_traits.py PATH/TO/stories260k --seeds 0 1 2 --n-dialogues 24

1. Pairs: eight openings that differ in mood alone ("was very happy" / "was very sad"), all exchanges of ends as null;
   and a null trait of eight pairs of openings that differ in nothing common (other names and places).
2. Other texts: mean level of texts with other names and words (glad, smiled, laughed against upset, cried, frowned) by
   AUROC, beside 100 random directions and the null trait.
3. Turns: four turns of a running text, of which the first two are steered along the trait (strength in distances
   between the ends) and the others are not. By turn: the level, and the loss of the reply under the model itself
   given its text (nats a token), for a history that is read clean, one that stays steered as in a kept cache, a
   random direction of the same length in a kept cache, and no steering at all. Spread: standard deviation over seeds.
"""

import argparse
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

import saelab as sl
from saelab.functional.statistics import auroc
from saelab.interventions.directions import make_random
from saelab.lm.hooks import next_token_loss
from saelab.steering import Dialogue, Trait, converse, monitor, trait_vector

WHO = ("Lily", "Tom", "the little dog", "Mia", "a big bear", "Ben", "the bird", "Sara")
WHERE = (
    "in the park",
    "at home",
    "by the tree",
    "in the house",
    "in the forest",
    "at school",
    "in the sky",
    "on the bed",
)
OTHERS = ("Max", "the cat", "Anna", "a boy", "the old man", "Sue", "a girl", "the frog", "Jack", "Mom")
WORDS = (("was glad", "smiled", "laughed"), ("was upset", "cried", "frowned"))
BEGIN = ("One day, {} went to the park.", "There was a boy named {}.", "{} had a red ball.", "{} lived in a big house.")
GO_ON = (" Then {} saw a friend.", " The next day, {} went out.", " At night, {} went home.")


def make_pairs() -> list[tuple[str, str]]:
    return [
        (f"One day, {who} was very happy {at}.", f"One day, {who} was very sad {at}.")
        for who, at in zip(WHO, WHERE, strict=True)
    ]


def make_null_pairs(seed: int) -> list[tuple[str, str]]:
    """Pairs whose ends are drawn from one set of sentences."""
    rng = np.random.default_rng(seed)
    ends = [[f"One day, {rng.choice(WHO)} was {rng.choice(WHERE)}." for _ in range(8)] for _ in range(2)]
    return list(zip(*ends, strict=True))


def separate(model: Any, trait: Trait, seed: int) -> tuple[float, float, float]:
    """AUROC of the level of other texts, and mean and 97.5 % quantile of |AUROC - .5| + .5 along random directions."""
    texts = [[f"{who} {word}." for who in OTHERS for word in words] for words in WORDS]
    rows = []
    for text in (*texts[0], *texts[1]):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        rows.append(sl.lm.capture(model, ids, [trait.hook_point])[trait.hook_point][0, 1:].mean(0))
    x, y = torch.stack(rows), np.arange(len(rows)) < len(texts[0])
    drawn = [make_random(trait.direction(), 1000 * seed + i).vector for i in range(100)]
    by_chance = [abs(auroc((x @ v).numpy(), y) - 0.5) + 0.5 for v in drawn]
    return auroc(trait.level(x).numpy(), y), fmean(by_chance), float(np.quantile(by_chance, 0.975))


def loss_of(model: Any, dialogue: Dialogue, turn: int) -> float:
    """Loss of a reply under the model without edits, given the text before it, in nats a token."""
    reply = dialogue.turns[turn].reply
    ids = torch.tensor([reply.all_ids])
    losses = next_token_loss(sl.lm.logits(model, ids), ids)[0]
    return float(losses[len(reply.prompt_ids) - 1 :].mean())


def run_turns(model: Any, trait: Trait, strength: float, seed: int, n: int) -> dict[str, dict[str, float]]:
    """Means over dialogues by way of steering."""
    own = sl.Intervention(trait.direction(), strength, unit="max")
    random = make_random(trait.direction(), seed)
    ways = {
        "none": ("clean", []),
        "clean history": ("clean", [own]),
        "kept cache": ("steered", [own]),
        "kept cache, random": ("steered", [replace(own, source=random)]),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for i in range(n):
        who = (*WHO, *OTHERS)[i % 18]
        says = [BEGIN[i % 4].format(who), *(text.format(who) for text in GO_ON)]
        for name, (history, edits) in ways.items():
            each = [edits, edits, [], []]
            made = converse(model, says, each, history=history, n_tokens=20, seed=1000 * seed + i)
            read = monitor(model, made, trait)
            for turn in range(4):
                level = [row for row in read.rows if row.role == "assistant"][turn].levels[trait.name]
                found[name].setdefault(f"level {turn + 1}", []).append(level)
                found[name].setdefault(f"loss {turn + 1}", []).append(loss_of(model, made, turn))
    return {name: {key: fmean(values) for key, values in columns.items()} for name, columns in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-dialogues", type=int, default=24)
    parser.add_argument("--strengths", type=float, nargs="+", default=[4.0, 12.0])
    args = parser.parse_args()
    model = sl.load_model(args.model, progress=False)
    trait = trait_vector(model, make_pairs(), name="happy", progress=False)
    print(trait, end="\n\n")
    for seed in args.seeds:
        null = trait_vector(model, make_null_pairs(seed), name="null", progress=False)
        scores = [f"{name} AUROC {score:.3f}" for name, score in
                  (("happy", separate(model, trait, seed)[0]), ("null", separate(model, null, seed)[0]))]  # fmt: skip
        _, mean, most = separate(model, trait, seed)
        print(
            f"seed {seed}: null pairs p {null.p:.3g}; other texts: {', '.join(scores)}, random {mean:.3f} ({most:.3f})"
        )
    for strength in args.strengths:
        runs = [run_turns(model, trait, strength, seed, args.n_dialogues) for seed in args.seeds]
        print(f"\nstrength {strength:g}, {args.n_dialogues} dialogues a seed, seeds {args.seeds}")
        keys = [f"{what} {turn}" for what in ("level", "loss") for turn in range(1, 5)]
        print("\t".join(["", *keys]))
        for name in runs[0]:
            cells = [[run[name][key] for run in runs] for key in keys]
            shown = [f"{fmean(c):.2f}" + (f" ({stdev(c):.2f})" if len(c) > 1 else "") for c in cells]
            print("\t".join([name, *shown]))


if __name__ == "__main__":
    main()
