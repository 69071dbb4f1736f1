"""The fused screen against its definition in numpy, and the search on it against a dense product.

Without numba, or without a processor for its kernels, they are not used, and these tests are skipped.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.functional import compiled, threshold_search, topk
from saelab.functional.fused_screen import PANEL, FusedScreen, can_fuse
from saelab.functional.partial_screen import LeadingScreen, find_leading
from saelab.functional.screening import balance_dimensions
from saelab.functional.threshold_search import search_above
from saelab.functional.topk import search_batch_topk

pytestmark = pytest.mark.skipif(not can_fuse(), reason="needs numba and AVX512-VNNI")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small weights are searched as large ones are."""
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(topk, "WIDE", 0)
    monkeypatch.setattr(threshold_search, "DENSE_WIDTH", 0)


def search_topk(x: Tensor, W: Tensor, bias: Tensor, k: int, signed: bool):
    return topk.search_topk(x, W, bias, k, signed, precision="int8")


def screen_top(x: Tensor, W: Tensor, bias: Tensor, n: int, signed: bool):
    return FusedScreen(W, bias, signed, like=x).top(x, n)


def draw(n: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normally distributed activations of unequal rows and dimensions, encoder rows and bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator) * 3
    x[:, 0] *= 20
    W, bias = torch.randn(d_sae, d_in, generator=generator), torch.randn(d_sae, generator=generator)
    return x, W, bias


def define(x: Tensor, W: Tensor, bias: Tensor, signed: bool) -> np.ndarray:
    """All sizes of the int8 screen, from its definition: rows scaled to [-127, 127] and rounded."""
    balance = balance_dimensions(x, W)
    factors = (x * balance.reciprocal()).numpy(), (W * balance).numpy()
    steps = [np.abs(part).max(1, keepdims=True) / np.float32(127) for part in factors]
    low = [np.rint(part * (1 / step)).astype(np.int64) for part, step in zip(factors, steps, strict=True)]
    u = (low[0] @ low[1].T) * (steps[0].astype(np.float64) * steps[1].T) + bias.numpy()
    return np.abs(u) if signed else u


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("n", "d_in", "d_sae"), [(1, 3, 5), (13, 64, PANEL), (70, 101, 700), (600, 32, 100)])
def test_it_screens_by_definition(n: int, d_in: int, d_sae: int, signed: bool) -> None:
    x, W, bias = draw(n, d_in, d_sae)
    sizes, latents, unseen, _ = screen_top(x, W, bias, d_sae, signed)
    assert (latents.sort(1).values == torch.arange(d_sae)).all()
    expected = define(x, W, bias, signed)
    error = np.abs(sizes.numpy() - np.take_along_axis(expected, latents.numpy(), 1))
    # a value on the border of two steps may be rounded either way: one step of one factor times the other's largest
    assert np.quantile(error / np.abs(expected).max(), 0.99) < 1e-5
    assert error.max() < 0.05 * np.abs(expected).max()
    assert (unseen == -torch.inf).all()


@pytest.mark.parametrize("signed", [False, True])
def test_it_keeps_the_largest_and_bounds_the_rest(signed: bool) -> None:
    x, W, bias = draw(300, 40, 6000)
    every, names, _, _ = screen_top(x, W, bias, 6000, signed)
    sizes, latents, unseen, _ = screen_top(x, W, bias, 30, signed)
    assert torch.equal(sizes.sort(1).values, every.sort(1).values[:, -30:])
    by_latent = torch.empty_like(every).scatter_(1, names, every)
    assert torch.equal(by_latent.gather(1, latents), sizes)
    others = by_latent.scatter(1, latents, -torch.inf).amax(1)
    assert (others <= unseen).all()
    assert torch.equal(unseen, sizes.amin(1))


def test_threads_change_nothing() -> None:
    x, W, bias = draw(100, 40, 1000)
    before = torch.get_num_threads()
    found = []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(screen_top(x, W, bias, 30, False))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def naive(x: Tensor, W: Tensor, bias: Tensor, k: int, signed: bool) -> Tensor:
    u = x.double() @ W.double().T + bias.double()
    best = (u.abs() if signed else u).topk(k, dim=1).indices
    kept = torch.zeros_like(u).scatter(1, best, u.gather(1, best))
    return kept if signed else kept.clamp(min=0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rank", [16, 96])
def test_the_search_is_exact(rank: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1024, rank, generator=generator) @ torch.randn(rank, 96, generator=generator)
    W, bias = torch.randn(3000, 96, generator=generator), torch.randn(3000, generator=generator)
    leading = find_leading(x, W)
    assert (leading is not None) == (rank == 16)
    z = search_topk(x, W, bias, 8, signed).to_dense()
    expected = naive(x, W, bias, 8, signed)
    assert torch.equal(z != 0, expected != 0)
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-3)


