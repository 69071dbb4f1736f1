"""Hooks that others registered on a model: detecting them, and running the model without them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from saelab.lm.plain import TapHook, is_ours

_BOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = (
    "transformers.",
    "transformer_lens.model_bridge.component_setup",
    "transformer_lens.model_bridge.generalized_components.",
)


class HookBooks:
    """The dictionaries in which PyTorch keeps the hooks of all modules of some models, and its global hooks.

    A dictionary lives as long as its module, so checking all of them before a forward pass is quick.
    """

    def __init__(self, *trees: nn.Module) -> None:
        from transformer_lens.hook_points import HookPoint

        modules = {id(module): module for tree in trees for module in tree.modules()}.values()
        self._points: list[Any] = [module for module in modules if isinstance(module, HookPoint)]
        self._at_points = [vars(point)[name] for point in self._points for name in _BOOKS]
        others = [module for module in modules if not isinstance(module, HookPoint)]
        self._elsewhere = [vars(module)[name] for module in others for name in _BOOKS]
        self._elsewhere += [getattr(torch_module, f"_global{name}") for name in _BOOKS]

    def has_foreign(self) -> bool:
        """Whether there are hooks other than saelab's edits of hook points and the libraries' own."""
        at_points = (hook for hooks in self._at_points if hooks for hook in hooks.values())
        elsewhere = (hook for hooks in self._elsewhere if hooks for hook in hooks.values())
        return any(not is_ours(hook) and not _is_inner(hook) for hook in at_points) or any(
            isinstance(getattr(hook, "__self__", None), TapHook) or not (is_ours(hook) or _is_inner(hook))
            for hook in elsewhere  # `hook_sae` on a module of the bridge is at no hook point
        )

    def count_ours(self) -> int:
        """Number of saelab's edits that are now on hook points."""
        return sum(is_ours(hook) for hooks in self._at_points if hooks for hook in hooks.values())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager in which only the libraries' own hooks are registered; all others are restored afterwards."""
        books = [(hooks, dict(hooks)) for hooks in (*self._at_points, *self._elsewhere)]
        holders = [(vars(point), name) for point in self._points for name in ("fwd_hooks", "bwd_hooks")]
        lists = [(holder, name, holder[name]) for holder, name in holders if holder[name]]
        try:
            for hooks, found in books:
                _refill(hooks, {key: hook for key, hook in found.items() if _is_inner(hook)})
            for holder, name, handles in lists:
                holder[name] = [handle for handle in handles if _is_inner(handle.user_hook)]
            yield
        finally:
            for hooks, found in books:  # some parts of the bridge register hooks in their first forward pass
                _refill(hooks, found | {key: hook for key, hook in hooks.items() if key not in found})
            for holder, name, handles in lists:
                holder[name] = handles


def warn_of_hooks(model: nn.Module) -> None:
    """Warn where a Hugging Face object has hooks, as the copy of its modules behind a bridge does not have them."""
    if any(
        not _is_inner(hook) for module in model.modules() for name in _BOOKS for hook in vars(module)[name].values()
    ):
        warnings.warn(
            f"This {type(model).__name__} has hooks of its own, and a bridge around a copy of its modules has not. Put "
            "them on the modules of the model that is returned.",
            stacklevel=2,
        )


def _refill(hooks: dict[int, Any], content: dict[int, Any]) -> None:
    if hooks or content:
        hooks.clear()
        hooks.update(content)


def _is_inner(hook: Any) -> bool:
    """Whether a hook is one by which the two libraries do their own work, whoever registered it in the end."""
    while True:
        if isinstance(hook, partial):
            hook = hook.func
        elif getattr(hook, "__module__", None) == "transformer_lens.hook_points" and getattr(hook, "__closure__", None):
            inside = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))  # around a user's function
            hook = next(inside[name].cell_contents for name in ("full_hook", "hook") if name in inside)
        else:
            return str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)
