"""Prompts with counterfactual versions, reading and patching their activations, and sparse edits of codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.lm.forwards import FORWARD_TOKENS
from saelab.lm.hooks import capture, logits, splice
from saelab.lm.models import Model
from saelab.steering.supervised import Attributes

TOLD = "as told"


@dataclass(frozen=True, eq=False, kw_only=True)
class EditTask:
    """Prompts ("as told") and counterfactual versions of them ("edits"), in which one attribute has another value.

    Activations are read and edited at the same positions of all versions of a prompt. Versions have the same lengths;
    rows of ids are padded on the right. ValueError where versions do not match.
    """

    model: Model
    hook_point: str
    """where activations are read and edited"""
    ids: Mapping[str, Int[Tensor, "n_prompts n"]]
    """token ids by version, the original under "as told"."""
    lengths: Int[Tensor, "n_prompts"]
    places: Int[Tensor, "n_prompts n_places"]
    """positions, negative ones from a prompt's end"""
    place_names: tuple[str, ...]
    """names of the positions"""
    attributes: Mapping[str, Sequence[Attributes]]
    """values of the attributes of each prompt, by version"""
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """additional attributes for interpretability, each a union of some: a value holds where any of them has it"""
    answers: Int[Tensor, "n_prompts"]
    """the token that each original prompt determines"""
    other_answers: Int[Tensor, "n_prompts"]
    """the alternative whose logit is subtracted"""

    def __post_init__(self) -> None:
        shapes = {tuple(ids.shape) for ids in self.ids.values()}
        if TOLD not in self.ids or len(shapes) != 1 or set(self.ids) != set(self.attributes):
            raise ValueError(
                f"Versions must be '{TOLD}' and edits of one shape, got {list(self.ids)}, {sorted(shapes)}."
            )
        if self.places.shape[1] != len(self.place_names):
            raise ValueError(f"`place_names` must name {self.places.shape[1]} places, got {self.place_names}.")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def edits(self) -> tuple[str, ...]:
        """Names of the counterfactual versions."""
        return tuple(name for name in self.ids if name != TOLD)

    @cached_property
    def positions(self) -> Int[Tensor, "n_prompts n_places"]:
        """Positions counted from 0."""
        return torch.where(self.places < 0, self.places + self.lengths[:, None], self.places)

    @cached_property
    def activations(self) -> dict[str, Float[Tensor, "n_prompts n_places d_in"]]:
        """Activations at the positions, by version."""
        return {name: self._read(ids) for name, ids in self.ids.items()}

    def _read(self, ids: Tensor) -> Tensor:
        parts = []
        for rows in self._batches():
            x = capture(self.model, ids[rows], [self.hook_point])[self.hook_point]
            parts.append(x[torch.arange(len(rows))[:, None], self.positions[rows]].float().cpu())
        return torch.cat(parts)

    def predict(
        self, x: Float[Tensor, "n_prompts n_places d_in"] | None = None, version: str = TOLD
    ) -> Float[Tensor, "n_prompts d_vocab"]:
        """Logits after the last token of each prompt, where `x` is given with it in place of the activations.

        `version` chooses the prompts; `x` replaces activations at the positions alone.
        """
        parts = []
        for rows in self._batches():
            ids, ends = self.ids[version][rows], self.lengths[rows] - 1
            if x is None:
                found = logits(self.model, ids)
            else:
                places = torch.arange(len(rows))[:, None], self.positions[rows]
                with splice(self.model, {self.hook_point: partial(_put, places=places, new=x[rows])}):
                    found = logits(self.model, ids)
            parts.append(found[torch.arange(len(rows)), ends].float().cpu())
        return torch.cat(parts)

    def margins(self, predicted: Float[Tensor, "n_prompts d_vocab"]) -> Float[Tensor, "n_prompts"]:
        """Logit of the answer less that of the alternative."""
        rows = torch.arange(len(self))
        return predicted[rows, self.answers] - predicted[rows, self.other_answers]

    def _batches(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self)).split(max(1, FORWARD_TOKENS // self.ids[TOLD].shape[1]))


def _put(x: Tensor, places: tuple[Tensor, Tensor], new: Tensor) -> Tensor:
    x[places] = new.to(x)
    return x


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """A change of the codes of a few features in each row: the change of the activation, and the features chosen."""

    change: Float[Tensor, "n d_in"]
    """of the activations"""
    chosen: Bool[Tensor, "n n_features"]
    """features whose codes change"""


def edit_sparsely(
    z: Float[Tensor, "n n_features"],
    goal: Float[Tensor, "n n_features"],
    rows: Float[Tensor, "n_features d_in"],
    delta: Float[Tensor, "n d_in"],
    ks: Sequence[int],
) -> dict[int, FeatureEdit]:
    """For each k, the change of at most k features' codes from `z` to `goal` that comes nearest to `delta`.

    Greedy: each step takes the feature that most reduces the norm of what is left of delta, as long as one does. A
    feature whose code changes sign counts once. Source: arXiv:2405.08366.

    Args:
        z: codes to start from.
        goal: codes that chosen features are set to.
        rows: decoder row of each feature.
        delta: wanted change of the activations.
        ks: largest numbers of features.

    >>> z, goal = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 2.0]])
    >>> edit_sparsely(z, goal, torch.eye(3), torch.tensor([[-1.0, 3.0, 0.0]]), ks=[1])[1].change
    tensor([[0., 3., 0.]])
    """
    steps, squares = goal - z, rows.square().sum(1)
    left, chosen = delta.clone(), torch.zeros_like(z, dtype=torch.bool)
    found = {}
    everyone = torch.arange(len(z))
    for k in range(max(ks, default=0) + 1):
        if k in ks:
            found[k] = FeatureEdit(delta - left, chosen.clone())
        gains = 2 * steps * (left @ rows.T) - steps.square() * squares
        best = gains.masked_fill(chosen, -torch.inf).argmax(1)
        better = gains[everyone, best] > 0
        left = left - torch.where(better, steps[everyone, best], 0)[:, None] * rows[best]
        chosen[everyone[better], best[better]] = True
    return found


def weigh_codes(
    z: Float[Tensor, "n n_features"], rows: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, "n n_features"]:
    """Each feature's share in the reconstruction, `(z_i d_i) . y / ||y||^2` with `y = sum_i z_i d_i`; they add up to 1.

    >>> weigh_codes(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([[0.9000, 0.1000]])
    """
    y = z @ rows
    return z * (y @ rows.T) / y.square().sum(1, keepdim=True).clamp(min=1e-12)
