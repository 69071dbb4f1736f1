"""Sources of steering (features, directions, interventions, functions) and their strengths, as context managers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from saelab.lm.models import Model
from saelab.sae.sae import SAE
from saelab.steering.directions import Direction
from saelab.steering.interventions import Intervention, Mode, Unit
from saelab.steering.moving import steer_all
from saelab.steering.places import Place, Where
from saelab.stores.features import FeatureStore

Block: TypeAlias = Callable[[float], AbstractContextManager]
Source: TypeAlias = (
    tuple[SAE, Mapping[int, float | int] | int] | Direction | Intervention | Sequence[Intervention] | Block
)
"""An SAE with one feature or weights of several, a direction, interventions whose strengths are weights, or a function
from a strength to a context manager
"""

GRIDS: dict[str, tuple[float, ...]] = {
    "max": (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0),
    "norm": (-1.6, -0.8, -0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8, 1.6),
}


@dataclass(frozen=True, eq=False)
class Dose:
    """One source of steering at one strength."""

    source: str
    strength: float
    block: Callable[[], AbstractContextManager]
    """returns the context manager inside which the model is steered"""
    told: str
    """description of what is steered, and how"""
    neutral: float
    """the strength that leaves the model unsteered"""


def make_doses(
    model: Model,
    sources: Mapping[str, Source],
    strengths: Sequence[float | int] | Mapping[str, Sequence[float | int]] | None,
    unit: Unit,
    mode: Mode,
    where: Place,
    store: FeatureStore | Mapping[str, FeatureStore] | None,
    allow_mismatch: bool = False,
) -> list[Dose]:
    """Every source at every strength, each as a context manager in which the model is steered.

    Args:
        model: language model; sources must match it.
        sources: what to steer, by name; no name may be 'unsteered'.
        strengths: for all sources, or by source; None for the grid of the unit in `GRIDS` (units "max" and "norm" of
            mode "add", "clamp" or "at-least").
        unit: of the strengths of SAE features and directions, as in `Intervention`; interventions bring their own.
        mode: the same for their mode; not "ablate", which has no strengths.
        where: tokens that SAE features and directions are steered at.
        store: codes for unit "max", for all sources or by source.
        allow_mismatch: steer SAEs of another model, weight processing or hook point.

    Raises:
        ValueError: for no sources, mode "ablate", missing strengths, and sources that do not match the model.
    """
    if not sources or "unsteered" in sources:
        raise ValueError("`sources` must name at least one, none of them 'unsteered', which is the model as it is.")
    if mode == "ablate":
        raise ValueError("A curve needs strengths, mode 'ablate' has none; use 'scale' with strengths from 0 to 1.")
    found = []
    for name, source in sources.items():
        own = store.get(name) if isinstance(store, Mapping) else store
        interventions = _read_source(source, unit, mode, where, own, allow_mismatch)
        for intervention in interventions:
            intervention.require_match(model)
        for strength in _strengths_of(name, strengths, unit, mode, interventions):
            found.append(_make_dose(model, name, source, interventions, strength))
    return found


def _read_source(
    source: Source, unit: Unit, mode: Mode, where: Place, store: FeatureStore | None, allow_mismatch: bool
) -> list[Intervention]:
    """Interventions of strength 1; none for a function, which makes its own context manager."""
    if isinstance(source, Direction):
        return [Intervention(source, 1.0, mode, where, unit)]
    if isinstance(source, Intervention):
        return [source]
    if callable(source):
        return []
    first, *rest = source
    if isinstance(first, SAE):
        weights: Any = rest[0] if isinstance(rest[0], Mapping) else {rest[0]: 1.0}
        return [Intervention(first, weights, mode, where, unit, store, allow_mismatch=allow_mismatch)]
    return [one for one in source if isinstance(one, Intervention)]


def _strengths_of(
    name: str, strengths: Any, unit: str, mode: str, interventions: Sequence[Intervention]
) -> list[float]:
    given = strengths.get(name) if isinstance(strengths, Mapping) else strengths
    if given is None:
        given = GRIDS.get(interventions[0].unit if interventions else unit) if mode != "scale" else None
    if not given:
        raise ValueError(f"`strengths` must be given for '{name}': only units {list(GRIDS)} of adding have defaults.")
    return [float(s) for s in dict.fromkeys(given)]


def _make_dose(model: Model, name: str, source: Source, interventions: Sequence[Intervention], strength: float) -> Dose:
    if not interventions:
        assert callable(source)
        return Dose(name, strength, partial(source, strength), getattr(source, "__name__", "a block"), 0.0)
    scaled = [scale_intervention(one, strength) for one in interventions]
    told = "; ".join(map(describe_intervention, interventions))
    neutral = 1.0 if interventions[0].mode == "scale" else 0.0
    return Dose(name, strength, partial(steer_all, model, scaled), told, neutral)


def scale_intervention(one: Intervention, factor: float) -> Intervention:
    """A copy of an intervention with every strength multiplied by a factor."""
    return replace(one, features={i: factor * float(s) for i, s in _weights_of(one.features).items()})


def _weights_of(features: Any) -> dict[int, float]:
    if isinstance(features, Mapping):
        return dict(features)
    return {0: float(features)} if not isinstance(features, Iterable) else {int(i): 1.0 for i in features}


def describe_intervention(one: Intervention) -> str:
    """An intervention in one line of text.

    >>> describe_intervention(Intervention(Direction(torch.ones(4), "blocks.0.hook_out", "glad"), 2.0))
    'glad +2 (add, raw) at blocks.0.hook_out, all tokens'
    """
    unit = "" if one.mode in ("scale", "ablate") else f", {one.unit}"
    what = ", ".join(_tell_feature(one, i, float(s)) for i, s in _weights_of(one.features).items())
    error = ", error dropped" if one.error == "drop" else ""
    return f"{what or 'reconstruction'} ({one.mode}{unit}{error}) at {one.writes_at}, {_tell_place(one.places)}"


def _tell_feature(one: Intervention, i: int, strength: float) -> str:
    name = one.source.name if isinstance(one.source, Direction) else f"feature {i}"
    amount = {"ablate": "", "scale": f" x {strength:g}", "clamp": f" = {strength:+g}"}
    return name + amount.get(one.mode, f" {strength:+g}")


def _tell_place(where: Where) -> str:
    rules = {
        str(where.part): where.part != "all",
        "chosen positions": where.positions is not None,
        "a mask": where.tokens is not None,
        "where a condition holds": where.when is not None,
    }
    return " and ".join(rule for rule, holds in rules.items() if holds) or "all tokens"
