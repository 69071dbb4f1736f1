"""Compressed dictionaries: rows of shared parts against rows of their own, and the bits of known codes."""

import math

import numpy as np
import pytest
import torch
from dictionaries import sae_of
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.evaluation.compressibility import count_bits, description_length, meta_sae, quantize


def test_rows_of_shared_parts_are_explained():
    """Each row is the sum of two of 16 parts; random rows share no parts."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(24, 16, generator=generator)).Q.T
    rows = torch.stack([parts[torch.randperm(16, generator=generator)[:2]].sum(0) for _ in range(256)]) / 2**0.5
    found = meta_sae(
        sae_of(rows, sl.AbsTopK(k=2)), n_latents=20, k=2, n_steps=70, batch_size=128, lr=1e-2, progress=False
    )
    assert found.explained_variance > 0.7 > found.gaussian > found.random
    assert f"{found.explained_variance:.3f}" in str(found) and found.n_rows == 256
    with pytest.raises(ValueError, match="must be above k"):
        meta_sae(sae_of(rows[:8], sl.AbsTopK(k=2)), progress=False)


def test_bits_of_known_codes():
    """A feature on half of the tokens at two strengths costs 1 + 1/2 bits, one on all at one strength nothing."""
    z = np.zeros((400, 3))
    z[:200, 0] = np.tile([1.0, -3.0], 100)
    z[:, 1] = 2.0
    codes = csr_matrix(z)
    places, centers = quantize(codes, 2)
    assert count_bits(codes, places, 2) == pytest.approx((1.0, 0.5))
    at = codes.indices == 0
    assert set(centers[at]) == {-2.0, 0.0} and set(centers[~at]) == {2.0}
    fine = quantize(codes, 4000)[1]
    np.testing.assert_allclose(fine, codes.data, atol=1e-3)


def test_description_length_of_a_planted_dictionary():
    """Words with one feature each: which word is all there is to say."""
    n_words, n = 8, 4000
    word = np.random.default_rng(0).integers(0, n_words, n)
    x = torch.eye(n_words)[word] * 2 + 0.01 * torch.randn(n, n_words, generator=torch.Generator().manual_seed(0))
    sae = sae_of(torch.eye(n_words), sl.TopK(k=1))
    found = description_length(sae, x)
    p = 1 / n_words
    assert found.bits_indices == pytest.approx(-n_words * (p * math.log2(p) + (1 - p) * math.log2(1 - p)), rel=0.01)
    assert found.l0 == 1.0 and found.fvu < 0.001 and not found.reason
    assert found.bits == found.bits_indices + found.bits_values
    assert found.baselines["untrained"].fvu > 0.1 and found.to_dict()["baselines"]["untrained"]["l0"] == 1.0
    coarse = description_length(sae, x, bins=(1,), tolerance=0.0, baselines=False)
    assert coarse.bits_values == 0.0 and "no number of bins" in coarse.reason and coarse.reason in str(coarse)
    same = description_length(sae, torch.ones(50, n_words), baselines=False)
    assert math.isnan(same.fvu) and "do not vary" in same.reason
    for wrong, why in ((x[:0], "must hold tokens"), (x.index_fill(0, torch.tensor([2]), torch.nan), "'acts' has NaN")):
        with pytest.raises(ValueError, match=why):
            description_length(sae, wrong, baselines=False)
    assert "bits a token" in str(found)
