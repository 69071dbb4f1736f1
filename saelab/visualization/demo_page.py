"""Page sections of `saelab demo`: how well the features of several dictionaries detect known concepts.

There are a bar chart of concept scores, and sentences whose tokens are colored by a feature's activation and
underlined where a concept is true.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.evaluation.results import ConceptScore, ConceptScores, PairScore
from saelab.lm.token_labels import TokenLabels
from saelab.visualization.html import Scripted, decimal, embed, escape, paragraph, section, table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PANELS = ("coverage", "parent recall", "opposed pairs")
# plotly draws on a canvas of its own: its colors are read from the page, again when the page turns dark or light
FOLLOW_THE_PAGE = """
const plot = document.getElementById("{plot_id}");
function paint() {
  const style = getComputedStyle(document.documentElement), at = name => style.getPropertyValue(name).trim();
  const look = {"font.color": at("--ink")};
  for (const axis of ["xaxis", "xaxis2", "xaxis3"]) look[axis + ".gridcolor"] = at("--line");
  Plotly.relayout(plot, look);
  plot.data.forEach((trace, i) => Plotly.restyle(plot, {"marker.color": [trace.meta.own.map(
    own => trace.type == "bar" ? at(own ? "--own" : "--other") : at("--ink"))]}, [i]));
}
paint();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""
CLOSING = frozenset(".,?!;:)\u201d\u2019")
OPENING = frozenset("(\u201c\u2018")
STRONGEST = 0.72  # opacity of the largest activation: the text stays readable on it
ENDS = frozenset(".?!")
CLOSE = "\u201d"
SHORT = 9  # tokens: a shorter sentence is shown with the one before
HEADER = [
    "", "features", "L0", "FVU", "coverage", "AUROC", "reconstruction",
    "parent recall", "parent F1", "opposed", "control",
]  # fmt: skip
CEILING = "probe"  # the baseline that was given the truth
CAPTION = "The thin mark in the right panel is the share of control pairs. All three run from 0 to 1; more is better."
READING = (
    "Coverage is the mean F1 of each concept's best feature. Reconstruction is the pooled F1 of all concepts as "
    "predicted by the features that are precise for them. Parent recall is how often the feature of a class fires "
    "where one of its members is named; read it with the F1 of those features. A pair counts where one feature "
    "predicts one concept by its positive and the other by its negative side; control pairs are pairs that oppose "
    "nothing. Features and thresholds were chosen on some of the stories and scored on others. The linear probe, "
    "where there is one, was fitted to the true labels: it is a ceiling, not a baseline."
)
LEGEND = (
    "Color is the activation of one feature, orange for positive and blue for negative; the concept truly holds "
    "of underlined tokens. A good feature colors what is underlined and nothing else. The concepts were chosen "
    "beforehand, not by their scores; the dictionary shown is the one that predicts the concept best on the stories "
    "that features were chosen on. Point at a token for its value and all that is true of it. Neither a "
    "dictionary nor a threshold was fitted to these stories."
)
MOODS = ("glad", "sad")


@dataclass(frozen=True)
class Bar:
    """One dictionary's values in the three panels, shares in [0, 1] or NaN; `own` marks dictionaries trained here."""

    name: str
    own: bool
    coverage: float
    parent_recall: float
    opposed: float
    """share of opposed pairs that are on the two sides of one feature"""
    control: float
    """the same share of control pairs"""


def draw_comparison(bars: Sequence[Bar]) -> Scripted:
    """Three panels of horizontal bars, one row per dictionary, as HTML; a mark at each bar shows its control pairs'
    share.
    """
    from plotly.graph_objects import Bar as Bars, Scatter
    from plotly.subplots import make_subplots

    names, meta = [bar.name for bar in bars], {"own": [bar.own for bar in bars]}
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.08, subplot_titles=PANELS)
    values = ([bar.coverage for bar in bars], [bar.parent_recall for bar in bars], [bar.opposed for bar in bars])
    for i, (panel, column) in enumerate(zip(PANELS, values, strict=True)):
        said = f"%{{y}}: {panel} %{{x:.2f}}<extra></extra>"
        figure.add_trace(
            Bars(x=_plain(column), y=names, orientation="h", meta=meta, hovertemplate=said), row=1, col=i + 1
        )
    control = Scatter(
        x=_plain([bar.control for bar in bars]),
        y=names,
        mode="markers",
        cliponaxis=False,
        meta=meta,
        marker={"symbol": "line-ns-open", "size": 11, "line": {"width": 2}},
        hovertemplate="%{y}: control pairs %{x:.2f}<extra></extra>",
    )
    figure.add_trace(control, row=1, col=3)
    figure.update_xaxes(range=[0, 1.02], tickvals=[0, 0.5, 1], fixedrange=True, zeroline=False)
    figure.update_yaxes(autorange="reversed", fixedrange=True, ticksuffix=" ")
    figure.update_annotations(font_size=13)
    figure.update_layout(
        height=90 + 27 * len(bars),
        margin={"l": 8, "r": 8, "t": 36, "b": 28},
        showlegend=False,
        bargap=0.3,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
    )
    return embed(figure, "comparison", FOLLOW_THE_PAGE)


