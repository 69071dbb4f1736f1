"""Rule-based labeling: for each sign of each feature the best rule on tokens, tested on held-out documents.

A rule is the predicate, pair or list of predicates with the highest F1. Several processes divide the features.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saelab.analysis.direct_logits import LogitLens
from saelab.functional.indices import FeatureIds, read_features
from saelab.functional.screening import largest_first
from saelab.labels.label import LabelKind, require_same_tokens
from saelab.labels.rules.contingency import (
    Counts,
    Judge,
    NextTokens,
    SideCounts,
    SideFirings,
    SplitCounts,
    Verdict,
    add_side_tokens,
    feature_blocks,
    one_ahead,
    q_values,
    read_columns,
)
from saelab.labels.rules.predicates import DISJOINT, Predicates, make_predicates
from saelab.labels.rules.rule_labels import NO_RULE, RuleLabel, RuleLabels, name_output, name_rule, same_word
from saelab.labels.rules.side_words import add_side_words
from saelab.stores.feature_store import FeatureStore
from saelab.training.ranks import RankGrid, Steps, run_together

Joined = Literal["", "and", "or"]
FRACTIONS = np.array([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9])
"""Levels: thresholds as shares of a feature side's largest |z| in training documents."""
HALF_COST = 0.0125
"""F1 that a level must gain for each halving of the firings it covers, because it describes less of the feature."""
PAIR_COST, PART_COST = 0.01, 0.02
"""F1 that a rule of several parts must gain over a single predicate, and for each doubling of its parts."""
GIVEN = ("own", "concept", "document")
FAVOR = 0.01
"""F1 by which the caller's own predicates are preferred to those found in the text."""
MIN_SHARE = 0.01
"""Share of a feature side's firings that a level must keep."""
N_BY_F1, N_BY_LIFT, LONGEST = 8, 6, 16
PAIR_ROWS = 768
"""Firings in training documents, drawn at random, on which pairs are selected."""
SIDES_AT_ONCE = 64
"""Feature sides whose counts are dense at a time."""
N_TOKENS = 400_000
"""Number of tokens that are used of a longer text."""
PART_SHARE = 0.25
"""Share of the covered firings that each part of a polysemantic feature must have."""
OVERLAP = 0.05
"""Share of the rarer part's tokens that may also be of the other part."""


@dataclass(frozen=True)
class Rule:
    """Predicates joined by "and" or "or" that predict where a feature side reaches a level."""

    parts: tuple[int, ...]
    """columns of the predicates"""
    joined: Joined
    level: int
    f1: float
    """F1 in training documents; of two parts, on the firings drawn"""


def choose_rules(
    counts: SideCounts,
    sides: SideFirings,
    split: SplitCounts,
    predicates: Predicates,
    min_count: int,
    seed: int,
    numbers: Int[np.ndarray, "n_sides"],
) -> list[Rule | None]:
    """For each feature side the rule with the highest F1 after costs; None where no predicate holds on enough firings.

    Args:
        counts: contingency counts of feature sides and predicates in training documents.
        sides: firings of each feature side, by level.
        split: the training documents.
        predicates: names and kinds of the predicates.
        min_count: number of firings that a level needs.
        seed: seed of the firings that pairs are selected on.
        numbers: number of each feature side, so that its draws are the same whatever other features are asked for.
    """
    found: list[Rule | None] = [None] * len(sides)
    live = np.flatnonzero(counts.fires[:, 0] >= min_count)  # no level of the others has enough firings
    for start in range(0, len(live), SIDES_AT_ONCE):
        chosen = live[start : start + SIDES_AT_ONCE]
        rules = _choose(counts.of(chosen), chosen, sides, split, predicates, min_count, seed, numbers)
        for side, rule in zip(chosen.tolist(), rules, strict=True):
            found[side] = rule
    return found


