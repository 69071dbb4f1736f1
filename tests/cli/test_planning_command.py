"""`saelab plan` prints a plan for a model or a width, with rates that were measured before or now."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_app import Shell, shell as shell

from saelab.cli.planning import read_model
from saelab.lm.models import WORLD_MODELS
from saelab.sae import planning
from saelab.sae.activation_functions import TopK
from saelab.sae.config import SAEConfig
from saelab.sae.planning import StepRates, plan_training
from saelab.stores.tensors import load_tensors
from saelab.training.config import TrainConfig


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_rates", lambda cfg: StepRates(1e-12, 1e-9, 1e-9))


def test_a_plan_of_widths_is_that_of_the_library(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["--d-in", "768", "--d-sae", "98304", "--tokens", "1e9", "--k", "64", "--mesh", "2x4"]
    run = shell("plan", *words, "--batch-size", "8192", "--dtype", "bfloat16", "--json", str(file))
    cfg = SAEConfig(d_in=768, d_sae=98_304, activation=TopK(k=64))
    budget = TrainConfig(n_tokens=10**9, batch_size=8192)
    plan = plan_training(cfg, budget, 2, 4, dtype=torch.bfloat16, rates=StepRates(1e-12, 1e-9, 1e-9))
    assert run.code == 0 and run.out == f"{plan}\n"
    assert json.loads(file.read_text()) == json.loads(json.dumps(plan.to_dict()))


def test_rates_of_a_file_are_used_and_none_are_measured(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    words = ["plan", "--d-in", "64", "--d-sae", "1024", "--n-tokens", "409600", "--batch-size", "4096"]
    assert shell(*words, "--json", str(file)).code == 0
    monkeypatch.setattr(planning, "measure_rates", None)
    again = shell(*words, "--rates", str(file))
    step = 4096 * (1024 * 64 * 1e-12 + 32 * 64 * 1e-9) + 1024 * 64 * 1e-9
    assert again.code == 0 and f"{step:.3g} s" in again.out
    without = shell(*words, "--no-time")
    assert without.code == 0 and "time" not in without.out
    file.write_text('{"product": 1}')
    refused = shell(*words, "--rates", str(file))
    assert refused.code == 2 and "Rates must be numbers" in refused.err and str(file) in refused.err


@pytest.mark.parametrize("name", ["tales", "othello"])
def test_a_built_in_model_is_read_without_its_weights(shell: Shell, name: str) -> None:
    held = load_tensors(WORLD_MODELS / name / "model.safetensors")
    found = read_model(name)
    assert found.n_parameters == sum(t.numel() for t in held.values())
    assert {held[key].shape[1] for key in held if key.endswith(("embed_tokens.weight", "wte.weight"))} == {
        found.d_model
    }
    run = shell("plan", name, "--d-sae", "512", "--no-time")
    assert run.code == 0 and f"{found.n_parameters:,}" in run.out and "memory while collecting" in run.out


def test_the_tiny_model_is_made(tiny: Any) -> None:
    found = read_model("tiny")
    assert found.d_model == tiny.cfg.d_model
    assert found.n_parameters == sum(p.numel() for p in tiny.original_model.parameters())


def test_a_folder_without_files_of_weights_has_a_width(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": 96}}')
    assert read_model(str(tmp_path)) == (str(tmp_path), 96, None)
    (tmp_path / "config.json").write_text('{"vocab_size": 96}')
    with pytest.raises(ValueError, match="must say its width"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--d-sae", "64"], "`--d-in` must be given"),
        (["nowhere", "--d-sae", "64"], "must be a folder"),
        (["--d-in", "8", "--d-sae", "64", "--tokens", "nan"], "`--n-tokens` must be"),
        (["--d-in", "8", "--d-sae", "64", "--dtype", "int8"], "`--dtype` must be"),
        (["--d-in", "8", "--d-sae", "64", "--mesh", "1x3"], "must divide"),
        (["--d-in", "8", "--d-sae", "64", "--activation", "sparsemax", "--k", "4"], "sparsemax"),
    ],
)
def test_what_cannot_be_planned_is_wrong_use(shell: Shell, words: list[str], said: str) -> None:
    run = shell("plan", *words)
    assert run.code == 2 and said in run.err and len(run.err.splitlines()) == 1
