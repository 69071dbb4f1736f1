"""Which latents fire where latents and tokens are divided among processes: the codes that one process would find.

Every rank searches its own latents. Where latents compete, the ranks send each other the sizes of the best that each
has found, and every one keeps those of its own that are among the best of all. Of equal sizes the first latent is
kept, and in a batch the first token's, as in one process.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.sae.activation_registry import Activation
from saelab.training.ranks import GridAxis, RankGrid

SURPLUS = 1.5  # codes that a rank of a batch activation offers, over its equal share


def search_among(
    activation: Activation,
    x: Float[Tensor, "n_rows d_in"],
    W: Float[Tensor, "n_latents d_in"],
    bias: Float[Tensor, "n_latents"],
    threshold: Tensor | None,
    ranks: RankGrid,
    training: bool = True,
) -> SparseCodes | None:
    """What `Activation.search` finds of this rank's rows and latents, in competition with those of all ranks; None, on
    all ranks, where the dense computation must or should be used.

    Args:
        activation: activation function of the step.
        x: this rank's rows of what the encoder reads.
        W: encoder of this rank's latents, one row per latent.
        bias: their encoder biases.
        threshold: their threshold, a scalar or one for each; None for an activation without one.
        ranks: the grid of processes.
        training: whether the codes are for a training step; else a batch activation needs its threshold.
    """
    kind = activation.competition
    if ranks.alone or (ranks.latents.size == 1 and kind != "batch"):
        return activation.search(x, W, bias, threshold, training)
    if kind == "unknown":
        return None
    if kind == "batch" and not training and threshold is not None and not bool(threshold.isnan()):
        kind = "none"
    k: int = getattr(activation, "k", 0)
    if kind == "batch":
        return _search_batch(activation, k, x, W, bias, threshold, ranks)
    local = activation
    if kind == "token":
        local = _with_k(activation, min(k, len(W)))
    elif kind == "group":
        local = _with_k(activation, k // ranks.latents.size)
    found = local.search(x, W, bias, threshold, training)
    if ranks.any(found is None):
        return None
    assert found is not None
    return found.keep(_best_of_tokens(found, k, ranks.latents, activation.signed)) if kind == "token" else found


def activate_among(
    activation: Activation,
    u: Float[Tensor, "n_rows n_latents"],
    threshold: Tensor | None,
    ranks: RankGrid,
    training: bool = True,
) -> Float[Tensor, "n_rows n_latents"]:
    """Codes of dense pre-activations of this rank's rows and latents, in competition with those of all ranks;
    differentiable.

    Args:
        activation: activation function of the step.
        u: pre-activations of this rank's rows and latents.
        threshold: threshold of these latents, a scalar or one for each; None for an activation without one.
        ranks: the grid of processes.
        training: whether the codes are for a training step.
    """
    kind = activation.competition
    by_batch = kind in ("batch", "unknown") and ranks.data.size > 1
    if kind == "none" or (ranks.latents.size == 1 and not by_batch):
        return activation(u, threshold, training=training)
    n_rows, n_latents = u.shape
    whole = ranks.latents.join_summed(u, dim=1)
    if threshold is not None and threshold.ndim:
        threshold = ranks.latents.join_summed(threshold)
    if by_batch:
        whole = ranks.data.join_summed(whole).view(ranks.data.size, n_rows, -1).transpose(0, 1).flatten(0, 1)
    z = activation(whole, threshold, training=training)
    if by_batch:
        z = z[ranks.data.index :: ranks.data.size]
    first = ranks.latents.index * n_latents
    return z[:, first : first + n_latents]


def best_of_ranks(size: Float[Tensor, "n_rows n"], k: int, axis: GridAxis) -> Bool[Tensor, "n_rows n"]:
    """Which of this rank's entries are among the k largest of their row over all ranks; of equal ones the first ranks'.

    Args:
        size: each row's largest entries on this rank, largest first, as many as on the other ranks; -inf is no entry.
        k: entries kept of a row.
        axis: the ranks.
    """
    found = torch.stack(axis.gather(size))
    if found.shape[0] * found.shape[2] <= k:
        return size > -torch.inf
    last = found.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    n_left = k - (found > last).sum((0, 2))  # for those equal to the last
    n_before = (found[: axis.index] == last).sum((0, 2))
    equal = size == last
    return ((size > last) | (equal & (equal.cumsum(1) <= (n_left - n_before)[:, None]))) & (size > -torch.inf)


def _with_k(activation: Any, k: int) -> Activation:
    return activation if activation.k == k else replace(activation, k=k)


def _best_of_tokens(found: SparseCodes, k: int, axis: GridAxis, signed: bool) -> Bool[Tensor, "nnz"]:
    size = found.values.abs() if signed else found.values
    width = int(axis.largest(found.l0.max() if len(found) else found.offsets.new_zeros(())))
    place = torch.arange(len(size), device=size.device) - found.offsets[found.rows]
    order = _sort_rows(found, size, place, width)
    equal = (order.values[:, 1:] == order.values[:, :-1]) & (order.values[:, 1:] > -torch.inf)
    if bool(equal.any()):  # a search finds them in any order
        by_latent = (found.rows * found.d_sae + found.indices).argsort()
        place = torch.empty_like(place).scatter_(0, by_latent, place)
        order = _sort_rows(found, size, place, width)
    grid = order.values
    kept = torch.empty_like(grid, dtype=torch.bool).scatter_(1, order.indices, best_of_ranks(order.values, k, axis))
    return kept[found.rows, place]


def _sort_rows(found: SparseCodes, size: Tensor, place: Tensor, width: int) -> Any:
    """Sizes of each row's codes, the largest first, and of equal ones that of the first place."""
    grid = size.new_full((len(found), width), -torch.inf)
    grid[found.rows, place] = size
    return grid.sort(dim=1, descending=True, stable=True)


