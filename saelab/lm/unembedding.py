"""Direct effect of residual-stream directions on the logits, through the final norm and the unembedding."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.hook_points import HookPoints, hook_points_of
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.unwrapped import Site, attach, run_as_set, strip

BIG = 1e4  # input scale at which the norm's epsilon is negligible
N_PROBE = 4


@dataclass(frozen=True, eq=False)
class Unembedding:
    """A model's final norm and unembedding, measured once; called with directions, it gives what `read_out` does.

    Where `is_alone`, calls neither run the model nor touch its hooks, so that other threads may use it meanwhile.

    >>> read_out = Unembedding.measure(sl.lm.tiny_model())
    >>> read_out(torch.ones(1, 32)).shape, read_out.is_alone
    (torch.Size([1, 259]), True)
    """

    model: Model
    home: HookPoints
    running: nn.Module
    site: Site
    norm: nn.Module
    head: nn.Module
    centers: bool
    """whether the norm subtracts the mean"""
    factor: Tensor | None
    """of the logits to what the head alone gives; None where directions go through the whole model"""
    at_zero: Float[Tensor, "1 1 d_vocab"] | None
    """what the head gives of a zero vector; None without `factor`"""
    known: Int[Tensor, "n_known"]
    """ids that the tokenizer has a token for"""

    @classmethod
    @torch.no_grad()
    def measure(cls, model: AnyModel) -> "Unembedding":
        """The unembedding of a model, measured by running its modules.

        Raises:
            ValueError: for a model without a final norm.
        """
        model = as_model(model)
        home = hook_points_of(model)
        if "ln_final" not in home.components:
            raise ValueError(
                f"Direct effects need a norm behind the last block, got a {type(home.running).__name__} without one. "
                "Use `sl.interventions.attribute`, or steer along the direction."
            )
        with home.aside():  # without the user's hooks and edits
            running, (site, _) = home.route(["ln_final.hook_out", "unembed.hook_out"])
            _require_at_end(home, f"blocks.{model.cfg.n_layers - 1}.hook_out")
            parts = [home.components[name] for name in ("ln_final", "unembed")]
            # Copies with the same weights: hooks that others put on the model are not on them.
            norm, head = (strip(part)[0] for part in parts) if home.is_plain else parts
            ones = torch.ones(1, 1, model.cfg.d_model).to(next(head.parameters()))
            centers = bool((norm(BIG * ones) - norm(0 * ones)).abs().amax() < 1e-3)  # the norm maps constants to 0
            factor = _find_factor(running, site, head, ones)
            at_zero = None if factor is None else head(0 * ones)
        known = find_known_ids(model).nonzero()[:, 0]
        return cls(model, home, running, site, norm, head, centers, factor, at_zero, known)

    @property
    def is_alone(self) -> bool:
        """Whether it needs nothing of the model but its weights."""
        return self.factor is not None and self.home.is_plain

    @property
    def is_current(self) -> bool:
        """Whether the model's weights are those that were measured; False after any edit of them."""
        return self.home.is_current(self.model)

    @torch.no_grad()
    def __call__(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """As `read_out`; ValueError for directions of another width, and a head that is not linear."""
        if directions.shape[1] != self.model.cfg.d_model:
            raise ValueError(
                f"Directions must have the residual stream's width ({self.model.cfg.d_model}), got "
                f"{directions.shape[1]}; features of another place have no direct effect on the logits."
            )
        with nullcontext() if self.is_alone else self.home.aside():
            x = directions.to(next(self.head.parameters()))[:, None]
            bias = self.norm(torch.zeros_like(x[:1]))
            scale = (x - x.mean(-1, keepdim=True) if self.centers else x).square().mean(-1, keepdim=True).sqrt()
            folded = (self.norm(BIG * x / scale.clamp(min=1e-12)) - bias) * scale
            if self.factor is None:
                made = _follow_all(self.running, self.site, folded)
            else:  # faster
                made = (self.head(folded) - self.at_zero) * self.factor.to(folded)
            return made[:, 0].float()


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
    return Unembedding.measure(model)(directions)


def _find_factor(running: nn.Module, norm: Site, head: nn.Module, x: Float[Tensor, "n 1 d"]) -> Tensor | None:
    """The factor of a model's logits to what its head alone gives of vectors like `x`, measured on a few of them.

    It is 1 in most models (others are Granite, Cohere, Falcon-H1); None where there is none (a projection in between).
    """
    probe = _draw_probe(x)
    true = _follow(running, norm, probe).double()
    try:
        alone = (head(probe) - head(torch.zeros_like(x[:1]))).double()
    except RuntimeError:  # the head has another input width than the residual stream
        return None
    factor = (true * alone).sum() / alone.square().sum()
    if not (factor * alone - true).norm() <= _tolerance(x) * true.norm():
        return None
    return factor.round() if (factor - factor.round()).abs() < 1e-6 else factor


def _require_at_end(home: HookPoints, last: str) -> None:
    """Raise ValueError where the final norm reads something else than the last block hands on."""
    if last not in home.points:
        return
    running, sites = home.route([last, "ln_final.hook_in"])
    seen: list[Tensor] = []
    with attach(sites[0], lambda x: seen.append(x.double())), attach(sites[1], lambda x: seen.append(x.double())):
        run_as_set(running, home.probe)
    handed, read = seen[0], seen[-1]
    near = handed.shape == read.shape
    if near:
        factor = (handed * read).sum() / handed.square().sum()
        near = bool((factor * handed - read).norm() <= _tolerance(next(running.parameters())) * read.norm())
    if not near:
        raise ValueError(
            "Direct effects need a final norm that reads what the last block hands on, got a "
            f"{type(home.running).__name__}, which computes something else before it. Use "
            "`sl.interventions.attribute`, or steer along the direction."
        )


def _draw_probe(x: Tensor) -> Tensor:
    return torch.randn(N_PROBE, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)


def _follow_all(running: nn.Module, norm: Site, x: Float[Tensor, "n 1 d"]) -> Float[Tensor, "n 1 v"]:
    """`_follow` of all rows, after a check that the derivative is the same elsewhere up to a factor per logit, as a
    softcap has.

    ValueError where it is not (a head with layers of its own, as ModernBERT's decoder has).
    """
    probe = _draw_probe(x)
    at_zero, elsewhere = (_follow(running, norm, probe, at).double() for at in (0.0, probe[:1].flip(-1)))
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
