"""What an SAE must beat: reconstructions that were not trained, each at the sparsity they are compared at."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.sae.activations import AbsTopK, TopK
from saelab.sae.config import SAEConfig
from saelab.sae.sae import SAE
from saelab.sae.untrained import make_untrained, prepare

Reconstruction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps activations (n, d_in) to their reconstructions (n, d_out) and the number of numbers each is made of (n)."""


def reconstruct_by(sae: SAE) -> Reconstruction:
    """An SAE's reconstruction and the latents that fire."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(sae.device)
        codes = sae.encode_sparse(x)
        return sae.decode(codes, x=x), codes.l0

    return reconstruct


def make_constant(value: Float[Tensor, "d_out"]) -> Reconstruction:
    """An ablation: the same vector for every token."""
    return lambda x: (value.to(x).expand(len(x), -1), torch.zeros(len(x), dtype=torch.int64))


def make_baselines(
    sae: SAE, l0: float, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], seed: int
) -> dict[str, Reconstruction]:
    """Three baselines for an SAE that uses `l0` latents a token, fitted to a sample of inputs and targets.

    untrained: the SAE as training would start it, at the L0 that the trained one has.
    random: the best k = round(l0) of `d_sae` random unit directions; the encoder is tied to them, up to a fitted scale
    (a transcoder's are of the input, and what they say of the target is fitted).
    pca: the sample's first k principal components, which need no dictionary wider than d_in.
    linear, for a transcoder instead: the best affine map of rank k, or of any rank beside a skip connection.
    """
    cfg = sae.cfg
    k = min(max(1, round(l0)), cfg.d_sae)
    activation = AbsTopK(k) if cfg.activation.signed else TopK(k)
    drawn = SAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, d_out=cfg.d_out, activation=activation, normaliser="none")
    x, y = x.to(sae.device), y.to(sae.device)
    rivals = {
        "untrained": reconstruct_by(make_untrained(sae, x, y, seed=seed)),
        "random": reconstruct_by(prepare(drawn, x, seed + 1, y)),
    }
    rank = min(round(l0), cfg.d_in, cfg.d_target)
    if cfg.d_out is None:
        return rivals | {"pca": make_pca(x, rank)}
    return rivals | {"linear": make_linear(x, y, min(cfg.d_in, cfg.d_out) if cfg.skip else rank)}


def make_pca(sample: Float[Tensor, "n d_in"], k: int) -> Reconstruction:
    """The best reconstruction of the sample from its mean and k directions."""
    mean = exact(sample).mean(0)
    centred = exact(sample) - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :k]

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = exact(x)
        return (x - mean) @ directions @ directions.T + mean, torch.full((len(x),), k)

    return reconstruct


def make_linear(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], k: int) -> Reconstruction:
    """The affine map of rank k that reconstructs the sample's targets best (reduced-rank regression).

    It is the least-squares map, cut down to the k principal components of what that map predicts.
    """
    mean_x, mean_y = exact(x).mean(0), exact(y).mean(0)
    centred, target = exact(x) - mean_x, exact(y) - mean_y
    moments = centred.T @ centred
    ridge = 1e-9 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    whole = torch.linalg.solve(moments + ridge, centred.T @ target)
    directions = torch.linalg.eigh(whole.T @ moments @ whole).eigenvectors.flip(1)[:, :k]
    matrix = whole @ directions @ directions.T

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        return (exact(x) - mean_x) @ matrix + mean_y, torch.full((len(x),), k)

    return reconstruct
