"""Compiled kernels against PyTorch's operations, and the threads they run on."""

import os
import subprocess
import sys

import pytest
import torch

import saelab as sl
from saelab.functional import compiled, sparse_products
from saelab.functional.codes import Entries, SparseCodes, nested_decode_error
from saelab.functional.compiled import has_numba, run_parts, use_numba
from saelab.functional.sparse_products import sampled_dot, transpose_entries
from saelab.sae.training_sae import TrainingSAE
from saelab.training.config import TrainConfig
from saelab.training.optimizer import clip_gradients, make_adam, step_adam

needs_numba = pytest.mark.skipif(not has_numba(), reason="needs numba")
D_IN, D_SAE, N = 40, 300, 200


@pytest.fixture
def small(monkeypatch):
    """Small weights take the kernels that large ones do."""
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_entries(n_groups: int = 1, seed: int = 1) -> tuple[torch.Tensor, Entries]:
    generator = torch.Generator().manual_seed(seed)
    z = draw(n_groups * N, D_SAE, seed=seed) * (torch.rand(n_groups * N, D_SAE, generator=generator) < 0.02)
    z[:, 7] = 0  # a latent that does not fire, and one that always does
    z[:, 8] = 1
    codes = SparseCodes.from_dense(z)
    return codes.values, Entries(codes.indices, codes.rows, codes.offsets)


def test_large_plain_weights_alone_are_for_kernels(monkeypatch):
    large = torch.empty(2**8, 2**8)
    assert use_numba(large) == has_numba()
    assert not use_numba(large[:-1])
    assert not use_numba(large.double()) and not use_numba(large.T) and not use_numba(large, large.T)
    monkeypatch.setenv("SAELAB_NUMBA", "0")
    assert not use_numba(large)


def test_pytorchs_openmp_is_found_beside_that_of_another_library():
    pytest.importorskip("sentencepiece")
    look = "from saelab.functional import compiled; print(getattr(compiled._openmp(), '_name', None))"
    codes = (f"import torch; {look}", f"import torch, sentencepiece; {look}")
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for code in codes]
    assert found[0].stdout == found[1].stdout


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_parts_cover_a_range_once(openmp, n_threads, monkeypatch):
    if not openmp:
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for n in (1, 2, 7, 100):
            parts = []
            run_parts(lambda a, b, parts=parts: parts.append((a, b)), n)
            assert len(parts) == (1 if n_threads == 1 else min(n, n_threads * compiled.PARTS))
            assert sorted(i for a, b in parts for i in range(a, b)) == list(range(n))
        with pytest.raises(ZeroDivisionError):
            run_parts(lambda a, b: 1 / 0, 8)
    finally:
        torch.set_num_threads(before)


@needs_numba
def test_transposed_entries_are_sorted_stably():
    from saelab.functional import numba_kernels

    _, entries = draw_entries()
    order, starts = numba_kernels.transpose_entries(entries.indices, D_SAE)
    expected = transpose_entries(entries.indices, D_SAE)
    assert torch.equal(order, expected[0]) and torch.equal(starts, expected[1])


@needs_numba
def test_inner_products_are_those_of_float64_and_equal_for_equal_rows(small):
    _, entries = draw_entries()
    left, table = draw(N, D_IN), draw(D_SAE, D_IN, seed=2)
    left[1::2] = left[::2]  # pairs of equal rows
    products = sampled_dot(entries.rows, entries.indices, left, table)
    expected = (left.double() @ table.double().T)[entries.rows, entries.indices]
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-5)
    dense = torch.zeros(N, D_SAE).index_put((entries.rows, entries.indices), products)
    both = (dense[::2] != 0) & (dense[1::2] != 0)
    assert both.sum() > N // 2
    assert torch.equal(dense[::2][both], dense[1::2][both])


