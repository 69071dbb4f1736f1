"""Pages of single features: card, labels with their origin, notes, and features that are similar or fire together.

What does not change is kept for the features that were read last. An answer needs the codes of one feature and those of
some of its tokens, no more.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.dashboard import FeatureCard, describe_feature
from saelab.analysis.direct_logits import Promoted, logit_lens
from saelab.analysis.feature_similarity import CoFiringFeatures, SimilarFeatures, cofiring_features, similar_features
from saelab.analysis.max_activating import ExampleGroup, expand_example, max_activating_examples
from saelab.explorer.session import Explorer
from saelab.labels.label import Label, describe_origin, join_texts
from saelab.labels.label_store import LabelStore
from saelab.stores.feature_store import FeatureStore
from saelab.visualization.card_data import describe_card, describe_window

if TYPE_CHECKING:
    from saelab.visualization.universality_plots import Matched

N_SIMILAR = 10
LONGEST = 2000
"""Tokens of a window on each side of its center, at most."""
MOST_EXAMPLES = 200
"""Examples of a group that can be looked through."""
WAIT = 0.1
"""Seconds that a page waits for the model, which may be at work for somebody else, where logit effects need it; they
are left out then."""
EACH: Mapping[str, str] = {"top": "n_top", "near miss": "n_near", "random": "n_random"}


def describe(explorer: Explorer, feature: int) -> dict[str, Any]:
    """The page of one feature, ready for JSON.

    Args:
        explorer: the explorer.
        feature: number of the feature, 0 to d_sae - 1.

    Raises:
        ValueError: the feature does not exist.
    """
    _require(explorer.store, feature)
    card, similar, cofiring = explorer.cache.get(
        (feature, "page"), lambda: _measure(explorer.store, explorer.sae, feature)
    )
    chosen, labels = _read_labels(explorer.labels, feature)
    others = {j for j, _ in similar.rows} | {row.feature for row in cofiring.rows}
    names = explorer.names(others)
    card = replace(
        card,
        label=join_texts(chosen),
        effects=_find_effects(explorer, feature),
        neighbors=similar.rows,
        likeness=similar.by,
        neighbor_labels=tuple(names[j] for j, _ in similar.rows),
    )
    matched = explorer.matched
    return {
        "feature": feature,
        "card": describe_card(card, chosen, matched.describe_partners(card) if matched is not None else ()),
        "label": card.label,
        "labels": labels,
        "note": explorer.annotations.note(feature),
        "lists": explorer.annotations.lists_of(feature),
        "cofiring": [
            {"feature": row.feature, "share": row.share, "lift": row.lift, "phi": row.phi, "label": names[row.feature]}
            for row in cofiring.rows
        ],
        "n_read": cofiring.n_read,
        "partner": _describe_partner(matched, feature),
    }


def _measure(store: FeatureStore, sae: Any, feature: int) -> tuple[FeatureCard, SimilarFeatures, CoFiringFeatures]:
    similar = similar_features(sae if sae is not None else store, feature, m=N_SIMILAR)
    return describe_feature(store, feature), similar, cofiring_features(store, feature, m=N_SIMILAR)


def _read_labels(labels: LabelStore, feature: int) -> tuple[list[Label], list[dict[str, Any]]]:
    """The chosen labels of a feature, and all of them as the page lists them."""
    found, chosen = labels.labels(feature), labels.chosen(feature)
    rows = [
        {
            "sign": label.sign,
            "text": label.text,
            "kind": label.kind,
            "author": label.author,
            "by_person": label.by_person,
            "chosen": label in chosen,
            "scores": {name: _plain(value) for name, value in label.scores.items()},
            "origin": describe_origin(label),
            "time": label.time,
        }
        for label in found
    ]
    return chosen, rows


def _find_effects(explorer: Explorer, feature: int) -> Promoted | None:
    """The feature's direct effects on the logits; None without SAE and model, or where they would have to wait for
    the model, which is at work.
    """
    sae, model = explorer.sae, explorer.model
    if sae is None or model is None or explorer.has_no_effects:
        return None
    key = (feature, "effects")
    held: Promoted | None = explorer.cache.find(key)
    if held is not None:
        return held
    unembedding = explorer.unembedding

    def find() -> Promoted:
        return logit_lens(sae, model, [feature], allow_mismatch=True, unembedding=unembedding)[feature]

    try:
        if unembedding is not None and unembedding.is_alone and unembedding.is_current:
            return explorer.cache.get(key, find)
        if not explorer.lock.acquire(timeout=WAIT):
            return None
        try:
            unembedding = explorer.measure_unembedding()
            return explorer.cache.get(key, find)
        finally:
            explorer.lock.release()
    except ValueError:  # a model whose features have no direct effect there
        explorer.has_no_effects = True
        return None


def _describe_partner(matched: "Matched | None", feature: int) -> dict[str, Any] | None:
    if matched is None:
        return None
    row = matched.describe(feature)
    return {"name": row["partner"], "match": row["match"], "universal": row["universal"], "store": matched.name}


def expand_window(explorer: Explorer, feature: int, row: int, before: int, after: int) -> dict[str, Any]:
    """A window of text around one row of the store with the feature's codes, as cards have it.

    Args:
        explorer: the explorer.
        feature: number of the feature.
        row: row of the store at the center.
        before: tokens before it, at most 2,000.
        after: tokens after it, at most 2,000.

    Raises:
        ValueError: the feature or the row does not exist, or the window is too long.
    """
    _require(explorer.store, feature)
    if not (0 <= before <= LONGEST and 0 <= after <= LONGEST):
        raise ValueError(f"`before` and `after` must be in 0..{LONGEST}, got {before} and {after}.")
    example = expand_example(explorer.store, feature, row, before, after)
    return {"window": describe_window(example)}


def list_examples(explorer: Explorer, feature: int, group: str, side: int, offset: int, limit: int) -> dict[str, Any]:
    """More windows of one group of examples, as cards have them.

    Args:
        explorer: the explorer.
        feature: number of the feature.
        group: name of the group, such as "top" or "quantile 1 of 5".
        side: 1 or -1, the sign of the codes; 0 for near misses and random tokens.
        offset: windows that are passed over; a group has at most 200.
        limit: windows to list.

    Raises:
        ValueError: the feature or the group does not exist, or `offset` or `limit` is out of range.
    """
    _require(explorer.store, feature)
    if offset < 0 or not 1 <= limit <= MOST_EXAMPLES:
        raise ValueError(f"`offset` must be at least 0 and `limit` in 1..{MOST_EXAMPLES}, got {offset} and {limit}.")
    n = min(MOST_EXAMPLES, offset + limit)
    # As many as asked for, in steps, so that what was found is used again.
    n = next(step for step in (25, 50, 100, MOST_EXAMPLES) if step >= n)
    found = explorer.cache.get((feature, group, side, n), lambda: _find_group(explorer.store, feature, group, side, n))
    shown = found.examples[offset : offset + limit]
    return {"windows": [describe_window(one) for one in shown], "total": len(found.examples)}


def _find_group(store: FeatureStore, feature: int, name: str, side: int, n: int) -> ExampleGroup:
    """A group of the card with `n` examples; the first of them are those of the card."""
    kinds = {**EACH, **{f"quantile {i + 1} of 5": "n_each" for i in range(5)}}
    if name not in kinds or side not in (-1, 0, 1):
        raise ValueError(f"`group` must be one of {list(kinds)}, got {name[:40]!r} of side {side}.")
    choice: dict[str, Any] = {kinds[name]: n}
    if name == "top":  # the others are drawn in their order
        choice |= {"n_quantiles": 0, "n_near": 0, "n_random": 0}
    found = max_activating_examples(store, feature, **choice)
    groups = {(group.name, group.side): group for group in found.groups}
    if (name, side) not in groups:
        raise ValueError(f"Feature {feature} has no examples of the group {name!r} and side {side}.")
    return groups[name, side]


def _require(store: FeatureStore, feature: int) -> None:
    if not 0 <= feature < store.d_sae:
        raise ValueError(f"`feature` must be in 0..{store.d_sae - 1}, got {feature}.")


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
