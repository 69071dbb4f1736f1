"""Pursuits: against a plain loop, its stops, its gradients, and an SAE that encodes by it."""

import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from unchecked import unchecked

import saelab as sl
from saelab.functional.pursuit import pursue, pursue_least_squares
from saelab.sae.encoders import ICFL, MatchingPursuit, OrthogonalMatchingPursuit
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE = 6, 15


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def atoms(seed=0):
    rows = draw(D_SAE, D_IN, seed=seed)
    return rows / rows.norm(dim=1, keepdim=True)


def one_by_one(x, W, n_steps, signed, threshold, stop_on_repeat):
    """Codes of one row at a time, by the definition."""
    z = torch.zeros(len(x), len(W))
    for row, code in zip(x, z, strict=True):
        residual = row.clone()
        for _ in range(n_steps):
            products = W @ residual
            best = int((products.abs() if signed else products).argmax())
            value = float(products[best]) if signed else max(0.0, float(products[best]))
            repeated = value == 0 or code[best] != 0
            code[best] += value
            residual = residual - value * W[best]
            if (stop_on_repeat and repeated) or (threshold > 0 and residual.norm() < threshold):
                break
    return z


@pytest.mark.parametrize("stop_on_repeat", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.6])  # rows need not be of unit norm
def test_it_is_the_plain_loop(scale, signed, threshold, stop_on_repeat):
    x, W = draw(40, D_IN, seed=1), scale * atoms()
    x[3] = 0.0
    x[4] *= 1e-3
    found = pursue(x, W, 9, signed, threshold, stop_on_repeat)
    torch.testing.assert_close(found.to_dense(), one_by_one(x, W, 9, signed, threshold, stop_on_repeat))
    assert (found.values != 0).all() and bool((found.values < 0).any()) == signed
    assert found.l0.max() <= 9 and found.l0[3] == 0 and (threshold == 0 or found.l0[4] == 1)


def test_orthonormal_rows_are_found_in_order_and_give_back_the_row():
    W = torch.linalg.qr(draw(D_IN, D_IN)).Q
    x = draw(20, D_IN, seed=2)
    for k in range(1, D_IN + 1):
        z = pursue(x, W, k, signed=True).to_dense()
        expected = x @ W.T
        kept = expected.abs() >= expected.abs().sort(descending=True).values[:, k - 1 : k]
        torch.testing.assert_close(z, expected * kept)
    torch.testing.assert_close(z @ W, x)


def test_every_step_lowers_the_error():
    x, W = draw(50, D_IN, seed=3), atoms()
    errors = [(x - pursue(x, W, k, stop_on_repeat=False).decode(W)).square().sum(1) for k in range(1, 8)]
    assert all((later <= sooner + 1e-6).all() for sooner, later in itertools.pairwise(errors))


def test_gradients_are_those_of_the_loop():
    x, W = draw(3, D_IN, seed=4).double(), atoms().double()
    assert torch.autograd.gradcheck(
        lambda x, W: pursue(x, W, 3, True).to_dense(), (x.requires_grad_(), W.requires_grad_()), eps=1e-7
    )


each_sign = pytest.mark.parametrize("activation", [sl.TopK(k=4), sl.AbsTopK(k=4)], ids=lambda a: a.name)


def pursuing(activation, **axes):
    cfg = sl.SAEConfig(
        d_in=D_IN, d_sae=D_SAE, activation=activation, encoder=MatchingPursuit(), normalizer="none", **axes
    )
    return sl.SAE(cfg, seed=1)


@each_sign
@unchecked()
def test_it_learns_and_beats_one_linear_step(activation):
    z = draw(2000, D_SAE, seed=5).abs() * (torch.rand(2000, D_SAE, generator=torch.Generator().manual_seed(0)) < 0.1)
    x = z @ atoms(seed=9) + 3.0
    run = sl.TrainConfig(n_tokens=10_000, batch_size=100)
    fvu = pursuing(activation).fit(x, run, progress=False).history_[-1]["held_out_fvu"]
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation)
    assert fvu < min(0.1, sl.SAE(cfg).fit(x, run, progress=False).history_[-1]["held_out_fvu"])


