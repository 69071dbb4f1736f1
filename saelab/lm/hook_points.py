"""Hook points of a language model by name: where each one's activations are, and whether an edit there is felt.

`HookPoints` are those of Hugging Face's modules; `BridgeHookPoints` those of a TransformerBridge, which is run as it
is.
"""

import difflib
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saelab.functional.autocast import computing_in
from saelab.lm.caching import Caching, measure_caching
from saelab.lm.huggingface import AnyModel, HuggingFaceModel, as_model, plain_of
from saelab.lm.model_checks import HookBooks, Model, Sketch, has_processed_weights, sketch_weights
from saelab.lm.module_names import name_hook_points, name_modules
from saelab.lm.unwrapped import Site, Tap, attach, make_probe, run, set_attention, strip


@dataclass(frozen=True)
class HookSite:
    """Measured properties of one hook point."""

    felt: bool
    """whether an edit there changes the logits"""
    flat: bool
    """whether the rows of all texts are concatenated, (batch * n, d), as in OPT and mixtures of experts"""


class HookPoints:
    """Hook points of plain Hugging Face modules: each is the input or the output of one of them.

    Properties of hook points are measured in short forward passes, not assumed. Hooks on the model, whoever registered
    them, do not run in these.
    """

    running: nn.Module
    """the module whose forward passes are those of the model"""
    probe: Tensor
    """two rows of random token ids for short test forward passes"""
    points: dict[str, str]
    """canonical name of each hook point by all its names"""
    components: dict[str, Any]
    """modules by name, such as "blocks.0.attn" and "ln_final\""""
    is_plain = True
    """whether Hugging Face's own modules run, without a bridge"""
    agrees = True
    """whether logits are those of Hugging Face's modules of the same weights"""

    def __init__(self, model: Model) -> None:
        self.running, self._hooks = model.original_model, HookBooks(model)
        self.probe = make_probe(model)
        self.places: dict[str, HookSite] = {}
        # These dictionaries live as long as their module, so checking them before each forward pass is quick.
        self._weights = [(m._parameters, m._buffers, m._non_persistent_buffers_set) for m in self.running.modules()]
        self._stamp = self._find_stamp(model)
        with self.aside():
            said = _try(self.running, self.probe)
            _require_causal(self.running, self.probe, said)
            self._last = said[:, -1]
            self._name(model, said)

    def _name(self, _model: Model, _logits: Tensor) -> None:
        self.components = name_modules(self.running)
        self.points = name_hook_points(self.components, self.running, self.probe)

    def _find_stamp(self, model: Any) -> tuple:
        """Value that changes when a weight is edited in place, replaced, moved or cast, or a bridge processes its
        weights.
        """
        found = [stamp(w) for weights, _, _ in self._weights if weights for w in weights.values() if w is not None]
        # Non-persistent buffers do not count: rotary angles change when a text exceeds the original context length.
        found += [
            stamp(w)
            for _, buffers, own in self._weights
            if buffers
            for name, w in buffers.items()
            if w is not None and name not in own
        ]
        weight = next(model.original_model.parameters())  # `to` puts other values in the same parameters
        return (model.compatibility_mode, weight.device, weight.dtype, *found)

    @cached_property
    def sketch(self) -> Sketch | None:
        """Fingerprint of the model's weights, computed once."""
        return sketch_weights(self.running)

    def is_current(self, model: Model) -> bool:
        """Whether the model's weights are those that this object was made with; False after any edit of them."""
        return self._stamp == self._find_stamp(model)

    @property
    def is_bare(self) -> bool:
        """Whether plain modules run, and nobody's hooks are on the model, saelab's edits included."""
        return self.is_plain and not self._hooks.has_any()

    def find(self, name: str) -> str:
        """The canonical name of a hook point; ValueError with similar names."""
        if name not in self.points:
            near = difflib.get_close_matches(name, self.points, n=5, cutoff=0.4)
            hint = f"Did you mean one of {near}?" if near else "Names look like 'blocks.0.hook_resid_post'."
            raise ValueError(
                f"`hook_point` must be a hook point of this model, got '{name}'. {hint}{MORE if self.is_plain else ''}"
            )
        return self.points[name]

    def site(self, name: str) -> Site:
        """Module and side that carry a hook point's tensor."""
        path, _, side = self.find(name).rpartition(".")
        return self.components[path], side

    @contextmanager
    def attached(self, name: str, tap: Tap) -> Iterator[None]:
        """Context manager in which a hook function runs at a hook point, in all forward passes of the model."""
        with attach(self.site(name), tap):
            yield

    def look(self, name: str) -> HookSite:
        """Properties of a hook point, measured by a few short forward passes at the first call, then kept.

        RuntimeError unless it fires exactly once in a forward pass.
        """
        if name not in self.places:
            self.find(name)
            with self.aside():
                self.places[name] = self._measure(name)
        return self.places[name]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager in which no hooks are on the model, whoever registered them, and no autocast is in force."""
        with computing_in(None, self.probe.device.type), self._hooks.aside():
            yield

    def _measure(self, name: str) -> HookSite:
        site = self.site(name)
        seen = self._read(site)
        require_once(name, len(seen))
        value = seen[0]
        felt = not value.is_floating_point() or not torch.equal(self._move(site, value)[:, -1], self._last)
        return HookSite(felt, self._is_flat(site, value))

    def _is_flat(self, site: Site, value: Tensor) -> bool:
        """Whether the rows of all texts are concatenated: permuting the texts permutes the rows."""
        if value.ndim != 2 or len(value) != self.probe.numel():
            return False
        swapped = self._read(site, self.probe.flip(0))[0]
        split = (*self.probe.shape, -1)
        return is_close(swapped.reshape(split), value.reshape(split).flip(0))

    def _read(self, site: Site, ids: Tensor | None = None) -> list[Tensor]:
        seen: list[Tensor] = []
        with attach(site, lambda x: seen.append(x.clone())):
            run(self.running, self.probe if ids is None else ids)
        return seen

    def _move(self, site: Site, value: Tensor) -> Tensor:
        """Logits when every entry at a site is scaled by its own factor; a common factor would be removed by norms."""
        factors = 1 + torch.arange(value.numel(), device=value.device).cos().view(value.shape).to(value) / 2
        with attach(site, lambda x: x * factors), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bridge warns that an edit disables its fastest path
            return run(self.running, self.probe)

    @cached_property
    def caching(self) -> Caching:
        """How the model may continue a text, measured once."""
        with self.aside():
            return measure_caching(self.running, self.probe)

    def route(self, names: list[str]) -> tuple[nn.Module, list[Site]]:
        """The module that runs, and the module and side of each hook point; ValueError for a wrong name."""
        for name in names:
            self.look(name)
        return self.running, [self.site(name) for name in names]


class BridgeHookPoints(HookPoints):
    """Hook points of a TransformerBridge by name; ValueError for one that does not compute what its model does."""

    is_plain = False

    def _name(self, model: Model, logits: Tensor) -> None:
        self._points, self.components = _find_points(model)
        self.points = {name: str(point.name) for name, point in self._points.items()}
        self.agrees = not (model.compatibility_mode or has_processed_weights(model))
        if self.agrees:
            plain, _ = strip(self.running)
            set_attention(plain, "eager")
            found = run(plain, self.probe)
            self.agrees = is_close(found, logits)
            if not (self.agrees or model in _doors):  # weights that were edited in the bridge are intended
                raise ValueError(
                    "A TransformerBridge must compute what its model does, got one whose logits are "
                    f"{_distance(logits, found):.1%} away from Hugging Face's. Take `load_model(bridge, "
                    "backend='huggingface')`, which runs Hugging Face's own modules."
                )

    def site(self, name: str) -> Site:
        """The bridge's own module at which a hook point fires."""
        self.find(name)
        return self._points[name], "hook_out"


