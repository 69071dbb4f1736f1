"""overcomplete's SAEs (KempnerInstitute): state dicts of its modules, as `torch.save` or safetensors wrote them.

    z = activation(x weight^T + bias),   x_hat = z D

with D = exp(multiplier) times the rows `dictionary._weights`, or times `W C + Relax` of an archetypal dictionary
(arXiv:2502.12892). No bias is subtracted from x or added to x_hat. The library itself has no files: its users save
whole modules, which only running code could read and which are refused, or state dicts. These leave out the class, k,
the running threshold of `BatchTopKSAE` and the normalization of the dictionary, which the module applies anew in each
forward of training and in `eval()`. Those are the caller's to give, or `config.json`'s beside the file:

    {"sae_class": "TopKSAE", "arguments": {"top_k": 16, "dictionary_params": {"normalization": "l2"}}}

with the arguments of the module's constructor, which saelab writes.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.sae.activation_functions import BatchTopK, Gated, JumpReLU, ReLU, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts, require
from saelab.sae.formats.sources import SAEFiles, require_number, require_tensors
from saelab.sae.module import SAEModule
from saelab.stores.files import save_tensors, write_atomic, write_json
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable
from saelab.stores.validation import require_object

CONFIG, WEIGHTS = "config.json", "sae.pt"
LINEAR, TIEABLE = "encoder.final_block.0.", "encoder."
NORM, TIED = "encoder.final_block.1.", "encoder.tied_to."
ROWS, FACTOR, THRESHOLDS, LEVELS = "dictionary._weights", "dictionary.multiplier", "thresholds", "Q"
POINTS, MIX, OFFSETS = "dictionary.C", "dictionary.W", "dictionary.Relax"
NORM_EPS = 1e-5  # of PyTorch's BatchNorm1d, which the library leaves as it is
SMALL = 1e-8  # what it adds to the norms that it divides by
CLOSE = 1e-5  # rows whose norms are within this of 1, or the dtype's precision, were normalized before they were saved
READ = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE")
CLASSES: dict[type, str] = {ReLU: "SAE", TopK: "TopKSAE", JumpReLU: "JumpSAE", Gated: "JumpSAE", BatchTopK: "JumpSAE"}
NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")


def recognize(source: SAEFiles) -> bool:
    """Whether the file has the dictionary of one of overcomplete's modules."""
    name = _find_file(source)
    return name is not None and _is_dictionary(source.tensors(name))


def _is_dictionary(held: Mapping[str, Any]) -> bool:
    return FACTOR in held and (ROWS in held or {POINTS, MIX, OFFSETS} <= set(held))


def _find_file(source: SAEFiles) -> str | None:
    """Name of the weights file: a PyTorch file, or one of safetensors that was named."""
    if source.file is not None and source.file.endswith(".safetensors"):
        return source.file
    return source.pickle


