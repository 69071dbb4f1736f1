"""Rule-based labelling: for each sign of each feature the best rule on tokens, tested on held-out documents."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from saelab.analyses.lens import LogitLens
from saelab.functional.feature_ids import FeatureIds, read_features
from saelab.labelling.choosing import FRACTIONS, Rule, choose_rules
from saelab.labelling.contingency import Counts, Side, Units, feature_blocks
from saelab.labelling.floors import require_same_tokens
from saelab.labelling.judging import Judge, NextTokens, Verdict, q_values
from saelab.labelling.label import Kind
from saelab.labelling.naming import alike, name_output, name_rule
from saelab.labelling.predicates import Predicates, make_predicates
from saelab.labelling.rule_labels import NO_RULE, RuleLabel, RuleLabels
from saelab.labelling.side_tokens import add_side_tokens
from saelab.stores.features import FeatureStore

N_TOKENS = 400_000
"""Number of tokens that are used of a longer text."""
T = TypeVar("T")
U = TypeVar("U")
PART_SHARE = 0.25
"""Share of the covered firings that each part of a polysemantic feature must have."""
OVERLAP = 0.05
"""Share of the rarer part's tokens that may also be of the other part."""


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
        untrained: store of the same tokens by an untrained dictionary (`sl.harvest_untrained`), which is labelled in
            the same way; its share of good rules is in the result.

    Raises:
        ValueError: `predicates` have another length than the store, or a setting is out of range.
    """
    if predicates is None:
        store, untrained = store.spread(n_tokens), None if untrained is None else untrained.spread(n_tokens)
        predicates = make_predicates(store)
    if untrained is not None:
        require_same_tokens(store, untrained)
    if predicates.matrix.shape[0] != len(store):
        raise ValueError(
            f"`predicates` must have a row for each of the {len(store)} tokens, got {predicates.matrix.shape[0]}."
        )
    if not 0 < fdr < 1 or min_count < 1 or not 0 <= min_skill <= 1:
        raise ValueError(
            f"`fdr` and `min_skill` must be in 0..1 and `min_count` at least 1, got {fdr}, {min_skill}, {min_count}."
        )
    floor = None
    if untrained is not None:
        floor = _floor_of(
            label_by_rules(
                untrained, predicates, features=features, train_frac=train_frac, seed=seed, fdr=fdr,
                min_skill=min_skill, min_count=min_count,
            )
        )  # fmt: skip
    is_train = store.split(train_frac, seed)
    predicates = add_side_tokens(store, predicates, is_train)
    work = _Work(store, predicates, is_train, lens, min_count, seed)
    drafts = [draft for counted in _one_ahead(work.count, work.blocks(features)) for draft in work.label(*counted)]

    p, q = q_values([verdict for draft in drafts for verdict in draft.verdicts])
    rows, at = [], 0
    for draft in drafts:
        stop = at + len(draft.verdicts)
        rows.append(work.decide(draft, p[at:stop], q[at:stop], fdr, min_skill))
        at = stop
    return RuleLabels(
        rows=tuple(rows), n_predicates=len(predicates), n_tested=len(q), fdr=fdr, min_skill=min_skill,
        min_count=min_count, train_frac=train_frac, seed=seed, n_train=work.train.n_tokens,
        n_tokens=work.held.n_tokens, signed=store.signed, source=str(store.folder), untrained=floor,
    )  # fmt: skip


def _floor_of(found: RuleLabels) -> dict[str, float]:
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
        self.train, self.held = Side(predicates, is_train), Side(predicates, ~is_train)
        self.judge = Judge(self.held, store.doc_ids, seed)
        self.next = NextTokens(store, lens, self.held) if lens is not None else None

    def blocks(self, features: FeatureIds | None) -> Iterator[Int[np.ndarray, "m"]]:
        """Blocks of features: of all of them, or of those asked for."""
        for start, stop in feature_blocks(self.store):
            wanted = np.arange(start, stop)
            if features is not None:
                wanted = np.intersect1d(wanted, read_features(features, self.store.d_sae))
            if len(wanted):
                yield wanted

    def count(self, wanted: Int[np.ndarray, "m"]) -> tuple[Int[np.ndarray, "m"], Units, Counts]:
        """Read the codes of a block of features, and count them against the predicates in training documents."""
        start, stop = int(wanted[0]), int(wanted[-1]) + 1
        columns = self.store.columns(start, stop)
        columns = columns if len(wanted) == stop - start else columns[:, wanted - start]
        units = Units.sort(columns, self.is_train, FRACTIONS)
        return wanted, units, self.train.count(units)

    def label(self, wanted: Int[np.ndarray, "m"], units: Units, counts: Counts) -> Iterator[_Draft]:
        """Choose and test the rules of a block; sides that never fire are left out."""
        rules = choose_rules(counts, units, self.train, self.predicates, self.min_count, self.seed)
        for unit, rule in enumerate(rules):
            if len(units.of(unit, 0)):
                yield self._draft(int(wanted[unit // 2]), 1 - 2 * (unit % 2), unit, units, rule)

    def _draft(self, feature: int, sign: int, unit: int, units: Units, rule: Rule | None) -> _Draft:
        number = 2 * feature + (sign < 0)
        fires = self.held.here(units.of(unit, rule.level if rule else 0))
        verdicts: list[Verdict] = []
        disjoint, words = False, list[str]()
        if rule is not None:
            marks = self.held.mark(rule.parts, rule.joined)
            verdicts.append(self.judge.test(marks.__getitem__, int(np.count_nonzero(marks)), fires, number))
            disjoint = self._disjoint(rule, fires)
        if self.next is not None:
            words, ids = self.next.promoted(feature, sign)
            if len(ids) and len(fires):
                verdicts.append(self.judge.test(*self.next.follow(ids), fires, number))
        n_firings = int(np.count_nonzero(~self.is_train[units.of(unit, 0)]))
        return _Draft(feature, sign, float(units.peaks[unit]), n_firings, rule, tuple(verdicts), tuple(words), disjoint)

    def _disjoint(self, rule: Rule, fires: np.ndarray) -> bool:
        if rule.joined != "or" or len(rule.parts) != 2 or alike(*(self.predicates.names[j] for j in rule.parts)):
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
        scores = {
            name: float(getattr(verdict, name)) for name in ("f1", "f1_chance", "precision", "recall", "auroc", "lift")
        }
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

    def _describe(self, draft: _Draft) -> tuple[str, Kind, tuple[str, ...], str]:
        assert draft.rule is not None
        names = tuple(self.predicates.names[j] for j in draft.rule.parts)
        kinds = {self.predicates.kinds[j] for j in draft.rule.parts}
        kind: Kind = "position" if kinds == {"position"} else "polysemantic" if draft.disjoint else "input"
        return name_rule(names, draft.rule.joined), kind, names, draft.rule.joined


def _describe_output(draft: _Draft) -> tuple[str, Kind, tuple[str, ...], str]:
    return name_output(draft.promoted), "output", draft.promoted, "next"


def _one_ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Results of `work` for each item in order, the next one computed in the background, as it leaves the interpreter
    free.
    """
    with ThreadPoolExecutor(max_workers=1) as background:
        waiting: deque[Future[U]] = deque()
        for item in items:
            waiting.append(background.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
