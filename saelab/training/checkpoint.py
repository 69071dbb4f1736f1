"""Checkpoints of a training run: one folder, replaced as a whole, from which the run goes on bit for bit."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.stores.files import (
    load_tensors,
    read_json,
    remove_leftovers,
    replace_folder,
    save_tensors,
    settle,
    write_json,
)
from saelab.training.optimiser import name_optimised
from saelab.training.protocols import Batches, Trainable

SCHEMA_VERSION = 1
FOLDER = "checkpoint"
PROGRESS = "progress.json"
"""written last: where it stands the checkpoint is whole"""


def save_checkpoint(
    folder: Path,
    progress: Mapping[str, Any],
    trainables: Sequence[Trainable],
    optimisers: Sequence[torch.optim.Optimizer],
    batches: Batches,
) -> None:
    """Write weights, counters, optimiser state, place in the data and history; the old checkpoint stands until this
    one is whole.
    """
    plain, tensors = _divide(batches.state_dict())
    with replace_folder(folder, last=PROGRESS) as temp:
        for i, (trainable, optimiser) in enumerate(zip(trainables, optimisers, strict=True)):
            save_tensors(temp / f"weights_{i}.safetensors", trainable.module.state_dict())
            save_tensors(temp / f"counters_{i}.safetensors", trainable.state)
            save_tensors(temp / f"optimiser_{i}.safetensors", _optimiser_tensors(trainable, optimiser))
        save_tensors(temp / "batches.safetensors", tensors)
        write_json(temp / PROGRESS, {"schema_version": SCHEMA_VERSION, "batches": plain, **progress})


def find_checkpoint(out: Path) -> Path | None:
    """The whole checkpoint in a run's folder, put in order where a killed process left it unfinished; None where there
    is none. For whoever holds the folder.
    """
    folder = out / FOLDER
    settle(folder)
    if not (folder / PROGRESS).is_file():
        # saelab 0.1 wrote checkpoints beside their place; killed between two renames it left them hidden there
        hidden = [path.parent for path in out.glob(f".{FOLDER}.*.tmp/{PROGRESS}")]
        if hidden:
            os.replace(max(hidden, key=lambda one: int(read_json(one / PROGRESS)["step"])), folder)
    remove_leftovers(out)
    return folder if (folder / PROGRESS).is_file() else None


def load_checkpoint(
    folder: Path, trainables: Sequence[Trainable], optimisers: Sequence[torch.optim.Optimizer], batches: Batches
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its progress; ValueError where it belongs to another version."""
    progress: dict[str, Any] = read_json(folder / PROGRESS)
    if progress["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"A checkpoint must have schema_version {SCHEMA_VERSION}, got {progress['schema_version']} in {folder}; "
            "train with the version of saelab that wrote it."
        )
    for i, (trainable, optimiser) in enumerate(zip(trainables, optimisers, strict=True)):
        trainable.module.load_state_dict(load_tensors(folder / f"weights_{i}.safetensors"))
        counters = load_tensors(folder / f"counters_{i}.safetensors")
        trainable.state = {name: value.to(trainable.state[name].device) for name, value in counters.items()}
        _restore_optimiser(trainable, optimiser, load_tensors(folder / f"optimiser_{i}.safetensors"))
    batches.load_state_dict({**progress["batches"], **load_tensors(folder / "batches.safetensors")})
    return progress


def _divide(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value for key, value in state.items() if key not in tensors}, tensors


def _optimiser_tensors(trainable: Trainable, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in name_optimised(trainable.module, optimiser).items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _restore_optimiser(trainable: Trainable, optimiser: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    for name, parameter in name_optimised(trainable.module, optimiser).items():
        mine = {key[len(name) + 1 :]: value for key, value in saved.items() if key.startswith(f"{name}.")}
        if mine:
            optimiser.state[parameter] = {
                key: value.to(parameter.device) if value.ndim else value for key, value in mine.items()
            }
