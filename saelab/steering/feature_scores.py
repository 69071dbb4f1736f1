"""`output_scores`: output and input scores of features (arXiv:2505.20063), which show how well each steers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.collecting.harvesting import require_harvested
from saelab.functional.indices import FeatureIds, read_features
from saelab.functional.screening import largest_first
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.interventions import Intervention
from saelab.interventions.prompt_metrics import Texts, read_last, read_texts
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.tokenizers import token_strings
from saelab.lm.unembedding import read_out
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

NAN = float("nan")
NEUTRAL = "From my experience,"
BLOCK = 512  # features looked at together
N_SHOWN = 10
N_OTHERS, N_RANDOM = 8, 32  # sides whose promoted tokens give the chance of one, and random directions


@dataclass(frozen=True, kw_only=True)
class SteeringScore:
    """Output and input score of one sign of a feature."""

    feature: int
    sign: int
    """1 or -1: sign of the codes scored"""
    output: float
    """[0, 1]; high where amplifying the feature raises the probability of the tokens it promotes"""
    input: float
    """[0, 1]; share of the strongest contexts in which it fires on a token that it promotes"""
    output_chance: float
    """the output score with tokens that other sides promote: high where any change makes the model predict these"""
    input_chance: float
    """the input score with tokens that other sides promote: high where they are frequent; NaN where only one side was
    scored
    """
    token: str
    """the promoted token with the highest probability under the amplified model"""
    probability: float
    """of that token, under the amplified model, mean over prompts"""
    peak: float
    """largest |z| of this sign in the store"""
    n_contexts: int
    """documents that the input score is computed on"""


@dataclass(frozen=True, kw_only=True)
class OutputScores(Result):
    """Result of `output_scores`: one row for each sign of each feature that fires."""

    rows: tuple[SteeringScore, ...]
    prompts: tuple[str, ...]
    """the neutral prompts"""
    strength: float
    """multiple of the largest code of each feature and sign"""
    n_top: int
    """tokens that count as promoted"""
    random: tuple[float, ...]
    """output scores of random directions as long as the sides' steps, each with the tokens that it promotes"""
    seed: int

    @property
    def random_95(self) -> float:
        """The output score that 5 % of random directions exceed; NaN where no side fires."""
        return float(np.quantile(self.random, 0.95)) if self.random else float("nan")

    @property
    def above_random_frac(self) -> float:
        """Share of the sides whose output score exceeds `random_95`: 0.05 by chance."""
        return float(np.mean([row.output > self.random_95 for row in self.rows])) if self.rows else float("nan")

    def top(self, n: int = N_SHOWN, by: str = "output") -> tuple[SteeringScore, ...]:
        """The `n` rows with the highest score, `by` "output" or "input"; ValueError for another `by`."""
        if by not in ("output", "input"):
            raise ValueError(f"`by` must be 'output' or 'input', got '{by}'.")
        return tuple(sorted(self.rows, key=lambda row: -getattr(row, by))[:n])

    def __str__(self) -> str:
        lines = [
            f"{len(self.rows):,} sides of features, amplified {self.strength:g} times their maximum behind "
            f"{len(self.prompts)} prompt(s); the best {min(N_SHOWN, len(self.rows))} by output score",
            f"{self.above_random_frac:.1%} of the sides have an output score above {self.random_95:.3f}, that of "
            "95 % of random directions",
        ]
        table = [["feature", "output", "chance", "input", "chance", "probability", "token"]]
        for row in self.top():
            name = f"{row.feature}{'+' if row.sign > 0 else '-'}"
            scores = (row.output, row.output_chance, row.input, row.input_chance, row.probability)
            table.append([name, *(f"{score:.3f}" for score in scores), repr(row.token)])
        return "\n".join([*lines, *format_table(table, left=(6,))])


