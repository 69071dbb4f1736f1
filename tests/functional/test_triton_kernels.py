"""Triton's kernels beside naive sums in float64, run by its interpreter; and where the library uses them.

The interpreter is chosen by the environment before triton is imported, so the checks, `check_*`, run in a process of
their own: this file, as a script. Without triton they are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from unchecked import unchecked

from saelab.functional import screening, sparse_products as products, triton_choice, triton_kernels
from saelab.functional.codes import Entries, SparseCodes, attach_encoder, nested_decode_error, sparse_decode
from saelab.functional.metrics import nested_error
from saelab.functional.topk import search_topk
from saelab.functional.triton_choice import use_triton

NO_TRITON = importlib.util.find_spec("triton") is None
WITH_TRITON = pytest.mark.skipif(NO_TRITON, reason="triton is not installed: its kernels are not run")
DEVICE = os.environ.get("CHECKED_DEVICE", "cpu")
SEED = 1_000_000 * int(os.environ.get("SAELAB_SEED_OFFSET", "0"))
U = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8 if DEVICE == "cuda" else 2.0**-7}
"""largest relative error of rounding to nearest; the interpreter cuts float32 off to bfloat16"""
DTYPES = tuple(U)
SHAPES = [(5, 7, 3), (1, 1, 1), (40, 9, 16), (3, 50, 261), (19, 131, 37)]  # n_rows, d_sae, d_in


def draw(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + SEED)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def draw_whole(*shape, seed, dtype=torch.float32):
    """Small whole numbers, whose products and sums are exact in float32: ties abound, and every order must agree."""
    generator = torch.Generator().manual_seed(seed + SEED)
    return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype)


def draw_codes(n_rows, d_sae, seed, dtype=torch.float32):
    """Random codes, a third of the rows empty, and the first latent where others are; one row is full."""
    z = draw(n_rows, d_sae, seed=seed, dtype=dtype)
    z = z * (draw(n_rows, d_sae, seed=seed + 1) > 0.5)
    z[:, 0] = 0
    z[: n_rows // 3] = 0
    z[-1] = 1.5
    return SparseCodes.from_dense(z), z.double()


def assert_sum(found, exact, size, n, dtype):
    """Within what rounding of n products, their sum in float32 and the result can do; `size` is that of |products|."""
    assert found.dtype == dtype
    bound = (n + 2) * U[torch.float32] * size + (U[dtype] * exact.abs() if dtype != torch.float32 else 0)
    assert found.isfinite().all() and ((found.double() - exact).abs() <= bound).all()


def check_gather_sum():
    for dtype in DTYPES:
        for n_rows, d_sae, d_in in SHAPES:
            sparse, z = draw_codes(n_rows, d_sae, seed=1, dtype=dtype)
            table = draw(d_sae, d_in, seed=3, dtype=dtype)
            for rows in (table, draw(d_in, d_sae, seed=4, dtype=dtype).T):  # any memory order
                found = triton_kernels.gather_sum(sparse.indices, sparse.values, sparse.offsets, rows)
                exact, size = z @ rows.double(), z.abs() @ rows.double().abs()
                assert_sum(found, exact, size, d_sae, dtype)
                assert not found[: n_rows // 3].any()


def check_gather_sum_of_repeated_entries_and_none():
    table = draw(4, 5, seed=1)
    indices, offsets = torch.full((19,), 2, device=DEVICE), torch.tensor([0, 0, 19, 19], device=DEVICE)
    found = triton_kernels.gather_sum(indices, torch.ones(19, device=DEVICE), offsets, table)
    assert_sum(found[1], 19 * table[2].double(), 19 * table[2].double().abs(), 19, torch.float32)
    assert not found[[0, 2]].any()
    none = indices[:0]
    assert not triton_kernels.gather_sum(none, table[0, :0], offsets * 0, table).any()
    assert triton_kernels.gather_sum(none, table[0, :0], offsets[:1] * 0, table).shape == (0, 5)


def check_sampled_dot():
    for dtype in DTYPES:
        for n_rows, d_sae, d_in in SHAPES:
            sparse, _ = draw_codes(n_rows, d_sae, seed=1, dtype=dtype)
            table = draw(d_sae, d_in, seed=3, dtype=dtype)
            for left in (draw(n_rows, d_in, seed=4, dtype=dtype), draw(d_in, n_rows, seed=5, dtype=dtype).T):
                exact, size = left.double() @ table.double().T, left.double().abs() @ table.double().abs().T
                for order in (None, sparse.indices.argsort()):
                    found = triton_kernels.sampled_dot(sparse.rows, sparse.indices, left, table, order)
                    places = (sparse.rows, sparse.indices)
                    assert_sum(found, exact[places], size[places], d_in, dtype)
    none = sparse.rows[:0]
    assert triton_kernels.sampled_dot(none, none, left, table).shape == (0,)


def check_equal_rows_have_equal_products():
    """In whatever place of a block they lie, and whatever else is in the batch."""
    for width in (31, 64, 261):
        values = draw(2, width, seed=width)
        left, table = values[:1].repeat(7, 1), values[1:].repeat(11, 1)
        rows = torch.arange(7, device=DEVICE).repeat_interleave(11)
        found = triton_kernels.sampled_dot(rows, torch.arange(11, device=DEVICE).repeat(7), left, table)
        alone = triton_kernels.sampled_dot(rows[:1], rows[:1], left[3:], table[5:])
        assert (found == found[0]).all() and torch.equal(alone, found[:1])


def check_weight_gradient():
    """Sums over the entries of each latent, in float64 the product Z^T left; the same bits whatever the rows' order."""
    for n_rows, d_sae, d_in in SHAPES:
        sparse, z = draw_codes(n_rows, d_sae, seed=1)
        left = draw(n_rows, d_in, seed=3)
        entries = Entries(sparse.indices, sparse.rows, sparse.offsets).with_columns(d_sae)
        order, starts = entries.columns
        found = triton_kernels.gather_sum(entries.rows[order], sparse.values[order], starts, left)
        assert_sum(found, z.T @ left.double(), z.T.abs() @ left.double().abs(), n_rows, torch.float32)
        again = triton_kernels.gather_sum(entries.rows[order], sparse.values[order], starts, left)
        assert torch.equal(found, again)


