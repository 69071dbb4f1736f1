"""`score_disentanglement`: do features carry one attribute of a prompt without the others? (RAVEL, arXiv:2402.17700).

The features chosen for an attribute are patched from a source prompt into a base prompt: an answer that tells this
attribute should become the source's (cause), one that tells another should stay the base's (isolation).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evaluation.sparse_control import ORIGINAL, EditTask, encode_rows, pool_versions, read_rows
from saelab.evaluation.supervised_dictionary import (
    Attributes,
    SupervisedDictionary,
    fit_supervised_dictionary,
    mark_values,
)
from saelab.functional.metrics import exact
from saelab.functional.statistics import fit_probe
from saelab.sae.baselines import check_baselines
from saelab.sae.initialization import prepare
from saelab.sae.sae import SAE
from saelab.stores.results import Result, format_table

NS = (1, 2, 4, 8, 16, 32, 64, 128)
SHOWN = 10
SUPERVISED, WHOLE, SHUFFLED = "supervised", "whole activation", "shuffled"
OWN = ("random", "untrained", "neurons", "pca", SHUFFLED, SUPERVISED, WHOLE)


@dataclass(frozen=True, kw_only=True)
class AttributePatch:
    """What patching the features of one attribute does to answers, on held-out prompts."""

    attribute: str
    cause: dict[int, float]
    """by number of features a place: share of the prompts asking this attribute that answer as the source; NaN for
    none
    """
    isolation: dict[int, float]
    """by number: share of the prompts asking another attribute that answer as the base; NaN for none"""
    n_cause: int
    n_isolation: int
    features: tuple[tuple[int, ...], ...] = ()
    """the first features chosen, for each place"""


@dataclass(frozen=True, kw_only=True)
class DisentanglementScores(Result):
    """Result of `score_disentanglement`: one row for each attribute, and the same of baselines."""

    hook_point: str
    places: tuple[str, ...]
    """names of the positions patched"""
    ns: tuple[int, ...]
    rows: tuple[AttributePatch, ...]
    n_prompts: int
    """base prompts, each patched from one source"""
    n_left_out: int
    """prompts that the model answers wrong, or that have no source of another answer"""
    n_train: int
    """training prompts, all versions counted"""
    baselines: "dict[str, DisentanglementScores]" = field(default_factory=dict)
    """other dictionaries by name; "whole activation" patches all there is, "shuffled" are features chosen by attributes
    that were exchanged among prompts
    """

    @property
    def cause(self) -> dict[int, float]:
        """Mean over attributes that prompts ask for, by number of features; NaN for none."""
        return self._average("cause")

    @property
    def isolation(self) -> dict[int, float]:
        """Mean over attributes that have one, by number of features; NaN for none."""
        return self._average("isolation")

    @property
    def scores(self) -> dict[int, float]:
        """Disentangle score, (cause + isolation) / 2, by number of features; 0.5 for patching nothing or everything."""
        return {n: (self.cause[n] + self.isolation[n]) / 2 for n in self.ns}

    def _average(self, name: str) -> dict[int, float]:
        found = {n: [value for row in self.rows if not math.isnan(value := getattr(row, name)[n])] for n in self.ns}
        return {n: sum(values) / len(values) if values else math.nan for n, values in found.items()}

    def __str__(self) -> str:
        lines = [
            f"{self.hook_point} at {', '.join(self.places)}: {self.n_prompts:,} prompts ({self.n_left_out} left out), "
            f"features chosen on {self.n_train:,} others",
            "disentangle score (cause, isolation) by features patched a place; 0.5 for nothing and for everything",
        ]
        table = [["", *(f"n={n}" for n in self.ns)]]
        for name, each in {"SAE": self, **self.baselines}.items():
            cells = [f"{s:.3f} ({each.cause[n]:.2f}, {each.isolation[n]:.2f})" for n, s in each.scores.items()]
            table.append([name, *cells])
        lines += [*format_table(table), ""]
        table = [["cause, isolation of the SAE", *(f"n={n}" for n in self.ns), "features"]]
        for row in self.rows:
            cells = [f"{row.cause[n]:.3f}, {row.isolation[n]:.3f}" for n in self.ns]
            chosen = " / ".join(" ".join(map(str, some)) for some in row.features)
            table.append([row.attribute, *cells, chosen])
        return "\n".join([*lines, *format_table(table, left=(0, len(table[0]) - 1))])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, the scores and their parts, as JSON values."""
        parts = {name: getattr(self, name) for name in ("scores", "cause", "isolation")}
        means = {name: {str(n): value for n, value in part.items()} for name, part in parts.items()}
        return super().to_dict() | means | {"baselines": {name: b.to_dict() for name, b in self.baselines.items()}}


