"""`verify_hooks`: check that hooks return what Hugging Face computes as `hidden_states`, layer by layer."""

import re
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.lm.hook_points import HookPoints, hook_points_of
from saelab.lm.hooks import capture, read_sites, to_model
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import has_processed_weights
from saelab.lm.unwrapped import Site, strip
from saelab.stores.results import Result, format_table


@dataclass(frozen=True, kw_only=True)
class HookAgreement(Result):
    """Relative distance |x - h| / |h| between hooked activations x and Hugging Face's hidden states h, per hook point.

    In [0, inf), lower is better, 0 is bit-equal.
    """

    hook_points: tuple[str, ...]
    """names of the residual hook points, in order of layers"""
    captured: tuple[float, ...]
    """distance of the values that `capture` returns, per hook point"""
    tolerance: float
    """largest distance that rounding explains"""
    n_tokens: int
    """number of tokens compared"""

    @property
    def ok(self) -> bool:
        """Whether every distance is within the tolerance (rounding)."""
        return all(error <= self.tolerance for error in self.captured)

    def __str__(self) -> str:
        table = [[name, f"{error:.2e}"] for name, error in zip(self.hook_points, self.captured, strict=True)]
        verdict = "agree" if self.ok else "DISAGREE"
        lines = format_table([["hook point", "|x - h| / |h|"], *table])
        return "\n".join(
            [*lines, f"Hooks and Hugging Face {verdict} (tolerance {self.tolerance:g}, {self.n_tokens} tokens)."]
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields and `ok`, as a dictionary for JSON."""
        return super().to_dict() | {"ok": self.ok}


def verify_hooks(model: AnyModel, ids: Int[Tensor, "batch ctx_len"] | None = None) -> HookAgreement:
    """Distances between every residual hook point and the values between the layers of the plain Hugging Face model.

    Hugging Face's hidden states are the reference where one of them is of that place (families differ in whether they
    begin with the embeddings and end after the last norm), else the layer's own input or output. `ids` defaults to two
    rows of random tokens.

    Raises:
        ValueError: for a model with folded weights, whose activations differ from Hugging Face's on purpose, or without
            `blocks`.

    >>> sl.lm.verify_hooks(sl.lm.tiny_model()).ok
    True
    """
    model = as_model(model)
    if has_processed_weights(model):
        raise ValueError(
            "`verify_hooks` needs raw weights, got a model whose weights were folded by `enable_compatibility_mode`. "
            "Load the model again."
        )
    home = hook_points_of(model)
    ids = home.probe if ids is None else to_model(model, ids)
    names = find_residuals(home)
    truth = _find_truth(home, ids, names)
    return HookAgreement(
        hook_points=tuple(names),
        captured=tuple(_distance(x, truth[name]) for name, x in capture(model, ids, names).items()),
        tolerance=1e-4 if truth[names[0]].dtype == torch.float32 else 0.02,
        n_tokens=ids.numel(),
    )


def find_residuals(home: HookPoints) -> list[str]:
    """Hook points of the input of each block, and of the output of the last; of several stacks, those of `blocks`."""
    stacks = [match[1] for name in home.points if (match := re.fullmatch(r"(\w*blocks)\.0\.hook_in", name))]
    stack = min(stacks, key=lambda name: (name != "blocks", name), default="blocks")
    names = list(takewhile(lambda name: name in home.points, (f"{stack}.{i}.hook_in" for i in count())))
    if not names:
        raise ValueError(
            "A model's layers must be `blocks` to be found by themselves, got one without 'blocks.0.hook_in'. Name "
            "hook points, or read single ones with `capture`."
        )
    return [*names, f"{stack}.{len(names) - 1}.hook_out"]


@torch.no_grad()
def _find_truth(home: HookPoints, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Residual stream in an unhooked copy of Hugging Face's modules: hidden states, or inputs and outputs of the
    layers.
    """
    reference, twins = strip(home.running)
    model: Any = reference
    places = [name.rpartition(".") for name in names]
    sites: dict[str, Site] = {
        name: (twins[home.components[path]], side) for name, (path, _, side) in zip(names, places, strict=True)
    }
    with home.aside():  # also without PyTorch's global hooks
        layers = read_sites(model, sites, ids, stop=True)
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states or ()
    # The hidden state nearest to a layer's input is the reference; where none is near, the input itself.
    accounts = {name: min(states, key=partial(_distance, x), default=x) for name, x in layers.items()}
    return {name: h if _distance(layers[name], h) < 1e-3 else layers[name] for name, h in accounts.items()}


def _distance(x: Tensor, h: Tensor) -> float:
    """Distance relative to h; infinite between different shapes."""
    return float((x.double() - h.double()).norm() / h.double().norm()) if x.shape == h.shape else float("inf")
