"""Figures: what is drawn is what was counted, signs stand on their sides, and nobody's text becomes markup."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis.pruning import PrunedScore
from saelab.stores.feature_statistics import FeatureStatistics
from saelab.training.loop import FileSink
from saelab.visualization.feature_plots import (
    plot_activations,
    plot_dead_features,
    plot_density,
    plot_dissection,
    plot_feature_map,
)
from saelab.visualization.training_plots import plot_frontier, plot_prefixes, plot_training

HOOK = "blocks.1.hook_resid_post"
D_SAE = 40
HOSTILE = "<script>alert(1)</script><b>$x$</b> %{x}"
TAGS = {"<br>", "<extra>", "</extra>", "<sup>", "</sup>", '<span style="font-size:12px">', "</span>"}


@pytest.fixture(scope="module")
def tokens(tiny):
    texts = [f"{a} {v} the {b}. Then {b} ran!" for a in ("Fox", "Owl", "Cat") for v in ("saw", "hid") for b in "xyzw"]
    return sl.tokenize(tiny, texts, ctx_len=20)


@pytest.fixture(scope="module")
def sae():
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=4), prefixes=(8, D_SAE)), seed=0)
    with torch.no_grad():
        sae.W_enc[:, [5, 9]] = 0
    return sae


@pytest.fixture(scope="module")
def store(sae, tiny, tokens, tmp_path_factory):
    return sl.harvest(sae, tiny, tokens, tmp_path_factory.mktemp("store"), hook_point=HOOK, progress=False)


@pytest.fixture(scope="module")
def evaluation(sae, tiny, tokens):
    return sl.evaluate(sae, tiny, tokens, hook_point=HOOK, n_bootstrap=20, progress=False)


@pytest.fixture(scope="module")
def progress(evaluation):
    """Rows in no order, as if a caller had put them together."""
    sizes = [("energy", 40, 0.1), ("energy", 8, 0.4), ("random", 8, 0.9), ("random", 40, 0.1)]
    rows = [
        PrunedScore(order=order, size=n, fvu=fvu, l0=n / 10, ce=1.0, loss_recovered=math.nan) for order, n, fvu in sizes
    ]
    return sl.analysis.PruningCurve(
        rows=tuple(rows), exponent=1.5, r2=0.9, ce_clean=1.0, ce_zero=2.0, n_tokens=1234, n_tokens_ranked=1200
    )


def history(n=3, fvu=0.5, prefix=""):
    """Entries as the training loop makes them, FVU on the last."""
    return [
        {"step": i, "n_tokens": 64 * i, f"{prefix}reconstruction": 1 / i, f"{prefix}l0": 4.0, f"{prefix}dead_frac": 0.0}
        | {f"{prefix}lr": 1e-3, f"{prefix}held_out_fvu": fvu if i == n else None}
        for i in range(1, n + 1)
    ]


def traces(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def strings(thing):
    """Every string in a figure's JSON."""
    if isinstance(thing, dict):
        return [s for key, value in thing.items() if key != "template" for s in strings(value)]
    if isinstance(thing, list | tuple | np.ndarray):
        return [s for value in thing for s in strings(value)]
    return [thing] if isinstance(thing, str) else []


def test_density_counts_every_feature_once_a_panel(store):
    codes = store.matrix().toarray()
    figure = plot_density(store, near_dead_rate=0.01, dense_rate=0.2)
    for name, fires in (("any firing", codes != 0), ("positive", codes > 0), ("negative", codes < 0)):
        [bars] = traces(figure, name)
        fires = fires.sum(0)
        assert sum(bars.y) == D_SAE and bars.y[0] == (fires == 0).sum()
        logs = np.log10(fires[fires > 0] / len(store))
        for x, n in zip(bars.x[1:], bars.y[1:], strict=True):
            assert n == ((logs >= x - 0.1 - 1e-9) & (logs < x + 0.1 - 1e-9)).sum()
    assert bars.x[0] < -math.log10(len(store)) - 0.2 and figure.layout.xaxis.ticktext[0] == "never"
    assert {shape.x0 for shape in figure.layout.shapes} == {math.log10(0.01), math.log10(0.2)}
    assert f"3/N = {3 / len(store):.2g}" in figure.layout.title.text
    assert not plot_density(store, near_dead_rate=1e-9, dense_rate=1e-8).layout.shapes  # not among the silent ones
    with pytest.raises(ValueError, match="near_dead_rate < dense_rate"):
        plot_density(store, near_dead_rate=0.5)


def test_a_store_in_which_nothing_fires_is_drawn(store, sae):
    silent = sl.FeatureStore.load(store.folder)
    vars(silent)["statistics"] = FeatureStatistics.zeros(D_SAE)
    [bars] = plot_density(silent).data
    assert bars.y[0] == D_SAE == sum(bars.y)
    figure = plot_activations(store, 5)
    assert not figure.data and "never fires" in figure.layout.annotations[0].text
    with pytest.raises(ValueError, match="4 live features"):
        plot_feature_map(sae, store=silent)


