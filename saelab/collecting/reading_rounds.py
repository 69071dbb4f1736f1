"""Rounds of forward passes that a stream is fed by: in one process, in those that train, or in others for them.

In a round each process that reads runs the language model on one batch of sequences, the i-th on the i-th batch. Where
the processes of a mesh train and those outside of it read, the first of the mesh names the place of a round, the
readers send what they have computed for it, and compute the next rounds while the others train.
"""

import hashlib
import json
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from saelab.collecting.reader import ActivationReader, ForwardRows
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.tokens import Tokens
from saelab.stores.jobs import DeferredInterrupt
from saelab.stores.manifest import Provenance, dtype_name
from saelab.training.ranks import GridAxis, RankGrid, device_of, make_group, ranks_in

STOP = -1
"""epoch of the command after which nothing is read"""
PATIENCE = timedelta(days=30)
"""for the next command, which comes when the rows are used up: after steps, checkpoints, an evaluation"""
MOST_ROUNDS = 16  # asked for at once, as their rows are held beside the buffer until all are there
PAUSE = 0.001  # seconds between looks for a command, so that signals are heard
Rows: TypeAlias = tuple[Tensor, dict[str, int]]
"""rows of one batch of sequences, and the number of tokens removed by each rule of the mask"""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What a stream reads, alike in all of its processes."""

    hook_points: tuple[str, ...]
    """one hook point, or inputs and then targets, whose rows are put side by side"""
    widths: tuple[int, ...]
    """width of the activations at each"""
    dtype: torch.dtype
    """dtype of the rows"""
    n_sequences: int
    """sequences of the text"""
    ctx_len: int
    """tokens in a sequence"""
    n_seq: int
    """sequences in a batch, which one forward pass reads"""
    seed: int
    """of the order of the sequences"""
    epochs: int | None
    """passes over the text; None for no end"""
    buffer_tokens: int
    """rows that are shuffled together"""
    settings: dict[str, Any]
    """what a saved state must agree with"""
    origins: tuple[Provenance, ...]
    """provenance of the rows, of which none are read yet: one, or that of each pair of an input and its target"""

    def order(self, epoch: int) -> Tensor:
        """The sequences in the order in which an epoch reads them."""
        digest = hashlib.sha256(repr((self.seed, "sequences", epoch)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(self.n_sequences, generator=generator)

    def n_batches_from(self, start: int) -> int:
        """Number of batches of an epoch from a sequence on."""
        return -(-(self.n_sequences - start) // self.n_seq)

    def rounds(self, epoch: int, start: int, n_readers: int) -> Iterator[tuple[int, int]]:
        """Epoch and first sequence of each round from a place on."""
        while self.epochs is None or epoch < self.epochs:
            yield epoch, start
            start += n_readers * self.n_seq
            if start >= self.n_sequences:
                epoch, start = epoch + 1, 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"dtype": dtype_name(self.dtype)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "StreamPlan":
        """The plan in the output of `to_dict`, after JSON."""
        found = {
            "hook_points": tuple(data["hook_points"]),
            "widths": tuple(data["widths"]),
            "dtype": getattr(torch, data["dtype"]),
            "origins": tuple(Provenance.from_dict(one) for one in data["origins"]),
        }
        return cls(**data | found)


class Forwards:
    """Forward passes of this process for a stream.

    Args:
        model: the language model.
        tokens: the text.
        hook_points: name of the hook point, or names of inputs and as many targets.
        mask: tokens to keep.
        dtype: dtype of the rows; None is the model's.
        n_seq: sequences per forward pass.
        order: fields of the plan that are given: seed, epochs and buffer_tokens.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        hook_points: list[str],
        mask: TokenMask,
        dtype: torch.dtype | None,
        n_seq: int,
        order: dict[str, Any],
    ) -> None:
        reader = ActivationReader.make(model, tokens, hook_points, mask, dtype).calibrated(tokens, n_seq)
        reading = reader.read(tokens[:1])
        first = side_by_side(reading)
        self.reader, self.tokens, self.no_rows = reader, tokens, first.new_empty(0, first.shape[1])
        self.request = reader.request(tokens)
        origins = reader.origins(tokens, 0, {}, order["seed"])
        each = [origins[name] for name in reader.hook_points]
        half = len(each) // 2
        self.plan = StreamPlan(
            **order,
            hook_points=reader.hook_points,
            widths=tuple(reading.acts[name].shape[1] for name in reader.hook_points),
            dtype=reader.dtype,
            n_sequences=len(tokens),
            ctx_len=tokens.ctx_len,
            n_seq=n_seq,
            settings={
                "seed": order["seed"],
                "n_seq": n_seq,
                "buffer_tokens": order["buffer_tokens"],
                "tokens_sha256": tokens.sha256,
                "hook_point": " to ".join(reader.hook_points),
                "mask": json.dumps(self.request["mask"]),
            },
            origins=tuple(map(Provenance.paired, each[:half], each[half:])) or (each[0],),
        )
        self._order = (0, self.plan.order(0))

    def follow(self, plan: StreamPlan, median_norms: dict[str, float] | None) -> None:
        """Take over a plan, and the median norms that the mask's norm rule compares with."""
        self.plan, self.reader = plan, replace(self.reader, median_norms=median_norms)

    def read(self, epoch: int, start: int) -> Rows:
        """Rows of the batch of sequences that begins at a place of an epoch's order; none behind its end."""
        if self._order[0] != epoch:
            self._order = (epoch, self.plan.order(epoch))
        chosen = self._order[1][start : start + self.plan.n_seq]
        if not len(chosen):
            return self.no_rows, {}
        reading = self.reader.read(self.tokens[chosen])
        return side_by_side(reading), reading.removed


