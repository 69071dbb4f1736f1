"""Rule labels against a world whose concepts are known: are they right, and does chance get any?

    python scripts/measure_labels.py --seeds 0 1 2 --n-tokens 1500000 --out labels_table.txt

Three dictionaries on the model `tales`, harvested on stories that training never saw. The words below are defined
before anything is measured; rules and concepts are chosen on training stories, everything is counted on held-out
ones.

A side (a feature and a sign of its codes) is KNOWN where its best concept, chosen with a threshold (0, 0.1, ... 0.9
of the largest |z|) on training stories, has a held-out F1 of 0.8 or more.

With the concepts among the predicates, a known side is NAMED where its rule is good and is the concept, or an
equivalent: a predicate whose tokens have a Jaccard index of 0.9 or more with the concept's on training stories; or
where it has several parts and one of them is that. "alone" counts only rules that are nothing else.

Without them (no predicate of the world at all), a known side has the RIGHT WORDS where its rule is good, and on
held-out stories (1) at least 80 % of the firings that the rule covers are of the concept, (2) at least half of all
tokens of which the rule holds are of the concept, so that the rule itself and not the firing does the work, and (3)
the rule covers at least half of the side's firings on the concept, so that one lucky word does not count for a class.
Firings are those that reach the rule's threshold.

CHANCE: the activations are moved round the text by a random number of tokens, which keeps their runs and breaks every
tie to the words. "labels" is the share of such sides with a good rule, "q" the share with q <= 0.05 whatever the F1,
"runs" the share of moves in which any side has q <= 0.05: with nothing to find, this is the false discovery rate.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_matrix

import saelab as sl
from saelab.labels.rules.contingency import SideFirings, SplitCounts, add_side_tokens, feature_blocks
from saelab.labels.rules.predicates import Predicates, make_predicates
from saelab.labels.rules.rule_labels import RuleLabel, RuleLabels
from saelab.labels.rules.rule_search import label_by_rules
from saelab.synthetic.tales import Stories, generate_stories

HOOK = "blocks.2.hook_resid_post"
FIRST = 50_000_000  # number of the first story: neither model nor notebook has seen any from here on
D_SAE, K = 1024, 16
NAMES = ("TopK", "AbsTopK", "Matryoshka")
KNOWN_F1, EQUIVALENT, PURE, SPECIFIC, COVERED = 0.8, 0.9, 0.8, 0.5, 0.5
FRACTIONS = np.arange(10) / 10
SIZES = {"token": 1000, "word": 0, "word end": 0}  # every word of the world is one token


class Moved(sl.FeatureStore):
    """A store whose codes are moved round the text."""

    steps = 0

    def columns(self, start: int = 0, stop: int | None = None) -> csc_matrix:
        found = super().columns(start, stop)
        found.indices = ((found.indices + self.steps) % len(self)).astype(np.int32)
        found.sort_indices()
        return found


@dataclass(frozen=True)
class Known:
    """A side and its best concept."""

    feature: int
    sign: int
    concept: int


def train(seed: int, n_tokens: int, n_stories: int, kept: Path) -> dict[str, sl.SAE]:
    """TopK, AbsTopK and Matryoshka on the same batches; those that were trained before are read."""
    folders = {name: kept / f"{name}-{seed}-{n_tokens}" for name in NAMES}
    if all(folder.is_dir() for folder in folders.values()):
        return {name: sl.SAE.from_pretrained(folder) for name, folder in folders.items()}
    model = sl.load_model("tales", progress=False)
    acts = sl.collect(model, generate_stories(n_stories, first=FIRST).tokens(), HOOK, progress=False)
    plain = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
    configs = {
        "TopK": plain,
        "AbsTopK": replace(plain, activation=sl.AbsTopK(k=K)),
        "Matryoshka": replace(plain, activation=sl.BatchTopK(k=K), prefixes=(D_SAE // 16, D_SAE // 4, D_SAE)),
    }
    budget = sl.TrainConfig(n_tokens=n_tokens, batch_size=2048, seed=seed)
    saes = sl.fit([sl.SAE(cfg, seed) for cfg in configs.values()], acts, budget, progress=False)
    for name, sae in zip(configs, saes, strict=True):
        sae.save_pretrained(folders[name])
    return dict(zip(configs, saes, strict=True))


def find_known(store: sl.FeatureStore, truth: Any, is_train: np.ndarray) -> list[Known]:
    """The sides with a concept of held-out F1 0.8 or more; at least 10 firings in training stories."""
    concepts = Predicates(truth.tocsr(), tuple(map(str, range(truth.shape[1]))), ("concept",) * truth.shape[1])
    train_split, held_split = SplitCounts(concepts, is_train), SplitCounts(concepts, ~is_train)
    found = []
    for start, stop in feature_blocks(store):
        firings = SideFirings.sort(store.columns(start, stop), is_train, FRACTIONS)
        sides = np.arange(len(firings))
        chosen, held = (split.count(firings).of(sides) for split in (train_split, held_split))
        f1 = np.where(chosen.fires[:, :, None] >= 10, chosen.f1, 0).reshape(len(firings), -1)
        held_f1 = held.f1.reshape(len(firings), -1)[sides, f1.argmax(1)]
        for side in np.flatnonzero((f1.max(1) > 0) & (held_f1 >= KNOWN_F1)).tolist():
            found.append(Known(start + side // 2, 1 - 2 * (side % 2), int(f1[side].argmax()) % truth.shape[1]))
    return found


def equivalents(predicates: Predicates, truth: Any, is_train: np.ndarray) -> list[set[str]]:
    """For each concept the names of the predicates that hold of the same tokens, nearly."""
    a, b = truth[is_train].astype(np.int32).tocsc(), predicates.matrix[is_train].astype(np.int32).tocsc()
    both = (a.T @ b).toarray()
    either = np.asarray(a.sum(0)).T + np.asarray(b.sum(0)) - both
    same = both >= EQUIVALENT * np.maximum(either, 1)
    return [{predicates.names[j] for j in np.flatnonzero(row)} for row in same]


def is_named(row: RuleLabel | None, same: set[str], alone: bool) -> bool:
    """Whether a rule is a concept or its equivalent, or has it among its parts."""
    if row is None or not row.good or row.joined == "next":
        return False
    return bool(same & set(row.parts)) and (not alone or len(row.parts) == 1)


def has_right_words(
    row: RuleLabel | None, store: sl.FeatureStore, predicates: Predicates, concept: np.ndarray, held: np.ndarray
) -> bool:
    """The three conditions above."""
    if row is None or not row.good or row.joined == "next":
        return False
    marks = [predicates.column(name) for name in row.parts]
    rule = np.logical_and.reduce(marks) if row.joined == "and" else np.logical_or.reduce(marks)
    firings, fires = store.feature(row.feature), np.zeros(len(store), bool)
    fires[firings.indices[firings.values * row.sign >= max(row.threshold, 1e-12)]] = True
    rule, fires, concept = rule & held, fires & held, concept & held
    covered = rule & fires
    return bool(
        (covered & concept).sum() >= PURE * max(1, covered.sum())
        and (rule & concept).sum() >= SPECIFIC * max(1, rule.sum())
        and (covered & concept).sum() >= COVERED * max(1, (fires & concept).sum())
    )


def chance(store: sl.FeatureStore, predicates: Predicates, n_moves: int, seed: int) -> tuple[float, float, float]:
    """Shares of moved sides with a good rule and with q <= 0.05, and of moves with any q <= 0.05."""
    moved, rng = Moved.load(store.folder), np.random.default_rng(seed)
    good, below, sides, runs = 0, 0, 0, 0
    for _ in range(n_moves):
        moved.steps = int(rng.integers(1000, len(store) - 1000))
        rows = label_by_rules(moved, predicates, seed=seed).rows
        n_below = sum(row.q <= 0.05 for row in rows)
        good, below = good + sum(row.good for row in rows), below + n_below
        sides, runs = sides + len(rows), runs + (n_below > 0)
    return good / sides, below / sides, runs / n_moves


def measure(name: str, sae: sl.SAE, stories: Stories, seed: int, n_moves: int, folder: Path) -> str:
    """One row of the table."""
    model = sl.load_model("tales", progress=False)
    store = sl.harvest(sae, model, stories.tokens(), folder / f"{name}-{seed}", progress=False)
    assert isinstance(store, sl.FeatureStore)
    truth = stories.labels_at(store.doc_ids, store.text.positions[store.places]).matrix
    labels = sl.lm.TokenLabels.of(truth, [f"concept {name}" for name in stories.labels])
    is_train = store.split(seed=seed)
    known = find_known(store, truth, is_train)
    given = make_predicates(store, size=400, sizes=SIZES, concepts=labels)
    given = add_side_tokens(store, given, is_train)  # as `label_by_rules` does: rules may name them
    plain = given.without("concept")
    same = equivalents(given, truth, is_train)
    with_concepts = _by_side(label_by_rules(store, given, seed=seed))
    plain_labels = label_by_rules(store, plain, seed=seed)
    by_plain = _by_side(plain_labels)
    dense = truth.tocsc()
    named, alone, right = [], [], []
    for one in known:
        row = with_concepts.get((one.feature, one.sign))
        named.append(is_named(row, same[one.concept], alone=False))
        alone.append(is_named(row, same[one.concept], alone=True))
        concept = dense[:, [one.concept]].toarray().ravel().astype(bool)
        plain_row = by_plain.get((one.feature, one.sign))
        right.append(has_right_words(plain_row, store, plain, concept, ~is_train))
        if not (named[-1] and right[-1]):
            _explain(name, seed, one, stories, row, plain_row, named[-1], right[-1])
    n_trained = (sae.training_ or {}).get("n_tokens_seen", 0)
    shares = "".join(f"{np.mean(values):>9.3f}" for values in (named, alone, right))
    by_chance = "".join(f"{value:>9.4f}" for value in chance(store, given, n_moves, seed))
    return (
        f"{name:<11}{seed:>5}{len(store):>9,}{n_trained:>11,}"
        f"{len(plain_labels.rows):>7}{len(plain_labels.good):>7}{len(known):>7}{shares}{by_chance}"
    )


def _by_side(labels: RuleLabels) -> dict[tuple[int, int], RuleLabel]:
    return {(row.feature, row.sign): row for row in labels.rows}


def _explain(
    name: str,
    seed: int,
    one: Known,
    stories: Stories,
    given: RuleLabel | None,
    plain: RuleLabel | None,
    *is_right: bool,
) -> None:
    """What went wrong, for the eye."""
    texts = [f"{row.text} (F1 {row.f1:.2f})" if row else "nothing" for row in (given, plain)]
    sys.stderr.write(
        f"{name} {seed} {one.feature:>5} {one.sign:+d} is {stories.labels.names[one.concept]}: {texts} {is_right}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=1_500_000, help="to train each dictionary on")
    parser.add_argument("--n-stories", type=int, default=2400, help="to train on, over and over")
    parser.add_argument("--n-moves", type=int, default=20)
    parser.add_argument("--kept", type=Path, help="a folder of dictionaries, to train each only once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stories = generate_stories(args.n_stories // 2, first=FIRST + args.n_stories)
    titles = ("sides", "good", "known", "named", "alone", "right", "labels", "q", "runs")
    lines = [
        f"{'':<11}{'seed':>5}{'tokens':>9}{'trained':>11}"
        + "".join(f"{t:>{7 if i < 3 else 9}}" for i, t in enumerate(titles))
    ]
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name, sae in train(seed, args.n_tokens, args.n_stories, args.kept or Path(folder)).items():
                lines.append(measure(name, sae, stories, seed, args.n_moves, Path(folder)))
                print("\n".join(lines[:1] + lines[-1:]), flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
