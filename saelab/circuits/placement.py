"""Which dictionary of a graph belongs where in the model, and which MLPs none of them covers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from saelab.lm.hook_points import hook_points_of
from saelab.lm.model_checks import Model
from saelab.sae.clt import CLT
from saelab.sae.compatibility import match_places, require_threshold
from saelab.sae.encoders import PursuitEncoder, Refined
from saelab.sae.sae import SAE

Dictionaries: TypeAlias = (
    SAE
    | CLT
    | Sequence[SAE | CLT]
    | Mapping[str, SAE]
    | Mapping[tuple[str, str], SAE]
    | Mapping[tuple[tuple[str, str], ...], CLT]
)
"""Transcoders and SAEs; or by the hook point of each, (input, target) of a transcoder, and of a cross-layer transcoder
one such pair for each of its layers
"""
Part = Literal["input", "attention", "middle", "MLP", "output"]
PARTS: tuple[Part, ...] = ("input", "attention", "middle", "MLP", "output")
"""of a block, in the order in which it computes them"""
OUTPUTS = ("hook_mlp_out", "mlp.hook_out", "mlp.out.hook_out")
"""of an MLP, in a block"""
_BLOCK = re.compile(r"(?P<stack>\w*blocks)\.(?P<layer>\d+)\.(?P<rest>.+)")
_STARTS: dict[str, Part] = {
    "hook_in": "input",
    "hook_resid_pre": "input",
    "ln1_post.hook_out": "attention",
    "hook_attn_out": "attention",
    "ln1": "input",
    "attn": "attention",
    "self_attn": "attention",
    "linear_attn": "attention",
    "ln2_post.hook_out": "MLP",
    "hook_mlp_out": "MLP",
    "ln2": "middle",
    "hook_resid_mid": "middle",
    "hook_mlp_in": "middle",
    "mlp.hook_in": "middle",
    "mlp": "MLP",
    "moe": "MLP",
    "hook_out": "output",
    "hook_resid_post": "output",
}
"""part by what the rest of a hook point's name begins with, the first that fits"""


@dataclass(frozen=True)
class BlockPlace:
    """Block and part of it that a hook point belongs to."""

    stack: str
    layer: int
    part: Part