def _choose(
    counts: Counts,
    chosen: Int[np.ndarray, "n"],
    sides: SideFirings,
    split: SplitCounts,
    predicates: Predicates,
    min_count: int,
    seed: int,
    numbers: Int[np.ndarray, "n_sides"],
) -> list[Rule | None]:
    """The rules of some of the sides, whose counts are given."""
    favor = np.array([FAVOR * (kind in GIVEN) for kind in predicates.kinds])
    cost = _cost(counts.fires, min_count)
    best, scores = _singles(counts, favor, min_count)
    possible = np.isfinite(cost)
    families = [_lists(predicates.family(kind), counts, possible) for kind in DISJOINT]
    lists = [family for family in families if family is not None]
    levels = (np.maximum.reduce([scores, *(score for *_, score in lists)]) - cost).argmax(1)
    here = np.arange(len(chosen))
    f1, both, fires = counts.f1[here, levels], counts.both[here, levels], counts.fires[here, levels]
    near = _candidates(f1 + favor, both, fires, counts)
    found: list[Rule | None] = [None] * len(chosen)
    for side in np.flatnonzero(np.isfinite((scores - cost)[here, levels])).tolist():
        level = int(levels[side])
        j = int(best[side, level])
        options = [(float(scores[side, level]), Rule((j,), "", level, float(f1[side, j])))]
        options += [_of_list(side, level, *one) for one in lists]
        if max(score for score, _ in options) < 1 - PAIR_COST - PART_COST:
            own = int(chosen[side])
            rows, rng = sides.of(own, level), np.random.default_rng((seed, int(numbers[own]), 1))  # of its own
            if len(rows) > 4 * PAIR_ROWS:
                rows = rows[rng.integers(len(rows), size=4 * PAIR_ROWS)]
            options += _pairs(near[side], level, split.here(rows), int(fires[side]), split, favor, rng)
        found[side] = max(options, key=lambda option: option[0])[1]
    return found


def _cost(fires: Int[np.ndarray, "n_sides n_levels"], min_count: int) -> Float[np.ndarray, "n_sides n_levels"]:
    """The cost of each level in F1; infinite where too few firings reach it."""
    enough = fires >= np.maximum(min_count, MIN_SHARE * fires[:, :1])
    return np.where(enough, HALF_COST * np.log2(np.maximum(fires[:, :1], 1) / np.maximum(fires, 1)), np.inf)


def _singles(
    counts: Counts, favor: np.ndarray, min_count: int
) -> tuple[Int[np.ndarray, "n_sides n_levels"], Float[np.ndarray, "n_sides n_levels"]]:
    """The best single predicate of each level, and its score; the score is -inf where there is none."""
    scores = np.where(counts.both >= min(3, min_count), counts.f1 + favor, -np.inf)
    best = scores.argmax(2)
    return best, np.take_along_axis(scores, best[:, :, None], 2)[:, :, 0]


def _lists(
    family: list[int], counts: Counts, possible: Bool[np.ndarray, "n_sides n_levels"]
) -> tuple[Int[np.ndarray, "n_sides n_levels m"], np.ndarray, np.ndarray, np.ndarray] | None:
    """The best list of mutually exclusive predicates of one family: those with the highest F1, the most precise first.

    For each feature side and level: the members in order, how many of them to take, their joint F1 and its score, which
    is -inf where the level is not possible.
    """
    if len(family) < 2:
        return None
    m = min(LONGEST, len(family))
    columns = np.array(family)
    f1 = counts.f1[possible][:, columns]
    f1 = np.where(f1 > 0, f1, -np.arange(len(family)))  # in order, as equal ones are: ties take time
    chosen = columns[largest_first(torch.from_numpy(f1), m).numpy()]
    hits, size = np.take_along_axis(counts.both[possible], chosen, 1), counts.holds[chosen]
    order = np.argsort(-hits / np.maximum(size, 1), axis=1, kind="stable")
    chosen, hits, size = (np.take_along_axis(one, order, 1) for one in (chosen, hits, size))
    f1 = 2 * hits.cumsum(1) / np.maximum(counts.fires[possible][:, None] + size.cumsum(1), 1)
    scores = f1 - PAIR_COST - PART_COST * np.log2(np.arange(1, m + 1))
    scores[:, 0] = -np.inf
    at = scores.argmax(1)[:, None]
    f1, scores = (np.take_along_axis(one, at, 1)[:, 0] for one in (f1, scores))
    lengths, scores = _spread(at[:, 0] + 1, possible, 0.0), _spread(scores, possible, -np.inf)
    return _spread(chosen, possible, -1.0), lengths, _spread(f1, possible, 0.0), scores