MORE = " Those inside of a module exist with `load_model(..., backend='transformer_lens')` only."


def _try(model: nn.Module, ids: Tensor) -> Tensor:
    """A model's logits; ValueError where it cannot compute them from token ids alone."""
    try:
        return run(model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"A model must compute logits from token ids, got a {type(model).__name__} that fails with "
            f"{type(error).__name__}: {error}. Take a causal language model of text; of a bridge "
            "that was made for another release of transformers, `load_model(bridge, backend='huggingface')`."
        ) from error


def require_once(name: str, n_fired: int) -> None:
    """Raise RuntimeError with the hook point's name and count, unless it fired exactly once in a forward pass."""
    if n_fired != 1:
        raise RuntimeError(
            f"A hook point must fire exactly once in a forward; '{name}' fired {n_fired} times. "
            "Choose another hook point. Of a bridge some never fire, others only with an option switched on: take "
            "backend='huggingface'."
        )


def _find_points(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hook points by all their names, and the bridge's components by path."""
    from transformer_lens.hook_points import HookPoint

    points: dict[str, Any] = dict(model.hook_dict)
    components = {path: _walk(model, path) for path in {name.rpartition(".")[0] for name in points}}
    for path, holder in components.items():
        aliases = {name: value for name, value in vars(holder).items() if isinstance(value, HookPoint)}
        points.update({f"{path}.{name}".lstrip("."): value for name, value in aliases.items()})
    components.pop("", None)  # the bridge itself would keep its own entry in `_doors` alive
    return points, components


def _walk(model: Any, path: str) -> Any:
    for part in path.split(".") if path else []:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _require_causal(model: nn.Module, probe: Tensor, expected: Tensor) -> None:
    """Raise ValueError where a token changes the logits of those before it."""
    if not expected.isfinite().all():
        raise ValueError(
            f"A model's logits must be finite, got {type(model).__name__} with NaN or infinite ones. Are its weights "
            "whole, and is its dtype wide enough?"
        )
    changed = torch.cat([probe[:, :-1], probe[:, -1:].roll(1, 0)], 1)
    rounding = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    if not _distance(run(model, changed)[:, :-1], expected[:, :-1]) <= rounding:
        raise ValueError(
            f"A model's logits must depend on earlier tokens only, got {type(model).__name__}, in which they depend on "
            "later ones too. Take a decoder, or a newer transformers: early releases of some families are not causal."
        )


def stamp(weight: Tensor) -> tuple[int, int]:
    """Value that changes when a tensor is replaced, or edited in place as counted by autograd."""
    return id(weight), 0 if weight.is_inference() else weight._version


def _distance(x: Tensor, y: Tensor) -> float:
    """Relative distance in the Euclidean norm."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def is_close(x: Tensor, y: Tensor) -> bool:
    """Whether tensors are equal up to rounding: relative distance of 0.1 % in float32, 5 % in half precision."""
    if x.shape != y.shape:
        return False
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.05
    return float((x.double() - y.double()).norm()) <= tolerance * float(y.double().norm())


_doors: weakref.WeakKeyDictionary[Model, HookPoints] = weakref.WeakKeyDictionary()


def hook_points_of(model: AnyModel) -> HookPoints:
    """The `HookPoints` of a model, rebuilt when its weights have changed.

    Raises:
        TypeError: for anything but a bridge or a Hugging Face model.
        ValueError: for a model that is not causal, a bridge that does not compute what its model does, and hooks on the
            bridge itself.
    """
    model = as_model(model)
    known = _doors.get(model)
    if known is None or not known.is_current(model):
        known = (HookPoints if isinstance(model, HuggingFaceModel) else BridgeHookPoints)(model)
        _doors[model] = known
    if not known.is_plain and any(vars(model)[book] for book in ("_forward_hooks", "_forward_pre_hooks")):
        raise ValueError(
            "Hooks must be on a bridge's hook points or modules, got one on the bridge itself, which is not in each "
            "forward pass. Put it on `bridge.original_model`, or on 'hook_embed' or 'unembed.hook_out'."
        )
    return known


def share_weights(model: AnyModel) -> HuggingFaceModel:
    """A second model on the same parameters and buffers, of plain modules and with hooks of its own.

    Two threads may each run one of them: edits, readings and `train()` of one are not felt by the other; changes of
    weights are. It begins without the hooks that are on the model now, whoever registered them.

    Raises:
        ValueError: for a bridge with folded weights.

    >>> model = sl.lm.tiny_model()
    >>> other = share_weights(model)
    >>> all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    True
    """
    return plain_of(as_model(model))
