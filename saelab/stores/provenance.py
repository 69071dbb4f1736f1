"""Where activations came from; it travels with everything made from them."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The whole origin of one hook point's activations.

    >>> origin = Provenance(model="gpt2", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="a.txt",
    ...     tokens_sha256="", mask={}, dtype="float32", ctx_len=128, n_tokens=10, seed=None, versions={})
    >>> origin.at("blocks.1.hook_resid_post").hook_point
    'blocks.1.hook_resid_post'
    """

    model: str
    "Name or folder of the language model."
    weight_processing: str
    "What was done to its weights, such as folding layer norms."
    hook_point: str
    "Place in the model, in TransformerLens spelling."
    text: str
    "Where the text came from."
    tokens_sha256: str
    "Hash of the token ids and document ids."
    mask: dict[str, Any]
    "Fields of the token mask."
    dtype: str
    "Of the stored activations."
    ctx_len: int | None
    "Tokens in a sequence."
    n_tokens: int
    "Rows kept."
    seed: int | None
    "Of the order of sequences, where it was drawn."
    versions: dict[str, str]
    "Of saelab, torch, transformer-lens and transformers."

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Provenance":
        """Build from `to_dict`'s output; ValueError on an unknown or missing field."""
        wanted = {field.name for field in fields(cls)}
        if wrong := sorted(wanted ^ set(data)):
            raise ValueError(
                f"A provenance must have exactly the fields {sorted(wanted)}, got a difference in {wrong[:5]}. "
                "Was the file edited, or written by another version?"
            )
        return cls(**data)

    def at(self, hook_point: str) -> "Provenance":
        """The same origin at another hook point."""
        return replace(self, hook_point=hook_point)
