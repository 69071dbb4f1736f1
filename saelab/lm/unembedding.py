"""Direct effect of residual-stream directions on the logits, through the final norm and the unembedding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.lm.hook_points import HookPoints, hook_points_of
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import Site, attach, run_as_set

BIG = 1e4  # input scale at which the norm's epsilon is negligible
N_PROBE = 4


@torch.no_grad()
def read_out(model: Model, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """Logits that each direction adds to a residual stream of unit scale, the final norm's weight folded in.

    With the norm's scale held fixed, adding `a d` to a residual of scale s (its root mean square, or its standard
    deviation where the norm subtracts the mean) adds `a / s` times these numbers to the logits, exactly; a softcap of
    the logits comes after, and is taken where its slope is 1. They are found by running the model's own modules,
    including anything between norm and logits (a scale, a projection).

    Raises:
        ValueError: for directions of another width, and for a model without a final norm or with a head that is not
            linear, where these numbers are not defined.
    """
    if directions.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"Directions must have the residual stream's width ({model.cfg.d_model}), got {directions.shape[1]}; "
            "features of another place have no direct effect on the logits."
        )
    home = hook_points_of(model)
    if "ln_final" not in home.components:
        raise ValueError(
            f"Direct effects need a norm behind the last block, got a {type(home.bridged).__name__} without one. Use "
            "`sl.interventions.attribute`, or steer along the direction."
        )
    with home.aside():  # without the user's hooks and edits
        return _read(home, directions)


def _read(home: HookPoints, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    running, (site, _) = home.route(["ln_final.hook_out", "unembed.hook_out"])
    parts = [home.components[name] for name in ("ln_final", "unembed")]
    norm, head = (home.twins[part] for part in parts) if running is home.plain else parts
    weight = next(head.parameters())
    zero, ones = torch.zeros(1, 1, directions.shape[1]).to(weight), torch.ones(1, 1, directions.shape[1]).to(weight)
    bias = norm(zero)
    centers = bool((norm(BIG * ones) - bias).abs().amax() < 1e-3)  # the norm maps constants to 0
    x = directions.to(weight)[:, None]
    scale = (x - x.mean(-1, keepdim=True) if centers else x).square().mean(-1, keepdim=True).sqrt()
    folded = (norm(BIG * x / scale.clamp(min=1e-12)) - bias) * scale
    return _unembed(running, site, head, folded)[:, 0].float()


def _unembed(running: nn.Module, norm: Site, head: nn.Module, x: Float[Tensor, "n 1 d"]) -> Float[Tensor, "n 1 v"]:
    """Logits that vectors after the final norm add.

    The head alone is faster than a forward pass, and right up to a factor in most models: the factor is measured on a
    few rows (Granite, Cohere, Falcon-H1); where there is none (a projection in between), every row goes through the
    model.
    """
    probe = torch.randn(N_PROBE, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
    true = _follow(running, norm, probe).double()
    zero = torch.zeros_like(x[:1])
    try:
        alone = (head(probe) - head(zero)).double()
    except RuntimeError:  # the head has another input width than the residual stream
        return _follow_all(running, norm, x, probe, true)
    factor = (true * alone).sum() / alone.square().sum()
    if not (factor * alone - true).norm() <= _tolerance(x) * true.norm():
        return _follow_all(running, norm, x, probe, true)
    exact = factor.round() if (factor - factor.round()).abs() < 1e-6 else factor
    made: Tensor = (head(x) - head(zero)) * exact.to(x)
    return made


def _follow_all(
    running: nn.Module, norm: Site, x: Float[Tensor, "n 1 d"], probe: Tensor, at_zero: Tensor
) -> Float[Tensor, "n 1 v"]:
    """`_follow` of all rows, after a check that the derivative is the same elsewhere up to a factor per logit, as a
    softcap has.

    ValueError where it is not (a head with layers of its own, as ModernBERT's decoder has).
    """
    elsewhere = _follow(running, norm, probe, at=probe[:1].flip(-1)).double()
    slopes = (elsewhere * at_zero).sum(0) / at_zero.square().sum(0).clamp(min=1e-30)
    if not (slopes * at_zero - elsewhere).norm() <= _tolerance(x) * elsewhere.norm():
        raise ValueError(
            "Direct effects need a head that is linear behind the final norm, got a "
            f"{type(running).__name__}, in whose head what a direction adds depends on the text. Use "
            "`sl.interventions.attribute`, or steer along it."
        )
    return _follow(running, norm, x)


def _tolerance(x: Tensor) -> float:
    return 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.05


def _follow(
    running: nn.Module, norm: Site, x: Float[Tensor, "n 1 d"], at: Tensor | float = 0.0
) -> Float[Tensor, "n 1 v"]:
    """Derivative of the model's logits along vectors after its final norm, by default at 0, where a softcap has slope
    1.
    """
    ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    place = (torch.zeros_like(x) + at).requires_grad_()
    with torch.enable_grad(), attach(norm, lambda y: place.to(y)):
        made = run_as_set(running, ids)
        # Twice backward is once forward: the product with the transposed derivative is linear in its other factor.
        other = torch.zeros_like(made, requires_grad=True)
        (product,) = torch.autograd.grad(made, place, other, create_graph=True)
        (tangent,) = torch.autograd.grad(product, other, x)
    return tangent
