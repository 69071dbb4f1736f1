"""OpenMOSS' formats (Language-Model-SAEs, Llamascopium), and its Llama Scope (arXiv:2410.20526).

    h = s_in x W_E + b_E,    z = h where it is chosen,    y_hat = (z W_D + b_D) / s_out

with s = sqrt(d_model) / (mean norm of the activations) on each side, 1 where norms are folded already. Nothing is
subtracted from the input. With `sparsity_include_decoder_norm` latents are chosen by h ||W_D_i||: a threshold is
divided by the norm; codes of TopK are scaled to rows of unit length, as `transform_to_unit_decoder_norm` does.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.activation_functions import BatchTopK, JumpReLU, ReLU, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts, require
from saelab.sae.formats.sources import SAEFiles, require_number, require_tensors
from saelab.stores.files import inside

CONFIG, WEIGHTS, PICKLED = "config.json", "sae_weights.safetensors", "sae_weights.pt"
HYPERPARAMETERS, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
NEW = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"}
OLD = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
LANGUAGE_MODEL = "lm_config.json"
NORM = "dataset_average_activation_norm."
ELSEWHERE = "sae_pretrained_name_or_path"
"""a setting that refers to weights outside of the folder"""


def recognize(source: SAEFiles) -> bool:
    """Whether the files are in OpenMOSS' format."""
    name = _find_weights(source)
    if name is None or not source.has(CONFIG) or "d_model" not in source.json(CONFIG):
        return False
    held = _unwrap(source.tensors(name))
    return "W_E" in held or "encoder.weight" in held


def _find_weights(source: SAEFiles) -> str | None:
    """Name of the weights file: of a finished run, or of its last checkpoint."""
    names = (WEIGHTS, PICKLED, FINAL, FINAL.replace(".safetensors", ".pt"))
    return next((name for name in names if source.has(name)), None)


