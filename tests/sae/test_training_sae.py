"""The training objective against a plain dense one, its parts one by one, and the habits that peers get wrong.

Numbers of defects refer to the list of peers' defects that the project keeps.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.activation_functions import jumprelu, step_above
from saelab.functional.metrics import normalized_error
from saelab.sae.activation_functions import AbsJumpReLU
from saelab.sae.training_sae import TrainingSAE
from saelab.training.optimizer import make_adam, step_adam

D_IN, D_SAE, K, N = 10, 48, 4, 64

STRUCTURAL = [sl.TopK(k=K), sl.AbsTopK(k=K), sl.BatchTopK(k=K), sl.BatchAbsTopK(k=K)]
PENALISED = [
    sl.ReLU(coefficient=0.02),
    sl.JumpReLU(coefficient=0.02, bandwidth=0.3, start=0.4),
    AbsJumpReLU(coefficient=0.02, bandwidth=0.3, start=0.4),
]
PREFIXES = [None, (5, 20, D_SAE), sl.RandomPrefixes(n=4, smallest=3)]

each_structural = pytest.mark.parametrize("activation", STRUCTURAL, ids=lambda a: a.name)
each_activation = pytest.mark.parametrize("activation", STRUCTURAL + PENALISED, ids=lambda a: a.name)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trainee_of(activation, n_dead=0, seed=0, aux=None, **axes):
    """An SAE with parameters all drawn at random, of which the last `n_dead` latents have not fired for long."""
    aux = aux or sl.AuxK(coefficient=0.3, k=3, dead_after_tokens=1000, token_frac=0.5)
    cfg = sl.SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=activation,
        normalizer="none",
        objective=(sl.ReconstructionLoss(), aux),
        **axes,
    )
    sae = sl.SAE(cfg, seed=seed)
    with torch.no_grad():
        sae.W_enc.add_(0.2 * draw(D_IN, D_SAE, seed=1))
        sae.b_enc.copy_(0.2 * draw(D_SAE, seed=2))
        sae.b_dec.copy_(draw(D_IN, seed=3))
        if n_dead:
            sae.b_enc[-n_dead:] -= 50.0 if not activation.signed else 0.0
            if activation.signed:
                sae.W_enc[:, -n_dead:] *= 1e-3
                sae.b_enc[-n_dead:] *= 1e-3
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=1_000_000, seed=seed))
    trainee.state["variance"].fill_(7.0)
    trainee.state["tokens_since_fired"][D_SAE - n_dead :] = 1000
    return trainee


def dense_codes(activation, u, threshold):
    """Codes with the gradients that the definitions give, written out."""
    size = u.abs() if activation.signed else u.relu()
    if isinstance(activation, sl.TopK):
        return u * torch.zeros_like(u).scatter(1, size.topk(K).indices, 1.0) * (size > 0)
    if isinstance(activation, sl.BatchTopK):
        limit = size.flatten().topk(K * len(u)).values[-1]
        return u * ((size >= limit) & (size > 0))
    if isinstance(activation, sl.ReLU):
        return u.relu()
    size, sign = (u.abs(), u.sign()) if activation.signed else (u, 1.0)
    fires = (size > threshold).float()
    near = ((size - threshold).abs() < activation.bandwidth / 2).float()
    # the value is u * fires; the second factor is 0 and carries the threshold's gradient only
    return u * fires - sign * near * threshold.detach() / activation.bandwidth * (threshold - threshold.detach())


def dense_penalty(activation, u, z, threshold):
    if isinstance(activation, sl.ReLU):
        return z.sum(1).mean()
    size = u.abs() if activation.signed else u
    near = ((size - threshold).abs() < activation.bandwidth / 2).float()
    count = (size > threshold).float() - near / activation.bandwidth * (threshold - threshold.detach())
    return count.sum(1).mean()


def dense_terms(trainee, x):
    """The objective, from the paper's formulas, all dense."""
    sae, cfg = trainee.sae, trainee.sae.cfg
    u = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = dense_codes(cfg.activation, u, sae.threshold)
    errors = [(x - sae.b_dec - z[:, :end] @ sae.W_dec[:end]).square().sum(1).mean() for end in trainee._prefixes()]
    terms = {"reconstruction": sum(errors) / len(errors) / 7.0}
    if isinstance(cfg.activation, sl.ReLU | sl.JumpReLU):
        terms["sparsity"] = 0.02 * dense_penalty(cfg.activation, u, z, sae.threshold)
    dead = trainee.state["tokens_since_fired"] >= 1000
    if dead.any():
        half = len(x) // 2
        residual = (x - sae.b_dec - z @ sae.W_dec).detach()[:half]
        size = (u.abs() if cfg.activation.signed else u)[:half].masked_fill(~dead, -torch.inf)
        kept = torch.zeros_like(size).scatter(1, size.topk(min(3, int(dead.sum()))).indices, 1.0)
        error = ((u[:half] * kept) @ sae.W_dec - residual).square().mean()
        terms["aux"] = 0.3 * error / (residual - residual.mean(0)).square().mean()
    return terms, z