def test_activations_stand_on_their_side_of_zero(store):
    feature = int(store.statistics.fires.min(1).argmax())
    codes = store.matrix().toarray()[:, feature]
    figure = plot_activations(store, feature)
    for name, side in (("negative", -1), ("positive", 1)):
        [bars] = traces(figure, name)
        mine = side * codes[side * codes > 0]
        assert (
            all(side * x > 0 for x in bars.x)
            and sum(bars.y) == len(mine) == store.statistics.fires[feature, int(side < 0)]
        )
        for (low, high), n in zip(side * np.array(bars.customdata), bars.y, strict=True):
            last = high == pytest.approx(abs(codes).max())
            assert n == ((mine >= low) & ((mine < high) | last)).sum()
    assert figure.layout.yaxis.type == "log" and figure.layout.xaxis.title.text
    assert str(feature) in figure.layout.title.text
    with pytest.raises(IndexError, match="Feature"):
        plot_activations(store, D_SAE)


def test_dead_features_are_shares_of_their_group(store):
    found = sl.analysis.dead_features(store, near_dead_rate=0.01, dense_rate=0.2)
    figure = plot_dead_features(found)
    assert list(found.groups) == ["0 to 7", "8 to 39", "all"]
    for i, counts in enumerate(found.groups.values()):
        assert {bars.name: bars.customdata[i] for bars in figure.data if bars.customdata[i]} == counts
        assert sum(bars.x[i] for bars in figure.data) == pytest.approx(1)
        assert f"({sum(counts.values())})" in figure.data[0].y[i]


def test_training_curves_are_the_history(tmp_path):
    FileSink(tmp_path, history(4))
    for source in (tmp_path, str(tmp_path), history(4)):
        figure = plot_training(source)
        assert [t.text for t in figure.layout.annotations][1:] == ["L0", "Dead latents", "Learning rate"]
        loss, fvu = figure.data[:2]
        assert loss.x == (64, 128, 192, 256) and loss.y == (1, 1 / 2, 1 / 3, 1 / 4)
        assert fvu.x == (256,) and fvu.y == (0.5,)
        assert "256 tokens" in figure.layout.title.text and not any(trace.showlegend for trace in figure.data)
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl"):
        plot_training({"a": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="at least one entry"):
        plot_training([])
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "n_tok')
    with pytest.raises(ValueError, match="JSON on every line"):
        plot_training(tmp_path)


def test_saes_of_one_run_and_several_runs_are_told_apart():
    both = [a | b for a, b in zip(history(2, prefix="0/"), history(2, 0.7, prefix="1/"), strict=True)]
    figure = plot_training({"pair": both, "alone": history(5, 0.9)})
    names = [trace.name for trace in figure.data if trace.showlegend]
    assert names == ["pair SAE 0", "pair SAE 1", "alone"]
    assert [trace.y for trace in figure.data if trace.mode == "markers"] == [(0.5,), (0.7,), (0.9,)]
    assert "128 to 320 tokens" in figure.layout.title.text


def test_the_frontier_is_sorted_and_leaves_out_what_is_unknown(evaluation):
    ladder = [
        replace(evaluation, l0=l0, fvu=fvu, intervals={"fvu": (fvu - 0.01, fvu + 0.02)})
        for l0, fvu in ((8.0, 0.1), (2.0, 0.4))
    ]
    lost = replace(evaluation, fvu=math.nan)
    figure = plot_frontier({"ladder": ladder, "alone": evaluation, "lost": lost})
    [line], [alone] = traces(figure, "ladder"), traces(figure, "alone")
    assert line.x == (2, 8) and line.y == (0.4, 0.1) and alone.x == (evaluation.l0,)
    assert line.error_y.array == pytest.approx([0.02] * 2) and line.error_y.arrayminus == pytest.approx([0.01] * 2)
    [pca] = traces(figure, "pca")
    assert pca.y == (evaluation.baselines["pca"]["fvu"],) * 3 and pca.customdata == ("ladder", "ladder", "alone")
    assert "1 of 4 left out" in figure.layout.title.text and figure.layout.xaxis.type == "log"
    assert not traces(plot_frontier({"a": evaluation}, baselines=False), "pca")
    pair = [replace(evaluation, loss_recovered=value, baselines={}) for value in (0.9, math.nan)]
    [line] = plot_frontier({"pair": pair}, "loss_recovered").data
    assert line.y == (0.9,)
    with pytest.raises(ValueError, match="known fvu, got none among 1"):
        plot_frontier({"lost": lost})


def test_prefix_curves_follow_size(progress, evaluation):
    figure = plot_prefixes(progress)
    assert [(t.name, t.x, t.y) for t in figure.data] == [
        ("energy", (8, 40), (0.4, 0.1)),
        ("random", (8, 40), (0.9, 0.1)),
    ]
    [line] = plot_prefixes(evaluation).data
    assert dict(zip(line.x, line.y, strict=True)) == evaluation.prefixes and line.x == (8, D_SAE)
    for wrong in (
        (progress, "loss_recovered"),
        (evaluation, "loss_recovered"),
        (replace(evaluation, prefixes={}), "fvu"),
    ):
        with pytest.raises(ValueError, match=r"known loss_recovered|must have prefixes"):
            plot_prefixes(*wrong)


def planted(activation):
    """Three directions, ten features along each, every other one turned round."""
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=30, activation=activation), seed=0)
    noise = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(8).repeat(4, 1)[torch.arange(30) % 3] + 0.05 * noise)
        sae.W_dec[torch.arange(30) % 2 == 1] *= -1
    return sae


