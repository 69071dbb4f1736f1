"""`dissect`: which sides of features are on for the tokens of a concept, by intersection over union (IoU).

Network Dissection (arXiv:1704.05796) with tokens for pixels. Thresholds and concepts are chosen on training documents,
all scores are of held-out ones. Its rule for a detector finds as many in random directions as in a trained dictionary,
so nulls and baselines stand beside the result, and it says where they cannot be told apart.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saelab.evaluation.concepts import move_truth
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.evaluation.side_masks import Coded, SideFits, SideMasks, fit_sides, mask_activations, mask_codes
from saelab.functional.indices import shift_groups
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, find_row, format_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SHOWN = 12
SURE = 2.0  # standard errors by which shares of detectors have to differ
CODES, SHIFTED, PERMUTED = "codes", "labels shifted", "labels permuted"
NEURONS, ROTATED, SCALED, TURNED = "activations", "activations rotated", "scaled and rotated", "dictionary rotated"


@dataclass(frozen=True, kw_only=True)
class DissectedSide:
    """A side of a feature and the concept that it fits best; scores are of held-out documents."""

    feature: int
    sign: int
    """1 or -1: the side of the feature"""
    concept: str
    """that with the highest IoU in training documents"""
    iou: float
    """tokens with both the concept and a code above the threshold, over tokens with either"""
    possible: float
    """the largest IoU that a side of its density can have with a concept of this rate"""
    chance: float
    """IoU of as many tokens at random"""
    iou_train: float
    threshold: float
    """magnitude above which the side is on"""
    n_on: int
    """tokens on which it is on"""

    @property
    def share(self) -> float:
        """Share of the largest IoU that is possible."""
        return self.iou / self.possible if self.possible else 0.0


@dataclass(frozen=True, kw_only=True)
class DissectedConcept:
    """A concept and the side that fits it best; scores are of held-out documents."""

    name: str
    feature: int | None
    """that with the highest IoU in training documents; None where none is on for any of its tokens"""
    sign: int
    iou: float
    n_tokens: int
    """tokens with the concept"""
    n_detectors: int
    """sides of which this is the concept, with an IoU above the limit"""


@dataclass(frozen=True, kw_only=True)
class DissectionRow:
    """How one set of columns fits the concepts, or the codes other labels."""

    name: str
    draw: int
    """number of the random rotation; 0 where there is but one"""
    n_sides: int
    """sides that fire in training documents"""
    n_detectors: int
    """sides with an IoU above `detector`"""
    n_unique: int
    """different concepts of these"""
    n_clear: int
    """sides with an IoU of `clear` or more"""
    n_unique_clear: int
    """different concepts of these"""
    mean_iou: float
    """of sides with their best concepts"""
    mean_share: float
    """of the largest IoU that is possible"""
    concept_iou: float
    """mean over concepts of the IoU of the side that fits each best"""

    @property
    def detector_frac(self) -> float:
        """Share of its sides that are detectors."""
        return self.n_detectors / max(1, self.n_sides)


@dataclass(frozen=True, kw_only=True)
class Dissection(Result):
    """Result of `dissect`; `rows[0]` is that of the codes, the others are baselines and nulls."""

    rows: tuple[DissectionRow, ...]
    sides: tuple[DissectedSide, ...] = field(repr=False)
    """of the codes, the highest IoU first; those that are on for no token of a concept in training documents are left
    out
    """
    concepts: tuple[DissectedConcept, ...] = field(repr=False)
    """in the order of the labels"""
    quantile: float
    detector: float
    clear: float
    n_train: int
    """tokens of training documents"""
    n_tokens: int
    """tokens of held-out documents, which are scored"""
    n_documents: int
    """held-out documents"""
    skipped: tuple[str, ...] = field(repr=False)
    """concepts with too few tokens to be scored"""
    warning: str
    """where the number of detectors does not tell the codes from a baseline; empty where it does"""

    def detectors(self, limit: float | None = None) -> tuple[DissectedSide, ...]:
        """The sides with an IoU above `limit`, by default `detector`."""
        return tuple(side for side in self.sides if side.iou > (self.detector if limit is None else limit))

    def row(self, name: str, draw: int = 0) -> DissectionRow:
        """The row of this name; KeyError listing those that there are."""
        return find_row(self.rows, name=name, draw=draw)

    def __str__(self) -> str:
        head = (
            f"{self.n_tokens:,} held-out tokens of {self.n_documents:,} documents, {len(self.concepts)} concepts; a "
            f"side is on for the largest {self.quantile:.2%} of codes; detectors have an IoU above {self.detector:g}"
        )
        names = ["", "sides", "detectors", "unique", f"IoU >= {self.clear:g}", "unique", "mean IoU", "of possible"]
        table = [[*names, "concept's best"]]
        for row in self.rows:
            counts = (row.n_sides, row.n_detectors, row.n_unique, row.n_clear, row.n_unique_clear)
            means = (row.mean_iou, row.mean_share, row.concept_iou)
            name = row.name + (f" {row.draw + 1}" if row.name in (ROTATED, SCALED, TURNED) else "")
            table.append([name, *(f"{n:,}" for n in counts), *(f"{x:.3f}" for x in means)])
        best = [["feature", "concept", "IoU", "possible"]]
        best += [
            [f"{side.feature}{'' if side.sign > 0 else ' -'}", side.concept, f"{side.iou:.3f}", f"{side.possible:.3f}"]
            for side in self.sides[:SHOWN]
        ]
        warned = [f"Warning: {self.warning}"] if self.warning else []
        return "\n".join([head, *warned, *format_table(table), *format_table(best, left=(0, 1))])


def dissect(
    codes: Coded,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    baselines: Mapping[str, Coded] | None = None,
    acts: Float[Tensor, "n_tokens d_in"] | None = None,
    sae: SAE | None = None,
    n_rotations: int = 3,
    quantile: float = 0.005,
    detector: float = 0.04,
    clear: float = 0.2,
    min_count: int = 20,
    train_frac: float = 0.5,
    seed: int = 0,
) -> Dissection:
    """The concept that each side of a feature fits best, by IoU, with nulls and baselines (arXiv:1704.05796).

    A side is on where its magnitude is above a threshold, exceeded on a share `quantile` of the tokens, or where it
    fires if that is rarer. `IoU = |on and true| / |on or true|`. Where a concept is true of a share p of the tokens and
    the side on for a share q, the IoU is at most `min(p, q) / max(p, q)`: for frequent concepts no side passes, for
    rare ones many do by chance. Thresholds, the concept of each side and the side of each concept are chosen on
    training documents and scored on the others.

    Nulls: labels of other documents, stretched to the length of each and shifted circularly in it, so that runs and
    relations of labels stay (`labels shifted`); labels permuted as for `score_concepts` (`labels permuted`). Baselines
    of random directions: `baselines`; with `acts` their own coordinates about the mean, the same in random orthonormal
    bases, before and after scaling each coordinate to variance 1; with `sae` too the dictionary rotated at random about
    the mean of the activations. One block of features is held at a time.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        labels: which concepts are true of each token.
        doc_ids: document of each token, needed where neither `codes` is a store nor the labels have them.
        baselines: other codes of the same tokens by name, such as an untrained SAE's from `harvest_untrained`.
        acts: activations of the same tokens.
        sae: the SAE that made the codes of `acts`.
        n_rotations: number of random rotations of activations and dictionary.
        quantile: share of training tokens for which a side is on, at most.
        detector: IoU above which a side is a detector.
        clear: IoU from which it is a clear one.
        min_count: concepts with fewer tokens on either side of the split are skipped.
        train_frac: share of documents for training.
        seed: of the split, the nulls and the rotations.

    Raises:
        ValueError: sizes that disagree, documents that cannot be split, no concept frequent enough, a quantile of less
            than one token, or limits out of range.

    >>> truth = np.tile(np.eye(4)[[0, 1, 2, 3]], (50, 1))
    >>> found = dissect(truth[:, ::-1], {"odd": truth[:, 1]}, np.arange(200) // 4, quantile=0.3)
    >>> found.concepts[0].feature, found.concepts[0].iou
    (2, 1.0)
    """
    _check(quantile, detector, clear, min_count, n_rotations, acts, sae)
    documents = codes.doc_ids if isinstance(codes, FeatureStore) and doc_ids is None else doc_ids
    given = TokenLabels.of(labels, doc_ids=documents)
    bench = _SplitLabels.make(given, train_frac, quantile, min_count, seed)
    own, *moved = fit_sides(mask_codes(codes, bench.is_train, quantile), (bench.truth, *bench.moved()), bench.is_train)
    labelings = zip((CODES, SHIFTED, PERMUTED), (own, *moved), strict=True)
    rows = [_summarize(name, 0, found, detector, clear) for name, found in labelings]
    for name, draw, blocks in _list_baselines(bench, baselines or {}, acts, sae, n_rotations, seed):
        rows.append(_summarize(name, draw, fit_sides(blocks, (bench.truth,), bench.is_train)[0], detector, clear))
    return Dissection(
        rows=tuple(rows),
        sides=_describe_sides(own, bench),
        concepts=_describe_concepts(own, bench, detector),
        quantile=quantile,
        detector=detector,
        clear=clear,
        n_train=bench.n_train,
        n_tokens=len(bench.is_train) - bench.n_train,
        n_documents=len(np.unique(bench.documents[~bench.is_train])),
        skipped=bench.skipped,
        warning=_warn(rows, detector, clear),
    )


def _check(
    quantile: float,
    detector: float,
    clear: float,
    min_count: int,
    n_rotations: int,
    acts: Tensor | None,
    sae: SAE | None,
) -> None:
    if not (0 < quantile < 1 and 0 <= detector < 1 and 0 < clear <= 1):
        raise ValueError(
            f"`quantile`, `detector` and `clear` must be shares, 0 to 1, got {quantile}, {detector} and {clear}."
        )
    if min_count < 1 or n_rotations < 0:
        raise ValueError(
            f"`min_count` must be at least 1 and `n_rotations` at least 0, got {min_count} and {n_rotations}."
        )
    if sae is not None and acts is None:
        raise ValueError("`sae` goes with `acts`, the activations that it encodes, got none; give both or neither.")


@dataclass(frozen=True, eq=False)
class _SplitLabels:
    """Labels on the two sides of the split."""

    names: tuple[str, ...]
    skipped: tuple[str, ...]
    truth: "csr_matrix"
    """(n_tokens, n_concepts) of the concepts that are frequent enough"""
    documents: Shaped[np.ndarray, "n_tokens"]
    is_train: Bool[np.ndarray, "n_tokens"]
    quantile: float
    seed: int

    @classmethod
    def make(cls, given: TokenLabels, train_frac: float, quantile: float, min_count: int, seed: int) -> "_SplitLabels":
        documents = given.require_documents()
        is_train = split_documents(documents, train_frac, seed)
        if quantile * is_train.sum() < 1:
            raise ValueError(
                f"`quantile` must be at least one of the {int(is_train.sum())} training tokens, got {quantile}; take a "
                "larger one, or more text."
            )
        truth = given.matrix.astype(np.int32).tocsr()
        counts = [np.bincount(truth[rows].indices, minlength=len(given)) for rows in (is_train, ~is_train)]
        keep = np.minimum(*counts) >= min_count
        if not keep.any():
            raise ValueError(
                f"`labels` must have a concept of {min_count} tokens on each side of the split (`min_count`), got "
                f"at most {int(np.minimum(*counts).max(initial=0))}; give more text."
            )
        names = np.array(given.names, dtype=object)
        kept, skipped = (tuple(str(name) for name in names[rows]) for rows in (keep, ~keep))
        return cls(kept, skipped, truth[:, np.flatnonzero(keep)], documents, is_train, quantile, seed)

    @property
    def n_train(self) -> int:
        return int(self.is_train.sum())

    def moved(self) -> "tuple[csr_matrix, csr_matrix]":
        """Labels moved within each side of the split: shifted as they are, and permuted."""
        rng, order = np.random.default_rng(self.seed), np.arange(len(self.is_train))
        for side in (self.is_train, ~self.is_train):
            rows = np.flatnonzero(side)
            order[rows] = rows[shift_groups(self.documents[rows], rng)]
        return self.truth[order], self._permute()

    def _permute(self) -> "csr_matrix":
        from scipy.sparse import vstack

        sides = [np.flatnonzero(self.is_train), np.flatnonzero(~self.is_train)]
        parts = [move_truth(self.truth[rows], self.documents[rows], self.seed) for rows in sides]
        back = np.argsort(np.concatenate(sides), kind="stable")
        return vstack(parts, format="csr")[back]


def _list_baselines(
    bench: _SplitLabels,
    baselines: Mapping[str, Coded],
    acts: Tensor | None,
    sae: SAE | None,
    n_rotations: int,
    seed: int,
) -> Iterator[tuple[str, int, Iterator[SideMasks]]]:
    """Name, number of the draw and sides of what the codes are compared with."""
    for name, codes in baselines.items():
        yield name, 0, mask_codes(codes, bench.is_train, bench.quantile, name)
    if acts is None:
        return
    if len(acts) != len(bench.is_train):
        raise ValueError(f"`acts` must have a row for each of the {len(bench.is_train)} tokens, got {len(acts)}.")
    seen = torch.from_numpy(bench.is_train)
    x = acts.detach().float().cpu()
    mean = x[seen].mean(0)
    scale = x[seen].std(0).clamp(min=1e-9)
    x = x - mean

    def project(basis: Tensor) -> Iterator[SideMasks]:
        def read(start: int, stop: int) -> np.ndarray:
            return (x @ basis[:, start:stop]).numpy()

        return mask_activations(read, x.shape[1], bench.is_train, bench.quantile)

    yield NEURONS, 0, project(torch.eye(x.shape[1]))
    for draw in range(n_rotations):
        basis = draw_rotation(x.shape[1], seed + draw)
        for name, weights in ((ROTATED, basis), (SCALED, basis / scale[:, None])):
            yield name, draw, project(weights)
        if sae is not None:
            yield TURNED, draw, mask_codes(encode_csr(sae, x @ basis + mean), bench.is_train, bench.quantile)


def draw_rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """An orthogonal matrix drawn uniformly.

    >>> turn = draw_rotation(3, 0)
    >>> bool((turn @ turn.T - torch.eye(3)).abs().max() < 1e-6)
    True
    """
    basis, triangle = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return torch.from_numpy(basis * np.sign(np.diag(triangle))).float()


def _summarize(name: str, draw: int, fits: SideFits, detector: float, clear: float) -> DissectionRow:
    passed, sure = fits.iou > detector, fits.iou >= clear
    live = fits.fires
    share = np.divide(fits.iou, fits.possible, out=np.zeros(len(fits.iou)), where=fits.possible > 0)
    return DissectionRow(
        name=name,
        draw=draw,
        n_sides=int(live.sum()),
        n_detectors=int(passed.sum()),
        n_unique=len(set(fits.concept[passed].tolist())),
        n_clear=int(sure.sum()),
        n_unique_clear=len(set(fits.concept[sure].tolist())),
        mean_iou=float(fits.iou[live].mean()) if live.any() else math.nan,
        mean_share=float(share[live].mean()) if live.any() else math.nan,
        concept_iou=float(fits.best_iou.mean()),
    )


def _describe_sides(fits: SideFits, bench: _SplitLabels) -> tuple[DissectedSide, ...]:
    order = np.argsort(-fits.iou, kind="stable")
    return tuple(
        DissectedSide(
            feature=int(fits.features[i]),
            sign=int(fits.signs[i]),
            concept=bench.names[fits.concept[i]],
            iou=float(fits.iou[i]),
            possible=float(fits.possible[i]),
            chance=float(fits.chance[i]),
            iou_train=float(fits.trained[i]),
            threshold=float(fits.thresholds[i]),
            n_on=int(fits.n_on[i]),
        )
        for i in order.tolist()
        if fits.concept[i] >= 0
    )


def _describe_concepts(fits: SideFits, bench: _SplitLabels, detector: float) -> tuple[DissectedConcept, ...]:
    n_true = np.bincount(bench.truth[~bench.is_train].indices, minlength=len(bench.names))
    passed = fits.concept[fits.iou > detector]
    counts = np.bincount(passed[passed >= 0], minlength=len(bench.names))
    return tuple(
        DissectedConcept(
            name=name,
            feature=int(fits.features[side]) if side >= 0 else None,
            sign=int(fits.signs[side]) if side >= 0 else 1,
            iou=float(fits.best_iou[c]),
            n_tokens=int(n_true[c]),
            n_detectors=int(counts[c]),
        )
        for c, (name, side) in enumerate(zip(bench.names, fits.best_side.tolist(), strict=True))
    )


def _warn(rows: Sequence[DissectionRow], detector: float, clear: float) -> str:
    """Why the number of detectors says nothing; empty where it does."""
    own, others = rows[0], [row for row in rows[1:] if row.name not in (SHIFTED, PERMUTED, NEURONS)]
    shifted = rows[1]
    said = []
    if not others:
        said.append(
            "no random dictionary stands beside the codes, without which the number of detectors means nothing: give "
            "`baselines` of an untrained SAE, or `acts`."
        )
    best = max(others, key=lambda row: row.detector_frac, default=own)
    p, q = own.detector_frac, best.detector_frac
    error = math.sqrt(p * (1 - p) / max(1, own.n_sides) + q * (1 - q) / max(1, best.n_sides))
    if others and p - q <= SURE * error:
        unique = max(row.n_unique for row in others)
        least = max(row.n_unique_clear for row in others)
        said.append(
            f"an IoU above {detector:g} does not tell the codes from '{best.name}': {p:.1%} of the sides are detectors "
            f"here, {q:.1%} there. Compare unique detectors, {own.n_unique} against at most {unique} of a baseline, "
            f"and those with an IoU of {clear:g} or more, {own.n_unique_clear} against {least}."
        )
    if shifted.detector_frac > 0.5 * p and p > 0:
        said.append(f"with labels of other documents {shifted.n_detectors} of {own.n_detectors} detectors are left.")
    return " ".join(said)
