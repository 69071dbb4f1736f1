"""Is this the model, and the place in it, that the SAE was trained on?"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from saelab.lm.door import door, stamp
from saelab.lm.masks import TokenMask
from saelab.lm.models import Model, describe_model, is_same_model
from saelab.lm.sketch import is_same_shape, is_same_weights
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.provenance import Provenance

_seen_finite: WeakKeyDictionary[SAE, list[tuple[int, int]]] = WeakKeyDictionary()
LAYOUT = ("transformers", "transformer-lens")
"""packages whose releases may lay the same weights out in other parameters"""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where an SAE is used: a hook point of a model, and the tokens that count there."""

    hook_point: str
    mask: TokenMask
    hook_point_out: str | None = None
    """whose activations are reconstructed, where a transcoder's is known"""
    median_norms: dict[str, float] = field(default_factory=dict)
    """what the mask's norm rule is relative to, by hook point, where training has measured it"""

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The one, or both."""
        return (self.hook_point,) if self.hook_point_out is None else (self.hook_point, self.hook_point_out)


def match_model(
    sae: SAE,
    model: Model,
    hook_point: str | tuple[str, str] | None,
    mask: TokenMask | None,
    allow_mismatch: bool,
) -> Match:
    """Hook point and mask given, or those of the SAE's provenance; ValueError where it disagrees with the model.

    A transcoder has two hook points: that of its input and, behind it, that of its target.
    """
    origin = sae.provenance
    names = match_places(sae, model, hook_point, allow_mismatch)
    recorded = mask_of(origin) if origin else TokenMask()
    medians: dict[str, float] = {}
    if origin and mask in (None, recorded) and not allow_mismatch:
        measured = zip(names, (origin.median_norm, origin.median_norm_out), strict=False)
        medians = {name: norm for name, norm in measured if norm is not None}
    return Match(hook_point=names[0], hook_point_out=(*names, None)[1], mask=mask or recorded, median_norms=medians)


def match_places(
    sae: SAE, model: Model, hook_point: str | tuple[str, str] | None = None, allow_mismatch: bool = False
) -> tuple[str, ...]:
    """The hook points at which an SAE is used, given or from its provenance; a transcoder's target comes second.

    Every function that takes an SAE and a model asks here.

    Args:
        sae: Whose provenance says the model, its weight processing and the hook point.
        model: On which it is about to be used.
        hook_point: Where, if not where it was trained; of a transcoder the input's, or input's and target's.
        allow_mismatch: Go ahead where model, weight processing or hook point differ from the provenance's.

    Raises:
        ValueError: Where one of them differs, where nobody says the hook point, or the model has none of that name.
    """
    require_finite(sae)
    names = _choose_places(sae, hook_point)
    for name in names:
        door(model).find(name)
    if sae.provenance and not allow_mismatch:
        _refuse(find_mismatches(sae.provenance, model, *names))
    return names


def match_weights(origin: Provenance | None, model: Model, allow_mismatch: bool = False) -> None:
    """ValueError where an SAE, or a store, is of another model or weight processing: the check without a hook point."""
    if origin and not allow_mismatch:
        _refuse(_differ(_model_of(origin, _origin_of(model, origin))))


def _choose_places(sae: SAE, given: str | tuple[str, str] | None) -> tuple[str, ...]:
    """The hook points that are known, the input's first."""
    origin = sae.provenance
    if isinstance(given, tuple) and sae.cfg.d_out is None:
        raise ValueError(f"`hook_point` must be one for an autoencoder, got {given}; name where it was trained.")
    known = (origin.hook_point, origin.hook_point_out) if origin else (None, None)
    wanted = given if isinstance(given, tuple) else (given or known[0], known[1])
    if wanted[0] is None:
        raise ValueError(
            "`hook_point` must be given for an SAE without provenance, got none; name where it was trained."
        )
    return tuple(name for name in wanted if name is not None)


