"""Untrained SAEs with the same number of active latents: baselines for trained ones."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.config import SAEConfig
from saelab.sae.finishing import cut_to, mean_l0
from saelab.sae.sae import SAE
from saelab.sae.trainee import Trainee
from saelab.training.config import TrainConfig


def prepare(cfg: SAEConfig, x: Float[Tensor, "n d_in"], seed: int, y: Float[Tensor, "n d_out"] | None = None) -> SAE:
    """SAE as it is before its first training step: random weights, fitted in location and scale to a sample.

    Args:
        cfg: its configuration; the AuxK loss is ignored.
        x: (n, d_in) sample of activations.
        seed: seed of the weights.
        y: (n, d_out) targets of the same tokens, for a transcoder.
    """
    sae = SAE(replace(cfg, aux=None), seed).to(x.device)
    sample = x if cfg.d_out is None or y is None else torch.cat([x, y], dim=1)
    trainee = Trainee(sae, TrainConfig(seed=seed))
    trainee.prepare(sample)
    if cfg.activation.threshold == "running":  # sets the threshold, as codes would depend on the batch without
        trainee.observe(trainee.objective(sample[:4096]))
    return sae


def make_untrained(
    sae: SAE, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"] | None = None, *, seed: int = 0
) -> SAE:
    """Untrained SAE of the same configuration and hook point, with as many active latents per token as `sae` has on
    `x`.

    Its weights are those that training starts from: random directions, with biases and scale fitted to the sample.
    Where L0 is not fixed by k, all thresholds or biases are adjusted by one number to match it.

    Args:
        sae: the trained SAE to match.
        x: (n, d_in) sample of activations.
        y: (n, d_out) targets of the same tokens, for a transcoder.
        seed: seed of the weights.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
    >>> make_untrained(sae, torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), seed=1).cfg.activation
    TopK(k=4)
    """
    x = x.float().to(sae.device)
    made = prepare(sae.cfg, x, seed, None if y is None else y.float().to(sae.device))
    wanted = mean_l0(sae, x)
    if abs(math.log(max(mean_l0(made, x), 1e-6) / max(wanted, 1e-6))) > 1e-3:
        cut_to(made, x, wanted)
    made.provenance = sae.provenance
    return made
