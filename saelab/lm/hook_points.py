"""Hook points of a language model by name: where each one's activations are, and whether an edit there is felt.

`HookPoints` are those of plain Hugging Face modules. `BridgeHookPoints` are those of a TransformerBridge, and for each
the fastest module from which identical values can be read.
"""

import copy
import difflib
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from saelab.functional.autocast import computing_in
from saelab.lm.caching import Caching, measure_caching
from saelab.lm.huggingface import AnyModel, HuggingFaceModel, as_model
from saelab.lm.model_checks import HookBooks, Model, Sketch, has_processed_weights, sketch_weights
from saelab.lm.module_names import name_hook_points, name_modules
from saelab.lm.unwrapped import Site, Tap, WithOwnHooks, attach, make_probe, run, set_attention, strip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HookSite:
    """Measured properties of one hook point."""

    agrees: bool
    """whether plain Hugging Face modules have the tensor there, and respond to an edit as the model itself does"""
    felt: bool
    """whether an edit there changes the logits"""
    flat: bool
    """whether the rows of all texts are concatenated, (batch * n, d), as in OPT and mixtures of experts"""


class BridgeError(ValueError):
    """A TransformerBridge does not compute what its Hugging Face model does."""


class HookPoints:
    """Hook points of plain Hugging Face modules: each is the input or the output of one of them.

    Properties of hook points are measured in short forward passes, not assumed. Hooks on the model, whoever registered
    them, do not run in these.
    """

    plain: nn.Module | None
    """Hugging Face's own modules"""
    trees: tuple[nn.Module, ...]
    """the modules whose forward passes are those of the model"""
    probe: Tensor
    """two rows of random token ids for short test forward passes"""
    points: dict[str, str]
    """canonical name of each hook point by all its names"""
    components: dict[str, Any]
    """modules by name, such as "blocks.0.attn" and "ln_final\""""
    _last: Tensor
    """logits of the probe's last tokens"""

    def __init__(self, model: Model) -> None:
        hf_model = model.original_model
        self._begin(model, (hf_model,), HookBooks(hf_model))
        self.plain = hf_model
        with self.aside():
            said = _try_plain(hf_model, self.probe)
            _require_causal(hf_model, self.probe, said)
            self._last = said[:, -1]
            self.components = name_modules(hf_model)
            self.points = name_hook_points(self.components, hf_model, self.probe)

    def _begin(self, model: Model, trees: tuple[nn.Module, ...], hooks: HookBooks) -> None:
        self.trees, self._hooks, self.probe = trees, hooks, make_probe(model)
        self.places: dict[str, HookSite] = {}
        self._caching: dict[nn.Module, Caching] = {}
        # These dictionaries live as long as their module, so checking them before each forward pass is quick.
        self._weights = [(m._parameters, m._buffers, m._non_persistent_buffers_set) for m in trees[0].modules()]
        self._stamp = self._find_stamp(model)

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
        return sketch_weights(self.trees[0])

    def is_current(self, model: Model) -> bool:
        """Whether the model's weights are those that this object was made with; False after any edit of them."""
        return self._stamp == self._find_stamp(model)

    @property
    def is_bare(self) -> bool:
        """Whether plain modules run, and nobody's hooks are on the model, saelab's edits included."""
        return not self._hooks.has_foreign()

    def find(self, name: str) -> str:
        """The canonical name of a hook point; ValueError with similar names."""
        if name not in self.points:
            near = difflib.get_close_matches(name, self.points, n=5, cutoff=0.4)
            hint = f"Did you mean one of {near}?" if near else "Names look like 'blocks.0.hook_resid_post'."
            raise ValueError(f"`hook_point` must be a hook point of this model, got '{name}'. {hint}{self._more}")
        return self.points[name]

    @property
    def _more(self) -> str:
        """Where there are more hook points."""
        return " Those inside of a module exist with `load_model(..., backend='transformer_lens')` only."

    def part(self, component: str) -> Any:
        """The module of the plain model that is a component, by its name."""
        return self.components[component]

    def plain_site(self, name: str) -> Site | None:
        """Module and side of the plain model that carry a hook point's tensor, or None."""
        path, _, side = self.find(name).rpartition(".")
        return (self.components[path], side) if path in self.components else None

    def _own_site(self, name: str) -> tuple[nn.Module, Site]:
        """The model that defines a hook point's values, and module and side in it."""
        site = self.plain_site(name)
        assert self.plain is not None and site is not None
        return self.plain, site

    @contextmanager
    def attached(self, name: str, tap: Tap) -> Iterator[None]:
        """Context manager in which a hook function runs at a hook point, in all forward passes of the model."""
        with attach(self._own_site(name)[1], tap):
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
        model, site = self._own_site(name)
        value = self._read_once(name, model, site)
        moved = self._move(model, site, value)
        felt = not value.is_floating_point() or not torch.equal(moved[:, -1], self._last)
        return HookSite(self._agrees(name, value, moved), felt, self._is_flat(model, site, value))

    def _agrees(self, _name: str, _value: Tensor, _moved: Tensor) -> bool:
        return True

    def _is_flat(self, model: nn.Module, site: Site, value: Tensor) -> bool:
        """Whether the rows of all texts are concatenated: permuting the texts permutes the rows."""
        if value.ndim != 2 or len(value) != self.probe.numel():
            return False
        swapped = self._read(model, site, self.probe.flip(0))[0]
        split = (*self.probe.shape, -1)
        return is_close(swapped.reshape(split), value.reshape(split).flip(0))

    def _read(self, model: nn.Module, site: Site, ids: Tensor | None = None) -> list[Tensor]:
        seen: list[Tensor] = []
        with attach(site, lambda x: seen.append(x.clone())):
            run(model, self.probe if ids is None else ids)
        return seen

    def _read_once(self, name: str, model: nn.Module, site: Site) -> Tensor:
        seen = self._read(model, site)
        require_once(name, len(seen))
        return seen[0]

    def _move(self, model: nn.Module, site: Site, value: Tensor) -> Tensor:
        """Logits when every entry at a site is scaled by its own factor; a common factor would be removed by norms."""
        if not value.is_floating_point():
            return run(model, self.probe)
        factors = 1 + torch.arange(value.numel(), device=value.device).cos().view(value.shape).to(value) / 2
        with attach(site, lambda x: x * factors), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bridge warns that an edit disables its fastest path
            return run(model, self.probe)

    def caching(self, module: nn.Module) -> Caching:
        """How the plain model or the bridge may continue a text, measured once."""
        module = module.wrapped if isinstance(module, WithOwnHooks) else module
        if module not in self._caching:
            with self.aside():
                self._caching[module] = measure_caching(module, self.probe)
        return self._caching[module]

    def route(self, names: list[str]) -> tuple[nn.Module, list[Site]]:
        """The fastest model that has correct values at these hook points, and the module and side of each."""
        assert self.plain is not None
        for name in names:
            self.look(name)  # so that a wrong name always raises
        return self.plain, [self._own_site(name)[1] for name in names]


