"""Labels in words: of one feature together, and how far each can be trusted. Plain text, not escaped."""

from collections.abc import Sequence

from saelab.labelling.label import Label

MARKS = {1: "+ ", 0: "", -1: "\u2212 "}
MOST_SCORES = 4


def join_texts(labels: Sequence[Label]) -> str:
    """The names among the labels of one feature as one line, each side marked; empty where there is no good name.

    >>> join_texts([Label(feature=0, sign=sign, text=text, author="a") for sign, text in ((1, "hot"), (-1, "cold"))])
    '+ hot; \u2212 cold'
    """
    names = [label for label in labels if label.kind != "none"]
    if len(names) == 1 and names[0].sign >= 0:
        return names[0].text
    return "; ".join(MARKS[label.sign] + label.text for label in names)


def describe_origin(label: Label) -> str:
    """Who gave a label, and its scores on held-out text.

    >>> describe_origin(Label(feature=0, text="hot", author="me", by_person=True))
    'by me, a person'
    """
    scores = describe_scores(label)
    person = ", a person" if label.by_person else ""
    return f"by {label.author}{person}" + (f": {scores}" if scores else "")


def describe_scores(label: Label) -> str:
    """The first scores of a label in words, each beside its chance level.

    >>> describe_scores(Label(feature=0, text="hot", author="me", scores={"f1": 0.91, "f1_chance": 0.5}))
    'f1 0.91 (chance 0.5)'
    """
    said = []
    for name, value in label.scores.items():
        if not name.endswith("_chance"):
            chance = label.scores.get(f"{name}_chance")
            said.append(f"{name} {value:.2g}" + ("" if chance is None else f" (chance {chance:.2g})"))
    return ", ".join(said[:MOST_SCORES])