def test_what_leading_directions_leave_out_is_found() -> None:
    """A few tokens, in no sample, have a large part in a direction of their own, in which some latents lie."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 96, generator=generator)
    W = torch.randn(96, 3000, generator=generator).T.contiguous()
    rare = torch.linalg.qr(torch.randn(96, 4, generator=generator)).Q.T
    rows = torch.tensor([5, 333, 701])
    x[rows] += 30 * rare[:3]
    W[100:104] = 10 * rare
    bias = torch.zeros(3000)
    leading = find_leading(x, W)
    assert leading is not None
    seen = LeadingScreen(W, bias, False, x, leading).top(x, 18)[1]
    assert not (
        seen[rows, :, None] == torch.tensor([100, 101, 102])[:, None, None]
    ).any()  # so the screen alone loses them
    z = search_topk(x, W, bias, 8, False).to_dense()
    assert torch.equal(z != 0, naive(x, W, bias, 8, False) != 0)


def test_of_equal_latents_the_lowest_is_kept() -> None:
    x, W, bias = draw(50, 64, 300)
    W, bias = torch.cat([W, W, W]), torch.cat([bias, bias, bias])
    z = search_topk(x, W, bias, 4, False)
    dense = z.to_dense()
    for row in range(50):
        names = dense[row].nonzero()[:, 0]
        assert all(int(name) - 300 in names or name < 300 for name in names)


def test_rows_that_the_screen_cannot_decide_are_searched_again() -> None:
    """All latents differ by a thousandth from one, which int8 does not resolve."""
    x, W, _ = draw(60, 64, 900)
    W = W[:1] + 1e-3 * W
    bias = torch.zeros(900)
    z = search_topk(x, W, bias, 8, False).to_dense()
    expected = naive(x, W, bias, 8, False)
    assert (expected > 0).any(1).sum() > 15  # rows on the positive side
    torch.testing.assert_close(z.sum(1).double(), expected.sum(1), rtol=1e-6, atol=1e-4)
    u = x.double() @ W.double().T
    least = u.topk(8, dim=1).values[:, -1:]
    assert (u[z != 0] >= (least - 1e-4).expand_as(u)[z != 0]).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rank", [16, 96])
def test_a_batchs_largest_are_exact(rank: int, signed: bool) -> None:
    x = torch.randn(1024, rank, generator=torch.Generator().manual_seed(3))
    W, bias = draw(1, 96, 3000, seed=4)[1:]
    x = x @ torch.randn(rank, 96, generator=torch.Generator().manual_seed(5)) / rank**0.5
    z = search_batch_topk(x, W, bias, 8, signed, precision="int8").to_dense()
    u = x.double() @ W.double().T + bias.double()
    size = u.abs() if signed else u
    least = size.flatten().topk(8 * 1024).values[-1]
    assert torch.equal(z != 0, (size >= least) & (size > 0))
    torch.testing.assert_close(z.double(), u.where(z != 0, 0.0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("signed", "per_latent"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("share", [0.002, 0.2])
def test_sizes_above_a_threshold_are_exact(signed: bool, per_latent: bool, share: float) -> None:
    """With the larger share a dense product takes over, as it does for one threshold of magnitudes by latent."""
    x, W, bias = draw(400, 96, 3000)
    u = x @ W.T + bias
    floor = (u.abs() if signed else u).flatten().kthvalue(int((1 - share) * u.numel())).values
    floor = floor * (1 + 0.1 * torch.rand(3000)) if per_latent else floor
    codes = search_above(x, W, bias, floor, signed)
    assert codes is not None
    size, z = (u.abs() if signed else u), codes.to_dense()
    sure = (size - floor).abs() > 1e-4 * size.abs().amax()
    assert torch.equal((z != 0)[sure], (size > floor)[sure])
    torch.testing.assert_close(z, u.where(z != 0, 0.0), rtol=1e-4, atol=1e-3)
    assert search_above(x, W, bias, floor, signed, max_frac=share / 4) is None


@pytest.mark.parametrize("per_latent", [False, True])
def test_few_sizes_above_a_threshold_are_screened_until_the_errors_are_covered(per_latent: bool, monkeypatch) -> None:
    x, W, bias = draw(400, 96, 3000)
    u = x @ W.T + bias
    floor = u.flatten().kthvalue(int(0.998 * u.numel())).values * (1 + 0.2 * torch.rand(3000 if per_latent else 1))
    floor = floor if per_latent else floor[0]
    allowed = []
    near = FusedScreen.near

    def spy(screen: FusedScreen, rows: Tensor, limit: Tensor, errors: float, *others: float):
        allowed.append(errors)
        return near(screen, rows, limit, errors, *others)

    monkeypatch.setattr(FusedScreen, "near", spy)
    monkeypatch.setattr(threshold_search, "ERRORS", -2.0)  # entries that are larger than their size by less are lost
    codes = search_above(x, W, bias, floor, False)
    assert codes is not None and len(allowed) == 2 and allowed[0] == -2 < allowed[1] < 20
    sure = (u - floor).abs() > 1e-4 * u.abs().amax()
    assert torch.equal((codes.to_dense() != 0)[sure], (u > floor)[sure])


@pytest.mark.parametrize("signed", [False, True])
def test_rows_that_are_not_finite_are_coded_as_by_a_dense_product(signed: bool, monkeypatch) -> None:
    x, W, bias = draw(60, 40, 900)
    x[5, 3], x[9, 2], x[11], x[12] = torch.nan, torch.inf, 0.0, x[12] * 1e30
    searches = {
        "topk": lambda: search_topk(x, W, bias, 8, signed),
        "above": lambda: search_above(x[torch.arange(60) != 12], W, bias, torch.tensor(400.0), signed),
    }
    for name, search in searches.items():
        fused = search().to_dense()
        with monkeypatch.context() as inside:
            inside.setenv("SAELAB_NUMBA", "0")
            plain = search().to_dense()
        assert torch.equal(fused != 0, plain != 0), name
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_rows_with_many_hits_get_room_for_them() -> None:
    x, W, bias = draw(40, 32, 2000)
    screen = FusedScreen(W, bias, False, like=x)
    rows, latents, sizes, _ = screen.above(x, torch.tensor(0.0))
    every, names = screen.top(x, 2000)[:2]
    assert len(rows) > 40 * 256  # more than there was room for at first
    dense = torch.empty_like(every).scatter_(1, names, every)
    found = torch.zeros_like(dense).index_put((rows, latents), torch.ones(len(rows)))
    assert torch.equal(dense >= 0, found > 0)
    assert torch.equal(dense[rows, latents], sizes)
    assert torch.equal(screen.count_above(x, torch.tensor(0.0)), (dense >= 0).sum(1).int())
