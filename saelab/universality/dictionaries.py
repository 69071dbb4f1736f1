"""Geometry and usage of one dictionary: rank, coherence, distance to the data, firing density and energy."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.metrics import FiringSums, ReconstructionSums, effective_rank, exact
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.features import FeatureStore
from saelab.stores.results import Result

PART = 4096
"""Tokens encoded at a time."""
BLOCK_CELLS = 2**23  # cosines held at a time


@dataclass(frozen=True, kw_only=True)
class DictionaryFigures(Result):
    """Geometry of a dictionary D with rows d_i of unit length (arXiv:2502.12892, appendix)."""

    stable_rank: float
    """`||D||_F^2 / ||D||_2^2`, 1 to d_in: small where rows lean towards one direction"""
    effective_rank: float
    """exp of the entropy of the singular values' shares, 1 to d_in"""
    coherence: float
    """`max_{i != j} |<d_i, d_j>|`, 0 to 1; one pair of equal rows makes it 1"""
    crowding: float
    """`mean_i max_{j != i} |<d_i, d_j>|`, 0 to 1"""
    ood: float
    """`1 - mean_i max_t cos(d_i, x_t)`, out-of-distribution score: lower is nearer to the data, and it falls with the
    number of tokens; NaN without data"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Usage(Result):
    """How often and how strongly a dictionary's features fire on some tokens."""

    n_tokens: int
    fvu: float
    """NaN where only codes are known"""
    density: Float[np.ndarray, "d_sae"]
    """share of tokens on which each feature fires"""
    energy: Float[np.ndarray, "d_sae"]
    """mean of `z^2 ||W_dec||^2` for each feature: the squared size of its contribution to the reconstruction"""

    @property
    def dead_frac(self) -> float:
        """Share of features that fire on no token."""
        return float((self.density == 0).mean())


@torch.no_grad()
def measure_directions(
    rows: Float[Tensor, "d_sae d_in"], x: Float[Tensor, "n_tokens d_in"] | None = None, signed: bool = False
) -> DictionaryFigures:
    """Ranks and coherence of a dictionary's directions and, with centred activations `x`, the out-of-distribution
    score.

    Cosines with activations count by size where codes are signed. No d_sae x d_sae matrix is held.

    >>> found = measure_directions(torch.eye(4), torch.eye(4)[:2])
    >>> found.stable_rank, found.effective_rank, found.coherence, found.ood
    (4.0, 4.0, 0.0, 0.5)
    """
    rows = _unit(rows.float().cpu())
    squares = torch.linalg.eigvalsh(exact(rows).T @ exact(rows)).clamp(min=0)
    beside = _largest_cosines(rows, rows, signed=True, itself=False)
    near = None if x is None else _largest_cosines(rows, _unit(x.float().cpu()), signed, itself=True)
    return DictionaryFigures(
        stable_rank=round(float(squares.sum() / squares[-1]), 6),
        effective_rank=effective_rank(squares.sqrt()),
        coherence=float(beside.max()),
        crowding=float(beside.mean()),
        ood=math.nan if near is None else 1 - float(near.double().mean()),
    )


def measure_usage(sae: SAE, acts: Activations) -> Usage:
    """FVU, firing density and energy of an SAE's features on activations."""
    sums, fires = ReconstructionSums(sae.cfg.d_in), FiringSums(sae.cfg.d_sae)
    squares = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, acts.n_tokens, PART):
            x = acts[start : start + PART].to(sae.W_enc)
            codes = sae.encode_sparse(x)
            sums.add(x, sae.decode(codes, x=x))
            fires.add(codes)
            squares.index_add_(0, codes.indices.cpu(), exact(codes.values).cpu().square())
    return _usage(sae, fires.firings, squares, acts.n_tokens, sums.fvu)


def read_usage(sae: SAE, store: FeatureStore) -> Usage:
    """Firing density and energy of an SAE's features, from the store that was harvested with it; FVU is NaN."""
    seen = store.statistics
    return _usage(sae, torch.from_numpy(seen.fires.sum(1)), torch.from_numpy(seen.squares.sum(1)), len(store), math.nan)


def _usage(sae: SAE, fires: Int[Tensor, "d_sae"], squares: Float[Tensor, "d_sae"], n: int, fvu: float) -> Usage:
    lengths = exact(sae.W_dec).cpu().square().sum(1)
    energy = squares.double() * lengths / max(1, n)
    return Usage(n_tokens=n, fvu=fvu, density=(fires.double() / max(1, n)).numpy(), energy=energy.numpy())


def _unit(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _largest_cosines(
    rows: Float[Tensor, "d_sae d_in"], others: Float[Tensor, "n d_in"], signed: bool, itself: bool
) -> Float[Tensor, "d_sae"]:
    """The largest cosine (|cosine| where signed) of each row with the others; with `itself`, its own index too."""
    step = max(1, BLOCK_CELLS // len(others))
    found = []
    for start in range(0, len(rows), step):
        cosines = rows[start : start + step] @ others.T
        cosines = cosines.abs_() if signed else cosines
        if not itself:
            cosines.diagonal(start).fill_(-1.0 if len(others) > 1 else 0.0)
        found.append(cosines.amax(1))
    return torch.cat(found).clamp(max=1.0)
