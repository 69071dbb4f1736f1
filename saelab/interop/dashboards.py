"""`Dashboards`: what SAEDashboard and Neuronpedia show of a feature, computed from a store, its SAE and its model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab.analysis.direct_logits import Promoted, logit_lens
from saelab.analysis.feature_similarity import NearestFeatures, nearest_features
from saelab.analysis.max_activating import ExampleGroup, max_activating_examples
from saelab.collecting.harvesting import require_harvested
from saelab.functional.screening import largest_first
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.unembedding import read_out
from saelab.sae.compatibility import match_weights
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.sharing import shareable, shareable_words

N_TOP, N_EACH, N_QUANTILES, N_BINS, N_ROWS, N_LOGITS = 20, 5, 10, 50, 3, 10
TOP = -1
"""value of the bounds of the top examples"""
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Dashboards:
    """Inputs of feature dashboards; without `sae` and `model` some fields stay empty."""

    store: FeatureStore
    sae: SAE | None
    model: "Model | None"
    alike: NearestFeatures

    @property
    def dataset(self) -> str:
        """Source of the text, without a local path."""
        return shareable_words(shareable(self.store.provenance.text))

    @classmethod
    def open(cls, store: FeatureStore, sae: SAE | None, model: "Model | None") -> "Dashboards":
        """The inputs, with the correlations of all features measured."""
        if sae is not None:
            require_harvested(store, sae)
        if model is not None:
            match_weights(store.provenance, model)
        return cls(store, sae, model, nearest_features(store, m=N_ROWS))

    def make(self, features: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The dashboard of each feature, with SAEDashboard's field names."""
        for start in range(0, len(features), BLOCK):
            part = list(features[start : start + BLOCK])
            lens = (
                logit_lens(self.sae, self.model, part, n=N_LOGITS, allow_mismatch=True)
                if self.sae and self.model
                else None
            )
            effects = None
            if self.sae and self.model:
                effects = read_out(self.model, self.sae.directions()[part]).cpu()[:, find_known_ids(self.model)]
            for i, j in enumerate(part):
                row = None if effects is None else effects[i].numpy()
                yield self._make(j, lens[j] if lens else None, row)

    def _make(self, j: int, effects: Promoted | None, logits: Float[np.ndarray, "n_known"] | None) -> dict[str, Any]:
        found = self.store.feature(j)
        heights, values = _histogram(found.values)
        logit_heights, logit_values = _histogram(logits) if logits is not None else ([], [])
        alike = self.alike.of(j)
        ctx_len = self.store.provenance.ctx_len or 0
        return {
            "feature_index": j,
            **self._align(j),
            "correlated_neurons_indices": [],
            "correlated_neurons_pearson": [],
            "correlated_neurons_l1": [],
            "correlated_features_indices": [i for i, _ in alike],
            "correlated_features_pearson": [value for _, value in alike],
            "correlated_features_l1": [],
            "neg_str": [text for text, _ in effects.suppressed] if effects else [],
            "neg_values": [value for _, value in effects.suppressed] if effects else [],
            "pos_str": [text for text, _ in effects.promoted] if effects else [],
            "pos_values": [value for _, value in effects.promoted] if effects else [],
            "frac_nonzero": len(found) / len(self.store),
            "freq_hist_data_bar_values": values,
            "freq_hist_data_bar_heights": heights,
            "logits_hist_data_bar_heights": logit_heights,
            "logits_hist_data_bar_values": logit_values,
            "n_prompts_total": int((np.asarray(self.store.text.positions) == 0).sum()),
            "n_tokens_in_prompt": ctx_len,
            "dataset": self.dataset,
            "decoder_weights_dist": [],
            **({"vector": self.sae.directions()[j].float().cpu().tolist()} if self.sae is not None else {}),
            "activations": [one for group in self._examples(j) for one in _describe_windows(group, len(self.store))],
        }

    def _align(self, j: int) -> dict[str, Any]:
        """The neurons with the largest components of the feature's direction, and their shares of its L1 norm."""
        if self.sae is None:
            return {f"neuron_alignment_{name}": [] for name in ("indices", "values", "l1")}
        row = self.sae.directions()[j].float().cpu()
        top = largest_first(row.abs(), min(N_ROWS, len(row)))
        shares = row[top].abs() / row.abs().sum().clamp(min=1e-12)
        return {
            "neuron_alignment_indices": top.tolist(),
            "neuron_alignment_values": row[top].tolist(),
            "neuron_alignment_l1": shares.tolist(),
        }

    def _examples(self, j: int) -> list[ExampleGroup]:
        found = max_activating_examples(
            self.store, j, n_top=N_TOP, n_each=N_EACH, n_quantiles=N_QUANTILES, n_near=0, n_random=0
        )
        return [group for group in found.groups if group.side != 0]


def _histogram(values: Float[np.ndarray, "n"]) -> tuple[list[int], list[float]]:
    """Heights and centers of bars of equal width."""
    if len(values) == 0:
        return [], []
    counts: Int[np.ndarray, n]
    counts, edges = np.histogram(values.astype(np.float64), N_BINS)
    return counts.tolist(), ((edges[1:] + edges[:-1]) / 2).tolist()


def _describe_windows(group: ExampleGroup, n_tokens: int) -> Iterator[dict[str, Any]]:
    """The windows of a group; bounds are codes with their sign, below 0 for negative firings."""
    low, high = (group.low, group.high) if group.side > 0 else (-group.high, -group.low)
    share = group.n_firings / n_tokens
    bounds = (TOP, high, TOP) if group.name == "top" and group.side > 0 else (low, high, share)
    for one in group.examples:
        yield {
            "bin_min": bounds[0],
            "bin_max": bounds[1],
            "bin_contains": bounds[2],
            "tokens": list(one.words),
            "values": list(one.values),
            "qualifying_token_index": one.center,
        }
