"""`Intervention`: an edit of activations through the codes of SAE features or of a direction.

`TokenSelector` and `ActivationCondition` select the tokens that it changes, by part of the text, position, mask or
condition.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.collecting.harvesting import require_harvested
from saelab.functional.indices import FeatureIds, read_feature
from saelab.interventions.directions import Direction
from saelab.lm.hooks import ForwardTokens, find_hook_point
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.compatibility import match_places
from saelab.sae.normalizer import PER_TOKEN
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore

TextPart = Literal["all", "prompt", "generated"]
CodeSign = Literal["both", "positive", "negative"]
Mode = Literal["add", "clamp", "floor", "scale", "ablate"]
Unit = Literal["raw", "max", "norm"]
Error = Literal["keep", "drop"]
Strength: TypeAlias = float | int | Float[Tensor, ""]
FeatureStrengths: TypeAlias = Mapping[SupportsIndex, Strength] | FeatureIds | Strength


@dataclass(frozen=True, eq=False)
class ActivationCondition:
    """A condition on tokens: that a feature fires, `|z| > above`, with one sign or with either.

    Codes are read at the condition's own hook point, which must not come after the steered one in the forward pass.
    Changes by enclosing contexts are included, those of its own are not.
    """

    source: SAE | Direction
    """SAE or direction whose code is read"""
    feature: int = 0
    """index of the feature; 0 for a direction"""
    above: float = 0.0
    """threshold on the code"""
    side: CodeSign = "both"
    """sign of the codes that count: "both", "positive" or "negative"."""
    hook_point: str | None = None
    """where codes are read; by default where the SAE was trained"""
    allow_mismatch: bool = False
    """read codes on a model, weight processing or hook point other than those that the SAE was trained on"""

    def __post_init__(self) -> None:
        if self.side not in get_args(CodeSign):
            raise ValueError(f"`side` must be one of {get_args(CodeSign)}, got {self.side!r}.")
        n = self.source.cfg.d_sae if isinstance(self.source, SAE) else 1
        object.__setattr__(self, "feature", read_feature(self.feature, d_sae=n))

    def holds(self, x: Float[Tensor, "*batch d_in"]) -> Bool[Tensor, "*batch"]:
        """Mask of the activations on which the feature fires."""
        z = self.source.encode_latents(x, [self.feature])[..., 0]
        return (z.abs() if self.side == "both" else z if self.side == "positive" else -z) > self.above


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSelector:
    """A selection of tokens by several rules, all of which must hold; padding is never changed."""

    part: TextPart = "all"
    """"prompt", "generated" or "all" tokens; the first generated token is chosen from the last prompt token, before any
    generated token is processed, so with "generated" it is not affected"""
    positions: slice | Sequence[int] | None = None
    """positions in a row's own tokens from 0 (BOS included, padding not); negative ones count back from the end of the
    prompt"""
    tokens: Bool[Tensor, "batch ctx_len"] | Bool[Tensor, "ctx_len"] | None = None
    """mask of the prompt's columns, True for tokens to change, special ones included; no token after them is changed"""
    when: ActivationCondition | None = None
    """a condition on the codes of a feature"""
    special: bool = False
    """change BOS and other special tokens, too; their large norms serve attention as a sink"""

    def __post_init__(self) -> None:
        if self.part not in get_args(TextPart):
            raise ValueError(
                f"`where` must be one of {get_args(TextPart)}, or a `TokenSelector(...)`, got '{self.part}'."
            )
        if self.positions is not None and not isinstance(self.positions, slice):
            if not isinstance(self.positions, Iterable):
                raise TypeError(f"`positions` must be a list or a slice, got {self.positions!r}; of one give a list.")
            # booleans would be taken for positions 0 and 1
            object.__setattr__(self, "positions", [read_feature(one, "positions") for one in self.positions])
        if self.tokens is not None and (not isinstance(self.tokens, Tensor) or self.tokens.dtype != torch.bool):
            got = self.tokens.dtype if isinstance(self.tokens, Tensor) else type(self.tokens).__name__
            raise TypeError(f"`tokens` must be a mask, a boolean tensor, got {got}; give positions as a list.")

    def select(self, passing: ForwardTokens, special_ids: Tensor) -> Bool[Tensor, "batch n"]:
        """Mask of the tokens of a forward pass by these rules, without the condition `when`."""
        keep = passing.positions >= 0
        if self.part != "all":
            keep = keep & ((passing.columns < passing.n_prompt) == (self.part == "prompt"))
        if self.positions is not None:
            keep = keep & _stand_at(self.positions, passing)
        if self.tokens is not None:
            return keep & _cut(self.tokens.to(keep.device), passing.columns, len(keep))
        if self.special or not len(special_ids):
            return keep
        return keep & (passing.ids[..., None] != special_ids.to(passing.ids.device)).all(-1)


