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
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import run_parts
from saelab.functional.numba_kernels import COMPARISONS, kernel
from saelab.functional.screening import BLOCK, balance_dimensions, scratch
from saelab.functional.step_kernels import split_hits

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from llvmlite import ir  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from numba.extending import intrinsic  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None  # type: ignore[assignment,unused-ignore]

ROWS, VECTORS, LANES = 8, 3, 16  # of a tile: 24 of the 32 registers hold its sums
PANEL = VECTORS * LANES  # latents of a tile
GROUPS = 64  # maxima that a loop keeps: whole vector registers
SIGNS = np.int32(-0x7F7F7F80)  # 0x80808080
QUAD = 4  # products that one instruction sums in each lane
ROOM = 256  # entries above a floor for which a row has room at first
SCAN_ROWS = 512  # tokens for which a panel stays in the cache
TRIES = 24  # bisections of a threshold
ALIGNMENT = 64  # bytes of a register


def can_fuse() -> bool:
    """Whether the kernels can run here: numba is installed, and the processor has AVX512-VNNI."""
    return has_features("avx512vnni", "avx512bw", "avx512vl")


@functools.cache
def has_features(*names: str) -> bool:
    """Whether Numba, if it is installed, compiles for a processor with these; it may be told to compile for another."""
    if numba is None:
        return False
    features: str | None = getattr(numba.core.config, "CPU_FEATURES", None)
    if features is None:
        import llvmlite.binding  # type: ignore[import-not-found,import-untyped,unused-ignore]

        known = llvmlite.binding.get_host_cpu_features()
        return all(known.get(name) for name in names)
    return all(f"+{name}" in features.split(",") for name in names)


@no_type_check
def _make_tile() -> Any:
    """The function that multiplies one tile and compares it, in LLVM's own language."""

    @intrinsic
    def multiply_tile(typing_context, x, w, start, step, bias, inverse, threshold, sizes, masks, n_quads, signed):
        i64 = numba.types.int64
        signature = numba.types.uint64(*[i64] * 10, numba.types.boolean)

        def codegen(context, builder, signature, args):
            x, w, start, step, bias, inverse, threshold, sizes, masks, n_quads, signed = args
            int16, int32, int64, real = (*map(ir.IntType, (16, 32, 64)), ir.FloatType())
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
            sizes, masks = builder.inttoptr(sizes, reals.as_pointer()), builder.inttoptr(masks, int64.as_pointer())
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
            any_above = whole(0)
            for r in range(ROWS):
                by, limit = (spread(load(of, whole(r), 4), reals) for of in (inverse, threshold))
                mask = whole(0)
                for v in range(VECTORS):
                    size = builder.fmul(builder.sitofp(grown[r * VECTORS + v], reals), load(step, whole(v), 4))
                    size = builder.fadd(size, builder.fmul(by, load(bias, whole(v), 4)))
                    size = builder.select(signed, builder.call(fabs, [size]), size)
                    place = whole(r * VECTORS + v)
                    builder.store(size, builder.gep(sizes, [place]), align=4)
                    above = builder.zext(builder.bitcast(builder.fcmp_ordered(">", size, limit), int16), int64)
                    mask = builder.or_(mask, builder.shl(above, whole(LANES * v)))
                builder.store(mask, builder.gep(masks, [whole(r)]), align=8)
                any_above = builder.or_(any_above, mask)
            return any_above

        return signature, codegen

    return multiply_tile


@no_type_check
def _make_lowest_bit() -> Any:
    """The function that counts the zeros below a number's lowest bit."""

    @intrinsic
    def lowest_bit(typing_context, mask):
        def codegen(context, builder, signature, args):
            return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

        return numba.types.int64(numba.types.uint64), codegen

    return lowest_bit


multiply_tile = None if numba is None else _make_tile()
lowest_bit = None if numba is None else _make_lowest_bit()


