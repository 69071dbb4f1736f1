"""`Where` and `When`: the tokens that an intervention changes, by part of the text, position, mask or condition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.feature_ids import read_feature
from saelab.lm.flow import Passing
from saelab.sae.sae import SAE
from saelab.steering.directions import Direction

Part = Literal["all", "prompt", "generated"]
Side = Literal["both", "positive", "negative"]


@dataclass(frozen=True, eq=False)
class When:
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
    side: Side = "both"
    """sign of the codes that count: "both", "positive" or "negative"."""
    hook_point: str | None = None
    """where codes are read; by default where the SAE was trained"""
    allow_mismatch: bool = False
    """read codes on a model, weight processing or hook point other than those that the SAE was trained on"""

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"`side` must be one of {get_args(Side)}, got {self.side!r}.")
        n = self.source.cfg.d_sae if isinstance(self.source, SAE) else 1
        object.__setattr__(self, "feature", read_feature(self.feature, d_sae=n))

    def holds(self, x: Float[Tensor, "*batch d_in"]) -> Bool[Tensor, "*batch"]:
        """Mask of the activations on which the feature fires."""
        z = self.source.encode_some(x, [self.feature])[..., 0]
        return (z.abs() if self.side == "both" else z if self.side == "positive" else -z) > self.above


@dataclass(frozen=True, kw_only=True, eq=False)
class Where:
    """A selection of tokens by several rules, all of which must hold; padding is never changed."""

    part: Part = "all"
    """"prompt", "generated" or "all" tokens; the first generated token is chosen from the last prompt token, before any
    generated token is processed, so with "generated" it is not affected"""
    positions: slice | Sequence[int] | None = None
    """positions in a row's own tokens from 0 (BOS included, padding not); negative ones count back from the end of the
    prompt"""
    tokens: Bool[Tensor, "batch ctx_len"] | Bool[Tensor, "ctx_len"] | None = None
    """mask of the prompt's columns, True for tokens to change, special ones included; no token after them is changed"""
    when: When | None = None
    """a condition on the codes of a feature"""
    special: bool = False
    """change BOS and other special tokens, too; their large norms serve attention as a sink"""

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"`where` must be one of {get_args(Part)}, or a `Where(...)`, got '{self.part}'.")

    def select(self, passing: Passing, special_ids: Tensor) -> Bool[Tensor, "batch n"]:
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


Place: TypeAlias = Part | slice | Sequence[int] | Bool[Tensor, "..."] | When | Where
"""What `where` accepts: part of the text, positions, a mask of the prompt's tokens, a condition, or a `Where`"""


def make_where(place: Place) -> Where:
    """The `Where` for any form that `where` accepts: a part of the text, positions, a mask or a condition.

    >>> make_where("prompt").part, make_where([0, 3]).positions, make_where(slice(1, None)).positions
    ('prompt', [0, 3], slice(1, None, None))
    """
    if isinstance(place, Where):
        return place
    if isinstance(place, When):
        return Where(when=place)
    if isinstance(place, str):
        return Where(part=place)
    return Where(tokens=place) if isinstance(place, Tensor) else Where(positions=place)


def _stand_at(wanted: slice | Sequence[int], passing: Passing) -> Bool[Tensor, "batch n"]:
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
