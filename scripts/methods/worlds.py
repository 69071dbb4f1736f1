"""The worlds of the table: activations to learn from, and what each world can say of a dictionary.

planted      1,024 features in 128 dimensions with Zipfian rates, correlations and trees: the truth of every code
tales        the bundled model of synthetic stories: concepts of every token, and a name task to control
stories260k  a model of real text: reconstruction and what the model makes of it
othello      the bundled model of games: the board after every move
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

import saelab as sl
from measure_supervised import make_task
from objectives.shared import labeled_activations, tales_activations
from saelab.evaluation import encode_csr, evaluate, evaluate_sparse_control, score_concepts
from saelab.evaluation.results import ConceptScores
from saelab.sae.fitting import measure as measure_fvu
from saelab.synthetic import PlantedConfig, PlantedWorld
from saelab.synthetic.othello import EMPTY, MINE, YOURS, generate_games
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import name_edits
from saelab.universality import score_recovery, seed_stability

N_HELD_OUT = 30_000
SEEN, UNSEEN = (
    70_000_000,
    90_000_000,
)  # numbers of the first games to train on, and of the first stories and games to score on
EDITED = 4  # features a place that the name task may change
KINDS = ("root", "class", "topic", "pole", "state", "one-sided", "register")


class World(Protocol):
    """Activations and scores."""

    d_sae: int
    k: int

    def activations(self, seed: int) -> sl.Activations:
        """What a dictionary of this seed learns from; the last `N_HELD_OUT` rows are held out."""
        ...

    def score(self, sae: sl.SAE, seed: int) -> dict[str, float]:
        """Figures of one dictionary."""
        ...

    def score_all(self, saes: Mapping[str, sl.SAE]) -> dict[str, dict[str, float]]:
        """Figures that are cheaper for all dictionaries of a seed at once; {} for none."""
        ...


def reconstruction(sae: sl.SAE, acts: sl.Activations) -> dict[str, float]:
    """FVU, L0 and dead latents on the held-out rows."""
    found = measure_fvu(sae, acts[len(acts) - N_HELD_OUT :])
    return {"FVU": found["fvu"], "L0": found["l0"], "dead": found["dead_frac"]}


class _Alone:
    """A world that scores one dictionary at a time."""

    def score_all(self, saes: Mapping[str, sl.SAE]) -> dict[str, dict[str, float]]:
        return {}


class Planted(_Alone):
    d_sae, k = 1024, 16

    def activations(self, seed: int) -> sl.Activations:
        return sl.Activations.from_tensor(self.world(seed).sample(330_000, (seed, 1))[0])

    def world(self, seed: int) -> PlantedWorld:
        return PlantedWorld(PlantedConfig(n_features=1024, d_in=128, l0=16.0), seed=seed)

    def score(self, sae: sl.SAE, seed: int) -> dict[str, float]:
        found = score_recovery(sae, self.world(seed), n_tokens=20_000)["SAE"]
        return {
            "MCC": found.mcc,
            "found": found.found,
            "F1": found.f1,
            "FVU": found.fvu,
            "L0": found.l0,
            "dead": found.dead_frac,
        }


class Tales:
    d_sae, k = 512, 16
    hook_point = "blocks.2.hook_resid_post"

    @cached_property
    def model(self) -> Any:
        return sl.load_model("tales", progress=False)

    @cached_property
    def acts(self) -> sl.Activations:
        return tales_activations(330_000)

    def activations(self, seed: int) -> sl.Activations:
        return self.acts

    @cached_property
    def labeled(self) -> tuple[torch.Tensor, Any]:
        return labeled_activations(200, KINDS)

    @cached_property
    def tasks(self) -> tuple[Any, Any]:
        return make_task(self.model, name_edits(100, 1)), make_task(self.model, name_edits(300, 2))

    @cached_property
    def text(self) -> sl.Tokens:
        return generate_stories(60, first=UNSEEN).tokens()

    def score(self, sae: sl.SAE, seed: int) -> dict[str, float]:
        scores = score_concepts(encode_csr(sae, self.labeled[0]), self.labeled[1])
        assert scores.moved is not None
        effect = evaluate(
            sae, self.model, self.text, hook_point=self.hook_point, n_bootstrap=0, baselines=False, progress=False
        )
        return {
            "coverage": scores.coverage,
            "coverage, permuted": scores.moved.coverage,
            "parent recall": scores.parent_recall,
            **reconstruction(sae, self.acts),
            "loss recovered": effect.loss_recovered,
        }

    def score_all(self, saes: Mapping[str, sl.SAE]) -> dict[str, dict[str, float]]:
        found = evaluate_sparse_control(*self.tasks, saes, ks=(EDITED,))
        edits = [edit for edit, changed in found.changed.items() if changed > 0.02]
        return {
            row.name: {"control": statistics.mean(row.edit(edit, EDITED).agreement for edit in edits)}
            for row in found.rows
        }


class Stories(_Alone):
    d_sae, k = 512, 8
    hook_point = "blocks.2.hook_resid_post"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        return sl.load_model(str(self.folder / "stories260k"), progress=False)

    @cached_property
    def tokens(self) -> sl.Tokens:
        files = sorted((self.folder / "tinystories").glob("*.txt"))
        texts = [file.read_text(encoding="utf-8") for file in files]
        return sl.tokenize(self.model, texts, ctx_len=128, n_tokens=360_000)

    @cached_property
    def acts(self) -> sl.Activations:
        n = len(self.tokens) * 11 // 12
        return sl.collect(self.model, self.tokens[:n], self.hook_point, progress=False)  # type: ignore[return-value]

    def activations(self, seed: int) -> sl.Activations:
        return self.acts

    def score(self, sae: sl.SAE, seed: int) -> dict[str, float]:
        text = self.tokens[len(self.tokens) * 11 // 12 :]
        effect = evaluate(
            sae, self.model, text, hook_point=self.hook_point, n_bootstrap=0, baselines=False, progress=False
        )
        return {**reconstruction(sae, self.acts), "loss recovered": effect.loss_recovered}


class Othello(_Alone):
    d_sae, k = 1024, 32

    def __init__(self, folder: str = "othello") -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        return sl.load_model(self.folder, progress=False)

    @property
    def hook_point(self) -> str:
        return f"blocks.{self.model.cfg.n_layers // 2}.hook_resid_post"

    @cached_property
    def acts(self) -> sl.Activations:
        mask = sl.TokenMask(special=True)
        tokens = generate_games(5_600, first=SEEN).tokens()
        return sl.collect(self.model, tokens, self.hook_point, mask=mask, progress=False)  # type: ignore[return-value]

    def activations(self, seed: int) -> sl.Activations:
        return self.acts

    @cached_property
    def labeled(self) -> tuple[torch.Tensor, Any]:
        games = generate_games(1_000, first=UNSEEN)
        mask = sl.TokenMask(special=True)
        acts = sl.collect(self.model, games.tokens(), self.hook_point, mask=mask, progress=False)
        return acts[:], games.labels_at(acts.doc_ids, acts.positions)

    def score(self, sae: sl.SAE, seed: int) -> dict[str, float]:
        scores = score_concepts(encode_csr(sae, self.labeled[0]), self.labeled[1])
        return scores_of_board(scores) | reconstruction(sae, self.acts)


def scores_of_board(scores: ConceptScores) -> dict[str, float]:
    """Coverage of own and other discs as in arXiv:2408.00113, of empty squares and of legal moves."""
    mean = {kind: np.mean([row.f1 for row in scores.scored if row.kind == kind]) for kind in (MINE, YOURS, EMPTY)}
    return {
        "coverage": float((mean[MINE] + mean[YOURS]) / 2),
        "coverage, empty": float(mean[EMPTY]),
        "board reconstruction": scores.reconstruction,
    }


def stability(saes: Sequence[sl.SAE]) -> Mapping[str, float]:
    """Mean cosine of one-to-one pairs of decoder rows between seeds, and that of random rows of equal moments."""
    found = seed_stability(saes)
    return {"stability": float(found.trained.matched.mean()), "by chance": float(found.matched_random.matched.mean())}
