"""What dissecting and labelling 24,576 features on a million tokens costs: seconds of processor time and peak memory.

    python benchmarks/dissection.py dissect
    python benchmarks/dissection.py label_head --epochs 1

Codes are random, 32 a token, half of them negative, with features as skewed as a dictionary's; 100 concepts of tokens,
of rates .0005 to .05, and as many labels of documents of 200 tokens. One process a measurement.
"""

import argparse
import resource
import time

import numpy as np
import torch
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.lm.token_labels import TokenLabels

D_SAE, L0, N_LABELS, PER_DOCUMENT = 24_576, 32, 100, 200


def make_codes(n_tokens: int) -> csr_matrix:
    """Random codes, made in parts."""
    rng = np.random.default_rng(0)
    features = np.empty(n_tokens * L0, np.int32)
    values = np.empty(n_tokens * L0, np.float32)
    for start in range(0, len(features), 2**22):
        part = slice(start, start + 2**22)
        n = len(features[part])
        features[part] = np.minimum(D_SAE * rng.random(n) ** 2, D_SAE - 1)
        values[part] = rng.normal(size=n)
    return csr_matrix((values, features, np.arange(n_tokens + 1) * L0), shape=(n_tokens, D_SAE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("dissect", "label_head"))
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    codes, rng = make_codes(args.n_tokens), np.random.default_rng(1)
    documents = np.arange(args.n_tokens) // PER_DOCUMENT
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.process_time()
    if args.what == "dissect":
        rates = np.geomspace(0.0005, 0.05, N_LABELS)
        rows = {f"c{i}": np.flatnonzero(rng.random(args.n_tokens) < rate) for i, rate in enumerate(rates)}
        labels = TokenLabels.place(rows, (args.n_tokens,), documents)
        found = sl.dissect(codes, labels)
        print(f"{len(found.sides):,} sides, {len(found.concepts)} concepts, labels as they are and moved twice")
    else:
        y = rng.random((documents[-1] + 1, N_LABELS)) < 0.05
        head = sl.label_head(
            codes, {f"c{i}": y[:, i] for i in range(N_LABELS)}, documents, n_epochs=args.epochs, baselines=False
        )
        print(head)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.process_time() - began
    memory = f"peak {peak:.2f} GiB, {before:.2f} before"
    print(f"{args.what}: {args.n_tokens:,} tokens, {seconds:.1f} s of processor time, {memory}")


if __name__ == "__main__":
    main()