@each_sign
def test_codes_dense_and_sparse_saved_folded_and_by_prefix(activation, tmp_path):
    sae, x = pursuing(activation, prefixes=(5, D_SAE)), draw(2, 7, D_IN, seed=6)
    with torch.no_grad():
        sae.b_dec.add_(0.5)
    z = sae.encode(x)
    torch.testing.assert_close(
        z.flatten(0, 1), pursue(x.flatten(0, 1) - 0.5, sae.W_dec, 4, activation.signed).to_dense()
    )
    assert torch.equal(sae.encode_sparse(x).to_dense(), z) and (sae.encode_sparse(x).l0 <= 4).all()
    torch.testing.assert_close(sae(x), z @ sae.W_dec + sae.b_dec)
    assert set(sae.state_dict()) == {"W_dec", "b_dec"}
    assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_enc.any()
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == sae.cfg and torch.equal(loaded(x), sae(x)) and torch.equal(sae.fold()(x), sae(x))
    assert json.loads(json.dumps(sae.cfg.to_dict()))["encoder"] == {
        "residual_threshold": 0.0,
        "stop_on_repeat": True,
    }


@each_sign
def test_losses_reach_the_dictionary(activation):
    sae = pursuing(activation, objective=(sl.ReconstructionLoss(), sl.AuxK(k=2, dead_after_tokens=10)))
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=100))
    trainee.prepare(draw(100, D_IN))
    trainee.state["tokens_since_fired"][-3:] = 10
    objective = trainee.objective(draw(100, D_IN))
    z = sae.encode(draw(100, D_IN))
    error = (draw(100, D_IN) - z @ sae.W_dec - sae.b_dec).square().sum() / (100 * trainee.state["variance"])
    torch.testing.assert_close(objective.terms["reconstruction"], error)
    wanted = torch.autograd.grad(error, [sae.W_dec, sae.b_dec])
    objective.terms["reconstruction"].backward(retain_graph=True)
    torch.testing.assert_close([sae.W_dec.grad, sae.b_dec.grad], list(wanted), rtol=1e-4, atol=1e-6)
    sae.zero_grad()
    objective.terms["aux"].backward()
    assert sae.W_dec.grad[-3:].any() and not sae.W_dec.grad[:-3].any()


def test_what_a_pursuit_cannot_be_is_named():
    plain = {"d_in": D_IN, "d_sae": D_SAE, "encoder": MatchingPursuit(), "normalizer": "none"}
    with pytest.raises(ValueError, match="`activation` of a pursuit must be TopK or AbsTopK"):
        sl.SAEConfig(**plain, activation=sl.ReLU(target_l0=3.0))
    with pytest.raises(ValueError, match="`normalizer` must be 'none'"):
        sl.SAEConfig(**plain | {"normalizer": "scale"}, activation=sl.TopK(k=3))
    with pytest.raises(ValueError, match="`d_out` must be None"):
        sl.SAEConfig(**plain, activation=sl.TopK(k=3), d_out=4)
    with pytest.raises(ValueError, match="`residual_threshold` must be at least 0"):
        MatchingPursuit(residual_threshold=-1.0)
    with pytest.raises(ValueError, match="`encoder` must be one of"), unchecked():
        sl.SAEConfig(**plain | {"encoder": "linaer"}, activation=sl.TopK(k=3))


def test_more_steps_than_latents_are_legal(tmp_path):
    """Without an end at the first repeat, steps go on adding to the latents that there are."""
    cfg = sl.SAEConfig(
        d_in=4, d_sae=6, activation=sl.TopK(k=9), encoder=sl.MatchingPursuit(stop_on_repeat=False), normalizer="none"
    )
    sae, x = sl.SAE(cfg, seed=0), torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    sae.save_pretrained(tmp_path)
    assert torch.equal(sl.SAE.from_pretrained(tmp_path).encode(x), sae.encode(x))
    assert int((sae.encode(x) != 0).sum(1).max()) <= 6
    with pytest.raises(ValueError, match="at least 1 step"):
        sl.SAEConfig(d_in=4, d_sae=6, activation=sl.TopK(k=0), encoder=sl.MatchingPursuit(), normalizer="none")