@kernel(COMPARISONS)
@no_type_check
def _quantize_row(row, scale, out, groups):
    """`row * scale` in int8 in the first bytes of `out`, and its step; `groups` is memory for maxima."""
    groups[:] = np.float32(1e-30)
    for start in range(0, len(row), len(groups)):
        part, factor = row[start : start + len(groups)], scale[start : start + len(groups)]
        for i in range(len(part)):
            size = abs(part[i] * factor[i])
            groups[i] = size if size > groups[i] else groups[i]
    largest = groups[0]
    for i in range(len(groups)):
        largest = groups[i] if groups[i] > largest else largest
    inverse = np.float32(127) / largest
    to = out[: len(row)]
    for i in range(len(row)):
        to[i] = np.int8(np.int32(np.rint(row[i] * scale[i] * inverse)))
    return largest / np.float32(127)


@kernel(COMPARISONS)
@no_type_check
def _pack_weights(weights, scale, first, last, packed, step):
    """Panels first to last of the int8 values of `weights * scale`, 128 too large, and the latents' steps."""
    n_latents, n_quads = weights.shape[0], packed.shape[1]
    low, groups = np.zeros(n_quads * QUAD, np.int8), np.empty(GROUPS, np.float32)
    words = low.view(np.int32)
    block = np.zeros((PANEL, n_quads), np.int32)
    for panel in range(first, last):
        for lane in range(PANEL):
            latent = panel * PANEL + lane
            row = block[lane]
            if latent < n_latents:
                step[latent] = _quantize_row(weights[latent], scale, low, groups)
                for quad in range(n_quads):
                    row[quad] = words[quad] ^ SIGNS  # flips the sign of every byte: 128 more, as unsigned
            else:
                step[latent] = np.float32(0)
                row[:] = SIGNS
        for quad in range(n_quads):
            to = packed[panel, quad]
            for lane in range(PANEL):
                to[lane] = block[lane, quad]


@kernel(COMPARISONS)
@no_type_check
def _pack_rows(x, scale, first, last, packed, step, start):
    """Tiles first to last of the int8 values of `x * scale`, the rows' steps and what their sums start from."""
    n_rows, n_quads = x.shape[0], packed.shape[1]
    low, groups = np.zeros(n_quads * QUAD, np.int8), np.empty(GROUPS, np.float32)
    words = low.view(np.int32)
    for tile in range(first, last):
        for r in range(ROWS):
            row = tile * ROWS + r
            if row >= n_rows:
                continue
            step[row] = _quantize_row(x[row], scale, low, groups)
            total = np.int32(0)
            for i in range(len(low)):
                total += np.int32(low[i])
            start[row] = -128 * total
            for quad in range(n_quads):
                packed[tile, quad, r] = words[quad]


@kernel(COMPARISONS)
@no_type_check
def keep_best(sizes, names, n_found, n):
    """Move the n largest of the first n_found sizes to the front; the smallest of them.

    Args:
        sizes: the sizes of a row.
        names: their latents, which are moved with them.
        n_found: how many there are.
        n: how many are kept.
    """
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


