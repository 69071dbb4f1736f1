"""`score_scr` and `score_tpp`: whether the features that a probe points to carry one concept alone (arXiv:2411.18895).

Spurious correlation removal (SCR) ablates features of a concept until a probe that took it for another works again.
Targeted probe perturbation (TPP) ablates features of a concept: its probe should fail, and those of others should not.
A study of reliability (arXiv:2605.18229) found both to disagree with a known truth: SCR at large n, TPP with training.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.coded_tokens import CodedTokens, code_baselines
from saelab.evaluation.feature_classifiers import SAMPLE_TOKENS
from saelab.functional.statistics import balanced_accuracy, fit_probe, permute_labels
from saelab.lm.hooks import require_finite
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents
from saelab.stores.results import Result, format_table

NS = (2, 5, 10, 20, 50)
SMALLEST_GAP = 0.001  # between two accuracies, for their ratio to mean something
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ConceptEdit:
    """Held-out accuracy of a concept's probe before and after features were ablated; 0.5 is chance."""

    concept: str
    """whose probe is read"""
    ablated: str
    """whose features are ablated: for TPP the same concept, for SCR the other one of the pair"""
    before: float = math.nan
    """accuracy without ablation; for SCR that of the biased probe"""
    clean: float = math.nan
    """accuracy of a probe from balanced training tokens; for TPP the same as `before`"""
    after: dict[int, float] = field(default_factory=dict)
    """accuracy by number of features ablated"""
    others: dict[int, float] = field(default_factory=dict)
    """TPP: by number, how much the accuracy of other concepts' probes fell, on average"""
    scores: dict[int, float] = field(default_factory=dict)
    """SCR or TPP by number"""
    features: tuple[str, ...] = ()
    """the first features with the sign of their codes"""
    reason: str = ""
    """why there are no scores"""