def _spread(values: np.ndarray, places: np.ndarray, empty: float) -> np.ndarray:
    """Values at their places, and `empty` elsewhere."""
    found = np.full(places.shape + values.shape[1:], empty, values.dtype)
    found[places] = values
    return found


def _of_list(
    side: int, level: int, chosen: np.ndarray, lengths: np.ndarray, f1: np.ndarray, scores: np.ndarray
) -> tuple[float, Rule]:
    parts = chosen[side, level, : lengths[side, level]].tolist()
    return float(scores[side, level]), Rule(tuple(parts), "or", level, float(f1[side, level]))


def _candidates(
    scores: np.ndarray, both: np.ndarray, fires: np.ndarray, counts: Counts
) -> Int[np.ndarray, "n_sides m"]:
    """Predicates that pairs are built from: those with the highest F1, and those that hold far more often than by
    chance.
    """
    expected = fires[:, None] * counts.holds / counts.n_tokens
    lift = (both - expected) / np.sqrt(expected + 1)
    width = scores.shape[1]
    parts = [
        largest_first(torch.from_numpy(values), min(n, width)).numpy()
        for values, n in ((scores, N_BY_F1), (lift, N_BY_LIFT))
    ]
    return np.sort(np.concatenate(parts, axis=1), axis=1)


def _pairs(
    candidates: np.ndarray,
    level: int,
    rows: np.ndarray,
    n_fires: int,
    split: SplitCounts,
    favor: np.ndarray,
    rng: np.random.Generator,
) -> list[tuple[float, Rule]]:
    """The best conjunction and the best union of two predicates, with their scores."""
    if len(rows) > PAIR_ROWS:
        rows = rows[rng.integers(len(rows), size=PAIR_ROWS)]
    if len(rows) == 0:  # all that were drawn are of held-out documents
        return []
    columns = candidates[np.diff(candidates, prepend=-1) > 0]
    hits = split.bits.at(rows, columns).astype(np.float32)
    both = (hits.T @ hits) * (n_fires / len(rows))
    single, holds = both.diagonal(), split.holds[columns]
    shared = split.pairs[np.ix_(columns, columns)]
    unions = single[:, None] + single - both, holds[:, None] + holds - shared
    found: list[tuple[float, Rule]] = []
    for joined, (all_hits, size) in (("and", (both, shared)), ("or", unions)):
        f1 = np.triu(2 * all_hits / np.maximum(n_fires + size, 1), 1)
        i, j = divmod(int(f1.argmax()), len(columns))
        if i != j:
            pair = int(columns[i]), int(columns[j])
            score = float(f1[i, j]) - PAIR_COST - PART_COST + float(favor[list(pair)].min())
            found.append((score, Rule(pair, joined, level, float(f1[i, j]))))  # type: ignore[arg-type]
    return found