def read(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of the SAE in a file.

    Raises:
        ValueError: where the class, its k or its threshold are not said, where the rows of the dictionary were not
            normalized and it is not said how, and for encoders and activation functions that saelab has no axis for.
    """
    name = _find_file(source)
    assert name is not None
    place, held = source.folder / name, source.tensors(name)
    settings = source.json_if_there(CONFIG)
    arguments = settings.get("arguments") or {}
    _refuse(held, settings, place)
    W_dec, as_it_is = _read_dictionary(held, arguments, bool(settings), place)
    parts, keys = _read_encoder(held, W_dec, place)
    parts |= {"W_dec": W_dec, "b_dec": torch.zeros(W_dec.shape[1])}
    keys |= {ROWS: "W_dec"} if as_it_is and "W_enc" in keys.values() else {}
    activation, threshold = _choose_activation(held, settings, overrides, place)
    if threshold is not None:
        parts["threshold"] = _just_below(threshold)
    kept = settings or _name_settings(activation, W_dec, threshold, ROWS not in held)
    extras = {key: tensor for key, tensor in held.items() if key not in keys and isinstance(tensor, Tensor)}
    made = {
        ours: part for ours, part in parts.items() if ours not in keys.values()
    }  # tells whether the SAE has changed
    return ParsedSAE(
        format="overcomplete",
        parts=parts,
        how=Convention(activation=activation),
        facts=_read_facts(settings),
        settings={"file": name, "keys": keys, CONFIG: kept},
        extras=extras | made,
    )


def _refuse(held: Mapping[str, Any], settings: Mapping[str, Any], place: Path) -> None:
    """Raise ValueError for classes that saelab has no axis for."""
    name = settings.get("sae_class")
    if LEVELS in held or name not in (*READ, None):
        raise ValueError(f"{place} must be of {', '.join(READ)}, got {name or 'QSAE'}, which saelab has no axis for.")
    if not any(key.startswith(TIEABLE) for key in held):
        raise ValueError(
            f"{place} must hold a linear encoder, got none: that of MpSAE and OMPSAE, whose codes take what correlates "
            "most, of either sign or by another least squares than saelab's pursuits."
        )


def _read_encoder(held: Mapping[str, Any], W_dec: Tensor, place: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """W_enc and b_enc, and the keys whose tensors they are unchanged; BatchNorm of inference is a part of both."""
    start = LINEAR if f"{LINEAR}weight" in held else TIEABLE
    normed = {f"{NORM}{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    layers = {key for key in held if key.startswith("encoder.")}
    tied = {key for key in layers if key.startswith(TIED)}
    known = {f"{start}weight", f"{start}bias"} | tied | (normed if f"{NORM}running_mean" in held else set())
    if unknown := sorted(layers - known):
        raise ValueError(
            f"{place} must hold a linear encoder, alone or with BatchNorm, got {unknown[:5]}, which saelab has no axis "
            "for."
        )
    keys = {} if tied else {f"{start}weight": "W_enc"}
    keys |= {f"{start}bias": "b_enc"} if f"{start}bias" in held else {}
    found = require_tensors(held, tuple(keys), place)
    parts = {"W_enc": W_dec, "b_enc": torch.zeros(len(W_dec))} | {keys[key]: tensor for key, tensor in found.items()}
    parts["W_enc"] = parts["W_enc"].T
    return (_merge_norm(parts, held, place), {}) if f"{NORM}running_mean" in held else (parts, keys)


def _merge_norm(parts: dict[str, Tensor], held: Mapping[str, Any], place: Path) -> dict[str, Tensor]:
    """BatchNorm in inference is a gain and an offset for each latent, computed in float64."""
    names = ("weight", "bias", "running_mean", "running_var")
    gain, offset, mean, var = (
        tensor.double() for tensor in require_tensors(held, tuple(f"{NORM}{name}" for name in names), place).values()
    )
    gain = gain / (var + NORM_EPS).sqrt()
    return {
        "W_enc": (parts["W_enc"].double() * gain).float(),
        "b_enc": ((parts["b_enc"].double() - mean) * gain + offset).float(),
    }


def _factor(held: Mapping[str, Any], key: str, place: Path) -> float:
    factor = math.exp(min(float(require_tensors(held, (key,), place)[key]), 80.0))
    if not math.isfinite(factor) or factor == 0:
        raise ValueError(f"{place} must hold a finite `{key}`, got {held[key]}. Training had failed.")
    return factor


def _read_dictionary(
    held: Mapping[str, Any], arguments: Mapping[str, Any], said: bool, place: Path
) -> tuple[Tensor, bool]:
    """The dictionary as the module uses it, and whether it is the file's tensor unchanged."""
    factor = _factor(held, FACTOR, place)
    if ROWS not in held:
        delta = require_number({"delta": 1.0} | dict(arguments), "delta", place.parent / CONFIG) if said else None
        return _mix(held, delta, place).mul(factor).float(), False
    rows = _require_floats(held, (ROWS,), place)[ROWS]
    params = require_object(arguments.get("dictionary_params") or {}, "`dictionary_params`")
    kind = params.get("normalization", "l2") if said else _find_normalization(rows, place)
    if kind not in NORMALIZATIONS:
        raise ValueError(f"`normalization` in {place.parent / CONFIG} must be one of {NORMALIZATIONS}, got {kind!r}.")
    if kind == "identity" or _is_normalized(rows, kind):
        return (rows, True) if factor == 1 else ((rows.double() * factor).float(), False)
    return (_normalize(rows.double(), kind) * factor).float(), False


def _require_floats(held: Mapping[str, Any], names: tuple[str, ...], place: Path) -> dict[str, Tensor]:
    found = require_tensors(held, names, place)
    if wrong := [name for name, part in found.items() if not part.is_floating_point() or part.ndim != 2]:
        got = found[wrong[0]]
        raise ValueError(
            f"{place} must hold matrices of floating-point numbers, got {got.dtype} of shape {tuple(got.shape)} for "
            f"{wrong[0]}. Is it another file?"
        )
    return found


def _norms(rows: Tensor, kind: str) -> Tensor:
    """What rows are divided by: the norm of each, or the largest."""
    norms = rows.norm(p=int(kind[-1]), dim=1, keepdim=True)
    return norms.amax(0, keepdim=True) if kind.startswith("max_") else norms


def _normalize(rows: Tensor, kind: str) -> Tensor:
    norms = _norms(rows, kind)
    return rows / (norms if kind.startswith("max_") else norms + SMALL)


def _is_normalized(rows: Tensor, kind: str) -> bool:
    norms = _norms(rows.float(), kind)
    return bool((((norms - 1).abs() < max(CLOSE, torch.finfo(rows.dtype).eps)) | (norms == 0)).all())


def _find_normalization(rows: Tensor, place: Path) -> str:
    """How the rows were normalized, where they are; ValueError for a dictionary in the middle of training."""
    found = next((kind for kind in NORMALIZATIONS[:4] if _is_normalized(rows, kind)), None)
    if found is None:
        norms = rows.float().norm(dim=1)
        raise ValueError(
            f"{place} must hold a dictionary whose rows were normalized, got norms from {norms.min():.4g} to "
            f"{norms.max():.4g}: the module does that in eval(). Save it once more: sae.eval(); "
            'torch.save(sae.state_dict(), path); or put config.json beside it, with {"sae_class": "TopKSAE", '
            '"arguments": {"top_k": 16, "dictionary_params": {"normalization": "l2"}}} ("identity": none).'
        )
    return found


def _mix(held: Mapping[str, Any], delta: float | None, place: Path) -> Tensor:
    """`W C + Relax` in float64, with rows of W on the simplex and rows of Relax up to the length `delta`, which None
    takes for done.
    """
    found = _require_floats(held, (POINTS, MIX, OFFSETS), place)
    points, mix, offsets = (tensor.double() for tensor in found.values())
    sums, near = mix.sum(1), max(CLOSE, torch.finfo(found[MIX].dtype).eps)
    done = bool((mix >= 0).all()) and bool((((sums - 1).abs() < near) | (sums == 0)).all())
    if not done:
        if delta is None:
            raise ValueError(
                f"{place} must hold an archetypal dictionary whose rows of W are shares, got sums from "
                f"{sums.min():.4g} to {sums.max():.4g}: the module makes them so in eval(). Save it once more: "
                "sae.eval(); torch.save(sae.state_dict(), path); or put config.json beside it, with "
                '{"sae_class": "RATopKSAE", "arguments": {"top_k": 16, "delta": 1.0}}.'
            )
        mix = mix.relu() / (mix.relu().sum(1, keepdim=True) + SMALL)
        offsets = offsets * (delta / offsets.norm(dim=1, keepdim=True)).clamp(max=1)
    return mix @ points + offsets


def _choose_activation(
    held: Mapping[str, Any], settings: Mapping[str, Any], overrides: SAEFacts, place: Path
) -> tuple[Activation, Tensor | None]:
    """The activation function and its threshold, for a pre-activation that reaches it."""
    name, arguments = settings.get("sae_class"), settings.get("arguments") or {}
    if isinstance(held.get(THRESHOLDS), Tensor):
        return overrides.activation or JumpReLU(), held[THRESHOLDS].float().exp()
    if overrides.activation is None and name == "SAE":
        return ReLU(), None
    if overrides.activation is None and name in ("TopKSAE", "RATopKSAE"):
        where = place.parent / CONFIG
        return TopK(k=int(require_number(dict(arguments), "top_k", where))), None
    activation = overrides.activation or (JumpReLU() if name == "BatchTopKSAE" else None)
    if activation is None:
        raise ValueError(
            f"`activation` must be given, as {place} does not say its class, got none; pass saelab.TopK(k=16) for a "
            "TopKSAE of that top_k, saelab.ReLU() for a plain SAE, or saelab.JumpReLU() with threshold= for a "
            "BatchTopKSAE, whose running_threshold no state dict holds."
        )
    if activation.threshold == "none":
        return activation, None
    running = overrides.threshold if overrides.threshold is not None else settings.get("running_threshold")
    running = require(running, "threshold", "the running_threshold of a BatchTopKSAE", "float(sae.running_threshold)")
    return activation, torch.tensor(float(running))


def _just_below(threshold: Tensor) -> Tensor:
    """The next smaller number: overcomplete's codes fire at their threshold, saelab's above it."""
    return torch.nextafter(threshold, torch.tensor(0.0))


def _read_facts(settings: Mapping[str, Any]) -> SAEFacts:
    return SAEFacts(model=settings.get("model_name"), hook_point=settings.get("hook_point"))


def describe(coder: SAEModule, provenance: Provenance | None) -> dict[str, Any]:
    """Class and constructor's arguments that express the SAE; ValueError where none does.

    Gated, and BatchTopK once its threshold is set, are written as the JumpReLU that they are equivalent to.
    """
    cfg, activation = coder.cfg, coder.cfg.activation
    if cfg.d_out is not None or cfg.encoder != "linear" or cfg.normalizer != "none":
        what = "a transcoder" if cfg.d_out is not None else f"encoder {cfg.encoder}, normalizer '{cfg.normalizer}'"
        raise ValueError(f"overcomplete has autoencoders with one linear step only, got {what}; write saelens.")
    if bool(coder.b_dec.any()):
        raise ValueError(
            "overcomplete adds no bias to a reconstruction, got a b_dec that is not 0; subtract the mean from the "
            "activations before training, or write saelens."
        )
    if type(activation) not in CLASSES:
        raise ValueError(
            f"overcomplete knows {[c.__name__ for c in CLASSES]}, got {activation}; it has no codes of both signs and "
            "no groups."
        )
    settings = _name_settings(activation, coder.W_dec)
    if provenance is not None:
        settings |= {"model_name": shareable(provenance.model), "hook_point": provenance.hook_point}
    keys = {f"{LINEAR}weight": "W_enc", f"{LINEAR}bias": "b_enc", ROWS: "W_dec"}
    return {"file": WEIGHTS, "keys": keys, CONFIG: settings}


def _name_settings(
    activation: Activation, W_dec: Tensor, running: Tensor | None = None, mixes: bool = False
) -> dict[str, Any]:
    """Configuration of an SAE whose rows are used as they are.

    Args:
        activation: activation function.
        W_dec: dictionary, for its widths.
        running: running threshold of a BatchTopKSAE, one number; thresholds of each latent are in the state dict.
        mixes: whether the dictionary is archetypal.
    """
    arguments: dict[str, Any] = {"input_shape": W_dec.shape[1], "nb_concepts": W_dec.shape[0]}
    name = CLASSES.get(type(activation), "SAE")
    said: dict[str, Any] = {}
    if running is not None and running.ndim == 0:
        name, said = "BatchTopKSAE", {"running_threshold": float(running)}
    if isinstance(activation, TopK | BatchTopK) and name != "JumpSAE":
        arguments["top_k"] = activation.k
    if not mixes:
        arguments["dictionary_params"] = {"normalization": "identity"}
    return {
        "sae_class": f"RA{name}" if mixes and name in ("TopKSAE", "JumpSAE") else name,
        "arguments": arguments,
    } | said


def find_parts(coder: SAEModule) -> dict[str, Tensor]:
    """Weights as overcomplete uses them."""
    return {name: getattr(coder, name).detach() for name in ("W_enc", "b_enc", "W_dec")}


def find_extras(coder: SAEModule) -> dict[str, Tensor]:
    """The dictionary's factor, 1, and the logarithms of thresholds."""
    extras = {FACTOR: torch.tensor(0.0)}
    if coder.threshold is not None:
        if bool((coder.threshold < 0).any()):
            raise ValueError(f"overcomplete's thresholds are positive, got {float(coder.threshold.min()):.3g}.")
        extras[THRESHOLDS] = coder.threshold.detach().double().log().float().expand(coder.cfg.d_sae)
    return extras


def write(folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> None:
    """Write the state dict, and the configuration where there is one.

    Args:
        folder: folder to write to.
        settings: file, keys and configuration, as `describe` returns them or as they were read.
        parts: weights by saelab's names, as `find_parts` returns them or as they were read.
        extras: further tensors by the format's own names, written unchanged.
    """
    named = {key: parts[ours].T if ours == "W_enc" else parts[ours] for key, ours in settings["keys"].items()}
    plain = {key: part.detach().cpu().contiguous() for key, part in (named | dict(extras)).items()}
    file = folder / Path(settings["file"]).name
    if file.suffix == ".safetensors":
        save_tensors(file, plain, {"format": "pt"})
    else:
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        write_atomic(file, buffer.getvalue())
    if settings[CONFIG] is not None:
        write_json(folder / CONFIG, settings[CONFIG])
