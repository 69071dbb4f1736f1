"""Latent scaling: how strong a latent of a crosscoder is in either of two sources, with standard errors.

Strengths are regressions on the latent's codes (arXiv:2504.02922). Their errors come from the jackknife: tokens of a
document depend on each other, and so blocks of whole documents are left out one by one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.sparse_products import Entries, sampled_dot, weight_gradient
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations

PART = 4096  # rows encoded at a time
BLOCKS = 100  # of rows, left out one by one
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Ratios:
    """Of each latent what the source of the smaller decoder norm has, over what that of the larger has; NaN where the
    latter has nothing, or less.
    """

    stronger: Int[Tensor, "d_sae"]
    """the source of the larger norm, 0 or 1"""
    norm: Float[Tensor, "d_sae"]
    """of the decoder rows; 0 where both are 0"""
    error: Float[Tensor, "d_sae"]
    """strengths in what the reconstruction misses and the latent's own row"""
    reconstruction: Float[Tensor, "d_sae"]
    """strengths in the reconstruction alone"""
    surplus: Float[Tensor, "d_sae"]
    """strength in the activations of the stronger source, less that in the weaker one's, in units of the stronger's
    row: a difference, no ratio
    """
    free: Float[Tensor, "d_sae"]
    """as `error`, in whatever direction each is largest"""

    @classmethod
    def measure(
        cls, sae: SAE, found: "CodeSums", norms: Float[Tensor, "2 d_sae"], columns: list[slice], same_space: bool
    ) -> "Ratios":
        """The ratios of two sources.

        Args:
            sae: the crosscoder.
            found: sums over tokens.
            norms: norms of the decoder rows of both.
            columns: columns of each.
            same_space: whether a direction of one is one of the other.
        """
        stronger = norms.argmax(0)
        row = _stronger_rows(sae, stronger, columns) if same_space else None
        slopes = found.slopes(sae, columns)
        error, rebuilt, whole = (torch.stack([_strength(one, found.spread, row) for one in pair]) for pair in slopes)
        free = torch.stack([_strength(one, found.spread, None) for one in slopes[0]])
        return cls(
            stronger=stronger,
            norm=_divide(norms, stronger).nan_to_num(),
            error=_divide(error, stronger),
            reconstruction=_divide(rebuilt, stronger),
            surplus=_subtract(whole, stronger) / norms.max(0).values.clamp(min=TINY),
            free=_divide(free, stronger),
        )


@dataclass(frozen=True, eq=False)
class RatioErrors:
    """Standard errors of `Ratios`, by the jackknife; NaN where one block of rows has all firings."""

    error: Float[np.ndarray, "d_sae"]
    reconstruction: Float[np.ndarray, "d_sae"]
    surplus: Float[np.ndarray, "d_sae"]
    freedom: Float[np.ndarray, "d_sae"]
    """degrees of freedom: number of blocks that the squared codes are spread over as evenly, less 1"""

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        sae: SAE,
        acts: Activations,
        found: "CodeSums",
        ratios: Ratios,
        norms: Float[Tensor, "2 d_sae"],
        columns: list[slice],
        same_space: bool,
    ) -> "RatioErrors":
        """The errors of two sources' ratios, from a second pass over the rows.

        In different spaces a strength is a norm, and its error that along the direction which all rows give.

        Args:
            sae: the crosscoder.
            acts: the activations that the ratios were measured on.
            found: sums over their tokens.
            ratios: the ratios.
            norms: norms of the decoder rows of both sources.
            columns: columns of each.
            same_space: whether a direction of one is one of the other.
        """
        row = _stronger_rows(sae, ratios.stronger, columns) if same_space else None
        whole = [[_whole(one, found.spread) for one in pair] for pair in found.slopes(sae, columns)]
        rows = [[one if row is None else row for one in pair] for pair in whole]
        rows = [[one / one.norm(dim=1, keepdim=True).clamp(min=TINY) for one in pair] for pair in rows]
        blocks = _Blocks.measure(sae, acts, columns, rows)
        own = [(row_m * sae.W_dec.detach()[:, part]).sum(1) for row_m, part in zip(rows[0], columns, strict=True)]
        errors = []
        for which in range(3):
            pair = torch.stack([blocks.slopes_without(which, m, rows[which][m]) for m in (0, 1)])
            if which == 0:
                pair = pair + torch.stack(own)[:, None]
            stronger = ratios.stronger.expand(pair.shape[1:])
            errors.append(_jackknife(_subtract(pair, stronger) if which == 2 else _divide(pair, stronger)))
        errors[2] /= norms.max(0).values.clamp(min=TINY)
        weights = blocks.squares
        even = weights.sum(0).square() / weights.square().sum(0).clamp(min=TINY)
        return cls(*(one.cpu().numpy() for one in (*errors, even - 1)))


