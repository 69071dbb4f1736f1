"""Initialisation of an SAE from a sample of activations: biases, dictionary directions and encoder scale."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import effective_rank, exact
from saelab.sae.coder import Coder
from saelab.sae.config import MatchingPursuit

SCALE_TOKENS = 1024  # tokens used to set the encoder's scale; also the chunk size


@torch.no_grad()
def place_weights(sae: Coder, x: Float[Tensor, "n_tokens d_in"], y: Float[Tensor, "n_tokens d_out"], seed: int) -> None:
    """Initialise biases and dictionary from a sample of inputs and targets, in place.

    b_dec is the targets' mean, directions are those of `cfg.init`. A transcoder's b_enc cancels the inputs' mean, and
    its rows of W_dec are the mean targets of its random codes: Z^T (y - b_dec), at unit length.

    Args:
        sae: the SAE; its weights change.
        x: (n_tokens, d_in) normalised inputs.
        y: (n_tokens, d_out) normalised targets; `x` again for an autoencoder.
        seed: seed of archetypal points, or of the activations drawn as directions for `init="data"`.
    """
    sae.b_dec.copy_(y.mean(0))
    centred = x - x.mean(0)
    rows = sae.W_enc.T
    if sae.archetypes is not None:
        sae.archetypes.place(y - y.mean(0), seed)
        sae.W_dec.copy_(sae.archetypes())
        rows = sae.W_dec if sae.cfg.d_out is None else _unit(sae.W_dec @ (y - y.mean(0)).T @ centred)
    elif sae.cfg.init == "data":
        rows = _draw_rows(centred, rows, seed)
    elif sae.cfg.init == "subspace":
        rows = _turn_inside(centred, rows)
    sae.W_enc.copy_(rows.T)
    if sae.cfg.d_out is None:
        sae.W_dec.copy_(rows)
    else:
        sae.b_enc.copy_(-x.mean(0) @ sae.W_enc)
        if sae.archetypes is None:
            _answer(sae, x, y)
    if not isinstance(sae.cfg.encoder, MatchingPursuit):
        _match_scale(sae, x[:SCALE_TOKENS], y[:SCALE_TOKENS])


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _draw_rows(centred: Tensor, random: Tensor, seed: int) -> Tensor:
    """Activations drawn at random, as directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = centred[centred.norm(dim=1) > 0]
    if len(rows) == 0:  # constant activations have no direction: keep the random ones
        return random
    chosen = rows[torch.randint(len(rows), (len(random),), generator=generator)]
    # adding some of the random direction makes repeated rows differ
    directions = chosen / chosen.norm(dim=1, keepdim=True) + 0.1 * random
    return directions / directions.norm(dim=1, keepdim=True)


def _turn_inside(centred: Tensor, random: Tensor) -> Tensor:
    """Random directions in the subspace spanned by the activations (arXiv:2508.16929): a latent outside of it is never
    active.

    The dimension is the effective rank of the singular values. Unlike the number of components that hold 99 % of the
    variance, it is not reduced to a handful by a few dominant directions.
    """
    moments = exact(centred).T @ exact(centred)
    variances, directions = torch.linalg.eigh(moments)
    n = max(1, math.ceil(effective_rank(variances.clamp(min=0).sqrt())))
    return _unit(random[:, :n] @ directions[:, -n:].T.to(random))


def _answer(sae: Coder, x: Tensor, y: Tensor) -> None:
    """Set each row of W_dec to the mean direction of the targets where its latent is active; rows of inactive latents
    stay random.
    """
    sums = torch.zeros_like(sae.W_dec)
    for part, target in zip(x.split(SCALE_TOKENS), y.split(SCALE_TOKENS), strict=True):
        sums += _codes(sae, part).T @ (target - sae.b_dec)
    sae.W_dec.copy_(torch.where(sums.norm(dim=1, keepdim=True) > 0, _unit(sums), sae.W_dec))


def _match_scale(sae: Coder, x: Tensor, y: Tensor) -> None:
    """Scale the encoder by the c that minimises ||y - b_dec - c z W_dec||^2: reconstructions from random weights are
    many times too large.
    """
    centred, y_hat = y - sae.b_dec, _codes(sae, x) @ sae.W_dec
    energy = y_hat.square().sum()
    if energy > 0 and (scale := (centred * y_hat).sum() / energy) > 0:
        sae.W_enc.mul_(scale.clamp(0.05, 1.0))
        sae.b_enc.mul_(scale.clamp(0.05, 1.0))


def _codes(sae: Coder, x: Tensor) -> Tensor:
    """Codes at the start of training, of normalised inputs."""
    read = x - sae.b_dec if sae.cfg.d_out is None else x
    return sae.cfg.activation(read @ sae.W_enc + sae.b_enc, sae.threshold, training=True)
