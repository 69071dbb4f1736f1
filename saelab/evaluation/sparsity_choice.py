"""`choose_k`: the k that mixes features least, by short training runs and the decoder projection (arXiv:2508.16560).

With too small a k, an SAE lowers its error by mixing correlated features into one row; with too large a k, by using
rows that are no features. In both cases rows project on activations that their feature is not in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.activation_functions import BatchTopK
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import open_data, require_varied
from saelab.sae.module import SAEModule
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.results import Result, find_row, format_table
from saelab.training.config import TrainConfig

SAMPLE_TOKENS = 4096
RANK_FRAC = 1 / 3
"""n of the projection, as a share of the latents: above any plausible L0, and below the half at which it is near 0"""


@dataclass(frozen=True, kw_only=True)
class TriedK:
    """Statistics of a dictionary trained with one k."""

    k: int
    projection: float
    """decoder projection s_n, in units of the mean over ks; the smallest marks the k that mixes least"""
    cosine: float
    """mean |cosine| of two rows; falls with k where it is not the features that are mixed"""
    fvu: float
    l0: float


@dataclass(frozen=True, kw_only=True)
class ChosenK(Result):
    """Result of `choose_k`: statistics by k."""

    rows: tuple[TriedK, ...]
    n: int
    """rank of the projection that is compared"""
    n_tokens: int
    """tokens that the statistics are of"""
    seed: int

    @property
    def k(self) -> int:
        """The k with the smallest decoder projection."""
        return min(self.rows, key=lambda row: row.projection).k

    @property
    def at_end(self) -> bool:
        """Whether the best is the smallest or the largest k tried, so that the minimum may lie beyond."""
        return self.k in (self.rows[0].k, self.rows[-1].k)

    def __getitem__(self, k: int) -> TriedK:
        return find_row(self.rows, k=k)

    def __str__(self) -> str:
        beyond = "; it is the end of those tried, try more" if self.at_end else ""
        head = f"k={self.k} has the smallest decoder projection (n={self.n}, {self.n_tokens:,} tokens){beyond}"
        table = [["k", "projection", "mean |cosine|", "fvu", "l0"]]
        for row in self.rows:
            table.append([f"{row.k}", f"{row.projection:.4f}", f"{row.cosine:.4f}", f"{row.fvu:.4f}", f"{row.l0:.2f}"])
        return "\n".join([head, *format_table(table)])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name and the k chosen, ready for JSON."""
        return super().to_dict() | {"k": self.k, "at_end": self.at_end}


def choose_k(
    acts: Activations | Float[Tensor, "n_tokens d_in"],
    ks: Sequence[int],
    cfg: SAEConfig | None = None,
    train: TrainConfig | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ChosenK:
    """The k at which a dictionary's rows mix features least, from an SAE trained with each k on the same batches.

    The decoder projection s_n is the (n B)-th largest of all `<x - b_dec, d_i>` of B tokens with the unit rows: how far
    rows lie along what they should not stand for. In the source it is smallest at the true L0, for n above that; FVU
    falls with k throughout and says nothing. Take it as a hint: with short runs on nine planted worlds (L0 4, 6 and 8,
    three seeds) the k chosen was within 20 % of the L0 in four, and on `tales` it was the largest k tried. Source:
    arXiv:2508.16560.

    Args:
        acts: activations to train on.
        ks: numbers of latents a token to try, at least three of them.
        cfg: configuration with an activation that has a k; None is a BatchTopK of 8 d_in latents.
        train: training configuration, a short run; None is that of `TrainConfig`.
        n: rank of the projection; None is a third of the latents.
        seed: of the initial weights.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for fewer than three ks, an activation without one, a transcoder, and an n beyond the latents or not
            above every k; activations that are all equal.
    """
    data = open_data(acts)
    if not isinstance(data, Activations):
        raise ValueError("`acts` must be activations of one hook point, collected or a tensor, got something else.")
    cfg = cfg or SAEConfig(d_in=data.d_in, d_sae=8 * data.d_in, activation=BatchTopK(k=max(ks, default=1)))
    ks, n = sorted({int(k) for k in ks}), round(cfg.d_sae * RANK_FRAC) if n is None else n
    if len(ks) < 3:
        raise ValueError(f"`ks` must be three or more, for a minimum between two others, got {ks}.")
    if not hasattr(cfg.activation, "k") or cfg.d_out is not None:
        raise ValueError(f"`cfg` must be of an SAE whose activation has a k, such as BatchTopK, got {cfg.activation}.")
    if not ks[-1] < n < cfg.d_sae:
        raise ValueError(f"`n` must be above every k ({ks[-1]}) and below d_sae ({cfg.d_sae}), got {n}.")
    require_varied(data)
    saes = [SAE(replace(cfg, activation=replace(cfg.activation, k=k)), seed) for k in ks]  # type: ignore[call-arg]
    fit(saes, data, train, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(data.n_tokens, generator=generator)[:SAMPLE_TOKENS].sort().values
    x = data[places].float()
    values = np.array([decoder_projection(sae, x, n) for sae in saes])
    rows = []
    for k, sae, value in zip(ks, saes, values / max(values.mean(), 1e-12), strict=True):
        saved = (sae.training_ or {})["saved"]
        rows.append(TriedK(k=k, projection=float(value), cosine=mean_row_cosine(sae), fvu=saved["fvu"], l0=saved["l0"]))
    return ChosenK(rows=tuple(rows), n=n, n_tokens=len(x), seed=seed)


@torch.no_grad()
def decoder_projection(sae: SAEModule, x: Float[Tensor, "n_tokens d_in"], n: int) -> float:
    """The (n B)-th largest of the projections `<x - b_dec, d_i>` of B normalized tokens on the unit rows of W_dec.

    Signed codes: of their sizes. ValueError unless n is from 1 to the number of latents.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> decoder_projection(sae, x, 4) > decoder_projection(sae, x, 16)
    True
    """
    if not 1 <= n <= sae.cfg.d_sae:
        raise ValueError(f"`n` must be from 1 to d_sae ({sae.cfg.d_sae}), got {n}.")
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    projections = (sae.center(x.to(rows)) @ rows.T).flatten()
    if sae.cfg.activation.signed:
        projections = projections.abs()
    return float(projections.kthvalue(len(projections) - n * len(x) + 1).values)


@torch.no_grad()
def mean_row_cosine(sae: SAEModule) -> float:
    """Mean |cosine| of two different rows of W_dec."""
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    m, total = len(rows), 0.0
    for part in rows.split(1024):
        total += float((part @ rows.T).abs().sum())
    return (total - m) / max(1, m * (m - 1))
