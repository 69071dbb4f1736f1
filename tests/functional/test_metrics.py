"""Metrics against known answers, against numpy, and against the wrong formulas that are in use elsewhere."""

import math

import pytest
import torch

from saelab.functional.codes import SparseCodes
from saelab.functional.metrics import (
    FiringSums,
    ReconstructionSums,
    kl_divergence,
    log_histogram,
    loss_recovered,
    read_scores,
    token_terms,
)


def planted(n=2000, d_in=16, offset=3.0, seed=0):
    """Activations with a large mean, reconstructed but for an error that has a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) + offset
    return x, x + 0.4 * torch.randn(n, d_in, generator=generator) + 0.2


def fvu_of(x, x_hat, batch_size=10_000):
    sums = ReconstructionSums(x.shape[1])
    for a, b in zip(x.split(batch_size), x_hat.split(batch_size), strict=True):
        sums.add(a, b)
    return sums.fvu


def test_fvu_is_the_textbook_formula_whatever_the_batches() -> None:
    x, x_hat = planted()
    a, b = x.double().numpy(), x_hat.double().numpy()
    expected = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    for batch_size in (1, 7, 64, 2000):
        assert fvu_of(x, x_hat, batch_size) == pytest.approx(expected, rel=1e-9)


def test_the_mean_predictor_has_fvu_one_and_a_copy_none() -> None:
    x, _ = planted()
    assert fvu_of(x, x.double().mean(0).float().expand_as(x)) == pytest.approx(1, abs=1e-6)
    assert fvu_of(x, x.clone()) == 0


def test_fvu_is_not_one_of_the_wrong_formulas() -> None:
    """Each gives another number here; ours moves neither with the offset nor lets an error of constant size go free."""
    x, x_hat = planted()
    ours = fvu_of(x, x_hat)
    error = (x - x_hat).square().sum(1)
    scalar_second_moment = error.mean() / (x.square().sum(1).mean() - x.square().mean(0).mean() ** 2)
    centered_error = (x - x_hat).var(0).sum() / x.var(0).sum()
    one_scalar_mean = error.sum() / (x - x.mean()).square().sum()
    uneven = torch.linspace(0, 5, x.shape[1])
    assert abs(float(scalar_second_moment) - ours) > 0.1
    assert abs(float(centered_error) - ours) > 0.02
    assert fvu_of(x + uneven, x_hat + uneven) == pytest.approx(ours, rel=1e-5)
    assert abs(float(one_scalar_mean) - float(error.sum() / (x + uneven - (x + uneven).mean()).square().sum())) > 0.05


def test_fvu_keeps_its_digits_beside_a_large_offset() -> None:
    x, x_hat = planted(offset=0.0)
    x, x_hat = x.double(), x_hat.double()
    assert fvu_of(x + 1e6, x_hat + 1e6) == pytest.approx(fvu_of(x, x_hat), rel=1e-8)


def test_bias_and_cosine_of_a_shrunken_copy() -> None:
    x, _ = planted()
    sums = ReconstructionSums(x.shape[1])
    sums.add(x, 0.5 * x)
    assert (sums.bias, sums.cosine) == (pytest.approx(0.5), pytest.approx(1.0))


def test_signed_codes_that_cancel_are_alive() -> None:
    z = torch.tensor([[1.0, 0.0, -2.0], [-1.0, 0.0, 2.0]])
    sums = FiringSums(3)
    sums.add(SparseCodes.from_dense(z))
    assert sums.l0 == 2
    assert sums.density.tolist() == [1.0, 0.0, 1.0]
    assert sums.dead_frac == pytest.approx(1 / 3)


def test_scores_of_sums_are_those_of_the_running_sums() -> None:
    x, x_hat = planted()
    running = ReconstructionSums(x.shape[1])
    running.add(x, x_hat)
    sums = {name: values.sum() for name, values in token_terms(x, x_hat).items()}
    sums["variance"] = (x.double() - x.double().mean(0)).square().sum()
    one = torch.ones((), dtype=torch.float64)
    sums |= {"n_tokens": len(x) * one, "firings": 4 * one}
    sums |= dict.fromkeys(("n_predictions", "ce", "ce_clean", "ce_zero", "ce_mean", "kl", "kl_zero"), one)
    scores = read_scores(sums)
    for name in ("fvu", "explained_variance", "cosine", "bias"):
        assert float(scores[name]) == pytest.approx(getattr(running, name), rel=1e-9)
    assert math.isnan(float(scores["loss_recovered"]))


def test_loss_recovered_is_nan_where_ablation_does_not_hurt() -> None:
    ce, clean = torch.tensor([1.0, 2.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    recovered = loss_recovered(ce, clean, torch.tensor([3.0, 3.0, 3.0, 1.0]))
    assert recovered[:3].tolist() == [1.0, 0.5, -0.5]
    assert recovered[3].isnan()
    assert loss_recovered(ce, clean, torch.full((4,), 0.9)).isnan().all()


def test_kl_survives_certainty_and_forbidden_tokens() -> None:
    """log(softmax(x)) would be -inf * 0 = NaN in both rows."""
    p = torch.tensor([[0.0, 500.0], [0.0, -math.inf]])
    q = torch.tensor([[500.0, 0.0], [1.0, -math.inf]])
    assert kl_divergence(p, q).tolist() == [500.0, 0.0]
    assert kl_divergence(q, q).tolist() == [0.0, 0.0]


def test_kl_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 30, generator=generator) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected)


@pytest.mark.parametrize("n_tokens", [1, 10, 999, 1000, 123_457])
def test_every_living_latent_is_in_one_bin(n_tokens: int) -> None:
    firings = torch.tensor([0, 0, 1, 1, (n_tokens + 1) // 2, n_tokens], dtype=torch.float64)
    edges, counts = log_histogram(firings / n_tokens, n_tokens)
    assert sum(counts) == 4
    assert len(edges) == len(counts) + 1
    assert edges[-1] == 0
