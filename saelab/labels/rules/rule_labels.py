"""Results of rule-based labeling, as a table and as labels in English."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from saelab.labels.label import Label, LabelKind
from saelab.stores.results import Result, format_table

NO_RULE = "no good rule"
TOKEN = "the token "
FAMILIES = (TOKEN, "after the token ", "before the token ", "the word ", "the last token of the word ")
QUOTED = re.compile(r"'([^']+)'|\"([^\"]+)\"")


@dataclass(frozen=True, kw_only=True)
class RuleLabel:
    """The best rule for one sign of a feature; all scores are measured on held-out documents."""

    feature: int
    sign: int
    text: str
    """the rule in English; "no good rule" where it is not good enough"""
    kind: LabelKind
    rule: str
    """the best rule in English, good or not; empty where there is none"""
    parts: tuple[str, ...] = ()
    """names of its predicates, or the promoted tokens"""
    joined: str = ""
    """"and", "or", or empty for one predicate; "next" for promoted tokens"""
    fraction: float = 0.0
    threshold: float = 0.0
    """the rule predicts codes with |z| at least this, `fraction` of the largest in training documents"""
    n_firings: int = 0
    """number of held-out tokens on which the code reaches the threshold"""
    share: float = float("nan")
    """share of all held-out firings of this sign that reach the threshold"""
    f1: float = float("nan")
    f1_chance: float = float("nan")
    """F1 of a rule that holds as often, independently of the feature"""
    f1_train: float = float("nan")
    precision: float = float("nan")
    recall: float = float("nan")
    auroc: float = float("nan")
    """AUROC of the rule in windows around firings; 0.5 is chance"""
    lift: float = float("nan")
    """firing rate where the rule holds, divided by the firing rate on all tokens"""
    r: float = float("nan")
    """Pearson's r of whether the rule holds with |z|, on all tokens; 0 where the side does not fire"""
    p: float = 1.0
    q: float = 1.0
    """false discovery rate at which the rule is significant, among all rules tested on held-out documents"""

    @property
    def good(self) -> bool:
        """Whether the rule is good enough to be a label."""
        return self.kind != "none"


