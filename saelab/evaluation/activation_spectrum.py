"""`spectrum`: how many directions the activations of a hook point fill, and how many of them the model needs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import effective_rank, exact
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import batches_of, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import mask_of, match_weights
from saelab.sae.fitting import require_varied
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table

PART = 2**15  # tokens at a time
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
"""ranks that are spliced in by default, as shares of d_in"""


@dataclass(frozen=True, kw_only=True)
class RankScore:
    """The model's loss when only some directions of the activations, around their mean, are left."""

    rank: int
    """directions kept; 0 leaves the mean"""
    variance: float
    """share of the variance in the principal components kept"""
    ce: float
    """loss with the first principal components alone, nats per token; lower is better"""
    ce_random: float
    """the same with as many random directions: what any subspace of that size keeps"""
    loss_recovered: float
    """`(ce_zero - ce) / (ce_zero - ce_clean)`; NaN where zero ablation does no harm"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum(Result):
    """Variances of activations along their principal components, and how many of these matter."""

    hook_point: str
    """empty where it is not known"""
    d_in: int
    n_tokens: int
    share: float
    n_components: int
    """principal components that hold `share` of the variance; few where some dimensions are very large, whatever the
    others hold: read the effective rank beside it"""
    effective_rank: float
    """exp of the entropy of the singular values' shares (`sl.functional.effective_rank`), 1 to d_in"""
    variances: Float[np.ndarray, "d_in"] = field(repr=False)
    """along the principal components, the largest first"""
    rows: tuple[RankScore, ...] = ()
    """loss by rank; empty without a model"""
    ce_clean: float = math.nan
    ce_zero: float = math.nan
    n_predictions: int = 0
    """tokens whose next one was predicted"""

    @property
    def components_frac(self) -> float:
        """`n_components / d_in`."""
        return self.n_components / self.d_in

    @property
    def effective_rank_frac(self) -> float:
        """`effective_rank / d_in`."""
        return self.effective_rank / self.d_in

    def rank_for(self, loss_recovered: float) -> int | None:
        """The smallest of the ranks from which on the loss recovered is at least this; None where there is none."""
        kept = None
        for row in reversed(self.rows):
            if not row.loss_recovered >= loss_recovered:
                break
            kept = row.rank
        return kept

    def __str__(self) -> str:
        where = f"{self.hook_point}: " if self.hook_point else ""
        lines = [
            f"{where}{self.n_components:,} of {self.d_in:,} components ({self.components_frac:.0%}) hold "
            f"{self.share:.0%} of the variance; effective rank {self.effective_rank:.1f} "
            f"({self.effective_rank_frac:.0%}); {self.n_tokens:,} tokens"
        ]
        if self.rows:
            lines.append(f"loss {self.ce_clean:.4f}, with zeros {self.ce_zero:.4f}, {self.n_predictions:,} predictions")
            table = [["rank", "of d_in", "variance", "loss", "recovered", "loss, random directions"]]
            for row in self.rows:
                scores = [f"{row.variance:.3f}", f"{row.ce:.4f}", f"{row.loss_recovered:.3f}", f"{row.ce_random:.4f}"]
                table.append([f"{row.rank:,}", f"{row.rank / self.d_in:.0%}", *scores])
            lines += format_table(table)
        return "\n".join(lines)


