"""Benchmarks of dictionaries on the stories of `tales`, whose concepts are known, beside baselines, at several seeds.

    python scripts/measure_benchmarks.py absorption --seeds 0 1 2

TopK, BatchTopK, Matryoshka and AbsTopK of equal size and k are trained on the same activations (hook point
blocks.2.hook_resid_post) once and kept. Tables are means over seeds, the smallest and the largest in brackets.

    absorption       feature absorption and splitting of roots (animal) and classes (pet), whose children are known
    edits            SCR of pairs of story states, TPP of classes
    meta             variance of the decoder rows that a meta-SAE explains; bits a token of the quantized codes
    sensitivity      firing on sentences told again in other words, by width; beside untrained SAEs
    disentanglement  giver, receiver and order of names patched one by one into prompts that ask the receiver (RAVEL)
    choose_k         k by the decoder projection, where the L0 is planted (4, 6 and 8), and on tales
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from measure_supervised import make_task
from objectives.shared import HOOK, format_table, labeled_activations, tales_activations
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.sae.initialization import make_untrained
from saelab.synthetic.planted import PlantedConfig, PlantedWorld
from saelab.synthetic.retelling import retell_stories
from saelab.synthetic.tales import Stories
from saelab.synthetic.tasks import name_edits

D_SAE, K = 1024, 16
PREFIXES = (D_SAE // 16, D_SAE // 4, D_SAE)
KEPT = Path("runs/benchmarks")


def read_dictionaries(seed: int, n_tokens: int, kept: Path = KEPT) -> dict[str, sl.SAE]:
    """The dictionaries of a seed; those that were trained before are read."""
    kinds = {"TopK": sl.TopK(k=K), "BatchTopK": sl.BatchTopK(k=K), "Matryoshka": sl.BatchTopK(k=K)}
    kinds |= {"AbsTopK": sl.AbsTopK(k=K)}
    folders = {name: kept / f"{name}-{n_tokens}-{seed}" for name in kinds}
    if not all(folder.is_dir() for folder in folders.values()):
        acts = tales_activations()
        saes = [
            sl.SAE(
                sl.SAEConfig(
                    d_in=acts.d_in,
                    d_sae=D_SAE,
                    activation=activation,
                    prefixes=PREFIXES if name == "Matryoshka" else None,
                ),
                seed,
            )
            for name, activation in kinds.items()
        ]
        sl.fit(saes, acts, sl.TrainConfig(n_tokens=n_tokens, batch_size=2048, seed=seed), progress=False)
        for sae, folder in zip(saes, folders.values(), strict=True):
            sae.save_pretrained(folder)
    return {name: sl.SAE.from_pretrained(folder) for name, folder in folders.items()}


def collect(rows: dict[str, list[dict[str, float]]], name: str, figures: dict[str, float]) -> None:
    rows.setdefault(name, []).append(figures)


def absorption(args: argparse.Namespace) -> str:
    acts, labels = labeled_activations(args.n_stories, ("root", "class", "word"))
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        dictionaries = read_dictionaries(seed, args.n_tokens)
        first, *others = dictionaries
        found = sl.evaluation.score_absorption(
            dictionaries[first], acts, labels, seed=seed, baselines={name: dictionaries[name] for name in others}
        )
        for name, scores in {first: found, **found.baselines}.items():
            for kind in ("root", "class"):
                of_kind = {concept.name for concept in labels.concepts if concept.kind == kind}
                mine = [row for row in scores.scored if row.parent in of_kind]
                names = ("full", "fraction", "n_split", "f1", "recall")
                means = {each: sum(getattr(row, each) for row in mine) / len(mine) for each in names}
                collect(rows, f"{kind}: {name}", means | {"parents": float(len(mine))})
    return f"{len(acts):,} tokens, half of the stories held out\n{format_table(dict(sorted(rows.items())))}"


PAIRS = (("quote", "story of a girl"), ("past", "story of a girl"), ("quote", "plural-subject"), ("past", "quote"))


def edits(args: argparse.Namespace) -> str:
    data = {
        "TPP": labeled_activations(args.n_stories, ("class",)),
        "SCR": labeled_activations(args.n_stories, ("state",)),
    }
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        dictionaries = read_dictionaries(seed, args.n_tokens)
        first, *others = dictionaries
        given = {name: dictionaries[name] for name in others}
        for metric, (acts, labels) in data.items():
            score = {
                "TPP": sl.evaluation.score_tpp,
                "SCR": partial(sl.evaluation.score_scr, pairs=PAIRS),
            }[metric]
            found = score(dictionaries[first], acts, labels, seed=seed, baselines=given)
            for name, scores in {first: found, **found.baselines}.items():
                collect(rows, f"{metric}: {name}", {f"n={n}": value for n, value in scores.means.items()})
        reasons = [f"{row.concept}/{row.ablated}: {row.reason}" for row in found.rows if row.reason]
    head = f"{len(data['TPP'][0]):,} tokens, half of the stories held out; SCR pairs left out: {reasons or 'none'}"
    return f"{head}\n{format_table(dict(sorted(rows.items())))}"


def meta(args: argparse.Namespace) -> str:
    acts, _ = labeled_activations(args.n_stories, ("class",))
    rows: dict[str, list[dict[str, float]]] = {}
    bits: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, sae in read_dictionaries(seed, args.n_tokens).items():
            if name in ("BatchTopK", "Matryoshka"):
                found = sl.evaluation.meta_sae(sae, n_steps=args.n_steps, seed=seed, progress=False)
                figures = {"rows": found.explained_variance, "gaussian": found.gaussian, "random": found.random}
                collect(rows, name, figures | {"dead": found.dead_frac})
            length = sl.evaluation.description_length(sae, acts, seed=seed)
            for which, one in {name: length, f"{name}, untrained": length.baselines["untrained"]}.items():
                names = ("bits", "bits_indices", "bits_values", "fvu", "l0")
                collect(bits, which, {each: getattr(one, each) for each in names})
    return f"variance explained\n{format_table(rows)}\n\n{len(acts):,} tokens\n{format_table(bits)}"


def disentanglement(args: argparse.Namespace) -> str:
    model = sl.load_model("tales", progress=False)
    task, fitted = (make_task(model, name_edits(n, seed)) for n, seed in ((args.n_prompts, 1), (2 * args.n_prompts, 2)))
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        if args.kept:
            folders = {name: args.kept / f"{name}-{seed}" for name in ("TopK", "Matryoshka", "AbsTopK")}
            saes = {name: sl.SAE.from_pretrained(folder) for name, folder in folders.items() if folder.is_dir()}
        else:
            saes = read_dictionaries(seed, args.n_tokens)
        if not saes:
            continue
        first, *others = saes
        given = {name: saes[name] for name in others}
        found = sl.evaluation.score_disentanglement(
            saes[first], task, fitted, ns=(4, 16, 64, 256), seed=seed, baselines=given
        )
        print(f"seed {seed}, SAE is {first}\n{found}\n", flush=True)
        for name, one in {first: found, **found.baselines}.items():
            for figure in ("scores", "cause", "isolation"):
                collect(rows, f"{figure}: {name}", {f"n={n}": value for n, value in getattr(one, figure).items()})
    head = f"{found.n_prompts} prompts, chosen on {found.n_train:,} others; 0.5 is patching nothing or everything"
    return f"{head}\n{format_table(dict(sorted(rows.items())))}"


def choose(args: argparse.Namespace) -> str:
    lines = []
    for l0, ks in ((4.0, (2, 3, 4, 5, 6, 8)), (6.0, (3, 4, 5, 6, 7, 9)), (8.0, (4, 6, 7, 8, 9, 12))):
        for seed in args.seeds:
            world = PlantedWorld(
                PlantedConfig(n_features=48, d_in=64, l0=l0, n_roots=0, zipf=0.3, correlation=0.5, n_factors=8), seed
            )
            x, _ = world.sample(20_000, seed=1)
            cfg = sl.SAEConfig(d_in=64, d_sae=48, activation=sl.BatchTopK(k=4))
            run = sl.TrainConfig(n_tokens=150 * 512, batch_size=512, lr=3e-3, seed=seed)
            found = sl.evaluation.choose_k(x, ks, cfg, run, seed=seed, progress=False)
            lines.append(f"planted L0 {l0:g}, seed {seed}: k={found.k} of {ks}")
    acts = tales_activations()
    for seed in args.seeds:
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.BatchTopK(k=K))
        run = sl.TrainConfig(n_tokens=args.n_tokens // 4, batch_size=2048, seed=seed)
        found = sl.evaluation.choose_k(acts, (4, 8, 16, 32, 64, 128), cfg, run, seed=seed, progress=False)
        lines.append(f"tales, seed {seed}: {found}")
    return "\n".join(lines)


def read_codes(sae: sl.SAE, model: Any, stories: Stories, numbers: np.ndarray) -> tuple[Any, np.ndarray]:
    """Codes of the words of stories, and the number of each word's sentence."""
    tokens = stories.tokens()
    kept = tokens.attention_mask
    acts = sl.lm.capture(model, tokens.ids, [HOOK])[HOOK][kept]
    return encode_csr(sae, acts), numbers


