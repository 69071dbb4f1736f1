"""Results of `evaluate` and `score_concepts`: metrics with intervals and baselines, and concept scores."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from saelab.stores.results import Result, format_table
from saelab.stores.validation import naming, read_fields, read_json, require_object

ROWS = (
    "fvu", "explained_variance", "cosine", "bias", "l0", "dead_frac", "ce_clean", "ce_sae", "ce_zero", "ce_mean",
    "loss_recovered", "loss_recovered_mean", "kl", "kl_zero", "kl_score",
)  # fmt: skip
SUMMARY = {
    "coverage": "coverage: mean F1",
    "coverage_always": "  of saying yes always",
    "auroc": "mean AUROC",
    "reconstruction": "reconstruction: pooled F1",
    "reconstruction_macro": "reconstruction: F1 a token",
    "n_split": "features a concept is split into",
    "parent_recall": "parent recall given the child",
    "parent_recall_overall": "  recall of those parents",
    "parent_f1": "  F1 of those parents",
}
COUNTED = ("n_opposed_on_two_sides", "n_control_on_two_sides")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Metrics of an SAE's reconstructions, and of its language model with the reconstructions spliced in.

    For a transcoder, activations means its targets. Means are over the tokens that the mask keeps; cross-entropies
    (`ce_*`) and `kl*` are in nats a prediction. An undefined metric is NaN, and `reasons` explains why. The formulas
    are in `saelab.functional.metrics`.
    """

    fvu: float
    """fraction of variance unexplained; [0, inf), lower is better, 1 is the mean predictor"""
    explained_variance: float
    """1 - fvu"""
    cosine: float
    """mean cosine of activation and reconstruction; higher is better"""
    bias: float
    """relative reconstruction bias; 1 is none, below 1 shrinkage"""
    l0: float
    """features that fire on a token, of either sign"""
    dead_frac: float
    """share of features that fired on none of the `n_tokens` tokens"""
    ce_clean: float
    """cross-entropy of the unmodified model"""
    ce_sae: float
    """with the SAE's reconstructions spliced in"""
    ce_zero: float
    """with zeros spliced in"""
    ce_mean: float
    """with the mean activation spliced in"""
    loss_recovered: float
    """(ce_zero - ce_sae) / (ce_zero - ce_clean); 1 is perfect, 0 no better than zeros"""
    loss_recovered_mean: float
    """the same against mean ablation, the harder reference"""
    kl: float
    """KL(clean || with the SAE); lower is better"""
    kl_zero: float
    """KL(clean || with zeros)"""
    kl_score: float
    """1 - kl / kl_zero; 1 is perfect"""
    n_tokens: int
    """tokens measured and spliced"""
    n_predictions: int
    """next-token predictions that `ce_*` and `kl*` are means over"""
    n_documents: int
    """number of documents, which the intervals resample"""
    removed: dict[str, int]
    """tokens left out, by rule of the mask"""
    density_edges: list[float]
    """bins of the features' firing density, in log10"""
    density_counts: list[int]
    """features in each bin; those that never fired are in none"""
    prefixes: dict[int, float]
    """FVU by prefix, for an SAE that has prefixes"""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the numbers above, from the document bootstrap"""
    baselines: dict[str, dict[str, float]]
    """the same metrics for the untrained SAE, a random dictionary and PCA, or a linear map for a transcoder, and
    for SAEs given as baselines; `ce` corresponds to the SAE's `ce_sae`"""
    reasons: dict[str, str]
    """why a number is NaN"""
    sae: str
    """the SAE in one line"""
    hook_point: str
    model: str
    text: str
    """source of the tokens"""
    mask: dict[str, Any]
    """rules of the mask"""
    provenance: dict[str, Any] | None
    """record of the activations that the SAE was trained on"""
    versions: dict[str, str]
    """of the libraries that computed the metrics"""
    hook_point_out: str | None = None
    """where a transcoder's reconstructions replace the activation; it reads at `hook_point`"""

    def __str__(self) -> str:
        removed = ", ".join(f"{rule} {n:,}" for rule, n in self.removed.items() if n)
        places = f"at {self.hook_point}"
        if self.hook_point_out is not None:
            places = f"from {self.hook_point} to {self.hook_point_out}"
        lines = [
            self.sae,
            f"Evaluated {places} of {self.model}.",
            f"{self.n_tokens:,} tokens, {self.n_documents:,} documents of {self.text} (left out: {removed or 'none'})",
            "",
        ]
        table = [["", "SAE", "95 % interval", *self.baselines], *map(self._row, ROWS)]
        lines += format_table(table + [[f"fvu, first {n}", _number(fvu)] for n, fvu in self.prefixes.items()])
        bins = zip(self.density_edges, self.density_counts, strict=False)
        lines += ["", "features by log10 density: " + "  ".join(f"{edge:g}:{n}" for edge, n in bins)]
        lines += [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)

    def _row(self, name: str) -> list[str]:
        interval = self.intervals.get(name)
        shown = f"{_number(interval[0])} .. {_number(interval[1])}" if interval else ""
        key = "ce" if name == "ce_sae" else name
        others = [_number(scores[key]) if key in scores else "" for scores in self.baselines.values()]
        return [name, _number(getattr(self, name)), shown, *others]


