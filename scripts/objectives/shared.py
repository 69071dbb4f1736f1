"""What the measurements share: activations of tales, training on them, and tables with a spread over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.evaluation.results import ConceptScores
from saelab.lm.token_labels import TokenLabels
from saelab.synthetic.tales import generate_stories

HOOK = "blocks.2.hook_resid_post"
FIRST_STORY = 70_000_000  # beyond those that the model was trained on
KEPT = Path("runs/objectives")
N_HELD_OUT = 30_000


def tales_activations(n_tokens: int = 300_000) -> sl.Activations:
    """Activations of `n_tokens` tokens of stories, with their documents; collected once."""
    tokens = generate_stories(n_tokens // 155, first=FIRST_STORY).tokens()
    folder = KEPT / f"tales-{n_tokens}"
    return sl.collect(sl.load_model("tales", progress=False), tokens, HOOK, folder, progress=False)


def train(
    configs: Mapping[str, sl.SAEConfig], acts: sl.Activations, seed: int, n_tokens: int, batch_size: int = 2048
) -> dict[str, sl.SAE]:
    """SAEs of these configurations, each from the same seed and on the same batches; the last tokens are held out."""
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=batch_size, seed=seed, n_held_out=N_HELD_OUT)
    return {name: sl.SAE(cfg, seed=seed).fit(acts, run, progress=False) for name, cfg in configs.items()}


def labeled_activations(n_stories: int, kinds: Sequence[str]) -> tuple[torch.Tensor, TokenLabels]:
    """Activations of the words of stories that nothing was trained on, and their concepts of these kinds."""
    stories = generate_stories(n_stories, first=FIRST_STORY + 10_000_000)
    tokens = stories.tokens()
    kept = tokens.attention_mask & (tokens.ids >= 4)  # words, not the ends
    acts = sl.lm.capture(sl.load_model("tales", progress=False), tokens.ids, [HOOK])[HOOK][kept]
    labels = stories.labels_at(*kept.nonzero(as_tuple=True))
    columns = [i for i, concept in enumerate(labels.concepts) if concept.kind in kinds]
    chosen = [labels.concepts[i] for i in columns]
    return acts, TokenLabels.of(labels.matrix[:, columns], chosen, kept.nonzero()[:, 0])


def score(sae: sl.SAE, acts: torch.Tensor, labels: TokenLabels) -> ConceptScores:
    """Scores of the best feature of each concept, chosen on one half of the stories and scored on the other."""
    return sl.evaluation.score_concepts(encode_csr(sae, acts), labels)


def mean_f1(scores: ConceptScores, *kinds: str) -> float:
    """Mean F1 of the scored concepts of some kinds, or of some names."""
    return float(np.mean([row.f1 for row in scores.scored if row.kind in kinds or row.name in kinds]))


def format_table(rows: Mapping[str, Sequence[Mapping[str, float]]], digits: int = 3) -> str:
    """Means over seeds, the smallest and the largest in brackets: a line for each name, a column for each figure."""
    columns = list(next(iter(rows.values()))[0])
    lines = [f"{'':<28}" + "".join(f"{column:>26}" for column in columns)]
    for name, seeds in rows.items():
        values = [np.array([seed[column] for seed in seeds]) for column in columns]
        cells = [f"{v.mean():.{digits}f} ({v.min():.{digits}f}..{v.max():.{digits}f})" for v in values]
        lines.append(f"{name:<28}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
