"""The largest pre-activations of each row, and those above a threshold, in float32, by a product that is never written.

Each tile of the product, of a few tokens and latents, stays in vector registers and is compared there with its rows'
thresholds, as in `fused_screen`; a size is written down only where it is larger. The first thresholds come from the
first thousand latents of a row: as many maxima of their groups are above them as latents are asked for.

Every pre-activation is the same sum, from the bias on, dimension after dimension: equal rows and equal latents have
equal ones, wherever in the batch they are and however many threads there are. Narrow activations take less time here
than in a screen in int8, whose candidates have to be recomputed.

The functions need numba; `compiled.use_numba` says whether they can be used.
"""

from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.compiled import run_parts
from saelab.functional.fused_screen import LANES, has_features, keep_best, lowest_bit
from saelab.functional.numba_kernels import COMPARISONS, kernel

try:
    import numba  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from llvmlite import ir  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from numba.extending import intrinsic  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:  # the module can be imported all the same, as every module of the package
    numba = None  # type: ignore[assignment,unused-ignore]

# of a tile: its sums take 24 of the 32 registers of AVX512, or 8 of 16 shorter ones
ROWS, VECTORS = (8, 3) if has_features("avx512f") else (4, 1)
PANEL = VECTORS * LANES  # latents of a tile
TILE = ROWS * PANEL
STRIPE = 1008 // PANEL  # panels whose sizes are all held, to find thresholds: 32 KiB
CHUNK = 8  # tiles for which a panel stays in the first cache
SPARE = 48  # sizes that a row may have beside the largest asked for
SORTED = 32  # sizes that are sorted beside the largest asked for; of more, those are found first
TRIES = 16  # bisections of a threshold
ENOUGH = 8  # of the sizes asked for, one part more may be above it
NEAR = np.float32(1e-6)  # of a threshold, by which it is lowered: equal sizes are above it
BYTES = 4  # of a float


class _Tools:
    """What both functions in LLVM's language are built from."""

    def __init__(self, builder: Any) -> None:
        int16, self.int32, self.int64, self.real = (*map(ir.IntType, (16, 32, 64)), ir.FloatType())
        self.builder, self.bits, self.reals = builder, int16, ir.VectorType(self.real, LANES)

    def whole(self, n: int) -> Any:
        return ir.Constant(self.int64, n)

    def load(self, pointer: Any, place: Any) -> Any:
        return self.builder.load(self.builder.gep(pointer, [place]), align=BYTES)

    def spread(self, value: Any) -> Any:
        """A vector of one number."""
        nothing = ir.Constant(self.reals, ir.Undefined)
        one = self.builder.insert_element(nothing, value, ir.Constant(self.int32, 0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(self.int32, LANES), [0] * LANES))

    def call(self, name: str, *vectors: Any) -> Any:
        """A function of LLVM's on vectors."""
        kind = ir.FunctionType(self.reals, [self.reals] * len(vectors))
        return self.builder.call(self.builder.module.declare_intrinsic(f"llvm.{name}.v{LANES}f32", (), kind), vectors)

    def compare(self, found: Any, threshold: Any, masks: Any, signed: Any) -> Any:
        """Write for each row of a tile the bits of the sizes above its threshold; a bit for each row that has any."""
        builder, has_any = self.builder, self.whole(0)
        threshold = builder.inttoptr(threshold, self.real.as_pointer())
        masks = builder.inttoptr(masks, self.int64.as_pointer())
        for r in range(ROWS):
            limit, mask = self.spread(self.load(threshold, self.whole(r))), self.whole(0)
            for v in range(VECTORS):
                one = found[r * VECTORS + v]
                size = builder.select(signed, self.call("fabs", one), one)
                above = builder.zext(builder.bitcast(builder.fcmp_ordered(">", size, limit), self.bits), self.int64)
                mask = builder.or_(mask, builder.shl(above, self.whole(LANES * v)))
            builder.store(mask, builder.gep(masks, [self.whole(r)]), align=8)
            has = builder.zext(builder.icmp_unsigned("!=", mask, self.whole(0)), self.int64)
            has_any = builder.or_(has_any, builder.shl(has, self.whole(r)))
        return has_any


