"""One signed feature moved both ways, against what else moves a concept and its opposite, on the model `tales`.

    python scripts/measure_axes.py --seeds 0 1 2 --out axes.txt

Axes are glad/sad, female/male, big/small and hot/cold; a concept is the set of words of one pole. Steered are, at all
tokens of the residual stream (hook point blocks.2.hook_resid_post), in units of the token's own norm:

    AbsTopK      one feature, upward for one pole and downward for the other
    TopK, two    the best feature for each pole, both upward
    TopK, one    the best feature moved both ways, downward past zero
    Matryoshka   the best feature moved both ways
    means        difference in means of the two poles' tokens, moved both ways
    means after  the same of the tokens that are followed by a word of a pole
    random       a random direction, moved both ways

Features are chosen in two steps on stories of their own: as candidates, the ones that separate a pole's tokens best
from the other pole's (difference of mean codes over their standard deviation) and those whose direction raises its
words most in the logits; of these, the feature with the largest gain at a KL of 0.05 nats, summed over the poles that
it is to raise, or with `--choice worse` the gain of the pole that it raises less. All sources are then measured on
stories that nothing was chosen on, by `steering_curve`; `saelab.steering.dose_response` defines the words. KL x1.5 and
KL x2 are the KL at which the expected number of the concept's words has grown so far; `lift` and `selectivity`
(against the words of the other axes) and `gain` are read at a KL of 0.05 nats.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import saelab as sl
from saelab.functional.metrics import kl_divergence, read_gain
from saelab.lm.unembedding import read_out
from saelab.probing.linear_directions import fit_direction
from saelab.steering.dose_response import log_mass, steering_curve
from saelab.steering.target_concepts import TokenConcept, make_concepts
from saelab.synthetic.lexicon import AXES, MOODS
from saelab.synthetic.tales import FEMALE, MALE, Stories, generate_stories

HOOK = "blocks.2.hook_resid_post"
TRAIN, CHOOSE, MEASURE = 60_000_000, 61_000_000, 62_000_000  # numbers of the first stories
D_SAE, K, BATCH = 1024, 16, 2048
KL, GRID, CHOICE_GRID = 0.05, (0.1, 0.2, 0.4, 0.8, 1.6), (0.2, 0.5, 1.2)
MATCHED = (1.5, 2.0)
"""times the expected number of the concept's words"""
MEASURES = ("KL x1.5", "KL x2", "gain", "lift", "selectivity", "best")
NAMES = ("AbsTopK", "TopK, two", "TopK, one", "Matryoshka", "means", "means after", "random")
POLES = {
    "mood": {name: [word for words in kinds.values() for word in words.split()] for name, kinds in MOODS.items()},
    "gender": {"female": FEMALE, "male": MALE},
    "size": dict(zip(AXES["size"].poles, map(str.split, AXES["size"].words), strict=True)),
    "temperature": dict(zip(AXES["temperature"].poles, map(str.split, AXES["temperature"].words), strict=True)),
}

Weights = tuple[sl.SAE, dict[int, float]] | sl.Direction


@dataclass(frozen=True)
class Bench:
    """What a way of steering is judged on before anything is measured: texts, and predictions on them."""

    model: Any
    ids: torch.Tensor
    keep: torch.Tensor
    log_p: torch.Tensor

    @classmethod
    def of(cls, model: Any, stories: Stories, n: int) -> "Bench":
        tokens = stories.tokens()[:n]
        ids = tokens.ids[:, :96].long()
        return cls(model, ids, tokens.doc_ids[:, :96] >= 0, sl.lm.logits(model, ids).log_softmax(-1))

    def gains(self, source: Weights, concepts: list[TokenConcept]) -> dict[tuple[str, int], float]:
        """Gain at the KL compared at, by concept and sign, interpolated; the strongest dose's where that costs less."""
        plain, found = [self.mass(self.log_p, concept) for concept in concepts], {}
        for sign in (1, -1):
            gains, costs = [], []
            for strength in CHOICE_GRID:
                with steered(self.model, source, sign * strength):
                    log_q = sl.lm.logits(self.model, self.ids).log_softmax(-1)
                gains.append(
                    [self.mass(log_q, concept) - before for concept, before in zip(concepts, plain, strict=True)]
                )
                costs.append(float(kl_divergence(self.log_p[self.keep], log_q[self.keep]).mean()))
            for i, concept in enumerate(concepts):
                mine = np.array(gains)[:, i]
                value = read_gain(mine, np.array(costs), KL)
                found[concept.name, sign] = float(mine[-1] if value != value else value)
        return found

    def mass(self, log_p: torch.Tensor, concept: TokenConcept) -> float:
        return float(log_mass(log_p, torch.tensor(concept.ids))[self.keep].exp().mean().log())


def steered(model: Any, source: Weights, strength: float) -> Any:
    if isinstance(source, sl.Direction):
        return sl.steer(model, source, strength, unit="norm")
    return sl.steer(model, source[0], {j: strength * w for j, w in source[1].items()}, unit="norm")


