"""Conversion of another library's weights into saelab's formula.

saelab's is `z = activation((normalize(x) - b_dec) W_enc + b_enc)`, `x_hat = unnormalize(z W_dec + b_dec)`. A
`Convention` lists how a source differs from that; `compose` converts exactly, and reports which tensors it had to
change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.activation_functions import BatchTopK, Gated, JumpReLU, ReLU, read_activation
from saelab.sae.activation_registry import Activation
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import Encoder, PursuitEncoder, read_encoder
from saelab.sae.normalizer import NormalizerKind
from saelab.stores.validation import read_fields, require_object

LATENT_AXIS = dict.fromkeys(("b_enc", "W_dec", "threshold", "r_mag", "b_gate", "b_mag", "code_scale"), 0) | {"W_enc": 1}
CHUNK = 4096  # latents converted to float64 at a time

Parts = Mapping[str, Tensor]
"""W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_out), b_dec, threshold, W_skip (d_in, d_out); of a gated SAE r_mag,
b_gate and b_mag instead of b_enc; code_scale (d_sae), which codes are multiplied by before W_dec"""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a source uses its weights, where that differs from saelab."""

    activation: Activation
    """activation function that maps pre-activations to codes"""
    encoder: Encoder = "linear"
    """as in `SAEConfig`"""
    prefixes: tuple[int, ...] | None = None
    """sizes of the Matryoshka prefixes"""
    transcodes: bool = False
    """whether W_dec reconstructs other activations than W_enc reads"""
    subtracts_b_dec: bool = True
    """whether the encoder is applied to `x - b_dec`, not `x`"""
    decoder_norms: Literal["none", "codes", "choice"] = "none"
    """what is multiplied by ||W_dec_i||: "none"; "codes": pre-activations and so codes, with W_dec used at unit length;
    or "choice": only the values by which the activation selects latents
    """
    scale: float = 1.0
    """factor on `x` before the encoder"""
    scale_out: float = 1.0
    """divisor of the reconstruction"""
    normalizer: NormalizerKind = "none"
    """"none", or a kind with per-token statistics"""

    def to_dict(self) -> dict[str, Any]:
        """Dictionary for JSON, the inverse of `from_dict`."""
        return asdict(self) | {"activation": self.activation.to_dict()}

    @classmethod
    def from_dict(cls, plain: Any) -> "Convention":
        """Convention from `to_dict`'s form; ValueError for an unknown key."""
        values = require_object(plain, "A convention")
        values = values | {"activation": read_activation(values.get("activation"))}
        if isinstance(values.get("encoder"), dict):
            values["encoder"] = read_encoder(values["encoder"])
        return read_fields(cls, values)

    def describe(self) -> list[str]:
        """Descriptions of how the source's weights were converted; empty if nothing was changed."""
        subtracts = self.subtracts_b_dec
        said = {
            "its encoder reads x, not x - b_dec: b_enc holds b_dec W_enc more": not (self.transcodes or subtracts),
            "its transcoder reads x - b_dec: b_enc holds b_dec W_enc less": self.transcodes and subtracts,
            "norms of W_dec's rows are in the codes, and the rows at unit length": self.decoder_norms == "codes",
            "choices look at codes times the norms of W_dec's rows": self.decoder_norms == "choice",
            f"activations are multiplied by {self.scale:g}": self.scale != 1.0,
            f"every token is normalized by itself ({self.normalizer})": self.normalizer != "none",
        }
        return [words for words, true in said.items() if true]


