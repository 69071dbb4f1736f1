"""`fit`'s steps before and after the training loop: building the run, calibrating thresholds, measuring and saving.

After training thresholds are adjusted so that the mean L0 is the target, and the SAE is measured on held-out tokens.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import FiringSums, ReconstructionSums, exact
from saelab.sae.activation_functions import MIN_THRESHOLD, ReLU
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.module import SAEModule
from saelab.sae.sharding import check_ranks
from saelab.sae.source_views import check_sources_of, find_columns, take_source
from saelab.sae.training_sae import TrainingSAE
from saelab.stores.activations import ActivationPairs, Activations
from saelab.stores.manifest import Provenance
from saelab.stores.neighbors import NeighborBatches
from saelab.training.config import Batches, Trainable, TrainConfig
from saelab.training.loop import TrainingRun
from saelab.training.prefetch import prefetch
from saelab.training.ranks import ALONE, RankGrid

PART = 4096  # tokens encoded at a time
MAX_TOKENS = 16_384  # tokens on which thresholds are set
SPLIT_TOKENS = 2_048  # held-out tokens from which on one half sets thresholds and the other is measured
TURN_TOKENS = 128  # consecutive tokens assigned to the same half
NEAR = 0.002  # relative distance from the target at which the search ends
TOLERANCE = 0.05  # relative distance from the target that is warned of
REACH = 0.25  # relative distance from the target beyond which L0 is not corrected: codes would change too much
MAX_PASSES = 40
SORTED_NUMBERS = 2**24  # pre-activations held and sorted at a time
NORMALIZER_TOKENS = 65_536  # tokens that a normalizer is fitted to
Pair: TypeAlias = tuple[Activations, Activations] | tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]
"""Inputs and targets of the same tokens, for a transcoder."""
HeldOut: TypeAlias = (
    Float[Tensor, "n_held d_in"]
    | tuple[Activations, Activations]
    | tuple[Float[Tensor, "n_held d_in"], Float[Tensor, "n_held d_out"]]
)
Data: TypeAlias = Activations | ActivationPairs | Batches | Float[Tensor, "n d_in"] | Pair
"""Training data: collected activations, pairs of them, a stream of batches, or tensors."""


def finish(
    sae: SAEModule, held_out: Float[Tensor, "n width"] | None, others: Float[Tensor, "m width"]
) -> dict[str, Any]:
    """Metrics of the trained SAE on tokens that training has not seen; first adjusts its mean L0 to the target, in
    place.

    One half of the held-out tokens sets the adjustment (if they are few, all serve for both), the other half is
    measured; without any, `others` serve for both. A batch activation gets the single threshold at which k latents are
    active per token on average. ReLU and JumpReLU, if training ended within a quarter of their target, are corrected by
    one number for all latents, as during training. Warns of a target missed by more than 5 %.

    The keys of the result are n_tokens, l0, fvu, dead_frac (fraction of latents active on none of the tokens), held_out
    (whether the tokens were held out), target_l0 and met (None without a target).

    Args:
        sae: the trained SAE; its thresholds or biases may change.
        held_out: (n, width) tokens left out of training, or None; a transcoder's rows are inputs with their targets
            appended.
        others: (m, width) tokens used where none were held out.
    """
    target = target_l0(sae)
    first, second = split_held_out(held_out, others)
    if target is not None and len(first):
        cut_to(sae, first, target, REACH if sae.cfg.activation.threshold != "running" else math.inf)
    measured = measure(sae, second)
    l0, unseen = measured["l0"], held_out is not None and len(held_out) > 0
    met = None if target is None or not len(second) else abs(l0 / target - 1) <= TOLERANCE
    if met is False:
        warnings.warn(
            f"The saved SAE must have its target L0 ({target:g}) within {TOLERANCE:.0%}, got {l0:.4g} on "
            f"{len(second):,} {'held-out ' if unseen else ''}tokens; train on more tokens, or set another target.",
            stacklevel=4,
        )
    return {**measured, "held_out": unseen, "target_l0": target, "met": met}


def target_l0(sae: SAEModule) -> float | None:
    """Mean L0 that the SAE's configuration asks for; None where L0 is fixed for each token (TopK) or has no target."""
    activation = sae.cfg.activation
    if isinstance(sae.cfg.encoder, PursuitEncoder):
        return None
    if activation.threshold == "running":
        return float(activation.k) if hasattr(activation, "k") else None
    return activation.penalty_target