def score_disentanglement(
    sae: SAE,
    task: EditTask,
    train: EditTask,
    *,
    ns: Sequence[int] = NS,
    seed: int = 0,
    baselines: bool | Mapping[str, SAE] = True,
    allow_mismatch: bool = False,
) -> DisentanglementScores:
    """How far features carry one attribute of prompts without the others, by patching them (RAVEL).

    With F_a the features chosen for attribute a at each place, codes z of a base prompt and z' of its source, and
    errors kept, the base prompt runs with

        x + sum over i in F_a of (z'_i - z_i) d_i

        cause(a)      share of the prompts asking a that answer with the source's value
        isolation(a)  share of the prompts asking another attribute that answer as before
        score         (mean cause + mean isolation) / 2

    A prompt's source is another prompt, drawn among those with another value of the attribute that is asked. Both must
    be answered right. F_a are up to n features with the largest positive effect on a linear probe w of a's values,
    `mean over pairs of (z'_i - z_i) <w[value'] - w[value], d_i>` on training prompts of all versions, not the mask that
    RAVEL trains. Codes are patched whole, whatever their sign. Source: arXiv:2402.17700.

    Args:
        sae: the SAE.
        task: prompts to score on, with `asks`; only the original version is used.
        train: other prompts of the task, for probes, choices and baselines.
        ns: numbers of features patched at each place; an attribute of many values needs as many.
        seed: of the pairs, the samples and the random directions.
        baselines: whether to score a random and an untrained dictionary, neurons, principal components, and features
            chosen by exchanged attributes; a supervised dictionary, the ceiling, of which all rows of an attribute are
            patched; and the whole activation, the ceiling of cause. Further SAEs by name.
        allow_mismatch: go ahead with SAEs of another model, weight processing or hook point than the task's.

    Raises:
        ValueError: for tasks without `asks`, values that two tokens answer, no prompt with a source, and SAEs that
            `evaluate_sparse_control` refuses.
    """
    given = dict(baselines) if isinstance(baselines, Mapping) else {}
    check_baselines(given, sae.cfg, OWN)
    for each in (sae, *given.values()):
        task.match(each, allow_mismatch)
    generator = torch.Generator().manual_seed(seed)
    pairs = _SourcePairs.draw(task, train, generator)
    x, known = pool_versions(train)
    chooser = _AttributeProbe.fit(x, known, torch.randperm(len(x), generator=generator))

    def wrap(rows: tuple[AttributePatch, ...], others: dict[str, DisentanglementScores]) -> DisentanglementScores:
        return DisentanglementScores(
            hook_point=task.hook_point,
            places=task.place_names,
            ns=tuple(ns),
            rows=rows,
            n_prompts=int(pairs.counts.sum()),
            n_left_out=int((~pairs.counts).sum()),
            n_train=len(x),
            baselines=others,
        )

    coders = {"SAE": _Coder.of(sae, x)}
    rows = {"SAE": pairs.score_features(coders["SAE"], chooser, ns)}
    if baselines is not False:
        sample, cfg = x.flatten(0, 1), replace(sae.cfg, dictionary="unit")
        saes = {"random": prepare(replace(cfg, init="tied"), sample, seed)}
        saes |= {"untrained": prepare(replace(cfg, init="data"), sample, seed)} | given
        coders = {name: _Coder.of(each, x) for name, each in saes.items()}
        coders |= {"neurons": _Coder.neurons(x), "pca": _Coder.components(x)}
        rows |= {name: pairs.score_features(coder, chooser, ns) for name, coder in coders.items()}
        order = torch.randperm(len(x), generator=generator).tolist()
        moved = _AttributeProbe.fit(x, [known[i] for i in order], chooser.sources)
        rows[SHUFFLED] = pairs.score_features(_Coder.of(sae, x), moved, ns)
        rows[SUPERVISED] = pairs.score_supervised(x, known, ns)
        rows[WHOLE] = pairs.score(lambda _attribute, _n: pairs.delta, ns)
    return wrap(rows.pop("SAE"), {name: wrap(each, {}) for name, each in rows.items()})


