"""Does an SAE find the features of a planted world? Directions, firing and codes against the truth."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.metrics import FiringSums, ReconstructionSums
from saelab.sae.baselines import check_baselines
from saelab.sae.initialization import make_untrained
from saelab.sae.sae import SAE
from saelab.stores.packing import as_csr
from saelab.stores.results import Result, format_table
from saelab.synthetic.planted import PlantedWorld
from saelab.universality.matching import assign
from saelab.universality.nearest import find_nearest
from saelab.universality.similarity import cosine_blocks

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PART = 4096  # tokens at a time
ALL_PAIRS = 2**24  # pairs of a latent and a feature up to which the assignment considers all of them
CANDIDATES = 32  # nearest ones of either side that it considers beyond that
FOUND = 0.9  # |cosine| from which a feature's direction counts as found
MIN_COUNT = 10  # fewest firings of a feature whose firing is scored


@dataclass(frozen=True, kw_only=True)
class Recovery(Result):
    """How well one dictionary recovers a planted world, on `n_tokens` tokens that it was not trained on.

    Latents and features are paired one to one so that the sum of |cosines| of their directions is largest. Firing of a
    feature is compared with that of its latent; a feature without one counts as never detected.
    """

    mcc: float
    """mean |cosine| of the pairs: the mean correlation coefficient of the directions, 0 to 1"""
    found: float
    """share of features whose latent has |cosine| above 0.9"""
    uniqueness: float
    """number of features that are some latent's nearest, over the number of latents; 1 where no two share one"""
    precision: float
    """share of a latent's firings on which its feature fires, mean over features"""
    recall: float
    """share of a feature's firings on which its latent fires, mean over features"""
    f1: float
    """harmonic mean of the two, mean over features"""
    fvu: float
    """fraction of variance unexplained"""
    l0: float
    """features that fire on a token, by the SAE"""
    true_l0: float
    """and in the world"""
    dead_frac: float
    """share of latents that never fire"""
    shrinkage: float
    """mean norm of the reconstruction over the mean norm of the activation, both without the SAE's bias"""
    n_features: int
    """features that fire at least 10 times; others are left out of precision, recall and F1"""
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class RecoveryTable(Result):
    """Recovery by a dictionary and by its baselines on the same tokens."""

    rows: Mapping[str, Recovery]
    """by name, the dictionary asked for first"""

    def __getitem__(self, name: str) -> Recovery:
        return self.rows[name]

    def __str__(self) -> str:
        names = ["mcc", "found", "uniqueness", "precision", "recall", "f1", "fvu", "l0", "dead_frac", "shrinkage"]
        lines = [["", *names]]
        lines += [[name, *(f"{getattr(row, each):.3g}" for each in names)] for name, row in self.rows.items()]
        first = next(iter(self.rows.values()))
        about = f"{first.n_tokens:,} tokens, true L0 {first.true_l0:.3g}, {first.n_features:,} features scored"
        return "\n".join([about, *format_table(lines)])


def score_recovery(
    sae: SAE,
    world: PlantedWorld,
    *,
    n_tokens: int = 50_000,
    seed: int = 1_000_003,
    baselines: Mapping[str, SAE] | None = None,
) -> RecoveryTable:
    """How many features of a planted world a dictionary has found, next to an untrained one of the same configuration.

    The row "untrained" has the directions that training starts from: random ones, what chance gives for so many
    latents.

    Args:
        sae: the SAE.
        world: the world it was trained on.
        n_tokens: tokens to measure on.
        seed: of these tokens; another one than that of the training batches.
        baselines: further SAEs by name, such as those of `fit_baselines`, or one with the planted directions.

    Raises:
        ValueError: where the widths differ, or a baseline has the name of another row.

    >>> from saelab.synthetic import PlantedConfig, PlantedWorld
    >>> world = PlantedWorld(PlantedConfig(n_features=32, d_in=16, l0=2.0, n_roots=0))
    >>> sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=32, activation=sl.TopK(k=2)), seed=0)
    >>> score_recovery(sae, world, n_tokens=1000)["SAE"].n_tokens
    1000
    """
    if sae.cfg.d_in != world.cfg.d_in or sae.cfg.d_out is not None:
        raise ValueError(f"`sae` must be an autoencoder of the world's d_in ({world.cfg.d_in}), got {sae}.")
    check_baselines(baselines or {}, sae.cfg, ("SAE", "untrained"))
    sample, _ = world.sample(min(n_tokens, 8_192), (seed, 0, 0))
    rows = {"SAE": sae, "untrained": make_untrained(sae, sample), **(baselines or {})}
    return RecoveryTable(rows={name: _score(each, world, n_tokens, seed) for name, each in rows.items()})