@torch.no_grad()
def cut_to(sae: SAEModule, rows: Float[Tensor, "n width"], target: float, reach: float = math.inf) -> bool:
    """Adjust the mean L0 on some tokens to a target by one number, in place: a common factor of all thresholds, or a
    common shift of Gated's thresholds or ReLU's biases. Returns whether the target was reached.

    Args:
        sae: the SAE to adjust.
        rows: (n, width) tokens to measure L0 on.
        target: mean number of active latents per token to reach.
        reach: largest relative distance from the target at the start; an SAE further away is left as it is.
    """
    threshold = sae.threshold
    if threshold is None and not isinstance(sae.cfg.activation, ReLU):
        return False
    if threshold is not None and not bool((threshold.isfinite() & (threshold > 0)).all()):
        return False
    place = sae.b_enc if threshold is None else threshold
    before = place.detach().clone()

    def excess(step: float) -> float:
        if sae.cfg.activation.gated:
            sae.set_gate(before + step)
        else:
            place.copy_(before - step if threshold is None else before * math.exp(step))
        return math.log(max(mean_l0(sae, rows), 1e-6) / target)

    start = excess(0.0)
    if abs(start) <= NEAR:
        return True
    if abs(math.expm1(start)) > reach:
        return False
    return _solve(excess, start, lambda: sae.set_gate(before) if sae.cfg.activation.gated else place.copy_(before))


def _solve(excess: Any, start: float, undo: Any) -> bool:
    """Find the step at which a falling function is 0: brackets it by doubling, then alternates false position and
    bisection.
    """
    low, high, at_low, at_high = 0.0, 0.0, start, start
    step, passes = math.copysign(0.05, start), 0
    while at_low <= 0 or at_high >= 0:
        passes += 1
        if passes > MAX_PASSES // 2:
            undo()
            return False
        if step > 0:
            low, at_low = high, at_high
            high, at_high = step, excess(step)
        else:
            high, at_high = low, at_low
            low, at_low = step, excess(step)
        step *= 2
        if min(abs(at_low), abs(at_high)) <= NEAR:
            break
    for turn in range(MAX_PASSES):
        middle = low + (high - low) * (at_low / (at_low - at_high) if turn % 2 == 0 else 0.5)
        here = excess(middle)
        if abs(here) <= NEAR or high - low < 1e-6:
            return True
        low, at_low, high, at_high = (middle, here, high, at_high) if here > 0 else (low, at_low, middle, here)
    return True  # L0 jumps over the target: as close as it gets


