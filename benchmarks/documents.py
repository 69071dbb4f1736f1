"""Embedding against the encoder's own rate, the size of a feature store of a million documents, and its families.

    python benchmarks/documents.py --encoder FOLDER_OF_MINILM --n-texts 4096 --json runs/documents.json

First: `embed` into a folder against the encoder's own `encode` of the same texts, turn about in one process after
warming up, medians of the turns and of their ratio. A folder of sentence-transformers needs that package; without
`--encoder` a random BERT of MiniLM's shape stands in for it, whose own rate is a plain loop over batches sorted by
length. Then `harvest` of synthetic codes, `--k` features a document of `--d-sae`: bytes a document, without texts and
with texts of ten words, and seconds to read features again. Then `find_families` of such a store with four times the
features, in a process of its own: seconds and the largest memory, with draws of permuted documents and without.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import saelab as sl
from saelab.functional.codes import SparseCodes
from saelab.lm.documents import read_documents
from saelab.lm.text_encoders import by_length, load_text_encoder, pool
from saelab.lm.tokenizers import SpecialWords, word_tokenizer

FAMILIES = """
import json, resource, sys, time
import saelab as sl
start, cpu = time.perf_counter(), time.process_time()
found = sl.corpora.find_families(sl.FeatureStore.load(sys.argv[1]), n_null=int(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
print(json.dumps({"s": time.perf_counter() - start, "cpu s": time.process_time() - cpu, "GiB": peak,
                  "sides": len(found.sides), "families": len(found.families)}))
"""
STORIES = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "tinystories" / "tinystories.txt"


def sentences(n: int) -> list[str]:
    """Sentences of stories, or made up where there are none."""
    found: list[str] = []
    if STORIES.is_file():
        for story in read_documents(STORIES):
            found += [part.strip() for part in re.split(r"(?<=[.!?])\s+", story) if len(part.split()) > 3]
            if len(found) >= n:
                return found[:n]
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 500, rng.integers(4, 24))) for _ in range(n)]


def random_encoder() -> tuple[Any, Any]:
    """A random BERT of the shape of all-MiniLM-L6-v2, whose words are numbered."""
    from transformers import BertConfig, BertModel

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(500))]
    tokenizer = word_tokenizer(
        words, SpecialWords("<bos>", "<eos>", "<pad>", "<unk>"), no_space_before="", no_space_after=""
    )
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(vocab_size=len(words), **sizes)).eval(), tokenizer


def plain_loop(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What a careful user would write: batches of 32 sorted by length, the mean over the attention mask."""
    rows = tokenizer(texts)["input_ids"]
    found = torch.empty(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for part in by_length([len(row) for row in rows], 32):
            batch = tokenizer.pad({"input_ids": [rows[i] for i in part]}, return_tensors="pt")
            found[part] = pool(model(**batch).last_hidden_state, batch["attention_mask"].bool(), "mean")
    return found


def time_turns(own: Callable[[], object], ours: Callable[[Path], object], turns: int) -> dict[str, float]:
    """Wall and CPU seconds of each, and the share of the encoder's own rate that is reached, by either clock."""
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    taken: dict[str, dict[str, list[float]]] = {name: {"own": [], "embed": []} for name in clocks}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2 * turns):
            name = ("own", "embed")[(turn + turn // 2) % 2]
            starts = {clock: read() for clock, read in clocks.items()}
            own() if name == "own" else ours(Path(folder) / f"{turn}")
            for clock, read in clocks.items():
                taken[clock][name].append(read() - starts[clock])
    found = {}
    for clock, times in taken.items():
        found |= {f"{name} {clock} s": median(one) for name, one in times.items()}
        found[f"ratio by {clock}"] = median(a / b for a, b in zip(times["own"], times["embed"], strict=True))
    return found


def measure_embedding(encoder: str | None, n_texts: int, turns: int) -> dict[str, float]:
    texts = sentences(n_texts)
    if encoder is None:
        model, tokenizer = random_encoder()
        kind: dict[str, Any] = {"pooling": "mean", "tokenizer": tokenizer}
        own: Callable[[list[str]], Any] = partial(plain_loop, model, tokenizer)
    else:
        model, tokenizer = load_text_encoder(encoder, device="cpu")
        kind = {}
        own = partial(model.encode, show_progress_bar=False)
    own(texts[:64])
    sl.embed(model, texts[:64], progress=False, **kind)
    found = time_turns(lambda: own(texts), lambda out: sl.embed(model, texts, out, progress=False, **kind), turns)
    return found | {"embedded a CPU second": n_texts / found["embed cpu s"]}


def synthetic_sae(d_sae: int, k: int) -> sl.SAE:
    """An SAE whose codes are drawn: k features a document, frequent ones first, as in trained dictionaries."""
    sae = sl.SAE(sl.SAEConfig(d_in=2, d_sae=d_sae, activation=sl.TopK(k=k)), seed=0)
    rng = np.random.default_rng(0)
    rates = 1.0 / np.arange(1, d_sae + 1) ** 0.6
    ends = np.cumsum(rates / rates.sum())

    def encode_sparse(x: torch.Tensor) -> SparseCodes:
        drawn = np.sort(np.minimum(np.searchsorted(ends, rng.random((len(x), 2 * k))), d_sae - 1), axis=1)
        for row in drawn:
            own = np.unique(row)
            row[:k] = np.sort(rng.permutation(own)[:k]) if len(own) >= k else np.arange(k)
        indices = torch.from_numpy(drawn[:, :k].flatten())
        values = torch.from_numpy(rng.lognormal(size=len(indices)).astype(np.float32))
        return SparseCodes.from_rows(indices, values, torch.arange(len(x)).repeat_interleave(k), (len(x), d_sae))

    sae.encode_sparse = encode_sparse  # type: ignore[method-assign]
    return sae


def measure_store(n: int, d_sae: int, k: int, with_texts: bool) -> dict[str, float]:
    texts = None
    if with_texts:
        rng = np.random.default_rng(1)
        texts = [" ".join(f"w{i}" for i in row) for row in rng.zipf(1.3, (n, 10)) % 20_000]
    acts = sl.embed(torch.zeros(n, 2), texts, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = sl.harvest(synthetic_sae(d_sae, k), None, acts, folder, progress=False)
        took = time.perf_counter() - start
        files = {path.name.split("-")[0]: 0 for path in Path(folder).iterdir()}
        for path in Path(folder).iterdir():
            files[path.name.split("-")[0]] += path.stat().st_size
        counts = store.statistics.fires.sum(1)
        chosen = np.argsort(-counts)[:: max(1, d_sae // 64)][:64].tolist()
        start = time.perf_counter()
        n_read = sum(len(store.feature(j)) for j in chosen)
        read = time.perf_counter() - start
    each = {f"bytes of {name}": size / n for name, size in files.items()}
    found = {"documents": n, "l0": store.l0, "bytes": sum(each.values()), **each, "harvest_s": took}
    if texts is not None:
        found["bytes of the texts themselves"] = sum(map(len, texts)) / n
    return found | {"ms_a_feature": 1e3 * read / len(chosen), "firings_read": n_read}


def measure_families(n: int, d_sae: int, k: int) -> dict[str, float]:
    """Families of all features, as a process that does nothing else finds them."""
    acts = sl.embed(torch.zeros(n, 2), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        sl.harvest(synthetic_sae(d_sae, k), None, acts, folder, progress=False)
        found: dict[str, float] = {"documents": n, "features": d_sae}
        for draws in (0, 3):
            told = subprocess.run(
                [sys.executable, "-c", FAMILIES, folder, str(draws)], check=True, capture_output=True, text=True
            )
            found |= {f"{name}, {draws} draws": value for name, value in json.loads(told.stdout).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder of a text encoder")
    parser.add_argument("--n-texts", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--n-documents", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--only", choices=("embedding", "store", "families"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if args.only in (None, "embedding"):
        found["embedding"] = measure_embedding(args.encoder, args.n_texts, args.turns)
    if args.only in (None, "store"):
        for name, with_texts in (("store", False), ("store with texts", True)):
            found[name] = measure_store(args.n_documents, args.d_sae, args.k, with_texts)
    if args.only in (None, "families"):
        found["families"] = measure_families(args.n_documents, 4 * args.d_sae, args.k)
    for name, numbers in found.items():
        print(name, *(f"  {key}: {value:,.4g}" for key, value in numbers.items()), sep="\n")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