@torch.no_grad()
def _score(sae: SAE, world: PlantedWorld, n_tokens: int, seed: int) -> Recovery:
    latent_of, cosine, uniqueness = _pair(sae.directions().float().cpu(), world.directions)
    sums, fires = ReconstructionSums(world.cfg.d_in), FiringSums(sae.cfg.d_sae)
    hits, true, detected = (np.zeros(world.cfg.n_features, np.int64) for _ in range(3))
    sizes = np.zeros(2)
    none = sae.W_dec.new_zeros(1, sae.cfg.d_sae)
    constant = sae.decode(none, x=None).float().cpu() if _is_fixed(sae) else 0.0
    for number, start in enumerate(range(0, n_tokens, PART)):
        x, planted = world.sample(min(PART, n_tokens - start), (seed, number))
        codes = sae.encode_sparse(x.to(sae.device))
        x_hat = sae.decode(codes, x=x.to(sae.device)).float().cpu()
        sums.add(x, x_hat)
        fires.add(codes)
        sizes += [float((x_hat - constant).norm(dim=1).sum()), float((x - constant).norm(dim=1).sum())]
        found = _count(codes, planted, latent_of)
        hits, true, detected = hits + found[0], true + found[1], detected + found[2]
    scored = true >= MIN_COUNT
    with np.errstate(invalid="ignore"):
        precision = np.where(detected > 0, hits / np.maximum(detected, 1), 0.0)[scored]
        recall = (hits / np.maximum(true, 1))[scored]
        f1 = (2 * hits / np.maximum(true + detected, 1))[scored]
    l0 = float(fires.firings.sum()) / n_tokens
    return Recovery(
        mcc=float(cosine.sum() / min(world.cfg.n_features, sae.cfg.d_sae)),
        found=float((cosine > FOUND).mean()),
        uniqueness=uniqueness,
        precision=_mean(precision),
        recall=_mean(recall),
        f1=_mean(f1),
        fvu=sums.fvu,
        l0=l0,
        true_l0=float(true.sum()) / n_tokens,
        dead_frac=float((fires.firings == 0).double().mean()),
        shrinkage=float(sizes[0] / sizes[1]) if sizes[1] else math.nan,
        n_features=int(scored.sum()),
        n_tokens=n_tokens,
    )


def _is_fixed(sae: SAE) -> bool:
    """Whether zero codes are decoded to the same activation for every token."""
    return sae.cfg.normalizer not in ("token_norm", "layer_norm")


def _pair(
    rows: Float[Tensor, "d_sae d_in"], directions: Float[Tensor, "n_features d_in"]
) -> tuple[Int[np.ndarray, "n_features"], Float[np.ndarray, "n_features"], float]:
    """Latent of each feature (-1 for none), the |cosine| of the two, and `uniqueness`."""
    from scipy.optimize import linear_sum_assignment

    a, b = rows.numpy(), directions.numpy()
    latent_of, cosine = np.full(len(b), -1), np.zeros(len(b))
    if len(a) * len(b) <= ALL_PAIRS:
        sizes = np.concatenate([block().abs().numpy() for _, block in cosine_blocks(a, b)])
        latents, features = linear_sum_assignment(sizes, maximize=True)
        values, nearest = sizes[latents, features], sizes.argmax(1)
    else:
        of_a, of_b = find_nearest(cosine_blocks(a, b), len(a), len(b), CANDIDATES, signed=True)
        pairs, values = assign(of_a, of_b)
        (latents, features), nearest = pairs.T, of_a.indices[:, 0]
    latent_of[features], cosine[features] = latents, np.abs(values)
    return latent_of, cosine, len(np.unique(nearest)) / len(a)


def _count(
    codes: SparseCodes, planted: SparseCodes, latent_of: Int[np.ndarray, "n_features"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each feature the number of tokens on which it and its latent fire, it fires, and its latent fires."""
    truth, latents = _firing(planted), _firing(codes)
    paired = np.flatnonzero(latent_of >= 0)
    mine = latents.tocsc()[:, latent_of[paired]]
    hits, detected = (np.zeros(len(latent_of), np.int64) for _ in range(2))
    hits[paired] = np.asarray(truth.tocsc()[:, paired].multiply(mine).sum(0)).ravel()
    detected[paired] = np.asarray(mine.sum(0)).ravel()
    return hits, np.asarray(truth.sum(0)).ravel().astype(np.int64), detected


def _firing(codes: SparseCodes) -> "csr_matrix":
    indices, offsets = codes.indices.cpu().numpy(), codes.offsets.cpu().numpy()
    return as_csr(np.ones(len(indices), bool), indices, offsets, (len(codes), codes.d_sae))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
