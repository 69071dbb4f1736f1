"""`StepCodes`: the codes of one training batch with their reconstruction errors, and what silent codes add to them."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import Entries, SparseCodes, attach_encoder
from saelab.functional.silent_codes import SilentCodes, silent_penalty, threshold_error
from saelab.functional.sparse_products import GradientMemory
from saelab.functional.threshold_search import search_near
from saelab.sae.activation_functions import SPARSE_FRAC, JumpReLU
from saelab.sae.activation_registry import Activation
from saelab.sae.competition import activate_among, search_among
from saelab.sae.module import SAEModule
from saelab.training.ranks import RankGrid


@dataclass(frozen=True, eq=False)
class StepCodes:
    """Codes of one batch and their reconstruction errors."""

    errors: Float[Tensor, "n_groups"]
    """squared error of each prefix or number of latents"""
    residual: Float[Tensor, "n_tokens d_out"]
    """what the last of them leaves, without gradient"""
    penalty: Tensor | None
    """the activation's penalty of each code, or None"""
    seen: tuple[Tensor, Tensor, Tensor]
    """latents that fired, L0, smallest code"""
    sparse: tuple[Float[Tensor, "nnz"], Entries] | None = None
    """codes at their entries"""
    dense: Tensor | None = None
    """all codes"""
    u: Tensor | None = None
    """all pre-activations"""

    def with_silent(
        self, silent: SilentCodes | None, sae: SAEModule, W_dec: Float[Tensor, "d_sae d_out"]
    ) -> "StepCodes":
        """The same with the gradients that silent codes give their thresholds.

        Args:
            silent: entries just below their threshold; None for none.
            sae: the SAE.
            W_dec: its decoder in this step, one row per latent.
        """
        if silent is None:
            return self
        assert self.penalty is not None and sae.threshold is not None and isinstance(sae.cfg.activation, JumpReLU)
        threshold, bandwidth = sae.threshold, sae.cfg.activation.bandwidth
        errors = threshold_error(self.errors, threshold, self.residual, W_dec, silent, bandwidth)
        penalty = torch.cat([self.penalty, silent_penalty(threshold, silent, bandwidth)])
        return replace(self, errors=errors, penalty=penalty)


def search_codes(
    sae: SAEModule, activation: Activation, read: Float[Tensor, "n_tokens d_in"], ranks: RankGrid, unread: bool
) -> tuple[SparseCodes | None, SilentCodes | None]:
    """What `search_among` finds in a training step; of `JumpReLU` the entries just below their threshold apart.

    Args:
        sae: the SAE, with this process's latents.
        activation: activation function of the step.
        read: what W_enc is applied to.
        ranks: processes among which tokens and latents are divided.
        unread: whether the codes of these entries, which are 0, are read by nothing but the reconstruction.
    """
    if unread and ranks.alone and isinstance(activation, JumpReLU) and type(activation) is JumpReLU:
        assert sae.threshold is not None
        found = search_near(read, sae.W_enc.T, sae.b_enc, sae.threshold, activation.bandwidth, SPARSE_FRAC)
        return (None, None) if found is None else found
    return search_among(activation, read, sae.W_enc.T, sae.b_enc, sae.threshold, ranks), None


def attach_codes(
    sae: SAEModule,
    found: SparseCodes,
    inputs: tuple[Float[Tensor, "n_tokens d_in"], Float[Tensor, "d_in"] | None, Float[Tensor, "n_tokens d_in"] | None],
    memory: GradientMemory | None = None,
) -> tuple[Float[Tensor, "nnz"], Entries, Tensor | None]:
    """Codes with gradients to the encoder, their entries, and the activation's penalty of each.

    Args:
        sae: the SAE.
        found: pre-activations that a search found.
        inputs: what the encoder reads: x, what is subtracted from it, and the difference, if known.
        memory: takes the gradient of W_enc transposed, or gives the memory for it.
    """
    x, b_read, centered = inputs
    entries = Entries(found.indices, found.rows, found.offsets).with_columns(found.d_sae)
    u = attach_encoder(found.values, x, sae.W_enc, sae.b_enc, b_read, entries, memory, centered)
    threshold = sae.threshold_of(found.indices)
    values = sae.cfg.activation.fire(u, threshold)
    if sae.cfg.activation.gated:
        return values, entries, sae.gate(u, found.indices).relu()
    return values, entries, sae.cfg.activation.penalty(u, values, threshold)


def activate_dense(
    sae: SAEModule, activation: Activation, read: Float[Tensor, "n_tokens d_in"], ranks: RankGrid
) -> tuple[Float[Tensor, "n_tokens d_sae"], Float[Tensor, "n_tokens d_sae"], Tensor | None]:
    """All codes in training, pre-activations, and the activation's penalty of each code.

    Args:
        sae: the SAE, with this process's latents.
        activation: activation function of the step.
        read: what W_enc is applied to.
        ranks: processes among which tokens and latents are divided.
    """
    u = read @ sae.W_enc + sae.b_enc
    z = activate_among(activation, u, sae.threshold, ranks)
    return z, u, sae.gate(u).relu() if activation.gated else activation.penalty(u, z, sae.threshold)


def see_dense(z: Float[Tensor, "n_tokens d_sae"]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that fired, L0, and the smallest code, of all codes.

    >>> see_dense(torch.tensor([[0.0, -2.0], [0.0, 1.0]]))
    (tensor([False,  True]), tensor(1.), tensor(1.))
    """
    size = z.detach().abs()
    fires = size > 0
    return fires.any(0), fires.sum() / len(z), find_smallest(size)


def see_entries(
    values: Float[Tensor, "nnz"], entries: Entries, d_sae: int, n_tokens: int, kept: Float[Tensor, "m"] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of codes at their entries.

    Args:
        values: the codes.
        entries: their entries.
        d_sae: number of latents.
        n_tokens: number of tokens.
        kept: sizes that the smallest code is of; None is those of all.
    """
    size = values.detach().abs()
    fired = torch.zeros(d_sae, dtype=torch.bool, device=values.device)
    fired[entries.indices[size > 0]] = True
    return fired, (size > 0).sum() / n_tokens, find_smallest(size if kept is None else kept)


def find_smallest(size: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The smallest size above 0, NaN where there is none.

    >>> find_smallest(torch.tensor([0.0, 2.0, 1.0]))
    tensor(1.)
    """
    smallest = size.masked_fill(size == 0, torch.inf).amin() if size.numel() else size.new_tensor(torch.inf)
    return torch.where(smallest.isinf(), torch.nan, smallest)
