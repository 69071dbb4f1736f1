"""Neighbors kept against bytes: an inverted index of sparse codes beside float embeddings and product quantization.

    python scripts/measure_retrieval.py kept --model FOLDER --text FILE --faiss PYTHON --out retrieval.json
    python scripts/measure_retrieval.py speed

`kept`: distinct sentences of stories, embedded by a Hugging Face encoder in FOLDER; those of the last tenth of stories
are the queries, all others are searched. `kept` is the share of a query's ten nearest by cosine of the embeddings that
are among the ten found, `in 100` among the hundred found (which a second look at the embeddings could sort). Codes are
those of SAEs trained on the sentences that are searched: `index` searches them by `CodeIndex` (binarized or with
magnitudes in 8 bits, weighted by idf or not), `decoded` compares the reconstructions, of which the same codes are
stored (a code is a 16-bit number and a float16). `untrained` has random rows. Bytes are those of a sentence: of
everything that the index holds, of the codes or the vectors for others, without their codebooks. PQ and the quantized
inverted file (IVFPQ, 64 cells of which 8 are read) are faiss's, run by the Python in which it is installed. What was
measured is kept in the file of `--out` after each seed, and the same command goes on from there.

`speed`: milliseconds a query among a million codes of 16 features of 8,192, on one thread: densities alike, by Zipf's
law (exponent .7), and scipy's product with the same matrix; the median and the largest of 100 queries.
"""

import argparse
import json
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

import saelab as sl
from objectives.embeddings import embed, read_sentences
from objectives.shared import format_table
from saelab.corpora import CodeIndex
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json

N_NEAREST, N_FOUND = 10, 100
N_ROWS, D_SAE, ACTIVE, N_QUERIES = 1_000_000, 8192, 16, 100
FAISS = """
import json, sys
import faiss, numpy as np
faiss.omp_set_num_threads(1)
given = np.load(sys.argv[1])
index = faiss.index_factory(given["rows"].shape[1], sys.argv[3], faiss.METRIC_INNER_PRODUCT)
if sys.argv[3].startswith("IVF"):
    index.nprobe = 8
index.train(given["rows"])
index.add(given["rows"])
json.dump(index.search(given["queries"], 100)[1].tolist(), open(sys.argv[2], "w"))
"""
FAISS_INDEXES = {"PQ8": 8, "PQ16": 16, "PQ32": 32, "PQ64": 64, "IVF64,PQ32": 40}
"""bytes of a vector by index; an inverted file holds its number, too"""


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = command.add_subparsers(dest="stage", required=True)
    kept = stages.add_parser("kept")
    kept.add_argument("--model", type=Path)
    kept.add_argument("--text", type=Path)
    kept.add_argument("--embeddings", type=Path, default=Path("runs/retrieval/embeddings.npz"))
    kept.add_argument("--faiss", help="a Python with faiss; without it there are no rows of it")
    kept.add_argument("--n-sentences", type=int, default=4_000)
    kept.add_argument("--n-tokens", type=int, default=100_000)
    kept.add_argument("--d-sae", type=int, default=1536)
    kept.add_argument("--ks", type=int, nargs="+", default=[16, 32])
    kept.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    kept.add_argument("--out", type=Path, default=Path("retrieval.json"))
    stages.add_parser("speed")
    args = command.parse_args()
    torch.set_num_threads(1)
    measure_speed() if args.stage == "speed" else measure_kept(args)


# ---- neighbors kept
def measure_kept(args: argparse.Namespace) -> None:
    rows, queries = read(args)
    true = nearest(rows, queries, N_NEAREST)
    asked = {name: getattr(args, name) for name in ("n_tokens", "d_sae", "ks")}
    asked |= {"sentences": len(rows), "queries": len(queries), "faiss": bool(args.faiss)}
    found: dict[str, Any] = {"asked": asked, "seeds": [], "rows": {}}
    if args.out.exists():
        found = json.loads(args.out.read_text())
        if found["asked"] != asked:
            raise SystemExit(f"{args.out} was begun with {found['asked']}, this is {asked}; give another --out.")
    table: dict[str, list[dict[str, float]]] = found["rows"]
    print(f"{len(rows):,} sentences, {len(queries):,} queries, width {rows.shape[1]}", flush=True)
    if not table:
        table |= {name: [score(true, near, size)] for name, (size, near) in dense_rows(rows, queries).items()}
    for name, size in FAISS_INDEXES.items() if args.faiss else ():
        if name not in table:
            table[name] = [score(true, run_faiss(args.faiss, name, rows, queries), float(size))]
            write_json(args.out, found)
            print(f"{name} done", flush=True)
    for seed in [seed for seed in args.seeds if seed not in found["seeds"]]:
        for k in args.ks:
            for kind, activation in (("TopK", sl.TopK(k=k)), ("AbsTopK", sl.AbsTopK(k=k))):
                cfg = sl.SAEConfig(d_in=rows.shape[1], d_sae=args.d_sae, activation=activation)
                acts = sl.Activations.from_tensor(rows)
                run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=256, n_held_out=0, seed=seed)
                sae = sl.SAE(cfg, seed=seed).fit(acts, run, progress=False)
                add_codes(table, f"{kind} {k}", sae, rows, queries, true)
                if kind == "TopK":
                    add_codes(table, f"untrained {k}", make_untrained(sae, rows[:8192], seed=seed), rows, queries, true)
        found["seeds"].append(seed)
        write_json(args.out, found)
        print(f"seed {seed} done", flush=True)
    print(format_table(dict(sorted(table.items(), key=lambda item: item[1][0]["bytes"]))))


