"""`steering_curve`: effect and cost of steering toward a concept, over strengths, sources and sampled texts.

Sources are features, directions, interventions and functions, each with its strengths as context managers.

Measures of the effect and cost of steering; p is the unsteered model's prediction, p' the steered model's:

    lift           mean_t log p'_t(C) - log p_t(C), p(C) the probability of a set of tokens, on the same prefixes, nats
    selectivity    the lift minus the mean lift of other sets
    mass           mean_t p'_t(C): how often the concept is expected; gain: its logarithm minus that of mean_t p_t(C)
    kl             mean_t KL(p_t || p'_t), nats
    entropy        mean_t of p'_t, nats
    nll            mean_t -log p_t of the tokens that the steered model generated, nats; perplexity is exp(nll)
    rate           share of generated tokens that are in C; share: of generated texts that contain one
    repetition     share of a text's 4-grams that occurred in it before (seq-rep-4, arXiv:1908.04319)
    distinct_n     different n-grams over all n-grams of a set of texts, n = 1 and 2 (arXiv:1510.03055)

Lift, gain, kl and entropy are computed on text that the unsteered model generated; prompt_lift, prompt_selectivity and
prompt_kl on the prompts themselves. The lift weighs all tokens alike, and so mostly those where the concept is very
unlikely: there any disturbance raises it by nats. The selectivity subtracts that; the gain weighs tokens by the
concept's probability.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.functional.metrics import kl_divergence
from saelab.interventions.directions import Direction
from saelab.interventions.interventions import Intervention, Mode, TokenSelection, TokenSelector, Unit
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.continuations import Continuations, read_continuations
from saelab.lm.conversations import Prompts
from saelab.lm.documents import list_prompts
from saelab.lm.generation import SAMPLING, Generated, Generation, SamplingConfig, generate
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import find_special_ids
from saelab.sae.sae import SAE
from saelab.steering.curves import MeasureName, SteeringCurve
from saelab.steering.target_concepts import (
    ConceptLike,
    ScoredConcept,
    TargetConcept,
    TokenConcept,
    concept_from_words,
    make_concepts,
)
from saelab.stores.feature_store import FeatureStore
from saelab.stores.jobs import hidden

EditBlock: TypeAlias = Callable[[float], AbstractContextManager]
SteeringSource: TypeAlias = (
    tuple[SAE, Mapping[int, float | int] | int] | Direction | Intervention | Sequence[Intervention] | EditBlock
)
"""An SAE with one feature or weights of several, a direction, interventions whose strengths are weights, or a function
from a strength to a context manager
"""

GRIDS: dict[str, tuple[float, ...]] = {
    "max": (-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0),
    "norm": (-1.6, -0.8, -0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8, 1.6),
}
REPEATED = 4
"""length of the n-grams counted in `repetition`"""
LOGITS = 2**25  # numbers in a batch's logits
ON_PROMPTS = ("lift", "selectivity", "kl")


@dataclass(frozen=True, eq=False)
class Dose:
    """One source of steering at one strength."""

    source: str
    strength: float
    block: Callable[[], AbstractContextManager]
    """returns the context manager inside which the model is steered"""
    description: str
    """description of what is steered, and how"""
    neutral: float
    """the strength that leaves the model unsteered"""


def make_doses(
    model: Model,
    sources: Mapping[str, SteeringSource],
    strengths: Sequence[float | int] | Mapping[str, Sequence[float | int]] | None,
    unit: Unit,
    mode: Mode,
    where: TokenSelection,
    store: FeatureStore | Mapping[str, FeatureStore] | None,
    allow_mismatch: bool = False,
) -> list[Dose]:
    """Every source at every strength, each as a context manager in which the model is steered.

    Args:
        model: language model; sources must match it.
        sources: what to steer, by name; no name may be 'unsteered'.
        strengths: for all sources, or by source; None for the grid of the unit in `GRIDS` (units "max" and "norm" of
            mode "add", "clamp" or "floor").
        unit: of the strengths of SAE features and directions, as in `Intervention`; interventions bring their own.
        mode: the same for their mode; not "ablate", which has no strengths.
        where: tokens that SAE features and directions are steered at.
        store: codes for unit "max", for all sources or by source.
        allow_mismatch: steer SAEs of another model, weight processing or hook point.

    Raises:
        ValueError: for no sources, mode "ablate", missing strengths, and sources that do not match the model.
    """
    if not sources or "unsteered" in sources:
        raise ValueError("`sources` must name at least one, none of them 'unsteered', which is the model as it is.")
    if mode == "ablate":
        raise ValueError("A curve needs strengths, mode 'ablate' has none; use 'scale' with strengths from 0 to 1.")
    found = []
    for name, source in sources.items():
        own = store.get(name) if isinstance(store, Mapping) else store
        interventions = _read_source(source, unit, mode, where, own, allow_mismatch)
        for intervention in interventions:
            intervention.require_match(model)
        for strength in _strengths_of(name, strengths, unit, mode, interventions):
            found.append(_make_dose(model, name, source, interventions, strength))
    return found


def _read_source(
    source: SteeringSource,
    unit: Unit,
    mode: Mode,
    where: TokenSelection,
    store: FeatureStore | None,
    allow_mismatch: bool,
) -> list[Intervention]:
    """Interventions of strength 1; none for a function, which makes its own context manager."""
    if isinstance(source, Direction):
        return [Intervention(source, 1.0, mode, where, unit)]
    if isinstance(source, Intervention):
        return [source]
    if callable(source):
        return []
    first, *rest = source
    if isinstance(first, SAE):
        weights: Any = rest[0] if isinstance(rest[0], Mapping) else {rest[0]: 1.0}
        return [Intervention(first, weights, mode, where, unit, store, allow_mismatch=allow_mismatch)]
    return [one for one in source if isinstance(one, Intervention)]


def _strengths_of(
    name: str, strengths: Any, unit: str, mode: str, interventions: Sequence[Intervention]
) -> list[float]:
    given = strengths.get(name) if isinstance(strengths, Mapping) else strengths
    if given is None:
        given = GRIDS.get(interventions[0].unit if interventions else unit) if mode != "scale" else None
    if not given:
        raise ValueError(f"`strengths` must be given for '{name}': only units {list(GRIDS)} of adding have defaults.")
    return [float(s) for s in dict.fromkeys(given)]


def _make_dose(
    model: Model, name: str, source: SteeringSource, interventions: Sequence[Intervention], strength: float
) -> Dose:
    if not interventions:
        assert callable(source)
        return Dose(name, strength, partial(source, strength), getattr(source, "__name__", "a block"), 0.0)
    scaled = [scale_intervention(one, strength) for one in interventions]
    description = "; ".join(map(describe_intervention, interventions))
    neutral = 1.0 if interventions[0].mode == "scale" else 0.0
    return Dose(name, strength, partial(steer_all, model, scaled), description, neutral)


def scale_intervention(one: Intervention, factor: float) -> Intervention:
    """A copy of an intervention with every strength multiplied by a factor."""
    return replace(one, features={i: factor * float(s) for i, s in _weights_of(one.features).items()})


def _weights_of(features: Any) -> dict[int, float]:
    if isinstance(features, Mapping):
        return dict(features)
    return {0: float(features)} if not isinstance(features, Iterable) else {int(i): 1.0 for i in features}


def describe_intervention(one: Intervention) -> str:
    """An intervention in one line of text.

    >>> describe_intervention(Intervention(Direction(torch.ones(4), "blocks.0.hook_out", "glad"), 2.0))
    'glad +2 (add, raw) at blocks.0.hook_out, all tokens'
    """
    unit = "" if one.mode in ("scale", "ablate") else f", {one.unit}"
    what = ", ".join(_describe_feature(one, i, float(s)) for i, s in _weights_of(one.features).items())
    error = ", error dropped" if one.error == "drop" else ""
    return f"{what or 'reconstruction'} ({one.mode}{unit}{error}) at {one.writes_at}, {_describe_place(one.places)}"


def _describe_feature(one: Intervention, i: int, strength: float) -> str:
    name = one.source.name if isinstance(one.source, Direction) else f"feature {i}"
    amount = {"ablate": "", "scale": f" x {strength:g}", "clamp": f" = {strength:+g}"}
    return name + amount.get(one.mode, f" {strength:+g}")


def _describe_place(where: TokenSelector) -> str:
    rules = {
        str(where.part): where.part != "all",
        "chosen positions": where.positions is not None,
        "a mask": where.tokens is not None,
        "where a condition holds": where.when is not None,
    }
    return " and ".join(rule for rule, holds in rules.items() if holds) or "all tokens"


def log_mass(log_probs: Float[Tensor, "*shape d_vocab"], ids: Int[Tensor, "n"]) -> Float[Tensor, "*shape"]:
    """The log-probability that the next token is one of `ids`, `log sum_{v in ids} p_v`, in nats.

    >>> round(float(log_mass(torch.zeros(8).log_softmax(0), torch.tensor([1, 5])).exp()), 6)
    0.25
    """
    return log_probs[..., ids.to(log_probs.device)].logsumexp(-1)


def entropy(log_probs: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*shape"]:
    """The entropy `-sum_v p_v log p_v` in nats: 0 for a certain token, log(d_vocab) for a uniform distribution.

    >>> round(float(entropy(torch.zeros(8).log_softmax(0))), 4)
    2.0794
    """
    return torch.special.entr(log_probs.exp()).sum(-1)


def repetition(ids: Sequence[int], n: int = REPEATED) -> float:
    """The share of a text's n-grams that occurred in it before, in [0, 1); 0 for a text shorter than n + 1.

    >>> repetition([1, 2, 3, 1, 2, 3], n=2)
    0.4
    """
    grams = _grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """The number of different n-grams over that of all n-grams of several texts, in (0, 1]; NaN where there is none.

    It falls with the number of tokens: compare it among sets of one size.

    >>> distinct([[1, 2], [1, 2]], n=1)
    0.5
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


