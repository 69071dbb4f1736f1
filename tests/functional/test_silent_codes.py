"""Gradients of thresholds from codes that do not fire: against the dense definition, on kernels and without."""

from dataclasses import dataclass

import pytest
import torch

import saelab as sl
from saelab.functional import compiled, sparse_products, threshold_search
from saelab.functional.activation_functions import jumprelu, step_above
from saelab.functional.compiled import has_numba
from saelab.functional.fused_screen import can_fuse
from saelab.functional.silent_codes import SilentCodes, silent_penalty, sum_products, threshold_error
from saelab.functional.threshold_search import search_near
from saelab.sae.objectives.terms import LOSS_TERMS, register_loss_term
from saelab.sae.step_codes import search_codes
from saelab.sae.training_sae import TrainingSAE
from saelab.training.ranks import ALONE

D_SAE, N, BANDWIDTH = 1500, 300, 0.9
needs_numba = pytest.mark.skipif(not has_numba(), reason="needs numba")


@pytest.fixture(params=[pytest.param("kernels", marks=needs_numba), "plain"])
def kernels(request, monkeypatch) -> bool:
    """Small weights take the kernels that large ones do, or no kernels are used."""
    if request.param == "plain":
        monkeypatch.setenv("SAELAB_NUMBA", "0")
        monkeypatch.setattr(sparse_products, "has_numba", lambda: False)
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(threshold_search, "DENSE_WIDTH", 0)
    monkeypatch.setattr(sparse_products, "LEAST_SORTED", 0)
    return request.param == "kernels"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_silent(seed: int = 1) -> tuple[torch.Tensor, SilentCodes]:
    """A mask of entries: of one latent there are none, of another all."""
    mask = torch.rand(N, D_SAE, generator=torch.Generator().manual_seed(seed)) < 0.05
    mask[:, 7], mask[:, 8] = False, True
    return mask, SilentCodes.from_entries(*mask.nonzero(as_tuple=True), D_SAE)


def test_entries_are_sorted_by_latent_in_their_order(kernels):
    mask, silent = draw_silent()
    latents, rows = mask.T.nonzero(as_tuple=True)
    assert torch.equal(silent.rows, rows) and torch.equal(
        silent.starts.diff(), torch.bincount(latents, minlength=D_SAE)
    )
    assert int(silent.starts[0]) == 0 and silent.starts[-1] == len(rows)


@pytest.mark.parametrize("d_in", [40, 64, 150])
def test_sums_of_products_are_those_of_float64_whatever_the_threads(kernels, d_in):
    mask, silent = draw_silent()
    left, table = draw(N, d_in), draw(D_SAE, d_in, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found.append(sum_products(left, table, silent))
    finally:
        torch.set_num_threads(before)
    expected = ((mask.double().T @ left.double()) * table.double()).sum(1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-4)
    assert found[0][7] == 0 and torch.equal(found[0], found[1])


@pytest.mark.parametrize(("spread", "few"), [(0.05, True), (3.0, False)])
def test_what_fires_and_what_nearly_does_is_found(kernels, spread, few, monkeypatch):
    """With thresholds far above most entries few are found and screened; with others a dense product finds many."""
    x, W, bias = draw(N, 96) * (0.2 + torch.rand(N, 1)), draw(D_SAE, 96, seed=3) / 96**0.5, 0.1 * draw(D_SAE, seed=4)
    x[11] = 0.0
    u = torch.addmm(bias, x, W.T)
    threshold = u.flatten().kthvalue(int(0.995 * u.numel())).values + spread * (torch.rand(D_SAE) - int(not few))
    scored, score = [], threshold_search.score
    monkeypatch.setattr(threshold_search, "score", lambda *a: scored.append(len(a[3])) or score(*a))
    codes, silent = search_near(x, W, bias, threshold, BANDWIDTH)
    mask = torch.zeros(N, D_SAE, dtype=torch.bool)
    mask[silent.rows, torch.arange(D_SAE).repeat_interleave(silent.starts.diff())] = True
    assert int(mask.sum()) == len(silent.rows)  # each once
    distance = u - threshold
    sure = (distance.abs() > 1e-4) & ((distance + BANDWIDTH / 2).abs() > 1e-4)
    fires = codes.to_dense() != 0
    assert torch.equal(fires[sure], (distance > 0)[sure]) and fires.any()
    assert torch.equal(mask[sure], ((distance <= 0) & (distance > -BANDWIDTH / 2))[sure]) and mask[sure].sum() > 200
    torch.testing.assert_close(codes.to_dense(), u.where(fires, 0.0), rtol=1e-4, atol=1e-5)
    assert search_near(x, W, bias, threshold, BANDWIDTH, max_frac=float((fires | mask).float().mean()) / 2) is None
    if kernels and can_fuse():  # most silent ones are not recomputed
        assert (0 < scored[0] < len(codes.values) + len(silent.rows)) if few else not scored


def test_a_screen_whose_errors_are_larger_than_allowed_is_repeated(kernels, monkeypatch):
    if not (kernels and can_fuse()):
        pytest.skip("there is no screen")
    x, W, bias = draw(N, 96), draw(D_SAE, 96, seed=3) / 96**0.5, torch.zeros(D_SAE)
    threshold = 2.8 + 0.2 * torch.rand(D_SAE, generator=torch.Generator().manual_seed(4))
    whole = search_near(x, W, bias, threshold, BANDWIDTH)
    monkeypatch.setattr(threshold_search, "ERRORS", 0.01)
    again = search_near(x, W, bias, threshold, BANDWIDTH)
    assert torch.equal(whole[0].to_dense(), again[0].to_dense())
    assert torch.equal(whole[1].starts, again[1].starts)


def test_thresholds_get_the_gradients_of_dense_codes(kernels):
    x, W = draw(N, 40, seed=5), draw(D_SAE, 40, seed=6) / 6
    u, threshold = draw(N, D_SAE, seed=7), 1.5 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(8))
    below = (u <= threshold) & ((u - threshold).abs() < BANDWIDTH / 2)
    silent = SilentCodes.from_entries(*below.nonzero(as_tuple=True), D_SAE)
    z = jumprelu(u, threshold, BANDWIDTH)
    mine = threshold.clone().requires_grad_()
    errors = (x - z @ W).square().sum().view(1)
    total = threshold_error(errors, mine, x - z @ W, W, silent, BANDWIDTH)
    assert torch.equal(total, errors)
    (0.3 * total.sum() + 0.7 * silent_penalty(mine, silent, BANDWIDTH).sum()).backward()
    theirs = threshold.double().requires_grad_()
    u = u.double().where(below, -9.0)  # only those below: what fires has gradients by other ways
    dense = jumprelu(u, theirs, BANDWIDTH)
    error = (x.double() - z.double() @ W.double() - dense @ W.double()).square().sum()
    (0.3 * error + 0.7 * step_above(u, theirs, BANDWIDTH).sum()).backward()
    torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    assert (theirs.grad != 0).float().mean() > 0.9


