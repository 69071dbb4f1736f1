"""SAEs whose rows a test chooses."""

import torch
from torch import Tensor

import saelab as sl


def sae_of(
    rows: Tensor, activation: sl.sae.Activation | None = None, encoder: Tensor | None = None, **axes: object
) -> sl.SAE:
    """An SAE with these decoder rows and no biases; its encoder has the same, or rows of its own."""
    cfg = {"d_in": rows.shape[1], "d_sae": len(rows), "activation": activation or sl.TopK(k=2), "normalizer": "none"}
    sae = sl.SAE(sl.SAEConfig(**cfg | axes), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        if sae.W_enc is not None:
            sae.W_enc.copy_((rows if encoder is None else encoder).T)
        for bias in (sae.b_enc, sae.b_dec):
            if bias is not None:
                bias.zero_()
    return sae
