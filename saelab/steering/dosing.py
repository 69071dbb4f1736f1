"""`steering_curve`: effect and cost of steering toward a concept, over strengths, sources and sampled texts."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from saelab.functional.metrics import kl_divergence
from saelab.lm.continuations import Continuations, read_continuations
from saelab.lm.generation import Generated, Generation, generate
from saelab.lm.models import Model
from saelab.lm.special import find_special_ids
from saelab.lm.text import list_prompts
from saelab.steering.aims import Aim, Concept, ScoredConcept, TokenConcept, make_concept, make_concepts
from saelab.steering.curves import SteeringCurve
from saelab.steering.doses import Dose, Source, make_doses
from saelab.steering.interventions import Mode, Unit
from saelab.steering.measures import distinct, entropy, log_mass, repetition
from saelab.steering.places import Place
from saelab.stores.features import FeatureStore
from saelab.stores.progress import hidden

LOGITS = 2**25  # numbers in a batch's logits
ON_PROMPTS = ("lift", "selectivity", "kl")


@torch.no_grad()
def steering_curve(
    model: Model,
    sources: Mapping[str, Source],
    concept: Aim,
    prompts: str | Sequence[str],
    *,
    strengths: Sequence[float | int] | Mapping[str, Sequence[float | int]] | None = None,
    unit: Unit = "norm",
    mode: Mode = "add",
    where: Place = "all",
    store: FeatureStore | Mapping[str, FeatureStore] | None = None,
    others: Mapping[str, Aim] | None = None,
    n: int = 3,
    n_tokens: int = 40,
    seed: int = 0,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int | None = None,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> SteeringCurve:
    """Effect and cost of steering toward a concept, for several sources at several strengths.

    The unsteered model continues each prompt. On these texts and on the prompts the steered predictions are compared
    with the unsteered ones: lift, selectivity, KL. Then each source at each strength generates texts with the same
    sampling seed: rate of the concept, nll under the unsteered model, repetition, distinct n-grams. Definitions are in
    `saelab.steering.measures`. A scored concept has a score instead of a lift.

    Args:
        model: language model.
        sources: what to steer, by name: (SAE, feature) or (SAE, {feature: weight}), a `Direction`, interventions (with
            their own unit and mode; strengths multiply theirs), or a function from a strength to a context manager.
            Give weights signs such that positive strengths mean more of the concept: side 1 of the result takes
            positive strengths as raising it, side -1 negative ones as lowering it.
        concept: target: words, a `TokenConcept` or a scoring function, as in `make_concept`.
        prompts: texts to continue; take prompts that no choice was made on.
        strengths: for all sources, or by source; by default a grid of halves and doubles for units "norm" and "max".
        unit: of the strengths, as in `Intervention`.
        mode: as in `Intervention`; not "ablate", which has no strengths.
        where: tokens that are steered, as in `steer`.
        store: codes of the SAE for unit "max", one store or one by source.
        others: other concepts of tokens by name, for selectivity; none with a scored concept.
        n: texts for each prompt.
        n_tokens: most tokens generated for each text.
        seed: of the sampling, the same for every strength.
        temperature: of the sampling; 0 takes the most likely token.
        top_k: sample from this many most likely tokens; None for all.
        top_p: sample from the most likely tokens that together have this probability; None for all.
        batch_size: texts scored at a time, which bounds memory; by default so many that their logits are 2^25 numbers.
        allow_mismatch: steer SAEs, given with features, of another model, weight processing or hook point.
        progress: show a progress bar.

    Raises:
        ValueError: for what `make_concept` or `steer` refuse, and for prompts that leave no room for text.

    >>> model, up = sl.tiny_model(), sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    >>> curve = steering_curve(model, {"up": up}, "a", "One", strengths=[0], n=2, n_tokens=4)
    >>> curve.values("lift").tolist(), curve.values("kl").tolist()
    ([0.0, 0.0], [0.0, 0.0])
    """
    target = make_concept(model, concept)
    rest = make_concepts(model, others or {})
    if rest and not all(isinstance(one, TokenConcept) for one in [target, *rest]):
        raise ValueError("`others` go with concepts of tokens, got one that is scored; leave `others` out.")
    doses = make_doses(model, sources, strengths, unit, mode, where, store, allow_mismatch)
    texts = list_prompts(prompts)
    table = _Table(model, target, rest, len(doses) + 1, n * len(texts))
    writing = {"n": n, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "progress": False}
    with tqdm(total=2 * len(doses), unit="dose", desc="steer", delay=2, disable=hidden(progress)) as bar:
        plain = generate(model, texts, n_tokens, **writing)  # type: ignore[arg-type]
        longest = max(len(sample.all_ids) for sample in plain)
        size = batch_size or max(1, LOGITS // (longest * model.cfg.d_vocab))
        table.add_texts(0, plain, size)
        table.compare(plain, doses, size, bar)
        for i, dose in enumerate(doses, 1):
            with dose.block():
                steered = generate(model, texts, n_tokens, **writing)  # type: ignore[arg-type]
            table.add_texts(i, steered, size)
            bar.update()
    by_prompt = (len(doses) + 1, len(texts), n)
    return SteeringCurve(
        concept=target.name,
        others=tuple(one.name for one in rest),
        sources={dose.source: dose.told for dose in doses},
        neutral={dose.source: dose.neutral for dose in doses},
        points=(("unsteered", 0.0), *((dose.source, dose.strength) for dose in doses)),
        cells={name: table.cells[name].reshape(by_prompt) for name in sorted(table.cells)},
        diversity=_find_diversity(table.written, n),
        prompts=tuple(texts),
        n=n,
        seed=seed,
        n_tokens=n_tokens,
        temperature=float(temperature),
    )


def _find_diversity(written: list[list[list[int]]], n: int) -> dict[str, np.ndarray]:
    """Distinct n-grams by point and sample number, each over the texts of all prompts with that number."""
    return {
        f"distinct_{size}": np.array([[distinct(texts[i::n], size) for i in range(n)] for texts in written])
        for size in (1, 2)
    }


class _Table:
    """Sums for each point and text; texts are in the order of `generate`, those of one prompt together."""

    def __init__(self, model: Model, target: Concept, others: list[Concept], n_points: int, n_texts: int) -> None:
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
