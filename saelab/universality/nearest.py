"""`find_nearest`: the most similar features of two dictionaries, for every feature of both.

Similarities are computed block by block, on several threads, and never held at once; several processes have blocks of
their own.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from saelab.functional.screening import largest_first
from saelab.training.ranks import ALONE, RankGrid, Steps, run_together
from saelab.universality.similarity import SimilarityBlock

GROUP = 64
"""Number of neighboring features whose largest similarity is found first."""
Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Some features, with partners and similarities of each; -1 and 0 where there are fewer."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """The `m` largest similarities of each feature, largest first; of equal ones the lowest partner comes first."""

    indices: Int[np.ndarray, "d m"]
    """partners; -1 where there are fewer"""
    values: Float[np.ndarray, "d m"]
    """similarities with their sign; NaN where there are fewer"""


def find_nearest(
    blocks: Iterable[SimilarityBlock], d_a: int, d_b: int, m: int, signed: bool, ranks: RankGrid = ALONE
) -> tuple[Nearest, Nearest]:
    """The `m` largest similarities of each feature with all features of the other side, for both sides.

    Blocks are computed in parallel; the number of threads does not change the result.

    Args:
        blocks: similarities, block by block of features of a.
        d_a: number of features of a.
        d_b: number of features of b.
        m: number kept for each feature, at most the number of features on the other side.
        signed: True ranks by absolute value and ignores only zeros; False keeps only similarities above 0.
        ranks: processes that search blocks of features of their own at the same time; `join_nearest` joins the results.
    """
    of_a, of_b = _Best(d_a, min(m, d_b)), _Best(d_b, min(m, d_a))
    n_threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))

    def search(block: SimilarityBlock) -> tuple[Found, Found]:
        start, make = block
        found = make() if signed else make().clamp_(min=0)
        sizes = found.abs() if signed else found
        return _search_rows(start, found, sizes, m), _search_columns(start, found, sizes, m, of_b.floor)

    def merge() -> Steps:
        with ThreadPoolExecutor(n_threads) as pool:
            for rows, columns in _in_order(pool, n_threads, search, blocks):
                of_a.merge(*rows)
                of_b.merge(*columns)
                yield

    run_together(merge(), ranks)
    return of_a.result(), of_b.result()


def join_nearest(
    found: tuple[Nearest, Nearest], own: Int[np.ndarray, "n"], m: int, ranks: RankGrid
) -> tuple[Nearest, Nearest]:
    """The largest similarities of all features, in all processes.

    Args:
        found: what this process found for its features of a, numbered from 0, and all of b.
        own: numbers of its features of a, increasing.
        m: number kept for each feature of b.
        ranks: the processes, each of which has other features of a.
    """
    of_a, of_b = found
    order = np.argsort(np.concatenate(ranks.gather_arrays(own)))
    indices, values = (np.concatenate(ranks.gather_arrays(x))[order] for x in (of_a.indices, of_a.values))
    numbered = np.append(own, -1)[of_b.indices]  # -1 stays -1
    partners, sizes = (np.concatenate(ranks.gather_arrays(x.T)) for x in (numbered, of_b.values))
    best = np.lexsort((partners, -np.nan_to_num(np.abs(sizes))), axis=0)[:m]
    kept = (np.ascontiguousarray(np.take_along_axis(x, best, 0).T) for x in (partners, sizes))
    return Nearest(indices, values), Nearest(*kept)


def _search_rows(start: int, found: Tensor, sizes: Tensor, m: int) -> Found:
    """The `m` largest of each row are among its `m` groups with the largest members."""
    n_groups = sizes.shape[1] // GROUP
    features = np.arange(start, start + len(sizes))
    if n_groups < 2 * m:
        indices = largest_first(sizes, min(m, sizes.shape[1]))
        return features, indices.numpy(), found.gather(1, indices).numpy()
    whole = n_groups * GROUP
    groups = largest_first(sizes[:, :whole].unflatten(1, (n_groups, GROUP)).amax(2), m).sort(1).values
    among = (groups[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)
    rest = torch.arange(whole, sizes.shape[1]).expand(len(sizes), -1)
    among = torch.cat([among, rest], 1)
    indices = among.gather(1, largest_first(sizes.gather(1, among), m))
    return features, indices.numpy(), found.gather(1, indices).numpy()


def _search_columns(start: int, found: Tensor, sizes: Tensor, m: int, floor: np.ndarray) -> Found:
    """The `m` largest of each column that exceed the smallest similarity kept for it so far."""
    if not floor.any():
        top = largest_first(sizes.T.contiguous(), min(m, len(sizes)))
        return np.arange(sizes.shape[1]), top.numpy() + start, found.T.gather(1, top).numpy()
    rows, columns = np.nonzero((sizes > torch.from_numpy(floor)).numpy())
    order = np.lexsort((rows, -sizes.numpy()[rows, columns], columns))
    rows, columns = rows[order], columns[order]
    features, first, counts = np.unique(columns, return_index=True, return_counts=True)
    ranks = np.arange(len(columns)) - np.repeat(first, counts)
    kept, numbers = ranks < m, np.repeat(np.arange(len(features)), counts)
    indices, values = np.full((len(features), m), -1), np.zeros((len(features), m), np.float32)
    cells = numbers[kept], ranks[kept]
    indices[cells], values[cells] = rows[kept] + start, found.numpy()[rows[kept], columns[kept]]
    return features, indices, values


def _in_order(pool: ThreadPoolExecutor, n: int, work: Callable, items: Iterable) -> Iterator:
    """Results of `work` for each item in order, computed `n` at a time with no more held in memory."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > n:
            yield waiting.popleft().result()
    for one in waiting:
        yield one.result()


class _Best:
    """The largest similarities found so far."""

    def __init__(self, d: int, m: int) -> None:
        self.indices = np.full((d, m), -1)
        self.values = np.zeros((d, m), np.float32)

    @property
    def floor(self) -> Float32[np.ndarray, "d"]:
        """The size of the smallest similarity kept for each feature."""
        return np.abs(self.values[:, -1])

    def merge(self, features: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Add similarities of some features; of equal ones the earlier stay."""
        all_indices = np.concatenate([self.indices[features], indices], 1)
        all_values = np.concatenate([self.values[features], values], 1)
        keep = np.argsort(-np.abs(all_values), axis=1, kind="stable")[:, : self.indices.shape[1]]
        self.indices[features] = np.take_along_axis(all_indices, keep, 1)
        self.values[features] = np.take_along_axis(all_values, keep, 1)

    def result(self) -> Nearest:
        """The similarities kept, with zeros as missing."""
        missing = (self.indices < 0) | (self.values == 0)
        return Nearest(np.where(missing, -1, self.indices), np.where(missing, np.nan, self.values))
