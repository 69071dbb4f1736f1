"""`LastLayers`: the logits that a model's final norm and head make of any residual vectors, with gradient."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.lm.hook_points import hook_points_of, is_close
from saelab.lm.hooks import capture, logits, replace_activations
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.unembedding import Unembedding
from saelab.lm.verification import find_residuals

PART = 1024
"""Vectors that go through the whole model at a time."""


@dataclass(frozen=True, eq=False)
class LastLayers:
    """What a model computes behind its last block, as a function of the residual stream there, measured once.

    Final norm and head run alone where they make the model's own logits of its own residual stream; else (a softcap, a
    projection, a head with layers of its own) the vectors are put in place of the last block's output, and the model
    runs.

    >>> model, ids = sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> x = sl.lm.capture(model, ids, ["blocks.2.hook_out"])["blocks.2.hook_out"]
    >>> torch.allclose(LastLayers.measure(model)(x[0]), sl.lm.logits(model, ids)[0], atol=1e-4)
    True
    """

    model: Model
    last: str
    """hook point of the last block's output"""
    norm: nn.Module | None
    """None where the whole model runs"""
    head: nn.Module | None
    factor: Tensor | None
    """of the logits to what the head gives"""

    @classmethod
    @torch.no_grad()
    def measure(cls, model: AnyModel) -> "LastLayers":
        """The last layers of a model, measured by running it.

        Raises:
            ValueError: for a model whose layers are not `blocks`, and one whose final norm reads something else than
                the last block hands on.
        """
        model = as_model(model)
        home = hook_points_of(model)
        whole = cls(model, find_residuals(home)[-1], None, None, None)
        if "ln_final" not in home.components:
            return whole
        found = Unembedding.measure(model)
        if not found.is_alone:
            return whole
        with home.aside():
            x = capture(model, home.probe, [whole.last])[whole.last].flatten(0, 1)
            true = logits(model, home.probe).flatten(0, 1)
            alone = cls(model, whole.last, found.norm, found.head, found.factor)
            # as they are, and of sizes at which a softcap would show
            pairs = [(alone(x), true), (alone(3 * x.flip(-1)), whole(3 * x.flip(-1)))]
        return alone if all(is_close(one, other.float()) for one, other in pairs) else whole

    def __call__(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Logits in float32, with gradient where that is enabled and `x` has one; the model's own gradients stay
        untouched if `torch.autograd.grad` takes them.
        """
        if self.norm is not None and self.head is not None and self.factor is not None:
            made = self.head(self.norm(x.to(next(self.head.parameters()))))
            return (made * self.factor.to(made)).float()
        return torch.cat(list(self._run(x)))

    def _run(self, x: Tensor) -> Iterator[Tensor]:
        for part in x.split(PART):
            ids = torch.zeros(len(part), 1, dtype=torch.long, device=part.device)
            with replace_activations(self.model, {self.last: partial(_put, part[:, None])}):
                yield logits(self.model, ids, grad=torch.is_grad_enabled())[:, 0].float()


def _put(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old)
