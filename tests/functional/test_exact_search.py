"""The compiled search in float32 against a full sort: the same members, order and values, however the largest lie."""

import pytest
import torch

from saelab.functional import topk
from saelab.functional.compiled import has_numba
from saelab.functional.exact_search import ROWS, ExactSearch
from saelab.functional.row_topk import topk_latents as choose_dense
from saelab.functional.topk import search_topk

pytestmark = pytest.mark.skipif(not has_numba(), reason="needs numba")
SIGNED = pytest.mark.parametrize("signed", [False, True])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, n_rows=70, d_sae=1500, d_in=24):
    """Activations, encoder and bias."""
    x, W, bias = draw(n_rows, d_in), draw(d_sae, d_in, seed=1), 0.3 * draw(d_sae, seed=2)
    if kind == "whole":  # every sum is exact, and many are equal
        return x.mul(2).round(), W.mul(2).round(), torch.zeros(d_sae)
    if kind == "ascending":  # each panel has larger ones than all before
        return x.abs(), W.abs() * torch.linspace(0.1, 3, d_sae)[:, None], bias * 0
    if kind == "descending":
        return x.abs(), W.abs() * torch.linspace(3, 0.1, d_sae)[:, None], bias * 0
    if kind == "negative":
        return x.abs(), -W.abs(), -bias.abs()
    if kind == "copies":
        W[1::2], bias[1::2] = W[: 2 * (d_sae // 2) : 2], bias[: 2 * (d_sae // 2) : 2]
    if kind == "zero":
        return x * 0, W, bias * 0
    return x, W, bias


KINDS = ["plain", "whole", "ascending", "descending", "negative", "copies", "zero"]


@SIGNED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d_sae", "n"), [(1500, 17), (97, 3), (48, 5), (1008, 1), (1009, 40), (5000, 9), (640, 129)])
def test_the_largest_are_those_of_a_sort(kind, d_sae, n, signed):
    x, W, bias = make(kind, d_sae=d_sae)
    u = x.double() @ W.double().T + bias.double()
    size = u.abs() if signed else u
    values, latents, found = ExactSearch(W, bias, signed).top(x, n)
    assert (found == n).all()
    assert all(len(row.unique()) == n for row in latents), "a latent came twice"
    slack = 1e-5 * (1 + u.abs().amax())
    torch.testing.assert_close(values.double(), u.gather(1, latents), rtol=0, atol=float(slack))
    wanted = size.sort(dim=1, descending=True).values[:, :n]
    torch.testing.assert_close((values.abs() if signed else values).double(), wanted, rtol=0, atol=float(slack))
    mine = values.abs() if signed else values
    assert (mine.diff() <= 0).all(), "the largest come first"
    assert (latents.diff()[mine.diff() == 0] > 0).all(), "of equal ones the lowest latent"


@SIGNED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_in", [1, 24, 200])
def test_codes_are_those_of_the_dense_product(kind, d_in, signed, monkeypatch):
    """Also of equal latents, and of those that a float32 sum cannot tell apart."""
    monkeypatch.setattr("saelab.functional.compiled.LEAST_WEIGHTS", 0)
    monkeypatch.setenv("SAELAB_NUMBA", "1")
    x, W, bias = make(kind, d_in=d_in)
    calls = []
    monkeypatch.setattr(topk, "exact_topk", lambda *args, f=topk.exact_topk: calls.append(1) or f(*args))
    fast = search_topk(x, W, bias, 12, signed)
    assert calls, "the compiled search was not used"
    latents = choose_dense(x @ W.T + bias, x, W, bias, 12, signed)
    z = torch.zeros(len(x), len(W)).scatter(1, latents, 1.0) * (x @ W.T + bias)
    z = z if signed else z.relu()
    torch.testing.assert_close(fast.to_dense(), z, rtol=1e-4, atol=1e-5)
    unlike = (fast.to_dense() != 0) != (z != 0)
    assert z[unlike].abs().max() < 1e-5 if unlike.any() else True, "the members are the same but for those of size 0"


@SIGNED
def test_equal_rows_have_equal_codes_wherever_they_are_and_on_any_threads(signed):
    x, W, bias = make("plain", n_rows=203, d_sae=2100)
    values, latents, _ = ExactSearch(W, bias, signed).top(x, 9)
    order = torch.randperm(203, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            for rows in (order, order[: ROWS - 1], order[:1]):
                again, names, _ = ExactSearch(W, bias, signed).top(x[rows], 9)
                assert torch.equal(again, values[rows]) and torch.equal(names, latents[rows])
    finally:
        torch.set_num_threads(before)
    copied = W.clone()
    copied[2000] = W[int(latents[0, 0])]
    bias[2000] = bias[int(latents[0, 0])]
    again, names, _ = ExactSearch(copied, bias, signed).top(x, 9)
    assert again[0, 0] == again[0, 1] and sorted(names[0, :2].tolist()) == sorted([int(latents[0, 0]), 2000])


@SIGNED
def test_numbers_that_are_not_finite_are_the_largest_as_for_a_sort(signed, monkeypatch):
    monkeypatch.setattr("saelab.functional.compiled.LEAST_WEIGHTS", 0)
    monkeypatch.setenv("SAELAB_NUMBA", "1")
    x, W, bias = make("plain")
    x[3, 2], x[5, 1] = torch.nan, torch.inf
    values = search_topk(x, W, bias, 12, signed).to_dense()
    clean = search_topk(x[[0, 1, 2, 4]], W, bias, 12, signed).to_dense()
    assert torch.equal(values[[0, 1, 2, 4]], clean)
    assert not values[5].isfinite().all()
    W[7] = torch.nan
    assert search_topk(x, W, bias, 12, True).to_dense()[:, 7].isnan().all()


def test_no_rows():
    values, latents, found = ExactSearch(draw(200, 8), torch.zeros(200), True).top(torch.zeros(0, 8), 3)
    assert values.shape == latents.shape == (0, 3) and len(found) == 0


@SIGNED
def test_latents_that_fill_the_last_panel_are_never_found(signed):
    """Where all sizes are equal, none is left out for being small."""
    values, latents, found = ExactSearch(torch.zeros(1009, 4), torch.zeros(1009), signed).top(draw(30, 4), 129)
    assert (found == 129).all() and not values.any() and int(latents.max()) < 1009
    assert all(len(row.unique()) == 129 for row in latents)
