"""`Freezing`: functions that are not linear are replaced by constants, whatever module calls them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Hold = Callable[[Callable[[], Tensor]], Tensor]
"""From a function that computes a constant to that constant: computed now, or in an earlier forward pass."""


class Freezing(TorchFunctionMode):
    """Context manager in which a model's forward pass is affine in its activations.

    Constants are the results of softmax (attention patterns), of square roots, deviations and norms (scales of norms),
    of sigmoid and softplus (gates), and tanh(x) / x (softcaps); gradients do not pass through them. LayerNorm's
    centering and all weights stay. The constants are computed in the first forward pass, or taken from one that was
    done before.

    >>> norm, x = torch.nn.LayerNorm(4), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> with Freezing() as first:
    ...     y = norm(x)
    >>> with Freezing(first.constants):
    ...     twice = norm(2 * x)
    >>> torch.allclose(twice, 2 * y)
    True
    """

    def __init__(self, constants: Sequence[Tensor] | None = None, n_rows: int = 1) -> None:
        """`constants` are those of an earlier forward pass over one row of tokens; None computes them. `n_rows` is the
        number of rows of this pass, all of which have the same constants.
        """
        super().__init__()
        self.constants: list[Tensor] = []
        self._n_rows = n_rows
        self._known: Iterator[Tensor] | None = None if constants is None else iter(constants)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns, or its frozen version."""
        rule = FREEZING_RULES.get(func)
        if rule is None or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return func(*args, **(kwargs or {}))
        return rule(self._hold, func, *args, **(kwargs or {}))

    def _hold(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._known is None:
            found = compute().detach()
        else:
            constant = next(self._known, None)
            if constant is None:
                raise RuntimeError("A model must call the same functions in each forward pass, got more of them.")
            found = constant.expand(self._n_rows, *constant.shape[1:]) if self._n_rows > 1 else constant
        self.constants.append(found)
        return found


def _freeze_result(hold: Hold, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return hold(lambda: func(*args, **kwargs))


def freeze_root(hold: Hold, func: Any, x: Tensor, exponent: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Powers: square roots are constants, others are computed.

    Args:
        hold: returns the constant in place of what a function computes.
        func: the function that the model calls.
        x: the base.
        exponent: the exponent.
        *args: its further arguments.
        **kwargs: its further arguments, by name.
    """
    if isinstance(exponent, float) and abs(exponent) == 0.5:
        return hold(lambda: func(x, exponent, *args, **kwargs))
    result: Tensor = func(x, exponent, *args, **kwargs)
    return result


def _freeze_slope(hold: Hold, func: Any, x: Tensor) -> Tensor:
    """tanh(x) as x times the constant tanh(x) / x."""
    return x * hold(lambda: torch.where(x == 0, 1.0, func(x) / x))


def _freeze_layer_norm(
    hold: Hold,
    _func: Any,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_args: Any,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    wide = x if x.dtype == torch.float64 else x.float()
    centered = wide - wide.mean(axes, keepdim=True)
    normalized = centered * hold(lambda: (centered.square().mean(axes, keepdim=True) + eps).rsqrt())
    normalized = normalized if weight is None else normalized * weight
    return (normalized if bias is None else normalized + bias).to(x)


def _freeze_rms_norm(
    hold: Hold,
    _func: Any,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    wide = x if x.dtype == torch.float64 else x.float()
    least = torch.finfo(x.dtype).eps if eps is None else eps
    normalized = wide * hold(lambda: (wide.square().mean(axes, keepdim=True) + least).rsqrt())
    return (normalized if weight is None else normalized * weight).to(x)


def freeze_attention(hold: Hold, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
    """Fused attention: its pattern is what it does to the identity in place of the values.

    Args:
        hold: returns the constant in place of what a function computes.
        func: the function that the model calls.
        query: (..., heads, n, d_head) queries.
        key: (..., heads, n, d_head) keys, of fewer heads where several queries share one.
        value: (..., heads, n, d_head) values, of as many heads as the keys.
        *args: its further arguments.
        **kw: its further arguments, by name.
    """

    def find_pattern() -> Tensor:
        unit = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
        found: Tensor = func(query, key, unit.expand(*key.shape[:-1], -1).contiguous(), *args, **kw)
        return found

    pattern = hold(find_pattern)
    if value.ndim == 4 and value.shape[1] != query.shape[1]:  # fewer keys and values than queries
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return pattern @ value


def _list_rules() -> dict[Any, Callable[..., Tensor]]:
    rules: dict[Any, Callable[..., Tensor]] = {
        F.layer_norm: _freeze_layer_norm,
        torch.layer_norm: _freeze_layer_norm,
        F.scaled_dot_product_attention: freeze_attention,
        torch.linalg.vector_norm: _freeze_result,
        torch.linalg.norm: _freeze_result,
        F.softmax: _freeze_result,
        F.sigmoid: _freeze_result,
        F.softplus: _freeze_result,
        F.tanh: _freeze_slope,
        Tensor.__pow__: freeze_root,
    }
    rules |= {getattr(home, "rms_norm"): _freeze_rms_norm for home in (F, torch) if hasattr(home, "rms_norm")}  # noqa: B009
    for home in (torch, Tensor):
        for name in ("softmax", "sigmoid", "sqrt", "rsqrt", "std", "var", "norm"):
            rules[getattr(home, name)] = _freeze_result
        rules[home.pow], rules[home.tanh] = freeze_root, _freeze_slope
    return rules


FREEZING_RULES = _list_rules()
"""By function, what takes its place: a function of `hold`, the function and its arguments"""