@needs_numba
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("n_groups", [1, 3])
def test_gradients_of_decoding_are_those_of_dense_autograd(n_groups, equal, small):
    """Where all errors count alike, and where they do not; to the bit the same on any number of threads."""
    values, entries = draw_entries(n_groups)
    x, W, b = draw(N, D_IN, seed=3), draw(D_SAE, D_IN, seed=4), draw(D_IN, seed=5)
    weights = torch.rand(n_groups, generator=torch.Generator().manual_seed(6))
    weights = weights[:1].expand(n_groups) if equal else weights
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            got = [t.clone().requires_grad_() for t in (values, W, x, b)]
            errors, last = nested_decode_error(*got, entries, n_groups)
            (errors * weights).sum().backward()
            results.append([errors.detach(), last, *(t.grad for t in got)])
    finally:
        torch.set_num_threads(before)
    want = [t.double().requires_grad_() for t in (values, W, x, b)]
    dense = torch.zeros(n_groups * N, D_SAE, dtype=torch.float64)
    dense = dense.index_put((entries.rows, entries.indices), want[0])
    parts = (dense @ want[1]).view(n_groups, N, D_IN).cumsum(0)
    residuals = want[2] - want[3] - parts
    expected = residuals.square().sum((1, 2))
    (expected * weights).sum().backward()
    expected_results = [expected.detach(), residuals[-1].detach(), *(t.grad for t in want)]
    for mine, again, theirs in zip(*results, expected_results, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * scale)
        assert torch.equal(mine, again)


@needs_numba
@pytest.mark.parametrize("unit", [False, True])
def test_adam_is_pytorchs(unit, small):
    modules = [torch.nn.ParameterDict({"W": draw(50, 30), "b": draw(30, seed=1)}) for _ in range(2)]
    optimizers = [make_adam(module, 1e-2, TrainConfig(n_tokens=4096, betas=(0.8, 0.95))) for module in modules]
    for step in range(5):
        for module in modules:
            for i, parameter in enumerate(module.values()):
                parameter.grad = draw(*parameter.shape, seed=10 * step + i) * 10.0 ** (step - 3)
        step_adam(modules[0], optimizers[0], ("W",) if unit else ())
        optimizers[1].step()
        if unit:
            with torch.no_grad():
                modules[1]["W"] /= modules[1]["W"].norm(dim=1, keepdim=True)
        for name in ("W", "b"):
            torch.testing.assert_close(modules[0][name], modules[1][name], rtol=1e-5, atol=1e-6)
            mine, theirs = (o.state[m[name]] for o, m in zip(optimizers, modules, strict=True))
            assert mine.keys() == theirs.keys() and int(mine["step"]) == step + 1
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=1e-9)


@needs_numba
def test_projected_gradients_have_no_part_along_their_rows():
    from saelab.functional import numba_kernels

    grad, W = draw(50, 30), torch.nn.functional.normalize(draw(50, 30, seed=1), dim=1)
    expected = grad - (grad * W).sum(1, keepdim=True) * W
    numba_kernels.project_rows(grad, W)
    torch.testing.assert_close(grad, expected)


@needs_numba
@pytest.mark.parametrize(
    ("activation", "prefixes"),
    [
        (sl.TopK(k=4), None),
        (sl.AbsTopK(k=4), None),
        (sl.BatchTopK(k=4), None),
        (sl.BatchTopK(k=4), (30, 90, D_SAE)),
        (sl.JumpReLU(coefficient=0.1, start=2.0, bandwidth=0.5), None),
    ],
)
def test_a_run_is_the_same_on_kernels_and_resumes_to_the_bit(activation, prefixes, small, monkeypatch, tmp_path):
    x = draw(2048, 16) @ draw(16, D_IN, seed=1)
    cfg = TrainConfig(n_tokens=10 * 512, batch_size=512, save_every_tokens=512)

    def fit(out=None, **options):
        sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, prefixes=prefixes), seed=0)
        return sae.fit(x, cfg, out=out, progress=False, **options).W_dec.detach().clone()

    whole = fit(tmp_path / "whole")
    assert torch.equal(fit(), whole)
    with pytest.raises(KeyboardInterrupt):

        def stop(entry):
            if entry["step"] == 5:
                raise KeyboardInterrupt

        fit(tmp_path / "stopped", sinks=[stop])
    assert torch.equal(fit(tmp_path / "stopped", resume=True), whole)
    monkeypatch.setenv("SAELAB_NUMBA", "0")
    # a code that rounding moves across the batch's threshold changes its latent a little
    assert (fit() - whole).norm() < 1e-3 * whole.norm()


