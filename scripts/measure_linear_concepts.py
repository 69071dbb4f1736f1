"""Linear concepts of `tales`: what exchanges answers, where effects pass, what is orthogonal, what is found blind.

    python scripts/measure_linear_concepts.py --out linear.json
    python scripts/measure_linear_concepts.py sentiment --text movieReviewSnippets_GroundTruth.txt --model FOLDER

`align`: distributed alignment search (arXiv:2303.02536, arXiv:2310.15154) at the last token of prompts of which the
mood or the gender decides the next word, beside random subspaces, means, a probe and principal components, by layer.

`positions`: the share of the effect of resampling the mood's direction that passes through punctuation, through the
word that told it and through the last token, beside as many random positions. Only prompts in which at least four
tokens lie between the word and the end.

`concepts`: cosines of directions of concepts by the causal inner product (arXiv:2311.03658) and the plain one, in
unembedding and embedding (arXiv:2403.03867), beside concepts of random pairs of words.

`contrasts`: contrast-consistent search (arXiv:2212.03827) on prompts with a word of either mood or gender behind
them, of which one goes on with what was told, and on true and false facts about towns; with a random word appended to
both halves of a pair (arXiv:2312.10029).

`sentiment`: sentences of film reviews with ratings of people, embedded by a Hugging Face encoder in FOLDER: held-out
AUROC of directions with and without labels, and contrast pairs of the sentence with either verdict. The sentences are
those in the source archive of the package vaderSentiment 3.3.2 (MIT license), hutto_ICWSM_2014.tar.gz:
`pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from objectives.embeddings import embed
from saelab.functional.statistics import auroc
from saelab.interventions.prompt_metrics import read_texts
from saelab.probing import align, compare_concepts, find_unsupervised_directions, fit_direction, score_contrasts
from saelab.stores.files import write_json
from saelab.stores.results import format_spread, format_table
from saelab.synthetic import lexicon as lex
from saelab.synthetic.tasks import Counterfactual, TaskName, counterfactuals
from saelab.synthetic.vocabulary import VOCABULARY

STAGES = ("align", "positions", "concepts", "contrasts")
WITHOUT_LABELS = ("pca", "kmeans")
VERDICTS = ("It was good.", "It was bad.")
N_RANDOM = 20


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument(
        "stages", nargs="*", default=list(STAGES), metavar="stage", help=", ".join([*STAGES, "sentiment"])
    )
    command.add_argument("--n-pairs", type=int, default=60)
    command.add_argument("--n-facts", type=int, default=150)
    command.add_argument(
        "--n-epochs", type=int, default=12, help="with --lr, as far as 64 epochs at 1e-3 and twice the pairs"
    )
    command.add_argument("--lr", type=float, default=1e-2)
    command.add_argument("--ranks", type=int, nargs="+", default=[1])
    command.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--text", type=Path, help="of the stage sentiment")
    command.add_argument("--model", type=Path, help="of the stage sentiment")
    command.add_argument("--n-sentences", type=int, default=1500)
    command.add_argument("--out", type=Path, default=Path("linear_concepts.json"))
    args = command.parse_args()
    torch.set_num_threads(1)
    stages = {
        "align": measure_alignment, "positions": measure_positions, "concepts": measure_concepts,
        "contrasts": measure_contrasts, "sentiment": measure_sentiment,
    }  # fmt: skip
    if unknown := set(args.stages) - set(stages):
        command.error(f"no such stage: {', '.join(sorted(unknown))}")
    found = {}
    for stage in args.stages:
        found[stage] = stages[stage](args)
        write_json(args.out, found)


def measure_alignment(args: argparse.Namespace) -> dict[str, Any]:
    model, found = sl.load_model("tales", progress=False), {}
    for task in ("mood", "gender"):
        pairs = counterfactuals(task, args.n_pairs, seed=7)
        for layer in args.layers:
            for rank in args.ranks:
                one = align(
                    model, pairs, f"blocks.{layer}.hook_resid_post", rank=rank, seeds=args.seeds,
                    n_epochs=args.n_epochs, lr=args.lr, progress=False,
                )  # fmt: skip
                print(f"\n{task}\n{one}", flush=True)
                found[f"{task}, layer {layer}, rank {rank}"] = one.to_dict()
    return found


def measure_positions(args: argparse.Namespace) -> dict[str, Any]:
    """With directions of the mood that other prompts' last tokens gave."""
    model, found = sl.load_model("tales", progress=False), {}
    fitted, pairs = counterfactuals("mood", args.n_pairs, seed=7), counterfactuals("mood", 4 * args.n_pairs, seed=8)
    pairs = [pair for pair in pairs if len(pair.prompt) - pair.differ_at[0] > 4][: args.n_pairs // 2]
    prompts = [prompt for pair in pairs for prompt in (pair.prompt, pair.other_prompt)]
    answers = torch.tensor([[pair.answer, pair.other_answer] for pair in pairs])
    own, other = answers.flatten(), answers.flip(1).flatten()
    texts = read_texts(model, prompts)
    marks = {name: torch.zeros_like(texts.ids, dtype=torch.bool) for name in ("the word", "the last token")}
    for i, length in enumerate(texts.lengths.tolist()):
        marks["the word"][i, pairs[i // 2].differ_at[0]] = True
        marks["the last token"][i, length - 1] = True
    punctuation = sl.interventions.mark_punctuation(model, texts.ids)
    after = (
        torch.arange(texts.ids.shape[1]) > torch.tensor([pair.differ_at[0] for pair in pairs for _ in (0, 1)])[:, None]
    )
    groups = {"punctuation after the word": punctuation & after & ~marks["the last token"], **marks}
    for layer in args.layers:
        point = f"blocks.{layer}.hook_resid_post"
        x, glad = read_last_tokens(model, fitted, point)
        one = sl.interventions.locate_effect(
            model,
            prompts,
            fit_direction(x, glad, point, name="mood, means"),
            (own, other),
            groups,
            n_random=9,
            seeds=args.seeds,
        )
        print(f"\n{one}", flush=True)
        found[f"layer {layer}"] = one.to_dict()
    return found


def read_last_tokens(model: Any, pairs: list[Counterfactual], point: str) -> tuple[Tensor, Tensor]:
    """Activations of the last tokens of prompts, and whether they are of the first mood."""
    prompts = [prompt.long() for pair in pairs for prompt in (pair.prompt, pair.other_prompt)]
    x = torch.stack([sl.lm.capture(model, ids[None], [point])[point][0, -1] for ids in prompts])
    return x, torch.tensor([pole == "glad" for pair in pairs for pole in pair.poles or ()])


def read_concepts() -> dict[str, list[tuple[str, str]]]:
    """Pairs of words of `tales` that differ in one concept."""
    concepts = {
        name: list(zip(*(words.split() for words in axis.words), strict=True)) for name, axis in lex.AXES.items()
    }
    glad, sad = lex.MOODS.values()
    concepts["mood"] = [pair for key in glad for pair in zip(glad[key].split(), sad[key].split(), strict=True)]
    concepts["gender"] = [(man, woman) for man, woman in lex.PARTNERS.items()] + [("he", "she"), ("boy", "girl")]
    concepts["young"] = list(lex.YOUNG.items())
    concepts["plural"] = [(word.removesuffix("s"), word) for word in lex.PLURALS]
    concepts["capital"] = [(word.lower(), word) for word in VOCABULARY if word[:1].isupper()]
    known = set(VOCABULARY)
    return {name: [pair for pair in pairs if known.issuperset(pair)] for name, pairs in concepts.items()}


def measure_concepts(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name in ("tales", "tales-b"):
        one = compare_concepts(sl.load_model(name, progress=False), read_concepts(), seed=args.seeds[0])
        print(f"\n{name}\n{one}", flush=True)
        found[name] = one.to_dict()
    return found


def measure_contrasts(args: argparse.Namespace) -> dict[str, Any]:
    model, found = sl.load_model("tales", progress=False), {}
    made = {task: make_poles(task, args.n_facts, seed=7) for task in ("mood", "gender")}
    for name, (statements, labels) in {**made, "facts": make_facts(args.n_facts, seed=7)}.items():
        for layer in args.layers:
            point = f"blocks.{layer}.hook_resid_post"
            one = find_unsupervised_directions(
                model, statements, labels, point, distractors=("spoon", "violin"), seeds=args.seeds
            )
            print(f"\n{name}\n{one}", flush=True)
            found[f"{name}, layer {layer}"] = one.to_dict()
    return found


def make_poles(task: TaskName, n: int, seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[bool]]:
    """A prompt with the word of either pole, always in the same order, and whether the first is its own pole."""
    rng, statements, labels = random.Random(seed), [], []
    for pair in counterfactuals(task, n, seed=seed):
        assert pair.poles is not None
        words = [one for _, one in sorted(zip(pair.poles, (pair.answer, pair.other_answer), strict=True))]
        prompt, pole = rng.choice([(pair.prompt, pair.poles[0]), (pair.other_prompt, pair.poles[1])])
        first, second = (torch.cat([prompt, torch.tensor([word])]) for word in words)
        statements.append((first, second))
        labels.append(pole == min(pair.poles))
    return statements, labels


def make_facts(n: int, seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[bool]]:
    """A prompt with its true and with the other town's word, in random order, and whether the first is true."""
    rng, statements, labels = random.Random(seed), [], []
    for pair in counterfactuals("facts", n, seed=seed):
        halves = [torch.cat([pair.prompt, torch.tensor([one])]) for one in (pair.answer, pair.other_answer)]
        labels.append(rng.random() < 0.5)
        statements.append((halves[0], halves[1]) if labels[-1] else (halves[1], halves[0]))
    return statements, labels


@torch.no_grad()
def measure_sentiment(args: argparse.Namespace) -> dict[str, Any]:
    texts, good = read_reviews(args.text, args.n_sentences)
    x = read_embeddings(args, texts)
    print(f"{len(texts):,} sentences, {good.float().mean():.1%} good, width {x.shape[1]}")
    table: dict[str, list[float]] = {}
    for seed in args.seeds:
        held = torch.from_numpy(np.random.default_rng(seed).random(len(texts)) < 0.3)
        random_ones = torch.randn(N_RANDOM, x.shape[1], generator=torch.Generator().manual_seed(seed))
        table.setdefault("random", []).extend(rank(x[held] @ one, good[held]) for one in random_ones)
        for method in (*WITHOUT_LABELS, "means", "probe"):
            direction = fit_direction(x[~held], good[~held], "embedding", method, seed=seed)
            table.setdefault(method, []).append(rank(x[held] @ direction.vector, good[held]))
    rows = [
        [name, "without labels" if name in WITHOUT_LABELS else "", format_spread(row)] for name, row in table.items()
    ]
    print("\n".join(format_table([["held-out AUROC, either sign", "", ""], *rows], left=(0, 1))), flush=True)
    return {"auroc": table, "contrasts": contrast_reviews(args, texts, good)}


def read_embeddings(args: argparse.Namespace, texts: list[str]) -> Tensor:
    return torch.from_numpy(embed(texts, [0] * len(texts), args.model)["embeddings"])


def contrast_reviews(args: argparse.Namespace, texts: list[str], good: Tensor) -> dict[str, Any]:
    """Each sentence with either verdict, in random order, and again with a random word behind both."""
    first = torch.rand(len(texts), generator=torch.Generator().manual_seed(7)) < 0.5
    halves = [
        [f"{text} {VERDICTS[int(said == bool(is_first))]}" for said in (True, False)]
        for text, is_first in zip(texts, ~first, strict=True)
    ]
    label = good == first  # whether the first half's verdict is right

    def read(words: list[str]) -> Tensor:
        lines = [f"{half}{word}" for pair, word in zip(halves, words, strict=True) for half in pair]
        return read_embeddings(args, lines).view(len(texts), 2, -1)

    drawn = [torch.rand(len(texts), generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in args.seeds]
    distracted = [read([" Banana." if one else " Shed." for one in which]) for which in drawn]
    found = score_contrasts(
        read([""] * len(texts)), label, "embedding", distracted=distracted, drawn=drawn, seeds=args.seeds
    )
    print(f"\n{found}", flush=True)
    return found.to_dict()


def read_reviews(path: Path, n: int) -> tuple[list[str], Tensor]:
    """Sentences of 5 to 40 words rated 1 or more, or -1 or less, in the mean; as many of each kind, by a fixed draw."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 1 and 5 <= len(text.split()) <= 40:
            kinds[float(rating) > 0].append(text.strip())
    rng = random.Random(0)
    chosen = [(text, kind) for kind, found in kinds.items() for text in rng.sample(found, min(n // 2, len(found)))]
    rng.shuffle(chosen)
    return [text for text, _ in chosen], torch.tensor([kind for _, kind in chosen])


def rank(scores: Tensor, y: Tensor) -> float:
    """AUROC of either sign."""
    found = auroc(scores.numpy(), y.numpy())
    return max(found, 1 - found)


if __name__ == "__main__":
    main()
