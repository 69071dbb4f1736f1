"""Feature cards, and the features of texts, as HTML for Jupyter and the report."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from saelab.analysis.dashboard import FeatureCard, FeatureSide, describe_feature
from saelab.analysis.max_activating import Example, ExampleGroup
from saelab.analysis.text_features import ReadFeature, TextFeatures
from saelab.labels.label import MARKS, Label, describe_origin, join_texts
from saelab.labels.label_store import LabelStore
from saelab.stores.feature_store import Feature
from saelab.stores.results import register_drawing
from saelab.visualization.html import escape, read_asset, table

STRONGEST = 0.75  # opacity of the largest code: the text stays readable on it
WIDTH, HEIGHT, FOOT = 300, 96, 14  # of the histogram, in its own units
SHOWN_OPEN = ("top",)
READ_TOKENS, READ_FEATURES, READ_EACH = 2_000, 20, 8
"""drawn of texts: tokens, rows of the table, and features that a token's title lists"""


def draw_card(card: FeatureCard, labels: Sequence[Label] = ()) -> str:
    """A feature dashboard as one HTML element, for notebooks, which run no scripts; all text is escaped.

    Positive codes are orange, negative ones blue, with an opacity that grows with |z| relative to the feature's
    largest; the token that a window was chosen for is underlined. `labels` are the feature's chosen labels, shown with
    their authors and scores. Pages draw the same card from JSON (`describe_card`, feature_card.js).
    """
    aside = [_histogram(card), *(_words(side, len(card.sides)) for side in card.sides), _effects(card), _near(card)]
    scale = max((side.peak for side in card.sides), default=0.0)
    groups = [_group(group, scale) for group in card.examples.groups]
    parts = f'<div class="texts">{"".join(groups)}</div><div class="numbers">{"".join(aside)}</div>'
    return f'<article class="fcard">{_head(card, labels)}<div class="cols">{parts}</div></article>'


def draw_window(example: Example, scale: float) -> str:
    """A window of text as HTML, each token an element colored by its code, with the value as its title.

    A document's picture is before its text.
    """
    inside = [
        _token(word, value, scale, False) if value else _silent(word)
        for word, value in zip(example.words, example.values, strict=True)
    ]
    center = example.center
    inside[center] = _token(example.words[center], example.values[center], scale, len(inside) > 1)
    if example.image:
        inside.insert(0, f'<img src="{escape(example.image)}" alt="">')
    return f'<div class="win">{"".join(inside)}</div>'


def list_windows(examples: Iterable[Example], scale: float) -> str:
    """Windows as an HTML list, each after the code at its center."""
    rows = (
        f"<li><span>{f'{example.value:+.3g}' if example.value else '0'}</span>{draw_window(example, scale)}</li>"
        for example in examples
    )
    return f"<ol>{''.join(rows)}</ol>"


def style_card() -> str:
    """The style element that cards need."""
    return f"<style>{read_asset('card.css')}</style>"


@lru_cache(maxsize=1 << 16)  # a corpus has few distinct tokens
def show_text(token: str) -> str:
    """A token, escaped, with its line breaks and tabs made visible."""
    return escape(token).replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")


def show_code(token: str) -> str:
    """A token as an HTML element of its own."""
    return f"<code>{show_text(token)}</code>"


def _token(word: str, value: float, scale: float, center: bool) -> str:
    kinds = (["p" if value > 0 else "m"] if value else []) + (["at"] if center else [])
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    if not value or scale <= 0:
        return f"<i{kind}>{show_text(word)}</i>"
    alpha = STRONGEST * min(1.0, abs(value) / scale)
    return f'<b{kind} style="--a:{alpha:.2f}" title="{value:+.3g}">{show_text(word)}</b>'


@lru_cache(maxsize=1 << 16)
def _silent(word: str) -> str:
    return f"<i>{show_text(word)}</i>"


