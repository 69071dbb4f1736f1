"""`steer_to_prototype`: codes moved toward the mean codes of a label's examples, by gradient descent at each token."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.screening import largest_first
from saelab.interventions.directions import Direction
from saelab.interventions.interventions import Intervention, TokenSelection, hook_point_of
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE

Loss = Literal["distance", "contrast"]
BLOCK = 8192  # activations encoded at a time


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The mean codes of labeled examples, one row for each label (prototypical networks, arXiv:1703.05175)."""

    names: tuple[str, ...]
    """the labels"""
    codes: Float[Tensor, "n_labels d_sae"]
    """mean codes of each label"""
    counts: tuple[int, ...]
    """number of examples of each label"""

    def find(self, name: str) -> int:
        """Row of a label in `codes`; ValueError for an unknown label."""
        if name not in self.names:
            raise ValueError(f"`target` must be one of the labels {self.names[:5]}, got '{name}'.")
        return self.names.index(name)

    def keep(self, k: int) -> "Prototypes":
        """A copy with only the `k` largest codes of each prototype in magnitude, the others 0.

        The rest of a mean is many small codes. ValueError unless `k` is in 1..d_sae.
        """
        if not 1 <= k <= self.codes.shape[1]:
            raise ValueError(f"`k` must be in 1..d_sae ({self.codes.shape[1]}), got {k}.")
        top = largest_first(self.codes.abs(), k)
        return replace(self, codes=torch.zeros_like(self.codes).scatter(1, top, self.codes.gather(1, top)))

    def difference(self, sae: SAE, target: str, other: str, hook_point: str | None = None) -> Direction:
        """The direction from one prototype to another in activation space, for addition with `steer`.

        Its peak is its length, so that a strength of 1 in units of "max" moves by the whole difference.

        Args:
            sae: SAE whose decoder maps codes to activations.
            target: label of the prototype moved to.
            other: label of the prototype moved from.
            hook_point: of the direction; by default where the SAE was trained.

        Raises:
            ValueError: for an unknown label, and where no hook point is known.
        """
        step = self.codes[self.find(target)] - self.codes[self.find(other)]
        vector = step.to(sae.device) @ sae.directions()
        point = hook_point or hook_point_of(sae)
        if point is None:
            raise ValueError("`hook_point` must be given for an SAE that does not say where it was trained, got None.")
        return Direction(vector, point, f"{target} - {other}", float(vector.norm()))

    def __repr__(self) -> str:
        named = ", ".join(f"{name} ({n:,})" for name, n in zip(self.names[:8], self.counts, strict=False))
        return f"Prototypes({named}{', ...' if len(self.names) > 8 else ''}, d_sae={self.codes.shape[1]})"


