"""A prompt that somebody typed: its features by token and its tokens by feature, ranked; and two prompts compared."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from saelab.analysis.prompt_features import PromptFeatures, PromptRanking, read_prompt
from saelab.explorer.live_steering import require_prompt
from saelab.explorer.security import LIMITS, ExplorerLimits
from saelab.interventions.attribution import Attribution, attribute
from saelab.interventions.prompt_metrics import find_token
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.tokenizers import token_strings
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.validation import read_fields

N_FEATURES = 100
"""features of a prompt that are listed"""
N_PREDICTIONS = 10
NameFeatures: TypeAlias = Callable[[Iterable[int]], Mapping[int, str]]
"""Chosen labels by feature, of those that have one."""


@dataclass(frozen=True, kw_only=True)
class PromptQuery:
    """What is asked about a prompt."""

    text: str
    other: str | None = None
    """a second prompt, to compare with"""
    rank: PromptRanking = "activation"
    target: str | None = None
    """next token that features are attributed to; None is the most likely one"""
    k: int = 12
    """features listed of each token"""

    @classmethod
    def from_dict(cls, plain: object, limits: ExplorerLimits = LIMITS) -> "PromptQuery":
        """The query in a JSON object; ValueError for one that is wrong or beyond the limits."""
        query = read_fields(cls, plain)
        for text in (query.text, *([] if query.other is None else [query.other])):
            require_prompt(text, limits)
        if not 1 <= query.k <= limits.n_rows:
            raise ValueError(f"`k` must be in 1..{limits.n_rows}, got {query.k}.")
        return query


def describe_prompt(
    sae: SAE, model: AnyModel, store: FeatureStore, query: PromptQuery, names: NameFeatures
) -> dict[str, Any]:
    """The answer to a query, ready for JSON, from one forward pass and one encoding of each prompt.

    Ranking by attribution needs a forward and a backward pass more. Tokens that the mask of the store leaves out have
    no codes.

    Args:
        sae: the SAE of the store.
        model: the language model of the store.
        store: feature store, for hook point, mask and densities.
        query: what is asked.
        names: gives the labels of features.

    Raises:
        ValueError: for a prompt beyond the model's context, and a target that is no token.
    """
    model = as_model(model)
    found = read_prompt(sae, model, query.text, store.provenance, predict=True)
    assert found.predicts is not None
    probabilities = found.predicts.softmax(0)
    ids = probabilities.topk(min(N_PREDICTIONS, len(probabilities))).indices.tolist()
    strings = token_strings(model.tokenizer, ids)
    answer: dict[str, Any] = {
        "words": list(found.words),
        "predictions": [{"token": strings[i], "p": float(probabilities[i])} for i in ids],
    }
    scores = _Scores.of(found, store, None)
    if query.rank == "attribution":
        target = ids[0] if query.target is None else find_token(model, query.target)
        effects = attribute(model, sae, found.ids, target, hook_point=store.provenance.hook_point, progress=False)
        scores = _Scores.of(found, store, effects)
        answer["target"] = token_strings(model.tokenizer, [target])[target]
        answer["log_prob"] = effects.clean
    elif query.rank == "rarity":
        scores = _Scores.of(found, store, found.rarity(store))
    answer["tokens"] = scores.by_word(query.k)
    answer["features"] = scores.by_feature(names)
    if query.other is not None:
        other = read_prompt(sae, model, query.other, store.provenance)
        answer["other"] = {"words": list(other.words), "tokens": _Scores.of(other, store, None).by_word(query.k)}
        answer["difference"] = compare_prompts(found, other, names)
    return answer


@dataclass(frozen=True, eq=False)
class _Scores:
    """Scores of the features that fire on a prompt, at each word and over all of them."""

    found: PromptFeatures
    words: list[dict[int, float]]
    features: dict[int, float]

    @classmethod
    def of(cls, found: PromptFeatures, store: FeatureStore, by: Attribution | Mapping[int, float] | None) -> "_Scores":
        """Scores by an attribution, by numbers of the features, or by their codes."""
        if isinstance(by, Attribution):
            words = [
                {feature: effects.get(feature, 0.0) for feature in codes}
                for codes, effects in zip(found.by_word, found.effects(by), strict=True)
            ]
            sums = dict.fromkeys(found.by_feature, 0.0)
            for effects in words:
                for feature, effect in effects.items():
                    sums[feature] += effect
            return cls(found, words, sums)
        if by is not None:
            return cls(found, [{feature: by[feature] for feature in codes} for codes in found.by_word], dict(by))
        return cls(found, found.by_word, {feature: found.peak(feature) for feature in found.by_feature})

    def by_word(self, k: int) -> list[dict[str, Any]]:
        """The features of each word with code and score, the largest score in magnitude first."""
        return [
            {"codes": [[feature, codes[feature], score] for feature, score in _largest(scores)[:k]]}
            for codes, scores in zip(self.found.by_word, self.words, strict=True)
        ]

    def by_feature(self, names: NameFeatures) -> list[dict[str, Any]]:
        """The words of each feature with their codes, in the order of the text; the largest score first."""
        listed = _largest(self.features)[:N_FEATURES]
        labels = names([feature for feature, _ in listed])
        return [
            {
                "feature": feature,
                "label": labels.get(feature, ""),
                "peak": self.found.peak(feature),
                "where": sorted(self.found.by_feature[feature]),
                "score": score,
            }
            for feature, score in listed
        ]


def _largest(scores: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(scores.items(), key=lambda pair: -abs(pair[1]))


def compare_prompts(one: PromptFeatures, other: PromptFeatures, names: NameFeatures) -> list[dict[str, Any]]:
    """Features by the difference of their largest codes in two prompts, the largest difference first."""
    both = {**one.by_feature, **other.by_feature}
    differences = _largest({feature: one.peak(feature) - other.peak(feature) for feature in both})[:N_FEATURES]
    labels = names([feature for feature, _ in differences])
    return [
        {
            "feature": feature,
            "label": labels.get(feature, ""),
            "peak": one.peak(feature),
            "other": other.peak(feature),
            "difference": difference,
        }
        for feature, difference in differences
    ]
