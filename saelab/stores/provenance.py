"""Where activations came from; it travels with everything made from them."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from saelab.stores.names import shareable
from saelab.stores.validation import read_fields


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
    removed: dict[str, int] = field(default_factory=dict)
    "Tokens removed by each rule of the mask."
    median_norm: float | None = None
    "What the mask's norm rule is relative to."
    hook_point_out: str | None = None
    "Place whose activations a transcoder reconstructs, where these are pairs."
    median_norm_out: float | None = None
    "What the mask's norm rule is relative to there."
    model_sketch: tuple[float, ...] | None = None
    "A few numbers of the language model's weights, whatever it is called."

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; those of a second hook point only where there is one, and no local path."""
        plain = asdict(self) | {"model": shareable(self.model), "text": shareable(self.text)}
        if self.hook_point_out is None:
            del plain["hook_point_out"], plain["median_norm_out"]
        if self.model_sketch is None:
            del plain["model_sketch"]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Provenance":
        """Build from `to_dict`'s output; ValueError on an unknown or missing field, and on a value of another type."""
        return read_fields(cls, data)

    def at(self, hook_point: str, median_norm: float | None = None) -> "Provenance":
        """The same origin at another hook point, whose median norm is its own."""
        return replace(self, hook_point=hook_point, median_norm=median_norm)

    @property
    def place(self) -> str:
        """The hook point in words: `at A`, or `from A to B` of pairs."""
        out = self.hook_point_out
        return f"at {self.hook_point}" if out is None else f"from {self.hook_point} to {out}"

    def paired(self, target: "Provenance") -> "Provenance":
        """The origin of pairs: rows of these activations, each with the same token's row of `target`.

        ValueError where the two were not read from the same tokens of one model.
        """
        for name in ("model", "weight_processing", "tokens_sha256", "mask", "n_tokens"):
            if (mine := getattr(self, name)) != (other := getattr(target, name)):
                raise ValueError(
                    f"Pairs must be of the same tokens, got `{name}` {mine!r} and {other!r}; collect both hook points "
                    "in one call."
                )
        return replace(self, hook_point_out=target.hook_point, median_norm_out=target.median_norm)
