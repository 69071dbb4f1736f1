"""Classical dictionaries: they find planted truth, which random directions do not, and are SAEs like any other."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from unchecked import unchecked

import saelab as sl
from saelab.cli.descriptions import describe_sae
from saelab.sae import classical_dictionaries
from saelab.sae.classical_dictionaries import METHODS, fit_dictionary
from saelab.sae.fitting import measure
from saelab.visualization.reports import _format_training

ORTHOGONAL = ["ica", "l3", "l4", "orthogonal"]


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def matched(sae, truth):
    """Mean |cos| of the planted rows with their one-to-one partners."""
    cosines = (unit(sae.directions()) @ truth.T).abs().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].sum()) / len(truth)


def plant_orthogonal(d, density, n=8_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    codes = (torch.rand(n, d, generator=generator) < density) * torch.randn(n, d, generator=generator)
    return truth, codes @ truth


def plant(d=16, m=24, k=2, n=3_000, signed=True, seed=0):
    """Random directions, k codes a token."""
    generator = torch.Generator().manual_seed(1_000 + seed)  # else "random" would draw the same directions
    truth = unit(torch.randn(m, d, generator=generator))
    kept = torch.rand(n, m, generator=generator).topk(k).indices
    values = torch.rand(n, k, generator=generator) + 0.5
    if signed:
        values = values * (2 * torch.randint(2, (n, k), generator=generator) - 1)
    return truth, torch.zeros(n, m).scatter(1, kept, values) @ truth


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("method", ORTHOGONAL)
def test_a_complete_orthogonal_dictionary_is_found(method, density):
    """The angle's square is about d times some (c / n), c below 10 for these codes: 1 - cos below .01 for d 16."""
    truth, x = plant_orthogonal(16, density)
    found = fit_dictionary(x, method, k=2)
    assert matched(found, truth) > 0.99
    assert found.training_["converged"] is (None if method == "orthogonal" else True)
    rows = found.W_dec.detach()
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["pca", "random"])
def test_what_knows_no_sparsity_does_not_find_it(method):
    truth, x = plant_orthogonal(16, 0.1)
    assert matched(fit_dictionary(x, method), truth) < 0.8


@pytest.mark.parametrize("method", ORTHOGONAL)
def test_fewer_rows_than_dimensions_are_some_of_the_truth(method):
    truth, x = plant_orthogonal(12, 0.15, n=6_000)
    found = fit_dictionary(x, method, d_sae=5, k=2)
    assert (unit(found.directions()) @ truth.T).abs().amax(1).min() > 0.97


@unchecked()
def test_independent_components_are_of_the_directions_that_there_are():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4_000, 3, generator=g) @ torch.randn(3, 8, generator=g)  # rank 3, Gaussian: no component is better
    sae = fit_dictionary(x, "ica", d_sae=6, k=3, seed=np.int64(2))
    with torch.no_grad():
        x_hat = sae(x)
    assert float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.01


@pytest.mark.parametrize("p", [3, 4])
def test_the_gradient_is_that_of_the_sum_of_powers(p):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    Q = torch.randn(4, 6, generator=generator).requires_grad_()
    ((x @ Q.T).abs() ** p).sum().backward()
    torch.testing.assert_close(p * classical_dictionaries._gradient(Q.detach(), x, p), Q.grad)


def test_pca_has_the_components_in_order():
    _, x = plant_orthogonal(12, 0.2)
    x = x * torch.arange(1, 13)
    found = fit_dictionary(x, "pca", d_sae=4, k=4)
    centered = (x - x.mean(0)).double()
    first = torch.linalg.svd(centered, full_matrices=False).Vh[:4].float()
    torch.testing.assert_close((found.W_dec @ first.T).abs(), torch.eye(4), atol=1e-3, rtol=0)
    residual = centered - centered @ first.T.double() @ first.double()
    want = float(residual.square().sum() / centered.square().sum())
    assert abs(measure(found, x)["fvu"] - want) < 1e-4  # four of four codes: the projection