@dataclass(eq=False)
class CodeSums:
    """Regressions on the codes of what reconstructions miss and of reconstructions, from sums over all rows."""

    n: int
    firings: Int[Tensor, "d_sae"]
    squares: Float[Tensor, "d_sae"]
    """sum of squared codes"""
    spread: Float[Tensor, "2 d_sae 1"]
    """sum of squared codes about their mean over all rows, in either half of the rows"""
    missed: Float[Tensor, "d_in"]
    """variance of what reconstructions miss"""
    variance: Float[Tensor, "d_in"]
    errors: Float[Tensor, "2 d_sae d_in"]
    """`sum (z - mean z) (e - mean e) / spread` in either half, e what reconstructions miss"""
    rebuilt: Float[Tensor, "2 d_sae d_in"]
    """the same of reconstructions"""

    @classmethod
    @torch.no_grad()
    def measure(cls, sae: SAE, acts: Activations) -> "CodeSums":
        """Sums over all rows; a half has the first or the second part of each batch."""
        d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=sae.device)

        products, sums = zeros(2, 2, d_sae, d_in), zeros(2, 2, d_in)
        codes_sum, squares, n_rows = zeros(2, d_sae), zeros(2, d_sae), zeros(2)
        firings, missed = torch.zeros(d_sae, dtype=torch.long, device=sae.device), zeros(d_in)
        x_sum, x_squares = zeros(d_in), zeros(d_in)
        for start in range(0, len(acts), PART):
            for half, part in enumerate(acts[start : start + PART].tensor_split(2)):
                target, codes = sae.center(part), sae.encode_sparse(part)
                found = codes.decode(sae.W_dec)
                error = target - found
                for which, rows in enumerate((error, found)):
                    products[which, half] += _product(codes, rows)
                    sums[which, half] += rows.sum(0)
                codes_sum[half].index_add_(0, codes.indices, codes.values.double())
                squares[half].index_add_(0, codes.indices, codes.values.double().square())
                firings += torch.bincount(codes.indices, minlength=d_sae)
                n_rows[half] += len(part)
                missed += error.double().square().sum(0)
                x_sum, x_squares = x_sum + target.sum(0), x_squares + target.square().sum(0)
        n, code_mean, means = len(acts), codes_sum.sum(0) / len(acts), sums.sum(1) / len(acts)
        spread = squares - 2 * code_mean * codes_sum + n_rows[:, None] * code_mean.square()
        spread = spread.clamp(min=TINY)[:, :, None]
        for which, mean in enumerate(means):
            for half in (0, 1):
                rest = sums[which, half] - n_rows[half] * mean
                products[which, half] -= torch.outer(code_mean, rest) + torch.outer(codes_sum[half], mean)
        return cls(
            n=n,
            firings=firings,
            squares=squares.sum(0),
            spread=spread,
            missed=missed / n - means[0].square(),
            variance=x_squares / n - (x_sum / n).square(),
            errors=products[0] / spread,
            rebuilt=products[1] / spread,
        )

    def slopes(self, sae: SAE, columns: list[slice]) -> list[list[Float[Tensor, "2 d_sae d"]]]:
        """Of two sources the slopes of `Ratios.error`, of reconstructions and of activations, in either half."""
        W_dec = sae.W_dec.detach()
        return [
            [self.errors[..., part] + W_dec[:, part] for part in columns],
            [self.rebuilt[..., part] for part in columns],
            [self.errors[..., part] + self.rebuilt[..., part] for part in columns],
        ]