def match_activations(sae: SAE, acts: Activations, allow_mismatch: bool) -> None:
    """ValueError where activations come from another model, weight processing or hook point than the SAE's."""
    trained, here = sae.provenance, acts.provenance
    if trained and here and not allow_mismatch:
        hook_points = [("hook point", trained.hook_point, here.hook_point)]
        _refuse(_differ([*_model_of(trained, here), *hook_points]))


def find_mismatches(origin: Provenance, model: Model, hook_point: str, hook_point_out: str | None = None) -> list[str]:
    """What differs between an SAE's origin and where it is about to be used, in words.

    Models are compared by their weights where both are known, else by name: see `is_same_model`.
    """
    known = door(model).points
    pairs = _model_of(origin, _origin_of(model, origin))
    places = [("hook point", origin.hook_point, hook_point)]
    if origin.hook_point_out is not None and hook_point_out is not None:
        places.append(("target", origin.hook_point_out, hook_point_out))
    pairs += [place for place in places if place[1] not in known or known[place[1]] is not known[place[2]]]
    return _differ(pairs)


def _origin_of(model: Model, like: Provenance) -> Provenance:
    """The provenance that activations of this model would have; weights are looked at where the other's are known."""
    here = describe_model(model)
    sketch = door(model).sketch if like.model_sketch is not None else None
    return replace(
        like,
        model=here.name,
        weight_processing=here.weight_processing,
        versions=dict(here.versions),
        model_sketch=sketch,
    )


def _model_of(origin: Provenance, here: Provenance) -> list[tuple[str, str, str]]:
    pairs = [("weight processing", origin.weight_processing, here.weight_processing)]
    same_name = is_same_model(origin.model, here.model)
    same_weights = _have_same_weights(origin, here)
    if same_weights or (same_weights is None and same_name):
        return pairs
    if same_name:
        return [("model of that name", origin.model, f"{here.model} with other weights"), *pairs]
    return [("model", Path(origin.model).name, Path(here.model).name), *pairs]


def _have_same_weights(origin: Provenance, here: Provenance) -> bool | None:
    """None where that cannot be told: a sketch is missing, or releases that lay weights out otherwise were used."""
    one, other = origin.model_sketch, here.model_sketch
    if one is None or other is None or origin.weight_processing != here.weight_processing:
        return None
    releases = [tuple(about.versions.get(name) for name in LAYOUT) for about in (origin, here)]
    if not is_same_shape(one, other) and releases[0] != releases[1]:
        return None
    return is_same_weights(one, other)


def _differ(pairs: list[tuple[str, str, str]]) -> list[str]:
    return [f"{what} (trained: {there!r}, now: {now!r})" for what, there, now in pairs if there != now]


def _refuse(differing: list[str]) -> None:
    if differing:
        raise ValueError(
            f"An SAE must be used where it was trained, got another {'; '.join(differing)}. "
            "Load that model the same way (`load_model` has `weight_processing`), or pass allow_mismatch=True."
        )


def mask_of(origin: Provenance) -> TokenMask:
    """The token mask that activations were collected with."""
    rules: dict[str, Any] = dict(origin.mask)
    if "positions" in rules:
        rules["positions"] = tuple(rules["positions"])  # JSON made it a list
    return TokenMask(**rules)


def require_finite(sae: SAE) -> None:
    """ValueError for an SAE with NaN or infinite weights; they are looked at once, and again where they changed."""
    weights = dict(sae.named_parameters())
    stamps = [stamp(weight) for weight in weights.values()]
    if _seen_finite.get(sae) == stamps:
        return
    if wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"An SAE's weights must be finite, got NaN or infinite ones in {', '.join(wrong)}. Take an earlier "
            "checkpoint, or train again with a lower learning rate."
        )
    _seen_finite[sae] = stamps


def require_threshold(sae: SAE) -> None:
    """ValueError for an SAE whose codes would depend on the batch, because training has set no threshold yet."""
    if sae.cfg.activation.threshold == "running" and (sae.threshold is None or bool(sae.threshold.isnan())):
        raise ValueError(
            f"{type(sae.cfg.activation).__name__} must have its inference threshold to be used, got none; "
            "train the SAE first."
        )