def test_ksvd_finds_more_rows_than_dimensions():
    truth, x = plant(seed=1)
    found = {method: fit_dictionary(x, method, d_sae=24, k=2) for method in ("ksvd", "random")}
    scores = {method: matched(sae, truth) for method, sae in found.items()}
    assert scores["ksvd"] > 0.9 and scores["random"] < 0.7
    assert measure(found["ksvd"], x)["fvu"] < 0.3 * measure(found["random"], x)["fvu"]


def test_kmeans_finds_what_fires_alone():
    """Without noise a centroid is exact, but for the few directions that a local minimum joins."""
    truth, x = plant(k=1, signed=False)
    assert matched(fit_dictionary(x, "kmeans", d_sae=24, k=1), truth) > 0.85
    assert matched(fit_dictionary(x, "random", d_sae=24, k=1), truth) < 0.7


def test_stacked_rows_are_what_fires_together():
    """Eight concepts, each a fixed mix of three of 16 orthogonal directions."""
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    mix = torch.zeros(8, 16).scatter(1, torch.rand(8, 16, generator=generator).topk(3).indices, 1.0)
    truth = unit(mix @ base)
    codes = (torch.rand(2_000, 8, generator=generator) < 0.15) * torch.randn(2_000, 8, generator=generator)
    assert matched(fit_dictionary(codes @ truth, "stacked", d_sae=8, k=2), truth) > 0.9
    assert matched(fit_dictionary(codes @ truth, "random", d_sae=8, k=2), truth) < 0.8


def test_nmf_finds_parts_and_refuses_negative_activations():
    generator = torch.Generator().manual_seed(0)
    parts = (torch.rand(6, 20, generator=generator) < 0.25) * (torch.rand(6, 20, generator=generator) + 0.1)
    parts[:, :6] += torch.eye(6)  # each has a coordinate that is mostly its own
    codes = (torch.rand(2_000, 6, generator=generator) < 0.2) * torch.rand(2_000, 6, generator=generator)
    found = fit_dictionary(codes @ parts, "nmf", d_sae=6, k=3)
    assert matched(found, unit(parts)) > 0.98 and (found.W_dec >= 0).all() and found.cfg.normalizer == "none"
    with pytest.raises(ValueError, match=r"at least 0 for 'nmf', got negative ones; take 'snmf'"):
        fit_dictionary(codes @ parts - 1, "nmf", d_sae=6, k=3)


@pytest.mark.parametrize("method", ["snmf", "cnmf"])
def test_the_error_of_a_factorization_falls_in_every_step(method, monkeypatch):
    truth, x = plant(signed=False)
    errors = []

    def watch(rows, update):
        for _ in range(30):
            z, W = update()
            assert (z >= 0).all()
            errors.append(float((rows - z @ W).square().sum()))
        return classical_dictionaries._Atoms(W, 30, True)

    monkeypatch.setattr(classical_dictionaries, "_repeat", watch)
    found = fit_dictionary(x, method, d_sae=24, k=2)
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(errors)) and errors[-1] < 0.7 * errors[0]
    assert matched(found, truth) > 0.7


