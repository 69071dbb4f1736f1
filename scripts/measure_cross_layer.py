"""Cross-layer transcoders of tales beside transcoders of each layer: error, graphs, and what they say falsely.

    python scripts/measure_cross_layer.py DIR --stage collect
    python scripts/measure_cross_layer.py DIR --stage train --kind clt --seed 0
    python scripts/measure_cross_layer.py DIR --stage graphs --kind clt --seed 0
    python scripts/measure_cross_layer.py DIR --stage mechanisms

`train` fits a cross-layer transcoder (`clt`), one for each layer (`per-layer`), or either for a single step
(`clt-one-step`, `per-layer-one-step`: the null), all with 1,024 latents a layer, TopK 16, on the same tokens. `graphs`
traces the prompts of tales' two tasks, 12 each, as `benchmarks/trace.py` does, and ablates the 100 features of the
largest effects. `mechanisms` needs no data: in a planted
model of three layers whose third output is y, either layer 2 reads what layer 1 read too (parallel) or what layer 1
wrote (chain). A cross-layer transcoder cannot tell the two apart; taking away what the first layer writes can.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import saelab as sl
from saelab.sae import CLT, CLTConfig
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import counterfactuals, name_edits

N_LAYERS, WIDTH, D_SAE, K = 4, 128, 1024, 16
KINDS = ("clt", "per-layer", "clt-one-step", "per-layer-one-step")


def load_sides(folder: Path) -> tuple[dict[str, sl.Activations], dict[str, sl.Activations]]:
    """Inputs and outputs of the MLPs by layer."""
    inputs, outputs = (
        {str(i): sl.Activations.load(folder / "acts", f"blocks.{i}.mlp.hook_{side}") for i in range(N_LAYERS)}
        for side in ("in", "out")
    )
    return inputs, outputs


def train(folder: Path, kind: str, seed: int, n_tokens: int, lr_factor: float) -> dict[str, Any]:
    """Fit and save one kind; FVU of each layer on held-out tokens."""
    inputs, outputs = load_sides(folder)
    one_step, out = kind.endswith("one-step"), folder / f"{kind}-{seed}"
    n_tokens = 1024 if one_step else n_tokens
    if kind.startswith("clt"):
        pair = sl.Activations.join(inputs), sl.Activations.join(outputs)
        clt = CLT(CLTConfig(n_layers=N_LAYERS, d_in=WIDTH, d_sae=D_SAE, activation=sl.TopK(k=K)), seed=seed)
        clt.fit(pair, make_training(n_tokens, seed), progress=False)
        clt.save_pretrained(out)
        assert clt.training_ is not None
        return {"fvu": [layer["fvu"] for layer in clt.training_["saved"]["layers"]], "lr": clt.training_["lr"]}
    fvus = []
    for i in range(N_LAYERS):
        cfg = sl.SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=D_SAE, activation=sl.TopK(k=K))
        lr = None
        if lr_factor != 1:
            lr = lr_factor * sl.sae.TrainingSAE(sl.SAE(cfg), make_training(n_tokens, seed)).default_lr()
        coder = sl.SAE(cfg, seed=seed * N_LAYERS + i)
        coder.fit((inputs[str(i)], outputs[str(i)]), make_training(n_tokens, seed, lr), progress=False)
        coder.save_pretrained(out / f"layer-{i}")
        assert coder.training_ is not None
        fvus.append(coder.training_["saved"]["fvu"])
        rate = coder.training_["lr"]
    return {"fvu": fvus, "lr": rate}


def make_training(n_tokens: int, seed: int, lr: float | None = None) -> sl.TrainConfig:
    """The same for all kinds."""
    return sl.TrainConfig(n_tokens=n_tokens, batch_size=1024, seed=seed, lr=lr)


def load_kind(folder: Path, kind: str, seed: int) -> Any:
    """What `trace` takes."""
    place = folder / f"{kind}-{seed}"
    if kind.startswith("clt"):
        return CLT.from_pretrained(place)
    return [sl.SAE.from_pretrained(place / f"layer-{i}") for i in range(N_LAYERS)]


def find_prompts(n: int) -> list[tuple[str, torch.Tensor, list[int]]]:
    """Task, ids, ids of the answer and its rival."""
    edits = [versions["original"] for versions in name_edits(n)]
    names = [("names", one.ids.long(), [one.answer, one.other_answer]) for one in edits]
    facts = counterfactuals("facts", n)
    return names + [("facts", one.prompt.long(), [one.answer, one.other_answer]) for one in facts]


def measure_graphs(folder: Path, kind: str, seed: int, n: int) -> dict[str, dict[str, float]]:
    """Means over the prompts of each task."""
    model, given = sl.load_model("tales", progress=False), load_kind(folder, kind, seed)
    rows: dict[str, list[dict[str, float]]] = {}
    for task, ids, targets in find_prompts(n):
        graph = sl.circuits.trace(model, given, ids, targets=targets, max_features=None)
        features = graph.is_kind("feature")
        direct = features[graph.edge_sources] & graph.is_kind("logit")[graph.edge_targets]
        found = {
            "miss": graph.completeness_error,
            "replacement": graph.replacement_score,
            "completeness": graph.completeness_score,
            "features": float(features.sum()),
            "edges": float((features[graph.edge_sources] & features[graph.edge_targets]).sum()),
            "path": mean_path(graph),
            "direct": float(abs(graph.edge_weights[direct]).sum() / abs(graph.edge_weights).sum()),
        }
        checked = sl.circuits.validate(graph, model, given, n_ablated=100, n_steered=0, seed=seed, progress=False)
        found |= {
            "Spearman": checked.held.spearman,
            "Spearman, 95 % of shuffles": checked.held.shuffled_95,
            "Pearson": checked.held.pearson,
            "Spearman, all responds": checked.live.spearman,
        }
        rows.setdefault(task, []).append(found)
    return {
        task: {name: (max if name == "miss" else mean)(row[name] for row in of_task) for name in of_task[0]}
        for task, of_task in rows.items()
    }


def mean_path(graph: Any) -> float:
    """Mean number of features on the paths from an embedding to a target, weighted by what flows along them."""
    import numpy as np

    shares = np.abs(graph.edge_weights.astype(np.float64))
    sums = np.bincount(graph.edge_targets, shares, len(graph))
    shares = shares / np.maximum(sums[graph.edge_targets], 1e-30)
    reach, length = np.zeros(len(graph)), np.zeros(len(graph))
    reach[graph.is_kind("embedding")] = 1
    order = np.argsort(graph.edge_targets, kind="stable")
    ends = np.searchsorted(graph.edge_targets[order], np.arange(len(graph) + 1))
    features = graph.is_kind("feature")
    for node in range(len(graph)):  # a source comes before its targets
        edges = order[ends[node] : ends[node + 1]]
        if len(edges):
            sources = graph.edge_sources[edges]
            reach[node] = (shares[edges] * reach[sources]).sum()
            length[node] = (shares[edges] * length[sources]).sum() + (reach[node] if features[node] else 0)
    start = graph.start
    return float((start * length).sum() / max((start * reach).sum(), 1e-30))


# ---- a planted model whose mechanism is known

N_EACH, D_PLANTED = 16, 128
GROUPS = {"source": (2 * N_EACH, 0), "p0": (N_EACH, 0)} | {
    f"{name}{layer}": (N_EACH, layer) for layer in (1, 2) for name in "pq"
}
"""number of features, and the layer whose MLP reads and answers them; exactly one of each group fires"""


def draw_planted(n: int, chain: bool, seed: int) -> dict[str, torch.Tensor]:
    """Inputs and outputs of three layers. A `source` i writes a_(i mod 16) at layer 0. In a chain layer 2 reads a and
    writes c; in a parallel model it reads the first 16 sources themselves and writes c.
    """
    fixed, drawn = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)

    def directions(count: int) -> torch.Tensor:
        rows = torch.randn(count, D_PLANTED, generator=fixed)
        return rows / rows.norm(dim=1, keepdim=True)

    a, c = directions(N_EACH), directions(N_EACH)
    x, outputs = torch.zeros(n, D_PLANTED), [torch.zeros(n, D_PLANTED) for _ in range(3)]
    found: dict[str, torch.Tensor] = {}
    for name, (count, layer) in GROUPS.items():
        which = torch.randint(count, (n,), generator=drawn)
        size = 1 + 0.25 * torch.randn(n, 1, generator=drawn).clamp(-2, 2)
        x += size * directions(count)[which]
        written = a[which % N_EACH] if name == "source" else directions(count)[which]
        outputs[layer] += size * written
        if name == "source":
            answers = torch.ones(n, dtype=torch.bool) if chain else which < N_EACH
            outputs[2] += size * c[which % N_EACH] * answers[:, None]
            found |= {"which": which, "wrote": size * written, "answered": size * c[which % N_EACH] * answers[:, None]}
    inputs = [x, x + outputs[0], x + outputs[0] + outputs[1]]
    return found | {"x": torch.cat(inputs, 1), "y": torch.cat(outputs, 1), "c": c}


def measure_mechanism(chain: bool, k: int, seed: int, n_tokens: int = 400_000) -> dict[str, float]:
    """FVU of the last layer, and the share of what layer 2 answers that is lost without what layer 0 wrote, by a
    cross-layer transcoder and by one for each layer. It is 1 in a chain and 0 in a parallel model.
    """
    data, test = draw_planted(100_000, chain, 2 * seed), draw_planted(5_000, chain, 2 * seed + 1)
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=1024, seed=seed)
    d = D_PLANTED
    clt = CLT(CLTConfig(n_layers=3, d_in=d, d_sae=96, activation=sl.TopK(k=k)), seed=seed)
    clt.fit((data["x"], data["y"]), run, progress=False)
    alone = sl.SAE(sl.SAEConfig(d_in=d, d_out=d, d_sae=96, activation=sl.TopK(k=k)), seed=seed)
    alone.fit((data["x"][:, 2 * d :], data["y"][:, 2 * d :]), run, progress=False)
    for parameter in (*clt.parameters(), *alone.parameters()):
        parameter.requires_grad_(False)
    less = test["x"].clone()
    less[:, d : 2 * d] -= test["wrote"]  # the inputs of both later layers
    less[:, 2 * d :] -= test["wrote"]
    answered = test["answered"]
    found = {}
    for name, coder, columns in (("clt", clt, slice(None)), ("per-layer", alone, slice(2 * d, None))):
        whole, changed = (coder(x[:, columns])[:, -d:] for x in (test["x"], less))
        y = test["y"][:, -d:]
        found[f"{name} fvu"] = float((whole - y).square().sum() / (y - y.mean(0)).square().sum())
        found[f"{name} lost"] = float(((whole - changed) * answered).sum() / answered.square().sum())
    last = clt.layer(2).encode(test["x"][:, 2 * d :]) @ clt.layer(2).directions()
    found["clt written by layer 2"] = float((last * answered).sum() / answered.square().sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", choices=("collect", "train", "graphs", "mechanisms"), required=True)
    parser.add_argument("--kind", choices=KINDS, default="clt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-tokens", type=int, default=500_000)
    parser.add_argument("--lr-factor", type=float, default=1.0, help="on the default rate of transcoders of a layer")
    parser.add_argument("--n", type=int, default=12, help="prompts of each task")
    parser.add_argument("--k", type=int, default=2, help="of the planted models; features of a layer that fire: 2")
    args = parser.parse_args()
    if args.stage == "collect":
        places = [f"blocks.{i}.mlp.hook_{side}" for i in range(N_LAYERS) for side in ("in", "out")]
        model = sl.load_model("tales", progress=False)
        sl.collect(model, generate_stories(6000, seed=1).tokens(), places, args.folder / "acts", progress=False)
        return
    if args.stage == "mechanisms":
        for chain in (True, False):
            found = measure_mechanism(chain, args.k, args.seed)
            print(
                "chain" if chain else "parallel", json.dumps({key: round(x, 3) for key, x in found.items()}), flush=True
            )
        return
    if args.stage == "train":
        fitted = train(args.folder, args.kind, args.seed, args.n_tokens, args.lr_factor)
        print(
            args.kind,
            args.seed,
            f"fvu {mean(fitted['fvu']):.4f}",
            [round(x, 4) for x in fitted["fvu"]],
            f"lr {fitted['lr']:.4f}",
        )
        return
    for task, row in measure_graphs(args.folder, args.kind, args.seed, args.n).items():
        figures = ", ".join(f"{key} {x:.1e}" if key == "miss" else f"{key} {x:.3f}" for key, x in row.items())
        print(f"{args.kind} {args.seed} {task}: {figures}", flush=True)


if __name__ == "__main__":
    main()
