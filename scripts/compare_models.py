"""Which features recur in another seed, another layer, another model: tables with the chance level of every number.

    python scripts/compare_models.py tales tales-b --out runs/compare
    python scripts/compare_models.py PATH/TO/stories260k --text PATH/TO/tinystories.txt --out runs/layers

With one model, two seeds of a dictionary at every layer; with two, one dictionary at every layer of each. All pairs of
layers are compared on the same text, which training did not see. On saelab's own stories the features are asked, too,
which concepts they stand for, and how many of those that both models have are found as matched pairs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.lm.model_checks import Model
from saelab.stores.files import write_json
from saelab.synthetic.tales import Stories, generate_stories

FIRST = 60_000_000  # number of the first story: no model has seen any from here on
STORY_TOKENS = 150
KNOWN_F1 = 0.8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="one or two")
    parser.add_argument("--text", type=Path, help="default: saelab's own stories")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--signed", action="store_true", help="AbsTopK in place of TopK")
    parser.add_argument("--n-train", type=int, default=1_000_000, help="tokens to train each dictionary on")
    parser.add_argument("--n-text", type=int, default=300_000, help="tokens that training sees over and over")
    parser.add_argument("--n-store", type=int, default=200_000, help="tokens to compare on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if len(args.models) > 2:
        parser.error("give one model or two")
    return args


def read(args: argparse.Namespace, model: Model) -> tuple[sl.Tokens, sl.Tokens, Stories | None]:
    """Tokens to train on, tokens to compare on, and the stories where they are saelab's own."""
    if args.text is None:
        stories = generate_stories(args.n_store // STORY_TOKENS, first=FIRST)
        seen = generate_stories(args.n_text // STORY_TOKENS, first=FIRST + len(stories))
        return seen.tokens(), stories.tokens(), stories
    whole = sl.tokenize(model, args.text, ctx_len=128, n_tokens=args.n_text + args.n_store)
    n_rows = args.n_store // whole.ctx_len
    return whole[n_rows:], whole[:n_rows], None


def harvest(args: argparse.Namespace, name: str, seed: int) -> tuple[dict[str, sl.FeatureStore], Stories | None]:
    """A store for each layer, trained and harvested unless it is there."""
    model = sl.load_model(name, progress=False)
    train, test, stories = read(args, model)
    layers = args.layers or range(model.cfg.n_layers)
    hooks = {f"{Path(name).name} layer {i} seed {seed}": f"blocks.{i}.hook_resid_post" for i in layers}
    stores = {}
    activation = (sl.AbsTopK if args.signed else sl.TopK)(k=args.k)
    for title, hook_point in hooks.items():
        folder = args.out / title.replace(" ", "-")
        if not (folder / "sae").is_dir():
            acts = sl.collect(model, train, hook_point, progress=False)
            sae = sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=activation), seed=seed)
            sae.fit(acts, sl.TrainConfig(n_tokens=args.n_train, batch_size=2048, seed=seed), progress=False)
            sae.save_pretrained(folder / "sae")
        sae = sl.SAE.from_pretrained(folder / "sae")
        stores[title] = sl.harvest(sae, model, test, folder / "store", progress=False)
    return stores, stories


def concepts_of(store: sl.FeatureStore, stories: Stories) -> tuple[np.ndarray, np.ndarray]:
    """The feature that fires most like each concept (F1 over its signs and all tokens), and that F1."""
    truth = stories.labels_at(store.doc_ids, store.text.positions[store.places]).matrix
    codes = store.matrix()
    best, features = np.zeros(truth.shape[1]), np.full(truth.shape[1], -1)
    holds = np.asarray(truth.sum(0)).ravel()
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.8):
        for sign, peaks in ((1, store.statistics.peaks[:, 0]), (-1, store.statistics.peaks[:, 1])):
            fires = codes.copy()
            fires.data = (sign * codes.data > fraction * peaks[codes.indices]).astype(np.float32)
            both = (truth.T.astype(np.float32) @ fires).toarray()
            f1 = 2 * both / np.maximum(holds[:, None] + np.asarray(fires.sum(0)), 1)
            found = f1.max(1)
            features = np.where(found > best, f1.argmax(1), features)
            best = np.maximum(best, found)
    return features, best


def mean(values: list) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if values else float("nan")


def match_concepts(
    found: sl.universality.Comparison, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> str:
    """Of the concepts with a feature of F1 0.8 in both dictionaries, how many have a universal pair between the two."""
    common = np.flatnonzero((a[1] >= KNOWN_F1) & (b[1] >= KNOWN_F1))
    exact = [found.a.universal[i] and found.a.partners[i] == j for i, j in zip(a[0][common], b[0][common], strict=True)]
    any_pair = [found.a.universal[i] for i in a[0][common]]
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(b[0][common])
    by_chance = [found.a.partners[i] == j for i, j in zip(a[0][common], shuffled, strict=True)]
    return (
        f"concepts with F1 of {KNOWN_F1:g} in both: {len(common)}; their features are each other's universal match: "
        f"{mean(exact):.2f} (permuted: {mean(by_chance):.2f}); have any universal match: {mean(any_pair):.2f}"
    )


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    sides = [(args.models[0], args.seed), (args.models[-1], args.seed + (len(args.models) == 1))]
    (mine, stories), (theirs, _) = (harvest(args, *side) for side in sides)
    known = {name: concepts_of(store, stories) for name, store in (mine | theirs).items()} if stories else {}
    lines, cells = [], {}
    for name_a, store_a in mine.items():
        for name_b, store_b in theirs.items():
            found = sl.compare(store_a, store_b, seed=args.seed, progress=False)
            found.save(args.out / f"{name_a} - {name_b}.json".replace(" ", "-"))
            cells[name_a, name_b] = found
            lines += [f"== {name_a} against {name_b}", str(found)]
            lines += [match_concepts(found, known[name_a], known[name_b])] if stories else []
            print("\n".join(lines[-3:]), flush=True)
    for title, number in (
        ("share universal (a), by number", lambda one: one.a.share()),
        ("share universal (a), by variance", lambda one: one.a.share("variance")),
        ("mean one-to-one similarity", lambda one: float(np.abs(one.values).mean())),
        ("median best similarity by chance", lambda one: one.a.chance[0]),
    ):
        lines += ["", title, " " * 24 + "".join(f"{name[-16:]:>18}" for name in theirs)]
        lines += [f"{a:<24}" + "".join(f"{number(cells[a, b]):>18.3f}" for b in theirs) for a in mine]
    (args.out / "table.txt").write_text("\n".join(lines) + "\n")
    write_json(args.out / "summary.json", {f"{a} - {b}": found.a.share() for (a, b), found in cells.items()})
    print("\n".join(lines[-4 * (3 + len(mine)) :]))


if __name__ == "__main__":
    main()
