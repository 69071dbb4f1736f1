"""SAELens' format: `cfg.json` and `sae_weights.safetensors`, read and written.

W_enc is (d_in, d_sae), W_dec (d_sae, d_out), but W_skip (d_out, d_in). Read are the architectures of SAELens 6, its
training checkpoints of BatchTopK, and configurations from before 6.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.activation_functions import AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.encoders import MatchingPursuit, PursuitEncoder, Refined
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts, describe_mask, dtype_name, name_processing, require
from saelab.sae.formats.sources import SAEFiles, require_number, require_tensors
from saelab.sae.module import SAEModule
from saelab.sae.normalizer import NormalizerKind
from saelab.stores.files import save_tensors, write_json
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
TRANSCODERS = {
    "transcoder": False,
    "skip_transcoder": False,
    "jumprelu_transcoder": True,
    "jumprelu_skip_transcoder": True,
}
"""transcoder architectures, and whether they have thresholds"""
BATCHED = ("batchtopk", "matryoshka_batchtopk")
"""architectures of training checkpoints, which SAELens converts to jumprelu at the end of training"""
PER_TOKEN: dict[str, NormalizerKind] = {"constant_norm_rescale": "token_norm", "layer_norm": "layer_norm"}
SCALED = "expected_average_only_in"
CODE_SCALE = "scaling_factor"
"""factor on codes before decoding, in files from before 6.0"""
OURS = "saelab"
"""key in `metadata` under which saelab stores what SAELens' format cannot express"""
VERSION = "6.0.0"
"""SAELens version whose configuration is written"""


def recognize(source: SAEFiles) -> bool:
    """Whether the files are in SAELens' format."""
    return source.has(CONFIG, WEIGHTS) and "W_dec" in source.tensors(WEIGHTS) and "d_in" in source.json(CONFIG)


