"""Similarity of features by decoder cosine, correlation of codes, or co-firing: nearest of all features, or of one."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, SupportsIndex, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.indices import read_feature
from saelab.functional.screening import largest_first
from saelab.functional.statistics import correlation_of_sums
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csc_matrix, csr_matrix

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
    by = _choose_measure(source, by, m)
    blocks = _cosines(source) if isinstance(source, SAE) else _correlations(source, firing=by == "phi")
    width = source.cfg.d_sae if isinstance(source, SAE) else source.d_sae
    found = [_nearest(start, block, min(m, width - 1)) for start, block in blocks]
    indices, values = (np.concatenate(part) for part in zip(*found, strict=True))
    n_tokens = None if isinstance(source, SAE) else len(source)
    return NearestFeatures(by=by, n_tokens=n_tokens, indices=indices, values=values)


N_ROWS = 2048
"""Firings of a frequent feature that are read to find what fires with it, evenly spaced over the text."""


@dataclass(frozen=True, kw_only=True)
class SimilarFeatures(Result):
    """The features most similar to one feature, by absolute value of the similarity, largest first."""

    feature: int
    by: str
    """name of the similarity"""
    n_firings: int | None
    """firings of the feature; None for directions"""
    n_read: int | None
    """those that the similarity was measured on: all, or some evenly spaced ones; None for directions"""
    rows: tuple[tuple[int, float], ...]
    """feature and similarity, -1 to 1"""

    def __str__(self) -> str:
        lines = [f"feature {self.feature}, nearest by {self.by}{_describe_rows(self.n_read, self.n_firings)}"]
        return "\n".join([*lines, *format_table([[str(j), f"{value:+.3f}"] for j, value in self.rows], left=())])


@dataclass(frozen=True, kw_only=True)
class CoFiring:
    """How often another feature fires on the tokens on which one feature fires, whatever the signs of the codes."""

    feature: int
    """the other feature"""
    share: float
    """share of the one's firings on which the other fires, too"""
    lift: float
    """that share over the share of all tokens; 1 is chance"""
    phi: float
    """Pearson's r of firing (0 or 1) over all tokens"""


@dataclass(frozen=True, kw_only=True)
class CoFiringFeatures(Result):
    """The features that fire together with one feature, by |phi|, largest first."""

    feature: int
    n_firings: int
    n_read: int
    """firings that were read: all, or some evenly spaced ones"""
    rows: tuple[CoFiring, ...]

    def __str__(self) -> str:
        lines = [f"feature {self.feature} fires with{_describe_rows(self.n_read, self.n_firings)}"]
        table = [["feature", "share", "lift", "phi"]]
        table += [[str(row.feature), f"{row.share:.1%}", f"{row.lift:.3g}", f"{row.phi:+.3f}"] for row in self.rows]
        return "\n".join([*lines, *format_table(table, left=())])


def _describe_rows(n_read: int | None, n_firings: int | None) -> str:
    return "" if n_read is None else f", on {n_read:,} of its {n_firings:,} firings"


def similar_features(
    source: FeatureStore | SAE,
    feature: SupportsIndex,
    by: SimilarityMeasure | None = None,
    *,
    m: int = 10,
    n_rows: int = N_ROWS,
) -> SimilarFeatures:
    """The `m` features most similar to one feature, as `nearest_features` finds them for all, without computing those.

    Args:
        source: feature store, or SAE.
        feature: number of the feature, 0 to d_sae - 1.
        by: "correlation" (default) or "phi" for a store, "cosine" for an SAE; see `nearest_features`.
        m: number of features.
        n_rows: firings to read of a store; of a feature with more, so many evenly spaced ones stand for all.

    Raises:
        ValueError: the feature does not exist, or the source has no such similarity.
    """
    by = _choose_measure(source, by, m)
    if isinstance(source, SAE):
        feature = read_feature(feature, d_sae=source.cfg.d_sae)
        rows, norms = source.W_dec.detach(), _find_norms(source)
        block = (rows @ (rows[feature] / norms[feature]) / norms)[None].float().cpu().numpy()
        return SimilarFeatures(
            feature=feature, by=by, n_firings=None, n_read=None, rows=_list_nearest(feature, block, m)
        )
    own = _Companions.read(source, read_feature(feature, d_sae=source.d_sae), n_rows)
    found = own.phi() if by == "phi" else own.correlation()
    rows_ = _list_nearest(own.feature, found[None].astype(np.float32), m)
    return SimilarFeatures(feature=own.feature, by=by, n_firings=own.n_firings, n_read=own.n_read, rows=rows_)


