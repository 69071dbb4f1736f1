"""`read_prompt`: the features that fire on each token of a prompt, and the tokens that each feature fires on."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.interventions.attribution import Attribution
from saelab.interventions.edited_runs import ReadActivations
from saelab.lm.hooks import capture, logits, replace_activations
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_context, find_row
from saelab.lm.tokenizers import spell
from saelab.lm.tokens import tokenize
from saelab.sae.compatibility import mask_of, match_weights
from saelab.sae.sae import SAE
from saelab.stores.corpus import group_words
from saelab.stores.feature_store import FeatureStore
from saelab.stores.manifest import Provenance

PromptRanking = Literal["activation", "rarity", "attribution"]
"""Order of the features of a prompt: by their largest code, by how rarely they fire elsewhere, or by their effect on a
next token."""


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """Codes of a prompt by token and by feature; tokens that the SAE's mask leaves out have none.

    Tokens that share a character are one word, with for each feature its code of largest magnitude there.
    """

    ids: Int[Tensor, "n_tokens"]
    """token ids, BOS included"""
    words: tuple[str, ...]
    """text of each word; joined they are the prompt, with BOS spelled as in the vocabulary"""
    groups: tuple[slice, ...]
    """tokens of each word"""
    keep: Bool[Tensor, "n_tokens"]
    """tokens that the mask keeps"""
    codes: SparseCodes = field(repr=False)
    """codes of all tokens, a row for each, also of those that the mask leaves out"""
    predicts: Float[Tensor, "d_vocab"] | None = field(default=None, repr=False)
    """logits after the last token, where they were asked for"""

    @cached_property
    def by_token(self) -> list[dict[int, float]]:
        """Code of each feature that fires, by token."""
        bounds, features, values = (x.tolist() for x in (self.codes.offsets, self.codes.indices, self.codes.values))
        kept = self.keep.tolist()
        return [
            dict(zip(features[a:b], values[a:b], strict=True)) if kept[i] else {}
            for i, (a, b) in enumerate(pairwise(bounds))
        ]

    @cached_property
    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Word, feature and code of each feature at each word where it fires, by word, the largest |z| first."""
        offsets, features, z = (x.cpu().numpy() for x in (self.codes.offsets, self.codes.indices, self.codes.values))
        token = np.repeat(np.arange(len(self.ids)), np.diff(offsets))
        word = np.repeat(np.arange(len(self.groups)), [group.stop - group.start for group in self.groups])[token]
        order = np.lexsort((-np.abs(z), word))
        order = order[self.keep.numpy()[token[order]]]
        # Of a feature that fires on several tokens of a word the first, which has the largest |z|.
        _, first = np.unique(np.stack([word[order], features[order]]), axis=1, return_index=True)
        order = order[np.sort(first)]
        return word[order], features[order], z[order].astype(np.float64)

    @cached_property
    def by_word(self) -> list[dict[int, float]]:
        """Code of each feature that fires, by word, the largest |z| first."""
        word, features, z = self._entries
        bounds = np.searchsorted(word, np.arange(len(self.groups) + 1)).tolist()
        listed, values = features.tolist(), z.tolist()
        return [dict(zip(listed[a:b], values[a:b], strict=True)) for a, b in pairwise(bounds)]

    @cached_property
    def by_feature(self) -> dict[int, list[tuple[int, float]]]:
        """Word and code wherever a feature fires, by feature, that with the largest |z| first."""
        word, features, z = self._entries
        order = np.lexsort((-np.abs(z), features))
        starts = np.flatnonzero(np.diff(features[order], prepend=-1))
        pairs = list(zip(word[order].tolist(), z[order].tolist(), strict=True))
        ends = [*starts[1:].tolist(), len(order)]
        largest = np.argsort(-np.abs(z[order][starts]), kind="stable").tolist()
        first, names = starts.tolist(), features[order][starts].tolist()
        return {names[i]: pairs[first[i] : ends[i]] for i in largest}

    def peak(self, feature: int) -> float:
        """The code of largest magnitude of a feature in the prompt, with its sign; 0 where it does not fire."""
        where = self.by_feature.get(feature)
        return where[0][1] if where else 0.0

    def rarity(self, store: FeatureStore) -> dict[int, float]:
        """-log of the density in the store of each feature that fires, in nats, the rarest first.

        A feature that does not fire in the store counts as firing on less than one of its tokens.
        """
        features = np.fromiter(self.by_feature, np.int64)
        fires = store.statistics.fires[features].sum(1)
        rarity = -np.log(np.maximum(fires, 0.5) / max(1, len(store)))
        order = np.argsort(-rarity, kind="stable")
        return dict(zip(features[order].tolist(), rarity[order].tolist(), strict=True))

    def effects(self, attribution: Attribution) -> list[dict[int, float]]:
        """Effects of an attribution of the same prompt by word and feature, the largest in magnitude first."""
        word_of = {token: word for word, group in enumerate(self.groups) for token in range(group.start, group.stop)}
        found: list[dict[int, float]] = [{} for _ in self.groups]
        for token, feature, effect in zip(
            attribution.positions.tolist(), attribution.features.tolist(), attribution.effects.tolist(), strict=True
        ):
            here = found[word_of[token]]
            here[feature] = here.get(feature, 0.0) + effect
        return [dict(sorted(here.items(), key=lambda pair: -abs(pair[1]))) for here in found]


@torch.no_grad()
def read_prompt(sae: SAE, model: AnyModel, prompt: str, origin: Provenance, *, predict: bool = False) -> PromptFeatures:
    """The features that fire on each token of a prompt, in one forward pass and one encoding.

    The model is read at the hook point of `origin`, with its mask except for the norm rule, which is relative to a
    corpus.

    Args:
        sae: the SAE that encodes.
        model: the language model that it was trained on.
        prompt: a text, which gets a BOS.
        origin: provenance of the feature store, which has hook point and mask.
        predict: run the model to its end, and keep the logits after the last token.

    Raises:
        ValueError: the prompt is blank or longer than the model's context, or the model is not that of `origin`.
    """
    model = as_model(model)
    match_weights(origin, model)
    tokens = tokenize(model, [prompt], ctx_len=find_row(model, prompt), packed=False, separator=None)
    if tokens.n_truncated:
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens, got {prompt[:40]!r}..."
        )
    ids = tokens.ids[:, : tokens.n_tokens]
    x, last = _run(model, ids.long(), origin.hook_point, predict)
    words = spell(model.tokenizer, ids[0].tolist()).words
    groups = tuple(group_words(words))
    return PromptFeatures(
        ids=ids[0],
        words=tuple("".join(words[group]) for group in groups),
        groups=groups,
        keep=replace(mask_of(origin), max_norm_ratio=None).apply(tokens).keep[0, : tokens.n_tokens],
        codes=sae.encode_sparse(x.to(sae.device)),
        predicts=last,
    )


def _run(model: Model, ids: Tensor, point: str, predict: bool) -> tuple[Tensor, Tensor | None]:
    """Activations of a row of ids and, with `predict`, the logits after its last token; one forward pass."""
    if not predict:
        return capture(model, ids, [point])[point][0], None
    reading = ReadActivations()
    with replace_activations(model, {point: reading}):
        found = logits(model, ids)
    return reading.take()[0], found[0, -1].float().cpu()
