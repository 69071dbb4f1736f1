"""Label of a feature, or of one of its signs, with author, scores and provenance."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from saelab.functional.feature_ids import read_feature

Kind = Literal["input", "output", "position", "two-sided", "polysemantic", "none", "free"]
"""What a label describes.

input: the tokens that the feature fires on; output: the tokens that it promotes; position: where it fires; two-sided:
an axis; polysemantic: several things; none: no good name was found; free: kind not specified.
"""
BOTH = 0


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label of one feature.

    >>> Label(feature=3, text="words for weather", author="me").sign
    0
    """

    feature: int
    sign: int = BOTH
    """1 or -1 for the codes of that sign; 0 for the whole feature"""
    text: str
    kind: Kind = "free"
    author: str
    """name of a rule set, a model, or a person"""
    by_person: bool = False
    """whether a person gave it; other authors never replace a person's choice"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """scores on held-out documents by name, with the chance level as name + "_chance" where there is one"""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """data that the label is based on, ready for JSON"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """store, split and settings that the label was made with"""
    time: str = ""
    """ISO 8601, UTC; empty until it is stored"""

    def __post_init__(self) -> None:
        for name in ("feature", "sign"):
            object.__setattr__(self, name, read_feature(getattr(self, name), name))
        if self.sign not in (-1, BOTH, 1):
            raise ValueError(f"`sign` must be 1, -1, or 0 for the whole feature, got {self.sign}.")
        if self.feature < 0:
            raise ValueError(f"`feature` must be 0 or more, got {self.feature}.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"`kind` must be one of {list(get_args(Kind))}, got {self.kind!r}.")
        if not self.author:
            raise ValueError("`author` must say who gave the label, got an empty text.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Label":
        """The label of `to_dict`'s output; ValueError for an unknown or missing field."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"A label must have the fields of `Label`, got others ({error}).") from None
