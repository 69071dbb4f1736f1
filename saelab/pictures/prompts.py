"""Features that fire on each token of chosen prompts."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from saelab.lm.extent import find_context, find_row
from saelab.lm.hooks import capture
from saelab.lm.masks import TokenMask
from saelab.lm.strings import spell
from saelab.lm.tokens import tokenize
from saelab.stores.provenance import Provenance
from saelab.stores.spelling import group_words

if TYPE_CHECKING:
    from saelab.lm.models import Model
    from saelab.sae.sae import SAE

N_SHOWN = 12
"""number of features shown per token, the strongest first"""


def read_prompts(sae: "SAE", model: "Model", prompts: Sequence[str], origin: Provenance) -> list[dict[str, Any]]:
    """The words of each prompt, and for each word the features that fire there with their codes, largest |z| first.

    The model is read at the hook point of `origin`, with its mask except for the norm rule, which is relative to a
    corpus: a token that the mask leaves out has no codes.

    Args:
        sae: the SAE that encodes.
        model: the language model that it was trained on.
        prompts: texts to show.
        origin: provenance of the feature store, which has hook point and mask.

    Raises:
        ValueError: a prompt is blank or longer than the model's context.
    """
    return [_read(sae, model, prompt, origin) for prompt in prompts]


@torch.no_grad()
def _read(sae: "SAE", model: "Model", prompt: str, origin: Provenance) -> dict[str, Any]:
    tokens = tokenize(model, [prompt], ctx_len=find_row(model, prompt), packed=False)
    if tokens.n_truncated:
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens, got {prompt[:40]!r}..."
        )
    ids = tokens.ids[:, : tokens.n_tokens]
    keep = _mask_of(origin).apply(tokens).keep[0, : tokens.n_tokens]
    x = capture(model, ids, [origin.hook_point])[origin.hook_point][0].to(sae.device)
    codes = sae.encode_sparse(x)
    bounds = codes.offsets.tolist()
    words = spell(model.tokenizer, ids[0].tolist()).words
    found = [_strongest(codes.indices[a:b], codes.values[a:b]) for a, b in pairwise(bounds)]
    fires = [pairs if kept else [] for pairs, kept in zip(found, keep.tolist(), strict=True)]
    groups = list(group_words(words))
    return {
        "words": ["".join(words[group]) for group in groups],
        "codes": [_join(fires[group]) for group in groups],
    }


def _join(codes: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The codes of a word of several tokens: for each feature the one with the largest |z|."""
    if len(codes) == 1:
        return codes[0]
    found: dict[int, float] = {}
    for feature, value in (pair for pairs in codes for pair in pairs):
        found[feature] = max(found.get(feature, 0.0), value, key=abs)
    return sorted(found.items(), key=lambda pair: -abs(pair[1]))[:N_SHOWN]


def _mask_of(origin: Provenance) -> TokenMask:
    rules = origin.mask | {"positions": tuple(origin.mask["positions"]), "max_norm_ratio": None}
    return TokenMask(**rules)


def _strongest(features: torch.Tensor, values: torch.Tensor) -> list[tuple[int, float]]:
    order = values.abs().argsort(descending=True, stable=True)[:N_SHOWN]
    return list(zip(features[order].tolist(), values[order].tolist(), strict=True))
