"""Similarity of features: the nearest others of every feature by decoder cosine, correlation of codes, or co-firing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.functional.indices import read_feature
from saelab.functional.screening import largest_first
from saelab.functional.statistics import correlation_of_sums
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

SimilarityMeasure = Literal["correlation", "phi", "cosine"]
BLOCK = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class NearestFeatures(Result):
    """The `m` most similar other features of each feature, by absolute value of the similarity, largest first."""

    by: str
    """name of the similarity"""
    n_tokens: int | None
    """tokens the similarity rests on; None for directions"""
    indices: Int[np.ndarray, "d_sae m"]
    """features; -1 where a feature has fewer than m"""
    values: Float[np.ndarray, "d_sae m"]
    """similarity in -1 to 1, negative where features exclude or oppose each other; NaN where there is none"""

    def of(self, feature: SupportsIndex) -> list[tuple[int, float]]:
        """The nearest features of one feature, as (feature, similarity) pairs."""
        feature = read_feature(feature, d_sae=len(self.indices))
        known = self.indices[feature] >= 0
        return list(zip(self.indices[feature][known].tolist(), self.values[feature][known].tolist(), strict=True))

    def __str__(self) -> str:
        best = np.argsort(-np.nan_to_num(np.abs(self.values[:, 0]), nan=-1.0), kind="stable")[:10].tolist()
        over = "" if self.n_tokens is None else f" over {self.n_tokens:,} tokens"
        lines = [f"{len(self.indices):,} features, nearest by {self.by}{over}; the closest:"]
        table = [[str(j), str(i), f"{value:+.3f}"] for j in best for i, value in self.of(j)[:1]]
        return "\n".join([*lines, *format_table(table, left=())])


def nearest_features(
    source: FeatureStore | SAE, by: SimilarityMeasure | None = None, *, m: int = 10
) -> NearestFeatures:
    """The `m` most similar other features of every feature, by absolute value of the similarity, largest first.

    - "correlation" (default for a store): Pearson's r of the codes over all tokens, zeros included.
    - "phi": Pearson's r of firing (0 or 1) over all tokens, whatever the sign of the code.
    - "cosine" (default for an SAE): cosine of rows of W_dec.

    A feature that never fires, or always with one value, has no correlation with any other. ValueError for a similarity
    that the source cannot give.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=40))
    >>> nearest_features(sae, m=2).indices.shape
    (40, 2)
    """
    by = by or ("cosine" if isinstance(source, SAE) else "correlation")
    allowed = ("cosine",) if isinstance(source, SAE) else tuple(set(get_args(SimilarityMeasure)) - {"cosine"})
    if by not in allowed or m < 1:
        what = "an SAE" if isinstance(source, SAE) else "a store"
        raise ValueError(f"`by` must be one of {sorted(allowed)} for {what} and `m` at least 1, got {by!r} and {m}.")
    blocks = _cosines(source) if isinstance(source, SAE) else _correlations(source, firing=by == "phi")
    width = source.cfg.d_sae if isinstance(source, SAE) else source.d_sae
    found = [_nearest(start, block, min(m, width - 1)) for start, block in blocks]
    indices, values = (np.concatenate(part) for part in zip(*found, strict=True))
    n_tokens = None if isinstance(source, SAE) else len(source)
    return NearestFeatures(by=by, n_tokens=n_tokens, indices=indices, values=values)


def _cosines(sae: SAE) -> Iterator[tuple[int, np.ndarray]]:
    rows = sae.W_dec.detach().float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for start in range(0, len(rows), BLOCK):
        yield start, (rows[start : start + BLOCK] @ rows.T).numpy()


def _correlations(store: FeatureStore, firing: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Pearson's correlations of codes, or of firing, in blocks of rows, summed over shards of which one is held."""
    n, seen = len(store), store.statistics
    x, xx = (seen.fires.sum(1),) * 2 if firing else (seen.sums[:, 0] - seen.sums[:, 1], seen.squares.sum(1))
    for start in range(0, store.d_sae, BLOCK):
        part = slice(start, min(start + BLOCK, store.d_sae))
        sums = np.zeros((part.stop - start, store.d_sae))
        for rows, columns in store.shard_matrices(start, part.stop):
            if firing:
                rows.data, columns.data = np.ones_like(rows.data), np.ones_like(columns.data)
            sums += (columns.T.tocsr() @ rows).toarray()
        yield start, correlation_of_sums(n, x[part, None], x, xx[part, None], xx, sums).astype(np.float32)


def _nearest(start: int, block: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The m largest by absolute value in each row, the feature itself left out."""
    size = torch.from_numpy(np.nan_to_num(np.abs(block), nan=-1.0))
    size[torch.arange(len(block)), torch.arange(start, start + len(block))] = -2.0
    top = largest_first(size, m)
    values = np.take_along_axis(block, top.numpy(), 1)
    missing = size.gather(1, top).numpy() <= 0
    return np.where(missing, -1, top.numpy()), np.where(missing, np.nan, values)