@no_type_check
def _make_tile() -> Any:
    """The function that multiplies one tile and compares it."""

    @intrinsic
    def multiply_tile(typing_context, x, w, bias, threshold, u, masks, n_dims, signed):
        i64 = numba.types.int64
        signature = numba.types.uint64(*[i64] * 7, numba.types.boolean)

        def codegen(context, builder, signature, args):
            x, w, bias, threshold, u, masks, n_dims, signed = args
            tools = _Tools(builder)
            whole, load, reals = tools.whole, tools.load, tools.reals
            x = builder.inttoptr(x, tools.real.as_pointer())
            w, bias, u = (builder.inttoptr(place, reals.as_pointer()) for place in (w, bias, u))
            rows = [builder.gep(x, [builder.mul(n_dims, whole(r))]) for r in range(ROWS)]
            first = [load(bias, whole(v)) for v in range(VECTORS)]
            before = builder.block
            loop, after = builder.append_basic_block("dimensions"), builder.append_basic_block("compare")
            builder.branch(loop)
            builder.position_at_end(loop)
            dim = builder.phi(tools.int64)
            dim.add_incoming(whole(0), before)
            totals = [builder.phi(reals) for _ in range(ROWS * VECTORS)]
            weights = [load(w, builder.add(builder.mul(dim, whole(VECTORS)), whole(v))) for v in range(VECTORS)]
            grown = []
            for r in range(ROWS):
                value = tools.spread(load(rows[r], dim))
                grown += [tools.call("fmuladd", value, weights[v], totals[r * VECTORS + v]) for v in range(VECTORS)]
            following = builder.add(dim, whole(1))
            dim.add_incoming(following, loop)
            for i, (total, more) in enumerate(zip(totals, grown, strict=True)):
                total.add_incoming(first[i % VECTORS], before)
                total.add_incoming(more, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_dims), loop, after)
            builder.position_at_end(after)
            for i, found in enumerate(grown):
                builder.store(found, builder.gep(u, [whole(i)]), align=BYTES)
            return tools.compare(grown, threshold, masks, signed)

        return signature, codegen

    return multiply_tile


@no_type_check
def _make_comparison() -> Any:
    """The function that compares the sizes of one tile with its rows' thresholds once more."""

    @intrinsic
    def compare_tile(typing_context, u, threshold, masks, signed):
        i64 = numba.types.int64
        signature = numba.types.uint64(i64, i64, i64, numba.types.boolean)

        def codegen(context, builder, signature, args):
            tools = _Tools(builder)
            u, threshold, masks, signed = args
            u = builder.inttoptr(u, tools.reals.as_pointer())
            found = [tools.load(u, tools.whole(i)) for i in range(ROWS * VECTORS)]
            return tools.compare(found, threshold, masks, signed)

        return signature, codegen

    return compare_tile


@no_type_check
def _make_count() -> Any:
    """The function that counts the numbers of some vectors that are larger than a given one."""

    @intrinsic
    def count_larger(typing_context, sizes, size, n_vectors):
        i64 = numba.types.int64
        signature = i64(i64, numba.types.float32, i64)

        def codegen(context, builder, signature, args):
            sizes, size, n_vectors = args
            tools = _Tools(builder)
            sizes, limit = builder.inttoptr(sizes, tools.reals.as_pointer()), tools.spread(size)
            before = builder.block
            loop, after = builder.append_basic_block("vectors"), builder.append_basic_block("counted")
            builder.branch(loop)
            builder.position_at_end(loop)
            i, count = builder.phi(tools.int64), builder.phi(tools.int64)
            larger = builder.fcmp_ordered(">", tools.load(sizes, i), limit)
            more = builder.ctpop(builder.zext(builder.bitcast(larger, tools.bits), tools.int64))
            following, grown = builder.add(i, tools.whole(1)), builder.add(count, more)
            for phi, new in ((i, following), (count, grown)):
                phi.add_incoming(tools.whole(0), before)
                phi.add_incoming(new, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_vectors), loop, after)
            builder.position_at_end(after)
            return grown

        return signature, codegen

    return count_larger


multiply_tile = None if numba is None else _make_tile()
compare_tile = None if numba is None else _make_comparison()
count_larger = None if numba is None else _make_count()