@dataclass(frozen=True, kw_only=True)
class _ReadsCodes(sl.sae.objectives.LossTerm):
    coefficient: float = 0.0

    def __call__(self, step):
        return step.values.square().sum() / step.n_tokens


def train(activation: sl.JumpReLU, *terms, n_threads: int = 1, **settings) -> tuple[dict[str, torch.Tensor], bool]:
    """Gradients of one step, and whether silent codes were kept apart."""
    x = draw(N, 40)
    objective = (sl.ReconstructionLoss(), *terms)
    sae = sl.SAE(sl.SAEConfig(d_in=40, d_sae=D_SAE, activation=activation, objective=objective, **settings), seed=0)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=N * 10, batch_size=N))
    trainee.prepare(x)
    with torch.no_grad():
        u = sae.center(sae.normalizer.normalize(x)) @ sae.W_enc + sae.b_enc
        sae.threshold.fill_(u.flatten().topk(N * 8).values[-1])
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        trainee.objective(x).total.backward()
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        apart = search_codes(sae, activation, x, ALONE, trainee._ignores_zeros)[1] is not None
    return {name: p.grad.clone() for name, p in sae.named_parameters()}, apart


def test_a_step_has_the_same_gradients_with_silent_codes_among_the_others(kernels):
    """They are where a loss term reads codes, which may be any that does not say otherwise."""
    register_loss_term("reads_codes")(_ReadsCodes)
    try:
        activation = sl.JumpReLU(coefficient=0.3, bandwidth=0.05)
        (mine, apart), (theirs, together) = train(activation), train(activation, _ReadsCodes())
        again, _ = train(activation, n_threads=3)
        assert apart and not together and not train(activation, prefixes=(100, D_SAE))[1]
        assert mine.keys() == theirs.keys()
        for name, grad in theirs.items():
            scale = float(grad.abs().max())
            torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5 * scale)
            assert scale > 0, name
            # the gradient of b_dec through the encoder is a matrix-vector product of BLAS
            assert not kernels or name == "b_dec" or torch.equal(mine[name], again[name]), name
    finally:
        del LOSS_TERMS["reads_codes"]


def test_an_objective_of_its_own_may_read_codes():
    class Other(TrainingSAE):
        def objective(self, batch):
            return self.weigh(*self.code(batch))

    sae, cfg = (
        sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.JumpReLU(target_l0=2.0))),
        sl.TrainConfig(n_tokens=4096),
    )
    assert TrainingSAE(sae, cfg)._ignores_zeros and not Other(sae, cfg)._ignores_zeros


def test_a_subclass_of_a_term_may_read_codes_until_it_says_otherwise():
    class Silent(sl.ReconstructionLoss):
        reads_codes = False

    class Grouped(Silent):
        pass

    assert not Silent.reads_codes and Grouped.reads_codes and not sl.ReconstructionLoss.reads_codes
