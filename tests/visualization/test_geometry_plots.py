"""Figures of geometry hold the numbers of their results, and can be drawn as pictures."""

import numpy as np
import pytest
import torch
from dictionaries import sae_of

import saelab as sl
from saelab.geometry.relation_crystals import RANDOM
from saelab.visualization import draw_picture, plot_crystals, plot_galaxy, plot_lobes

DRAW = np.random.default_rng(0)
DOCS = np.repeat(np.arange(40), 20)
CODES = (DRAW.random((800, 24)) < 0.1).astype(np.float32)
SAE = sae_of(torch.from_numpy(DRAW.standard_normal((24, 20))).float())
LABELS = {"a": DRAW.random(800) < 0.3, "b": DRAW.random(800) < 0.3}


@pytest.mark.parametrize("labels", [None, LABELS])
def test_lobes_are_lines_by_number(labels):
    settings = {"doc_ids": DOCS, "labels": labels, "window": 5, "n_draws": 2}
    found = sl.lobes(CODES, SAE, (2, 4), baselines={"untrained": (CODES[::-1].copy(), SAE)}, **settings)
    figure = plot_lobes(found)
    lines = {(line.name, line.yaxis): line for line in figure.data}
    assert lines["SAE", "y"].y == tuple(score.contrast_z for score in found.scores)
    assert lines["SAE", "y"].x == ("2", "4")
    theirs = found.baselines["untrained"].scores
    assert lines["untrained", "y2"].y == tuple(score.meaning if labels else score.ami for score in theirs)
    null = tuple(score.meaning_permuted if labels else np.mean(score.ami_random) for score in found.scores)
    name = "meanings permuted" if labels else "Gaussian directions"
    assert lines[name, "y2"].y == pytest.approx(null)
    assert draw_picture(figure)[:4] == b"\x89PNG"


def test_spectra_are_lines_by_rank():
    found = sl.galaxy({"one": SAE, "two": sae_of(torch.from_numpy(DRAW.standard_normal((50, 20))).float())}, n_draws=1)
    figure = plot_galaxy(found)
    assert [line.name.split(",")[0] for line in figure.data] == ["one", "two", "untrained"]
    assert figure.data[1].y == pytest.approx(found.at("two").cloud.variances)
    assert figure.data[1].x[0] == 1 and figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert draw_picture(figure)[:4] == b"\x89PNG"


def test_crystals_are_bars_beside_their_nulls():
    pairs = {"x": [(i, i + 6) for i in range(6)], "y": [(i, i + 6) for i in range(12, 18)]}
    x = DRAW.standard_normal((40, 10))
    found = sl.crystals(x, pairs, distractors=DRAW.standard_normal(40), n_draws=3)
    figure = plot_crystals(found)
    shown = [score for score in found.scores if score.space != RANDOM]
    assert figure.data[0].x == tuple(score.space for score in shown) and len(figure.data) == 3
    for bar, what in zip(figure.data[1:], ("permuted_pairs", "permuted_relations"), strict=True):
        for i, score in enumerate(shown):
            draws = getattr(score, what)
            assert bar.y[i] == pytest.approx(np.mean(draws))
            assert bar.y[i] + bar.error_y.array[i] == pytest.approx(max(draws))
            assert bar.y[i] - bar.error_y.arrayminus[i] == pytest.approx(min(draws))
    assert draw_picture(figure)[:4] == b"\x89PNG"
