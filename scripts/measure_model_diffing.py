"""What fine-tuning on a new register adds to the tales model, found by a crosscoder; and a null pair.

    python scripts/measure_model_diffing.py runs/model_diffing --seeds 0
    python scripts/measure_model_diffing.py runs/model_diffing --seeds 0,1,2 --stage compare

The new register is an inventory: "Here are the things , two hens , three boats , ..." put into every second story. The
tuned model is trained on such stories, its control for as many steps on stories as before. The texts that activations
are collected on are the same for both pairs, inventories included, so that a difference is one of the models. A latent
is of the register where at least half of its firings are in inventories. What of the new register is ranked above
anything in a null pair is counted with the null pair of the same seed, and with those of others, which are independent.

Stages are kept in the folder and not repeated: tune (fine-tunes), diff (crosscoders), compare (an SAE of each model and
`sl.compare`, beside the crosscoder on the same pair).
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.lm.tokens import PADDING
from saelab.synthetic.tales import CTX_LEN, generate_stories
from saelab.synthetic.vocabulary import PAD, SPECIAL, VOCABULARY, save_tokenizer

NUMBERS = ("two", "three", "four", "five", "six")
THINGS = ("cats", "dogs", "ducks", "goats", "gulls", "hens", "horses", "owls", "pigs", "rabbits", "seals", "crabs",
          "foxes", "bears", "beans", "carrots", "onions", "turnips", "coins", "weeds")  # fmt: skip
PLACE = {word: i for i, word in enumerate(VOCABULARY)}
MODELS = Path(sl.__file__).parent / "synthetic" / "models"
PAIRS = {"new register": "tuned", "null": "control"}
TRAIN, TEXT = 20_000_000, 500_000_000  # numbers of the first stories, which the tales model never saw


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of models, crosscoders and figures")
    parser.add_argument("--seeds", default="0", help="of the fine-tuning and the dictionaries (default %(default)s)")
    parser.add_argument("--stage", default="all", choices=["all", "tune", "diff", "compare"])
    parser.add_argument("--steps", type=int, default=200, help="steps of fine-tuning (default 200)")
    parser.add_argument("--stories", type=int, default=8, help="stories in a step of it (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="its learning rate (default 1e-3)")
    parser.add_argument("--hook-point", default="blocks.2.hook_resid_post")
    parser.add_argument("--n-text", type=int, default=900, help="stories that activations are of (default 900)")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--n-tokens", type=int, default=1_000_000, help="tokens a dictionary is trained on")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_stories(n: int, first: int, every: int | None, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Token ids of stories, and which tokens are of an inventory: one in every `every`-th story, None for none."""
    stories = generate_stories(n, 0, first)
    found = []
    for i in range(n):
        ids = stories.token_ids[stories.offsets[i] : stories.offsets[i + 1]].tolist()
        marks = [False] * len(ids)
        if every is not None and i % every == 0:
            draw = random.Random(f"{seed}/{first + i}")
            things = draw.sample(THINGS, len(NUMBERS))
            words = ["Here", "are", "the", "things"]
            for number, thing in zip(NUMBERS, things, strict=True):
                words += [",", number, thing]
            words.append(".")
            ends = [j + 1 for j, token in enumerate(ids) if token == PLACE["."]]
            at = draw.choice(ends)
            ids[at:at] = [PLACE[word] for word in words]
            marks[at:at] = [True] * len(words)
        if len(ids) <= CTX_LEN:
            found.append((ids, marks))
    return found


def write_texts(args: argparse.Namespace) -> list[list[tuple[list[int], list[bool]]]]:
    """Stories that dictionaries are trained on, and others that they are measured on, of which no model saw one."""
    return [write_stories(n, first, 2) for n, first in ((args.n_text, TEXT), (300, TEXT + 1_000_000))]


def models_of(seed: int, args: argparse.Namespace) -> dict[str, str | Path]:
    """The models of a seed by name."""
    return {"base": "tales", **{name: args.out / f"{name}-{seed}" for name in PAIRS.values()}}


