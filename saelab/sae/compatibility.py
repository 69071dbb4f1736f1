"""Check that a model, its weight processing and the hook point match the SAE's training data."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from saelab.lm.hook_points import hook_points_of, stamp
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, is_same_shape, is_same_weights
from saelab.lm.models import describe_model, is_same_model
from saelab.sae.sae import SAE
from saelab.sae.source_views import check_sources_of
from saelab.stores.activations import Activations
from saelab.stores.manifest import Provenance

_seen_finite: WeakKeyDictionary[SAE, list[tuple[int, int]]] = WeakKeyDictionary()
LAYOUT = ("transformers", "transformer-lens")
"""packages whose releases may store the same weights in differently shaped parameters"""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where an SAE is used: hook points of a model, and the token mask that applies there."""

    hook_point: str
    """hook point that the SAE reads"""
    mask: TokenMask
    """tokens that count"""
    hook_point_out: str | None = None
    """hook point of a transcoder's target, where known"""
    median_norms: dict[str, float] = field(default_factory=dict)
    """median activation norm by hook point, which the mask's norm rule is relative to; only where training has measured
    it
    """

    @property
    def hook_points(self) -> tuple[str, ...]:
        """All hook points: input, and a transcoder's target."""
        return (self.hook_point,) if self.hook_point_out is None else (self.hook_point, self.hook_point_out)


def require_one_source(sae: SAE) -> None:
    """Raise ValueError for a crosscoder, whose sources are used on a model one at a time."""
    if sae.cfg.sources is not None:
        raise ValueError(
            f"An SAE must read one hook point to be used on a model, got a crosscoder of "
            f"{[source.name for source in sae.cfg.sources]}; take one of them: sae.source(name), and of its store "
            "store.at_source(name)."
        )


def match_model(
    sae: SAE,
    model: Model,
    hook_point: str | tuple[str, str] | None,
    mask: TokenMask | None,
    allow_mismatch: bool,
) -> Match:
    """Hook points and token mask for using an SAE on a model: those given, else those of the SAE's provenance.

    Args:
        sae: the SAE; its provenance holds model, weight processing, hook point and mask of its training.
        model: model on which it is about to be used.
        hook_point: hook point, or a transcoder's (input, target); None is that of the provenance.
        mask: tokens that count; None is the mask of the provenance, or the default mask.
        allow_mismatch: accept a model, weight processing or hook point that differs from the provenance.

    Raises:
        ValueError: where one of them differs, where no hook point is known, or the model has none of that name.
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
    """Names of the hook points at which an SAE is used, given or from its provenance; a transcoder's target comes
    second.

    Every function that takes an SAE and a model calls this check.

    Args:
        sae: the SAE; its provenance holds model, weight processing and hook point of its training.
        model: model on which it is about to be used.
        hook_point: hook point, if not that of the provenance; of a transcoder the input's, or (input, target).
        allow_mismatch: accept a model, weight processing or hook point that differs from the provenance.

    Raises:
        ValueError: where one of them differs, where no hook point is known, or the model has none of that name.
    """
    require_finite(sae)
    require_one_source(sae)
    names = _choose_places(sae, hook_point)
    for name in names:
        hook_points_of(model).find(name)
    if sae.provenance and not allow_mismatch:
        _refuse(find_mismatches(sae.provenance, model, *names))
    return names


def match_weights(origin: Provenance | None, model: Model, allow_mismatch: bool = False) -> None:
    """Raise ValueError where the provenance of an SAE or a store is of another model or weight processing; checks no
    hook point.
    """
    if origin and not allow_mismatch:
        _refuse(_differ(_model_of(origin, _origin_of(model, origin))))


def _choose_places(sae: SAE, given: str | tuple[str, str] | None) -> tuple[str, ...]:
    """Names of the hook points, given or from the provenance, the input's first."""
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
    """Raise ValueError where activations come from another model, weight processing or hook point than the SAE's
    training data, or of other sources.
    """
    check_sources_of(sae, acts)
    trained, here = sae.provenance, acts.provenance
    if trained and here and trained.sources and here.sources and not allow_mismatch:
        for name in trained.sources:
            one, other = trained.at_source(name), here.at_source(name)
            _refuse(_differ([*_model_of(one, other), (f"hook point of '{name}'", one.hook_point, other.hook_point)]))
    elif trained and here and not allow_mismatch:
        hook_points = [("hook point", trained.hook_point, here.hook_point)]
        hook_points.append(("pooling", trained.pooling or "none", here.pooling or "none"))
        _refuse(_differ([*_model_of(trained, here), *hook_points]))


def find_mismatches(origin: Provenance, model: Model, hook_point: str, hook_point_out: str | None = None) -> list[str]:
    """Descriptions of the differences between an SAE's provenance and where it is about to be used; empty if none.

    Models are compared by their weights where both are known, else by name: see `is_same_model`.

    Args:
        origin: provenance of the SAE.
        model: model on which it is about to be used.
        hook_point: hook point there; two names of the same place are equal.
        hook_point_out: hook point of a transcoder's target; None is not compared.
    """
    known = hook_points_of(model).points
    pairs = _model_of(origin, _origin_of(model, origin))
    places = [("hook point", origin.hook_point, hook_point)]
    if origin.hook_point_out is not None and hook_point_out is not None:
        places.append(("target", origin.hook_point_out, hook_point_out))
    pairs += [place for place in places if place[1] not in known or known[place[1]] != known[place[2]]]
    return _differ(pairs)


def _origin_of(model: Model, like: Provenance) -> Provenance:
    """Provenance that activations of this model would have; a weight fingerprint is computed only where the other has
    one.
    """
    here = describe_model(model)
    sketch = hook_points_of(model).sketch if like.model_sketch is not None else None
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
    """Whether two provenances are of the same weights; None where unknown: a fingerprint is missing, or package
    releases that store weights in different shapes were used.
    """
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
    """Token mask that the activations of a provenance were collected with."""
    rules: dict[str, Any] = dict(origin.mask)
    if "positions" in rules:
        rules["positions"] = tuple(rules["positions"])  # a list after JSON
    return TokenMask(**rules)


def require_finite(sae: SAE) -> None:
    """Raise ValueError for an SAE with NaN or infinite weights; unchanged weights are checked only once."""
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
    """Raise ValueError for an SAE whose inference threshold has not been set by training, as its codes would depend on
    the batch.
    """
    if sae.cfg.activation.threshold == "running" and (sae.threshold is None or bool(sae.threshold.isnan())):
        raise ValueError(
            f"{type(sae.cfg.activation).__name__} must have its inference threshold to be used, got none; "
            "train the SAE first."
        )