class BridgeHookPoints(HookPoints):
    """Hook points of a bridge by name, the plain Hugging Face model that shares its weights, and at which hook points
    both have identical activations.
    """

    def __init__(self, model: Model, *, was_right: bool = False) -> None:
        """`was_right` is for a bridge that computed what its model does, before its weights were edited.

        BridgeError where it computes something else.
        """
        self._points, self.components = _find_points(model)
        self.points = {name: str(point.name) for name, point in self._points.items()}
        bridged = model.original_model
        self._bridge = weakref.ref(model)  # weak, as `_doors` would otherwise never free the bridge
        self._begin(model, (bridged,), HookBooks(model, bridged, *self._points.values()))
        self.n_spliced = 0  # edits registered on both the plain twin and the bridge
        self._plain_hooks: HookBooks | None = None
        with self.aside():
            said = _try_bridge(bridged, self.probe)
            _require_causal(bridged, self.probe, said)
            # Weights that were edited or processed in the bridge are intended: then its logits are the right ones.
            owns_weights = was_right or model.compatibility_mode or has_processed_weights(model)
            self.plain, self.twins = self._find_plain(bridged, said, owns_weights)
            self._last = said[:, -1]
        if self.plain is not None:
            self._plain_hooks = HookBooks(self.plain)
            self.trees = (bridged, self.plain)

    def _find_plain(self, bridged: nn.Module, said: Tensor, owns_weights: bool) -> tuple[nn.Module | None, dict]:
        """The plain Hugging Face model with the fastest attention that gives the bridge's logits."""
        try:
            plain, twins = strip(bridged)
        except (TypeError, ValueError) as error:
            logger.info("This model runs through its bridge, at about half the speed: %s", error)
            return None, {}
        for attention in ("sdpa", "eager"):
            if set_attention(plain, attention):
                found = run(plain, self.probe)
                if is_close(found, said):
                    return plain, twins
        distance = f"the bridge's logits are {_distance(said, found):.1%} away from Hugging Face's"
        if not owns_weights:
            raise BridgeError(
                f"A TransformerBridge must compute what its model does, but {distance}. Give it to "
                "`saelab.load_model`, which takes Hugging Face's own modules (backend='huggingface')."
            )
        logger.info("This model runs through its bridge, at about half the speed: %s", distance)
        return None, {}

    @property
    def is_bare(self) -> bool:
        """Whether plain modules run, and nobody's hooks are on the model, saelab's edits included."""
        return self.plain is not None and not self.n_spliced and self._sees_all

    @property
    def _sees_all(self) -> bool:
        """Whether all hooks on the model are saelab's, and on the plain model, too."""
        return not self._hooks.has_foreign() and self._hooks.count_ours() == self.n_spliced

    @property
    def _more(self) -> str:
        return ""

    def part(self, component: str) -> Any:
        """The module of the plain model that is a component, by its name."""
        return self.twins[self.components[component]]

    def plain_site(self, name: str) -> Site | None:
        """Module and side of the plain Hugging Face model that should carry the same tensor, or None."""
        path, _, side = self.find(name).rpartition(".")
        twin = self.twins.get(self.components[path]) if path in self.components else None
        return (twin, side) if twin is not None and side in ("hook_in", "hook_out") else None

    def _own_site(self, name: str) -> tuple[nn.Module, Site]:
        self.find(name)
        return self.trees[0], (self._points[name], "hook_out")

    def bridge_sites(self, names: list[str]) -> dict[str, Site]:
        """Module and side at which the bridge fires each hook point."""
        return {name: self._own_site(name)[1] for name in names}

    @contextmanager
    def attached(self, name: str, tap: Tap) -> Iterator[None]:
        """Context manager with a hook on the bridge's hook point, and on the plain model where that is the same
        place.
        """
        site = self.plain_site(name) if self.look(name).agrees else None
        with ExitStack() as stack:
            stack.enter_context(super().attached(name, tap))
            if site is not None:
                stack.enter_context(attach(site, tap))
                self.n_spliced += 1
                stack.callback(setattr, self, "n_spliced", self.n_spliced - 1)
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager in which no hooks are on the model, whoever registered them, and no autocast is in force."""
        with super().aside(), ExitStack() as stack:
            if self._plain_hooks is not None:
                stack.enter_context(self._plain_hooks.aside())
            yield

    def _agrees(self, name: str, value: Tensor, moved: Tensor) -> bool:
        site = self.plain_site(name)
        if self.plain is None or site is None:
            return False
        seen = self._read(self.plain, site)
        return len(seen) == 1 and is_close(seen[0], value) and is_close(self._move(self.plain, site, value), moved)

    def route(self, names: list[str]) -> tuple[nn.Module, list[Site]]:
        """The fastest model that has correct values at these hook points, and the module and side of each.

        That is the bridge itself where other hooks than saelab's are on it, or a hook point exists only there.
        """
        trusted = [self.look(name).agrees for name in names]  # looks at all of them, so that a wrong name always raises
        if self.plain is not None and self._sees_all and all(trusted):
            return self.plain, [site for name in names if (site := self.plain_site(name)) is not None]
        bridge: Any = self._bridge()
        has_own = bridge is not None and any(getattr(bridge, book) for book in ("_forward_hooks", "_forward_pre_hooks"))
        return WithOwnHooks(bridge) if has_own else self.trees[0], [self._own_site(name)[1] for name in names]


def _try_plain(model: nn.Module, ids: Tensor) -> Tensor:
    """A Hugging Face model's logits; ValueError where it cannot compute them from token ids alone."""
    try:
        return run(model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"A model must compute logits from token ids, got a {type(model).__name__} that fails with "
            f"{type(error).__name__}: {error}. Take a causal language model of text."
        ) from error


