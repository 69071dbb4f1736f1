"""Direct logit attribution of features: the tokens that each decoder direction promotes and suppresses most."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.indices import FeatureIds, read_feature, read_features
from saelab.functional.screening import largest_first
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import token_strings
from saelab.lm.unembedding import Unembedding
from saelab.sae.compatibility import match_weights, require_finite, require_one_source
from saelab.sae.sae import SAE
from saelab.stores.results import Result
from saelab.training.ranks import RankGrid, Steps, run_together

BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """One feature's largest and most negative direct effects on the next token's logits, for a code of +1."""

    feature: int
    promoted: tuple[tuple[str, float], ...]
    """(token, effect) pairs, largest effect first"""
    suppressed: tuple[tuple[str, float], ...]
    """(token, effect) pairs, most negative effect first"""
    spread: float
    """standard deviation of the effect over the vocabulary"""
    kurtosis: float
    """excess kurtosis of the effect: large where a few tokens stand out, 0 for a normal distribution"""


@dataclass(frozen=True, kw_only=True)
class LogitLens(Result):
    """Direct effects of features on the logits, at a residual stream of unit scale.

    A code of -1 has the opposite effects.
    """

    features: tuple[Promoted, ...]
    d_vocab: int

    @cached_property
    def _places(self) -> dict[int, int]:
        return {row.feature: i for i, row in enumerate(self.features)}

    def __getitem__(self, feature: SupportsIndex) -> Promoted:
        feature = read_feature(feature)
        if feature not in self._places:
            raise KeyError(f"Feature must be one of those asked for, got {feature}.")
        return self.features[self._places[feature]]

    def __str__(self) -> str:
        return "\n".join(
            f"{row.feature:>7}  + {_list(row.promoted)}\n{'':>7}  - {_list(row.suppressed)}" for row in self.features
        )


@torch.no_grad()
def logit_lens(
    sae: SAE,
    model: AnyModel,
    features: FeatureIds | None = None,
    *,
    n: int = 10,
    allow_mismatch: bool = False,
    unembedding: Unembedding | None = None,
    mesh: Any = None,
) -> LogitLens:
    """The tokens that each feature's decoder direction promotes and suppresses most, through final norm and
    unembedding.

    `effect = (norm'(d)) W_U`, where d is the row of W_dec in the activations' own units and norm' the final norm made
    linear at unit scale: adding z d to a residual stream of scale s adds `z effect / s` to the logits. Effects are
    centered over the vocabulary, which leaves the probabilities as they are; ids without a token (padded vocabularies)
    are left out.

    Args:
        sae: the SAE whose decoder directions are read.
        model: the language model that the SAE was trained on.
        features: numbers of the features; None takes all.
        n: tokens returned at each end, at most the size of the vocabulary.
        allow_mismatch: True accepts an SAE that was trained on another model or weight processing.
        unembedding: `Unembedding.measure(model)` of before, for features that are asked for one by one; None measures.
        mesh: `DeviceMesh` of processes that each read some of the features, and call this with the same arguments; all
            return all features. None is this process alone.

    Raises:
        ValueError: the SAE's activations are not as wide as the residual stream, the SAE is of another model or weight
            processing, or a feature does not exist.
        RuntimeError: where another process failed.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=48))
    >>> len(logit_lens(sae, model, [3], n=5)[3].promoted)
    5
    """
    model = as_model(model)
    ranks = RankGrid.of(mesh)
    with ranks.together():
        wanted = read_features(range(sae.cfg.d_sae) if features is None else features, sae.cfg.d_sae)
        require_finite(sae)
        require_one_source(sae)
        match_weights(sae.provenance, model, allow_mismatch)
        read_out = unembedding if unembedding is not None else Unembedding.measure(model)
    ranks.require_equal({"features": wanted, "number of tokens": n})
    known, found = read_out.known, list[_Tops]()
    blocks = [wanted[i : i + BLOCK] for i in range(0, len(wanted), BLOCK)]

    def read() -> Steps:
        for block in blocks[ranks.own(len(blocks))]:
            found.append(_Tops.find(block, read_out(sae.directions(block)), known, min(n, len(known))))
            yield

    run_together(read(), ranks)
    rows = list(_describe(found, model))
    if not ranks.alone:
        told = {row["feature"]: row for part in ranks.gather_json([vars(row) for row in rows]) for row in part}
        rows = [_restore(told[feature]) for feature in wanted]
    return LogitLens(features=tuple(rows), d_vocab=len(known))


def _restore(told: dict[str, Any]) -> Promoted:
    """A feature's effects, from what JSON made of them."""
    return Promoted(**told | {name: tuple(map(tuple, told[name])) for name in ("promoted", "suppressed")})


@dataclass(frozen=True, eq=False)
class _Tops:
    """The extreme effects of a block of features, and the spread over the whole vocabulary."""

    features: list[int]
    sides: tuple[tuple[Int[Tensor, "n_features n"], Float[Tensor, "n_features n"]], ...]
    """tokens and effects, of the largest and of the most negative"""
    spread: Float[Tensor, "n_features"]
    kurtosis: Float[Tensor, "n_features"]

    @classmethod
    def find(
        cls, features: list[int], effects: Float[Tensor, "n_features d_vocab"], known: Int[Tensor, "n_known"], n: int
    ) -> "_Tops":
        """The extremes over ids that have a token; other ids were never trained, so their effects mean nothing."""
        known = known.to(effects.device)
        effects = effects[:, known]
        effects = effects - effects.mean(1, keepdim=True)
        tops = largest_first(effects, n), largest_first(-effects, n)
        spread = effects.std(1)
        kurtosis = (effects / spread.clamp(min=1e-12)[:, None]).double().pow(4).mean(1) - 3
        sides = tuple((known[places].cpu(), effects.gather(1, places).cpu()) for places in tops)
        return cls(features, sides, spread.cpu(), kurtosis.cpu())


def _describe(found: list[_Tops], model: Model) -> Iterator[Promoted]:
    ids = {i for tops in found for tokens, _ in tops.sides for i in tokens.unique().tolist()}
    strings = token_strings(model.tokenizer, ids) if model.tokenizer is not None else {i: f"<{i}>" for i in ids}
    for tops in found:
        for row, feature in enumerate(tops.features):
            plus, minus = (
                tuple(
                    (strings[i], effect) for i, effect in zip(tokens[row].tolist(), values[row].tolist(), strict=True)
                )
                for tokens, values in tops.sides
            )
            yield Promoted(
                feature=feature,
                promoted=plus,
                suppressed=minus,
                spread=float(tops.spread[row]),
                kurtosis=float(tops.kurtosis[row]),
            )


def _list(tokens: tuple[tuple[str, float], ...]) -> str:
    return "  ".join(f"{text!r} {effect:+.2f}" for text, effect in tokens)
