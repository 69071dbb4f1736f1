"""The training loop: one or several modules trained on the same batches, with logging, checkpoints and resuming.

Loggers write a run's history to JSONL and CSV files in the run's folder, TensorBoard or Weights & Biases. A logger is
any callable that takes one entry of the history, a flat dictionary of numbers. Entries have no clock times, so that a
resumed run writes the same bytes as an uninterrupted one.
"""

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelab.functional.metrics import exact
from saelab.stores.files import write_atomic
from saelab.stores.jobs import DeferredInterrupt, explained, hidden
from saelab.training.checkpoint import FOLDER, find_checkpoint, load_checkpoint, read_progress, save_checkpoint
from saelab.training.config import (
    Batches,
    Trainable,
    TrainConfig,
    latent_axes_of,
)
from saelab.training.optimizer import average_gradients, clip_gradients, make_adam, step_adam
from saelab.training.ranks import ALONE, RankGrid
from saelab.training.shared_checkpoint import is_shared, load_shared, save_shared

HistoryEntry = dict[str, Any]
ENTRY_KEYS = ("step", "n_tokens", "l0", "dead_frac", "lr", "held_out_fvu")
"""what an entry of the history has beside the losses, which are under their terms' names"""
Sink = Callable[[HistoryEntry], None]
SAMPLE_TOKENS = 16_384  # size of the sample for normalization and initialization


class FileSink:
    """A sink that writes the history to `history.jsonl` and `history.csv` in a folder.

    Args:
        folder: the folder.
        history: entries so far, such as those of a checkpoint; the files are written again with these.
    """

    def __init__(self, folder: Path, history: list[HistoryEntry]) -> None:
        self.jsonl, self.csv = folder / "history.jsonl", folder / "history.csv"
        write_atomic(self.jsonl, "".join(_as_json(entry) for entry in history).encode())
        write_atomic(self.csv, "".join([_header(history), *(_as_csv(entry) for entry in history)]).encode())

    def __call__(self, entry: HistoryEntry) -> None:
        with explained(self.jsonl.parent):
            with self.jsonl.open("a", encoding="utf-8") as file:
                file.write(_as_json(entry))
            text = _as_csv(entry) if self.csv.stat().st_size else _header([entry]) + _as_csv(entry)
            with self.csv.open("a", encoding="utf-8", newline="") as file:
                file.write(text)


def _as_json(entry: HistoryEntry) -> str:
    return json.dumps(_finite(entry)) + "\n"


def _header(history: list[HistoryEntry]) -> str:
    return _row(list(history[0])) if history else ""


def _as_csv(entry: HistoryEntry) -> str:
    return _row(list(_finite(entry).values()))


def _finite(entry: HistoryEntry) -> HistoryEntry:
    """The entry with None for NaN and infinities, which JSON lacks."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}


def _row(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def tensorboard_sink(folder: str | Path) -> Sink:
    """A sink that writes TensorBoard scalars, tokens as the step; needs the extra `[tensorboard]` (ImportError)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard must be installed for this sink: pip install tensorboard.") from error
    writer = SummaryWriter(str(folder))

    def write(entry: HistoryEntry) -> None:
        for key, value in entry.items():
            if isinstance(value, int | float) and key != "n_tokens":
                writer.add_scalar(key, value, entry["n_tokens"])
        writer.flush()

    return write


def wandb_sink(run: Any) -> Sink:
    """A sink that logs to a Weights & Biases run (`wandb.init(...)`, extra `[wandb]`), with tokens as the step."""
    return lambda entry: run.log(entry, step=entry["n_tokens"])


class InvalidData(ValueError):
    """Raised for batches that a run cannot go on with, by all of its processes after the same step."""


class Diverged(ValueError):
    """Raised when losses or weights of a run are no longer finite; its state is not saved."""


