"""`collect` and `stream`: activations of a text at hook points, stored or computed on the fly.

`collect` keeps them in memory or in a folder of shards; `stream` yields shuffled batches for training without storing
them, and its state can be saved.
"""

import json
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.collecting.reader import DEFAULT_MASK, ActivationReader
from saelab.collecting.reading_rounds import Forwards, Rows, StreamPlan, connect, open_rounds
from saelab.collecting.shared import SharedFolder, claim_together
from saelab.collecting.writers import FolderWriter, MemoryWriter, RowBuffer, RowWriter, load_all
from saelab.lm.hooks import forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens
from saelab.stores.activations import Activations
from saelab.stores.jobs import hidden
from saelab.stores.manifest import ActivationsManifest, Provenance, dtype_name
from saelab.stores.shuffling import RingBuffer
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together

SHARD_TOKENS = 32768
BUFFER_TOKENS = 1 << 16


def collect(
    model: AnyModel,
    tokens: Tokens,
    hook_points: str | Sequence[str],
    out: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    mask: TokenMask = DEFAULT_MASK,
    batch_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    resume: bool = True,
    mesh: Any = None,
) -> Activations | dict[str, Activations]:
    """Activations at one hook point, or a dictionary of several, from one forward pass for all of them.

    With `out` they are written to a folder, shard by shard, each atomically. An interrupted call continues where it
    stopped when it is made again, and ends with the same bytes; a finished one is opened at once. What each rule of the
    mask removed is in `provenance.removed`.

    Args:
        model: the language model.
        tokens: rows of token ids to run it on.
        hook_points: name of a hook point, or several.
        out: folder to write to; None keeps the activations in memory.
        dtype: dtype of the stored rows; None is the model's.
        mask: tokens to keep, the same for all hook points: a token whose norm is an outlier at one is dropped at all.
        batch_size: sequences per forward pass; None is as many as hold about 4096 tokens.
        shard_tokens: rows per shard.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.
        mesh: `DeviceMesh` of processes that collect together, each of which calls this with the same arguments; None is
            this process alone. Each runs the model on a share of the rows, and `out`, which all must see, ends with the
            bytes that one process writes. An interrupted call goes on with as many processes. Where the mask has a
            norm rule, the disk must have room for the activations twice.

    Raises:
        ValueError: for a wrong hook point, NaN or infinity, a mask that keeps nothing, a folder begun with other
            arguments or by another number of processes, and a mesh without `out`.
        OSError: where the disk is full or not writable.
        RuntimeError: where another process failed.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> acts = sl.collect(model, tokens, "blocks.1.hook_resid_post", progress=False)
    >>> acts.d_in
    32
    """
    model = as_model(model)
    ranks = RankGrid.of(mesh)
    with ranks.together():
        names = [hook_points] if isinstance(hook_points, str) else list(hook_points)
        if shard_tokens < 1:
            raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
        if out is None and not ranks.alone:
            raise ValueError(
                "`mesh` must go with `out`, as several processes collect into a folder, got out=None; give one that "
                "all of them see."
            )
        reader = ActivationReader.make(model, tokens, names, mask, dtype)
        n_seq = forward_size(tokens, batch_size)
    if out is None:
        reader = reader.calibrated(tokens, n_seq)
        memory = MemoryWriter(reader.count_rows(tokens), reader.widths(tokens), reader.dtype)
        acts = _run(reader, tokens, memory, n_seq, progress)
    else:
        acts = _collect_to_folder(reader, tokens, Path(out), n_seq, shard_tokens, progress, resume, ranks)
    return acts[hook_points] if isinstance(hook_points, str) else acts


