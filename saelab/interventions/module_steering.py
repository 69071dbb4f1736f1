"""`steer_module`: a vector added, or features edited, at the output or input of any torch module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.interventions.concept_vectors import ConceptVector, as_rows
from saelab.interventions.directions import Direction
from saelab.interventions.interventions import Intervention, Strength, TokenSelection, TokenSelector, make_where
from saelab.lm.hooks import ForwardTokens
from saelab.lm.module_inputs import require_tensor
from saelab.lm.unwrapped import attach
from saelab.sae.adapters import ModulePort
from saelab.sae.sae import SAE

ModuleUnit = Literal["raw", "norm"]
"""Of strengths: multiples of the vector, or of the norm of the activation that it is added to"""
Steering: TypeAlias = Float[Tensor, "d"] | Float[Tensor, "n d"] | ConceptVector | Direction | Intervention
"""What `steer_module` takes: one vector, one for each position, or an edit of features."""
Move: TypeAlias = Callable[[Tensor], Tensor]


@contextmanager
def steer_module(
    module: nn.Module,
    vector: Steering,
    strength: Strength = 1.0,
    *,
    where: TokenSelection = "all",
    unit: ModuleUnit = "raw",
    side: ModulePort = "output",
    axis: int = -1,
) -> Iterator[nn.Module]:
    """A context in which a vector is added to the activations of a torch module in every forward pass.

        raw    x' = x + strength v
        norm   x' = x + strength |x| v / |v|

    The module may be a layer of a text encoder, of a vision model, of anything: pipelines that call it are steered
    too. A negative strength removes what the vector adds. Vectors by position go to the first positions, in their
    order. An `Intervention` edits features instead, in all of its modes (its strengths are in it). Contexts nest, a
    strength of 0 leaves every bit as it is, gradients flow, and no hook remains, also after an error.

    Args:
        module: module whose first output (or input) is steered, (batch, ..., d) or (batch, d).
        vector: one vector (d), or one a position (n, d); concept vector, direction, or intervention.
        strength: what it is multiplied with; a tensor may have gradients.
        where: support: "all", positions (negative ones count back from the end, padding included), a mask (n) or
            (batch, n), or a condition that a feature fires in what is steered.
        unit: "raw" or "norm".
        side: "output" or "input" of the module.
        axis: axis of the width d; 1 for feature maps of convolutions, whose places are positions row by row.

    Raises:
        ValueError: vectors that are not finite or of another width, unknown units and sides, "prompt" or "generated"
            as `where`, and an intervention with a strength or of a transcoder.
        TypeError: a module whose output is no tensor.

    >>> layer = torch.nn.Linear(4, 4)
    >>> x = torch.ones(1, 3, 4)
    >>> with sl.steer_module(layer, torch.tensor([1.0, 0, 0, 0]), -2.0, where=[0, -1]):
    ...     moved = layer(x)
    >>> (moved - layer(x))[0, :, 0].round().tolist()
    [-2.0, 0.0, -2.0]
    """
    if side not in get_args(ModulePort):
        raise ValueError(f"`side` must be one of {get_args(ModulePort)}, got {side!r}.")
    places = make_where(where)
    if isinstance(vector, Intervention):
        _check_intervention(vector, strength, unit)
        places = vector.places if isinstance(where, str) and where == "all" else places
        move, width, idle = _edit(vector), vector.rows.shape[1], vector.changes_nothing
    else:
        given = vector if isinstance(vector, Tensor) else vector.vector
        move, width, idle = _add(given, strength, unit), given.shape[-1], _is_zero(strength)
    if places.part != "all":
        raise ValueError(f"`where` of a module must be without parts of a text, got {places.part!r}; give positions.")

    def change(x: Any) -> Tensor | None:
        require_tensor(x)
        if idle:
            return None
        rows = as_rows(x, axis)
        if rows.shape[-1] != width:
            raise ValueError(
                f"A vector must have the width of what it is added to, {rows.shape[-1]} in a "
                f"{type(module).__name__}, got {width}; choose another module or `axis`."
            )
        new = torch.where(_select(places, rows)[..., None], move(rows), rows)
        return new.reshape(x.movedim(axis, -1).shape).movedim(-1, axis)

    with attach((module, "hook_in" if side == "input" else "hook_out"), change):
        yield module


def _is_zero(strength: Strength) -> bool:
    return not isinstance(strength, Tensor) and strength == 0


def _check_intervention(edit: Intervention, strength: Strength, unit: str) -> None:
    if isinstance(strength, Tensor) or strength != 1 or unit != "raw":
        raise ValueError(f"An intervention has strengths and a unit of its own, got {strength} and {unit!r}; set them.")
    if isinstance(edit.source, SAE) and edit.source.cfg.d_out is not None:
        raise ValueError("An intervention on a module must be of an SAE or a direction, got a transcoder.")


def _edit(intervention: Intervention) -> Move:
    def move(rows: Tensor) -> Tensor:
        flat = rows.flatten(0, 1)
        return intervention.change(flat, flat).to(rows).view_as(rows)

    return move


def _add(vector: Tensor, strength: Strength, unit: str) -> Move:
    if unit not in get_args(ModuleUnit):
        raise ValueError(f"`unit` must be one of {get_args(ModuleUnit)}, got {unit!r}.")
    if vector.ndim not in (1, 2) or not vector.detach().isfinite().all():
        raise ValueError(f"A vector must be finite and (d) or (n, d), got {tuple(vector.shape)}.")
    if not torch.as_tensor(strength).detach().isfinite().all() or torch.as_tensor(strength).ndim:
        raise ValueError(f"`strength` must be one finite number, got {strength}.")

    def move(rows: Tensor) -> Tensor:
        x, step = rows.float(), vector.to(rows.device, torch.float32)
        if unit == "norm":
            step = step / step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        if step.ndim == 2:
            n = x.shape[1]
            step = torch.nn.functional.pad(step[:n], (0, 0, 0, max(0, n - len(step))))
        change = strength * step
        return (x + (change * x.norm(dim=-1, keepdim=True) if unit == "norm" else change)).to(rows)

    return move


def _select(places: TokenSelector, rows: Float[Tensor, "batch n d"]) -> Bool[Tensor, "batch n"]:
    """The positions that are changed, as `where` chooses tokens: every position counts, none is special."""
    batch, n = rows.shape[:2]
    positions = torch.arange(n, device=rows.device).expand(batch, n)
    passing = ForwardTokens(positions, positions, 0, n, torch.full((batch,), n, device=rows.device))
    keep = places.select(passing, torch.zeros(0, dtype=torch.long))
    return keep if places.when is None else keep & places.when.holds(rows).to(keep.device)