def test_rows_of_a_convex_factorization_are_combinations_of_activations():
    _, x = plant(signed=False, n=80)
    found = fit_dictionary(x, "cnmf", d_sae=4, k=2)
    points = found.normalizer.normalize(x).numpy().astype(float)
    rest = [nnls(points.T, row)[1] for row in found.W_dec.detach().numpy().astype(float)]
    assert max(rest) < 1e-4
    free = fit_dictionary(x[:3], "random", d_sae=4, k=2)  # three activations make no cone around a random direction
    assert max(nnls(points[:3].T, row)[1] for row in free.W_dec.detach().numpy().astype(float)) > 0.1


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_makes_an_sae(method, tmp_path):
    _, x = plant(d=8, m=8, n=400, signed=False)
    x = x.abs() if method == "nmf" else x
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - to see that it stays
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of convergence, which 400 tokens need not reach
        first, again, other = (fit_dictionary(x, method, d_sae=6, k=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert method == "pca" or not torch.equal(first.W_dec, other.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(6))
    assert not first.W_dec.requires_grad and not first.W_enc.requires_grad
    codes = first.encode(x)
    assert (codes != 0).sum(1).max() <= 2 and (METHODS[method].signed or (codes >= 0).all())
    assert first.training_["method"] == method and first.training_["n_tokens_seen"] == 400
    first.save_pretrained(tmp_path / "sae")
    loaded = sl.SAE.from_pretrained(tmp_path / "sae")
    assert loaded.training_ == first.training_ and torch.equal(loaded.encode(x), codes)
    assert f"{method} to 400 tokens (seed 3)" in describe_sae(tmp_path / "sae")
    assert _format_training(first.training_) == f"400 tokens by {method}, seed 3"


def test_the_sample_is_drawn_from_all_tokens_and_has_provenance():
    _, x = plant()
    acts = sl.Activations.from_tensor(x)
    sae = fit_dictionary(acts, "pca", n_tokens=100)
    assert sae.training_["n_tokens_seen"] == 100 and sae.provenance is acts.provenance
    rows = classical_dictionaries.draw_tokens(acts, 100, seed=0)
    places = (rows[:, None] == x).all(2).nonzero()[:, 1]
    assert len(places) == 100 and (places.diff() > 0).all()
    assert (places > 2_000).sum() > 10  # a third, give or take five


def test_an_encoder_can_be_chosen():
    _, x = plant()
    tied = fit_dictionary(x, "ksvd", d_sae=24, k=2, encoder="linear")
    assert torch.equal(tied.W_enc, tied.W_dec.T) and tied.cfg.encoder == "linear"
    pursuit = fit_dictionary(x, "pca", k=2, encoder=sl.OrthogonalMatchingPursuit())
    tied = fit_dictionary(x, "pca", k=2)
    torch.testing.assert_close(pursuit.encode(x[:50]), tied.encode(x[:50]), atol=1e-4, rtol=1e-4)  # orthogonal rows


@pytest.mark.parametrize("method", ["ica", "l3", "snmf"])
def test_what_does_not_converge_says_so(method, monkeypatch):
    monkeypatch.setattr(classical_dictionaries, "MAX_STEPS", 1)
    monkeypatch.setattr(classical_dictionaries, "FACTOR_STEPS", 1)
    _, x = plant(n=500)
    with pytest.warns(UserWarning, match=f"'{method}' must converge, got no fixed point in 1 steps on 500 tokens"):
        found = fit_dictionary(x, method, k=2)
    assert found.training_["converged"] is False


@pytest.mark.parametrize(
    ("x", "settings", "complaint"),
    [
        (torch.ones(9, 4), {"method": "svd"}, "`method` must be one of .*, got 'svd'"),
        (
            torch.ones(9, 4),
            {"method": "l3", "d_sae": 5},
            "`d_sae` of 'l3' must be at most d_in .4., got 5; take 'ksvd'",
        ),
        (torch.ones(9, 4), {"k": 5}, "`k` must be in 1..d_sae"),
        (torch.ones(9, 4), {"n_tokens": 1}, "`n_tokens` must be at least 2, got 1"),
        (torch.ones(1, 4), {}, "`acts` must hold at least 2 tokens, got 1"),
        (torch.full((9, 4), torch.nan), {}, "`acts` must be finite"),
        (torch.ones(9, 4), {"method": "snmf"}, "`acts` must vary, got 9 equal rows"),
    ],
)
def test_bad_input_is_an_error(x, settings, complaint):
    with pytest.raises(ValueError, match=complaint), unchecked():
        fit_dictionary(x, **{"method": "pca", "k": 2, **settings})
