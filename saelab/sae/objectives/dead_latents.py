"""`AuxK`: the loss that revives dead latents."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import normalized_error
from saelab.functional.screening import largest_first
from saelab.sae.objectives.terms import LossTerm, TrainingStep, register_loss_term
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

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Error of the dead latents' reconstruction of the residual on the first `token_frac` of the batch; 0 if no
        latent is dead.
        """
        sae, dead, x = step.sae, step.dead, step.x
        if len(dead) == 0:
            return x.new_zeros(())
        n = math.ceil(self.token_frac * len(x))
        W_enc = sae.W_enc.T.index_select(0, dead)
        read = x[:n] - sae.b_dec if sae.cfg.d_out is None else x[:n]
        u = read @ W_enc.T + sae.b_enc[dead]
        # raw u, not relu(u): a dead latent whose u is negative everywhere would get no gradient
        k = min(self.k or max(1, sae.cfg.d_target // 2), len(dead))
        places = largest_first((u.abs() if sae.cfg.activation.signed else u).detach(), k)
        z = torch.zeros_like(u).scatter(1, places, u.gather(1, places))
        return normalized_error(z @ step.W_dec.index_select(0, dead), step.residual[:n].detach())
