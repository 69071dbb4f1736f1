"""The optimizer of a training run: Adam with gradient clipping, for weights stored as they are or transposed.

Gradients are those in `.grad` of the parameters, and sparse ones (`SparseGradient`), which take no memory of the size
of a weight: a kernel computes a row of one, updates the row's moments and weights, and goes on to the next.
"""

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saelab.functional.compiled import use_numba
from saelab.functional.short_floats import (
    LIMIT,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
    hash_places,
)
from saelab.functional.sparse_products import GradientMemory, SparseGradient, SparseGradients
from saelab.training.config import TrainConfig
from saelab.training.ranks import ALONE, RankGrid

CHUNK = 2**20  # numbers of a weight that are in float32 at a time


def make_adam(module: nn.Module, lr: float, cfg: TrainConfig) -> torch.optim.Adam:
    """A fused Adam (arXiv:1412.6980) over the trained parameters; weights and both moments are float32.

    Weights that are stored transposed are passed as their contiguous transpose, which shares their memory, so that no
    step copies them.

    With `optim_bits=16` the moments of matrices are stored in 16 bits (`short_floats`), those of vectors as before. A
    step computes both moments in float32 and updates the weight from these; then they are rounded up or down, at
    random, with the exact value as their mean. One rounding changes the mean of gradients m by less than r = 2^-8 of
    it, the mean of squares v by less than r = 2^-9. Over the steps s errors of a running mean x of decay beta add up to
    a standard deviation of at most `r/2 (sum_s (beta^(t-s) x_s)^2)^1/2`. Where gradients go on as they were that is
    `r/2 / (1 - beta^2)^1/2` of x: for the default betas .45 % of m and 2.2 % of v, which is 1.1 % of an update. Where n
    steps bring none, v decays and its error grows to `r/2 n^1/2` of it (10 % after 10,000 steps), until gradients come
    again. Gradients of more than 2^24 count as 2^24.
    """
    trained = [_in_memory_order(p) for p in module.parameters() if p.requires_grad]
    group = {"params": trained, "optim_bits": cfg.optim_bits}
    if trained[0].device.type in ("cpu", "cuda") and hasattr(torch, "_fused_adam_"):
        return _FusedAdam(group, lr, cfg.betas)
    return torch.optim.Adam([group], lr=lr, betas=cfg.betas)


