"""`propose_hypotheses`: what tells two corpora apart, in words, scored on documents that nothing was chosen on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saelab.corpora.corpus_diffing import FeatureDifference, diff_corpora
from saelab.corpora.document_features import DocumentFeatures, Documents, SideId, as_documents, require_same_dictionary
from saelab.functional.statistics import adjust, auroc, correlation, fit_balanced_probe
from saelab.functional.two_samples import Effect, cliffs_delta, permutation_p
from saelab.stores.corpus import choose_documents
from saelab.stores.feature_names import FeatureNames
from saelab.stores.results import Result, format_table

ALIKE = 0.7
"""correlation of firing over documents from which on a feature says the same as one that was chosen"""
N_RANDOM = 20
SAME_RATE = 0.02
"""shares of documents that differ by less are called the same: the codes are what is larger"""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One difference between two corpora in words, with the rates and scores of held-out documents."""

    feature: int
    sign: int
    """1 or -1: the side of the feature"""
    text: str
    """sentence that can be read alone"""
    more_in: str
    """name of the corpus with more of it, in the half that it was chosen on"""
    chosen_delta: Effect
    """Cliff's delta in the half that it was chosen on, which choosing has made larger"""
    rate_a: float
    """share of a's held-out documents in which the side fires"""
    rate_b: float
    delta: Effect
    """Cliff's delta in held-out documents, above 0 where b has more"""
    p: float
    """two-sided p value in held-out documents"""
    q: float
    """false discovery rate among the hypotheses, in held-out documents"""
    holds: bool
    """whether held-out documents differ in the same direction, with a `q` of at most `fdr`"""


@dataclass(frozen=True, kw_only=True)
class Hypotheses(Result):
    """What tells two corpora apart, in words, the surest first; scores are of documents that nothing was chosen on."""

    names: tuple[str, str]
    """what the corpora are called"""
    n_chosen_on: tuple[int, int]
    """documents of a and b that hypotheses were chosen on"""
    n_held_out: tuple[int, int]
    """documents of a and b that they were scored on"""
    fdr: float
    rows: tuple[Hypothesis, ...]
    auroc: float
    """area under the ROC curve of a logistic regression on all of them, in held-out documents; 0.5 is chance"""
    auroc_random: tuple[float, float]
    """mean and largest area of as many sides drawn at random, 20 times"""

    def __str__(self) -> str:
        held = sum(row.holds for row in self.rows)
        head = f"{held} of {len(self.rows)} hypotheses hold in {sum(self.n_held_out):,} held-out documents"
        if self.rows:
            head += f"; together they tell {self.names[1]} from {self.names[0]} with AUROC {self.auroc:.3f}"
            head += f" (random features {self.auroc_random[0]:.3f}, at most {self.auroc_random[1]:.3f})"
        table = [["holds", "Cliff's delta", "q", "hypothesis"]]
        table += [["yes" if row.holds else "no", str(row.delta), f"{row.q:.2g}", row.text] for row in self.rows]
        return "\n".join([head, *(format_table(table, left=(0, 3)) if self.rows else ())])


def propose_hypotheses(
    a: Documents,
    b: Documents,
    labels: FeatureNames | None = None,
    *,
    n: int = 5,
    names: tuple[str, str] = ("a", "b"),
    train_frac: float = 0.5,
    fdr: float = 0.05,
    min_documents: int = 5,
    seed: int = 0,
) -> Hypotheses:
    """What tells two corpora apart, in the words of features' labels, scored on documents that nothing was chosen on.

    On some documents of each corpus the discoveries of `diff_corpora` are taken in their order, and those left out that
    fire in much the same documents (correlation 0.7) as an earlier one. Each is then tested on the other documents, and
    a logistic regression on all of them, fitted on the first documents, is scored there.

    Args:
        a: feature store of one corpus, or its documents from `pool_documents`.
        b: that of the other, coded by the same SAE.
        labels: names of features, as texts by feature or a label store.
        n: most hypotheses.
        names: what the corpora are called in the texts.
        train_frac: share of each corpus's documents on which hypotheses are chosen.
        fdr: false discovery rate up to which a hypothesis is proposed, and up to which it holds.
        min_documents: sides that fire in fewer of the documents they are chosen on are not tested.
        seed: of the split and of the random features.

    Raises:
        ValueError: corpora of different SAEs, or too few documents for two halves.
    """
    a, b = as_documents(a), as_documents(b)
    require_same_dictionary(a, b)
    if min(len(a), len(b)) < 4 or n < 1:
        raise ValueError(
            f"Hypotheses need at least 4 documents of each corpus and `n` of at least 1, got {len(a)}, {len(b)} and "
            f"{n}; half of the documents are held out."
        )
    (early_a, late_a), (early_b, late_b) = (_split(one, train_frac, seed + i) for i, one in enumerate((a, b)))
    found = diff_corpora(early_a, early_b, labels=labels, fdr=fdr, min_documents=min_documents, n_null=0)
    chosen = _choose(found.discoveries, early_a, early_b, n)
    rows = _score(chosen, late_a, late_b, names, fdr)
    tested = [(row.feature, row.sign) for row in found.rows]
    areas = _predict([(row.feature, row.sign) for row in rows], tested, (early_a, early_b), (late_a, late_b), seed)
    return Hypotheses(
        names=names,
        n_chosen_on=(len(early_a), len(early_b)),
        n_held_out=(len(late_a), len(late_b)),
        fdr=fdr,
        rows=tuple(rows),
        auroc=areas[0],
        auroc_random=areas[1:],
    )