@dataclass(frozen=True, eq=False)
class PlacedDictionary:
    """A transcoder or SAE, where it reads, and where its reconstruction and error replace what the model computes."""

    sae: SAE
    read: str
    write: str
    place: BlockPlace
    """of what it writes"""
    later: tuple[str, ...] = ()
    """hook points that features of a cross-layer transcoder's layer write to besides: `sae` has them side by side"""
    neurons: tuple[str, str] | None = None
    """of an SAE of an MLP's output: hook points in front of and behind the MLP's neurons, whose gates are frozen"""

    @property
    def width(self) -> int:
        """Width of what it writes at one hook point."""
        return self.sae.cfg.d_target // (1 + len(self.later))

    def find_slopes(self, u: Tensor, latents: Tensor) -> Tensor:
        """Derivative of the codes of active latents by their pre-activations: 1, unless the activation bends them."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            codes = self.sae.cfg.activation.fire(leaf, self.sae.threshold_of(latents))
            return torch.autograd.grad(codes.sum(), leaf)[0]

    def skip(self, x: Tensor, centered: Tensor) -> Tensor | None:
        """What the skip connection adds to what is written, without bias; linear in `centered`; None without one."""
        sae = self.sae
        if sae.W_skip is None:
            return None
        made = centered @ sae.W_skip
        normalizer = sae.out_normalizer
        made = made if normalizer.kind == "none" else normalizer.apply_matrix(made, normalizer.inverse)
        return made * sae.output_scale(x.to(made))


@dataclass(frozen=True, eq=False)
class Placement:
    """The dictionaries of a graph in the order of the model, and the MLPs that none of them replaces."""

    dictionaries: tuple[PlacedDictionary, ...]
    uncovered: tuple[tuple[int, str], ...]
    """layer and hook point of each such MLP"""
    start: str
    """hook point at which the embeddings enter the first block"""


def place_dictionaries(
    model: Model,
    given: Dictionaries,
    *,
    allow_missing: bool = False,
    allow_mismatch: bool = False,
    below: int | None = None,
) -> Placement:
    """Where each dictionary reads and writes, checked before the model runs.

    Args:
        model: the language model.
        given: transcoders, also cross-layer ones, and SAEs, or by hook point.
        allow_missing: accept layers whose MLP no dictionary replaces.
        allow_mismatch: accept dictionaries of another model, weight processing or hook point.
        below: the first layer whose MLP needs no dictionary; None is none.

    Raises:
        ValueError: for an SAE of an MLP's output whose neurons cannot be told, a transcoder between two blocks, two
            dictionaries of one place, layers without a dictionary of their MLP, another model or other weights, an
            encoder that is not one linear map, and a width that is not the model's.
    """
    found: list[PlacedDictionary] = []
    for each, names in _list_given(given):
        if isinstance(each, CLT):
            found += _place_layers(model, each, names, allow_mismatch)
        else:
            found.append(_place(model, each, names, allow_mismatch))
    points = hook_points_of(model).points
    for i, one in enumerate(found):
        if any(points[one.write] == points[other.write] for other in found[:i]):
            raise ValueError(f"A hook point must have one dictionary, got two for '{one.write}'; leave one out.")
    stack, n_layers = find_stack(model)
    found.sort(key=lambda one: (one.place.layer, PARTS.index(one.place.part)))
    covered = {
        one.place.layer
        for one in found
        if (one.sae.cfg.d_out is not None and one.place.part != "attention") or one.place.part == "MLP"
    }
    others = [
        (layer, name) for layer in range(n_layers) if layer not in covered if (name := find_mlp(model, stack, layer))
    ]
    if not allow_missing and (missing := [layer for layer, _ in others if below is None or layer < below]):
        which = f"all {n_layers} layers" if below is None else f"the layers below {below}"
        raise ValueError(
            f"Transcoders must cover the MLPs of {which}, got none for {missing}. Give more, or allow_missing=True, "
            "which takes what these MLPs write for errors."
        )
    return Placement(tuple(found), tuple(others), f"{stack}.0.hook_in")


def _list_given(given: Dictionaries) -> list[tuple[SAE | CLT, Any]]:
    if isinstance(given, SAE | CLT):
        return [(given, None)]
    if isinstance(given, Mapping):
        pairs: list[tuple[SAE | CLT, Any]] = [(sae, name) for name, sae in given.items()]
    else:
        pairs = [(sae, None) for sae in given]
    if not pairs:
        raise ValueError("`transcoders` must hold at least one, got none.")
    if wrong := [sae for sae, _ in pairs if not isinstance(sae, SAE | CLT)]:
        raise ValueError(f"`transcoders` must be SAEs, got a {type(wrong[0]).__name__}; load it: SAE.from_pretrained.")
    return pairs


def _place_layers(
    model: Model, clt: CLT, names: tuple[tuple[str, str], ...] | None, allow_mismatch: bool
) -> list[PlacedDictionary]:
    """Each layer of a cross-layer transcoder; ValueError for other layers than it has, in another order."""
    places = clt.places if names is None else names
    n = clt.cfg.n_layers
    if places is None:
        raise ValueError(
            "A cross-layer transcoder without provenance must be given with its hook points, as {((input, target), "
            "...): clt} with a pair for each layer."
        )
    if len(places) != n or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in places):
        raise ValueError(f"A cross-layer transcoder must have (input, target) for each of {n} layers, got {places}.")
    found = []
    for i, pair in enumerate(places):
        later = tuple(target for _, target in places[i + 1 :])
        found.append(_place(model, clt.layer(i, copy=False), pair, allow_mismatch, later))
    order = [one.place.layer for one in found]
    if order != sorted(set(order)) or len({(one.place.stack, one.place.part) for one in found}) > 1:
        raise ValueError(f"Layers of a cross-layer transcoder must be in the order of the model, got {places}.")
    return found


def _place(
    model: Model,
    sae: SAE,
    names: str | tuple[str, str] | None,
    allow_mismatch: bool,
    later: tuple[str, ...] = (),
) -> PlacedDictionary:
    """A dictionary where it belongs; ValueError for one that does not fit there.

    Args:
        model: the language model.
        sae: the dictionary.
        names: hook points that it is given with, or None.
        allow_mismatch: accept other ones than its provenance's.
        later: hook points that it writes to besides.
    """
    places = match_places(sae, model, names, allow_mismatch)
    require_threshold(sae)
    if isinstance(sae.cfg.encoder, PursuitEncoder | Refined):
        raise ValueError(
            f"A dictionary must read by one linear map, got the encoder {sae.cfg.encoder}, of whose codes no "
            "pre-activation exists that direct effects could add up to. Take one with encoder='linear'."
        )
    if sae.cfg.d_out is not None and len(places) == 1:
        raise ValueError(
            f"A transcoder must have the hook point of its target, got only '{places[0]}'; give transcoders as "
            "{(input, target): transcoder}."
        )
    read, write = places[0], places[-1]
    start, end = _locate(model, read), _locate(model, write)
    if (start.stack, start.layer) != (end.stack, end.layer):
        raise ValueError(f"A transcoder must read and write in one block, got '{read}' and '{write}'.")
    if sae.cfg.d_out is not None and PARTS.index(start.part) >= PARTS.index(end.part):
        raise ValueError(f"A transcoder must read before it writes, got '{read}' and '{write}'.")
    for name, place, width in ((read, start, sae.cfg.d_in), (write, end, sae.cfg.d_target // (1 + len(later)))):
        wide = _has_model_width(name, place)
        if wide and width != model.cfg.d_model:
            raise ValueError(
                f"A dictionary at '{name}' must have the model's width ({model.cfg.d_model}) there, got {width}."
            )
    neurons = _find_neurons(model, write, end) if sae.cfg.d_out is None and end.part == "MLP" else None
    return PlacedDictionary(sae, read, write, end, later, neurons)


def _find_neurons(model: Model, name: str, place: BlockPlace) -> tuple[str, str]:
    """Hook points in front of and behind the neurons of the MLP at whose output an SAE is."""
    home, block = hook_points_of(model), f"{place.stack}.{place.layer}"
    points = home.points
    pair = (f"{block}.mlp.in.hook_out", f"{block}.mlp.out.hook_in")
    behind = [f"{block}.{rest}" for rest in (*OUTPUTS, "ln2_post.hook_out")]
    if any(one not in points for one in pair):
        raise ValueError(
            f"An SAE of an MLP's output needs an MLP of one layer of neurons, whose gates can be frozen, got '{name}'. "
            "Train a transcoder from the MLP's input to its output."
            + (" A bridge parts some MLPs: `load_model(..., backend='transformer_lens')`." if home.is_plain else "")
        )
    if not any(points[name] == points.get(one) for one in behind):
        raise ValueError(f"An SAE of an MLP must be one of its output ('{block}.hook_mlp_out'), got '{name}'.")
    return pair


def _has_model_width(name: str, place: BlockPlace) -> bool:
    local = name.split(".", 2)[2]
    return place.part in ("input", "middle", "output") or local in ("hook_attn_out", "hook_mlp_out", "mlp.hook_out")


def _locate(model: Model, name: str) -> BlockPlace:
    """Block and part of a hook point, by its own name or by that of the module that it is."""
    for known in (name, hook_points_of(model).find(name)):
        if match := _BLOCK.fullmatch(known):
            rest = match["rest"]
            for start, part in _STARTS.items():
                if rest == start or rest.startswith(f"{start}."):
                    return BlockPlace(match["stack"], int(match["layer"]), part)
    raise ValueError(
        f"A dictionary must be at an MLP, at an attention output or in the residual stream, got '{name}'. Choose "
        "another hook point."
    )


def find_stack(model: Model) -> tuple[str, int]:
    """Name of the blocks, and how many there are."""
    found = [match for name in hook_points_of(model).points if (match := _BLOCK.fullmatch(name))]
    stacks = {match["stack"] for match in found}
    if not stacks:
        raise ValueError(f"A model must consist of blocks, got {type(model.original_model).__name__} without any.")
    stack = min(stacks, key=lambda name: (name != "blocks", name))
    return stack, 1 + max(int(match["layer"]) for match in found if match["stack"] == stack)


def find_mlp(model: Model, stack: str, layer: int) -> str | None:
    """Hook point of what the MLP of a layer writes; None for a block without one."""
    points = hook_points_of(model).points
    names = [f"{stack}.{layer}.{rest}" for rest in OUTPUTS]
    return next((name for name in names if name in points), None)
