"""Screening: approximate pre-activations of all latents in low precision, from which a search takes its candidates.

The encoder's product is the one dense product of a training step. In int8 or bfloat16 it costs a fraction of float32,
and its error is small compared with the gaps between the largest and the rest; the search (`topk.py`) measures that
error on the candidates that it recomputes in float32, and repeats in float32 the rows that the screen cannot decide.

Blocks of 16 latents are compared first: a block whose maximum is too small has no candidate. In int8 every latent has
a quantization step of its own; latents of similar step share a block, so that whole blocks are compared as integers
and only their maxima are scaled. A few dimensions of large activations would leave the others no resolution, so int8
first moves half of each dimension's scale to the weights, which does not change the product (arXiv:2211.10438).

Without VNNI instructions oneDNN sums pairs of int8 products in 16 bits, with saturation: `torch._int_mm` is then
silently wrong by up to the size of its own entries. The processor's instruction set does not decide this, as oneDNN
may be restricted to older instructions (ONEDNN_MAX_CPU_ISA, read once per process). So the kernel is tried once, and
used only where it is exact.
"""

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn.functional import embedding

from saelab.functional.triton_choice import use_triton

TRIED_SHAPES = ((1, 25, 560), (17, 16, 16), (70, 33, 512), (30, 129, 1024), (64, 769, 256))
"""rows, width and columns: a vector, whole and broken tiles, and lengths of sum that meet every kernel's remainder"""
Precision = Literal["float32", "bfloat16", "int8"]
SCAN_ROWS = 512  # tokens at a time: enough for the matrix kernels, few enough for the cache and to reuse the memory
BLOCK = 16  # latents a block
ROUNDS = 12  # of timing the precisions
MOST_MERGED = 128  # candidates of a row that a kernel holds in registers
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")


def multiply_int8(
    a: Int8[Tensor, "n d"], b: Int8[Tensor, "m d"], out: Int[Tensor, "n m"] | None = None
) -> Int[Tensor, "n m"]:
    """`a b^T` in int32, exact: by the int8 kernel where that is exact here, else through float32 and as slow as that.

    The result is written into `out` where that is given.

    >>> multiply_int8(torch.full((1, 2), -128, dtype=torch.int8), torch.full((1, 2), -128, dtype=torch.int8))
    tensor([[32768]], dtype=torch.int32)
    """
    if a.device.type == "cpu" and has_exact_int8():
        return torch._int_mm(a, b.T) if out is None else torch._int_mm(a, b.T, out=out)
    out = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device) if out is None else out.zero_()
    for columns in torch.split(torch.arange(a.shape[1], device=a.device), 1024):  # 1024 * 128^2 = 2^24: exact
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        out += (a[:, part].float() @ b[:, part].float().T).int()
    return out


def has_exact_int8() -> bool:
    """Whether `torch._int_mm` is exact here; tried once per process, thread count and oneDNN setting (10 ms)."""
    return _try_int8(torch.get_num_threads(), torch.backends.mkldnn.enabled)


