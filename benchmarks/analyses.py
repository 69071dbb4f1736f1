"""Analyses of a trained dictionary: report, labels by rules, stability of seeds and attribution; time and peak memory.

    python benchmarks/analyses.py --cache /tmp/analyses
    git worktree add /tmp/before 824caee
    python benchmarks/analyses.py --cache /tmp/analyses --before /tmp/before --turns 3 --json runs/analyses.json

Each figure is a process of its own: seconds of the work alone (the store is opened, the model loaded and libraries
imported before), and the peak of anonymous memory above what the process held then, sampled every 5 ms. Processes take
turns; medians count. `limit` is the time that it takes to read the codes and tokens of the store once. Whatever a
piece of work returns or writes is hashed: `same` says whether both builds made the same bytes.

SAEs of `--d-sae` features are trained for a short time on stories260k (a random model where it is absent), and one of
them is harvested. `--cache` keeps SAEs and store for the next call. `--before` is the folder of another checkout.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / ".." / "shared" / "data"
HOOK_POINT, CTX_LEN, GOAL = "blocks.2.hook_resid_post", 128, 1.5
PROMPT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but her mom said that it was"
)


def load_model() -> Any:
    """stories260k, or a random model where it is absent."""
    import saelab as sl

    folder = DATA / "stories260k"
    return sl.load_model(folder, device="cpu", progress=False) if folder.is_dir() else sl.lm.tiny_model()


def read_tokens(model: Any, n_tokens: int) -> Any:
    """Tokens of stories, or of one sentence many times where they are absent."""
    import saelab as sl

    text: Any = DATA / "tinystories" / "tinystories.txt"
    if not text.is_file():
        text = ["Once upon a time there was a cat who could count. " * 40] * (n_tokens // 500 + 1)
    return sl.tokenize(model, text, ctx_len=CTX_LEN, n_tokens=n_tokens)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Train the SAEs and harvest the first, unless they are there."""
    import saelab as sl

    if (folder / "store" / "manifest.json").is_file():
        return
    model = load_model()
    tokens = read_tokens(model, args.n_tokens)
    point = HOOK_POINT if DATA.is_dir() else "blocks.1.hook_resid_post"
    acts = sl.collect(model, tokens, point, folder / "acts", progress=False)
    for seed in range(args.n_seeds):
        if (folder / f"sae-{seed}").is_dir():
            continue
        sae = sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.TopK(k=args.k)), seed=seed)
        sae.fit(acts, sl.TrainConfig(n_tokens=args.n_training, seed=seed), progress=False)
        sae.save_pretrained(folder / f"sae-{seed}")
    sl.harvest(sl.SAE.from_pretrained(folder / "sae-0"), model, tokens, folder / "store", progress=False)


class Inputs:
    """What a piece of work starts from, loaded when it is asked for."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.settings = json.loads(os.environ["ANALYSES"])

    def store(self) -> Any:
        import saelab as sl

        return sl.FeatureStore.load(self.folder / "store")

    def sae(self, seed: int = 0) -> Any:
        import saelab as sl

        return sl.SAE.from_pretrained(self.folder / f"sae-{seed}")


def read_once(inputs: Inputs) -> Callable[[], Any]:
    """The limit of what looks at everything: codes by token, and tokens, each read once."""
    store = inputs.store()

    def work() -> Any:
        names = ("offsets", "latents", "values", "places")
        sums = [int(arrays[name].view("u1").sum()) for _, arrays in store.shards() for name in names]
        return [*sums, int(store.text.token_ids.sum()), int(store.text.doc_ids.sum())]

    return work


def read_by_feature(inputs: Inputs) -> Callable[[], Any]:
    """The limit of what looks at features: their codes, and tokens, each read once."""
    store = inputs.store()

    def work() -> Any:
        names = ("feature_offsets", "feature_tokens", "feature_values", "places")
        sums = [int(arrays[name].view("u1").sum()) for _, arrays in store.shards() for name in names]
        return [*sums, int(store.text.token_ids.sum()), int(store.text.doc_ids.sum())]

    return work


def make_report(inputs: Inputs) -> Callable[[], Any]:
    """A report with the model and the SAE: promoted tokens, and similar features by direction."""
    import saelab as sl

    store, model, sae, features = inputs.store(), load_model(), inputs.sae(), choose_features(inputs)
    return lambda: sl.report(store, inputs.out, model=model, sae=sae, features=features, progress=False).n_features


def make_plain_report(inputs: Inputs) -> Callable[[], Any]:
    """A report of the store alone: similar features by correlation of codes."""
    import saelab as sl

    store, features = inputs.store(), choose_features(inputs)
    return lambda: sl.report(store, inputs.out, features=features, progress=False).n_features


def choose_features(inputs: Inputs) -> list[int]:
    """The features of a report, evenly spaced."""
    d_sae, n = inputs.settings["d_sae"], inputs.settings["n_features"]
    return [i * d_sae // n for i in range(n)]


def label(inputs: Inputs) -> Callable[[], Any]:
    """Labels by rules of every feature, on all tokens."""
    from saelab.labels.rules import label_by_rules, make_predicates

    store = inputs.store()
    return lambda: label_by_rules(store, make_predicates(store)).to_dict()


def measure_stability(inputs: Inputs) -> Callable[[], Any]:
    """Stability of the seeds by their directions."""
    import saelab as sl

    saes = [inputs.sae(seed) for seed in range(inputs.settings["n_seeds"])]
    return lambda: sl.universality.seed_stability(saes).to_dict()


def measure_stability_on_tokens(inputs: Inputs) -> Callable[[], Any]:
    """Stability of the seeds, with usage and distance to the data on the activations of all tokens."""
    import saelab as sl

    saes = [inputs.sae(seed) for seed in range(inputs.settings["n_seeds"])]
    acts = sl.Activations.load(inputs.folder / "acts")
    return lambda: sl.universality.seed_stability(saes, acts).to_dict()


def attribute(method: str, check: bool) -> Callable[[Inputs], Callable[[], Any]]:
    """Effects of every feature at every token of a prompt."""

    def load(inputs: Inputs) -> Callable[[], Any]:
        import saelab as sl

        model, sae = load_model(), inputs.sae()
        settings: dict[str, Any] = {"method": method, "check": check, "progress": False}
        return lambda: sl.interventions.attribute(model, sae, PROMPT, "loss", **settings).to_dict()

    return load


WORK: dict[str, Callable[[Inputs], Callable[[], Any]]] = {
    "codes by token": read_once,
    "codes by feature": read_by_feature,
    "report": make_report,
    "report, store alone": make_plain_report,
    "labels by rules": label,
    "stability": measure_stability,
    "stability, on tokens": measure_stability_on_tokens,
    "attribution": attribute("gradient", check=False),
    "attribution, checked": attribute("gradient", check=True),
    "attribution, integrated": attribute("integrated", check=False),
}
LIMITS = {
    "report": "codes by feature",
    "report, store alone": "codes by token",
    "labels by rules": "codes by feature",
}
"""What must be read at least."""


def read_status(key: str) -> float:
    """A line of this process's memory status, in MiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def run(name: str, folder: Path, out: Path) -> None:
    """One piece of work, in this process; prints its figures."""
    import pandas  # noqa: F401 - what the work imports is not its time
    import scipy.optimize
    import scipy.sparse.csgraph
    import scipy.stats  # noqa: F401
    import tqdm.auto  # noqa: F401

    import saelab as sl

    sl.report, sl.interventions.attribute, sl.labels.rules.label_by_rules, sl.universality.seed_stability  # noqa: B018 - imports them
    work = WORK[name](Inputs(folder, out))
    before = read_status("RssAnon")
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], read_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    found = work()
    taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
    done.set()
    watcher.join()
    print(json.dumps(taken | {"peak": peak[0] - before, "hash": digest(found, out)}))