def read(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of the SAE in a folder; ValueError for an unsupported architecture, and for facts that the
    caller has to give.
    """
    place = source.folder
    settings = source.settings(CONFIG)
    cfg = modernise(settings)
    held = dict(source.tensors(WEIGHTS))
    ours = cfg["metadata"].get(OURS) or {}
    names = _name_parts(cfg, held)
    parts = require_tensors(held, names, place / WEIGHTS)
    code_scale = _find_code_scale(cfg, held, place)
    used = (*names, CODE_SCALE) if code_scale else names
    extras = {name: value for name, value in held.items() if name not in used}
    parts |= code_scale
    if "W_skip" in parts:
        parts["W_skip"] = parts["W_skip"].T
    activation = overrides.activation or _choose_activation(cfg, ours, parts, place)
    if type(activation) is BatchTopK:
        parts["threshold"] = _one_threshold(parts.get("threshold", held.get("topk_threshold")), place)
        if "threshold" not in held:  # under another name: kept, so that a change of it is noticed
            extras["threshold"] = parts["threshold"]
    scale = _find_scale(cfg, source, overrides)
    how = Convention(
        activation=activation,
        encoder=_choose_encoder(cfg),
        prefixes=tuple(ours["prefixes"]) if ours.get("prefixes") else None,
        transcodes=cfg["architecture"] in TRANSCODERS,
        subtracts_b_dec=bool(cfg.get("apply_b_dec_to_input", True)),
        decoder_norms="codes" if cfg.get("rescale_acts_by_decoder_norm") else "none",
        scale=scale,
        scale_out=scale,
        normalizer=PER_TOKEN.get(cfg["normalize_activations"], "none"),
    )
    facts = _read_facts(cfg["metadata"], ours)
    return ParsedSAE(format="saelens", parts=parts, how=how, facts=facts, settings=settings, extras=extras)


def modernise(settings: dict[str, Any]) -> dict[str, Any]:
    """Configuration in the form of SAELens 6, with its metadata; those from before 6.0 are flat."""
    cfg = dict(settings)
    metadata = dict(cfg.get("metadata") or {})
    version = cfg.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version is None or int(re.match(r"\d*", str(version)).group() or 0) < 6:  # type: ignore[union-attr]
        renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
        cfg = {renamed.get(key, key): value for key, value in cfg.items()}
        cfg["activation_fn"] = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"
        cfg["architecture"] = cfg.get("architecture") or "standard"
        if cfg["activation_fn"] == "topk":
            cfg["architecture"] = "topk"
            cfg["k"] = (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))
        metadata = cfg | metadata
    normalize = cfg.get("normalize_activations")
    cfg["normalize_activations"] = {None: "none", False: "none", True: SCALED}.get(normalize, normalize)
    cfg["metadata"] = metadata
    return cfg


def _name_parts(cfg: dict[str, Any], held: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of an architecture's tensors; ValueError for an unsupported one."""
    architecture = cfg.get("architecture")
    basic = ("W_enc", "b_enc", "W_dec", "b_dec")
    if architecture in TRANSCODERS:
        threshold = ("threshold",) if TRANSCODERS[architecture] else ()
        return (*basic, *threshold, *(("W_skip",) if "skip" in architecture else ()))
    known = {
        "standard": basic,
        "topk": basic,
        "abstopk": basic,
        "batchtopk": basic,
        "matryoshka_batchtopk": basic,
        "jumprelu": (*basic, "threshold"),
        "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
        "matching_pursuit": ("W_dec", "b_dec"),
    }
    if architecture not in known:
        raise ValueError(
            f"`architecture` of a SAELens file must be one of {sorted([*known, *TRANSCODERS])}, got {architecture!r}, "
            "which is no point on saelab's axes."
        )
    return known[architecture]


def _choose_activation(
    cfg: dict[str, Any], ours: dict[str, Any], parts: Mapping[str, Tensor], place: Path
) -> Activation:
    architecture = cfg["architecture"]
    if ours.get("batch_k"):
        return BatchTopK(k=int(ours["batch_k"]))
    if architecture in BATCHED:
        return BatchTopK(k=max(1, round(require_number(cfg, "k", place / CONFIG))))
    if architecture in ("topk", "abstopk"):
        k = int(require_number(cfg, "k", place / CONFIG))
        return AbsTopK(k=k) if architecture == "abstopk" else TopK(k=k)
    if architecture == "matching_pursuit":
        return TopK(k=int(cfg.get("max_iterations") or parts["W_dec"].shape[1]))
    if architecture == "gated" or "threshold" in parts:
        return JumpReLU()
    if (name := cfg.get("activation_fn", "relu")) != "relu":
        raise ValueError(f"`activation_fn` in {place / CONFIG} must be relu or topk, got '{name}'.")
    return ReLU()


def _choose_encoder(cfg: dict[str, Any]) -> Any:
    if cfg["architecture"] != "matching_pursuit":
        return "linear"
    return MatchingPursuit(
        residual_threshold=float(cfg.get("residual_threshold", 1e-2)),
        stop_on_repeat=bool(cfg.get("stop_on_duplicate_support", True)),
    )


def _one_threshold(threshold: Tensor | None, place: Path) -> Tensor:
    """The common value of a vector of equal thresholds."""
    if threshold is None or not bool((threshold.float() == threshold.flatten()[0].float()).all()):
        raise ValueError(f"{place} must hold one threshold for all latents of a BatchTopK SAE, got others or none.")
    return threshold.flatten()[0]


def _find_code_scale(cfg: dict[str, Any], held: Mapping[str, Any], place: Path) -> dict[str, Tensor]:
    """Factors on the codes before decoding, where an SAE was fine-tuned with them; else empty."""
    scale = held.get(CODE_SCALE)
    if not isinstance(scale, Tensor) or bool((scale.float() == 1).all()):
        return {}
    if not cfg.get("finetuning_scaling_factor"):
        raise ValueError(
            f"{place} must say `finetuning_scaling_factor` for its scaling_factor to be used, got "
            f"{cfg.get('finetuning_scaling_factor')!r}. What the factors are for is not known."
        )
    return {"code_scale": scale}


def _find_scale(cfg: dict[str, Any], source: SAEFiles, overrides: SAEFacts) -> float:
    """Factor on the activations before the encoder. SAELens folds it into the weights at the end of training, so a file
    whose configuration still has one lacks its value; training checkpoints have it in a file next to them.
    """
    normalize = cfg["normalize_activations"]
    if normalize not in ("none", SCALED, *PER_TOKEN):
        raise ValueError(f"`normalize_activations` must be none, {SCALED} or {list(PER_TOKEN)}, got '{normalize}'.")
    scale = overrides.scale
    if normalize == SCALED:
        stored = source.json_if_there(SCALER).get("scaling_factor")
        what = "what activations were multiplied by (sqrt(d_in) / their mean norm; 1.0 if that is folded in)"
        known = next((value for value in (scale, stored, overrides.likely_scale) if value is not None), None)
        scale = float(require(known, "scale", what, "0.25"))
    if cfg["architecture"] in TRANSCODERS and scale not in (None, 1.0):
        raise ValueError(
            f"A transcoder's scale must be folded into its weights, got {scale} for {source.folder}: the file does not "
            "say what its target was multiplied by. Fold it with SAELens, and pass scale=1.0."
        )
    return 1.0 if scale is None else scale


def _read_facts(metadata: dict[str, Any], ours: dict[str, Any]) -> SAEFacts:
    how = metadata.get("model_from_pretrained_kwargs") or {}
    hook_point = metadata.get("hook_name")
    seqpos: tuple[Any, ...] = tuple(metadata.get("seqpos_slice") or (None,))
    special = metadata.get("exclude_special_tokens")
    stop = seqpos[1] if len(seqpos) > 1 else None
    mask = describe_mask(bool(special), seqpos[0] or 0, stop) if special is not None and (stop or 1) > 0 else {}
    return SAEFacts(
        model=metadata.get("model_name"),
        hook_point=hook_point,
        hook_point_out=metadata.get("hook_name_out"),
        weight_processing=name_processing(
            hook_point, centered=bool(how.get("center_writing_weights")), folded=bool(how.get("fold_ln"))
        ),
        text=metadata.get("dataset_path") or "unknown",
        ctx_len=metadata.get("context_size"),
        mask=mask,
        provenance=ours.get("provenance"),
        complete=bool(ours),
    )


def describe(coder: SAEModule, provenance: Provenance | None) -> dict[str, Any]:
    """SAELens configuration of an SAE without a linear normalizer; ValueError for what SAELens cannot express.

    Gated, and BatchTopK once its threshold is set, are written as the JumpReLU that they are equivalent to; prefixes
    and provenance go into the metadata under a key of saelab's own.
    """
    cfg, activation = coder.cfg, coder.cfg.activation
    if isinstance(cfg.encoder, Refined):
        raise ValueError(f"SAELens' encoders must read activations alone, got {cfg.encoder}, which reads its error.")
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
        "normalize_activations": {v: k for k, v in PER_TOKEN.items()}.get(cfg.normalizer, "none"),
        "reshape_activations": "none",
        "metadata": metadata,
        "architecture": architecture,
        **extra,
    }