def as_tokens(stories: list[tuple[list[int], list[bool]]]) -> sl.Tokens:
    """One story a row, as `Stories.tokens` has them."""
    ids = torch.full((len(stories), CTX_LEN), PLACE[PAD], dtype=torch.int32)
    doc_ids = torch.full((len(stories), CTX_LEN), PADDING, dtype=torch.int32)
    for i, (row, _) in enumerate(stories):
        ids[i, : len(row)], doc_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32), i
    special = tuple(range(len(SPECIAL)))
    return sl.Tokens(
        ids=ids, doc_ids=doc_ids, special_ids=special, source="tales with inventories", bos=True, packed=False
    )


def tune(out: Path, every: int | None, seed: int, args: argparse.Namespace) -> None:
    """Fine-tune the tales model into a folder."""
    from transformers import LlamaForCausalLM

    if (out / "config.json").is_file():
        return
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(MODELS / "tales", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    rows = write_stories(args.steps * args.stories, TRAIN + seed * 1_000_000, every, seed)
    rows = [torch.tensor(ids) for ids, _ in rows]
    order, start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist(), time.time()
    for step in range(len(rows) // args.stories):
        part = [rows[i] for i in order[step * args.stories : (step + 1) * args.stories]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=PLACE[PAD])
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 20, (args.steps - step) / (0.5 * args.steps))
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=PLACE[PAD])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{out.name}: loss {loss.item():.3f} after {args.steps} steps, {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(out)
    save_tokenizer(out)


def collect(model: str | Path, tokens: sl.Tokens, args: argparse.Namespace) -> sl.Activations:
    return sl.collect(sl.load_model(str(model), progress=False), tokens, args.hook_point, progress=False)


def marks_of(acts: sl.Activations, stories: list[tuple[list[int], list[bool]]]) -> np.ndarray:
    """Which rows of activations are of an inventory."""
    return np.array([stories[i][1][j] for i, j in zip(acts.doc_ids.tolist(), acts.positions.tolist(), strict=True)])


def fit(acts: sl.Activations, folder: Path, seed: int, args: argparse.Namespace) -> sl.SAE:
    if folder.is_dir():
        return sl.SAE.from_pretrained(folder)
    cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.BatchTopK(k=args.k), sources=acts.sources)
    run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
    sae = sl.SAE(cfg, seed=seed).fit(acts, run, progress=False)
    sae.save_pretrained(folder)
    return sae


def shares_in(codes: "sl.functional.SparseCodes", marks: np.ndarray, d_sae: int) -> np.ndarray:
    """Share of each latent's firings that are in inventories."""
    latents, inside = codes.indices.numpy(), marks[codes.rows.numpy()]
    fires = np.bincount(latents, minlength=d_sae)
    return np.bincount(latents[inside], minlength=d_sae) / np.maximum(fires, 1)


def diff(seed: int, args: argparse.Namespace) -> dict[str, object]:
    """The two pairs of a seed, beside the same by decoder norms alone."""
    train, test = write_texts(args)
    rows = {
        name: [collect(path, as_tokens(part), args) for part in (train, test)]
        for name, path in models_of(seed, args).items()
    }
    marks, told, diffs = marks_of(rows["base"][1], test), {}, {}
    for pair, other in PAIRS.items():
        both, held = (sl.Activations.join({"base": rows["base"][i], "other": rows[other][i]}) for i in (0, 1))
        sae = fit(both, args.out / f"crosscoder-{other}-{seed}", seed, args)
        found = diffs[pair] = sl.universality.diff_models(sae, held)
        inside = shares_in(sae.encode_sparse(held[:].float()), marks, sae.cfg.d_sae)
        first = found.rank("b", 10)
        told[pair] = {
            "counts": found.counts,
            "by norm": {
                kind: found.kinds_by_norm.count(kind) for kind in ("only_a", "only_b", "weak_in_a", "weak_in_b")
            },
            "fvu": found.fvu,
            "relative norm within .3 to .7": float(np.mean((found.relative_norm > 0.3) & (found.relative_norm < 0.7))),
            "register share of tokens": float(marks.mean()),
            "first ten, share in the register": [round(float(inside[j]), 2) for j in first],
            "first ten, gain": [round(float(found.gain[j]), 5) for j in first],
            "first ten, kind": [found.kinds[j] for j in first],
            "only or weak: kind, strength, standard error, share in the register": [
                (kind, *(round(float(x[j]), 3) for x in (found.nu_error, found.nu_error_se, inside)))
                for kind in ("only_a", "only_b", "weak_in_a", "weak_in_b")
                for j in found.top(kind)
            ],
            "of them turned": int(found.turned.sum()),
            "standard error of strengths, median and 95 %": np.nanquantile(found.nu_error_se, [0.5, 0.95])
            .round(4)
            .tolist(),
            "largest gain": {side: float(max(found.gain[found.rank(side, 1)], default=0)) for side in "ab"},
            **explain_weak(found),
        }
        found.save(args.out / f"{other}-{seed}.diff.json")
        if pair == "new register":
            register = inside
            np.save(args.out / f"{other}-{seed}.npy", inside)
        print(f"seed {seed}, {pair}:", json.dumps(told[pair], indent=1), flush=True)
    null = diffs["null"]
    for level in (0.02, 0.05):
        judged = diffs["new register"].calibrate(null, level)
        ranked = judged.rank("b")
        told[f"limits of the null pair, level {level}"] = {
            "shared from": judged.shared,
            "new register": judged.counts,
            "null": null.calibrate(null, level).counts,
            "ranked in b": len(ranked),
            "of the register": sum(bool(register[j] >= 0.5) for j in ranked),
            "median share in the register": float(np.median(register[ranked])) if ranked else None,
        }
    print(f"seed {seed}:", json.dumps({k: v for k, v in told.items() if k.startswith("limits")}, indent=1), flush=True)
    return told


