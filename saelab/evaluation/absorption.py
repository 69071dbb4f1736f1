"""`score_absorption`: feature splitting and feature absorption of known parent concepts (arXiv:2409.14507).

A parent (animal) has a feature of its own, which stays silent on some of its children (dog) because the child's feature
carries the parent's direction too: the parent is absorbed. Or no one feature has it, and several share it: it is split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.coded_tokens import CodedTokens, code_baselines
from saelab.evaluation.feature_classifiers import MAX_SPLIT, SAMPLE_TOKENS, SPLIT_GAIN, ratio
from saelab.functional.statistics import choose_threshold, f1, fit_balanced_probe, fit_probe, permute_labels
from saelab.lm.hooks import require_finite
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents
from saelab.stores.results import Result, find_row, format_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PROBE_F1 = 0.6  # below it, a probe knows too little of the parent to say what is absorbed
FIT_TOKENS = 5_000  # of each label, that sparse probes are fitted to
CANDIDATES, PENALTY = 64, 0.1
COSINE_FULL, COSINE, SHARE, MOST = 0.025, 0.1, 0.4, 3
TITLES = ("full", "fraction", "split", "F1", "recall")


@dataclass(frozen=True, kw_only=True)
class ChildAbsorption:
    """Absorption of a parent on the tokens of one of its children."""

    child: str
    full: float
    fraction: float
    n_tokens: int
    """held-out tokens of the child where the probe finds the parent"""


@dataclass(frozen=True, kw_only=True)
class ParentAbsorption:
    """Main features of one parent concept, chosen in training documents, and its absorption in held-out ones."""

    parent: str
    features: tuple[str, ...] = ()
    """main features with the sign of their codes ("12+"), the best first"""
    n_split: int = 0
    """number of main features: each further one raises F1 by more than 0.03; 1 is no split"""
    full: float = math.nan
    """share of tokens on which the main features are silent and another one carries the parent's direction; lower is
    better, 0 to 1"""
    fraction: float = math.nan
    """mean share of the parent's direction that is carried by others than the main features; lower is better, 0 to 1"""
    f1: float = math.nan
    """of the sparse probe on the main features: where it is low there is no feature to be absorbed"""
    recall: float = math.nan
    """share of the parent's tokens on which a main feature fires"""
    probe_f1: float = math.nan
    """of the probe on activations"""
    n_tokens: int = 0
    """held-out tokens of the parent where the probe finds it: those that absorption is measured on"""
    children: tuple[ChildAbsorption, ...] = ()
    reason: str = ""
    """why the scores are NaN"""