def cofiring_features(
    store: FeatureStore, feature: SupportsIndex, *, m: int = 10, n_rows: int = N_ROWS
) -> CoFiringFeatures:
    """The `m` features whose firing goes together most with that of one feature, by |phi|, largest first.

    Args:
        store: feature store with the codes of all features.
        feature: number of the feature, 0 to d_sae - 1.
        m: number of features.
        n_rows: firings to read; of a feature with more, so many evenly spaced ones stand for all.
    """
    own = _Companions.read(store, read_feature(feature, d_sae=store.d_sae), n_rows)
    near = _list_nearest(own.feature, own.phi()[None].astype(np.float32), m)
    shares, rates = own.counts / max(1, own.n_read), store.statistics.fires.sum(1) / len(store)
    rows = tuple(
        CoFiring(feature=j, share=float(shares[j]), lift=float(shares[j] / rates[j]), phi=phi) for j, phi in near
    )
    return CoFiringFeatures(feature=own.feature, n_firings=own.n_firings, n_read=own.n_read, rows=rows)


@dataclass(frozen=True, eq=False)
class _Companions:
    """Sums over the firings of one feature, or some evenly spaced ones, of what fires there."""

    store: FeatureStore
    feature: int
    n_firings: int
    n_read: int
    counts: Float[np.ndarray, "d_sae"]
    """firings of each feature there"""
    products: Float[np.ndarray, "d_sae"]
    """sums of the products of both codes"""

    @classmethod
    def read(cls, store: FeatureStore, feature: int, n_rows: int) -> "_Companions":
        """The sums over at most `n_rows` firings of a feature."""
        fires = store.feature(feature)
        chosen = spread_evenly(len(fires), n_rows)
        offsets, latents, values = store.codes_of(fires.indices[chosen])
        codes = np.repeat(fires.values[chosen].astype(np.float64), np.diff(offsets))
        counts = np.bincount(latents, minlength=store.d_sae).astype(np.float64)
        products = np.bincount(latents, codes * values, store.d_sae).astype(np.float64)  # integers of no codes
        return cls(store, feature, len(fires), len(chosen), counts, products)

    def phi(self) -> Float[np.ndarray, "d_sae"]:
        """Pearson's r of firing with each feature."""
        x = self.store.statistics.fires.sum(1)
        return self._correlate(x, x, self.counts)

    def correlation(self) -> Float[np.ndarray, "d_sae"]:
        """Pearson's r of codes with each feature."""
        seen = self.store.statistics
        return self._correlate(seen.sums[:, 0] - seen.sums[:, 1], seen.squares.sum(1), self.products)

    def _correlate(self, x: np.ndarray, xx: np.ndarray, sums: np.ndarray) -> np.ndarray:
        j, n, scale = self.feature, len(self.store), self.n_firings / max(1, self.n_read)
        return correlation_of_sums(n, x[j], x, xx[j], xx, sums * scale)


def spread_evenly(n: int, n_chosen: int) -> Int[np.ndarray, "m"]:
    """Indices of `n_chosen` evenly spaced ones of `n` items; all of them where there are no more.

    >>> spread_evenly(10, 3).tolist(), spread_evenly(2, 3).tolist()
    ([1, 5, 8], [0, 1])
    """
    if n <= n_chosen:
        return np.arange(n)
    return (np.arange(n_chosen) * 2 + 1) * n // (2 * n_chosen)


