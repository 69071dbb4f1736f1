"""The normaliser axis: an invertible affine map between activations and what the dictionary sees."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.functional.metrics import exact

Kind = Literal["none", "scale", "whiten"]

KINDS: tuple[Kind, ...] = ("none", "scale", "whiten")

RIDGE = 1e-6  # of the largest variance: directions with less than this are not amplified further


class Normaliser(nn.Module):
    """`normalise(x) = (x - mean) M` and its inverse; saved with the weights.

    `none`: the identity. `scale`: M is one number, so that E||(x - mean) M||^2 = d_in. `whiten`: M maps principal
    components to unit variance (arXiv:2412.16247), those of almost no variance kept small. Learned by `fit`; the
    identity until then.
    """

    mean: Float[Tensor, "d_in"]
    matrix: Tensor
    inverse: Tensor

    def __init__(self, kind: Kind, d_in: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "none":
            return
        unit = torch.eye(d_in) if kind == "whiten" else torch.ones(())
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("matrix", unit.clone())
        self.register_buffer("inverse", unit.clone())

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n_tokens d_in"]) -> None:
        """Learn mean and M from a sample of activations, in float64."""
        if self.kind == "none":
            return
        x = exact(x)
        mean = x.mean(0)
        centred = x - mean
        self.mean.copy_(mean)
        if self.kind == "scale":
            root = (centred.square().sum(1).mean() / x.shape[1]).sqrt()
            root = root if root > 0 else torch.ones_like(root)
            self.inverse.copy_(root)
            self.matrix.copy_(root.reciprocal())
            return
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))
        roots = (variances.clamp(min=0) + RIDGE * variances[-1].clamp(min=1e-30)).sqrt()
        self.matrix.copy_(directions / roots)
        self.inverse.copy_((directions * roots).T)

    def normalise(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`(x - mean) M`."""
        return x if self.kind == "none" else self.apply_matrix(x - self.mean, self.matrix)

    def unnormalise(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """`x M^-1 + mean`."""
        return x if self.kind == "none" else self.apply_matrix(x, self.inverse) + self.mean

    def fold_into(self, weight: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        """`M weight`: what does to `x - mean` what the weight does to `normalise(x)`."""
        return self.matrix @ weight if self.matrix.ndim else self.matrix * weight

    @staticmethod
    def apply_matrix(x: Float[Tensor, "*batch d_in"], matrix: Tensor) -> Float[Tensor, "*batch d_in"]:
        """`x M`, for a matrix or a single number."""
        return x @ matrix if matrix.ndim else x * matrix