def _try_bridge(model: nn.Module, ids: Tensor) -> Tensor:
    """A bridge's logits; BridgeError where it fails, as it may be made for another release of transformers."""
    try:
        return run(model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BridgeError(
            f"A TransformerBridge must compute what its model does, but this one fails ({type(error).__name__}: "
            f"{error}). Give it to `saelab.load_model`, which takes Hugging Face's own modules."
        ) from error


def require_once(name: str, n_fired: int) -> None:
    """Raise RuntimeError with the hook point's name and count, unless it fired exactly once in a forward pass."""
    if n_fired != 1:
        raise RuntimeError(
            f"A hook point must fire exactly once in a forward; '{name}' fired {n_fired} times. "
            "Choose another hook point; some fire only with an option of the bridge switched on."
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
        ValueError: for a model that is not causal, and a bridge that does not compute what its model does.
    """
    model = as_model(model)
    known = _doors.get(model)
    if known is None or not known.is_current(model):
        if isinstance(model, HuggingFaceModel):
            _doors[model] = HookPoints(model)
        else:
            _doors[model] = BridgeHookPoints(model, was_right=known is not None)
    return _doors[model]


def share_weights(model: AnyModel) -> Model:
    """A second model on the same parameters and buffers, with modules and hooks of its own.

    Two threads may each run one of them: edits, readings and `train()` of one are not felt by the other; changes of
    weights are. It begins without the hooks that are on the model now, whoever registered them. The tokenizer is the
    same object.

    >>> model = sl.lm.tiny_model()
    >>> other = share_weights(model)
    >>> all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    True
    """
    model = as_model(model)
    kept: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for module in model.modules():
        held = (module._parameters, module._buffers, vars(module))
        kept |= {id(value): value for part in held for value in part.values() if isinstance(value, Tensor)}
    with hook_points_of(model).aside():
        other = copy.deepcopy(model, kept)
    for module in other.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                hooks[key] = _lead(hook, kept)
    return other


def _lead(hook: Any, copies: dict[int, Any]) -> Any:
    """A library's hook that leads to modules, leading to their copies: functions and weak references are not copied.

    Args:
        hook: the hook, or what it holds.
        copies: copies by `id`.
    """
    if isinstance(hook, weakref.ProxyTypes):
        copied = copies.get(id(hook.__init__.__self__))
        return hook if copied is None else weakref.proxy(copied)
    if not isinstance(hook, FunctionType) or not hook.__closure__:
        return copies.get(id(hook), hook)
    held = [cell.cell_contents for cell in hook.__closure__]
    cells = tuple(CellType(_lead(value, copies)) for value in held)
    if all(cell.cell_contents is value for cell, value in zip(cells, held, strict=True)):
        return hook
    new = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
    new.__kwdefaults__, new.__module__ = hook.__kwdefaults__, hook.__module__
    return new
