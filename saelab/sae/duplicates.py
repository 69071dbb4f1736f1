"""`DuplicateReset`: rows of a dictionary that point where another does are replaced in training."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sae.encoders import PursuitEncoder

CHUNK_NUMBERS = 2**24  # cosines held at a time


@dataclass(frozen=True, kw_only=True)
class DuplicateReset:
    """Replacement of nearly equal rows of W_dec in training, for pursuits: one of two such rows is hardly ever chosen
    (arXiv:2412.16247).

    Every `every_steps` steps each row whose cosine to an earlier row is above `cos` becomes a random direction of the
    same norm; where codes are signed, opposite rows are equal too. The first step after a replacement is counted like
    any other, and Adam's moments are left as they are: they fade within tens of steps.

    >>> DuplicateReset(every_steps=50).find(torch.eye(2)[[0, 1, 0]], signed=False)
    tensor([False, False,  True])
    """

    cos: float = 0.9
    """cosine above which two rows are taken for equal"""
    every_steps: int = 100
    """steps between replacements"""

    def __post_init__(self) -> None:
        if not 0 < self.cos < 1:
            raise ValueError(f"`cos` must be in (0, 1), got {self.cos}.")
        if self.every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1, got {self.every_steps}.")

    def check(self, cfg: Any) -> None:
        """Raise ValueError for an SAE whose rows cannot be replaced alone."""
        if not isinstance(cfg.encoder, PursuitEncoder):
            raise ValueError(
                f"`duplicates` must go with a pursuit, whose rows encode too, got encoder {cfg.encoder!r}; "
                "leave it out, AuxK revives latents of a linear encoder."
            )
        if cfg.dictionary not in ("unit", "free"):
            raise ValueError(f"`duplicates` must go with a dictionary of free rows, got {cfg.dictionary!r}.")

    @torch.no_grad()
    def find(self, W: Float[Tensor, "d_sae d_in"], signed: bool) -> Bool[Tensor, "d_sae"]:
        """Rows that are nearly equal to one before them, or where `signed` to its opposite."""
        unit = W / W.norm(dim=1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)
        places, found = torch.arange(len(W), device=W.device), []
        for rows in torch.split(places, max(1, CHUNK_NUMBERS // len(W))):
            cosines = unit[rows] @ unit.T
            cosines = cosines.abs_() if signed else cosines
            found.append(((cosines > self.cos) & (places < rows[:, None])).any(1))
        return torch.cat(found)

    @torch.no_grad()
    def replace(self, W: Float[Tensor, "d_sae d_in"], signed: bool, n_steps: int, seed: int) -> None:
        """Replace duplicates in place, if that is due after so many steps.

        Args:
            W: the dictionary.
            signed: whether codes may be negative.
            n_steps: number of completed steps.
            seed: seed of the run; with the number of steps it seeds the directions, so that no state has to be saved.
        """
        if n_steps % self.every_steps:
            return
        found = self.find(W, signed).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + n_steps)
        drawn = torch.randn(len(found), W.shape[1], generator=generator).to(W)
        W[found] = drawn / drawn.norm(dim=1, keepdim=True) * W[found].norm(dim=1, keepdim=True)
