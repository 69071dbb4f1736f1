"""Statistics against scipy and scikit-learn, and that each is defined once."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score
from sources import nodes, parse

import saelab
from saelab.evaluation.feature_classifiers import classifier_union
from saelab.functional.statistics import (
    auroc,
    balanced_accuracy,
    choose_threshold,
    correlation,
    correlation_of_sums,
    draw_weights,
    f1,
    fit_balanced_probe,
    fit_probe,
    kappa,
    rank_correlation,
)

HOMES = ("functional/statistics.py", "geometry/group_agreement.py")  # the latter of several classes
ONCE = {"auroc", "balanced_accuracy", "choose_threshold", "correlation", "f1", "fit_probe", "kappa",
        "pearson", "rank_correlation", "spearman"}  # fmt: skip
FROM_LIBRARIES = {"LBFGS", "LogisticRegression", "pearsonr", "roc_auc_score", "roc_curve", "spearmanr"}


def test_each_is_defined_once():
    package, found = Path(saelab.__file__).parent, []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        tree = parse(file)
        used = {node.attr for node in nodes(tree) if isinstance(node, ast.Attribute)}
        used |= {one.name for node in nodes(tree) if isinstance(node, ast.ImportFrom) for one in node.names}
        defined = {node.name.lstrip("_") for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name not in HOMES:
            found += [f"{name}: {what}" for what in sorted((used & FROM_LIBRARIES) | (defined & ONCE))]
    assert not found, f"use those of {HOMES}: {found}"


@pytest.fixture
def planted():
    """A label of about a fifth of the rows, and scores with ties that are higher where it is true."""
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.2
    return (rng.normal(size=300) + 1.5 * y).round(1), y


def test_auroc_is_that_of_scikit_learn(planted):
    scores, y = planted
    assert auroc(scores, y) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)
    assert balanced_accuracy(scores > 1, y) == pytest.approx(roc_auc_score(y, scores > 1), abs=1e-12)
    assert auroc((scores > 1).astype(float), y) == pytest.approx(balanced_accuracy(scores > 1, y), abs=1e-12)
    assert math.isnan(auroc(scores, np.ones(300, bool))) and math.isnan(balanced_accuracy(y, np.zeros(300, bool)))


@pytest.mark.parametrize("by", ["kappa", "balanced"])
def test_the_threshold_is_the_best_of_all(planted, by):
    scores, y = planted
    threshold, found = choose_threshold(scores, y, by)
    value = cohen_kappa_score if by == "kappa" else lambda y, guess: balanced_accuracy(guess, y)
    assert value(y, scores >= threshold) == pytest.approx(max(value(y, scores >= t) for t in np.unique(scores)))
    assert found == pytest.approx(f1_score(y, scores >= threshold))


def test_kappa_is_that_of_scikit_learn(planted):
    scores, y = planted
    guess = scores > 0.5
    counts = int((guess & y).sum()), int(guess.sum()), int(y.sum())
    assert float(kappa(*counts, len(y))) == pytest.approx(cohen_kappa_score(y, guess), abs=1e-12)
    assert float(f1(*counts)) == pytest.approx(f1_score(y, guess), abs=1e-12)
    assert float(kappa(9, 9, 9, 9)) == 0 == float(f1(0, 0, 0))


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.normal(size=30).round(1)
    assert correlation(x, y) == pytest.approx(pearsonr(x, y).statistic)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    sums = x.sum(), y.sum(), x @ x, y @ y, x @ y
    assert float(correlation_of_sums(30, *sums)) == pytest.approx(correlation(x, y), abs=1e-11)
    for same in (np.ones(5), np.full(5, 0.1)):  # the mean of tenths is off by rounding
        assert math.isnan(correlation(same, x[:5]))
        assert math.isnan(correlation_of_sums(5, same.sum(), x[:5].sum(), same @ same, x[:5] @ x[:5], same @ x[:5]))


def test_weights_draw_each_item_as_often_as_any():
    weights = draw_weights(20, 4000, seed=1)
    assert (weights.sum(1) == 20).all() and (draw_weights(20, 4000, seed=1) == weights).all()
    sd = math.sqrt(20 * (1 / 20) * (19 / 20) / 4000)  # of the mean of a binomial count
    assert np.abs(weights.mean(0) - 1).max() < 5 * sd
    assert np.isnan(draw_weights(1, 10)).all()


@pytest.mark.parametrize("solver", ["liblinear", "lbfgs"])
def test_a_balanced_probe_is_one_of_scikit_learn(solver):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)), rng.random(200) < 0.2
    x[:, 2] += 2 * y
    probe = LogisticRegression(class_weight="balanced", C=0.5, solver=solver).fit(x, y)
    found = fit_balanced_probe(x, y, c=0.5, solver=solver)
    np.testing.assert_allclose(found, probe.coef_[0], atol=1e-3)  # both stop within their tolerance of the optimum
    np.testing.assert_allclose(found, fit_balanced_probe(csc_matrix(x).tocsr(), y, c=0.5, solver=solver), atol=1e-3)
    sparse = fit_balanced_probe(x, y, c=0.05, l1=True)
    assert np.argmax(np.abs(sparse)) == 2 and (sparse == 0).any()


def test_a_union_is_what_trying_all_finds():
    rng = np.random.default_rng(0)
    y = rng.random(400) < 0.4
    fires = (rng.random((400, 12)) < 0.2) & (y[:, None] | (rng.random((400, 12)) < 0.3))
    fires[:, 7] = fires[:, 3]  # of equal ones the first

    def score(guess):
        return float(f1((guess & y).sum(), guess.sum(), y.sum()))

    expected, predicted, best = [], np.zeros(400, bool), 0.0
    while len(expected) < 10:
        gains = [score(predicted | column) for column in fires.T]
        if max(gains) <= best + (0.03 if expected else 0):
            break
        expected.append(int(np.argmax(gains)))
        predicted, best = predicted | fires[:, expected[-1]], max(gains)
    found = classifier_union(
        fires[y].sum(0), fires.sum(0), y, lambda i: np.flatnonzero(fires[:, i]), lambda rows: fires[rows].sum(0)
    )
    assert found == expected and len(found) > 2
    assert (
        classifier_union(np.zeros(3, int), np.arange(3), y, lambda i: np.arange(i), lambda rows: np.zeros(3, int)) == []
    )


def test_a_standardized_probe_does_not_hear_of_units():
    """The same predictions whatever the columns' units and origins, and those of scikit-learn on standardized ones."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)).astype(np.float32)
    y = (x @ [1.0, -2.0, 0.5] + rng.normal(size=400) > 0)[:, None].astype(np.float32)
    rounded = np.where(rng.random((400, 1)) < 0.5, 7, np.nextafter(np.float32(7), np.float32(8)))  # of one number
    moved = np.concatenate([x * [100, 0.01, 1] + [5, -3, 0], rounded], 1).astype(np.float32)
    probes = [fit_probe(torch.from_numpy(one), torch.from_numpy(y), standardize=True) for one in (x, moved)]
    plain, other = (probe(torch.from_numpy(one))[:, 0].numpy() for probe, one in zip(probes, (x, moved), strict=True))
    np.testing.assert_allclose(plain, other, atol=1e-2)
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)
    known = LogisticRegression(C=1.0, tol=1e-8).fit(scaled, y[:, 0]).decision_function(scaled)
    np.testing.assert_allclose(plain, known, atol=1e-2)
    assert float(probes[1].weight[0, 3].abs()) < 1e-6  # a column that is constant but for rounding says nothing