def train(seed: int, n_tokens: int, kept: Path) -> dict[str, sl.SAE]:
    """The three dictionaries on the same batches; those that were trained before are read."""
    kinds = {"AbsTopK": sl.AbsTopK(k=K), "TopK": sl.TopK(k=K), "Matryoshka": sl.BatchTopK(k=K)}
    folders = {name: kept / f"{name}-{seed}" for name in kinds}
    if all(folder.is_dir() for folder in folders.values()):
        return {name: sl.SAE.from_pretrained(folder) for name, folder in folders.items()}
    acts = sl.collect(
        sl.load_model("tales", progress=False), generate_stories(2400, first=TRAIN).tokens(), HOOK, progress=False
    )
    saes = [
        sl.SAE(
            sl.SAEConfig(
                d_in=acts.d_in,
                d_sae=D_SAE,
                activation=activation,
                prefixes=(D_SAE // 16, D_SAE // 4, D_SAE) if name == "Matryoshka" else None,
            ),
            seed,
        )
        for name, activation in kinds.items()
    ]
    sl.fit(saes, acts, sl.TrainConfig(n_tokens=n_tokens, batch_size=BATCH, seed=seed), progress=False)
    for sae, folder in zip(saes, folders.values(), strict=True):
        sae.save_pretrained(folder)
    return dict(zip(kinds, saes, strict=True))


@dataclass(frozen=True)
class Labeled:
    """Activations of stories to choose on, and the tokens of each pole."""

    x: torch.Tensor
    on: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]
    """tokens that a word of the pole follows"""

    @classmethod
    def of(cls, model: Any, stories: Stories, concepts: Mapping[str, TokenConcept]) -> "Labeled":
        tokens = stories.tokens()
        x = sl.lm.capture(model, tokens.ids, [HOOK])[HOOK]
        real = (tokens.doc_ids >= 0) & (tokens.ids > 2)
        labels = stories.labels.spread(tokens.attention_mask)
        on, before = {}, {}
        for name, concept in concepts.items():
            is_word = torch.isin(tokens.ids, torch.tensor(concept.ids))
            on[name], before[name] = labels[name][real], torch.roll(is_word, -1, 1)[real]
        return cls(x[real], on, before)


def find_candidates(model: Any, sae: sl.SAE, data: Labeled, poles: tuple[str, str], concepts: Any, n: int) -> list[int]:
    """Features that separate the first pole from the second, and features that promote its words; `n` of each."""
    rows = data.on[poles[0]] | data.on[poles[1]]
    z = sae.encode_sparse(data.x[rows]).to_dense()
    is_first = data.on[poles[0]][rows]
    separation = (z[is_first].mean(0) - z[~is_first].mean(0)) / z.std(0).clamp_min(1e-6)
    effects = read_out(model, sae.directions())
    promotion = (effects[:, list(concepts[poles[0]].ids)].mean(1) - effects.mean(1)) / effects.std(1)
    both = [separation, promotion]
    if sae.cfg.activation.signed:
        both = [score.abs() for score in both]
    return list(dict.fromkeys(int(j) for score in both for j in score.topk(n).indices))


