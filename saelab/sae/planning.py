"""`plan_training`: what training an SAE will take: memory, disk, bytes sent between processes, and time.

Memory and bytes are counted from the configuration, without allocating anything. Time is that of a few steps of
smaller SAEs on this machine (`measure_rates`), scaled to the size asked for.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.threshold_search import DENSE_WIDTH
from saelab.sae.activation_functions import GroupMax
from saelab.sae.competition import SURPLUS
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import make_run
from saelab.sae.module import SAEModule
from saelab.sae.planned_memory import FLOAT, count_memory, k_of, n_groups_of, n_trained
from saelab.sae.pretrained import on_meta
from saelab.sae.training_sae import TrainingSAE
from saelab.stores.manifest import INT_COLUMNS
from saelab.stores.results import Result, format_table
from saelab.stores.tensors import BLOCK, make_header
from saelab.training.config import TrainConfig
from saelab.training.loop import TrainingRun

SHARD_TOKENS = 32_768
"""rows of a file that `collect` writes"""
MEASURED_ROWS = (512, 4096)
"""batch sizes of the steps that `measure_rates` times"""
N_TIMED = 3
INDEX, FLAG = 8, 1  # bytes of int64 and bool


@dataclass(frozen=True)
class StepRates(Result):
    """Seconds that a training step takes for each part of its work, in one process."""

    product: float
    """encoder: per token, latent and dimension"""
    codes: float
    """decoding and gradients of codes: per token, active latent and dimension"""
    weights: float
    """gradients, optimizer and constraints of weights: per latent and dimension"""
    step: float = 0.0
    """what does not depend on the size: per step"""
    link: float | None = None
    """bytes that one process sends to another in a second; None is unknown"""

    def seconds(self, cfg: SAEConfig, n_rows: int, n_latents: int, n_codes: int | float) -> float:
        """Seconds of a step without sending.

        Args:
            cfg: configuration of the SAE.
            n_rows: tokens of the process.
            n_latents: latents of the process.
            n_codes: active latents of the process per token.
        """
        work = _work(cfg, n_rows, n_latents, n_codes)
        rates = (self.product, self.codes, self.weights, self.step)
        return sum(rate * amount for rate, amount in zip(rates, work, strict=True))


@dataclass(frozen=True)
class TrainingPlan(Result):
    """What each process of a training run holds and sends, what the run leaves on disk, and how long it takes."""

    n_data: int
    """ranks that divide every batch"""
    n_latents: int
    """ranks that divide the latents"""
    n_parameters: int
    """trained numbers of the whole SAE"""
    n_steps: int
    """optimizer steps of the run"""
    held_bytes: dict[str, int]
    """memory of one rank throughout the run, by what it is for"""
    start_bytes: dict[str, int]
    """what initialization needs in addition, once"""
    step_bytes: dict[str, int]
    """what every step needs in addition, at its peak"""
    disk_bytes: dict[str, int]
    """sizes of safetensors files; the JSON beside them is small"""
    sent_bytes: dict[str, float]
    """bytes that one rank sends in a step, by what for, in a ring of the ranks of an axis"""
    sent_while_dead: float
    """bytes that AuxK sends in addition in a step, while latents are dead"""
    rates: StepRates | None = None
    """rates that the time is computed from; None for none"""
    seconds_per_step: float | None = None
    """time of a step, without that of sending where the link's rate is unknown"""
    notes: tuple[str, ...] = field(default=())
    """what is not counted"""

    @property
    def peak_bytes(self) -> int:
        """Peak memory of one rank."""
        return sum(self.held_bytes.values()) + max(sum(self.start_bytes.values()), sum(self.step_bytes.values()))

    @property
    def peak_gib(self) -> float:
        """Peak memory of one rank in GiB."""
        return self.peak_bytes / 2**30

    @property
    def seconds(self) -> float | None:
        """Time of the whole run, AuxK's share aside; None where it was not estimated."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.n_steps

    def __str__(self) -> str:
        ranks = f"{self.n_data}x{self.n_latents} (data x latents)" if self.n_data * self.n_latents > 1 else "1"
        rows = [["processes", ranks], ["parameters", f"{self.n_parameters:,}"], ["steps", f"{self.n_steps:,}"]]
        rows += [["memory of one process", ""], *_as_rows(self.held_bytes)]
        rows += _as_rows({f"{name} (at the start)": n for name, n in self.start_bytes.items()})
        rows += _as_rows({f"{name} (in a step)": n for name, n in self.step_bytes.items()})
        rows += [["  peak", _size(self.peak_bytes)], ["disk", ""], *_as_rows(self.disk_bytes)]
        if self.sent_bytes:
            rows += [["sent by one process in a step", ""], *_as_rows(self.sent_bytes)]
            rows += _as_rows({"AuxK, while latents are dead": self.sent_while_dead} if self.sent_while_dead else {})
            rows += [["  sum", _size(sum(self.sent_bytes.values()))]]
        if self.seconds_per_step is not None and self.seconds is not None:
            rows += [["time of a step", f"{self.seconds_per_step:.3g} s"]]
            rows += [["time of the run", f"{self.seconds:,.0f} s ({self.seconds / 3600:.1f} h)"]]
        return "\n".join([*format_table(rows), *(f"Note: {note}" for note in self.notes)])


def plan_training(
    cfg: SAEConfig,
    run: TrainConfig,
    n_data: int = 1,
    n_latents: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    n_tokens: int | None = None,
    rates: StepRates | None = None,
) -> TrainingPlan:
    """Memory, disk, bytes sent and time of a training run on collected activations, counted without training.

    Memory is meant for activations that are read from a folder, and for processes that each make their own share of the
    latents. On a GPU the weights, gradients, moments and what steps add are in its memory, the rest in that of the
    machine; the context of CUDA is not counted. Gradients of W_enc and W_dec take no memory, and are not counted, where
    one process on a CPU keeps them as products: with compiled kernels (extra `[fast]`), and at least `n_tokens k / 3`
    latents for batches of n_tokens.

    Args:
        cfg: configuration of the SAE, whose activation keeps a number k of latents.
        run: configuration of the run.
        n_data: ranks that divide every batch.
        n_latents: ranks that divide the latents.
        dtype: dtype of the collected activations.
        n_tokens: tokens collected; None is those of the run.
        rates: rates of this machine, from `measure_rates`; None leaves the time out.

    Raises:
        ValueError: for an SAE whose number of codes depends on the data, and ranks that do not divide it.

    >>> cfg = sl.SAEConfig(d_in=768, d_sae=98304, activation=sl.TopK(k=32))
    >>> plan = sl.sae.planning.plan_training(cfg, sl.TrainConfig(n_tokens=10**9), n_latents=4)
    >>> plan.n_steps, round(plan.held_bytes["weights"] / 2**30, 2)
    (244140, 0.14)
    """
    _check(cfg, run, n_data, n_latents)
    collected = run.n_tokens if n_tokens is None else n_tokens
    n_rows, n_here = run.batch_size // n_data, cfg.d_sae // n_latents
    with on_meta():
        whole = TrainingSAE(SAEModule(cfg, seed=None), run)
        share = SAEModule(cfg.adapt(d_sae=n_here, prefixes=None), seed=None) if n_latents > 1 else whole.sae
    sent, while_dead = _count_sent(cfg, share, n_rows, n_data, n_latents)
    seconds = None
    if rates is not None:
        seconds = rates.seconds(cfg, n_rows, n_here, k_of(cfg) / n_latents)
        seconds += sum(sent.values()) / rates.link if rates.link else 0.0
    held, start, step = count_memory(cfg, run, share, collected, dtype, n_rows, n_data * n_latents == 1)
    return TrainingPlan(
        n_data=n_data,
        n_latents=n_latents,
        n_parameters=sum(p.numel() for p in whole.sae.parameters() if p.requires_grad),
        n_steps=run.n_steps,
        held_bytes=held,
        start_bytes=start,
        step_bytes=step,
        disk_bytes=_count_disk(cfg, run, whole, collected, dtype, shared=n_data * n_latents > 1),
        sent_bytes=sent,
        sent_while_dead=while_dead,
        rates=rates,
        seconds_per_step=seconds,
        notes=_notes(cfg, rates, bool(sent)),
    )


def _size(n_bytes: int | float) -> str:
    return f"{n_bytes / 2**30:,.3f} GiB" if n_bytes >= 2**20 else f"{n_bytes:,.0f} B"


def _as_rows(sizes: Mapping[str, int] | Mapping[str, float]) -> list[list[str]]:
    return [[f"  {name}", _size(n_bytes)] for name, n_bytes in sizes.items()]


def _check(cfg: SAEConfig, run: TrainConfig, n_data: int, n_latents: int) -> None:
    known = cfg.activation.competition in ("token", "batch", "group") and cfg.encoder == "linear"
    plain = isinstance(cfg.dictionary, str) and not any("dense" in term.needs for term in cfg.terms)
    if not (known and plain and hasattr(cfg.activation, "k")):
        raise ValueError(
            "A plan must be for an SAE with a linear encoder and a dictionary of its own, whose activation keeps a "
            f"number k of latents, got {cfg.activation}, {cfg.encoder} and {cfg.dictionary}; take TopK or BatchTopK."
        )
    if min(n_data, n_latents) < 1 or cfg.d_sae % n_latents or run.batch_size % n_data:
        raise ValueError(
            f"`n_data` must divide batch_size ({run.batch_size}) and `n_latents` d_sae ({cfg.d_sae}), got {n_data} and "
            f"{n_latents}; choose others."
        )
    if isinstance(cfg.activation, GroupMax) and cfg.activation.k % n_latents:
        raise ValueError(f"`n_latents` must divide the groups of {cfg.activation}, got {n_latents}; choose another.")


def _notes(cfg: SAEConfig, rates: StepRates | None, sends: bool) -> tuple[str, ...]:
    notes = []
    if rates is not None and cfg.aux is not None:
        notes.append("time is without AuxK, which costs while latents are dead.")
    if rates is not None and sends and not rates.link:
        notes.append("time is without sending; give the link's bytes per second in the file of rates.")
    return tuple(notes)


def _count_disk(
    cfg: SAEConfig, run: TrainConfig, whole: TrainingSAE, collected: int, dtype: torch.dtype, shared: bool
) -> dict[str, int]:
    """Sizes of the files of tensors that collecting and training write."""
    with on_meta():
        full, rest = divmod(collected, SHARD_TOKENS)
        shards = [_shard_bytes(cfg.d_in, n, dtype) for n in (SHARD_TOKENS, rest)]
        weights = dict(whole.sae.state_dict())
        moments: dict[str, Tensor] = {}
        for name, parameter in whole.sae.named_parameters():
            if parameter.requires_grad:
                short = parameter.ndim == 2 and run.optim_bits == 16
                moment = parameter.short() if short else parameter
                moments |= {f"{name}.exp_avg": moment, f"{name}.exp_avg_sq": moment}
                moments[f"{name}.step"] = torch.zeros(())
        moments = {name: t.detach() if t.is_contiguous() else t.detach().T for name, t in moments.items()}
        files = [_file_bytes(t) for t in (weights, dict(whole.state), moments, {})]
    disk = {f"activations (d_in, {str(dtype).removeprefix('torch.')})": full * shards[0] + (shards[1] if rest else 0)}
    if cfg.d_out is not None:
        with on_meta():
            disk["activations (d_out)"] = collected * cfg.d_out * dtype.itemsize
    checkpoint = sum(t.numel() * t.element_size() for part in (weights, whole.state, moments) for t in part.values())
    return disk | {
        "SAE": _file_bytes(weights, {"format": "pt"}),
        "checkpoint": checkpoint if shared else sum(files),
    }


def _shard_bytes(d_in: int, n: int, dtype: torch.dtype) -> int:
    rows = {"blocks.0.hook_resid_post": torch.empty(n, d_in, dtype=dtype)}
    return _file_bytes(rows | {name: torch.empty(n, dtype=torch.int32) for name in INT_COLUMNS})


def _file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the safetensors file of some tensors, which need have no memory."""
    sizes = [t.numel() * t.element_size() for t in tensors.values()]
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = make_header(ordered, metadata, [])[8:].rstrip(b" ")
    length = len(header) + 8 * sum(-(-n // BLOCK) for n in sizes)  # eight digits of checksum a block
    return 8 + -(-length // 8) * 8 + sum(sizes)


def _count_sent(
    cfg: SAEConfig, share: SAEModule, n_rows: int, n_data: int, n_latents: int
) -> tuple[dict[str, float], float]:
    """Bytes that one rank sends in a step, and what AuxK adds while latents are dead."""
    if n_data * n_latents == 1:
        return {}, 0.0
    to_latents, to_data = _Ring(n_latents), _Ring(n_data)
    n_here, d_out, kind = len(share.W_dec), cfg.d_target, cfg.activation.competition
    sent = {
        "decoded rows": to_latents.reduce(n_groups_of(cfg) * n_rows * d_out * FLOAT),
        "sizes of codes": _count_competing(cfg, n_here, n_rows, to_latents, to_data),
        "gradients": to_data.reduce(FLOAT * n_trained(share)),
        "biases": to_latents.reduce(FLOAT * d_out) * (cfg.d_out is None) + to_latents.spread(FLOAT * _shared(share)),
        "firing flags": to_data.reduce(FLAG * n_here),
    }
    n_per_latent = sum(p.requires_grad and name in ("W_enc", "b_enc", "W_dec") for name, p in share.named_parameters())
    messages = to_latents.reduce(2 * FLOAT) + to_data.reduce(3 * FLOAT)  # L0, the smallest code, and the loss
    messages += to_latents.reduce(FLOAT * n_per_latent)  # norms of gradients
    messages += to_latents.reduce(INDEX) + to_data.reduce(INDEX)  # whether one was interrupted
    messages += to_latents.reduce(INDEX) * (cfg.aux is not None)  # number of dead latents
    if n_latents > 1 or kind == "batch":
        messages += to_latents.reduce(INDEX) + to_data.reduce(INDEX)  # whether all searches found something
    messages += to_latents.reduce(INDEX) * (kind == "token")  # the largest number of codes
    sent["short messages"] = messages
    return sent, _count_aux(cfg, n_rows, to_latents, to_data)


def _shared(share: SAEModule) -> int:
    """Trained numbers that all ranks of the latents have alike."""
    return share.b_dec.numel() + (0 if share.W_skip is None else share.W_skip.numel())


def _count_competing(cfg: SAEConfig, n_here: int, n_rows: int, to_latents: "_Ring", to_data: "_Ring") -> float:
    """Bytes of the comparison of codes; of a batch activation about, as that depends on the data."""
    k, kind = k_of(cfg), cfg.activation.competition
    if kind == "token":
        return to_latents.gather(n_rows * min(k, n_here) * FLOAT)
    if kind != "batch":
        return 0.0
    offered = min(n_here, max(1, round(SURPLUS * k / to_latents.size)), k * to_data.size)
    part = n_rows * offered * FLOAT
    lengths = to_latents.gather(INDEX) + to_data.gather(INDEX)
    return to_latents.gather(part) + to_data.gather(part * to_latents.size) + lengths


def _count_aux(cfg: SAEConfig, n_rows: int, to_latents: "_Ring", to_data: "_Ring") -> float:
    aux = cfg.aux
    if aux is None:
        return 0.0
    n = -(-math.ceil(aux.token_frac * n_rows * to_data.size) // to_data.size)
    k = aux.k or max(1, cfg.d_target // 2)
    return (
        to_latents.gather(n * k * FLOAT)
        + to_latents.reduce(n * cfg.d_target * FLOAT)
        + to_data.reduce((cfg.d_target + 3) * FLOAT)
    )


@dataclass(frozen=True)
class _Ring:
    """Bytes that each rank of an axis sends to the next."""

    size: int

    def reduce(self, n_bytes: int) -> float:
        """For the sum of tensors of that many bytes."""
        return 2 * n_bytes * (self.size - 1) / self.size

    def gather(self, n_bytes: int) -> float:
        """For a tensor of that many bytes of each rank to reach all."""
        return float(n_bytes * (self.size - 1))

    def spread(self, n_bytes: int) -> float:
        """For the first rank's tensor of that many bytes to reach all, on average over the ranks."""
        return n_bytes * (self.size - 1) / self.size


def _work(cfg: SAEConfig, n_rows: int, n_latents: int, n_codes: int | float) -> tuple[float, float, float, float]:
    width = (cfg.d_in + cfg.d_target) / 2
    return float(n_rows * n_latents * cfg.d_in), n_rows * n_codes * width, n_latents * width, 1.0


def measure_rates(cfg: SAEConfig, *, seed: int = 0, link: float | None = None) -> StepRates:
    """Rates of a training step in this process on the CPU, from steps of up to four sizes (some seconds).

    The steps are those of SAEs like `cfg` with fewer latents, but enough that the same search is used, on random
    activations.

    Args:
        cfg: configuration of the SAE.
        seed: seed of activations and weights.
        link: bytes that one process sends to another in a second; not measured.
    """
    from scipy.optimize import nnls

    smallest = max(DENSE_WIDTH, -(-(2**22) // cfg.d_in // 16) * 16)
    widths = sorted({min(cfg.d_sae, smallest), min(cfg.d_sae, 2 * smallest)})
    work, seconds = [], []
    for d_sae in widths:
        small = cfg.adapt(d_sae=d_sae, prefixes=None)
        for n_rows in MEASURED_ROWS:
            work.append(_work(small, n_rows, d_sae, k_of(small)))
            seconds.append(_time_steps(small, n_rows, seed))
    # relative errors count, and none of the rates is negative
    matrix = torch.tensor(work, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = matrix.amax(0)
    found, _ = nnls((matrix / scale).numpy(), torch.ones(len(seconds), dtype=torch.float64).numpy())
    product, codes, weights, step = (float(rate) for rate in torch.from_numpy(found) / scale)
    return StepRates(product, codes, weights, step, link)


def _time_steps(cfg: SAEConfig, n_rows: int, seed: int) -> float:
    """Shortest time of some steps; the first allocates memory."""
    x = _draw_rows(cfg, 2 * n_rows, seed)
    endless = TrainConfig(n_tokens=10**9, batch_size=n_rows, n_held_out=0)  # so that no latent is dead
    data = x if cfg.d_out is None else (x[:, : cfg.d_in], x[:, cfg.d_in :])
    run = make_run([SAEModule(cfg, seed=seed)], data, endless, None, None, False)
    run.trainables[0].prepare(x)
    return min(_time_step(run) for _ in range(N_TIMED + 1))


def _time_step(run: TrainingRun) -> float:
    """Seconds of a step; where other programs take the processor, the time that this one had on it."""
    batch = next(run.batches)
    start, own = time.perf_counter(), time.process_time()
    run.train_on(batch)
    return min(time.perf_counter() - start, time.process_time() - own)


def _draw_rows(cfg: SAEConfig, n: int, seed: int) -> Float[Tensor, "n width"]:
    return torch.randn(n, cfg.d_in + (cfg.d_out or 0), generator=torch.Generator().manual_seed(seed))


def read_rates(plain: Mapping[str, Any]) -> StepRates:
    """Rates from JSON values: those of `StepRates.save`, or of a plan that was saved with its rates.

    Raises:
        ValueError: for anything else.

    >>> read_rates({"product": 1e-12, "codes": 1e-9, "weights": 1e-9}).link is None
    True
    """
    found = plain["rates"] if isinstance(plain.get("rates"), dict) else plain
    known, needed = {"product", "codes", "weights", "step", "link"}, {"product", "codes", "weights"}
    numbers = {name: float(x) for name, x in found.items() if isinstance(x, int | float) and 0 <= x < math.inf}
    if (
        set(found) - known
        or needed - set(numbers)
        or {name for name, x in found.items() if x is not None} - set(numbers)
    ):
        raise ValueError(
            "Rates must be numbers of at least 0 under product, codes, weights, step and link, got "
            f"{json.dumps(found)[:200]}; write them with `saelab plan --json`."
        )
    return StepRates(**numbers)
