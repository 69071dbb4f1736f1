"""Geometry of concepts (arXiv:2410.19750) on the model `tales`: lobes, a galaxy and crystals, each beside its nulls.

    python scripts/measure_geometry.py --out geometry.json

Lobes (`sl.lobes`): clusters of features that fire in the same windows of 32 tokens of unseen stories, as clusters of
directions (contrast of cosines, AMI) and of meanings (the topic or state that a feature agrees with best in other
stories). Galaxy (`sl.galaxy`): spectrum and clumps of directions, by layer for one seed. Crystals (`sl.crystals`):
differences of word pairs, of mean activations by word, and of the decoder row of the feature that is best for a word;
distractors are topics, states, position and log frequency. An untrained SAE shows what follows from its activations.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, format_table, labeled_activations
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.metrics import exact
from saelab.functional.statistics import kappa
from saelab.geometry.lobe_results import Lobes
from saelab.geometry.relation_crystals import RANDOM, Crystals
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic import lexicon as lex
from saelab.synthetic.grammar import PLURALS
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.vocabulary import VOCABULARY

D_SAE, K = 1024, 16
N_LABELED = 1200  # stories that lobes are measured on
RELATIONS: dict[str, Mapping[str, str]] = {
    "young-of": lex.YOUNG,
    "home-of": lex.HOMES,
    "partner-of": lex.PARTNERS,
    "plural-of": PLURALS,
    "people-of": {name: town.people for name, town in lex.TOWNS.items()},
    "language-of": {name: town.language for name, town in lex.TOWNS.items()},
}
Rows = dict[str, list[dict[str, float]]]


def train(acts: sl.Activations, n_tokens: int, seed: int, folder: Path) -> sl.SAE:
    """An SAE of this hook point; read where it was trained before."""
    if not folder.is_dir():
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=512, seed=seed)
        sl.SAE(cfg, seed=seed).fit(acts, run, progress=False).save_pretrained(folder)
    return sl.SAE.from_pretrained(folder)


def list_lobes(name: str, found: Lobes) -> dict[str, dict[str, float]]:
    """Figures of each number of lobes, for a table."""
    rows = {}
    for score in found.scores:
        rows[f"{name}, {found.affinity}, {score.n_lobes}"] = {
            "contrast": score.contrast,
            "z": score.contrast_z,
            "z, Gaussian": float(np.mean(score.contrast_z_random)),
            "AMI": score.ami,
            "AMI z": score.ami_z,
            "AMI, Gaussian": float(np.mean(score.ami_random)),
            "of halves": score.ami_halves,
            "of starts": score.ami_starts,
            "accuracy": score.accuracy,
            "acc., Gaussian": score.accuracy_random,
            "meaning": score.meaning,
            "permuted": score.meaning_permuted,
            "of directions": score.meaning_directions,
        }
    return rows


def list_crystals(name: str, found: Crystals) -> dict[str, dict[str, float]]:
    """Figures of each treatment of vectors, for a table."""
    rows = {}
    for score in found.scores:
        figures = {"pairs": score.contrast, "differ": found.n_differ / found.n_pairs}
        for null in ("permuted_pairs", "permuted_relations"):
            figures[null] = float("nan" if score.space == RANDOM else np.mean(getattr(score, null)))
        rows[f"{name}, {score.space}"] = figures
    return rows


def list_galaxy(found: Any) -> dict[str, dict[str, float]]:
    """Figures of each cloud, for a table."""
    names = ("slope", "r2_power", "r2_exponential", "clustering")
    rows = {}
    for row in found.rows:
        for name, clouds in {"SAE": (row.cloud,), **row.nulls}.items():
            rows[f"{row.name} {name}"] = {key: float(np.mean([getattr(one, key) for one in clouds])) for key in names}
    return rows


def word_features(sae: sl.SAE, acts: sl.Activations, ids: np.ndarray) -> np.ndarray:
    """(n_words, d_in) the decoder row of the feature that agrees best with each word."""
    from scipy.sparse import csr_matrix

    words = csr_matrix((np.ones(len(ids)), (np.arange(len(ids)), ids)), shape=(len(ids), len(VOCABULARY)))
    fires = (encode_csr(sae, acts[:]) != 0).astype(np.float64)
    n_words, n_fires = (np.asarray(one.sum(0)).ravel() for one in (words, fires))
    agrees = kappa((words.T @ fires).toarray(), n_words[:, None], n_fires, len(ids))
    return exact(sae.W_dec).numpy()[np.nan_to_num(agrees).argmax(1)]


def mean_by_word(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    counts = np.bincount(ids, minlength=len(VOCABULARY)).clip(min=1)
    found = torch.zeros(len(VOCABULARY), values.shape[1], dtype=torch.float64)
    return found.index_add_(0, torch.from_numpy(ids).long(), torch.from_numpy(values)).numpy() / counts[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layer-seed", type=int, default=0, help="the seed for which other layers are measured, too")
    parser.add_argument("--n-collected", type=int, default=300_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="to train each SAE on")
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of lobes")
    parser.add_argument("--affinities", nargs="+", default=["cosine + 1", "max(cosine, 0)"])
    parser.add_argument("--kept", type=Path, default=Path("runs/geometry"), help="folder of SAEs")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    hooks = [HOOK]
    if args.layer_seed in args.seeds:
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    stories = generate_stories(args.n_collected // 155, first=FIRST_STORY)
    collected: Any = sl.collect(model, stories.tokens(), ["hook_embed", *hooks], progress=False)
    x, labels = labeled_activations(N_LABELED, ("topic", "state"))
    acts = collected[HOOK]
    ids = np.asarray(acts.token_ids)
    truth = stories.labels_at(acts.doc_ids, acts.positions)
    topics = [i for i, concept in enumerate(truth.concepts) if concept.kind in ("topic", "state")]
    counts = np.bincount(ids, minlength=len(VOCABULARY)).astype(np.float64)
    shares = [truth.matrix[:, topics].toarray().astype(np.float64), acts.positions.numpy()[:, None].astype(np.float64)]
    covariates = np.hstack([mean_by_word(np.hstack(shares), ids), np.log1p(counts)[:, None]])
    spaces = {
        name: mean_by_word(exact(collected[at][:]).numpy(), ids)
        for name, at in (("embedding", "hook_embed"), ("layer 2", HOOK))
    }
    tables: dict[str, Rows] = {"lobes": {}, "galaxy": {}, "crystals": {}}

    def add(table: str, rows: dict[str, dict[str, float]]) -> None:
        for name, figures in rows.items():
            tables[table].setdefault(name, []).append(figures)

    pairs = {name: list(found.items()) for name, found in RELATIONS.items()}
    settings: dict[str, Any] = {"names": VOCABULARY, "distractors": covariates, "weights": counts}
    for name, vectors in spaces.items():
        found = sl.crystals(vectors, pairs, **settings)
        print(f"\n{name}: {found}")
        add("crystals", list_crystals(name, found))
    for seed in args.seeds:
        layers = {}
        for hook in hooks if seed == args.layer_seed else [HOOK]:
            layer = hook.split(".")[1]
            layers[f"layer {layer}"] = train(collected[hook], args.n_tokens, seed, args.kept / f"layer-{layer}-{seed}")
        sae = layers[f"layer {HOOK.split('.')[1]}"]
        untrained = make_untrained(sae, acts[:10_000], seed=100 + seed)
        cloud = sl.galaxy(layers, seed=seed)
        print(cloud)
        add("galaxy", list_galaxy(cloud))
        coded = {"SAE": (encode_csr(sae, x), sae), "untrained": (encode_csr(untrained, x), untrained)}
        for affinity in args.affinities:
            baselines = {"untrained": coded["untrained"]}
            lobed = sl.lobes(*coded["SAE"], args.ks, labels=labels, baselines=baselines, affinity=affinity, seed=seed)
            print(lobed)
            add("lobes", list_lobes("SAE", lobed) | list_lobes("untrained", lobed.baselines["untrained"]))
        for name, (_, one) in coded.items():
            found = sl.crystals(word_features(one, acts, ids), pairs, seed=seed, **settings)
            add("crystals", list_crystals(name, found))
        print(f"\nseeds so far: {args.seeds[: args.seeds.index(seed) + 1]}")
        for title, rows in tables.items():
            print(f"\n{title}\n{format_table(rows)}", flush=True)
        if args.out:
            write_json(args.out, tables)


if __name__ == "__main__":
    main()
