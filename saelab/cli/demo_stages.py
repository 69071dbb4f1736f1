"""Stages of `saelab demo`: activations of generated stories, dictionaries trained on them, scores, and the page."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saelab.cli.terminal import echo
from saelab.collecting.collection import collect
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.feature_classifiers import concept_baselines, encode_csr
from saelab.evaluation.results import ConceptScores
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.token_labels import TokenLabels
from saelab.sae.activation_functions import AbsTopK, BatchTopK, TopK
from saelab.sae.config import SAEConfig
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.corpus import split_documents
from saelab.stores.files import write_atomic
from saelab.stores.jobs import hidden
from saelab.synthetic.tales import Stories
from saelab.synthetic.vocabulary import VOCABULARY
from saelab.training.config import TrainConfig
from saelab.visualization.demo_page import Corpus, Trial, show_comparison, show_failures, show_features
from saelab.visualization.html import facts, make_page, section

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