class TrainingRun:
    """State of a training run: modules, optimizers, step and history; `train` runs it to its end.

    Args:
        trainables: what is trained, each with an optimizer of its own, on the same batches.
        batches: iterator of batches (batch, d_in) whose position can be saved.
        cfg: configuration of the run.
        held_out: (n_tokens, d_in) activations on which FVU is measured; None for none.
        out: folder for history and checkpoints; None to write nothing.
        ranks: the processes that train together; each is given the whole batches and trains on its rows.

    Raises:
        ValueError: held-out activations or weights are not finite.
    """

    def __init__(
        self,
        trainables: Sequence[Trainable],
        batches: Batches,
        cfg: TrainConfig,
        held_out: Tensor | None,
        out: Path | None,
        ranks: RankGrid = ALONE,
    ) -> None:
        self.trainables, self.batches, self.cfg, self.ranks = list(trainables), batches, cfg, ranks
        self._check_start(held_out)
        self.held_out, self.out = held_out, out
        self.lrs = [cfg.lr or trainable.default_lr() for trainable in trainables]
        self.optimizers = [make_adam(t.module, lr, cfg) for t, lr in zip(self.trainables, self.lrs, strict=True)]
        self.step = 0
        self.stopped = False  # by Ctrl-C or SIGTERM, after the same step in all processes
        self.history: list[HistoryEntry] = []
        self._sums: dict[str, Tensor] = {}
        self._since_log = 0

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the checkpoint; None for a run without a folder."""
        return None if self.out is None else self.out / FOLDER

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run and of its trainables, which must be the same when the run is resumed."""
        trained = [
            (self._name(i, key), value) for i, t in enumerate(self.trainables) for key, value in t.settings.items()
        ]
        return {**self.cfg.to_dict(), **dict(trained)}

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run's folder has a checkpoint to resume from."""
        found = self.ranks.is_first and self.out is not None and find_checkpoint(self.out) is not None
        return self.ranks.any(found)

    def resume(self) -> bool:
        """Restore the checkpoint and return True, or False where there is none; ValueError for other settings."""
        if self.checkpoint is None or not self.has_checkpoint:
            return False
        before = read_progress(self.checkpoint)["config"]
        now = self.settings
        for key in {**before, **now}:  # a setting at its default may not be written
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"A resumed run must keep `{key}` of {self.checkpoint} ({before.get(key)}), got {now.get(key)}; "
                    "give the same settings, or another folder."
                )
        if self.ranks.alone and not is_shared(self.checkpoint):
            progress = load_checkpoint(self.checkpoint, self.trainables, self.optimizers, self.batches)
        else:
            progress = load_shared(self.checkpoint, self.trainables, self.optimizers, self.batches, self.ranks)
        self.step, self.history = progress["step"], progress["history"]
        self._since_log = progress["since_log"]
        self._sums = {key: torch.tensor(value, dtype=torch.float64) for key, value in progress["sums"].items()}
        return True

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder; raises Diverged (a ValueError) where weights are not finite."""
        self._check_going({}, f"after step {self.step}")
        if self.checkpoint is None:
            return
        progress = {
            "config": self.settings,
            "step": self.step,
            "history": self.history,
            "since_log": self._since_log,
            "sums": {key: float(value) for key, value in self._sums.items()},
        }
        if self.ranks.alone:
            save_checkpoint(self.checkpoint, progress, self.trainables, self.optimizers, self.batches)
        else:
            save_shared(self.checkpoint, progress, self.trainables, self.optimizers, self.batches, self.ranks)

    def prepare(self) -> None:
        """Initialize the trainables from a sample of the first batches; the position in the data does not change."""
        start = self.batches.state_dict()
        n_batches = min(self.cfg.n_steps, max(1, SAMPLE_TOKENS // self.cfg.batch_size))
        sample = torch.cat(list(itertools.islice(self._checked(), n_batches)))
        self.batches.load_state_dict(start)
        for trainable in self.trainables:
            trainable.prepare(sample.float())

    def peek(self, n_tokens: int) -> Tensor:
        """The next batches as one tensor of at least `n_tokens` rows, if there are as many; the position is kept."""
        start = self.batches.state_dict()
        parts: list[Tensor] = []
        while len(parts) * self.cfg.batch_size < n_tokens and (batch := next(self.batches, None)) is not None:
            parts.append(batch.float().cpu())
        self.batches.load_state_dict(start)
        return torch.cat(parts) if parts else torch.zeros(0, self.batches.d_in)

    def _checked(self) -> Iterator[Tensor]:
        """Iterator over the batches; ValueError for one that is not finite, and where the data ends too early."""
        while True:
            try:
                batch = next(self.batches)
            except StopIteration:
                raise InvalidData(
                    f"The data must last for {self.cfg.n_tokens} tokens, it ended at step {self.step} of "
                    f"{self.cfg.n_steps}; give more data or a smaller `n_tokens`."
                ) from None
            self.check_finite(batch)
            yield batch

    def check_finite(self, batch: Tensor) -> None:
        """Raise ValueError for a batch that holds NaN or infinity."""
        # the sum is finite unless an entry is not, or the sum itself overflows
        if bool(batch.sum(dtype=torch.float32).isfinite()) or bool(batch.isfinite().all()):
            return
        wrong = int((~batch.isfinite()).any(1).sum())
        raise InvalidData(
            f"Activations must be finite, {wrong} of {len(batch)} tokens after step {self.step} hold NaN or inf; "
            "mask those tokens or collect again in a wider dtype."
        )

    def _check_start(self, held_out: Tensor | None) -> None:
        """Raise ValueError for held-out rows or weights that are not finite, before anything is written."""
        if held_out is not None and not bool(held_out.sum(dtype=torch.float32).isfinite()):
            wrong = (~held_out.isfinite()).any(1).nonzero()[:, 0]
            if len(wrong):
                raise ValueError(
                    f"Held-out activations must be finite, {len(wrong)} of {len(held_out)} tokens hold NaN or inf, the "
                    f"first is held-out row {int(wrong[0])}; mask those tokens or collect again in a wider dtype."
                )
        for i, trainable in enumerate(self.trainables):
            if name := _find_broken(trainable):
                raise ValueError(
                    f"Weights must be finite before they are trained, got NaN or inf in {self._name(i, name)}; start "
                    "from others."
                )

    def _check_going(self, values: Mapping[str, float], where: str) -> None:
        """Raise Diverged where a value or weight is not finite, before a good checkpoint is replaced."""
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        broken = [self._name(i, name) for i, t in enumerate(self.trainables) if (name := _find_broken(t))]
        if self.ranks.any(bool(wrong or broken)):
            broken = broken if wrong or broken else ["weights of another process"]
            kept = f"{self.checkpoint} is as it was last saved" if self.has_checkpoint else "nothing was saved"
            raise Diverged(
                f"Training must stay finite, but {where} {' and '.join((wrong + broken)[:5])} came out NaN or "
                f"infinite; {kept}. Train with a smaller `lr` than {max(self.lrs):.3g}."
            )

    def train_on(self, batch: Tensor) -> None:
        """Take one optimizer step of every trainable."""
        for i, (trainable, optimizer, lr) in enumerate(zip(self.trainables, self.optimizers, self.lrs, strict=True)):
            optimizer.param_groups[0]["lr"] = lr * self.cfg.lr_scale(self.step)
            objective = trainable.objective(self.ranks.rows(batch))
            sparse = trainable.differentiate(objective.total)
            own = latent_axes_of(trainable)
            average_gradients(trainable.module, self.ranks, own)
            trainable.constrain_gradients()
            known = getattr(trainable, "gradient_squares", None)
            clip_gradients(trainable.module, self.cfg.clip_norm, self.ranks, own, sparse, known)
            step_adam(trainable.module, optimizer, getattr(trainable, "normalized_rows", ()), sparse)
            del sparse
            trainable.recycle_gradients()
            trainable.constrain_weights()
            trainable.observe(objective)
            self._add(i, {**objective.terms, "l0": objective.l0})
        self.step += 1
        self._since_log += 1

    def _add(self, i: int, values: dict[str, Tensor]) -> None:
        """Add to the running sums on the device; nothing is copied to the CPU before an entry is due."""
        for key, value in values.items():
            name = self._name(i, key)
            self._sums[name] = self._sums.get(name, 0) + exact(value)

    def _name(self, i: int, key: str) -> str:
        return key if len(self.trainables) == 1 else f"{i}/{key}"

    def entry(self) -> HistoryEntry:
        """The history's next entry: mean losses and L0 since the last one, learning rate, share of dead latents, and
        held-out FVU where it is due.
        """
        entry: HistoryEntry = {"step": self.step, "n_tokens": self.step * self.cfg.batch_size}
        for i, trainable in enumerate(self.trainables):
            for key in [key for key in self._sums if len(self.trainables) == 1 or key.startswith(f"{i}/")]:
                entry[key] = float(self._sums[key]) / self._since_log
            dead = trainable.state["tokens_since_fired"] >= trainable.dead_after_tokens
            axis = self.ranks.latents
            entry[self._name(i, "dead_frac")] = float(axis.total(dead.float().mean()) / axis.size)
            entry[self._name(i, "lr")] = self.lrs[i] * self.cfg.lr_scale(self.step - 1)
            due = self.step % self.cfg.save_every_steps == 0 or self.step == self.cfg.n_steps
            fvu = trainable.held_out_fvu(self.held_out) if due and self.held_out is not None else None
            entry[self._name(i, "held_out_fvu")] = fvu
        means = {key: float(value) for key, value in self._sums.items()}
        self._check_going(means, f"between steps {self.step - self._since_log} and {self.step}")
        self._sums, self._since_log = {}, 0
        self.history.append(entry)
        return entry


def train(run: TrainingRun, *, resume: bool = False, sinks: Sequence[Sink] = (), progress: bool = True) -> TrainingRun:
    """The same run, trained to its end, with logging and checkpoints.

    Ctrl-C, SIGTERM and invalid data stop it after a complete step with a checkpoint; a killed process loses the steps
    since the last checkpoint.

    Args:
        run: the run.
        resume: whether to continue from the checkpoint in the run's folder, if there is one.
        sinks: functions that receive every entry of the history.
        progress: whether a progress bar is shown.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message names the checkpoint.
        Diverged: losses or weights are no longer finite.
        ValueError: a batch is not finite, the data ends too early, or the checkpoint is of other settings.
    """
    if not (resume and run.resume()):
        run.prepare()
    if not run.ranks.is_first:
        sinks, progress = (), False
    elif run.out is not None:
        sinks = [FileSink(run.out, run.history), *sinks]
    with DeferredInterrupt() as interrupt, _progress_bar(run, progress) as bar:
        try:
            _drive(run, run._checked(), sinks, bar, interrupt)
        except Diverged:
            raise
        except ValueError as error:
            if run.step and (run.ranks.alone or isinstance(error, InvalidData)):  # others save too, or nobody
                run.save()
            raise
    return run


def _drive(
    run: TrainingRun, source: Iterator[Tensor], sinks: Sequence[Sink], bar: Any, interrupt: DeferredInterrupt
) -> None:
    cfg = run.cfg
    while run.step < cfg.n_steps:
        run.train_on(next(source))
        bar.update(cfg.batch_size)
        save_due = run.step % cfg.save_every_steps == 0 or run.step == cfg.n_steps
        if save_due or run.step % cfg.log_every_steps == 0:
            entry = run.entry()
            bar.set_postfix({key: f"{entry[key]:.4g}" for key in ("reconstruction", "l0", "dead_frac") if key in entry})
            with run.ranks.together():
                for sink in sinks:
                    sink(entry)
        interrupted = run.ranks.any(interrupt.requested)
        if save_due or interrupted:
            run.save()
        if interrupted and run.step < cfg.n_steps:
            run.stopped = True
            where = (
                f"saved to {run.checkpoint}; go on with resume=True" if run.checkpoint else "not saved: no folder given"
            )
            raise KeyboardInterrupt(f"Training stopped after {run.step} of {cfg.n_steps} steps, {where}.")


def _find_broken(trainable: Trainable) -> str:
    """The name of the first weight that is not finite, or ""."""
    for name, weight in trainable.module.named_parameters():
        if not bool(weight.detach().sum().isfinite()) and not bool(weight.detach().isfinite().all()):
            return name
    return ""


def _progress_bar(run: TrainingRun, show: bool) -> Any:
    done, total = run.step * run.cfg.batch_size, run.cfg.n_steps * run.cfg.batch_size
    return tqdm(desc="train", unit="tok", unit_scale=True, initial=done, total=total, disable=hidden(show))
