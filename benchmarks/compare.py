"""Comparing two feature stores: seconds and memory of 24,576 x 24,576 correlations over a million tokens.

    python benchmarks/compare.py
    python benchmarks/compare.py --d-sae 4096 --n-tokens 200000

Random codes of which a share recurs in the other store, so that there is something to find. Beside it the dense
matrix products that notebooks take, from one block of the features, scaled up to all. The goals are 30 s and 4 GiB.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.universality.nearest import find_nearest
from saelab.universality.similarity import ComparedCodes, Moments, correlation_blocks


class RandomStore(sl.FeatureStore):
    """Codes in memory: k random features a token."""

    def __init__(self, codes: csr_matrix) -> None:
        self.codes, self._starts = codes, [0, codes.shape[0]]
        self.folder = Path("random")

    @property
    def d_sae(self) -> int:
        return int(self.codes.shape[1])

    @property
    def n_entries(self) -> int:
        return int(self.codes.nnz)

    def matrix(self, start: int = 0, stop: int | None = None) -> csr_matrix:
        whole = start == 0 and stop in (None, len(self))
        return self.codes if whole else self.codes[start:stop]


def draw(n: int, d: int, k: int, rng: np.random.Generator) -> csr_matrix:
    """k features of each token, one from each of k equal ranges, so that none comes twice."""
    columns = rng.integers(0, d // k, (n, k), dtype=np.int32) + np.arange(k, dtype=np.int32) * (d // k)
    values = rng.standard_normal(n * k).astype(np.float32)
    return csr_matrix((values, columns.ravel(), np.arange(0, n * k + 1, k, dtype=np.int32)), shape=(n, d))


def resident(key: str) -> float:
    """A line of this process's memory status, in GiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def compare_all(a: RandomStore, b: RandomStore, m: int) -> tuple[float, float]:
    """Seconds, and by how many GiB memory grew at the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    sides = ComparedCodes(a), ComparedCodes(b)
    seen = Moments.of(sides[0]), Moments.of(sides[1])
    found, _ = find_nearest(correlation_blocks(*sides, seen, 10), a.d_sae, b.d_sae, m, signed=True)
    elapsed = time.perf_counter() - start
    same = np.arange(a.d_sae // 4)
    assert (found.indices[same, 0] == same).all()  # the quarter that recurs is found
    return elapsed, resident("VmHWM") - before


def multiply_dense(a: RandomStore, b: RandomStore, width: int = 256) -> float:
    """Seconds that the dense products alone would take for all features, from those of one block."""
    x, y = (store.codes[:, :width].toarray() for store in (a, b))
    start = time.perf_counter()
    x.T @ y
    return (time.perf_counter() - start) * (a.d_sae / width) * (b.d_sae / width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--m", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    a, b = (draw(args.n_tokens, args.d_sae, args.k, rng) for _ in range(2))
    ranges = args.k // 4  # of the features' ranges recur
    b_codes = b.copy()
    for part in ("indices", "data"):
        theirs, ours = (getattr(codes, part).reshape(args.n_tokens, args.k) for codes in (b_codes, a))
        theirs[:, :ranges] = ours[:, :ranges]
    stores = RandomStore(a), RandomStore(b_codes)
    turns = [compare_all(*stores, args.m) for _ in range(args.turns)]
    dense = multiply_dense(*stores)
    seconds, memory = min(turn[0] for turn in turns), max(turn[1] for turn in turns)
    print(f"{args.d_sae:,} x {args.d_sae:,} features, k {args.k}, {args.n_tokens:,} tokens, the {args.m} best of each")
    print(f"  {'saelab':<10}{seconds:>8.1f} s (goal 30)  {memory:>6.2f} GiB more than the codes (goal 4)")
    print(f"  {'dense':<10}{dense:>8.1f} s, estimated: {dense / seconds:.0f} times")
    if args.json:
        args.json.write_text(json.dumps({"turns": turns, "dense_seconds": dense} | vars(args), default=str))


if __name__ == "__main__":
    main()