def gradients(trainee, total):
    trainee.sae.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in trainee.sae.named_parameters() if p.grad is not None}


def assert_same(trainee, x):
    objective = trainee.objective(x)
    terms, z = dense_terms(trainee, x)
    assert {key for key, value in objective.terms.items() if value != 0} == set(terms)
    for key, value in terms.items():
        torch.testing.assert_close(objective.terms[key], value, rtol=1e-4, atol=1e-6)
    fast, dense = gradients(trainee, objective.total), gradients(trainee, sum(terms.values()))
    assert fast.keys() == dense.keys()
    for name in dense:
        scale = float(dense[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            fast[name], dense[name], rtol=1e-3, atol=1e-4 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )
    assert torch.equal(objective.fired, (z != 0).any(0)) and objective.n_tokens == len(x)
    torch.testing.assert_close(objective.l0, (z != 0).sum(1).float().mean())
    torch.testing.assert_close(objective.smallest, z[z != 0].detach().abs().min(), rtol=1e-4, atol=1e-6)


# peers' defects 1 (encoder without gradient) and 23 (target not detached): every gradient is compared, AuxK's included
@pytest.mark.parametrize("n_dead", [0, 2, 7])
@pytest.mark.parametrize("prefixes", PREFIXES, ids=["flat", "fixed", "random"])
@each_activation
def test_objective_is_the_dense_one(activation, prefixes, n_dead):
    assert_same(trainee_of(activation, n_dead, prefixes=prefixes), draw(N, D_IN, seed=5))


@pytest.mark.parametrize("dictionary", ["free", "frozen"])
@each_activation
def test_objective_with_other_dictionaries(activation, dictionary):
    trainee = trainee_of(activation, 3, dictionary=dictionary)
    assert_same(trainee, draw(N, D_IN, seed=5))
    assert (trainee.sae.W_dec.grad is None) == (dictionary == "frozen")


@pytest.mark.parametrize("prefixes", PREFIXES, ids=["flat", "fixed", "random"])
@each_activation
def test_recycled_memory_changes_nothing(activation, prefixes):
    """A second step may write over the first one's gradients; what they held, NaN even, leaves no trace."""
    trainee = trainee_of(activation, 3, prefixes=prefixes)
    for seed in (5, 6):
        trainee.objective(draw(N, D_IN, seed=seed)).total.backward()
        for parameter in trainee.sae.parameters():
            parameter.grad.fill_(torch.nan)
        trainee.recycle_gradients()
        x = draw(N, D_IN, seed=seed + 2)
        fast = {}
        objective = trainee.objective(x)
        objective.total.backward()
        fast = {name: p.grad.clone() for name, p in trainee.sae.named_parameters()}
        dense = gradients(trainee, sum(dense_terms(trainee, x)[0].values()))
        for name in dense:
            torch.testing.assert_close(fast[name], dense[name], rtol=1e-3, atol=1e-4 * float(dense[name].abs().max()))


@pytest.mark.parametrize("prefixes", PREFIXES[:2], ids=["flat", "fixed"])
@pytest.mark.parametrize("activation", PENALISED, ids=lambda a: a.name)
def test_penalised_codes_are_trained_sparsely_once_they_are_few(activation, prefixes, monkeypatch):
    """Both ways of a ReLU and of a JumpReLU step are the dense one's equal, and each is taken where it should be."""
    trainee = trainee_of(activation, 3, prefixes=prefixes)
    few = trainee.sae.b_enc.detach().clone()
    few[2:-3] = -10.0  # 2 of 48 that may fire are few enough whatever the batch
    many, rows = trainee.sae.b_enc.detach().clone(), trainee.sae.W_enc.detach().clone()
    with torch.no_grad():
        if activation.signed:
            trainee.sae.W_enc[:, 2:-3] *= 1e-3
            few[2:-3] = 0.0
        trainee.sae.b_enc.copy_(few)
    x = draw(N, D_IN, seed=5)
    took = []
    for name in ("_sparse_step", "_dense_step"):
        step = getattr(trainee, name)
        monkeypatch.setattr(trainee, name, lambda *a, name=name, step=step: took.append(name) or step(*a))
    assert_same(trainee, x)
    with torch.no_grad():
        trainee.sae.b_enc.copy_(many)
        trainee.sae.W_enc.copy_(rows)
    assert_same(trainee, x)
    assert took == ["_sparse_step", "_dense_step"]


def test_batches_without_any_code():
    for activation in (sl.TopK(k=K), sl.BatchTopK(k=K), *PENALISED):
        trainee = trainee_of(activation)
        with torch.no_grad():
            trainee.sae.b_enc.fill_(0.0 if activation.signed else -100.0)
            trainee.sae.W_enc.mul_(1e-3 if activation.signed else 1.0)
        objective = trainee.objective(draw(N, D_IN))
        objective.total.backward()
        assert objective.total.isfinite() and objective.l0 == 0 and not objective.fired.any()
        trainee.observe(objective)
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainee.sae.parameters())


