"""What saelab knows of one bridge: its hook points, and where each can be read fastest and still truthfully."""

import difflib
import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saelab.lm.models import Model
from saelab.lm.plain import Site, attach, is_ours, run, set_attention, strip

logger = logging.getLogger(__name__)


class Door:
    """One bridge's hook points by name, its plain twin, and which hook points agree on both (measured, not assumed)."""

    def __init__(self, model: Model) -> None:
        from transformer_lens.hook_points import HookPoint

        self.points: dict[str, Any] = dict(model.hook_dict)
        paths = {name.rpartition(".")[0] for name in self.points}
        self.components: dict[str, Any] = {path: _walk(model, path) for path in paths}
        for path, holder in self.components.items():
            aliases = {name: value for name, value in vars(holder).items() if isinstance(value, HookPoint)}
            self.points.update({f"{path}.{name}".lstrip("."): value for name, value in aliases.items()})
        distinct = {id(point): point for point in self.points.values()}.values()  # several names a point
        self._edits = [point._forward_hooks for point in distinct]
        self.components.pop("", None)  # the bridge itself, which would keep its own entry alive
        self.bridged: nn.Module = model.original_model
        self.n_spliced = 0  # edits that are on the plain twin as well as on the bridge
        self.probe = torch.randint(0, model.cfg.d_vocab, (2, 16), generator=torch.Generator().manual_seed(0))
        self.probe = self.probe.to(next(self.bridged.parameters()).device)
        self.agrees: dict[str, bool] = {}
        self.attention = "eager"
        self.plain, self.twins = self._find_plain()
        # PyTorch keeps these dicts as long as their module: looking at them before each forward is quick.
        modules = list(self.bridged.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._weights = [weights for m in modules for weights in (m._parameters, m._buffers)]
        # With somebody's hooks on the bridge nothing could be compared, so such a door is made anew next time.
        self._stamp = () if self._is_hooked() else self._find_stamp(model)

    def _find_plain(self) -> tuple[nn.Module | None, dict[nn.Module, nn.Module]]:
        """The plain twin with the fastest attention that gives the bridge's logits, if any does."""
        expected = run(self.bridged, self.probe)
        try:
            plain, twins = strip(self.bridged)
            for implementation in ("sdpa", "eager"):
                set_attention(plain, implementation)
                if _close(run(plain, self.probe), expected):
                    self.attention = implementation
                    return plain, twins
            reason = "plain Hugging Face modules give other logits than the bridge"
        except (TypeError, ValueError) as error:
            reason = str(error)
        logger.info("This model runs through its bridge, at about half the speed: %s", reason)
        return None, {}

    def _is_hooked(self) -> bool:
        """Whether somebody has forward hooks on the wrapped model: neither saelab nor the libraries themselves."""
        found = [hook for hooks in self._hooks if hooks for hook in hooks.values()]
        return any(not is_ours(hook) and not _is_inner(hook) for hook in found)

    def _find_stamp(self, model: Any) -> tuple:
        """Changes when a weight is edited in place or replaced, or the bridge processes its weights."""
        found = [(id(w), w._version) for weights in self._weights if weights for w in weights.values() if w is not None]
        return (model.compatibility_mode, *found)

    def is_current(self, model: Model) -> bool:
        """Whether the model's weights are still those that this door was made with."""
        return self._stamp == self._find_stamp(model)

    def find(self, name: str) -> Any:
        """The HookPoint called `name`, in the old or the canonical spelling; else ValueError with near names."""
        if name not in self.points:
            near = difflib.get_close_matches(name, self.points, n=5, cutoff=0.4)
            hint = f"Did you mean one of {near}?" if near else "Names look like 'blocks.0.hook_resid_post'."
            raise ValueError(f"`hook_point` must be a hook point of this model, got '{name}'. {hint}")
        return self.points[name]

    def bridge_site(self, name: str) -> Site:
        """Where the bridge fires a hook point."""
        return self.find(name), "hook_out"

    def plain_site(self, name: str) -> Site | None:
        """The plain module and side that should carry the same tensor, where there is one."""
        path, _, side = str(self.find(name).name).rpartition(".")
        twin = self.twins.get(self.components[path]) if path in self.components else None
        return (twin, side) if twin is not None and side in ("hook_in", "hook_out") else None

    def check(self, name: str) -> bool:
        """Whether the plain twin has the bridge's tensor at a hook point, and answers a test edit there alike.

        Measured once per hook point, in at most four short forwards. RuntimeError unless the bridge fires it once.
        """
        if name not in self.agrees:
            seen = self._read(self.bridged, self.bridge_site(name))
            require_once(name, len(seen))
            site = self.plain_site(name)
            self.agrees[name] = self.plain is not None and site is not None and self._agree(name, site, seen[0])
        return self.agrees[name]

    def _agree(self, name: str, site: Site, value: Tensor) -> bool:
        """Same tensor, and same logits when it is halved."""
        assert self.plain is not None
        seen = self._read(self.plain, site)
        if len(seen) != 1 or not _close(seen[0], value):
            return False
        return _close(self._halved(self.plain, site), self._halved(self.bridged, self.bridge_site(name)))

    def _read(self, model: nn.Module, site: Site) -> list[Tensor]:
        seen: list[Tensor] = []
        with attach(site, lambda x: seen.append(x.clone())):
            run(model, self.probe)
        return seen

    def _halved(self, model: nn.Module, site: Site) -> Tensor:
        with attach(site, lambda x: x / 2 if x.is_floating_point() else None):
            return run(model, self.probe)

    def trusts(self, name: str) -> bool:
        """`check`, but with hooks or edits in place nothing new is probed: a probe would run them behind one's back."""
        if name in self.agrees:  # known, hooks or not
            return self.agrees[name]
        return not self._count_ours() and not self._is_hooked() and self.check(name)

    def route(self, names: list[str]) -> tuple[nn.Module, list[Site]]:
        """The fastest model that serves these hook points truthfully, and where they are on it.

        That is the bridge itself where somebody else has hooks on it, or a hook point exists only there.
        """
        plain_sees_all = self._count_ours() == self.n_spliced and not self._is_hooked()
        trusted = [self.trusts(name) for name in names]  # all of them, so that a wrong name is always reported
        if self.plain is not None and plain_sees_all and all(trusted):
            return self.plain, [site for name in names if (site := self.plain_site(name)) is not None]
        return self.bridged, [self.bridge_site(name) for name in names]

    def _count_ours(self) -> int:
        """Edits of saelab's now on the bridge's hook points."""
        return sum(is_ours(hook) for hooks in self._edits if hooks for hook in hooks.values())


def require_once(name: str, n_fired: int) -> None:
    """RuntimeError naming the hook and its count, unless it fired exactly once in a forward."""
    if n_fired != 1:
        raise RuntimeError(
            f"A hook point must fire exactly once in a forward; '{name}' fired {n_fired} times. "
            "Choose another hook point; some fire only with an option of the bridge switched on."
        )


def _is_inner(hook: Any) -> bool:
    """Hooks by which the two libraries do their own work; what users add through a HookPoint is not among them."""
    return str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens.model_bridge."))


def _walk(model: Any, path: str) -> Any:
    for part in path.split(".") if path else []:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal up to what another order of rounding explains: 0.1 % in float32, 5 % in half precision (relative norm)."""
    if x.shape != y.shape:
        return False
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.05
    return float((x.double() - y.double()).norm()) <= tolerance * float(y.double().norm())


_doors: WeakKeyDictionary[nn.Module, Door] = WeakKeyDictionary()


def door(model: Model) -> Door:
    """The `Door` of a model, made anew when its weights changed since."""
    known = _doors.get(model)
    if known is None or not known.is_current(model):
        known = _doors[model] = Door(model)
    return known
