"""Steps after training: adjusting thresholds so that the mean L0 is the target, and measuring the saved SAE on held-out
tokens.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import FiringSums, ReconstructionSums
from saelab.sae.activations import ReLU
from saelab.sae.coder import Coder
from saelab.sae.config import MatchingPursuit

PART = 4096  # tokens encoded at a time
MAX_TOKENS = 16_384  # tokens on which thresholds are set
SPLIT_TOKENS = 2_048  # held-out tokens from which on one half sets thresholds and the other is measured
TURN_TOKENS = 128  # consecutive tokens assigned to the same half
NEAR = 0.002  # relative distance from the target at which the search ends
TOLERANCE = 0.05  # relative distance from the target that is warned of
REACH = 0.25  # relative distance from the target beyond which L0 is not corrected: codes would change too much
MAX_PASSES = 40


def finish(sae: Coder, held_out: Float[Tensor, "n width"] | None, others: Float[Tensor, "m width"]) -> dict[str, Any]:
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
    first, second = _split(held_out, others)
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


def target_l0(sae: Coder) -> float | None:
    """Mean L0 that the SAE's configuration asks for; None where L0 is fixed for each token (TopK) or has no target."""
    activation = sae.cfg.activation
    if isinstance(sae.cfg.encoder, MatchingPursuit):
        return None
    if activation.threshold == "running":
        return float(activation.k) if hasattr(activation, "k") else None
    return activation.penalty_target


@torch.no_grad()
def cut_to(sae: Coder, rows: Float[Tensor, "n width"], target: float, reach: float = math.inf) -> bool:
    """Adjust the mean L0 on some tokens to a target by one number, in place: a common factor of all thresholds, or for
    ReLU a common shift of all biases. Returns whether the target was reached.

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
        place.copy_(before - step if threshold is None else before * math.exp(step))
        return math.log(max(mean_l0(sae, rows), 1e-6) / target)

    start = excess(0.0)
    if abs(start) <= NEAR:
        return True
    if abs(math.expm1(start)) > reach:
        return False
    return _solve(excess, start, lambda: place.copy_(before))


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


def mean_l0(sae: Coder, rows: Float[Tensor, "n width"]) -> float:
    """Mean number of active latents per token."""
    parts = (part[:, : sae.cfg.d_in].to(sae.W_dec) for part in rows.split(PART))
    return sum(int(sae.encode_sparse(part).l0.sum()) for part in parts) / len(rows)


@torch.no_grad()
def measure(sae: Coder, rows: Float[Tensor, "n width"]) -> dict[str, Any]:
    """Number of tokens, L0, FVU and fraction of latents that are never active, on some tokens (with their targets, for
    a transcoder).
    """
    cfg = sae.cfg
    sums, fires = ReconstructionSums(cfg.d_target), FiringSums(cfg.d_sae)
    for part in rows.split(PART):
        x = part[:, : cfg.d_in].to(sae.W_dec)
        codes = sae.encode_sparse(x)
        sums.add(part[:, -cfg.d_target :], sae.decode(codes, x=x))
        fires.add(codes)
    firings = fires.firings
    return {
        "n_tokens": len(rows),
        "l0": float(firings.sum()) / max(1, len(rows)),
        "fvu": sums.fvu if len(rows) else math.nan,
        "dead_frac": float((firings == 0).double().mean()),
    }


def _split(held_out: Tensor | None, others: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to set thresholds on, and tokens to measure on."""
    if held_out is None or len(held_out) == 0:
        return others[:MAX_TOKENS].float(), others[:MAX_TOKENS].float()
    if len(held_out) < SPLIT_TOKENS:
        return held_out.float(), held_out.float()
    first = torch.arange(len(held_out)) // TURN_TOKENS % 2 == 0  # alternating blocks, as the text may drift
    return held_out[first][:MAX_TOKENS].float(), held_out[~first].float()
