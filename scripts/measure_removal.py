"""One register of tales taken out of a model: what is left of it downstream, and what the rest of the world lost.

    python scripts/measure_removal.py recipe weather-report --kept runs/supervised/stories --out removal.json

At the output of block 2 of `tales` the concept is taken out by the k sides of features that separate it (of three
kinds of dictionary), by directions, and by the least erasure; behind block 3 fresh probes look for it and for every
other concept, in held-out stories. Beside each stand as many random features that fire as often, or random directions.
`--kept` is a folder of dictionaries that `measure_supervised.py --kept` wrote; without it they are trained.
"""

import argparse
from pathlib import Path

import torch

import saelab as sl
from measure_supervised import FIRST, HOOK, train
from saelab.probing.concept_removal import erase_concept
from saelab.stores.files import write_json
from saelab.synthetic.tales import Stories, generate_stories

UNSEEN = 70_000_000  # number of the first story here
KINDS = ("root", "pole", "state", "topic", "role", "register", "relation")


def mark_concepts(stories: Stories, tokens: sl.Tokens) -> dict[str, torch.Tensor]:
    """Where each concept of some kinds holds, as rows of tokens."""
    labels = stories.labels.spread(tokens.attention_mask)
    return {concept.name: labels[concept.name] for concept in labels.concepts if concept.kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--n-stories", type=int, default=240, help="half to choose and fit on, half to score on")
    parser.add_argument("--n-tokens", type=int, default=1_200_000, help="to train each dictionary on")
    parser.add_argument("--n-trained", type=int, default=2400, help="stories to train them on, over and over")
    parser.add_argument("--kept", type=Path, help="a folder of dictionaries, to train each only once")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    stories = generate_stories(args.n_stories, first=UNSEEN)
    tokens = stories.tokens()
    labels = mark_concepts(stories, tokens)
    acts = sl.collect(model, generate_stories(args.n_trained, first=FIRST).tokens(), HOOK, progress=False)
    saes = {seed: train(acts, seed, args.n_tokens, args.kept) for seed in args.seeds}
    found = {}
    for concept in args.concepts:
        for title, options in (
            ("directions", {"methods": ("means", "probe", "erasure")}),
            ("directions to zero", {"methods": ("means", "probe"), "to": "zero", "n_random": 0}),
            ("8 directions", {"methods": ("probe",), "n_directions": 8}),
        ):
            result = erase_concept(model, tokens, labels, concept, hook_point=HOOK, **options)
            print(f"\n{title}\n{result}", flush=True)
            found[f"{concept}/{title}"] = result.to_dict()
        for seed, kinds in saes.items():
            for name, sae in kinds.items():
                for k in args.ks if name != "frozen decoder" else ():
                    result = erase_concept(
                        model, tokens, labels, concept, sae, k=k, methods=("features",), n_random=1, seed=seed
                    )
                    print(f"\n{name}, seed {seed}\n{result}\n{result.harmed('features')}", flush=True)
                    found[f"{concept}/{name}/{seed}/{k}"] = result.to_dict()
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
