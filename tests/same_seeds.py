"""Generators as saelab draws them, for computing anew what it drew: `--seed-offset` does not move these."""

import numpy as np
import torch


def rng_of(seed: int) -> np.random.Generator:
    """numpy's, of a seed."""
    return np.random.default_rng(seed)


def generator_of(seed: int) -> torch.Generator:
    """torch's, of a seed."""
    return torch.Generator().manual_seed(seed)
