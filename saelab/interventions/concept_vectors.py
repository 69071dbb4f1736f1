"""`concept_vector`: what the features of a prompt write, as a vector to steer a language model or any module along."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.functional.screening import largest_first
from saelab.interventions.directions import Direction
from saelab.lm.hooks import capture
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, find_context, find_row
from saelab.lm.module_inputs import ModuleExample, find_module, make_inputs
from saelab.lm.text_encoders import pool
from saelab.lm.tokens import tokenize
from saelab.sae.compatibility import match_places, require_finite, require_one_source
from saelab.sae.sae import SAE
from saelab.stores.results import Drawn, format_table

ConceptPooling = Literal["mean", "max", "last"]
"""How codes of a concept's tokens become those of the concept: mean, the largest in magnitude, or those of the last"""
SHOWN = 8


@dataclass(frozen=True, eq=False)
class ConceptVector(Drawn):
    """What features of a concept write into activations: `codes @ D`, D the decoder's rows in activations' own units.

    `sl.steer_module(module, vector, strength)` adds it; `direction(hook_point)` is for `sl.steer`.
    """

    vector: Float[Tensor, "d"] | Float[Tensor, "n d"]
    """one vector, or one for each position of the concept's text"""
    codes: Float[Tensor, "d_sae"] | Float[Tensor, "n d_sae"]
    """codes that it is made of"""
    name: str
    """how the concept was given"""

    @property
    def features(self) -> list[tuple[int, float]]:
        """Features and their codes, the largest in magnitude first; of several positions each feature's largest."""
        codes = self.codes if self.codes.ndim == 1 else _largest(self.codes)
        order = largest_first(codes[None].abs(), max(1, int((codes != 0).sum())))[0]
        return [(int(i), float(codes[i])) for i in order if codes[i] != 0]

    def direction(self, hook_point: str) -> Direction:
        """The vector, scaled to norm 1, as a direction of a hook point; its peak is the norm, so that a strength of 1
        in units of "max" adds the vector. ValueError for one that has several positions.
        """
        if self.vector.ndim != 1:
            raise ValueError(
                f"A direction must be one vector, got {len(self.vector)} of positions; give `concept_vector` a pooling."
            )
        return Direction(self.vector, hook_point, self.name, float(self.vector.norm()))

    def __str__(self) -> str:
        places = "" if self.vector.ndim == 1 else f"{len(self.vector)} positions, "
        norm = float(self.vector.norm(dim=-1).mean())
        head = f"{self.name}: {places}{len(self.features)} features, norm {norm:.3g}"
        rows = [["feature", "code"], *([str(i), f"{code:+.3g}"] for i, code in self.features[:SHOWN])]
        return "\n".join([head, *format_table(rows)])

    __repr__ = __str__


def _largest(z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "d_sae"]:
    """The code of each feature that is largest in magnitude, with its sign."""
    return z.gather(0, z.abs().argmax(0, keepdim=True))[0]


@torch.no_grad()
def concept_vector(
    sae: SAE,
    model: Any,
    concept: ModuleExample,
    *,
    at: nn.Module | str | None = None,
    pooling: ConceptPooling | None = "mean",
    k: int | None = None,
    less: ModuleExample | None = None,
    tokenizer: Any = None,
    axis: int = -1,
    allow_mismatch: bool = False,
) -> ConceptVector:
    """The vector that the SAE's features of a concept write: v = z D, z = encode(x) of the activations x of a prompt.

    Pooled, z is the mean (largest, last) code over the tokens of the text without special ones, and over texts where
    there are several; `less` takes away the codes of other texts, such as "a photo of a person" from "a photo of a
    naked person". With `pooling=None` each position has a vector of its own, special tokens and padding included, as
    diffusion pipelines use them. Adding v makes what is encoded more like the concept, subtracting it removes the
    concept (concept steerers, arXiv:2501.19066).

    Args:
        sae: SAE of the activations there.
        model: model of `load_model`; Hugging Face encoder, model of sentence-transformers, or any torch module.
        concept: text or texts; for other modules also the tensor, or tensors by name, that they take.
        at: hook point of a language model, by default where the SAE was trained; of other models the module whose
            output is read, itself or its dotted name.
        pooling: "mean", "max" or "last"; None for one vector a position.
        k: features in the vector, the largest in magnitude; an SAE that keeps its k largest is read with this k, so
            that k = d_sae takes all that are positive, as arXiv:2501.19066 does. None keeps what the SAE does.
        less: what is taken away, given like `concept`.
        tokenizer: of texts, where the model has none of its own.
        axis: axis of the width in the module's output; 1 for feature maps of convolutions.
        allow_mismatch: accept an SAE of another language model, weight processing or hook point.

    Raises:
        ValueError: several texts or `less` without pooling, an SAE of another width, `k` out of range, a module that
            does not exist, and for an SAE of another model or hook point (unless `allow_mismatch`).
        TypeError: a module without a tensor as output.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> found = sl.concept_vector(sae, model, "a dog", at="blocks.1.hook_resid_post", k=3)
    >>> found.vector.shape, len(found.features)
    (torch.Size([32]), 3)
    """
    if pooling is not None and pooling not in get_args(ConceptPooling):
        raise ValueError(f"`pooling` must be one of {get_args(ConceptPooling)} or None, got {pooling!r}.")
    if k is not None and not 1 <= k <= sae.cfg.d_sae:
        raise ValueError(f"`k` must be in 1..d_sae ({sae.cfg.d_sae}), got {k}.")
    if less is not None and pooling is None:
        raise ValueError("`less` must go with a pooling, as positions of two texts do not belong together; give one.")
    require_finite(sae)
    require_one_source(sae)
    reader = sae if k is None or not _keeps_largest(sae) else sae.with_k(k)

    def read(example: ModuleExample) -> Tensor:
        if isinstance(model, Model):
            x, keep = _read_language_model(sae, model, example, at, pooling, allow_mismatch)
        else:
            x, keep = _read_module(model, example, at, pooling, tokenizer, axis)
        if x.shape[-1] != sae.cfg.d_in:
            raise ValueError(f"An SAE must have the width of what it reads, {x.shape[-1]}, got d_in {sae.cfg.d_in}.")
        x = x.to(sae.device)
        return _pool(reader.encode(x) * reader.output_scale(x), keep.to(x.device), pooling)

    z = read(concept)
    z = z if less is None else z - read(less)
    if k is not None:
        top = largest_first(z.reshape(-1, z.shape[-1]).abs(), k).reshape(*z.shape[:-1], k)
        z = torch.zeros_like(z).scatter(-1, top, z.gather(-1, top))
    return ConceptVector(z @ sae.directions(), z, _name(concept, less))