@dataclass(frozen=True, kw_only=True)
class RuleLabels(Result):
    """The best rule for each sign of each feature that fires, and which of them are good enough to be labels."""

    rows: tuple[RuleLabel, ...] = field(repr=False)
    n_predicates: int
    n_tested: int
    """number of rules tested on held-out documents, over which false discoveries are controlled"""
    fdr: float
    min_skill: float
    """smallest (F1 - F1_chance) / (1 - F1_chance) of a good rule, whose q is also at most `fdr`"""
    min_count: int
    train_frac: float
    seed: int
    n_train: int
    n_tokens: int
    """number of held-out tokens"""
    signed: bool
    source: str
    untrained: dict[str, float | int] | None = None
    """for an untrained dictionary on the same tokens: n_sides that fire, the share with a good rule, and the median f1
    of those; None where none was labeled"""
    counted: str = "tokens"
    """what was counted: "tokens" or "documents\""""

    def of(self, feature: int) -> tuple[RuleLabel, ...]:
        """The rows of one feature, the positive sign first."""
        return tuple(row for row in self.rows if row.feature == feature)

    @property
    def good(self) -> tuple[RuleLabel, ...]:
        """The rows with a good rule, sorted by F1."""
        return tuple(sorted((row for row in self.rows if row.good), key=lambda row: -row.f1))

    def clean_sides(self, min_f1: float = 0.8, min_r: float = 0.8) -> tuple[tuple[int, int], ...]:
        """Features and signs with a good rule of at least this F1 and r: clean labels, as arXiv:2408.00657 has them."""
        return tuple((row.feature, row.sign) for row in self.rows if row.good and row.f1 >= min_f1 and row.r >= min_r)

    def __str__(self) -> str:
        good, kinds = self.good, [row.kind for row in self.rows]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds)))
        lines = [
            f"{len(good):,} of {len(self.rows):,} signs of features have a good rule ({counts})",
            f"rules of {self.n_predicates} predicates, chosen on {self.n_train:,} {self.counted}, "
            f"scored on {self.n_tokens:,}; good: q <= {self.fdr:g}, F1 above chance >= {self.min_skill:g}",
            self._format_floor(),
        ]
        titles = ["feature", "F1", "chance", "prec.", "recall", "AUROC", "share", "rule"]
        return "\n".join([*lines, *format_table([titles, *map(_cells, good[:20])], left=(len(titles) - 1,))])

    def _format_floor(self) -> str:
        f1 = f"median F1 {np.median([row.f1 for row in self.good]):.2f}" if self.good else "none"
        mine = f"trained {len(self.good) / max(1, len(self.rows)):.1%} good, {f1}"
        if self.untrained is None:
            return f"{mine}; no untrained dictionary was labeled for comparison"
        return f"{mine}; an untrained dictionary {self.untrained['good']:.1%}, median F1 {self.untrained['f1']:.2f}"

    def labels(self) -> list[Label]:
        """The rows as labels: one for each sign, or of the whole feature (sign 0) where codes have no sign.

        Where both signs have a good rule, one label for the two sides together is added.
        """
        found = [self._label(row) for row in self.rows]
        by_sign = {(row.feature, row.sign): row for row in self.rows if row.good}
        pairs = [(row, by_sign[row.feature, -1]) for row in self.rows if row.good and row.sign > 0
                 and (row.feature, -1) in by_sign]  # fmt: skip
        return found + [self._two_sided(plus, minus) for plus, minus in pairs]

    def _label(self, row: RuleLabel) -> Label:
        names = ("f1", "precision", "recall", "auroc", "lift", "q", "share", "n_firings", "r")
        scores = {name: float(getattr(row, name)) for name in names}
        evidence = {
            name: value for name, value in asdict(row).items() if name in ("rule", "joined", "threshold", "f1_train")
        }
        return Label(
            feature=row.feature,
            sign=row.sign if self.signed else 0,
            text=row.text,
            kind=row.kind,
            author="rules",
            scores=scores | {"f1_chance": row.f1_chance, "auroc_chance": 0.5},
            evidence=evidence | {"parts": list(row.parts)},
            provenance=self._provenance(),
        )

    def _two_sided(self, plus: RuleLabel, minus: RuleLabel) -> Label:
        lesser = min(plus, minus, key=lambda row: row.f1)
        return Label(
            feature=plus.feature,
            text=f"{plus.text} (+) against {minus.text} (-)",
            kind="two-sided",
            author="rules",
            scores={"f1": lesser.f1, "f1_chance": lesser.f1_chance},
            evidence={"plus": plus.text, "minus": minus.text, "scores_of": "the lesser side"},
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, object]:
        names = (
            "source",
            "n_predicates",
            "n_tested",
            "fdr",
            "min_skill",
            "train_frac",
            "seed",
            "n_train",
            "n_tokens",
            "counted",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class LabelGroup:
    """How well rules describe the features of one group; means are over the signs of its features that fire."""

    name: str
    n_features: int
    """features of the group, those that never fire among them"""
    n_sides: int
    """signs of features that fire"""
    good: float
    """share of them with a good rule"""
    f1: float
    """mean held-out F1 of the best rule; 0 where there is none"""
    skill: float
    """mean `(F1 - F1_chance) / (1 - F1_chance)`, 0 where there is no rule: comparable between frequent and rare ones"""
    n_firings: float
    """median number of held-out firings that rules predict: groups of rare features have fewer to learn from"""


def score_groups(found: RuleLabels, groups: Mapping[str, Sequence[int]]) -> tuple[LabelGroup, ...]:
    """How well rules describe each of several groups of features, such as the rings of a Matryoshka dictionary.

    Args:
        found: labels of at least these features.
        groups: features of each group, by name.

    >>> row = RuleLabel(feature=3, sign=1, text="", kind="input", rule="", f1=0.6, f1_chance=0.2, n_firings=9)
    >>> counts = {"n_predicates": 1, "n_tested": 1, "min_count": 1, "n_train": 9, "n_tokens": 9}
    >>> settings = {"fdr": 0.05, "min_skill": 0.2, "train_frac": 0.5, "seed": 0, "signed": False, "source": ""}
    >>> round(score_groups(RuleLabels(rows=(row,), **counts, **settings), {"first": [2, 3]})[0].skill, 6)
    0.5
    """
    return tuple(_score_group(found, name, frozenset(features)) for name, features in groups.items())


def _score_group(found: RuleLabels, name: str, features: frozenset[int]) -> LabelGroup:
    rows = [row for row in found.rows if row.feature in features]
    f1, chance, firings = (
        np.array([getattr(row, key) for row in rows], float) for key in ("f1", "f1_chance", "n_firings")
    )
    skill = np.nan_to_num((f1 - chance) / np.maximum(1 - chance, 1e-12))
    nan = float("nan")
    return LabelGroup(
        name=name,
        n_features=len(features),
        n_sides=len(rows),
        good=float(np.mean([row.good for row in rows])) if rows else nan,
        f1=float(np.nan_to_num(f1).mean()) if rows else nan,
        skill=float(skill.mean()) if rows else nan,
        n_firings=float(np.median(firings)) if rows else nan,
    )


def _cells(row: RuleLabel) -> list[str]:
    scores = (row.precision, row.recall, row.auroc, row.share)
    sizes = [f"{row.f1:.2f}", f"{row.f1_chance:.3f}", *(f"{score:.2f}" for score in scores)]
    return [f"{row.feature}{'+' if row.sign > 0 else '-'}", *sizes, row.text]


def name_rule(names: Sequence[str], joined: str) -> str:
    """A rule in English, from the names of its predicates.

    >>> name_rule(["the token ' cat'", "the token ' dog'"], "or"), name_rule(["numbers", "in a question"], "and")
    ("the token ' cat' or ' dog'", 'numbers and also in a question')
    >>> name_rule(["after the token ' th'", "the token 'at'"], "and")
    "the token 'at' after ' th'"
    """
    if joined == "and":
        return _name_both(*names)
    lead = next((lead for lead in FAMILIES if all(name.startswith(lead) for name in names)), "")
    tails = [name[len(lead) :] for name in names]
    return lead + ", ".join(tails[:-1]) + (" or " if len(tails) > 1 else "") + tails[-1]


def _name_both(first: str, second: str) -> str:
    """The conjunction of two predicates in English, shortened where one of them is a token."""
    for token, other in ((first, second), (second, first)):
        if token.startswith(TOKEN) and " after " not in token:
            if other.startswith("after " + TOKEN):
                return f"{token} after {other.removeprefix('after ' + TOKEN)}"
            if other.startswith(("words ", "the word ")):
                return f"{token} in {other}"
    return f"{first} and also {second}"


def name_output(tokens: Sequence[str]) -> str:
    """The tokens that a feature promotes, in English.

    >>> name_output([" cat", " dog"])
    "promotes ' cat' or ' dog'"
    """
    return "promotes " + name_rule([repr(token) for token in tokens[:6]], "or") if tokens else ""


def same_word(a: str, b: str) -> bool:
    """Whether two names quote the same word, ignoring case, spaces and endings.

    >>> same_word("the token ' cat'", "the token ' Cats'"), same_word("the token ' cat'", "the token ' dog'")
    (True, False)
    """
    cores = [(match[1] or match[2]).strip().lower() for match in map(QUOTED.search, (a, b)) if match]
    if len(cores) < 2 or not all(cores):
        return False
    n = min(4, *map(len, cores))
    return cores[0][:n] == cores[1][:n] and n > 1
