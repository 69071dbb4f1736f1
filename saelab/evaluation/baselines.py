"""What an SAE must beat: reconstructions that were not trained, each at the sparsity they are compared at."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.sae.activations import AbsTopK, TopK
from saelab.sae.config import SAEConfig
from saelab.sae.sae import SAE
from saelab.sae.trainee import Trainee
from saelab.training.config import TrainConfig

Reconstruction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps activations (n, d_in) to their reconstructions (n, d_in) and the number of numbers each is made of (n)."""


def reconstruct_by(sae: SAE) -> Reconstruction:
    """An SAE's reconstruction and the latents that fire."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = sae.encode_sparse(x.to(sae.device))
        return sae.decode(codes), codes.l0

    return reconstruct


def make_constant(value: Float[Tensor, "d_in"]) -> Reconstruction:
    """An ablation: the same vector for every token."""
    return lambda x: (value.to(x).expand_as(x), torch.zeros(len(x), dtype=torch.int64))


def make_baselines(cfg: SAEConfig, l0: float, sample: Float[Tensor, "n d_in"], seed: int) -> dict[str, Reconstruction]:
    """Three baselines for an SAE that uses `l0` latents a token, fitted to a sample of activations.

    untrained: the SAE as training would start it, at whatever L0 that has.
    random: the best k = round(l0) of `d_sae` random unit directions; the encoder is tied to them, up to a fitted scale.
    pca: the sample's first k principal components, which need no dictionary wider than d_in.
    """
    k = min(max(1, round(l0)), cfg.d_sae)
    activation = AbsTopK(k) if cfg.activation.signed else TopK(k)
    drawn = SAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, activation=activation, normaliser="none")
    return {
        "untrained": reconstruct_by(prepare(cfg, sample, seed)),
        "random": reconstruct_by(prepare(drawn, sample, seed + 1)),
        "pca": make_pca(sample, min(round(l0), cfg.d_in)),
    }


def prepare(cfg: SAEConfig, sample: Float[Tensor, "n d_in"], seed: int) -> SAE:
    """An SAE at step 0 of its training: drawn from `seed`, fitted in place and scale to the sample."""
    sae = SAE(replace(cfg, aux=None), seed).to(sample.device)
    trainee = Trainee(sae, TrainConfig(seed=seed))
    trainee.prepare(sample)
    if cfg.activation.threshold == "running":  # or its codes would depend on the batch
        trainee.observe(trainee.objective(sample[:4096]))
    return sae


def make_pca(sample: Float[Tensor, "n d_in"], k: int) -> Reconstruction:
    """The best reconstruction of the sample from its mean and k directions."""
    mean = exact(sample).mean(0)
    centred = exact(sample) - mean
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :k]

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = exact(x)
        return (x - mean) @ directions @ directions.T + mean, torch.full((len(x),), k)

    return reconstruct