def label_by_rules(
    store: FeatureStore,
    predicates: Predicates | None = None,
    *,
    features: FeatureIds | None = None,
    lens: LogitLens | None = None,
    train_frac: float = 0.5,
    seed: int = 0,
    fdr: float = 0.05,
    min_skill: float = 0.25,
    min_count: int = 10,
    n_tokens: int = N_TOKENS,
    untrained: FeatureStore | None = None,
    mesh: Any = None,
) -> RuleLabels:
    """The best rule for each sign of each feature, chosen on training documents and scored on held-out ones.

    A rule is a predicate, a conjunction or union of two, or a list of tokens (words, pairs, ...) of one family. It
    predicts where |z| reaches a share of its largest (0, 0.2, 0.4, 0.6, 0.7, 0.8 or 0.9), chosen with it by F1 after
    small costs for thresholds and parts. Every chosen rule is tested once on held-out documents, against a null
    distribution of hits whose spread is measured by shifting the firings through the documents; q controls false
    discoveries over all rules. The label is "no good rule" unless q is at most `fdr` and the F1 above chance at least
    `min_skill`. Kinds of labels: input, position, output, polysemantic (two things on different tokens), none.

    Args:
        store: feature store that holds codes and text.
        predicates: conditions that rules are built from; None takes those of `make_predicates`. Where tokens are among
            them, tokens that predict single sides in training documents are added, however rare.
        features: numbers of the features; None takes all.
        lens: direct logit effects of the features; the tokens that a sign promotes are then tested as a rule for the
            next token.
        train_frac: share of the documents that rules are chosen on.
        seed: seed of the split and of all draws.
        fdr: largest false discovery rate of a good rule, in (0, 1).
        min_skill: smallest (F1 - F1_chance) / (1 - F1_chance) of a good rule.
        min_count: a side with fewer firings in training documents has no rule.
        n_tokens: tokens used, spread over the text where it is longer, so that memory does not grow with it; applies
            only without `predicates` (else give predicates of `store.spread(n)`, and that store).
        untrained: store of the same tokens by an untrained dictionary (`sl.collecting.harvest_untrained`), which is
            labeled in the same way; its share of good rules is in the result.
        mesh: `DeviceMesh` of processes that label together, each of which calls this with the same arguments; None is
            this process alone. Each labels a share of the features, and all return what one process would.

    Raises:
        ValueError: `predicates` have another length than the store, or a setting is out of range.
        RuntimeError: where another process failed.
    """
    ranks = RankGrid.of(mesh)
    with ranks.together():
        store, untrained, predicates = _prepare(store, untrained, predicates, n_tokens)
        wanted = np.unique(read_features(range(store.d_sae) if features is None else features, store.d_sae))
        settings: dict[str, Any] = {"train_frac": train_frac, "seed": seed, "fdr": fdr}
        settings |= {"min_skill": min_skill, "min_count": min_count}
        if not 0 < fdr < 1 or min_count < 1 or not 0 <= min_skill <= 1:
            raise ValueError(
                f"`fdr` and `min_skill` must be in 0..1 and `min_count` at least 1, got {fdr}, {min_skill}, "
                f"{min_count}."
            )
        facts = {"store": store.fingerprint, "features": wanted.tolist(), "predicates": predicates.names}
        facts |= {"untrained store": None if untrained is None else untrained.fingerprint}
    ranks.require_equal(facts | settings)
    floor = None
    if untrained is not None:
        floor = _floor_of(label_by_rules(untrained, predicates, features=features, mesh=mesh, **settings))
    is_train = store.split(train_frac, seed)
    predicates = (add_side_words if store.of_documents else add_side_tokens)(store, predicates, is_train, ranks)
    with ranks.together():
        work = _Work(store, predicates, is_train, lens, min_count, seed)
    drafts: list[_Draft] = []

    def search() -> Steps:
        for counted in one_ahead(work.count, work.blocks(wanted[ranks.own(len(wanted))])):
            drafts.extend(work.label(*counted))
            yield

    run_together(search(), ranks)
    rows, n_tested = _decide(work, drafts, fdr, min_skill, ranks)
    return RuleLabels(
        rows=rows, n_predicates=len(predicates), n_tested=n_tested, **settings, n_train=work.train.n_tokens,
        n_tokens=work.held.n_tokens, signed=store.signed, source=store.folder.resolve().name, untrained=floor,
        counted=store.counted,
    )  # fmt: skip


def _prepare(
    store: FeatureStore, untrained: FeatureStore | None, predicates: Predicates | None, n_tokens: int
) -> tuple[FeatureStore, FeatureStore | None, Predicates]:
    """The tokens that are used, and conditions on them; ValueError where they do not fit."""
    if predicates is None:
        store, untrained = store.spread(n_tokens), None if untrained is None else untrained.spread(n_tokens)
        predicates = make_predicates(store)
    if untrained is not None:
        require_same_tokens(store, untrained)
    if (n := predicates.matrix.shape[0]) != len(store):
        raise ValueError(f"`predicates` must have a row for each of the {len(store)} {store.counted}, got {n}.")
    return store, untrained, predicates