@functools.cache
def _try_int8(n_threads: int, with_onednn: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    for n, d, m in TRIED_SHAPES:
        a, b = (torch.randint(-128, 128, (rows, d), dtype=torch.int8, generator=generator) for rows in (n, m))
        a[0], b[0] = -128, -128  # the largest sum there is
        a[-1, ::2] = 127
        try:
            found = torch._int_mm(a, b.T)
        except (AttributeError, RuntimeError):  # a private name, and not every build has the kernel
            return False
        if not torch.equal(found.double(), a.double() @ b.double().T):
            return False
    return True


def largest_places(sizes: Float[Tensor, "n_rows n"], k: int) -> tuple[Int[Tensor, "n_rows k"], Float[Tensor, "n_rows"]]:
    """Places of each row's k largest entries, unsorted, and an upper bound of the row's other entries.

    On CPU size and place share a 32-bit key, the size in its upper bits, and numpy's vectorized partition selects among
    the keys; a top-k of (size, place) pairs costs several times as much. Sizes with the same upper bits count as equal;
    the bound allows for that.

    >>> places, bound = largest_places(torch.tensor([[3.0, -1.0, 2.0]]), 1)
    >>> places.tolist(), 3 <= float(bound) < 3.01
    ([[0]], True)
    """
    n = sizes.shape[1]
    low, high = sizes.aminmax()
    largest = torch.maximum(-low, high)
    place_bits = (n - 1).bit_length()
    if sizes.device.type != "cpu" or k == n or place_bits > 14 or not torch.isfinite(largest):
        best = sizes.topk(k, dim=1, sorted=False)
        return best.indices, best.values.amin(1)
    levels = (2 ** (30 - place_bits) - 1) / largest.clamp(min=1e-30)
    keys = torch.add(torch.arange(n, dtype=torch.int32), (sizes * levels).int(), alpha=2**place_bits)
    keys.numpy().partition(n - k, axis=1)  # in place
    kept = keys[:, n - k :]
    return (kept & (2**place_bits - 1)).long(), ((kept[:, 0] >> place_bits) + 1) / levels


def largest_first(sizes: Float[Tensor, "*batch n"], k: int) -> Int[Tensor, "*batch k"]:
    """Places of each row's k largest entries, largest first; of equal entries the lowest place.

    `torch.topk` alone breaks ties arbitrarily: by processor, length of the row, and k.

    >>> largest_first(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3)
    tensor([1, 3, 0])
    """
    flat = sizes.reshape(-1, sizes.shape[-1])
    best = flat.topk(min(k + 1, flat.shape[1]), dim=1)
    places = best.indices[:, :k].contiguous()
    tied = (best.values[:, 1:] == best.values[:, :-1]).any(1).nonzero()[:, 0]
    for rows in torch.split(tied, 256):
        part, last = flat[rows], best.values[rows, k - 1 : k]
        above, equal = ~(part <= last), part == last  # so that NaN, the largest for `topk`, is above
        members = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        within = members.nonzero()[:, 1].view(-1, k)
        order = part.gather(1, within).sort(dim=1, descending=True, stable=True).indices
        places[rows] = within.gather(1, order)
    return places.view(*sizes.shape[:-1], k)


def first_largest(sizes: Float[Tensor, "n"], k: int) -> Int[Tensor, "k"]:
    """Places of the k largest entries, ascending; of equal entries the first.

    >>> first_largest(torch.tensor([1.0, 2.0, 1.0, 2.0]), 3)
    tensor([0, 1, 3])
    """
    if k >= len(sizes):
        return torch.arange(len(sizes), device=sizes.device)
    if k < 1:
        return torch.arange(0, device=sizes.device)
    floor = sizes.topk(k, sorted=False).values.amin()
    places = (~(sizes < floor)).nonzero()[:, 0]  # NaN is the largest for `topk`
    equal = (sizes[places] == floor).nonzero()[:, 0]
    keep = torch.ones_like(places, dtype=torch.bool)
    keep[equal[len(equal) - (len(places) - k) :]] = False
    return places[keep]


class _Kept(threading.local):
    """Buffers of this thread by name, dtype and device; each as large as the largest requested so far."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_KEPT = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized buffer, which the next call with the same name, dtype and device in this thread reuses.

    Do not keep the result beyond that call.

    Args:
        name: what the buffer is for; buffers of different names never share memory.
        shape: shape of the result.
        dtype: dtype of the result.
        device: device of the result.

    >>> scratch("example", (2, 3), torch.float32, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    key, size = (name, dtype, device), math.prod(shape)
    if key not in _KEPT.buffers or _KEPT.buffers[key].numel() < size:
        _KEPT.buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return _KEPT.buffers[key][:size].view(shape)


class Screen:
    """Approximate `u = x W^T + bias`, or |u|, in chunks of rows and blocks of latents.

    Args:
        W: encoder, one row per latent.
        bias: encoder bias.
        precision: dtype of the product.
        signed: whether |u| is returned.
        like: rows similar to those to be screened, from which int8 takes the scale of each dimension; without them
            dimensions are not rescaled.
    """

    def __init__(
        self,
        W: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, "d_sae"],
        precision: Precision,
        signed: bool,
        like: Float[Tensor, "n_rows d_in"] | None = None,
    ) -> None:
        self.signed, self.precision = signed, precision
        self.width = BLOCK if W.shape[0] % BLOCK == 0 else 1
        self.n_blocks = W.shape[0] // self.width
        self.d_sae = W.shape[0]
        self.latents = torch.arange(W.shape[0], device=W.device)
        self.step = W.new_ones(W.shape[0])
        self.typical_norm = W.new_ones(())
        self.balance: Tensor | None = None
        if precision == "int8":
            self.balance = None if like is None else balance_dimensions(like, W)
            self._quantize(W, bias)
        else:
            dtype = torch.bfloat16 if precision == "bfloat16" else W.dtype
            self.W, self.bias = W.to(dtype), bias.to(dtype)
        by_block = self.step.view(self.width, self.n_blocks)
        self.largest_step, self.smallest_step = by_block.amax(0), by_block.amin(0)
        self.step_by_block = by_block.T.contiguous()

    def _quantize(self, W: Tensor, bias: Tensor) -> None:
        """Quantise W to int8, latents of similar step in one block; the latent at place p is in block p % n_blocks.

        The bias becomes one more input dimension, scaled so that the weights' range does not change.
        """
        sample = W[::BLOCK] if self.balance is None else W[::BLOCK] * self.balance
        self.typical_norm = torch.linalg.vector_norm(sample, dim=1).square().mean().sqrt()
        largest = torch.maximum(sample.amax(), -sample.amin()).clamp(min=1e-30)
        self.one = float((bias.abs().amax() / largest).clamp(min=1e-6))
        quantized, step = quantize_rows(W, bias.unsqueeze(1) / self.one, self.balance)
        by_step = step.squeeze(1).argsort()
        self.latents = by_step.view(self.n_blocks, self.width).T.flatten()
        self.step = step[self.latents, 0]
        self.W = scratch("weights", tuple(quantized.shape), torch.int8, W.device)
        torch.index_select(quantized, 0, self.latents, out=self.W)

    def chunks(self, x: Float[Tensor, "n_rows d_in"]) -> Iterator["ScreenedRows"]:
        """Iterator over the screened rows of x, in order; each chunk is overwritten by the next."""
        if self.precision == "int8":
            ones = x.new_full((x.shape[0], 1), self.one)
            x = x if self.balance is None else x / self.balance
            norm = torch.linalg.vector_norm(x, dim=1)
            x, scale = quantize_rows(x, ones)
            # both factors are off by up to half a step in each dimension
            noise = torch.hypot(scale[:, 0] * self.typical_norm, norm * self.step.square().mean().sqrt()) / 12**0.5
        else:
            scale, noise = x.new_ones(x.shape[0], 1), torch.linalg.vector_norm(x, dim=1)
        dtype = torch.int32 if self.precision == "int8" else self.W.dtype
        buffer = scratch("product", (min(SCAN_ROWS, len(x)), len(self.W)), dtype, x.device)
        for start in range(0, len(x), SCAN_ROWS):
            rows = slice(start, min(start + SCAN_ROWS, len(x)))
            sizes = self.multiply(x[rows], buffer[: rows.stop - start])
            yield ScreenedRows(self, rows, sizes.abs_() if self.signed else sizes, scale[rows], noise[rows])

    def top(
        self, x: Float[Tensor, "n_rows d_in"], n: int
    ) -> tuple[Float[Tensor, "n_rows n"], Int[Tensor, "n_rows n"], Float[Tensor, "n_rows"], Float[Tensor, "n_rows"]]:
        """Sizes and latents of each row's n largest; an upper bound of the other sizes; and the noise of each row."""
        if self.precision != "int8" and n < MOST_MERGED and use_triton(x, self.W):
            from saelab.functional import triton_kernels

            return *triton_kernels.screen_topk(x, self.W, self.bias, n, self.signed), torch.linalg.vector_norm(x, dim=1)
        parts = zip(*(chunk.top(n) for chunk in self.chunks(x)), strict=True)
        sizes, latents, unseen, noise = (torch.cat(part) for part in parts)
        return sizes, latents, unseen, noise

    def above(self, x: Float[Tensor, "n_rows d_in"], floor: Float[Tensor, ""]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, latents and sizes of the entries at or above `floor`, row by row; and the noise of each row."""
        parts = zip(*(chunk.above(floor) for chunk in self.chunks(x)), strict=True)
        rows, latents, sizes, noise = (torch.cat(part) for part in parts)
        return rows, latents, sizes, noise

    def multiply(self, x: Tensor, out: Tensor) -> Tensor:
        """The product `x W^T + bias` in low precision, before scaling, written into `out`."""
        if self.precision == "int8":
            return multiply_int8(x, self.W, out=out)
        return torch.addmm(self.bias, x.to(self.W.dtype), self.W.T, out=out)


class ScreenedRows:
    """One chunk of screened rows.

    Args:
        screen: the screen that the rows passed.
        rows: which rows of the batch.
        sizes: (chunk, d_sae) products in low precision, by place.
        scale: factor of each row that turns them into values of u.
        noise: typical error of each row: a token a hundred times as large is screened with errors a hundred times as
            large.
    """

    def __init__(
        self,
        screen: Screen,
        rows: slice,
        sizes: Tensor,
        scale: Float[Tensor, "chunk 1"],
        noise: Float[Tensor, "chunk"],
    ) -> None:
        self.screen, self.rows, self.sizes, self.scale, self.noise = screen, rows, sizes, scale, noise
        largest = sizes.view(-1, screen.width, screen.n_blocks).amax(1)
        # upper bounds of every size in the block, up to the scale; with |u| none is negative
        step = screen.largest_step
        self.bounds = largest * (step if screen.signed else torch.where(largest > 0, step, screen.smallest_step))

    def top(self, n: int) -> tuple[Float[Tensor, "chunk n"], Int[Tensor, "chunk n"], Float[Tensor, "chunk"], Tensor]:
        """Sizes and latents of each row's n largest, unsorted; an upper bound of the other sizes; and the noise."""
        screen = self.screen
        if 4 * n > screen.n_blocks:  # blocks would narrow nothing down
            sizes = self.sizes * screen.step
            places, unseen = largest_places(sizes, n)
            return sizes.gather(1, places) * self.scale, screen.latents[places], unseen * self.scale[:, 0], self.noise
        blocks, unseen_blocks = largest_places(self.bounds, n)
        inside = self.sizes.view(-1, screen.width, screen.n_blocks)
        inside = inside.gather(2, blocks.unsqueeze(1).expand(-1, screen.width, -1)).transpose(1, 2)
        sizes = (inside * embedding(blocks, screen.step_by_block)).flatten(1)
        best, unseen = largest_places(sizes, n)
        within, block = best & (screen.width - 1), best >> (screen.width.bit_length() - 1)  # widths are powers of two
        places = within * screen.n_blocks + blocks.gather(1, block)
        unseen = torch.maximum(unseen_blocks, unseen) * self.scale[:, 0]
        return sizes.gather(1, best) * self.scale, screen.latents[places], unseen, self.noise

    def above(self, floor: Float[Tensor, ""]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of the batch, latents and sizes of the entries at or above `floor`, row by row; and the rows' noise."""
        limit = floor / self.scale
        row, block = (self.bounds >= limit).nonzero(as_tuple=True)
        blocks = self.sizes.view(-1, self.screen.width, self.screen.n_blocks)
        inside = torch.arange(self.screen.width, device=row.device) * self.screen.n_blocks + block.unsqueeze(1)
        sizes = blocks[row, :, block] * self.screen.step[inside]
        hit, place = (sizes >= limit[row]).nonzero(as_tuple=True)
        row = row[hit]
        latents = self.screen.latents[inside[hit, place]]
        return row + self.rows.start, latents, sizes[hit, place] * self.scale[row, 0], self.noise


def balance_dimensions(x: Float[Tensor, "n d"], W: Float[Tensor, "m d"]) -> Float[Tensor, "d"]:
    """The factor by which dimensions of W are multiplied and those of x divided to have similar scale; from every nth
    row.
    """
    of_x = torch.linalg.vector_norm(x[:: max(1, len(x) // 256)], dim=0)
    of_W = torch.linalg.vector_norm(W[:: max(1, len(W) // 1024)], dim=0)
    ratio = of_x / of_W
    return torch.where(ratio.isfinite() & (ratio > 0), ratio.sqrt(), torch.ones_like(ratio))


def quantize_rows(
    x: Float[Tensor, "n d"], last: Float[Tensor, "n 1"], scale: Float[Tensor, "d"] | None = None
) -> tuple[Int8[Tensor, "n d_1"], Float[Tensor, "n 1"]]:
    """Rows of `[x * scale, last]` quantized to int8, and each row's step: `~ q * step`, `step = max|.| / 127`.

    The int8 tensor is a scratch buffer, overwritten by the next call.

    >>> quantize_rows(torch.tensor([[1.0, -2.54]]), torch.tensor([[0.5]]))
    (tensor([[  50, -127,   25]], dtype=torch.int8), tensor([[0.0200]]))
    """
    q = scratch("quantized", (x.shape[0], x.shape[1] + 1), torch.int8, x.device)
    step = last.abs()
    for start in range(0, x.shape[0], 256):  # by pieces that fit the cache
        rows = slice(start, start + 256)
        part = x[rows] if scale is None else x[rows] * scale
        largest = torch.maximum(part.amax(1, keepdim=True), -part.amin(1, keepdim=True))
        step[rows] = torch.maximum(largest, step[rows]).clamp(min=1e-30) / 127
        q[rows, :-1] = (part * step[rows].reciprocal()).round_()
    q[:, -1:] = (last / step).round_()
    return q, step


def choose_precision(d_in: int, d_sae: int, device: torch.device) -> Precision:
    """The fastest precision for screening on this device, from the processor's instructions or a short measurement.

    Small products stay in float32, where a screen saves nothing. The choice changes the speed only, never the result.
    """
    if d_in * d_sae < 2**22:
        return "float32"
    if device.type == "cuda":
        return "bfloat16"
    return _fastest_on_cpu(torch.get_num_threads()) if device.type == "cpu" else "float32"


@functools.lru_cache
def _fastest_on_cpu(n_threads: int) -> Precision:
    """Int8 where its kernel is exact and the processor has instructions for it; elsewhere the fastest measured."""
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch in use
    fast = any(able.get(name) for name in INT8_INSTRUCTIONS)
    return "int8" if fast and has_exact_int8() else _measure_precisions()


def _measure_precisions() -> Precision:
    """The fastest precision by timing one product in each that is accurate here, best of many rounds (0.3 s); low
    precision must win by a third.

    On a busy machine even that can be wrong, and the wrong choice slows a whole run: where the processor reports its
    instructions, those decide instead.
    """
    x, W = torch.ones(256, 768), torch.ones(4096, 768)
    low_x, low_W, int_x, int_W = x.bfloat16(), W.bfloat16(), x.to(torch.int8), W.to(torch.int8)
    products: dict[Precision, Callable[[], Tensor]] = {"float32": lambda: x @ W.T}
    if _rounds_once():
        products["bfloat16"] = lambda: low_x @ low_W.T
    if has_exact_int8():
        products["int8"] = lambda: multiply_int8(int_x, int_W)
    handicap = {"float32": 1 / 1.5, "bfloat16": 1.1, "int8": 1.0}
    seconds = dict.fromkeys(products, float("inf"))
    for i in range(ROUNDS):
        for name, product in products.items():
            if i < 2 or seconds[name] < 4 * min(seconds.values()):  # what is hopeless need not be timed well
                seconds[name] = min(seconds[name], _time(product))
    return min(seconds, key=lambda name: seconds[name] * handicap[name])


def _rounds_once() -> bool:
    """Whether bfloat16 products sum in float32 here, so that only their result is rounded (to 2^-9 of itself)."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 769, generator=generator).bfloat16() for n in (17, 33))
    exact = x.double() @ W.double().T
    return bool(((x @ W.T).double() - exact).abs().le(2**-8 * exact.abs() + 1e-3).all())


def _time(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
