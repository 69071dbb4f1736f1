"""Seconds of the top-k search of wide dictionaries, against the encoder's full int8 product alone.

    python benchmarks/wide_search.py
    python benchmarks/wide_search.py --rank 64
    python benchmarks/wide_search.py --activations x.npy --encoder W.npy --bias b.npy

The first draws normally distributed activations, where no direction leads; the second such of 64 dimensions in 768, as
a narrow model's are that was widened. The third reads activations (n, d_in) and a trained SAE's encoder (d_sae, d_in).

Columns: the full int8 product; the search by PyTorch's operations; by the fused screen; by the leading directions alone
where there are few enough; a whole training step of TopK, with these; how many directions they are; the share of rows
that are searched again. The columns take turns.

The second table says what leading directions can save at all. By their number: the standard deviation (rho) of what
they leave out, relative to that of a row's sizes; the share of latents whose size in these directions is within
`--margin` standard deviations of what is left out of the row's k-th largest size, which have to be finished; and the
share of the full product's multiply-adds, with the projection of the weights, if a multiply-add of a latent finished by
itself costs as much as one of a product (optimistic), or three times that.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers import Sizes, saelab
from saelab.functional import partial_screen, topk
from saelab.functional.fused_screen import can_fuse
from saelab.functional.screening import SCAN_ROWS, multiply_int8

RANKS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
GATHERED = 3  # how much dearer a multiply-add of one latent by itself is than one of a product


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--d-in", type=int, default=768, help="width of the activations (default 768)")
    parser.add_argument("--d-sae", default="24576,98304", help="latents (default %(default)s)")
    parser.add_argument("--k", type=int, default=32, help="latents kept for a token (default 32)")
    parser.add_argument("--rank", type=int, help="dimensions that the drawn activations have (default: all)")
    parser.add_argument("--activations", type=Path, help="an .npy file of activations; else they are drawn")
    parser.add_argument("--encoder", type=Path, help="an .npy file of encoder rows; else drawn from the activations")
    parser.add_argument("--bias", type=Path, help="an .npy file of the encoder's bias (default 0)")
    parser.add_argument("--margin", type=float, default=5.5, help="standard deviations to allow for (default 5.5)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns, after one that is not (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument("--bound-only", action="store_true", help="only the second table")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def read(args: argparse.Namespace, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, encoder rows and bias."""
    draw = torch.Generator().manual_seed(0)
    if args.activations:
        x = torch.from_numpy(np.load(args.activations)).float()[: args.n]
    else:
        rank = args.rank or args.d_in
        x = torch.randn(args.n, rank, generator=draw) @ torch.randn(rank, args.d_in, generator=draw) / rank**0.5
        x = x if args.rank else torch.randn(args.n, args.d_in, generator=draw)
    if args.encoder:
        W = torch.from_numpy(np.load(args.encoder)).float()
    elif args.activations or args.rank:
        pairs = torch.randint(0, len(x), (2, d_sae), generator=draw)
        W = x[pairs[0]] + 0.5 * x[pairs[1]]
    else:
        W = torch.randn(d_sae, x.shape[1], generator=draw)
    bias = torch.from_numpy(np.load(args.bias)).float() if args.bias else torch.zeros(len(W))
    return x, (W if args.encoder else W / W.norm(dim=1, keepdim=True)).contiguous(), bias


def time_searches(x: Tensor, W: Tensor, bias: Tensor, k: int, repeats: int) -> dict[str, float]:
    """Median seconds of each search; the codes of all of them are compared."""
    low_x, low_W = (torch.randint(-127, 128, tuple(t.shape), dtype=torch.int8) for t in (x, W))
    out = torch.empty(SCAN_ROWS, len(W), dtype=torch.int32)
    repeated: list[int] = []
    dense, wide = topk._dense_topk, topk.WIDE

    def counted(rows: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        repeated.append(len(rows))
        return dense(rows, *rest)  # type: ignore[arg-type]

    def product() -> None:
        for rows in low_x.split(SCAN_ROWS):
            multiply_int8(rows, low_W, out=out[: len(rows)])

    def search(numba: str, least: int) -> Callable[[], object]:
        def call() -> object:
            os.environ["SAELAB_NUMBA"], topk.WIDE = numba, least
            return topk.search_topk(x, W, bias, k, False)

        return call

    calls: dict[str, Callable[[], object]] = {"product": product, "by torch": search("0", len(W) + 1)}
    if can_fuse():
        calls |= {"fused": search("1", len(W) + 1), "leading": search("1", 0)}
    step = saelab("topk", Sizes(len(x), x.shape[1], len(W), k)).step
    calls["step"] = lambda: step(x)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    topk._dense_topk = counted
    for turn in range(repeats + 1):
        found = []
        for name, call in calls.items():
            repeated.clear()
            start = time.perf_counter()
            result: Any = call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            if name not in ("product", "step"):
                found.append(result)
        assert all(torch.equal(a.indices.sort().values, found[0].indices.sort().values) for a in found), "they differ"
    topk._dense_topk, topk.WIDE = dense, wide
    leading = partial_screen.find_leading(x, W)
    row = {name: median(values) for name, values in seconds.items()}
    return row | {"directions": leading.basis.shape[1] if leading else x.shape[1], "repeated": sum(repeated) / len(x)}


@torch.no_grad()
def bound(x: Tensor, W: Tensor, bias: Tensor, k: int, margin: float) -> list[dict[str, float]]:
    """By number of leading directions of the product: what they leave out, and what that costs."""
    mean, n_rows = x.mean(0), min(len(x), 256)
    centered, bias = (x - mean).double(), bias + W @ mean
    of_x, of_W = centered.T @ centered / len(x), (W.T @ W).double() / len(W)
    values, vectors = torch.linalg.eigh(of_W)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inverse = (vectors * values.clamp(min=1e-12 * float(values[-1])).rsqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(root @ of_x @ root)
    directions = directions.flip(1)
    left, right = (centered[:n_rows] @ root @ directions).float(), (W.double() @ inverse @ directions).float()
    u = left @ right.T + bias
    least = u.topk(k, dim=1).values[:, -1:]
    rows = []
    for share in RANKS:
        r = int(share * x.shape[1])
        near = left[:, :r] @ right[:, :r].T + bias
        noise = (u - near).std(1, keepdim=True)
        kept = float((near >= least - margin * noise).float().mean())
        lost = float(((u >= least) & (near < least - margin * noise)).any(1).float().mean())
        projected = share * x.shape[1] / len(x)
        rows.append(
            {
                "directions": r,
                "rho": float((noise / u.std(1, keepdim=True)).mean()),
                "finished": kept,
                "rows lost": lost,
                "share": share + projected + kept * (1 - share),
                "share gathered": share + projected + kept * (1 - share) * GATHERED,
            }
        )
    return rows


def show(rows: list[dict[str, float]]) -> None:
    print("  ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>14.4g}" for value in row.values()), flush=True)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    times, bounds = [], []
    for d_sae in [0] if args.encoder else [int(n) for n in args.d_sae.split(",")]:
        x, W, bias = read(args, d_sae)
        if not args.bound_only:
            times.append({"d_sae": len(W), **time_searches(x, W, bias, args.k, args.repeats)})
        bounds += [{"d_sae": len(W), **row} for row in bound(x, W, bias, args.k, args.margin)]
    if times:
        show(times)
    show(bounds)
    if args.json:
        args.json.write_text(json.dumps({"times": times, "bounds": bounds}, indent=1))


if __name__ == "__main__":
    main()
