"""Loss terms as an axis: a user's own one, schedules, what a term reads, and configurations in files."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from resuming import assert_resumes

import saelab as sl
from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.sae.training_sae import TrainingSAE
from saelab.training.loop import ENTRY_KEYS
from saelab.training.schedules import Schedule, bounds_of, value_at

D_IN, D_SAE, BATCH, N_STEPS = 8, 40, 64, 12


@register_loss_term("test_energy")
@dataclass(frozen=True)
class Energy(LossTerm):
    """Mean squared code, with a state of its own and a record of what it saw."""

    coefficient: float | Schedule = 0.5
    power: int = 2

    seen: ClassVar[list[TrainingStep]] = []

    def __call__(self, step):
        Energy.seen.append(step)
        step.notes["test_energy.sum"] = step.values.detach().sum()
        return step.values.abs().pow(self.power).sum() / step.n_tokens

    def initial_state(self, cfg):
        return {"total": torch.zeros(())}

    def observe(self, notes, state, share):
        state["test_energy.total"] += notes["test_energy.sum"]


@register_loss_term("test_all")
@dataclass(frozen=True)
class All(LossTerm):
    """Mean square of all pre-activations, those that do not fire included."""

    needs: ClassVar[frozenset[str]] = frozenset({"dense"})

    def __call__(self, step):
        return step.u.square().sum() / step.n_tokens


@register_loss_term("test_nested")
@dataclass(frozen=True)
class Nested(LossTerm):
    """Settings in tuples of tuples."""

    pairs: tuple[tuple[int, int], ...] = ((0, 1), (2, 3))
    names: tuple[tuple[str, ...], float] = (("a", "b"), 0.5)

    def __call__(self, step):
        return step.values.square().sum() / step.n_tokens


@dataclass(frozen=True)
class Unregistered(LossTerm):
    pass


@dataclass(frozen=True, kw_only=True)
class UnregisteredAuxK(sl.AuxK):
    pass


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(*terms, activation=None, d_sae=D_SAE, **axes):
    objective = (sl.ReconstructionLoss(), sl.AuxK(k=3, dead_after_tokens=120), *terms)
    return sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=activation or sl.TopK(k=3), objective=objective, **axes)


def budget(**settings):
    return sl.TrainConfig(n_tokens=N_STEPS * BATCH, batch_size=BATCH, **settings)


def trainee_of(cfg, at=0):
    trainee = TrainingSAE(sl.SAE(cfg, seed=0), budget())
    trainee.prepare(draw(512, D_IN, seed=1))
    trainee.state["n_steps"].fill_(at)
    return trainee


def test_a_term_of_ones_own_trains_as_its_dense_formula_says():
    x = draw(BATCH, D_IN, seed=2)
    plain, own = trainee_of(config()), trainee_of(config(Energy()))
    without, loss = plain.objective(x), own.objective(x)
    sae = own.sae
    centered = sae.normalizer.normalize(x) - sae.b_dec
    u = centered @ sae.W_enc + sae.b_enc
    z = u.relu() * torch.zeros_like(u).scatter(1, u.topk(3).indices, 1.0)
    dense = 0.5 * z.square().sum(1).mean()
    torch.testing.assert_close(loss.terms["test_energy"], dense, rtol=1e-5, atol=0)
    (loss.total - loss.terms["reconstruction"] - loss.terms["aux"]).backward()
    expected = torch.autograd.grad(dense, [sae.W_enc, sae.b_enc])
    torch.testing.assert_close(sae.W_enc.grad, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sae.b_enc.grad, expected[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(without.terms["reconstruction"], loss.terms["reconstruction"])


def test_the_keys_of_the_history_are_the_terms_and_those_that_no_term_may_have():
    run = sl.TrainConfig(n_tokens=4 * BATCH, batch_size=BATCH)
    entry = sl.SAE(config(Energy())).fit(draw(1_000, D_IN), run, progress=False).history_[-1]
    assert entry.keys() == {"reconstruction", "aux", "test_energy", *ENTRY_KEYS}


def test_it_is_logged_saved_and_moves_the_codes(tmp_path):
    x = draw(2_000, D_IN, seed=3)
    energies = []
    for terms in ((), (Energy(coefficient=3.0),)):
        sae = sl.SAE(config(*terms), seed=0).fit(x, budget(), progress=False)
        energies.append(float(sae.encode(x).detach().square().sum(1).mean()))
        assert ("test_energy" in sae.history_[-1]) == bool(terms)
    assert energies[1] < 0.8 * energies[0]
    sae.save_pretrained(tmp_path)
    assert sl.SAE.from_pretrained(tmp_path).cfg == sae.cfg


def test_a_resumed_run_goes_on_with_the_terms_own_state(tmp_path):
    x = draw(2_000, D_IN, seed=3)
    cfg = config(Energy(coefficient=Schedule(start=0.0, end=1.0)), sparsity_schedule=Schedule(start=2.0, end=1.0))
    settings = budget(log_every_tokens=BATCH, save_every_tokens=BATCH)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), x, settings, tmp_path)
    with pytest.raises(ValueError, match="must keep `objective`"):
        sl.SAE(config(Energy()), seed=0).fit(x, settings, out=tmp_path, resume=True, progress=False)


def test_coefficients_follow_their_schedule():
    x = draw(BATCH, D_IN, seed=2)
    term = Energy(coefficient=Schedule(start=0.0, end=2.0, since=0.25, until=0.75))
    plain = trainee_of(config(Energy(coefficient=1.0))).objective(x).terms["test_energy"]
    for at, weight in ((0, 0.0), (3, 0.0), (6, 1.0), (9, 2.0), (12, 2.0)):
        torch.testing.assert_close(trainee_of(config(term), at).objective(x).terms["test_energy"], weight * plain)


@pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.AbsTopK(k=3), sl.BatchTopK(k=3)], ids=lambda a: a.name)
def test_k_follows_its_schedule_and_ends_at_the_activations_own(activation):
    x = draw(BATCH, D_IN, seed=2)
    cfg = config(activation=activation, sparsity_schedule=Schedule(start=4.0, end=1.0, until=0.5))
    for at, k in ((0, 12), (3, 8), (6, 3), (11, 3)):
        l0 = float(trainee_of(cfg, at).objective(x).l0)
        assert k - 0.5 <= l0 <= k if activation.signed else l0 <= k
        if activation.signed:
            assert l0 == k
    sae = sl.SAE(cfg, seed=0).fit(x.repeat(40, 1), budget(), progress=False)
    assert sae.encode_sparse(x).l0.float().mean() <= 3.5


def test_a_target_follows_its_schedule():
    """What steering compares L0 with is the target of the step, so that the same L0 is too much late and not early."""
    cfg = config(activation=sl.ReLU(target_l0=3.0), sparsity_schedule=Schedule(start=4.0, end=1.0))
    x = draw(BATCH, D_IN, seed=2)
    moved = []
    for at in (0, N_STEPS):
        trainee = trainee_of(cfg, at)
        losses = replace(trainee.objective(x), l0=torch.tensor(6.0))
        trainee.observe(losses)
        moved.append(float(trainee.state["coefficient"]))
    assert moved[0] < 1e-3 < moved[1]


@pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.BatchAbsTopK(k=3), sl.ReLU(coefficient=0.1)])
@pytest.mark.parametrize("d_sae", [D_SAE, 2048])
def test_a_step_shows_the_same_codes_sparse_and_dense(activation, d_sae):
    x = draw(BATCH, D_IN, seed=2)
    trainee = trainee_of(config(Energy(), activation=activation, d_sae=d_sae))
    trainee.objective(x)
    step = Energy.seen[-1]
    normalized = trainee.sae.normalizer.normalize(x) - trainee.sae.b_dec
    expected = activation(normalized @ trainee.sae.W_enc + trainee.sae.b_enc, trainee.sae.threshold, training=True)
    torch.testing.assert_close(step.z, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.codes_of(7), expected[:, :7], rtol=1e-4, atol=1e-5)
    at = expected[step.entries.rows, step.entries.indices]
    torch.testing.assert_close(step.values, at, rtol=1e-4, atol=1e-5)
    assert step.n_tokens == BATCH and step.d_sae == d_sae and (step.sparse is None) != (step.dense is None)


def test_a_term_that_needs_all_pre_activations_gets_them():
    x = draw(BATCH, D_IN, seed=2)
    trainee = trainee_of(config(All(), d_sae=2048))
    loss = trainee.objective(x)
    sae = trainee.sae
    u = (sae.normalizer.normalize(x) - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(loss.terms["test_all"], u.square().sum(1).mean(), rtol=1e-5, atol=0)


@sl.register_loss_term("own_aux")
@dataclass(frozen=True, kw_only=True)
class OwnAux(sl.AuxK):
    share: float = 0.5


def test_the_default_is_reconstruction_and_auxk_and_files_say_so_as_ever():
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE)
    assert cfg.objective == (sl.ReconstructionLoss(), sl.AuxK()) and [t.name for t in cfg.terms] == [
        "reconstruction",
        "aux",
    ]
    plain = cfg.to_dict()
    assert "objective" not in plain and plain["aux"]["coefficient"] == 1 / 32
    assert sl.SAEConfig.from_dict(plain) == cfg
    without = replace(cfg, objective=(sl.ReconstructionLoss(),))
    assert without.to_dict()["aux"] is None and sl.SAEConfig.from_dict(without.to_dict()) == without
    own_aux = replace(cfg, objective=(sl.ReconstructionLoss(), OwnAux(share=0.25)))
    assert sl.SAEConfig.from_dict(own_aux.to_dict()) == own_aux
    penalized = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.ReLU())
    assert [term.name for term in penalized.terms] == ["reconstruction", "sparsity", "aux"]
    own = replace(
        penalized,
        objective=(sl.ReconstructionLoss(), sl.sae.objectives.SparsityLoss(coefficient=Schedule(start=0.0, end=1.0))),
    )
    assert own.terms == own.objective and sl.SAEConfig.from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sl.SAEConfig(d_in=4, d_sae=64, objective=(sl.AuxK(),)), "must have a reconstruction term"),
        (lambda: config(sl.ReconstructionLoss()), "every term once, got 'reconstruction' twice"),
        (lambda: config(sl.sae.objectives.SparsityLoss()), "must go with an activation that has a penalty"),
        (lambda: config(Energy(coefficient=-1.0)), "`coefficient` must be at least 0"),
        (lambda: config(Energy(coefficient=Schedule(start=1.0, end=-1.0))), "`coefficient` must be at least 0"),
        (lambda: config(sparsity_schedule=Schedule(start=4.0, end=2.0)), "must start above 0 and end at 1"),
        (
            lambda: config(activation=sl.ReLU(coefficient=0.1), sparsity_schedule=Schedule(start=4.0, end=1.0)),
            "a k or a target L0 to multiply",
        ),
        (lambda: Schedule(start=0.0, end=1.0, since=0.8, until=0.2), "must hold, got 0.8 and 0.2"),
        (lambda: Schedule(start=0.0, end=float("nan")), "must be finite"),
        (lambda: register_loss_term("test_energy")(All), "'test_energy' is Energy"),
        (lambda: register_loss_term("l0")(type("Counted", (LossTerm,), {})), "must have no '/' and be none of"),
        (lambda: register_loss_term("my/own")(type("Slashed", (LossTerm,), {})), "must have no '/' and be none of"),
        (lambda: config(Unregistered()), "must be registered, so that it can be saved, got Unregistered"),
        (
            lambda: sl.SAEConfig(d_in=4, d_sae=64, objective=(sl.ReconstructionLoss(), UnregisteredAuxK())),
            "must be registered, so that it can be saved, got UnregisteredAuxK",
        ),
    ],
)
def test_bad_objectives_are_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_in_tuples_of_tuples_come_back_and_resume(tmp_path):
    cfg = config(Nested(pairs=((4, 5),)))
    assert sl.SAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, log_every_tokens=BATCH, save_every_tokens=BATCH)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), sl.Activations.from_tensor(draw(1_000, D_IN)), run, tmp_path)


@pytest.mark.parametrize(
    "axes",
    [
        {"objective": (sl.ReconstructionLoss(), sl.sae.objectives.OrthogonalLoss())},
        {"encoder": sl.sae.Refined()},
        {"sparsity_schedule": Schedule(start=4.0, end=1.0)},
        {"train_encoder": False},
    ],
    ids=lambda axes: next(iter(axes)),
)
def test_a_run_is_not_resumed_with_a_setting_back_at_its_default(axes, tmp_path):
    def stop(entry):
        if entry["step"] == 2:
            raise KeyboardInterrupt

    plain = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=3), objective=(sl.ReconstructionLoss(),))
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, log_every_tokens=BATCH, save_every_tokens=BATCH)
    with pytest.raises(KeyboardInterrupt):
        sl.SAE(replace(plain, **axes)).fit(draw(1_000, D_IN), run, out=tmp_path, sinks=[stop], progress=False)
    with pytest.raises(ValueError, match=f"A resumed run must keep `{next(iter(axes))}`"):
        sl.SAE(plain).fit(draw(1_000, D_IN), run, out=tmp_path, resume=True, progress=False)


def test_another_activation_or_width_keeps_the_terms_that_go_with_it():
    own = sl.sae.objectives
    more = (sl.AuxK(k=3), own.OrthogonalLoss(), own.FLOPsPenalty(weights=(1.0,) * D_SAE))
    cfg = sl.SAEConfig(
        d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=3), objective=(own.HierarchicalLoss(ks=(1, 3)), *more)
    )
    assert cfg.adapt(activation=sl.TopK(k=5)).objective == (sl.ReconstructionLoss(), *more)
    assert cfg.adapt(activation=sl.TopK(k=3)) == cfg
    assert cfg.adapt(d_sae=20).objective == (cfg.objective[0], *more[:2])


@pytest.mark.parametrize(
    ("activation", "axes"),
    [
        (sl.JumpReLU(target_l0=2.0), {"objective": (sl.ReconstructionLoss(), sl.sae.objectives.KeptCoreLoss(n=5))}),
        (
            sl.JumpReLU(target_l0=2.0),
            {"objective": (sl.ReconstructionLoss(), sl.sae.objectives.FLOPsPenalty(weights=(1.0,) * D_SAE))},
        ),
        (sl.BatchTopK(k=3), {"objective": (sl.sae.objectives.HierarchicalLoss(ks=(1, 3)),)}),
        (
            sl.BatchTopK(k=3),
            {"objective": (sl.sae.objectives.MatryoshkaLoss(detached=True),), "prefixes": (10, D_SAE)},
        ),
    ],
)
def test_some_latents_are_loaded_whatever_the_loss_of_all_was(activation, axes, tmp_path):
    sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, **axes), seed=0)
    with torch.no_grad():
        sae.threshold.fill_(0.3)
    sae.save_pretrained(tmp_path)
    some, x = sl.SAE.from_pretrained(tmp_path, latents=[7, 2]), draw(50, D_IN)
    torch.testing.assert_close(some.encode(x), sae.encode(x)[:, [7, 2]])


def test_files_with_unknown_terms_or_settings_are_refused():
    plain = config(Energy()).to_dict()
    for wrong, message in (
        ({"name": "test_enrgy"}, "Did you mean one of .*test_energy"),
        ({"name": "test_energy", "powr": 2}, r"takes \['coefficient', 'power'\], got \['powr'\]"),
        ({"power": 2}, "must have a name"),
        (3, "must be a JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            sl.SAEConfig.from_dict(plain | {"objective": [{"name": "reconstruction"}, wrong]})
    with pytest.raises(ValueError, match="`aux` must be left out where `objective` is given"):
        sl.SAEConfig.from_dict(plain | {"aux": None})


def test_schedules():
    cosine = Schedule(start=1.0, end=3.0, shape="cosine", until=0.5)
    assert [round(cosine.at(share), 3) for share in (0.0, 0.125, 0.25, 0.375, 0.5, 1.0)] == [1, 1.293, 2, 2.707, 3, 3]
    step = Schedule(start=1.0, end=0.0, until=0.5, shape="step")
    assert [step.at(share) for share in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]
    assert value_at(2.0, 0.3) == 2.0 and bounds_of(cosine) == (1.0, 3.0) and bounds_of(2.0) == (2.0, 2.0)


def test_activations_with_a_penalty_must_weigh_it():
    @sl.register_activation("test_unweighted")
    @dataclass(frozen=True)
    class Unweighted(sl.sae.Activation):
        def __call__(self, u, threshold=None, training=False):
            return u.relu()

        def penalty(self, u, z, threshold):
            return z

    with pytest.raises(ValueError, match="without `coefficient` and `target_l0`"):
        sl.SAEConfig(d_in=4, d_sae=8, activation=Unweighted())


def test_the_command_line_knows_every_term_of_saelab_without_their_import():
    """In a process of its own: here other tests have imported them."""
    code = (
        "from saelab.cli.settings import read_objective; from saelab.sae.config import SAEConfig; "
        "print(read_objective(['orthogonal,coefficient=0.5'], None)[1].coefficient)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.5", done.stderr
