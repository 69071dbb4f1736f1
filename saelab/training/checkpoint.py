"""Checkpoints of a training run: one folder, replaced as a whole, from which the run continues bit for bit.

That needs the same number of threads, as on some processors the rounding of matrix products depends on it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from typing_extensions import TypedDict

from saelab.stores.files import remove_leftovers, replace_folder, save_tensors, settle, write_json
from saelab.stores.jobs import hold_folder
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL, check_settings, naming, read_json, read_sealed, refuse_unknown
from saelab.training.config import Batches, Trainable
from saelab.training.optimizer import name_optimized

SCHEMA_VERSION = 1
FOLDER = "checkpoint"
PROGRESS = "progress.json"
"""written last: where this file exists the checkpoint is complete"""


class _Progress(TypedDict):
    schema_version: int
    batches: dict[str, int | str]
    config: dict[str, Any]
    step: int
    history: list[dict[str, Any]]
    since_log: int
    sums: dict[str, float]


def save_checkpoint(
    folder: Path,
    progress: Mapping[str, Any],
    trainables: Sequence[Trainable],
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Batches,
) -> None:
    """Write a checkpoint: weights, counters, optimizer state, position in the data and history.

    The old checkpoint is kept until this one is complete.

    Args:
        folder: the checkpoint's folder.
        progress: config, step, history and running sums, as JSON values; see `read_progress`.
        trainables: what is trained.
        optimizers: the optimizer of each trainable.
        batches: the data, whose position is saved.
    """
    plain, tensors = divide_state(batches.state_dict())
    with replace_folder(folder, last=PROGRESS) as temp:
        for i, (trainable, optimizer) in enumerate(zip(trainables, optimizers, strict=True)):
            save_tensors(temp / f"weights_{i}.safetensors", trainable.module.state_dict())
            save_tensors(temp / f"counters_{i}.safetensors", trainable.state)
            save_tensors(temp / f"optimiser_{i}.safetensors", _optimizer_tensors(trainable, optimizer))
        save_tensors(temp / "batches.safetensors", tensors)
        head = {"schema_version": SCHEMA_VERSION, "batches": plain}
        write_json(temp / PROGRESS, {**head, **progress}, sealed=True)


def find_checkpoint(out: Path) -> Path | None:
    """Folder of the complete checkpoint in a run's folder, or None; an interrupted replacement is completed first.

    The caller must hold the run's folder.
    """
    folder = out / FOLDER
    if folder.is_dir():
        with hold_folder(folder):  # and its lock goes, if a killed process left one
            settle(folder)
    if not (folder / PROGRESS).is_file():
        # saelab 0.1 wrote checkpoints to a hidden folder; killed between two renames it left them there
        hidden = [path.parent for path in out.glob(f".{FOLDER}.*.tmp/{PROGRESS}")]
        if hidden:
            os.replace(max(hidden, key=lambda one: int(read_json(one / PROGRESS)["step"])), folder)
    remove_leftovers(out)
    return folder if (folder / PROGRESS).is_file() else None


def load_checkpoint(
    folder: Path, trainables: Sequence[Trainable], optimizers: Sequence[torch.optim.Optimizer], batches: Batches
) -> dict[str, Any]:
    """Restore the state that `save_checkpoint` wrote, and return its progress.

    Args:
        folder: the checkpoint's folder.
        trainables: what is trained; weights and counters are restored in place.
        optimizers: the optimizer of each trainable; their state is restored in place.
        batches: the data, which continues from the saved position.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is damaged, edited, of another version, or of other modules or data.
    """
    progress = read_progress(folder)
    for i, (trainable, optimizer) in enumerate(zip(trainables, optimizers, strict=True)):
        _fill(folder / f"weights_{i}.safetensors", trainable.module.load_state_dict)
        counters = load_tensors(folder / f"counters_{i}.safetensors")
        _check_like(folder / f"counters_{i}.safetensors", counters, trainable.state)
        trainable.state = {name: value.to(trainable.state[name].device) for name, value in counters.items()}
        with naming(folder / f"optimiser_{i}.safetensors"):
            _restore_optimizer(trainable, optimizer, load_tensors(folder / f"optimiser_{i}.safetensors"))
    _fill(folder / "batches.safetensors", lambda held: batches.load_state_dict({**progress["batches"], **held}))
    return progress


def read_progress(folder: Path) -> dict[str, Any]:
    """Config, step, history and running sums of a checkpoint, as written by `save_checkpoint`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, edited or of another version.
    """
    path = folder / PROGRESS
    with naming(path):
        held, check_seal = read_sealed(path)
        progress: dict[str, Any] = check_settings(_Progress, held, "A checkpoint")
        if (version := progress.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(
                f"A checkpoint must have schema_version {SCHEMA_VERSION}, got {version} in {folder}; train with the "
                "version of saelab that wrote it."
            )
        if min(progress["step"], progress["since_log"]) < 0:
            raise ValueError(f"`step` must be at least 0, got {progress['step']}. Was it edited?")
        refuse_unknown(progress, [*get_type_hints(_Progress), SEAL], "A checkpoint")
        check_seal()
    # as saelab spelled it once
    progress["config"] = {key.replace("normaliser", "normalizer"): x for key, x in progress["config"].items()}
    return progress


def _fill(path: Path, load: Callable[[dict[str, Tensor]], Any]) -> None:
    """Pass the tensors of a file to `load`; ValueError where they are not those of this run."""
    held = load_tensors(path)
    try:
        load(held)
    except (RuntimeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} must hold what this run needs, got others ({error}). Train again.") from None


def _check_like(path: Path, held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    got, due = ({name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in (held, wanted))
    if got != due:
        names = sorted(name for name in due.keys() | got.keys() if due.get(name) != got.get(name))
        raise ValueError(
            f"{path} must hold what this run needs; {names[0]!r} should be {due.get(names[0])}, got "
            f"{got.get(names[0])}. Train again."
        )


def divide_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The position in the data as JSON values and as tensors."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value for key, value in state.items() if key not in tensors}, tensors


def _optimizer_tensors(trainable: Trainable, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in name_optimized(trainable.module, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(trainable: Trainable, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    for name, parameter in name_optimized(trainable.module, optimizer).items():
        mine = {key[len(name) + 1 :]: value for key, value in saved.items() if key.startswith(f"{name}.")}
        if mine:
            if wrong := [key for key, value in mine.items() if value.ndim and value.numel() != parameter.numel()]:
                raise ValueError(f"`{wrong[0]}` of {name} must have its {parameter.numel()} entries. Train again.")
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if value.ndim else value for key, value in mine.items()
            }
