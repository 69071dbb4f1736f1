"""Pruned codes: one after another by brute force, planted latents that are not needed, and SAEs that prune."""

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional import SparseCodes, needed_codes, pruning
from saelab.sae import Refined

D_IN, D_SAE = 8, 40


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prune_slowly(z, x, W, tau):
    """Dense codes that are left, each row by itself, each removal tried."""
    z = z.clone()
    for row, target in zip(z, x, strict=True):
        limit = tau * (target - row @ W).square().sum()
        while True:
            error, fired = (target - row @ W).square().sum(), row.nonzero()[:, 0]
            rises = torch.stack([(target - row @ W + row[i] * W[i]).square().sum() - error for i in fired] or [limit])
            if not len(fired) or rises.min() >= limit:
                break
            row[fired[rises.argmin()]] = 0
    return z


@pytest.mark.parametrize("held", [pruning.HELD_NUMBERS, 200], ids=["at once", "by parts"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1e6])
def test_codes_go_one_after_another(tau, held, monkeypatch):
    monkeypatch.setattr(pruning, "HELD_NUMBERS", held)
    W = draw(D_SAE, D_IN).double()
    z = draw(30, D_SAE, seed=2).double() * (torch.rand(30, D_SAE, generator=torch.Generator().manual_seed(3)) < 0.2)
    z[3] = 0  # codes of both signs, rows of any number of them, and one of none
    x = (z * (draw(30, D_SAE, seed=1) > 0)) @ W + draw(30, D_IN, seed=5)
    codes, wanted = SparseCodes.from_dense(z), prune_slowly(z, x, W, tau)
    kept = needed_codes(codes, x, W, tau)
    assert torch.equal(codes.keep(kept).to_dense(), wanted)
    assert not kept.any() if tau > 1e5 else 0 < kept.sum() < len(kept)
    assert len(needed_codes(SparseCodes.from_dense(z[3:4]), x[3:4], W, tau)) == 0


def test_one_of_two_equal_latents_stays_and_noise_goes():
    """Leaving out either of two halves of an atom raises the error little; both together are the atom."""
    W = torch.cat([torch.eye(4), torch.eye(4)[:1]])
    x = torch.tensor([[2.0, -1.0, 0.0, 0.3]])
    z = torch.tensor([[1.0, -1.0, 0.1, 0.0, 1.0]])
    left = SparseCodes.from_dense(z).keep(needed_codes(SparseCodes.from_dense(z), x, W, tau=0.5)).to_dense()
    assert left.tolist() == [[1.0, -1.0, 0.0, 0.0, 1.0]]
    half = SparseCodes.from_dense(z).keep(needed_codes(SparseCodes.from_dense(z), x, W, tau=30.0)).to_dense()
    assert (half[0, [0, 4]] != 0).sum() == 1


@unchecked()
@pytest.mark.parametrize(
    ("activation", "encoder", "d_sae", "tau"),
    [
        (sl.TopK(k=6), "linear", 2048, 0.3),  # which is searched
        (sl.AbsTopK(k=6), Refined(), D_SAE, 0.3),
        (sl.ReLU(coefficient=0.1), "linear", D_SAE, 0.3),
        (sl.AbsTopK(k=6), sl.OrthogonalMatchingPursuit(), D_SAE, 5.0),
    ],
    ids=["topk", "refined", "relu", "pursuit"],
)
def test_an_sae_prunes_in_inference_only(activation, encoder, d_sae, tau, tmp_path):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=activation, encoder=encoder), seed=0)
    x = 1 + 2 * draw(20, D_IN, seed=4)
    sae.normalizer.fit(x)
    if encoder != sl.OrthogonalMatchingPursuit():
        with torch.no_grad():
            sae.W_enc.mul_(0.2)  # random rows explain more than there is
    pruned, z = sae.prune(tau), sae.encode(x).detach()
    assert pruned.W_dec.data_ptr() == sae.W_dec.data_ptr() and sae.cfg.pruning is None
    wanted = prune_slowly(z.double(), sae.center(x).detach().double(), sae.W_dec.detach().double(), tau)
    assert 0 < (wanted != 0).sum() < (z != 0).sum()
    found = pruned.encode(x.view(2, 10, D_IN))
    torch.testing.assert_close(found.view(20, -1).double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(pruned.encode_sparse(x).to_dense(), found.view(20, -1))
    assert torch.equal(pruned.encode_latents(x, [3, 1]), found.view(20, -1)[:, [3, 1]])
    (gradient,) = torch.autograd.grad(found.sum(), pruned.b_dec)
    assert gradient.any()
    pruned.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == pruned.cfg and torch.equal(loaded.encode(x), pruned.encode(x))
    torch.testing.assert_close(pruned.fold()(x), pruned(x), rtol=1e-4, atol=1e-4)
    assert "pruning" not in sae.cfg.to_dict() and f"pruned by {tau:g}" in repr(pruned)


def test_pruning_finds_which_latents_fired():
    """With the planted rows as weights and twice as many codes as features, pruning leaves the planted ones."""
    rows = torch.nn.functional.normalize(draw(60, 40, seed=4))
    support = torch.rand(300, 60, generator=torch.Generator().manual_seed(5)).topk(3).indices
    x = torch.zeros(300, 60).scatter(1, support, 1 + draw(300, 3, seed=6).abs()) @ rows + 0.1 * draw(300, 40, seed=7)
    encoder = sl.OrthogonalMatchingPursuit()
    sae = sl.SAE(sl.SAEConfig(d_in=40, d_sae=60, activation=sl.AbsTopK(k=6), encoder=encoder, normalizer="none"))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
    true = torch.zeros(300, 60, dtype=torch.bool).scatter(1, support, True)
    precision, recall = [], []
    for each in (sae, sae.prune(0.5)):
        fires = each.encode(x) != 0
        precision.append(float((fires & true).sum() / fires.sum()))
        recall.append(float((fires & true).sum() / true.sum()))
    assert precision[0] <= 0.5 and precision[1] > 0.9 and recall[1] > 0.95


def test_what_cannot_be_pruned_is_named(tmp_path):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.ReLU()))
    with pytest.raises(ValueError, match="`pruning` must be at least 0"):
        sae.prune(-0.1)
    with pytest.raises(ValueError, match="None for a transcoder"):
        sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=4, pruning=0.1)
    with pytest.raises(ValueError, match="must be given an SAE without pruning"):
        sae.prune().to_jumprelu(draw(50, D_IN))
    with pytest.raises(ValueError, match="must keep all codes"):
        sae.prune().save_pretrained(tmp_path / "foreign", "saelens")
    sae.prune().save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="depends on all latents"):
        sl.SAE.from_pretrained(tmp_path / "own", latents=[1])
    with pytest.raises(ValueError, match="to be folded, got 'whiten'"):
        sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.ReLU(), normalizer="whiten", pruning=0.1)).fold()
