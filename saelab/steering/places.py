"""`Where`: the tokens that an intervention changes."""

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
    """A condition on a token: that a feature fires on it, `|z| > above`, on one side of the feature or on both.

    The condition is read at its own hook point, which must not lie behind what is steered, from what flows there:
    changes of enclosing blocks included, those of its own block not.
    """

    source: SAE | Direction
    feature: int = 0
    above: float = 0.0
    side: Side = "both"
    hook_point: str | None = None
    """where the SAE was trained, unless given"""
    allow_mismatch: bool = False
    """read it on a model, weight processing or hook point other than those that the SAE was trained on"""

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"`side` must be one of {get_args(Side)}, got {self.side!r}.")
        n = self.source.cfg.d_sae if isinstance(self.source, SAE) else 1
        object.__setattr__(self, "feature", read_feature(self.feature, d_sae=n))

    def holds(self, x: Float[Tensor, "*batch d_in"]) -> Bool[Tensor, "*batch"]:
        """Whether the feature fires on each activation."""
        z = self.source.encode_some(x, [self.feature])[..., 0]
        return (z.abs() if self.side == "both" else z if self.side == "positive" else -z) > self.above


@dataclass(frozen=True, kw_only=True, eq=False)
class Where:
    """Tokens by several rules, all of which must hold; padding is never changed.

    Generated are the tokens behind the prompt: the first of them is chosen before anything generated passes, so it
    comes from the prompt alone. Positions count a row's own tokens from 0 (BOS included, padding not); negative ones
    count back from the end of its prompt.
    """

    part: Part = "all"
    positions: slice | Sequence[int] | None = None
    tokens: Bool[Tensor, "batch ctx_len"] | Bool[Tensor, "ctx_len"] | None = None
    """true where the prompt's columns are changed, special tokens included; nothing behind them is"""
    when: When | None = None
    special: bool = False
    """change BOS and other special tokens too, whose large norms other tokens lean on"""

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"`where` must be one of {get_args(Part)}, or a `Where(...)`, got '{self.part}'.")

    def select(self, passing: Passing, special_ids: Tensor) -> Bool[Tensor, "batch n"]:
        """The tokens of a forward that these rules leave, the condition `when` not asked."""
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
"""What `where` may be: part of the text, positions, a mask of the prompt's tokens, a condition, or all of them"""


def make_where(place: Place) -> Where:
    """The `Where` that a shorter form stands for.

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
    """A mask's columns, false behind its end."""
    mask = tokens.expand(n_rows, -1) if tokens.ndim == 1 else tokens
    if len(mask) != n_rows:
        raise ValueError(f"A token mask must have a row for each of the {n_rows} texts, got {len(mask)}.")
    inside = columns < mask.shape[1]
    return mask[:, columns.clamp_max(mask.shape[1] - 1)] & inside
