"""`Removal`: what is left of a concept after an edit, and what the edit cost the others."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saelab.steering.erasing import Edit
from saelab.stores.results import Result, align_columns


@dataclass(frozen=True, kw_only=True)
class ProbedConcept:
    """How well fresh probes on the edited activations tell one concept, in held-out documents."""

    concept: str
    accuracy: float
    """mean of the accuracies where it holds and where it does not, threshold chosen in training; 0.5 is chance"""
    auroc: float
    """0.5 is chance"""


@dataclass(frozen=True, kw_only=True)
class RemovalScore:
    """What one edit left and what it cost."""

    name: str
    n: int
    """sides of features, or directions, taken out"""
    concept: ProbedConcept
    others: tuple[ProbedConcept, ...]
    loss_without: float
    """nats a token where the concept does not hold: the collateral"""
    loss_with: float
    """nats a token where it holds"""
    size: float
    """mean squared change over mean squared activation, of tokens without the concept"""

    @property
    def accuracy_of_others(self) -> float:
        """Mean over the other concepts."""
        return float(np.mean([one.accuracy for one in self.others])) if self.others else float("nan")


@dataclass(frozen=True, kw_only=True)
class Removal(Result):
    """What `ablate_concept` found; `untouched` is the first row."""

    concept: str
    hook_point: str
    read_at: str
    rows: tuple[RemovalScore, ...]
    features: tuple[int, ...]
    """taken out by "features", and the signs of their codes"""
    signs: tuple[int, ...]
    rate: float
    """share of held-out tokens of which the concept is true"""
    n_train: int
    """tokens that probes are fitted to"""
    n_tokens: int
    """held-out tokens that they are tested on"""
    n_predictions: int
    """held-out predictions behind `loss_without`"""
    edits: dict[str, Edit] = field(repr=False)
    """by name, for `sl.splice(model, {hook_point: edit})`; not saved"""

    def __getitem__(self, name: str) -> RemovalScore:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"Must be one of {[row.name for row in self.rows]}, got '{name}'.")

    def harmed(self, name: str, n: int = 5) -> tuple[tuple[str, float], ...]:
        """The other concepts that lost most accuracy by an edit, and how much."""
        before = {one.concept: one.accuracy for one in self.rows[0].others}
        lost = [(one.concept, before[one.concept] - one.accuracy) for one in self[name].others]
        return tuple(sorted(lost, key=lambda pair: -pair[1])[:n])

    def to_dict(self) -> dict[str, Any]:
        """Every field but the edits, ready for JSON."""
        found: dict[str, Any] = Result.to_dict(replace(self, edits={}))
        del found["edits"]
        return found

    def __str__(self) -> str:
        first = self.rows[0]
        lines = [
            f"{self.concept} ({self.rate:.2%} of tokens) taken out at {self.hook_point}, probed at {self.read_at}: "
            f"fresh probes of {self.n_train:,} tokens, tested on {self.n_tokens:,} of other documents; "
            f"{len(first.others)} other concepts; {self.n_predictions:,} predictions without it",
        ]
        table = [["", "n", "accuracy", "AUROC", "others", "worst", "loss without", "with", "size"]]
        for row in self.rows:
            worst = self.harmed(row.name, 1) if row is not first else ()
            sign, base = ("", 0) if row is first else ("+", 1)
            cells = [
                f"{row.accuracy_of_others - base * first.accuracy_of_others:{sign}.3f}",
                f"{-worst[0][1]:+.3f}" if worst else "",
                f"{row.loss_without - base * first.loss_without:{sign}.4f}",
                f"{row.loss_with - base * first.loss_with:{sign}.3f}",
                f"{row.size:.4f}",
            ]
            table.append([row.name, str(row.n), f"{row.concept.accuracy:.3f}", f"{row.concept.auroc:.3f}", *cells])
        return "\n".join(
            [*lines, *align_columns(table), "others, worst and losses of edits are changes from the first row"]
        )


def average_scores(name: str, scores: list[RemovalScore]) -> RemovalScore:
    """Means over random draws."""

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    def pool(some: list[ProbedConcept]) -> ProbedConcept:
        accuracy, auroc = mean([one.accuracy for one in some]), mean([one.auroc for one in some])
        return ProbedConcept(concept=some[0].concept, accuracy=accuracy, auroc=auroc)

    return RemovalScore(
        name=name,
        n=scores[0].n,
        concept=pool([score.concept for score in scores]),
        others=tuple(pool(list(some)) for some in zip(*(score.others for score in scores), strict=True)),
        loss_without=mean([score.loss_without for score in scores]),
        loss_with=mean([score.loss_with for score in scores]),
        size=mean([score.size for score in scores]),
    )