def side_by_side(reading: ForwardRows) -> Tensor:
    """Rows of one hook point, or each with its rows of the others appended."""
    acts = list(reading.acts.values())
    return acts[0] if len(acts) == 1 else torch.cat(acts, dim=1)


class OwnRounds:
    """Rounds that the processes of a grid read together, each of which gets the rows of all; or this one alone."""

    is_reader = False

    def __init__(self, forwards: Forwards, ranks: RankGrid) -> None:
        self.forwards, self.ranks = forwards, ranks
        self.device = forwards.no_rows.device

    def read(self, epoch: int, start: int, n_batches: int) -> list[Rows]:
        """Rows of the batches from a place on, one of each process."""
        ranks, plan = self.ranks, self.forwards.plan
        rows, removed = self.forwards.no_rows, dict[str, int]()
        with ranks.together():
            rows, removed = self.forwards.read(epoch, start + ranks.index * plan.n_seq)
        counts = ranks.gather_json(removed)
        return list(zip(ranks.gather_parts(rows), counts, strict=True))[: plan.n_batches_from(start)]

    def serve(self) -> None:
        """Raise ValueError: nobody asks."""
        raise ValueError(
            "`serve` must be called in a process outside of `mesh`, which reads for those in it, got one that takes "
            "batches itself; give it to `fit`, or call next()."
        )

    def close(self) -> None:
        """Do nothing: nobody waits."""


class Links:
    """Groups of the processes of a mesh, which train, with those outside of it, which read."""

    def __init__(self, trainers: tuple[int, ...], everyone: RankGrid, device: torch.device) -> None:
        self.everyone, self.device = everyone, device
        self.readers = [rank for rank in range(everyone.size) if rank not in trainers]
        self.first, self.rank = trainers[0], dist.get_rank()
        self.commands = dist.new_group([self.first, *self.readers], timeout=PATIENCE, backend="gloo")
        # a reader and all that train, so that readers do not get each other's rows
        members = [[*trainers, reader] for reader in self.readers]
        self.texts = [dist.new_group(ranks, backend="gloo") for ranks in members]
        on_device = device.type != "cpu"
        self.rows = [dist.new_group(ranks) for ranks in members] if on_device else self.texts
        make_group(trainers)
        self.n_streams = 0
        self.closed: set[int] = set()

    @property
    def is_reader(self) -> bool:
        """Whether this process reads."""
        return self.rank in self.readers

    @property
    def index(self) -> int:
        """Place of this process among those that read."""
        return self.readers.index(self.rank)


def connect(mesh: Any) -> Links | None:
    """Groups of a mesh's processes with those outside of it; None where it holds all. All processes call this.

    Raises:
        ValueError: the processes have different meshes.
    """
    trainers = ranks_in(mesh)
    if len(trainers) == dist.get_world_size():
        return None
    everyone = _meet(dist.group.WORLD)
    everyone.require_equal({"processes of `mesh`": list(trainers)})
    return _link(dist.group.WORLD, trainers, device_of(mesh))


@cache
def _meet(world: Any) -> RankGrid:
    """All processes, whose messages are on the CPU; made once, as a group stays with its processes."""
    n, rank = dist.get_world_size(), dist.get_rank()
    return RankGrid(data=GridAxis(n, rank, dist.new_group(backend="gloo")), is_first=rank == 0)


@cache
def _link(world: Any, trainers: tuple[int, ...], device: torch.device) -> Links:
    return Links(trainers, _meet(world), device)