# --- AuxK: peers' defects 1, 23, 33


def aux_gradients(activation, **settings):
    trainee = trainee_of(activation, n_dead=6, **settings)
    objective = trainee.objective(draw(N, D_IN, seed=5))
    return trainee, gradients(trainee, objective.terms["aux"])


@each_activation
def test_auxk_moves_the_dead_and_only_the_dead(activation):
    """The residual is a constant: no live latent hears of it, so AuxK cannot make the others worse (defect 23)."""
    _, grads = aux_gradients(activation)
    for name, dead_axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
        by_latent = grads[name].movedim(dead_axis, 0).flatten(1) if grads[name].ndim > 1 else grads[name].unsqueeze(1)
        assert by_latent[-6:].abs().sum() > 0, f"{name} of the dead gets no gradient (defect 1)"
        assert not by_latent[:-6].any(), f"{name} of a live latent is moved by AuxK"


@pytest.mark.parametrize("activation", [sl.TopK(k=K), sl.BatchTopK(k=K), *PENALISED[:2]], ids=lambda a: a.name)
def test_dead_latents_that_are_negative_everywhere_are_heard(activation):
    """Defect 33: behind a ReLU they would get no gradient at all."""
    trainee, grads = aux_gradients(activation)
    x = draw(N, D_IN, seed=5)
    assert (((x - trainee.sae.b_dec) @ trainee.sae.W_enc + trainee.sae.b_enc)[:, -6:] < 0).all()
    assert (grads["W_enc"][:, -6:].norm(dim=0) > 0).sum() >= 3


def test_auxk_leaves_out_b_dec():
    """What the dead reconstruct is residual alone: adding b_dec to them would add its norm to the loss."""
    trainee = trainee_of(sl.TopK(k=K), n_dead=6)
    x = draw(N, D_IN, seed=5)
    before = trainee.objective(x).terms["aux"]
    with torch.no_grad():
        trainee.sae.b_dec.add_(100.0)
    torch.testing.assert_close(trainee.objective(x + 100.0).terms["aux"], before, rtol=1e-3, atol=1e-5)


def test_auxk_ranks_signed_codes_by_size():
    trainee = trainee_of(sl.AbsTopK(k=K), n_dead=6, aux=sl.AuxK(k=1, dead_after_tokens=1000, token_frac=1.0))
    with torch.no_grad():  # one dead latent is far below zero, the others are small and positive
        trainee.sae.W_enc[:, -6:] = 0
        trainee.sae.b_enc[-6:] = torch.tensor([1e-3, 2e-3, -5e-3, 1e-3, 3e-3, 1e-3])
    grads = gradients(trainee, trainee.objective(draw(N, D_IN)).terms["aux"])
    assert grads["b_enc"].nonzero().flatten().tolist() == [D_SAE - 4]


