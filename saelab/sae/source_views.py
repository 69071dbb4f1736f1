"""Crosscoders source by source: columns, decoder norms, weights of one source, and what a training step encodes."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.activation_registry import Activation
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import Refined
from saelab.sae.module import SAEModule
from saelab.stores.activations import Activations
from saelab.training.ranks import RankGrid


def find_columns(cfg: SAEConfig, name: str | None = None) -> slice:
    """Columns of a source among a crosscoder's activations.

    Args:
        cfg: configuration of the crosscoder.
        name: name of the source.

    Raises:
        ValueError: for an SAE of one source, and for a name that is none of its sources.
    """
    start = 0
    for source in cfg.sources or ():
        if source.name == name:
            return slice(start, start + source.d_in)
        start += source.d_in
    known = [source.name for source in cfg.sources or ()]
    raise ValueError(
        f"`name` must be one of the sources {known}, got '{name}'."
        if known
        else f"`sae` must be a crosscoder to have a source '{name}', got an SAE of one source."
    )


@torch.no_grad()
def source_norms(sae: SAEModule) -> Float[Tensor, "n_sources d_sae"]:
    """Norm of every latent's decoder row at each source, in the normalizer's units, in which all sources have the same
    mean squared norm.

    Raises:
        ValueError: for an SAE of one source.

    >>> two = tuple(sl.stores.JoinedSource(name=name, d_in=4) for name in "ab")
    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=64, sources=two), seed=0)
    >>> source_norms(sae).square().sum(0).allclose(torch.ones(64))
    True
    """
    if sae.cfg.sources is None:
        raise ValueError("`sae` must be a crosscoder, got an SAE of one source; give `sources` in SAEConfig.")
    parts = (sae.W_dec.detach()[:, find_columns(sae.cfg, source.name)] for source in sae.cfg.sources)
    return torch.stack([part.norm(dim=1) for part in parts])


def relative_norms(sae: SAEModule) -> Float[Tensor, "n_sources d_sae"]:
    """Share of each source in the decoder norms of every latent: `||d_s|| / sum over sources ||d_s||`.

    Of two sources .5 is a latent that is as strong in both, and 0 one that a source does not have as far as its decoder
    says. A sparsity penalty drives weak rows to 0, so that 0 is no proof: see `sl.universality.diff_models`.

    Raises:
        ValueError: for an SAE of one source.

    >>> two = tuple(sl.stores.JoinedSource(name=name, d_in=4) for name in "ab")
    >>> relative_norms(sl.SAE(sl.SAEConfig(d_in=8, d_sae=64, sources=two), seed=0)).shape
    torch.Size([2, 64])
    """
    norms = source_norms(sae)
    return norms / norms.sum(0).clamp(min=1e-30)


@torch.no_grad()
def cut_source(sae: SAEModule, name: str) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Configuration and weights of an SAE that reads and reconstructs one source of a crosscoder.

    Args:
        sae: the crosscoder.
        name: name of the source.

    Raises:
        ValueError: for an SAE of one source, a name that is none of its sources, and an encoder that reads the decoder.
    """
    cfg, columns = sae.cfg, find_columns(sae.cfg, name)
    if cfg.encoder != "linear":
        raise ValueError(f"`encoder` must be 'linear' for a source to be taken alone, got {cfg.encoder}.")
    held = dict(sae.state_dict())
    n_read = len(cfg.sources or ()) if cfg.encode_from == "any" else 1
    held["W_enc"] = n_read * held["W_enc"][columns]
    held["W_dec"], held["b_dec"] = held["W_dec"][:, columns], held["b_dec"][columns]
    for key in ("mean", "matrix", "inverse"):
        if (part := held.pop(f"normalizer.{key}", None)) is not None:
            # with one factor for all columns, as a normalizer of one source has
            cut = part[columns][:1].reshape(()) if part.ndim == 1 and key != "mean" else part[columns]
            held[f"normalizer.{key}"] = cut[:, columns] if cut.ndim == 2 else cut
    held = {key: tensor.clone() for key, tensor in held.items() if not key.startswith("archetypes.")}
    held["W_enc"] = held["W_enc"].T.contiguous().T  # latent by latent, as in every SAE
    held["W_dec"] = held["W_dec"].contiguous()
    width = columns.stop - columns.start
    alone = cfg.adapt(d_in=width, sources=None, encode_from="all", dictionary="free", init="tied", pruning=None)
    return alone, held


def take_source(sae: SAEModule, name: str) -> SAEModule:
    """The module of one source of a crosscoder, as `SAE.source` gives it; ValueError as `cut_source`."""
    cfg, held = cut_source(sae, name)
    alone = SAEModule(cfg, seed=None)
    alone.load_state_dict(held, assign=True)
    return alone


def read_inputs(
    sae: SAEModule, x: Float[Tensor, "n_tokens d_in"], activation: Activation, ranks: RankGrid, number: int
) -> Float[Tensor, "n_tokens d_in"] | None:
    """What W_enc is applied to in a training step where that is not `x - b_dec`, differentiable; else None.

    For a crosscoder with `encode_from="any"` it is the columns of one source times the number of sources, others 0, so
    that a latent's pre-activation from all sources is the mean of those from each.

    Args:
        sae: the SAE that is trained.
        x: normalized activations.
        activation: activation function of the step.
        ranks: processes that train together.
        number: number of completed steps, which source it is the turn of.
    """
    if isinstance(sae.cfg.encoder, Refined):
        return ranks.latents.share(sae.refine(x - sae.b_dec, activation, ranks))
    if sae.cfg.encode_from == "all":
        return None
    sources = sae.cfg.sources or ()
    columns = find_columns(sae.cfg, sources[number % len(sources)].name)
    factor = torch.zeros(sae.cfg.d_in, device=x.device, dtype=x.dtype)
    factor[columns] = len(sources)
    return ranks.latents.share((x - sae.b_dec) * factor)


def check_sources_of(sae: SAEModule, acts: object) -> None:
    """Raise ValueError where activations have other sources than the crosscoder, or a plain SAE is given several.

    Args:
        sae: the SAE.
        acts: activations; those without named sources are not checked.
    """
    given = acts.sources if isinstance(acts, Activations) else None
    if given is None or given == sae.cfg.sources:
        return
    wanted, got = (
        "one source" if sources is None else str({source.name: source.d_in for source in sources})
        for sources in (sae.cfg.sources, given)
    )
    raise ValueError(
        f"Activations must have the sources of the SAE, {wanted}, in that order, got {got}; join those, or set "
        "`sources=acts.sources` in SAEConfig."
    )
