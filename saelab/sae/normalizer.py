"""Normalization of activations before encoding: an invertible map, affine for most kinds."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.functional.metrics import exact

NormalizerKind = Literal["none", "scale", "whiten", "token_norm", "layer_norm"]

KINDS: tuple[NormalizerKind, ...] = ("none", "scale", "whiten", "token_norm", "layer_norm")
PER_TOKEN: tuple[NormalizerKind, ...] = ("token_norm", "layer_norm")

RIDGE = 1e-6  # fraction of the largest variance added to every one, which bounds how much the smallest are amplified
LAYER_EPSILON = 1e-5  # what layer_norm adds to the deviation it divides by


class Normalizer(nn.Module):
    """Invertible map `normalize(x) = (x - mean) M`, saved with the SAE's weights.

    `none`: the identity. `scale`: M is one number, so that E||(x - mean) M||^2 = d_in. `whiten`: M maps principal
    components to unit variance (arXiv:2412.16247), those of almost no variance kept small. Learned by `fit`; the
    identity until then.

    Two kinds have per-token statistics, so that their inverse needs `x` again and cannot be folded into weights.
    `token_norm`: `x sqrt(d_in) / ||x||`. `layer_norm`: `(x - mean(x)) / (std(x) + 1e-5)` over the token's own entries,
    with the sample standard deviation; its inverse multiplies by `std(x)` alone, as in OpenAI's and SAELens'
    implementations.

    With `widths` the activations are those of several sources side by side, and M is fitted to each by itself: "scale"
    has a factor for each, so that every one of n sources has E||(x - mean) M||^2 = d_in / n and none dominates, and
    "whiten" has a block for each.
    """

    mean: Float[Tensor, "d_in"]
    matrix: Tensor
    inverse: Tensor

    def __init__(self, kind: NormalizerKind, d_in: int, widths: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.kind, self.widths = kind, widths
        if kind == "none":
            return
        unit = torch.eye(d_in) if kind == "whiten" else torch.ones(() if widths is None else d_in)
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("matrix", unit.clone())
        self.register_buffer("inverse", unit.clone())

    @property
    def fitted(self) -> bool:
        """Whether it is another map than the identity it starts as; never for kinds that learn nothing."""
        if self.kind == "none" or self.kind in PER_TOKEN:
            return False
        unit = torch.eye(len(self.mean)).to(self.matrix) if self.matrix.ndim == 2 else torch.ones_like(self.matrix)
        return bool(self.mean.any()) or not torch.equal(self.matrix, unit)

    @torch.no_grad()
    def fit(self, x: Float[Tensor, "n_tokens d_in"]) -> None:
        """Estimate mean and M from a sample of activations, in float64."""
        if self.kind == "none" or self.kind in PER_TOKEN:
            return
        x = exact(x)
        mean = x.mean(0)
        centered = x - mean
        self.mean.copy_(mean)
        parts = centered.split(list(self.widths or (x.shape[1],)), dim=1)
        if self.kind == "scale":
            share = x.shape[1] / len(parts)
            roots = torch.stack([(part.square().sum(1).mean() / share).sqrt() for part in parts])
            roots = torch.where(roots > 0, roots, 1.0)
            if self.widths is not None:
                roots = roots.repeat_interleave(torch.tensor(self.widths, device=roots.device))
            self.inverse.copy_(roots.view_as(self.inverse))
            self.matrix.copy_(roots.reciprocal().view_as(self.matrix))
            return
        maps, inverses = zip(*(_whiten(part) for part in parts), strict=True)
        self.matrix.copy_(torch.block_diag(*maps))
        self.inverse.copy_(torch.block_diag(*inverses))

    def normalize(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Normalized activations: `(x - mean) M`, or with the token's own statistics for per-token kinds."""
        if self.kind == "none":
            return x
        if self.kind in PER_TOKEN:
            shift, scale = self._measure(x)
            return (x - shift) / (scale + LAYER_EPSILON if self.kind == "layer_norm" else scale.clamp(min=1e-30))
        return self.apply_matrix(x - self.mean, self.matrix)

    def unnormalize(
        self, x_hat: Float[Tensor, "*batch d_in"], x: Float[Tensor, "*batch d_read"] | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Inverse of `normalize`: `x_hat M^-1 + mean`.

        A per-token kind takes mean and scale from `x`, the activations that were encoded; ValueError without them.
        """
        if self.kind == "none":
            return x_hat
        if self.kind not in PER_TOKEN:
            return self.apply_matrix(x_hat, self.inverse) + self.mean
        if x is None:
            raise ValueError(
                f"`x` must be given to decode with normalizer '{self.kind}', which measures every token, got none; "
                "pass the activations that were encoded: decode(codes, x=x)."
            )
        shift, scale = self._measure(x.to(x_hat))
        return x_hat * scale + shift

    def output_scale(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"] | float:
        """Factor by which the inverse multiplies each token, for per-token kinds; 1 for the others."""
        return self._measure(x)[1] if self.kind in PER_TOKEN else 1.0

    def fold_into(self, weight: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in n"]:
        """`M weight`: the weight that does to `x - mean` what the given one does to `normalize(x)`; ValueError for
        per-token kinds, which are not linear.
        """
        if self.kind in PER_TOKEN:
            raise ValueError(
                f"`normalizer` must be linear to be folded into weights, got '{self.kind}', which measures every "
                "token; keep it, or normalize the activations before they come here."
            )
        return self.matrix @ weight if self.matrix.ndim == 2 else self.matrix.view(-1, 1) * weight

    def _measure(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Tensor, Tensor]:
        """Per-token shift and scale."""
        if self.kind == "layer_norm":
            return x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.zeros_like(norms), norms / x.shape[-1] ** 0.5

    @staticmethod
    def apply_matrix(x: Float[Tensor, "*batch d_in"], matrix: Tensor) -> Float[Tensor, "*batch d_in"]:
        """`x M`, for a matrix, or a scalar or diagonal M."""
        return x @ matrix if matrix.ndim == 2 else x * matrix


def _whiten(centered: Tensor) -> tuple[Tensor, Tensor]:
    """The map of centered rows to principal components of unit variance, and its inverse."""
    variances, directions = torch.linalg.eigh(centered.T @ centered / len(centered))
    roots = (variances.clamp(min=0) + RIDGE * variances[-1].clamp(min=1e-30)).sqrt()
    return directions / roots, (directions * roots).T