@torch.no_grad()
def steering_curve(
    model: AnyModel,
    sources: Mapping[str, SteeringSource],
    concept: ConceptLike,
    prompts: Prompts,
    *,
    strengths: Sequence[float | int] | Mapping[str, Sequence[float | int]] | None = None,
    unit: Unit = "norm",
    mode: Mode = "add",
    where: TokenSelection = "all",
    store: FeatureStore | Mapping[str, FeatureStore] | None = None,
    others: Mapping[str, ConceptLike] | None = None,
    n: int = 3,
    n_tokens: int = 40,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    batch_size: int | None = None,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> SteeringCurve:
    """Effect and cost of steering toward a concept, for several sources at several strengths.

    The unsteered model continues each prompt. On these texts and on the prompts the steered predictions are compared
    with the unsteered ones: lift, selectivity, KL. Then each source at each strength generates texts with the same
    sampling seed: rate of the concept, nll under the unsteered model, repetition, distinct n-grams. Definitions are in
    `saelab.steering.dose_response`. A scored concept has a score instead of a lift.

    Args:
        model: language model.
        sources: what to steer, by name: (SAE, feature) or (SAE, {feature: weight}), a `Direction`, interventions (with
            their own unit and mode; strengths multiply theirs), or a function from a strength to a context manager.
            Give weights signs such that positive strengths mean more of the concept: side 1 of the result takes
            positive strengths as raising it, side -1 negative ones as lowering it.
        concept: target: words, a `TokenConcept` or a scoring function, as in `concept_from_words`.
        prompts: texts to continue; take prompts that no choice was made on.
        strengths: for all sources, or by source; by default a grid of halves and doubles for units "norm" and "max".
        unit: of the strengths, as in `Intervention`.
        mode: as in `Intervention`; not "ablate", which has no strengths.
        where: tokens that are steered, as in `steer`.
        store: codes of the SAE for unit "max", one store or one by source.
        others: other concepts of tokens by name, for selectivity; none with a scored concept.
        n: texts for each prompt.
        n_tokens: most tokens generated for each text.
        seed: seed of the sampling, the same for every strength.
        sampling: temperature, top-k and top-p, as in `generate`.
        batch_size: texts scored at a time, which bounds memory; by default so many that their logits are 2^25 numbers.
        allow_mismatch: steer SAEs, given with features, of another model, weight processing or hook point.
        progress: show a progress bar.

    Raises:
        ValueError: for what `concept_from_words` or `steer` refuse, and for prompts that leave no room for text.

    >>> model, up = sl.lm.tiny_model(), sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    >>> curve = steering_curve(model, {"up": up}, "a", "One", strengths=[0], n=2, n_tokens=4)
    >>> curve.values("lift").tolist(), curve.values("kl").tolist()
    ([0.0, 0.0], [0.0, 0.0])
    """
    model = as_model(model)
    target = concept_from_words(model, concept)
    rest = make_concepts(model, others or {})
    if rest and not all(isinstance(one, TokenConcept) for one in [target, *rest]):
        raise ValueError("`others` go with concepts of tokens, got one that is scored; leave `others` out.")
    doses = make_doses(model, sources, strengths, unit, mode, where, store, allow_mismatch)
    texts = list_prompts(prompts)
    table = _Table(model, target, rest, len(doses) + 1, n * len(texts))
    write = partial(generate, model, texts, n_tokens, n=n, seed=seed, sampling=sampling, progress=False)
    with tqdm(total=2 * len(doses), unit="dose", desc="steer", delay=2, disable=hidden(progress)) as bar:
        plain = write()
        longest = max(len(sample.all_ids) for sample in plain)
        size = batch_size or max(1, LOGITS // (longest * model.cfg.d_vocab))
        table.add_texts(0, plain, size)
        table.compare(plain, doses, size, bar)
        for i, dose in enumerate(doses, 1):
            with dose.block():
                steered = write()
            table.add_texts(i, steered, size)
            bar.update()
    by_prompt = (len(doses) + 1, len(texts), n)
    return SteeringCurve(
        concept=target.name,
        others=tuple(one.name for one in rest),
        sources={dose.source: dose.description for dose in doses},
        neutral={dose.source: dose.neutral for dose in doses},
        points=(("unsteered", 0.0), *((dose.source, dose.strength) for dose in doses)),
        cells={name: table.cells[name].reshape(by_prompt) for name in sorted(table.cells)},
        diversity=_find_diversity(table.written, n),
        prompts=tuple(texts),
        n=n,
        seed=seed,
        n_tokens=n_tokens,
        temperature=float(sampling.temperature),
    )


def _find_diversity(written: list[list[list[int]]], n: int) -> dict[MeasureName, np.ndarray]:
    """Distinct n-grams by point and sample number, each over the texts of all prompts with that number."""
    sizes: dict[MeasureName, int] = {"distinct_1": 1, "distinct_2": 2}
    return {
        name: np.array([[distinct(texts[i::n], size) for i in range(n)] for texts in written])
        for name, size in sizes.items()
    }


class _Table:
    """Sums for each point and text; texts are in the order of `generate`, those of one prompt together."""

    def __init__(
        self, model: Model, target: TargetConcept, others: list[TargetConcept], n_points: int, n_texts: int
    ) -> None:
        self.model, self.target = model, target
        self.sets = [one for one in (target, *others) if isinstance(one, TokenConcept)]
        self.special = torch.tensor(find_special_ids(model))
        self.cells: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((n_points, n_texts)))
        self.written: list[list[list[int]]] = []
        """generated tokens for each point and text, without special ones"""

    def add_texts(self, point: int, made: Generation, size: int) -> None:
        """Count concept tokens and repetitions in generated texts, and score the texts under the unsteered model."""
        special = set(self.special.tolist())
        words = [[i for i in sample.ids if i not in special] for sample in made]
        self.written.append(words)
        found: dict[str, list[float]] = {"n_texts": [1.0] * len(made), "n_words": [float(len(row)) for row in words]}
        found["repetition"] = [repetition(row) for row in words]
        if isinstance(self.target, TokenConcept):
            found["hits"] = [float(sum(i in self.target.ids for i in row)) for row in words]
            found["held"] = [float(n > 0) for n in found["hits"]]
        else:
            found["score"] = _score(self.target, made)
        for name, values in found.items():
            self.cells[name][point] = values
        for rows, batch in _batches(made, size):
            read = _read(self.model, batch)
            log_probs = read.logits.float().log_softmax(-1).gather(2, read.ids[..., None])[..., 0]
            self._add("nll", point, rows, read.mask, -log_probs[read.mask])
            self._add("n_written", point, rows, read.mask, None)

    def compare(self, plain: Generation, doses: Sequence[Dose], size: int, bar: Any) -> None:
        """Compare predictions with and without steering on the prompts and on the unsteered model's texts."""
        for rows, batch in _batches(plain, size):
            before = _read(self.model, batch)
            self._add_terms(0, rows, before, before)
            for point, dose in enumerate(doses, 1):
                with dose.block():
                    after = _read(self.model, batch)
                self._add_terms(point, rows, before, after)
                bar.update((rows.stop - rows.start) / len(plain))

    def _add_terms(self, point: int, rows: slice, before: Continuations, after: Continuations) -> None:
        kept = before.prompt_mask & ~torch.isin(before.prompt_ids, self.special.to(before.prompt_ids.device))
        p, q = (one.logits[before.mask].float() for one in (before, after))
        for name, values in self._terms(p, q).items():
            self._add(name, point, rows, before.mask, values)
        p, q = (one.prompt_logits[kept].float() for one in (before, after))
        for name, values in self._terms(p, q).items():
            if name in ON_PROMPTS:
                self._add(f"prompt_{name}", point, rows, kept, values)
        self._add("n_text", point, rows, before.mask, None)
        self._add("n_prompt", point, rows, kept, None)

    def _terms(self, p: Float[Tensor, "n d_vocab"], q: Float[Tensor, "n d_vocab"]) -> dict[str, Float[Tensor, "n"]]:
        """Measures of each prediction, from unsteered and steered logits."""
        log_p, log_q = p.log_softmax(1), q.log_softmax(1)
        terms = {"kl": kl_divergence(p, q), "entropy": entropy(log_q)}
        lifts = []
        for i, one in enumerate(self.sets):
            ids = torch.tensor(one.ids)
            mass = log_mass(log_q, ids)
            lifts.append(mass - log_mass(log_p, ids))
            terms[f"mass {one.name}" if i else "mass"] = mass.exp()
        if lifts:
            terms["lift"] = lifts[0]
        if len(lifts) > 1:
            terms["selectivity"] = lifts[0] - torch.stack(lifts[1:]).mean(0)
        return terms

    def _add(self, name: str, point: int, rows: slice, mask: Bool[Tensor, "batch n"], values: Tensor | None) -> None:
        """Add sums over each text's tokens; numbers of tokens where no values are given."""
        sums = torch.zeros(mask.shape, dtype=torch.float64)
        sums[mask.cpu()] = 1.0 if values is None else values.cpu().double()
        self.cells[name][point, rows] = sums.sum(1).numpy()


def _read(model: Model, batch: Sequence[Generated]) -> Continuations:
    return read_continuations(model, [sample.prompt_ids for sample in batch], [sample.ids for sample in batch])


def _batches(made: Generation, size: int) -> Iterator[tuple[slice, list[Generated]]]:
    for first in range(0, len(made), size):
        batch = list(made.samples[first : first + size])
        yield slice(first, first + len(batch)), batch


def _score(concept: ScoredConcept, made: Generation) -> list[float]:
    """Scores of a user's function, one for each text."""
    found = [float(x) for x in concept.scorer([sample.text for sample in made])]
    if len(found) != len(made) or not np.isfinite(found).all():
        raise ValueError(
            f"A scorer must return a finite number for each of the {len(made)} texts, '{concept.name}' returned "
            f"{len(found)} numbers or one that is not finite."
        )
    return found