@dataclass(frozen=True, kw_only=True)
class AbsorptionScores(Result):
    """Result of `score_absorption`: one row for each parent, and the same scores of baselines."""

    parents: tuple[ParentAbsorption, ...]
    n_train: int
    """training tokens"""
    n_tokens: int
    """held-out tokens"""
    baselines: "dict[str, AbsorptionScores]" = field(default_factory=dict)
    """other dictionaries by name; "shuffled" are main features chosen for permuted labels: what every dictionary with
    some feature for the parent scores where the main ones are the wrong ones"""

    def __getitem__(self, parent: str) -> ParentAbsorption:
        return find_row(self.parents, parent=parent)

    @property
    def scored(self) -> tuple[ParentAbsorption, ...]:
        """Parents that have scores."""
        return tuple(row for row in self.parents if not row.reason)

    def mean(self, name: str) -> float:
        """Mean of one number over scored parents, such as "full" or "n_split"; NaN where there are none."""
        values = [getattr(row, name) for row in self.scored]
        return float(np.mean(values)) if values else math.nan

    @property
    def full(self) -> float:
        """Mean full absorption over scored parents; lower is better."""
        return self.mean("full")

    @property
    def fraction(self) -> float:
        """Mean absorption fraction over scored parents; lower is better."""
        return self.mean("fraction")

    def __str__(self) -> str:
        lines = [
            f"{len(self.scored)} of {len(self.parents)} parents on {self.n_tokens:,} held-out tokens, main features "
            f"chosen on {self.n_train:,} others; absorption: lower is better, and means little where F1 is low"
        ]
        table = [["mean over parents", *TITLES]]
        table += [[name, *_cells(scores.mean)] for name, scores in {"SAE": self, **self.baselines}.items()]
        lines += format_table(table)
        table = [["parent", *TITLES, "tokens", "main features"]]
        for row in sorted(self.scored, key=lambda row: -row.fraction):
            numbers = _cells(lambda name, row=row: getattr(row, name))
            table.append([row.parent, *numbers, f"{row.n_tokens:,}", " ".join(row.features)])
        lines += ["", *format_table(table, left=(0, len(TITLES) + 2))]
        return "\n".join([*lines, *(f"{row.parent}: {row.reason}" for row in self.parents if row.reason)])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name and the means, ready for JSON."""
        means = {name: self.mean(name) for name in ("full", "fraction", "n_split", "f1", "recall")}
        baselines = {name: scores.to_dict() for name, scores in self.baselines.items()}
        return super().to_dict() | {"means": means, "baselines": baselines}


def _cells(read: Any) -> list[str]:
    full, fraction, split, *others = (read(name) for name in ("full", "fraction", "n_split", "f1", "recall"))
    return [f"{full:.3f}", f"{fraction:.3f}", f"{split:.2f}", *(f"{value:.3f}" for value in others)]


def score_absorption(
    sae: SAE,
    acts: Float[Tensor, "n_tokens d_in"],
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    parents: Sequence[str] | None = None,
    train_frac: float = 0.5,
    min_count: int = 20,
    seed: int = 0,
    baselines: bool | Mapping[str, SAE] = True,
) -> AbsorptionScores:
    """Feature splitting and absorption of parent concepts, in held-out documents.

    A logistic regression on activations has the unit direction p. Main features are those of k-sparse probes, k raised
    as long as F1 grows by more than 0.03 (at most to 10): `n_split` is that k. On each token where the probe finds the
    parent and is right, with a = <x - offset, p>, and for each feature its part z_j <d_j, p> in that and its cosine
    with p:

        full      1 where no main feature fires, and the feature with the largest part has a cosine of 0.025 and 0.4 a
        fraction  A / (A + M) with M the part of the main features and A that of the three largest others with a cosine
                  of 0.1, at most a - M; 0 where M >= a, A < 0.4 a or a <= 0, and 1 where M <= 0

    The sides of signed features count as features. The offset, the reconstruction where nothing fires, is what features
    do not have to account for; for an offset of 0 these are the formulas of SAEBench. Sources: arXiv:2409.14507,
    arXiv:2503.09532.

    Args:
        sae: the SAE.
        acts: activations of the tokens.
        labels: which concepts are true of each token, as `TokenLabels.of` reads them; a concept's children are those
            that name it as parent.
        doc_ids: document of each token, needed where the labels do not have them; documents are split as a whole.
        parents: concepts to score; None is every one that has children, or all concepts where none has.
        train_frac: share of documents for training.
        min_count: fewest tokens of a concept on either side of the split.
        seed: of the split, of samples and of baselines.
        baselines: whether to score a random and an untrained dictionary, neurons, and shuffled labels as well; further
            SAEs by name.

    Raises:
        ValueError: for sizes that disagree, unknown parents, and an SAE whose features have no fixed directions.
    """
    given = TokenLabels.of(labels, doc_ids=doc_ids)
    documents = given.require_documents()
    if len(acts) != given.n_tokens:
        raise ValueError(f"`acts` must have a row for each of the {given.n_tokens} tokens, got {len(acts)}.")
    names = {concept.parent: 0 for concept in given.concepts if concept.parent in given} if parents is None else parents
    chosen = [given.find(name) for name in names] or list(given.names)
    is_train = split_documents(documents, train_frac, seed)
    task = _Task.make(acts, given, chosen, is_train, min_count, seed)
    coded = CodedTokens.of(sae, acts)
    others = {name: task.score(each) for name, each in code_baselines(sae, acts, is_train, seed, baselines).items()}
    if baselines is not False:
        others["shuffled"] = task.score(coded, shuffle=True)
    return task.score(coded, others)


@dataclass(frozen=True, eq=False)
class _Task:
    """Labels and probes of the parents, which every dictionary is scored with."""

    x: Float[np.ndarray, "n_tokens d_in"]
    labels: TokenLabels
    parents: list[str]
    is_train: Bool[np.ndarray, "n_tokens"]
    min_count: int
    seed: int
    probes: Float[np.ndarray, "n_parents d_in"]
    """unit directions"""
    found: Bool[np.ndarray, "n_tokens n_parents"]
    """where the probes say yes"""

    @classmethod
    def make(
        cls,
        acts: Tensor,
        labels: TokenLabels,
        parents: list[str],
        is_train: np.ndarray,
        min_count: int,
        seed: int,
    ) -> "_Task":
        require_finite("acts", acts)
        x = acts.float().cpu()
        y = np.stack([labels[name].flatten().numpy() for name in parents], 1)
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(is_train))[:SAMPLE_TOKENS]
        probe = fit_probe(x[torch.from_numpy(rows)], torch.from_numpy(y[rows]).float(), standardize=True)
        weights, scores = probe.weight, probe(x).numpy().astype(np.float64)
        found = np.zeros_like(y)
        for i in range(len(parents)):
            if y[is_train, i].any():
                found[:, i] = scores[:, i] >= choose_threshold(scores[is_train, i], y[is_train, i])[0]
        probes = (weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-12)).numpy()
        return cls(x.numpy(), labels, parents, is_train, min_count, seed, probes, found)

    def score(
        self, coded: CodedTokens, baselines: dict[str, AbsorptionScores] | None = None, *, shuffle: bool = False
    ) -> AbsorptionScores:
        """Scores of one dictionary; with `shuffle`, of main features that were chosen for permuted labels."""
        sides = _TrainSides.of(coded, self.is_train, self.seed)
        return AbsorptionScores(
            parents=tuple(self._row(coded, sides, i, shuffle) for i in range(len(self.parents))),
            n_train=int(self.is_train.sum()),
            n_tokens=int((~self.is_train).sum()),
            baselines=baselines or {},
        )

    def _row(self, coded: CodedTokens, sides: "_TrainSides", i: int, shuffle: bool) -> ParentAbsorption:
        name, held = self.parents[i], ~self.is_train
        y = self.labels[name].flatten().numpy()
        probe_f1 = _f1_of(self.found[held, i], y[held])
        reason = ""
        if min(min(part.sum(), (~part).sum()) for part in (y[self.is_train], y[held])) < self.min_count:
            reason = f"fewer than {self.min_count} tokens with it, or without it, in training or held-out documents"
        elif probe_f1 < PROBE_F1:
            reason = f"the probe on activations has F1 {probe_f1:.2f}, below {PROBE_F1}"
        if reason:
            return ParentAbsorption(parent=name, probe_f1=probe_f1, reason=reason)
        shown = y[self.is_train]
        if shuffle:
            shown = permute_labels(shown, self.labels.require_documents()[self.is_train], np.random.default_rng(i))[0]
        main, weights, threshold = sides.choose(shown)
        right = np.flatnonzero(held & y & self.found[:, i])
        full, fraction = measure_absorption(coded, main, self.x[right], self.probes[i], right)
        codes = coded.codes[held][:, main]
        return ParentAbsorption(
            parent=name,
            features=tuple(coded.name(int(side)) for side in main),
            n_split=len(main),
            full=float(full.mean()),
            fraction=float(fraction.mean()),
            f1=_f1_of(codes @ weights >= threshold, y[held]) if len(main) else 0.0,
            recall=ratio((codes[y[held]].getnnz(1) > 0).sum(), int(y[held].sum())),
            probe_f1=probe_f1,
            n_tokens=len(right),
            children=tuple(self._children(name, right, full, fraction)),
        )

    def _children(self, parent: str, right: np.ndarray, full: np.ndarray, fraction: np.ndarray) -> Any:
        for concept in self.labels.concepts:
            if concept.parent == parent:
                mine = self.labels[concept.name].flatten().numpy()[right]
                if n := int(mine.sum()):
                    means = float(full[mine].mean()), float(fraction[mine].mean())
                    yield ChildAbsorption(child=concept.name, full=means[0], fraction=means[1], n_tokens=n)


def measure_absorption(
    coded: CodedTokens,
    main: Sequence[int] | Int[np.ndarray, "k"],
    x: Float[np.ndarray, "n d_in"],
    probe: Float[np.ndarray, "d_in"],
    rows: Int[np.ndarray, "n"],
) -> tuple[Bool[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Whether a concept is fully absorbed on each token, and the fraction absorbed, as `score_absorption` defines them.

    Args:
        coded: the dictionary's codes of all tokens.
        main: sides of the main features.
        x: activations of the tokens measured.
        probe: unit direction of the concept.
        rows: those tokens' places among all.
    """
    parts = coded.rows @ probe
    cosines = parts / np.maximum(np.linalg.norm(coded.rows, axis=1), 1e-12)
    codes, whole = coded.codes[rows], (x - coded.offset) @ probe
    is_main = np.zeros(codes.shape[1], bool)
    is_main[np.asarray(main, np.int64)] = True
    token, side = np.repeat(np.arange(len(rows)), np.diff(codes.indptr)), codes.indices
    part = codes.data * parts[side]
    silent = np.bincount(token[is_main[side]], minlength=len(rows)) == 0
    of_main = np.bincount(token[is_main[side]], part[is_main[side]], minlength=len(rows))
    order = np.lexsort((-part, token))
    top = order[np.diff(token[order], prepend=-1) > 0]
    full = np.zeros(len(rows), bool)
    full[token[top]] = (cosines[side[top]] >= COSINE_FULL) & (part[top] >= SHARE * whole[token[top]])
    full &= silent & (whole >= 0)
    others = order[~is_main[side[order]] & (cosines[side[order]] >= COSINE) & (part[order] > 0)]
    starts = np.flatnonzero(np.diff(token[others], prepend=-1) > 0)
    rank = np.arange(len(others)) - np.repeat(starts, np.diff(np.append(starts, len(others))))
    largest = others[rank < MOST]
    absorbed = np.bincount(token[largest], part[largest], minlength=len(rows))
    capped = np.minimum(absorbed, whole - of_main)
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(of_main <= 0, 1.0, capped / (capped + of_main))
    return full, np.where((of_main >= whole) | (absorbed < SHARE * whole) | (whole <= 0), 0.0, fraction)


