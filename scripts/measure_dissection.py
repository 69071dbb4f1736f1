"""Do neurons align with concepts more than rotated ones do, and SAEs more than both? Network Dissection of `tales`.

    python scripts/measure_dissection.py --out dissection.json

`sl.dissect` (arXiv:1704.05796, with tokens for pixels): a side of a feature is on for the tokens of its largest 0.5 %
of values; thresholds and the concept of each side are chosen on half of the stories, IoU is that of the other half.
Beside a TopK SAE: an untrained one, the activations, these in random orthonormal bases, before and after scaling each
coordinate to variance 1, the SAE's dictionary in random bases, and labels moved in two ways. The same for MLP neurons
without an SAE. Then concept embeddings (Net2Vec): IoU of the best single side and of a regression on all. Every seed is
another sample of stories, another SAE and other rotations.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, tales_activations
from saelab.evaluation import DissectionRow, encode_csr
from saelab.lm.token_labels import TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.tales import generate_stories

KEPT = Path("runs/dissection")
NEURONS = tuple(f"blocks.{i}.mlp.hook_post" for i in range(4))
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


def summarize(row: DissectionRow) -> dict[str, float]:
    """A row by the names of its columns."""
    return {
        "sides": row.n_sides,
        "detectors": row.n_detectors,
        "unique": row.n_unique,
        "IoU >= .2": row.n_clear,
        "unique of these": row.n_unique_clear,
        "mean IoU": row.mean_iou,
        "of possible": row.mean_share,
        "of a concept": row.concept_iou,
    }


def dissect_all(args: argparse.Namespace, seed: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Rows by place and name, of one sample of stories."""
    acts, labels = read_stories(args.n_stories, FIRST_STORY + 10_000_000 + seed * 10_000, [*NEURONS, HOOK])
    print(f"seed {seed}: {labels.n_tokens:,} tokens, {len(labels)} concepts of {MIN_COUNT} or more", flush=True)
    sae = trained_sae(args.d_sae, args.k, args.n_tokens, seed)
    untrained = make_untrained(sae, tales_activations()[:10_000], seed=100 + seed)
    tables: dict[str, dict[str, list[dict[str, float]]]] = {}
    for hook_point, x in acts.items():
        settings = {"acts": x, "seed": seed, "n_rotations": args.n_rotations, "min_count": MIN_COUNT // 2}
        if hook_point == HOOK:
            settings |= {"sae": sae, "baselines": {"untrained SAE": encode_csr(untrained, x)}}
            found = sl.dissect(encode_csr(sae, x), labels, **settings)
            print(f"{found}\n", flush=True)
        else:
            found = sl.dissect(x - x.mean(0), labels, **settings)
        for row in found.rows:
            tables.setdefault(hook_point, {}).setdefault(row.name, []).append(summarize(row))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-stories", type=int, default=400, help="stories to dissect on, for each seed")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--n-rotations", type=int, default=3, help="rotations for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [dissect_all(args, seed) for seed in args.seeds]
    tables = {
        place: {name: [row for one in found for row in one[place][name]] for name in found[0][place]}
        for place in found[0]
    }
    for place, rows in tables.items():
        print(f"\n{place}\n{format_rows(rows)}")
    if args.out:
        write_json(args.out, {"settings": vars(args) | {"out": str(args.out)}, "tables": tables})


if __name__ == "__main__":
    main()