def _collect_to_folder(
    reader: ActivationReader,
    tokens: Tokens,
    folder: Path,
    n_seq: int,
    shard_tokens: int,
    progress: bool,
    resume: bool,
    ranks: RankGrid,
) -> dict[str, Activations]:
    with ranks.together():
        request = reader.request(tokens) | {"batch_size": n_seq, "shard_tokens": shard_tokens}

    def begin() -> ActivationsManifest:
        calibrated = reader.calibrated(tokens, n_seq)
        return ActivationsManifest(
            d_in=calibrated.widths(tokens),
            dtype=dtype_name(calibrated.dtype),
            request=request,
            provenance=calibrated.origins(tokens, 0, {})[calibrated.hook_points[0]].to_dict(),
            median_norms=calibrated.median_norms,
        )

    with ExitStack() as stack:
        manifest = claim_together(folder, request, ActivationsManifest, begin, resume, ranks, stack)
        reader = replace(reader, median_norms=manifest.median_norms)
        if not manifest.complete and ranks.alone:
            writer = FolderWriter(folder, manifest, shard_tokens)
            with writer:
                return _run(reader, tokens, writer, n_seq, progress)
        if not manifest.complete:
            shared = SharedFolder(folder, manifest, ranks, len(tokens), n_seq, shard_tokens)
            _collect_shared(reader, tokens, shared, progress and ranks.is_first)
    return load_all(folder, list(reader.hook_points))


def _collect_shared(
    reader: ActivationReader, tokens: Tokens, shared: SharedFolder[ActivationsManifest], progress: bool
) -> None:
    """Write this process's part, and with the others the folder."""
    first = reader.hook_points[0]

    def write_part() -> Steps:
        with shared.claim_part() as part:
            if part.complete:
                return
            n_first = shared.first_tokens(lambda start, stop: reader.foresee_rows(tokens[start:stop]))
            writer = FolderWriter(shared.part, part, shared.shard_tokens, n_first)
            with writer:
                yield from _read(reader, tokens, writer, shared.share, shared.size, progress)
                writer.finish(reader.origins(tokens, writer.n_tokens, dict(writer.removed))[first])

    run_together(write_part(), shared.ranks)
    made = shared.join(RowBuffer(shared.shard_tokens, shared.manifest.d_in, reader.dtype))
    origin = reader.origins(tokens, made.n_tokens, made.removed)[first]
    shared.ranks.on_first(lambda: shared.finish(replace(made, complete=True, provenance=origin.to_dict())))


def _run(
    reader: ActivationReader, tokens: Tokens, writer: RowWriter, n_seq: int, progress: bool
) -> dict[str, Activations]:
    for _ in _read(reader, tokens, writer, range(len(tokens)), n_seq, progress):
        pass
    return writer.open(reader.origins(tokens, writer.n_tokens, dict(writer.removed)))


def _read(
    reader: ActivationReader, tokens: Tokens, writer: RowWriter, share: range, n_seq: int, progress: bool
) -> Steps:
    """Write the rows of the sequences of a share that are not written yet, a batch per step."""
    from tqdm.auto import tqdm

    first = writer.next_seq
    whole, done = tokens[share.start : share.stop].n_tokens, tokens[share.start : first].n_tokens
    with tqdm(total=whole, initial=done, unit=" tokens", unit_scale=True, disable=hidden(progress)) as bar:
        batches = [tokens[start : start + n_seq] for start in range(first, share.stop, n_seq)]
        with closing(reader.read_all(batches)) as readings:
            for batch, reading in zip(batches, readings, strict=True):
                writer.add_reading(reading, len(batch))
                bar.update(batch.n_tokens)
                yield


@runtime_checkable
class Rounds(Protocol):
    """Protocol of where a stream's rows come from: rounds of forward passes, of this process or of others."""

    is_reader: bool
    device: torch.device

    def read(self, epoch: int, start: int, n_batches: int) -> list[Rows]:
        """Rows of the next batches of sequences, at most `n_batches`, from a place of an epoch's order on."""

    def serve(self) -> None:
        """Read for other processes until they close the stream."""

    def close(self) -> None:
        """End the stream, for those that read for this process, too."""


