"""Adam and gradient clipping, for weights stored as they are or transposed."""

import torch
from torch import Tensor, nn

from saelab.training.config import TrainConfig


def make_adam(module: nn.Module, lr: float, cfg: TrainConfig) -> torch.optim.Adam:
    """A fused Adam (arXiv:1412.6980) over the trained parameters; weights and both moments are float32.

    Weights that are stored transposed are passed as their contiguous transpose, which shares their memory, so that no
    step copies them.
    """
    trained = [_in_memory_order(p) for p in module.parameters() if p.requires_grad]
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.Adam(trained, lr=lr, betas=cfg.betas, fused=fused)


def step_adam(module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Update the module's parameters from their gradients by one step of the optimizer."""
    for mine, parameter in zip(optimiser.param_groups[0]["params"], _trained(module), strict=True):
        grad = parameter.grad
        mine.grad = grad if grad is None or parameter.is_contiguous() else grad.T
    optimiser.step()
    for mine, parameter in zip(optimiser.param_groups[0]["params"], _trained(module), strict=True):
        mine.grad = mine.grad if mine is parameter else None  # keep no gradient but the module's own


def name_optimised(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The optimizer's parameters by their names in the module."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return dict(zip(names, optimiser.param_groups[0]["params"], strict=True))


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`, and return the norm before."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = [(grad if grad.is_contiguous() else grad.T).reshape(-1) for grad in grads]
    norm = torch.stack([torch.dot(grad, grad) for grad in flat]).sum().sqrt()  # twice as fast as vector_norm
    scale = (limit / (norm + 1e-12)).clamp(max=1.0)
    if grads[0].device.type != "cpu" or scale < 1:
        for grad in grads:
            grad.mul_(scale)
    return norm


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _in_memory_order(parameter: nn.Parameter) -> nn.Parameter:
    return parameter if parameter.is_contiguous() else nn.Parameter(parameter.detach().T)