def _decide(
    work: "_Work", drafts: "list[_Draft]", fdr: float, min_skill: float, ranks: RankGrid
) -> tuple[tuple[RuleLabel, ...], int]:
    """The rows of all processes' drafts by feature, the positive sign first, and how many rules were tested.

    False discoveries are controlled over all of them, so that each process has all counts.
    """
    own = [(draft.side, v.hits, v.fires, v.holds, v.spread) for draft in drafts for v in draft.verdicts]
    counts = np.concatenate(ranks.gather_arrays(np.array(own, float).reshape(-1, 5)))
    counts = counts[np.argsort(counts[:, 0], kind="stable")]
    p, q = q_values(counts[:, 1:], work.held.n_tokens)
    rows = []
    for draft in drafts:
        start = int(np.searchsorted(counts[:, 0], draft.side))
        part = slice(start, start + len(draft.verdicts))
        rows.append(work.decide(draft, p[part], q[part], fdr, min_skill))
    if not ranks.alone:
        told = ranks.gather_json([vars(row) for row in rows])
        rows = [RuleLabel(**row | {"parts": tuple(row["parts"])}) for part in told for row in part]
        rows.sort(key=lambda row: (row.feature, -row.sign))
    return tuple(rows), len(q)


def _floor_of(found: RuleLabels) -> dict[str, float | int]:
    """Number of sides, share of good rules and median F1 of an untrained dictionary."""
    f1 = [row.f1 for row in found.good]
    n = max(1, len(found.rows))
    return {"n_sides": len(found.rows), "good": len(f1) / n, "f1": float(np.median(f1)) if f1 else float("nan")}


@dataclass(frozen=True, eq=False)
class _Draft:
    """A feature side with its tested rules, before false discoveries are controlled."""

    feature: int
    sign: int
    peak: float
    n_firings: int
    rule: Rule | None
    verdicts: tuple[Verdict, ...]
    """results of the rule and of the promoted tokens, those that exist, in this order"""
    promoted: tuple[str, ...]
    disjoint: bool
    """whether two parts share no token, each with its part of the firings"""

    @property
    def side(self) -> int:
        """Number of the side, which seeds its draws."""
        return 2 * self.feature + (self.sign < 0)