class ActivationStream:
    """Iterator over shuffled batches (batch_size, d_in) of activations, on the model's device; made by `stream`.

    With a pair of hook points the batches are (batch_size, d_in + d_out): each input with its target appended; with
    several pairs the inputs of all, and then the targets, which is what a cross-layer transcoder is trained on. Where
    other processes run the model for those that train, it is a context that ends with `close`.
    """

    def __init__(self, plan: StreamPlan, rounds: Rounds, batch_size: int) -> None:
        """Set up the iterator; `stream` checks the arguments.

        Args:
            plan: what is read.
            rounds: where the rows come from.
            batch_size: rows per batch.
        """
        n_inputs = max(1, len(plan.widths) // 2)
        self.d_in = sum(plan.widths[:n_inputs])
        self.d_out = sum(plan.widths[n_inputs:]) or None
        "Width of the targets, where the stream is of pairs."
        self.batch_size = batch_size
        self.removed: Counter[str] = Counter()
        "Tokens removed so far by each rule of the mask."
        self._plan, self._rounds = plan, rounds
        self._n_tokens = 0
        self._epoch, self._next_seq = 0, 0
        self._ahead: deque[Rows] = deque()

    @property
    def is_reader(self) -> bool:
        """Whether this process runs the model for others, which it does in `serve`; it gets no batches then."""
        return self._rounds.is_reader

    @property
    def provenance(self) -> Provenance | None:
        """Provenance of the activations, with the number of rows read so far; None of several pairs."""
        return self.provenances[0] if len(self.provenances) == 1 else None

    @property
    def provenances(self) -> tuple[Provenance, ...]:
        """The same for each pair of an input and its target."""
        read = {"n_tokens": self._n_tokens, "removed": dict(self.removed)}
        return tuple(replace(one, **read) for one in self._plan.origins)  # type: ignore[arg-type]

    def serve(self) -> None:
        """Run the model for the processes that train until they close the stream; for the processes outside of `mesh`.

        Rows are read ahead, as many as refill the buffer, so that the model runs while the others train.

        Raises:
            ValueError: this process takes batches itself.
            RuntimeError: those that train ended without closing the stream.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, once the stream is closed.
        """
        self._rounds.serve()

    def close(self) -> None:
        """End the stream: processes that read for this one return from `serve`. Does nothing where none do."""
        self._rounds.close()

    def __enter__(self) -> "ActivationStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RuntimeError:  # a reader is gone, which may be what the first error says
            if error is None:
                raise

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        if self._ring.half_empty:
            self._refill()
        if self._ring.n_unread < self.batch_size:
            raise StopIteration
        return self._ring.sample(self.batch_size)

    def state_dict(self) -> dict[str, Tensor | int | str]:
        """State to resume from: position in the tokens, unread rows, random generator."""
        ring = {f"ring.{name}": value for name, value in self._ring.state_dict().items()}
        counts = {"epoch": self._epoch, "next_seq": self._next_seq, "n_tokens": self._n_tokens}
        return ring | counts | self._plan.settings | {"removed": json.dumps(self.removed)}

    def load_state_dict(self, state: dict[str, Tensor | int | str]) -> None:
        """Resume, bit for bit, where `state` was saved; ValueError where it belongs to another stream."""
        for key, value in self._plan.settings.items():
            if state[key] != value:
                raise ValueError(
                    f"`{key}` must be what it was when the state was saved ({state[key]}), got {value}. "
                    "Build the stream with the same arguments, or start again."
                )
        rings = {name.removeprefix("ring."): x for name, x in state.items() if isinstance(x, Tensor)}
        self._ring.load_state_dict(rings)
        self.removed = Counter(json.loads(str(state["removed"])))
        self._n_tokens = int(state["n_tokens"])
        self._epoch, self._next_seq = int(state["epoch"]), int(state["next_seq"])
        self._ahead.clear()

    @cached_property
    def _ring(self) -> RingBuffer:
        """The shuffle buffer, made when rows come: a process that reads for others needs none."""
        plan, device = self._plan, self._rounds.device
        return RingBuffer(plan.buffer_tokens, sum(plan.widths), dtype=plan.dtype, seed=plan.seed, device=device)

    def _refill(self) -> None:
        plan, largest = self._plan, self._plan.n_seq * self._plan.ctx_len
        while self._ring.n_free >= largest:
            if self._next_seq >= plan.n_sequences:
                self._epoch, self._next_seq = self._epoch + 1, 0
            if plan.epochs is not None and self._epoch >= plan.epochs:
                return
            if not self._ahead:
                self._ahead.extend(self._rounds.read(self._epoch, self._next_seq, self._ring.n_free // largest))
            rows, removed = self._ahead.popleft()
            self._ring.add(rows)
            self._next_seq = min(self._next_seq + plan.n_seq, plan.n_sequences)
            self._n_tokens += len(rows)
            self.removed.update(removed)


def stream(
    model: AnyModel | None,
    tokens: Tokens | None,
    hook_point: str | tuple[str, str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 4096,
    buffer_tokens: int = BUFFER_TOKENS,
    seed: int = 0,
    mask: TokenMask = DEFAULT_MASK,
    dtype: torch.dtype | None = None,
    n_seq: int | None = None,
    epochs: int | None = None,
    mesh: Any = None,
) -> ActivationStream:
    """Iterator over shuffled batches of activations at one hook point, computed on the fly; nothing is written to disk.

    Each epoch takes the sequences in a new seeded order. Their rows go through a ring buffer that is refilled whenever
    half of it is served.

    Args:
        model: the language model; None in a process that trains while others run it.
        tokens: rows of token ids to run it on; None as for `model`.
        hook_point: name of the hook point; of two it gives the (input, target) pairs that a transcoder is trained on,
            and of a list of such pairs, one for each layer in the order of the model, what a `CLT` is.
        batch_size: rows per batch.
        buffer_tokens: rows in the shuffle buffer, at least twice a batch and twice a forward pass.
        seed: seed of the order of sequences and rows.
        mask: tokens to keep.
        dtype: dtype of the rows; None is the model's.
        n_seq: sequences per forward pass; None is as many as hold about 4096 tokens.
        epochs: passes over the tokens, after which the iterator stops once the rows left do not fill a batch; None
            repeats without end.
        mesh: `DeviceMesh` of the processes that take the batches, as `sl.fit` takes it; all get the same batches, those
            of one process. Where it holds all processes, each runs the model on some of the sequences. Where it does
            not, those outside of it run the model (`ActivationStream.serve`) while those in it train, and the stream is
            a context or ends with `close`; all processes call this. None is this process alone.

    Raises:
        ValueError: for a wrong hook point, NaN or infinity, a buffer that is too small, and processes that have
            different arguments.
        RuntimeError: where another process failed.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> batches = sl.stream(model, tokens, "blocks.1.hook_resid_post", batch_size=32, buffer_tokens=128, n_seq=2)
    >>> next(batches).shape
    torch.Size([32, 32])
    """
    model = model if model is None else as_model(model)
    links = None if mesh is None else connect(mesh)
    ranks = RankGrid.of(mesh) if mesh is not None and links is None else ALONE
    everyone = ranks if links is None else links.everyone
    names = _list_names(hook_point)
    given = {"batch_size": batch_size, "hook_point": names, "mask": mask.to_dict(), "dtype": str(dtype), "n_seq": n_seq}
    everyone.require_equal(given | {"buffer_tokens": buffer_tokens, "seed": seed, "epochs": epochs})
    forwards: Forwards | None = None
    with everyone.together():
        if links is not None and not links.is_reader:
            RankGrid.of(mesh)  # whose axes are checked
        elif model is None or tokens is None:
            raise ValueError(
                "`model` and `tokens` must be given in a process that runs the model, got None; those of `mesh` alone "
                "train without, where others run it."
            )
        else:
            n_seq = min(forward_size(tokens, n_seq), len(tokens))
            _require_buffer(buffer_tokens, batch_size, n_seq, tokens)
            order = {"seed": seed, "epochs": epochs, "buffer_tokens": buffer_tokens}
            forwards = Forwards(model, tokens, names, mask, dtype, n_seq, order)
    return ActivationStream(*open_rounds(forwards, tokens, ranks, links), batch_size)


def _list_names(given: str | tuple[str, str] | Sequence[tuple[str, str]]) -> list[str]:
    """One hook point, or all inputs and then their targets."""
    if isinstance(given, str):
        return [given]
    pairs = [given] if all(isinstance(one, str) for one in given) else list(given)
    if not pairs or not all(not isinstance(pair, str) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"`hook_point` must be a name, (input, target), or a list of such pairs, got {given!r}.")
    names = [name for side in zip(*pairs, strict=True) for name in side]
    if len(set(names)) < len(names):
        raise ValueError(f"`hook_point` must have each name once, got {names}.")
    return names


def _require_buffer(buffer_tokens: int, batch_size: int, n_seq: int, tokens: Tokens) -> None:
    smallest = 2 * max(batch_size, n_seq * tokens.ctx_len)
    if batch_size < 1 or buffer_tokens < smallest:
        raise ValueError(
            f"`buffer_tokens` must be at least twice the batch ({batch_size}) and twice a forward of n_seq={n_seq} "
            f"sequences, {smallest} in all, got {buffer_tokens}. Enlarge it, or take a smaller n_seq or batch_size."
        )
