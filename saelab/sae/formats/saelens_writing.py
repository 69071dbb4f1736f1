"""Writing SAELens' format, `cfg.json` and `sae_weights.safetensors`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.activations import AbsTopK, BatchTopK, JumpReLU, ReLU, TopK
from saelab.sae.coder import Coder
from saelab.sae.config import MatchingPursuit
from saelab.sae.formats.readings import dtype_name
from saelab.sae.formats.saelens import BATCHED, CODE_SCALE, CONFIG, OURS, PER_TOKEN, WEIGHTS
from saelab.stores.files import save_tensors, write_json
from saelab.stores.names import shareable
from saelab.stores.provenance import Provenance

VERSION = "6.0.0"
"""SAELens version whose configuration is written"""


def describe(coder: Coder, provenance: Provenance | None) -> dict[str, Any]:
    """SAELens configuration of an SAE without a linear normaliser; ValueError for what SAELens cannot express.

    BatchTopK is written as the JumpReLU that it is equivalent to once its threshold is set; prefixes and provenance go
    into the metadata under a key of saelab's own.
    """
    cfg, activation = coder.cfg, coder.cfg.activation
    architecture, extra = _name_architecture(coder)
    origin = provenance
    ours: dict[str, Any] = {"provenance": origin.to_dict() if origin else None}
    if isinstance(activation, BatchTopK):
        ours["batch_k"] = activation.k
    if isinstance(cfg.prefixes, tuple):
        ours["prefixes"] = list(cfg.prefixes)
    metadata = {
        "sae_lens_version": VERSION,
        "training_architecture": activation.name,
        "model_name": shareable(origin.model) if origin else None,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": _name_kwargs(origin),
        "hook_name": origin.hook_point if origin else None,
        "hook_name_out": origin.hook_point_out if origin else None,
        "hook_head_index": None,
        "context_size": origin.ctx_len if origin else None,
        "exclude_special_tokens": origin.mask.get("special") if origin else None,
        "dataset_path": shareable(origin.text) if origin else None,
        OURS: ours,
    }
    return {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": dtype_name(coder.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": cfg.d_out is None,
        "normalize_activations": {v: k for k, v in PER_TOKEN.items()}.get(cfg.normaliser, "none"),
        "reshape_activations": "none",
        "metadata": metadata,
        "architecture": architecture,
        **extra,
    }


def _name_kwargs(origin: Provenance | None) -> dict[str, Any]:
    if origin is None or origin.weight_processing == "none":
        return {}
    centred = {"center_writing_weights": True}
    return centred | {"fold_ln": True} if origin.weight_processing == "folded" else centred


def _name_architecture(coder: Coder) -> tuple[str, dict[str, Any]]:
    cfg, activation = coder.cfg, coder.cfg.activation
    if isinstance(cfg.encoder, MatchingPursuit):
        if activation.signed:
            raise ValueError(
                f"SAELens' matching pursuit must be of positive codes, got {activation}. It has no signed one."
            )
        pursuit = {"residual_threshold": cfg.encoder.residual_threshold, "max_iterations": activation.k}  # type: ignore[attr-defined]
        return "matching_pursuit", {**pursuit, "stop_on_duplicate_support": cfg.encoder.stop_on_repeat}
    thresholded = type(activation) in (JumpReLU, BatchTopK)
    if cfg.d_out is not None:
        if not thresholded and type(activation) is not ReLU:
            raise ValueError(
                f"SAELens' transcoders must be ReLU or JumpReLU, got {activation}. sparsify can say a TopK transcoder."
            )
        skip = "skip_" if cfg.skip else ""
        return ("jumprelu_" if thresholded else "") + skip + "transcoder", {"d_out": cfg.d_out}
    if thresholded:
        return "jumprelu", {}
    named = {ReLU: "standard", TopK: "topk", AbsTopK: "abstopk"}
    if type(activation) not in named:
        raise ValueError(
            f"SAELens must have a word for the activation, got {activation}: it knows no codes of both signs above a "
            "threshold, and no groups."
            if activation.signed or activation.name == "groupmax"
            else f"SAELens must have a word for the activation, got {activation}, which is one of your own."
        )
    extra = {"k": activation.k, "rescale_acts_by_decoder_norm": False} if isinstance(activation, TopK) else {}
    return named[type(activation)], extra


def find_parts(coder: Coder) -> dict[str, Tensor]:
    """Weights as SAELens uses them."""
    names: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
    if isinstance(coder.cfg.encoder, MatchingPursuit):
        names = ("W_dec", "b_dec")
    parts = {name: part for name in names if (part := getattr(coder, name)) is not None}
    if isinstance(coder.cfg.activation, BatchTopK):
        parts["threshold"] = parts["threshold"].expand(coder.cfg.d_sae)
    return parts


def write(folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    """Write weights and configuration.

    Args:
        folder: folder to write to.
        settings: configuration of the format, as `describe` returns it or as it was read.
        parts: weights by saelab's names, as `find_parts` returns them or as they were read.
        extras: further tensors by the format's own names, written unchanged.
    """
    named = dict(parts)
    if "W_skip" in named:
        named["W_skip"] = named["W_skip"].T
    if "code_scale" in named:
        named[CODE_SCALE] = named.pop("code_scale")
    if settings.get("architecture") in BATCHED:  # the file's own threshold is among the extras
        named.pop("threshold")
    elif "threshold" in named and named["threshold"].ndim == 0:
        named["threshold"] = named["threshold"].expand(len(named["W_dec"]))
    save_tensors(folder / WEIGHTS, named | dict(extras), {"format": "pt"})
    write_json(folder / CONFIG, settings)
