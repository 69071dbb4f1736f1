"""Training curves, sparsity-fidelity frontiers, and quality by dictionary size."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from saelab.analysis.pruning import PruningCurve
from saelab.evaluation.results import Evaluation
from saelab.training.loop import HistoryEntry
from saelab.visualization.html import DASHES, LEGEND_WIDTH, OTHER, apply_layout, count_rows, escape_plotly, line_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

History: TypeAlias = str | Path | Sequence[HistoryEntry]
"""The folder of a training run, or `history_` of its SAE."""
Quality: TypeAlias = Literal["fvu", "loss_recovered"]

PANELS = {
    "reconstruction": ("Reconstruction loss (dots: held-out FVU)", "share of variance"),
    "l0": ("L0", "latents per token"),
    "dead_frac": ("Dead latents", "share of latents"),
    "lr": ("Learning rate", "learning rate"),
    "aux": ("Loss on dead latents", "weighted loss"),
    "sparsity": ("Sparsity loss", "weighted loss"),
}
AXES = {
    "fvu": "FVU, share of variance (lower is better)",
    "loss_recovered": "loss recovered (1: untouched model, 0: zeros)",
}
LOG = {"type": "log", "tickformat": "~g", "nticks": 3}
SYMBOLS = {"untrained": "triangle-up-open", "random": "x-thin-open", "pca": "diamond-open"}


def plot_training(source: History | Mapping[str, History]) -> "Figure":
    """Training curves of one run, or of several by name: losses, L0, dead latents and learning rate, one panel each.

    x: tokens seen; y: mean since the previous entry, losses as shares of the activations' variance, L0 in latents per
    token, dead latents as a share. A run is the folder that `fit` wrote to, or an SAE's `history_`; SAEs that were
    trained together are distinguished by number. FileNotFoundError for a folder without a history, ValueError for an
    empty or damaged one.

    >>> plot_training({"mine": [{"n_tokens": 64, "l0": 4.0}, {"n_tokens": 128, "l0": 3.5}]}).data[0].y
    (4.0, 3.5)
    """
    from plotly.subplots import make_subplots

    named = source if isinstance(source, Mapping) else {"": source}
    runs = dict(run for name, one in named.items() for run in _split(name, _read(one)))
    if not runs:
        raise ValueError("`source` must hold at least one run, got none; give folders or histories by name.")
    known = {key: None for history in runs.values() for key in history[0]}
    keys = [key for key in PANELS if key in known]
    keys += [key for key in known if key not in PANELS and key not in ("step", "n_tokens", "held_out_fvu")]
    n_rows, titles = math.ceil(len(keys) / 2), [PANELS.get(key, (escape_plotly(key), ""))[0] for key in keys]
    gaps = {"horizontal_spacing": 0.12, "vertical_spacing": 0.34 / n_rows}
    cells: list[list[dict[str, Any] | None]] = [[{}, {} if 2 * row + 1 < len(keys) else None] for row in range(n_rows)]
    figure = make_subplots(n_rows, 2, subplot_titles=titles, specs=cells, **gaps)
    for panel, key in enumerate(keys):
        place = {"row": panel // 2 + 1, "col": panel % 2 + 1}
        for i, (name, history) in enumerate(runs.items()):
            line = _draw_history(history, key, name, i, "lines")
            figure.add_trace(line.update(showlegend=panel == 0 and len(runs) > 1), **place)
            if key == "reconstruction":
                figure.add_trace(_draw_history(history, "held_out_fvu", name, i, "markers"), **place)
        scale = LOG if key == "reconstruction" else {"rangemode": "tozero"}
        figure.update_yaxes(title_text=PANELS.get(key, ("", escape_plotly(key)))[1], **scale, **place)
    figure.update_xaxes(title_text="tokens seen", matches="x", rangemode="tozero")
    seen = count_rows(history[-1]["n_tokens"] for history in runs.values())
    return apply_layout(figure, "Training", f"{seen} seen; each point is the mean since the one before", 250 * n_rows)


def _read(source: History) -> list[HistoryEntry]:
    """The entries of a run, with NaN as None."""
    if not isinstance(source, str | Path):
        history, where = list(source), "the history"
    else:
        file = Path(source) / "history.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"A run must hold history.jsonl, got {source} without; give the `out` of `fit`.")
        where = str(file)
        try:
            history = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise ValueError(f"{file} must hold JSON on every line ({error}); resume the run to mend it.") from error
    if not history:
        raise ValueError(f"A history must have at least one entry, got none in {where}; train for longer.")
    return history


def _split(name: str, history: list[HistoryEntry]) -> Iterator[tuple[str, list[HistoryEntry]]]:
    """The histories of the SAEs of one run; the keys of the i-th start with `i/`."""
    numbers = {key.split("/")[0]: None for key in history[0] if "/" in key}
    if not numbers:
        yield name, history
    for i in numbers:
        mine = [key for key in history[0] if "/" not in key or key.startswith(f"{i}/")]
        entries = [{key.removeprefix(f"{i}/"): entry.get(key) for key in mine} for entry in history]
        yield f"{name} SAE {i}".strip(), entries


def _draw_history(history: list[HistoryEntry], key: str, name: str, i: int, mode: str) -> "Scatter":
    from plotly.graph_objects import Scatter

    known = [entry for entry in history if entry.get(key) is not None]
    return Scatter(
        x=[entry["n_tokens"] for entry in known],
        y=[entry[key] for entry in known],
        mode=mode,
        name=escape_plotly(name, LEGEND_WIDTH),
        legendgroup=str(i),
        showlegend=False,
        line=line_of(i),
        marker={"size": 8, "color": line_of(i)["color"]},
        hovertemplate="%{y:.4g} at %{x:,} tokens<extra>%{fullData.name}</extra>",
    )


def plot_frontier(
    evaluations: Mapping[str, Evaluation | Sequence[Evaluation]], y: Quality = "fvu", *, baselines: bool = True
) -> "Figure":
    """Fidelity against sparsity of SAEs by name; evaluations in a list are joined by a line.

    x: L0, latents that fire per token, log scale; y: FVU, log scale, or the loss recovered; bars are the 95 % intervals
    of `evaluate`. Baselines are open gray marks, each at its own L0. Evaluations without a positive L0 or a finite `y`
    (above 0 for FVU) are left out and counted in the note; ValueError where none remains.
    """
    from plotly.graph_objects import Figure

    groups = {name: [one] if isinstance(one, Evaluation) else list(one) for name, one in evaluations.items()}
    every = [one for group in groups.values() for one in group]
    good = {name: [one for one in group if _is_shown(one.l0, getattr(one, y), y)] for name, group in groups.items()}
    n_lost = len(every) - sum(len(group) for group in good.values())
    if n_lost == len(every):
        raise ValueError(
            f"`evaluations` must hold one with an L0 above 0 and a known {y}, got none among {n_lost}; "
            "see their `reasons`."
        )
    figure = Figure()
    for i, (name, group) in enumerate(good.items()):
        figure.add_trace(_draw_group(name, group, y, i))
    for baseline in dict.fromkeys(baseline for one in every if baselines for baseline in one.baselines):
        figure.add_trace(_draw_baseline(baseline, good, y))
    figure.update_xaxes(title_text="L0: latents that fire per token (log scale)", type="log", tickformat="~g")
    _scale_quality(figure, y)
    figure.update_layout(showlegend=True)
    note = f"evaluated on {count_rows(one.n_tokens for one in every)}; bars: 95 % intervals over documents"
    note += f"; {n_lost} of {len(every)} left out: {y} or L0 unknown" if n_lost else ""
    return apply_layout(figure, "Fidelity and sparsity", note)


def _scale_quality(figure: "Figure", y: Quality) -> None:
    figure.update_yaxes(title_text=AXES[y], **(LOG if y == "fvu" else {}))


def _is_shown(l0: float, value: float, y: Quality) -> bool:
    return l0 > 0 and math.isfinite(value) and (value > 0 or y != "fvu")


def _draw_group(name: str, group: list[Evaluation], y: Quality, i: int) -> "Scatter":
    from plotly.graph_objects import Scatter

    group = sorted(group, key=lambda one: one.l0)
    values = [getattr(one, y) for one in group]
    ends = [one.intervals.get(y, (value, value)) for one, value in zip(group, values, strict=True)]
    return Scatter(
        x=[one.l0 for one in group],
        y=values,
        mode="lines+markers",
        name=escape_plotly(name, LEGEND_WIDTH),
        line=line_of(i),
        marker={"size": 9},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [high - value for value, (_, high) in zip(values, ends, strict=True)],
            "arrayminus": [value - low for value, (low, _) in zip(values, ends, strict=True)],
        },
        customdata=[escape_plotly(one.sae) for one in group],
        hovertemplate=f"{y} %{{y:.4g}}, L0 %{{x:.4g}}<br>%{{customdata}}<extra>%{{fullData.name}}</extra>",
    )


def _draw_baseline(baseline: str, groups: Mapping[str, Sequence[Evaluation]], y: Quality) -> "Scatter":
    from plotly.graph_objects import Scatter

    found = [(name, one.baselines.get(baseline, {})) for name, group in groups.items() for one in group]
    found = [(name, scores) for name, scores in found if _is_shown(scores.get("l0", 0), scores.get(y, math.nan), y)]
    return Scatter(
        x=[scores["l0"] for _, scores in found],
        y=[scores[y] for _, scores in found],
        mode="markers",
        name=escape_plotly(baseline, LEGEND_WIDTH),
        marker={"symbol": SYMBOLS.get(baseline, "circle-open"), "size": 10, "color": OTHER, "line": {"width": 1.5}},
        customdata=[escape_plotly(name) for name, _ in found],
        hovertemplate=f"{y} %{{y:.4g}}, L0 %{{x:.4g}}<br>for %{{customdata}}<extra>%{{fullData.name}}</extra>",
    )


def plot_prefixes(result: PruningCurve | Evaluation, y: Quality = "fvu") -> "Figure":
    """Quality against the number of features that are kept of a dictionary.

    x: features, log scale; y: FVU, log scale, or the loss recovered. A `PruningCurve` gives one line for each order of
    features, an `Evaluation` the FVU of its SAE's Matryoshka prefixes. ValueError for an evaluation of an SAE without
    prefixes, for another `y` of it, and where no quality is known.
    """
    from plotly.graph_objects import Figure, Scatter

    if isinstance(result, Evaluation) and (y != "fvu" or not result.prefixes):
        raise ValueError(
            f"An evaluation must have prefixes, and `y` be 'fvu', got {len(result.prefixes)} and '{y}'; "
            "use `prune_dictionary`."
        )
    lines = _sizes_of(result, y)
    if not any(math.isfinite(value) for points in lines.values() for _, value, _ in points):
        raise ValueError(f"`result` must hold a known {y}, got NaN for all {len(lines)} orders; plot another `y`.")
    figure = Figure()
    for i, (order, points) in enumerate(lines.items()):
        trace = Scatter(
            x=[size for size, _, _ in points],
            y=[value for _, value, _ in points],
            mode="lines+markers",
            name=order,
            line=line_of(i) | {"dash": DASHES[i % len(DASHES)]},  # orders that agree lie on one another
            marker={"size": 8},
            customdata=[said for _, _, said in points],
            hovertemplate=f"{y} %{{y:.4g}} with %{{x:,}} features%{{customdata}}<extra>%{{fullData.name}}</extra>",
        )
        figure.add_trace(trace)
    sizes = sorted({size for points in lines.values() for size, _, _ in points})
    figure.update_xaxes(
        title_text="features kept (log scale)", type="log", tickvals=sizes, ticktext=[f"{size:,}" for size in sizes]
    )
    _scale_quality(figure, y)
    figure.update_layout(showlegend=True)
    note = f"quality on {count_rows([result.n_tokens])}"
    if isinstance(result, PruningCurve):
        note += f", order from {result.n_tokens_ranked:,} others; importance ~ rank^-{result.exponent:.2f}"
    return apply_layout(figure, "Quality by size of the dictionary", note)


def _sizes_of(result: PruningCurve | Evaluation, y: Quality) -> dict[str, list[tuple[int, float, str]]]:
    """Size, quality and hover text of each point, by order."""
    if isinstance(result, Evaluation):
        return {"prefix": [(size, fvu, "") for size, fvu in sorted(result.prefixes.items())]}
    lines: dict[str, list[tuple[int, float, str]]] = {row.order: [] for row in result.rows}
    for row in sorted(result.rows, key=lambda row: row.size):
        lines[row.order].append((row.size, getattr(row, y), f", L0 {row.l0:.4g}"))
    return lines
