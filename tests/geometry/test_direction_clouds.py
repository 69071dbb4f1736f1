"""The cloud of directions: spectra and clumps that were planted, and clouds that have none."""

import json
import math

import numpy as np
import pytest
import torch
from dictionaries import sae_of

import saelab as sl
from saelab.geometry.direction_clouds import GAUSSIAN, ON_SPHERE, UNTRAINED, neighbor_entropy

D, N = 40, 1200


@pytest.fixture(scope="module")
def draw():
    return torch.Generator().manual_seed(0)


def test_a_planted_power_law_has_its_slope(draw):
    """Rows of norm 1 keep it nearly: no component dominates the length."""
    scales = torch.arange(1.0, D + 1) ** -0.25  # of standard deviations: variances fall with the root of the rank
    row = sl.galaxy(sae_of(torch.randn(20_000, D, generator=draw) * scales), n_draws=1).rows[0]
    assert row.cloud.slope == pytest.approx(-0.5, abs=0.05) and row.cloud.r2_power > 0.98 > row.cloud.r2_exponential
    assert row.cloud.variances.sum() == pytest.approx(1) and (np.diff(row.cloud.variances) <= 0).all()
    assert abs(row.nulls[UNTRAINED][0].slope) < 0.1 and row.nulls[GAUSSIAN][0].slope == pytest.approx(-0.5, abs=0.05)


def test_clumps_are_above_gaussian_rows_of_equal_covariance(draw):
    centers = torch.randn(N // 4, D, generator=draw)
    clumps = centers.repeat_interleave(4, 0) + 0.1 * torch.randn(N, D, generator=draw)
    found = sl.galaxy({"clumps": sae_of(clumps), "none": sae_of(torch.randn(N, D, generator=draw))})
    assert found.at("clumps").excess() > 10 > 1 > abs(found.at("none").excess())
    assert "none: Gaussian rows of norm 1 have as much clustering" in " ".join(found.failed)
    assert "clumps: Gaussian" not in " ".join(found.failed)
    assert str(found).startswith("A null is not passed: ") and json.loads(json.dumps(found.to_dict()))["n_draws"] == 3
    # scaling Gaussian rows to norm 1 takes a dimension away, which is no structure
    assert found.at("none").cloud.clustering == pytest.approx(found.at("none").nulls[ON_SPHERE][0].clustering, abs=1)


def test_entropy_is_that_of_a_gaussian_in_few_dimensions(draw):
    """Of 4,000 rows in two dimensions the estimate's standard error is about .02."""
    rows = torch.randn(4000, 2, generator=draw, dtype=torch.float64)
    assert neighbor_entropy(rows) == pytest.approx(1 + math.log(2 * math.pi), abs=0.15)
    assert neighbor_entropy(2 * rows) - neighbor_entropy(rows) == pytest.approx(2 * math.log(2), abs=0.1)


def test_blocks_dead_rows_and_lengths_change_nothing(draw, monkeypatch):
    rows = torch.randn(200, D, generator=draw)
    plain = sl.galaxy(sae_of(rows), n_draws=1).rows[0]
    longer = torch.cat([rows, torch.zeros(3, D)]) * torch.rand(203, 1, generator=draw).add(0.5)
    monkeypatch.setattr("saelab.geometry.direction_clouds.BLOCK", 33)
    found = sl.galaxy(sae_of(longer), n_draws=1).rows[0]
    assert found.n_rows == 200 and found.cloud.slope == pytest.approx(plain.cloud.slope)
    assert found.cloud.clustering == pytest.approx(plain.cloud.clustering, abs=1e-4)
    dead = sae_of(torch.cat([rows, rows[:1]]))
    dead.training_ = {"dead": [200]}
    assert sl.galaxy(dead, n_draws=1).rows[0].cloud.clustering == pytest.approx(plain.cloud.clustering, abs=1e-4)


def test_wrong_input_is_refused(draw):
    with pytest.raises(ValueError, match="at least 18 dimensions"):
        sl.galaxy(sae_of(torch.randn(50, 16, generator=draw)))
    with pytest.raises(ValueError, match="at least one, got 0"):
        sl.galaxy({})
