"""Do neurons align with concepts more than rotated ones do, and SAEs more than both? Network Dissection of `tales`.

    python scripts/measure_dissection.py --out dissection.json

As in arXiv:1704.05796, with tokens for pixels: a column of activations (a neuron, a coordinate, a latent) is on for the
tokens of its largest 0.5 % of values, for those with a code other than 0 where there are fewer. Its concept is the one
with the largest IoU, intersection over union of its tokens and the concept's; it is a detector where that is above .04,
and unique detectors are the different concepts of detectors. That rule finds detectors among random directions too, so
those with an IoU of .2 or more stand beside it. Rotated neurons are the same activations in a random orthonormal basis;
"scaled" are those of neurons brought to variance 1 first, as large neurons fill all others in a rotation.

Labels are moved in two ways. "permuted": within stories, or between them where a concept is one of whole stories.
"exchanged": each story has the labels of another, stretched to its length and in their order, so that places in the
story are still told, as the beginning is. Every seed is another sample of stories, another SAE and other rotations.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, tales_activations
from saelab.evaluation import encode_csr
from saelab.evaluation.concepts import move_truth
from saelab.lm.token_labels import TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.tales import generate_stories

KEPT = Path("runs/dissection")
QUANTILE, DETECTOR, CLEAR = 0.005, 0.04, 0.2
MIN_COUNT = 100  # tokens of a concept


def read_stories(
    n_stories: int, first: int, hook_points: Sequence[str], name: str = "tales"
) -> tuple[dict[str, Tensor], TokenLabels]:
    """Activations of the words of stories by hook point, and their concepts."""
    stories = generate_stories(n_stories, first=first)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)  # words, not the ends
    model = sl.load_model(name, progress=False)
    parts: dict[str, list[Tensor]] = {hook_point: [] for hook_point in hook_points}
    for ids, chosen in zip(tokens.ids.split(100), kept.split(100), strict=True):
        for hook_point, x in sl.lm.capture(model, ids, hook_points).items():
            parts[hook_point].append(x[chosen].float())
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    documents = kept.nonzero()[:, 0].numpy()
    frequent = np.flatnonzero(labels.matrix.astype(np.int64).sum(0).A1 >= MIN_COUNT)
    concepts = [labels.concepts[i] for i in frequent]
    labels = TokenLabels.of(labels.matrix[:, frequent], concepts, documents)
    return {hook_point: torch.cat(part) for hook_point, part in parts.items()}, labels


def trained_sae(d_sae: int, k: int, n_tokens: int, seed: int, folder: Path = KEPT) -> sl.SAE:
    """A TopK SAE of `tales`, trained once."""
    place = folder / f"topk-{d_sae}-{k}-{n_tokens}-{seed}"
    if not place.is_dir():
        cfg = sl.SAEConfig(d_in=128, d_sae=d_sae, activation=sl.TopK(k=k))
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=512, seed=seed)
        sl.SAE(cfg, seed).fit(tales_activations(), run, progress=False).save_pretrained(place)
    return sl.SAE.from_pretrained(place)


def rotate(x: Tensor, seed: int, scaled: bool) -> Tensor:
    """The rows in a random orthonormal basis."""
    rng = np.random.default_rng(seed)
    basis, triangle = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))
    if scaled:
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    return x @ torch.from_numpy(basis * np.sign(np.diag(triangle))).to(x)


def find_masks(z: Tensor, sides: int) -> Any:
    """Which columns are on for which tokens, sparse (n_tokens, n_columns * sides); with two sides also those of -z."""
    from scipy.sparse import csc_matrix, hstack

    n = round(QUANTILE * len(z))
    found = []
    for side in (1, -1)[:sides]:
        values, rows = (side * z).topk(n, dim=0)
        on = (values != 0).T.numpy()
        counts = on.sum(1)
        parts = (np.ones(counts.sum(), np.int32), rows.T.numpy()[on], np.concatenate([[0], counts.cumsum()]))
        found.append(csc_matrix(parts, shape=tuple(z.shape)))
    return hstack(found, format="csc")


def measure(masks: Any, truth: Any, sides: int) -> dict[str, float]:
    """How many columns are detectors, of how many concepts, and how well the best ones fit."""
    hits = np.asarray((masks.T @ truth).todense(), np.float64)
    on, true = masks.sum(0).A1, truth.sum(0).A1
    iou = hits / np.maximum(on[:, None] + true[None] - hits, 1)
    iou = iou.reshape(sides, -1, len(true)).max(0)
    best, concept = iou.max(1), iou.argmax(1)
    clear = best >= CLEAR
    return {
        "columns": len(best),
        "detectors": int((best > DETECTOR).sum()),
        "unique": len(set(concept[best > DETECTOR])),
        "IoU >= .2": int(clear.sum()),
        "unique of these": len(set(concept[clear])),
        "best IoU": float(best.mean()),
        "of a concept": float(iou.max(0).mean()),
    }


def exchange_stories(documents: np.ndarray, seed: int) -> np.ndarray:
    """For each token the one at the same relative place of another story."""
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    sizes = np.diff(starts, append=len(documents))
    order = np.random.default_rng(seed).permutation(len(starts))
    # a cycle, so that no story keeps its own labels
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)
    places = np.arange(len(documents)) - np.repeat(starts, sizes)
    scaled = places * np.repeat(sizes[source], sizes) // np.repeat(sizes, sizes)
    return np.repeat(starts[source], sizes) + scaled


def format_rows(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Means over all that there are of a line, the smallest and the largest in brackets."""
    columns = list(dict.fromkeys(name for found in rows.values() for name in found[0]))
    lines = [f"{'':<26}" + "".join(f"{name:>21}" for name in columns)]
    for title, found in rows.items():
        cells = []
        for column in columns:
            values = np.array([one.get(column, np.nan) for one in found])
            digits = 0 if all(isinstance(one.get(column), int) for one in found) else 3
            text = f"{values.mean():.{digits}f} ({values.min():.{digits}f}..{values.max():.{digits}f})"
            cells.append(text if column in found[0] else "")
        lines.append(f"{title:<26}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def sources(acts: dict[str, Tensor], args: argparse.Namespace, seed: int) -> Iterator[tuple[str, Tensor]]:
    """What is dissected, by name."""
    for name, x in acts.items():
        short = "block 2" if name == HOOK else f"neurons {name.split('.')[1]}"
        yield short, x
        for draw in range(args.n_rotations):
            yield f"{short}, rotated", rotate(x, 100 * seed + draw, scaled=False)
            yield f"{short}, scaled", rotate(x, 100 * seed + draw, scaled=True)
    x = acts[HOOK]
    sae = trained_sae(args.d_sae, args.k, args.n_tokens, seed)
    untrained = make_untrained(sae, tales_activations()[:10_000], seed=100 + seed)
    random = torch.randn(x.shape[1], args.d_sae, generator=torch.Generator().manual_seed(seed))
    yield "TopK SAE", torch.from_numpy(encode_csr(sae, x).toarray())
    yield "untrained SAE", torch.from_numpy(encode_csr(untrained, x).toarray())
    yield "its encoder, dense", x @ sae.W_enc.detach()
    yield "random directions", x @ random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-stories", type=int, default=400, help="stories to dissect on, for each seed")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--n-rotations", type=int, default=3, help="rotations for each seed")
    parser.add_argument("--sides", type=int, choices=(1, 2), default=1, help="2 to take the smallest values as well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    hook_points = [*(f"blocks.{i}.mlp.hook_post" for i in range(4)), HOOK]
    tables: dict[str, dict[str, list[dict[str, float]]]] = {"own": {}, "permuted": {}, "exchanged": {}}
    for seed in args.seeds:
        acts, labels = read_stories(args.n_stories, FIRST_STORY + 10_000_000 + seed * 10_000, hook_points)
        assert labels.doc_ids is not None
        truth = labels.matrix.astype(np.int32).tocsr()
        moved = {
            "own": truth,
            "permuted": move_truth(truth, labels.doc_ids, seed),
            "exchanged": truth[exchange_stories(labels.doc_ids, seed)],
        }
        print(f"seed {seed}: {labels.n_tokens:,} tokens, {len(labels)} concepts of {MIN_COUNT} or more", flush=True)
        for name, z in sources(acts, args, seed):
            masks = find_masks(z, args.sides)
            for which, given in moved.items():
                tables[which].setdefault(name, []).append(measure(masks, given, args.sides))
    for which, rows in tables.items():
        print(f"\nlabels {which}\n{format_rows(rows)}")
    if args.out:
        write_json(args.out, {"settings": vars(args) | {"out": str(args.out)}, "tables": tables})


if __name__ == "__main__":
    main()