def check_topk_of_ties():
    """Whole numbers are exact, so the members are those of a stable sort: of equal ones the lowest latents."""
    for dtype, shapes in zip(DTYPES, (((70, 131, 3), (1, 1, 1), (16, 64, 16)), ((7, 70, 5),)), strict=True):
        for n_rows, d_sae, d_in in shapes:
            x, W = draw_whole(n_rows, d_in, seed=1, dtype=dtype), draw_whole(d_sae, d_in, seed=2, dtype=dtype)
            W[d_sae // 2 :] = W[: d_sae - d_sae // 2].clone()  # copies of latents
            bias = draw_whole(d_sae, seed=3, dtype=dtype)
            u = x.double() @ W.double().T + bias.double()
            for signed in (False, True):
                latents = (u.abs() if signed else u).sort(dim=1, descending=True, stable=True).indices
                for k in sorted({1, min(5, d_sae), min(65, d_sae), d_sae}):
                    values, found = triton_kernels.merge_topk(x, W, bias, k, signed, n_splits=1 + k % 3)
                    assert torch.equal(found, latents[:, :k]), (dtype, d_sae, signed, k)
                    assert torch.equal(values.double(), u.gather(1, found)) and values.dtype == torch.float32


def check_topk_of_random_numbers():
    for dtype, shapes in zip(DTYPES, (((19, 131, 37), (3, 300, 100)), ((65, 64, 33),)), strict=True):
        for n_rows, d_sae, d_in in shapes:
            x, W = draw(n_rows, d_in, seed=1, dtype=dtype), draw(d_sae, d_in, seed=2, dtype=dtype)
            bias = draw(2 * d_sae, seed=3, dtype=dtype)[::2]
            u = x.double() @ W.double().T + bias.double()
            size = x.double().abs() @ W.double().abs().T + bias.double().abs()
            slack = ((d_in + 2) * U[torch.float32] * size).amax(1, keepdim=True)
            for signed in (False, True):
                sizes = u.abs() if signed else u
                for k in (5, min(d_sae, 200)):
                    values, found = triton_kernels.merge_topk(x, W, bias, k, signed, n_splits=1)
                    assert ((values - u.gather(1, found)).abs() <= slack).all()
                    kept = torch.zeros_like(u, dtype=torch.bool).scatter_(1, found, True)
                    assert (kept.sum(1) == k).all()
                    limit = sizes.topk(k, dim=1).values[:, -1:]
                    assert not ((sizes > limit + 2 * slack) & ~kept).any()
                    assert not ((sizes < limit - 2 * slack) & kept).any()


def check_topk_of_what_is_no_usual_number():
    """Both zeros are equal, latents of minus infinity come last but come, and rows without size name the lowest."""
    x, W = torch.zeros(3, 4, device=DEVICE), draw(70, 4, seed=1)
    bias = torch.where(torch.arange(70, device=DEVICE) % 2 == 0, -0.0, 0.0)
    for signed in (False, True):
        assert triton_kernels.merge_topk(x, W, bias, 9, signed)[1].tolist() == [list(range(9))] * 3
    bias[::3] = -torch.inf
    last = list(range(0, 70, 3))
    values, latents = triton_kernels.merge_topk(x, W, bias, 70, False)
    assert (
        latents[0].tolist() == [j for j in range(70) if j % 3] + last and (values[:, -len(last) :] == -torch.inf).all()
    )
    assert triton_kernels.merge_topk(x, W, bias, 25, True)[1][0].tolist() == [*last, 1]
    for k in (0, 71):
        try:
            triton_kernels.merge_topk(x, W, bias, k, False)
        except ValueError as error:
            assert f"1..70, got {k}" in str(error)
        else:
            raise AssertionError(k)


def check_topk_with_one_late_member():
    """A block with a single member, for a single row, is merged as every other."""
    x, W = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE), torch.zeros(200, 1, device=DEVICE)
    W[199] = 300.0
    bias = -torch.arange(200.0, device=DEVICE)
    latents = triton_kernels.merge_topk(x, W, bias, 3, False, n_splits=1)[1]
    assert latents.tolist() == [[0, 1, 2], [199, 0, 1], [0, 1, 2]]


