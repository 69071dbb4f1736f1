"""The Hugging Face model inside a TransformerBridge, without wrappers: the same weights at Hugging Face's speed.

`TransformerBridge` computes attention and norms itself so that every intermediate value has a hook; that takes about
twice the time of the model it wraps. Most hook points are the input or the output of a Hugging Face module, so the same
tensor can be read from plain modules that share the bridge's parameters.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.lm.norms import find_neutral, set_neutral, unset_neutral, with_gain

_HOOK_BOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_INPUTS = ("hidden_states", "input", "input_ids", "x", "inputs_embeds")

Tap = Callable[[Tensor], Tensor | None]
"""A hook function: takes the activation, returns its replacement or None."""
Site = tuple[nn.Module, str]
"""A module and its side, "hook_in" or "hook_out", or "hook_normalized" of a norm."""


def unwrap(module: nn.Module) -> nn.Module:
    """Hugging Face's own module behind the bridge's wrappers of it; any other module as it is."""
    parts = sys.modules.get("transformer_lens.model_bridge.generalized_components.base")
    while (
        parts is not None and isinstance(module, parts.GeneralizedComponent) and module.original_component is not None
    ):
        module = module.original_component
    return module


def strip(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of a module tree without bridge wrappers and hooks, sharing every parameter, and the map from old to new
    modules.

    Only the tree is copied, not the weights, and the copy is in evaluation mode. Raises TypeError for a module whose
    `forward` was replaced on the instance (offloaded or patched models): its copy would still run the original.
    """
    twins: dict[nn.Module, nn.Module] = {}
    configs: dict[int, Any] = {}

    def twin(wrapper: nn.Module) -> nn.Module:
        module = unwrap(wrapper)
        if module not in twins:
            twins[module] = _copy_shell(module, configs)
            children = {name: child if child is None else twin(child) for name, child in module._modules.items()}
            twins[module].__dict__["_modules"] = children
        twins[wrapper] = twins[module]
        return twins[module]

    return twin(model).eval(), twins


def _copy_shell(module: nn.Module, configs: dict[int, Any]) -> nn.Module:
    """A copy of one module with its own dictionaries (hooks, config, names of weights) and the same Parameter
    objects.
    """
    patch = vars(module).get("forward")
    if patch is not None and not str(getattr(patch, "__module__", "")).startswith("transformer_lens."):
        raise TypeError(
            f"`forward` of {type(module).__name__} is replaced on the instance (an offloaded or patched model), so it "
            "cannot be copied. Load the model whole on one device."
        )
    new: nn.Module = object.__new__(type(module))
    books = {name: type(vars(module)[name])() for name in _HOOK_BOOKS}
    weights = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers")}
    new.__dict__.update({**vars(module), **books, **weights})
    # Left out: the bridge's patched `forward`, the compiled original, and Hugging Face's flag of models whose
    # recording hooks are installed, as the copy has no hooks.
    for name in ("forward", "_compiled_call_impl", "_output_capturing_hooks_installed"):
        new.__dict__.pop(name, None)
    if (config := vars(module).get("config")) is not None:
        new.__dict__["config"] = configs.setdefault(id(config), copy.deepcopy(config))
    return new


def set_attention(model: nn.Module, implementation: str) -> bool:
    """Set a plain model's attention implementation, "sdpa" or "eager"; returns whether the model supports it.

    Also switches off the output of attention maps, which the bridge switches on.
    """
    config: Any = model.config
    config.output_attentions = False
    # Fused attention ignores soft-capped scores (Gemma 2), so such models stay with eager.
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    set_implementation: Any = model.set_attn_implementation
    try:
        set_implementation(implementation)
    except ValueError:  # a model without attention has no choice; its only implementation is called eager
        return implementation == "eager"
    return True


def make_probe(model: Any) -> Tensor:
    """Two rows of random token ids for short test forward passes."""
    length = min(16, model.cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, model.cfg.d_vocab, (2, length), generator=generator, device="cpu")
    return probe.to(next(model.original_model.parameters()).device)