def _keeps_largest(sae: SAE) -> bool:
    """Whether `with_k` reads the SAE with another k as it is, without a sample for a threshold."""
    return hasattr(sae.cfg.activation, "k") and sae.cfg.activation.name in ("topk", "abstopk")


def _read_language_model(
    sae: SAE, model: Model, texts: ModuleExample, at: Any, pooling: str | None, allow_mismatch: bool
) -> tuple[Float[Tensor, "batch n d"], Bool[Tensor, "batch n"]]:
    if not isinstance(texts, str) and not (isinstance(texts, Sequence) and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"A language model's concept must be text or texts, got {type(texts).__name__}.")
    if at is not None and not isinstance(at, str):
        raise ValueError(f"`at` of a language model must be a hook point, got a {type(at).__name__}; give its name.")
    place = match_places(sae, model, at, allow_mismatch)[0]
    given = [texts] if isinstance(texts, str) else list(texts)
    longest = min(find_context(model), max((find_row(model, text) for text in given), default=1))
    tokens = tokenize(model, given, longest, packed=False)
    keep = tokens.attention_mask if pooling is None else TokenMask().apply(tokens).keep
    _require_texts(keep, given)
    return capture(model, tokens.ids, [place])[place].float(), keep


def _read_module(
    model: Any, example: ModuleExample, at: Any, pooling: str | None, tokenizer: Any, axis: int
) -> tuple[Float[Tensor, "batch n d"], Bool[Tensor, "batch n"]]:
    if at is None:
        raise ValueError("`at` must be the module that is read, or its name, for what is no language model; got None.")
    inputs = make_inputs(model, example, tokenizer)
    x = as_rows(inputs.capture(find_module(model, at)), axis).float()
    keep = inputs.text if pooling is not None and inputs.text is not None else inputs.real
    if pooling is None or keep is None or keep.shape != x.shape[:2]:
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    _require_texts(keep, [str(example)])
    return x, keep


def _require_texts(keep: Tensor, texts: Sequence[str]) -> None:
    if len(keep) == 0 or not keep.any(1).all():
        raise ValueError(f"A concept must have a token that is not special, got none of {texts[:3]!r}.")


def as_rows(x: Tensor, axis: int = -1) -> Float[Tensor, "batch n d"]:
    """What a module puts out as one row of width d for each position, the axis of the width last.

    >>> as_rows(torch.zeros(2, 8, 3, 3), axis=1).shape, as_rows(torch.zeros(2, 8)).shape
    (torch.Size([2, 9, 8]), torch.Size([2, 1, 8]))
    """
    if x.ndim < 2:
        raise ValueError(f"A module that is read or steered must put out (batch, ..., width), got {tuple(x.shape)}.")
    spread = x.movedim(axis, -1)
    return spread[:, None] if spread.ndim == 2 else spread.flatten(1, -2)


def _pool(z: Tensor, keep: Tensor, pooling: str | None) -> Tensor:
    """Codes of the concept: (d_sae), or (n, d_sae) of the positions of one text."""
    if pooling is None:
        if len(z) != 1:
            raise ValueError(f"`pooling` must be given for several texts, got None for {len(z)}.")
        return z[0]
    if pooling != "max":
        return pool(z, keep, pooling).mean(0)
    return torch.stack([_largest(rows[kept]) for rows, kept in zip(z, keep, strict=True)]).mean(0)


def _name(concept: ModuleExample, less: ModuleExample | None) -> str:
    def say(one: ModuleExample) -> str:
        texts = [one] if isinstance(one, str) else one
        if isinstance(texts, Sequence):
            return repr(texts[0]) if len(texts) == 1 else f"{texts[0]!r} and {len(texts) - 1} more"
        return "tensors"

    return say(concept) if less is None else f"{say(concept)} less {say(less)}"