@torch.no_grad()
def output_scores(
    model: AnyModel,
    sae: SAE,
    store: FeatureStore,
    features: FeatureIds | None = None,
    *,
    prompts: str | Int[Tensor, "n"] | Sequence[str | Int[Tensor, "n"]] = NEUTRAL,
    strength: float = 10.0,
    n_top: int = 20,
    n_contexts: int = 100,
    hook_point: str | None = None,
    allow_mismatch: bool = False,
    seed: int = 0,
) -> OutputScores:
    """Output and input scores of features, for both signs of signed ones; features with a high output score steer well.

        output = max_t p'(t) (1 - min_t rank'(t) / |V|)     t the `n_top` tokens that the side promotes (logit lens)
        input  = share of the `n_contexts` documents with the largest |z| whose strongest token is among those t

    t runs over the `n_top` tokens that the feature promotes most by the logit lens; p' is the model's next-token
    distribution after a neutral prompt with the feature amplified at the last token, `x + strength peak sign d`, the
    reconstruction error kept; ranks count from 0; several prompts are averaged. Each row of a batch amplifies another
    feature, so thousands take seconds on a small model. Source: arXiv:2505.20063.

    Chance levels: each score has its mean with the promoted tokens of eight other features in place of its own, and the
    output scores are compared with those of 32 random directions of the same lengths, since any large step makes the
    model predict what it promotes.

    Args:
        model: language model the SAE belongs to.
        sae: SAE whose features are scored; it must write to the residual stream.
        store: codes of the SAE on some text: maxima for the amplification, contexts for the input score. Signs that
            never fire in it get no row.
        features: feature indices; by default all.
        prompts: one or several neutral prompts, texts or token ids, for the output score.
        strength: multiple of the largest |z| of that sign in the store.
        n_top: number of promoted tokens.
        n_contexts: number of documents, those with the largest |z|, for the input score.
        hook_point: where the SAE reads; by default where it was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        seed: of the random directions and of the choice of other features.

    Raises:
        ValueError: for features that do not exist, prompts with words unknown to the model, activations of another
            width than the residual stream's, and an SAE of another model, weight processing or hook point (unless
            `allow_mismatch`).
    """
    model = as_model(model)
    everything = range(sae.cfg.d_sae)
    wanted = np.array(read_features(everything if features is None else features, sae.cfg.d_sae), np.int64)
    require_harvested(store, sae)
    intervention = Intervention(sae, (), hook_point=hook_point, allow_mismatch=allow_mismatch)
    intervention.require_match(model)
    writes_at = intervention.writes_at
    given = [prompts] if isinstance(prompts, str | Tensor) else list(prompts)
    runs = [EditedRuns(model, _read_prompt(model, prompt), _read_probabilities) for prompt in given]
    directions, peaks = sae.directions().cpu(), store.statistics.peaks
    starts = range(0, len(wanted), BLOCK)
    found = [_Sides.find(model, wanted[start : start + BLOCK], directions, peaks, n_top) for start in starts]
    blocks, rng = [sides for sides in found if len(sides.features)], np.random.default_rng(seed)
    rows: list[SteeringScore] = []
    for sides, others in zip(blocks, _draw_others(blocks, rng), strict=True):
        amplified = [_amplify(one, writes_at, strength * sides.steps) for one in runs]
        rows += sides.score(model, amplified, others, _count_contexts(store, sides, others, n_contexts))
    return OutputScores(
        rows=tuple(rows),
        prompts=tuple(prompt if isinstance(prompt, str) else str(prompt.tolist()) for prompt in given),
        strength=float(strength),
        n_top=n_top,
        random=_score_random(model, runs, writes_at, blocks, strength, rng),
        seed=seed,
    )


def _read_prompt(model: Model, prompt: str | Int[Tensor, "n"]) -> Texts:
    """One prompt; a prompt with words unknown to the model is not neutral and refused."""
    texts, unknown = read_texts(model, prompt), getattr(model.tokenizer, "unk_token_id", None)
    if isinstance(prompt, str) and unknown is not None and bool((texts.ids == unknown).any()):
        raise ValueError(f"`prompts` must be of words that the model knows, got '{prompt}'; give others.")
    return texts


@dataclass(frozen=True, eq=False)
class _Sides:
    """The features that fire in the store, each with one sign of its codes."""

    features: Int[np.ndarray, "n"]
    signs: Int[np.ndarray, "n"]
    peaks: Float[np.ndarray, "n"]
    directions: Float[Tensor, "n d_out"]
    """change of the activation for amplifying each by 1"""
    promoted: Int[Tensor, "n n_top"]
    """tokens, the most promoted first"""

    @classmethod
    def find(cls, model: Model, block: np.ndarray, directions: Tensor, peaks: np.ndarray, n_top: int) -> "_Sides":
        places, columns = np.nonzero(peaks[block] > 0)
        features, signs = block[places], 1 - 2 * columns
        signed = torch.from_numpy(signs)[:, None] * directions[features]
        return cls(features, signs, peaks[features, columns], signed, _find_promoted(model, signed, n_top))

    @property
    def steps(self) -> Float[Tensor, "n d_out"]:
        """What the largest code of each side adds."""
        return torch.from_numpy(self.peaks)[:, None].float() * self.directions

    def score(
        self,
        model: Model,
        runs: list[Float[Tensor, "n d_vocab"]],
        others: Int[Tensor, "n n_others n_top"],
        inputs: list[tuple[float, float, int]],
    ) -> Iterator[SteeringScore]:
        """One row for each feature and sign."""
        outputs = torch.stack([_score_output(p, self.promoted) for p in runs]).mean(0)
        chances = torch.stack(
            [_score_output(p, tokens) for p in runs for tokens in others.unbind(1)] or [outputs * NAN]
        )
        of_promoted = torch.stack([p.gather(1, self.promoted) for p in runs]).mean(0)
        probability, places = of_promoted.max(1)
        said = self.promoted.gather(1, places[:, None])[:, 0].tolist()
        strings = token_strings(model.tokenizer, said) if model.tokenizer is not None else {}
        for i, (share, chance, n) in enumerate(inputs):
            yield SteeringScore(
                feature=int(self.features[i]),
                sign=int(self.signs[i]),
                output=float(outputs[i]),
                input=share,
                output_chance=float(chances[:, i].mean()),
                input_chance=chance,
                token=strings.get(said[i], f"<{said[i]}>"),
                probability=float(probability[i]),
                peak=float(self.peaks[i]),
                n_contexts=n,
            )


