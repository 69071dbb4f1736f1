"""`head_overlap`: whether what one attention head writes lies where a later one reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.frozen_model import FrozenModel
from saelab.circuits.placement import find_mlp, find_stack
from saelab.lm.freezing import ScoreWatch
from saelab.lm.hook_points import hook_points_of
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import Tap
from saelab.stores.results import Result, format_table

Read = Literal["query", "key", "value"]
N_SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadOverlap(Result):
    """Result of `head_overlap`."""

    reads: Read
    """what the later head makes of what it reads"""
    rank: int
    """dimension of the subspaces"""
    overlap: Float[np.ndarray, "n_layers n_heads n_layers n_heads"] = field(repr=False)
    """by layer and head that writes, layer and head that reads: in [0, 1]; NaN unless the one layer is before the
    other"""
    chance: float
    """what random subspaces of this rank have in the mean: rank / d_model"""
    chance_std: float
    """standard deviation of the same"""
    chance_95: float
    """what 5 % of the pairs of random subspaces exceed"""

    @property
    def z(self) -> Float[np.ndarray, "n_layers n_heads n_layers n_heads"]:
        """Standard deviations above chance."""
        return (self.overlap - self.chance) / self.chance_std

    @property
    def above_frac(self) -> float:
        """Share of the pairs of heads above `chance_95`; NaN for a model of one layer."""
        known = self.overlap[~np.isnan(self.overlap)]
        return float((known > self.chance_95).mean()) if len(known) else float("nan")

    def top(self, n: int = N_SHOWN) -> list[tuple[float, tuple[int, int], tuple[int, int]]]:
        """The `n` pairs of largest overlap: it, layer and head that writes, layer and head that reads."""
        order = np.argsort(-np.nan_to_num(self.overlap, nan=-1.0), axis=None, kind="stable")
        places = [np.unravel_index(i, self.overlap.shape) for i in order[: min(n, int((self.overlap >= 0).sum()))]]
        return [(float(self.overlap[a, b, c, d]), (int(a), int(b)), (int(c), int(d))) for a, b, c, d in places]

    def __str__(self) -> str:
        head = (
            f"{self.reads} of a head and output of one before it, subspaces of {self.rank} dimensions: random ones "
            f"overlap by {self.chance:.3f} (95 % below {self.chance_95:.3f}), {self.above_frac:.0%} of pairs by more"
        )
        rows = [
            [f"{value:.3f}", f"{(value - self.chance) / self.chance_std:+.1f}", f"{a}.{b}", f"{c}.{d}"]
            for value, (a, b), (c, d) in self.top()
        ]
        return "\n".join([head, *format_table([["overlap", "z", "writes", "reads"], *rows])])


@torch.inference_mode(False)  # gradients are needed wherever it is called
def head_overlap(
    model: AnyModel, *, reads: Read = "key", rank: int | None = None, n_null: int = 1000, seed: int = 0
) -> HeadOverlap:
    """For each pair of heads of different layers, how much of what the earlier one writes lies where the later reads.

        overlap = |U V^T|^2 / rank        the mean squared cosine of the principal angles

    U has the `rank` first directions of the residual stream that the earlier head's map W_V W_O writes to, V those that
    the later head's W_Q, W_K or W_V reads, both by singular values; norms are in the maps, but for their scales. Heads
    that work together across layers have large values: an induction head's key reads what a head that looks one token
    back writes. Weights alone are compared: no text is. Sources: arXiv:2408.09503 (common bridge subspace), Elhage et
    al. 2021, A Mathematical Framework for Transformer Circuits (composition).

    Args:
        model: the language model.
        reads: what of the later head reads: its query, key or value.
        rank: dimension of the subspaces; None is that of a head.
        n_null: pairs of random subspaces of the same rank.
        seed: seed of these.

    Raises:
        ValueError: for a rank that the heads do not have, and a model with a layer whose queries and keys cannot be
            told (see `attention_score`).

    >>> found = head_overlap(sl.lm.tiny_model(n_layers=2))
    >>> found.overlap.shape, found.chance
    ((2, 4, 2, 4), 0.25)
    """
    model = as_model(model)
    if reads not in ("query", "key", "value"):
        raise ValueError(f"`reads` must be 'query', 'key' or 'value', got {reads!r}.")
    if n_null < 20:
        raise ValueError(f"`n_null` must be at least 20, got {n_null}.")
    width, d_head = model.cfg.d_model, int(model.cfg.d_head)  # type: ignore[attr-defined]
    rank = d_head if rank is None else rank
    if not 1 <= rank <= min(d_head, width):
        raise ValueError(f"`rank` must be in 1..{min(d_head, width)}, the dimension of a head, got {rank}.")
    maps = _find_maps(model, reads)
    written = [torch.stack([_span(one, rank) for one in of.written]) for of in maps]
    read = [torch.stack([_span(one, rank) for one in of.read]) for of in maps]
    n_layers, n_heads = len(maps), len(written[0])
    overlap = np.full((n_layers, n_heads, n_layers, n_heads), np.nan)
    for a in range(n_layers):
        for b in range(a + 1, n_layers):
            overlap[a, :, b] = _compare(written[a], read[b]).numpy()
    null = _draw_null(width, rank, n_null, seed)
    return HeadOverlap(
        reads=reads,
        rank=rank,
        overlap=overlap,
        chance=rank / width,
        chance_std=float(null.std()),
        chance_95=float(np.quantile(null, 0.95)),
    )


@dataclass(frozen=True, eq=False)
class _Maps:
    """Linear maps of the heads of a layer from and to the residual stream, norms included up to a factor."""

    written: Float[Tensor, "n_heads d_model d_model"]
    """what is written (columns) for what is read by values (rows)"""
    read: Float[Tensor, "n_heads d_head d_model"]


@torch.enable_grad()
def _find_maps(model: Model, reads: Read) -> list[_Maps]:
    """Gradients in the frozen model on one token, whose attention is 1 to itself and whose rotation is none."""
    stack, n_layers = find_stack(model)
    layers = [_Layer(model, f"{stack}.{i}", find_mlp(model, stack, i)) for i in range(n_layers)]
    ids = torch.zeros(1, 1, dtype=torch.long)
    frozen = FrozenModel.make(model, ids, [name for one in layers for name in one.points])

    def watch(*seen: Any) -> None:
        for one in layers:
            one.watch(*seen)

    frozen.forward([tap for one in layers for tap in one.taps], watch=watch)
    return [one.find_maps(reads, int(model.cfg.n_heads), i) for i, one in enumerate(layers)]  # type: ignore[attr-defined]


class _Layer:
    """Hook functions that keep what a block reads, its heads' outputs and what it writes, its MLP held constant."""

    def __init__(self, model: Model, block: str, mlp: str | None) -> None:
        self.watch, self._kept = ScoreWatch(), dict[str, Tensor]()
        named = {"in": f"{block}.hook_in", "heads": f"{block}.attn.hook_z", "out": f"{block}.hook_out"}
        around = f"{block}.attn.hook_in", f"{block}.attn.hook_out"
        if missing := [name for name in (*named.values(), *around) if name not in hook_points_of(model).points]:
            raise ValueError(f"Each layer must have heads of attention to be compared, got no '{missing[0]}'.")
        self.taps: Sequence[tuple[str, Tap]] = [
            (named["in"], lambda x: self._keep("in", x.detach().requires_grad_())),
            (around[0], self.watch.begin),
            (named["heads"], lambda x: self._keep("heads", x.clone())),
            (around[1], self.watch.end),
            *([] if mlp is None else [(mlp, lambda x: x.detach())]),
            (named["out"], lambda x: self._keep("out", x.clone())),
        ]
        self.points = [name for name, _ in self.taps]

    def _keep(self, name: str, x: Tensor) -> Tensor:
        self._kept[name] = x
        return x.view_as(x)

    def find_maps(self, reads: Read, n_heads: int, layer: int) -> _Maps:
        """The maps, after a forward pass with the hook functions."""
        terms, x, z = self.watch.found, self._kept["in"], self._kept["heads"]
        values = _differentiate(z, x).reshape(n_heads, -1, x.numel())
        outputs = _differentiate(self._kept["out"], z).reshape(-1, n_heads, values.shape[1])
        written = torch.einsum("hed,ohe->hdo", values, outputs)
        if reads == "value":
            return _Maps(written, values)
        if terms is None:
            raise ValueError(
                "Scores must be products of queries and keys by `torch.matmul` or fused attention to say what these "
                f"read, got others in layer {layer}. Compare with reads='value'."
            )
        of = terms.queries if reads == "query" else terms.keys
        found = _differentiate(of, x).reshape(of.shape[1], -1, x.numel())
        return _Maps(written, found.repeat_interleave(n_heads // len(found), 0))


def _differentiate(output: Tensor, x: Tensor) -> Float[Tensor, "n_outputs n_inputs"]:
    rows = torch.eye(output.numel(), dtype=output.dtype, device=output.device).reshape(-1, *output.shape)
    (found,) = torch.autograd.grad(output, x, rows, retain_graph=True, is_grads_batched=True)
    return found.reshape(output.numel(), -1).double().cpu()


def _span(matrix: Float[Tensor, "n d_model"], rank: int) -> Float[Tensor, "rank d_model"]:
    """The directions of the rows with the largest singular values."""
    return torch.linalg.svd(matrix, full_matrices=False)[2][:rank]


def _compare(a: Float[Tensor, "n rank d"], b: Float[Tensor, "m rank d"]) -> Float[Tensor, "n m"]:
    return torch.einsum("nrd,msd->nmrs", a, b).square().sum((-1, -2)) / a.shape[1]


def _draw_null(width: int, rank: int, n: int, seed: int) -> Float[np.ndarray, "n"]:
    """Overlaps of random subspaces with a fixed one, which is any."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(width, rank, dtype=torch.double, generator=generator) for _ in range(n)]
    fixed = torch.eye(width, dtype=torch.double)[:rank]
    return np.array([float(_compare(torch.linalg.qr(one)[0].T[None], fixed[None])) for one in draws])
