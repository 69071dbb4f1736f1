"""`Freezing`: functions that are not linear are replaced by constants, whatever module calls them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Hold = Callable[[Callable[[], Tensor]], Tensor]
"""From a function that computes a constant to that constant: computed now, or in an earlier forward pass."""
Watch = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Sees each function that is called, its arguments, those by name, and its result."""


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

    def __init__(self, constants: Sequence[Tensor] | None = None, n_rows: int = 1, watch: Watch | None = None) -> None:
        """`constants` are those of an earlier forward pass over one row of tokens; None computes them. `n_rows` is the
        number of rows of this pass, all of which have the same constants. `watch` sees all functions.
        """
        super().__init__()
        self.constants: list[Tensor] = []
        self._n_rows, self._watch = n_rows, watch
        self._known: Iterator[Tensor] | None = None if constants is None else iter(constants)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns, or its frozen version."""
        rule, known = FREEZING_RULES.get(func), kwargs or {}
        if rule is None or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            found = func(*args, **known)
        else:
            found = rule(self.hold, func, *args, **known)
        if self._watch is not None:
            self._watch(func, args, known, found)
        return found

    def hold(self, compute: Callable[[], Tensor]) -> Tensor:
        """The next constant: what `compute` returns, or what it returned in the earlier forward pass."""
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


@dataclass(frozen=True, eq=False)
class ScoreTerms:
    """Queries and keys of one attention as they are multiplied: rotated, normalized, of grouped heads."""

    queries: Tensor
    """(1, n_heads, n, d_head)"""
    keys: Tensor
    """(1, n_heads, n, d_head), or of fewer heads where several queries share one"""
    scale: float | None
    """factor of fused attention; None where products and scores are tensors"""
    products: Tensor | None
    """(1, n_heads, n, n), of queries and keys"""
    scores: Tensor
    """what the softmax gets: (1, n_heads, n, n); of fused attention what is added to products, () for nothing"""

    def read(self, head: int, query: int, key: int) -> tuple[float, float, float]:
        """A score, and the factor and the summand that make it of the product of query and key.

        ValueError where the score is no such function of that product alone, and where the key is hidden by a mask.
        """
        if self.scale is not None:
            added = self.scores if not self.scores.ndim else self.scores.expand(1, self.queries.shape[1], -1, -1)
            summand = float((added[0, head, query, key] if added.ndim else added).detach())
            grouped = head // (self.queries.shape[1] // self.keys.shape[1])
            product = self.queries[0, head, query].detach().double() @ self.keys[0, grouped, key].detach().double()
            score, factor = float(product * self.scale) + summand, self.scale
        else:
            assert self.products is not None
            one = self.scores[0, head, query, key]
            (into,) = torch.autograd.grad(one, self.products, retain_graph=True, allow_unused=True)
            into = torch.zeros_like(self.products) if into is None else into
            score, factor = float(one.detach()), float(into[0, head, query, key])
            summand = score - factor * float(self.products[0, head, query, key].detach())
            if int(into.count_nonzero()) > 1:
                raise ValueError(
                    "A score must be made of one product of a query and a key, got several in one score of this model."
                )
        if not factor or not abs(summand) < HIDDEN:
            raise ValueError(
                f"A key must be one that the head may attend to, got {key}, hidden from {query} by a mask."
            )
        return score, factor, summand


class ScoreWatch:
    """Keeps the `ScoreTerms` of the attention that is computed between two hook points, at its input and its output.

    It is a `Watch`; `begin` and `end` are hook functions.
    """

    def __init__(self) -> None:
        self.found: ScoreTerms | None = None
        self._is_on = False
        self._product: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, _x: Tensor) -> None:
        """Watch from here on."""
        self._is_on = True

    def end(self, _x: Tensor) -> None:
        """Watch no more."""
        self._is_on = False

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """See a function.

        Args:
            func: the function of PyTorch that was called.
            args: its positional arguments.
            kwargs: the others.
            result: what it returned.
        """
        if not self._is_on or self.found is not None:
            return
        if func is F.scaled_dot_product_attention:
            self.found = _read_fused(*args, **kwargs)
        elif func in _PRODUCTS and isinstance(result, Tensor) and result.ndim == 4:
            self._product = args[0], args[1], result
        elif func in _SOFTMAXES and self._product is not None and args[0].ndim == 4:
            queries, keys, products = self._product
            if products.shape[:3] == args[0].shape[:3]:
                self.found = ScoreTerms(queries, keys.transpose(2, 3), None, products, args[0])


def _read_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ScoreTerms:
    added = torch.zeros(()) if attn_mask is None else attn_mask
    if added.dtype == torch.bool:
        added = torch.zeros(added.shape, device=added.device).masked_fill(~added, -torch.inf)
    return ScoreTerms(query, key, 1 / math.sqrt(query.shape[-1]) if scale is None else scale, None, added)


HIDDEN = 1e4
"""what masks subtract from scores is more than that"""
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax}
