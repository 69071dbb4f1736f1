"""Harvesting a feature store: its cost beside the forward and the encoding it contains, sorting by feature, opening.

    PYTHONPATH=. .venv/bin/python benchmarks/harvest.py [--folder ../shared/data/stories260k] [--n-tokens 200000]

Random weights in the SAE and random tokens: only time is measured. Turns are taken in alternation, medians printed.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.lm.forwards import forward_size
from saelab.stores.packing import pack_codes

K = 32


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forward_and_encode(model: sl.lm.models.Model, sae: sl.SAE, tokens: sl.Tokens, hook_point: str) -> None:
    """What harvesting cannot do without."""
    n_seq = forward_size(tokens, None)
    for rows in torch.arange(len(tokens)).split(n_seq):
        x = sl.capture(model, tokens[rows].ids, [hook_point])[hook_point]
        sae.encode_sparse(x.flatten(0, 1))


def compare(folder: str, n_tokens: int, d_sae: int, turns: int) -> None:
    """Harvest beside its parts, by turns."""
    model = sl.load_model(folder, progress=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.cfg.d_vocab, (n_tokens // 128, 128), generator=generator).int()
    tokens = sl.Tokens(ids=ids, doc_ids=torch.arange(len(ids)).int()[:, None].expand_as(ids).contiguous())
    hook_point = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    sae = sl.SAE(sl.SAEConfig(d_in=model.cfg.d_model, d_sae=d_sae, activation=sl.AbsTopK(k=K)))
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as out:
        for turn in range(turns + 1):  # the first warms up
            bare.append(seconds(lambda: forward_and_encode(model, sae, tokens, hook_point)))
            target = Path(out, str(turn))
            settings = {"hook_point": hook_point, "progress": False}
            whole.append(seconds(lambda: sl.harvest(sae, model, tokens, target, **settings)))  # noqa: B023 - called now
        size = sum(file.stat().st_size for file in target.iterdir())
        opened = min(seconds(lambda: sl.FeatureStore.load(target)) for _ in range(5))
    ratios = [w / b for w, b in zip(whole[1:], bare[1:], strict=True)]
    rate = n_tokens / statistics.median(whole[1:])
    print(f"harvest: {rate:,.0f} tokens/s, {statistics.median(ratios):.2f} times forward and encode (goal 1.25)")
    print(f"  {size / n_tokens:.0f} bytes a token; opened in {1000 * opened:.1f} ms ({len(ids) * 128:,} tokens)")


def sort_by_feature(turns: int, d_sae: int = 24576, n: int = 65536) -> None:
    """Entries a second from by-token to by-feature, one shard."""
    rng = np.random.default_rng(0)
    latents = np.sort(rng.integers(0, d_sae // K, (n, K)) + np.arange(K) * (d_sae // K), axis=1).ravel()
    values = rng.standard_normal(n * K).astype(np.float16)
    offsets = np.arange(n + 1, dtype=np.int32) * K
    packed = latents.astype(np.uint16)
    times = [seconds(lambda: pack_codes(offsets, packed, values, d_sae)) for _ in range(turns + 1)][1:]
    print(f"by feature: {n * K / statistics.median(times) / 1e6:.0f} million entries/s (goal 40)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="tales")
    parser.add_argument("--n-tokens", type=int, default=200_000)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    compare(args.folder, args.n_tokens, args.d_sae, args.turns)
    sort_by_feature(args.turns)


if __name__ == "__main__":
    main()
