"""dictionary_learning's format: `ae.pt` and, of a training run, `config.json`; seven classes, recognized by their keys.

Orientations and biases differ between classes. AutoEncoderNew and JumpReluAutoEncoder subtract nothing from their
input; the others subtract their decoder's bias, under whatever name.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.activation_functions import BatchTopK, Gated, JumpReLU, ReLU, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.formats.conventions import Convention, read_with
from saelab.sae.formats.origin import ParsedSAE, SAEFacts
from saelab.sae.formats.sources import SAEFiles
from saelab.sae.module import SAEModule
from saelab.stores.files import write_atomic, write_json
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable

WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
KEYS: dict[str, dict[str, str]] = {
    "AutoEncoder": LINEAR | {"bias": "b_dec"},
    "AutoEncoderNew": LINEAR | {"decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    },
    "AutoEncoderTopK": LINEAR | {"b_dec": "b_dec"},
    "BatchTopKSAE": LINEAR | {"b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": PLAIN | {"threshold": "threshold"},
    "JumpReluAutoEncoder": PLAIN | {"threshold": "threshold"},
}
"""saelab's name for each key of a class"""
SUBTRACTS_NOTHING = ("AutoEncoderNew", "JumpReluAutoEncoder")
LINEAR_SPELLED = {"encoder_linear.": "encoder.", "decoder_linear.": "decoder."}
"""other spellings of the layers of the same class"""


def recognize(source: SAEFiles) -> bool:
    """Whether the file has the keys of one of dictionary_learning's classes."""
    return source.pickle is not None and bool(_find_classes(_respell(source.tensors(source.pickle))))


def _respell(held: Mapping[str, Any]) -> dict[str, Any]:
    for other, own in LINEAR_SPELLED.items():
        held = {key.replace(other, own) if key.startswith(other) else key: value for key, value in held.items()}
    return dict(held)


def _find_classes(held: Mapping[str, Any]) -> list[str]:
    """Names of the classes with these keys: one, or the two that share their keys."""
    keys = {key for key, value in held.items() if isinstance(value, Tensor)}
    if "W_enc" in keys:
        if not {*PLAIN, "threshold"} <= keys:
            return []
        return ["MatryoshkaBatchTopKSAE"] if "group_sizes" in keys else ["JumpReluAutoEncoder"]
    for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder"):
        if keys == set(KEYS[name]):
            return [name]
    return ["AutoEncoderTopK", "BatchTopKSAE"] if {*LINEAR, "b_dec"} <= keys else []


