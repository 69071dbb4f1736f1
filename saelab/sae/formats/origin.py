"""Intermediate results of loading an SAE: contents of a file, what the caller adds, and what is kept for writing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from saelab.lm.masks import TokenMask
from saelab.sae.activation_functions import Activation
from saelab.sae.formats.conventions import Convention
from saelab.stores.manifest import Provenance
from saelab.stores.validation import check_settings, require_object

ALIASES = {"gpt2-small": "gpt2"}
"""TransformerLens' names of models that differ from the last part of their Hub id"""
RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""hook points where folding layer norms changes nothing, and centering what is written to the residual stream is all
that matters
"""


@dataclass(frozen=True, kw_only=True)
class SAEFacts:
    """Facts about an SAE: those that a file records, or those that the caller of `from_pretrained` or a release adds
    because files often lack them; None where unknown.
    """

    model: str | None = None
    """name of the model that the SAE is for"""
    hook_point: str | None = None
    """hook point that it reads"""
    hook_point_out: str | None = None
    """hook point that a transcoder writes"""
    weight_processing: str | None = None
    """processing of the model's weights in training: "none", or "folded" as in TransformerLens 2"""
    activation: Activation | None = None
    """activation function with its k"""
    threshold: float | None = None
    """threshold of inference"""
    scale: float | None = None
    """factor by which activations are multiplied before the encoder"""
    likely_scale: float | None = None
    """the same, for a file that says that there is one and not which"""
    text: str = "unknown"
    """data set or file that the activations were collected from"""
    ctx_len: int | None = None
    """length of its rows in tokens"""
    mask: dict[str, Any] = field(default_factory=dict)
    """fields of the token mask; empty where the file has none"""
    provenance: dict[str, Any] | None = None
    """the full provenance, in files that saelab wrote"""
    complete: bool = False
    """whether saelab wrote the file, so that what it leaves out is unknown"""


@dataclass(frozen=True, kw_only=True)
class ParsedSAE:
    """An SAE with the source's values, under saelab's names and orientations."""

    format: str
    """name of the format"""
    parts: Mapping[str, Tensor]
    """weights by saelab's names; see `Parts`"""
    how: Convention
    """how the source uses them"""
    facts: SAEFacts = SAEFacts()
    """what it records of its activations"""
    settings: dict[str, Any] = field(default_factory=dict)
    """the source's own configuration, kept to write it back"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """tensors that do not affect codes or reconstructions, kept to write them back"""


class _Said(TypedDict):
    format: str
    settings: dict[str, Any]
    dtypes: dict[str, str]


@dataclass(frozen=True, eq=False)
class Origin:
    """Format that an SAE was read from, and the tensors that conversion changed: enough to write it back bit for
    bit.
    """

    format: str
    """name of the format"""
    how: Convention
    """how the source uses its weights"""
    settings: dict[str, Any]
    """the source's own configuration"""
    dtypes: dict[str, str]
    """dtypes of the source's tensors"""
    kept: Mapping[str, Any]
    """the source's tensors that are not in the SAE unchanged; memory-mapped, and read only to be written"""

    def __repr__(self) -> str:
        return f"Origin({self.format}: {'; '.join(self.how.describe()) or 'as it is'})"

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors as a dictionary for JSON."""
        return {
            "format": self.format,
            "convention": self.how.to_dict(),
            "settings": self.settings,
            "dtypes": self.dtypes,
        }

    @classmethod
    def from_dict(cls, plain: Any, kept: Mapping[str, Any]) -> "Origin":
        """Origin from `to_dict`'s form and the tensors kept; ValueError where it is malformed or names an unknown
        dtype.
        """
        plain = require_object(plain, "`origin`")
        said = check_settings(_Said, plain, "`origin`")
        how = Convention.from_dict(plain.get("convention"))
        if wrong := [name for name, dtype in said["dtypes"].items() if not hasattr(torch, dtype)]:
            raise ValueError(f"`origin` must say dtypes that PyTorch has, got another for {wrong[:5]}. Was it edited?")
        return cls(said["format"], how, said["settings"], said["dtypes"], kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # immutable, and copying would read the mapped tensors


def require(value: Any, name: str, what: str, example: str) -> Any:
    """The value itself; ValueError that asks the caller for it where the file leaves it out.

    Args:
        value: what the caller or the file gave; None raises.
        name: parameter of `from_pretrained` that supplies it.
        what: description of what the file leaves out, for the message.
        example: example of a value, for the message.
    """
    if value is None:
        raise ValueError(f"`{name}` must be given, as this file does not say {what}, got none; pass {name}={example}.")
    return value


def make_provenance(reading: ParsedSAE, overrides: SAEFacts) -> Provenance | None:
    """Provenance of a loaded SAE: what the caller gave, else what the file records; ValueError if model or hook point
    is in neither.
    """
    facts = reading.facts
    if facts.complete and not (
        overrides.model or overrides.hook_point or overrides.hook_point_out or overrides.weight_processing
    ):
        return Provenance.from_dict(facts.provenance) if facts.provenance else None
    model = require(overrides.model or facts.model, "model", "which model it is for", "'owner/name'")
    at = require(
        overrides.hook_point or facts.hook_point,
        "hook_point",
        "where in the model it reads",
        "'blocks.6.hook_resid_post'",
    )
    to = None
    if reading.how.transcodes:
        out = overrides.hook_point_out or facts.hook_point_out
        to = require(out, "hook_point_out", "where a transcoder writes", "'blocks.6.hook_mlp_out'")
    return Provenance(
        model=ALIASES.get(model, model),
        weight_processing=overrides.weight_processing or facts.weight_processing or "none",
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


def name_processing(hook_point: str | None, *, centered: bool, folded: bool) -> str:
    """Weight processing of the model in saelab's terms, from the TransformerLens options it was loaded with.

    "folded" is what the bridge's compatibility mode makes: layer norms folded, and weights that write to the residual
    stream centered. At hook points of the residual stream centering alone gives the same activations.
    """
    reads_residual = hook_point is not None and hook_point.rpartition(".")[2] in RESIDUAL
    if centered and (folded or reads_residual):
        return "folded"
    if not centered and (not folded or reads_residual):
        return "none"
    return "centered" if centered else "layer norms folded"


def describe_mask(excludes_special: bool | None, start: int = 0, stop: int | None = None) -> dict[str, Any]:
    """Fields of the token mask that a source trained with; empty where it does not record one."""
    if excludes_special is None:
        return {}
    rules = TokenMask(special=excludes_special, positions=(start, stop)).to_dict()
    return rules | {"positions": [start, stop]}  # a list, as after JSON


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as 'bfloat16'."""
    return str(dtype).removeprefix("torch.")
