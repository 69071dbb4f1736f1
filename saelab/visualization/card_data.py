"""Feature cards as JSON, as compact as it can be: what `feature_card.js` draws in the report, the explorer and widgets.

Numbers have the digits that are shown. Windows, most of a card, hold the text between firings as one string.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saelab.analysis.dashboard import FeatureCard, FeatureSide
from saelab.analysis.direct_logits import Promoted
from saelab.analysis.max_activating import Example, ExampleGroup
from saelab.labels.label import MARKS, Label, describe_origin

DIGITS, LOGIT_DIGITS = 3, 2


def describe_card(
    card: FeatureCard,
    labels: Sequence[Label] = (),
    partners: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A feature's card, ready for JSON.

    Args:
        card: result of `describe_feature`.
        labels: the feature's chosen labels, shown with their authors and scores.
        partners: its partners in another store, as `Matched.describe_partners` has them.
    """
    made: dict[str, Any] = {
        "feature": card.feature,
        "label": card.label,
        "n_tokens": card.n_tokens,
        "counted": card.examples.counted,
        "origins": [_describe_label(one, alone=len(labels) == 1) for one in labels],
        "sides": [describe_side(side) for side in card.sides],
        "groups": [_describe_group(group) for group in card.examples.groups],
    }
    if card.counts:
        below = sum(edge < 0 for edge in card.edges)
        ends = {"low": shorten(card.edges[0]), "high": shorten(card.edges[-1])}
        made["histogram"] = {**ends, "below": below, "counts": list(card.counts)}
    if card.effects is not None:
        made["effects"] = describe_effects(card.effects)
    if card.likeness:
        rows = [[int(j), round(value, LOGIT_DIGITS), label] for j, label, value in card.named_neighbors()]
        made["near"] = {"by": card.likeness, "rows": rows}
    if partners:
        made["partners"] = list(partners)
    return made


def describe_side(side: FeatureSide) -> dict[str, Any]:
    """The firings of one sign: sign, n, mean and peak of |z|, and the most frequent tokens with their shares."""
    words = [[word, round(share, DIGITS)] for word, share in side.words]
    return {
        "sign": side.sign,
        "n": side.n_firings,
        "mean": shorten(side.mean),
        "peak": shorten(side.peak),
        "words": words,
    }


def describe_effects(effects: Promoted) -> dict[str, Any]:
    """The tokens that are promoted and suppressed, each with its effect in logits."""

    def shown(tokens: Iterable[tuple[str, float]]) -> list[list[Any]]:
        return [[token, round(effect, LOGIT_DIGITS)] for token, effect in tokens]

    return {"promoted": shown(effects.promoted), "suppressed": shown(effects.suppressed)}


def describe_window(example: Example) -> list[Any]:
    """A window as a list: the store's row of its center, which text of those that follow is the center, and the texts,
    each followed by its code where the feature fires.

    Tokens between firings are one text, so that joined texts are the window. The picture of a document that has one is
    last, as {"image": data URI}.

    >>> words, values = ("the", " hot", " and", " the", " cold"), (0.0, 1.5, 0.0, 0.0, -2.25)
    >>> describe_window(Example(words=words, values=values, center=4, token=7, doc_id=0))
    [7, 3, 'the', ' hot', 1.5, ' and the', ' cold', -2.25]
    """
    parts: list[Any] = []
    n_texts = center = 0
    joins = False  # whether the last text goes on
    for i, (word, value) in enumerate(zip(example.words, example.values, strict=True)):
        quiet = not value and i != example.center
        if quiet and joins:
            parts[-1] += word
        else:
            parts.append(word)
            n_texts += 1
        if value:
            parts.append(shorten(value))
        if i == example.center:
            center = n_texts - 1
        joins = quiet
    return [example.token, center, *parts, *([{"image": example.image}] if example.image else [])]


def shorten(x: float) -> float:
    """A number with as many digits as are shown.

    >>> shorten(-1234.567), shorten(0.000123456)
    (-1230.0, 0.000123)
    """
    return float(f"{x:.{DIGITS}g}")


def _describe_label(label: Label, alone: bool) -> str:
    """Author and scores of a label; also its text where the heading holds several labels or none."""
    text = "" if alone and label.kind != "none" else f"{MARKS[label.sign]}{label.text or 'no name'}, "
    return text + describe_origin(label)


def _describe_group(group: ExampleGroup) -> dict[str, Any]:
    made = {"name": group.name, "side": group.side, "windows": [describe_window(one) for one in group.examples]}
    if group.n_firings:
        made |= {"n": group.n_firings, "low": shorten(group.low), "high": shorten(group.high)}
    return made