@dataclass(frozen=True, eq=False)
class _TrainSides:
    """Codes of training tokens, scaled to a standard deviation of 1, to choose main features from."""

    codes: "csr_matrix"
    scale: Float[np.ndarray, "n_sides"]
    seed: int

    @classmethod
    def of(cls, coded: CodedTokens, is_train: np.ndarray, seed: int) -> "_TrainSides":
        codes = coded.codes[is_train]
        means, squares = (np.asarray(m.mean(0)).ravel() for m in (codes, codes.multiply(codes)))
        return cls(codes, 1 / np.sqrt(np.maximum(squares - means**2, 1e-12)), seed)

    def choose(self, y: Bool[np.ndarray, "n"]) -> tuple[np.ndarray, np.ndarray, float]:
        """Main features of a label, their weights in the sparse probe, and its threshold.

        Of the 64 sides that separate the label best, by the difference of means, an L1 regression ranks those that
        speak for it.
        """
        from scipy.sparse import csr_matrix

        on = csr_matrix(y.astype(np.float32)) @ self.codes
        total = np.asarray(self.codes.sum(0)).ravel()
        on = np.asarray(on.todense()).ravel()
        gaps = (on / y.sum() - (total - on) / max(1, len(y) - y.sum())) * self.scale
        near = np.argsort(-gaps, kind="stable")[:CANDIDATES]
        near = near[gaps[near] > 0]
        best: tuple[np.ndarray, np.ndarray, float] = (near[:0], np.zeros(0), math.inf)
        if not len(near):
            return best
        rng = np.random.default_rng(self.seed)
        drawn = np.concatenate([rng.permutation(np.flatnonzero(y == kind))[:FIT_TOKENS] for kind in (True, False)])
        columns = self.codes[:, near].multiply(self.scale[near]).tocsr()
        penalized = fit_balanced_probe(columns[drawn], y[drawn], c=PENALTY, l1=True)
        ranked = np.argsort(-penalized, kind="stable")
        ranked, score = ranked[penalized[ranked] > 0][:MAX_SPLIT], -math.inf
        for k in range(1, len(ranked) + 1):
            weights = fit_balanced_probe(columns[drawn][:, ranked[:k]], y[drawn])
            threshold, now = choose_threshold(columns[:, ranked[:k]] @ weights, y)
            if now <= score + SPLIT_GAIN:
                break
            best, score = (near[ranked[:k]], weights * self.scale[near[ranked[:k]]], threshold), now
        return best


def _f1_of(guess: Bool[np.ndarray, "n"], y: Bool[np.ndarray, "n"]) -> float:
    return float(f1((guess & y).sum(), guess.sum(), int(y.sum())))