TokenSelection: TypeAlias = TextPart | slice | Sequence[int] | Bool[Tensor, "..."] | ActivationCondition | TokenSelector
"""What `where` accepts: part of the text, positions, a mask of the prompt's tokens, a condition, or a `TokenSelector`
"""


def make_where(place: TokenSelection) -> TokenSelector:
    """The `TokenSelector` for any form that `where` accepts: a part of the text, positions, a mask or a condition.

    TypeError for positions that are no integers, such as a list of booleans, and masks that are not boolean.

    >>> make_where("prompt").part, make_where([0, 3]).positions, make_where(slice(1, None)).positions
    ('prompt', [0, 3], slice(1, None, None))
    """
    if isinstance(place, TokenSelector):
        return place
    if isinstance(place, ActivationCondition):
        return TokenSelector(when=place)
    if isinstance(place, str):
        return TokenSelector(part=place)
    if isinstance(place, np.ndarray) and place.dtype == bool:
        return TokenSelector(tokens=torch.from_numpy(place))
    return TokenSelector(tokens=place) if isinstance(place, Tensor) else TokenSelector(positions=place)


def _stand_at(wanted: slice | Sequence[int], passing: ForwardTokens) -> Bool[Tensor, "batch n"]:
    lengths, positions = passing.lengths[:, None], passing.positions
    if not isinstance(wanted, slice):
        places = torch.tensor([list(wanted)], device=positions.device)
        return (positions[..., None] == torch.where(places < 0, places + lengths, places)[:, None]).any(-1)
    step = 1 if wanted.step is None else wanted.step
    if step < 1:
        raise ValueError(f"A slice of positions must go forwards, got step {step}.")
    start = _resolve(wanted.start or 0, lengths)
    keep = (positions >= start) & ((positions - start) % step == 0)
    return keep if wanted.stop is None else keep & (positions < _resolve(wanted.stop, lengths))


def _resolve(place: int, lengths: Tensor) -> Tensor:
    return (lengths + place).clamp_min(0) if place < 0 else torch.full_like(lengths, place)


def _cut(tokens: Tensor, columns: Tensor, n_rows: int) -> Bool[Tensor, "batch n"]:
    """The columns of a mask, False after its end."""
    mask = tokens.expand(n_rows, -1) if tokens.ndim == 1 else tokens
    if len(mask) != n_rows:
        raise ValueError(f"A token mask must have a row for each of the {n_rows} texts, got {len(mask)}.")
    inside = columns < mask.shape[1]
    return mask[:, columns.clamp_max(mask.shape[1] - 1)] & inside