def find_sources(
    model: Any, saes: dict[str, sl.SAE], data: Labeled, bench: Bench, poles: tuple[str, str], concepts: Any, args: Any
) -> dict[str, tuple[Weights, Weights]]:
    """By name, what is moved upward for each of the two poles."""
    up, down = poles
    both = {"sum": float.__add__, "worse": min}[args.choice]
    found: dict[str, tuple[Weights, Weights]] = {}
    for kind, sae in saes.items():
        tried = {j for pair in (poles, poles[::-1]) for j in find_candidates(model, sae, data, pair, concepts, args.n)}
        gains = {j: bench.gains((sae, {j: 1.0}), [concepts[up], concepts[down]]) for j in sorted(tried)}
        ways = {(j, s): both(gains[j][up, s], gains[j][down, -s]) for j in gains for s in (1, -1)}
        j, s = max(ways, key=lambda way: ways[way])
        found["TopK, one" if kind == "TopK" else kind] = (sae, {j: float(s)}), (sae, {j: -float(s)})
        if kind == "TopK":
            best = [max(gains, key=lambda j, pole=pole: gains[j][pole, 1]) for pole in poles]
            found["TopK, two"] = (sae, {best[0]: 1.0}), (sae, {best[1]: 1.0})
    for name, labels in (("means", data.on), ("means after", data.before)):
        rows = labels[up] ^ labels[down]
        direction = fit_direction(data.x[rows], labels[up][rows], HOOK, name=name)
        found[name] = direction, -direction
    drawn = sl.interventions.make_random(direction, args.seed)
    return {name: (found | {"random": (drawn, -drawn)})[name] for name in NAMES if name in args.sources}


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A row for each pole and source, by seed and axis."""
    model = sl.load_model("tales", progress=False)
    words = {pole: listed for poles in POLES.values() for pole, listed in poles.items()}
    concepts = {concept.name: concept for concept in make_concepts(model, words)}
    chosen_on, measured_on = (
        generate_stories(args.n_stories, first=CHOOSE),
        generate_stories(args.n_prompts, first=MEASURE),
    )
    data, bench = Labeled.of(model, chosen_on, concepts), Bench.of(model, chosen_on, 16)
    prompts = [" ".join(measured_on.text(i).split()[:30]) for i in range(args.n_prompts)]
    jobs = [(seed, axis) for seed in args.seeds for axis in args.axes]
    for seed, axis in tqdm(jobs, desc="axes", disable=None):
        args.seed = seed
        poles = tuple(POLES[axis])
        sources = find_sources(model, train(seed, args.n_tokens, args.kept), data, bench, poles, concepts, args)
        rows = []
        for side, pole in enumerate(poles):
            others = {name: concept for name, concept in concepts.items() if name not in poles}
            curve = steering_curve(
                model,
                {name: pair[side] for name, pair in sources.items()},
                concepts[pole],
                prompts,
                strengths=GRID,
                others=others,
                n=1,
                n_tokens=40,
                seed=seed,
                progress=False,
            )
            if args.curves:
                curve.save(args.curves / f"{axis}-{pole}-{seed}.json")
            for name in sources:
                row = {"seed": seed, "axis": axis, "pole": pole, "source": name}
                row |= {f"KL x{times:g}": curve.along(name).kl_at(log(times)).value for times in MATCHED}
                row |= {key: curve.along(name).at_kl(KL, measure=key).value for key in ("gain", "lift", "selectivity")}
                best = curve.along(name).best()
                line = curve.along(name).points
                points = {key: curve.values(key)[line].tolist() for key in ("gain", "kl")}
                rows.append(row | {"best": best.score, "description": curve.sources[name], "points": points})
        yield rows


def _format_cell(rows: list[dict[str, Any]], axis: str, name: str, key: str) -> str:
    mine = [row for row in rows if row["axis"] == axis and row["source"] == name]
    seeds = [np.mean([row[key] for row in mine if row["seed"] == seed]) for seed in {row["seed"] for row in mine}]
    reached = [value for value in seeds if value == value]
    if not reached:
        return "not reached"
    short = "" if len(reached) == len(seeds) else f" {len(reached)}/{len(seeds)}"
    return f"{np.mean(reached):.3f} ({min(reached):.2f}..{max(reached):.2f}){short}"


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Means over seeds and poles, the smallest and largest seed in brackets; seeds where both poles got so far."""
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        lines += ["", f"{axis:<14}" + "".join(f"{key:>20}" for key in MEASURES)]
        for name in [name for name in NAMES if any(row["source"] == name for row in rows)]:
            cells = "".join(f"{_format_cell(rows, axis, name, key):>20}" for key in MEASURES)
            lines.append(f"  {name:<12}{cells}")
    return "\n".join(lines[1:])


def draw(rows: list[dict[str, Any]]) -> Any:
    """Gain against KL, means over seeds and poles at each strength, a panel an axis."""
    from plotly.subplots import make_subplots

    from saelab.visualization.html import GRID as FAINT, apply_layout, line_of

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = make_subplots(1, len(axes), subplot_titles=axes, shared_yaxes=True, horizontal_spacing=0.02)
    for column, axis in enumerate(axes, 1):
        for i, name in enumerate(NAMES):
            mine = [row["points"] for row in rows if row["axis"] == axis and row["source"] == name]
            if not mine:
                continue
            gain, kl = (np.mean([points[key] for points in mine], 0) for key in ("gain", "kl"))
            figure.add_scatter(
                x=kl,
                y=np.exp(gain),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line=line_of(i),
                row=1,
                col=column,
            )
    seeds = len({row["seed"] for row in rows})
    note = f"{seeds} seeds, both poles, {len(GRID)} strengths in norms of the token's activation; each point a strength"
    apply_layout(figure, "The concept's words, times as expected as before, against the KL that it costs", note, 380)
    figure.add_hline(y=1, line={"color": FAINT})
    figure.update_xaxes(type="log", title="KL, nats")
    figure.update_yaxes(type="log")
    figure.update_yaxes(title="times as expected", col=1)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--axes", nargs="+", default=list(POLES), choices=list(POLES))
    parser.add_argument("--n-tokens", type=int, default=1_200_000, help="to train each dictionary on")
    parser.add_argument("--n-stories", type=int, default=300, help="to choose on")
    parser.add_argument("--n-prompts", type=int, default=24, help="to measure on")
    parser.add_argument("--n", type=int, default=5, help="candidates by each of the two criteria")
    parser.add_argument(
        "--choice", choices=["sum", "worse"], default="sum", help="of a feature that is moved both ways"
    )
    parser.add_argument("--sources", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--kept", type=Path, default=Path("runs/axes"), help="where dictionaries are kept")
    parser.add_argument("--curves", type=Path, help="a folder for every curve")
    parser.add_argument("--figure", type=Path, help="an HTML file for the figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.curves:
        args.curves.mkdir(parents=True, exist_ok=True)
    rows = []
    for found in measure(args):
        rows += found
        if args.out:
            args.out.write_text(format_rows(rows) + "\n")
            args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    if args.figure:
        draw(rows).write_html(args.figure, include_plotlyjs=True)
    print(format_rows(rows))


if __name__ == "__main__":
    main()
