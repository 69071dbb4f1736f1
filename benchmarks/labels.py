"""Labels by rules: seconds for each part of the work, on a store of your own or one made of random codes.

    python benchmarks/labels.py runs/store --size 300

Without a store, random codes on random words: 1,000,000 tokens, 4,096 features, l0 32. Wall time and CPU time
are both shown, since wall time on a shared machine says little. Reading the text (predicates) is apart from the rules.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

import saelab as sl
from saelab.labels.autointerp.token_prediction import token_baseline
from saelab.labels.rules.predicates import make_predicates
from saelab.labels.rules.rule_search import label_by_rules
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure


class RandomStore(sl.FeatureStore):
    """Random signed codes in memory, of every density, on a text of Zipf's words."""

    def __init__(self, n_tokens: int, d_sae: int, l0: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        share = rng.permutation(np.geomspace(1, 1e3, d_sae))
        counts = (share / share.sum() * n_tokens * l0).astype(int).clip(1, n_tokens // 2)
        rows = np.concatenate([np.sort(rng.choice(n_tokens, n, replace=False)) for n in counts]).astype(np.int32)
        values = rng.standard_normal(len(rows)).astype(np.float32)
        self.codes = csc_matrix((values, rows, np.append(0, np.cumsum(counts))), shape=(n_tokens, d_sae))
        ids = np.minimum(rng.zipf(1.3, n_tokens), 20_000).astype(np.int32)
        places = np.arange(n_tokens, dtype=np.int32)
        strings = {i: f" w{i}" if i % 7 else "." for i in range(20_001)}
        text = StoredText(token_ids=ids, doc_ids=places // 400, positions=places % 400, strings=strings)
        self.folder, self._starts = Path("random"), [0, n_tokens]
        statistics = measure(d_sae, [(self.codes.indptr, self.codes.data)])
        self.__dict__.update(text=text, places=places, statistics=statistics)

    @property
    def d_sae(self) -> int:
        return int(self.codes.shape[1])

    def columns(self, start: int = 0, stop: int | None = None) -> csc_matrix:
        return self.codes[:, start:stop]


def seconds(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What work gives, and its wall and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", help="a folder that `harvest` wrote")
    parser.add_argument("--size", type=int, default=300, help="predicates")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(args.turns):
        store = sl.FeatureStore.load(args.store) if args.store else RandomStore(1_000_000, 4096, 32)
        predicates, reading = seconds(lambda: make_predicates(store, size=args.size))  # noqa: B023 - called at once
        labels, ruling = seconds(lambda: label_by_rules(store, predicates))  # noqa: B023
        _, simulating = seconds(lambda: token_baseline(store))  # noqa: B023
        found.append({"predicates": reading, "rules": ruling, "simulation": simulating})
        print(f"{len(store):,} tokens, {store.d_sae:,} features, {predicates}, {labels.n_tested:,} rules tested")
        for name, times in found[-1].items():
            print(f"    {name:<12}{times['wall']:>8.1f} s wall{times['cpu']:>8.1f} s CPU", flush=True)
    best = {name: {kind: min(turn[name][kind] for turn in found) for kind in ("wall", "cpu")} for name in found[0]}
    print("best of all turns:", json.dumps(best))
    if args.json:
        args.json.write_text(json.dumps(best))


if __name__ == "__main__":
    sys.exit(main())