def _head(card: FeatureCard, labels: Sequence[Label]) -> str:
    label = escape(card.label) if card.label else '<span class="dim">no label</span>'
    rows = f"{card.n_tokens:,} {card.examples.counted}"
    said = f"Never fired on {rows}: its rate is below {3 / card.n_tokens:.1e} (95 %)."
    if card.sides:
        said = f"Fires on {card.density:.3%} of {rows}: " + "; ".join(map(_format_side, card.sides)) + "."
    given = "".join(_format_label(one, alone=len(labels) == 1) for one in labels)
    return f'<h2><span>{card.feature}</span> {label}</h2>{given}<p class="dim">{said}</p>'


def _format_label(label: Label, alone: bool) -> str:
    """Author and scores of a label; also its text where the heading holds several labels or none."""
    text = "" if alone and label.kind != "none" else f"{MARKS[label.sign]}{label.text or 'no name'}, "
    return f'<p class="dim">{escape(text + describe_origin(label))}</p>'


def _format_side(side: FeatureSide) -> str:
    name = "positive" if side.sign > 0 else "negative"
    return f"{side.n_firings:,} {name}, mean |z| {side.mean:.3g}, largest {side.peak:.3g}"


def _histogram(card: FeatureCard) -> str:
    """Histogram of codes as SVG, counts on a log axis, negative codes on the left in blue."""
    if not card.counts:
        return ""
    low, high, most = card.edges[0], card.edges[-1], max(card.counts)
    bars: dict[str, list[str]] = {"down": [], "up": []}
    for left, right, count in zip(card.edges, card.edges[1:], card.counts, strict=False):
        if count:
            x, width = (left - low) / (high - low) * WIDTH, (right - left) / (high - low) * WIDTH
            height = (HEIGHT - FOOT) * math.log1p(count) / math.log1p(most)
            bars["up" if left >= 0 else "down"].append(_bar(x, width, height))
    paths = "".join(f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in bars.items() if path)
    ends = f'<text x="0" y="{HEIGHT - 2}">{low:.3g}</text>'
    ends += f'<text x="{WIDTH}" y="{HEIGHT - 2}" text-anchor="end">{high:.3g}</text>'
    title = f"Firings by code, counts on a log axis; the fullest bin has {most:,}"
    return (
        f'<h3>Codes</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{title}</title>{paths}{ends}</svg>'
        f'<p class="dim">firings by code, log counts, up to {most:,} in a bin</p>'
    )


def _bar(x: float, width: float, height: float) -> str:
    return f"M{x + 0.5:.1f} {HEIGHT - FOOT:.1f}v{-height:.1f}h{max(width - 1, 0.5):.1f}v{height:.1f}z"


def _words(side: FeatureSide, n_sides: int) -> str:
    if not side.words:
        return ""
    kind = "" if n_sides == 1 else " +" if side.sign > 0 else " \u2212"
    return f"<h3>Fires on{kind}</h3>" + _rank((show_code(word), f"{share:.0%}") for word, share in side.words)


def _effects(card: FeatureCard) -> str:
    if card.effects is None:
        return ""
    lists = (("Promotes", card.effects.promoted), ("Suppresses", card.effects.suppressed))
    said = "".join(
        f"<h3>{name}</h3>" + _rank((show_code(token), f"{effect:+.2f}") for token, effect in tokens)
        for name, tokens in lists
    )
    swapped = "; a negative code does the opposite" if any(side.sign < 0 for side in card.sides) else ""
    return said + f'<p class="dim">logits, for a code of +1 at unit scale{swapped}</p>'


def _near(card: FeatureCard) -> str:
    if not card.likeness:
        return ""
    rows = ((escape(f"{j} {label}".rstrip()), f"{value:+.2f}") for j, label, value in card.named_neighbors())
    return f"<h3>Nearest by {escape(card.likeness)}</h3>" + (_rank(rows) if card.neighbors else "<p>none</p>")


