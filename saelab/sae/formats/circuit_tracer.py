"""circuit-tracer's files: of a transcoder of one layer, and of a cross-layer transcoder. Inputs are read as they are.

A transcoder of layer l is `layer_l.safetensors` with `W_enc` (d_sae, d_in), `b_enc`, `W_dec` (d_sae, d_out), `b_dec`
and, of a JumpReLU, `activation_function.threshold`; `W_skip` (d_out, d_in) is a skip connection.

Of each layer l of L of a cross-layer transcoder `W_enc_l.safetensors` holds `W_enc_l` (d_sae, d_in), `b_enc_l`,
`b_dec_l` and, of a JumpReLU, `threshold_l`; `W_dec_l.safetensors` holds `W_dec_l` (d_sae, L - l, d_out), whose second
axis are the outputs l, l + 1, ... crosslayer-transcoder and CLT-Forge export these, too. SAELens has no format of its
own for them: it reads these files a layer at a time, as a ReLU transcoder whose decoders are summed, for feature
activations only. So thresholds are lost there.

`config.yaml` names the model and, after `blocks.l.`, the hook points.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.sae.activation_functions import BatchTopK, Gated, JumpReLU, ReLU
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts
from saelab.sae.formats.sources import SAEFiles, read_tensors, require_tensors
from saelab.sae.module import SAEModule
from saelab.stores.files import replace_folder, save_tensors, write_atomic
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable
from saelab.stores.tensors import read_header
from saelab.stores.validation import naming

CONFIG = "config.yaml"
ENCODER = re.compile(r"W_(enc|dec)_(\d+)\.safetensors")
LAYER = re.compile(r"layer_(\d+)\.safetensors")
PARTS, THRESHOLD, SKIP = ("W_enc", "b_enc", "W_dec", "b_dec"), "activation_function.threshold", "W_skip"
LINE = re.compile(r"(\w+):[ \t]*(.*?)[ \t]*")
QUOTED = re.compile(r"'((?:[^']|'')*)'")
NULLS = ("~", "null", "Null", "NULL")
KIND, READ, WRITTEN, MODEL = "model_kind", "feature_input_hook", "feature_output_hook", "model_name"
OF_LAYERS, CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"
"""kinds of folders that circuit-tracer knows"""
DEFAULTS = {READ: "hook_resid_mid", WRITTEN: "hook_mlp_out"}
"""hook points that circuit-tracer takes where its configuration names none"""


def recognize_transcoder(source: SAEFiles) -> bool:
    """Whether the file is a transcoder of one layer."""
    if source.file is None or not LAYER.fullmatch(source.file):
        return False
    names = set(source.tensors(source.file))
    return set(PARTS) <= names <= {*PARTS, THRESHOLD, SKIP}


def read_transcoder(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of a layer's file: `z = activation(x W_enc^T + b_enc)`, `z W_dec + x W_skip^T + b_dec`.

    The layer is that of the file's name, hook points and model those of `config.yaml` beside it.

    Raises:
        ValueError: for tensors that are missing, and thresholds below 0, which let negative codes pass there.
    """
    assert source.file is not None
    place, held = source.folder / source.file, source.tensors(source.file)
    parts = require_tensors(held, PARTS, place)
    parts["W_enc"] = parts["W_enc"].T
    for ours, theirs in (("threshold", THRESHOLD), (SKIP, SKIP)):
        if theirs in held:
            parts |= {ours: require_tensors(held, (theirs,), place)[theirs]}
    if SKIP in parts:
        parts[SKIP] = parts[SKIP].T
    if "threshold" in parts:
        _require_positive(parts["threshold"], place)
    found, facts, settings = LAYER.fullmatch(source.file), SAEFacts(), _read_settings(source.folder / CONFIG)
    if found and (source.folder / CONFIG).is_file():
        said = DEFAULTS | settings
        block = f"blocks.{int(found[1])}"
        facts = SAEFacts(
            model=said.get(MODEL), hook_point=f"{block}.{said[READ]}", hook_point_out=f"{block}.{said[WRITTEN]}"
        )
    activation = overrides.activation or (JumpReLU() if "threshold" in parts else ReLU())
    how = Convention(activation=activation, transcodes=True, subtracts_b_dec=False)
    kept = {"file": source.file, CONFIG: settings or None}
    return ParsedSAE(format="circuit_tracer", parts=parts, how=how, facts=facts, settings=kept)


