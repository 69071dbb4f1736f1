"""Page sections that compare dictionaries by how well their features detect known concepts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saelab.evaluation.concept_scores import ConceptScore, ConceptScores, PairScore
from saelab.pictures.corpus import Corpus, examples
from saelab.pictures.figures import Bar, draw_comparison
from saelab.pictures.page import Scripted, decimal, escape, paragraph, section, table
from saelab.pictures.tokens import colour

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True, eq=False)
class Trial:
    """A trained dictionary with its codes of the corpus and its concept scores."""

    name: str
    codes: "csr_matrix"
    """(n_tokens, d_sae)"""
    scores: ConceptScores
    fvu: float
    """fraction of variance unexplained on held-out activations"""
    signed: bool = False
    """whether its codes have both signs"""

    def row(self, concept: str) -> ConceptScore:
        """The scores of one concept."""
        return next(row for row in self.scores.concepts if row.name == concept)


def tabulate(trials: Sequence[Trial], baselines: dict[str, ConceptScores]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison table, trained dictionaries first."""
    rows = [_compare(trial.name, trial.scores, trial.fvu) for trial in trials]
    return HEADER, rows + [_compare(name, scores, math.nan) for name, scores in baselines.items()]


HEADER = [
    "", "latents", "L0", "FVU", "coverage", "AUROC", "reconstruction",
    "parent recall", "parent F1", "opposed", "control",
]  # fmt: skip


def show_comparison(trials: Sequence[Trial], baselines: dict[str, ConceptScores]) -> Scripted:
    """The section with findings in sentences, the table and the figure."""
    bars = [_bar(trial.name, trial.scores, True) for trial in trials]
    bars += [_bar(name, scores, False) for name, scores in baselines.items()]
    header, rows = tabulate(trials, baselines)
    figure = draw_comparison(bars)
    shown = section(
        "Comparison",
        *(paragraph(finding) for finding in find(trials, baselines)),
        table(header, rows, frozenset(trial.name for trial in trials)),
        f"<figure>{figure}<figcaption>{escape(CAPTION)}</figcaption></figure>",
        paragraph(READING, "small soft"),
    )
    return Scripted.of(shown, figure)


CEILING = "probe"  # the baseline that was given the truth
CAPTION = "The thin mark in the right panel is the share of control pairs. All three run from 0 to 1; more is better."
READING = (
    "Coverage is the mean F1 of each concept's best feature. Reconstruction is the pooled F1 of all concepts as "
    "told by the features that are precise for them. Parent recall is how often the feature of a class fires "
    "where one of its members is named; read it beside the F1 of those features. A pair counts where one feature "
    "tells one concept by its positive and the other by its negative side; control pairs are pairs that oppose "
    "nothing. Features and thresholds were chosen on some of the stories and scored on others. The linear probe, "
    "where there is one, was given the truth and is a ceiling, not a rival."
)


def find(trials: Sequence[Trial], baselines: dict[str, ConceptScores]) -> list[str]:
    """The main findings as sentences, whichever way the numbers fall."""
    first = trials[0].scores
    pairs = ", ".join(f"{trial.name} {trial.scores.n_opposed_on_two_sides}" for trial in trials)
    control = ", ".join(f"{trial.name} {trial.scores.n_control_on_two_sides}" for trial in trials)
    parents = ", ".join(f"{trial.name} {decimal(trial.scores.parent_recall)}" for trial in trials)
    return [
        _rank(trials, baselines),
        f"Of {len(first.opposed_pairs)} opposed pairs on the two sides of one feature: {pairs}. "
        f"Of {len(first.control_pairs)} control pairs: {control}.",
        f"Recall of the parent where a child is named: {parents}. One seed: small differences may be chance.",
    ]


def _rank(trials: Sequence[Trial], baselines: dict[str, ConceptScores]) -> str:
    best = max(trials, key=lambda trial: _known(trial.scores.coverage))
    said = f"{best.name} covers the concepts best (mean F1 {decimal(best.scores.coverage)})"
    rivals = {name: scores.coverage for name, scores in baselines.items() if name != CEILING}
    if not rivals:
        return said + "."
    name = max(rivals, key=lambda rival: _known(rivals[rival]))
    n_above = sum(trial.scores.coverage > rivals[name] for trial in trials)
    return f"{said}; {n_above} of {len(trials)} dictionaries beat the best baseline, {name} ({decimal(rivals[name])})."


