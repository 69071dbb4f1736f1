"""`revive`: re-initialise dead latents from tokens that the SAE reconstructs badly."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.feature_ids import FeatureIds, read_features
from saelab.sae.coder import Coder
from saelab.training.optimiser import name_optimised

ENCODER_SHARE = 0.2
"""Norm of a revived latent's encoder, as a fraction of the others' mean: large enough to become active, too small to
take over.
"""
PART = 4096


@torch.no_grad()
def revive(
    sae: Coder,
    acts: Float[Tensor, "n_tokens d_in"],
    units: FeatureIds,
    *,
    optimiser: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> list[int]:
    """Re-initialise latents from badly reconstructed tokens, in place; returns the index of the token used for each.

    Tokens are drawn without replacement with probability proportional to their squared loss ||x - x_hat||^4, as in
    Anthropic's resampling (transformer-circuits.pub/2023/monosemantic-features). A latent's row of W_dec becomes the
    direction of its token's residual, its column of W_enc the same with a fifth of the other latents' mean norm, b_enc
    0, a learned threshold the others' median.

    Args:
        sae: the SAE; its weights change.
        acts: (n_tokens, d_in) activations to draw tokens from.
        units: indices of the latents to re-initialise.
        optimiser: optimiser whose Adam moments of these latents are set to zero; None leaves them.
        seed: seed of the draw.

    Raises:
        ValueError: for latents that do not exist or repeat, for fewer tokens with an error than latents, and for an SAE
            without independent rows and encoders: an archetypal dictionary, a transcoder, matching pursuit.
    """
    kinds = {
        "an archetypal one": sae.archetypes is not None,
        "a transcoder": sae.cfg.d_out is not None,
        "matching pursuit": sae.cfg.encoder != "linear",
    }
    if wrong := [name for name, is_so in kinds.items() if is_so]:
        raise ValueError(
            f"`revive` must be given an SAE that a row and its encoder can be set in, got {wrong[0]}; use AuxK."
        )
    chosen = torch.tensor(read_features(units, sae.cfg.d_sae, "units"), dtype=torch.long)
    if len(chosen) == 0:
        return []
    if len(chosen.unique()) < len(chosen):
        raise ValueError(f"`units` must be different, got {chosen.tolist()[:5]}.")
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
    if optimiser is not None:
        _forget(sae, chosen, optimiser)
    return tokens


def _draw(sae: Coder, acts: Tensor, n: int, seed: int) -> tuple[list[int], Tensor]:
    """Tokens drawn in proportion to their squared loss, and their residuals in normalised units."""
    rows = []
    for x in acts.split(PART):
        x = x.to(sae.W_enc)
        rows.append(sae.normaliser.normalise(x) - sae.normaliser.normalise(sae.decode(sae.encode_sparse(x), x=x)))
    residual = torch.cat(rows)
    weights = residual.square().sum(1).cpu().double().square()
    if int((weights > 0).sum()) < n:
        raise ValueError(
            f"`acts` must hold a badly reconstructed token for each of {n} units, got {int((weights > 0).sum())}."
        )
    # Gumbel top-k: the largest of log w plus Gumbel noise are a weighted sample without replacement
    noise = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = weights.log() - (-noise.clamp(min=1e-300).log()).log()
    tokens = keys.topk(n).indices
    return tokens.tolist(), residual[tokens.to(residual.device)]


def _forget(sae: Coder, units: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Zero the optimiser's moments of some latents; all parameters but b_dec have latents as their first axis in
    storage, W_enc too.
    """
    for name, parameter in name_optimised(sae, optimiser).items():
        if name == "b_dec" or (name == "threshold" and parameter.ndim == 0):
            continue
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimiser.state[parameter]:
                optimiser.state[parameter][moment][units] = 0.0
