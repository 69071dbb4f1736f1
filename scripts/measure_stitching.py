"""Do probes of one model read another through similarities to shared anchors? Relative representations of two models.

    python scripts/measure_stitching.py --out stitching.json

The models `tales` and `tales-b` (another width, depth and initialization) read the same stories. As in
arXiv:2209.15430, the relative representation of a token is its cosines to the activations of some anchor tokens, the
same ones for both models, all centered at the anchors' mean. Probes of concepts learn from one model's tokens and are
tried on the other's, in stories of which neither probes nor anchors were taken. Mean AUROC over concepts, of:

    own, token alone      probes of the model itself; the concept's rate among tokens of that word, without a model
    relative, own         probes of relative representations, of the model itself
    relative              the same probes on the other model
    relative, scaled      the same, each model's cosines brought to the mean and variance of its own tokens
    relative, shuffled    the other model's anchors in another order
    direct                probes of activations, on those of the other model, filled up with zeros or cut
    linear map            probes of activations, on those of the other model mapped by least squares at the anchors
    rotation              the same with an orthogonal map and a scale
    all pairs             least squares at all tokens that probes learn from, a ceiling of linear maps

"codes" are the codes of TopK SAEs, one of each model, in place of activations. Every seed is another choice of stories,
anchors and SAEs; the two models are the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from measure_dissection import MIN_COUNT, read_stories, trained_sae
from objectives.shared import FIRST_STORY, HOOK, format_table
from saelab.evaluation import encode_csr
from saelab.functional.metrics import exact
from saelab.functional.statistics import auroc, fit_probe
from saelab.lm.token_labels import TokenLabels
from saelab.stores.files import write_json
from saelab.synthetic.tales import generate_stories

KEPT = Path("runs/stitching")
KINDS = ("root", "class", "pole", "one-sided", "state", "topic", "register", "role", "relation")
MODELS = ("tales", "tales-b")
D_SAE, K = 512, 16
N_TOKENS = 10_000  # that probes learn from, and are tried on


class Side(NamedTuple):
    """One model's rows: of tokens that probes learn from, of anchors, and of held-out tokens."""

    train: Tensor
    anchors: Tensor
    test: Tensor

    def relative(self, order: Tensor | None = None) -> "Side":
        """Cosines to the anchors."""
        center = self.anchors.mean(0)
        anchors = torch.nn.functional.normalize(self.anchors - center, dim=1)
        anchors = anchors if order is None else anchors[order]
        parts = (torch.nn.functional.normalize(part - center, dim=1) @ anchors.T for part in self)
        return Side(*parts)

    def scaled(self) -> "Side":
        """Columns of mean 0 and deviation 1 over the tokens that probes learn from."""
        mean, scale = self.train.mean(0), self.train.std(0).clamp(min=1e-6)
        return Side(*((part - mean) / scale for part in self))

    def fit(self, width: int) -> "Side":
        """Rows filled up with zeros or cut to a width."""
        return Side(*(torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in self))


def map_rows(source: Tensor, target: Tensor, x: Tensor, orthogonal: bool = False) -> Tensor:
    """`x` by the map that brings `source` nearest to `target`, pair by pair."""
    from_mean, to_mean = exact(source).mean(0), exact(target).mean(0)
    a, b = exact(source) - from_mean, exact(target) - to_mean
    if orthogonal:
        left, sizes, right = torch.linalg.svd(a.T @ b, full_matrices=False)
        weights = left @ right * (sizes.sum() / a.square().sum())
    else:
        weights = torch.linalg.lstsq(a, b, driver="gelsd").solution
    return ((exact(x) - from_mean) @ weights + to_mean).float()


def mean_auroc(scores: Tensor, y: Tensor) -> float:
    """Mean over concepts."""
    return float(np.mean([auroc(scores[:, i].numpy(), y[:, i].bool().numpy()) for i in range(y.shape[1])]))


def stitch(mine: Side, other: Side, y: Tensor, y_test: Tensor, seed: int) -> dict[str, float]:
    """Figures of probes of one model, on itself and on the other."""
    own, theirs = mine.relative(), other.relative()
    order = torch.randperm(len(own.anchors), generator=torch.Generator().manual_seed(seed))
    plain, relative, scaled = (fit_probe(one.train, y, standardize=True) for one in (mine, own, own.scaled()))
    tried = {
        "own": plain(mine.test),
        "relative, own": relative(own.test),
        "relative": relative(theirs.test),
        "relative, scaled": scaled(theirs.scaled().test),
        "relative, shuffled": relative(other.relative(order).test),
        "direct": plain(other.fit(mine.test.shape[1]).test),
        "linear map": plain(map_rows(other.anchors, mine.anchors, other.test)),
        "rotation": plain(map_rows(other.anchors, mine.anchors, other.test, orthogonal=True)),
        "all pairs": plain(map_rows(other.train, mine.train, other.test)),
    }
    return {name: mean_auroc(scores, y_test) for name, scores in tried.items()}


