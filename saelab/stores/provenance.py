"""`Provenance`: model, hook point, text and mask of activations, saved with everything that is made from them."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from saelab.stores.names import shareable
from saelab.stores.validation import read_fields


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of the activations at one hook point: model, text, mask and versions.

    >>> origin = Provenance(model="gpt2", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="a.txt",
    ...     tokens_sha256="", mask={}, dtype="float32", ctx_len=128, n_tokens=10, seed=None, versions={})
    >>> origin.at("blocks.1.hook_resid_post").hook_point
    'blocks.1.hook_resid_post'
    """

    model: str
    "Name or folder of the language model."
    weight_processing: str
    "How its weights were processed, such as folding of layer norms."
    hook_point: str
    "Place in the model, by its TransformerLens name."
    text: str
    "Source of the text: a file, a data set or a description."
    tokens_sha256: str
    "Hash of the token ids and document ids."
    mask: dict[str, Any]
    "Fields of the token mask."
    dtype: str
    "Dtype of the stored activations."
    ctx_len: int | None
    "Tokens in a sequence."
    n_tokens: int
    "Number of rows that the mask kept."
    seed: int | None
    "Seed of the order of sequences, where it is random."
    versions: dict[str, str]
    "Versions of saelab, torch, transformer-lens and transformers."
    removed: dict[str, int] = field(default_factory=dict)
    "Number of tokens removed by each rule of the mask."
    median_norm: float | None = None
    "Median norm that the mask's norm rule refers to."
    hook_point_out: str | None = None
    "Hook point whose activations a transcoder reconstructs, where these are pairs."
    median_norm_out: float | None = None
    "Median norm that the mask's norm rule refers to at that hook point."
    model_sketch: tuple[float, ...] | None = None
    "A few numbers computed from the language model's weights, which identify it whatever its name."

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without local paths; those of a second hook point only where there is one."""
        plain = asdict(self) | {"model": shareable(self.model), "text": shareable(self.text)}
        if self.hook_point_out is None:
            del plain["hook_point_out"], plain["median_norm_out"]
        if self.model_sketch is None:
            del plain["model_sketch"]
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Provenance":
        """The provenance in the output of `to_dict`; ValueError for an unknown or missing field or a wrong type."""
        return read_fields(cls, data)

    def at(self, hook_point: str, median_norm: float | None = None) -> "Provenance":
        """A copy at another hook point, with the median norm there."""
        return replace(self, hook_point=hook_point, median_norm=median_norm)

    @property
    def place(self) -> str:
        """Text naming the hook point: `at A`, or `from A to B` for pairs."""
        out = self.hook_point_out
        return f"at {self.hook_point}" if out is None else f"from {self.hook_point} to {out}"

    def paired(self, target: "Provenance") -> "Provenance":
        """The origin of pairs of these activations with those of `target`, token by token.

        Raises:
            ValueError: the two are not of the same tokens, mask and model.
        """
        for name in ("model", "weight_processing", "tokens_sha256", "mask", "n_tokens"):
            if (mine := getattr(self, name)) != (other := getattr(target, name)):
                raise ValueError(
                    f"Pairs must be of the same tokens, got `{name}` {mine!r} and {other!r}; collect both hook points "
                    "in one call."
                )
        return replace(self, hook_point_out=target.hook_point, median_norm_out=target.median_norm)