def explain_weak(found: "sl.universality.ModelDiff") -> dict[str, float]:
    """Is what is weak smaller, or turned, or written by other latents? Of latents whose strength is below `shared` and
    of shared ones the median: strength along the stronger row, in any direction, of the reconstruction, and what is
    missing of it in the activations.
    """
    figures = {
        "strength": found.nu_error,
        "strength in any direction": found.nu_free,
        "strength in the reconstruction": found.nu_reconstruction,
        "surplus": found.surplus,
        "share of tokens": found.firings / found.n_tokens,
    }
    known = np.isfinite(found.nu_error_se) & np.isfinite(found.nu_reconstruction)
    groups = {"low": known & (found.nu_error < found.shared), "shared": known & (found.nu_error >= found.shared)}
    return {
        f"{group}: {name}": round(float(np.median(values[chosen])), 5)
        for group, chosen in groups.items()
        for name, values in figures.items()
        if chosen.any()
    }


def compare(seed: int, args: argparse.Namespace) -> dict[str, object]:
    """`sl.compare` of an SAE of either model: features of the other model without a universal partner."""
    told = {}
    train, test = write_texts(args)
    stores = {}
    for name, path in models_of(seed, args).items():
        acts, held = (collect(path, as_tokens(part), args) for part in (train, test))
        sae = fit(acts, args.out / f"sae-{name}-{seed}", seed, args)
        stores[name] = sl.harvest(sae, None, held, args.out / f"store-{name}-{seed}", progress=False)
        if name != "base":
            marks = marks_of(held, test)
            inside = shares_in(sae.encode_sparse(held[:].float()), marks, sae.cfg.d_sae)
            one = sl.compare(stores[name], stores["base"], progress=False).a
            alone = np.flatnonzero(one.live & ~one.universal & (one.fires >= 20))
            first = np.flatnonzero(one.live & (one.fires >= 20))
            first = first[np.argsort(-(one.variance * (1 - np.nan_to_num(one.similarity) ** 2))[first])][:10]
            told[name] = {
                "live": int(one.live.sum()),
                "universal": int(one.universal.sum()),
                "without a partner": len(alone),
                "of them of the register": int((inside[alone] >= 0.5).sum()),
                "of the register in all": int((inside[one.fires >= 20] >= 0.5).sum()),
                "first ten by unshared variance, share in the register": [round(float(inside[j]), 2) for j in first],
            }
            print(f"seed {seed}, compare, {name}:", json.dumps(told[name], indent=1), flush=True)
    return told


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, args.seeds.split(",")):
        for stage, run in (("diff", diff), ("compare", compare)):
            if args.stage in ("all", "tune"):
                tune(args.out / f"tuned-{seed}", 2, seed, args)
                tune(args.out / f"control-{seed}", None, seed, args)
            if args.stage in ("all", stage):
                (args.out / f"{stage}-{seed}.json").write_text(json.dumps(run(seed, args), indent=1))


if __name__ == "__main__":
    main()