def _unwrap(held: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = held.get("sae")
    return inner if isinstance(inner, Mapping) else held


def read(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of an SAE or transcoder; ValueError for other types, and for thresholds and norms that are
    not in the file.
    """
    settings, name = source.settings(CONFIG), _find_weights(source)
    assert name is not None
    place = source.folder / name
    _refuse(settings, source)
    held = _unwrap(source.tensors(name))
    parts = _name_parts(held, bool(settings.get("use_decoder_bias", True)), source)
    points = str(settings.get("hook_point_in")), str(settings.get("hook_point_out"))
    scales = _find_scales(settings, held, points, overrides, source.folder / CONFIG)
    activation = overrides.activation or _choose_activation(settings, place)
    if isinstance(activation, JumpReLU):
        log = next((held[key] for key in THRESHOLDS if key in held), None)
        parts["threshold"] = require(log, "threshold", "its thresholds", "0.5").float().exp()
    if isinstance(activation, BatchTopK):
        parts["threshold"] = torch.tensor(
            require(overrides.threshold, "threshold", "the threshold of inference (batches decided in training)", "0.5")
        )
    how = Convention(
        activation=activation,
        transcodes=points[0] != points[1],
        subtracts_b_dec=bool(settings.get("apply_decoder_bias_to_pre_encoder", False)),
        decoder_norms="choice" if settings.get("sparsity_include_decoder_norm", True) else "none",
        scale=scales[0],
        scale_out=scales[1],
        normalizer="token_norm" if settings.get("norm_activation") == "token-wise" else "none",
    )
    return ParsedSAE(format="openmoss", parts=parts, how=how, facts=_read_facts(source, points))


def _refuse(settings: dict[str, Any], source: SAEFiles) -> None:
    if (kind := settings.get("sae_type", "sae")) != "sae":
        why = "whose sources each choose latents by their own decoder norms" if kind == "crosscoder" else ""
        raise ValueError(
            f"`sae_type` must be sae, got '{kind}' in {source.folder}, {why or 'which saelab has no axis for'}."
        )
    if settings.get("use_glu_encoder"):
        raise ValueError(
            f"{source.folder} must have one linear encoder, got use_glu_encoder, which saelab has no axis for."
        )
    if elsewhere := settings.get(ELSEWHERE):
        inside(str(elsewhere))
        raise ValueError(
            f"{source.folder} must hold its own weights, got `{ELSEWHERE}` '{elsewhere}'; open that instead."
        )


def _name_parts(held: Mapping[str, Any], has_bias: bool, source: SAEFiles) -> dict[str, Tensor]:
    names = NEW if "W_E" in held else OLD
    wanted = {theirs: ours for theirs, ours in names.items() if has_bias or ours != "b_dec"}
    found = require_tensors(held, tuple(wanted), source.folder)
    parts = {ours: found[theirs] for theirs, ours in wanted.items()}
    if names is OLD:
        parts["W_enc"], parts["W_dec"] = parts["W_enc"].T, parts["W_dec"].T
    if not has_bias:
        parts["b_dec"] = torch.zeros(parts["W_dec"].shape[1])
    return parts


def _find_scales(
    settings: dict[str, Any], held: Mapping[str, Any], points: tuple[str, str], overrides: SAEFacts, place: Path
) -> tuple[float, float]:
    """Factors on the activations of input and target."""
    norm = settings.get("norm_activation", "dataset-wise")
    if norm in ("inference", "token-wise"):
        return 1.0, 1.0
    if norm != "dataset-wise":
        raise ValueError(f"`norm_activation` must not depend on the batch, got '{norm}'.")
    root = math.sqrt(require_number(settings, "d_model", place))
    norms = [float(held[NORM + point].float().sum()) for point in points if isinstance(held.get(NORM + point), Tensor)]
    if any(not norm > 0 for norm in norms):
        raise ValueError(
            f"The mean norms of activations must be positive, got {norms} next to {place}. Is the file whole?"
        )
    scales = [root / norm for norm in norms]
    if len(scales) == 2:
        return scales[0], scales[1]
    scale = require(overrides.scale, "scale", "the mean norm of the activations (sqrt(d_model) / it)", "2.5")
    if points[0] != points[1]:
        raise ValueError(f"A transcoder needs the mean norms of both sides, got none in the file for {points}.")
    return scale, scale


def _choose_activation(settings: dict[str, Any], place: Path) -> Activation:
    name = str(settings.get("act_fn", "relu")).lower()
    if name in ("topk", "batchtopk"):
        k = int(require_number(settings, "top_k", place))
        return TopK(k=k) if name == "topk" else BatchTopK(k=k)
    if name not in ("relu", "jumprelu"):
        raise ValueError(f"`act_fn` must be relu, jumprelu, topk or batchtopk, got '{name}'.")
    return ReLU() if name == "relu" else JumpReLU()


def _read_facts(source: SAEFiles, points: tuple[str, str]) -> SAEFacts:
    said = source.json_if_there(LANGUAGE_MODEL)
    return SAEFacts(model=said.get("model_name"), hook_point=points[0], hook_point_out=points[1])


def recognize_llama_scope(source: SAEFiles) -> bool:
    """Whether the files are of Llama Scope."""
    return source.has(HYPERPARAMETERS, FINAL) and "encoder.weight" in source.tensors(FINAL)


def read_llama_scope(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of an SAE or transcoder of Llama Scope: a JumpReLU with one threshold for all latents.

    `jump_relu_threshold` is in the units of the activations themselves, h in those of norm sqrt(d_model): h is active
    above `s_in jump_relu_threshold`. Decoder norms do not enter, as in SAELens' loader, which its authors corrected.
    """
    settings = source.settings(HYPERPARAMETERS)
    place = source.folder / HYPERPARAMETERS
    parts = _name_parts(source.tensors(FINAL), bool(settings.get("use_decoder_bias", True)), source)
    norms = settings.get("dataset_average_activation_norm") or {}
    root = math.sqrt(require_number(settings, "d_model", place))
    scale, scale_out = (root / max(require_number(norms, side, place), 1e-30) for side in ("in", "out"))
    if (name := settings.get("act_fn", "jumprelu")) != "jumprelu":
        raise ValueError(f"`act_fn` in {place} must be jumprelu, got '{name}'.")
    parts["threshold"] = torch.tensor(scale * require_number(settings, "jump_relu_threshold", place))
    points = str(settings.get("hook_point_in")), str(settings.get("hook_point_out"))
    how = Convention(
        activation=JumpReLU(),
        transcodes=points[0] != points[1],
        subtracts_b_dec=bool(settings.get("apply_decoder_bias_to_pre_encoder", False)),
        scale=scale,
        scale_out=scale_out,
    )
    return ParsedSAE(format="llama_scope", parts=parts, how=how, facts=_read_facts(source, points))
