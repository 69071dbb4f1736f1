"""From a text to a trained SAE of a small model: saelab, a build of it before, and SAELens, in turns.

    .venv-bench/bin/python benchmarks/small_models.py --before ../before --json runs/small_models.json

All start with the same folder of a model and the same text file, and end with an SAE trained on as many tokens: same
context length, sequences in a forward pass, tokens in a step, width and k. saelab tokenizes, collects to a folder and
trains; SAELens does so by its own runner, which computes activations while it trains. Each run is a process of its own;
its imports are not counted, loading the model is. `make bench` makes the environment with SAELens; without it the peer
is left out.

The FVU of both is on the same held-out activations, so that speed is not bought with quality.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
MODEL, TEXT = DATA / "stories260k", DATA / "tinystories" / "tinystories.txt"
CTX_LEN, N_SEQ, BATCH, K, LAYER, D_IN = 128, 32, 4096, 16, 2, 64
HOOK_POINT = f"blocks.{LAYER}.hook_resid_post"
GOALS = {1024: 4.0, 8192: 12.0}
MARK = "measured: "


def run_saelab(n_tokens: int, d_sae: int) -> dict[str, float]:
    """Seconds of each part."""
    import saelab as sl

    sl.lm.tiny_model()  # imports what loading needs
    marks = [time.perf_counter()]
    model = sl.load_model(MODEL)
    marks.append(time.perf_counter())
    tokens = sl.tokenize(model, TEXT, ctx_len=CTX_LEN, n_tokens=n_tokens)
    marks.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        acts = sl.collect(model, tokens, HOOK_POINT, folder, batch_size=N_SEQ, progress=False)
        marks.append(time.perf_counter())
        sae = sl.SAE(sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=sl.TopK(K)))
        sae.fit(acts, sl.TrainConfig(n_tokens=n_tokens, batch_size=BATCH), progress=False)
        marks.append(time.perf_counter())
    parts = [after - before for before, after in pairwise(marks)]
    names = ("load", "tokenize", "collect", "fit")
    return dict(zip(names, parts, strict=True)) | {"total": marks[-1] - marks[0], "fvu": held_out_fvu(sae)}


def run_saelens(n_tokens: int, d_sae: int) -> dict[str, float]:
    """Seconds of SAELens's runner, with Hugging Face's model, which is faster than TransformerLens's."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    start = time.perf_counter()
    stories = [story.strip() for story in TEXT.read_text(encoding="utf-8").split("<|endoftext|>")]
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, k=K),
        model_name=str(MODEL),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{LAYER}",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=CTX_LEN,
        n_batches_in_buffer=64,  # contexts, of its tutorial; the default does not hold a batch
        store_batch_size_prompts=N_SEQ,
        train_batch_size_tokens=BATCH,
        training_tokens=n_tokens,
        exclude_special_tokens=True,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    stories_set = Dataset.from_dict({"text": stories})
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=stories_set).run()
    return {"total": time.perf_counter() - start, "fvu": held_out_fvu(sae)}


def held_out_fvu(sae: Any) -> float:
    """FVU on the activations of the text's last 50,000 tokens."""
    import torch

    import saelab as sl

    model = sl.load_model(MODEL)
    every = sl.tokenize(model, TEXT, ctx_len=CTX_LEN)
    tail = every[len(every) - 50_000 // CTX_LEN : len(every)]
    acts: Any = sl.collect(model, tail, HOOK_POINT, progress=False)
    x = acts[:].float()
    with torch.no_grad():
        x_hat = sae.decode(sae.encode(x))
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def run_apart(kind: str, d_sae: int, args: argparse.Namespace) -> dict[str, float]:
    """What a process of its own measures."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if kind != "saelens":
        home = args.before if kind == "before" else Path(__file__).parents[1]
        environment["PYTHONPATH"] = str(home.resolve())
    command = [sys.executable, "-W", "ignore", __file__, "--one", kind, str(d_sae), "--n-tokens", str(args.n_tokens)]
    out = subprocess.run(command, env=environment, text=True, capture_output=True)
    if out.returncode:
        sys.exit(f"{kind} failed:\n{out.stderr[-2000:]}")
    line = next(line for line in out.stdout.splitlines() if line.startswith(MARK))
    found: dict[str, float] = json.loads(line.removeprefix(MARK))
    return found


def compare(kinds: list[str], d_sae: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of all that each measures, in turns."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.turns):
        for kind in kinds:
            runs[kind].append(run_apart(kind, d_sae, args))
            print(f"{kind}, d_sae {d_sae:,}: {runs[kind][-1]['total']:.1f} s", file=sys.stderr, flush=True)
    return {kind: {key: statistics.median(run[key] for run in made) for key in made[0]} for kind, made in runs.items()}


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Seconds of each part, and the ratios to saelab."""
    parts = ("load", "tokenize", "collect", "fit", "total")
    lines = [f"{'d_sae':>6} {'':<8}" + "".join(f"{part:>9}" for part in parts) + f"{'fvu':>8}{'ratio':>8}{'goal':>6}"]
    for d_sae, made in results.items():
        for kind, found in made.items():
            cells = "".join(f"{found[part]:9.2f}" if part in found else f"{'':>9}" for part in parts)
            ratio = found["total"] / made["saelab"]["total"]
            goal = f"{GOALS[d_sae]:6.0f}" if kind == "saelens" and d_sae in GOALS else ""
            lines.append(f"{d_sae:>6} {kind:<8}{cells}{found['fvu']:8.4f}{ratio:8.2f}{goal}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--before", type=Path, help="checkout of a build to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "D_SAE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write JSON."""
    args = parse()
    if args.one:
        kind, d_sae = args.one
        run = run_saelens if kind == "saelens" else run_saelab
        print(MARK + json.dumps(run(args.n_tokens, int(d_sae))))
        return
    if not MODEL.is_dir():
        sys.exit(f"The model and the text must be in {DATA.resolve()}, which is absent.")
    kinds = ["saelab", *(["before"] if args.before else [])]
    if importlib.util.find_spec("sae_lens"):
        kinds.append("saelens")
    else:
        print("SAELens is not installed here and left out. `make bench` makes .venv-bench with it.")
    results = {d_sae: compare(kinds, d_sae, args) for d_sae in args.d_sae}
    print(table(results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
