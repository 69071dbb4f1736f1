"""The start of wide SAEs, whose codes are searched, is that of others, whose codes are dense."""

from typing import Any

import pytest
import torch

import saelab as sl
from saelab.sae import placement
from saelab.sae.placement import place_weights


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": sl.TopK(k=4)},
        {"activation": sl.BatchTopK(k=4), "init": "data"},
        {"activation": sl.TopK(k=4), "d_out": 5},
        {"activation": sl.ReLU(), "init": "subspace"},
    ],
    ids=str,
)
def test_searched_codes_place_weights_as_dense_ones_do(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(1500, 12, generator=generator),
        torch.randn(1500, settings.get("d_out", 12), generator=generator),
    )
    y = y if "d_out" in settings else x
    placed = []
    for n in (2**26, 0):
        monkeypatch.setattr(placement, "DENSE_NUMBERS", n)
        sae = sl.SAE(sl.SAEConfig(d_in=12, d_sae=2048, **settings), seed=0)
        before = sae.W_enc.detach().clone()
        place_weights(sae, x, y, seed=0)
        assert not torch.equal(sae.W_enc, before)
        placed.append([sae.W_enc.detach(), sae.W_dec.detach(), sae.b_enc.detach(), sae.b_dec.detach()])
    for searched, dense in zip(*placed, strict=True):
        torch.testing.assert_close(searched, dense, rtol=1e-4, atol=1e-5)
