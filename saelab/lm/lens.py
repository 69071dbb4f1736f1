"""What a direction in the residual stream says to the next token: the last norm and the unembedding, linearised."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.lm.models import Model

BIG = 1e4  # so that the norm's epsilon vanishes


@torch.no_grad()
def read_out(model: Model, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """Logits that each direction adds to a residual stream of unit scale, the final norm's weight folded in.

    With the norm's scale held fixed, adding `a d` to a residual of scale s (its root mean square, or its standard
    deviation where the norm subtracts the mean) adds `a / s` times these numbers to the logits, exactly; a cap on the
    logits comes after. They are found by running the model's own modules, whatever their kind. ValueError for
    directions of another width.
    """
    if directions.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"Directions must have the residual stream's width ({model.cfg.d_model}), got {directions.shape[1]}; "
            "features of another place have no direct effect on the logits."
        )
    weight = next(model.unembed.parameters())
    zero, ones = torch.zeros(1, 1, directions.shape[1]).to(weight), torch.ones(1, 1, directions.shape[1]).to(weight)
    bias = model.ln_final(zero)
    centres = bool((model.ln_final(BIG * ones) - bias).abs().amax() < 1e-3)  # nothing is left of a constant
    x = directions.to(weight)[:, None]
    scale = (x - x.mean(-1, keepdim=True) if centres else x).square().mean(-1, keepdim=True).sqrt()
    folded = (model.ln_final(BIG * x / scale.clamp(min=1e-12)) - bias) * scale
    return (model.unembed(folded) - model.unembed(zero))[:, 0].float()
