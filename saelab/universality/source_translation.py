"""`score_translation`: how well codes from one source of a crosscoder reconstruct the others, and fire with theirs."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from saelab.functional.metrics import ReconstructionSums
from saelab.sae.compatibility import match_activations, require_finite, require_threshold
from saelab.sae.sae import SAE
from saelab.sae.source_views import find_columns
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table

PART = 4096  # rows encoded at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Translation(Result):
    """Reconstruction of every source from the codes of every other, and how far their codes agree."""

    sources: tuple[str, ...]
    n_tokens: int
    fvu: Float[np.ndarray, "n_sources n_sources"]
    """unexplained share of the variance of the column's source from codes of the row's"""
    cofiring: Float[np.ndarray, "n_sources n_sources"]
    """of the codes of the row's source, the share whose latent fires from the column's on the same token too"""
    cofiring_shuffled: Float[np.ndarray, "n_sources n_sources"]
    """the same with the column's rows in random order"""
    latent_cofiring: Float[np.ndarray, "d_sae"]
    """tokens on which a latent fires from all sources over those on which it fires from any; NaN where it never fires
    """

    def __str__(self) -> str:
        lines = [f"codes from a source (row) for another (column), {self.n_tokens:,} tokens"]
        figures = (("fvu", self.fvu), ("cofiring", self.cofiring), ("cofiring, shuffled", self.cofiring_shuffled))
        for name, found in figures:
            rows = [[source, *(f"{x:.3f}" for x in row)] for source, row in zip(self.sources, found, strict=True)]
            lines += ["", *format_table([[name, *self.sources], *rows])]
        return "\n".join(lines)


@torch.no_grad()
def score_translation(sae: SAE, acts: Activations, *, seed: int = 0, allow_mismatch: bool = False) -> Translation:
    """How well a crosscoder's codes from each source reconstruct all of them (arXiv:2502.03714).

    Meant for one that encodes from "any" source; of another the codes of a source are those with the other sources at
    their bias.

    Args:
        sae: the crosscoder.
        acts: activations of its sources, joined as those it was trained on.
        seed: of the shuffled rows.
        allow_mismatch: accept activations of other models or hook points.

    Raises:
        ValueError: for an SAE of one source, and activations of other sources.

    >>> x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.join({"base": Activations.from_tensor(x), "tuned": Activations.from_tensor(-x)})
    >>> cfg = sl.SAEConfig(d_in=8, d_sae=32, sources=acts.sources, encode_from="any", activation=sl.AbsTopK(k=4))
    >>> sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=80_000, batch_size=400), progress=False)
    >>> bool((score_translation(sae, acts).fvu < 0.1).all())
    True
    """
    if sae.cfg.sources is None:
        raise ValueError("`sae` must be a crosscoder, got an SAE of one source; train one on joined activations.")
    require_finite(sae)
    require_threshold(sae)
    match_activations(sae, acts, allow_mismatch)
    if acts.d_in != sae.cfg.d_in:
        raise ValueError(f"`acts` must be as wide as all sources together ({sae.cfg.d_in}), got {acts.d_in}.")
    names = tuple(source.name for source in sae.cfg.sources)
    columns, alone = [find_columns(sae.cfg, name) for name in names], [sae.source(name) for name in names]
    sums = [[ReconstructionSums(source.d_in) for source in sae.cfg.sources] for _ in names]
    both, shuffled, fired = (torch.zeros(len(names), size, dtype=torch.float64) for size in (len(names),) * 2 + (1,))
    fires_all, fires_any = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(acts), PART):
        x = acts[start : start + PART].to(sae.W_dec)
        codes = [one.encode_sparse(x[:, part]) for one, part in zip(alone, columns, strict=True)]
        for i, own in enumerate(codes):
            for j, part in enumerate(columns):
                sums[i][j].add(x[:, part], alone[j].decode(own))
        fires = [own.to_dense() != 0 for own in codes]
        order = torch.randperm(len(x), generator=generator).to(sae.device)
        for i, mine in enumerate(fires):
            fired[i] += float(mine.sum())
            for j, other in enumerate(fires):
                both[i, j] += float((mine & other).sum())
                shuffled[i, j] += float((mine & other[order]).sum())
        stacked = torch.stack(fires)
        fires_all += stacked.all(0).sum(0)
        fires_any += stacked.any(0).sum(0)
    never = torch.where(fires_any > 0, 0.0, torch.nan)
    return Translation(
        sources=names,
        n_tokens=len(acts),
        fvu=np.array([[one.fvu for one in row] for row in sums]),
        cofiring=(both / fired.clamp(min=1)).numpy(),
        cofiring_shuffled=(shuffled / fired.clamp(min=1)).numpy(),
        latent_cofiring=(fires_all / fires_any.clamp(min=1) + never).cpu().numpy(),
    )