def _split(documents: DocumentFeatures, train_frac: float, seed: int) -> tuple[DocumentFeatures, DocumentFeatures]:
    early = choose_documents(np.arange(len(documents)), train_frac, seed)
    return documents.rows(early), documents.rows(~early)


def _choose(
    found: Sequence[FeatureDifference], a: DocumentFeatures, b: DocumentFeatures, n: int
) -> list[FeatureDifference]:
    """The first discoveries that do not fire in much the same documents as an earlier one."""
    chosen: list[FeatureDifference] = []
    fires: list[Float[np.ndarray, n_documents]] = []
    for row in found:
        own = (_values((row.feature, row.sign), a, b) > 0).astype(np.float64)
        if not any(abs(correlation(own, other)) >= ALIKE for other in fires):
            chosen.append(row)
            fires.append(own)
        if len(chosen) == n:
            break
    return chosen


def _values(side: SideId, a: DocumentFeatures, b: DocumentFeatures) -> Float[np.ndarray, "n_documents"]:
    """One side's magnitudes in the documents of a, then of b."""
    return np.concatenate([one.side(side) for one in (a, b)])


def _score(
    chosen: Sequence[FeatureDifference], a: DocumentFeatures, b: DocumentFeatures, names: tuple[str, str], fdr: float
) -> list[Hypothesis]:
    in_b = (np.arange(len(a) + len(b)) >= len(a))[None]
    log_p, deltas, rates = [], [], []
    for row in chosen:
        values = _values((row.feature, row.sign), a, b)
        fires = np.flatnonzero(values)
        log_p.append(float(permutation_p(values[fires], fires, in_b)[0]))
        of_a, of_b = (own[own > 0] for own in (values[: len(a)], values[len(a) :]))
        deltas.append(cliffs_delta(of_a, len(a), of_b, len(b)))
        rates.append((len(of_a) / len(a), len(of_b) / len(b)))
    p = np.exp(np.array(log_p))
    q = adjust(p)
    return [
        Hypothesis(
            feature=row.feature,
            sign=row.sign,
            text=_word(row, rates[i], names),
            more_in=names[row.more_in == "b"],
            chosen_delta=row.delta,
            rate_a=rates[i][0],
            rate_b=rates[i][1],
            delta=deltas[i],
            p=float(p[i]),
            q=float(q[i]),
            holds=bool(q[i] <= fdr and (deltas[i].value > 0) == (row.delta.value > 0)),
        )
        for i, row in enumerate(chosen)
    ]


def _word(row: FeatureDifference, rates: tuple[float, float], names: tuple[str, str]) -> str:
    more = row.more_in == "b"
    what = row.name or f"feature {row.feature}{'' if row.sign > 0 else ', negative'}"
    if abs(rates[0] - rates[1]) < SAME_RATE:
        return f"{names[more]} has stronger: {what} (in {rates[more]:.0%} of its documents, as in {names[not more]})"
    return (
        f"{names[more]} has more of: {what} (in {rates[more]:.0%} of its documents; of {names[not more]} in "
        f"{rates[not more]:.0%})"
    )


def _predict(
    sides: Sequence[SideId],
    tested: Sequence[SideId],
    early: tuple[DocumentFeatures, DocumentFeatures],
    late: tuple[DocumentFeatures, DocumentFeatures],
    seed: int,
) -> tuple[float, float, float]:
    """Held-out AUROC of a logistic regression on some sides; mean and maximum of those of as many random ones."""
    if not sides:
        return 0.5, 0.5, 0.5
    rng = np.random.default_rng(seed)
    draws = [rng.choice(len(tested), len(sides), replace=False).tolist() for _ in range(N_RANDOM)]
    areas = [_area([tested[i] for i in drawn], early, late) for drawn in draws]
    return _area(sides, early, late), float(np.mean(areas)), max(areas)


def _area(
    sides: Sequence[SideId],
    early: tuple[DocumentFeatures, DocumentFeatures],
    late: tuple[DocumentFeatures, DocumentFeatures],
) -> float:
    x, x_late = (np.stack([_values(side, *half) for side in sides], axis=1) for half in (early, late))
    y, y_late = (np.arange(len(half[0]) + len(half[1])) >= len(half[0]) for half in (early, late))
    scale = np.maximum(x.max(0), 1e-9)
    return auroc(x_late / scale @ fit_balanced_probe(x / scale, y, solver="lbfgs"), y_late)
