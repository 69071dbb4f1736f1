"""sparsify's (eai-sparsify) format: `cfg.json` and `sae.safetensors`, a folder for each hook point.

`encoder.weight` is (d_sae, d_in), `W_dec` (d_sae, d_out), not transposed, `W_skip` (d_out, d_in). A transcoder
subtracts nothing from its input; everything else subtracts b_dec, whatever `normalize_decoder` is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.activation_functions import AbsTopK, GroupMax, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts
from saelab.sae.formats.sources import SAEFiles, require_number, require_tensors
from saelab.sae.module import SAEModule
from saelab.stores.files import save_tensors, write_json
from saelab.stores.manifest import Provenance
from saelab.stores.validation import read_json

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"


def recognize(source: SAEFiles) -> bool:
    """Whether the files are in sparsify's format."""
    return source.has(CONFIG, WEIGHTS) and "encoder.weight" in source.tensors(WEIGHTS)


def read(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of the SAE or transcoder in a folder; ValueError where its configuration does not fit its
    weights.

    The folder above may hold the run's `config.json`, which names the model; no file names the hook point.
    """
    place, settings = source.folder, source.settings(CONFIG)
    held = source.tensors(WEIGHTS)
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    parts = _to_parts(require_tensors(held, names, place / WEIGHTS))
    if isinstance(held.get("W_skip"), Tensor):
        parts["W_skip"] = held["W_skip"].T
    _check_width(settings, parts, place)
    if ("W_skip" in parts) != bool(settings.get("skip_connection")):
        raise ValueError(f"{place / CONFIG} must say whether there is a W_skip; it and the weights disagree.")
    how = Convention(
        activation=overrides.activation or _choose_activation(settings, place),
        transcodes=bool(settings.get("transcode")) or "W_skip" in parts,
        subtracts_b_dec=not settings.get("transcode"),
    )
    facts = _read_facts(place.parent / RUN)
    return ParsedSAE(format="sparsify", parts=parts, how=how, facts=facts, settings=settings)


def _to_parts(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "W_enc": held["encoder.weight"].T,
        "b_enc": held["encoder.bias"],
        "W_dec": held["W_dec"],
        "b_dec": held["b_dec"],
    }


def _check_width(settings: dict[str, Any], parts: Mapping[str, Tensor], place: Path) -> None:
    """Raise ValueError where the weights' shape is not the configuration's; `num_latents` 0 means
    `d_in * expansion_factor`.
    """
    d_in = require_number(settings, "d_in", place / CONFIG)
    d_sae = settings.get("num_latents") or d_in * require_number(settings, "expansion_factor", place / CONFIG)
    if tuple(parts["W_enc"].shape) != (d_in, d_sae):
        raise ValueError(
            f"encoder.weight in {place} must be ({d_sae}, {d_in}) by {CONFIG}, got {tuple(parts['W_enc'].T.shape)}."
        )


def _choose_activation(settings: dict[str, Any], place: Path) -> Activation:
    k, name = int(require_number(settings, "k", place / CONFIG)), settings.get("activation", "topk")
    if name == "groupmax":
        return GroupMax(k=k)
    if name != "topk":
        raise ValueError(f"`activation` in {place / CONFIG} must be topk or groupmax, got '{name}'.")
    return AbsTopK(k=k) if settings.get("signed") else TopK(k=k)


def _read_facts(run: Path) -> SAEFacts:
    said = read_json(run) if run.is_file() else {}
    if not isinstance(said, dict) or "sae" not in said:  # not a run of sparsify
        return SAEFacts()
    model, text, ctx_len = said.get("model"), said.get("dataset"), said.get("ctx_len")
    return SAEFacts(
        model=model if isinstance(model, str) else None,
        text=text if isinstance(text, str) else "unknown",
        ctx_len=ctx_len if isinstance(ctx_len, int) else None,
    )


def describe(coder: SAEModule, provenance: Provenance | None) -> dict[str, Any]:
    """sparsify configuration of an SAE; ValueError for what sparsify cannot express."""
    cfg, activation = coder.cfg, coder.cfg.activation
    if type(activation) not in (TopK, GroupMax) or cfg.encoder != "linear":
        got = activation if cfg.encoder == "linear" else cfg.encoder
        raise ValueError(f"sparsify knows TopK and GroupMax with a linear encoder, got {got}; write saelens.")
    if cfg.normalizer != "none":
        raise ValueError(
            f"sparsify reads activations as they are, got normalizer '{cfg.normalizer}', which measures every token."
        )
    if cfg.d_target != cfg.d_in:
        raise ValueError(f"sparsify's transcoders must write what they read in width ({cfg.d_in}), got {cfg.d_out}.")
    return {
        "activation": activation.name,
        "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
        "normalize_decoder": cfg.dictionary == "unit",
        "num_latents": cfg.d_sae,
        "k": activation.k,  # type: ignore[attr-defined]
        "multi_topk": False,
        "skip_connection": cfg.skip,
        "transcode": cfg.d_out is not None,
        "d_in": cfg.d_in,
    }


def find_parts(coder: SAEModule) -> dict[str, Tensor]:
    """Weights as sparsify uses them."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
    return {name: part for name in names if (part := getattr(coder, name)) is not None}


def write(folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    """Write weights and configuration.

    Args:
        folder: folder to write to.
        settings: configuration of the format, as `describe` returns it or as it was read.
        parts: weights by saelab's names, as `find_parts` returns them or as they were read.
        extras: further tensors by the format's own names, written unchanged.
    """
    named = {
        "encoder.weight": parts["W_enc"].T,
        "encoder.bias": parts["b_enc"],
        "W_dec": parts["W_dec"],
        "b_dec": parts["b_dec"],
    }
    if "W_skip" in parts:
        named["W_skip"] = parts["W_skip"].T
    save_tensors(folder / WEIGHTS, named | dict(extras), {"format": "pt"})
    write_json(folder / CONFIG, settings)