@kernel(COMPARISONS)
@no_type_check
def _scan(x, start, inverse, w, step, bias, n_latents, n, signed, first, last, sizes, names, threshold, counts):
    """The n largest sizes of the rows of tiles first to last, in the row's own unit, at the front of `sizes`.

    With n = 0: those above the rows' thresholds, as many as there is room for, and their number.
    """
    room, n_quads = sizes.shape[1], w.shape[1]
    memory = np.empty(ROWS * PANEL + LANES, np.float32)
    shift = (-memory.ctypes.data % ALIGNMENT) // 4
    found = memory[shift : shift + ROWS * PANEL]
    masks = np.empty(ROWS, np.uint64)
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
                for i in range(ROWS):
                    mask, r = masks[i], row + i
                    if mask == 0:
                        continue
                    count = counts[r]
                    while mask != 0:
                        lane = lowest_bit(mask)
                        mask &= mask - np.uint64(1)
                        size, latent = found[i * PANEL + lane], panel * PANEL + lane
                        if size > threshold[r] and latent < n_latents:
                            if count < room:
                                sizes[r, count], names[r, count] = size, latent
                            count += 1
                            if count == room and n > 0:
                                threshold[r] = keep_best(sizes[r], names[r], count, n)
                                count = n
                    counts[r] = count
        for row in range(chunk * ROWS, min(last, chunk + SCAN_ROWS // ROWS) * ROWS):
            if n > 0 and counts[row] > n:
                threshold[row] = keep_best(sizes[row], names[row], counts[row], n)


def _aligned(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A scratch buffer that starts at a multiple of 64 bytes."""
    room = ALIGNMENT // dtype.itemsize
    flat = scratch(f"fused {name}", (math.prod(shape) + room,), dtype, torch.device("cpu"))
    start = -flat.data_ptr() % ALIGNMENT // dtype.itemsize
    return flat[start : start + math.prod(shape)].view(shape)


class FusedScreen:
    """Approximate `u = x W^T + bias`, or |u|, as `Screen` in int8, but for the sizes that a caller asks for alone.

    Args:
        W: encoder, one row per latent.
        bias: encoder bias, added in float32.
        signed: whether the sizes are |u|.
        like: rows similar to those to be screened, from which the scale of each dimension is taken.

    >>> x, W = torch.tensor([[1.0, -3.0]]), torch.eye(2)
    >>> if can_fuse():
    ...     assert FusedScreen(W, torch.zeros(2), True, like=x).top(x, 1)[1].tolist() == [[1]]
    """

    precision = "int8"

    def __init__(
        self,
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        signed: bool,
        like: Float[Tensor, "n_rows d_in"],
    ) -> None:
        self.signed, (self.d_sae, self.d_in) = signed, W.shape
        n_panels, n_quads = -(-self.d_sae // PANEL), -(-self.d_in // QUAD)
        self.balance = balance_dimensions(like, W)
        self.W = _aligned("W", (n_panels, n_quads, PANEL), torch.int32)  # four bytes each
        self.step = _aligned("step", (n_panels * PANEL,), torch.float32)
        self.bias = _aligned("bias", (n_panels * PANEL,), torch.float32).zero_()
        self.bias[: self.d_sae] = bias
        arrays = [_array(t) for t in (W.contiguous(), self.balance, self.W, self.step)]
        run_parts(lambda i, j: _pack_weights(arrays[0], arrays[1], i, j, *arrays[2:]), n_panels)
        sample = W[::BLOCK] * self.balance
        self.typical_norm = torch.linalg.vector_norm(sample, dim=1).square().mean().sqrt()
        self.typical_step = self.step[: self.d_sae].square().mean().sqrt()

    def top(
        self, x: Float[Tensor, "n_rows d_in"], n: int
    ) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Float[Tensor, "n_rows"], Float[Tensor, "n_rows"]]:
        """Sizes and latents of each row's n largest, unsorted; an upper bound of the other sizes; and the noise."""
        n_rows = len(x)
        low, start, scale, noise = self._pack(x)
        unseen = torch.full_like(scale, -torch.inf)
        unseen[n_rows:] = torch.inf
        sizes, latents, _ = self._search(low, start, scale, unseen, n, n + max(n, 2 * PANEL))
        best, names, factor = sizes[:n_rows, :n], latents[:n_rows, :n].long(), scale[:n_rows]
        unseen = unseen[:n_rows] * factor
        short = (best == -torch.inf).any(1).nonzero()[:, 0]  # sizes that are no numbers are never above a threshold
        if len(short):
            best[short], names[short] = 0.0, torch.arange(n)
            unseen[short] = torch.inf
        return best * factor[:, None], names, unseen, noise

    def above(
        self, x: Float[Tensor, "n_rows d_in"], floor: Float[Tensor, ""], errors: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, latents and sizes of the entries at or above `floor`, row by row; and the noise of each row.

        Args:
            x: activations.
            floor: the threshold.
            errors: entries are returned too that are below it by no more than this many times the noise of their row.
        """
        rows, latents, sizes, _, _, noise = self.near(x, floor, errors)
        return rows, latents, sizes, noise

    def near(
        self,
        x: Float[Tensor, "n_rows d_in"],
        floor: Float[Tensor, ""],
        errors: float,
        width: float = 0.0,
        rounding: float = 0.0,
        room: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `above` returns, without the entries that are surely above `floor` and below `floor + width`; and of
        these rows and latents, before the noise.

        Args:
            x: activations.
            floor: the threshold.
            errors: how many times the noise of its row an entry's size may be off.
            width: where the entries end that are left out; 0 leaves none out.
            rounding: what a size may be off in addition.
            room: entries that rows may have, if known; where one has more the search is repeated.
        """
        low, start, scale, noise = self._pack(x)
        limit = self._limit(floor - errors * noise, scale)
        room = self.d_sae if floor == -torch.inf else min(max(room, ROOM), self.d_sae)
        sizes, latents, counts = self._search(low, start, scale, limit, 0, room)
        most = int(counts.max())
        if most > room:
            sizes, latents, counts = self._search(low, start, scale, limit, 0, most)
        margin, n = errors * noise + rounding, len(x)
        base = float(floor) if width else 0.0
        found = split_hits(sizes, latents, counts[:n], scale[:n], margin + base, width + 2 * base)
        return *found, noise

    def count_above(self, x: Float[Tensor, "n_rows d_in"], floor: Float[Tensor, ""]) -> Int[Tensor, "n_rows"]:
        """Number of sizes at or above `floor` in each row."""
        low, start, scale, noise = self._pack(x)
        return self._search(low, start, scale, self._limit(floor.expand_as(noise), scale), 0, 1)[2][: len(x)]

    def _limit(self, floor: Float[Tensor, "n_rows"], scale: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The thresholds of rows in their own units, just below `floor`; rows of padding have none above theirs."""
        limit = torch.full_like(scale, torch.inf)
        limit[: len(floor)] = (floor / scale[: len(floor)]).nextafter(scale.new_tensor(-torch.inf))
        return limit

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows in int8 by tiles, what their sums start from, their scale, and the noise of each."""
        n_tiles = -(-len(x) // ROWS)
        low = _aligned("x", (n_tiles, self.W.shape[1], ROWS), torch.int32).zero_()
        scale, start = torch.ones(n_tiles * ROWS), torch.zeros(n_tiles * ROWS, dtype=torch.int32)
        arrays = [_array(t) for t in (x.contiguous(), self.balance.reciprocal(), low, scale, start)]
        run_parts(lambda i, j: _pack_rows(arrays[0], arrays[1], i, j, *arrays[2:]), n_tiles)
        # both factors are off by up to half a step in each dimension
        norm = torch.linalg.vector_norm(x / self.balance, dim=1)
        noise = torch.hypot(scale[: len(x)] * self.typical_norm, norm * self.typical_step) / 12**0.5
        return low, start, scale, noise

    def _search(
        self, low: Tensor, start: Tensor, scale: Tensor, limit: Tensor, n: int, room: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes and latents that `_scan` keeps, and their numbers; `limit` is changed in place."""
        shape = (len(scale), room)
        sizes = torch.full(shape, -torch.inf) if n else torch.empty(shape)  # with n, of all places some are read
        latents = torch.zeros(shape, dtype=torch.int32) if n else torch.empty(shape, dtype=torch.int32)
        counts = torch.zeros(len(scale), dtype=torch.int32)
        inputs = [_array(t) for t in (low, start, scale.reciprocal(), self.W, self.step, self.bias)]
        outputs = [_array(t) for t in (sizes, latents, limit, counts)]
        run_parts(lambda i, j: _scan(*inputs, self.d_sae, n, self.signed, i, j, *outputs), len(low))
        return sizes, latents, counts


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