@dataclass(frozen=True, eq=False)
class Intervention:
    """An edit of the codes of some features of an SAE, or of a direction, at one hook point.

        x' = x + sum_i (z'_i - z_i) d_i          z = encode(x), d_i the feature's row in the activations' own units

    The reconstruction error stays as it is (`error="drop"` leaves x' = decode(z')). Codes become, by `mode`:

        add        z_i + s_i
        clamp      s_i
        floor      max(z_i, s_i) where s_i > 0, min(z_i, s_i) where s_i < 0
        scale      s_i z_i
        ablate     0

    All features of an intervention are read before any is changed. Signed features take strengths of both signs.

    Raises:
        ValueError: for features, units, modes and hook points that do not exist.
    """

    source: SAE | Direction
    """SAE or direction whose codes are edited"""
    features: FeatureStrengths = ()
    """strengths s_i by feature; for mode "ablate" a list of features; for a direction its strength"""
    mode: Mode = "add"
    """how codes change, see above"""
    where: TokenSelection = "all"
    """tokens that are changed, see `TokenSelector`"""
    unit: Unit = "raw"
    """of strengths: "raw" codes, "max" multiples of the largest |z_i| in `store` (or of a direction's peak), "norm"
    multiples of the norm of the token's own activation; factors of "scale" have no unit"""
    store: FeatureStore | None = None
    """codes of the SAE on some text, for unit "max"."""
    error: Error = "keep"
    """"keep" the reconstruction error, or "drop" it"""
    hook_point: str | None = None
    """where codes are read; by default where the SAE was trained"""
    allow_mismatch: bool = False
    """edit a model, weight processing or hook point other than those that the SAE was trained on"""
    strengths: dict[int, Strength] = field(init=False, repr=False)
    """by feature, in codes (unit "norm": in norms of the token's activation)"""
    places: TokenSelector = field(init=False, repr=False)
    """`where` as a `TokenSelector`"""
    rows: Float[Tensor, "n_features d_out"] = field(init=False, repr=False)
    """change of the activation for a code of 1 of each feature, from the weights as they are now"""
    _shift: Float[Tensor, "d_out"] | None = field(init=False, repr=False)
    """the change of every token, where it is the same for all"""

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("unit", Unit), ("error", Error)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"`{name}` must be one of {get_args(choices)}, got '{getattr(self, name)}'.")
        object.__setattr__(self, "places", make_where(self.where))
        strengths = _read_features(self.features, self.source, self.mode)
        if self.unit == "max" and self.mode not in ("scale", "ablate"):
            if self.store is not None and isinstance(self.source, SAE):
                require_harvested(self.store, self.source)
            strengths = {i: s * self._peak(i) for i, s in strengths.items()}
        object.__setattr__(self, "strengths", strengths)
        object.__setattr__(self, "rows", _find_rows(self.source, list(strengths)))
        object.__setattr__(self, "_shift", self._find_shift())
        if isinstance(self.source, Direction) and self.error == "drop":
            raise ValueError("`error` of a direction must be 'keep': it reconstructs nothing. Give an SAE to drop it.")
        if self.hook_point is None and hook_point_of(self.source) is None:
            raise ValueError("`hook_point` must be given for an SAE that does not say where it was trained, got None.")

    def _find_shift(self) -> Float[Tensor, "d_out"] | None:
        by_token = isinstance(self.source, SAE) and self.source.cfg.normalizer in PER_TOKEN
        if self.mode != "add" or self.unit == "norm" or by_token or not self._fixed:
            return None
        return self._goal(self.rows) @ self.rows

    @property
    def _fixed(self) -> bool:
        """Whether strengths are plain numbers, without gradients."""
        return not any(isinstance(s, Tensor) for s in self.strengths.values())

    def _goal(self, rows: Tensor) -> Float[Tensor, "n_features"]:
        """Strengths by feature."""
        if self._fixed:
            return torch.tensor([float(s) for s in self.strengths.values()], dtype=rows.dtype, device=rows.device)
        return torch.stack([torch.as_tensor(s, dtype=rows.dtype, device=rows.device) for s in self.strengths.values()])

    def _peak(self, feature: int) -> float:
        """The value that strengths of unit "max" are multiples of."""
        if isinstance(self.source, Direction):
            peak, of = self.source.peak or 0.0, "a direction with a `peak`"
        elif self.store is None:
            raise ValueError("Strengths of unit 'max' need `store`, the features' maxima, got None; harvest one.")
        else:
            peak, of = float(self.store.statistics.peaks[feature].max()), f"a feature that fires in {self.store!r}"
        if peak <= 0:
            raise ValueError(f"Strengths of unit 'max' need {of}, feature {feature} has none; use another unit.")
        return peak

    def require_match(self, model: AnyModel) -> None:
        """Raise ValueError unless the SAE, and that of a condition, were trained on this model at this hook point."""
        model = as_model(model)
        when = self.places.when
        match_source(self.source, model, self.hook_point, self.allow_mismatch)
        if when is not None:
            match_source(when.source, model, when.hook_point, when.allow_mismatch)

    @property
    def reads_at(self) -> str:
        """The hook point that codes are read from."""
        found = hook_point_of(self.source)
        return self.hook_point or found or ""

    @property
    def writes_at(self) -> str:
        """The hook point that is changed: for a transcoder that of its output."""
        provenance = None if isinstance(self.source, Direction) else self.source.provenance
        return (provenance and provenance.hook_point_out) or self.reads_at

    @property
    def changes_nothing(self) -> bool:
        """Whether all strengths leave the activations as they are, bit for bit."""
        if self.error == "drop" or self.mode in ("ablate", "clamp"):
            return self.error == "keep" and not self.strengths
        neutral = 1.0 if self.mode == "scale" else 0.0
        return all(not isinstance(s, Tensor) and s == neutral for s in self.strengths.values())

    def change(self, written: Float[Tensor, "n d_out"], read: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Activations after the intervention, at the n tokens it applies to; differentiable in all that it depends on.

        `written` are the activations to change, at `writes_at`; `read` those that codes are computed from, at
        `reads_at` (for an SAE or a direction the same, for a transcoder its input).
        """
        if isinstance(self.source, SAE) and self.error == "drop":
            written = self.source(read).to(written)
        if not self.strengths:
            return written
        if self._shift is not None:
            return written + self._shift.to(written)
        rows = self.rows.to(written.device)
        output_scale = self.source.output_scale(read.to(rows))
        return written + ((self._steps(read, written, rows, output_scale) @ rows) * output_scale).to(written.dtype)

    def _steps(
        self, read: Tensor, written: Tensor, rows: Tensor, output_scale: Tensor | float
    ) -> Float[Tensor, "n n_features"]:
        """z' - z for each token and feature."""
        goal = self._goal(rows)
        if self.unit == "norm" and self.mode != "scale":
            goal = goal * written.float().norm(dim=1, keepdim=True).to(rows.device) / (rows.norm(dim=1) * output_scale)
        if self.mode == "add":
            return goal.expand(len(read), -1)
        z = self.source.encode_latents(read, list(self.strengths)).to(rows.device)
        if self.mode == "scale":
            return (goal - 1) * z
        if self.mode == "ablate":
            return -z
        if self.mode == "clamp":
            return goal - z
        return torch.where(goal > 0, (goal - z).clamp_min(0), torch.where(goal < 0, (goal - z).clamp_max(0), 0 * z))


def hook_point_of(source: SAE | Direction) -> str | None:
    """The hook point of a direction, or the one an SAE was trained at; None where it is not known."""
    if isinstance(source, Direction):
        return source.hook_point
    return source.provenance.hook_point if source.provenance is not None else None


def match_source(
    source: SAE | Direction, model: Model, hook_point: str | None = None, allow_mismatch: bool = False
) -> str:
    """The hook point that an SAE or direction reads, after a check that an SAE was trained on this model there.

    A direction does not record its model: its hook point must exist.

    Args:
        source: SAE or direction.
        model: language model.
        hook_point: where to read; by default where the SAE was trained, or the direction's own.
        allow_mismatch: accept an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: for an SAE that does not match (unless `allow_mismatch`), and for a hook point that does not exist.
    """
    if isinstance(source, SAE):
        return match_places(source, model, hook_point, allow_mismatch)[0]
    return find_hook_point(model, hook_point or source.hook_point)


def _find_rows(source: SAE | Direction, features: list[int]) -> Float[Tensor, "n_features d_out"]:
    return source.vector[None] if isinstance(source, Direction) else source.directions()[features]


def _is_number(features: Any) -> bool:
    """Whether a tensor is a strength, not a list of features."""
    return isinstance(features, Tensor) and features.ndim == 0


def _read_features(features: FeatureStrengths, source: SAE | Direction, mode: Mode) -> dict[int, Strength]:
    """Strengths by feature; features without strengths are for ablation only."""
    if isinstance(source, Direction) and not isinstance(features, Mapping):
        given: Any = {} if isinstance(features, tuple | list) and not features else {0: features}
        strengths = {0: 0.0} if not given and mode == "ablate" else given
    elif isinstance(features, Mapping):
        strengths = {read_feature(i, "features"): s for i, s in features.items()}
    elif mode == "ablate" and isinstance(features, Iterable) and not _is_number(features):
        strengths = {read_feature(i, "features"): 0.0 for i in features}
    elif isinstance(features, tuple | list) and not features:
        strengths = {}
    else:
        raise ValueError(f"`features` must map features to strengths (a list for mode 'ablate' alone), got {features}.")
    n = 1 if isinstance(source, Direction) else source.cfg.d_sae
    if bad := [i for i in strengths if not 0 <= i < n]:
        raise ValueError(f"`features` must be in 0..{n - 1}, got {bad[:5]}.")
    for i, s in strengths.items():
        if not torch.as_tensor(s).isfinite().all():
            raise ValueError(f"Strengths must be finite, got {s} for feature {i}.")
    return strengths