def _number(x: float) -> str:
    return f"{x:.4g}"


class BestFeature(NamedTuple):
    """The best feature for a concept, as the classifier `side * z > threshold`."""

    feature: int | None
    side: int
    threshold: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class ConceptScore:
    """Scores of the best feature for one concept; chosen on training stories, scored on held-out ones."""

    name: str
    kind: str
    """kind of concept: "class", "pole", "state", ..."""
    feature: int | None = None
    """index of the feature; None where the concept is not scored, or no feature fires with it in training stories"""
    side: int = 1
    """1 or -1: the sign of the codes that count"""
    threshold: float = math.nan
    """a token is classified as the concept where `side * z > threshold`"""
    fraction: float = math.nan
    """the threshold as a fraction of the largest code of that sign in training stories"""
    f1: float = math.nan
    precision: float = math.nan
    """NaN where the feature does not fire"""
    recall: float = math.nan
    """of the concept's held-out tokens"""
    auroc: float = math.nan
    """of max(side z, 0), ties counted half"""
    kappa: float = math.nan
    """F1 above that of as many firings at random (Cohen's kappa), with a 95 % interval of held-out stories: an interval
    that holds 0 is no evidence, as for what is true of a few whole stories"""
    kappa_low: float = math.nan
    kappa_high: float = math.nan
    f1_train: float = math.nan
    f1_always: float
    """F1 of always predicting the concept, which is high for a frequent one"""
    n_split: int | None = None
    """feature splitting: features in a greedy union, each of which raises F1 by more than 0.03 in training stories; 1
    is no split"""
    n_train: int
    """training tokens of the concept"""
    n_tokens: int
    """held-out tokens of the concept"""
    n_fires: int
    """held-out tokens that the feature classifies as the concept"""
    reason: str = ""
    """why the scores are NaN"""


@dataclass(frozen=True, kw_only=True)
class ParentScore:
    """Recall of a parent concept's feature on tokens of a child concept; low recall is a sign of feature absorption."""

    parent: str
    child: str
    recall: float
    """of the parent's feature on the child's held-out tokens"""
    parent_recall: float
    """of the same on all held-out tokens of the parent"""
    parent_f1: float
    """of the same; where it is low, the parent has no feature of its own"""
    n_tokens: int
    """held-out tokens of the child"""
    n_parent: int
    """held-out tokens of the parent"""


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """Whether one signed feature represents two concepts, one with each sign.

    The feature is the one whose lesser kappa of the two is highest in training stories.
    """

    a: str
    b: str
    opposed: bool
    """False for a control pair of concepts that are not opposites"""
    feature: int | None = None
    side_of_a: int = 1
    """1 or -1: sign of the codes that stand for a"""
    f1_a: float = math.nan
    f1_b: float = math.nan
    kappa_a: float = math.nan
    """F1 above chance (Cohen's kappa): for a concept on half of the tokens, chance gives F1 0.5 and kappa 0"""
    kappa_b: float = math.nan
    best_f1_a: float = math.nan
    """of the best feature for a alone"""
    best_f1_b: float = math.nan
    on_two_sides: bool = False
    """both kappa exceed 0.3 (and so both F1), and both F1 half of that of the best feature for the concept"""
    n_a: int
    """held-out tokens of a"""
    n_b: int
    reason: str = ""
    """why the scores are NaN"""

    @property
    def f1(self) -> float:
        """The smaller F1 of the two concepts."""
        return min(self.f1_a, self.f1_b)


