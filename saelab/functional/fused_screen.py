"""A screen in int8 whose product is never written: each tile of it is compared in registers with its rows' thresholds.

`torch._int_mm` writes all pre-activations, four bytes each, and a selection reads them again. Here the product of 8
tokens and 48 latents stays in 24 vector registers. A row keeps the largest sizes found so far; a size is compared with
the smallest of the n best of them, and written down only where it is larger. After a few hundred latents that is rare.

The instruction (`vpdpbusd`, AVX512-VNNI) multiplies unsigned by signed bytes: weights are stored 128 too large, and the
sums start at -128 times the sum of the row's int8 values. All sums are exact in int32. Every row is searched by itself,
in the same order of latents: the result does not depend on the number of threads.

The functions need numba and such a processor; `can_fuse` says whether they can be used.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.screening import _balance_dimensions, scratch

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from llvmlite import ir  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from numba.extending import intrinsic  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None  # type: ignore[assignment,unused-ignore]

ROWS, VECTORS, LANES = 8, 3, 16  # of a tile: 24 of the 32 registers hold its sums
PANEL = VECTORS * LANES  # latents of a tile
QUAD = 4  # products that one instruction sums in each lane
SCAN_ROWS = 512  # tokens for which a panel stays in the cache
TRIES = 24  # bisections of a threshold
ALIGNMENT = 64  # bytes of a register


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels can run here: numba is installed, and the processor has AVX512-VNNI."""
    return device.type == "cpu" and numba is not None and _has_instruction()


@functools.cache
def _has_instruction() -> bool:
    """Whether Numba compiles for a processor with `vpdpbusd` on 512 bits; it may be told to compile for another."""
    features: str | None = getattr(numba.core.config, "CPU_FEATURES", None)
    if features is None:
        import llvmlite.binding  # type: ignore[import-not-found,import-untyped,unused-ignore]

        return all(
            llvmlite.binding.get_host_cpu_features().get(name) for name in ("avx512vnni", "avx512bw", "avx512vl")
        )
    return "+avx512vnni" in features.split(",")