def _plain(column: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(x) else x for x in column]


@dataclass(frozen=True)
class Sentence:
    """Tokens of a sentence, each with the feature's activation and the names of its true concepts."""

    words: Sequence[str]
    values: Sequence[float]
    concepts: Sequence[Sequence[str]]
    note: str = ""
    """reason why the sentence is shown"""


def color(sentence: Sentence, scale: float, underline: str = "") -> str:
    """The sentence as HTML, every token a span with its value and its concepts as the title.

    Positive activations are orange, negative ones blue, with opacity |value| / `scale`; tokens on which the concept
    `underline` holds are underlined. ValueError where the columns differ in length.
    """
    columns = list(zip(sentence.words, sentence.values, sentence.concepts, strict=True))
    pieces, glued = [], True
    for word, value, concepts in columns:
        pieces.append("" if glued or word in CLOSING else " ")
        pieces.append(_span(word, value, concepts, scale, underline))
        glued = word in OPENING
    return f'<span class="tokens">{"".join(pieces)}</span>'


def _span(word: str, value: float, concepts: Sequence[str], scale: float, underline: str) -> str:
    kinds, style = ["t"], ""
    if value and scale > 0:
        kinds.append("plus" if value > 0 else "minus")
        style = f' style="--a:{STRONGEST * min(1.0, abs(value) / scale):.2f}"'
    if underline in concepts:
        kinds.append("true")
    title = f"{value:+.2f}" if value else "0"
    title += f" | {', '.join(concepts)}" if concepts else ""
    return f'<span class="{" ".join(kinds)}"{style} title="{escape(title)}">{escape(word)}</span>'


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens in the order of the text, story after story, with one row of codes each."""

    words: Sequence[str]
    labels: TokenLabels
    """concepts of each token, and its story as document"""
    shown: Bool[np.ndarray, "n_tokens"]
    """tokens of the stories that sentences are taken from"""

    @cached_property
    def story_ids(self) -> Int[np.ndarray, "n_tokens"]:
        """Story of each token."""
        return self.labels.require_documents()

    def holds(self, name: str) -> Int[np.ndarray, "n"]:
        """The tokens of the shown stories on which a concept holds."""
        return np.flatnonzero(self.labels[name].numpy() & self.shown)

    def span(self, token: int) -> tuple[int, int]:
        """First token and end of a token's sentence; a short sentence includes the one before it in the story."""
        start, stop = self._start(token), token + 1
        while not self._ends(stop - 1):
            stop += 1
        if stop - start < SHORT and start > 0 and self.story_ids[start - 1] == self.story_ids[start]:
            start = self._start(start - 1)
        return start, stop

    def _start(self, token: int) -> int:
        while token > 0 and not self._ends(token - 1):
            token -= 1
        return token

    def _ends(self, token: int) -> bool:
        after = token + 1
        if after == len(self.words) or self.story_ids[after] != self.story_ids[token]:
            return True
        return self.words[token] in ENDS and self.words[after] != CLOSE

    def sentence(self, token: int, column: Float[np.ndarray, "n_tokens"], note: str = "") -> Sentence:
        """The sentence around a token, with a feature's activations (a dense column)."""
        start, stop = self.span(token)
        names = [[self.labels.names[i] for i in self.labels.matrix[row].indices] for row in range(start, stop)]
        return Sentence(self.words[start:stop], column[start:stop].tolist(), names, note)


