"""`score_concepts`: scores of a dictionary on synthetic text whose concepts are known for every token.

With each score go its distance from chance (Cohen's kappa, with an interval over stories) and its value on permuted
concept labels, and F1 of concepts predicted where a feature with high precision for them fires.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from saelab.evaluation.feature_classifiers import (
    FRACTIONS,
    N_LEVELS,
    NOTHING,
    ClassifierCounts,
    CodeMatrix,
    Levels,
    Ranks,
    best_classifier,
    best_pair,
    classifier_union,
    count_classifiers,
    find_peaks,
    grade,
    ratio,
    read_values,
    select_rows,
)
from saelab.evaluation.results import ConceptScore, ConceptScores, PairScore, ParentScore
from saelab.functional.indices import exchange_groups, permute_within
from saelab.functional.statistics import INSIDE, draw_weights, find_reach, kappa
from saelab.lm.token_labels import Concept, LabelsLike, TokenLabels
from saelab.stores.corpus import split_documents

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

N_DRAWS = 500
PRECISION, MIN_FIRES = 0.95, 10
PAIR_KAPPA, PAIR_SHARE = 0.3, 0.5
CLASSIFIERS_AT_ONCE = 16  # rows of a product with the truth


def kappa_intervals(
    held: Levels, truth: "csr_matrix", classifiers: Sequence[int], story_ids: Shaped[np.ndarray, "n_tokens"], seed: int
) -> Float[np.ndarray, "n_concepts 3"]:
    """Cohen's kappa of each concept's classifier with the ends of its 95 % interval, stories drawn with replacement.

    Args:
        held: levels of held-out tokens.
        truth: (n_tokens, n_concepts), of the same tokens.
        classifiers: the classifier of each concept.
        story_ids: the story of each token.
        seed: of the draws.
    """
    _, numbers, sizes = np.unique(story_ids, return_inverse=True, return_counts=True)
    weights = np.concatenate([np.ones((1, len(sizes))), draw_weights(len(sizes), N_DRAWS, seed)])
    columns, found = truth.tocsc(), np.empty((len(classifiers), 3))
    for c, classifier in enumerate(classifiers):
        fires, true = held.tokens(classifier), columns[:, [c]].indices
        sums = [np.bincount(numbers[rows], minlength=len(sizes)) for rows in (np.intersect1d(fires, true), fires, true)]
        kappas = _kappa_or_nan(*(weights @ one for one in (*sums, sizes)))
        [reach] = find_reach(kappas[None, 1:], len(sizes))
        found[c] = kappas[0], kappas[0] - reach, kappas[0] + reach
    return found


def _kappa_or_nan(
    hits: Float[np.ndarray, "n"], fires: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"], n: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """F1 above that of as many firings at random; NaN where neither fires nor holds, or both always."""
    known = (fires + true > 0) & (fires + true < 2 * n)
    return np.where(known, kappa(hits, fires, true, n), np.nan)


def move_truth(truth: "csr_matrix", story_ids: Shaped[np.ndarray, "n_tokens"], seed: int) -> "csr_matrix":
    """The labels of all concepts permuted, as `permute_labels` does it: tokens within stories, or whole stories
    where a concept is mostly a matter of whole stories.

    Concepts that are permuted in the same way keep their relations: those that exclude each other still do.

    Args:
        truth: (n_tokens, n_concepts), counts of 0 and 1.
        story_ids: the story of each token.
        seed: of both orders.

    >>> from scipy.sparse import csr_matrix
    >>> truth = csr_matrix(np.eye(4, 2, dtype=np.int32))
    >>> move_truth(truth, np.array([0, 0, 1, 1]), seed=0).sum(0).tolist()
    [[1, 1]]
    """
    from scipy.sparse import csr_matrix, diags

    _, numbers, sizes = np.unique(story_ids, return_inverse=True, return_counts=True)
    n_tokens = len(numbers)
    of_story = csr_matrix((np.ones(n_tokens, np.int64), (numbers, np.arange(n_tokens))), shape=(len(sizes), n_tokens))
    true = (of_story @ truth).toarray()
    rates = true.sum(0) / n_tokens
    inside = (true * (1 - true / sizes[:, None])).sum(0) / np.maximum(n_tokens * rates * (1 - rates), 1e-30)
    rng = np.random.default_rng(seed)
    orders = permute_within(numbers, rng), exchange_groups(numbers, rng)
    masks = (
        diags((inside >= INSIDE).astype(np.int32), dtype=np.int32),
        diags((inside < INSIDE).astype(np.int32), dtype=np.int32),
    )
    moved = csr_matrix(sum(truth[order] @ mask for order, mask in zip(orders, masks, strict=True)).astype(np.int32))
    moved.eliminate_zeros()
    return moved


def reconstruct_truth(
    levels: Levels,
    held: Levels,
    counts: ClassifierCounts,
    truth: "csr_matrix",
    held_truth: "csr_matrix",
    scored: Bool[np.ndarray, "n_concepts"],
) -> dict[str, Any]:
    """Fields of `ConceptScores` on reconstruction: held-out F1 at the threshold with the best pooled F1 in training.

    Args:
        levels: quantized codes of training stories.
        held: quantized codes of held-out stories.
        counts: of classifiers in training stories.
        truth: (n_tokens, n_concepts) of training stories.
        held_truth: (n_tokens, n_concepts) of held-out stories.
        scored: concepts that count; the others are left out.
    """
    from scipy.sparse import diags

    keep = diags(scored.astype(np.int32), dtype=np.int32)
    truth, held_truth = truth @ keep, held_truth @ keep
    truth.eliminate_zeros()
    held_truth.eliminate_zeros()
    precise = (counts.fires >= MIN_FIRES) & (counts.hits >= PRECISION * counts.fires) & scored[:, None]
    by_level: np.ndarray = precise.reshape(len(scored), -1, N_LEVELS)
    trained = [_pooled_f1(predicted, truth) for predicted in _predict(levels, by_level, range(N_LEVELS))]
    known = [i for i, f1 in enumerate(trained) if not math.isnan(f1)]
    best = max(known, key=lambda i: trained[i], default=0)
    predicted = _predict(held, by_level, [best])[0]
    return {
        "reconstruction": _pooled_f1(predicted, held_truth),
        "reconstruction_macro": _mean_f1(predicted, held_truth),
        "reconstruction_fraction": float(FRACTIONS[best]),
        "n_precise": int(by_level[..., best].any(0).sum()),
    }


def _predict(
    levels: Levels, precise: Bool[np.ndarray, "n_concepts n_sides n_levels"], chosen: Sequence[int]
) -> "list[csr_matrix]":
    """Predictions (n_tokens, n_concepts) for each chosen level: 1 where a precise feature fires above that level."""
    from scipy.sparse import csr_matrix

    n_tokens, useful = levels.table.shape[0], np.any(precise, axis=0)
    predicted = [csr_matrix((n_tokens, len(precise)), dtype=np.int32) for _ in chosen]
    for part, tokens, classifiers in levels.blocks():
        sides, passed = np.divmod(classifiers, N_LEVELS)
        mine = slice(2 * part.start, 2 * part.stop)
        for i, level in enumerate(chosen):
            there = np.flatnonzero((passed >= level) & useful[mine, level][sides])
            ones, shape = np.ones(len(there), np.int32), (n_tokens, mine.stop - mine.start)
            fired = csr_matrix((ones, (tokens[there], sides[there])), shape=shape)
            predicted[i] = predicted[i] + fired @ csr_matrix(precise[:, mine, level].T.astype(np.int32))
    for matrix in predicted:
        matrix.data[:] = 1
    return predicted


def _pooled_f1(predicted: "csr_matrix", truth: "csr_matrix") -> float:
    whole = predicted.nnz + truth.nnz
    return 2 * int(predicted.multiply(truth).sum()) / whole if whole else math.nan


def _mean_f1(predicted: "csr_matrix", truth: "csr_matrix") -> float:
    hits, both = (np.asarray(m.sum(1)).ravel() for m in (predicted.multiply(truth), predicted + truth))
    some = both.nonzero()[0]
    return float((2 * hits[some] / both[some]).mean()) if len(some) else math.nan


def score_concepts(
    codes: CodeMatrix,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    train_frac: float = 0.5,
    min_count: int = 20,
    seed: int = 0,
    control_pairs: Sequence[tuple[str, str]] | None = None,
    baselines: Mapping[str, CodeMatrix] | None = None,
) -> ConceptScores:
    """Scores of features as classifiers of known concepts, chosen on training stories and scored on held-out ones.

    For each concept the best of all (feature, sign, threshold) by F1, with thresholds t f_max, t in {0, 0.1, ..., 0.9},
    f_max the largest code of that sign in training stories. Coverage and reconstruction are defined in
    arXiv:2408.00113. All scores are computed a second time with permuted labels (`ConceptScores.moved`), which gives
    the chance level of choosing the best of so many features. Unsigned codes have one sign, so none of their features
    can represent a pair of opposites.

    Args:
        codes: (n_tokens, d_sae), sparse or dense; a code fires where z != 0, and each sign is a classifier of its own.
        labels: which concepts are true of each token, as `TokenLabels.of` makes them; parents and opposites come from
            its concepts.
        doc_ids: story (document) of each token, needed where the labels do not have them; stories are split as a whole.
        train_frac: share of stories for training.
        min_count: fewest tokens of a concept on either side of the split; scores of rarer ones are NaN, with the
            reason.
        seed: of the split, and of the permuted labels.
        control_pairs: pairs of concepts that are not opposites, to compare the opposed pairs with; by
            default each one-sided concept with the next.
        baselines: other codes of the same tokens by name, such as those of `concept_baselines`.

    Raises:
        ValueError: where sizes disagree, stories cannot be split, or a control pair names no concept of the labels.
    """
    if min_count < 1:
        raise ValueError(f"`min_count` must be at least 1, got {min_count}.")
    given = TokenLabels.of(labels, doc_ids=doc_ids)
    stories = given.require_documents()
    is_train = split_documents(stories, train_frac, seed)
    truth = given.matrix.astype(np.int32)  # sums of booleans would stop at true
    train, held = truth[is_train], truth[~is_train]
    pairs = _pairs_of(given.concepts, control_pairs)
    world = _World(given.concepts, pairs, is_train, train, held, stories, min_count, seed)
    moved = replace(
        world, train=move_truth(train, stories[is_train], seed), held=move_truth(held, stories[~is_train], seed)
    )

    def judge(values: CodeMatrix, others: dict[str, ConceptScores]) -> ConceptScores:
        return _score(values, world, others, _score(values, moved, {}, None))

    return judge(codes, {name: judge(values, {}) for name, values in (baselines or {}).items()})


@dataclass(frozen=True, eq=False)
class _World:
    """Concept labels on the two sides of the split, with the pairs to score."""

    table: Sequence[Concept]
    pairs: list[tuple[str, str, bool]]
    """a, b, whether they are opposed"""
    is_train: Bool[np.ndarray, "n_tokens"]
    train: "csr_matrix"
    held: "csr_matrix"
    stories: Shaped[np.ndarray, "n_tokens"]
    min_count: int
    seed: int

    @cached_property
    def n_train(self) -> Int[np.ndarray, "n_concepts"]:
        return np.asarray(self.train.sum(0)).ravel()

    @cached_property
    def n_held(self) -> Int[np.ndarray, "n_concepts"]:
        return np.asarray(self.held.sum(0)).ravel()

    @cached_property
    def n_stories(self) -> tuple[int, int]:
        """On the training side, and on the other."""
        return len(np.unique(self.stories[self.is_train])), len(np.unique(self.stories[~self.is_train]))

    @cached_property
    def places(self) -> dict[str, int]:
        return {concept.name: c for c, concept in enumerate(self.table)}

    @property
    def scored(self) -> Bool[np.ndarray, "n_concepts"]:
        return np.minimum(self.n_train, self.n_held) >= self.min_count

    def reason(self, c: int) -> str:
        """Why a concept cannot be scored; empty where it can."""
        sides = {"training": self.n_train[c], "held-out": self.n_held[c]}
        few = " and ".join(side for side, n in sides.items() if n < self.min_count)
        return f"fewer than {self.min_count} tokens in {few} stories" if few else ""


def _score(
    codes: CodeMatrix, world: _World, baselines: dict[str, ConceptScores], moved: ConceptScores | None
) -> ConceptScores:
    """All scores of one dictionary: features chosen on training tokens, then scored on the others."""
    values, is_train = read_values(codes), world.is_train
    if len(is_train) != values.shape[0]:
        raise ValueError(f"`codes` must have a row for each of the {len(is_train)} tokens, got {values.shape[0]}.")
    seen, unseen = select_rows(values, is_train), select_rows(values, ~is_train)
    peaks = find_peaks(seen)
    levels, held = grade(seen, peaks), grade(unseen, peaks)
    counts = ClassifierCounts(*count_classifiers(levels, world.train), world.n_train, int(is_train.sum()))
    best = [best_classifier(counts, c) if ok else NOTHING for c, ok in enumerate(world.scored)]
    both = [best_pair(counts, world.places[a], world.places[b]) for a, b, _ in world.pairs]
    tested = _test(held, world, [*best, *itertools.chain(*both)])
    kappas = kappa_intervals(held, world.held, best, world.stories[~is_train], world.seed)
    return ConceptScores(
        concepts=_concept_rows(world, levels, counts, best, tested, Ranks(unseen), peaks, kappas),
        parents=_parent_rows(world, tested),
        pairs=_pair_rows(world, both, tested),
        **reconstruct_truth(levels, held, counts, world.train, world.held, world.scored),
        n_features=levels.n_features,
        l0=int(np.count_nonzero(unseen if isinstance(unseen, np.ndarray) else unseen.data)) / tested.n_tokens,
        n_train=counts.n_tokens,
        n_tokens=tested.n_tokens,
        n_train_stories=world.n_stories[0],
        n_stories=world.n_stories[1],
        min_count=world.min_count,
        baselines=baselines,
        moved=moved,
    )


def _test(held: Levels, world: _World, classifiers: Sequence[int]) -> ClassifierCounts:
    """How often chosen classifiers fire in held-out stories."""
    from scipy.sparse import csc_matrix

    hits = np.zeros((len(world.table), len(classifiers)), np.int64)
    fires = np.zeros(len(classifiers), np.int64)
    for start in range(0, len(classifiers), CLASSIFIERS_AT_ONCE):
        part = slice(start, start + CLASSIFIERS_AT_ONCE)
        tokens = [held.tokens(classifier) for classifier in classifiers[part]]
        fires[part] = [len(where) for where in tokens]
        rows, ends = np.concatenate(tokens), np.cumsum([0, *fires[part]])
        fired = csc_matrix((np.ones(len(rows), np.int32), rows, ends), shape=(world.held.shape[0], len(tokens)))
        hits[:, part] = (fired.T @ world.held).toarray().T
    return ClassifierCounts(hits, fires, world.n_held, world.held.shape[0])


def _concept_rows(
    world: _World,
    levels: Levels,
    counts: ClassifierCounts,
    best: list[int],
    tested: ClassifierCounts,
    ranks: Ranks,
    peaks: Float[np.ndarray, "n_features 2"],
    kappas: Float[np.ndarray, "n_concepts 3"],
) -> tuple[ConceptScore, ...]:
    """One row for each concept; its classifier has the concept's index among those tested."""
    train, held = world.train.tocsc(), world.held.tocsc()
    rows = []
    for c, (concept, classifier) in enumerate(zip(world.table, best, strict=True)):
        scores: dict[str, Any] = {}
        if world.scored[c]:
            scores |= {"f1": float(tested.f1(c)[c]), "recall": ratio(tested.hits[c, c], world.n_held[c])}
            scores |= {"f1_train": 0.0, "auroc": 0.5}
        if classifier != NOTHING:
            column, level = divmod(classifier, N_LEVELS)
            scores |= {"feature": column // 2, "side": -1 if column % 2 else 1, "fraction": float(FRACTIONS[level])}
            scores["threshold"] = scores["fraction"] * float(peaks[column // 2, column % 2])
            scores |= dict(zip(("kappa", "kappa_low", "kappa_high"), kappas[c].tolist(), strict=True))
            scores["precision"] = ratio(tested.hits[c, c], tested.fires[c])
            scores["auroc"] = ranks.auroc(column, held[:, [c]].indices)
            scores["f1_train"] = float(counts.f1(c)[classifier])
            true = np.zeros(levels.table.shape[0], bool)
            true[train[:, [c]].indices] = True
            scores["n_split"] = len(classifier_union(counts.hits[c], counts.fires, true, levels.tokens, levels.count))
        rows.append(
            ConceptScore(
                name=concept.name,
                kind=concept.kind,
                **scores,
                f1_always=ratio(2 * world.n_held[c], world.n_held[c] + tested.n_tokens),
                n_train=int(world.n_train[c]),
                n_tokens=int(world.n_held[c]),
                n_fires=int(tested.fires[c]),
                reason=world.reason(c),
            )
        )
    return tuple(rows)


def _parent_rows(world: _World, tested: ClassifierCounts) -> tuple[ParentScore, ...]:
    """One row for each concept with a parent, where both are scored; the parent's classifier has the parent's index."""
    rows = []
    for c, concept in enumerate(world.table):
        p = world.places.get(concept.parent or "")
        if p is None or not (world.scored[c] and world.scored[p]):
            continue
        rows.append(
            ParentScore(
                parent=world.table[p].name,
                child=concept.name,
                recall=ratio(tested.hits[c, p], world.n_held[c]),
                parent_recall=ratio(tested.hits[p, p], world.n_held[p]),
                parent_f1=float(tested.f1(p)[p]),
                n_tokens=int(world.n_held[c]),
                n_parent=int(world.n_held[p]),
            )
        )
    return tuple(rows)


def _pair_rows(world: _World, both: list[tuple[int, int]], tested: ClassifierCounts) -> tuple[PairScore, ...]:
    """One row for each pair; the two classifiers of each follow those of the concepts, in the pairs' order."""
    rows = []
    for i, ((a, b, opposed), (classifier, _)) in enumerate(zip(world.pairs, both, strict=True)):
        at, place = (world.places[a], world.places[b]), len(world.table) + 2 * i
        reasons = [f"{name}: {why}" for name, c in zip((a, b), at, strict=True) if (why := world.reason(c))]
        scores: dict[str, Any] = {}
        if not reasons:
            (scores["f1_a"], scores["f1_b"]) = f1 = [float(tested.f1(c)[place + j]) for j, c in enumerate(at)]
            (scores["kappa_a"], scores["kappa_b"]) = kappa = [
                float(tested.kappa(c)[place + j]) for j, c in enumerate(at)
            ]
            (scores["best_f1_a"], scores["best_f1_b"]) = best = [float(tested.f1(c)[c]) for c in at]
            shares = [mine > PAIR_SHARE * top for mine, top in zip(f1, best, strict=True)]
            scores["on_two_sides"] = min(kappa) > PAIR_KAPPA and all(shares)
            scores["feature"] = classifier // (2 * N_LEVELS) if classifier != NOTHING else None
            scores["side_of_a"] = -1 if classifier != NOTHING and (classifier // N_LEVELS) % 2 else 1
        sizes = [int(world.n_held[c]) for c in at]
        rows.append(
            PairScore(a=a, b=b, opposed=opposed, **scores, n_a=sizes[0], n_b=sizes[1], reason="; ".join(reasons))
        )
    return tuple(rows)


def _pairs_of(table: Sequence[Concept], control: Sequence[tuple[str, str]] | None) -> list[tuple[str, str, bool]]:
    """Each opposed pair once, the first of the table first, then the control pairs."""
    places = {concept.name: c for c, concept in enumerate(table)}
    opposed = [
        (concept.name, concept.opposite, True)
        for c, concept in enumerate(table)
        if concept.opposite is not None and c < places.get(concept.opposite, -1)
    ]
    if control is None:
        names = [concept.name for concept in table if concept.kind == "one-sided"]
        control = list(zip(names, names[1:] + names[:1], strict=True)) if len(names) > 1 else []
    for name in itertools.chain(*control):
        if name not in places:
            near = get_close_matches(name, places, n=5)
            raise ValueError(f"`control_pairs` must name concepts of the labels, got '{name}'; near it are {near}.")
    return opposed + [(a, b, False) for a, b in control]
