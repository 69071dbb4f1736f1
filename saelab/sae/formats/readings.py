"""What a reader finds in somebody's files, what the user adds to it, and what is kept of it in an SAE."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from saelab.lm.masks import TokenMask
from saelab.sae.formats.conventions import Convention
from saelab.sae.registry import Activation
from saelab.stores.provenance import Provenance
from saelab.stores.validation import check_settings, require_object

ALIASES = {"gpt2-small": "gpt2"}
"""names that TransformerLens has for models, where the Hub's last part is another"""
RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""places where folding layer norms changes nothing, and centring what is written there changes all"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the caller of `from_pretrained` says, because files often do not; it goes before what they say."""

    model: str | None = None
    hook_point: str | None = None
    hook_point_out: str | None = None
    weight_processing: str | None = None
    activation: Activation | None = None
    threshold: float | None = None
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says of the activations its SAE is for."""

    model: str | None = None
    hook_point: str | None = None
    hook_point_out: str | None = None
    weight_processing: str = "none"
    text: str = "unknown"
    ctx_len: int | None = None
    mask: dict[str, Any] = field(default_factory=dict)
    """fields of the token mask; none where the file says nothing"""
    provenance: dict[str, Any] | None = None
    """the whole of it, in files of our own writing"""
    complete: bool = False
    """whether the file is of our own writing, so that what it does not say is not known"""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """An SAE in its source's numbers, under our names and orientations."""

    format: str
    parts: Mapping[str, Tensor]
    how: Convention
    facts: Facts = Facts()
    settings: dict[str, Any] = field(default_factory=dict)
    """the source's own configuration, to write it back"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """tensors that say nothing about codes or reconstructions, to write them back"""


class _Said(TypedDict):
    format: str
    settings: dict[str, Any]
    dtypes: dict[str, str]


@dataclass(frozen=True, eq=False)
class Origin:
    """Where an SAE was read from, and what composing had to change: enough to write it back bit for bit."""

    format: str
    how: Convention
    settings: dict[str, Any]
    dtypes: dict[str, str]
    """of the source's tensors"""
    kept: Mapping[str, Any]
    """those tensors of the source that are not in the SAE as they were; mapped, and read only to be written"""

    def __repr__(self) -> str:
        return f"Origin({self.format}: {'; '.join(self.how.describe()) or 'as it is'})"

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, ready for JSON."""
        return {
            "format": self.format,
            "convention": self.how.to_dict(),
            "settings": self.settings,
            "dtypes": self.dtypes,
        }

    @classmethod
    def from_dict(cls, plain: Any, kept: Mapping[str, Any]) -> "Origin":
        """Build from `to_dict`'s form and the tensors kept; ValueError where one of them is missing."""
        plain = require_object(plain, "`origin`")
        said = check_settings(_Said, plain, "`origin`")
        how = Convention.from_dict(plain.get("convention"))
        if wrong := [name for name, dtype in said["dtypes"].items() if not hasattr(torch, dtype)]:
            raise ValueError(f"`origin` must say dtypes that PyTorch has, got another for {wrong[:5]}. Was it edited?")
        return cls(said["format"], how, said["settings"], said["dtypes"], kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # nothing in it is ever changed, and what it maps need not be read


def require(value: Any, name: str, what: str, example: str) -> Any:
    """The value; ValueError that asks for it where the file does not say it."""
    if value is None:
        raise ValueError(f"`{name}` must be given, as this file does not say {what}, got none; pass {name}={example}.")
    return value


def make_provenance(reading: Reading, asked: Asked) -> Provenance | None:
    """The provenance of an SAE that was read: what was asked for, else what the file says; ValueError if neither."""
    facts = reading.facts
    if facts.complete and not (asked.model or asked.hook_point or asked.hook_point_out or asked.weight_processing):
        return Provenance.from_dict(facts.provenance) if facts.provenance else None
    model = require(asked.model or facts.model, "model", "which model it is for", "'owner/name'")
    at = require(
        asked.hook_point or facts.hook_point, "hook_point", "where in the model it reads", "'blocks.6.hook_resid_post'"
    )
    to = None
    if reading.how.transcodes:
        out = asked.hook_point_out or facts.hook_point_out
        to = require(out, "hook_point_out", "where a transcoder writes", "'blocks.6.hook_mlp_out'")
    return Provenance(
        model=ALIASES.get(model, model),
        weight_processing=asked.weight_processing or facts.weight_processing,
        hook_point=at,
        text=facts.text,
        tokens_sha256="",
        mask=facts.mask,
        dtype="unknown",
        ctx_len=facts.ctx_len,
        n_tokens=0,
        seed=None,
        versions={},
        hook_point_out=to,
    )


def name_processing(hook_point: str | None, *, centred: bool, folded: bool) -> str:
    """What TransformerLens did to the model's weights, in our words.

    "folded" is what the bridge's compatibility mode makes: layer norms folded, what is written to the residual stream
    centred. Where that is read, centring alone is the same.
    """
    reads_residual = hook_point is not None and hook_point.rpartition(".")[2] in RESIDUAL
    if centred and (folded or reads_residual):
        return "folded"
    if not centred and (not folded or reads_residual):
        return "none"
    return "centred" if centred else "layer norms folded"


def describe_mask(excludes_special: bool | None, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Fields of the token mask that a source trained with; None where it does not say."""
    if excludes_special is None:
        return {}
    rules = TokenMask(special=excludes_special, positions=(start, stop)).to_dict()
    return rules | {"positions": [start, stop]}  # as JSON would give it back


def dtype_name(dtype: torch.dtype) -> str:
    """Such as 'bfloat16'."""
    return str(dtype).removeprefix("torch.")