# --- least squares ---


def nonnegative(rows, x):
    """min ||x - z rows|| for z >= 0 by trying every subset of the rows: the best one whose fit has no negative code."""
    best, error = np.zeros(len(rows)), float(x @ x)
    for n in range(1, len(rows) + 1):
        for chosen in map(list, itertools.combinations(range(len(rows)), n)):
            z = np.linalg.lstsq(rows[chosen].T, x, rcond=None)[0]
            left = float(np.square(x - z @ rows[chosen]).sum())
            if (z > 0).all() and left < error - 1e-12:
                best, error = np.zeros(len(rows)), left
                best[chosen] = z
    return best


def fit_one_by_one(x, W, n_latents, signed, per_round, refit):
    """Codes of one row at a time, by the definition, in float64."""
    x, W = x.double().numpy(), W.double().numpy()
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    codes = np.zeros((len(x), len(W)))
    for row, code in zip(x, codes, strict=True):
        residual, support = row, []
        for start in range(0, n_latents, per_round):
            u = unit @ residual
            order = np.argsort(-(np.abs(u) if signed else u), kind="stable")[: min(per_round, n_latents - start)]
            new = [int(j) for j in order if (abs(u[j]) if signed else u[j]) > 1e-6 * np.linalg.norm(row)]
            support = support + new if refit else new
            target = row if refit else residual
            if not new:
                break
            fit = np.linalg.lstsq(W[support].T, target, rcond=None)[0] if signed else nonnegative(W[support], target)
            if refit:
                code[:] = 0
            code[support] += fit
            support = [j for j, value in zip(support, fit, strict=True) if value != 0]
            residual = row - code @ W
    return torch.tensor(codes).float()


ways = pytest.mark.parametrize(
    ("per_round", "refit"), [(1, True), (2, True), (2, False), (3, False)], ids=["omp", "omp2", "icfl2", "icfl3"]
)


@ways
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("d_sae", [D_SAE, 2048])  # the wide one is searched in low precision
def test_least_squares_are_those_of_the_plain_loop(d_sae, signed, per_round, refit, monkeypatch):
    monkeypatch.setattr("saelab.functional.pursuit.GATHERED", 9 * 5 * D_IN)  # several parts
    x, W = draw(30, D_IN, seed=1), draw(d_sae, D_IN, seed=11)  # rows of any length
    x[3] = 0.0
    found = pursue_least_squares(x, W, 5, signed, per_round, refit)
    wanted = fit_one_by_one(x, W, 5, signed, per_round, refit)
    torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-3, atol=1e-4)
    assert bool((found.values < 0).any()) == signed and found.l0[3] == 0 and 1 < found.l0.max() <= 5


def test_what_is_chosen_after_others_were_left_out_is_fitted_with_the_rest():
    """Rows with a common part, so that many codes turn negative on the way; the fit is the best: no slope is left."""
    x, W = 1 + draw(200, 16, seed=1), 0.5 + draw(60, 16, seed=2)
    found = pursue_least_squares(x, W, 12)
    slopes = (x - found.decode(W)) @ W.T
    assert slopes[found.rows, found.indices].abs().max() < 1e-4 * x.norm(dim=1).max()
    assert (found.l0 < 12).any() and (found.values > 0).all()


def test_of_equal_rows_the_first_is_chosen():
    W, x = draw(15, 33, seed=1).repeat(37, 1), draw(300, 33, seed=3)  # a product's last columns may round otherwise
    W = W / W.norm(dim=1, keepdim=True)
    for found in (pursue(x, W, 4, True), pursue_least_squares(x, W, 4, True)):
        assert found.indices.max() < 15


