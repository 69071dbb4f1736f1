"""Pre-activations at chosen entries in float32, and bounds of the error of a matrix product or of a screen."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.sparse_products import sampled_dot

ROUNDINGS = 4.0  # how many times their expected size, eps * sqrt(d) * |x| |w|, errors of a product may be
ERROR_MARGIN = 1.25  # an unseen latent may be wrong by this many times the largest error seen on the candidates


def score(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    rows: Int[Tensor, "nnz"],
    latents: Int[Tensor, "nnz"],
) -> Float[Tensor, "nnz"]:
    """`u = x W^T + bias` at the given entries, bit for bit the same whatever else is in the batch.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        rows: row of x of each entry.
        latents: latent of each entry.
    """
    return sampled_dot(rows, latents, x, W) + bias[latents]


def bound_rounding(
    x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, "d_sae"]
) -> Float[Tensor, "n_rows"]:
    """Upper bound, for each row, of the difference by rounding between a matrix product `x W^T + bias` and `score`.

    x and W are as in `score`: activations, and the encoder with one row per latent.
    """
    largest = torch.linalg.vector_norm(W, dim=1).amax()
    size = torch.linalg.vector_norm(x, dim=1) * largest * x.shape[1] ** 0.5 + bias.abs().amax()
    bound: Tensor = ROUNDINGS * torch.finfo(x.dtype).eps * size
    return bound


def bound_error(relative: Float[Tensor, "..."], noise: Float[Tensor, "n_rows"]) -> Float[Tensor, "n_rows"]:
    """Bound of the screen's error in each row, from the candidates' errors relative to their row's noise."""
    worst = relative.nan_to_num().amax() if relative.numel() else noise.new_zeros(())
    return worst * noise * ERROR_MARGIN
