"""What do the layers of a model look like beside shuffled tokens, and what words do they stand for?

    python scripts/measure_layers.py tales --seeds 0 1 2
    python scripts/measure_layers.py PATH/TO/stories260k --text PATH/TO/tinystories.txt --seeds 0 1 2

A seed draws other documents, prompts, shuffles and batches. Every number is the mean over seeds and its standard
deviation; `shuffled` and `chance` are the nulls of `layer_profile`, `untrained` is the same model with weights drawn as
before training. `told` counts the seeds in which a measure differs from shuffled text (false discovery rate 0.05 over
all layers and measures). With the model of tales the words' topics are known: `word_geometry`.
"""

import argparse
import copy
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.analysis import LayerProfile, TunedLens, WordGeometry, fit_lens, layer_profile, word_geometry
from saelab.lm.model_checks import Model
from saelab.stores.files import write_json
from saelab.stores.results import format_table
from saelab.synthetic.lexicon import TOPICS
from saelab.synthetic.tales import generate_stories

FIRST = 96_000_000  # number of the first story: the model has seen none from here on


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tales, a Hub id or a folder")
    parser.add_argument("--text", type=Path, help="default: stories generated for the models of tales")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=60_000, help="of each seed")
    parser.add_argument("--n-prompts", type=int, default=120)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--n-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="file for all numbers")
    return parser.parse_args()


def read_tokens(model: Model, args: argparse.Namespace, seed: int) -> sl.Tokens:
    """Documents of a seed that no other seed has."""
    if args.text is None:
        n = args.n_tokens // 160
        return generate_stories(n, first=FIRST + n * seed).tokens()
    tokens = sl.tokenize(model, args.text, 256)
    n_rows = args.n_tokens // 256
    start = n_rows * seed
    if len(tokens) < start + n_rows:
        raise SystemExit(f"The text holds {len(tokens)} rows of 256, seed {seed} needs {start + n_rows}.")
    return tokens[start : start + n_rows]


def make_untrained(model: Model) -> Model:
    """The model with weights drawn as its family does before training."""
    theirs = copy.deepcopy(model.original_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = type(theirs)(theirs.config)
    return sl.load_model(fresh.eval(), tokenizer=model.tokenizer, backend="huggingface", progress=False)


def find_topics(model: Model) -> dict[str, list[int]]:
    known = model.tokenizer.get_vocab()
    listed = {name: f"{one.places} {one.workers} {one.animals} {one.things}".split() for name, one in TOPICS.items()}
    counts = Counter(word for words in listed.values() for word in words)
    return {name: [known[word] for word in words if counts[word] == 1] for name, words in listed.items()}


def spell_mean(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ({np.std(values, ddof=1) if len(values) > 1 else 0:.{digits}f})"


def show_profiles(found: list[LayerProfile], untrained: LayerProfile) -> str:
    rows = [["measure", "layer", "text", "shuffled", "chance", "untrained", "told"]]
    for one in found[0].measures:
        for layer in range(len(found[0].hook_points)):
            mine = [profile[one.name] for profile in found]
            if np.isnan(mine[0].mean[layer]):
                continue
            told = sum(
                not any(u.measure == one.name and u.null == "shuffled text" and layer in u.layers for u in p.untold)
                for p in found
            )
            rows.append([
                one.name, str(layer), spell_mean([m.mean[layer] for m in mine]),
                spell_mean([m.shuffled[layer].mean() for m in mine]),
                "" if one.chance is None else spell_mean([m.chance[layer].mean() for m in mine]),
                f"{untrained[one.name].mean[layer]:.3f}", f"{told} of {len(found)}",
            ])  # fmt: skip
    head = (
        f"{found[0].model}: {found[0].n_prompts} prompts of {found[0].length} tokens a seed, {len(found)} seeds; loss "
        f"{spell_mean([p.loss.mean() for p in found])}, shuffled {spell_mean([p.loss_shuffled.mean() for p in found])}"
    )
    return "\n".join([head, *format_table(rows)])


def show_lenses(found: list[TunedLens], untrained: TunedLens) -> str:
    scores = [lens.scores for lens in found if lens.scores is not None]
    bare = untrained.scores
    assert bare is not None
    rows = [["layer", "KL logit", "KL tuned", "KL mean", "same, logit", "same, tuned", "same, mean", "untrained: logit",
             "tuned", "mean"]]  # fmt: skip
    for i, row in enumerate(scores[0].rows):
        mine = [one.rows[i] for one in scores]
        kl = [spell_mean([one.kl[name] for one in mine]) for name in ("logit", "tuned", "mean")]
        same = [spell_mean([one.agreement[name] for one in mine]) for name in ("logit", "tuned", "mean")]
        rows.append(
            [row.hook_point, *kl, *same, *(f"{bare.rows[i].kl[name]:.3f}" for name in ("logit", "tuned", "mean"))]
        )
    head = f"lenses: {scores[0].n_train:,} tokens, {scores[0].n_steps} steps, {scores[0].n_tokens:,} held out, by seed"
    return "\n".join([head, *format_table(rows)])


def show_words(found: list[WordGeometry]) -> str:
    rows = [["measure", "layer", "text", "permuted", "sd of permuted", "p, largest"]]
    for row in found[0].rows:
        mine = [one.find(row.layer, row.measure) for one in found]
        values = spell_mean([one.value for one in mine]), spell_mean([one.chance for one in mine])
        rows.append([row.measure, row.layer, *values, f"{mine[0].chance_std:.3f}", f"{max(one.p for one in mine):.3f}"])
    return "\n".join([f"words: {found[0].n_words}, {found[0].n_in_topics} in topics", *format_table(rows, left=(0, 1))])


def main() -> None:
    args = parse()
    model = sl.load_model(args.model, progress=False)
    bare = make_untrained(model)
    topics = find_topics(model) if args.text is None else None
    profiles, lenses, words = [], [], []
    size = {"n_prompts": args.n_prompts, "length": args.length, "progress": False}
    for seed in args.seeds:
        tokens = read_tokens(model, args, seed)
        profiles.append(layer_profile(model, tokens, seed=seed, **size))
        lenses.append(fit_lens(model, tokens, n_steps=args.n_steps, seed=seed, progress=False))
        words.append(word_geometry(model, tokens, topics, seed=seed, progress=False))
        print(f"seed {seed} done", flush=True)
    tokens = read_tokens(model, args, args.seeds[0])
    bare_profile = layer_profile(bare, tokens, **size)
    bare_lens = fit_lens(bare, tokens, n_steps=args.n_steps, progress=False)
    print(show_profiles(profiles, bare_profile), show_lenses(lenses, bare_lens), show_words(words), sep="\n\n")
    if args.out is not None:
        scores = [lens.scores.to_dict() for lens in lenses if lens.scores is not None]
        told = {"profiles": profiles, "words": words, "untrained": [bare_profile]}
        plain = {name: [one.to_dict() for one in each] for name, each in told.items()}
        write_json(args.out, plain | {"lenses": scores})


if __name__ == "__main__":
    main()
