"""p-annealing: its formula and gradient, equal penalties before and after an update, resuming, and planted atoms."""

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import LpPenalty, SparsityLoss
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE, BATCH, N_STEPS = 16, 48, 64, 20


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(term, activation=None, d_sae=D_SAE):
    activation = activation or sl.ReLU(coefficient=0.02)
    return sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=activation, objective=(sl.ReconstructionLoss(), term))


def trainee_of(cfg, at=0):
    run = sl.TrainConfig(n_tokens=N_STEPS * BATCH, batch_size=BATCH)
    trainee = TrainingSAE(sl.SAE(cfg, seed=0), run)
    trainee.prepare(draw(512, D_IN, seed=1))
    trainee.state["n_steps"].fill_(at)
    return trainee


def dense_codes(sae, x):
    return ((sae.normalizer.normalize(x) - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()


@pytest.mark.parametrize("few", [False, True], ids=["dense", "sparse"])
def test_value_and_gradient_are_those_of_the_formula(few):
    x, trainee = draw(BATCH, D_IN, seed=2), trainee_of(config(LpPenalty(p=1.0, p_end=0.5, n_updates=2)))
    with torch.no_grad():
        trainee.sae.b_enc[2:] -= 100.0 * few  # a few latents that fire take the sparse step
    trainee.state["lp.updates"].fill_(2)
    trainee.state["lp.factor"].fill_(3.0)
    loss = trainee.objective(x).terms["lp"]
    z = dense_codes(trainee.sae, x)
    dense = 0.02 * 3.0 * z[z > 0].sqrt().sum() / BATCH
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0)
    weights = [trainee.sae.W_enc, trainee.sae.b_enc, trainee.sae.b_dec]
    for mine, wanted in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(dense, weights), strict=True):
        assert wanted.any()
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_penalty_is_equal_before_and_after_each_update():
    term = LpPenalty(start=0.3, n_updates=4)
    trainee, x = trainee_of(config(term)), draw(BATCH, D_IN, seed=2)
    exponents = []
    for _ in range(N_STEPS):
        before = trainee.objective(x)
        updates = int(trainee.state["lp.updates"])
        trainee.observe(before)
        after = trainee.objective(x)  # the weights are the same
        torch.testing.assert_close(before.terms["lp"], after.terms["lp"], rtol=1e-5, atol=0)
        changed = int(trainee.state["lp.updates"]) > updates
        assert (float(trainee.state["lp.factor"]) != 1.0) if changed else True
        exponents.append(round(term.p_after(int(trainee.state["lp.updates"])), 3))
    assert exponents == [1.0] * 6 + [0.8] * 4 + [0.6] * 3 + [0.4] * 4 + [0.2] * 3
    assert [term.updates_due(share) for share in (0.0, 0.29, 0.3, 0.5, 0.9, 1.0)] == [0, 0, 1, 2, 4, 4]


@sl.register_loss_term("renamed_lp")
class Renamed(LpPenalty):
    pass


def test_a_subclass_has_a_state_of_its_own_name():
    trainee = trainee_of(config(Renamed()), at=N_STEPS // 2)
    objective = trainee.objective(draw(BATCH, D_IN))
    objective.total.backward()
    trainee.observe(objective)
    assert trainee.state["renamed_lp.updates"] > 0 and "lp.updates" not in trainee.state


def test_batches_without_codes_keep_the_coefficient():
    trainee = trainee_of(config(LpPenalty()), at=N_STEPS // 2)
    with torch.no_grad():
        trainee.sae.b_enc.fill_(-100.0)
    objective = trainee.objective(draw(BATCH, D_IN))
    objective.total.backward()
    trainee.observe(objective)
    assert objective.terms["lp"] == 0 and trainee.state["lp.factor"] == 1 and trainee.state["lp.updates"] > 0


def test_a_resumed_run_goes_on_with_the_exponent_it_had(tmp_path):
    cfg, x = config(LpPenalty(n_updates=3), sl.ReLU(target_l0=6.0)), draw(2_000, D_IN, seed=3)
    run = {"n_tokens": N_STEPS * BATCH, "batch_size": BATCH, "log_every_tokens": BATCH, "save_every_tokens": BATCH}

    def stop(entry):
        if entry["step"] == 12:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="must have its target L0"):  # twenty steps are too few
        whole = sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(**run), progress=False)
    with pytest.raises(KeyboardInterrupt):
        sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(**run), out=tmp_path, sinks=[stop], progress=False)
    with pytest.warns(UserWarning, match="must have its target L0"):
        cut = sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(**run), out=tmp_path, resume=True, progress=False)
    assert all(torch.equal(weight, cut.state_dict()[name]) for name, weight in whole.state_dict().items())
    assert sl.SAEConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LpPenalty(p=0.2, p_end=0.5), "0 < `p_end` <= `p` must hold, got 0.5 and 0.2"),
        (lambda: LpPenalty(start=1.0), r"`start` must be in \[0, 1\)"),
        (lambda: LpPenalty(n_updates=0), "`n_updates` must be at least 1"),
        (lambda: config(LpPenalty(), sl.TopK(k=3)), "must go with an activation that has a penalty"),
        (lambda: config(LpPenalty(), sl.JumpReLU()), "its penalty is L0, which p would not change"),
        (
            lambda: sl.SAEConfig(
                d_in=D_IN,
                d_sae=D_SAE,
                activation=sl.ReLU(),
                objective=(sl.ReconstructionLoss(), LpPenalty(), SparsityLoss()),
            ),
            "at most one sparsity term",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@unchecked()
def test_planted_atoms_are_coded_more_sparsely_at_no_loss():
    """Fewer codes than L1 and a smaller error, which no other coefficient of L1 gives: more of it, more error."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=generator), dim=1)
    z = (torch.rand(20_000, 40, generator=generator) < 0.05) * (0.5 + torch.rand(20_000, 40, generator=generator))
    x = z @ atoms + 0.05 * torch.randn(20_000, D_IN, generator=generator)
    run = sl.TrainConfig(n_tokens=120_000, batch_size=256)
    saved = {}
    for name, term in (("l1", SparsityLoss()), ("lp", LpPenalty(coefficient=0.6)), ("off", LpPenalty(coefficient=0.0))):
        sae = sl.SAE(config(term, sl.ReLU(coefficient=0.05)), seed=0).fit(x, run, progress=False)
        saved[name] = sae.training_["saved"]
    assert saved["lp"]["l0"] < 0.9 * saved["l1"]["l0"] and saved["lp"]["fvu"] < saved["l1"]["fvu"]
    assert saved["off"]["l0"] > 1.5 * saved["l1"]["l0"]
