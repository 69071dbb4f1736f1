"""`saelab demo`: train dictionaries on a model whose concepts are known, and score them; offline."""

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from saelab.cli import options
from saelab.cli.exploring import name_command
from saelab.cli.inputs import echo
from saelab.cli.labeling import Context
from saelab.collecting.collection import collect
from saelab.collecting.harvesting import harvest
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.feature_classifiers import concept_baselines, encode_csr
from saelab.evaluation.results import ConceptScores
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.models import describe_model, load_model
from saelab.lm.token_labels import TokenLabels
from saelab.sae.activation_functions import AbsTopK, BatchTopK, TopK
from saelab.sae.config import SAEConfig
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.corpus import split_documents
from saelab.stores.files import write_atomic
from saelab.stores.jobs import hidden, hold_folder
from saelab.stores.results import format_table
from saelab.synthetic.tales import Stories, generate_stories
from saelab.synthetic.vocabulary import VOCABULARY
from saelab.training.config import TrainConfig
from saelab.visualization.demo_page import Corpus, Trial, show_comparison, show_failures, show_features, tabulate
from saelab.visualization.html import facts, make_page, section

EXPLORED = "AbsTopK"
"""the dictionary whose features are harvested, to be explored"""
STORY_SEED = 0
FIRST = 20_000_000  # number of the first story: the models of tales were trained and measured on earlier ones
BATCH_SIZE = 2048
SHOWN = (
    "topic sea", "glad", "sad", "pet", "animal", "girl name", "receiver", "quote", "question", "past", "recipe",
    "about Velm", "magic",
)  # fmt: skip
TITLE = "Sparse dictionaries against known concepts"
LEAD = (
    "A small language model was trained on stories made by a grammar, so that it is known of every token what is "
    "true of it. Three sparse dictionaries were trained on its activations without that knowledge. This page "
    "holds them against the truth."
)


