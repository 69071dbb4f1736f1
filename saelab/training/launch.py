"""The mesh of the processes that a launcher such as `torchrun` started, for the command line."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started: RANK and WORLD_SIZE are in its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def name_process() -> str:
    """This process as messages name it; "" where it is alone or the first."""
    rank = os.environ.get("RANK", "0") if is_launched() else "0"
    return "" if rank == "0" else f"process {rank} on {socket.gethostname()}"


def local_device(kind: str) -> torch.device:
    """The device of this process: of several accelerators of a machine that of its number there."""
    if kind == "cpu" or not is_launched():
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def launched_mesh(shape: tuple[int, int] | None, device: torch.device) -> Iterator[Any]:
    """Context with the `DeviceMesh` of all processes, (data, latents), whose group is left at its end; None where this
    process was not started by a launcher.

    Args:
        shape: number of ranks on the axes "data" and "latents"; None puts all on the latents.
        device: device that this process trains on; its kind decides between gloo and nccl.

    Raises:
        ValueError: for a shape that does not have all processes.
    """
    if not is_launched():
        if shape is not None and shape != (1, 1):
            raise ValueError(
                f"`mesh` must go with processes that a launcher started, got {shape[0]}x{shape[1]} in one process; run "
                f"torchrun --nproc-per-node {shape[0] * shape[1]} -m saelab ..."
            )
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh

    n = int(os.environ["WORLD_SIZE"])
    n_data, n_latents = shape or (1, n)
    if n_data * n_latents != n:
        raise ValueError(f"`mesh` must have all {n} processes, got {n_data}x{n_latents}.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield init_device_mesh(device.type, (n_data, n_latents), mesh_dim_names=("data", "latents"))
    finally:
        dist.destroy_process_group()
