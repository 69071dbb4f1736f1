"""What of one model can be used in another? Probes, directions, SAE features and the head of `tales`, carried.

    python scripts/measure_stitching.py runs/stitching
    python scripts/measure_stitching.py runs/stitching --other FOLDER --hook-point blocks.2.hook_resid_post

The models read the same stories; where the other has another tokenizer, tokens are paired where they end at the same
character. Parts are kept in the folder, one file of each, and not measured again:

    probes      AUROC of probes of concepts, and of directions between their means, by way of use (`stitch_probes`)
    saes        a TopK SAE of `tales` carried: FVU, and agreement of its features with themselves at home (`stitch_sae`)
    heads       next tokens predicted by the other's head from activations of `tales`; not with another tokenizer
    steering    log of the probability of a class of words (13 root concepts) when the other model is steered by a
                direction carried from `tales`, its own, or a random one, each as long as its own; one vocabulary
    maps        held-out pairs: R^2, rank and top-1 of maps of 100 to 3,000 pairs, and of relative representations
    spaces      SVCCA, CKA, RSA and other measures beside pairings shuffled in blocks, and of an untrained copy
    layers      SVCCA, CKA and RSA of every two blocks, of the first seed

Every seed is another choice of stories, pairs, anchors and SAEs; the two models are the same.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from measure_dissection import MIN_COUNT
from objectives.shared import FIRST_STORY, HOOK
from saelab.lm.token_labels import TokenLabels
from saelab.stores.files import write_json
from saelab.synthetic.tales import Stories, generate_stories
from saelab.universality import (
    AlignedActivations,
    Anchors,
    align_activations,
    compare_spaces,
    fit_map,
    score_pairs,
    stitch_heads,
    stitch_probes,
    stitch_sae,
)

KINDS = ("root", "class", "pole", "one-sided", "state", "topic", "register", "role", "relation")
CHANNELS = ("cosine", "euclidean", "l1", "linf", "product")
MEASURES = ("svcca", "svcca_one", "linear_cka", "rsa", "procrustes", "relative_agreement", "neighbor_overlap")
D_SAE, K = 512, 16
N_COMPARED = 4000
PARTS = ("probes", "saes", "heads", "steering", "maps", "spaces", "layers")


class Pair:
    """`tales` and the other model, on the same stories."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.models = sl.load_model("tales", progress=False), sl.load_model(args.other, progress=False)
        self.hooks = HOOK, args.hook_point
        self.same_tokens = args.other == "tales-b"

    def stories(self, seed: int) -> Stories:
        return generate_stories(self.args.n_stories, first=FIRST_STORY + 12_000_000 + seed * 10_000)

    def tokens(self, stories: Stories, model: Any) -> sl.Tokens:
        """The stories in the tokens of one of the models."""
        tokens = stories.tokens()
        if self.same_tokens or model is self.models[0]:
            return tokens
        kept = tokens.attention_mask & (tokens.ids >= 4)  # words, not the ends
        decode = self.models[0].tokenizer.decode
        texts = [decode(ids[here].tolist()) for ids, here in zip(tokens.ids, kept, strict=True)]
        return sl.tokenize(model, texts, ctx_len=512, packed=False)

    def align(self, stories: Stories, hooks: tuple[str, str] | None = None, other: Any = None) -> AlignedActivations:
        models = (self.models[0], other or self.models[1])
        acts = [
            sl.collect(model, self.tokens(stories, model), hook, progress=False)
            for model, hook in zip(models, hooks or self.hooks, strict=True)
        ]
        return align_activations(*acts, models)

    def sae(self, which: int, seed: int) -> sl.SAE:
        """A TopK SAE of one of the models, trained once."""
        place = self.args.out / f"sae-{('tales', Path(self.args.other).name)[which]}-{self.hooks[which]}-{seed}"
        if not place.is_dir():
            model, n = self.models[which], self.args.n_tokens
            stories = generate_stories(n // 150, first=FIRST_STORY + seed * 100_000)
            acts = sl.collect(model, self.tokens(stories, model), self.hooks[which], progress=False)
            run = sl.TrainConfig(n_tokens=n, batch_size=512, seed=seed)
            cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
            sl.SAE(cfg, seed).fit(acts, run, progress=False).save_pretrained(place)
        return sl.SAE.from_pretrained(place)

    def untrained(self, seed: int) -> Any:
        """A copy of the other model with random weights."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        source = self.args.other
        if self.same_tokens:
            source = Path(sl.__file__).parent / "synthetic" / "models" / source
        place = self.args.out / f"untrained-{Path(source).name}-{seed}"
        if not place.is_dir():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).float().save_pretrained(place)
            AutoTokenizer.from_pretrained(source).save_pretrained(place)
        return sl.load_model(str(place), progress=False)


def choose_concepts(pair: Pair, aligned: AlignedActivations, stories: Stories, names: list[str] | None) -> TokenLabels:
    """Labels of the paired rows: some concepts of all kinds but single words, of those that are frequent."""
    assert aligned.a.doc_ids is not None and aligned.a.positions is not None
    labels = stories.labels_at(aligned.a.doc_ids.long(), aligned.a.positions.long())
    if names is None:
        frequent = labels.matrix.astype(np.int64).sum(0).A1 >= 4 * MIN_COUNT
        chosen = [one.name for one, there in zip(labels.concepts, frequent, strict=True) if there and one.kind in KINDS]
        names = sorted(np.random.default_rng(0).permutation(chosen)[: pair.args.n_concepts].tolist())
    columns = [labels.names.index(name) for name in names]
    return TokenLabels.of(labels.matrix[:, columns], names)


def measure_probes(pair: Pair) -> dict[str, Any]:
    names: list[str] | None = None
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        stories = pair.stories(seed)
        aligned = pair.align(stories)
        labels = choose_concepts(pair, aligned, stories, names)
        names = list(labels.names)
        for n in pair.args.n_pairs:
            for readout in ("probes", "directions"):
                channels = CHANNELS if readout == "probes" else CHANNELS[:1]
                table = stitch_probes(
                    aligned.a, aligned.b, labels, readout=readout, n_pairs=n, channels=channels, seeds=(seed,)
                )
                print(f"\n{table}", flush=True)
                rows = found.setdefault(f"{readout}, {n} pairs", {})
                for name in table.figures:
                    rows.setdefault(name, []).append(table.mean(name))
    return {"concepts": names, "figures": found}


def measure_saes(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        aligned = pair.align(pair.stories(seed))
        for n in pair.args.n_pairs:
            table = stitch_sae(pair.sae(0, seed), aligned.a, aligned.b, pair.sae(1, seed), n_pairs=n, seeds=(seed,))
            print(f"\n{table}", flush=True)
            add(found.setdefault(f"{n} pairs", {}), table.figures)
    return {"figures": found}


def measure_heads(pair: Pair) -> dict[str, Any]:
    if not pair.same_tokens:
        return {"figures": {}, "reason": "the models have different vocabularies"}
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        tokens = pair.stories(seed).tokens()
        for n in pair.args.n_pairs:
            table = stitch_heads(*pair.models, tokens, n_pairs=n, seeds=(seed,))
            print(f"\n{table}", flush=True)
            add(found.setdefault(f"{n} pairs", {}), table.figures)
    return {"figures": found}


def add(found: dict[str, Any], figures: dict[str, dict[str, tuple[float, ...]]]) -> None:
    """Figures of one more seed."""
    for row, columns in figures.items():
        for column, values in columns.items():
            found.setdefault(row, {}).setdefault(column, []).extend(values)


def measure_steering(pair: Pair) -> dict[str, Any]:
    if not pair.same_tokens:
        return {"figures": {}, "reason": "the models have different vocabularies"}
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        stories = pair.stories(seed)
        tokens, words = stories.tokens(), words_of_classes(stories)
        acts = [
            torch.cat([sl.lm.capture(model, ids, [hook])[hook] for ids in tokens.ids.split(40)])
            for model, hook in zip(pair.models, pair.hooks, strict=True)
        ]
        half = len(tokens) // 2
        predicts, documents = tokens.predicts[:half], tokens.doc_ids[:half]
        follows = tokens.ids[:half].roll(-1, 1)[predicts]
        x, y = (side[:half][predicts].float() for side in acts)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        for n in pair.args.n_pairs:
            chosen, of = rows[:n], documents[predicts][rows[:n]].numpy()
            maps = {
                f"{m} map": fit_map(x[chosen], y[chosen], m, doc_ids=of) for m in ("linear", "orthogonal", "anchors")
            }
            maps["linear map, shuffled pairs"] = fit_map(x[chosen], y[chosen.flip(0)], doc_ids=of)
            for name, ids in words.items():
                marks = torch.isin(follows, ids)
                mine, own = (side[marks].mean(0) - side[~marks].mean(0) for side in (x, y))
                steps = {"own": own, "random": torch.randn(len(own), generator=torch.Generator().manual_seed(seed))}
                steps |= {title: mine @ one.W for title, one in maps.items()}
                before = log_share(pair, tokens[half : half + 30], ids, None)
                for title, step in steps.items():
                    after = log_share(pair, tokens[half : half + 30], ids, step * own.norm() / step.norm())
                    kept = found.setdefault(f"{n} pairs", {}).setdefault(title, {})
                    kept.setdefault(name, []).append(after - before)
        for n, table in found.items():
            means = {title: round(float(np.mean([v[-1] for v in one.values()])), 3) for title, one in table.items()}
            print(seed, n, means, flush=True)
    return {"figures": found}


def words_of_classes(stories: Stories) -> dict[str, torch.Tensor]:
    """Ids of the words of each root concept: those of which most occurrences are labeled."""
    labels, ids = stories.labels, torch.from_numpy(np.asarray(stories.token_ids)).long()
    n = torch.bincount(ids)
    found = {}
    for one in labels.concepts:
        if one.kind == "root":
            rate = torch.bincount(ids[labels[one.name]], minlength=len(n)) / n.clamp(min=1)
            found[one.name] = (rate > 0.5).nonzero()[:, 0]
    return found


def log_share(pair: Pair, tokens: sl.Tokens, ids: torch.Tensor, step: torch.Tensor | None) -> float:
    """Mean log of the probability that the next token is one of some words, where it is another."""
    edits = {} if step is None else {pair.hooks[1]: lambda x: x + step.to(x)}
    with sl.splice(pair.models[1], edits):
        shares = sl.lm.logits(pair.models[1], tokens.ids).float().softmax(-1)[..., ids].sum(-1)
    others = tokens.predicts & ~torch.isin(tokens.ids.roll(-1, 1), ids)
    return float(shares[others].clamp(min=1e-12).log().mean())


def measure_maps(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        aligned = pair.align(pair.stories(seed))
        documents = aligned.a.doc_ids
        assert documents is not None
        learn = (documents < pair.args.n_stories // 2).nonzero()[:, 0]
        test = slice(int(learn[-1]) + 1, int(learn[-1]) + 5001)
        order = learn[torch.randperm(len(learn), generator=torch.Generator().manual_seed(seed))]
        held = aligned.a[test], aligned.b[test]
        for n in (100, 300, 1000, 3000):
            rows = order[:n].sort().values
            x, y, of = aligned.a[rows], aligned.b[rows], documents[rows].numpy()
            options = {"linear": {}, "no ridge": {"ridge": 0.0}, "orthogonal": {"method": "orthogonal"},
                       "anchors": {"method": "anchors"}, "linear, rank 16": {"rank": 16}}  # fmt: skip
            scores = {name: fit_map(x, y, doc_ids=of, **how).score(*held, doc_ids=documents[test], n_shuffles=20)
                      for name, how in options.items()}  # fmt: skip
            relative = [Anchors(side).relate(other) for side, other in ((x, held[0]), (y, held[1]))]
            scores["relative"] = score_pairs(*relative, doc_ids=documents[test], n_shuffles=20)
            for name, one in scores.items():
                for measure, score in one.scores.items():
                    kept = found.setdefault(f"{n} pairs", {}).setdefault(name, {})
                    kept.setdefault(measure, []).append(score.value)
                    kept.setdefault(f"{measure}, chance", []).append(score.chance)
    return {"figures": found}


def measure_spaces(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed in pair.args.seeds:
        stories = pair.stories(seed)
        for name, other in (("trained", None), ("untrained", pair.untrained(seed))):
            scores = compare(pair.align(stories, other=other), MEASURES, 100, seed)
            print(f"\nseed {seed}, {name}\n{scores}", flush=True)
            for measure, one in scores.scores.items():
                kept = found.setdefault(name, {}).setdefault(measure, {})
                for key in ("value", "chance", "chance_95", "p"):
                    kept.setdefault(key, []).append(getattr(one, key))
    return {"figures": found, "n_pairs": N_COMPARED, "n_shuffles": 100}


def compare(aligned: AlignedActivations, measures: tuple[str, ...], n_shuffles: int, seed: int) -> Any:
    n = N_COMPARED
    x, y = (side[:n].double().numpy() for side in (aligned.a, aligned.b))
    assert aligned.a.doc_ids is not None
    return compare_spaces(
        x, y, doc_ids=aligned.a.doc_ids[:n].numpy(), measures=measures, n_shuffles=n_shuffles, seed=seed, progress=False
    )


def measure_layers(pair: Pair) -> dict[str, Any]:
    seed, found = pair.args.seeds[0], {}
    stories = pair.stories(seed)
    for i in range(pair.models[0].cfg.n_layers):
        for j in range(pair.models[1].cfg.n_layers):
            hooks = (f"blocks.{i}.hook_resid_post", f"blocks.{j}.hook_resid_post")
            scores = compare(pair.align(stories, hooks), ("svcca", "linear_cka", "rsa"), 20, seed).scores
            found[f"{i}, {j}"] = {name: [one.value, one.chance] for name, one in scores.items()}
            print(f"blocks {i}, {j}: {found[f'{i}, {j}']}", flush=True)
    return {"figures": found, "n_shuffles": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of SAEs and figures")
    parser.add_argument("--other", default="tales-b", help="the other model: tales-b, or a folder")
    parser.add_argument("--hook-point", default="blocks.3.hook_resid_post", help="of the other model")
    parser.add_argument("--n-stories", type=int, default=240, help="half to learn from, half to measure on")
    parser.add_argument("--n-pairs", type=int, nargs="+", default=[300, 2000])
    parser.add_argument("--n-concepts", type=int, default=20)
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    setting = {name: value for name, value in vars(args).items() if name not in ("out", "parts")}
    pair = Pair(args)
    for part in args.parts:
        place = args.out / f"{part}-{Path(args.other).name}.json"
        if place.is_file():
            print(f"{place}: {json.dumps(json.loads(place.read_text())['figures'])[:2000]}")
            continue
        figures = globals()[f"measure_{part}"](pair)
        write_json(place, {"setting": setting | {"other": Path(args.other).name}, **figures})


if __name__ == "__main__":
    main()
