"""HTML page of the report: its frame and summary, and data embedded safely in scripts."""

import json
from collections.abc import Mapping
from typing import Any

from saelab.analyses.dead import KINDS, DeadUnits
from saelab.evaluation.results import ROWS, Evaluation
from saelab.pictures.assets import read_asset
from saelab.pictures.cards import style_card
from saelab.pictures.page import STYLE, escape, facts, paragraph, section, table, write_policy
from saelab.stores.features import FeatureStore
from saelab.stores.names import shareable, shareable_words

BESIDE = "'self' file:"
"""Content-Security-Policy sources for card files in the page's own folder, loaded when they are needed"""


def fill_page(title: str, summary: str, data: Mapping[str, Any], cards: Mapping[int, str]) -> str:
    """The complete HTML page of a report.

    Args:
        title: plain text.
        summary: HTML.
        data: data of the feature list and the prompts, embedded as JSON.
        cards: cards in the page itself, HTML by feature.
    """
    views = read_asset("views.html").format(hidden="" if data["prompts"] else "hidden", summary=summary)
    script = read_asset("report.js")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            write_policy([script], BESIDE if data["files"] else ""),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}{read_asset('report.css')}</style>{style_card()}</head>",
            f"<body>\n<main>\n<header><h1>{escape(title)}</h1></header>\n{views}\n</main>",
            f'<script type="application/json" id="data">{to_script(data)}</script>',
            f'<script type="application/json" id="cards">{to_script(cards)}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def as_script(cards: Mapping[int, str]) -> str:
    """A script that passes cards, HTML by feature, to the page."""
    return f"addCards({to_script(cards)});"


def to_script(value: Any) -> str:
    """JSON that is safe between script tags: without `<` and without line ends that only JavaScript recognizes.

    >>> to_script("</script>")
    '"\\\\u003c/script>"'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def summarise(store: FeatureStore, found: DeadUnits, evaluation: Evaluation | Mapping[str, Any] | None) -> str:
    """The summary of the report as HTML: data encoded, dead latents, and quality of the SAE."""
    origin = store.provenance
    about = {
        "SAE": shareable_words(store.manifest.source),
        "Model": f"{shareable(origin.model)} (weight processing: {origin.weight_processing})",
        "Hook point": origin.hook_point,
        "Text": f"{shareable(origin.text)}, rows of {origin.ctx_len} tokens",
        "Tokens": f"{len(store):,}, in {len(set(store.doc_ids.tolist())):,} documents",
        "L0": f"{store.l0:.2f} codes a token, {'of both signs' if store.signed else 'all positive'}",
        "Trained on": _tell_training(store.manifest.sae.get("training")),
    }
    parts = [facts({name: text for name, text in about.items() if text}), section("Units", *_count_kinds(found))]
    if evaluation is not None:
        parts.append(section("Evaluation", *_show_evaluation(evaluation)))
    return "\n".join(parts)


def _tell_training(training: Mapping[str, Any] | None) -> str:
    if not training:
        return ""
    seen = training.get("n_tokens_seen", training.get("n_tokens"))
    return f"{seen:,} tokens, batch {training['batch_size']:,}, lr {training['lr']:.3g}, seed {training['seed']}"


def _count_kinds(found: DeadUnits) -> list[str]:
    rows = [
        [name, *(f"{counts.get(kind, 0):,}" for kind in KINDS), f"{sum(counts.values()):,}"]
        for name, counts in found.groups.items()
    ]
    limits = (
        f"On {found.n_tokens:,} tokens. Dead: never fired, so the rate is below {3 / found.n_tokens:.1e} (95 %). "
        f"Near-dead: below {found.near_dead_rate:g}. Dense: above {found.dense_rate:g}."
    )
    return [table(["units", *KINDS, "all"], rows), paragraph(limits, "small soft")]


def _show_evaluation(evaluation: Evaluation | Mapping[str, Any]) -> list[str]:
    numbers = evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation
    baselines = numbers.get("baselines", {})
    rows = []
    for name in ROWS:
        low, high = numbers.get("intervals", {}).get(name, (None, None))
        between = f"{_say(low)} to {_say(high)}" if low is not None else ""
        key = "ce" if name == "ce_sae" else name
        rows.append([name, _say(numbers.get(name)), between, *(_say(scores.get(key)) for scores in baselines.values())])
    said = f"{numbers.get('n_tokens', 0):,} tokens of {numbers.get('text', 'an unnamed text')}."
    return [table(["", "SAE", "95 % interval", *baselines], rows), paragraph(said, "small soft")]


def _say(x: float | None) -> str:
    return "-" if x is None or x != x else f"{x:.4g}"
