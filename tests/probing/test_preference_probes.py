"""Preferences that were planted along one axis, transferred to pairs that share it and to pairs that do not."""

import json
import math

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.probing import preference_probe
from saelab.probing.preference_probes import OWN

D, N = 12, 60


def plant(seed: int) -> tuple[torch.Tensor, list[tuple[int, int]], dict[str, list[tuple[int, int]]]]:
    """Words whose rank is their first coordinate; pairs of the first 40, others along this axis and the second."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank, other = x[:, 0].tolist(), x[:, 1].tolist()

    def order(rows: range, by: list[float]) -> list[tuple[int, int]]:
        return [(i, j) for i in rows for j in rows if by[i] > by[j] + 0.5]

    rest = range(40, N)
    turned = [(j, i) for i, j in order(rest, rank)]
    return x, order(range(40), rank), {"same": order(rest, rank), "turned": turned, "other": order(rest, other)}


@pytest.fixture(scope="module")
def found():
    x, pairs, transfer = plant(0)
    return preference_probe(x, pairs, transfer, n_draws=39)


def test_a_planted_preference_transfers_and_others_do_not(found) -> None:
    assert found[OWN].accuracy > 0.9 and found["same"].accuracy > 0.9 and found[OWN].p == found["same"].p == 1 / 40
    assert found["turned"].accuracy == pytest.approx(1 - found["same"].accuracy) and found["turned"].p == 1 / 40
    # the draws' own spread, of which four deviations
    assert abs(found["other"].accuracy - 0.5) < 4 * np.std(found["other"].flipped)
    assert abs(np.mean(found[OWN].flipped) - 0.5) < 4 * np.std(found[OWN].flipped) / math.sqrt(39) + 0.02
    assert not any(one.startswith(("same", "turned", OWN)) for one in found.failed)


def test_the_direction_and_the_probabilities_are_those_of_the_axis(found) -> None:
    x, pairs, _ = plant(0)
    direction = found.direction("blocks.0.hook_resid_post")
    assert isinstance(direction, sl.interventions.Direction) and float(direction.vector[0]) > 0.9
    first, second = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    p = found.prefer(x[first], x[second])
    assert torch.allclose(p + found.prefer(x[second], x[first]), torch.ones(len(p), dtype=torch.float64))
    assert float((p > 0.5).double().mean()) > 0.95
    assert json.loads(json.dumps(found.to_dict()))["n_pairs"] == len(pairs) == found.n_pairs


def test_units_of_columns_change_no_decision() -> None:
    x, pairs, transfer = plant(1)
    scale = torch.logspace(-3, 3, D, dtype=torch.float64)
    small, large = (preference_probe(one, pairs, transfer, n_draws=19) for one in (x, x * scale))
    assert [row.accuracy for row in small.rows] == pytest.approx([row.accuracy for row in large.rows])
    rows = slice(0, 20), slice(20, 40)
    told = small.prefer(x[rows[0]], x[rows[1]]), large.prefer(*(x[some] * scale for some in rows))
    assert torch.allclose(*told, atol=1e-3)
    constant = torch.cat([x, torch.ones(N, 1, dtype=torch.float64)], 1)
    assert np.isfinite(preference_probe(constant, pairs, n_draws=19).weights).all()


def test_pairs_without_a_reason_are_told() -> None:
    """Words in no order: a probe fits its own pairs, and decides held-out ones no better than those of turned pairs."""
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    order = rng.permutation(40).tolist()
    found = preference_probe(x, [(order[i], order[j]) for i in range(40) for j in range(i + 4, 40)], n_draws=39)
    assert abs(found[OWN].accuracy - 0.5) < 4 * np.std(found[OWN].flipped) and found[OWN].p > 1 / 40
    assert found.failed == () or str(found).startswith(f"A null is not passed: {OWN}")


def test_own_pairs_are_scored_by_probes_that_saw_neither_word() -> None:
    """Each word has a column of its own: whatever is learned of some words says nothing about others."""
    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    found = preference_probe(torch.eye(20), pairs, n_folds=4, n_draws=19)
    assert found[OWN].accuracy == 0.5 and found[OWN].n_pairs == 4 * 10


def test_pairs_that_do_not_fit_are_told() -> None:
    x, pairs, _ = plant(0)
    with pytest.raises(ValueError, match="'pairs' must be two different rows"):
        preference_probe(x, [(0, 0), *pairs])
    with pytest.raises(ValueError, match="'far' must be two different rows"):
        preference_probe(x, pairs, {"far": [(0, N)]})
    with pytest.raises(ValueError, match="'none' must be"):
        preference_probe(x, pairs, {"none": []})
    with pytest.raises(ValueError, match="at least 4"):
        preference_probe(x, pairs[:3])
    with pytest.raises(ValueError, match="one of the 40 folds"):
        preference_probe(x[:40], pairs, n_folds=40)