def test_they_are_scikit_learns():
    x, W = draw(40, 20, seed=1), draw(60, 20, seed=2)
    W = W / W.norm(dim=1, keepdim=True)
    theirs = orthogonal_mp(W.T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=6)
    torch.testing.assert_close(
        pursue_least_squares(x, W, 6, signed=True).to_dense(), torch.tensor(theirs.T).float(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("signed", [False, True])
def test_exact_sums_of_few_rows_are_found_and_nothing_is_added_to_them(signed):
    """Three incoherent rows make each x: with five to choose the others are left out, as nothing remains to explain."""
    W = draw(40, 200, seed=1)
    z = torch.zeros(30, 40)
    for i, code in enumerate(z):
        code[torch.randperm(40, generator=torch.Generator().manual_seed(i))[:3]] = 1 + draw(3, seed=i).abs()
    z = z * (draw(30, 40, seed=5).sign() if signed else 1)
    found = pursue_least_squares(z @ W, W, 5, signed)
    torch.testing.assert_close(found.to_dense(), z, rtol=1e-4, atol=1e-4)
    assert (found.l0 == 3).all()


def test_the_residual_is_orthogonal_to_what_was_chosen_and_falls_each_round():
    x, W = draw(50, D_IN, seed=3), atoms()
    errors = []
    for k in range(1, D_IN + 1):
        for signed in (True, False):
            found = pursue_least_squares(x, W, k, signed)
            residual = x - found.decode(W)
            products = (residual[found.rows] * W[found.indices]).sum(1)
            assert products.abs().max() < 1e-4 * x.norm(dim=1).max()
            errors.append(residual.square().sum(1))
    assert all((later <= sooner + 1e-5).all() for sooner, later in zip(errors, errors[2:], strict=False))
    assert errors[-2].max() < 1e-6  # d_in rows span everything


def test_equal_rows_are_used_once():
    W = torch.cat([atoms(), atoms()])
    found = pursue_least_squares(draw(50, D_IN, seed=3), W, 4, signed=True, per_round=2)
    assert found.values.isfinite().all() and found.values.abs().max() < 100
    assert pursue_least_squares(draw(0, D_IN), W, 4).to_dense().shape == (0, 2 * D_SAE)


@ways
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_the_fit(signed, per_round, refit):
    x, W = draw(2, D_IN, seed=4).double(), draw(8, D_IN, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda x, W: pursue_least_squares(x, W, 4, signed, per_round, refit).to_dense(),
        (x.requires_grad_(), W.requires_grad_()),
        eps=1e-7,
    )


LEAST_SQUARES = [OrthogonalMatchingPursuit(), OrthogonalMatchingPursuit(latents_per_round=2), ICFL(latents_per_round=2)]
each_encoder = pytest.mark.parametrize("encoder", LEAST_SQUARES, ids=["omp", "omp2", "icfl"])


def fitting(encoder, activation=None, normalizer="scale", **axes):
    activation = activation or sl.AbsTopK(k=4)
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, encoder=encoder, normalizer=normalizer, **axes)
    return sl.SAE(cfg, seed=1)


@each_encoder
@each_sign
@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten"])
def test_sae_of_least_squares(encoder, activation, normalizer, tmp_path):
    sae, x = fitting(encoder, activation, normalizer, prefixes=(5, D_SAE)), 2 + draw(2, 7, D_IN, seed=6)
    sae.normalizer.fit(3 + 2 * draw(100, D_IN, seed=1) * torch.arange(1.0, D_IN + 1))
    with torch.no_grad():
        sae.b_dec.add_(0.5)
    z = sae.encode(x)
    assert torch.equal(sae.encode_sparse(x).to_dense(), z) and (sae.encode_sparse(x).l0 <= 4).all()
    with torch.no_grad():
        assert torch.equal(sae.encode(x), z)
    torch.testing.assert_close(sae(x), sae.normalizer.unnormalize(z @ sae.W_dec + sae.b_dec))
    torch.testing.assert_close(sae.encode_latents(x, [3, 1]), z[..., [3, 1]])
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == sae.cfg and torch.equal(loaded(x), sae(x))
    if normalizer == "whiten":
        with pytest.raises(ValueError, match="got 'whiten'; keep it"):
            sae.fold()
    else:
        torch.testing.assert_close(sae.fold()(x), sae(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be MatchingPursuit"):
        fitting(encoder, activation, "none").save_pretrained(tmp_path / "other", "saelens")


@each_encoder
@each_sign
def test_the_loss_reaches_the_dictionary_alone(encoder, activation):
    sae = fitting(encoder, activation)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=100))
    trainee.prepare(draw(100, D_IN))
    x = draw(100, D_IN, seed=3)
    loss = trainee.objective(x).terms["reconstruction"]
    normal = sae.normalizer.normalize(x)
    error = (normal - sae.encode(x).detach() @ sae.W_dec - sae.b_dec).square().sum() / (100 * trainee.state["variance"])
    torch.testing.assert_close(loss, error)
    loss.backward()
    wanted = torch.autograd.grad(error, [sae.W_dec, sae.b_dec])
    torch.testing.assert_close([sae.W_dec.grad, sae.b_dec.grad], list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoder", [MatchingPursuit(), *LEAST_SQUARES])
def test_the_number_of_steps_follows_its_schedule(encoder):
    schedule = sl.Schedule(start=2.0, end=1.0)
    sae = fitting(encoder, sl.AbsTopK(k=3), "none", sparsity_schedule=schedule)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1000, batch_size=100))
    trainee.prepare(draw(100, D_IN))
    early = float(trainee.objective(draw(100, D_IN)).l0)
    trainee.state["n_steps"].fill_(10)
    assert early > float(trainee.objective(draw(100, D_IN)).l0) and early > 3