def read(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the sentences that are searched and of the queries, each distinct and of unit length."""
    if not args.embeddings.exists():
        args.embeddings.parent.mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = embed(*read_sentences(args.text, args.n_sentences), args.model)
        np.savez(args.embeddings, **made)
    found = np.load(args.embeddings)
    first = np.sort(np.unique(found["sentence_ids"], return_index=True)[1])
    x, docs = normalize(torch.from_numpy(found["embeddings"])[first]), found["doc_ids"][first]
    early = torch.from_numpy(docs < docs[len(docs) * 9 // 10])
    return x[early], x[~early]


def nearest(rows: torch.Tensor, queries: torch.Tensor, n: int) -> torch.Tensor:
    return (normalize(queries) @ normalize(rows).T).topk(n).indices


def score(true: torch.Tensor, near: torch.Tensor, size: float) -> dict[str, float]:
    hits = true[:, :, None] == near[:, None, :]
    return {
        "bytes": size,
        "kept": float(hits[:, :, :N_NEAREST].any(2).float().mean()),
        "in 100": float(hits.any(2).float().mean()),
    }


def dense_rows(rows: torch.Tensor, queries: torch.Tensor) -> dict[str, tuple[float, torch.Tensor]]:
    """Bytes and what is found by vectors in fewer bits or dimensions; queries are as they are."""
    d, mean = rows.shape[1], rows.mean(0)
    step = rows.abs().max() / 127
    found = {
        "float32": (4.0 * d, nearest(rows, queries, N_FOUND)),
        "float16": (2.0 * d, nearest(rows.half().float(), queries, N_FOUND)),
        "int8": (1.0 * d, nearest((rows / step).round() * step, queries, N_FOUND)),
        "signs": (d / 8, nearest((rows - mean).sign(), (queries - mean).sign(), N_FOUND)),
    }
    axes = torch.linalg.svd(rows - mean, full_matrices=False).Vh
    for n in (8, 16, 32, 64):
        x_hat = mean + ((rows - mean) @ axes[:n].T).half().float() @ axes[:n]
        found[f"PCA {n}, float16"] = 2.0 * n, nearest(x_hat, queries, N_FOUND)
    return found


def run_faiss(python: str, name: str, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.json")
        np.savez(given, rows=rows.numpy(), queries=queries.numpy())
        subprocess.run([python, "-c", FAISS, str(given), str(found), name], check=True)
        return torch.tensor(json.loads(found.read_text()))


@torch.no_grad()
def add_codes(
    table: dict[str, list[dict[str, float]]],
    name: str,
    sae: sl.SAE,
    rows: torch.Tensor,
    queries: torch.Tensor,
    true: torch.Tensor,
) -> None:
    codes, asked = encode_csr(sae, rows), encode_csr(sae, queries)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("binary", {}),
        ("binary, no idf", {"idf": False}),
        ("8 bits", {"values": "uint8"}),
        ("8 bits, no idf", {"values": "uint8", "idf": False}),
    ]
    for way, options in ways if not name.startswith("untrained") else ways[:1]:
        index = CodeIndex.build(codes, **options)
        near = torch.from_numpy(index.search(asked, top=N_FOUND)[0])
        table.setdefault(f"{name}, {way}", []).append(score(true, near, index.n_bytes / len(index)))
    if not name.startswith("untrained"):
        near = nearest(sae.decode(sae.encode(rows).half().float()), queries, N_FOUND)
        table.setdefault(f"{name}, decoded", []).append(score(true, near, 4.0 * codes.nnz / len(rows)))


# ---- speed
def measure_speed() -> None:
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    for name, weights in (("alike", np.ones(D_SAE)), ("Zipf", np.arange(1, D_SAE + 1) ** -0.7)):
        ends = np.cumsum(weights / weights.sum())
        features = np.minimum(np.searchsorted(ends, rng.random((N_ROWS, ACTIVE))), D_SAE - 1)
        codes = csr_matrix(
            (np.ones(N_ROWS * ACTIVE, np.float32), features.ravel(), np.arange(N_ROWS + 1) * ACTIVE), (N_ROWS, D_SAE)
        )
        codes.sum_duplicates()
        codes.data = rng.gamma(2, size=codes.nnz).astype(np.float32)
        queries = codes[rng.integers(0, N_ROWS, N_QUERIES)]
        for values in ("none", "uint8"):
            start = time.perf_counter()
            index = CodeIndex.build(codes, values=values)
            built = time.perf_counter() - start
            times = [clock(partial(index.search, queries[i : i + 1], 10)) for i in range(N_QUERIES)]
            told = (
                f"median {np.median(times):.2f} ms, largest {max(times):.2f} ms, CPU {cpu_time(index, queries):.2f} ms"
            )
            print(
                f"{name}, {values}: {told}; built in {built:.1f} s, {index.n_bytes / N_ROWS:.1f} bytes a row",
                flush=True,
            )
        times = [clock(partial(multiply, codes, queries[i].toarray().ravel())) for i in range(20)]
        print(f"{name}, scipy's product: median {np.median(times):.2f} ms", flush=True)


def multiply(codes: Any, query: np.ndarray) -> np.ndarray:
    return np.argpartition(codes @ query, -10)[-10:]


def cpu_time(index: CodeIndex, queries: Any) -> float:
    """Milliseconds of this process's processor a query, which other processes hardly change."""
    start = time.process_time()
    index.search(queries, 10)
    return 1e3 * (time.process_time() - start) / queries.shape[0]


def clock(call: Any) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
