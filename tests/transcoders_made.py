"""Random transcoders and SAEs with biases, and graphs of tiny models."""

from typing import Any

import torch

import saelab as sl


def make_coder(width: int = 32, seed: int = 0, *, is_transcoder: bool = True, d_sae: int = 48, **axes: Any) -> sl.SAE:
    """Untrained, with random biases, and a random skip connection where it has one."""
    cfg: dict[str, Any] = {"activation": sl.TopK(k=4), "normalizer": "none", **axes}
    if is_transcoder:
        cfg["d_out"] = width
    coder = sl.SAE(sl.SAEConfig(d_in=width, d_sae=d_sae, **cfg), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (coder.b_enc, coder.b_dec, coder.W_skip):
            if weight is not None:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
        if coder.normalizer.kind in ("scale", "whiten"):
            coder.fit_normalizers(
                torch.randn(200, coder.cfg.d_in + (width if is_transcoder else 0), generator=generator)
            )
    return coder


def cover(model: Any, **axes: Any) -> dict[Any, sl.SAE]:
    """A transcoder for the MLP of each layer, by its hook points."""
    places = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(model.cfg.n_layers)]
    return {place: make_coder(model.cfg.d_model, i, **axes) for i, place in enumerate(places)}
