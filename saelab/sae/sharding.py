"""An SAE's latents divided among processes: each keeps the weights of its own, and all are put together again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.sae.activation_functions import GroupMax
from saelab.sae.competition import activate_among, search_among
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import PursuitEncoder, Refined
from saelab.sae.module import SAEModule
from saelab.training.config import TrainConfig
from saelab.training.ranks import RankGrid

LATENT_AXIS = {
    "W_enc": 1,
    "b_enc": 0,
    "W_dec": 0,
    "threshold": 0,
    "r_mag": 0,
    "b_gate": 0,
    "archetypes.weights": 0,
    "archetypes.relaxation": 0,
}
"""weights that have one entry or row per latent, and which of their axes is that of the latents"""


def check_ranks(cfg: SAEConfig, run: TrainConfig, ranks: RankGrid) -> None:
    """Raise ValueError for a configuration that cannot be divided among these processes."""
    n_latents, n_data = ranks.latents.size, ranks.data.size
    if cfg.d_sae % n_latents:
        raise ValueError(
            f"`mesh` must divide the latents into equal shares, got d_sae {cfg.d_sae} for {n_latents} ranks; choose a "
            f'd_sae that is a multiple of {n_latents}, or put more ranks on the axis "data".'
        )
    if run.batch_size % n_data:
        raise ValueError(
            f"`mesh` must divide the batch into equal shares, got batch_size {run.batch_size} for {n_data} ranks; "
            f"choose a batch_size that is a multiple of {n_data}."
        )
    if n_latents > 1 and isinstance(cfg.encoder, PursuitEncoder):
        raise ValueError(
            f"A pursuit reads the whole dictionary in every round, so its latents cannot be divided, got {cfg.encoder} "
            f'and {n_latents} ranks on the axis "latents"; put them on the axis "data".'
        )
    if isinstance(cfg.activation, GroupMax) and cfg.activation.k % n_latents:
        raise ValueError(
            f'`mesh` must not cut the groups of {cfg.activation}, got {n_latents} ranks on the axis "latents"; choose '
            f"a k that is a multiple of {n_latents}."
        )
    paired = [term.name for term in cfg.terms if "neighbors" in term.needs]
    if paired and run.batch_size // 2 % n_data:
        raise ValueError(
            f"`mesh` must not separate neighboring tokens, which '{paired[0]}' compares, got batch_size "
            f"{run.batch_size} for {n_data} ranks; choose a batch_size that is a multiple of {2 * n_data}."
        )


@torch.no_grad()
def take_share(sae: SAEModule, ranks: RankGrid) -> bool:
    """Keep the weights of this rank's latents alone, in place; those of the others are gone from this process. Returns
    whether the SAE was made as a share of them.
    """
    own = ranks.latents.split(sae.cfg.d_sae)
    if len(sae.W_dec) != sae.cfg.d_sae:
        if len(sae.W_dec) != len(own):
            raise ValueError(
                f"A share of an SAE must have the latents of its place in `mesh`, {own.start} to {own.stop}, got "
                f"{len(sae.W_dec)} latents; make it with `latents=` of that range."
            )
        return True
    if ranks.latents.size == 1:
        return False
    for name, held in _per_latent(sae):
        rows = held.data.movedim(LATENT_AXIS[name], 0)[own.start : own.stop].clone()
        held.data = rows.movedim(0, LATENT_AXIS[name])
    return False


@torch.no_grad()
def put_together(sae: SAEModule, ranks: RankGrid, to_first: bool = False) -> None:
    """Give every process, or the first one alone, the weights of all latents, in place.

    Args:
        sae: the SAE, with the weights of this rank's latents.
        ranks: the grid of processes.
        to_first: whether only the first process gets them; the others keep their share.
    """
    if ranks.latents.size == 1 or (to_first and ranks.data.index > 0):
        return
    for name, held in _per_latent(sae):
        own = held.data.movedim(LATENT_AXIS[name], 0)
        parts = ranks.latents.gather_to_first(own) if to_first else ranks.latents.gather(own)
        if parts:
            held.data = torch.cat(parts).movedim(0, LATENT_AXIS[name])


def _per_latent(sae: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that have an entry for each latent."""
    for name, held in (*sae.named_parameters(), *sae.named_buffers()):
        if name in LATENT_AXIS and held.ndim:
            yield name, held


@torch.no_grad()
def reconstruct_among(
    sae: SAEModule, x: Float[Tensor, "n_rows d_in"], ranks: RankGrid
) -> Float[Tensor, "n_rows d_out"]:
    """Reconstruction as in inference, by latents that are divided among processes; each is given all rows.

    Args:
        sae: the SAE, with this rank's latents.
        x: activations.
        ranks: the grid of processes.
    """
    if ranks.latents.size == 1:
        return sae(x)
    ranks = RankGrid(latents=ranks.latents)
    read = sae.center(x)
    if isinstance(sae.cfg.encoder, Refined):  # the first pass is one of inference too
        decoded = ranks.latents.total(_infer(sae, read, ranks).decode(sae.W_dec))
        read = read + sae.cfg.encoder.step * (read - decoded)
    decoded = _infer(sae, read, ranks).decode(sae.W_dec)
    return sae.finish_decoding(ranks.latents.total(decoded), x).to(x)


def _infer(sae: SAEModule, read: Tensor, ranks: RankGrid) -> SparseCodes:
    """Codes of this rank's latents."""
    activation = sae.cfg.activation
    found = search_among(activation, read, sae.W_enc.T, sae.b_enc, sae.threshold, ranks, training=False)
    if found is None:
        u = read @ sae.W_enc + sae.b_enc
        return SparseCodes.from_dense(activate_among(activation, u, sae.threshold, ranks, training=False))
    return replace(found, values=activation.fire(found.values, sae.threshold_of(found.indices)))