@each_activation
def test_auxk_is_zero_without_dead_latents_and_can_be_switched_off(activation):
    x = draw(N, D_IN)
    assert float(trainee_of(activation).objective(x).terms.get("aux", torch.zeros(()))) == 0
    trainee = trainee_of(activation, n_dead=6)
    trainee.sae.cfg = replace(trainee.sae.cfg, objective=(sl.ReconstructionLoss(),))
    assert float(trainee.objective(x).terms.get("aux", torch.zeros(()))) == 0


@each_structural
def test_auxk_is_free_of_scale(activation):
    """Normalized by the residual's variance: multiplying data and dead codes by a number leaves it as it was."""
    x = draw(N, D_IN, seed=5)
    terms = []
    for factor in (1.0, 30.0):
        trainee = trainee_of(activation, n_dead=6)
        with torch.no_grad():
            trainee.sae.b_enc.mul_(factor)
            trainee.sae.b_dec.mul_(factor)
        terms.append(trainee.objective(x * factor).terms["aux"])
    torch.testing.assert_close(*terms, rtol=1e-4, atol=1e-6)


def test_normalized_error_of_a_constant_target_is_zero():
    estimate = draw(4, 3).requires_grad_()
    error = normalized_error(estimate, torch.ones(4, 3))
    error.backward()
    assert error == 0 and not estimate.grad.any()


def test_auxk_on_a_share_of_the_batch_is_unbiased():
    shares = []
    for frac in (1.0, 0.25):
        trainee = trainee_of(sl.TopK(k=K), n_dead=6, aux=sl.AuxK(k=3, dead_after_tokens=1000, token_frac=frac))
        shares.append(
            torch.stack([trainee.objective(draw(1024, D_IN, seed=s)).terms["aux"].detach() for s in range(20)]).mean()
        )
    torch.testing.assert_close(*shares, rtol=0.05, atol=0)


@pytest.mark.parametrize(("n_tokens", "after"), [(1_000_000, 50_000), (200_000_000, 10_000_000)])
def test_default_age_of_death(n_tokens, after):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=K)))
    assert TrainingSAE(sae, sl.TrainConfig(n_tokens=n_tokens)).dead_after_tokens == after


# --- prefixes


def test_prefixes_are_averaged_once():
    """Normalizing by their number twice would weigh AuxK five times as much as it says."""
    x = draw(N, D_IN, seed=5)
    whole = trainee_of(sl.TopK(k=K), n_dead=4).objective(x).terms
    for n in (2, 5):
        # all codes lie in the smallest prefix, so every prefix has the same error
        trainee = trainee_of(sl.TopK(k=K), n_dead=4, prefixes=tuple(range(D_SAE - n + 1, D_SAE + 1)))
        terms = trainee.objective(x).terms
        torch.testing.assert_close(terms["reconstruction"], whole["reconstruction"])
        torch.testing.assert_close(terms["aux"], whole["aux"])


def test_random_prefixes_change_with_step_and_seed_and_nothing_else():
    trainee, same = (trainee_of(sl.TopK(k=K), prefixes=sl.RandomPrefixes(n=4, smallest=3)) for _ in range(2))
    other = trainee_of(sl.TopK(k=K), seed=1, prefixes=sl.RandomPrefixes(n=4, smallest=3))
    before = torch.get_rng_state()
    drawn = []
    for _ in range(40):
        assert trainee._prefixes() == trainee._prefixes() == same._prefixes()
        drawn.append((tuple(trainee._prefixes()), tuple(other._prefixes())))
        for each in (trainee, same, other):
            each.observe(each.objective(draw(N, D_IN)))
    assert torch.equal(torch.get_rng_state(), before)
    mine, others = zip(*drawn, strict=True)
    assert len(set(mine)) > 20 and mine != others
    for ends in mine + others:
        assert ends[-1] == D_SAE and ends[0] >= 3 and list(ends) == sorted(set(ends))


# --- JumpReLU: peers' defect 16


