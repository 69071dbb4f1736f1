"""Likely causes of dead latents, found by comparing their weights with those of the latents that fire."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore

COLLAPSED = 0.1
"""Encoder norm as a share of the live latents' median."""
ALIKE = 0.95
"""Decoder cosine to a live latent."""
FAR = 3.0
"""Robust deviations by which a bias lies below those of the live latents."""
NEAR = 0.9
"""Share of the smallest code that fires."""
BLOCK = 1024


@torch.no_grad()
def find_causes(
    sae: SAE, store: FeatureStore, silent: Sequence[int], acts: Tensor | None = None
) -> dict[int, tuple[str, ...]]:
    """The likely causes of each dead latent, as a dictionary from latent to names of causes.

    - "encoder norm collapsed": ||W_enc|| is below a tenth of the live median.
    - "bias too low": b_enc (for learned thresholds, b_enc minus the threshold) is more than 3 robust deviations below
      the live median.
    - "duplicate of a live unit", "antipode of a live unit": the decoder cosine with a live latent is above 0.95, or
      below -0.95.
    - "never near selection": on no row of `acts` does the pre-activation come within a tenth of the smallest code that
      fires.

    Args:
        sae: the SAE whose weights are compared.
        store: feature store harvested with the SAE; latents that fire in it are live.
        silent: latents to explain; they never count as live.
        acts: (n, d_in) activations in the units of the SAE's input, on which "never near selection" is tested; None
            leaves that test out.

    Returns:
        Only latents with at least one cause; empty where no latent is live.
    """
    is_live = torch.from_numpy(store.statistics.fires.sum(1) > 0)
    is_live[list(silent)] = False
    live, units = is_live.nonzero().squeeze(1), torch.tensor(list(silent), dtype=torch.long)
    if len(units) == 0 or len(live) == 0:
        return {}
    norms, bias = sae.W_enc.detach().norm(dim=0).cpu(), _bias_of(sae)
    collapsed = norms[units] < COLLAPSED * norms[live].median()
    spread = float(1.4826 * (bias[live] - bias[live].median()).abs().median())
    low = bias[units] < bias[live].median() - FAR * max(spread, 1e-6)
    cosine = _nearest_cosine(sae.W_dec.detach().cpu(), units, live)
    reach = find_reach(sae, acts, units) if acts is not None else None
    found: dict[int, tuple[str, ...]] = {}
    for i, unit in enumerate(units.tolist()):
        causes = ["encoder norm collapsed"] * bool(collapsed[i]) + ["bias too low"] * bool(low[i])
        if abs(float(cosine[i])) > ALIKE:
            causes.append(f"{'duplicate' if cosine[i] > 0 else 'antipode'} of a live unit")
        if reach is not None and reach[i] < NEAR:
            causes.append("never near selection")
        found[unit] = tuple(causes)
    return {unit: causes for unit, causes in found.items() if causes}


@torch.no_grad()
def find_reach(sae: SAE, acts: Float[Tensor, "n d_in"], units: Int[Tensor, "n_units"]) -> Float[Tensor, "n_units"]:
    """How near each latent's pre-activation comes to firing: its largest ratio to the smallest code that fires on the
    token.

    At 1 the latent would fire. Where codes are signed, pre-activations count by size.
    """
    reach = torch.full((len(units),), -torch.inf)
    for x in acts.split(BLOCK):
        codes = sae.encode_sparse(x.to(sae.device))
        smallest = torch.full((len(x),), torch.inf, device=sae.device)
        smallest.scatter_reduce_(0, codes.rows, codes.values.abs(), "amin")
        u = sae.centre(x) @ sae.W_enc[:, units] + sae.b_enc[units]
        shares = (u.abs() if sae.cfg.activation.signed else u) / smallest[:, None]
        reach = torch.maximum(reach, shares.amax(0).cpu())
    return reach


def _bias_of(sae: SAE) -> Tensor:
    """The encoder bias of each latent, less its threshold where thresholds are learned."""
    bias = sae.b_enc.detach().cpu()
    if sae.cfg.activation.threshold == "learned" and sae.threshold is not None:
        bias = bias - sae.threshold.detach().cpu()
    return bias


def _nearest_cosine(W_dec: Tensor, units: Tensor, live: Tensor) -> Tensor:
    """For each of `units`, the decoder cosine of largest size with a live latent, with its sign."""
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found = []
    for part in units.split(BLOCK):
        cosines = rows[part] @ rows[live].T
        found.append(cosines.gather(1, cosines.abs().argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(found)
