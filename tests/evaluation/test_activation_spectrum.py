"""Spectra of activations: planted ranks, and splices whose answer is known."""

import math

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.evaluation import activation_spectrum
from saelab.evaluation.activation_spectrum import spectrum
from saelab.evaluation.splicing import Stage

HOOK = "blocks.1.hook_resid_post"


def planted(rank: int, d_in: int = 12, n: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q[:, :rank]
    return torch.randn(n, rank, generator=generator) @ axes.T + 1000


def test_a_planted_rank_is_found_whatever_the_mean(monkeypatch) -> None:
    x = planted(5)
    found = spectrum(x, share=1 - 1e-6)
    assert found.n_components == 5 and found.components_frac == 5 / 12
    # 500 tokens: variances have relative errors of 0.06, singular values of 0.03; entropy loses half their squares
    assert 4.9 < found.effective_rank < 5.001
    # float32 activations near 1000 are rounded by 3e-5 at most
    expected = torch.linalg.svdvals(x.double() - x.double().mean(0)).square() / 500
    np.testing.assert_allclose(found.variances, expected, rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(activation_spectrum, "PART", 7)
    np.testing.assert_allclose(spectrum(x).variances, found.variances, atol=1e-9)
    assert not found.rows and math.isnan(found.ce_clean) and "5 of 12" in str(found)


def test_a_large_dimension_hides_the_others_from_the_share_of_variance() -> None:
    x = planted(12)
    x[:, 0] *= 100
    assert spectrum(x).n_components == 1 < spectrum(x).effective_rank


def test_splices_go_from_mean_ablation_to_the_model_itself(tiny, tiny_tokens) -> None:
    tokens = tiny_tokens[:24]
    acts = sl.collect(tiny, tokens, HOOK, progress=False)
    found = spectrum(acts, tiny, tokens, ranks=(0, 4, 16, 32))
    assert found.hook_point == HOOK and found.n_tokens == len(acts)
    clean = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask()).run(tokens)
    x = clean.rows
    u, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    for row in found.rows:
        x_hat = x.mean(0) + (u[:, : row.rank] * s[: row.rank]) @ v[: row.rank]
        assert row.ce == pytest.approx(float(clean.splice(x_hat)["ce"].double().mean()), abs=1e-5)
        assert row.variance == pytest.approx(float(s[: row.rank].square().sum() / s.square().sum()), abs=1e-6)
    assert found.rows[0].ce == found.rows[0].ce_random
    assert found.rows[-1].ce == pytest.approx(found.ce_clean, abs=1e-5)
    assert found.rows[-1].ce_random == pytest.approx(found.ce_clean, abs=1e-5)
    assert found.rows[1].ce != found.rows[1].ce_random
    assert found.ce_zero == pytest.approx(float(clean.splice(torch.zeros_like(x))["ce"].double().mean()), abs=1e-5)
    assert found.n_predictions == int(clean.predicts.sum()) and "recovered" in str(found)
    again = spectrum(acts, tiny, tokens, ranks=(4,), batch_size=5)
    assert again.rows[0].ce_random == pytest.approx(found.rows[1].ce_random, abs=1e-5)


def test_the_rank_that_is_needed_is_one_from_which_on_it_is_enough() -> None:
    shares = (0.2, 0.95, 0.5, 0.92, 1.0)
    rows = tuple(
        activation_spectrum.RankScore(rank=r, variance=0.0, ce=0.0, ce_random=0.0, loss_recovered=share)
        for r, share in enumerate(shares)
    )
    found = activation_spectrum.Spectrum(
        hook_point="",
        d_in=4,
        n_tokens=9,
        share=0.9,
        n_components=1,
        effective_rank=1.0,
        variances=np.ones(4),
        rows=rows,
    )
    assert found.rank_for(0.9) == 3 and found.rank_for(1.1) is None


def test_what_cannot_be_done_is_said(tiny, tiny_tokens) -> None:
    x = planted(3, d_in=32)
    with pytest.raises(ValueError, match=r"`ranks` in 0..32"):
        spectrum(x, ranks=(33,))
    with pytest.raises(ValueError, match="given together"):
        spectrum(x, tiny)
    with pytest.raises(ValueError, match="without a record"):
        spectrum(x, tiny, tiny_tokens)
    with pytest.raises(ValueError, match="finite"):
        spectrum(x * math.nan)
    with pytest.raises(ValueError, match="`acts` must vary, got 9 equal rows"):
        spectrum(torch.full((9, 32), 0.1))
