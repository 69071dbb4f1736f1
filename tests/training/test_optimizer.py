"""Adam with moments in 16 bits against Adam in float64: the bounds of its docstring, with and without kernels."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import saelab as sl
from saelab.functional import compiled
from saelab.functional.compiled import has_numba
from saelab.functional.short_floats import MEAN_SPACING, SQUARE_SPACING, decode_positive, decode_signed
from saelab.functional.sparse_products import GradientMemory, select_rows
from saelab.training.config import TrainConfig
from saelab.training.optimizer import differentiate, make_adam, step_adam

SHORT = TrainConfig(n_tokens=4096, optim_bits=16)
WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not has_numba(), reason="needs numba"))]
each_way = pytest.mark.parametrize("kernels", WAYS, ids=["torch", "numba"])


@pytest.fixture
def choose(monkeypatch):
    """Have all weights take the compiled kernels, or none."""

    def chosen(kernels: bool) -> None:
        monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
        monkeypatch.setenv("SAELAB_NUMBA", str(int(kernels)))

    return chosen


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module_of(W):
    return torch.nn.ParameterDict({"W": W.clone(), "b": torch.zeros(3)})


def moments(module, optimizer):
    state = optimizer.state[module["W"]]
    return decode_signed(state["exp_avg"]), decode_positive(state["exp_avg_sq"])


class Exact:
    """A running mean in float64, and the standard deviation that roundings of at most half a spacing give it."""

    def __init__(self, beta: float, spacing: float) -> None:
        self.beta, self.spacing, self.mean, self.squares = beta, spacing, torch.zeros(()), torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        self.mean = self.beta * self.mean + (1 - self.beta) * x.double()
        self.squares = self.beta**2 * self.squares + self.mean**2

    @property
    def bound(self) -> torch.Tensor:
        return self.spacing / 2 * self.squares.sqrt()


@each_way
def test_moments_stay_within_the_bound_over_thousands_of_steps(kernels, choose):
    choose(kernels)
    sizes = torch.tensor([0.0, 1e-12, 1e-6, 1.0, 1e3, 3e6]).repeat_interleave(4)[:, None]
    module = module_of(torch.zeros(24, 50))
    optimizer = make_adam(module, 1e-3, SHORT)
    exact = Exact(SHORT.betas[0], MEAN_SPACING), Exact(SHORT.betas[1], SQUARE_SPACING)
    for step in range(1, 2501):
        fires = torch.rand(24, 50, generator=torch.Generator().manual_seed(step)) < 0.3
        g = module["W"].grad = draw(24, 50, seed=step) * sizes * (fires if step <= 2000 else 0)  # at last none fires
        exact[0].add(g)
        exact[1].add(g.square())
        step_adam(module, optimizer)
        if step in (10, 2000, 2500):
            for x, of in zip(moments(module, optimizer), exact, strict=True):
                assert not x[:4].any() and (x[4:8].abs() < 1e-11).all()
                there = of.bound[8:] > 1e-20  # m is 0 long after the last gradient
                error = ((x.double() - of.mean)[8:] / of.bound[8:])[there]
                assert len(error) == 0 or (error.square().mean() < 1 and error.mean().abs() < 5 / len(error) ** 0.5)
    # where gradients go on, v is off by 2.2 % at most
    assert SQUARE_SPACING / 2 / (1 - SHORT.betas[1] ** 2) ** 0.5 < 0.022
    assert module["W"].isfinite().all() and not module["W"][:4].any()
    assert optimizer.state[module["W"]]["exp_avg_sq"].dtype == torch.int16


@each_way
def test_squares_do_not_stand_still(kernels, choose):
    """A running mean that moves by a thousandth a step, less than the distance of two codes, arrives."""
    choose(kernels)
    module = module_of(torch.zeros(20, 60))
    optimizer = make_adam(module, 0.0, SHORT)
    exact = Exact(SHORT.betas[1], SQUARE_SPACING)
    for size, n_steps in ((10.0, 10), (0.1, 3000)):
        start = exact.mean.float()
        for _ in range(n_steps):
            module["W"].grad = torch.full((20, 60), size)
            step_adam(module, optimizer)
            exact.add(torch.tensor(size**2))
    error = (moments(module, optimizer)[1] - exact.mean) / exact.bound
    assert error.square().mean() < 1 and error.mean().abs() < 5 / error.numel() ** 0.5
    assert exact.mean < start / 10
    stalled = (0.999 * start.bfloat16().float() + 0.001 * 0.1**2).bfloat16()
    assert stalled == start.bfloat16()  # rounded to the nearest it would never move


@each_way
def test_gradients_beyond_the_limit_count_as_the_limit_and_nan_is_seen(kernels, choose):
    choose(kernels)
    module = module_of(torch.zeros(4, 5))
    optimizer = make_adam(module, 1e-3, SHORT)
    grad = torch.zeros(4, 5)
    grad[0], grad[1], grad[2, 0] = 1e30, -torch.inf, torch.nan
    module["W"].grad = grad
    step_adam(module, optimizer)
    W = module["W"].detach()
    torch.testing.assert_close(W[:2], torch.tensor([-1e-3, 1e-3])[:, None].expand(2, 5))
    assert W[2, 0].isnan() and not W[2, 1:].any() and not W[3].any()


@pytest.mark.skipif(not has_numba(), reason="needs numba")
def test_kernels_make_the_codes_of_pytorch_on_any_number_of_threads(choose):
    runs = []
    for kernels, n_threads in ((True, 1), (True, 3), (False, 1)):
        choose(kernels)
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            module = module_of(torch.nn.functional.normalize(draw(30, 70), dim=1))
            optimizer = make_adam(module, 1e-3, SHORT)
            for step in range(20):
                module["W"].grad = draw(30, 70, seed=step)
                step_adam(module, optimizer, ("W",))
        finally:
            torch.set_num_threads(before)
        state = optimizer.state[module["W"]]
        runs.append((state["exp_avg"], state["exp_avg_sq"], module["W"].detach()))
    assert all(torch.equal(one, other) for one, other in zip(*runs[:2], strict=True))
    for i in (0, 1):  # a difference in the last bit is rounded the other way now and then
        assert (runs[0][i] == runs[2][i]).double().mean() > 0.99
    torch.testing.assert_close(runs[0][2], runs[2][2], rtol=1e-3, atol=1e-5)


@each_way
def test_a_run_resumes_to_the_bit_and_its_fvu_is_that_of_32_bits(kernels, choose, tmp_path):
    choose(kernels)
    x = draw(2048, 16) @ draw(16, 40, seed=1)
    cfg = replace(SHORT, n_tokens=60 * 512, batch_size=512, save_every_tokens=512 * 10)

    def fit(cfg, seed=0, **options):
        sae = sl.SAE(sl.SAEConfig(d_in=40, d_sae=128, activation=sl.TopK(k=4)), seed=seed)
        return sae.fit(x, replace(cfg, seed=seed), progress=False, **options)

    whole = fit(cfg, out=tmp_path / "whole")

    def stop(entry):
        if entry["step"] == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cfg, out=tmp_path / "stopped", sinks=[stop])
    with pytest.raises(ValueError, match="optim_bits"):
        fit(replace(cfg, optim_bits=32), out=tmp_path / "stopped", resume=True)
    resumed = fit(cfg, out=tmp_path / "stopped", resume=True)
    assert torch.equal(resumed.W_dec, whole.W_dec) and torch.equal(resumed.W_enc, whole.W_enc)
    long, short = (
        torch.tensor([fit(replace(cfg, optim_bits=bits), seed).history_[-1]["held_out_fvu"] for seed in range(3)])
        for bits in (32, 16)
    )
    assert not torch.equal(long, short)
    assert (long - short).abs().max() < max(float(long.max() - long.min()), 0.02 * float(long.mean()))


def test_settings_of_older_runs_are_the_same_and_others_are_refused():
    assert "optim_bits" not in TrainConfig().to_dict() and SHORT.to_dict()["optim_bits"] == 16
    with pytest.raises(ValueError, match="`optim_bits` must be 32 or 16, got 8"):
        TrainConfig(optim_bits=8)


def test_steps_are_those_of_pytorchs_adam_to_the_bit():
    cfg = TrainConfig(n_tokens=4096, betas=(0.8, 0.95))
    module = torch.nn.Linear(7, 5)
    other = torch.nn.Linear(7, 5)
    other.load_state_dict(module.state_dict())
    mine, theirs = (
        make_adam(module, 1e-2, cfg),
        torch.optim.Adam(other.parameters(), 1e-2, betas=(0.8, 0.95), fused=True),
    )
    for step in range(8):
        module.weight.grad, other.weight.grad = draw(5, 7, seed=step), draw(5, 7, seed=step)
        if step % 3:  # a bias without a gradient stays where it is
            module.bias.grad, other.bias.grad = draw(5, seed=step), draw(5, seed=step)
        else:
            module.bias.grad = other.bias.grad = None
        mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.01 / (1 + step)
        step_adam(module, mine)
        theirs.step()
        assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)
    saved = {id(p): theirs.state[q] for p, q in zip(module.parameters(), other.parameters(), strict=True)}
    for parameter in module.parameters():
        assert all(torch.equal(mine.state[parameter][key], t) for key, t in saved[id(parameter)].items())


def test_training_does_not_load_pytorchs_compiler():
    """Loading it takes more than a second, and the class of PyTorch's optimizer does when it is made."""
    code = (
        "import sys, torch, saelab as sl\n"
        "sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(2)))\n"
        "sae.fit(torch.randn(512, 8), sl.TrainConfig(n_tokens=512, batch_size=64), progress=False)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_gradient_of_two_parts_is_their_sum_not_projected(monkeypatch):
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
    weight = torch.nn.Parameter(torch.nn.functional.normalize(draw(6, 8), dim=1))
    factor, latents = draw(6, 8, seed=1), torch.tensor([1, 4])
    memory = GradientMemory(projected=True)
    loss = (select_rows(weight, latents, memory) * factor[latents]).sum() + weight.sum()
    kept = differentiate(loss, {weight: memory})
    wanted = torch.ones(6, 8).index_add(0, latents, factor[latents])
    assert not kept and weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted)