def read(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of the dictionary in a file.

    Raises:
        ValueError: where the file does not determine which of two classes it is, or a threshold was never set.
    """
    assert source.pickle is not None
    place, held = source.folder / source.pickle, _respell(source.tensors(source.pickle))
    settings = source.json_if_there(CONFIG)
    trainer = settings.get("trainer") or {}
    name = _choose_class(_find_classes(held), trainer.get("dict_class"), overrides, place)
    parts = {ours: held[theirs] for theirs, ours in KEYS[name].items()}
    if "encoder.weight" in KEYS[name]:
        parts["W_enc"], parts["W_dec"] = parts["W_enc"].T, parts["W_dec"].T
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        parts["threshold"] = _require_threshold(parts["threshold"], overrides, place)
    groups = held["group_sizes"].cumsum(0).tolist() if name == "MatryoshkaBatchTopKSAE" else None
    how = Convention(
        activation=overrides.activation or _choose_activation(name, held, trainer, place),
        prefixes=tuple(groups) if groups else None,
        subtracts_b_dec=name not in SUBTRACTS_NOTHING,
        scale=1.0 if overrides.scale is None else overrides.scale,
        scale_out=1.0 if overrides.scale is None else overrides.scale,
    )
    extras = {key: value for key, value in held.items() if key not in KEYS[name] and isinstance(value, Tensor)}
    return ParsedSAE(
        format="dictionary_learning",
        parts=parts,
        how=how,
        facts=_read_facts(settings),
        settings={"class": name, "file": source.pickle, CONFIG: settings or None},
        extras=extras,
    )


def _choose_class(found: list[str], said: str | None, overrides: SAEFacts, place: Path) -> str:
    """Name of the class. TopK and BatchTopK have the same keys; the run's configuration, or the caller's activation,
    decides.
    """
    if len(found) == 1:
        return found[0]
    if overrides.activation is not None:
        said = {TopK: "AutoEncoderTopK", BatchTopK: "BatchTopKSAE"}.get(type(overrides.activation))
    if said not in found:
        raise ValueError(
            f"`activation` must be given, as {place} may be an {' or a '.join(found)}, which choose other codes, "
            f"got {overrides.activation}; pass activation=saelab.TopK(k=...) or saelab.BatchTopK(k=...), or add its "
            "config.json."
        )
    return said


def _require_threshold(threshold: Tensor, overrides: SAEFacts, place: Path) -> Tensor:
    """Threshold of inference; dictionary_learning writes -1 where training has not set one."""
    if overrides.threshold is not None:
        return torch.tensor(overrides.threshold)
    if float(threshold) < 0:
        raise ValueError(
            f"`threshold` must be given, as training had not set that of {place} ({float(threshold):g}) and every "
            "positive pre-activation would fire, got none; pass threshold=0.5, or the one that gives the L0 you want."
        )
    return threshold


def _choose_activation(name: str, held: Mapping[str, Any], trainer: dict[str, Any], place: Path) -> Activation:
    if name in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        return JumpReLU()
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    k = trainer.get("k", held.get("k"))
    if k is None:
        raise ValueError(f"`activation` must be given, as {place} does not say k; pass activation=saelab.TopK(k=...).")
    return TopK(k=int(k)) if name == "AutoEncoderTopK" else BatchTopK(k=int(k))


def _read_facts(settings: dict[str, Any]) -> SAEFacts:
    """Model, hook point and context length; the hook point only where the submodule's name determines it, not from a
    layer's number alone.
    """
    trainer, buffer = settings.get("trainer") or {}, settings.get("buffer") or {}
    submodule = str(trainer.get("submodule_name"))
    named = re.fullmatch(r"resid_post_layer_(\d+)", submodule)
    written = submodule if re.fullmatch(r"(blocks\.\d+\.)?([\w]+\.)*hook_\w+", submodule) else None  # by `describe`
    return SAEFacts(
        model=trainer.get("lm_name"),
        hook_point=f"blocks.{named[1]}.hook_resid_post" if named else written,
        ctx_len=buffer.get("ctx_len"),
    )


def describe(coder: SAEModule, provenance: Provenance | None) -> dict[str, Any]:
    """Class name and configuration that express the SAE; ValueError where none does."""
    cfg, activation = coder.cfg, coder.cfg.activation
    if cfg.d_out is not None or cfg.encoder != "linear":
        what = "a transcoder" if cfg.d_out is not None else str(cfg.encoder)
        raise ValueError(f"dictionary_learning has autoencoders with one linear step only, got {what}; write saelens.")
    if cfg.normalizer != "none":
        raise ValueError(
            f"dictionary_learning reads activations as they are, got normalizer '{cfg.normalizer}', which measures "
            "every token; write saelens."
        )
    classes = {
        ReLU: "AutoEncoder",
        TopK: "AutoEncoderTopK",
        JumpReLU: "JumpReluAutoEncoder",
        Gated: "JumpReluAutoEncoder",
        BatchTopK: "BatchTopKSAE",
    }
    if type(activation) not in classes:
        raise ValueError(
            f"dictionary_learning knows {[c.__name__ for c in classes]}, got {activation}; it has no codes of both "
            "signs and no groups."
        )
    name = classes[type(activation)]
    if name == "BatchTopKSAE" and isinstance(cfg.prefixes, tuple):
        name = "MatryoshkaBatchTopKSAE"
    trainer = {
        "dict_class": name,
        "activation_dim": cfg.d_in,
        "dict_size": cfg.d_sae,
        "k": getattr(activation, "k", None),
        "lm_name": shareable(provenance.model) if provenance else None,
        "layer": _find_layer(provenance),
        "submodule_name": _name_submodule(provenance),
    }
    buffer = {"ctx_len": provenance.ctx_len if provenance else None}
    return {"class": name, "file": WEIGHTS, CONFIG: {"trainer": trainer, "buffer": buffer}}


def _find_layer(provenance: Provenance | None) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", provenance.hook_point) if provenance else None
    return int(found[1]) if found else None


def _name_submodule(provenance: Provenance | None) -> str | None:
    if provenance is None:
        return None
    layer = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", provenance.hook_point)
    return f"resid_post_layer_{layer[1]}" if layer else provenance.hook_point


def find_parts(coder: SAEModule) -> dict[str, Tensor]:
    """Weights as the SAE's class in dictionary_learning uses them."""
    parts = {name: getattr(coder, name).detach() for name in PLAIN}
    activation = coder.cfg.activation
    if type(activation) in (JumpReLU, Gated):  # JumpReluAutoEncoder does not subtract b_dec
        parts["b_enc"] = parts["b_enc"].float() - read_with(parts["W_enc"], parts["b_dec"])
    if coder.threshold is not None:
        parts["threshold"] = coder.threshold.detach()
    return parts


def find_extras(coder: SAEModule) -> dict[str, Tensor]:
    """Buffers that a class has in addition to its weights."""
    activation, prefixes = coder.cfg.activation, coder.cfg.prefixes
    extras: dict[str, Tensor] = {}
    if type(activation) in (TopK, BatchTopK):
        extras["k"] = torch.tensor(activation.k, dtype=torch.int32)  # type: ignore[attr-defined]
    if type(activation) is TopK:
        extras["threshold"] = torch.tensor(-1.0)
    if type(activation) is BatchTopK and isinstance(prefixes, tuple):
        ends = torch.tensor([0, *prefixes])
        extras["group_sizes"] = ends.diff()
    return extras


def write(folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    """Write the weights, and the run's configuration where there is one.

    Args:
        folder: folder to write to.
        settings: configuration of the format, as `describe` returns it or as it was read.
        parts: weights by saelab's names, as `find_parts` returns them or as they were read.
        extras: further tensors by the format's own names, written unchanged.
    """
    keys = KEYS[settings["class"]]
    named = {theirs: parts[ours] for theirs, ours in keys.items()}
    if "encoder.weight" in keys:
        named["encoder.weight"], named["decoder.weight"] = named["encoder.weight"].T, named["decoder.weight"].T
    buffer = io.BytesIO()
    torch.save({key: part.detach().cpu().contiguous() for key, part in (named | dict(extras)).items()}, buffer)
    write_atomic(folder / Path(settings["file"]).name, buffer.getvalue())
    if settings[CONFIG] is not None:
        write_json(folder / CONFIG, settings[CONFIG])
