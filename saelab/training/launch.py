"""`launched`: the processes that a launcher such as `torchrun` started, for the command line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist

from saelab.stores.jobs import is_launched
from saelab.training.ranks import ALONE, AXES, RankGrid


@contextmanager
def launched(
    shape: tuple[int, int] | None, device: torch.device, timeout: timedelta | None = None
) -> Iterator[tuple[RankGrid, torch.device]]:
    """Context with the grid of all processes, whose group is left at its end, and this one's device; where no launcher
    started this process, a grid of one and the device as it was given.

    Args:
        shape: number of ranks on the axes "data" and "latents"; None puts all on the latents.
        device: kind of device, which decides between gloo and nccl; of several of a machine each process has its own.
        timeout: how long a process waits for the others, where there is no `shape`; None is torch's default, minutes.

    Raises:
        ValueError: for a shape that does not have all processes.
    """
    if not is_launched():
        if shape is not None and shape != (1, 1):
            raise ValueError(
                f"`mesh` must go with processes that a launcher started, got {shape[0]}x{shape[1]} in one process; run "
                f"torchrun --nproc-per-node {shape[0] * shape[1]} -m saelab ..."
            )
        yield ALONE, device
        return
    from torch.distributed.device_mesh import init_device_mesh

    n = int(os.environ["WORLD_SIZE"])
    sizes, names = shape or (n,), AXES[-len(shape or (n,)) :]  # one axis has the group of all, and so its timeout
    if prod(sizes) != n:
        raise ValueError(f"`mesh` must have all {n} processes, got {'x'.join(map(str, sizes))}.")
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield RankGrid.of(init_device_mesh(device.type, sizes, mesh_dim_names=names)), device
    finally:
        dist.destroy_process_group()