def describe_transcoder(coder: SAEModule, provenance: Provenance | None) -> dict[str, Any]:
    """Name of the layer's file, and the settings of `config.yaml`; ValueError for what circuit-tracer has no files for.

    Gated, and BatchTopK once its threshold is set, are written as the JumpReLU that they are equivalent to.
    """
    cfg = coder.cfg
    if cfg.d_out is None or cfg.d_out != cfg.d_in:
        what = "an autoencoder" if cfg.d_out is None else f"d_in {cfg.d_in} and d_out {cfg.d_out}"
        raise ValueError(
            f"circuit-tracer's transcoders must read and write places of one width, got {what}; write saelens."
        )
    if type(cfg.activation) not in (ReLU, JumpReLU, Gated, BatchTopK):
        raise ValueError(
            f"circuit-tracer's files hold ReLU and a threshold for each latent, got {cfg.activation}. Give latents "
            "thresholds first: sae.to_jumprelu(activations)."
        )
    if provenance is None:
        raise ValueError(
            "circuit-tracer's files are named by the layer, which a transcoder without provenance does not say, got "
            "none. Set `provenance`, or load it with model=, hook_point= and hook_point_out=."
        )
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", provenance.hook_point)
    out = re.fullmatch(r"blocks\.(\d+)\.(.+)", provenance.hook_point_out or "")
    if not found or not out or found[1] != out[1]:
        raise ValueError(
            "circuit-tracer's transcoders must read and write places of one layer, as blocks.3.hook_resid_mid and "
            f"blocks.3.hook_mlp_out, got '{provenance.hook_point}' and '{provenance.hook_point_out}'; write saelens."
        )
    settings = {MODEL: shareable(provenance.model), READ: found[2], WRITTEN: out[2]}
    return {"file": f"layer_{found[1]}.safetensors", CONFIG: settings}


def find_transcoder_parts(coder: SAEModule) -> dict[str, Tensor]:
    """Weights as circuit-tracer uses them; ValueError for thresholds below 0, which let negative codes pass."""
    named = {name: getattr(coder, name) for name in (*PARTS, "threshold", SKIP)}
    parts = {name: part.detach() for name, part in named.items() if part is not None}
    if "threshold" in parts:
        _require_positive(parts["threshold"], "the transcoder")
        parts["threshold"] = parts["threshold"].expand(coder.cfg.d_sae)
    return parts