@torch.no_grad()
def spectrum(
    acts: Activations | Float[Tensor, "n_tokens d_in"],
    model: AnyModel | None = None,
    tokens: Tokens | None = None,
    *,
    hook_point: str | None = None,
    ranks: Sequence[int] | None = None,
    share: float = 0.99,
    batch_size: int | None = None,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Spectrum:
    """The spectrum of activations and, with a model, its loss when only their first r principal components are left.

    Activations are centered. With `model` and `tokens`, they are replaced by `mean + P_r (x - mean)` at the hook point,
    P_r the projection on r components, as a reconstruction would be in `evaluate`; rank 0 is mean ablation. Source:
    arXiv:2508.16929, where attention outputs need fewer components than MLP outputs or the residual stream.

    Args:
        acts: (n_tokens, d_in) activations.
        model: the language model that they are of; None measures the activations alone.
        tokens: text on which the loss is measured, best another than that of the activations.
        hook_point: where they are of; None takes their record.
        ranks: numbers of components to splice in, 0 to d_in; None takes eight shares of d_in and all.
        share: share of the variance that `n_components` counts for.
        batch_size: sequences per forward pass; None takes as many as hold about 4096 tokens.
        seed: of the random directions.
        allow_mismatch: True accepts another model or weight processing than that of the activations.

    Raises:
        ValueError: fewer than two activations, ones that are not finite or all equal, a number out of range, or a model
            without tokens, and the reverse.

    >>> x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> found = spectrum(x * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    >>> found.components_frac, round(found.effective_rank, 1)
    (0.5, 4.0)
    """
    model = model if model is None else as_model(model)
    acts = Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts
    ranks = ranks if ranks is not None else (0, *sorted({max(1, round(part * acts.d_in)) for part in SHARES}))
    if not 0 < share <= 1 or not all(0 <= rank <= acts.d_in for rank in ranks) or len(acts) < 2:
        raise ValueError(
            f"`share` must be in (0, 1], `ranks` in 0..{acts.d_in} and `acts` two or more, got {share}, {list(ranks)} "
            f"and {len(acts)}."
        )
    require_varied(acts)
    if (model is None) != (tokens is None):
        raise ValueError("`model` and `tokens` must be given together, got one of them; give both, or neither.")
    mean, variances, axes = _find_axes(acts)
    held = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    origin = acts.provenance
    known = hook_point or (origin.hook_point if origin else None)
    found = Spectrum(
        hook_point=known or "",
        d_in=acts.d_in,
        n_tokens=len(acts),
        share=share,
        n_components=min(acts.d_in, int((held < share - 1e-12).sum()) + 1),
        effective_rank=effective_rank(variances.sqrt()),
        variances=variances.numpy(),
    )
    if model is None or tokens is None:
        return found
    if known is None:
        raise ValueError("`hook_point` must be given for activations without a record, got none; name where they are.")
    match_weights(origin, model, allow_mismatch)
    hook_points_of(model).find(known)
    n_seq = forward_size(tokens, batch_size)
    stage = Stage(model=model, hook_point=known, mask=mask_of(origin) if origin else TokenMask())
    drawn = torch.linalg.qr(torch.randn(axes.shape, generator=torch.Generator().manual_seed(seed)).double()).Q
    cuts = [(rank, one[:, :rank].float()) for one in (axes, drawn) for rank in ranks]
    ce, n = _measure(stage.calibrated(tokens, n_seq), tokens, n_seq, mean.float(), [cut for _, cut in cuts])
    shares, harm = [0.0, *held.tolist()], ce["zero"] - ce["clean"]
    rows = tuple(
        RankScore(
            rank=rank,
            variance=shares[rank],
            ce=ce[i],
            ce_random=ce[len(ranks) + i],
            loss_recovered=(ce["zero"] - ce[i]) / harm if harm > 0 else math.nan,
        )
        for i, rank in enumerate(ranks)
    )
    return replace(found, rows=rows, ce_clean=ce["clean"], ce_zero=ce["zero"], n_predictions=n)


def _find_axes(acts: Activations) -> tuple[Float[Tensor, "d_in"], Float[Tensor, "d_in"], Float[Tensor, "d_in d_in"]]:
    """Mean, variances along the principal components from the largest on, and the components as columns."""
    shift = exact(acts[:PART]).cpu().mean(0)  # near the mean, so that squares lose no digits
    total, moments = torch.zeros_like(shift), torch.zeros(acts.d_in, acts.d_in, dtype=torch.float64)
    for start in range(0, len(acts), PART):
        x = exact(acts[start : start + PART]).cpu() - shift
        total += x.sum(0)
        moments += x.T @ x
    if not bool(moments.isfinite().all()):
        raise ValueError("`acts` must be finite, got NaN or infinity; check where they come from.")
    offset = total / len(acts)
    variances, axes = torch.linalg.eigh(moments / len(acts) - torch.outer(offset, offset))
    return shift + offset, variances.flip(0).clamp(min=0), axes.flip(1)


def _measure(
    stage: Stage, tokens: Tokens, n_seq: int, mean: Float[Tensor, "d_in"], cuts: Sequence[Float[Tensor, "d_in _"]]
) -> tuple[dict[Any, float], int]:
    """Loss by cut, clean and with zeros, and the number of predictions."""
    losses: dict[Any, float] = defaultdict(float)
    n = 0
    for batch in batches_of(tokens, n_seq):
        clean = stage.run(batch)
        x = clean.rows
        losses["clean"] += float(clean.losses(clean.logits).double().sum())
        losses["zero"] += float(clean.splice(torch.zeros_like(x))["ce"].double().sum())
        n += int(clean.predicts.sum())
        centered = x.float() - mean.to(x.device)
        for i, cut in enumerate(cuts):
            axes = cut.to(x.device)
            x_hat = mean.to(x.device) + centered @ axes @ axes.T
            losses[i] += float(clean.splice(x_hat.to(x))["ce"].double().sum())
    return {name: total / n if n else math.nan for name, total in losses.items()}, n