@no_type_check
def _make_tile() -> Any:
    """The function that multiplies one tile and compares it, in LLVM's own language."""

    @intrinsic
    def multiply_tile(typing_context, x, w, start, step, bias, inverse, threshold, sizes, masks, n_quads, signed):
        i64, i32 = numba.types.int64, numba.types.int32
        signature = i32(*[i64] * 10, numba.types.boolean)

        def codegen(context, builder, signature, args):
            x, w, start, step, bias, inverse, threshold, sizes, masks, n_quads, signed = args
            int16, int32, int64, real = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
            sums, reals = ir.VectorType(int32, LANES), ir.VectorType(real, LANES)
            dot = builder.module.declare_intrinsic(
                "llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(sums, [sums, sums, sums])
            )
            fabs = builder.module.declare_intrinsic("llvm.fabs.v16f32", (), ir.FunctionType(reals, [reals]))

            def whole(n):
                return ir.Constant(int64, n)

            def spread(value, vector):
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(int32, 0))
                zeros = ir.Constant(ir.VectorType(int32, LANES), [0] * LANES)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            def load(pointer, place, align):
                return builder.load(builder.gep(pointer, [place]), align=align)

            x, start = builder.inttoptr(x, int32.as_pointer()), builder.inttoptr(start, int32.as_pointer())
            w = builder.inttoptr(w, sums.as_pointer())
            step, bias = builder.inttoptr(step, reals.as_pointer()), builder.inttoptr(bias, reals.as_pointer())
            inverse = builder.inttoptr(inverse, real.as_pointer())
            threshold = builder.inttoptr(threshold, real.as_pointer())
            sizes, masks = builder.inttoptr(sizes, reals.as_pointer()), builder.inttoptr(masks, int16.as_pointer())
            first = [spread(load(start, whole(r), 4), sums) for r in range(ROWS)]
            before = builder.block
            loop, after = builder.append_basic_block("quads"), builder.append_basic_block("compare")
            builder.branch(loop)
            builder.position_at_end(loop)
            quad = builder.phi(int64)
            quad.add_incoming(whole(0), before)
            totals = [builder.phi(sums) for _ in range(ROWS * VECTORS)]
            of_w, of_x = builder.mul(quad, whole(VECTORS)), builder.mul(quad, whole(ROWS))
            weights = [load(w, builder.add(of_w, whole(v)), ALIGNMENT) for v in range(VECTORS)]
            grown = []
            for r in range(ROWS):
                value = spread(load(x, builder.add(of_x, whole(r)), 4), sums)
                grown += [builder.call(dot, [totals[r * VECTORS + v], weights[v], value]) for v in range(VECTORS)]
            following = builder.add(quad, whole(1))
            quad.add_incoming(following, loop)
            for i, (total, more) in enumerate(zip(totals, grown, strict=True)):
                total.add_incoming(first[i // VECTORS], before)
                total.add_incoming(more, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_quads), loop, after)
            builder.position_at_end(after)
            any_above = ir.Constant(int16, 0)
            for r in range(ROWS):
                by, limit = (spread(load(of, whole(r), 4), reals) for of in (inverse, threshold))
                for v in range(VECTORS):
                    size = builder.fmul(builder.sitofp(grown[r * VECTORS + v], reals), load(step, whole(v), 4))
                    size = builder.fadd(size, builder.fmul(by, load(bias, whole(v), 4)))
                    size = builder.select(signed, builder.call(fabs, [size]), size)
                    place = whole(r * VECTORS + v)
                    builder.store(size, builder.gep(sizes, [place]), align=4)
                    mask = builder.bitcast(builder.fcmp_ordered(">", size, limit), int16)
                    builder.store(mask, builder.gep(masks, [place]), align=2)
                    any_above = builder.or_(any_above, mask)
            return builder.zext(any_above, int32)

        return signature, codegen

    return multiply_tile


multiply_tile = None if numba is None else _make_tile()


def _kernel(function: Callable[..., Any]) -> Any:
    """Have Numba compile a function for arrays, without the interpreter's lock; sums keep their order."""
    if numba is None:
        return function
    return numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"}, error_model="numpy")(function)


@_kernel
@no_type_check
def _pack_weights(columns, scale, first, last, packed, step):
    """Panels first to last of the int8 weights `W * scale`, 128 too large, and the latents' steps."""
    width, n_latents = columns.shape
    block = np.empty((packed.shape[1] * QUAD, PANEL), np.float32)
    largest, inverse = np.empty(PANEL, np.float32), np.empty(PANEL, np.float32)
    for panel in range(first, last):
        start = panel * PANEL
        n = min(PANEL, n_latents - start)
        if n < PANEL or width < len(block):
            block[:] = np.float32(0)
        largest[:] = np.float32(1e-30)
        for d in range(width):
            row, factor, to = columns[d, start : start + n], scale[d], block[d]
            for lane in range(n):
                value = row[lane] * factor
                to[lane] = value
                largest[lane] = max(largest[lane], abs(value))
        for lane in range(PANEL):
            step[start + lane] = largest[lane] / np.float32(127)
            inverse[lane] = np.float32(127) / largest[lane]
        for quad in range(packed.shape[1]):
            to, place = packed[panel, quad], quad * QUAD
            one, two, three, four = block[place], block[place + 1], block[place + 2], block[place + 3]
            for lane in range(PANEL):
                by = inverse[lane]
                word = np.int32(np.rint(one[lane] * by)) + np.int32(128)
                word |= (np.int32(np.rint(two[lane] * by)) + np.int32(128)) << np.int32(8)
                word |= (np.int32(np.rint(three[lane] * by)) + np.int32(128)) << np.int32(16)
                word |= (np.int32(np.rint(four[lane] * by)) + np.int32(128)) << np.int32(24)
                to[lane] = word


@_kernel
@no_type_check
def _pack_rows(x, scale, first, last, packed, step, start):
    """Tiles first to last of the int8 values of `x * scale`, the rows' steps and what their sums start from."""
    n_rows, width = x.shape
    for tile in range(first, last):
        for r in range(ROWS):
            row = tile * ROWS + r
            if row >= n_rows:
                continue
            values, largest = x[row], np.float32(1e-30)
            for d in range(width):
                value = abs(values[d] * scale[d])
                largest = value if value > largest else largest
            inverse, total = np.float32(127) / largest, np.int32(0)
            for d in range(width):
                q = np.int32(np.rint(values[d] * scale[d] * inverse))
                packed[tile, d // QUAD, r, d % QUAD] = q
                total += q
            step[row] = largest / np.float32(127)
            start[row] = -128 * total


@_kernel
@no_type_check
def _keep_best(sizes, names, n_found, n):
    """Move the n largest of the first n_found sizes to the front; the smallest of them."""
    low, high = sizes[0], sizes[0]
    for i in range(n_found):
        low = sizes[i] if sizes[i] < low else low
        high = sizes[i] if sizes[i] > high else high
    for _ in range(TRIES):  # at least n sizes are at or above `low`
        middle = np.float32(0.5) * (low + high)
        count = np.int32(0)
        for i in range(n_found):
            count += np.int32(1) if sizes[i] >= middle else np.int32(0)
        if count >= n:
            low = middle
            if count == n:
                break
        else:
            high = middle
    kept = 0
    for i in range(n_found):
        if sizes[i] >= low and kept < n_found:
            size, name = sizes[i], names[i]
            sizes[i], names[i] = sizes[kept], names[kept]
            sizes[kept], names[kept] = size, name
            kept += 1
    while kept > n:  # equal, or closer than the bisection can tell
        smallest = 0
        for i in range(kept):
            smallest = i if sizes[i] < sizes[smallest] else smallest
        kept -= 1
        size, name = sizes[kept], names[kept]
        sizes[kept], names[kept] = sizes[smallest], names[smallest]
        sizes[smallest], names[smallest] = size, name
    least = sizes[0]
    for i in range(n):
        least = sizes[i] if sizes[i] < least else least
    return least


@_kernel
@no_type_check
def _scan(x, start, inverse, w, step, bias, n_latents, n, signed, first, last, sizes, names, threshold):
    """The n largest sizes of the rows of tiles first to last, in the row's own unit, at the front of `sizes`."""
    room, n_quads = sizes.shape[1], w.shape[1]
    memory = np.empty(ROWS * PANEL + LANES, np.float32)
    shift = (-memory.ctypes.data % ALIGNMENT) // 4
    found = memory[shift : shift + ROWS * PANEL]
    masks = np.empty(ROWS * VECTORS, np.uint16)
    counts = np.zeros(ROWS * x.shape[0], np.int32)
    for chunk in range(first, last, SCAN_ROWS // ROWS):
        for panel in range(w.shape[0]):
            for tile in range(chunk, min(last, chunk + SCAN_ROWS // ROWS)):
                row = tile * ROWS
                hit = multiply_tile(
                    x[tile].ctypes.data,
                    w[panel].ctypes.data,
                    start[row:].ctypes.data,
                    step[panel * PANEL :].ctypes.data,
                    bias[panel * PANEL :].ctypes.data,
                    inverse[row:].ctypes.data,
                    threshold[row:].ctypes.data,
                    found.ctypes.data,
                    masks.ctypes.data,
                    n_quads,
                    signed,
                )
                if hit == 0:
                    continue
                for i in range(ROWS * VECTORS):
                    if masks[i] == 0:
                        continue
                    r = row + i // VECTORS
                    latent = panel * PANEL + (i % VECTORS) * LANES
                    count = counts[r]
                    for lane in range(LANES):
                        size = found[i * LANES + lane]
                        if size > threshold[r] and latent + lane < n_latents:
                            sizes[r, count], names[r, count] = size, latent + lane
                            count += 1
                            if count == room:
                                threshold[r] = _keep_best(sizes[r], names[r], count, n)
                                count = n
                    counts[r] = count
        for row in range(chunk * ROWS, min(last, chunk + SCAN_ROWS // ROWS) * ROWS):
            if counts[row] > n:
                threshold[row] = _keep_best(sizes[row], names[row], counts[row], n)


@functools.lru_cache(maxsize=4)
def _threads(n: int, process: int) -> ThreadPoolExecutor:
    """Threads for kernels beside the calling one; those of a parent process do not run in a forked one."""
    return ThreadPoolExecutor(n, thread_name_prefix="saelab-screen")


def _run_parts(kernel: Callable[[int, int], object], n: int) -> None:
    """Call `kernel(first, last)` for parts of `range(n)` on PyTorch's number of threads, the last part on this one."""
    n_parts = max(1, min(torch.get_num_threads(), n))
    ends = [n * i // n_parts for i in range(n_parts + 1)]
    others = [_threads(n_parts - 1, os.getpid()).submit(kernel, ends[i], ends[i + 1]) for i in range(n_parts - 1)]
    try:
        kernel(ends[-2], ends[-1])
    finally:
        for other in others:
            other.result()


def _aligned(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A scratch buffer that starts at a multiple of 64 bytes."""
    room = ALIGNMENT // dtype.itemsize
    flat = scratch(f"fused {name}", (math.prod(shape) + room,), dtype, torch.device("cpu"))
    start = -flat.data_ptr() % ALIGNMENT // dtype.itemsize
    return flat[start : start + math.prod(shape)].view(shape)


def screen_top(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    n: int,
    signed: bool,
) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Float[Tensor, "n_rows"], Float[Tensor, "n_rows"]]:
    """Sizes and latents of each row's n largest approximate `x W^T + bias`, unsorted; a bound of the rest; the noise.

    What `Screen(...).top(x, n)` returns in int8, within rounding of the same sizes.

    Args:
        x: activations.
        W: encoder, one row per latent; read fastest where its transpose is contiguous, as the encoder of an SAE is.
        bias: encoder bias, added in float32.
        n: entries found in each row, at most d_sae.
        signed: whether the sizes are |u|.

    >>> x, W = torch.tensor([[1.0, -3.0]]), torch.eye(2)
    >>> if can_fuse(x.device):
    ...     assert screen_top(x, W, torch.zeros(2), 1, signed=True)[1].tolist() == [[1]]
    """
    (n_rows, width), d_sae = x.shape, len(W)
    n_tiles, n_panels, n_quads = -(-n_rows // ROWS), -(-d_sae // PANEL), -(-width // QUAD)
    balance = _balance_dimensions(x, W)
    low_x = _aligned("x", (n_tiles, n_quads, ROWS, QUAD), torch.int8).zero_()
    low_W = _aligned("W", (n_panels, n_quads, PANEL), torch.int32)  # four bytes each
    step = _aligned("step", (n_panels * PANEL,), torch.float32)
    shift = _aligned("bias", (n_panels * PANEL,), torch.float32).zero_()
    shift[:d_sae] = bias
    of_row = torch.ones(n_tiles * ROWS)
    start = torch.zeros(n_tiles * ROWS, dtype=torch.int32)
    columns, rows = W.T.contiguous().numpy(), x.contiguous().numpy()
    by_x, by_W = balance.reciprocal().numpy(), balance.numpy()
    _run_parts(lambda i, j: _pack_weights(columns, by_W, i, j, low_W.numpy(), step.numpy()), n_panels)
    _run_parts(lambda i, j: _pack_rows(rows, by_x, i, j, low_x.numpy(), of_row.numpy(), start.numpy()), n_tiles)
    room = n + max(n, 2 * PANEL)
    sizes = torch.full((n_tiles * ROWS, room), -torch.inf)
    latents = torch.zeros((n_tiles * ROWS, room), dtype=torch.int32)
    unseen = torch.full((n_tiles * ROWS,), -torch.inf)
    unseen[n_rows:] = torch.inf
    inputs = (low_x, start, of_row.reciprocal(), low_W, step, shift)
    outputs = (sizes, latents, unseen)
    arrays = [part.numpy() for part in inputs + outputs]
    _run_parts(lambda i, j: _scan(*arrays[:6], d_sae, n, signed, i, j, *arrays[6:]), n_tiles)
    best, names, factor = sizes[:n_rows, :n], latents[:n_rows, :n].long(), of_row[:n_rows]
    short = (best == -torch.inf).any(1).nonzero()[:, 0]  # sizes that are no numbers are never larger than a threshold
    best[short], names[short] = 0.0, torch.arange(n)
    unseen = (unseen[:n_rows] * factor).index_fill(0, short, torch.inf)
    # both factors are off by up to half a step in each dimension
    typical = torch.linalg.vector_norm(W[:: max(1, d_sae // 4096)] * balance, dim=1).square().mean().sqrt()
    norm = torch.linalg.vector_norm(x / balance, dim=1)
    noise = torch.hypot(factor * typical, norm * step[:d_sae].square().mean().sqrt()) / 12**0.5
    return best * factor[:, None], names, unseen, noise