_norms: "WeakKeyDictionary[SAE, tuple[int, Tensor]]" = WeakKeyDictionary()


def _find_norms(sae: SAE) -> Tensor:
    """Norms of the rows of W_dec, computed again where it has changed."""
    version = sae.W_dec._version
    if sae not in _norms or _norms[sae][0] != version:
        _norms[sae] = version, sae.W_dec.detach().norm(dim=1).clamp(min=1e-12)
    return _norms[sae][1]


def _list_nearest(feature: int, block: np.ndarray, m: int) -> tuple[tuple[int, float], ...]:
    indices, values = _nearest(feature, block, min(m, block.shape[1] - 1))
    pairs = zip(indices[0].tolist(), values[0].tolist(), strict=True)
    return tuple((j, value) for j, value in pairs if j >= 0)


def _choose_measure(source: FeatureStore | SAE, by: SimilarityMeasure | None, m: int) -> SimilarityMeasure:
    """The similarity that is asked for, or the default; ValueError for one that the source does not have."""
    by = by or ("cosine" if isinstance(source, SAE) else "correlation")
    allowed = ("cosine",) if isinstance(source, SAE) else tuple(set(get_args(SimilarityMeasure)) - {"cosine"})
    if by not in allowed or m < 1:
        what = "an SAE" if isinstance(source, SAE) else "a store"
        raise ValueError(f"`by` must be one of {sorted(allowed)} for {what} and `m` at least 1, got {by!r} and {m}.")
    return by


def _cosines(sae: SAE) -> Iterator[tuple[int, np.ndarray]]:
    rows = sae.W_dec.detach().float().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for start in range(0, len(rows), BLOCK):
        yield start, (rows[start : start + BLOCK] @ rows.T).numpy()


def _correlations(store: FeatureStore, firing: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Pearson's correlations of codes, or of firing, in blocks of rows, summed over shards of which one is held."""
    n, seen = len(store), store.statistics
    x, xx = (seen.fires.sum(1),) * 2 if firing else (seen.sums[:, 0] - seen.sums[:, 1], seen.squares.sum(1))
    n_threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    with ThreadPoolExecutor(n_threads) as pool:  # each thread sums rows of its own, so that all sums stay the same
        for start in range(0, store.d_sae, BLOCK):
            part = slice(start, min(start + BLOCK, store.d_sae))
            sums = np.zeros((part.stop - start, store.d_sae))
            step = -(-len(sums) // (8 * n_threads))  # few products are held at a time
            for rows, columns in store.shard_matrices(start, part.stop):
                if firing:
                    rows.data, columns.data = np.ones_like(rows.data), np.ones_like(columns.data)
                pieces = [slice(i, i + step) for i in range(0, len(sums), step)]
                list(pool.map(partial(_add_products, sums, columns, rows), pieces))
                del rows, columns  # before the next are read
            yield start, correlation_of_sums(n, x[part, None], x, xx[part, None], xx, sums).astype(np.float32)


def _add_products(sums: np.ndarray, columns: "csc_matrix", rows: "csr_matrix", piece: slice) -> None:
    """Add the sums over tokens of the products of the codes of some columns with all others."""
    sums[piece] += (columns[:, piece].T.tocsr() @ rows).toarray()


def _nearest(start: int, block: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The m largest by absolute value in each row, the feature itself left out."""
    size = torch.from_numpy(np.nan_to_num(np.abs(block), nan=-1.0))
    size[torch.arange(len(block)), torch.arange(start, start + len(block))] = -2.0
    top = largest_first(size, m)
    values = np.take_along_axis(block, top.numpy(), 1)
    missing = size.gather(1, top).numpy() <= 0
    return np.where(missing, -1, top.numpy()), np.where(missing, np.nan, values)