@kernel(COMPARISONS)
@no_type_check
def _pack(weights, first, last, packed):
    """Panels first to last of the weights, dimension after dimension."""
    n_latents, n_dims = weights.shape
    for panel in range(first, last):
        to = packed[panel]
        start = panel * PANEL
        width = min(PANEL, n_latents - start)
        for d in range(n_dims):
            row = to[d]
            for lane in range(width):
                row[lane] = weights[start + lane, d]
            for lane in range(width, PANEL):
                row[lane] = np.float32(0)


@kernel(COMPARISONS)
@no_type_check
def _find_threshold(held, row, n_panels, n, signed, maxima):
    """A number below at least n of a row's sizes in the first panels, and below few more."""
    n_sets = max(1, min(-(-2 * n // PANEL), n_panels // 2))
    n_groups = n_sets * PANEL
    if n_groups < n:
        return np.float32(-np.inf)
    maxima[:n_groups] = np.float32(-np.inf)
    for panel in range(n_panels):
        start = panel * TILE + row * PANEL
        part, most = held[start : start + PANEL], maxima[panel % n_sets * PANEL : (panel % n_sets + 1) * PANEL]
        for j in range(PANEL):
            size = abs(part[j]) if signed else part[j]
            most[j] = size if size > most[j] else most[j]
    low, high = maxima[0], maxima[0]
    for j in range(n_groups):
        low = maxima[j] if maxima[j] < low else low
        high = maxima[j] if maxima[j] > high else high
    low -= abs(low) * NEAR + np.float32(1e-37)
    at, n_vectors = maxima.ctypes.data, n_groups // LANES
    for _ in range(TRIES):  # at least n maxima are larger than `low`
        middle = np.float32(0.5) * (low + high)
        count = count_larger(at, middle, n_vectors)
        if count >= n:
            low = middle
            if count <= n + n // ENOUGH:
                break
        else:
            high = middle
    return low


@kernel(COMPARISONS)
@no_type_check
def _add_hits(hit, u, place, masks, start, n_latents, n, signed, at, room, sizes, names, counts, threshold):
    """Write the sizes of a tile whose bits are set to their rows' lists; of negative ones the latent's complement."""
    while hit != 0:
        i = lowest_bit(hit)
        hit &= hit - np.uint64(1)
        mask = masks[i]
        row, from_, to = at + i, place + i * PANEL, (at + i) * room
        count, limit = counts[row], threshold[row]
        while mask != 0:
            lane = lowest_bit(mask)
            mask &= mask - np.uint64(1)
            value, latent = u[from_ + lane], np.int32(start + lane)
            size = abs(value) if signed else value
            if size > limit and latent < n_latents:
                sizes[to + count] = size
                names[to + count] = ~latent if signed and value < 0 else latent
                count += 1
                if count == room:
                    limit = keep_best(sizes[to : to + room], names[to : to + room], count, n)
                    count = n
        counts[row], threshold[row] = count, limit


@kernel(COMPARISONS)
@no_type_check
def _write_sorted(sizes, names, n_found, n, values, out):
    """Write the n largest of a list, the largest first, of equal ones the lowest latent."""
    n_vectors = -(-n_found // LANES)
    for i in range(n_found, n_vectors * LANES):
        sizes[i] = np.float32(-np.inf)
    out[:] = -1
    at = sizes.ctypes.data
    for i in range(n_found):
        place, size, name = count_larger(at, sizes[i], n_vectors), sizes[i], names[i]
        value, latent = (-size, ~name) if name < 0 else (size, name)
        while place < n and out[place] >= 0:  # taken by an equal one
            if out[place] > latent:
                out[place], latent = latent, np.int32(out[place])
                values[place], value = value, values[place]
            place += 1
        if place < n:
            values[place], out[place] = value, latent


@kernel(COMPARISONS)
@no_type_check
def _scan_largest(x, w, bias, n_panels, n_latents, n_dims, n, signed, first, last, values, latents, found):
    """Of the rows of tiles first to last the n largest, and how many were found; x, w and bias are addresses."""
    room, n_held, n_rows = -(-(n + max(n, SPARE)) // LANES) * LANES, min(n_panels, STRIPE), CHUNK * ROWS
    of_tile, of_panel = ROWS * n_dims * BYTES, PANEL * n_dims * BYTES
    held, maxima = np.empty(n_held * TILE, np.float32), np.empty(max(1, n_held) * PANEL, np.float32)
    sizes, names = np.empty(n_rows * room, np.float32), np.empty(n_rows * room, np.int32)
    threshold, counts = np.empty(n_rows, np.float32), np.empty(n_rows, np.int32)
    masks = np.empty(ROWS, np.uint64)
    at_held, at_masks, at_threshold = held.ctypes.data, masks.ctypes.data, threshold.ctypes.data
    for chunk in range(first, last, CHUNK):
        end = min(last, chunk + CHUNK)
        threshold[:], counts[:] = np.float32(-np.inf), 0
        for tile in range(chunk, end):
            at = (tile - chunk) * ROWS
            limits, rows = at_threshold + at * BYTES, x + tile * of_tile
            for panel in range(n_held):
                to, shift = at_held + panel * TILE * BYTES, bias + panel * PANEL * BYTES
                multiply_tile(rows, w + panel * of_panel, shift, limits, to, at_masks, n_dims, signed)
            for i in range(ROWS):
                threshold[at + i] = _find_threshold(held, i, n_held, n, signed, maxima)
            for panel in range(n_held):
                hit, place = compare_tile(at_held + panel * TILE * BYTES, limits, at_masks, signed), panel * TILE
                if hit:
                    start = panel * PANEL
                    _add_hits(
                        hit, held, place, masks, start, n_latents, n, signed, at, room, sizes, names, counts, threshold
                    )
        for panel in range(n_held, n_panels):
            start, shift = panel * PANEL, bias + panel * PANEL * BYTES
            for tile in range(chunk, end):
                at = (tile - chunk) * ROWS
                limits, rows = at_threshold + at * BYTES, x + tile * of_tile
                hit = multiply_tile(rows, w + panel * of_panel, shift, limits, at_held, at_masks, n_dims, signed)
                if hit:
                    _add_hits(
                        hit, held, 0, masks, start, n_latents, n, signed, at, room, sizes, names, counts, threshold
                    )
        for row in range(chunk * ROWS, min(end * ROWS, len(values))):
            at = row - chunk * ROWS
            part, known, count = sizes[at * room : (at + 1) * room], names[at * room : (at + 1) * room], counts[at]
            if count > n + SORTED:
                keep_best(part, known, count, n)
                count = n
            found[row] = min(n, count)
            _write_sorted(part, known, count, n, values[row], latents[row])


class ExactSearch:
    """Pre-activations `u = x W^T + bias`, but for those that a caller asks for alone.

    Args:
        W: encoder, one row per latent.
        bias: encoder bias.
        signed: whether sizes are |u|.
    """

    def __init__(self, W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, "d_sae"], signed: bool) -> None:
        self.signed, (self.d_sae, self.d_in) = signed, W.shape
        n_panels = -(-self.d_sae // PANEL)
        self.W = torch.empty(n_panels, self.d_in, PANEL)
        # a latent of padding is never above a threshold, or never a row's largest
        self.bias = torch.full((n_panels * PANEL,), 0.0 if signed else -torch.inf)
        self.bias[: self.d_sae] = bias.detach()
        weights, packed = _array(W.contiguous()), _array(self.W)
        run_parts(lambda i, j: _pack(weights, i, j, packed), n_panels)

    def top(
        self, x: Float[Tensor, "n_rows d_in"], n: int
    ) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Int[Tensor, "n_rows"]]:
        """Each row's n largest u and their latents, the largest first, of equal ones the lowest latent; and how many
        were found, fewer than n where some are infinite.
        """
        u, latents = torch.zeros(len(x), n), torch.zeros(len(x), n, dtype=torch.int64)
        found, whole = torch.zeros(len(x), dtype=torch.int64), _whole_tiles(x)
        inputs = [t.data_ptr() for t in (whole, self.W, self.bias)]
        outputs, sizes = [_array(t) for t in (u, latents, found)], (len(self.W), self.d_sae, self.d_in, n, self.signed)
        run_parts(lambda i, j: _scan_largest(*inputs, *sizes, i, j, *outputs), len(whole) // ROWS)
        return u, latents, found


def _whole_tiles(x: Tensor) -> Tensor:
    """Contiguous rows, with rows of 0 to fill the last tile."""
    missing = -len(x) % ROWS
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