@needs_numba
@pytest.mark.parametrize("projected", [False, True])
def test_decoder_gradients_come_projected_with_their_squares(projected, small):
    from saelab.functional import numba_kernels

    values, entries = draw_entries()
    left, W = draw(N, D_IN, seed=2), torch.nn.functional.normalize(draw(D_SAE, D_IN, seed=3), dim=1)
    out = torch.full((D_SAE, D_IN), 7.0)
    columns = transpose_entries(entries.indices, D_SAE)
    products, squares = numba_kernels.decode_gradients(entries.rows, columns, values, left, W, out, projected)
    expected = torch.zeros(D_SAE, D_IN).index_add_(0, entries.indices, values[:, None] * left[entries.rows])
    if projected:
        expected -= (expected * W).sum(1, keepdim=True) * W
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, expected.square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products, (left[entries.rows] * W[entries.indices]).sum(1), rtol=1e-4, atol=1e-4)


@needs_numba
@pytest.mark.parametrize("aux", [False, True])
def test_a_step_uses_the_squares_only_of_gradients_that_nobody_changed(aux, small, monkeypatch):
    monkeypatch.setattr(sparse_products, "MOST_PRODUCTS", 0)  # gradients are computed, not kept as products
    objective = (sl.ReconstructionLoss(), sl.AuxK(coefficient=0.5, dead_after_tokens=1)) if aux else None
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=4), **({"objective": objective} if aux else {}))
    found = []
    for fused in (True, False):
        sae = sl.SAE(cfg, seed=0)
        trainee = TrainingSAE(sae, TrainConfig(n_tokens=4096))
        if aux:
            trainee.state["tokens_since_fired"][:200] = 1000  # dead: AuxK adds to their gradients
        loss = trainee.objective(draw(N, D_IN)).total
        if fused:
            trainee.differentiate(loss)
        else:
            loss.backward()
        assert ("W_dec" in trainee.gradient_squares) == (fused and not aux)
        trainee.constrain_gradients()
        known = trainee.gradient_squares
        norm = clip_gradients(sae, 1e9, known=known)
        found.append((norm, sae.W_dec.grad.clone()))
        torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(D_SAE), rtol=0, atol=1e-4)
        sae.W_dec.grad.mul_(2)
        assert not trainee.gradient_squares
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


STEPS = """
import hashlib
import torch
from saelab.functional import numba_kernels

draw = torch.Generator().manual_seed(0)
starts, rows = torch.arange(65) * 3, torch.arange(192) % 20
left, normals = torch.randn(20, 40, generator=draw), torch.randn(64, 40, generator=draw)
parts = (starts, rows, torch.randn(192, generator=draw), left, torch.nn.functional.normalize(normals, dim=1))
for dtype in (torch.float32, torch.int16):
    weight, mean, square = parts[-1].clone(), *torch.zeros(2, 64, 40, dtype=dtype)
    for step in range(1, 4):
        settings = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "step": step, "unit": True}
        numba_kernels.step_adam(weight, parts, mean, square, **settings)
    print([hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (weight, mean, square)])
"""


@needs_numba
def test_a_step_is_the_same_by_kernels_just_compiled_and_from_the_cache(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert any(tmp_path.rglob("*.nbc")) and first.count("[") == 2 and first == second