@torch.no_grad()
def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits without gradient; see `run_as_set`."""
    return run_as_set(model, ids)


def run_as_set(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a plain or wrapped Hugging Face model, in evaluation mode and without a cache; gradients as enabled by
    the caller.

    Rows are padded on the right, where a causal model does not look, so no attention mask is needed and positions count
    from 0 in every row.
    """
    with evaluating(model):
        logits: Tensor = model(ids, use_cache=False).logits
        return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model is in evaluation mode; restored afterward."""
    training = [module for module in model.modules() if module.training]  # some may be, in a model that is not
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class OwnHook:
    """Base class of objects whose methods saelab registers as PyTorch hooks, to distinguish them from the user's."""


class TapHook(OwnHook):
    """A hook function (`Tap`) as a PyTorch hook."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def at_input(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Apply the hook function to the first tensor among a module's inputs."""
        if args and isinstance(args[0], Tensor):
            new = self.tap(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        if (name := next((name for name in _INPUTS if name in kwargs), None)) is None:
            raise RuntimeError(
                f"A hook must find what goes into a module as its first argument or one of {_INPUTS}, got "
                f"{sorted(kwargs)}. Choose the output of the module before it."
            )
        new = self.tap(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    def at_output(self, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Apply the hook function to the first tensor among a module's outputs."""
        if not isinstance(output, tuple | list):
            return self.tap(output)
        new = self.tap(output[0])
        if new is None:
            return None
        return [new, *output[1:]] if isinstance(output, list) else (new, *output[1:])


class NormHook(TapHook):
    """The hook functions between a norm's division and its gain, in order of entry, as two PyTorch hooks.

    The module computes with a neutral gain and without bias, once, so that it is its own formula, and what freezes
    norms or replaces their gradients holds for it; gain and bias come after the hook functions.
    """

    def __init__(self, module: nn.Module) -> None:
        value = find_neutral(module) if module._parameters.get("weight") is not None else 1.0
        if value is None:
            raise ValueError(f"Only a norm has a `hook_normalized`, got a {type(module).__name__}.")
        self.module, self.value = module, value
        self._taps: list[TapHook] = []
        self._handles: list[RemovableHandle] = []

    @classmethod
    def of(cls, module: nn.Module) -> "NormHook":
        """The one on a module, or a new one."""
        owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
        return next((owner for owner in owners if isinstance(owner, cls)), None) or cls(module)

    @contextmanager
    def added(self, tap: Tap) -> Iterator[None]:
        """Context manager in which a hook function takes part."""
        entry = TapHook(tap)
        self._taps.append(entry)
        if len(self._taps) == 1:  # before the hooks on what the norm returns, which see its gain
            after = self.module.register_forward_hook(self.at_output, prepend=True, always_call=True)
            self._handles = [self.module.register_forward_pre_hook(self.before), after]
        try:
            yield
        finally:
            self._taps.remove(entry)
            if not self._taps:
                for handle in self._handles:
                    handle.remove()
                unset_neutral(self.module)

    def before(self, module: nn.Module, _args: tuple) -> None:
        """Make the gain neutral."""
        set_neutral(module, self.value)

    def at_output(self, module: nn.Module, _args: tuple, output: Any) -> Any:
        """Apply the hook functions, then gain and bias."""
        unset_neutral(module)
        if output is None:  # the norm itself has failed
            return None
        for entry in tuple(self._taps):
            new = entry.tap(output)
            output = output if new is None else new
        return with_gain(module, self.value, output)


@contextmanager
def attach(site: Site, tap: Tap) -> Iterator[None]:
    """Context manager in which the hook function `tap` runs at a site."""
    module, side = site
    if side == "hook_normalized":
        with NormHook.of(module).added(tap):
            yield
        return
    hook = TapHook(tap)
    if side == "hook_in":
        handle = module.register_forward_pre_hook(hook.at_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(hook.at_output)
    with handle, _announced(module, handle):
        yield


@contextmanager
def _announced(module: Any, handle: RemovableHandle) -> Iterator[None]:
    """Context manager that lists a hook in the bridge's own registry; some parts of the bridge fire a hook point only
    if that is not empty.
    """
    if not hasattr(module, "fwd_hooks"):
        yield
        return
    from transformer_lens.hook_points import LensHandle

    entry = LensHandle(handle, is_permanent=True)  # permanent: not removed by `reset_hooks`
    module.fwd_hooks.append(entry)
    try:
        yield
    finally:
        module.fwd_hooks = [other for other in module.fwd_hooks if other is not entry]


def is_ours(hook: Any) -> bool:
    """Whether a registered PyTorch hook is one of saelab's."""
    return isinstance(getattr(hook, "__self__", None), OwnHook)