def rates_of_words(ids: Tensor, y: Tensor, asked: Tensor) -> Tensor:
    """How often each concept holds of tokens of the same word."""
    table = torch.zeros(int(max(ids.max(), asked.max())) + 1, y.shape[1]).index_add(0, ids, y)
    counts = torch.bincount(ids, minlength=len(table))[:, None]
    return ((table + y.mean(0)) / (counts + 1))[asked]


def sae_of_other(hook_point: str, n_tokens: int, seed: int) -> sl.SAE:
    """A TopK SAE of `tales-b`, trained once."""
    place = KEPT / f"{hook_point}-{n_tokens}-{seed}"
    if not place.is_dir():
        tokens = generate_stories(2000, first=FIRST_STORY).tokens()
        model = sl.load_model("tales-b", progress=False)
        acts = sl.collect(model, tokens, hook_point, KEPT / f"activations-{hook_point}", progress=False)
        assert isinstance(acts, sl.Activations)
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=512, seed=seed)
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
        sl.SAE(cfg, seed).fit(acts, run, progress=False).save_pretrained(place)
    return sl.SAE.from_pretrained(place)


def choose_concepts(n: int) -> list[str]:
    """Some concepts of all kinds but single words, of those that are frequent."""
    labels = generate_stories(100, first=FIRST_STORY).labels
    frequent = labels.matrix.astype(np.int64).sum(0).A1 >= 2 * MIN_COUNT
    names = [one.name for one, there in zip(labels.concepts, frequent, strict=True) if there and one.kind in KINDS]
    return sorted(np.random.default_rng(0).permutation(names)[:n].tolist())


def marks(labels: TokenLabels, names: Sequence[str], rows: Tensor) -> Tensor:
    """Which of the concepts hold of the tokens, as 0 and 1."""
    return torch.stack([labels[name][rows] for name in names], 1).float()


def read_words(n_stories: int, first: int) -> Tensor:
    """Ids of the words of stories, as `read_stories` takes them."""
    tokens = generate_stories(n_stories, first=first).tokens()
    return tokens.ids[tokens.attention_mask & (tokens.ids >= 4)].long()


def encode(sae: sl.SAE, x: Tensor) -> Tensor:
    return torch.from_numpy(encode_csr(sae, x).toarray())


def measure(args: argparse.Namespace, seed: int, names: list[str]) -> dict[int, dict[str, dict[str, float]]]:
    """Figures by number of anchors, setting and method; `names` are the concepts."""
    first = FIRST_STORY + 12_000_000 + seed * 10_000
    second = first + 5_000
    hooks = dict(zip(MODELS, (HOOK, args.hook_point), strict=True))
    acts = {}
    for name, at in hooks.items():
        x, labels = read_stories(args.n_stories, first, [at], name)
        x_test, labels_test = read_stories(args.n_stories, second, [at], name)
        acts[name] = x[at], x_test[at]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(labels.n_tokens, generator=generator)
    rows, rest = order[:N_TOKENS], order[N_TOKENS:]
    test = torch.randperm(labels_test.n_tokens, generator=generator)[:N_TOKENS]
    y, y_test = marks(labels, names, rows), marks(labels_test, names, test)
    pair = trained_sae(D_SAE, K, args.n_tokens, seed), sae_of_other(args.hook_point, args.n_tokens, seed)
    saes = dict(zip(MODELS, pair, strict=True))
    codes = {name: (encode(saes[name], x), encode(saes[name], x_test)) for name, (x, x_test) in acts.items()}
    words = read_words(args.n_stories, first)[rows], read_words(args.n_stories, second)[test]
    alone = mean_auroc(rates_of_words(words[0], y, words[1]), y_test)
    found: dict[int, dict[str, dict[str, float]]] = {}
    for n in args.n_anchors:
        for what, space in (("", acts), (", codes", codes)) if n == args.n_anchors[0] else (("", acts),):
            sides = {name: Side(x[rows], x[rest[:n]], x_test[test]) for name, (x, x_test) in space.items()}
            for a, b in (MODELS, MODELS[::-1]):
                figures = {"token alone": alone, **stitch(sides[a], sides[b], y, y_test, seed)}
                found.setdefault(n, {})[f"{a} to {b}{what}"] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook-point", default="blocks.3.hook_resid_post", help="of tales-b")
    parser.add_argument("--n-stories", type=int, default=120, help="to learn from, and as many to measure on")
    parser.add_argument("--n-anchors", type=int, nargs="+", default=[300, 50])
    parser.add_argument("--n-concepts", type=int, default=20)
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = choose_concepts(args.n_concepts)
    tables = [measure(args, seed, names) for seed in args.seeds]
    print(f"tales ({HOOK}) and tales-b ({args.hook_point}), {N_TOKENS:,} tokens to learn from, concepts: {names}")
    for n in args.n_anchors:
        methods = next(iter(tables[0][n].values()))
        rows = {m: [{setting: one[m] for setting, one in table[n].items()} for table in tables] for m in methods}
        print(f"\n{n} anchors\n{format_table(rows)}")
    if args.out:
        write_json(args.out, {"concepts": names, "seeds": args.seeds, "tables": tables})


if __name__ == "__main__":
    main()
