"""Association tests of words whose bias was planted, and of words that differ in something else."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.probing import association_test

D, N = 24, 6


def plant(seed: int, bias: float, apart: float = 0.0) -> list[np.ndarray]:
    """Words x and y, attributes a and b: `bias` along the attributes' axis, `apart` along another."""
    rng = np.random.default_rng(seed)
    axis, other = np.eye(D)[:2]
    steps = [bias * axis + apart * other, -bias * axis - apart * other, 3 * axis, -3 * axis]
    return [step + 0.5 * rng.standard_normal((N, D)) for step in steps]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_figures_are_those_of_the_formula() -> None:
    x, y, a, b = plant(0, 0.2)
    found = association_test(*plant(0, 0.2))
    s = np.array([np.mean([cosine(w, v) for v in a]) - np.mean([cosine(w, v) for v in b]) for w in [*x, *y]])
    assert found.statistic == pytest.approx(s[:N].mean() - s[N:].mean())
    assert found.effect == pytest.approx(found.statistic / s.std())
    sums = [s[list(chosen)].sum() for chosen in itertools.combinations(range(2 * N), N)]
    assert found.p == pytest.approx(np.mean(np.array(sums) >= s[:N].sum() - 1e-12))
    assert found.n_partitions == (math.comb(2 * N, N),) * 2 and found.is_exact == (True, True)
    g = np.array([np.mean([cosine(w, v) for w in x]) - np.mean([cosine(w, v) for w in y]) for v in [*a, *b]])
    sums = [g[list(chosen)].sum() for chosen in itertools.combinations(range(2 * N), N)]
    assert found.p_attributes == pytest.approx(np.mean(np.array(sums) >= g[:N].sum() - 1e-12))


def test_a_planted_bias_is_found_and_its_sign_kept() -> None:
    x, y, a, b = plant(1, 1.5)
    found = association_test(x, y, a, b)
    assert found.effect > 1.5 and found.p == 1 / math.comb(2 * N, N) == found.p_attributes and not found.failed
    turned = association_test(y, x, torch.from_numpy(a), b)
    assert turned.effect == pytest.approx(-found.effect) and turned.p == 1 and len(turned.failed) == 2
    both = association_test(y, x, a, b, alternative="two-sided")
    assert both.p == pytest.approx(2 / math.comb(2 * N, N)) and not both.failed


def test_p_is_uniform_without_bias() -> None:
    ps = np.array([association_test(*plant(seed, 0.0)).p for seed in range(60)])
    reach = 4 / math.sqrt(12 * len(ps))  # four standard errors of the mean of uniform numbers
    assert abs(ps.mean() - 0.5) < reach and np.mean(ps <= 0.05) < 0.2


def test_words_that_are_apart_pass_the_null_of_words_alone() -> None:
    """Attributes without an axis of their own: two clouds of words are told apart along any difference of them."""
    seeds = []
    for seed in range(40):
        x, y, *_ = plant(seed, 0.0, apart=3.0)
        a, b = np.random.default_rng(900 + seed).standard_normal((2, N, D))
        seeds.append(association_test(x, y, a, b, alternative="two-sided", seed=seed))
    by_words, by_attributes = (
        np.mean([one <= 0.05 for one in ps]) for ps in zip(*((s.p, s.p_attributes) for s in seeds), strict=False)
    )
    assert by_words > 0.25  # about 0.6, less four standard errors
    assert by_attributes < 0.19  # 0.05 and four standard errors
    failing = next(one for one in seeds if one.p <= 0.05 < one.p_attributes)
    assert str(failing).startswith("A null is not passed: attributes permuted")


def test_random_partitions_agree_with_all_and_count_the_true_one() -> None:
    sets = plant(3, 0.1)
    exact, drawn = association_test(*sets), association_test(*sets, n_permutations=400)
    assert drawn.n_partitions == (400, 400) and drawn.is_exact == (False, False)
    assert abs(exact.p - drawn.p) < 4 * math.sqrt(0.25 / 400)
    assert 1 / 100 <= association_test(*plant(3, 3.0), n_permutations=99).p <= 3 / 100  # drawn again at times
    assert drawn.p == association_test(*sets, n_permutations=400).p
    assert "random 400 partitions" in str(drawn) and json.loads(json.dumps(drawn.to_dict()))["sizes"] == [N] * 4


def test_sets_of_other_sizes_are_compared_by_their_means() -> None:
    x, y, a, b = plant(4, 1.5)
    found = association_test(x[:4], y, a[:5], b[:3])
    assert found.sizes == (4, N, 5, 3) and found.n_partitions == (math.comb(10, 4), math.comb(8, 5))
    assert found.p == 1 / math.comb(10, 4) and found.p_attributes == 1 / math.comb(8, 5)


def test_what_cannot_be_tested_is_told() -> None:
    x, y, a, b = plant(0, 0.5)
    with pytest.raises(ValueError, match="at least 2 rows"):
        association_test(x[:1], y, a, b)
    with unchecked(), pytest.raises(ValueError, match="one width"):
        association_test(x, y, a, b[:, :-1])
    with pytest.raises(ValueError, match="length 0"):
        association_test(x * 0, y, a, b)
    with pytest.raises(ValueError, match="all the same"):
        association_test(np.ones((N, D)), np.ones((N, D)), a, b)
    with unchecked(), pytest.raises(ValueError, match="alternative"):
        association_test(x, y, a, b, alternative="less")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        association_test(x * np.nan, y, a, b)
    assert sl.probing.association_test is association_test
