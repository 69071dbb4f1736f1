"""Pages of a whole store: dead latents, evaluation, comparison with another store, saved attribution.

Each is HTML, in which all text is escaped, and plotly figures, as the reports and notebooks show them.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saelab.analysis.density import DeadFeatures, dead_features
from saelab.explorer.session import Explorer
from saelab.visualization.feature_plots import plot_dead_features, plot_density
from saelab.visualization.html import escape, facts, paragraph, section, table
from saelab.visualization.intervention_plots import draw_attribution, plot_attribution
from saelab.visualization.reports import draw_evaluation, draw_kinds
from saelab.visualization.universality_plots import plot_matches

N_LISTED = 100
"""Dead and near-dead features that are listed with their causes."""
N_EXPLAINED = 1_000
"""Dead and near-dead features whose causes are counted: each is compared with all live ones."""
FEATURE = "#/feature/"
"""what the address of a feature's page begins with"""


def make_page(explorer: Explorer, name: str) -> dict[str, Any]:
    """One page, ready for JSON: {"title", "html", "figures"}.

    Args:
        explorer: the explorer.
        name: "dead", "evaluation", "compare" or "attribution".

    Raises:
        ValueError: there is no such page, or nothing to show on it.
    """
    if name not in PAGES:
        raise ValueError(f"A page must be one of {list(PAGES)}, got {name[:40]!r}.")
    return PAGES[name](explorer)


def _make(title: str, parts: Sequence[str], figures: Sequence[Any] = ()) -> dict[str, Any]:
    """A page with plotly figures."""
    return {"title": title, "html": "\n".join(parts), "figures": [json.loads(figure.to_json()) for figure in figures]}


def _show_dead(explorer: Explorer) -> dict[str, Any]:
    found = explorer.cache.get("dead", lambda: dead_features(explorer.store, explorer.sae, n_explained=N_EXPLAINED))
    parts = [*draw_kinds(found), *_compare_training(found), *_list_causes(found, explorer.names)]
    return _make("Dead latents", parts, [plot_dead_features(found), plot_density(explorer.store)])


def _compare_training(found: DeadFeatures) -> list[str]:
    if found.training is None:
        return []
    return [section("Dead at the end of training", facts({name: f"{n:,}" for name, n in found.training.items()}))]


def _list_causes(found: DeadFeatures, name: Callable[[Sequence[int]], Mapping[int, str]]) -> list[str]:
    """The likely causes, counted, and the first features of which they are."""
    counts = Counter(cause for causes in found.causes.values() for cause in causes)
    silent = [*found.of_kind("dead"), *found.of_kind("near-dead")]
    if not silent:
        return []
    heading = "latents" if len(silent) <= N_EXPLAINED else f"of the first {N_EXPLAINED:,} latents"
    parts = (
        [table(["likely cause", heading], [[cause, f"{n:,}"] for cause, n in counts.most_common()])] if counts else []
    )
    names = name(silent[:N_LISTED])
    rows = "".join(
        f'<li><a href="{FEATURE}{j}">{j}</a> {escape(f"{names[j]} {found.kinds[j]}".lstrip())}'
        f"{_describe_causes(found, j)}</li>"
        for j in silent[:N_LISTED]
    )
    more = f"The first {N_LISTED} of {len(silent):,}." if len(silent) > N_LISTED else f"All {len(silent):,}."
    return [section("Dead and near-dead latents", *parts, paragraph(more, "small soft"), f"<ul>{rows}</ul>")]


def _describe_causes(found: DeadFeatures, feature: int) -> str:
    causes = found.causes.get(feature, ())
    return f": {escape(', '.join(causes))}" if causes else ""


def _show_evaluation(explorer: Explorer) -> dict[str, Any]:
    if not explorer.evaluation:
        raise ValueError("There is no evaluation to show. Start again with one, which `evaluate` makes.")
    return _make("Evaluation", draw_evaluation(explorer.evaluation))


def _show_comparison(explorer: Explorer) -> dict[str, Any]:
    if explorer.other is None:
        raise ValueError("There is no other store to compare with. Start again with `compare`.")
    if explorer.matched is None:
        why = {"comparing": "The stores are being compared, which takes a while. Load this page again later."}
        raise ValueError(why.get(explorer.comparison_state, f"The comparison {explorer.comparison_state}"))
    matched = explorer.matched
    return _make("Comparison", [matched.summarize()], [plot_matches(matched.comparison)])


def _show_attribution(explorer: Explorer) -> dict[str, Any]:
    if explorer.attribution is None:
        raise ValueError("There is no attribution to show. Start again with one, which `attribute` makes.")
    found = explorer.attribution
    labels = explorer.names(found.by_feature)
    return _make("Attribution", [draw_attribution(found, FEATURE, labels)], [plot_attribution(found, labels=labels)])


PAGES: dict[str, Callable[[Explorer], dict[str, Any]]] = {
    "dead": _show_dead,
    "evaluation": _show_evaluation,
    "compare": _show_comparison,
    "attribution": _show_attribution,
}