@torch.no_grad()
def compose(
    parts: Parts, how: Convention, latents: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[SAEConfig, dict[str, Tensor], frozenset[str]]:
    """Configuration and state dict of a source's weights in saelab's convention, and the names of those of its tensors
    that are not in the state dict unchanged; only tensors that are needed are read.

    Args:
        parts: the source's tensors by saelab's names; see `Parts`.
        how: how the source uses them.
        latents: indices of the latents to keep, in that order; None is all.
        dtype: dtype of the weights in the state dict.

    Raises:
        ValueError: for `latents` where codes depend on other latents, and for tensors whose shapes do not fit one
            another.
    """
    check_shapes(parts, how)
    if latents is not None:
        parts, how = take_latents(parts, latents), narrow(how, len(latents))
    now: dict[str, Tensor] = dict(parts)
    for step in (_merge_gate, _weigh, _scale_codes, _keep_b_dec, _set_threshold):
        step(now, how)
    changed = frozenset(name for name in parts if now.get(name) is not parts[name])
    cfg = _configure(now, how)
    tensors = {name: own(tensor, dtype, latent_major=name == "W_enc") for name, tensor in now.items()}
    return cfg, tensors | _normalizer_tensors(cfg, how), changed


def compose_config(parts: Parts, how: Convention) -> SAEConfig:
    """Configuration of a source's SAE without its weights: only shapes are read. Raises ValueError as `compose`
    does.
    """
    check_shapes(parts, how)
    return _configure(parts, how)


def own(tensor: Tensor, dtype: torch.dtype, *, latent_major: bool = False) -> Tensor:
    """Copy of the tensor in its own memory, in a dtype; `latent_major` stores the entries of a column contiguously."""
    turned = tensor.T if latent_major else tensor
    held = torch.empty(turned.shape, dtype=dtype).copy_(turned)
    return held.T if latent_major else held


def _merge_gate(now: dict[str, Tensor], how: Convention) -> None:
    """A gated encoder as a JumpReLU (arXiv:2404.16014): with p = x W_enc and e = exp(r_mag) a latent is active where p
    + b_gate > 0 and its code is e p + b_mag there, so its pre-activation is e p + b_mag and its threshold b_mag - e
    b_gate.
    """
    if "r_mag" not in now:
        return
    gain, b_mag, b_gate = now.pop("r_mag").float().exp(), now.pop("b_mag").float(), now.pop("b_gate").float()
    now["W_enc"] = now["W_enc"].float() * gain
    now["b_enc"], now["threshold"] = b_mag, b_mag - gain * b_gate


def _weigh(now: dict[str, Tensor], how: Convention) -> None:
    """Move norms of W_dec's rows into codes and W_dec. Where each latent is selected on its own, only its threshold
    changes; where latents compete, codes are scaled to rows of unit length.
    """
    if how.decoder_norms == "none" or (how.decoder_norms == "choice" and isinstance(how.activation, ReLU)):
        return
    norms = now["W_dec"].float().norm(dim=1)
    empty = norms == 0  # a latent with a zero row is never selected
    if how.decoder_norms == "choice" and isinstance(how.activation, JumpReLU):
        never = torch.finfo(torch.float32).max
        now["threshold"] = (now["threshold"].float() / norms).masked_fill(empty, never)
        return
    now["W_enc"], now["b_enc"] = now["W_enc"].float() * norms, now["b_enc"].float() * norms
    now["W_dec"] = now["W_dec"].float() / norms.masked_fill(empty, 1.0)[:, None]


def _scale_codes(now: dict[str, Tensor], how: Convention) -> None:
    if "code_scale" in now:
        now["W_dec"] = now["W_dec"].float() * now.pop("code_scale").float()[:, None]


def _keep_b_dec(now: dict[str, Tensor], how: Convention) -> None:
    """Correct b_enc where saelab's encoder subtracts b_dec and the source's does not, and the other way round for a
    transcoder, whose encoder subtracts nothing in saelab: (x - b_dec) W_enc + (b_enc + b_dec W_enc) = x W_enc + b_enc.
    """
    if how.transcodes != how.subtracts_b_dec:
        return
    if isinstance(how.encoder, PursuitEncoder):  # tied: b_dec is neither subtracted nor added
        now["b_dec"] = torch.zeros_like(now["b_dec"])
        return
    if len(now["b_dec"]) != len(now["W_enc"]):
        raise ValueError(
            f"b_dec must be as wide as what the encoder reads ({len(now['W_enc'])}) to be subtracted from it, got "
            f"{len(now['b_dec'])}; the configuration does not go with the weights."
        )
    given_back = read_with(now["W_enc"], now["b_dec"])
    now["b_enc"] = now["b_enc"].float() + (-given_back if how.transcodes else given_back)


def read_with(W_enc: Float[Tensor, "d_in d_sae"], b_dec: Float[Tensor, "d_in"]) -> Float[Tensor, "d_sae"]:
    """`b_dec W_enc`, computed in float64 and in chunks of latents."""
    parts = [rows.double() @ b_dec.double() for rows in W_enc.T.split(CHUNK)]
    return torch.cat(parts).float()


def _set_threshold(now: dict[str, Tensor], how: Convention) -> None:
    """Clamp thresholds at 0: sources apply max(u, 0) first, so that their threshold below 0 admits no negative code."""
    if "threshold" not in now or how.activation.threshold == "none":
        now.pop("threshold", None)
        return
    threshold = now["threshold"]
    if how.activation.threshold == "learned" and threshold.ndim == 0:
        threshold = threshold.expand(len(now["W_dec"]))
    if bool((threshold.float() < 0).any()):  # 8-bit floats have no comparison
        threshold = threshold.float().clamp(min=0)
    now["threshold"] = threshold


def _configure(now: Parts, how: Convention) -> SAEConfig:
    d_sae, d_out = now["W_dec"].shape
    d_in = now["W_enc"].shape[0] if "W_enc" in now else d_out
    if not all(0 < scale < math.inf for scale in (how.scale, how.scale_out)):
        raise ValueError(f"`scale` must be positive and finite, got {how.scale} and {how.scale_out}.")
    scaled = (how.scale, how.scale_out) != (1.0, 1.0)
    if scaled and how.normalizer != "none":
        raise ValueError(f"`scale` must not go with normalizer '{how.normalizer}', got {how.scale}; leave one out.")
    if how.transcodes and how.normalizer != "none":
        raise ValueError(
            f"A transcoder's input must be read as it is, got normalizer '{how.normalizer}', which measures every "
            "token and cannot be undone at the target; normalize the activations before."
        )
    if not how.transcodes and how.scale != how.scale_out:
        raise ValueError(f"An autoencoder must undo its own scale ({how.scale}), got {how.scale_out}.")
    return SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out if how.transcodes else None,
        skip="W_skip" in now,
        activation=fit_width(how.activation, d_sae),
        encoder=how.encoder,
        prefixes=how.prefixes,
        dictionary="free",
        normalizer="scale" if scaled else how.normalizer,
    )