class _Work:
    """Data shared by all features."""

    def __init__(
        self,
        store: FeatureStore,
        predicates: Predicates,
        is_train: np.ndarray,
        lens: LogitLens | None,
        min_count: int,
        seed: int,
    ) -> None:
        self.store, self.predicates, self.is_train = store, predicates, is_train
        self.min_count, self.seed = min_count, seed
        with ThreadPoolExecutor(max_workers=1) as background:
            train = background.submit(SplitCounts.prepare, predicates, is_train)
            self.held = SplitCounts(predicates, ~is_train)
            self.judge = Judge(self.held, store.doc_ids, seed)
            self.next = NextTokens(store, lens, self.held) if lens is not None else None
            self.train = train.result()

    def blocks(self, features: Int[np.ndarray, "n"]) -> Iterator[Int[np.ndarray, "m"]]:
        """Features in increasing order, cut into blocks."""
        for start, stop in feature_blocks(self.store):
            first, end = np.searchsorted(features, [start, stop])
            if first < end:
                yield features[first:end]

    def count(self, wanted: Int[np.ndarray, "m"]) -> tuple[Int[np.ndarray, "m"], SideFirings, SideCounts]:
        """Read the codes of a block of features, and count them against the predicates in training documents."""
        sides = SideFirings.sort(read_columns(self.store, wanted), self.is_train, FRACTIONS)
        return wanted, sides, self.train.count(sides)

    def label(self, wanted: Int[np.ndarray, "m"], sides: SideFirings, counts: SideCounts) -> Iterator[_Draft]:
        """Choose and test the rules of a block; sides that never fire are left out."""
        numbers = (2 * wanted[:, None] + np.arange(2)).ravel()
        rules = choose_rules(counts, sides, self.train, self.predicates, self.min_count, self.seed, numbers)
        for side, (rule, in_training) in enumerate(zip(rules, counts.fires[:, 0].tolist(), strict=True)):
            if n := len(sides.of(side, 0)):
                yield self._draft(int(wanted[side // 2]), 1 - 2 * (side % 2), side, sides, rule, n - in_training)

    def _draft(
        self, feature: int, sign: int, side: int, sides: SideFirings, rule: Rule | None, n_firings: int
    ) -> _Draft:
        fires, number = self.held.here(sides.of(side, rule.level if rule else 0)), 2 * feature + (sign < 0)
        verdicts, codes = list[Verdict](), sides.codes(side)
        disjoint, words = False, list[str]()
        if rule is not None:
            marks = self.held.mark(rule.parts, rule.joined)
            verdicts.append(self.judge.test(marks.__getitem__, int(np.count_nonzero(marks)), fires, number, codes))
            disjoint = self._disjoint(rule, fires)
        if self.next is not None:
            words, ids = self.next.promoted(feature, sign)
            if len(ids) and len(fires):
                verdicts.append(self.judge.test(*self.next.follow(ids), fires, number, codes))
        return _Draft(feature, sign, float(sides.peaks[side]), n_firings, rule, tuple(verdicts), tuple(words), disjoint)

    def _disjoint(self, rule: Rule, fires: np.ndarray) -> bool:
        if rule.joined != "or" or len(rule.parts) != 2 or same_word(*(self.predicates.names[j] for j in rule.parts)):
            return False
        a, b = (self.held.mark([j])[fires] for j in rule.parts)
        apart = self.train.pairs[rule.parts] <= OVERLAP * self.train.holds[list(rule.parts)].min()
        return bool(apart and min(a.sum(), b.sum()) >= PART_SHARE * max(1, (a | b).sum()))

    def decide(self, draft: _Draft, p: np.ndarray, q: np.ndarray, fdr: float, min_skill: float) -> RuleLabel:
        """The row of a feature side: its rule, or its promoted tokens where these are the better label."""
        tried = list(zip(draft.verdicts, p.tolist(), q.tolist(), strict=True))
        good = [one for one in tried if one[2] <= fdr and one[0].skill >= min_skill]
        if not tried:
            return RuleLabel(feature=draft.feature, sign=draft.sign, text=NO_RULE, kind="none", rule="")
        best = max(good or tried[:1], key=lambda one: one[0].f1)
        is_rule = draft.rule is not None and best is tried[0]
        level = draft.rule.level if draft.rule is not None else 0
        text, kind, parts, joined = self._describe(draft) if is_rule else _describe_output(draft)
        verdict = best[0]
        names = ("f1", "f1_chance", "precision", "recall", "auroc", "lift", "r")
        scores = {name: float(getattr(verdict, name)) for name in names}
        return RuleLabel(
            feature=draft.feature,
            sign=draft.sign,
            text=text if good else NO_RULE,
            kind=kind if good else "none",
            rule=text,
            parts=parts,
            joined=joined,
            fraction=float(FRACTIONS[level]),
            threshold=float(FRACTIONS[level]) * draft.peak,
            n_firings=verdict.fires,
            share=verdict.fires / draft.n_firings if draft.n_firings else float("nan"),
            f1_train=draft.rule.f1 if is_rule and draft.rule is not None else float("nan"),
            p=best[1],
            q=best[2],
            **scores,
        )

    def _describe(self, draft: _Draft) -> tuple[str, LabelKind, tuple[str, ...], str]:
        assert draft.rule is not None
        names = tuple(self.predicates.names[j] for j in draft.rule.parts)
        kinds = {self.predicates.kinds[j] for j in draft.rule.parts}
        kind: LabelKind = "position" if kinds == {"position"} else "polysemantic" if draft.disjoint else "input"
        return name_rule(names, draft.rule.joined), kind, names, draft.rule.joined


def _describe_output(draft: _Draft) -> tuple[str, LabelKind, tuple[str, ...], str]:
    return name_output(draft.promoted), "output", draft.promoted, "next"