@dataclass(frozen=True, eq=False)
class _Coder:
    """Codes and decoder rows of one dictionary, the same at every place."""

    encode: Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n n_features"]]
    rows: Float[Tensor, "n_features d_in"]

    @classmethod
    def of(cls, sae: SAE, x: Float[Tensor, "n n_places d_in"]) -> "_Coder":
        return cls(partial(encode_rows, sae), read_rows(sae, x[:1, 0]))

    @classmethod
    def neurons(cls, x: Float[Tensor, "n n_places d_in"]) -> "_Coder":
        return cls(torch.clone, torch.eye(x.shape[2]))

    @classmethod
    def components(cls, x: Float[Tensor, "n n_places d_in"]) -> "_Coder":
        """Principal components of all places."""
        centered = exact(x.flatten(0, 1))
        centered = centered - centered.mean(0)
        rows = torch.linalg.eigh(centered.T @ centered).eigenvectors.T.float()
        return cls(lambda each: each @ rows.T, rows)


@dataclass(frozen=True, eq=False)
class _AttributeProbe:
    """Training prompts, the source of each, and what a linear probe of the attributes says of each pair."""

    x: Float[Tensor, "n n_places d_in"]
    sources: Int[Tensor, "n"]
    pulls: dict[str, Float[Tensor, "n n_places d_in"]]
    """by attribute, the probe's weights of the source's value less those of the base's"""

    @classmethod
    def fit(
        cls, x: Float[Tensor, "n n_places d_in"], known: Sequence[Attributes], sources: Int[Tensor, "n"]
    ) -> "_AttributeProbe":
        truth = {name: torch.from_numpy(marks).float() for name, marks in mark_values(known).items()}
        widths, labels = [marks.shape[1] for marks in truth.values()], torch.cat(list(truth.values()), 1)
        weights = [fit_probe(part, labels, standardize=True).weight for part in x.unbind(1)]
        by_attribute = torch.stack(weights, 1).split(widths)  # (n_values, n_places, d_in) each
        steps = {name: marks[sources] - marks for name, marks in truth.items()}
        pulls = {
            name: torch.einsum("nv,vpd->npd", step, part)
            for (name, step), part in zip(steps.items(), by_attribute, strict=True)
        }
        return cls(x, sources, pulls)

    def choose(self, coder: _Coder) -> dict[str, tuple[Int[Tensor, "n_chosen"], ...]]:
        """By attribute, for each place, the features with a positive effect on its probe, the largest first."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.pulls}
        for place, part in enumerate(self.x.unbind(1)):
            z = coder.encode(part)
            steps = z[self.sources] - z
            for name, pull in self.pulls.items():
                effects = (steps * (pull[:, place] @ coder.rows.T)).mean(0)
                order = effects.argsort(descending=True, stable=True)
                found[name].append(order[: int((effects > 0).sum())])
        return {name: tuple(places) for name, places in found.items()}


@dataclass(frozen=True, eq=False)
class _SourcePairs:
    """Base prompts, each with a source prompt whose features are patched in."""

    task: EditTask
    sources: Int[Tensor, "n_prompts"]
    """number of each prompt's source; the prompt itself where it has none"""
    counts: Bool[Tensor, "n_prompts"]
    """prompts that have a source"""
    wanted: Int[Tensor, "n_prompts"]
    """the token of the source's value of the attribute that the base asks"""

    @classmethod
    def draw(cls, task: EditTask, train: EditTask, generator: torch.Generator) -> "_SourcePairs":
        if not task.asks or not train.asks:
            raise ValueError("Both tasks must say what their prompts ask, got no `asks`; give the attribute of each.")
        tokens: dict[tuple[str, str], int] = {}
        for each in (train, task):
            for asked, one, answer in zip(each.asks, each.attributes[ORIGINAL], each.answers.tolist(), strict=True):
                if tokens.setdefault((asked, one[asked]), answer) != answer:
                    raise ValueError(
                        f"A value must have one token as answer, got {tokens[asked, one[asked]]} and {answer} for "
                        f"{asked} '{one[asked]}'."
                    )
        known = task.attributes[ORIGINAL]
        answers = {asked: torch.tensor([tokens.get((asked, one[asked]), -1) for one in known]) for asked in task.asks}
        wanted = torch.stack([answers[asked] for asked in task.asks])  # (base, source)
        right = task.predict().argmax(1) == task.answers
        able = right & right[:, None] & (wanted != task.answers[:, None]) & (wanted >= 0)
        counts = able.any(1)
        if not counts.any():
            raise ValueError(
                f"Some prompts must be answered right and have a source with another answer, got none of {len(task)} "
                f"({int(right.sum())} answered right)."
            )
        able = able | (torch.eye(len(task), dtype=torch.bool) & ~counts)
        sources = torch.multinomial(able.float(), 1, generator=generator)[:, 0]
        return cls(task, sources, counts, wanted[torch.arange(len(task)), sources])

    @property
    def delta(self) -> Float[Tensor, "n_prompts n_places d_in"]:
        """Activations of the sources less those of the bases."""
        x = self.task.activations[ORIGINAL]
        return x[self.sources] - x

    def score_features(self, coder: _Coder, chooser: _AttributeProbe, ns: Sequence[int]) -> tuple[AttributePatch, ...]:
        """Scores of a dictionary's features, chosen on training prompts."""
        chosen = chooser.choose(coder)
        codes = [coder.encode(part) for part in self.task.activations[ORIGINAL].unbind(1)]
        steps = [z[self.sources] - z for z in codes]

        def change(attribute: str, n: int) -> Tensor:
            places = zip(steps, chosen[attribute], strict=True)
            return torch.stack([step[:, some[:n]] @ coder.rows[some[:n]] for step, some in places], 1)

        found = self.score(change, ns)
        shown = [tuple(tuple(some[:SHOWN].tolist()) for some in chosen[row.attribute]) for row in found]
        return tuple(replace(row, features=features) for row, features in zip(found, shown, strict=True))

    def score_supervised(
        self, x: Float[Tensor, "n n_places d_in"], known: Sequence[Attributes], ns: Sequence[int]
    ) -> tuple[AttributePatch, ...]:
        """Scores of the vectors of each attribute, fitted to training prompts."""
        fits = [fit_supervised_dictionary(part, known, "least-squares") for part in x.unbind(1)]
        bases = self.task.attributes[ORIGINAL]

        def change(attribute: str, _n: int) -> Tensor:
            after = [
                {**base, attribute: bases[source][attribute]}
                for base, source in zip(bases, self.sources.tolist(), strict=True)
            ]
            return torch.stack([_move(fit, bases, after) for fit in fits], 1)

        return self.score(change, ns)

    def score(
        self, change: Callable[[str, int], Float[Tensor, "n_prompts n_places d_in"]], ns: Sequence[int]
    ) -> tuple[AttributePatch, ...]:
        """A row for each attribute; `change` gives the change of activations by attribute and number of features."""
        x, rows = self.task.activations[ORIGINAL], []
        for attribute in self.task.attributes[ORIGINAL][0]:
            asked = torch.tensor([name == attribute for name in self.task.asks])
            cause, isolation = dict[int, float](), dict[int, float]()
            before, guess = None, self.task.answers
            for n in ns:
                moved = change(attribute, n)
                if before is None or not torch.equal(moved, before):  # no more features than for the n before
                    before, guess = moved, self.task.predict(x + moved).argmax(1)
                cause[n] = _share(guess == self.wanted, self.counts & asked)
                isolation[n] = _share(guess == self.task.answers, self.counts & ~asked)
            n_cause, n_others = int((self.counts & asked).sum()), int((self.counts & ~asked).sum())
            rows.append(
                AttributePatch(
                    attribute=attribute, cause=cause, isolation=isolation, n_cause=n_cause, n_isolation=n_others
                )
            )
        return tuple(rows)


def _move(fit: SupervisedDictionary, before: Sequence[Attributes], after: Sequence[Attributes]) -> Tensor:
    return (fit.encode(after) - fit.encode(before)) @ fit.rows


def _share(hits: Bool[Tensor, "n"], among: Bool[Tensor, "n"]) -> float:
    return float(hits[among].float().mean()) if among.any() else math.nan
