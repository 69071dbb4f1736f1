"""`propagating`: layer-wise relevance propagation, by replacing the gradients of functions that are not linear.

The rules are those of RelP and of AttnLRP, and hold for the functions of torch, whatever module calls them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saelab.lm.freezing import FREEZING_RULES, freeze_root
from saelab.lm.hook_points import hook_points_of
from saelab.lm.model_checks import Model

RelevanceMethod = Literal["relp", "attnlrp"]
NEAR_ZERO = 1e-3
"""where the slope act(h) / h is taken for h = 0; the step is large enough for half precision"""
POWERS = (2, 3)
"""exponents of powers that are activation functions (squared ReLU)"""


@contextmanager
def propagating(model: Model, method: RelevanceMethod) -> Iterator[None]:
    """Context manager in which forward passes of a model are recorded with propagation rules in place of gradients.

        norm                  x / scale(x)            the scale is a constant
        activation function   act(h)                  h times the constant act(h) / h
        gate                  sigmoid(h), softplus    a constant
        product               a b of two activations  each passes half
        "relp": attention     softmax(s)              a constant
        "attnlrp": attention  softmax(s)              the gradient; its products, q k and pattern v, pass half each

    What `torch.autograd.grad` gives of such a forward pass are propagation coefficients c: the relevance of an
    activation x is x c. Linear maps and all other functions have their gradients. Results of the forward pass are the
    same but for rounding. The model's parameters need no gradients within, nor does a backward pass later give them
    any. Sources: arXiv:2508.21258 (RelP), arXiv:2402.05602 (AttnLRP).

    Args:
        model: the language model.
        method: "relp" or "attnlrp".

    >>> model, ids = sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> push = torch.zeros(32, requires_grad=True)
    >>> with propagating(model, "relp"), sl.splice(model, {"blocks.0.hook_resid_post": lambda x: x + push}):
    ...     logit = sl.lm.logits(model, ids, grad=True)[0, -1, 7]
    >>> torch.autograd.grad(logit, push)[0].shape
    torch.Size([32])
    """
    running = hook_points_of(model).running
    trained = [parameter for parameter in running.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:  # so that what requires a gradient is an activation
            parameter.requires_grad_(False)
        with _Propagation(RELEVANCE_RULES[method]):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def require_rules(result: Tensor) -> None:
    """Raise ValueError where a forward pass within `propagating` has passed an autograd function that its author wrote:
    no rule takes the place of such a function's own gradient.
    """
    seen, left = set(), [result.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise ValueError(
                "Relevance rules need a model of PyTorch's own functions, got one with a gradient of its own, "
                f"{type(node).__name__}. Use `method='gradient'` or 'integrated'."
            )
        left += [before for before, _ in node.next_functions]


PropagationRule = Callable[..., Tensor]


class _Propagation(TorchFunctionMode):
    """Replaces functions of activations that require gradients by their rules."""

    def __init__(self, rules: dict[Any, PropagationRule]) -> None:
        super().__init__()
        self._rules = rules
        self._odd: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns, with the gradient of its rule."""
        known = kwargs or {}
        if func in _SUMS and any(arg is self._odd for arg in args) and not all(map(_is_activation, args)):
            return _hold(lambda: func(*args, **known))
        rule = self._rules.get(func)
        if rule is None or not any(map(_is_activation, (*args, *known.values()))):
            return func(*args, **known)
        found = rule(_hold, func, *args, **known)
        if func in _ODD:
            self._odd = found
        return found


def _is_activation(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_activation, value))
    return isinstance(value, Tensor) and value.requires_grad


@torch.no_grad()
def _hold(compute: Callable[[], Tensor]) -> Tensor:
    return compute().detach()


def _share(x: Any, n: int) -> Any:
    """`x`, to which a share 1 / n of the gradient is passed."""
    if n == 1 or not _is_activation(x):
        return x
    shared = x.view_as(x)
    shared.register_hook(lambda gradient: gradient / n)
    return shared


def _pass_slope(_hold: Any, func: Any, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """act(h), whose gradient is the constant act(h) / h."""
    held = h.detach()
    away = torch.where(held == 0, NEAR_ZERO, held)
    slope = func(away, *args, **kwargs) / away
    found: Tensor = func(held.clone(), *args, **kwargs) + slope * (h - held)
    return found


def _pass_power(hold: Any, func: Any, h: Tensor, exponent: Any, *args: Any, **kwargs: Any) -> Tensor:
    rule = _pass_slope if isinstance(exponent, (int, float)) and exponent in POWERS else None
    return (rule or freeze_root)(hold, func, h, exponent, *args, **kwargs)


def _share_product(_hold: Any, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A product, of whose gradient each factor that is an activation gets an equal share."""
    if func is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = (args[0], *args[1])
    n = sum(map(_is_activation, args))
    found: Tensor = func(*(_share(arg, n) for arg in args), **kwargs)
    return found


def _share_added_product(
    hold: Any, func: Any, summand: Tensor, batch1: Tensor, batch2: Tensor, **kwargs: Any
) -> Tensor:
    """A product that is added to something; the names are those of `torch.baddbmm`."""
    return _share_product(hold, lambda *factors: func(summand, *factors, **kwargs), batch1, batch2)


def _share_attention(
    _hold: Any, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Fused attention: half for the values and half for the pattern, of which queries and keys get half each."""
    q, k, v = map(_is_activation, (query, key, value))
    query, key, value = _share(query, (1 + k) * (1 + v)), _share(key, (1 + q) * (1 + v)), _share(value, 1 + (q or k))
    found: Tensor = func(query, key, value, *args, **kwargs)
    return found


_ODD = {torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf}
"""functions f for which 1 + f(u) is a gate, as in GELU"""
_SUMS = {torch.add, Tensor.add}
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


def _list_rules() -> dict[RelevanceMethod, dict[Any, PropagationRule]]:
    names = ("relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "celu", "hardswish")
    rules = FREEZING_RULES | {getattr(F, name): _pass_slope for name in names}
    for home in (torch, Tensor):
        rules |= {getattr(home, name): _pass_slope for name in ("relu", "square", "expm1", "erf")}
        rules |= {getattr(home, name): _share_product for name in ("mul", "multiply", "matmul", "bmm")}
        rules |= {home.pow: _pass_power, home.baddbmm: _share_added_product}
    rules |= {Tensor.__pow__: _pass_power, torch.einsum: _share_product}
    attention = {F.scaled_dot_product_attention: _share_attention}
    lrp = {func: rule for func, rule in rules.items() if func not in _SOFTMAX} | attention
    return {"relp": rules, "attnlrp": lrp}


RELEVANCE_RULES = _list_rules()
"""by method and function, what takes the function's place"""
