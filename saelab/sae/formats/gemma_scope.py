"""Gemma Scope's formats: `params.npz` (arXiv:2408.05147), and Gemma Scope 2's `config.json` and `params.safetensors`.

Both are JumpReLU with a threshold for each latent, W_enc (d_in, d_sae) and W_dec (d_sae, d_out), and subtract nothing
from their input. The second's affine connection is (d_in, d_out).
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saelab.sae.activation_functions import JumpReLU
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts
from saelab.sae.formats.sources import SAEFiles, require_tensors

ARCHIVE, CONFIG, WEIGHTS = "params.npz", "config.json", "params.safetensors"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "ln2.hook_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""TransformerLens hook names for module inputs and outputs in a Hugging Face layer of Gemma 3"""


def recognize_first(source: SAEFiles) -> bool:
    """Whether the file is an SAE of the first Gemma Scope."""
    name = _find_archive(source)
    return name is not None and set(NAMES) <= set(_capitalize(source.tensors(name)))


def _find_archive(source: SAEFiles) -> str | None:
    if source.file is not None:
        return source.file if source.file.endswith(".npz") else None
    return ARCHIVE if source.has(ARCHIVE) else None


def _capitalize(held: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by `W_enc` and `W_dec`; files spell them in either case."""
    return {f"W{name[1:]}" if name.startswith("w_") else name: value for name, value in held.items()}


def read_first(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of an SAE, or of a transcoder where `hook_point_out` is given; the file holds nothing but
    weights.
    """
    name = _find_archive(source)
    assert name is not None
    parts = require_tensors(_capitalize(source.tensors(name)), NAMES, source.folder / name)
    return ParsedSAE(format="gemma_scope", parts=parts, how=_mean(transcodes=overrides.hook_point_out is not None))


def _mean(*, transcodes: bool) -> Convention:
    return Convention(activation=JumpReLU(), transcodes=transcodes, subtracts_b_dec=False)


def recognize_second(source: SAEFiles) -> bool:
    """Whether the files are an SAE or transcoder of the second Gemma Scope."""
    if not source.has(CONFIG, WEIGHTS):
        return False
    return source.json(CONFIG).get("architecture") == "jump_relu" and "w_enc" in source.tensors(WEIGHTS)


def read_second(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of an SAE or transcoder; ValueError for a cross-layer transcoder, whose W_dec has three
    axes.
    """
    settings = source.settings(CONFIG)
    held = _capitalize(source.tensors(WEIGHTS))
    parts = require_tensors(held, NAMES, source.folder / WEIGHTS)
    if parts["W_dec"].ndim != 2:
        raise ValueError(
            f"W_dec must write one place, got shape {tuple(parts['W_dec'].shape)} in {source.folder}: that is a "
            "layer of a cross-layer transcoder, of which saelab reads circuit-tracer's files: sl.sae.CLT."
        )
    if isinstance(held.get(SKIP), Tensor):
        parts["W_skip"] = held[SKIP]
    if bool(settings.get("affine_connection")) != ("W_skip" in parts):
        raise ValueError(f"{source.folder / CONFIG} must say whether there is an {SKIP}; it and the weights disagree.")
    hook_point, out = (_translate(settings.get(f"hf_hook_point_{side}")) for side in ("in", "out"))
    transcodes = "W_skip" in parts or (out is not None and out != hook_point) or overrides.hook_point_out is not None
    model = str(settings.get("model_name") or "").replace("gemma-v3", "gemma-3")
    facts = SAEFacts(model=model or None, hook_point=hook_point, hook_point_out=out)
    return ParsedSAE(format="gemma_scope_2", parts=parts, how=_mean(transcodes=transcodes), facts=facts)


def _translate(place: str | None) -> str | None:
    """TransformerLens hook point, such as 'blocks.3.hook_resid_post' for 'model.layers.3.output'; None for one that is
    not in the list.
    """
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", place or "")
    return f"blocks.{found[1]}.{PLACES[found[2]]}" if found and found[2] in PLACES else None