@torch.no_grad()
def mean_codes(sae: SAE, x: Float[Tensor, "n d_in"], labels: Sequence[Hashable] | Int[Tensor, "n"]) -> Prototypes:
    """The mean codes of each label's activations, labels in order of their names.

    ValueError where there is not one label a row, or fewer than two different ones.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.TopK(k=2)))
    >>> mean_codes(sae, torch.eye(4), ["glad", "sad", "glad", "glad"]).counts
    (3, 1)
    """
    named = [str(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]
    names, of = np.unique(named, return_inverse=True)
    if len(named) != len(x) or len(names) < 2:
        raise ValueError(
            f"`labels` must name each of {len(x)} rows, two or more in all, got {len(named)} of {len(names)}."
        )
    rows, sums = torch.from_numpy(of), torch.zeros(len(names), sae.cfg.d_sae, dtype=torch.float64)
    for part, which in zip(x.split(BLOCK), rows.split(BLOCK), strict=True):
        codes = sae.encode_sparse(part.to(sae.device))
        cells = which[codes.rows.cpu()] * sae.cfg.d_sae + codes.indices.cpu()
        sums.view(-1).index_add_(0, cells, codes.values.cpu().double())
    counts = torch.bincount(rows, minlength=len(names))
    return Prototypes(tuple(names.tolist()), (sums / counts[:, None]).float(), tuple(counts.tolist()))


@dataclass(frozen=True, eq=False)
class PrototypeSteering(Intervention):
    """The intervention of `steer_to_prototype`, which moves codes toward the prototype of a label.

    `features` and `strengths` are those of the prototype, for display; other active codes of a token are moved, too.
    """

    prototypes: Prototypes | None = None
    target: str = ""
    eta: float = 0.1
    n_steps: int = 20
    loss: Loss = "contrast"
    keep_norm: bool = False
    _codes: Float[Tensor, "n_labels d_sae"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prototypes is None or not isinstance(self.source, SAE):
            raise ValueError("A pull needs an SAE and its `prototypes`, got none; `mean_codes` makes them.")
        if self.prototypes.codes.shape[1] != self.source.cfg.d_sae:
            got = self.prototypes.codes.shape[1]
            raise ValueError(f"`prototypes` must have the SAE's {self.source.cfg.d_sae} codes, got {got}.")
        if self.loss not in get_args(Loss):
            raise ValueError(f"`loss` must be one of {get_args(Loss)}, got '{self.loss}'.")
        most = 0.5 if self.loss == "distance" else float("inf")
        if not 0 <= self.eta <= most or self.eta == float("inf") or self.n_steps < 0:
            raise ValueError(
                f"`eta` must be in 0..{most} and `n_steps` not negative, got {self.eta} and {self.n_steps}."
            )
        codes = self.prototypes.codes.to(self.source.device)
        wanted = codes[self.prototypes.find(self.target)]
        object.__setattr__(self, "_codes", codes)
        object.__setattr__(self, "features", {int(i): float(wanted[i]) for i in wanted.nonzero()[:, 0]})
        object.__setattr__(self, "mode", "clamp")
        super().__post_init__()

    @property
    def changes_nothing(self) -> bool:
        """Whether no step is taken."""
        return self.eta == 0 or self.n_steps == 0

    def change(self, written: Float[Tensor, "n d_out"], read: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Activations after the gradient steps, the reconstruction error unchanged."""
        assert isinstance(self.source, SAE)
        read = read.to(self.source.device)
        z = self.source.encode(read)
        change = (self.descend(z) - z) @ self.source.directions() * self.source.output_scale(read)
        moved = written + change.to(written)
        if not self.keep_norm:
            return moved
        norms = written.float().norm(dim=1, keepdim=True) / moved.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        return moved * norms.to(moved)

    def descend(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_sae"]:
        """Codes after the gradient steps: those active in the token or the prototype move, the others stay 0."""
        assert self.prototypes is not None and isinstance(self.source, SAE)
        row = self.prototypes.find(self.target)
        wanted = self._codes[row]
        if self.loss == "distance":  # z - c shrinks by the same factor at every step
            return z + (1 - (1 - 2 * self.eta) ** self.n_steps) * (wanted - z)
        moved = self._mix(z, ((z != 0) | (wanted != 0)).to(z), row)
        return moved if self.source.cfg.activation.signed else moved.clamp_min(0)

    def _mix(self, z: Tensor, support: Tensor, row: int) -> Float[Tensor, "n d_sae"]:
        """Codes after the steps of "contrast", from the weights of the prototypes.

        Every gradient is a mixture of the prototypes, and so are all steps together: only the few weights of the
        mixture change from step to step, and the products that they need are computed once.
        """
        codes, n_labels = self._codes, len(self._codes)
        products = (support @ (codes[:, None] * codes).flatten(0, 1).T).unflatten(1, (n_labels, n_labels))
        start = 2 * z @ codes.T - codes.square().sum(1)  # minus squared distances, but for ||z||^2, the same for all
        weights, target = torch.zeros_like(start), torch.eye(n_labels).to(start)[row]
        for _ in range(self.n_steps):
            shares = (start + 2 * (weights[:, None] @ products)[:, 0]).softmax(1)
            weights = weights + 2 * self.eta * (target - shares)
        return z + support * (weights @ codes)


@contextmanager
def steer_to_prototype(
    model: AnyModel,
    sae: SAE,
    prototypes: Prototypes,
    target: str,
    *,
    eta: float = 0.1,
    n_steps: int = 20,
    loss: Loss = "contrast",
    keep_norm: bool = False,
    where: TokenSelection = "all",
    hook_point: str | None = None,
    allow_mismatch: bool = False,
) -> Iterator[Model]:
    """A context in which the codes of every token of `where` descend toward the prototype c of a label.

        z <- z - eta grad L(z), `n_steps` times, over codes that are active in the token or in c
        x' = x + (z' - z) D
        distance   L = ||z - c||^2                                  z' = c + (1 - 2 eta)^n_steps (z - c)
        contrast   L = -log softmax_y(-||z - c_y||^2)[target]       grad = 2 (sum_y p_y c_y - c)

    So "distance" moves every token to one point and erases its other information; "contrast" adds differences of
    prototypes, weighted by 1 - p, until the token is nearer to the target than to the other prototypes: addition, where
    it is needed. Codes that cannot be negative are cut at 0 in the end. The reconstruction error stays, 0 steps change
    nothing bit for bit, and contexts nest, as with `steer`. Descent on sparse codes: arXiv:2502.18644; the two losses
    are an interpretation of it.

    Args:
        model: language model.
        sae: SAE whose codes are moved.
        prototypes: mean codes by label, from `mean_codes`.
        target: label whose prototype is approached.
        eta: step size; `eta * n_steps`, in the codes' own units, is how far codes move: choose it on data. At most 1/2
            for "distance".
        n_steps: number of gradient steps.
        loss: "contrast" or "distance".
        keep_norm: scale x' to the norm of x.
        where: tokens that are changed; special tokens are not unless asked for.
        hook_point: where the SAE reads; by default where it was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: for a label, loss or prototypes that do not fit, for steps of "distance" that overshoot (eta above
            1/2), and for an SAE of another model, weight processing or hook point (unless `allow_mismatch`).

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64))
    >>> moods = mean_codes(sae, torch.randn(8, 32), ["glad", "sad"] * 4)
    >>> with steer_to_prototype(model, sae, moods, "glad", hook_point="blocks.1.hook_resid_post"):
    ...     made = sl.generate(model, "So", 4)
    """
    model = as_model(model)
    pull = PrototypeSteering(
        sae, where=where, hook_point=hook_point, prototypes=prototypes, target=target, eta=eta, n_steps=n_steps,
        loss=loss, keep_norm=keep_norm, allow_mismatch=allow_mismatch,
    )  # fmt: skip
    with steer_all(model, [pull]):
        yield model