def _name_kwargs(origin: Provenance | None) -> dict[str, Any]:
    if origin is None or origin.weight_processing == "none":
        return {}
    centered = {"center_writing_weights": True}
    return centered | {"fold_ln": True} if origin.weight_processing == "folded" else centered


def _name_architecture(coder: SAEModule) -> tuple[str, dict[str, Any]]:
    cfg, activation = coder.cfg, coder.cfg.activation
    if isinstance(cfg.encoder, Refined):
        raise ValueError(f"SAELens' encoders must read activations alone, got {cfg.encoder}, which reads its error.")
    if isinstance(cfg.encoder, PursuitEncoder):
        if not isinstance(cfg.encoder, MatchingPursuit):
            raise ValueError(f"SAELens' pursuit must be MatchingPursuit, got {cfg.encoder}. It has no least squares.")
        if activation.signed:
            raise ValueError(
                f"SAELens' matching pursuit must be of positive codes, got {activation}. It has no signed one."
            )
        pursuit = {"residual_threshold": cfg.encoder.residual_threshold, "max_iterations": activation.k}  # type: ignore[attr-defined]
        return "matching_pursuit", {**pursuit, "stop_on_duplicate_support": cfg.encoder.stop_on_repeat}
    thresholded = type(activation) in (JumpReLU, Gated, BatchTopK)
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


def find_parts(coder: SAEModule) -> dict[str, Tensor]:
    """Weights as SAELens uses them."""
    names: tuple[str, ...] = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold")
    if isinstance(coder.cfg.encoder, PursuitEncoder):
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