class _FusedAdam(torch.optim.Adam):
    """PyTorch's fused Adam by its kernel alone; constructor and step of its class load the compiler, a second's work.

    Args:
        group: the parameters, under "params", and settings of ours.
        lr: learning rate.
        betas: decay of the two means.
    """

    def __init__(self, group: dict[str, Any], lr: float, betas: tuple[float, float]) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "fused": True}
        state = {"defaults": defaults, "state": defaultdict(dict), "param_groups": [{**defaults, **group}]}
        self.__setstate__(state)  # type: ignore[no-untyped-call]  # as a copy of an optimizer is made

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        assert closure is None, "nothing here computes a loss again"
        group = self.param_groups[0]
        trained = [p for p in group["params"] if p.grad is not None]
        if not trained:
            return
        for parameter in trained:
            if not self.state[parameter]:
                make_moments(parameter, self)
        states = [self.state[parameter] for parameter in trained]
        means, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        settings = {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"], "lr": group["lr"]}
        grads = [parameter.grad for parameter in trained]
        torch._fused_adam_(
            trained, grads, means, squares, [], steps, weight_decay=0.0, amsgrad=False, maximize=False, **settings
        )


def make_moments(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Give a weight of the optimizer the state of no step: both moments are 0."""
    dtype = torch.int16 if _is_short(weight, optimizer) else weight.dtype
    moments = {name: torch.zeros_like(weight.detach(), dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    # where PyTorch's fused Adam reads it; steps of our own read it on the CPU
    device = weight.device if weight.is_cuda and dtype != torch.int16 else "cpu"
    optimizer.state[weight] = {"step": torch.zeros((), device=device), **moments}


def _is_short(weight: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    return weight.ndim == 2 and optimizer.param_groups[0].get("optim_bits", 32) == 16


@torch.no_grad()
def step_adam(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    normalized_rows: Container[str] = (),
    sparse: SparseGradients | None = None,
) -> None:
    """Update the module's parameters from their gradients by one step of the optimizer.

    Args:
        module: the module.
        optimizer: the result of `make_adam` for it.
        normalized_rows: names of the parameters whose rows are divided by their norms afterwards.
        sparse: gradients of parameters that have none in `.grad`.
    """
    stored = name_optimized(module, optimizer)
    taken: dict[str, Tensor | SparseGradient] = {}  # by steps of our own
    for (name, mine), parameter in zip(stored.items(), _trained(module), strict=True):
        grad = parameter.grad
        mine.grad = grad if grad is None or parameter.is_contiguous() else grad.T
        if sparse is not None and parameter in sparse:
            taken[name] = sparse[parameter]
        elif mine.grad is not None and mine.ndim == 2 and (use_numba(mine, mine.grad) or _is_short(mine, optimizer)):
            taken[name], mine.grad = mine.grad, None
    optimizer.step()
    for i, (name, mine) in enumerate(stored.items()):
        done = name in taken and _step_own(mine, taken[name], optimizer, i, name in normalized_rows)
        if name in normalized_rows and not done:
            for rows in torch.split(mine, 256):  # in chunks that fit the CPU cache
                rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
    for (name, mine), parameter in zip(stored.items(), _trained(module), strict=True):
        held = taken.get(name)
        mine.grad = None if mine is not parameter else held if isinstance(held, Tensor) else mine.grad


def _step_own(
    weight: nn.Parameter, grad: Tensor | SparseGradient, optimizer: torch.optim.Optimizer, number: int, unit: bool
) -> bool:
    """One step of a weight that PyTorch's Adam does not take, whose state is kept where PyTorch's is; whether rows were
    divided by their norms, as is asked for by `unit`.
    """
    if not optimizer.state[weight]:
        make_moments(weight, optimizer)
    group, state = optimizer.param_groups[0], optimizer.state[weight]
    state["step"] += 1
    lr, step, eps, betas = float(group["lr"]), int(state["step"]), group["eps"], group["betas"]
    key = (step * 0x9E3779B1 + number * 0x85EBCA77) & 0xFFFFFFFF
    if isinstance(grad, SparseGradient) or use_numba(weight, grad):
        from saelab.functional import numba_kernels

        given = grad if isinstance(grad, Tensor) else grad.parts
        moments = state["exp_avg"], state["exp_avg_sq"]
        numba_kernels.step_adam(
            weight.detach(), given, *moments, lr=lr, betas=betas, eps=eps, step=step, unit=unit, key=key
        )
        return True
    rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5
    n = max(1, CHUNK // weight.shape[1])
    parts = (torch.split(t, n) for t in (weight.detach(), grad, state["exp_avg"], state["exp_avg_sq"]))
    for i, (w, g, mean, square) in enumerate(zip(*parts, strict=True)):
        g = g.float().clamp(-LIMIT, LIMIT)
        m = decode_signed(mean).lerp_(g, 1 - betas[0])
        v = decode_positive(square).mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        w -= rate * m / (v.sqrt() / root + eps)
        random = hash_places(key, range(n * i, n * i + len(w)), w.shape[1], w.device)
        mean.copy_(encode_signed(m, random))
        square.copy_(encode_positive(v, random))
    return False


def name_optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the module."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return dict(zip(names, optimizer.param_groups[0]["params"], strict=True))


def differentiate(loss: Tensor, memories: Mapping[nn.Parameter, GradientMemory]) -> SparseGradients:
    """Differentiate a loss into `.grad` of the parameters, and gradients that can be kept as products into those.

    Args:
        loss: a scalar.
        memories: where the gradients of some parameters are kept as products, projected already where they say so; of
            one that has another part in `.grad` the sum is there, not projected.
    """
    for memory in memories.values():
        memory.sparse = True
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        taken = {parameter: memory.take() for parameter, memory in memories.items()}
        for memory in memories.values():
            memory.sparse = False
    kept: SparseGradients = {}
    for parameter, gradient in taken.items():
        if gradient is None:
            continue
        if parameter.grad is None:
            kept[parameter] = gradient
            memories[parameter].spare = None  # of a step whose gradient was stored
        else:
            made = replace(gradient, normals=None).to_dense()
            parameter.grad += made if parameter.is_contiguous() else made.T
    return kept


def project_gradient(weight: Tensor) -> None:
    """Subtract from each row of a weight's gradient its part along the weight's row (of unit norm), in place."""
    grad = weight.grad
    if grad is None:
        return
    if use_numba(weight, grad):
        from saelab.functional import numba_kernels

        numba_kernels.project_rows(grad, weight)
        return
    for g, w in zip(torch.split(grad, 256), torch.split(weight, 256), strict=True):  # in chunks that fit the CPU cache
        g.addcmul_(torch.linalg.vecdot(g, w).unsqueeze(1), w, value=-1)


def average_gradients(module: nn.Module, ranks: RankGrid, own: Container[str]) -> None:
    """Replace gradients by their mean over the ranks that saw other tokens, in place.

    Args:
        module: the module.
        ranks: the processes that train it.
        own: names of the parameters of which each rank of the latents has those of its own; the others, which all have
            alike, get the first one's gradient, so that no rounding ever drives them apart.
    """
    if ranks.alone:
        return
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        grad = parameter.grad if parameter.grad.is_contiguous() else parameter.grad.T
        ranks.data.average_(grad)
        if name not in own:
            ranks.latents.spread_(grad)


def clip_gradients(
    module: nn.Module,
    limit: float,
    ranks: RankGrid = ALONE,
    own: Container[str] = (),
    sparse: SparseGradients | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`, and return the norm before.

    Args:
        module: the module.
        limit: largest norm.
        ranks: the processes that have the gradients.
        own: names of the parameters of which each rank of the latents has those of its own; the others count once.
        sparse: gradients of parameters that have none in `.grad`; scaled ones are written here.
        known: squared norms that need not be computed, by name of the parameter.
    """
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    grads = list(named.values())
    flat = {name: (grad if grad.is_contiguous() else grad.T).reshape(-1) for name, grad in named.items()}
    known = known or {}
    # twice as fast as vector_norm
    squares = {name: known[name] if name in known else torch.dot(grad, grad) for name, grad in flat.items()}
    if ranks.latents.size > 1:
        mine = [name for name in squares if name in own]
        total = ranks.latents.total(torch.stack([squares[name] for name in mine]))
        squares |= dict(zip(mine, total, strict=True))
    found = {} if sparse is None else sparse
    all_squares = [*squares.values(), *(gradient.square_sum() for gradient in found.values())]
    norm = torch.stack(all_squares).sum().sqrt()
    scale = (limit / (norm + 1e-12)).clamp(max=1.0)
    if norm.device.type != "cpu" or scale < 1:
        for grad in grads:
            grad.mul_(scale)
        found.update({parameter: gradient.scaled(scale) for parameter, gradient in found.items()})
    return norm


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _in_memory_order(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_contiguous() else nn.Parameter(parameter.detach().T)