@dataclass(frozen=True, kw_only=True)
class ConceptScores(Result):
    """Scores of a dictionary against known concepts of tokens, and of its baselines; all in [0, 1], higher is better.

    Features, signs and thresholds are chosen on training stories; every score but `f1_train` is of held-out ones.
    """

    concepts: tuple[ConceptScore, ...]
    parents: tuple[ParentScore, ...]
    pairs: tuple[PairScore, ...]
    """opposed and control pairs"""
    reconstruction: float
    """F1 over all (token, concept) pairs: a concept is predicted where any feature fires that had precision 0.95 for it
    and 10 firings in training stories"""
    reconstruction_macro: float
    """the same for each token, averaged over tokens with a true or a predicted concept"""
    reconstruction_fraction: float
    """the threshold used for it, chosen on training stories"""
    n_precise: int
    """features (by sign) that predict some concept for it"""
    n_features: int
    """features of the dictionary"""
    l0: float
    """number of nonzero codes for a token"""
    n_train: int
    """training tokens"""
    n_tokens: int
    """held-out tokens"""
    n_train_stories: int
    n_stories: int
    """held-out stories"""
    min_count: int
    baselines: "dict[str, ConceptScores]"
    """the same scores for other codes of the same tokens, by name"""
    moved: "ConceptScores | None"
    """the same scores for labels permuted at random, with features chosen in the same way: what the best of many
    features reaches by chance. Tokens are permuted within stories; where a concept is true of whole stories, stories
    are exchanged too. None within `moved` itself"""

    @property
    def scored(self) -> tuple[ConceptScore, ...]:
        """Scores of the concepts that have enough tokens to be scored."""
        return tuple(row for row in self.concepts if not row.reason)

    @property
    def coverage(self) -> float:
        """Mean F1 of the best features over scored concepts."""
        return _mean(row.f1 for row in self.scored)

    @property
    def coverage_always(self) -> float:
        """Mean F1 of always predicting a concept, over the same concepts: a baseline for `coverage`."""
        return _mean(row.f1_always for row in self.scored)

    @property
    def auroc(self) -> float:
        """Mean AUROC of the best features over scored concepts."""
        return _mean(row.auroc for row in self.scored)

    @property
    def n_split(self) -> float:
        """Mean number of features a scored concept is split into."""
        return _mean(float(row.n_split) for row in self.scored if row.n_split is not None)

    @property
    def parent_recall(self) -> float:
        """Mean over (parent, child) pairs of concepts of the recall of the parent's feature on the child's tokens.

        Where it is low (`parent_recall_overall` is higher) features may be absorbed, unless `parent_f1` is low as well:
        then the parent has no feature of its own.
        """
        return _mean(pair.recall for pair in self.parents)

    @property
    def parent_recall_overall(self) -> float:
        """Mean over (parent, child) pairs of concepts of the recall of the parent's feature on the parent's tokens."""
        return _mean(pair.parent_recall for pair in self.parents)

    @property
    def parent_f1(self) -> float:
        """Mean over (parent, child) pairs of concepts of the F1 of the parent's feature for the parent."""
        return _mean(pair.parent_f1 for pair in self.parents)

    @property
    def opposed_pairs(self) -> tuple[PairScore, ...]:
        """Scores of the pairs of opposite concepts that have enough tokens."""
        return tuple(pair for pair in self.pairs if pair.opposed and not pair.reason)

    @property
    def control_pairs(self) -> tuple[PairScore, ...]:
        """Scores of the pairs of concepts that are not opposites, for comparison, and have enough tokens."""
        return tuple(pair for pair in self.pairs if not pair.opposed and not pair.reason)

    @property
    def n_opposed_on_two_sides(self) -> int:
        """Number of opposed pairs represented by the two signs of one feature."""
        return sum(pair.on_two_sides for pair in self.opposed_pairs)

    @property
    def n_control_on_two_sides(self) -> int:
        """Number of control pairs represented by the two signs of one feature: what chance and frequency alone give."""
        return sum(pair.on_two_sides for pair in self.control_pairs)

    def best(self, name: str) -> BestFeature:
        """The feature chosen for a concept, with sign, threshold and held-out F1; KeyError for an unknown concept."""
        for row in self.concepts:
            if row.name == name:
                return BestFeature(row.feature, row.side, row.threshold, row.f1)
        raise KeyError(f"`name` must be a concept of the world, got '{name}'; `scores.concepts` lists them.")

    def __str__(self) -> str:
        columns = {"codes": self, **({"labels moved": self.moved} if self.moved else {}), **self.baselines}
        n_child = sum(pair.n_tokens for pair in self.parents)
        over = {
            "coverage": f"{len(self.scored)} concepts",
            "reconstruction": f"{self.n_tokens:,} tokens",
            "parent_recall": f"{len(self.parents)} pairs, {n_child:,} tokens",
        }
        lines = [
            f"{len(self.scored)} of {len(self.concepts)} concepts scored on {self.n_tokens:,} tokens"
            f" of {self.n_stories:,} stories; features chosen on {self.n_train:,} of {self.n_train_stories:,} others",
            "",
        ]
        table = [
            ["", "over", *columns],
            ["features", "", *(f"{scores.n_features:,}" for scores in columns.values())],
            ["l0", "", *(f"{scores.l0:.4g}" for scores in columns.values())],
        ]
        for name, title in SUMMARY.items():
            numbers = [f"{getattr(scores, name):.3f}" for scores in columns.values()]
            table.append([title, over.get(name, ""), *numbers])
        for kind, pairs in (("opposed", self.opposed_pairs), ("control", self.control_pairs)):
            numbers = [str(getattr(scores, f"n_{kind}_on_two_sides")) for scores in columns.values()]
            table.append([f"{kind} pairs on two sides", f"{len(pairs)} pairs", *numbers])
        lines += format_table(table)
        reasons = Counter(row.reason for row in self.concepts if row.reason)
        if reasons:
            lines += ["", *(f"not scored, {n} concepts: {reason}" for reason, n in reasons.items())]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name and the summary's numbers, ready for JSON."""
        summary = {name: getattr(self, name) for name in (*SUMMARY, *COUNTED)}
        baselines = {name: scores.to_dict() for name, scores in self.baselines.items()}
        moved = self.moved.to_dict() if self.moved else None
        return super().to_dict() | summary | {"baselines": baselines, "moved": moved}

    @classmethod
    def load(cls, path: str | Path) -> "ConceptScores":
        """The scores that `save` wrote; FileNotFoundError, or ValueError for a file that holds something else."""
        with naming(path):
            return _read_scores(read_json(path))