def show_features(corpus: Corpus, trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Cards of an opposed pair on one signed feature, if there is one, and of each named concept."""
    pair = next((card for trial in trials if trial.signed if (card := _pair_card(corpus, trial))), "")
    cards = [_concept_card(corpus, trials, name) for name in names]
    return section("Features and where they fire", paragraph(LEGEND, "small soft"), pair, *cards)


LEGEND = (
    "Colour is the activation of one feature, orange for positive and blue for negative; the concept truly holds "
    "of underlined tokens. A good feature colours what is underlined and nothing else. The concepts were chosen "
    "beforehand, not by their scores; the dictionary shown is the one that tells the concept best on the stories "
    "that features were chosen on. Point at a token for its value and all that is true of it. Neither a "
    "dictionary nor a threshold was fitted to these stories."
)


def show_failures(trials: Sequence[Trial], baselines: dict[str, ConceptScores], n: int = 15) -> str:
    """The concepts with the lowest scores in even the best dictionary, and those that could not be scored."""
    scored = trials[0].scores.scored
    best = {row.name: max(_known(trial.row(row.name).f1) for trial in trials) for row in scored}
    worst = sorted(scored, key=lambda row: best[row.name])[:n]
    ceilings = {
        name: {row.name: row.f1 for row in scores.concepts} for name, scores in baselines.items() if name == CEILING
    }
    header = ["concept", "kind", "tokens", *(trial.name for trial in trials), *ceilings]
    rows = [
        [row.name, row.kind, f"{row.n_tokens:,}", *(decimal(trial.row(row.name).f1) for trial in trials)]
        + [decimal(ceiling[row.name]) for ceiling in ceilings.values()]
        for row in worst
    ]
    n_low, n_left = sum(f1 < 0.5 for f1 in best.values()), len(trials[0].scores.concepts) - len(scored)
    lost = [pair for trial in trials if trial.signed for pair in trial.scores.opposed_pairs if not pair.on_two_sides]
    return section(
        "What failed",
        paragraph(
            f"{n_low} of {len(scored)} concepts have no feature with an F1 of 0.5 in any dictionary. The worst, by F1:"
        ),
        table(header, rows),
        paragraph(_lost(lost)),
        paragraph(f"Not scored, for want of tokens: {n_left} of {len(trials[0].scores.concepts)} concepts."),
    )


def _lost(pairs: Sequence[PairScore]) -> str:
    if not pairs:
        return "No opposed pair that was scored is missing from the signed dictionary's two-sided features."
    named = ", ".join(f"{pair.a} and {pair.b} ({decimal(pair.f1)})" for pair in pairs)
    return f"Opposed pairs that no signed feature holds on its two sides (lesser F1 of the nearest one): {named}."


def _compare(name: str, scores: ConceptScores, fvu: float) -> list[str]:
    numbers = (scores.coverage, scores.auroc, scores.reconstruction, scores.parent_recall, scores.parent_f1)
    counts = (
        f"{scores.n_opposed_on_two_sides} of {len(scores.opposed_pairs)}",
        f"{scores.n_control_on_two_sides} of {len(scores.control_pairs)}",
    )
    l0 = decimal(scores.l0, 1)
    return [name, f"{scores.n_features:,}", l0, decimal(fvu), *(decimal(x) for x in numbers), *counts]


def _bar(name: str, scores: ConceptScores, own: bool) -> Bar:
    opposed, control = scores.opposed_pairs, scores.control_pairs
    return Bar(
        name,
        own,
        scores.coverage,
        scores.parent_recall,
        scores.n_opposed_on_two_sides / len(opposed) if opposed else math.nan,
        scores.n_control_on_two_sides / len(control) if control else math.nan,
    )


def _concept_card(corpus: Corpus, trials: Sequence[Trial], name: str) -> str:
    trial = max(trials, key=lambda trial: _known(trial.row(name).f1_train))
    row = trial.row(name)
    beside = ", ".join(f"{other.name} {decimal(other.row(name).f1)}" for other in trials if other is not trial)
    if row.feature is None:
        return _card(name, row.kind, f"{row.reason or 'No feature fires with it.'}", "")
    said = (
        f"{trial.name} feature {row.feature}{_side(trial, row.side)}: F1 {decimal(row.f1)}, "
        f"precision {decimal(row.precision)}, recall {decimal(row.recall)}, AUROC {decimal(row.auroc)}; "
        f"F1 of the best in {beside}"
    )
    return _card(name, row.kind, said, _sentences(corpus, trial, row.feature, row.side, row.threshold, name))


def _pair_card(corpus: Corpus, trial: Trial) -> str:
    found = [pair for pair in trial.scores.opposed_pairs if pair.on_two_sides and pair.feature is not None]
    if not found:
        return ""
    pair = max(found, key=lambda pair: (pair.a in MOODS, pair.f1))
    assert pair.feature is not None
    said = f"{trial.name} feature {pair.feature}, two sides of one direction"
    parts = []
    for name, side, f1 in ((pair.a, pair.side_of_a, pair.f1_a), (pair.b, -pair.side_of_a, pair.f1_b)):
        parts.append(
            f'<p class="side">{escape(name)}: the {"positive" if side > 0 else "negative"} side, F1 {decimal(f1)}</p>'
        )
        parts.append(_sentences(corpus, trial, pair.feature, side, 0.0, name))
    return _card(f"{pair.a} and {pair.b}", "an opposed pair", said, "".join(parts))


MOODS = ("glad", "sad")


def _sentences(corpus: Corpus, trial: Trial, feature: int, side: int, threshold: float, name: str) -> str:
    column = trial.codes[:, [feature]].toarray().ravel()
    scale = float(abs(column).max(initial=0.0))
    shown = examples(corpus, column, side, threshold, name)
    lines = (f'<li>{colour(s, scale, name)}<span class="note">{escape(s.note)}</span></li>' for s in shown)
    return f"<ol>{''.join(lines)}</ol>"


def _card(title: str, kind: str, said: str, inside: str) -> str:
    head = f'<div class="head"><h3>{escape(title)}</h3><span class="soft small">{escape(kind)}</span></div>'
    return f'<article class="card">{head}<div class="small">{escape(said)}</div>{inside}</article>'


def _side(trial: Trial, side: int) -> str:
    return "" if not trial.signed else ", positive side" if side > 0 else ", negative side"


def _known(x: float) -> float:
    return -1.0 if math.isnan(x) else x