def sensitivity(args: argparse.Namespace) -> str:
    acts, model = tales_activations(), sl.load_model("tales", progress=False)
    told = retell_stories(args.n_stories, seed=1)
    n = len(np.unique(told[0][1])) - 1
    sample = acts[:16_384].float()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for width in args.widths:
            cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=width, activation=sl.TopK(k=K))
            run = sl.TrainConfig(n_tokens=args.n_tokens // 4, batch_size=2048, seed=seed)
            sae = sl.SAE(cfg, seed).fit(acts, run, progress=False)
            for name, each in {"TopK": sae, "untrained": make_untrained(sae, sample, seed=seed)}.items():
                codes = [read_codes(each, model, *one) for one in told]
                found = sl.evaluation.score_sensitivity(*codes[0], *codes[1])
                figures = {"sensitivity": found.mean, "chance": found.mean_chance}
                collect(rows, f"{name}, {width}", figures | {"sides": float(len(found.sensitivity))})
    return f"{n:,} sentences\n{format_table(dict(sorted(rows.items())))}"


COMMANDS: dict[str, Callable[[Any], str]] = {
    "absorption": absorption,
    "edits": edits,
    "meta": meta,
    "sensitivity": sensitivity,
    "disentanglement": disentanglement,
    "choose_k": choose,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=COMMANDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=1_200_000, help="to train each dictionary on")
    parser.add_argument("--n-steps", type=int, default=300, help="of training a meta-SAE")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096], help="for sensitivity")
    parser.add_argument("--n-prompts", type=int, default=100, help="for disentanglement; chosen on twice as many")
    parser.add_argument("--kept", type=Path, help="for disentanglement: a folder of dictionaries, such as TopK-0")
    parser.add_argument("--n-stories", type=int, default=400, help="to measure on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(COMMANDS[args.benchmark](args))


if __name__ == "__main__":
    main()
