"""Activation caches of every dtype that OpenMOSS' chunks may have: rows keep their values, to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import saelab as sl
from saelab.interop import convert_activations

N_SEQ, CTX, D = 3, 8, 16
SAME = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
SHORT = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def write_chunks(folder: Path, dtype: torch.dtype) -> Tensor:
    """Two chunks of one hook point; returns the rows."""
    folder.mkdir(parents=True)
    g, rows = torch.Generator().manual_seed(0), []
    for i in range(2):
        rows.append((torch.randn(N_SEQ, CTX, D, generator=g) * 3).to(dtype))
        tokens = torch.randint(0, 90, (N_SEQ, CTX), generator=g)
        save_file({"activation": rows[-1], "tokens": tokens}, folder / f"chunk-0000000{i}.safetensors")
    return torch.cat(rows).flatten(0, 1)


@pytest.mark.parametrize("dtype", sorted(SAME | SHORT, key=str), ids=str)
def test_rows_keep_their_values(dtype: torch.dtype, tmp_path: Path) -> None:
    made = write_chunks(tmp_path / "cache" / "h", dtype)
    acts = convert_activations(tmp_path / "cache", tmp_path / "out", model="m", hook_point="h", progress=False)
    assert acts[:].dtype == (dtype if dtype in SAME else torch.float16)
    assert torch.equal(acts[:].double(), made.double())


def test_an_sae_learns_from_rows_of_eight_bits(tmp_path: Path) -> None:
    write_chunks(tmp_path / "cache" / "h", torch.float8_e4m3fn)
    acts = convert_activations(tmp_path / "cache", tmp_path / "out", model="m", hook_point="h", progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=32, activation=sl.TopK(k=4)), seed=0)
    sae.fit(acts, sl.TrainConfig(n_tokens=48, batch_size=24), progress=False)
    assert bool(sae.W_dec.isfinite().all()) and sae.provenance is not None and sae.provenance.hook_point == "h"


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_chunks(tmp_path / "cache" / "h", torch.float8_e4m3fn)
    wrong = torch.full((N_SEQ, CTX, D), float("nan")).to(torch.float8_e4m3fn)
    held = {"activation": wrong, "tokens": torch.zeros(N_SEQ, CTX, dtype=torch.int64)}
    save_file(held, tmp_path / "cache" / "h" / "chunk-00000001.safetensors")
    with pytest.raises(ValueError, match=r"finite|NaN"):
        convert_activations(tmp_path / "cache", tmp_path / "out", model="m", hook_point="h", progress=False)