def examples(
    corpus: Corpus, column: Float[np.ndarray, "n_tokens"], side: int, threshold: float, name: str, n: int = 4
) -> list[Sentence]:
    """Up to `n` sentences of different stories: the strongest firings, one on the median token, and a mistake if any.

    Where that side of the feature never fires, sentences in which the concept holds are returned instead.

    Args:
        corpus: tokens with their true concepts.
        column: the feature's code at every token.
        side: 1 or -1, the sign of the codes looked at.
        threshold: the feature predicts the concept where `side * column` is larger.
        name: name of the concept.
        n: largest number of sentences.
    """
    z, true = np.where(corpus.shown, side * column, 0), corpus.holds(name)
    firing = np.flatnonzero(z > 0)
    firing = firing[np.argsort(-z[firing], kind="stable")].tolist()
    strong = [(token, "fires among the most strongly") for token in firing]
    median = [(token, "fires as on its median token") for token in firing[len(firing) // 2 :]]
    silent = [(token, "the concept holds here; the feature never fires") for token in true.tolist() if not firing]
    wanted = [(strong, 2), (median, 1), (_mistakes(z, true, threshold) if firing else [], 1), (strong, n), (silent, n)]
    chosen: dict[int, Sentence] = {}  # by story
    for candidates, n_more in wanted:
        limit = min(n, len(chosen) + n_more)
        for token, note in candidates:
            if len(chosen) == limit:
                break
            if (story := int(corpus.story_ids[token])) not in chosen:
                chosen[story] = corpus.sentence(token, column, f"{corpus.words[token]}: {note}")
    return list(chosen.values())


def _mistakes(z: Float[np.ndarray, "n_tokens"], true: Int[np.ndarray, "n"], threshold: float) -> list[tuple[int, str]]:
    """The tokens of the more frequent kind of error: false positives, strongest first, or misses from the middle on."""
    says = np.flatnonzero(z > threshold)
    false_alarms, misses = np.setdiff1d(says, true), np.setdiff1d(true, says)
    if len(false_alarms) > len(misses):
        strongest = false_alarms[np.argsort(-z[false_alarms], kind="stable")].tolist()
        return [(token, "a false alarm: above its threshold, but the concept does not hold") for token in strongest]
    order = np.roll(misses, -(len(misses) // 2)).tolist()
    return [(token, "a miss: the concept holds, but it stays below its threshold") for token in order]


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


def show_comparison(trials: Sequence[Trial], baselines: dict[str, ConceptScores]) -> Scripted:
    """The section with findings in sentences, the table and the figure."""
    bars = [_bar(trial.name, trial.scores, True) for trial in trials]
    bars += [_bar(name, scores, False) for name, scores in baselines.items()]
    header, rows = tabulate(trials, baselines)
    return section(
        "Comparison",
        *(paragraph(finding) for finding in find(trials, baselines)),
        table(header, rows, frozenset(trial.name for trial in trials)),
        "<figure>",
        draw_comparison(bars),
        f"<figcaption>{escape(CAPTION)}</figcaption></figure>",
        paragraph(READING, "small soft"),
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
    coverage_of = {name: scores.coverage for name, scores in baselines.items() if name != CEILING}
    if not coverage_of:
        return said + "."
    name = max(coverage_of, key=lambda one: _known(coverage_of[one]))
    highest = coverage_of[name]
    n_above = sum(trial.scores.coverage > highest for trial in trials)
    return f"{said}; {n_above} of {len(trials)} dictionaries beat the best baseline, {name} ({decimal(highest)})."


def show_features(corpus: Corpus, trials: Sequence[Trial], names: Sequence[str]) -> str:
    """Cards of an opposed pair on one signed feature, if there is one, and of each named concept."""
    pair = next((card for trial in trials if trial.signed if (card := _pair_card(corpus, trial))), "")
    cards = [_concept_card(corpus, trials, name) for name in names]
    return section("Features and where they fire", paragraph(LEGEND, "small soft"), pair, *cards)


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
    compared = ", ".join(f"{other.name} {decimal(other.row(name).f1)}" for other in trials if other is not trial)
    if row.feature is None:
        return _card(name, row.kind, f"{row.reason or 'No feature fires with it.'}", "")
    said = (
        f"{trial.name} feature {row.feature}{_side(trial, row.side)}: F1 {decimal(row.f1)}, "
        f"precision {decimal(row.precision)}, recall {decimal(row.recall)}, AUROC {decimal(row.auroc)}; "
        f"F1 of the best in {compared}"
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


def _sentences(corpus: Corpus, trial: Trial, feature: int, side: int, threshold: float, name: str) -> str:
    column = trial.codes[:, [feature]].toarray().ravel()
    scale = float(abs(column).max(initial=0.0))
    shown = examples(corpus, column, side, threshold, name)
    lines = (f'<li>{color(s, scale, name)}<span class="note">{escape(s.note)}</span></li>' for s in shown)
    return f"<ol>{''.join(lines)}</ol>"


def _card(title: str, kind: str, said: str, inside: str) -> str:
    head = f'<div class="head"><h3>{escape(title)}</h3><span class="soft small">{escape(kind)}</span></div>'
    return f'<article class="card">{head}<div class="small">{escape(said)}</div>{inside}</article>'


def _side(trial: Trial, side: int) -> str:
    return "" if not trial.signed else ", positive side" if side > 0 else ", negative side"


def _known(x: float) -> float:
    return -1.0 if math.isnan(x) else x
