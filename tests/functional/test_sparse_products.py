"""Gradients that are kept as products, against the same gradients as tensors."""

import pytest
import torch

import saelab as sl
from saelab.functional import sparse_products
from saelab.functional.sparse_products import GradientMemory, SparseGradient, select_rows, weight_gradient
from saelab.sae.training_sae import TrainingSAE
from saelab.training.config import TrainConfig
from saelab.training.optimizer import clip_gradients
from tests.functional.test_numba_kernels import D_IN, D_SAE, N, draw, draw_entries, needs_numba, small as small


@pytest.fixture
def many(small, monkeypatch):
    """Gradients of any number of entries are kept."""
    monkeypatch.setattr(sparse_products, "MOST_PRODUCTS", 10**9)


@needs_numba
@pytest.mark.parametrize("projected", [False, True])
def test_a_sparse_gradient_is_the_dense_one(projected):
    values, entries = draw_entries()
    left, W = draw(N, D_IN, seed=3), torch.nn.functional.normalize(draw(D_SAE, D_IN, seed=4), dim=1)
    made = SparseGradient.from_entries(entries, values, left, D_SAE, W if projected else None)
    wanted = weight_gradient(entries, values, left, D_SAE).double()
    if projected:
        wanted -= (wanted * W).sum(1, keepdim=True) * W
    torch.testing.assert_close(made.to_dense().double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.square_sum().double(), wanted.square().sum(), rtol=1e-5, atol=0)
    assert entries.columns is None
    order = entries.with_columns(D_SAE).columns[0]
    products = made.sampled_dot(W, order)
    torch.testing.assert_close(products, (left[entries.rows] * W[entries.indices]).sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.squares.double(), wanted.square().sum(1), rtol=1e-4, atol=1e-6)
    half, twice = made.scaled(torch.tensor(0.5)), made + made
    torch.testing.assert_close(half.to_dense().double(), wanted / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half.square_sum().double(), wanted.square().sum() / 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(twice.to_dense().double(), 2 * wanted, rtol=1e-4, atol=1e-5)


@needs_numba
def test_rows_keep_their_gradient_only_where_it_is_asked_for(many):
    W, latents = draw(D_SAE, D_IN).requires_grad_(), torch.tensor([5, 2, 70])
    (expected,) = torch.autograd.grad((W[latents] * draw(3, D_IN, seed=1)).sum(), W)
    for memory in (None, GradientMemory(), GradientMemory(sparse=True)):
        W.grad = None
        (select_rows(W, latents, memory) * draw(3, D_IN, seed=1)).sum().backward()
        found = memory.take() if memory else None
        assert (found is None) == (memory is None or not memory.sparse) and (W.grad is None) == (found is not None)
        assert torch.equal(W.grad if found is None else found.to_dense(), expected)


CASES = {
    "topk": {"activation": sl.TopK(k=4)},
    "free": {"activation": sl.TopK(k=4), "dictionary": "free"},
    "frozen": {"activation": sl.TopK(k=4), "dictionary": "frozen"},
    "prefixes": {"activation": sl.BatchTopK(k=4), "prefixes": (40, 100, D_SAE)},
    "refined": {"activation": sl.TopK(k=4), "encoder": sl.sae.Refined()},
    "archetypal": {"activation": sl.TopK(k=4), "dictionary": sl.sae.Archetypal(n_points=64)},
    "orthogonal": {
        "activation": sl.TopK(k=4),
        "objective": (sl.ReconstructionLoss(), sl.AuxK(dead_after_tokens=600), sl.sae.objectives.OrthogonalLoss()),
    },
    "aux": {"activation": sl.TopK(k=4), "objective": (sl.ReconstructionLoss(), sl.AuxK(dead_after_tokens=600))},
}


@needs_numba
@pytest.mark.parametrize("case", CASES)
def test_runs_with_kept_and_with_stored_gradients_are_equal_to_rounding(case, many, monkeypatch):
    x = draw(2048, 16) @ draw(16, D_IN, seed=1)
    cfg = TrainConfig(n_tokens=8 * 512, batch_size=512, n_held_out=0)
    kept = []
    keep = GradientMemory.keep
    for stores in (False, True):
        if stores:
            monkeypatch.setattr(GradientMemory, "keep", lambda self, *args: None)
        else:
            monkeypatch.setattr(GradientMemory, "keep", lambda self, *args: kept.append(keep(self, *args)) or kept[-1])
        sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, **CASES[case]), seed=0).fit(x, cfg, progress=False)
        weights = {name: w.detach().clone() for name, w in sae.named_parameters()}
        if not stores:
            first = weights
    assert any(kept) == (case != "archetypal")
    for name, w in weights.items():
        # a code that rounding moves in or out changes its latent a little
        assert (first[name] - w).norm() < 1e-3 * w.norm() + 1e-6, name


@needs_numba
@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clipping_counts_and_scales_what_is_kept(limit, many):
    grads = []
    for kept in (True, False):
        sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=4)), seed=0)
        trainee = TrainingSAE(sae, TrainConfig(n_tokens=4096))
        loss = trainee.objective(draw(N, D_IN)).total
        trainee.memory["W_dec"].spare = torch.empty(D_SAE, D_IN)
        sparse = trainee.differentiate(loss) if kept else loss.backward() or {}
        assert trainee.memory["W_dec"].spare is None  # it was written into, or is not needed
        trainee.constrain_gradients()
        assert set(sparse) == ({sae.W_enc, sae.W_dec} if kept else set())
        assert all((p.grad is None) == (p in sparse) for p in sae.parameters())
        norm = clip_gradients(sae, limit, sparse=sparse)
        dense = [sparse[p].to_dense() if p in sparse else p.grad for p in (sae.W_enc, sae.W_dec)]
        grads.append([norm, dense[0].T if kept else dense[0], dense[1], sae.b_dec.grad])
    for mine, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
