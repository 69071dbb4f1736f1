"""Labels as display text: the labels of one feature joined, and their origin and scores; plain text, not escaped."""

from collections.abc import Sequence
from math import isnan

from saelab.labelling.label import Label

MARKS = {1: "+ ", 0: "", -1: "\u2212 "}
ENDS = ("low", "high", "chance")
MOST_SCORES = 4


def join_texts(labels: Sequence[Label]) -> str:
    """The labels of one feature as one line, each side marked; empty where there is no good name.

    A label of the axis between both sides is left out where both sides have one of their own.

    >>> join_texts([Label(feature=0, sign=sign, text=text, author="a") for sign, text in ((1, "hot"), (-1, "cold"))])
    '+ hot; \u2212 cold'
    """
    names = [label for label in labels if label.kind != "none"]
    if {label.sign for label in names} == {-1, 0, 1}:
        names = [label for label in names if label.kind != "two-sided"]
    if len(names) == 1 and names[0].sign >= 0:
        return names[0].text
    return "; ".join(MARKS[label.sign] + label.text for label in names)


def describe_origin(label: Label) -> str:
    """The author of a label and its scores on held-out text, as one line.

    >>> describe_origin(Label(feature=0, text="hot", author="me", by_person=True))
    'by me, a person'
    """
    scores = describe_scores(label)
    person = ", a person" if label.by_person else ""
    return f"by {label.author}{person}" + (f": {scores}" if scores else "")


def describe_scores(label: Label) -> str:
    """The first scores of a label as text, each with its interval and chance level where it has them.

    For a rule on the strongest firings alone, the share of firings that it covers is added.

    >>> describe_scores(Label(feature=0, text="hot", author="me", scores={"f1": 0.91, "f1_chance": 0.5}))
    'f1 0.91 (chance 0.5)'
    """
    said = []
    for name, value in label.scores.items():
        base, _, end = name.rpartition("_")
        if isnan(value) or (end in ENDS and base in label.scores):
            continue
        low, high, chance = (label.scores.get(f"{name}_{end}") for end in ENDS)
        beside = [] if low is None or high is None else [f"{low:.2g} to {high:.2g}"]
        beside += [] if chance is None else [f"chance {chance:.2g}"]
        said.append(f"{name} {value:.2g}" + (f" ({', '.join(beside)})" if beside else ""))
    return ", ".join(said[:MOST_SCORES]) + _describe_share(label)


def _describe_share(label: Label) -> str:
    share, threshold = label.scores.get("share"), label.evidence.get("threshold")
    if share is None or isnan(share) or share >= 1 or not isinstance(threshold, int | float):
        return ""
    return f"; of codes with |z| from {threshold:.3g} on, {share:.2g} of the firings"