def check_screen():
    """The bound of the sizes that are not returned is the largest of them, and nothing is left where all are."""
    x, W, bias = draw(5, 6, seed=1), draw(90, 6, seed=2), draw(90, seed=3)
    u = (x.double() @ W.double().T + bias.double()).abs()
    sizes, _, unseen = triton_kernels.screen_topk(x, W, bias, 8, True)
    largest = u.topk(9, dim=1).values
    torch.testing.assert_close(sizes.double(), largest[:, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unseen.double(), largest[:, 8], rtol=1e-5, atol=1e-5)
    assert (triton_kernels.screen_topk(x, W, bias, 90, True)[2] == -torch.inf).all()


def check_nested_residuals():
    for dtype in DTYPES:
        for n_groups, n_rows, d in ((1, 1, 1), (3, 5, 7), (4, 33, 65), (2, 2, 1024)):
            target, parts = draw(n_rows, d, seed=1, dtype=dtype), draw(n_groups, n_rows, d, seed=2, dtype=dtype)
            exact = target.double() - parts.double().cumsum(0)
            size = target.double().abs() + parts.double().abs().cumsum(0)
            off = (n_groups + 1) * U[torch.float32] * size  # of the residuals in float32, of which squares are summed
            slack = (2 * exact.abs() * off + off.square()).flatten(1).sum(1)
            squares = exact.square().flatten(1).sum(1)
            slack += (n_rows * d + 1) * U[torch.float32] * squares + U[dtype] * squares
            for out in (torch.empty_like(parts), parts.clone(), parts.transpose(1, 2).contiguous().transpose(1, 2)):
                kept = out if torch.equal(out, parts) and out.is_contiguous() else parts
                errors = triton_kernels.subtract_parts(target, kept, out)
                assert errors.dtype == dtype and ((errors.double() - squares).abs() <= slack).all()
                assert ((out.double() - exact).abs() <= off + U[dtype] * exact.abs()).all()
            grad = draw(1, seed=3, dtype=dtype).expand(n_groups)
            terms = -2 * grad.double().view(-1, 1, 1) * out.double()
            found = triton_kernels.add_residuals(out, grad)
            later, sizes = (t.flip(0).cumsum(0).flip(0) for t in (terms, terms.abs()))
            assert_sum(found, later, sizes, n_groups, dtype)


def forced() -> ExitStack:
    """Inside, the library takes Triton's kernels whatever the device; `called` lists which."""
    stack = ExitStack()
    for module in (products, screening, triton_choice):
        stack.enter_context(patch.object(module, "use_triton", lambda *tensors: True))
    return stack


def counted(stack: ExitStack) -> list[str]:
    """Names of the kernels' functions as they are called."""
    called: list[str] = []
    for name in ("gather_sum", "sampled_dot", "merge_topk", "subtract_parts", "add_residuals"):
        real = getattr(triton_kernels, name)

        def call(*args, name=name, real=real):
            called.append(name)
            return real(*args)

        stack.enter_context(patch.object(triton_kernels, name, call))
    return called


def both_ways(run: Callable[[], list[torch.Tensor]], kernels: set[str]) -> None:
    """Results and gradients by the kernels `kernels` and by PyTorch's operations, up to rounding."""
    plain = run()
    with forced() as stack:
        called = counted(stack)
        fused = run()
    assert set(called) == kernels, called
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_training_products_take_the_kernels():
    n_groups, n_rows, d_sae, d_in = 3, 9, 20, 21
    sparse, _ = draw_codes(n_groups * n_rows, d_sae, seed=1)
    W_dec, x, b_dec = draw(d_sae, d_in, seed=2), draw(n_rows, d_in, seed=3), draw(d_in, seed=4)
    W_enc, b_enc, weight = draw(d_in, d_sae, seed=5), draw(d_sae, seed=6), draw(n_groups, seed=7)
    entries = Entries(sparse.indices, sparse.rows, sparse.offsets)

    def leaves(*tensors):
        return [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def nested():
        own = leaves(sparse.values, W_dec, x, b_dec)
        errors, last = nested_decode_error(*own, entries, n_groups)
        (errors * weight).sum().backward()
        return [errors.detach(), last, *(t.grad for t in own)]

    def dense_parts():
        own = leaves(x, draw(n_groups, n_rows, d_in, seed=8))
        errors, last = nested_error(*own)
        (errors * weight).sum().backward()
        return [errors.detach(), last, *(t.grad for t in own)]

    def decoded():
        own = leaves(sparse.values, W_dec)
        x_hat = sparse_decode(*own, sparse.indices, sparse.rows, sparse.offsets)
        x_hat.square().sum().backward()
        return [x_hat.detach(), *(t.grad for t in own)]

    def encoded():
        own = leaves(draw(n_groups * n_rows, d_in, seed=9), W_enc, b_enc, b_dec)
        attach_encoder(sparse.values, *own, entries).square().sum().backward()
        return [t.grad for t in own]

    # on the CPU the gradient of a weight is a product of compressed columns: see `sparse_products.weight_gradient`
    both_ways(nested, {"gather_sum", "sampled_dot", "subtract_parts", "add_residuals"})
    both_ways(dense_parts, {"subtract_parts", "add_residuals"})
    both_ways(decoded, {"gather_sum", "sampled_dot"})
    both_ways(encoded, {"gather_sum"})


def check_search_takes_the_kernel():
    """The codes are those of PyTorch's operations: exactly those of whole numbers, ties included."""
    for make, exact in ((draw_whole, True), (draw, False)):
        x, W, bias = make(11, 6, seed=1), make(150, 6, seed=2), make(150, seed=3)
        for signed, precision, k in ((False, "float32", 1), (True, "float32", 7), (False, "bfloat16", 7)):
            plain = search_topk(x, W, bias, k, signed, precision)
            with forced() as stack:
                called = counted(stack)
                fused = search_topk(x, W, bias, k, signed, precision)
            assert {"merge_topk", "sampled_dot"} <= set(called)
            assert torch.equal(fused.to_dense() != 0, plain.to_dense() != 0)
            tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(fused.to_dense(), plain.to_dense(), **tolerance)
        with forced() as stack:
            called = counted(stack)
            search_topk(x, W, bias, 130, False, "float32")  # more candidates than a program holds
            assert "merge_topk" not in called


CHECKS = sorted(name for name in globals() if name.startswith("check_"))


def compile_kernels() -> None:
    """Compile every kernel to machine code for two generations of devices, which needs none of them."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"BLOCK_N": 16, "BLOCK_K": 64, "LOG_K": 6, "BLOCK_D": 32, "BLOCK_E": 8, "BLOCK": 1024}
    flags = {"SIGNED": True, "PRECISION": "ieee", "WIDEN": False, "ORDERED": True}
    ids = ("indices", "offsets", "rows", "order")
    numbers = ("values", "table", "left", "x", "W", "bias", "target", "parts", "residuals", "grad")
    for name in ("_gather_sum", "_sampled_dot", "_merge_topk", "_subtract_parts", "_add_residuals"):
        kernel = getattr(triton_kernels, name)
        own = {key: value for key, value in (sizes | flags).items() if key in kernel.arg_names}
        for dtype, capability in (("fp32", 80), ("bf16", 90)):
            types = dict.fromkeys(ids, "*i64") | dict.fromkeys(numbers, f"*{dtype}") | {"errors": "*fp32"}
            types |= dict.fromkeys(own, "constexpr") | {"out": "*i64" if name == "_merge_topk" else f"*{dtype}"}
            source = ASTSource(kernel, {arg: types.get(arg, "i32") for arg in kernel.arg_names}, constexprs=own)
            made = compiled(source, target=GPUTarget("cuda", capability, 32), options=triton_kernels.FUSED)
            assert len(made.asm["cubin"]) and "atom" not in made.asm["ptx"], name


def run_checks(*arguments: str, **variables: str) -> dict[str, str]:
    """What went wrong in each check, nothing where it passed, in a process with these environment variables."""
    root = str(Path(triton_kernels.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), **variables}
    command = [sys.executable, __file__, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    outcomes: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return run_checks(TRITON_INTERPRET="1")


@WITH_TRITON
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue("interpreted")[name] == ""


@pytest.mark.slow
@WITH_TRITON
def test_kernels_compile_for_devices_and_add_nothing_atomically(tmp_path: Path) -> None:
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    assert run_checks("compile_kernels", **variables) == {"compile_kernels": ""}


@pytest.mark.gpu
@WITH_TRITON
def test_kernels_on_the_device() -> None:
    assert not {name: why for name, why in run_checks(CHECKED_DEVICE="cuda").items() if why}


def test_tensors_on_the_cpu_take_pytorchs_operations() -> None:
    assert not use_triton(torch.ones(2)) and not use_triton(torch.ones(2), torch.ones(2))


def pretend(**properties: object) -> SimpleNamespace:
    """What `use_triton` reads of a tensor."""
    return SimpleNamespace(**{"is_cuda": True, "dtype": torch.float32, "device": torch.device("cuda"), **properties})


@unchecked()
def test_kernels_are_for_able_devices_with_triton_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_choice, "has_triton", lambda: True)
    monkeypatch.setattr(triton_choice, "_is_able", lambda device: device.index != 1)
    monkeypatch.delenv("SAELAB_TRITON", raising=False)
    assert use_triton(pretend()) and use_triton(pretend(), pretend(dtype=torch.bfloat16))
    assert not use_triton(pretend(), torch.ones(2)) and not use_triton(pretend(dtype=torch.float64))
    assert not use_triton(pretend(), pretend(device=torch.device("cuda", 1)))
    monkeypatch.setenv("SAELAB_TRITON", "0")
    assert not use_triton(pretend())
    monkeypatch.delenv("SAELAB_TRITON")
    monkeypatch.setattr(triton_choice, "has_triton", lambda: False)
    assert not use_triton(pretend())


def test_the_module_is_there_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("kernels_without_triton", triton_kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.IS_INSTALLED and module.merge_topk.__doc__
    assert triton_kernels.IS_INSTALLED is not NO_TRITON


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for check in sys.argv[1:] or CHECKS:
        try:
            globals()[check]()
            found[check] = ""
        except Exception:
            found[check] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")