def _find_promoted(model: Model, directions: Float[Tensor, "n d_out"], n_top: int) -> Int[Tensor, "n n_top"]:
    """The tokens that each direction promotes, the most promoted first."""
    effects = read_out(model, directions).cpu() if len(directions) else torch.zeros(0, model.cfg.d_vocab)
    known = find_known_ids(model).nonzero()[:, 0]
    return known[largest_first(effects[:, known], min(n_top, len(known)))]


def _draw_others(blocks: Sequence[_Sides], rng: np.random.Generator) -> Iterator[Int[Tensor, "n n_others n_top"]]:
    """What other sides promote, of all blocks, by block."""
    if not blocks:
        return
    promoted = torch.cat([sides.promoted for sides in blocks])
    n = len(promoted)
    steps = 1 + rng.permutation(n - 1)[:N_OTHERS]
    order = torch.from_numpy(rng.permutation(n))
    places = torch.from_numpy(np.argsort(order.numpy(), kind="stable"))
    others = promoted[order[(places[:, None] + torch.from_numpy(steps)) % n]]
    yield from others.split([len(sides.features) for sides in blocks])


def _score_random(
    model: Model,
    runs: Sequence[EditedRuns],
    writes_at: str,
    blocks: Sequence[_Sides],
    strength: float,
    rng: np.random.Generator,
) -> tuple[float, ...]:
    """Output scores of random directions, as long as sides drawn from all."""
    if not blocks:
        return ()
    lengths = torch.cat([sides.steps.norm(dim=1) for sides in blocks])
    width = blocks[0].directions.shape[1]
    drawn = torch.from_numpy(rng.standard_normal((N_RANDOM, width))).float()
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    steps = strength * lengths[torch.from_numpy(rng.integers(len(lengths), size=N_RANDOM))][:, None] * unit
    promoted = _find_promoted(model, unit, blocks[0].promoted.shape[1])
    scores = [_score_output(_amplify(one, writes_at, steps), promoted) for one in runs]
    return tuple(torch.stack(scores).mean(0).tolist())


def _amplify(
    runs: EditedRuns, writes_at: str, steps: Float[Tensor, "n_sides d_out"]
) -> Float[Tensor, "n_sides d_vocab"]:
    """Next-token probabilities after a prompt, each run with another change at its last token."""

    def push(x: Tensor, i: Tensor) -> Tensor:
        x[:, -1] += steps[i].to(x)
        return x

    return runs.run({writes_at: push}, torch.zeros(len(steps), dtype=torch.long))


def _read_probabilities(logits: Tensor, texts: Texts, rows: Tensor) -> Tensor:
    return read_last(logits, texts, rows).softmax(-1)


def _score_output(p: Float[Tensor, "n d_vocab"], promoted: Int[Tensor, "n n_top"]) -> Float[Tensor, "n"]:
    """`max_t p(t) (1 - min_t rank(t) / |V|)`; the most probable promoted token attains both maximum and minimum."""
    best = p.gather(1, promoted).amax(1)
    ranks = (p > best[:, None]).sum(1)
    return best * (1 - ranks / p.shape[1])


def _count_contexts(
    store: FeatureStore, sides: _Sides, others: Int[Tensor, "n n_others n_top"], n_contexts: int
) -> list[tuple[float, float, int]]:
    """The input score of each feature and sign, its chance level and the number of documents it is computed on."""
    first, last = int(sides.features.min()), int(sides.features.max()) + 1
    dense = last - first <= 4 * len(sides.features)
    columns: Any = store.columns(first, last) if dense else None
    token_ids, doc_ids = store.token_ids, store.doc_ids
    found = []
    promoted = torch.cat([sides.promoted[:, None], others], dim=1).numpy()
    for feature, sign, tokens in zip(sides.features, sides.signs, promoted, strict=True):
        if dense:
            part = slice(*columns.indptr[feature - first : feature - first + 2])
            rows, values = columns.indices[part], columns.data[part]
        else:
            firings = store.feature(int(feature))
            rows, values = firings.indices, firings.values
        tops = _find_tops(rows[values * sign > 0], np.abs(values[values * sign > 0]), doc_ids, n_contexts)
        share, *chances = [float(np.isin(token_ids[tops], some).mean()) for some in tokens]
        found.append((share, float(np.mean(chances)) if chances else NAN, len(tops)))
    return found


def _find_tops(rows: np.ndarray, sizes: np.ndarray, doc_ids: np.ndarray, n: int) -> np.ndarray:
    """The strongest token of each of the `n` documents with the strongest tokens."""
    size = 8 * n
    while True:
        order = rows[largest_first(torch.from_numpy(sizes), min(size, len(rows))).numpy()]
        _, firsts = np.unique(doc_ids[order], return_index=True)
        if len(firsts) >= n or size >= len(rows):
            return order[np.sort(firsts)[:n]]
        size *= 8