@dataclass(frozen=True, kw_only=True)
class ConceptEditScores(Result):
    """Result of `score_scr` or `score_tpp`: one row for each concept or pair, and the same scores of baselines."""

    metric: str
    """"SCR" or "TPP"."""
    ns: tuple[int, ...]
    rows: tuple[ConceptEdit, ...]
    n_train: int
    """training tokens"""
    n_tokens: int
    """held-out tokens"""
    baselines: "dict[str, ConceptEditScores]" = field(default_factory=dict)
    """other dictionaries by name; "shuffled" are features chosen by probes of permuted labels"""

    @property
    def means(self) -> dict[int, float]:
        """Mean score over rows that have one, by number of features ablated; higher is better."""
        rows = [row for row in self.rows if not row.reason]
        return {n: float(np.mean([row.scores[n] for row in rows])) if rows else math.nan for n in self.ns}

    def __str__(self) -> str:
        best = {"SCR": "1 at best, 0 no better than before", "TPP": "0.5 at best, 0 for no or every concept alike"}
        lines = [
            f"{self.metric} by number of features ablated ({best[self.metric]}), {self.n_tokens:,} held-out tokens; "
            "known to be unreliable, see arXiv:2605.18229"
        ]
        table = [["mean", *(f"n={n}" for n in self.ns)]]
        for name, scores in {"SAE": self, **self.baselines}.items():
            table.append([name, *(f"{value:.3f}" for value in scores.means.values())])
        lines += [*format_table(table), ""]
        table = [["probe", "ablated", "before", "clean", *(f"n={n}" for n in self.ns), "features"]]
        for row in self.rows:
            if not row.reason:
                cells = [f"{value:.3f}" for value in (row.before, row.clean, *row.scores.values())]
                table.append([row.concept, row.ablated, *cells, " ".join(row.features)])
        lines += format_table(table, left=(0, 1, len(table[0]) - 1))
        return "\n".join([*lines, *(f"{row.concept}, {row.ablated}: {row.reason}" for row in self.rows if row.reason)])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name and the means, ready for JSON."""
        baselines = {name: scores.to_dict() for name, scores in self.baselines.items()}
        return super().to_dict() | {"means": {str(n): v for n, v in self.means.items()}, "baselines": baselines}


def score_tpp(
    sae: SAE,
    acts: Float[Tensor, "n_tokens d_in"],
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    concepts: Sequence[str] | None = None,
    ns: Sequence[int] = NS,
    train_frac: float = 0.5,
    min_count: int = 20,
    seed: int = 0,
    baselines: bool | Mapping[str, SAE] = True,
) -> ConceptEditScores:
    """Targeted probe perturbation (TPP) of concepts, in held-out documents.

    With A_j the balanced accuracy of a logistic regression for concept j on activations, and A_j|i that with the n
    features of concept i set to 0, errors kept:

        TPP_n(i) = (A_i - A_i|i) - mean over j != i of (A_j - A_j|i)

    The features of i are those with the largest positive `max(mean code where i is true - mean where not, 0) <w_i, d>`.
    The sides of signed features count as features. At best 0.5: the probe of i at chance, all others as before. Source:
    arXiv:2411.18895.

    Args:
        sae: the SAE.
        acts: activations of the tokens.
        labels: which concepts are true of each token, as `TokenLabels.of` reads them.
        doc_ids: document of each token, needed where the labels do not have them; documents are split as a whole.
        concepts: names of two labels at least; None is all.
        ns: numbers of features to ablate.
        train_frac: share of documents for training.
        min_count: fewest tokens of a concept on either side of the split.
        seed: of the split, of samples and of baselines.
        baselines: whether to score a random and an untrained dictionary, neurons, and shuffled labels as well; further
            SAEs by name.

    Raises:
        ValueError: for sizes that disagree, a number of features below 1, unknown concepts, fewer than two of them that
            have enough tokens, and an SAE whose features have no fixed directions.
    """
    _check_numbers(ns)
    data = _Data.read(acts, labels, doc_ids, concepts, train_frac, seed)
    halves = data.y[data.is_train], data.y[~data.is_train]
    counts = np.min([count for y in halves for count in (y.sum(0), (~y).sum(0))], 0)
    if (counts >= min_count).sum() < 2:
        raise ValueError(
            f"Two concepts must have {min_count} tokens on either side, got {int((counts >= min_count).sum())}."
        )
    few = [
        ConceptEdit(
            concept=name,
            ablated=name,
            reason=f"fewer than {min_count} tokens with it, or without it, in training or held-out documents",
        )
        for name, n in zip(data.names, counts, strict=True)
        if n < min_count
    ]
    task = _Targeted.make(data.select(np.flatnonzero(counts >= min_count)), ns)

    def score(coded: CodedTokens, moved: np.ndarray) -> tuple[ConceptEdit, ...]:
        return (*task.score(coded, moved), *few)

    return task.data.compare("TPP", sae, ns, score, baselines)


def score_scr(
    sae: SAE,
    acts: Float[Tensor, "n_tokens d_in"],
    labels: LabelsLike,
    pairs: Sequence[tuple[str, str]],
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    ns: Sequence[int] = NS,
    train_frac: float = 0.5,
    min_count: int = 20,
    seed: int = 0,
    baselines: bool | Mapping[str, SAE] = True,
) -> ConceptEditScores:
    """Spurious correlation removal (SCR) for pairs of concepts, in held-out documents.

    A biased probe for concept a is trained where a and b are both true or both false, so that it may take b for a; a
    clean one on as many tokens of each of the four cases. With A the mean accuracy on the four cases in held-out
    documents, and A_n that of the biased probe with the n features of b set to 0, errors kept:

        SCR_n = (A_n - A_biased) / (A_clean - A_biased)

    The features of b are those with the largest `|(mean code where b is true - mean where not) <w_b, d>|`, w_b the
    probe of b from tokens of all four cases. Of the two directions, a of b and b of a, the one whose biased probe is
    less accurate is scored. Source: arXiv:2411.18895.

    Args:
        sae: the SAE.
        acts: activations of the tokens.
        labels: which concepts are true of each token, as `TokenLabels.of` reads them.
        pairs: names of two concepts that occur in all four combinations.
        doc_ids: document of each token, needed where the labels do not have them; documents are split as a whole.
        ns: numbers of features to ablate.
        train_frac: share of documents for training.
        min_count: fewest tokens of each of the four cases, on either side of the split.
        seed: of the split, of samples and of baselines.
        baselines: whether to score a random and an untrained dictionary, neurons, and shuffled labels as well; further
            SAEs by name.

    Raises:
        ValueError: for sizes that disagree, a number of features below 1, unknown concepts, and an SAE whose features
            have no fixed directions.
    """
    _check_numbers(ns)
    data = _Data.read(
        acts, labels, doc_ids, list(dict.fromkeys(name for pair in pairs for name in pair)), train_frac, seed
    )
    biased = [_Biased.make(data, *pair, min_count) for pair in pairs]

    def score(coded: CodedTokens, moved: np.ndarray) -> tuple[ConceptEdit, ...]:
        return tuple(one.score(data, coded, moved, ns) for one in biased)

    return data.compare("SCR", sae, ns, score, baselines)


def _check_numbers(ns: Sequence[int]) -> None:
    if not ns or min(ns) < 1:
        raise ValueError(f"`ns` must be numbers of features of at least 1, got {tuple(ns)}.")


@dataclass(frozen=True, eq=False)
class _Data:
    """Activations and labels of the tokens, split by document."""

    x: Float[Tensor, "n_tokens d_in"]
    y: Bool[np.ndarray, "n_tokens n_concepts"]
    names: tuple[str, ...]
    documents: Shaped[np.ndarray, "n_tokens"]
    is_train: Bool[np.ndarray, "n_tokens"]
    seed: int

    @classmethod
    def read(
        cls, acts: Tensor, labels: LabelsLike, doc_ids: Any, concepts: Any, train_frac: float, seed: int
    ) -> "_Data":
        given = TokenLabels.of(labels, doc_ids=doc_ids)
        if len(acts) != given.n_tokens:
            raise ValueError(f"`acts` must have a row for each of the {given.n_tokens} tokens, got {len(acts)}.")
        names = tuple(given.find(name) for name in (given.names if concepts is None else concepts))
        documents = given.require_documents()
        y = np.stack([given[name].flatten().numpy() for name in names], 1)
        require_finite("acts", acts)
        return cls(acts.float().cpu(), y, names, documents, split_documents(documents, train_frac, seed), seed)

    def select(self, columns: Int[np.ndarray, "n"]) -> "_Data":
        """The same with some of the concepts."""
        names = tuple(self.names[i] for i in columns)
        return _Data(self.x, self.y[:, columns], names, self.documents, self.is_train, self.seed)

    def compare(
        self, metric: str, sae: SAE, ns: Sequence[int], score: Any, baselines: bool | Mapping[str, SAE]
    ) -> ConceptEditScores:
        """Scores of an SAE and of its baselines; `score` takes codes, and the labels that features are chosen for."""

        def wrap(rows: tuple[ConceptEdit, ...], others: dict[str, ConceptEditScores]) -> ConceptEditScores:
            n_train = int(self.is_train.sum())
            n_held = len(self.is_train) - n_train
            return ConceptEditScores(
                metric=metric, ns=tuple(ns), rows=rows, n_train=n_train, n_tokens=n_held, baselines=others
            )

        coded = CodedTokens.of(sae, self.x)
        coders = code_baselines(sae, self.x, self.is_train, self.seed, baselines)
        others = {name: wrap(score(each, self.y), {}) for name, each in coders.items()}
        if baselines is not False:
            rng = np.random.default_rng(self.seed)
            moved = np.stack([permute_labels(column, self.documents, rng)[0] for column in self.y.T], 1)
            others["shuffled"] = wrap(score(coded, moved), {})
        return wrap(score(coded, self.y), others)


@dataclass(frozen=True, eq=False)
class _Probe:
    """Logistic regressions on activations, `x w >= threshold`, with the threshold for classes of equal size."""

    weights: Float[np.ndarray, "d_in n_concepts"]
    thresholds: Float[np.ndarray, "n_concepts"]

    @classmethod
    def fit(
        cls, data: _Data, rows: Bool[np.ndarray, "n_tokens"], y: Bool[np.ndarray, "n_tokens n_concepts"]
    ) -> "_Probe":
        places = np.random.default_rng(data.seed).permutation(np.flatnonzero(rows))[:SAMPLE_TOKENS]
        labels = torch.from_numpy(y[places]).float()
        fitted = fit_probe(data.x[torch.from_numpy(places)], labels, standardize=True)
        # where true and false would be equally likely if there were as many of each
        cuts = labels.mean(0).clamp(1e-6, 1 - 1e-6).logit() - fitted.bias
        return cls(fitted.weight.T.numpy().astype(np.float64), cuts.numpy().astype(np.float64))

    def score(self, data: _Data, rows: np.ndarray) -> Float[np.ndarray, "n n_concepts"]:
        """Scores of some tokens."""
        return np.asarray(data.x[torch.from_numpy(rows)].numpy() @ self.weights)

    def ablate(self, scores: np.ndarray, codes: Any, rows: np.ndarray) -> Bool[np.ndarray, "n n_concepts"]:
        """Predictions with the codes (n, k) of features whose decoder rows are given set to 0."""
        found: np.ndarray = scores - codes @ (rows @ self.weights) >= self.thresholds
        return found


def _accuracies(guess: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "n_concepts"]:
    """Balanced accuracy of each concept."""
    return np.array([balanced_accuracy(one, true) for one, true in zip(guess.T, y.T, strict=True)])


@dataclass(frozen=True, eq=False)
class _Targeted:
    """Probes of all concepts, and what they say of held-out tokens before any feature is ablated."""

    data: _Data
    ns: Sequence[int]
    probe: _Probe
    scores: Float[np.ndarray, "n_held n_concepts"]
    before: Float[np.ndarray, "n_concepts"]

    @classmethod
    def make(cls, data: _Data, ns: Sequence[int]) -> "_Targeted":
        probe = _Probe.fit(data, data.is_train, data.y)
        scores = probe.score(data, ~data.is_train)
        return cls(data, ns, probe, scores, _accuracies(scores >= probe.thresholds, data.y[~data.is_train]))

    def score(self, coded: CodedTokens, moved: Bool[np.ndarray, "n_tokens n_concepts"]) -> Iterator[ConceptEdit]:
        """Each concept with its features ablated, chosen for the labels `moved`."""
        data, codes = self.data, coded.codes[~self.data.is_train].tocsc()
        chooser = self.probe if moved is data.y else _Probe.fit(data, data.is_train, moved)
        pull = coded.rows @ chooser.weights
        for i, name in enumerate(data.names):
            effects = np.maximum(_gaps(coded, data.is_train, moved[:, i]), 0) * pull[:, i]
            order = np.argsort(-effects, kind="stable")[: min(max(self.ns), int((effects > 0).sum()))]
            falls = {n: self._fall(codes, coded.rows, order[:n]) for n in self.ns}
            side = {n: float(np.delete(fall, i).mean()) for n, fall in falls.items()}
            yield ConceptEdit(
                concept=name,
                ablated=name,
                before=float(self.before[i]),
                clean=float(self.before[i]),
                after={n: float(self.before[i] - fall[i]) for n, fall in falls.items()},
                others=side,
                scores={n: float(fall[i]) - side[n] for n, fall in falls.items()},
                features=tuple(coded.name(int(j)) for j in order[:SHOWN]),
            )

    def _fall(self, codes: Any, rows: np.ndarray, chosen: np.ndarray) -> Float[np.ndarray, "n_concepts"]:
        """How much less accurate every probe is without some features."""
        guess = self.probe.ablate(self.scores, codes[:, chosen], rows[chosen])
        return np.asarray(self.before - _accuracies(guess, self.data.y[~self.data.is_train]))


@dataclass(frozen=True, eq=False)
class _Biased:
    """The biased probe of one concept of a pair, in the direction that is less accurate."""

    target: str
    spurious: str
    probe: _Probe | None
    pull: Float[np.ndarray, "d_in"]
    """weights of the probe of the spurious concept"""
    before: float
    clean: float
    reason: str

    @classmethod
    def make(cls, data: _Data, a: str, b: str, min_count: int) -> "_Biased":
        rng = np.random.default_rng(data.seed)
        y = data.y[:, [data.names.index(a), data.names.index(b)]]
        case = 2 * y[:, 0] + y[:, 1]
        sizes = [[int((case[side] == c).sum()) for c in range(4)] for side in (data.is_train, ~data.is_train)]
        if min(map(min, sizes)) < min_count:
            return cls(a, b, None, np.zeros(0), math.nan, math.nan, f"a case of the four has under {min_count} tokens")

        def draw(cases: tuple[int, ...]) -> np.ndarray:
            rows, n = np.zeros(len(case), bool), min(sizes[0][c] for c in cases)
            for c in cases:
                rows[rng.permutation(np.flatnonzero(data.is_train & (case == c)))[:n]] = True
            return rows

        even, odd = draw((0, 1, 2, 3)), draw((0, 3))
        clean, biased = _Probe.fit(data, even, y), _Probe.fit(data, odd, y[:, :1])
        held = ~data.is_train
        guess = (biased.score(data, held) >= biased.thresholds)[:, 0]
        before = [_mean_of_cases(guess, y[held], t) for t in (0, 1)]
        t = int(np.argmin(before))
        after = _mean_of_cases((clean.score(data, held) >= clean.thresholds)[:, t], y[held], t)
        reason = ""
        if after - before[t] < SMALLEST_GAP:
            reason = f"the biased probe is as accurate ({before[t]:.3f}) as the clean one ({after:.3f})"
        names = (a, b) if t == 0 else (b, a)
        return cls(*names, biased, clean.weights[:, 1 - t], before[t], after, reason)

    def score(self, data: _Data, coded: CodedTokens, moved: np.ndarray, ns: Sequence[int]) -> ConceptEdit:
        if self.probe is None or self.reason:
            return ConceptEdit(
                concept=self.target, ablated=self.spurious, before=self.before, clean=self.clean, reason=self.reason
            )
        held, places = ~data.is_train, [data.names.index(name) for name in (self.target, self.spurious)]
        y = data.y[held][:, places]
        pull = self.pull
        if moved is not data.y:
            pull = _Probe.fit(data, data.is_train, moved[:, places[1:]]).weights[:, 0]
        effects = np.abs(_gaps(coded, data.is_train, moved[:, places[1]]) * (coded.rows @ pull))
        order = np.argsort(-effects, kind="stable")[: min(max(ns), int((effects > 0).sum()))]
        codes, scores = coded.codes[held].tocsc(), self.probe.score(data, held)
        guesses = {n: self.probe.ablate(scores, codes[:, order[:n]], coded.rows[order[:n]]) for n in ns}
        after = {n: _mean_of_cases(guess[:, 0], y, 0) for n, guess in guesses.items()}
        return ConceptEdit(
            concept=self.target,
            ablated=self.spurious,
            before=self.before,
            clean=self.clean,
            after=after,
            scores={n: (value - self.before) / (self.clean - self.before) for n, value in after.items()},
            features=tuple(coded.name(int(j)) for j in order[:SHOWN]),
        )


def _mean_of_cases(guess: np.ndarray, y: Bool[np.ndarray, "n 2"], target: int) -> float:
    """Mean over the four cases of the share that is right about the target."""
    right, case = guess == y[:, target], 2 * y[:, 0] + y[:, 1]
    return float(np.mean([right[case == c].mean() for c in range(4)]))


def _gaps(coded: CodedTokens, rows: np.ndarray, y: np.ndarray) -> Float[np.ndarray, "n_sides"]:
    """Mean code where a label is true less that where it is false, of each side, on some tokens."""
    true, false = (np.asarray(coded.codes[rows & (y == kind)].mean(0)).ravel() for kind in (True, False))
    return np.asarray(true - false)
