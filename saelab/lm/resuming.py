"""Forward passes that begin in the middle: layers before a hook point, whose output is known, are not computed again.

Only Hugging Face's plain modules are passed over, which are saelab's own copy of the tree, and only where a trial gives
the same logits to the bit: some models hand more than one tensor from lower layers to higher ones.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.hook_points import HookPoints, hook_points_of
from saelab.lm.hooks import read_sites, to_model, within_context
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import run


@dataclass(frozen=True, eq=False)
class LayersBelow:
    """The layers of a plain Hugging Face model that come before a hook point."""

    plain: nn.Module
    layers: tuple[nn.Module, ...]
    n_empty: int | None = None
    """number of empty places after the activations in what a layer returns; None where it returns them alone"""

    def read(self, model: Model, ids: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d"]:
        """What the last of the layers puts out, in the model's dtype and without gradient; the forward pass ends there.

        Args:
            model: the bridge that the plain model belongs to.
            ids: token ids, padded on the right.
        """
        with within_context(model, ids):
            return read_sites(self.plain, {"last": (self.layers[-1], "hook_out")}, to_model(model, ids), stop=True)[
                "last"
            ]

    @contextmanager
    def passed_over(self, output: Float[Tensor, "batch n d"]) -> Iterator[None]:
        """Context manager in which a forward pass does not compute the layers: `output` is what comes out of them.

        Edits of the last layer's output still apply.
        """
        returned = output if self.n_empty is None else (output, *[None] * self.n_empty)
        for layer in self.layers:
            layer.__dict__["forward"] = lambda *_args, **_options: returned
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


_known: "weakref.WeakKeyDictionary[HookPoints, dict[str, LayersBelow | None]]" = weakref.WeakKeyDictionary()


def find_layers_below(model: Model, hook_point: str) -> LayersBelow | None:
    """The layers before a hook point that need not be computed again; None where there are none.

    There are none, either, where a trial of three short forward passes, made once, finds that the model needs more than
    the last layer's output, and while hooks are on the model, whoever registered them.

    >>> model = sl.lm.tiny_model()
    >>> [len(found.layers) if (found := find_layers_below(model, f"blocks.1.{p}")) else 0
    ...  for p in ("hook_resid_pre", "hook_resid_post")]
    [1, 2]
    """
    home = hook_points_of(model)
    if home.plain is None or home.n_spliced or home.route([hook_point])[0] is not home.plain:
        return None
    known = _known.setdefault(home, {})
    if hook_point not in known:
        with home.aside():
            known[hook_point] = _try(home, home.plain, hook_point)
    return known[hook_point]


def _try(home: HookPoints, plain: nn.Module, hook_point: str) -> LayersBelow | None:
    site = home.plain_site(hook_point)
    layers = _list_before(plain, *site) if site is not None else ()
    if not layers:
        return None
    try:
        said, output, others = _run_seeing(plain, layers[-1], home.probe)
        if output.shape[:2] != home.probe.shape or any(other is not None for other in others or ()):
            return None
        found = LayersBelow(plain, layers, None if others is None else len(others))
        run(plain, home.probe.flip(1))  # what is left of lower layers anywhere is now that of another text
        with found.passed_over(output):
            again = run(plain, home.probe)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: the model is then run whole
        return None
    return found if torch.equal(again, said) else None


def _run_seeing(plain: nn.Module, layer: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
    """Logits, what a layer put out, and what it returned besides; None where it returned a tensor alone."""
    seen: list[tuple[Tensor, tuple | None]] = []

    def see(_module: nn.Module, _args: tuple, returned: Any) -> None:
        output, others = (returned[0], tuple(returned[1:])) if isinstance(returned, tuple) else (returned, None)
        seen.append((output.clone(), others))  # a copy, since the model may add to it in place

    with layer.register_forward_hook(see):
        said = run(plain, ids)
    [(output, others)] = seen
    return said, output, others


def _list_before(plain: nn.Module, module: nn.Module, side: str) -> tuple[nn.Module, ...]:
    """The elements of the outermost list of layers that are complete where a module begins, or ends."""
    for listed in plain.modules():
        if isinstance(listed, nn.ModuleList):
            for i, layer in enumerate(listed):
                if any(part is module for part in layer.modules()):
                    return tuple(listed)[: i + (layer is module and side == "hook_out")]
    return ()