def digest(found: Any, out: Path) -> str:
    """A hash of a result and of the files that were written with it."""
    told = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode())
    for file in sorted(out.rglob("*")):
        if file.is_file():
            told.update(file.name.encode() + file.read_bytes())
    return told.hexdigest()


def take(name: str, root: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of one process that imports saelab from a folder."""
    told = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "ANALYSES": json.dumps(settings)}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--run", name, str(folder), str(Path(out) / "out")]
        done = subprocess.run(command, env=os.environ | told, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Figures of every piece of work as aligned text; ratios are those of the build before to this one."""
    head = ["", "seconds", "before", "faster", "goal", "MiB", "before", "limit, s", "same"]
    lines = [head]
    for name, row in rows.items():
        here, before, limit = row["here"], row.get("before"), rows.get(LIMITS.get(name, ""))
        cells = [name, f"{here['seconds']:.3f}", "-", "-", "-", f"{here['peak']:.0f}", "-", "-", "-"]
        if before is not None:
            faster = before["seconds"] / here["seconds"]
            cells[2:4] = f"{before['seconds']:.3f}", f"{faster:.2f}"
            cells[4] = "-" if name.startswith("codes") else "met" if faster >= GOAL else "MISSED"
            cells[6], cells[8] = f"{before['peak']:.0f}", "yes" if here["hash"] == before["hash"] else "NO"
        if limit is not None:
            cells[7] = f"{limit['here']['seconds']:.3f}"
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line) for line in padded)


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of another checkout")
    parser.add_argument("--cache", type=Path, help="where SAEs and store are kept; a temporary folder by default")
    parser.add_argument("--n-tokens", type=int, default=1_000_000, help="tokens of the store")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32, help="codes of a token")
    parser.add_argument("--n-training", type=int, default=200_000, help="tokens that each SAE is trained on")
    parser.add_argument("--n-features", type=int, default=1000, help="features of a report")
    parser.add_argument("--n-seeds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write JSON."""
    args = parse()
    if args.run:
        run(args.run[0], Path(args.run[1]), Path(args.run[2]))
        return
    settings = {"d_sae": args.d_sae, "n_features": args.n_features, "n_seeds": args.n_seeds}
    builds = {"here": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    with tempfile.TemporaryDirectory() as temporary:
        sizes = f"{args.n_tokens}-{args.d_sae}-{args.k}-{args.n_seeds}-{args.n_training}"
        folder = (args.cache or Path(temporary)) / sizes
        prepare(args, folder)
        rows: dict[str, dict[str, Any]] = {}
        for name in args.work:
            turns = [
                {build: take(name, root, folder, settings) for build, root in builds.items()} for _ in range(args.turns)
            ]
            rows[name] = {build: middle([turn[build] for turn in turns]) for build in builds}
            print(f"{name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2))


def middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the hash is that of all turns, or "several" where they differ."""
    hashes = {turn["hash"] for turn in turns}
    numbers = {key: statistics.median(turn[key] for turn in turns) for key in ("seconds", "cpu", "peak")}
    return numbers | {"hash": hashes.pop() if len(hashes) == 1 else "several"}


if __name__ == "__main__":
    main()
