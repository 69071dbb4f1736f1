"""Planted surfaces, circles, classes and columns, naive formulas, and what must change nothing."""

import math

import numpy as np
import pytest
import torch

from saelab.functional.row_geometry import (
    curvature,
    draw_rotation,
    find_neighbors,
    intrinsic_dimension,
    lidar,
    matrix_entropy,
    mean_cosine,
    outlier_dimensions,
    permute_columns,
    shared_neighbors,
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("d", [1, 2, 4])
def test_a_planted_dimension_is_found(d: int) -> None:
    n = 900
    flat = torch.rand(n, d, generator=torch.Generator().manual_seed(d))
    curved = torch.cat([flat, (3 * flat).sin(), flat.square()], 1) @ draw(1, 3 * d, 20)
    # the standard error is d / sqrt(n), 5 of them; edges lower it by up to a tenth
    assert abs(intrinsic_dimension(curved) - d) < 5 * d / n**0.5 + 0.1 * d
    turned = 5 * curved.double() @ draw_rotation(20, np.random.default_rng(0))
    assert intrinsic_dimension(turned) == pytest.approx(intrinsic_dimension(curved), rel=1e-3)
    again = torch.cat([curved, curved[:50], curved[:300] * (1 + 1e-7)])  # the same rows, and rounded ones
    assert intrinsic_dimension(again) == pytest.approx(intrinsic_dimension(curved), rel=1e-3)
    assert intrinsic_dimension(permute_columns(curved, np.random.default_rng(0))) > 1.2 * intrinsic_dimension(curved)


def test_a_dimension_needs_rows_that_differ() -> None:
    assert all(
        math.isnan(intrinsic_dimension(x)) for x in (draw(0, 3, 4), torch.ones(9, 4), torch.eye(9), draw(0, 0, 4))
    )


def test_angles_are_those_of_a_polygon_and_of_independent_rows() -> None:
    turns = torch.arange(40) * 2 * math.pi / 12
    circle = torch.stack([turns.cos(), turns.sin()], 1)
    assert curvature(circle) == pytest.approx(30, abs=1e-4)
    assert curvature(torch.cat([circle, circle[-1:]])) == pytest.approx(30, abs=1e-4)  # a step of no length
    # one angle has a deviation of about 1 / sqrt(d) radians, 6 of them over sqrt(n)
    assert curvature(draw(0, 400, 300)) == pytest.approx(120, abs=6 * math.degrees(300**-0.5) / 20)
    assert math.isnan(curvature(draw(0, 2, 3))) and math.isnan(curvature(torch.ones(5, 3)))


def test_entropy_is_that_of_the_gram_matrix_and_forgets_order() -> None:
    x = draw(0, 9, 30)
    values = torch.linalg.eigvalsh((x @ x.T).double())
    shares = values / values.sum()
    assert matrix_entropy(x) == pytest.approx(float(-(shares * shares.log()).sum()) / math.log(9), rel=1e-5)
    assert matrix_entropy(x[torch.randperm(9, generator=torch.Generator().manual_seed(0))]) == pytest.approx(
        matrix_entropy(x), rel=1e-6
    )
    assert matrix_entropy(x + 50) < 0.1 < matrix_entropy(x)
    assert math.isnan(matrix_entropy(torch.zeros(4, 4))) and math.isnan(matrix_entropy(x[:1]))


def test_cosines_are_those_of_all_pairs() -> None:
    x = draw(0, 12, 5) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[~torch.eye(12, dtype=torch.bool)]
    assert mean_cosine(x) == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert math.isnan(mean_cosine(x[:1])) and math.isnan(mean_cosine(torch.zeros(3, 3)))


def test_planted_columns_are_outliers_and_turned_ones_are_not() -> None:
    x = draw(0, 200, 64)
    x[:, [3, 40]] *= 30
    assert outlier_dimensions(x).tolist() == [3, 40]
    # of 64 columns alike, one is 3 deviations above the mean with a probability of a few percent
    assert len(outlier_dimensions(x.double() @ draw_rotation(64, np.random.default_rng(0)))) <= 2


def test_neighbors_are_the_nearest_and_independent_sets_share_few() -> None:
    x, n, k = draw(0, 300, 6), 300, 10
    distances = (x[:, None] - x[None]).norm(dim=2).fill_diagonal_(math.inf)
    near = find_neighbors(x, k)
    assert torch.equal(near.sort(1).values, distances.topk(k, largest=False).indices.sort(1).values)
    assert shared_neighbors(near, near.flip(1)) == 1 and not (near == torch.arange(n)[:, None]).any()
    other = find_neighbors(draw(1, n, 6), k)
    # 3,000 draws of a share of 10 / 299, of which neighbors of neighbors repeat some: 6 deviations of a tenth of them
    assert abs(shared_neighbors(near, other) - k / (n - 1)) < 6 * (k / (n - 1) / (n * k / 10)) ** 0.5
    assert find_neighbors(torch.ones(4, 2), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    with pytest.raises(ValueError, match=r"`k` must be in 1\.\.2"):
        find_neighbors(draw(0, 3, 2), 3)


def test_classes_of_a_planted_rank_are_told_apart() -> None:
    means = draw(0, 60, 5) @ torch.linalg.qr(draw(1, 12, 5)).Q.T
    views = means[:, None] + 0.01 * draw(2, 60, 8, 12)
    # eigenvalues of 5 planted directions differ by their sampled lengths alone
    assert 4.5 < lidar(views) < 5.1
    noise = draw(3, 60, 8, 12)
    assert lidar(noise) > 9  # nothing but noise has all 12 directions alike
    one = noise.clone()
    one[..., 0] += 100 * draw(4, 60, 1)
    assert lidar(one) < 1.1
    assert math.isnan(lidar(views[:1])) and math.isnan(lidar(views[:, :1])) and math.isnan(lidar(torch.ones(4, 3, 5)))


def test_lidar_is_the_formula_and_knows_no_basis() -> None:
    views = draw(0, 20, 6, 7) + 2 * draw(1, 20, 1, 7)
    rows = views.double()
    between = torch.from_numpy(np.cov(rows.mean(1).numpy().T))
    noise = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
    within = noise.T @ noise / (20 * 5)
    within = within + 1e-4 * within.diagonal().mean() * torch.eye(7)
    values, axes = torch.linalg.eigh(within)
    root = axes / values.sqrt() @ axes.T
    found = torch.linalg.eigvalsh(root @ between @ root)
    shares = found / found.sum()
    assert lidar(views) == pytest.approx(math.exp(float(-(shares * shares.log()).sum())), rel=1e-6)
    mixed = rows @ draw(2, 7, 7).double() + 5
    assert lidar(mixed, ridge=0.0) == pytest.approx(lidar(rows, ridge=0.0), rel=1e-6)
    wide = torch.cat([rows, torch.zeros(20, 6, 500)], 2)
    assert lidar(wide, ridge=0.0) == pytest.approx(lidar(rows, ridge=0.0), rel=1e-6)


def test_permuted_components_keep_mean_and_variances() -> None:
    x = draw(0, 80, 6) @ draw(1, 6, 10) + 3
    moved = permute_columns(x, np.random.default_rng(0))
    assert torch.allclose(moved.mean(0), x.double().mean(0), atol=1e-6)
    assert torch.allclose(moved.var(0).sum(), x.double().var(0).sum(), rtol=1e-6)
    assert not torch.allclose(moved, x.double(), atol=1e-2)
