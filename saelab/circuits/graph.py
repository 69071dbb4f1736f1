"""`AttributionGraph`: which embeddings, features and errors of a prompt cause which features and logits."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from saelab.stores.results import Result

NodeKind = Literal["embedding", "feature", "error", "bias", "logit"]
KINDS: tuple[NodeKind, ...] = ("embedding", "feature", "error", "bias", "logit")


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph(Result):
    """Result of `trace`: nodes and the direct effects between them, on one prompt.

    Entry i of each array of nodes is node i. Nodes are in the order in which the model computes them, so that a source
    comes before its targets.
    """

    prompt: str
    """the text"""
    tokens: tuple[str, ...]
    """the tokens of the prompt, as text"""
    token_ids: Int[np.ndarray, "n_tokens"] = field(repr=False)
    model: str
    """name of the model"""
    dictionaries: tuple[str, ...]
    """hook point that each dictionary writes to, in the order of the model"""
    kinds: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """index in `KINDS`"""
    layers: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """layer of the node; -1 for embeddings, the number of layers for logits"""
    positions: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """token that the node belongs to"""
    sources: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """index in `dictionaries`; -1 for embeddings and logits"""
    features: Int[np.ndarray, "n_nodes"] = field(repr=False)
    """latent of the dictionary; token id for embeddings and logits; -1 for errors and biases"""
    activations: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """z of features, probability of logits, 1 for the others"""
    values: Float[np.ndarray, "n_nodes"] = field(repr=False)
    """what the edges into the node sum to: its pre-activation, or its logit less the mean of all; 0 for nodes that
    nothing leads to"""
    edge_sources: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_targets: Int[np.ndarray, "n_edges"] = field(repr=False)
    edge_weights: Float[np.ndarray, "n_edges"] = field(repr=False)
    """direct effect of the source on the target's value"""
