"""Is this the model, and the place in it, that the SAE was trained on?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.lm.door import door
from saelab.lm.masks import TokenMask
from saelab.lm.models import Model, describe_model
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where an SAE is used: a hook point of a model, and the tokens that count there."""

    hook_point: str
    mask: TokenMask
    median_norm: float | None = None
    """what the mask's norm rule is relative to, where training has measured it"""


def match_model(sae: SAE, model: Model, hook_point: str | None, mask: TokenMask | None, allow_mismatch: bool) -> Match:
    """The hook point and mask given, or those of the SAE's provenance; ValueError where it disagrees with the model."""
    origin = sae.provenance
    name = hook_point or (origin.hook_point if origin else None)
    if name is None:
        raise ValueError(
            "`hook_point` must be given for an SAE without provenance, got none; name where it was trained."
        )
    door(model).find(name)
    if origin and not allow_mismatch:
        _refuse(find_mismatches(origin, model, name))
    recorded = mask_of(origin) if origin else TokenMask()
    median = origin.median_norm if origin and mask in (None, recorded) and not allow_mismatch else None
    return Match(hook_point=name, mask=mask or recorded, median_norm=median)


def match_activations(sae: SAE, acts: Activations, allow_mismatch: bool) -> None:
    """ValueError where activations come from another model, weight processing or hook point than the SAE's."""
    trained, here = sae.provenance, acts.provenance
    if trained and here and not allow_mismatch:
        hook_points = [("hook point", trained.hook_point, here.hook_point)]
        _refuse(_differ([*_model_of(trained, here.model, here.weight_processing), *hook_points]))


def find_mismatches(origin: Provenance, model: Model, hook_point: str) -> list[str]:
    """What differs between an SAE's origin and where it is about to be used, in words.

    Of the model's name only the last part counts: one model has several folders and, on the Hub, owners.
    """
    here, known = describe_model(model), door(model).points
    pairs = _model_of(origin, here.name, here.weight_processing)
    if origin.hook_point not in known or known[origin.hook_point] is not known[hook_point]:
        pairs.append(("hook point", origin.hook_point, hook_point))
    return _differ(pairs)


def _model_of(origin: Provenance, name: str, weight_processing: str) -> list[tuple[str, str, str]]:
    return [
        ("model", Path(origin.model).name, Path(name).name),
        ("weight processing", origin.weight_processing, weight_processing),
    ]


def _differ(pairs: list[tuple[str, str, str]]) -> list[str]:
    return [f"{what} (trained: {there!r}, now: {now!r})" for what, there, now in pairs if there != now]


def _refuse(differing: list[str]) -> None:
    if differing:
        raise ValueError(
            f"An SAE must be used where it was trained, got another {'; '.join(differing)}. "
            "Load that model the same way, or pass allow_mismatch=True."
        )


def mask_of(origin: Provenance) -> TokenMask:
    """The token mask that activations were collected with."""
    rules: dict[str, Any] = dict(origin.mask)
    if "positions" in rules:
        rules["positions"] = tuple(rules["positions"])  # JSON made it a list
    return TokenMask(**rules)


def require_threshold(sae: SAE) -> None:
    """ValueError for an SAE whose codes would depend on the batch, because training has set no threshold yet."""
    if sae.cfg.activation.threshold == "running" and (sae.threshold is None or bool(sae.threshold.isnan())):
        raise ValueError(
            f"{type(sae.cfg.activation).__name__} must have its inference threshold to be used, got none; "
            "train the SAE first."
        )