def _read_scores(plain: object) -> ConceptScores:
    given = require_object(plain, "Concept scores")
    own = {field.name for field in fields(ConceptScores)}
    held = {name: value for name, value in given.items() if name in own or name not in (*SUMMARY, *COUNTED)}
    for name, kind in (("concepts", ConceptScore), ("parents", ParentScore), ("pairs", PairScore)):
        if isinstance(held.get(name), list):
            held[name] = [_read_numbers(kind, row) for row in held[name]]
    if isinstance(held.get("baselines"), dict):
        held["baselines"] = {name: _read_scores(scores) for name, scores in held["baselines"].items()}
    if held.get("moved") is not None:
        held["moved"] = _read_scores(held["moved"])
    scores = _read_numbers(ConceptScores, held)
    chosen = [row.feature for row in scores.concepts] + [pair.feature for pair in scores.pairs]
    if wrong := [feature for feature in chosen if feature is not None and not 0 <= feature < scores.n_features]:
        raise ValueError(f"`feature` must be in 0..{scores.n_features - 1}, got {wrong[0]}. Was it edited?")
    return scores


def _read_numbers(cls: type[T], plain: object) -> T:
    """An instance of a dataclass from a JSON object; numbers that are not finite were written as null."""
    given = require_object(plain, cls.__name__)
    numbers = [field.name for field in fields(cls) if field.type is float]  # type: ignore[arg-type]
    unknown = [name for name in numbers if name in given and given[name] is None]
    made = read_fields(cls, given | dict.fromkeys(unknown, 0.0))
    return replace(made, **dict.fromkeys(unknown, math.nan))  # type: ignore[type-var]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
