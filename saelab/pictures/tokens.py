"""Sentences as HTML, tokens coloured by a feature's activation and underlined where a concept holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from saelab.pictures.page import escape

CLOSING = frozenset(".,?!;:)\u201d\u2019")
OPENING = frozenset("(\u201c\u2018")
STRONGEST = 0.72  # opacity of the largest activation: the text stays readable on it


@dataclass(frozen=True)
class Sentence:
    """Tokens of a sentence, each with the feature's activation and the names of its true concepts."""

    words: Sequence[str]
    values: Sequence[float]
    concepts: Sequence[Sequence[str]]
    note: str = ""
    """reason why the sentence is shown"""


def colour(sentence: Sentence, scale: float, underline: str = "") -> str:
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