@dataclass
class Clock:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what begins, and note how long it took."""
        echo(f"{name.capitalize()} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        return f"{total:.0f} s: " + ", ".join(f"{name} {s:.0f}" for name, s in self.seconds.items())


def run_demo(
    context: Context,
    out: Annotated[
        Path, Option(help="Folder for the report and the dictionaries; an older demo is replaced.", metavar="FOLDER")
    ] = Path("demo"),
    model: Annotated[
        str, Option(help="A model of tales: its name, or a folder that holds one.", metavar="NAME")
    ] = "tales",
    hook_point: Annotated[
        str, Option(help="Hook point whose activations the dictionaries are trained on.", metavar="NAME")
    ] = "blocks.2.hook_resid_post",
    n_stories: Annotated[int, Option(help="Stories to train on; half as many others to score on.")] = 2400,
    n_tokens: Annotated[int, Option(help="Tokens that each dictionary is trained on.")] = 1_200_000,
    d_sae: Annotated[int, Option(help="Latents in each dictionary.")] = 1024,
    k: Annotated[int, Option(help="Latents that fire for a token: kept, or their mean.")] = 16,
    seed: Annotated[int, Option(help="Seed of dictionaries, order of the data and split of the stories.")] = 0,
    progress: options.Progress = True,
) -> None:
    """Train three dictionaries on a built-in model whose concepts are known, score them, and write a report.

    Needs no network, and three minutes at most on two cores. The report is one self-contained HTML file.
    """
    clock = Clock()
    context.with_resource(hold_folder(out))
    with clock.stage("generating stories"):
        lm, half = load_model(model, progress=progress), max(2, n_stories // 2)
        seen, unseen = (
            generate_stories(n_stories, STORY_SEED, FIRST),
            generate_stories(half, STORY_SEED, FIRST + n_stories),
        )
    with clock.stage("collecting activations"):
        acts, others = (collect_stories(lm, stories, hook_point, progress) for stories in (seen, unseen))
    with clock.stage("training three dictionaries in one pass"):
        saes = train_all(acts, d_sae, k, n_tokens, seed, progress)
    with clock.stage("scoring them and their baselines"):
        trials, baselines = score_all(saes, others, unseen, seed, progress)
    ran = {
        "Model": f"{model}, at {hook_point} (d_in {acts.d_in})",
        "Trained on": describe(seen, acts) + f"; {n_tokens:,} tokens seen",
        "Scored on": describe(unseen, others) + "; features chosen on one half of the stories, scored on the other",
        "Dictionaries": f"{d_sae:,} latents; k = {k} for all, so that their L0 is matched; seed {seed}",
        "Time": str(clock),
        "Versions": ", ".join(f"{name} {version}" for name, version in describe_model(lm).versions.items()),
    }
    save_all(out, saes, trials, lay_out(ran, trials, baselines, read_corpus(others, unseen, seed)))
    store = out / "store"
    harvest(SAE.from_pretrained(out / EXPLORED.lower()), lm, others, store, progress=progress, resume=False)
    header, rows = tabulate(trials, baselines)
    echo("\n".join(["", *format_table([header, *rows]), "", f"{clock}."]))
    echo(
        f"Open {out / 'report.html'} in a browser; then try `saelab info {shlex.quote(str(out / 'abstopk'))}`, or "
        f"`saelab demo --k {max(1, k // 2)} --out {shlex.quote(str(out) + '-sparser')}`."
    )
    scores = out / EXPLORED.lower() / "concepts.json"
    echo(f"To search, name and steer the features of {EXPLORED} in a browser: {name_command(store, model, scores)}")


def choose_configs(d_in: int, d_sae: int, k: int) -> dict[str, SAEConfig]:
    """TopK, AbsTopK and Matryoshka, the last with the sizes d_sae / 16, d_sae / 4 and d_sae."""
    plain = SAEConfig(d_in=d_in, d_sae=d_sae, activation=TopK(k=k))
    sizes = tuple(sorted({max(1, d_sae // part) for part in (16, 4, 1)}))
    return {
        "TopK": plain,
        "AbsTopK": replace(plain, activation=AbsTopK(k=k)),
        "Matryoshka": replace(plain, activation=BatchTopK(k=k), prefixes=sizes),
    }


def train_all(acts: Activations, d_sae: int, k: int, n_tokens: int, seed: int, progress: bool) -> dict[str, SAE]:
    """The three dictionaries by name, trained on the same batches."""
    cfgs = choose_configs(acts.d_in, d_sae, k)
    budget = TrainConfig(n_tokens=n_tokens, batch_size=min(BATCH_SIZE, n_tokens, len(acts) // 2), seed=seed)
    saes = fit([SAE(cfg, seed) for cfg in cfgs.values()], acts, budget, progress=progress)
    return dict(zip(cfgs, saes, strict=True))


def collect_stories(lm: Model, stories: Stories, hook_point: str, progress: bool) -> Activations:
    """The activations of stories, without the tokens at their ends and the padding."""
    acts = collect(lm, stories.tokens(), hook_point, mask=TokenMask(special=True), progress=progress)
    assert isinstance(acts, Activations)
    return acts


def score_all(
    saes: dict[str, SAE], acts: Activations, stories: Stories, seed: int, progress: bool
) -> tuple[list[Trial], dict[str, ConceptScores]]:
    """The dictionaries and their baselines against the truth of the stories."""
    from tqdm.auto import tqdm

    labels, x = read_truth(acts, stories), acts[:]
    codes: dict[str, Any] = {name: encode_csr(sae, x) for name, sae in saes.items()}
    cfg = next(iter(saes.values())).cfg
    baselines = concept_baselines(x, cfg, labels, seed=seed)
    scores = {}
    for name, values in tqdm({**codes, **baselines}.items(), unit=" dictionaries", disable=hidden(progress)):
        scores[name] = score_concepts(values, labels, seed=seed)
    trials = [
        Trial(name, codes[name], scores[name], held_out_fvu(sae), sae.cfg.activation.signed)
        for name, sae in saes.items()
    ]
    return trials, {name: scores[name] for name in baselines}


def read_truth(acts: Activations, stories: Stories) -> TokenLabels:
    """Concepts of each row of the activations."""
    assert acts.doc_ids is not None and acts.positions is not None
    return stories.labels_at(acts.doc_ids, acts.positions)


def held_out_fvu(sae: SAE) -> float:
    """As measured at the end of training."""
    last = (sae.training_ or {}).get("last", {}).get("held_out_fvu")
    return math.nan if last is None else float(last)


def read_corpus(acts: Activations, stories: Stories, seed: int) -> Corpus:
    """The activations' tokens as words, with the truth; sentences are shown of the stories nothing was fitted to."""
    assert acts.token_ids is not None
    labels = read_truth(acts, stories)
    words = [VOCABULARY[i] for i in acts.token_ids.tolist()]
    return Corpus(words, labels, shown=~split_documents(labels.require_documents(), seed=seed))


def describe(stories: Stories, acts: Activations) -> str:
    """How many stories and tokens, and what was left out."""
    assert acts.provenance is not None
    removed = ", ".join(f"{name} {n:,}" for name, n in acts.provenance.removed.items() if n)
    return f"{len(stories):,} stories, {len(acts):,} tokens (left out: {removed})"


def lay_out(ran: dict[str, str], trials: list[Trial], baselines: dict[str, ConceptScores], corpus: Corpus) -> str:
    """The whole page."""
    sections = [
        section("What was run", facts(ran)),
        show_comparison(trials, baselines),
        show_features(corpus, trials, SHOWN),
        show_failures(trials, baselines),
    ]
    return make_page(TITLE, LEAD, sections)


def save_all(out: Path, saes: dict[str, SAE], trials: list[Trial], page: str) -> None:
    """The report, and a folder for each dictionary with its scores."""
    for trial in trials:
        folder = out / trial.name.lower()
        saes[trial.name].save_pretrained(folder)
        trial.scores.save(folder / "concepts.json")
    write_atomic(out / "report.html", page.encode())