def _search_batch(
    activation: Activation, k: int, x: Tensor, W: Tensor, bias: Tensor, threshold: Tensor | None, ranks: RankGrid
) -> SparseCodes | None:
    """The codes of the batch's k * n_tokens largest that this rank has.

    Ranks offer somewhat more than their share, and more again while one of them might have kept an entry back that is
    among the largest.
    """
    n_kept, n_offered = k * len(x) * ranks.data.size, SURPLUS * k / ranks.latents.size
    while True:
        offered = min(len(W), max(1, round(n_offered)), k * ranks.data.size)
        found = _with_k(activation, offered).search(x, W, bias, threshold, True)
        assert found is not None
        size = found.values.abs() if activation.signed else found.values
        whole = offered in (len(W), k * ranks.data.size) or len(size) < offered * len(x)  # fewer: no more are positive
        everyone = ranks.gather_ragged(size)
        floor = everyone.topk(n_kept).values[-1] if len(everyone) > n_kept else size.new_zeros(())
        # an entry that is kept back is at most as large as the smallest offered
        if not ranks.any(not whole and bool(size.amin() >= floor)):
            break
        n_offered *= 2
    if len(everyone) <= n_kept:
        return found
    keep, equal = size > floor, size == floor
    n_left, n_equal = n_kept - int((everyone > floor).sum()), int((everyone == floor).sum())
    if n_equal <= n_left:
        return found.keep(keep | equal)
    number = _number(found, equal, W, ranks)
    last = ranks.gather_ragged(number).sort().values[n_left - 1]
    keep[equal] = number <= last
    return found.keep(keep)


def _number(found: SparseCodes, chosen: Tensor, W: Tensor, ranks: RankGrid) -> Tensor:
    """Place of each chosen code in the batch's whole matrix of codes, row by row."""
    rows = found.rows[chosen] * ranks.data.size + ranks.data.index
    latents = found.indices[chosen] + ranks.latents.index * len(W)
    return rows * len(W) * ranks.latents.size + latents
