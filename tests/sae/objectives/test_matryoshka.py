"""Detached prefixes, prefixes by firing rate and the tilted mean, against dense autograd, and what each is for."""

import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import FLOPsPenalty, KeptCoreLoss, MatryoshkaLoss
from saelab.sae.training_sae import TrainingSAE

D_IN, BATCH = 8, 48
EVERY = MatryoshkaLoss(detached=True, by_rate=True, tilt=0.5)
CHOICES = [
    MatryoshkaLoss(),
    MatryoshkaLoss(detached=True),
    MatryoshkaLoss(by_rate=True),
    MatryoshkaLoss(tilt=0.5),
    EVERY,
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(loss, activation=None, d_sae=40, **axes):
    axes = {"normalizer": "none", "prefixes": (d_sae // 8, d_sae // 2, d_sae)} | axes
    return sl.SAEConfig(
        d_in=D_IN, d_sae=d_sae, activation=activation or sl.TopK(k=3), objective=(loss, sl.AuxK()), **axes
    )


def prepared(loss, activation=None, d_sae=40):
    """A trainee in float64, biases and firing rates random."""
    trainee = TrainingSAE(sl.SAE(config(loss, activation, d_sae), seed=0).double(), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1).double())
    with torch.no_grad():
        trainee.sae.b_enc += 0.1 * draw(d_sae, seed=3)
    if loss.by_rate:
        trainee.state["matryoshka.rate"].copy_(draw(d_sae, seed=4).abs())
    return trainee


def dense_loss(trainee, loss, x):
    """The loss by its words: a dense matrix of codes, `detach` and softmax weights that are constants."""
    sae, order = trainee.sae, torch.arange(trainee.sae.cfg.d_sae)
    if loss.by_rate:
        order = trainee.state["matryoshka.rate"].argsort(descending=True)
    z = sae.cfg.activation((x - sae.b_dec) @ sae.W_enc + sae.b_enc, sae.threshold, training=True)
    total, start, x_hat = 0.0, 0, sae.b_dec
    for end in sae.cfg.prefixes:
        joining = order[start:end]
        if loss.detached and start:
            x_hat = x_hat.detach()
        x_hat = x_hat + z[:, joining] @ sae.W_dec[joining]
        if loss.detached and end == sae.cfg.d_sae:
            x_hat = z @ sae.W_dec + sae.b_dec
        error, start = (x - x_hat).square().sum(1), end
        total = total + ((loss.tilt * error / error.mean()).detach().softmax(0) * error).sum()
    return total / len(sae.cfg.prefixes) / trainee.state["variance"]


@pytest.mark.parametrize("loss", CHOICES, ids=["plain", "detached", "by_rate", "tilt", "every"])
@pytest.mark.parametrize(
    ("activation", "d_sae"), [(sl.AbsTopK(k=3), 2048), (sl.ReLU(coefficient=0.1), 40)], ids=["sparse", "dense"]
)
def test_the_gradient_is_that_of_the_dense_formula(loss, activation, d_sae):
    trainee, x = prepared(loss, activation, d_sae), draw(BATCH, D_IN, seed=2).double()
    found, wanted = trainee.objective(x).terms["matryoshka"], dense_loss(trainee, loss, x)
    if not loss.tilt:  # else only the gradients are equal
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    weights = [trainee.sae.W_enc, trainee.sae.b_enc, trainee.sae.W_dec, trainee.sae.b_dec]
    for mine, right in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        assert right.any()
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()))


def test_without_a_choice_it_is_the_reconstruction_loss():
    trainees = [prepared(MatryoshkaLoss()), None]
    trainees[1] = TrainingSAE(sl.SAE(config(sl.ReconstructionLoss()), seed=0).double(), sl.TrainConfig())
    trainees[1].prepare(draw(512, D_IN, seed=1).double())
    trainees[1].sae.load_state_dict(trainees[0].sae.state_dict())
    totals = [trainee.objective(draw(BATCH, D_IN, seed=2).double()).total for trainee in trainees]
    torch.testing.assert_close(*totals, rtol=1e-6, atol=0)  # the variance is of float32


def test_the_tilted_mean_is_between_the_mean_and_the_largest():
    errors = draw(2, 500).exp().double()
    means = [sl.sae.objectives.matryoshka.tilted_mean(errors, tilt) for tilt in (0.0, 2e-3, 1.0, 500.0)]
    torch.testing.assert_close(means[0], errors.mean(1))
    # to second order in a small tilt, log mean exp is the mean and half the variance
    second = errors.mean(1) + 1e-3 * errors.var(1, correction=0) / errors.mean(1)
    torch.testing.assert_close(means[1], second, rtol=1e-4, atol=0)
    assert (means[1] < means[2]).all() and (means[2] < means[3]).all()
    torch.testing.assert_close(means[3], errors.amax(1), rtol=0.05, atol=0)