def test_jumprelu_estimate_is_the_density_at_the_threshold():
    """The gradient of L0 for u ~ N(0, 1) is -pdf(threshold); an estimate after the jump would see half of it."""
    u = draw(400_000, 1, seed=1)
    threshold = torch.full((1,), 0.5, requires_grad=True)
    step_above(u, threshold, 0.05).mean().backward()
    pdf = math.exp(-0.125) / math.sqrt(2 * math.pi)
    assert abs(float(threshold.grad) + pdf) < 0.01 and abs(pdf - 0.352) < 1e-3


def test_jumprelu_estimate_sees_both_halves_of_its_window():
    bandwidth = 0.2
    u = torch.tensor([[0.41], [0.59], [0.39], [0.61]])
    for function, size in ((step_above, 1 / bandwidth), (jumprelu, 0.5 / bandwidth)):
        for row, inside in zip(u, (True, True, False, False), strict=True):
            threshold = torch.full((1,), 0.5, requires_grad=True)
            function(row, threshold, bandwidth).sum().backward()
            torch.testing.assert_close(threshold.grad, torch.tensor([-size if inside else 0.0]))
    u = u.requires_grad_()
    jumprelu(u, torch.tensor([0.5]), bandwidth).sum().backward()
    assert u.grad.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


def test_signed_jumprelu_is_odd_and_its_estimates_too():
    """At -u its code is the negative, the threshold's gradient through the code too; a count knows no sign."""
    bandwidth, u = 0.2, draw(2000, 3, seed=1)
    assert torch.equal(
        jumprelu(u.relu(), torch.full((3,), 0.5), bandwidth, signed=True), jumprelu(u, torch.full((3,), 0.5), bandwidth)
    )
    grads = {}
    for function in (step_above, jumprelu):
        for sign in (1, -1):
            threshold = torch.full((3,), 0.5, requires_grad=True)
            z = function(sign * u, threshold, bandwidth, signed=True)
            z.sum().backward()
            grads[function, sign] = z.detach(), threshold.grad
    assert torch.equal(grads[jumprelu, 1][0], -grads[jumprelu, -1][0])
    torch.testing.assert_close(grads[jumprelu, 1][1], -grads[jumprelu, -1][1])
    for one, other in zip(grads[step_above, 1], grads[step_above, -1], strict=True):
        torch.testing.assert_close(one, other)


def test_learned_thresholds_stay_positive():
    trainee = trainee_of(PENALISED[1])
    with torch.no_grad():
        trainee.sae.threshold.fill_(-3.0)
    trainee.constrain_weights()
    assert (trainee.sae.threshold > 0).all()


# --- free of side effects: peers' defect 14


@each_activation
def test_an_objective_changes_nothing(activation):
    trainee = trainee_of(activation, n_dead=4)
    sae = trainee.sae

    def everything():
        return {
            **{k: v.clone() for k, v in sae.state_dict().items()},
            **{k: v.clone() for k, v in trainee.state.items()},
        }

    before = everything()
    x = draw(N, D_IN)
    kept = x.clone()
    first, second = trainee.objective(x), trainee.objective(x)
    trainee.held_out_fvu(x)
    after = everything()
    assert all(torch.equal(before[k], after[k]) or before[k].isnan().all() for k in before) and torch.equal(x, kept)
    assert all(torch.equal(first.terms[k], second.terms[k]) for k in first.terms)
    trainee.observe(second)
    assert trainee.state["n_steps"] == 1 and not torch.equal(
        trainee.state["tokens_since_fired"], before["tokens_since_fired"]
    )


@each_activation
def test_observing_counts_signed_firings(activation):
    trainee = trainee_of(activation, n_dead=4)
    x = draw(N, D_IN)
    z = dense_terms(trainee, x)[1]
    before = trainee.state["tokens_since_fired"].clone()
    trainee.observe(trainee.objective(x))
    wanted = torch.where((z != 0).any(0), 0, before + N)
    assert torch.equal(trainee.state["tokens_since_fired"], wanted)


@pytest.mark.parametrize(
    "activation", [sl.ReLU(target_l0=3.0), sl.JumpReLU(target_l0=3.0), AbsJumpReLU(target_l0=3.0)], ids=lambda a: a.name
)
def test_the_coefficient_is_steered_towards_its_target(activation):
    trainee = trainee_of(activation)
    before = float(trainee.state["coefficient"])
    objective = trainee.objective(draw(N, D_IN))
    assert objective.l0 > 3
    trainee.observe(objective)
    assert trainee.state["coefficient"] > before
    trainee.observe(replace(objective, l0=torch.tensor(0.0)))
    trainee.observe(replace(objective, l0=torch.tensor(0.0)))
    assert 0 < trainee.state["coefficient"] < before
    fixed = trainee_of(replace(activation, coefficient=0.5))
    fixed.observe(objective)
    assert fixed.state["coefficient"] == 0.5