@dataclass(eq=False)
class _Blocks:
    """Sums over each block of rows, of which regressions with a block left out are made."""

    n_rows: Float[Tensor, "n_blocks 1"]
    codes: Float[Tensor, "n_blocks d_sae"]
    squares: Float[Tensor, "n_blocks d_sae"]
    products: Float[Tensor, "n_blocks 3 2 d_sae"]
    """codes times what is regressed (see `Ratios`) along the row of each source"""
    sums: list[list[Tensor]]
    """(n_blocks, d) what is regressed, of each source"""

    @classmethod
    def measure(cls, sae: SAE, acts: Activations, columns: list[slice], rows: list[list[Tensor]]) -> "_Blocks":
        starts = cut_blocks(len(acts), None if acts.doc_ids is None else acts.doc_ids.numpy())
        n, d_sae = len(starts) - 1, sae.cfg.d_sae

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n, *shape, dtype=torch.float64, device=sae.device)

        codes_sum, squares, products = zeros(d_sae), zeros(d_sae), zeros(3, 2, d_sae)
        sums = [[zeros(part.stop - part.start) for part in columns] for _ in range(3)]
        rows = [[one.float() for one in pair] for pair in rows]
        for block, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            for start in range(first, last, PART):
                part = acts[start : min(last, start + PART)]
                target, codes = sae.center(part), sae.encode_sparse(part)
                found, z = codes.decode(sae.W_dec), codes.values.double()
                codes_sum[block].index_add_(0, codes.indices, z)
                squares[block].index_add_(0, codes.indices, z.square())
                for which, whole in enumerate((target - found, found, target)):
                    for m, of_source in enumerate(columns):
                        values = whole[:, of_source].contiguous()
                        along = sampled_dot(codes.rows, codes.indices, values, rows[which][m])
                        products[block, which, m].index_add_(0, codes.indices, z * along.double())
                        sums[which][m][block] += values.double().sum(0)
        n_rows = torch.from_numpy(np.diff(starts)).to(codes_sum)[:, None]
        return cls(n_rows, codes_sum, squares, products, sums)

    def slopes_without(self, which: int, m: int, row: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n_blocks d_sae"]:
        """Slopes with each block left out, of one thing and one source along a direction."""
        n, codes, squares, products, along = (
            one.sum(0) - one
            for one in (self.n_rows, self.codes, self.squares, self.products[:, which, m], self.sums[which][m] @ row.T)
        )
        n = n.clamp(min=1)
        spread = squares - codes.square() / n
        # a block with all firings leaves nothing
        return torch.where(spread > 0, (products - codes * along / n) / spread, torch.nan)


def cut_blocks(n: int, doc_ids: Shaped[np.ndarray, "n"] | None, n_blocks: int = BLOCKS) -> Int[np.ndarray, "m"]:
    """Where blocks of about equally many rows begin, and their end: at borders of documents where these are near.

    Args:
        n: number of rows.
        doc_ids: document of each row, or None.
        n_blocks: most blocks.

    >>> cut_blocks(12, np.repeat([0, 1, 2], [3, 4, 5]), 3).tolist(), cut_blocks(4, None, 2).tolist()
    ([0, 3, 7, 12], [0, 2, 4])
    """
    cuts = np.linspace(0, n, min(n, n_blocks) + 1).round().astype(np.int64)
    if doc_ids is not None and len(borders := np.flatnonzero(np.diff(doc_ids)) + 1):
        after = borders.searchsorted(cuts).clip(max=len(borders) - 1)
        before = (after - 1).clip(min=0)
        near = np.where(cuts - borders[before] < borders[after] - cuts, borders[before], borders[after])
        cuts = np.where(2 * np.abs(near - cuts) * n_blocks <= n, near, cuts)
        cuts[0], cuts[-1] = 0, n
    return np.unique(cuts)


def _stronger_rows(sae: SAE, stronger: Int[Tensor, "d_sae"], columns: list[slice]) -> Float[Tensor, "d_sae d"]:
    a, b = (sae.W_dec.detach().double()[:, part] for part in columns)
    return torch.where((stronger == 0)[:, None], a, b)


def _whole(halves: Float[Tensor, "2 d_sae d"], spread: Float[Tensor, "2 d_sae 1"]) -> Float[Tensor, "d_sae d"]:
    return (halves * spread).sum(0) / spread.sum(0)


def _strength(
    halves: Float[Tensor, "2 d_sae d"], spread: Float[Tensor, "2 d_sae 1"], row: Float[Tensor, "d_sae d"] | None
) -> Float[Tensor, "d_sae"]:
    """Length of regressions along a direction; without one, their norm from the product of the two halves, whose noise
    is independent.
    """
    if row is None:
        return (halves[0] * halves[1]).sum(1).clamp(min=0).sqrt()
    return (_whole(halves, spread) * row).sum(1) / row.norm(dim=1).clamp(min=TINY)


def _divide(values: Float[Tensor, "2 *d_sae"], stronger: Int[Tensor, "*d_sae"]) -> Float[Tensor, "*d_sae"]:
    """Values of the weaker source over those of the stronger; NaN where these are not above 0."""
    below, above = values.gather(0, 1 - stronger[None])[0], values.gather(0, stronger[None])[0]
    return torch.where(above > 0, below / above.clamp(min=TINY), torch.nan)


def _subtract(values: Float[Tensor, "2 *d_sae"], stronger: Int[Tensor, "*d_sae"]) -> Float[Tensor, "*d_sae"]:
    """Values of the stronger source less those of the weaker one."""
    return values.gather(0, stronger[None])[0] - values.gather(0, 1 - stronger[None])[0]


def _jackknife(without: Float[Tensor, "n_blocks d_sae"]) -> Float[Tensor, "d_sae"]:
    """Standard error of a number from its values with each block left out."""
    n = len(without)
    return ((without - without.mean(0)).square().sum(0) * ((n - 1) / n)).sqrt() if n > 1 else without[0] * torch.nan


def _product(codes: SparseCodes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """z^T rows."""
    entries = Entries(codes.indices, codes.rows, codes.offsets).with_columns(codes.d_sae)
    return weight_gradient(entries, codes.values, rows.contiguous(), codes.d_sae).double()
