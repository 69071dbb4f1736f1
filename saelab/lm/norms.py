"""Norms of a model without their gain: what TransformerLens calls `hook_normalized`, of Hugging Face's own modules."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LARGE = 1000.0
"""factor of a test input, at which what a norm adds to the variance does not matter"""


@torch.no_grad()
def find_neutral(module: nn.Module, width: int | None = None) -> float | None:
    """The value of a norm's `weight` at which its gain is 1: 1, or 0 where the gain is 1 + weight, as in Gemma's.

    None for any other module. That a module is a norm is measured: with its gain neutral and its bias zero it returns
    rows n of unit mean square, and n * gain + bias is what it returns as it is.

    Args:
        module: the module.
        width: of the rows that go into a module without weights; None takes those as no norms.

    >>> find_neutral(torch.nn.LayerNorm(8)), find_neutral(torch.nn.Linear(8, 8))
    (1.0, None)
    """
    own, weight = dict(module.named_parameters(recurse=False)), getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower() or set(own) - {"weight", "bias"} or any(module.children()):
        return None
    shape = weight.shape if isinstance(weight, Tensor) else () if width is None else (width,)
    if len(shape) != 1 or len(inspect.signature(module.forward).parameters) != 1:  # a gate is not a norm's business
        return None
    # Drawn by formula, so that no random state is touched; two texts of three tokens.
    x = torch.arange(6 * shape[0], dtype=torch.float32).mul(2.39996).sin().view(2, 3, -1)
    x = x if weight is None else x.to(weight)
    return next((value for value in (1.0, 0.0) if _is_neutral(module, value, x)), None)


def _is_neutral(module: Any, value: float, x: Tensor) -> bool:
    try:
        said = module.forward(x)
        with neutral(module, value):
            normalized, large = module.forward(x), module.forward(_LARGE * x)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: then it is no norm of rows
        return False
    if not all(isinstance(y, Tensor) and y.shape == x.shape for y in (said, normalized, large)):
        return False
    rounding = 1e-5 if x.dtype in (torch.float32, torch.float64) else 0.02
    whole = with_gain(module, value, normalized)
    is_whole = (whole - said).double().norm() <= rounding * said.double().norm()
    return bool(is_whole and ((large.double().square().mean(-1) - 1).abs() < 0.03).all())


@contextmanager
def neutral(module: nn.Module, value: float) -> Iterator[None]:
    """Context manager in which a norm has a gain of 1 and no bias, and keeps its parameters.

    Args:
        module: the norm.
        value: from `find_neutral`.
    """
    set_neutral(module, value)
    try:
        yield
    finally:
        unset_neutral(module)


def set_neutral(module: nn.Module, value: float) -> None:
    """Begin what `neutral` does: attributes of the object hide its parameters, which are not touched."""
    for name, fill in (("weight", value), ("bias", 0.0)):
        if (own := module._parameters.get(name)) is not None:
            module.__dict__[name] = torch.full_like(own, fill, requires_grad=False)


def unset_neutral(module: nn.Module) -> None:
    """End what `neutral` does."""
    for name in ("weight", "bias"):
        if name in module._parameters:
            module.__dict__.pop(name, None)


def with_gain(module: Any, value: float, normalized: Tensor) -> Tensor:
    """n * gain + bias, in the dtype of n.

    Args:
        module: the norm.
        value: from `find_neutral`.
        normalized: (..., d) activations n after the division by the norm.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    wide = normalized if normalized.dtype == torch.float64 else normalized.float()
    if weight is not None:
        wide = wide * (weight.to(wide.dtype) + (1 - value))
    return (wide if bias is None else wide + bias.to(wide.dtype)).to(normalized)