@pytest.mark.parametrize("encoder", LEAST_SQUARES[1:], ids=["omp2", "icfl"])
@unchecked()
def test_planted_rows_are_found(encoder):
    """Sparse codes of rows of 12 dimensions; a linear encoder of as many codes leaves more."""
    g = torch.Generator().manual_seed(0)
    rows = draw(24, 12, seed=9)
    z = draw(4000, 24, seed=5) * (torch.rand(4000, 24, generator=g) < 2 / 24)
    x, run = z @ rows, sl.TrainConfig(n_tokens=20_000, batch_size=100, lr=1e-2)
    axes = {"d_in": 12, "d_sae": 24, "activation": sl.AbsTopK(k=4)}
    fitted, linear = (
        sl.SAE(sl.SAEConfig(**axes, encoder=how), seed=0).fit(x, run, progress=False) for how in (encoder, "linear")
    )
    fvus = [sae.history_[-1]["held_out_fvu"] for sae in (fitted, linear)]
    assert fvus[0] < fvus[1]
    unit = rows / rows.norm(dim=1, keepdim=True)
    nearest = (unit @ fitted.W_dec.detach().T).abs().amax(1)
    untrained = (unit @ sl.SAE(fitted.cfg, seed=0).W_dec.detach().T).abs().amax(1)
    assert nearest.mean() > untrained.mean() + 5 * untrained.std() / 24**0.5


def test_what_least_squares_cannot_be_is_named():
    with pytest.raises(ValueError, match="must be at most the activation's k, got 5 and AbsTopK"):
        fitting(ICFL())
    with pytest.raises(ValueError, match="`latents_per_round` must be at least 1"):
        ICFL(latents_per_round=0)
    with pytest.raises(ValueError, match="`activation` of a pursuit"):
        fitting(OrthogonalMatchingPursuit(), sl.BatchTopK(k=4))
    with pytest.raises(ValueError, match=r"must be in 1\.\.d_sae"):
        fitting(OrthogonalMatchingPursuit(), sl.TopK(k=D_SAE + 1))
    plain = fitting(ICFL(latents_per_round=2)).cfg.to_dict()
    assert plain["encoder"] == {"name": "icfl", "latents_per_round": 2}
    with pytest.raises(ValueError, match="An encoder must be one of"):
        sl.SAEConfig.from_dict(plain | {"encoder": {"name": "lars"}})