@pytest.mark.parametrize("kind", ["signed", "unsigned", "neighbors"])
def test_like_features_lie_together(kind):
    """Antipodes are alike where codes are signed, and not where they are not."""
    sae = planted(sl.TopK(k=2) if kind == "unsigned" else sl.AbsTopK(k=2))
    figure = plot_feature_map(sl.analysis.nearest_features(sae, m=4) if kind == "neighbors" else sae)
    places = np.stack([figure.data[0].x, figure.data[0].y], 1)
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(1)
    period = 6 if kind == "unsigned" else 3
    assert (nearest % period == np.arange(30) % period).all()
    if kind == "signed":
        assert (nearest % 2 != np.arange(30) % 2).any()


def test_the_map_shows_the_living_and_says_what_it_left_out(sae, store):
    torch_state, state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    figure = plot_feature_map(sae, store=store, labels={7: "cats", 12: "dogs"}, limit=20, seed=3)
    again = plot_feature_map(sae, store=store, labels={7: "cats", 12: "dogs"}, limit=20, seed=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    [points] = figure.data
    shown = points.customdata.tolist()
    alive = set(np.flatnonzero(store.statistics.fires.sum(1)).tolist())
    assert len(shown) == 20 and {7, 12} <= set(shown) <= alive and {5, 9}.isdisjoint(alive)
    assert np.array_equal(points.x, again.data[0].x)
    assert f"20 of {len(alive)} live features, drawn with seed 3; {D_SAE - len(alive)} dead" in figure.layout.title.text
    positive, negative = store.statistics.fires[7]
    told = points.hovertext[shown.index(7)].split("<br>")
    assert told[:2] == ["feature 7", "cats"] and told[2].endswith(f"{positive} +, {negative} -")
    assert points.marker.color[0] == pytest.approx(math.log10(store.statistics.fires[shown[0]].sum() / len(store)))
    trained = planted(sl.AbsTopK(k=2))
    trained.training_ = {"dead": [0, 4], "n_tokens_seen": 9000}
    figure = plot_feature_map(trained)
    assert {0, 4}.isdisjoint(figure.data[0].customdata) and "9,000 tokens" in figure.layout.title.text
    for wrong, message in (
        ({"store": store}, "30 features"),
        ({"labels": {30: "x"}}, "0..29"),
        ({"limit": 3}, "`limit`"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plot_feature_map(trained, **wrong)


def test_text_is_never_markup_and_every_figure_names_axes_and_tokens(store, sae, evaluation, progress):
    hostile = replace(evaluation, sae=HOSTILE, baselines={HOSTILE: evaluation.baselines["pca"]})
    text = {
        "training": plot_training({HOSTILE: [entry | {HOSTILE: 1.0} for entry in history()]}),
        "frontier": plot_frontier({HOSTILE: hostile}),
        "map": plot_feature_map(sae, store=store, labels={7: HOSTILE}),
    }
    plain = [
        plot_density(store),
        plot_activations(store, 0),
        plot_dead_features(sl.analysis.dead_features(store)),
        plot_prefixes(progress),
    ]
    plain += [plot_feature_map(sl.analysis.nearest_features(store))]
    for figure in [*text.values(), *plain]:
        said = strings(figure.to_plotly_json())
        tags = {tag for s in said for tag in re.findall(r"<[^<>]*>", s)}
        assert tags <= TAGS and "<script" not in "".join(said)
        assert re.search(r"\d(?: |<br>)tokens", figure.layout.title.text)
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            assert axis.title.text or axis.matches or axis.showticklabels is False
    for figure in text.values():
        said = "".join(strings(figure.to_plotly_json()))
        assert "&lt;script&gt;" in said and "&#36;x&#36;" in said and "$" not in said
        templates = [trace.hovertemplate or "" for trace in figure.data]
        assert not any("alert" in template for template in templates)  # %{x} would be filled in there


def test_dissections_are_means_over_draws():
    rng = np.random.default_rng(0)
    codes, truth = rng.normal(size=(800, 4)), rng.random((800, 1)) < 0.2
    x = torch.from_numpy(codes).float()
    found = sl.dissect(codes, {"<b>c</b>": truth[:, 0]}, np.arange(800) // 8, acts=x, n_rotations=2)
    share, unique = plot_dissection(found).data
    assert len(share.y) == len({row.name for row in found.rows}) == len(unique.x)
    drawn = [row.detector_frac for row in found.rows if row.name == "activations rotated"]
    assert share.x[share.y.index("activations rotated")] == np.mean(drawn) and len(drawn) == 2
    assert share.x[0] == found.rows[0].detector_frac and unique.x[0] == found.rows[0].n_unique_clear