class AskedRounds:
    """Rounds that other processes read for those of a mesh, of which this is one."""

    is_reader = False

    def __init__(self, plan: StreamPlan, links: Links, number: int) -> None:
        self.plan, self.links, self.number = plan, links, number
        self.device, self._open = links.device, True

    def read(self, epoch: int, start: int, n_batches: int) -> list[Rows]:
        """Rows of so many batches from a place on, or of the first of them: of as many from each reader.

        They are asked for at once, so that the readers do not begin a forward pass between two of them.

        Raises:
            RuntimeError: a reader failed, after which none of them reads any more.
        """
        if not self._open:
            raise ValueError("The stream must be open, got one that was closed; make another.")
        n = len(self.links.readers)
        n_rounds = min(max(1, -(-n_batches // n)), MOST_ROUNDS)
        places = list(islice(self.plan.rounds(epoch, start, n), n_rounds))
        self._command(epoch, start, len(places))
        answers: list[tuple[Tensor, dict[str, Any]]] = []
        for _, first in places:
            answers += [self._receive(i) for i in range(n)][: self.plan.n_batches_from(first)]
        if failed := [told["error"] for _, told in answers if "error" in told]:
            self.close()
            raise RuntimeError(f"Stopped, as another process failed. {failed[0]}")
        return [(rows, told["removed"]) for rows, told in answers]

    def serve(self) -> None:
        """Raise ValueError: this process trains."""
        raise ValueError(
            f"`serve` must be called in a process outside of `mesh`, got process {self.links.rank}, which trains; give "
            "the stream to `fit`."
        )

    def close(self) -> None:
        """Tell the readers that nothing more is read."""
        was_open, self._open = self._open, False
        if was_open:
            self._command(STOP, 0, 0)

    def _command(self, epoch: int, start: int, n_rounds: int) -> None:
        if self.links.rank == self.links.first:
            with _explained("One of the processes that run the language model has ended"):
                command = torch.tensor([self.number, epoch, start, n_rounds])
                dist.broadcast(command, self.links.first, group=self.links.commands)

    def _receive(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        links, reader = self.links, self.links.readers[i]
        with _explained(f"Process {reader}, which runs the language model, has ended"):
            sizes = torch.zeros(2, dtype=torch.int64)
            dist.broadcast(sizes, reader, group=links.texts[i])
            n_rows, n_bytes = sizes.tolist()
            text = torch.zeros(n_bytes, dtype=torch.uint8)
            dist.broadcast(text, reader, group=links.texts[i])
            rows = torch.empty(n_rows, sum(self.plan.widths), dtype=self.plan.dtype, device=links.device)
            if n_rows:
                dist.broadcast(rows.view(torch.uint8), reader, group=links.rows[i])
        return rows, json.loads(text.numpy().tobytes())


class ServedRounds:
    """Rounds that this process reads for those of a mesh, with other processes outside of it."""

    is_reader = True
    device = torch.device("cpu")

    def __init__(self, forwards: Forwards, links: Links, number: int) -> None:
        self.forwards, self.links, self.number = forwards, links, number
        self._places = self._rounds_from(0, 0)
        self._ahead: deque[tuple[tuple[int, int], Rows | Exception]] = deque()
        self._failure: Exception | None = None

    def read(self, epoch: int, start: int, n_batches: int) -> list[Rows]:
        """Raise ValueError: the rows are for others."""
        raise ValueError(
            f"Batches must be taken in the processes of `mesh`, got a call in process {self.links.rank}, which runs "
            "the language model for them; call serve()."
        )

    def serve(self) -> None:
        """Read what the processes of the mesh ask for, until they close the stream.

        Raises:
            RuntimeError: they ended without closing it.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, once the stream is closed.
        """
        with DeferredInterrupt() as interrupt:  # those that train save first, and close
            while self.number not in self.links.closed:
                number, epoch, start, n_rounds = self._hear()
                if epoch == STOP:
                    self.links.closed.add(number)
                    continue
                if number != self.number:
                    self._failure = ValueError(_other_stream(self.number, number))
                places = self._rounds_from(epoch, start)
                for _ in range(n_rounds):
                    self._send(self._failure or self._find(next(places)))
        self._ahead.clear()
        if self._failure is not None:
            raise self._failure
        if interrupt.requested:
            raise KeyboardInterrupt("Stopped after those that train closed the stream.")

    def close(self) -> None:
        """Do nothing: those that train close the stream."""

    def _rounds_from(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        return self.forwards.plan.rounds(epoch, start, len(self.links.readers))

    def _hear(self) -> list[int]:
        """The next command: number of a stream, epoch and first sequence, number of rounds. Reads ahead meanwhile."""
        command = torch.zeros(4, dtype=torch.int64)
        with _explained(
            "The processes that train ended without closing the stream; see what they say, and open it by `with`"
        ):
            heard = dist.broadcast(command, self.links.first, group=self.links.commands, async_op=True)
            while not heard.is_completed():
                if not self._read_ahead():
                    time.sleep(PAUSE)
            heard.wait()
        numbers: list[int] = command.tolist()
        return numbers

    def _read_ahead(self) -> bool:
        """Read a round if the rows held, and as many of the other readers, do not refill the buffer yet: half of it is
        used up at a time. Returns whether one was read.
        """
        found = [rows for _, rows in self._ahead if not isinstance(rows, Exception)]
        n_rows = sum(len(rows) for rows, _ in found) * len(self.links.readers)
        wanted = len(found) == len(self._ahead) and 2 * n_rows < self.forwards.plan.buffer_tokens
        return wanted and self._read_next()

    def _read_next(self) -> bool:
        place = next(self._places, None)
        if place is None:
            return False
        epoch, start = place
        found: Rows | Exception
        try:
            found = self.forwards.read(epoch, start + self.links.index * self.forwards.plan.n_seq)
        except Exception as error:  # whatever it was, the others are told when they ask for it
            found = error
        self._ahead.append((place, found))
        return True

    def _find(self, place: tuple[int, int]) -> Rows | Exception:
        """What was read ahead of a place, or else is read now."""
        if not self._ahead or self._ahead[0][0] != place:
            self._ahead.clear()
            self._places = self._rounds_from(*place)
            self._read_next()
        return self._ahead.popleft()[1]

    def _send(self, found: Rows | Exception) -> None:
        links = self.links
        if isinstance(found, Exception):
            self._failure, rows = found, self.forwards.no_rows  # which is the answer to all that is asked now
            where = f"process {links.rank} on {socket.gethostname()}"
            told: dict[str, Any] = {"error": f"{where}: {type(found).__name__}: {found}"}
        else:
            rows, told = found[0], {"removed": found[1]}
        text = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        with _explained("The processes that train have ended; see what they say"):
            dist.broadcast(torch.tensor([len(rows), len(text)]), links.rank, group=links.texts[links.index])
            dist.broadcast(text, links.rank, group=links.texts[links.index])
            if len(rows):
                sent = rows.to(links.device).contiguous().view(torch.uint8)
                dist.broadcast(sent, links.rank, group=links.rows[links.index])


AnyRounds: TypeAlias = OwnRounds | AskedRounds | ServedRounds


def open_rounds(
    forwards: Forwards | None, tokens: Tokens | None, ranks: RankGrid, links: Links | None
) -> tuple[StreamPlan, AnyRounds]:
    """The plan on which all processes agree, and this one's end of the rounds.

    Args:
        forwards: forward passes of this process; None where it runs no model.
        tokens: the text, or None where others have it.
        ranks: the processes, where all of them read and take batches.
        links: groups of those that train and those that read, or None.

    Raises:
        ValueError: those that read have different models, texts or arguments.
    """
    if ranks.alone and links is None and forwards is not None:
        return forwards.plan, OwnRounds(forwards, ranks)
    everyone = ranks if links is None else links.everyone
    own: dict[str, Any] | None = None
    if forwards is not None:
        medians = forwards.reader.median_norms
        own = {"request": forwards.request, "plan": forwards.plan.to_dict(), "median_norms": medians}
    told = everyone.gather_json(own)
    first = next(one for one in told if one is not None)  # of several readers, whose GPUs may round differently
    expected = first["request"] if tokens is None else first["request"] | {"tokens_sha256": tokens.sha256}
    everyone.require_equal(expected if own is None else own["request"])
    plan = StreamPlan.from_dict(first["plan"])
    if links is None:
        assert forwards is not None
        forwards.follow(plan, first["median_norms"])
        return plan, OwnRounds(forwards, ranks)
    links.n_streams += 1
    if forwards is None:
        return plan, AskedRounds(plan, links, links.n_streams)
    forwards.follow(plan, first["median_norms"])
    return plan, ServedRounds(forwards, links, links.n_streams)


def _other_stream(mine: int, asked: int) -> str:
    return (
        f"Streams of one mesh must be read one after another, got a call for number {asked} while number {mine} is "
        "served; close that first, in all processes."
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Context in which an error of a message, which knows addresses alone, is raised with what it means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what}.") from error
