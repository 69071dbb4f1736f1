"""Gradient steering on sparse codes against plain addition, at equal cost, on the moods of `tales`.

    python scripts/measure_prototypes.py FOLDER FOLDER ...

Tokens of a paragraph whose mood has shown are glad or sad; prototypes are their mean codes. On stories that nothing was
chosen on, every token of blocks.2.hook_resid_post is steered toward one mood, then toward the other:

    contrast      gradient descent on -log softmax of minus squared distances, 100 steps, by growing step
    kept          the same with the 32 largest codes of each prototype
    three         the same with a third prototype, of tokens without a mood
    distance      gradient descent on the squared distance to the prototype
    difference    the difference of the two prototypes added, by growing strength
    means         the difference of the activations' means added: no dictionary
    random        a random direction added

Read where a curve reaches a KL of 0.03, 0.1 and 0.3 nats a token, interpolated; means over both moods and the
dictionaries of a kind, with the standard deviation over dictionaries. gain: logarithm of how much oftener a word of the
mood is expected; share: of the probability that mood words have where one stands, what the mood's own have.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import saelab as sl
from saelab.functional.metrics import kl_divergence, read_gain
from saelab.interventions.prototype_steering import Prototypes, mean_codes, steer_to_prototype
from saelab.lm.model_checks import Model
from saelab.probing.linear_directions import fit_direction
from saelab.steering.dose_response import log_mass
from saelab.steering.target_concepts import synthetic_concept
from saelab.synthetic.tales import generate_stories

FIRST = 95_000_000  # number of the first story: neither model nor dictionary has seen any from here on
HOOK = "blocks.2.hook_resid_post"
MOODS = ("glad", "sad")
COSTS = (0.03, 0.1, 0.3)
ETAS = (0.2, 0.6, 1.5, 4.0, 12.0, 40.0)
SHARES = (0.3, 0.5, 0.6, 0.7, 0.8)
NORMS = (0.2, 0.4, 0.6, 0.8, 1.1, 1.6)  # of the token's activation
BATCH = 25

Block = Callable[[float], Any]


@dataclass(frozen=True)
class Bench:
    """Held-out stories and the plain model's predictions on them."""

    model: Model
    ids: torch.Tensor
    predicts: torch.Tensor
    at_words: torch.Tensor
    log_p: torch.Tensor
    words: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Model, n_stories: int) -> "Bench":
        stories = generate_stories(n_stories, first=FIRST + 1_000_000)
        tokens = stories.tokens(int(np.diff(stories.offsets).max()))
        words = {mood: torch.tensor(synthetic_concept(model, mood).ids) for mood in MOODS}
        predicts, behind = tokens.attention_mask.clone(), torch.zeros_like(tokens.attention_mask)
        predicts[:, :-1] &= tokens.attention_mask[:, 1:]
        behind[:, :-1] = torch.isin(tokens.ids, torch.cat([*words.values()]))[:, 1:]
        bare = cls(model, tokens.ids.long(), predicts, predicts & behind, torch.zeros(0), words)
        return cls(model, bare.ids, predicts, bare.at_words, bare.predict(), words)

    def predict(self) -> torch.Tensor:
        return torch.cat([sl.lm.logits(self.model, ids).log_softmax(-1) for ids in self.ids.split(BATCH)])

    def measure(self, mood: str, block: Any) -> tuple[float, float, float]:
        """KL, gain and share inside a block."""
        with block:
            log_q = self.predict()
        own, both = self.words[mood], torch.cat([*self.words.values()])
        kl = float(kl_divergence(self.log_p[self.predicts], log_q[self.predicts]).mean())
        gain = self.expected(log_q, own).log() - self.expected(self.log_p, own).log()
        share = (log_mass(log_q, own) - log_mass(log_q, both))[self.at_words].exp().mean()
        return kl, float(gain), float(share)

    def expected(self, log_q: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return log_mass(log_q, words)[self.predicts].exp().mean()


def read_labeled(model: Model, n_stories: int) -> tuple[torch.Tensor, np.ndarray]:
    """Activations and what each token's mood is: glad, sad or none."""
    stories = generate_stories(n_stories, first=FIRST)
    acts = sl.collect(model, stories.tokens(), HOOK, progress=False)
    held = stories.labels_at(acts.doc_ids, acts.positions)
    return acts[:], np.where(held[MOODS[0]], MOODS[0], np.where(held[MOODS[1]], MOODS[1], "none"))


def added(model: Model, direction: sl.Direction) -> Block:
    return lambda strength: sl.steer(model, direction, strength, unit="norm")


def methods(
    model: Model, sae: sl.SAE, mood: str, x: torch.Tensor, labels: np.ndarray
) -> Iterator[tuple[str, Block, tuple[float, ...]]]:
    """Ways of steering toward a mood: name, block by dose, and doses in growing order."""
    other = MOODS[1 - MOODS.index(mood)]
    marked = torch.from_numpy(labels != "none")
    two = mean_codes(sae, x[marked], labels[labels != "none"].tolist())
    three = mean_codes(sae, x, labels.tolist())

    def pulled(prototypes: Prototypes, **settings: Any) -> Block:
        return lambda eta: steer_to_prototype(model, sae, prototypes, mood, eta=eta, **({"n_steps": 100} | settings))

    yield "contrast", pulled(two), ETAS
    yield "  kept", pulled(two.keep(32)), ETAS
    yield "  three", pulled(three), ETAS
    yield (
        "distance",
        lambda share: steer_to_prototype(model, sae, two, mood, eta=share / 2, n_steps=1, loss="distance"),
        SHARES,
    )
    difference = two.difference(sae, mood, other)
    yield "difference", added(model, difference), NORMS
    means = fit_direction(x[marked], torch.from_numpy(labels == mood)[marked], HOOK)
    yield "means", added(model, means), NORMS
    yield "random", added(model, sl.interventions.make_random(difference, seed=MOODS.index(mood))), NORMS


def read_curve(bench: Bench, mood: str, block: Block, doses: tuple[float, ...]) -> list[float]:
    """Gain and share at each cost, in turns."""
    _, _, plain = bench.measure(mood, nullcontext())
    kl, gain, share = (np.array(column) for column in zip(*(bench.measure(mood, block(d)) for d in doses), strict=True))
    found = []
    for cost in COSTS:
        found += [read_gain(gain, kl, cost), plain + read_gain(share - plain, kl, cost)]
    return found


def measure_all(bench: Bench, sae: sl.SAE, x: torch.Tensor, labels: np.ndarray) -> dict[str, list[float]]:
    """Gain and share at each cost by method, mean over moods."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for mood in MOODS:
        for name, block, doses in methods(bench.model, sae, mood, x, labels):
            found[name].append(read_curve(bench, mood, block, doses))
    return {name: np.mean(both, 0).tolist() for name, both in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+", type=Path, help="folders; what stands before the first - is their kind")
    parser.add_argument("--n-train", type=int, default=300, help="stories for prototypes and directions")
    parser.add_argument("--n-test", type=int, default=30, help="stories to measure on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    x, labels = read_labeled(model, args.n_train)
    bench = Bench.of(model, args.n_test)
    plain = {mood: bench.measure(mood, nullcontext())[2] for mood in MOODS}
    counts = ", ".join(f"{(labels == mood).sum():,} {mood}" for mood in (*MOODS, "none"))
    print(f"prototypes of {counts} tokens; measured on {int(bench.predicts.sum()):,} tokens", end=", ")
    print(
        f"{int(bench.at_words.sum())} of them before a mood word; share at no cost {np.mean(list(plain.values())):.3f}"
    )
    print(f"{'':<26}" + "".join(f"{f'at KL {cost:g}: gain':>22}{'share':>16}" for cost in COSTS))
    kinds: dict[str, list[Path]] = defaultdict(list)
    for folder in args.saes:
        kinds[folder.name.split("-")[0]].append(folder)
    for kind, folders in kinds.items():
        found = [measure_all(bench, sl.SAE.from_pretrained(folder), x, labels) for folder in tqdm(folders)]
        for name in found[0]:
            values = np.array([one[name] for one in found])
            shown = [f"{mean:.3f} ({by:.3f})" for mean, by in zip(values.mean(0), values.std(0), strict=True)]
            cells = "".join(f"{text:>{22 if i % 2 == 0 else 16}}" for i, text in enumerate(shown))
            print(f"{f'{kind}, {name}':<26}{cells}", flush=True)


if __name__ == "__main__":
    main()