def _rank(rows: Iterable[tuple[str, str]]) -> str:
    return '<dl class="rank">' + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"


def _group(group: ExampleGroup, scale: float) -> str:
    opened = " open" if group.name in SHOWN_OPEN else ""
    sign = {1: " +", -1: " \u2212", 0: ""}[group.side]
    pool = f"{group.n_firings:,} firings, |z| {group.low:.3g} to {group.high:.3g}" if group.n_firings else ""
    name, windows = escape(group.name.capitalize()), list_windows(group.examples, scale)
    return f"<details{opened}><summary>{name}{sign} <span>{pool}</span></summary>{windows}</details>"


def _draw_alone(card: FeatureCard) -> str:
    return style_card() + draw_card(card)


register_drawing(FeatureCard, _draw_alone)


def _draw_feature(feature: Feature) -> str:
    """The card of a feature, with the labels of its store."""
    note = ""
    with LabelStore.open(feature.store) as book:
        try:
            labels = book.chosen(feature.feature)
        except (OSError, ValueError) as error:  # a card without its label is better than none
            labels, note = [], f'<p class="fcard">{escape(error)}</p>'
    card = describe_feature(feature.store, feature.feature, label=join_texts(labels))
    return style_card() + note + draw_card(card, labels)


register_drawing(Feature, _draw_feature)


def draw_texts(found: TextFeatures) -> str:
    """Texts whose tokens are colored by their code of largest |z|, with their features as titles, over a table of the
    features that fire; all text is escaped.
    """
    n = min(len(found.tokens), READ_TOKENS)
    scale = max((abs(codes[0][1]) for codes in found.by_token[:n] if codes), default=0.0)
    texts: list[list[str]] = [[] for _ in range(len(found))]
    for i in range(n):
        texts[int(found.text_ids[i])].append(_read_token(found, i, scale))
    windows = "".join(
        f'<li><span>{i}</span><div class="win">{"".join(text)}</div></li>' for i, text in enumerate(texts) if text
    )
    more = f'<p class="dim">... and {len(found.tokens) - n:,} more tokens</p>' if n < len(found.tokens) else ""
    fired = f"{len(found.features):,} features fire, L0 {found.l0:.3g}"
    said = (
        f"{len(found.tokens):,} tokens at {found.hook_point}, {fired}; "
        "colored by the code of largest |z|, orange positive, blue negative; point at a token for its features."
    )
    rows = [_read_row(row) for row in found.features[:READ_FEATURES]]
    listed = table(("feature", "peak", "at", "tokens", "texts", "name"), rows)
    inside = f'<p class="dim">{escape(said)}</p><ol>{windows}</ol>{more}{listed}'
    return f'{style_card()}<article class="fcard">{inside}</article>'


def _read_token(found: TextFeatures, i: int, scale: float) -> str:
    codes = found.by_token[i]
    if not codes or scale <= 0:
        return f'<i class="dim">{show_text(found.tokens[i])}</i>' if not found.kept[i] else _silent(found.tokens[i])
    listed = [f"{f} {z:+.3g} {found.name(f, z)}".rstrip() for f, z in codes[:READ_EACH]]
    if len(codes) > READ_EACH:
        listed.append(f"and {len(codes) - READ_EACH} more")
    z = codes[0][1]
    title, alpha = escape("\n".join(listed)), STRONGEST * min(1.0, abs(z) / scale)
    kind = "p" if z > 0 else "m"
    return f'<b class="{kind}" style="--a:{alpha:.2f}" title="{title}">{show_text(found.tokens[i])}</b>'


def _read_row(row: ReadFeature) -> tuple[str, ...]:
    place = f"{row.token!r} ({row.text}:{row.position})"
    return str(row.feature), f"{row.peak:+.3g}", place, f"{row.n_tokens:,}", f"{row.n_texts:,}", row.name


register_drawing(TextFeatures, draw_texts)
