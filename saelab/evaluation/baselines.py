"""Baselines for reconstruction at the SAE's sparsity: untrained SAE, random dictionary, PCA, linear map, ablations."""

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
"""A function of activations (n, d_in) that returns reconstructions (n, d_out) and the number of nonzero codes of each
(n)."""


def reconstruct_by(sae: SAE) -> Reconstruction:
    """An SAE as a reconstruction function, with the number of latents that fire."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(sae.device)
        codes = sae.encode_sparse(x)
        return sae.decode(codes, x=x), codes.l0

    return reconstruct


def make_constant(value: Float[Tensor, "d_out"]) -> Reconstruction:
    """Ablation: a reconstruction function that returns the same vector for every token."""
    return lambda x: (value.to(x).expand(len(x), -1), torch.zeros(len(x), dtype=torch.int64))


def make_baselines(
    sae: SAE, l0: float, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], seed: int
) -> dict[str, Reconstruction]:
    """Baseline reconstruction functions for an SAE by name, fitted to a sample of inputs and targets.

    untrained: the SAE as initialized before training, at the trained SAE's L0. random: the best k = round(l0) of
    `d_sae` random unit directions; the encoder is tied to them, up to a fitted scale (a transcoder's are directions of
    the input, and its decoder to the target is fitted). pca: the sample's first k principal components, which need no
    dictionary wider than d_in. linear, for a transcoder in place of pca: the best affine map of rank k, or of full rank
    where the transcoder has a skip connection.

    Args:
        sae: the trained SAE or transcoder.
        l0: number of latents that fire on a token, on average.
        x: inputs of the sample.
        y: targets of the sample; for an autoencoder its inputs.
        seed: of the random directions.
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
    """The reconstruction from the sample's mean and its first k principal components."""
    mean = exact(sample).mean(0)
    centred = exact(sample) - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :k]

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = exact(x)
        return (x - mean) @ directions @ directions.T + mean, torch.full((len(x),), k)

    return reconstruct


def make_linear(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], k: int) -> Reconstruction:
    """The affine map of rank k with the least squared error on the sample's targets (reduced-rank regression).

    It is the least-squares map, projected on the first k principal components of its predictions.
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