# --- the dictionary's constraint


def test_normalized_rows_lose_their_parallel_gradient_and_come_back_to_unit_norm():
    trainee = trainee_of(sl.TopK(k=K))
    W_dec = trainee.sae.W_dec
    trainee.objective(draw(N, D_IN)).total.backward()
    before = W_dec.grad.clone()
    assert ((before * W_dec).sum(1).abs() > 1e-4).any()
    trainee.constrain_gradients()
    rows = W_dec.detach()
    torch.testing.assert_close((W_dec.grad * rows).sum(1), torch.zeros(D_SAE), atol=1e-6, rtol=0)
    torch.testing.assert_close(W_dec.grad, before - (before * rows).sum(1, keepdim=True) * rows)
    before = W_dec.detach().clone()
    step_adam(trainee.module, make_adam(trainee.module, 0.1, trainee.cfg), trainee.normalized_rows)
    assert not torch.allclose(W_dec, before, atol=1e-2)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("dictionary", ["free", "frozen"])
def test_other_dictionaries_are_left_alone(dictionary):
    trainee = trainee_of(sl.TopK(k=K), dictionary=dictionary)
    with torch.no_grad():
        trainee.sae.W_dec.mul_(3.0)
    trainee.objective(draw(N, D_IN)).total.backward()
    before = None if trainee.sae.W_dec.grad is None else trainee.sae.W_dec.grad.clone()
    trainee.constrain_gradients()
    trainee.constrain_weights()
    assert (before is None) == (dictionary == "frozen")
    assert before is None or torch.equal(trainee.sae.W_dec.grad, before)
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.full((D_SAE,), 3.0))


# --- batch activations and their threshold


@dataclass(frozen=True)
class Fitted:
    sae: sl.SAE
    held_out: torch.Tensor


@pytest.fixture(scope="module")
@unchecked()
def batch_fits():
    atoms = draw(32, 16, seed=8)
    generator = torch.Generator().manual_seed(9)
    z = draw(14_000, 32, seed=10).abs() * (torch.rand(14_000, 32, generator=generator) < 0.12)
    sign = torch.randint(0, 2, z.shape, generator=generator) * 2 - 1
    fits = {}
    for activation in (sl.BatchTopK(k=4), sl.BatchAbsTopK(k=4)):
        x = (z * sign if activation.signed else z) @ atoms + 0.1 * draw(14_000, 16, seed=11)
        cfg = sl.SAEConfig(d_in=16, d_sae=48, activation=activation)
        train = sl.TrainConfig(n_tokens=60_000, batch_size=400, n_held_out=0)
        fits[activation.name] = Fitted(sl.SAE(cfg).fit(x[:10_000], train, progress=False), x[10_000:])
    return fits


@pytest.mark.parametrize("name", ["batchtopk", "batchabstopk"])
def test_threshold_gives_the_asked_l0_on_held_out_tokens(batch_fits, name):
    sae, x = batch_fits[name].sae, batch_fits[name].held_out
    assert sae.threshold.ndim == 0 and sae.threshold > 0
    l0 = float(sae.encode_sparse(x).l0.float().mean())
    assert abs(l0 - 4) < 0.05 * 4
    z = sae.encode(x)
    assert z[z != 0].abs().min() > sae.threshold
    assert len(set((z != 0).sum(1).tolist())) > 2  # as many as a token needs, not k each


@pytest.mark.parametrize("name", ["batchtopk", "batchabstopk"])
def test_inference_does_not_look_at_the_batch(batch_fits, name):
    sae, x = batch_fits[name].sae, batch_fits[name].held_out
    whole = sae.encode(x[:100])
    loud = sae.encode(torch.cat([x[:100], 100 * x[100:200]]))[:100]
    torch.testing.assert_close(whole, loud)
    torch.testing.assert_close(whole[:1], sae.encode(x[:1]))
