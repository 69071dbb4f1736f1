"""`WholeStep`: the step of one process, gathered from the shares of several as far as it is read."""

# mypy: disable-error-code="override"
# what a `TrainingStep` holds is computed here when it is first read

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep
from saelab.sae.sharding import LATENT_AXIS
from saelab.training.ranks import ALONE, RankGrid

STATE_PER_LATENT = ("tokens_since_fired", "axes")
"""states of training that each rank has for its own latents; those of the terms are whole on every rank"""


class WholeStep(TrainingStep):
    """A step as one process would have it: all tokens in the order of the batch, all latents, and values that every
    rank computes alike, each with gradients to its own tokens and latents.

    What is read is gathered at the first time, which all ranks do in the same order, as they run the same terms.
    """

    def __init__(self, share: TrainingStep) -> None:
        self._share = share
        self.number, self.seed, self.share = share.number, share.seed, share.share
        self.dead_after_tokens, self.notes = share.dead_after_tokens, share.notes
        self.ranks: RankGrid = ALONE
        self.memory = {}

    @cached_property
    def sae(self) -> Any:
        return _WholeSAE(self._share.sae, self._share.ranks)

    @cached_property
    def x(self) -> Tensor:
        return self._share.ranks.join_rows(self._share.x)

    @cached_property
    def y(self) -> Tensor:
        return self._share.ranks.join_rows(self._share.y)

    @cached_property
    def W_dec(self) -> Tensor:
        return self._share.ranks.latents.join(self._share.W_dec)

    @cached_property
    def errors(self) -> Tensor:
        return self._share.ranks.sum_tokens(self._share.errors)

    @cached_property
    def residual(self) -> Tensor:
        return self._share.ranks.join_rows(self._share.residual)

    @cached_property
    def penalty(self) -> Tensor | None:
        penalty = self._share.penalty
        if penalty is None:
            return None
        return self._join_dense(penalty) if penalty.ndim == 2 else self._join_entries(penalty)

    @cached_property
    def sparse(self) -> tuple[Tensor, Entries] | None:
        if self._share.sparse is None:
            return None
        return self._join_entries(self._share.sparse[0]), self._entries_and_order[0]

    @cached_property
    def dense(self) -> Tensor | None:
        return None if self._share.dense is None else self._join_dense(self._share.dense)

    @cached_property
    def u(self) -> Tensor | None:
        return None if self._share.u is None else self._join_dense(self._share.u)

    @cached_property
    def b_read(self) -> Tensor | None:
        return self._share.b_read

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        mine, axis = self._share.state, self._share.ranks.latents
        return {**mine, **{name: axis.join(mine[name]) for name in STATE_PER_LATENT if name in mine}}

    @property
    def d_sae(self) -> int:
        return len(self._share.W_dec) * self._share.ranks.latents.size

    def _join_dense(self, x: Tensor) -> Tensor:
        ranks = self._share.ranks
        return ranks.join_rows(ranks.latents.join(x, dim=1))

    @cached_property
    def _entries_and_order(self) -> tuple[Entries, Tensor]:
        assert self._share.sparse is not None
        step = self._share
        return gather_entries(self._share.sparse[1], step.latents.start, step.n_tokens, step.ranks)

    def _join_entries(self, values: Tensor) -> Tensor:
        """Values of the codes of all ranks in the order of the whole step."""
        ranks = self._share.ranks
        joined = torch.cat(ranks.latents.gather_ragged(ranks.weigh_rows(values)))
        return torch.cat(ranks.data.gather_ragged(joined))[self._entries_and_order[1]]


class _WholeSAE:
    """The SAE of a step, whose weights are gathered when they are read."""

    def __init__(self, share: Any, ranks: RankGrid) -> None:
        self._share, self._ranks = share, ranks

    def __getattr__(self, name: str) -> Any:
        held = getattr(self._share, name)
        if name in LATENT_AXIS and isinstance(held, Tensor) and held.ndim:
            held = self._ranks.latents.join(held, LATENT_AXIS[name])
            setattr(self, name, held)
        return held


def gather_entries(entries: Entries, first: int, n_tokens: int, ranks: RankGrid) -> tuple[Entries, Int[Tensor, "nnz"]]:
    """Entries of the codes of all processes, token by token, and the order of `RankGrid.gather_ragged` that gives it.

    Args:
        entries: latent and token of each code of this rank.
        first: number of this rank's first latent.
        n_tokens: this rank's tokens in the batch.
        ranks: the grid of processes.
    """
    rows, order = ranks.gather_ragged(entries.rows * ranks.data.size + ranks.data.index).sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(n_tokens * ranks.data.size + 1, device=rows.device))
    return Entries(ranks.gather_ragged(entries.indices + first)[order], rows, offsets), order


def group_among(
    cfg: Any,
    values: Float[Tensor, "nnz"],
    entries: Entries,
    n_tokens: int,
    first: int,
    ranks: RankGrid,
) -> tuple[Int[Tensor, "nnz"], int] | None:
    """What the reconstruction term groups the codes of all processes by (`ReconstructionLoss.group`), for those of this
    one.

    Args:
        cfg: configuration of the SAE.
        values: codes of this rank's tokens and latents.
        entries: latent and token of each code.
        n_tokens: this rank's tokens in the batch.
        first: number of this rank's first latent.
        ranks: the grid of processes.
    """
    if ranks.alone or type(cfg.reconstruction).group is ReconstructionLoss.group:
        found: tuple[Tensor, int] | None = cfg.reconstruction.group(values, entries, n_tokens, cfg)
        return found
    whole, order = gather_entries(entries, first, n_tokens, ranks)
    grouped = cfg.reconstruction.group(ranks.gather_ragged(values)[order], whole, n_tokens * ranks.data.size, cfg)
    if grouped is None:
        return None
    lengths = ranks.gather_ragged(torch.tensor([len(values)], device=values.device))
    start = int(lengths[: ranks.index].sum())
    in_order_gathered = torch.empty_like(grouped[0]).scatter_(0, order, grouped[0])
    return in_order_gathered[start : start + len(values)], grouped[1]
