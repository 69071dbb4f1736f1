"""Under `torch.autocast` the language model computes in low precision, which is written down, and an SAE does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.functional.autocast import autocast_dtype, computing_in

HOOK = "blocks.1.hook_resid_post"
LOW = torch.bfloat16
QUIET: dict[str, Any] = {"progress": False}


def autocast() -> Any:
    return torch.autocast("cpu", LOW)


@pytest.fixture(scope="module")
def model() -> Any:
    return sl.lm.tiny_model()


@pytest.fixture(scope="module")
def tokens(model: Any) -> sl.Tokens:
    return sl.tokenize(model, [f"Once upon a time there were {i} cats." for i in range(24)], ctx_len=16)


def test_collected_rows_are_those_of_the_model_under_autocast(model: Any, tokens: sl.Tokens, tmp_path: Path) -> None:
    with autocast():
        low = sl.collect(model, tokens, HOOK, tmp_path, **QUIET)
        reference = sl.lm.capture(model, tokens.ids, [HOOK])[HOOK]
    exact = sl.collect(model, tokens, HOOK, **QUIET)
    assert low.dtype == torch.float32
    assert torch.equal(low[:], reference[sl.TokenMask().apply(tokens).keep].float())
    error = (low[:] - exact[:]).norm() / exact[:].norm()
    assert 2**-14 < error < 2**-4  # a few roundings to 8 bits
    assert low.provenance is not None and low.provenance.autocast == "bfloat16"
    assert exact.provenance is not None and "autocast" not in exact.provenance.to_dict()
    with pytest.raises(ValueError, match="autocast"):
        sl.collect(model, tokens, HOOK, tmp_path, **QUIET)
    assert sl.Activations.load(tmp_path, HOOK).provenance == low.provenance


def test_a_stream_keeps_the_precision_it_was_made_under(model: Any, tokens: sl.Tokens) -> None:
    settings: dict[str, Any] = {"batch_size": 32, "buffer_tokens": 128, "epochs": 1, "n_seq": 4}
    with autocast():
        made_under = sl.stream(model, tokens, HOOK, **settings)
        low = [torch.cat(list(sl.stream(model, tokens, HOOK, **settings)))]
    with autocast():
        made_before = sl.stream(model, tokens, HOOK, **settings)
    low += [torch.cat(list(made_under)), torch.cat(list(made_before))]
    assert torch.equal(low[0], low[1]) and torch.equal(low[0], low[2])
    exact = sl.stream(model, tokens, HOOK, **settings)
    with autocast():
        rows = torch.cat(list(exact))
    assert torch.equal(rows, torch.cat(list(sl.stream(model, tokens, HOOK, **settings))))
    assert not torch.equal(rows, low[0])


@pytest.mark.parametrize("activation", [sl.TopK(k=4), sl.BatchTopK(k=4), sl.JumpReLU(target_l0=8.0)], ids=str)
@pytest.mark.filterwarnings("ignore:The saved SAE must have its target L0")  # in a few steps
def test_an_sae_trains_and_encodes_in_its_own_dtype(activation: Any) -> None:
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
    cfg = sl.SAEConfig(d_in=32, d_sae=128, activation=activation, normalizer="whiten")
    run = sl.TrainConfig(n_tokens=8 * 256, batch_size=256)
    sae = sl.SAE(cfg, seed=0).fit(x, run, **QUIET)
    with autocast():
        other = sl.SAE(cfg, seed=0).fit(x, run, **QUIET)
        found = (other.encode(x), other.encode_sparse(x).to_dense(), other.encode_latents(x, [3, 5]), other(x))
        found += (other.decode(other.encode_sparse(x)), other.decode(other.encode(x)), other.fold().W_enc)
        assert autocast_dtype("cpu") == LOW
    assert all(torch.equal(one, weight) for one, weight in zip(other.parameters(), sae.parameters(), strict=True))
    expected = (sae.encode(x), sae.encode_sparse(x).to_dense(), sae.encode_latents(x, [3, 5]), sae(x))
    expected += (sae.decode(sae.encode_sparse(x)), sae.decode(sae.encode(x)), sae.fold().W_enc)
    for one, truth in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, truth)


def test_what_runs_the_model_with_an_sae_runs_under_autocast(model: Any, tokens: sl.Tokens, tmp_path: Path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=8)), seed=0)
    exact = sl.evaluate(sae, model, tokens, hook_point=HOOK, n_bootstrap=0, allow_mismatch=True, **QUIET)
    with autocast():
        low = sl.evaluate(sae, model, tokens, hook_point=HOOK, n_bootstrap=0, allow_mismatch=True, **QUIET)
        store = sl.harvest(sae, model, tokens, tmp_path, hook_point=HOOK, **QUIET)
    assert low.ce_sae == pytest.approx(exact.ce_sae, abs=0.02) and low.ce_sae != exact.ce_sae
    assert store.manifest.request["autocast"] == "bfloat16"


def test_hook_points_are_measured_without_autocast(tokens: sl.Tokens) -> None:
    measured = sl.lm.tiny_model()
    with autocast():
        sl.collect(measured, tokens, HOOK, **QUIET)
    exact = sl.collect(sl.lm.tiny_model(), tokens, HOOK, **QUIET)
    assert torch.equal(sl.collect(measured, tokens, HOOK, **QUIET)[:], exact[:])


def test_contexts_restore_what_was_in_force() -> None:
    with autocast():
        with computing_in(None, "cpu"):
            assert autocast_dtype("cpu") is None
            with computing_in(torch.float16, "cpu"):
                assert autocast_dtype("cpu") == torch.float16
        assert autocast_dtype("cpu") == LOW and torch.is_autocast_cache_enabled()
    assert autocast_dtype("cpu") is None and autocast_dtype("meta") is None
