"""Checkpoints of a run of several processes: each writes its latents, and any other number of processes goes on.

They are written and read by `torch.distributed.checkpoint` in safetensors files, one per process, beside the same
`progress.json` as that of one process. All weights have latents as their first axis there.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.stores.files import replace_folder, write_json
from saelab.stores.tensors import load_tensors
from saelab.training.checkpoint import PROGRESS, SCHEMA_VERSION, divide_state, read_progress
from saelab.training.config import Batches, Trainable, latent_axes_of
from saelab.training.optimizer import make_moments, name_optimized
from saelab.training.ranks import RankGrid

KINDS = ("weights", "counters", "optimiser")
BATCHES = "batches"


def save_shared(
    folder: Path,
    progress: Mapping[str, Any],
    trainables: Sequence[Trainable],
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Batches,
    ranks: RankGrid,
) -> None:
    """Write a checkpoint together with the other processes; the old one is kept until this one is complete.

    Args:
        folder: the checkpoint's folder, which all processes see.
        progress: config, step, history and running sums, as JSON values; written by the first process.
        trainables: what is trained, with this process's share of the weights.
        optimizers: the optimizer of each trainable.
        batches: the data, whose position is the same in all processes.
        ranks: the processes.

    Raises:
        RuntimeError: a process could not write; the message names it.
    """
    import torch.distributed.checkpoint as dcp

    plain, tensors = divide_state(batches.state_dict())
    state = {key: _as_global(t, axis, ranks) for key, t, axis in _parts(trainables, optimizers)}
    state |= {f"{BATCHES}.{name}": t for name, t in tensors.items()}
    with ExitStack() as stack:
        staged = ranks.on_first(lambda: str(stack.enter_context(replace_folder(folder, last=PROGRESS))))
        failed: BaseException | None = None
        try:
            dcp.save(state, storage_writer=_writer(staged), process_group=ranks.group)
        except dcp.api.CheckpointException as error:  # in all processes, with the errors of those that failed
            own = error.failures.get(torch.distributed.get_rank(ranks.group))
            failed = own[0] if own else None
        except Exception as error:  # whatever it was, the others are told
            failed = error
        ranks.agree(failed)
        head = {"schema_version": SCHEMA_VERSION, "batches": plain}

        def complete() -> None:
            for file in Path(staged).glob("*.safetensors"):
                _order_metadata(file)
            write_json(Path(staged) / PROGRESS, {**head, **progress}, sealed=True)
            stack.close()  # which moves the files into place

        ranks.on_first(complete)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which the library that writes it puts in random order: two
    checkpoints of one state are then the same bytes.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def is_shared(folder: Path) -> bool:
    """Whether a checkpoint was written by several processes."""
    return (folder / PROGRESS).is_file() and not (folder / f"{KINDS[0]}_0.safetensors").is_file()


def load_shared(
    folder: Path,
    trainables: Sequence[Trainable],
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Batches,
    ranks: RankGrid,
) -> dict[str, Any]:
    """Restore a checkpoint of several processes or of one, and return its progress.

    Args:
        folder: the checkpoint's folder, which all processes see.
        trainables: what is trained; this process's share of weights and counters is restored in place.
        optimizers: the optimizer of each trainable; their state is restored in place.
        batches: the data, which continues from the saved position.
        ranks: the processes, which may be of another number than those that wrote it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is damaged, edited, of another version, or of other modules or data.
    """
    progress = read_progress(folder)
    for trainable, optimizer in zip(trainables, optimizers, strict=True):
        _make_moments(trainable, optimizer)
    state = {key: (t, axis) for key, t, axis in _parts(trainables, optimizers)}
    position = _read_shared(folder, state, ranks) if is_shared(folder) else _read_single(folder, state, ranks)
    batches.load_state_dict({**progress["batches"], **position})
    return progress


def _read_shared(folder: Path, state: Mapping[str, tuple[Tensor, int | None]], ranks: RankGrid) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    reader = _reader(str(folder))
    held = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {key: _as_global(t, axis, ranks) for key, (t, axis) in state.items()}
    position = {key: torch.empty(held[key].size, dtype=held[key].properties.dtype) for key in held if _is_position(key)}
    due = {key: (tuple(t.shape), t.dtype) for key, t in {**wanted, **position}.items()}
    found = {key: (tuple(one.size), one.properties.dtype) for key, one in held.items()}
    if due != found:
        names = sorted(key for key in due.keys() | found.keys() if due.get(key) != found.get(key))
        raise ValueError(
            f"{folder} must hold what this run needs; {names[0]!r} should be {due.get(names[0])}, got "
            f"{found.get(names[0])}. Train again."
        )
    with warnings.catch_warnings():
        # said of `no_dist` too, which asks for it
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(
            {**wanted, **position},
            storage_reader=_reader(str(folder)),
            process_group=ranks.group,
            no_dist=ranks.alone,
        )
    return {key.removeprefix(f"{BATCHES}."): t for key, t in position.items()}


def _read_single(folder: Path, state: Mapping[str, tuple[Tensor, int | None]], ranks: RankGrid) -> dict[str, Tensor]:
    """This process's share of the files that one process wrote."""
    held: dict[str, dict[str, Tensor]] = {}
    for key, (mine, axis) in state.items():
        file, _, name = key.partition(".")
        if file not in held:
            held[file] = load_tensors(folder / f"{file}.safetensors")
        whole = held[file].get(name)
        if whole is not None and axis is not None:
            rows = whole.movedim(axis, 0)
            own = ranks.latents.split(len(rows))
            whole = rows[own.start : own.stop]
        if whole is None or whole.shape != mine.shape:
            raise ValueError(
                f"{folder} must hold {name} of shape {tuple(mine.shape)} for this process, got "
                f"{None if whole is None else tuple(whole.shape)}. Train again."
            )
        mine.copy_(whole)
    return load_tensors(folder / f"{BATCHES}.safetensors")