@unchecked()
def trained(loss, x, n_steps, prefixes=None, **axes):
    cfg = sl.SAEConfig(d_in=x.shape[1], normalizer="none", prefixes=prefixes, objective=(loss,), **axes)
    return sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(n_tokens=256 * n_steps, batch_size=256), progress=False)


def test_latents_end_in_the_order_of_their_rates():
    """Sixteen orthogonal atoms, the i-th ever rarer: the prefix of four has the four that fire most."""
    generator = torch.Generator().manual_seed(0)
    rates = 0.4 * 0.8 ** torch.arange(16.0)
    z = (torch.rand(8_000, 16, generator=generator) < rates) * (1 + 0.1 * torch.rand(8_000, 16, generator=generator))
    x = z @ torch.linalg.qr(draw(16, 16, seed=5))[0]
    sae = trained(MatryoshkaLoss(by_rate=True), x, 100, (4, 16), d_sae=16, activation=sl.TopK(k=3))
    firings = (sae.encode(x) != 0).sum(0)
    assert firings[:4].sum() > 0.95 * firings.topk(4).values.sum() > 0
    ranks = torch.stack([firings.argsort(descending=True).argsort(), torch.arange(16)])
    assert torch.corrcoef(ranks.double())[0, 1] > 0.9  # an average over 100 steps differs from the last codes


def test_a_tilt_serves_tokens_of_large_error():
    """One latent for three kinds of tokens, one in ten of the largest: the mean error is least without that kind."""
    kinds = torch.tensor([0.45, 0.45, 0.1]).multinomial(2_000, True, generator=torch.Generator().manual_seed(7))
    x, errors = torch.diag(torch.tensor([1.0, 1.0, 1.5]))[kinds], []
    for tilt in (0.0, 3.0):
        sae = trained(MatryoshkaLoss(tilt=tilt), x, 60, d_sae=1, activation=sl.AbsTopK(k=1))
        error = (sae(x).detach() - x).square().sum(1)
        errors.append((float(error.mean()), float(error.amax())))
    assert errors[0][0] < errors[1][0] and errors[1][1] < 0.7 * errors[0][1], errors


def test_detached_errors_leave_inner_latents_alone():
    """With a whole reconstruction of weight 0 the inner latents' gradient is that of the inner error alone."""
    loss = MatryoshkaLoss(detached=True)
    trainee, x = prepared(loss, sl.ReLU(coefficient=0.0)), draw(BATCH, D_IN, seed=2).double()
    step, _ = trainee.code(x)
    parts = torch.ones(3, BATCH, D_IN, dtype=torch.float64, requires_grad=True)
    residuals = loss._residuals(step.y.detach(), parts)
    (inner,) = torch.autograd.grad(residuals[1].sum(), parts, retain_graph=True)
    assert not inner[0].any() and inner[1].any() and not inner[2].any()
    (whole,) = torch.autograd.grad(residuals[2].sum(), parts)
    assert whole.all()


def test_runs_resume_and_files_keep_the_choices(tmp_path):
    cfg = config(EVERY, sl.BatchTopK(k=3), prefixes=sl.RandomPrefixes(n=3, smallest=4))
    assert sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    x, every = draw(1_000, D_IN, seed=4), {"log_every_tokens": BATCH, "save_every_tokens": BATCH}
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, **every)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), x, run, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatryoshkaLoss(tilt=-1.0), "`tilt` must be at least 0"),
        (lambda: config(MatryoshkaLoss(detached=True), prefixes=None), "`prefixes` must be given"),
        (lambda: config(EVERY, sl.GroupMax(k=4)), "none may have a place of its own"),
        (lambda: config(EVERY, dictionary=sl.Archetypal()), "none may have a place of its own"),
        (
            lambda: sl.SAEConfig(d_in=8, d_sae=40, prefixes=(4, 40), objective=(EVERY, KeptCoreLoss(n=2))),
            "got kept_core",
        ),
        (
            lambda: sl.SAEConfig(
                d_in=8,
                d_sae=4,
                activation=sl.TopK(k=2),
                prefixes=(2, 4),
                objective=(EVERY, FLOPsPenalty(weights=(1.0,) * 4)),
            ),
            "got flops",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
