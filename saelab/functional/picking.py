"""Codes of a few chosen latents of a top-k SAE, without encoding every row in full."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.proximal import keep_places
from saelab.functional.ties import bound_rounding, topk_latents

SAMPLE = 16  # times k latents are computed first: k of these usually exceed a latent of average size
PART = 2**22  # pre-activations held at a time


def pick_topk(
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, "d_sae"],
    latents: Int[Tensor, "n_latents"],
    k: int,
    signed: bool,
) -> Float[Tensor, "n_rows n_latents"]:
    """Dense codes of the given latents where only the k largest of `x W^T + bias` fire, differentiable.

    If k latents exceed latent j, j is not among the k largest, and k of the first few hundred latents usually suffice
    to show it: only rows where they do not are encoded in full. Rows are processed in parts, so that memory does not
    grow with their number.

    Args:
        x: activations.
        W: encoder, one row per latent.
        bias: encoder bias.
        latents: the latents whose codes are returned, in this order.
        k: latents that fire in each row.
        signed: whether the largest are those of |u| (negative codes are kept); else only positive ones fire.

    >>> x, W = torch.tensor([[1.0, -3.0], [4.0, 2.0]]), torch.eye(2)
    >>> pick_topk(x, W, torch.zeros(2), torch.tensor([1]), k=1, signed=True)
    tensor([[-3.],
            [ 0.]])
    """
    parts = torch.split(x, max(1, PART // len(W)))
    return torch.cat([_pick_part(part, W, bias, latents, k, signed) for part in parts])


def _pick_part(x: Tensor, W: Tensor, bias: Tensor, latents: Tensor, k: int, signed: bool) -> Tensor:
    u = torch.addmm(bias[latents], x, W[latents].T)
    rows = _find_unbeaten(x, W, bias, u, k, signed).nonzero()[:, 0]
    z = torch.zeros_like(u)
    if not len(rows):
        return z
    whole = torch.addmm(bias, x[rows], W.T)
    kept = keep_places(whole, topk_latents(whole, x[rows], W, bias, k, signed), signed)
    return z.index_put((rows,), kept[:, latents])


@torch.no_grad()
def _find_unbeaten(x: Tensor, W: Tensor, bias: Tensor, u: Tensor, k: int, signed: bool) -> Tensor:
    """Rows where fewer than k of the first latents exceed the largest of the chosen ones."""
    n, asked = SAMPLE * k, (u.abs() if signed else u).amax(1, keepdim=True)
    if n >= len(W):
        return asked[:, 0] > 0
    first = torch.addmm(bias[:n], x, W[:n].T)
    slack = 2 * bound_rounding(x, W, bias)[:, None]  # by rounding, an equal one may seem larger
    return ((first.abs() if signed else first) > asked + slack).sum(1) < k