def _normalizer_tensors(cfg: SAEConfig, how: Convention) -> dict[str, Tensor]:
    """Buffers of the normalizer (of a transcoder's two) that multiplies by the source's scale."""
    if cfg.normalizer == "none":
        return {}
    sides = {"normalizer": (how.scale, cfg.d_in)}
    if cfg.d_out is not None:
        sides["target_normalizer"] = (how.scale_out, cfg.d_out)
    named = {}
    for side, (scale, width) in sides.items():
        named[f"{side}.mean"] = torch.zeros(width)
        named[f"{side}.matrix"], named[f"{side}.inverse"] = torch.tensor(scale), torch.tensor(1 / scale)
    return named


def fit_width(activation: Activation, d_sae: int) -> Activation:
    """The activation with its training target (target L0, or BatchTopK's k) reduced to the number of latents; codes in
    inference do not change.
    """
    if isinstance(activation, ReLU | JumpReLU | Gated) and activation.target_l0 > d_sae:
        return replace(activation, target_l0=float(d_sae))
    if isinstance(activation, BatchTopK) and activation.k > d_sae:
        return replace(activation, k=d_sae)
    return activation


def take_latents(parts: Parts, latents: Sequence[int]) -> dict[str, Tensor]:
    """The tensors restricted to the given latents; the rest of a mapped tensor is not read. ValueError for an index out
    of range or repeated.
    """
    d_sae = len(parts["W_dec"])
    index = torch.as_tensor(list(latents), dtype=torch.int64)
    if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= d_sae:
        raise ValueError(f"`latents` must be some numbers in 0..{d_sae - 1}, got {list(latents)[:5]}.")
    if len(index.unique()) < len(index):
        raise ValueError(f"`latents` must name each latent once, got {len(index) - len(index.unique())} twice.")
    taken = dict(parts)
    for name, axis in LATENT_AXIS.items():
        if name in taken and taken[name].ndim:
            taken[name] = taken[name].index_select(axis, index)
    return taken


def narrow(how: Convention, d_sae: int) -> Convention:
    """The convention for a subset of latents; ValueError where the codes of a latent depend on the others."""
    if not isinstance(how.activation, ReLU | JumpReLU | Gated | BatchTopK) or how.encoder != "linear":
        raise ValueError(
            f"`latents` needs codes that do not depend on one another, got {how.activation}: which latents it keeps is "
            "decided among all of them. Load all, and take the columns of the codes."
        )
    return replace(how, activation=fit_width(how.activation, d_sae), prefixes=None)


def check_shapes(parts: Parts, how: Convention) -> None:
    """Raise ValueError naming the first tensor that is missing, has a shape that does not fit W_dec and b_dec, or is
    not floating point.
    """
    pursues = isinstance(how.encoder, PursuitEncoder)
    needed = ["W_dec", "b_dec"] if pursues else ["W_enc", "W_dec", "b_dec"]
    needed += [] if pursues else ["r_mag", "b_gate", "b_mag"] if "r_mag" in parts else ["b_enc"]
    if how.activation.threshold != "none" and "r_mag" not in parts:
        needed.append("threshold")
    if missing := [name for name in needed if name not in parts]:
        raise ValueError(f"The weights must hold {needed}, got none for {missing}. Is the file whole?")
    if parts["W_dec"].ndim != 2:
        raise ValueError(f"W_dec must have two axes, got shape {tuple(parts['W_dec'].shape)}.")
    d_sae, d_out = parts["W_dec"].shape
    d_in = parts["W_enc"].shape[0] if how.transcodes and "W_enc" in parts else d_out
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(LATENT_AXIS, (d_sae,))
    expected |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_in, d_out)}
    for name, part in parts.items():
        scalar = name == "threshold" and part.ndim == 0
        if not scalar and tuple(part.shape) != expected.get(name, tuple(part.shape)):
            raise ValueError(
                f"{name} must have shape {expected[name]}, got {tuple(part.shape)}; the weights do not fit."
            )
        if not part.is_floating_point():
            raise ValueError(f"{name} must be floating-point numbers, got {part.dtype}.")
