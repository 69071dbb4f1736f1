"""`place_weights`: biases, dictionary and encoder scale before the first step, from a sample of activations."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries, SparseCodes
from saelab.functional.metrics import effective_rank, exact
from saelab.functional.sparse_products import weight_gradient
from saelab.sae.competition import activate_among, search_among
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.module import SAEModule
from saelab.training.ranks import ALONE, RankGrid

SCALE_TOKENS = 1024  # tokens used to set the encoder's scale; also the chunk size
DENSE_NUMBERS = 2**26  # pre-activations of the chunk, of which more are not made where a search finds the codes


@torch.no_grad()
def place_weights(
    sae: SAEModule,
    x: Float[Tensor, "n_tokens d_in"],
    y: Float[Tensor, "n_tokens d_out"],
    seed: int,
    ranks: RankGrid = ALONE,
) -> None:
    """Initialise biases and dictionary from a sample of inputs and targets, in place.

    b_dec is the targets' mean, directions are those of `cfg.init`. A transcoder's b_enc cancels the inputs' mean, and
    its rows of W_dec are the mean targets of its random codes: Z^T (y - b_dec), at unit length.

    Args:
        sae: the SAE; its weights change.
        x: (n_tokens, d_in) normalized inputs.
        y: (n_tokens, d_out) normalized targets; `x` again for an autoencoder.
        seed: seed of archetypal points, or of the activations drawn as directions for `init="data"`.
        ranks: processes among which the latents are divided; `sae` has those of this one.
    """
    sae.b_dec.copy_(y.mean(0))
    centered = x - x.mean(0)
    rows = sae.W_enc.T
    if sae.archetypes is not None:
        sae.archetypes.place(y - y.mean(0), seed)
        ranks.latents.spread_(sae.archetypes.points)
        sae.W_dec.copy_(sae.archetypes())
        rows = sae.W_dec if sae.cfg.d_out is None else normalize_rows(sae.W_dec @ (y - y.mean(0)).T @ centered)
    elif sae.cfg.init == "data":
        rows = _draw_rows(centered, rows, seed, ranks)
    elif sae.cfg.init == "subspace":
        rows = _turn_inside(centered, rows)
    sae.W_enc.copy_(rows.T)
    if sae.cfg.d_out is None:
        sae.W_dec.copy_(rows)
    else:
        sae.b_enc.copy_(-x.mean(0) @ sae.W_enc)
        if sae.archetypes is None:
            _answer(sae, x, y, ranks)
    if not isinstance(sae.cfg.encoder, PursuitEncoder):
        _match_scale(sae, x[:SCALE_TOKENS], y[:SCALE_TOKENS], ranks)
    if sae.cfg.activation.gated:
        sae.set_gate(sae.threshold)


@torch.no_grad()
def reorder_latents(sae: SAEModule, order: Int[Tensor, "d_sae"]) -> None:
    """Put the latents in another order, in place: latent i becomes what latent `order[i]` was.

    Args:
        sae: the SAE; its weights and thresholds change.
        order: (d_sae,) latents, each once.
    """
    if not isinstance(sae.cfg.encoder, PursuitEncoder):
        sae.W_enc.copy_(sae.W_enc[:, order])
        sae.b_enc.copy_(sae.b_enc[order])
    sae.W_dec.copy_(sae.W_dec[order])
    for held in (sae.threshold, sae.r_mag, sae.b_gate):
        if held is not None and held.ndim:
            held.copy_(held[order])


def normalize_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows at unit length; rows of zeros stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _draw_rows(centered: Tensor, random: Tensor, seed: int, ranks: RankGrid) -> Tensor:
    """Activations drawn at random, as directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = centered[centered.norm(dim=1) > 0]
    if len(rows) == 0:  # constant activations have no direction: keep the random ones
        return random
    here = ranks.latents.split(n := len(random) * ranks.latents.size)
    places = torch.randint(len(rows), (n,), generator=generator)[here.start : here.stop]
    made = torch.empty_like(random)
    for out, noise, part in zip(*(t.split(SCALE_TOKENS) for t in (made, random, places)), strict=True):
        chosen = rows[part]
        # adding some of the random direction makes repeated rows differ
        directions = chosen / chosen.norm(dim=1, keepdim=True) + 0.1 * noise
        torch.div(directions, directions.norm(dim=1, keepdim=True), out=out)
    return made


def _turn_inside(centered: Tensor, random: Tensor) -> Tensor:
    """Random directions in the subspace spanned by the activations (arXiv:2508.16929): a latent outside of it is never
    active.

    The dimension is the effective rank of the singular values. Unlike the number of components that hold 99 % of the
    variance, it is not reduced to a handful by a few dominant directions.
    """
    moments = exact(centered).T @ exact(centered)
    variances, directions = torch.linalg.eigh(moments)
    n = max(1, math.ceil(effective_rank(variances.clamp(min=0).sqrt())))
    return normalize_rows(random[:, :n] @ directions[:, -n:].T.to(random))


def _answer(sae: SAEModule, x: Tensor, y: Tensor, ranks: RankGrid) -> None:
    """Set each row of W_dec to the mean direction of the targets where its latent is active; rows of inactive latents
    stay random.
    """
    sums = torch.zeros_like(sae.W_dec)
    for part, target in zip(x.split(SCALE_TOKENS), y.split(SCALE_TOKENS), strict=True):
        codes, centered = _codes(sae, part, ranks), target - sae.b_dec
        if isinstance(codes, Tensor):
            sums += codes.T @ centered
        else:
            entries = Entries(codes.indices, codes.rows, codes.offsets)
            sums += weight_gradient(entries, codes.values, centered, len(sums))
    sae.W_dec.copy_(torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize_rows(sums), sae.W_dec))


def _match_scale(sae: SAEModule, x: Tensor, y: Tensor, ranks: RankGrid) -> None:
    """Scale the encoder by the c that minimizes ||y - b_dec - c z W_dec||^2: reconstructions from random weights are
    many times too large.
    """
    centered, codes = y - sae.b_dec, _codes(sae, x, ranks)
    y_hat = ranks.latents.total(codes @ sae.W_dec if isinstance(codes, Tensor) else codes.decode(sae.W_dec))
    energy = y_hat.square().sum()
    if energy > 0 and (scale := (centered * y_hat).sum() / energy) > 0:
        sae.W_enc.mul_(scale.clamp(0.05, 1.0))
        sae.b_enc.mul_(scale.clamp(0.05, 1.0))


def _codes(sae: SAEModule, x: Tensor, ranks: RankGrid) -> Tensor | SparseCodes:
    """Codes at the start of training, of normalized inputs; each process has all of them, and its own latents."""
    read = x - sae.b_dec if sae.cfg.d_out is None else x
    activation, ranks = sae.cfg.activation, RankGrid(latents=ranks.latents)
    # of several processes dense pre-activations would have to be those of all latents
    if not ranks.alone or len(x) * len(sae.W_dec) > DENSE_NUMBERS:
        found = search_among(activation, read, sae.W_enc.T, sae.b_enc, sae.threshold, ranks)
        if found is not None:
            fired = activation.fire(found.values, sae.threshold_of(found.indices))
            return replace(found, values=fired)
    return activate_among(activation, read @ sae.W_enc + sae.b_enc, sae.threshold, ranks)
