"""`AuxK`: the loss that revives dead latents."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import Entries, attach_encoder, sparse_decode
from saelab.functional.metrics import normalized_error
from saelab.functional.row_topk import finds_exactly, largest_latents
from saelab.functional.screening import largest_first
from saelab.functional.sparse_products import select_rows
from saelab.sae.competition import best_of_ranks
from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
from saelab.training.ranks import GridAxis, RankGrid
from saelab.training.schedules import Scheduled


@register_loss_term("aux")
@dataclass(frozen=True, kw_only=True)
class AuxK(LossTerm):
    """The AuxK loss, which revives dead latents by having them reconstruct the residual of the others
    (arXiv:2406.04093, A.2).

    Its value is normalized by the residual's variance, the reconstruction loss by the activations' variance, so
    `coefficient` weighs two numbers of the same kind. Dead latents are ranked by |u| where codes are signed; the
    residual is detached, b_dec left out.

    In a short run a latent that is merely rare counts as dead after few steps. The loss then fits it to the residual,
    and more latents end up dead, not fewer. On `tales` (blocks.2.hook_resid_post, 4,096 latents, TopK of 16, 100,000
    tokens in batches of 2,048, one seed) 6.8 % fire on none of 20,000 tokens without AuxK. By `dead_after_tokens`:
    34.5 % at 5,000 (the default there), 13.4 % at 20,000, 6.5 % at 50,000. The FVU falls from 0.057 to 0.055 at 5,000.
    """

    coefficient: Scheduled = 1 / 32
    """weight of the loss"""
    k: int | None = None
    """dead latents used per token; None is half the reconstruction's width"""
    dead_after_tokens: int | None = None
    """tokens without firing after which a latent is dead; None is 10 million, or 5 % of a shorter run"""
    token_frac: float = 0.125
    """fraction of each batch's tokens on which the loss is computed; its gradient stays unbiased, its cost small"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.token_frac <= 1:
            raise ValueError(f"`token_frac` must be in (0, 1], got {self.token_frac}.")
        if self.k is not None and self.k < 1:
            raise ValueError(f"`k` of AuxK must be at least 1, got {self.k}; leave AuxK out to switch it off.")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise ValueError(f"`dead_after_tokens` must be at least 1, got {self.dead_after_tokens}.")

    sharded: ClassVar[bool] = True
    reads_codes: ClassVar[bool] = False

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Error of the dead latents' reconstruction of the residual on the first `token_frac` of the batch; 0 if no
        latent is dead.
        """
        sae, dead, x, axis = step.sae, step.dead, step.x, step.ranks.latents
        n_dead = int(axis.total(torch.tensor(len(dead), device=x.device)))
        if n_dead == 0:
            return x.new_zeros(())
        n = step.ranks.n_rows_among(math.ceil(self.token_frac * len(x) * step.ranks.data.size))
        W_enc = select_rows(sae.W_enc.T, dead, step.memory.get("W_enc"))
        W_dec = select_rows(step.W_dec, dead, step.memory.get("W_dec"))
        read, signed = x[:n] if step.b_read is None else x[:n] - step.b_read, sae.cfg.activation.signed
        # raw u, not relu(u): a dead latent whose u is negative everywhere would get no gradient
        k = min(self.k or max(1, sae.cfg.d_target // 2), n_dead)
        if axis.size == 1 and finds_exactly(W_enc, k):
            estimate = _decode_largest(x[:n], W_enc, sae.b_enc[dead], step.b_read, read, W_dec, k, signed)
        else:
            u = read @ W_enc.T + sae.b_enc[dead]
            estimate = axis.sum(keep_largest(u, (u.abs() if signed else u).detach(), k, axis) @ W_dec)
        residual = step.residual[:n].detach()
        if step.weights is not None:
            estimate, residual = estimate * step.weights.sqrt(), residual * step.weights.sqrt()
        return _normalized_error(estimate, residual, step.ranks)


def _decode_largest(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_read: Tensor | None, read: Tensor, W_dec: Tensor, k: int, signed: bool
) -> Tensor:
    """`keep_largest(u) W_dec`, without the pre-activations that are not kept."""
    indices, values = largest_latents(read.detach(), W_enc.detach(), b_enc.detach(), k, signed)
    starts = torch.arange(len(x) + 1) * k
    rows = torch.arange(len(x)).repeat_interleave(k)
    entries = Entries(indices.flatten(), rows, starts).with_columns(len(W_enc))
    u = attach_encoder(values.flatten(), x, W_enc.T, b_enc, b_read, entries, None, read.detach())
    return sparse_decode(u, W_dec, entries.indices, rows, starts)


def keep_largest(
    u: Float[Tensor, "n_rows n"], size: Float[Tensor, "n_rows n"], k: int, axis: GridAxis
) -> Float[Tensor, "n_rows n"]:
    """u where its size is among the k largest of the row over all ranks, and 0 elsewhere; differentiable in u.

    Args:
        u: pre-activations of this rank's latents.
        size: what they are ranked by.
        k: latents kept in a row.
        axis: the ranks that the latents are divided among.
    """
    if axis.size == 1:
        places = largest_first(size, k)
        return torch.zeros_like(u).scatter(1, places, u.gather(1, places))
    n = size.shape[1]
    size = torch.nn.functional.pad(size, (0, max(0, k - n)), value=-torch.inf)
    places = largest_first(size, k)
    kept = torch.zeros_like(size).scatter(1, places, best_of_ranks(size.gather(1, places), k, axis).to(size))
    return u * kept[:, :n]


def _normalized_error(
    estimate: Float[Tensor, "n_rows d_out"], target: Float[Tensor, "n_rows d_out"], ranks: RankGrid
) -> Float[Tensor, ""]:
    """`normalized_error` over the rows of all ranks."""
    if ranks.data.size == 1:
        return normalized_error(estimate, target)
    n = ranks.data.total(torch.tensor(float(len(target)), device=target.device))
    mean = ranks.data.total(target.sum(0)) / n
    variance = ranks.data.total((target - mean).square().sum())
    error = ranks.sum_tokens((estimate - target).square().sum())
    return error / variance if variance > 0 else error * 0