def _is_position(key: str) -> bool:
    return key.startswith(f"{BATCHES}.")


def _parts(
    trainables: Sequence[Trainable], optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[str, Tensor, int | None]]:
    """Tensors of weights, counters and moments by name, latents first, and their axis of the latents in the files of
    one process; None for those that all processes have alike.
    """
    for i, (trainable, optimizer) in enumerate(zip(trainables, optimizers, strict=True)):
        axes = latent_axes_of(trainable)
        for name, t in trainable.module.state_dict().items():
            axis = axes.get(name) if t.ndim else None
            yield f"weights_{i}.{name}", t if axis is None else t.movedim(axis, 0), axis
        for name, t in trainable.state.items():
            yield f"counters_{i}.{name}", t, axes.get(name) if t.ndim else None
        for name, parameter in name_optimized(trainable.module, optimizer).items():
            for key, t in optimizer.state.get(parameter, {}).items():  # in the order of memory, latents first
                yield f"optimiser_{i}.{name}.{key}", t, 0 if name in axes and t.ndim else None


def _make_moments(trainable: Trainable, optimizer: torch.optim.Optimizer) -> None:
    """Memory for the moments, which Adam has from its first step on."""
    for parameter in name_optimized(trainable.module, optimizer).values():
        make_moments(parameter, optimizer)


def _as_global(t: Tensor, axis: int | None, ranks: RankGrid) -> Tensor:
    """The tensor of all latents that this process has a part of, which shares its memory; others as they are."""
    if axis is None or ranks.alone:
        return t.detach()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(0) if name == "latents" else Replicate() for name in ranks.mesh_axes]
    return DTensor.from_local(t.detach(), ranks.mesh, placements, run_check=False)


def _writer(folder: str) -> Any:
    return _storage("HuggingFaceStorageWriter")(folder, save_distributed=True)


def _reader(folder: str) -> Any:
    return _storage("HuggingFaceStorageReader")(folder)


def _storage(name: str) -> Any:
    import torch.distributed.checkpoint as dcp

    if not hasattr(dcp, name):
        raise RuntimeError(
            f"Checkpoints of several processes need a torch.distributed.checkpoint that writes safetensors (torch 2.8 "
            f"and later), got torch {torch.__version__}; update torch, or train with one process."
        )
    return getattr(dcp, name)
