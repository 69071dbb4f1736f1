"""Attribution graphs of invented content, for tests of files and pages."""

from typing import Any

import numpy as np

from saelab.circuits.graph import KINDS, AttributionGraph

TOKENS = ("<s>", "Tom", " saw", " a")


def make_graph(
    n_features: int = 12,
    n_edges: int = 200,
    tokens: tuple[str, ...] = TOKENS,
    n_layers: int = 2,
    seed: int = 0,
    **changed: Any,
) -> AttributionGraph:
    """A graph with an embedding and, at each layer, an MLP error and bias for every token, the model's bias, and three
    logits.

    Each layer has a dictionary of attention's output and one of the MLP's; a third of the codes are negative. Edges are
    drawn among all pairs whose source is of a lower place, and `values` are their sums.
    """  # fmt: skip
    rng = np.random.default_rng(seed)
    hooks = [f"blocks.{layer}.hook_{part}_out" for layer in range(n_layers) for part in ("attn", "mlp")]
    last, rows = len(tokens) - 1, []  # kind, layer, position, source, feature, activation
    ids = rng.permutation(1000)[: len(tokens) + 3].tolist()
    rows += [("embedding", -1, i, -1, ids[i], 1.0) for i in range(len(tokens))]
    rows.append(("bias", -1, 0, -1, -1, 1.0))
    for source in range(2 * n_layers):
        layer = source // 2
        if source % 2:
            rows += [("error", layer, i, source, -1, 1.0) for i in range(len(tokens))]
            rows += [("bias", layer, i, source, -1, 1.0) for i in range(len(tokens))]
        n = n_features // (2 * n_layers)
        places = rng.permutation(len(tokens) * 4 * n)[:n]
        codes = rng.uniform(0.5, 4, n) * np.where(rng.random(n) < 1 / 3, -1, 1)
        rows += [
            ("feature", layer, int(place % len(tokens)), source, int(place // len(tokens)), float(code))
            for place, code in zip(places, codes, strict=True)
        ]
    rows += [("logit", n_layers, last, -1, ids[len(tokens) + i], p) for i, p in enumerate((0.5, 0.25, 0.125))]
    kinds, layers, positions, sources, features, activations = (np.array(column) for column in zip(*rows, strict=True))
    numbers = np.array([KINDS.index(kind) for kind in kinds])
    place = np.where(layers < 0, -1, np.where(kinds == "logit", 2 * n_layers, sources))
    before = (place[:, None] < place[None, :]) & np.isin(kinds, ("feature", "logit"))[None, :]
    before &= positions[:, None] <= positions[None, :]
    starts, ends = np.nonzero(before)
    chosen = np.sort(rng.permutation(len(starts))[:n_edges])
    starts, ends, weights = starts[chosen], ends[chosen], rng.standard_normal(len(chosen)).astype(np.float32)
    fields: dict[str, Any] = {
        "prompt": "".join(tokens), "tokens": tokens, "token_ids": np.array(ids[: len(tokens)]),
        "model": "someone/tiny-model", "dictionaries": tuple(hooks), "kinds": numbers, "layers": layers,
        "positions": positions, "sources": sources, "features": features,
        "activations": activations.astype(np.float32),
        "values": np.bincount(ends, weights, len(rows)).astype(np.float32), "edge_sources": starts,
        "edge_targets": ends, "edge_weights": weights,
        "target_weights": np.where(kinds == "logit", activations, 0).astype(np.float32),
        "slopes": rng.uniform(0.5, 1, len(rows)).astype(np.float32),
        "logit_tokens": (" he said \"hm\"", "\n", " b (p=1)"),
        "completeness_error": 1e-6, "n_left_out": 3,
    }  # fmt: skip
    return AttributionGraph(**fields | changed)
