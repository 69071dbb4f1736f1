"""Untrained SAEs as baselines for trained ones, and re-initialization of dead latents.

An untrained SAE has the same number of active latents. `resample_dead_latents` starts dead latents again from tokens
that the SAE reconstructs badly, `start_from_core` a whole run from features that earlier runs found.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.indices import FeatureIds, read_features
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.fitting import cut_to, mean_l0
from saelab.sae.module import SAEModule
from saelab.sae.objectives.kept_core import KeptCoreLoss
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.placement import place_weights
from saelab.sae.sae import SAE
from saelab.sae.training_sae import TrainingSAE
from saelab.training.config import TrainConfig
from saelab.training.optimizer import name_optimized

ENCODER_SHARE = 0.2
"""Norm of a revived latent's encoder, as a fraction of the others' mean: large enough to become active, too small to
take over.
"""
PART = 4096


def prepare(cfg: SAEConfig, x: Float[Tensor, "n d_in"], seed: int, y: Float[Tensor, "n d_out"] | None = None) -> SAE:
    """SAE as it is before its first training step: random weights, fitted in location and scale to a sample.

    Args:
        cfg: its configuration; its objective is ignored.
        x: (n, d_in) sample of activations.
        seed: seed of the weights.
        y: (n, d_out) targets of the same tokens, for a transcoder.
    """
    sae = SAE(replace(cfg, objective=(ReconstructionLoss(),)), seed).to(x.device)
    sample = x if cfg.d_out is None or y is None else torch.cat([x, y], dim=1)
    trainee = TrainingSAE(sae, TrainConfig(seed=seed))
    trainee.prepare(sample)
    if cfg.activation.threshold == "running":  # sets the threshold, as codes would depend on the batch without
        trainee.observe(trainee.objective(sample[:4096]))
    return sae


def make_untrained(
    sae: SAE, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"] | None = None, *, seed: int = 0
) -> SAE:
    """Untrained SAE of the same configuration and hook point, with as many active latents per token as `sae` has on
    `x`.

    Its weights are those that training starts from: random directions, with biases and scale fitted to the sample.
    Where L0 is not fixed by k, all thresholds or biases are adjusted by one number to match it.

    Args:
        sae: the trained SAE to match.
        x: (n, d_in) sample of activations.
        y: (n, d_out) targets of the same tokens, for a transcoder.
        seed: seed of the weights.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
    >>> make_untrained(sae, torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), seed=1).cfg.activation
    TopK(k=4)
    """
    x = x.float().to(sae.device)
    made = prepare(sae.cfg, x, seed, None if y is None else y.float().to(sae.device))
    wanted = mean_l0(sae, x)
    if abs(math.log(max(mean_l0(made, x), 1e-6) / max(wanted, 1e-6))) > 1e-3:
        cut_to(made, x, wanted)
    made.provenance = sae.provenance
    return made


@torch.no_grad()
def start_from_core(
    sae: SAE, latents: FeatureIds, x: Float[Tensor, "n d_in"], *, keep: float | None = 1.0, seed: int = 0
) -> SAE:
    """New SAE whose first latents are the given ones of `sae`, the core, and whose others are as training starts from
    them; `fit` continues from these weights.

    Fewer features differ between seeds where those that recurred (`sl.universality.find_core`) begin a new run. The
    normalizer and b_dec are also those of `sae`.

    Args:
        sae: the SAE whose latents are the core.
        latents: indices of the core's latents.
        x: (n, d_in) sample of activations, to which the scale of the other latents is fitted.
        keep: coefficient of a `KeptCoreLoss` that is added to the objective; None only initializes.
        seed: of the other latents.

    Raises:
        ValueError: for latents that do not exist or repeat, or are none, and for an SAE without independent rows and
            encoders: an archetypal dictionary, a transcoder, a pursuit.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
    >>> other = start_from_core(sae, [5, 3], torch.randn(100, 8, generator=torch.Generator().manual_seed(0)), seed=1)
    >>> torch.equal(other.W_dec[:2], sae.W_dec[[5, 3]]), other.cfg.objective[-1]
    (True, KeptCoreLoss(coefficient=1.0, n=2))
    """
    _require_rows("start_from_core", sae)
    chosen = _read_distinct(latents, sae.cfg.d_sae)
    n = len(chosen)
    if n == 0:
        raise ValueError("`latents` must name a core to start from, got none.")
    terms = tuple(term for term in sae.cfg.objective if not isinstance(term, KeptCoreLoss))
    kept = () if keep is None else (KeptCoreLoss(n=n, coefficient=keep),)
    other = SAE(replace(sae.cfg, objective=(*terms, *kept)), seed).to(sae.device)
    other.normalizer.load_state_dict(sae.normalizer.state_dict())
    normalized = other.normalizer.normalize(x.to(other.W_dec))
    place_weights(other, normalized, normalized, seed)
    chosen = chosen.to(sae.device)
    other.W_dec[:n], other.W_enc[:, :n] = sae.W_dec[chosen], sae.W_enc[:, chosen]
    for name in ("b_enc", "r_mag", "b_gate", "threshold"):
        held = getattr(sae, name)
        if held is not None and held.ndim:  # a batch activation's threshold is one for all
            getattr(other, name)[:n] = held[chosen]
    other.b_dec.copy_(sae.b_dec)
    other.provenance, other.placed = sae.provenance, True
    return other


def _read_distinct(latents: FeatureIds, d_sae: int) -> Tensor:
    chosen = torch.tensor(read_features(latents, d_sae, "latents"), dtype=torch.long)
    if len(chosen.unique()) < len(chosen):
        raise ValueError(f"`latents` must be different, got {chosen.tolist()[:5]}.")
    return chosen


def _require_rows(function: str, sae: SAEModule) -> None:
    kinds = {
        "an archetypal one": sae.archetypes is not None,
        "a transcoder": sae.cfg.d_out is not None,
        "a pursuit": isinstance(sae.cfg.encoder, PursuitEncoder),
    }
    if wrong := [name for name, is_so in kinds.items() if is_so]:
        raise ValueError(
            f"`{function}` must be given an SAE that a row and its encoder can be set in, got {wrong[0]}; use AuxK."
        )


@torch.no_grad()
def resample_dead_latents(
    sae: SAEModule,
    acts: Float[Tensor, "n_tokens d_in"],
    latents: FeatureIds,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> list[int]:
    """Re-initialize latents from badly reconstructed tokens, in place; returns the index of the token used for each.

    Tokens are drawn without replacement with probability proportional to their squared loss ||x - x_hat||^4, as in
    Anthropic's resampling (transformer-circuits.pub/2023/monosemantic-features). A latent's row of W_dec becomes the
    direction of its token's residual, its column of W_enc the same with a fifth of the other latents' mean norm, b_enc
    0, a learned threshold the others' median.

    Args:
        sae: the SAE; its weights change.
        acts: (n_tokens, d_in) activations to draw tokens from.
        latents: indices of the latents to re-initialize.
        optimizer: optimizer whose Adam moments of these latents are set to zero; None leaves them.
        seed: seed of the draw.

    Raises:
        ValueError: for latents that do not exist or repeat, for fewer tokens with an error than latents, and for an SAE
            without independent rows and encoders: an archetypal dictionary, a transcoder, a pursuit.
    """
    _require_rows("resample_dead_latents", sae)
    chosen = _read_distinct(latents, sae.cfg.d_sae)
    if len(chosen) == 0:
        return []
    tokens, residual = _draw(sae, acts, len(chosen), seed)
    directions = residual / residual.norm(dim=1, keepdim=True)
    others = torch.ones(sae.cfg.d_sae, dtype=torch.bool)
    others[chosen] = False
    norms = sae.W_enc.norm(dim=0)[others] if others.any() else torch.ones(1)
    chosen = chosen.to(sae.device)
    sae.W_dec[chosen] = directions
    sae.W_enc[:, chosen] = ENCODER_SHARE * norms.mean() * directions.T
    sae.b_enc[chosen] = 0.0
    if sae.cfg.activation.threshold == "learned" and sae.threshold is not None and others.any():
        sae.threshold[chosen] = sae.threshold[others.to(sae.device)].median()
        if sae.r_mag is not None:
            sae.r_mag[chosen] = 0.0
            sae.set_gate(sae.threshold)
    if optimizer is not None:
        _forget(sae, chosen, optimizer)
    return tokens


def _draw(sae: SAEModule, acts: Tensor, n: int, seed: int) -> tuple[list[int], Tensor]:
    """Tokens drawn in proportion to their squared loss, and their residuals in normalized units."""
    rows = []
    for x in acts.split(PART):
        x = x.to(sae.W_enc)
        rows.append(sae.normalizer.normalize(x) - sae.normalizer.normalize(sae.decode(sae.encode_sparse(x), x=x)))
    residual = torch.cat(rows)
    weights = residual.square().sum(1).cpu().double().square()
    if int((weights > 0).sum()) < n:
        raise ValueError(
            f"`acts` must hold a badly reconstructed token for each of {n} latents, got {int((weights > 0).sum())}."
        )
    # Gumbel top-k: the largest of log w plus Gumbel noise are a weighted sample without replacement
    noise = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = weights.log() - (-noise.clamp(min=1e-300).log()).log()
    tokens = keys.topk(n).indices
    return tokens.tolist(), residual[tokens.to(residual.device)]


def _forget(sae: SAEModule, latents: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer's moments of some latents; all parameters but b_dec have latents as their first axis in
    storage, W_enc too.
    """
    for name, parameter in name_optimized(sae, optimizer).items():
        if name == "b_dec" or (name == "threshold" and parameter.ndim == 0):
            continue
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][latents] = 0.0
