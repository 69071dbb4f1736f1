"""`RankGrid`: the processes that train together, a grid of shares of the batch and shares of the latents.

Processes are those of `torch.distributed`, started by `torchrun`; a process alone is a grid of one, and every method
below then returns what it was given.

Gradients follow one convention. The loss that a rank differentiates is that of the whole batch, and the gradient of a
weight is the mean over `data` of what the ranks there found. So a sum over tokens passes its gradient on times the
number of ranks it was made over, and a sum over latents passes it on as it is: each rank has latents of its own. What
all ranks of `latents` have alike, such as b_dec, is read by each one's latents through `GridAxis.share`, which adds up
their gradients.
"""

import hashlib
import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

AXES = ("data", "latents")
ROUND = 8
"""Steps after which processes hear of each other: communication does not wait for long, and a failure should not"""
Steps: TypeAlias = Generator[None, None, None]


@dataclass(frozen=True, eq=False)
class GridAxis:
    """One axis of the grid: ranks that hold different shares, and the place of this process among them."""

    size: int = 1
    """number of ranks"""
    index: int = 0
    """place of this process, 0-based"""
    group: Any = None
    """their process group"""
    device: torch.device | str = "cpu"
    """where their messages are"""

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks, without gradient."""
        return x if self.size == 1 else self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, without gradient."""
        return x if self.size == 1 else self._reduced(x, dist.ReduceOp.MAX)

    def add_(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)

    def average_(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its mean over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
            x.div_(self.size)

    def spread_(self, x: Tensor) -> None:
        """Replace a contiguous tensor by that of the axis's first rank, in place."""
        if self.size > 1:
            dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.largest(torch.tensor(int(flag), device=self.device)))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks; the gradient that comes back is passed on as it is."""
        return x if self.size == 1 else _sum(x, self)

    def share(self, x: Tensor) -> Tensor:
        """The same tensor, whose gradients are added up over the ranks."""
        return x if self.size == 1 else _share(x, self)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape; without gradient, but that this rank's own is `x` itself."""
        if self.size == 1:
            return [x]
        sent = x.detach().contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent, group=self.group)
        found[self.index] = x
        return found

    def gather_to_first(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks in the axis's first one, which have one shape; none elsewhere. Without gradient."""
        if self.size == 1:
            return [x]
        sent = x.detach().contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)] if self.index == 0 else []
        dist.gather(sent, found or None, dist.get_global_rank(self.group, 0), group=self.group)
        return found

    def gather_ragged(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which differ in the length of their first axis; otherwise as `gather`."""
        if self.size == 1:
            return [x]
        lengths = [int(n) for n in self.gather(torch.tensor(len(x), device=x.device))]
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x.detach()
        found = [part[:n] for part, n in zip(self.gather(padded), lengths, strict=True)]
        found[self.index] = x
        return found

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks."""
        sent = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8).to(self.device)
        return [part.cpu().numpy().tobytes().decode().rstrip("\0") for part in self.gather_ragged(sent)]

    def join(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks side by side; a gradient reaches this rank's own part."""
        return x if self.size == 1 else torch.cat(self.gather(x), dim)

    def join_summed(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks side by side; the gradients that the ranks have of a part are added up."""
        return x if self.size == 1 else _join(x, self, dim)

    def split(self, n: int) -> range:
        """This rank's share of n things that are divided into equal runs."""
        return range(self.index * n // self.size, (self.index + 1) * n // self.size)

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        out = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach().clone()
        out = out.contiguous()
        dist.all_reduce(out, op=how, group=self.group)
        return out.to(x.dtype)


@dataclass(frozen=True, eq=False)
class RankGrid:
    """A grid of processes: rank (i, j) has the i-th share of every batch and the j-th share of the latents.

    >>> RankGrid().alone, RankGrid().rows(torch.arange(4)).tolist()
    (True, [0, 1, 2, 3])
    """

    data: GridAxis = GridAxis()
    """ranks that have the same latents and different rows"""
    latents: GridAxis = GridAxis()
    """ranks that have the same rows and different latents"""
    is_first: bool = True
    """whether this is the process that writes what there is one of: history, messages, the manifest"""
    mesh: Any = None
    """the `DeviceMesh` it is made of"""
    mesh_axes: tuple[str, ...] = ()
    """names of the mesh's axes"""
    group: Any = None
    """process group of all of them; None where these are all that were started"""

    @classmethod
    def of(cls, mesh: Any) -> "RankGrid":
        """The grid of a `DeviceMesh` whose axes are named "data", "latents" or both; one unnamed axis is of latents.

        None is this process alone.

        Raises:
            ValueError: for other axes, and a mesh that this process is not in.
        """
        if mesh is None:
            return ALONE
        names = mesh.mesh_dim_names or (("latents",) if mesh.ndim == 1 else ())
        if not names or len(names) != mesh.ndim or not set(names) <= set(AXES):
            raise ValueError(
                f'`mesh` must have axes named "data" and "latents", got {mesh.mesh_dim_names} of shape '
                f'{tuple(mesh.shape)}; make it by init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "latents")).'
            )
        if mesh.get_coordinate() is None:
            raise ValueError(
                f"`mesh` must hold this process, number {dist.get_rank()} of {dist.get_world_size()}, got one of "
                f"{list(ranks_in(mesh))}; start as many processes as it has, or let the others run the language model, "
                "as `sl.stream` says."
            )
        axes = dict.fromkeys(AXES, GridAxis(device=device_of(mesh)))
        axes |= {name: cls._axis(mesh, i) for i, name in enumerate(names)}
        is_first = all(axis.index == 0 for axis in axes.values())
        return cls(**axes, is_first=is_first, mesh=mesh, mesh_axes=tuple(names), group=cls._group(mesh))

    @classmethod
    def _axis(cls, mesh: Any, i: int) -> GridAxis:
        return GridAxis(mesh.size(i), mesh.get_local_rank(i), mesh.get_group(i), device_of(mesh))

    @staticmethod
    def _group(mesh: Any) -> Any:
        ranks = ranks_in(mesh)
        if len(ranks) == dist.get_world_size():
            return None
        if len(ranks) in tuple(mesh.shape):
            return mesh.get_group(tuple(mesh.shape).index(len(ranks)))
        if (dist.group.WORLD, ranks) not in _groups:
            raise ValueError(
                f"`mesh` of two axes must hold all {dist.get_world_size()} processes, got {tuple(mesh.shape)}; start "
                "as many as it has, or give it to `sl.stream` first, in all of them."
            )
        return _groups[dist.group.WORLD, ranks]

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.data.size * self.latents.size

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch: every n-th, so that the first rows of the batch are spread over all ranks."""
        return batch if self.data.size == 1 else batch[self.data.index :: self.data.size]

    def n_rows_among(self, n: int) -> int:
        """Number of this rank's rows among the first n of the batch."""
        return max(0, -(-(n - self.data.index) // self.data.size))

    def join_rows(self, x: Tensor) -> Tensor:
        """The rows of all ranks in the order of the batch; a gradient reaches this rank's own."""
        if self.data.size == 1:
            return x
        return torch.stack(self.data.gather(self.weigh_rows(x)), 1).flatten(0, 1)

    def weigh_rows(self, x: Tensor) -> Tensor:
        """The same tensor; its gradient times the number of shares of the batch, as that is averaged in the end."""
        return _weigh(x, self.data.size) if self.data.size > 1 and x.requires_grad else x

    def sum_tokens(self, x: Tensor) -> Tensor:
        """Sum over the shares of the batch, differentiable."""
        return self.data.sum(self.weigh_rows(x))

    def mean_tokens(self, x: Tensor) -> Tensor:
        """Mean over the shares of the batch, which are of one size; differentiable."""
        return x if self.data.size == 1 else self.sum_tokens(x) / self.data.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.data.any(self.latents.any(flag))

    def gather_ragged(self, x: Tensor) -> Tensor:
        """The entries of all processes in one tensor, without gradient; the lengths of their first axes may differ."""
        return torch.cat(self.data.gather_ragged(torch.cat(self.latents.gather_ragged(x.detach()))))

    @property
    def index(self) -> int:
        """Place of this process among all, those of one share of the batch after those of the one before."""
        return self.data.index * self.latents.size + self.latents.index

    def gather_parts(self, x: Tensor) -> list[Tensor]:
        """The tensors of all processes in the order of `index`, without gradient; first axes may differ in length."""
        columns = [self.data.gather_ragged(part) for part in self.latents.gather_ragged(x.detach())]
        return [column[i] for i in range(self.data.size) for column in columns]

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all processes, those of one share of the batch after those of the one before."""
        here = json.dumps(self.latents.gather_texts(text))
        return [one for row in self.data.gather_texts(here) for one in json.loads(row)]

    def gather_json(self, value: Any) -> list[Any]:
        """The values of all processes, of what JSON can hold, in the order of `index`."""
        return [value] if self.alone else [json.loads(text) for text in self.gather_texts(json.dumps(value))]

    def gather_arrays(self, x: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes in the order of `index`; they have one dtype, first axes may differ in length."""
        if self.alone:
            return [x]
        width = math.prod(x.shape[1:])
        rows = np.array(x, order="C").reshape(len(x), width).view(np.uint8)  # gloo and nccl do not know every dtype
        parts = self.gather_parts(torch.from_numpy(rows).to(self.latents.device))
        return [part.cpu().numpy().view(x.dtype).reshape(len(part), *x.shape[1:]) for part in parts]

    def own(self, n: int) -> slice:
        """This process's share of n things in a row: every so many, as neighbors are often alike in what they cost."""
        return slice(self.index, n, self.size)

    def on_first(self, function: Callable[[], Any]) -> str:
        """Call a function in the first process alone, and return its result as text in all.

        Raises:
            RuntimeError: it failed there; in the first process its own error.
        """
        result = ""
        with self.together():
            if self.is_first:
                result = str(function())
        return result if self.alone else self.gather_texts(result)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that all processes enter; where one raises an exception in it, all do, as in `agree`."""
        error: Exception | None = None
        try:
            yield
        except Exception as failed:  # whatever it was, the others are told
            if self.alone:
                raise
            error = failed
        self.agree(error)

    def agree(self, error: BaseException | None) -> None:
        """Raise in all processes where one of them has failed: its own error there, in the others which it was.

        Args:
            error: this process's error, or None.
        """
        if self.any(error is not None):
            where = f"process {dist.get_rank()} on {socket.gethostname()}" if self.size > 1 else ""
            told = self.gather_texts("" if error is None else f"{where}: {type(error).__name__}: {error}")
            if error is not None:
                raise error
            raise RuntimeError(f"Stopped, as another process failed. {next(text for text in told if text)}")

    def require_shared(self, folder: Path) -> None:
        """Raise ValueError, in all processes, where some do not see the folder of the first; it is made where missing.

        Args:
            folder: the folder.
        """

        def mark() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".seen-", suffix=".tmp", dir=folder)
            os.close(descriptor)
            return Path(name).name  # a writer removes what a killed process leaves

        place = folder / self.on_first(mark)
        unseen = self.any(not place.is_file())
        self.on_first(place.unlink)
        if unseen:
            raise ValueError(
                f"`out` must be one folder that all processes see, got {folder}, which is another on some machine; "
                "choose one on a shared disk."
            )

    def require_equal(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, on all processes alike, where they do not agree on some facts, or are of other releases.

        Args:
            facts: what must be the same on all processes, as JSON values by their names.
        """
        if self.alone:
            return
        facts = {"release of saelab": _release(), "release of torch": torch.__version__, **facts}
        text = json.dumps(facts, sort_keys=True, default=str)
        digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        digest = digest.to(self.latents.device)
        others = [*self.data.gather(digest), *self.latents.gather(digest)]
        if not self.any(not all(torch.equal(one, digest) for one in others)):
            return
        found = [json.loads(one) for one in self.gather_texts(text)]
        for name in dict.fromkeys(name for one in found for name in one):
            values = [one.get(name) for one in found]
            if other := next((rank for rank, value in enumerate(values) if value != values[0]), None):
                raise ValueError(
                    f"All processes must have the same {name}, got {_short(values[0])} in process 0 and "
                    f"{_short(values[other])} in process {other}."
                )


ALONE = RankGrid()


def device_of(mesh: Any) -> torch.device:
    """Where the messages of a mesh's processes are."""
    kind: str = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def ranks_in(mesh: Any) -> tuple[int, ...]:
    """Numbers of the processes of a mesh, in its order."""
    return tuple(mesh.mesh.flatten().tolist())


_groups: dict[tuple[Any, tuple[int, ...]], Any] = {}
"""groups of some processes, which all have to make"""


def make_group(ranks: tuple[int, ...]) -> None:
    """Make the group of some processes, so that their mesh may have two axes; all processes call this."""
    _groups[dist.group.WORLD, ranks] = dist.new_group(list(ranks))


def run_together(steps: Steps, ranks: RankGrid, every: int = ROUND) -> None:
    """Carry out the steps of each process, of any number; where one fails, all stop after at most `every` more."""
    with closing(steps):
        left = True
        while left:
            with ranks.together():
                left = sum(1 for _ in islice(steps, every)) == every
            left = ranks.any(left)


def _release() -> str:
    try:
        return version("saelab")
    except PackageNotFoundError:
        return "not installed"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Sum(torch.autograd.Function):
    """The sum over ranks; each one's gradient is that of its own summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: GridAxis) -> Tensor:
        return axis.total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Share(torch.autograd.Function):
    """The same tensor, read by the latents of every rank: their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: GridAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.total(grad), None


class _Join(torch.autograd.Function):
    """Parts of all ranks side by side; a part's gradient is the sum of those that all ranks have of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: GridAxis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return torch.cat(axis.gather(x.detach()), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.total(grad).chunk(ctx.axis.size, ctx.dim)[ctx.axis.index], None, None


class _Weigh(torch.autograd.Function):
    """The same tensor; its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: int) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.weight, None


_sum: Callable[[Tensor, GridAxis], Tensor] = _Sum.apply
_share: Callable[[Tensor, GridAxis], Tensor] = _Share.apply
_join: Callable[[Tensor, GridAxis, int], Tensor] = _Join.apply
_weigh: Callable[[Tensor, int], Tensor] = _Weigh.apply
