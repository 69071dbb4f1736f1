"""Dictionaries of a name task against supervised ones: do they rebuild it, edit it with few features, and read it?

    python scripts/measure_supervised.py --seeds 0 1 2 --n-tokens 1200000 --out supervised.json

A prompt for the model `tales` is of two people and a gift, "Tom gave the kite to", and the model names the receiver.
At the output of block 2 the giver's token knows who gives, and the last token the two names: patching both places
carries every change of the prompt over, patching either does not (the first lines printed). Dictionaries of equal size
and k, trained on the same activations (of stories, or with `--on task` of the two places in prompts of the task), are
compared with supervised ones: one vector for each giver, receiver and order of names. "either" is a name that is one
of the two, in any role.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

import saelab as sl
from saelab.evaluation.sparse_control import ORIGINAL, EditScore, EditTask, SparseControlResult, evaluate_sparse_control
from saelab.lm.model_checks import Model
from saelab.stores.files import write_json
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import NAME_EDITS, NamePrompt, name_edits

HOOK = "blocks.2.hook_resid_post"
FIRST = 50_000_000  # number of the first story that dictionaries are trained on: the model has seen none from here on
D_SAE, K = 1024, 16
SUMMARY = ("l0", "n_live", "sufficiency", "necessity")
ATTRIBUTE = ("f1_always", "f1", "f1_union", "f1_probe", "n_sides", "n_found", "n_split", "n_occluded")
JOINED = {"either": ("giver", "receiver")}


def make_task(model: Model, prompts: Sequence[dict[str, NamePrompt]], hook_point: str = HOOK) -> EditTask:
    """Prompts as rows; read and edited where the giver is named, and at the last token."""
    first = [versions[ORIGINAL] for versions in prompts]
    lengths = torch.tensor([len(prompt.ids) for prompt in first])
    versions = (ORIGINAL, *NAME_EDITS)
    return EditTask(
        model=model,
        hook_point=hook_point,
        ids={
            v: torch.nn.utils.rnn.pad_sequence([one[v].ids.long() for one in prompts], batch_first=True)
            for v in versions
        },
        lengths=lengths,
        places=torch.stack([torch.tensor([prompt.giver_at for prompt in first]), lengths - 1], 1),
        place_names=("giver", "end"),
        attributes={v: [one[v].attributes for one in prompts] for v in versions},
        joined=JOINED,
        answers=torch.tensor([prompt.answer for prompt in first]),
        other_answers=torch.tensor([prompt.other_answer for prompt in first]),
        asks=("receiver",) * len(first),
    )


def find_places(task: EditTask) -> str:
    """Which place carries which change: share of predictions that become those of the edited prompt."""
    lines = [f"{task.hook_point}: share of prompts where patching brings the other prompt's prediction"]
    x = task.activations[ORIGINAL]
    for edit in task.edits:
        goal, changed = task.predict(version=edit).argmax(1), task.predict().argmax(1)
        cells = [f"untouched {float((changed == goal).float().mean()):.3f}"]
        for name, places in (*((name, [i]) for i, name in enumerate(task.place_names)), ("both", [0, 1])):
            patched = x.clone()
            patched[:, places] = task.activations[edit][:, places]
            cells.append(f"{name} {float((task.predict(patched).argmax(1) == goal).float().mean()):.3f}")
        lines.append(f"  {edit:<10}" + "   ".join(cells))
    return "\n".join(lines)


def read_training(name: str, model: Model, n_stories: int, n_task: int) -> sl.Activations:
    """Activations of stories, or of both places of prompts of the task, in any order."""
    if name == "stories":
        acts = sl.collect(model, generate_stories(n_stories, first=FIRST).tokens(), HOOK, progress=False)
        assert isinstance(acts, sl.Activations)
        return acts
    rows = torch.cat([x.flatten(0, 1) for x in make_task(model, name_edits(n_task, 3)).activations.values()])
    return sl.Activations.from_tensor(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])


def train(acts: sl.Activations, seed: int, n_tokens: int, kept: Path | None) -> dict[str, sl.SAE]:
    """Four dictionaries on the same batches; those that were trained before are read."""
    plain = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=sl.TopK(k=K))
    configs = {
        "TopK": plain,
        "AbsTopK": replace(plain, activation=sl.AbsTopK(k=K)),
        "Matryoshka": replace(plain, activation=sl.BatchTopK(k=K), prefixes=(D_SAE // 16, D_SAE // 4, D_SAE)),
        "frozen decoder": replace(plain, dictionary="frozen"),
    }
    folders = {name: (kept or Path()) / f"{name.replace(' ', '-')}-{seed}" for name in configs}
    saes = {name: sl.SAE.from_pretrained(folder) for name, folder in folders.items() if kept and folder.is_dir()}
    missing = [name for name in configs if name not in saes]
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=2048, seed=seed)
    if missing:
        trained = sl.fit([sl.SAE(configs[name], seed) for name in missing], acts, run, progress=False)
        saes |= dict(zip(missing, trained, strict=True))
    for name in missing if kept else ():
        saes[name].save_pretrained(folders[name])
    return {name: saes[name] for name in configs}


def summarize(tables: Sequence[SparseControlResult]) -> str:
    """Means over seeds, with the range of the agreement."""
    first = tables[0]
    edits = [edit for edit, changed in first.changed.items() if changed > 0.02]
    ks = sorted({score.k for score in first.rows[0].edits})
    lines = [f"{'mean of ' + str(len(tables)) + ' seeds':<26}{'l0':>6}{'live':>7}{'suffices':>10}{'needed':>8}"]
    for row in first.rows:
        same = [table[row.name] for table in tables]
        l0, live, *rest = (mean(getattr(one, name) for one in same) for name in SUMMARY)
        lines.append(f"{row.name:<26}{l0:>6.1f}{live:>7.0f}{rest[0]:>10.3f}{rest[1]:>8.3f}")
    for edit in edits:
        lines.append(f"{edit:<26}" + "".join(f"{f'k={k}':>24}" for k in ks))
        for row in first.rows:
            cells = [[table[row.name].edit(edit, k) for table in tables] for k in ks]
            lines.append(f"  {row.name:<24}" + "".join(f"{_spread(cell):>24}" for cell in cells))
    titles = ("always", "best", "union", "probe", "sides", "found", "split", "occluded")
    lines.append(f"{'F1 of values':<42}{'values':>7}" + "".join(f"{title:>9}" for title in titles))
    for row in first.rows:
        for i, one in enumerate(row.attributes):
            same = [table[row.name].attributes[i] for table in tables]
            cells = "".join(f"{mean(getattr(score, name) for score in same):>9.3g}" for name in ATTRIBUTE)
            lines.append(f"{f'{row.name}, {one.attribute} at {one.place}':<42}{one.n_values:>7}{cells}")
    return "\n".join(lines)


def _spread(cell: list[EditScore]) -> str:
    """Agreement, its range, and the share taken out."""
    values = [one.agreement for one in cell]
    return f"{mean(values):.2f} ({min(values):.2f}-{max(values):.2f}) / {mean(one.magnitude for one in cell):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=1_200_000, help="to train each dictionary on")
    parser.add_argument("--n-stories", type=int, default=2400, help="to train on, over and over")
    parser.add_argument("--n-train", type=int, default=800, help="prompts, each in five versions, to fit and choose on")
    parser.add_argument("--n-prompts", type=int, default=200, help="held-out prompts to measure on")
    parser.add_argument("--on", nargs="+", choices=("stories", "task"), default=["stories"], help="what to train on")
    parser.add_argument(
        "--n-task", type=int, default=2000, help="prompts of the task to train on, in five versions each"
    )
    parser.add_argument("--kept", type=Path, help="a folder of dictionaries, to train each only once")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    task, fitted = (make_task(model, name_edits(n, seed)) for n, seed in ((args.n_prompts, 1), (args.n_train, 2)))
    print(find_places(task), flush=True)
    texts = {name: read_training(name, model, args.n_stories, args.n_task) for name in args.on}
    found = {}
    for name, x in texts.items():
        tables = []
        for seed in args.seeds:
            saes = train(x, seed, args.n_tokens, args.kept / name if args.kept else None)
            table = evaluate_sparse_control(task, fitted, saes)
            print(f"\ntrained on {name} ({len(x):,} rows, {args.n_tokens:,} tokens), seed {seed}\n{table}", flush=True)
            found[f"{name}/{seed}"] = table.to_dict()
            tables.append(table)
        print(f"\ntrained on {name}\n{summarize(tables)}", flush=True)
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
