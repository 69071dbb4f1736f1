"""Memory of labeling and comparing against the size of the text: it must not grow with it.

    python benchmarks/memory.py
    python benchmarks/memory.py --n-tokens 100000 400000 1600000 --work compare --json runs/memory.json

Stores of random words and codes (d_sae 1,024, l0 16) are written to disk once for each size; each piece of work runs in
a process of its own. Two figures each, in MiB above what importing takes: the peak of anonymous memory, which is what a
process cannot give back (sampled every 5 ms), and the peak of all resident memory, in which pages of mapped files count
that the system takes back when it needs them. Next to them are their ratios to the smallest text's.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from saelab.collecting.harvesting import SHARD_TOKENS, _Codes, _CodesBuffer
from saelab.collecting.writers import ShardWriter
from saelab.functional.codes import SparseCodes
from saelab.labels.autointerp.clients import Answer
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure, save_statistics
from saelab.stores.feature_store import FeatureStore
from saelab.stores.manifest import FeatureManifest

D_SAE, K, CTX_LEN, N_WORDS = 1024, 16, 128, 4096
DOCUMENT = 400
"""Tokens of a document."""


def write_store(folder: Path, n_tokens: int, seed: int, split: bool = False) -> None:
    """Random codes, one from each of K ranges a token, on words of Zipf's frequencies; `split` has other ids."""
    words, codes = np.random.default_rng(0), np.random.default_rng(seed)
    share = 1 / np.arange(1, N_WORDS + 1)
    ids = words.choice(N_WORDS, n_tokens, p=share / share.sum()).astype(np.int32)
    at = np.arange(n_tokens, dtype=np.int32)
    strings = {i: "." if i == 0 else f" w{i:04d}" for i in range(N_WORDS)}
    if split:
        ids, strings = N_WORDS - 1 - ids, {N_WORDS - 1 - i: text for i, text in strings.items()}
    text = StoredText(token_ids=ids, doc_ids=at // DOCUMENT, positions=at % DOCUMENT % CTX_LEN, strings=strings)
    folder.mkdir(parents=True)
    where = sl.stores.Provenance(
        model="random", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="random",
        tokens_sha256="", mask={}, dtype="float32", ctx_len=CTX_LEN, n_tokens=n_tokens, seed=seed, versions={},
    )  # fmt: skip
    manifest = FeatureManifest(d_sae=D_SAE, dtype="float16", sae={}, request={}, provenance=where.to_dict())
    buffers = _CodesBuffer(D_SAE, "float16"), _CodesBuffer(D_SAE, "float16")
    with ShardWriter(folder, manifest, SHARD_TOKENS, buffers) as writer:
        for start in range(0, n_tokens, 16384):
            places = np.arange(start, min(start + 16384, n_tokens))
            n, width = len(places), D_SAE // K
            latents = codes.integers(0, width, (n, K)) + width * np.arange(K)
            latents[:, : K // 2] = (ids[places, None] if not split else N_WORDS - 1 - ids[places, None]) % width + (
                width * np.arange(K // 2)
            )
            values = codes.standard_normal((n, K)).astype(np.float32)
            entries = torch.from_numpy(latents.ravel()), torch.from_numpy(values.ravel())
            rows = torch.arange(n).repeat_interleave(K)
            made = SparseCodes.from_rows(*entries, rows, (n, D_SAE))
            writer.add(_Codes(made, torch.from_numpy(places)), n, 1, {})
        writer.flush()
        store = FeatureStore(folder, writer.manifest, writer.manifest.check_shards(folder))
        orders = ((arrays["feature_offsets"], arrays["feature_values"]) for _, arrays in store.shards())
        files = save_statistics(folder, measure(D_SAE, orders)) | text.save(folder)
        writer.finish(where, files=files)


class Silent:
    """A client that answers at once: names everything one way, and says yes."""

    name, settings = "silent", {"model": "silent"}

    def complete(self, messages: Any) -> Answer:
        return Answer(text='{"label": "words", "answers": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}')


def label_rules(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    return sl.labels.rules.label_by_rules(a)


def label_examples(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return sl.labels.autointerp.explain_features(
            a, Silent(), range(0, D_SAE, 64), answers=Path(folder) / "answers.jsonl", progress=False
        )


def compare_stores(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    return sl.compare(a, b, null=sl.universality.NullConfig(n_shifts=2), progress=False)


def compare_documents(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    return sl.compare(a, b, similarity="documents", null=sl.universality.NullConfig(n_shifts=2), progress=False)


def compare_tokenizers(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    return sl.compare(a, c, null=sl.universality.NullConfig(n_shifts=2), progress=False)


def count_codes(a: FeatureStore, b: FeatureStore, c: FeatureStore) -> Any:
    """What is flat already: every shard looked at once."""
    return sum(int(arrays["latents"].sum()) for _, arrays in a.shards())


WORK: dict[str, Callable[[FeatureStore, FeatureStore, FeatureStore], Any]] = {
    "codes": count_codes,
    "rules": label_rules,
    "examples": label_examples,
    "compare": compare_stores,
    "documents": compare_documents,
    "tokenizers": compare_tokenizers,
}


def read_status(key: str) -> float:
    """A line of this process's memory status, in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def run(name: str, folder: Path) -> None:
    """One piece of work, in this process; prints its figures."""
    import pandas  # noqa: F401 - what the work imports is not its memory
    import scipy.sparse.csgraph
    import scipy.stats  # noqa: F401
    import tqdm.auto  # noqa: F401

    torch.set_num_threads(1)
    stores = [FeatureStore.load(folder / one) for one in "abc"]
    before, resident = read_status("RssAnon"), read_status("VmRSS")
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], read_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    WORK[name](*stores)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"anonymous": peak[0] - before, "resident": whole - resident, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, nargs="+", default=[100_000, 400_000, 1_600_000])
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--folder", type=Path, help="where stores are kept; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run[0], Path(args.run[1]))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for n in args.n_tokens:
            for seed, name in enumerate("abc"):
                if not (folder / str(n) / name).is_dir():
                    write_store(folder / str(n) / name, n, seed, split=name == "c")
        print(f"{'':<12}{'tokens':>12}{'anonymous':>12}{'ratio':>8}{'resident':>12}{'ratio':>8}{'seconds':>10}")
        for name in args.work:
            for n in args.n_tokens:
                command = [sys.executable, __file__, "--run", name, str(folder / str(n))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                mine = found.setdefault(name, {})[n] = json.loads(done.stdout.splitlines()[-1])
                first = found[name][args.n_tokens[0]]
                sizes = "".join(
                    f"{mine[key]:>12.0f}{mine[key] / max(first[key], 1e-9):>8.2f}" for key in ("anonymous", "resident")
                )
                print(f"{name:<12}{n:>12,}{sizes}{mine['seconds']:>10.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
