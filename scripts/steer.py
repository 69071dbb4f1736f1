"""From a feature store to features that steer: texts side by side, and what each strength does and costs.

    python scripts/steer.py runs/report/store --out runs/steer
    python scripts/steer.py runs/report/store --features 123,45 --concept "happy,glad,smiled" --out runs/steer

Without --features those with the best output scores: amplified, they make the model say the words they promote. Without
--concept each is measured on the five words that it promotes most. Each is steered up and down and compared with the
difference in means, a probe, a random direction and another feature of equal density, all adding vectors of one length.
"""

import argparse
from pathlib import Path

import torch

import saelab as sl
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import token_strings
from saelab.lm.unembedding import read_out
from saelab.steering.baselines import steering_baselines, write_own
from saelab.steering.dose_response import steering_curve
from saelab.steering.feature_scores import output_scores
from saelab.steering.target_concepts import TokenConcept, concept_from_words
from saelab.steering.text_comparison import compare_generations
from saelab.stores.files import write_atomic
from saelab.visualization.intervention_plots import show_curve, show_generations

PROMPTS = ("Once upon a time", "One day", "She went to the", "The boy", "It was")
HELD_OUT = ("There was a", "In the morning", "He saw a", "They", "The girl", "Then", "After a while", "Her friend")
N_PROMOTED = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder of a feature store")
    parser.add_argument("--sae", help="default: as the store has it")
    parser.add_argument("--model", help="default: as the store has it")
    parser.add_argument("--features", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("-n", type=int, default=3, help="features, where none are given")
    parser.add_argument("--concept", help="words joined by commas; default: what each feature promotes")
    parser.add_argument("--strength", type=float, default=4.0, help="of the texts, in multiples of the largest code")
    parser.add_argument("--n-tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for pages and numbers")
    return parser.parse_args()


def choose(args: argparse.Namespace, model: Model, sae: sl.SAE, store: sl.FeatureStore) -> list[tuple[int, int]]:
    """Features and the side of each that is steered."""
    if args.features:
        peaks = store.statistics.peaks
        return [(feature, 1 if peaks[feature, 0] >= peaks[feature, 1] else -1) for feature in args.features]
    scores = output_scores(model, sae, store, prompts="Once upon a time")
    print(scores)
    words = [row for row in scores.top(len(scores.rows)) if len(row.token.strip()) > 2 and row.token.strip().isalpha()]
    return [(row.feature, row.sign) for row in words[: args.n]]


def find_concept(args: argparse.Namespace, model: Model, sae: sl.SAE, feature: int, sign: int) -> TokenConcept:
    """The words that are given, or what a side of a feature promotes."""
    if args.concept is not None:
        return concept_from_words(model, args.concept)
    order = read_out(model, sign * sae.directions()[[feature]])[0].argsort(descending=True).tolist()
    strings = token_strings(model.tokenizer, order)
    ids = [i for i in order if strings[i].strip().isalpha()][:N_PROMOTED]
    return TokenConcept(" ".join(strings[i].strip() for i in ids), tuple(sorted(ids)))


def steer_one(args: argparse.Namespace, model: Model, sae: sl.SAE, store: sl.FeatureStore, feature: int, sign: int):
    """Texts and a curve of one feature, printed and as pages."""
    concept = find_concept(args, model, sae, feature, sign)
    print(f"\n== feature {feature}, side {sign:+d}: {concept.name}\n")
    ways = {
        name: sl.Intervention(sae, {feature: side * sign * args.strength}, unit="max", store=store)
        for name, side in (("up", 1), ("down", -1))
    }
    texts = compare_generations(model, ways, PROMPTS[:3], args.n_tokens, seed=args.seed, progress=False)
    print(texts)
    own = write_own(model, list(PROMPTS), args.seed + 1, progress=False)
    sources = steering_baselines(model, sae, feature, concept, own, unit="max", store=store, sign=sign, seed=args.seed)
    curve = steering_curve(model, sources, concept, HELD_OUT, unit="max", n_tokens=args.n_tokens, seed=args.seed)
    print(f"\n{curve}")
    curve.save(args.out / f"{feature}.json")
    write_atomic(args.out / f"{feature}-texts.html", show_generations(texts).encode())
    write_atomic(args.out / f"{feature}-curve.html", show_curve(curve).encode())


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    store = sl.FeatureStore.load(args.store)
    sae = sl.SAE.from_pretrained(args.sae or store.manifest.sae["name_or_path"])
    model = sl.load_model(args.model or store.provenance.model, progress=False)
    for feature, sign in choose(args, model, sae, store):
        steer_one(args, model, sae, store, feature, sign)
    print(f"\nPages in {args.out}.")


if __name__ == "__main__":
    main()