def check_layers(folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the transcoders of other layers in a folder are of another model, place or width, as
    circuit-tracer has one setting for all of them, and where the folder holds a cross-layer transcoder.
    """
    if folder.is_dir() and recognize(folder):
        raise ValueError(
            f"{folder} must hold transcoders of a layer each, got a cross-layer one. Choose another folder."
        )
    given = settings[CONFIG] or {}
    for name, held in _read_settings(folder / CONFIG).items() if given else ():
        if given.get(name, held) != held:
            raise ValueError(
                f"The transcoders in {folder} must agree on `{name}`, got '{given[name]}' beside '{held}'. Choose "
                "another folder."
            )
    shape = tuple(parts["W_dec"].shape)
    for path in sorted(folder.glob("layer_*.safetensors")):
        if not LAYER.fullmatch(path.name) or path.name == settings["file"]:
            continue
        other = read_header(path)[0].get("W_dec")
        if other is not None and other.shape != shape:
            raise ValueError(
                f"The transcoders in {folder} must be of one d_sae and d_model, got {shape} beside {other.shape} in "
                f"{path.name}. Choose another folder."
            )


def write_transcoder(
    folder: Path, settings: dict[str, Any], parts: Mapping[str, Tensor], extras: Mapping[str, Tensor]
) -> None:
    """Write the layer's file, and `config.yaml` where it is known what it says.

    Args:
        folder: folder to write to.
        settings: file and settings, as `describe_transcoder` returns them or as they were read.
        parts: weights by saelab's names, as `find_transcoder_parts` returns them or as they were read.
        extras: further tensors by the format's own names; there are none.
    """
    named = dict(parts) | dict(extras)
    if "threshold" in named:
        named[THRESHOLD] = named.pop("threshold")
    for name in {"W_enc", SKIP} & set(named):
        named[name] = named[name].T
    plain = {name: part.detach().cpu().contiguous() for name, part in named.items()}
    save_tensors(folder / settings["file"], plain, {"format": "pt"})
    if settings[CONFIG] is not None:
        _write_settings(folder, OF_LAYERS, DEFAULTS | settings[CONFIG])


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFiles:
    """A cross-layer transcoder as these files have it, an entry a layer."""

    W_enc: list[Tensor]
    """(d_sae, d_in)"""
    b_enc: list[Tensor]
    W_dec: list[Tensor]
    """(d_sae, n_layers - l, d_out)"""
    b_dec: list[Tensor]
    thresholds: list[Tensor] | None
    """None of ReLU"""
    settings: dict[str, str]
    """model and hook points, as far as they are known"""

    def make_provenances(self, weight_processing: str) -> tuple[Provenance, ...] | None:
        """Origin of each layer's activations; None where the model is not known."""
        settings = DEFAULTS | self.settings
        if MODEL not in settings:
            return None
        first = Provenance(
            model=settings[MODEL],
            weight_processing=weight_processing,
            hook_point="",
            text="unknown",
            tokens_sha256="",
            mask={},
            dtype="unknown",
            ctx_len=None,
            n_tokens=0,
            seed=None,
            versions={},
        )
        return tuple(
            first.at(f"blocks.{i}.{settings[READ]}").paired(first.at(f"blocks.{i}.{settings[WRITTEN]}"))
            for i in range(len(self.W_enc))
        )


def recognize(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return folder.is_dir() and any(ENCODER.fullmatch(path.name) for path in folder.iterdir())


def read_layers(folder: Path) -> LayerFiles:
    """Weights of all layers, memory-mapped.

    Raises:
        FileNotFoundError: for a folder without such files, and where a layer's are missing.
        ValueError: for tensors that are missing or do not fit each other, and for skip connections.
    """
    names = {path.name for path in folder.iterdir()}
    numbers = [int(match[2]) for name in names if (match := ENCODER.fullmatch(name))]
    if not numbers:
        raise FileNotFoundError(
            f"A cross-layer transcoder must have config.json or W_enc_0.safetensors, got {folder} with "
            f"{sorted(names)[:5]}. Check the path."
        )
    n = max(numbers) + 1
    wanted = (f"W_{side}_{i}.safetensors" for i in range(n) for side in ("enc", "dec"))
    if missing := list(islice((name for name in wanted if name not in names), 5)):  # n may be anything
        raise FileNotFoundError(
            f"{folder} must have encoder and decoder of each of its {n} layers, got no {missing}. Copy them, too."
        )
    held = [_read_layer(folder, i, n) for i in range(n)]
    jumps = ["threshold" in layer for layer in held]
    if any(jumps) != all(jumps):
        raise ValueError(f"{folder} must have thresholds for all layers or none, got none for {jumps.index(False)}.")
    for i, layer in enumerate(held):
        shapes = [tuple(layer[name].shape) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
        (d_sae, d_in), d_out = tuple(held[0]["W_enc"].shape), len(held[0]["b_dec"])
        due = [(d_sae, d_in), (d_sae,), (d_sae, n - i, d_out), (d_out,)]
        if shapes != due or ("threshold" in layer and layer["threshold"].shape != (d_sae,)):
            raise ValueError(
                f"Layer {i} of {n} in {folder} must have W_enc, b_enc, W_dec and b_dec of shapes {due}, got {shapes}. "
                "Are the files of one transcoder, and are all layers here?"
            )
    return LayerFiles(
        **{name: [layer[name] for layer in held] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        thresholds=[layer["threshold"] for layer in held] if all(jumps) else None,
        settings=_read_settings(folder / CONFIG),
    )


def _read_layer(folder: Path, i: int, n: int) -> dict[str, Tensor]:
    place = folder / f"W_enc_{i}.safetensors"
    encoder, decoder = read_tensors(place), read_tensors(folder / f"W_dec_{i}.safetensors")
    found = require_tensors(encoder, tuple(f"{name}_{i}" for name in ("W_enc", "b_enc", "b_dec")), place)
    found |= require_tensors(decoder, (f"W_dec_{i}",), folder / f"W_dec_{i}.safetensors")
    if f"W_skip_{i}" in encoder:
        raise ValueError(
            f"{place} must have no skip connection, got W_skip_{i}, which saelab has in transcoders of a layer."
        )
    if f"threshold_{i}" in encoder:
        found |= require_tensors(encoder, (f"threshold_{i}",), place)
    if wrong := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{place} must hold floating point weights, got {found[wrong[0]].dtype} for {wrong[0]}.")
    if f"threshold_{i}" in found:
        _require_positive(found[f"threshold_{i}"], place)
    if found[f"W_enc_{i}"].ndim != 2 or found[f"b_dec_{i}"].ndim != 1:
        raise ValueError(f"{place} must hold a matrix W_enc_{i} and a vector b_dec_{i}, got other shapes.")
    return {name.removesuffix(f"_{i}"): tensor for name, tensor in found.items()}


def _require_positive(threshold: Tensor, place: Path | str) -> None:
    if bool((threshold.float() < 0).any()):  # 8-bit floats have no comparison
        lowest = float(threshold.float().min())
        raise ValueError(f"Thresholds in {place} must be at least 0, got {lowest:.3g}; below, codes would be negative.")


def _read_settings(path: Path) -> dict[str, str]:
    """The plain texts at the top level of config.yaml; what else it holds is not read."""
    if not path.is_file():
        return {}
    found = {}
    with naming(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            if (match := LINE.fullmatch(line)) and match[1] in (READ, WRITTEN, MODEL) and match[2] not in NULLS:
                found[match[1]] = _read_scalar(match[1], match[2])
    return found


def _read_scalar(name: str, text: str) -> str:
    """A plain or quoted text of YAML, without the comment behind it."""
    if text[:1] == '"':  # as JSON has it, but for rare escapes
        found, end = json.JSONDecoder().raw_decode(text)
    elif match := QUOTED.match(text):
        found, end = match[1].replace("''", "'"), match.end()
    else:
        found, end = text.split(" #")[0].rstrip(), len(text)
        if text[:1] in "[{&*!|>'#":
            found = ""
    rest = text[end:]
    if not found or (rest.strip() and not rest.lstrip("\t ").startswith("#")):
        raise ValueError(f"`{name}` must be a plain text, got {text!r}. Was it edited?")
    return str(found)


def write_layers(folder: Path, held: LayerFiles) -> None:
    """Write the files, replacing those of another transcoder in the folder.

    Args:
        folder: the folder.
        held: weights by layer, and model and hook points.

    Raises:
        ValueError: for a folder with transcoders of a layer each.
    """
    if layers := sorted(path.name for path in folder.glob("layer_*.safetensors") if LAYER.fullmatch(path.name)):
        raise ValueError(f"{folder} must hold one kind of transcoder, got {layers[:5]}. Choose another folder.")
    stale = ("W_enc_*.safetensors", "W_dec_*.safetensors", CONFIG)
    with replace_folder(folder, last=CONFIG, stale=stale) as temp:
        for i, W_enc in enumerate(held.W_enc):
            encoder = {"W_enc": W_enc, "b_enc": held.b_enc[i], "b_dec": held.b_dec[i]}
            if held.thresholds is not None:
                encoder["threshold"] = held.thresholds[i]
            plain = {f"{name}_{i}": tensor.detach().contiguous() for name, tensor in encoder.items()}
            save_tensors(temp / f"W_enc_{i}.safetensors", plain, {"format": "pt"})
            save_tensors(temp / f"W_dec_{i}.safetensors", {f"W_dec_{i}": held.W_dec[i].contiguous()}, {"format": "pt"})
        _write_settings(temp, CROSS_LAYER, held.settings)


def _write_settings(folder: Path, kind: str, settings: Mapping[str, str]) -> None:
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in ({KIND: kind} | dict(settings)).items())
    write_atomic(folder / CONFIG, text.encode())


def name_places(places: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The settings that name each layer's hook points; ValueError where layers are not 0, 1, ... with the same place in
    each.
    """
    found: dict[str, set[str]] = {READ: set(), WRITTEN: set()}
    for i, pair in enumerate(places):
        for name, place in zip(found, pair, strict=True):
            start, _, rest = place.partition(f"blocks.{i}.")
            if start or not rest:
                raise ValueError(
                    f"circuit-tracer numbers layers from the model's first, so layer {i} must be at blocks.{i}, got "
                    f"'{place}'. Save it in saelab's own format."
                )
            found[name].add(rest)
    if several := [sorted(rests) for rests in found.values() if len(rests) > 1]:
        raise ValueError(
            f"circuit-tracer has one hook point for all layers, got {several[0]}. Save in saelab's format."
        )
    return {name: rests.pop() for name, rests in found.items()}