@torch.no_grad()
def match_thresholds(sae: SAEModule, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_sae"]:
    """The threshold of each latent above which as many of its pre-activations (signed: their sizes) lie as it has codes
    on some tokens; those that the SAE has where its latents do not compete. A latent without codes gets its largest
    pre-activation.
    """
    cfg = sae.cfg
    if sae.threshold is not None and bool(sae.threshold.isfinite().all()):
        return sae.threshold.expand(cfg.d_sae).clamp(min=MIN_THRESHOLD)
    fires = FiringSums(cfg.d_sae)
    for part in rows.split(PART):
        fires.add(sae.encode_sparse(part.to(sae.W_dec)))
    firings, found = fires.firings.to(sae.device), []
    for latents in torch.arange(cfg.d_sae, device=sae.device).split(max(1, SORTED_NUMBERS // len(rows))):
        W, b = sae.W_enc[:, latents], sae.b_enc[latents]
        u = torch.cat([sae.center(part.to(sae.W_dec)) @ W + b for part in rows.split(PART)])
        u, n = (u.abs() if cfg.activation.signed else u).sort(0, descending=True).values, firings[latents]
        last = u.gather(0, (n - 1).clamp(min=0)[None])[0]
        found.append((last + u.gather(0, torch.where(n > 0, n.clamp(max=len(u) - 1), 0)[None])[0]) / 2)
    return torch.cat(found).clamp(min=MIN_THRESHOLD)


def mean_l0(sae: SAEModule, rows: Float[Tensor, "n width"]) -> float:
    """Mean number of active latents per token; of a crosscoder that encodes from any source, over its sources."""
    if sae.cfg.encode_from == "any" and sae.cfg.sources is not None:
        names = [source.name for source in sae.cfg.sources]
        return sum(mean_l0(take_source(sae, name), rows[:, find_columns(sae.cfg, name)]) for name in names) / len(names)
    parts = (part[:, : sae.cfg.d_in].to(sae.W_dec) for part in rows.split(PART))
    return sum(int(sae.encode_sparse(part).l0.sum()) for part in parts) / len(rows)


@torch.no_grad()
def measure(sae: SAEModule, rows: Float[Tensor, "n width"]) -> dict[str, Any]:
    """Number of tokens, L0, FVU and fraction of latents that are never active, on some tokens (with their targets, for
    a transcoder).
    """
    cfg = sae.cfg
    sums, fires = ReconstructionSums(cfg.d_target), FiringSums(cfg.d_sae)
    for part in rows.split(PART):
        x = part[:, : cfg.d_in].to(sae.W_dec)
        codes = sae.encode_sparse(x)
        sums.add(part[:, -cfg.d_target :].to(sae.W_dec), sae.decode(codes, x=x))
        fires.add(codes)
    firings = fires.firings
    return {
        "n_tokens": len(rows),
        "l0": mean_l0(sae, rows)
        if cfg.encode_from == "any" and len(rows)
        else float(firings.sum()) / max(1, len(rows)),
        "fvu": sums.fvu if len(rows) else math.nan,
        "dead_frac": float((firings == 0).double().mean()),
    }


def split_held_out(held_out: Tensor | None, others: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to set thresholds on, and tokens to measure on."""
    if held_out is None or len(held_out) == 0:
        return others[:MAX_TOKENS].float(), others[:MAX_TOKENS].float()
    if len(held_out) < SPLIT_TOKENS:
        return held_out.float(), held_out.float()
    first = torch.arange(len(held_out)) // TURN_TOKENS % 2 == 0  # alternating blocks, as the text may drift
    return held_out[first][:MAX_TOKENS].float(), held_out[~first].float()


def make_run(
    saes: Sequence[SAEModule],
    acts: Data,
    cfg: TrainConfig,
    held_out: HeldOut | None,
    out: str | Path | None,
    resume: bool,
    ranks: RankGrid = ALONE,
) -> TrainingRun:
    """Training run of SAEs on one stream of activations, ready for `train`; each SAE is trained as if alone with its
    seed.

    Args:
        saes: the SAEs, trained on the same batches.
        acts: collected activations, a plain tensor, or a stream of batches; for transcoders a pair of the first two, or
            a stream of pairs.
        cfg: training configuration.
        held_out: activations to measure FVU on. None holds out the last tokens of `acts`; a stream has none to hold
            out, so give them for a stream.
        out: folder for history and checkpoints; None writes nothing.
        resume: whether to continue the run in `out`.
        ranks: the processes that train together; each SAE has the weights of this one's latents.

    Raises:
        ValueError: for widths that differ, pairs that are not of the same tokens, too little data, and a folder that
            does not go with `resume`.
    """
    acts = open_data(acts)
    for sae in saes:
        check_sources_of(sae, acts)
        check_widths(sae, acts.d_in, getattr(acts, "d_out", None))
    kept = open_data(held_out)[:] if held_out is not None else None  # type: ignore[index]
    paired = [term.name for sae in saes for term in sae.cfg.terms if "neighbors" in term.needs]
    if isinstance(acts, Batches):
        if paired and not isinstance(acts, NeighborBatches):
            raise ValueError(
                f"Loss term '{paired[0]}' must be given pairs of neighboring tokens, which a stream of shuffled tokens "
                "has not; collect the activations into a folder."
            )
        batches = acts
    else:
        batches, kept = hold_out(acts, cfg, kept, neighbors=bool(paired))
        batches = prefetch(batches, saes[0].device)
    # an SAE that was trained before, or started from other features, continues from its weights
    trained = [getattr(sae, "training_", None) is not None or getattr(sae, "placed", False) for sae in saes]
    trainees = [TrainingSAE(sae, cfg, before, ranks) for sae, before in zip(saes, trained, strict=True)]
    return open_run(trainees, batches, cfg, kept, out, resume, ranks)


def check_processes(
    saes: Sequence[SAEModule],
    acts: Activations | ActivationPairs | Batches,
    cfg: TrainConfig,
    out: str | Path | None,
    ranks: RankGrid,
) -> None:
    """Raise ValueError, in all processes, where they would not do the same work: other releases, settings, data or
    weights, or a folder that some of them do not see.

    Args:
        saes: the SAEs, whole.
        acts: what they are trained on.
        cfg: training configuration.
        out: folder of the run, or None.
        ranks: the processes.
    """
    if ranks.alone:
        return
    for sae in saes:
        check_ranks(sae.cfg, cfg, ranks)
    first = b"" if isinstance(acts, Batches) else acts[: min(64, acts.n_tokens)].float().cpu().numpy().tobytes()
    ranks.require_equal(
        {
            "SAEConfig": [sae.cfg.to_dict() for sae in saes],
            "TrainConfig": cfg.to_dict(),
            "number of tokens": None if isinstance(acts, Batches) else acts.n_tokens,
            "activations": hashlib.sha256(first).hexdigest(),
            "weights to start from": [_sum_weights(sae, ranks) for sae in saes],
            "folder": None if out is None else str(out),
        }
    )
    if out is not None:
        ranks.require_shared(Path(out))


def _sum_weights(sae: SAEModule, ranks: RankGrid) -> float:
    """A sum that is the same for equal weights: of the whole SAE, or of the shares of one copy of it."""
    here = exact(sae.W_dec).square().sum() + exact(sae.W_dec)[0].sum()
    return float(here if len(sae.W_dec) == sae.cfg.d_sae else ranks.latents.total(here))


def open_run(
    trainees: Sequence[Trainable],
    batches: Batches,
    cfg: TrainConfig,
    held_out: Tensor | None,
    out: str | Path | None,
    resume: bool,
    ranks: RankGrid = ALONE,
) -> TrainingRun:
    """A training run in a new folder, in that of a run to go on with, or without one.

    Args:
        trainees: what is trained, on the same batches.
        batches: the data.
        cfg: training configuration.
        held_out: activations to measure FVU on, or None.
        out: folder for history and checkpoints; None writes nothing.
        resume: whether to continue the run in `out`.
        ranks: the processes that train together.

    Raises:
        ValueError: for a folder that does not go with `resume`.
    """
    folder = _make_folder(out, resume)
    run = TrainingRun(trainees, batches, cfg, held_out, folder, ranks)
    if run.has_checkpoint and not resume:
        raise ValueError(f"`out` must not hold another run, got {folder}; go on with resume=True, or choose another.")
    return run


def fit_normalizer(sae: SAEModule, acts: Data, *, seed: int = 0) -> None:
    """Fit the normalizer to other activations than the SAE will be trained on, in place; `fit` then keeps it.

    With normalizer "whiten" and activations of a control set, directions along which the controls vary are scaled down,
    so that the dictionary describes what is different from them (arXiv:2412.16247).

    Args:
        sae: an SAE that was not trained.
        acts: activations, or pairs of them for a transcoder; a sample of at most 65,536 tokens is used.
        seed: seed of the sample.

    Raises:
        ValueError: for a normalizer that learns nothing, an SAE that was trained, and other widths.
    """
    if sae.cfg.normalizer not in ("scale", "whiten"):
        raise ValueError(f"`normalizer` must be 'scale' or 'whiten' to be fitted, got '{sae.cfg.normalizer}'.")
    if getattr(sae, "training_", None) is not None:
        raise ValueError("`sae` must not be trained yet: its weights are in the units of the normalizer it has.")
    acts = open_data(acts)
    check_widths(sae, acts.d_in, getattr(acts, "d_out", None))
    batches = acts if isinstance(acts, Batches) else acts.batches(min(NORMALIZER_TOKENS, acts.n_tokens), seed=seed)
    sae.fit_normalizers(next(batches).to(sae.W_dec))


def open_data(acts: Data) -> Activations | ActivationPairs | Batches:
    """Activations or batches behind what the user passed: tensors become `Activations`, two of them `ActivationPairs`;
    ValueError where those are not of the same tokens.
    """
    if isinstance(acts, tuple):
        inputs, targets = (Activations.from_tensor(part) if isinstance(part, Tensor) else part for part in acts)
        return ActivationPairs(inputs, targets)
    return Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts


def require_varied(acts: Activations | Tensor) -> None:
    """Raise ValueError where all rows are equal, so that there is nothing to describe."""
    first = acts[:1]
    if not any(bool((acts[i : i + PART] != first).any()) for i in range(0, len(acts), PART)):
        raise ValueError(f"`acts` must vary, got {len(acts):,} equal rows; check where they come from.")


def check_widths(sae: SAEModule, d_in: int, d_out: int | None) -> None:
    """Raise ValueError where activations, or pairs (d_out is not None), have other widths than the SAE."""
    cfg = sae.cfg
    if cfg.d_out is not None and d_out is None:
        raise ValueError(
            f"A transcoder (d_out={cfg.d_out}) must have pairs to learn from, got activations of one hook point; give "
            "(inputs, targets)."
        )
    if cfg.d_out is None and d_out is not None:
        raise ValueError(
            "An autoencoder must have activations of one hook point, got pairs; set `d_out` in SAEConfig for a "
            "transcoder."
        )
    if cfg.d_in != d_in:
        raise ValueError(f"`d_in` of the SAE must be the activations' ({d_in}), got {cfg.d_in}.")
    if cfg.d_out != d_out:
        raise ValueError(f"`d_out` of the transcoder must be the targets' ({d_out}), got {cfg.d_out}.")


def hold_out(
    acts: Activations | ActivationPairs, cfg: TrainConfig, held_out: Tensor | None, neighbors: bool
) -> tuple[Batches, Tensor | None]:
    """Batches to train on, and the last tokens, held out to measure FVU unless other activations are given for that.

    Args:
        acts: activations, or pairs of them.
        cfg: training configuration.
        held_out: activations held out elsewhere, or None.
        neighbors: whether batches are pairs of neighboring tokens.

    Raises:
        ValueError: for fewer tokens than a batch.
    """
    n_held = 0 if held_out is not None else min(cfg.n_held_out, acts.n_tokens // 10)
    rest = acts.rows(0, acts.n_tokens - n_held)
    if rest.n_tokens < cfg.batch_size:
        raise ValueError(
            f"`batch_size` must be at most the {rest.n_tokens} tokens to train on, got {cfg.batch_size}; "
            "lower it or collect more."
        )
    draw = rest.neighbor_batches if neighbors else rest.batches
    return draw(cfg.batch_size, seed=cfg.seed), acts[rest.n_tokens :] if n_held else held_out


def _make_folder(out: str | Path | None, resume: bool) -> Path | None:
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    if resume:
        raise ValueError("`resume` needs the folder of the run, got out=None; give `out`.")
    return None


def join_states(run: TrainingRun) -> None:
    """Give all processes the counters of all latents, before `finish_run`."""
    for trainee in run.trainables:
        if isinstance(trainee, TrainingSAE):
            trainee.join_state()


def finish_run(run: TrainingRun, saes: Sequence[SAEModule]) -> list[dict[str, Any]]:
    """Metrics of each trained SAE as it is saved, its latents in their final order, from `finish`: on held-out tokens,
    or on the tokens that come next where there are none.
    """
    for trainee in run.trainables:
        if isinstance(trainee, TrainingSAE):
            trainee.settle()
    others = run.peek(MAX_TOKENS) if run.held_out is None or len(run.held_out) == 0 else run.held_out[:0]
    return [finish(sae, run.held_out, others) for sae in saes]


def describe_training(run: TrainingRun, i: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Record of the training for config.json: its settings, learning rate, tokens seen, dead latents, the last entry of
    the history with L0 and FVU of the saved SAE, and the metrics of `finish`.
    """
    last: dict[str, Any] = run.history[-1] if run.history else {}
    prefix = f"{i}/"
    mine = {key.removeprefix(prefix): value for key, value in last.items() if "/" not in key or key.startswith(prefix)}
    trainee = run.trainables[i]
    dead = (trainee.state["tokens_since_fired"] >= trainee.dead_after_tokens).nonzero().squeeze(1).tolist()
    if saved["n_tokens"]:
        mine |= {"l0": saved["l0"]} | ({"held_out_fvu": saved["fvu"]} if saved["held_out"] else {})
    seen = {"lr": run.lrs[i], "n_tokens_seen": run.step * run.cfg.batch_size}
    return {**run.cfg.to_dict(), **seen, "dead": dead, "last": mine, "saved": saved}


def origin_of(acts: Any) -> Provenance | None:
    """Provenance of activations, or None where they have none."""
    origin = getattr(acts, "provenance", None)
    return origin if isinstance(origin, Provenance) else None
