"""Building a training run from SAEs and activations, and recording its results: the parts of `fit` before and after the
training loop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from saelab.sae.coder import Coder
from saelab.sae.finishing import MAX_TOKENS, finish
from saelab.sae.trainee import Trainee
from saelab.stores.activations import Activations
from saelab.stores.pairs import ActivationPairs
from saelab.stores.provenance import Provenance
from saelab.training.config import TrainConfig
from saelab.training.loop import TrainingRun
from saelab.training.protocols import Batches

Pair: TypeAlias = tuple[Activations, Activations] | tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]
"""Inputs and targets of the same tokens, for a transcoder."""
HeldOut: TypeAlias = (
    Float[Tensor, "n_held d_in"]
    | tuple[Activations, Activations]
    | tuple[Float[Tensor, "n_held d_in"], Float[Tensor, "n_held d_out"]]
)
Data: TypeAlias = Activations | ActivationPairs | Batches | Float[Tensor, "n d_in"] | Pair
"""Training data: collected activations, pairs of them, a stream of batches, or tensors."""


def make_run(
    saes: Sequence[Coder],
    acts: Data,
    cfg: TrainConfig,
    held_out: HeldOut | None,
    out: str | Path | None,
    resume: bool,
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

    Raises:
        ValueError: for widths that differ, pairs that are not of the same tokens, too little data, and a folder that
            does not go with `resume`.
    """
    acts = open_data(acts)
    for sae in saes:
        _check_widths(sae, acts.d_in, getattr(acts, "d_out", None))
    kept = open_data(held_out)[:] if held_out is not None else None  # type: ignore[index]
    batches, kept = (acts, kept) if isinstance(acts, Batches) else _hold_out(acts, cfg, kept)
    folder = _make_folder(out, resume)
    # an SAE that was trained before continues from its weights
    trained = [getattr(sae, "training_", None) is not None for sae in saes]
    trainees = [Trainee(sae, cfg, before) for sae, before in zip(saes, trained, strict=True)]
    run = TrainingRun(trainees, batches, cfg, kept, folder)
    if run.has_checkpoint and not resume:
        raise ValueError(f"`out` must not hold another run, got {folder}; go on with resume=True, or choose another.")
    return run


def open_data(acts: Data) -> Activations | ActivationPairs | Batches:
    """Activations or batches behind what the user passed: tensors become `Activations`, two of them `ActivationPairs`;
    ValueError where those are not of the same tokens.
    """
    if isinstance(acts, tuple):
        inputs, targets = (Activations.from_tensor(part) if isinstance(part, Tensor) else part for part in acts)
        return ActivationPairs(inputs, targets)
    return Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts


def _check_widths(sae: Coder, d_in: int, d_out: int | None) -> None:
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


def _hold_out(
    acts: Activations | ActivationPairs, cfg: TrainConfig, held_out: Tensor | None
) -> tuple[Batches, Tensor | None]:
    """Batches to train on, and the last tokens, held out to measure FVU unless other activations are given for that."""
    n_held = 0 if held_out is not None else min(cfg.n_held_out, acts.n_tokens // 10)
    rest = acts.rows(0, acts.n_tokens - n_held)
    if rest.n_tokens < cfg.batch_size:
        raise ValueError(
            f"`batch_size` must be at most the {rest.n_tokens} tokens to train on, got {cfg.batch_size}; "
            "lower it or collect more."
        )
    return rest.batches(cfg.batch_size, seed=cfg.seed), acts[rest.n_tokens :] if n_held else held_out


def _make_folder(out: str | Path | None, resume: bool) -> Path | None:
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    if resume:
        raise ValueError("`resume` needs the folder of the run, got out=None; give `out`.")
    return None


def finish_run(run: TrainingRun, saes: Sequence[Coder]) -> list[dict[str, Any]]:
    """Metrics of each trained SAE as it is saved, from `finish`: on held-out tokens, or on the tokens that come next
    where there are none.
    """
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
