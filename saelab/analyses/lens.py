"""`logit_lens`: what features push the model to say, and not to say."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.lm.lens import read_out
from saelab.lm.models import Model
from saelab.lm.strings import token_strings
from saelab.sae.sae import SAE
from saelab.stores.files import write_json

BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """One feature's strongest direct effects on the next token's logits, for a code of +1."""

    feature: int
    promoted: tuple[tuple[str, float], ...]
    """tokens and effects, largest first"""
    suppressed: tuple[tuple[str, float], ...]
    """tokens and effects, most negative first"""
    spread: float
    """standard deviation of the effect over the vocabulary"""
    kurtosis: float
    """excess kurtosis of the effect: large where a few tokens stand out, 0 for a normal distribution"""


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Direct effects of features on the logits, at a residual stream of unit scale; a code of -1 has the opposite."""

    features: tuple[Promoted, ...]
    d_vocab: int

    def __getitem__(self, feature: int) -> Promoted:
        for row in self.features:
            if row.feature == feature:
                return row
        raise KeyError(f"Feature must be one of those asked for, got {feature}.")

    def __str__(self) -> str:
        return "\n".join(
            f"{row.feature:>7}  + {_list(row.promoted)}\n{'':>7}  - {_list(row.suppressed)}" for row in self.features
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ready for JSON."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())


@torch.no_grad()
def logit_lens(sae: SAE, model: Model, features: Sequence[int] | None = None, *, n: int = 10) -> LogitLens:
    """The tokens that each feature's direction promotes and suppresses most, through final norm and unembedding.

    `effect = (norm'(d)) W_U`, d the row of W_dec in the activations' own units, the norm linear at unit scale: adding
    z d to a residual stream of scale s adds `z effect / s` to the logits. Effects are centred over the vocabulary,
    which the probabilities do not see. All features by default. ValueError for an SAE whose activations are not of the
    residual stream's width, and for features that do not exist.

    >>> model, sae = sl.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=48))
    >>> len(logit_lens(sae, model, [3], n=5)[3].promoted)
    5
    """
    wanted = list(range(sae.cfg.d_sae) if features is None else features)
    if bad := [j for j in wanted if not 0 <= j < sae.cfg.d_sae]:
        raise ValueError(f"`features` must be in 0..{sae.cfg.d_sae - 1}, got {bad[:5]}.")
    rows = sae.fold().W_dec[wanted]
    found: list[tuple[int, Float[Tensor, d_vocab]]] = []
    for i in range(0, len(wanted), BLOCK):
        found += zip(wanted[i : i + BLOCK], read_out(model, rows[i : i + BLOCK]), strict=True)
    return _collect(found, model, n)


def _collect(found: list[tuple[int, Tensor]], model: Model, n: int) -> LogitLens:
    effects = {j: effect - effect.mean() for j, effect in found}
    tops = {j: (effect.topk(n), (-effect).topk(n)) for j, effect in effects.items()}
    ids = {int(i) for pair in tops.values() for top in pair for i in top.indices}
    strings = token_strings(model.tokenizer, ids) if model.tokenizer is not None else {i: f"<{i}>" for i in ids}
    rows = []
    for j, effect in effects.items():
        plus, minus = (
            tuple((strings[int(i)], sign * float(v)) for i, v in zip(top.indices, top.values, strict=True))
            for sign, top in zip((1, -1), tops[j], strict=True)
        )
        z = (effect / effect.std().clamp(min=1e-12)).double().cpu().numpy()
        kurtosis = float(np.mean(z**4) - 3)
        spread = float(effect.std())
        rows.append(Promoted(feature=j, promoted=plus, suppressed=minus, spread=spread, kurtosis=kurtosis))
    return LogitLens(features=tuple(rows), d_vocab=model.cfg.d_vocab)


def _list(tokens: tuple[tuple[str, float], ...]) -> str:
    return "  ".join(f"{text!r} {effect:+.2f}" for text, effect in tokens)
