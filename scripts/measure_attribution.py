"""Are attributions right? Estimates against exact ablation, completeness, and what patches restore.

    python scripts/measure_attribution.py tales --saes FOLDER FOLDER ...
    python scripts/measure_attribution.py PATH/TO/stories260k --text PATH/TO/tinystories.txt --saes FOLDER

For each dictionary, and one of its shape at step 0 of training, on prompts that training never saw: the effect of every
active feature at every token on the log-probability of the next token, or on the prompt's own loss.

    pearson, spearman   of the gradient's estimates with exact effects, mean over prompts and its standard deviation
    shuffled            the same rank correlation where estimates meet other features of their token
    top 10              share of the ten largest exact effects that are among the ten largest estimates
    by size             rank correlation of |estimate| with |exact|; moved: of the norm that the code has, with |exact|
    IG                  the same two correlations of integrated gradients, which are about all codes at once
    gradient, IG: worst sum of effects, errors included, over what replacing everything does: the gradient's median, and
                        the largest distance from 1 of integrated gradients; points: those took on average
    features            the features' share of that sum, by integrated gradients; the rest is the errors'

On saelab's own stories, then: pairs of prompts that differ in one draw ("names", "facts") patched layer by layer, whole
and feature by feature, and the direction of moods resampled, compared with random ones.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import saelab as sl
from saelab.interventions.attribution import Attribution, attribute
from saelab.interventions.patching import patch
from saelab.interventions.resampling import resample_ablation
from saelab.lm.model_checks import Model
from saelab.probing.linear_directions import fit_direction
from saelab.sae.initialization import prepare
from saelab.synthetic.lexicon import MOODS
from saelab.synthetic.tales import Stories, generate_stories
from saelab.synthetic.tasks import Counterfactual, TaskName, counterfactuals
from saelab.synthetic.vocabulary import VOCABULARY

FIRST = 90_000_000  # number of the first story: neither model nor dictionary has seen any from here on
HOOK = "blocks.2.hook_resid_post"
MOOD_WORDS = {name: [w for kind in kinds.values() for w in kind.split()] for name, kinds in MOODS.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of tales, a Hub id or a folder")
    parser.add_argument("--text", type=Path, help="default: stories generated for the models of tales")
    parser.add_argument("--saes", nargs="+", help="folders; default: AbsTopK and TopK, trained now")
    parser.add_argument("--n-prompts", type=int, default=24)
    parser.add_argument("--length", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--n-pairs", type=int, default=60, help="of prompts to patch")
    parser.add_argument("--n-tokens", type=int, default=1_000_000, help="to train on, where dictionaries are trained")
    return parser.parse_args()


def read_prompts(model: Model, args: argparse.Namespace) -> list[tuple[torch.Tensor, int]]:
    """Beginnings of the last documents and the token behind each."""
    if args.text is None:
        tokens = generate_stories(args.n_prompts, first=FIRST).tokens()
    else:
        tokens = sl.tokenize(model, args.text, args.length + 1, packed=False)[-3 * args.n_prompts :]
    whole = (tokens.attention_mask.sum(1) > args.length).nonzero()[:, 0].tolist()[: args.n_prompts]
    return [(tokens.ids[i, : args.length].long(), int(tokens.ids[i, args.length])) for i in whole]


def read_saes(model: Model, args: argparse.Namespace) -> dict[str, sl.SAE]:
    if args.saes:
        return {Path(folder).name: sl.SAE.from_pretrained(folder) for folder in args.saes}
    if args.text is None:
        tokens = generate_stories(args.n_tokens // 450, first=FIRST - 10_000_000).tokens()
    else:
        tokens = sl.tokenize(model, args.text, n_tokens=args.n_tokens // 3)
    acts = sl.collect(model, tokens, HOOK, progress=False)
    kinds = {"AbsTopK": sl.AbsTopK(k=16), "TopK": sl.TopK(k=16)}
    saes = [sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=1024, activation=kind)) for kind in kinds.values()]
    sl.fit(saes, acts, sl.TrainConfig(n_tokens=args.n_tokens), progress=False)
    return dict(zip(kinds, saes, strict=True))


def kinds_of(saes: dict[str, sl.SAE], model: Model, prompts: list) -> Iterator[tuple[str, list[sl.SAE]]]:
    """Dictionaries of one shape together, named by what stands before the first -, and one at step 0 for each shape."""
    ids = torch.stack([ids for ids, _ in prompts])
    for cfg in dict.fromkeys(sae.cfg for sae in saes.values()):
        alike = {name: sae for name, sae in saes.items() if sae.cfg == cfg}
        origin = next(iter(alike.values())).provenance
        yield f"{next(iter(alike)).split('-')[0]} ({len(alike)})", list(alike.values())
        x = sl.lm.capture(model, ids, [origin.hook_point])[origin.hook_point][:, 1:].flatten(0, 1)
        bare = prepare(cfg, x, seed=1)
        bare.provenance = origin
        yield "  untrained", [bare]


COLUMNS = (
    f"{'':<22}{'pearson':>14}{'spearman':>14}{'shuffled':>9}{'top 10':>7}{'by size':>8}{'moved':>7}"
    f"{'IG: pe.':>9}{'sp.':>6}{'gradient':>10}{'IG: worst':>10}{'points':>7}{'features':>9}{'effects':>9}"
)


def hold(name: str, model: Model, saes: list[sl.SAE], prompts: list, by: str) -> str:
    """A row of the table: prompts by dictionaries."""
    pairs = []
    for sae, (ids, behind) in tqdm(list(product(saes, prompts)), desc=name.strip(), leave=False):
        metric = behind if by == "next token" else "loss"
        estimate = attribute(model, sae, ids, metric, check=True, progress=False)
        path = attribute(model, sae, ids, metric, method="integrated")
        pairs.append((estimate, replace(path, exact=estimate.exact)))
    return f"{name:<22}" + format_row(pairs)


def format_row(pairs: list[tuple[Attribution, Attribution]]) -> str:
    def mean(of: int, field: str) -> tuple[float, float]:
        values = [getattr(pair[of].agreement, field) for pair in pairs]
        return float(np.nanmean(values)), float(np.nanstd(values))

    steps = np.mean([path.n_steps for _, path in pairs])
    worst = max(abs(path.completeness - 1) for _, path in pairs)
    bent = float(np.median([estimate.completeness for estimate, _ in pairs]))
    own = sum(path.effects.sum() for _, path in pairs) / sum(path.patched - path.clean for _, path in pairs)
    spread = "".join(f"{m:>7.3f} ({s:.3f})" for m, s in (mean(0, "pearson"), mean(0, "spearman")))
    columns = (("shuffled", 9), ("top", 7), ("size_estimate", 8), ("size", 7))
    rest = "".join(f"{mean(0, field)[0]:>{n}.3f}" for field, n in columns)
    path = f"{mean(1, 'pearson')[0]:>9.2f}{mean(1, 'spearman')[0]:>6.2f}{bent:>10.2f}{worst:>10.4f}{steps:>7.0f}"
    return f"{spread}{rest}{path}{own:>9.2f}{sum(len(a.effects) for a, _ in pairs):>9,}"


def patch_layers(model: Model, task: TaskName, n: int) -> list[Counterfactual]:
    """Scores of the residual stream, mean over pairs that the model gets right both ways; these pairs."""
    layers = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    pairs = [pair for pair in counterfactuals(task, n, seed=2) if is_right(model, pair)]
    scores = [patch_pair(model, pair, layers, roles(pair)) for pair in pairs]
    print(f"\n{task}: {len(pairs)} of {n} pairs right both ways; share of the logit difference that a patch restores")
    print(f"  {'':<28}{'where they differ':>18}{'between':>9}{'last':>7}{'all':>7}")
    for layer, row in zip(layers, np.mean(scores, 0), strict=True):
        print(f"  {layer:<28}{row[0]:>18.3f}{row[1]:>9.3f}{row[2]:>7.3f}{row[3]:>7.3f}")
    return pairs


def roles(pair: Counterfactual) -> list[list[int]]:
    last, first = len(pair.prompt) - 1, min(pair.differ_at)
    between = [i for i in range(first, last) if i not in pair.differ_at]
    return [list(pair.differ_at), between, [last], list(range(last + 1))]


def is_right(model: Model, pair: Counterfactual) -> bool:
    ends = [(pair.prompt, pair.answer), (pair.other_prompt, pair.other_answer)]
    return all(int(sl.lm.logits(model, ids[None])[0, -1].argmax()) == answer for ids, answer in ends)


def patch_pair(model: Model, pair: Counterfactual, sources: list, positions: Any) -> np.ndarray:
    metric = (pair.answer, pair.other_answer)
    return patch(
        model, pair.prompt.long(), pair.other_prompt.long(), metric, sources=sources, positions=positions
    ).scores


def patch_features(model: Model, saes: list[sl.SAE], pairs: list[Counterfactual]) -> str:
    """All features, those with the largest attributions, and as many others that differ: mean scores."""
    generator, scores = np.random.default_rng(0), []
    for sae, pair in product(saes, pairs):
        found = attribute(
            model, sae, pair.other_prompt.long(), (pair.answer, pair.other_answer), counterfactual=pair.prompt.long()
        )
        ranked = list(found.by_feature)
        others = generator.permutation(ranked[16:])
        chosen = [ranked[:1], ranked[:4], ranked[:16], others[:4].tolist(), others[:16].tolist()]
        sources = [sae.provenance.hook_point, sae, *((sae, [int(i) for i in some]) for some in chosen)]
        scores.append(patch_pair(model, pair, sources, "all")[:, 0])
    return "".join(f"{value:>9.3f}" for value in np.mean(scores, 0))


def resample_moods(model: Model, n_stories: int) -> None:
    """The direction between moods, at words of a mood that has been shown before."""
    train, test = (
        generate_stories(n_stories, first=FIRST + 1_000_000),
        generate_stories(n_stories // 3, first=FIRST + 2_000_000),
    )
    prompts, targets = mood_prompts(test)
    print(f"\nlog p of {len(prompts)} mood words whose mood was shown before, with a direction resampled everywhere")
    points = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    directions = []
    for point, acts in sl.collect(model, train.tokens(), points, progress=False).items():
        held = train.labels_at(acts.doc_ids, acts.positions)
        either = held["glad"] | held["sad"]
        labels = held["glad"][either]
        directions.append(fit_direction(acts[:][either], labels, point, name="glad - sad"))
    print(resample_ablation(model, prompts, directions, targets, n_random=8))


def mood_prompts(stories: Stories) -> tuple[list[torch.Tensor], torch.Tensor]:
    words = {VOCABULARY.index(word) for listed in MOOD_WORDS.values() for word in listed}
    column = (stories.labels["glad"] | stories.labels["sad"]).numpy()
    found = []
    for start, stop in zip(stories.offsets[:-1], stories.offsets[1:], strict=True):
        ids = torch.from_numpy(stories.token_ids[start:stop]).long()
        found += [(ids[:i], int(ids[i])) for i in range(2, len(ids)) if int(ids[i]) in words and column[start + i - 1]]
    return [ids for ids, _ in found], torch.tensor([target for _, target in found])


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    model = sl.load_model(args.model, progress=False)
    prompts, saes = read_prompts(model, args), read_saes(model, args)
    for by in ("next token", "loss"):
        print(f"{args.model}, {by}: {len(prompts)} prompts of {args.length} tokens, codes and errors set to zero")
        print(COLUMNS)
        for name, alike in kinds_of(saes, model, prompts):
            print(hold(name, model, alike, prompts, by), flush=True)
    if args.text is None:
        tasks: tuple[TaskName, ...] = ("names", "facts")
        pairs = {task: patch_layers(model, task, args.n_pairs) for task in tasks}
        header = "".join(f"{name:>9}" for name in ("whole", "all", "top 1", "top 4", "top 16", "other 4", "other 16"))
        print(f"\nfeatures patched at all positions, by attribution on the pair\n  {'':<29}{header}")
        for task in tasks:
            for name, alike in kinds_of(saes, model, prompts):
                print(f"  {task:<7}{name:<22}" + patch_features(model, alike, pairs[task]), flush=True)
        resample_moods(model, 300)


if __name__ == "__main__":
    main()
