"""A core of features that begins a new run: the penalty against its formula, the start, and what stays of it."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae import start_from_core
from saelab.sae.objectives import KeptCoreLoss
from saelab.sae.training_sae import TrainingSAE
from saelab.universality import find_core

D_IN, BATCH = 8, 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(*terms, activation=None, **axes):
    objective = (sl.ReconstructionLoss(), sl.AuxK(), *terms)
    return sl.SAEConfig(d_in=D_IN, d_sae=40, activation=activation or sl.TopK(k=3), objective=objective, **axes)


def test_value_and_gradient_are_those_of_the_formula():
    trainee = TrainingSAE(sl.SAE(config(KeptCoreLoss(n=5, coefficient=2.0), dictionary="free")), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    x, W_dec = draw(BATCH, D_IN, seed=2), trainee.sae.W_dec
    first = trainee.objective(x)
    assert abs(float(first.terms["kept_core"].detach())) < 1e-6
    trainee.observe(first)
    start = W_dec.detach().clone()
    with torch.no_grad():
        W_dec += 0.3 * draw(40, D_IN, seed=3)
    loss = trainee.objective(x).terms["kept_core"]
    dense = 2 * (1 - torch.nn.functional.cosine_similarity(W_dec[:5], start[:5])).mean()
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-7)
    found, expected = (torch.autograd.grad(one, W_dec)[0] for one in (loss, dense))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found[5:].any()


def planted(n=8_000):
    """Four of 60 random directions a token."""
    generator = torch.Generator().manual_seed(100)
    atoms = torch.nn.functional.normalize(torch.randn(60, 32, generator=generator), dim=1)
    places = torch.rand(n, 60, generator=generator).topk(4, dim=1).indices
    return torch.zeros(n, 60).scatter(1, places, 1 + torch.rand(n, 4, generator=generator)) @ atoms, atoms


RUN = sl.TrainConfig(n_tokens=40_000, batch_size=256)


@cache
def trained(seed):
    """On `planted()`, once for all tests."""
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=80, activation=sl.TopK(k=4)), seed=seed).fit(
        planted()[0], RUN, progress=False
    )


@unchecked()
def test_a_core_stays_where_it_is_kept_and_wanders_where_it_is_not():
    """The core points a little beside the planted directions, so that training moves it unless it is kept."""
    x, atoms = planted()
    sae = deepcopy(trained(0))
    with torch.no_grad():
        sae.W_dec += 0.1 * draw(80, 32, seed=5)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    core = [int(i) for i in (sae.W_dec.detach() @ atoms.T).amax(1).topk(20).indices]
    moved = []
    for keep in (None, 0.0, 10.0):
        other = start_from_core(sae, core, x[:2000], keep=keep, seed=7).fit(x, RUN, progress=False)
        cosines = (other.W_dec[:20] * sae.W_dec[core]).sum(1).detach()
        moved.append(float(1 - cosines.mean()))
    assert moved[0] == pytest.approx(moved[1], rel=1e-4) and moved[2] < 0.2 * moved[1]


@unchecked()
@pytest.mark.parametrize(
    "activation",
    [sl.TopK(k=3), sl.AbsTopK(k=3), sl.JumpReLU(target_l0=3.0), sl.sae.Gated(target_l0=3.0)],
    ids=lambda a: a.name,
)
def test_a_run_begins_with_the_core_and_goes_on_after_a_stop(activation, tmp_path):
    x, every = draw(1_000, D_IN, seed=4), {"log_every_tokens": BATCH, "save_every_tokens": BATCH}
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, **every)
    sae = sl.SAE(config(activation=activation), seed=0).fit(x, run, progress=False)
    core = [7, 3, 30]

    def start():
        return start_from_core(sae, core, x, seed=1)

    assert torch.equal(start().W_enc[:, :3], sae.W_enc[:, core]) and torch.equal(start().b_enc[:3], sae.b_enc[core])
    assert not torch.equal(start().W_dec[3:], start_from_core(sae, core, x, seed=2).W_dec[3:])
    assert sl.SAEConfig.from_dict(start().cfg.to_dict()) == start().cfg
    whole = assert_resumes(lambda seed: start(), x, run, tmp_path)
    again = start_from_core(whole, [0, 1], x)  # another core takes the first one's place
    assert [term.n for term in again.cfg.objective if isinstance(term, KeptCoreLoss)] == [2]


@unchecked()
def test_the_core_of_runs_on_planted_data_are_planted_directions():
    _, atoms = planted()
    saes = [trained(seed) for seed in (0, 1)]
    core = find_core(saes, threshold=0.9)
    near = (saes[0].W_dec.detach() @ atoms.T).amax(1)
    others = [i for i in range(80) if i not in core]
    assert len(core) >= 8 and near[core].mean() > 0.9 and near[core].mean() > near[others].mean() + 0.05
    assert find_core([saes[0], saes[0]]) == list(range(80))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeptCoreLoss(n=0), "`n` must be at least 1"),
        (lambda: config(KeptCoreLoss(n=41)), r"must keep at most d_sae \(40\) rows"),
        (lambda: config(KeptCoreLoss(n=4), dictionary="frozen"), "got n=4 and 'frozen'"),
        (lambda: start_from_core(sl.SAE(config()), [], draw(9, D_IN)), "must name a core"),
        (lambda: start_from_core(sl.SAE(config()), [3, 3], draw(9, D_IN)), "`latents` must be different"),
        (lambda: start_from_core(sl.SAE(config(d_out=4)), [3], draw(9, D_IN)), "got a transcoder"),
        (lambda: find_core([sl.SAE(config())]), "two or more of one shape"),
        (lambda: find_core([sl.SAE(config())] * 2, threshold=0.0), r"`threshold` must be in \(0, 1\]"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
