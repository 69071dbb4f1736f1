"""From a feature store to names of its features and a report that shows them.

    python scripts/label_features.py runs/report/store --report runs/report/labelled
    python scripts/label_features.py runs/report/store --llm http://localhost:8000/v1 --model NAME --features 1,2,3

Rules name every feature; with --model a language model names those that are asked for (the ten with the best rules by
default) and scores them against chance. Labels go into the database in the store's folder; a person's choice is kept:

    saelab labels runs/report/store set 123 "rain and storms"
"""

import argparse
from pathlib import Path

import saelab as sl
from saelab.labels.autointerp.endpoints import OpenAIClient
from saelab.labels.autointerp.explainers import estimate_labels, explain_features
from saelab.labels.label import BOTH
from saelab.labels.label_store import LabelStore
from saelab.labels.rules.rule_labels import RuleLabels
from saelab.labels.rules.rule_search import label_by_rules
from saelab.lm.model_checks import Model

N_ASKED = 10


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder of a feature store")
    parser.add_argument("--report", type=Path, help="folder for a report; default: none is written")
    parser.add_argument("--llm", help="URL of an OpenAI-compatible endpoint; default: OpenAI's")
    parser.add_argument("--model", help="the language model there; default: none is asked")
    parser.add_argument("--features", type=lambda text: [int(part) for part in text.split(",")], help="for the model")
    return parser.parse_args()


def open_origin(store: sl.FeatureStore) -> "tuple[sl.SAE | None, Model | None]":
    """SAE and language model of a store, where they are still where they were."""
    try:
        return sl.SAE.from_pretrained(store.manifest.sae["name_or_path"]), sl.load_model(store.provenance.model)
    except (OSError, ValueError) as error:
        print(f"Without what features promote and neighbors by direction: {error}")
        return None, None


def ask(store: sl.FeatureStore, args: argparse.Namespace, ruled: RuleLabels, book: LabelStore) -> None:
    """Names and scores by a language model; made again it asks only what has no answer yet."""
    features = args.features or list(dict.fromkeys(row.feature for row in ruled.good))[:N_ASKED]
    signs = (1, -1) if store.signed else (BOTH,)
    client = OpenAIClient(args.model, args.llm)
    print(estimate_labels(store, client, features, signs=signs))
    found = explain_features(store, client, features, signs=signs)
    book.add(found.labels)
    print(found)


def main() -> None:
    args = parse()
    store = sl.FeatureStore.load(args.store)
    sae, model = open_origin(store)
    lens = sl.analysis.logit_lens(sae, model) if sae is not None and model is not None else None
    ruled = label_by_rules(store, lens=lens)
    print(ruled)
    with LabelStore.open(store) as book:
        book.add(ruled.labels(), afresh=True)
        if args.model is not None:
            ask(store, args, ruled, book)
        print(book)
    if args.report is not None:
        print(sl.report(store, args.report, model, sae=sae))


if __name__ == "__main__":
    main()
