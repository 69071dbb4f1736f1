"""`measure_structure`: known directions and concepts in a dictionary, and how its features fire and interfere.

The metrics of arXiv:2502.12892, each beside the same of random directions and of k-means centroids.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.concepts import move_truth
from saelab.evaluation.feature_classifiers import (
    ClassifierCounts,
    CodeMatrix,
    count_classifiers,
    encode_csr,
    find_peaks,
    grade,
    read_values,
    select_rows,
)
from saelab.functional.metrics import exact
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.baselines import check_baselines, fit_baselines
from saelab.sae.classical_dictionaries import draw_tokens
from saelab.sae.initialization import prepare
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK = 1024  # features whose pairs are held at a time
SAMPLE_TOKENS = 16_384
POWER_STEPS, POWER_GAIN = 500, 1e-9  # at most so many, until one gains no more than this share
OTHER_SEED = 1_000_003  # added to the seed of random directions: an SAE's own start from those of its seed


@dataclass(frozen=True, kw_only=True)
class Identifiability(Result):
    """How accurately single features classify known concepts; chosen on training stories, scored on held-out ones.

    All are means over the scored concepts.
    """

    accuracy: float
    """of the best of all (feature, sign, threshold), always and never predicting the concept among them; where concepts
    are rare it is near `accuracy_majority` whatever the features are"""
    accuracy_majority: float
    """of the better of always and never predicting the concept"""
    balanced: float
    """mean of the accuracies on tokens with and without the concept, of the classifier that is best in it: what
    accuracy would be if half of the tokens had the concept; 0.5 is chance"""
    n_concepts: int
    """concepts scored"""
    n_tokens: int
    """held-out tokens"""
    n_train: int
    """training tokens"""
    moved: "Identifiability | None" = None
    """the same for permuted labels, as in `score_concepts`: what the best of so many features reaches by chance"""


@dataclass(frozen=True, kw_only=True)
class DictionaryStructure(Result):
    """Known directions and concepts in one dictionary, and how its features fire together."""

    plausibility: float
    """`mean_i max_j cos(v_i, d_j)` over known directions v, |cos| where codes are signed; it rises with d_sae, so read
    it beside that of random directions"""
    identifiability: Identifiability | None
    """None without labels"""
    connectivity: float
    """share of the pairs of features that never fire on one token; it falls with the number of tokens"""
    connectivity_independent: float
    """the same where the firings of each feature are permuted over the tokens"""
    negative_interference: float
    """spectral norm of `relu(-(Z^T Z / n) * (D D^T))` over the variance of the activations: how much features that fire
    together cancel each other; 0 is none"""
    d_sae: int
    signed: bool
    n_directions: int
    n_tokens: int
    baselines: "dict[str, DictionaryStructure]" = field(default_factory=dict)
    """the same of other dictionaries, by name"""

    def __str__(self) -> str:
        columns = {"SAE": self, **self.baselines}
        about = f"{self.n_directions:,} known directions, {self.n_tokens:,} tokens"
        table = [["", *columns], ["features", *(f"{one.d_sae:,}" for one in columns.values())]]
        table.append(["plausibility", *(f"{one.plausibility:.3f}" for one in columns.values())])
        if self.identifiability is not None:
            about += f", {self.identifiability.n_concepts:,} concepts"
            for name in ("accuracy", "accuracy_majority", "balanced"):
                cells = [f"{getattr(one.identifiability, name):.3f}" for one in columns.values()]
                table.append([f"identifiability, {name.replace('_', ' of ')}", *cells])
            moved = [one.identifiability.moved for one in columns.values() if one.identifiability]
            table.append(["  labels moved", *("" if one is None else f"{one.balanced:.3f}" for one in moved)])
        for name in ("connectivity", "connectivity_independent", "negative_interference"):
            table.append([name.replace("_", " "), *(f"{getattr(one, name):.4g}" for one in columns.values())])
        return "\n".join([about, *format_table(table)])


@torch.no_grad()
def plausibility(sae: SAE, directions: Float[Tensor, "n d_in"]) -> float:
    """`mean_i max_j cos(v_i, d_j)`: how near each known direction has a feature; in [-1, 1], higher is better.

    The directions are such as weights of linear probes, or rows of the unembedding, in the units of the activations.
    A feature whose codes are never negative stands for its direction alone, so the sign counts; where codes are signed
    it stands for both, and |cos| counts. Chance rises with d_sae: compare with random directions. Source:
    arXiv:2502.12892, section 5.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)))
    >>> round(plausibility(sae, 3 * sae.directions([5, 7])), 6)
    1.0
    """
    rows = sae.directions().float().cpu()
    if directions.ndim != 2 or not len(directions) or directions.shape[1] != rows.shape[1]:
        raise ValueError(
            f"`directions` must be one or more rows of width {rows.shape[1]}, got {tuple(directions.shape)}; give "
            "directions at the SAE's hook point."
        )
    rows, known = (exact(one) / exact(one).norm(dim=1, keepdim=True) for one in (rows, directions.float().cpu()))
    rows = rows.nan_to_num()  # a row of zeros is near nothing
    if not bool(known.isfinite().all()):
        raise ValueError("`directions` must be finite and not zero, got a row that is; leave it out.")
    found = torch.full((len(known),), -1.0, dtype=torch.float64)
    for part in rows.split(BLOCK):
        cosines = known @ part.T
        found = torch.maximum(found, (cosines.abs() if sae.cfg.activation.signed else cosines).amax(1))
    return float(found.clamp(max=1.0).mean())


def identifiability(
    codes: CodeMatrix,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    train_frac: float = 0.5,
    min_count: int = 20,
    seed: int = 0,
) -> Identifiability:
    """Accuracy of the best feature for each concept, `max over (feature, sign, threshold) of P(1[z > t] = y)`.

    Classifiers are those of `score_concepts`, with ten thresholds a sign; chosen on training stories and scored on
    held-out ones, where arXiv:2502.12892 takes the largest on the same data.

    Args:
        codes: (n_tokens, d_sae), sparse or dense; a code fires where z != 0, and each sign is a classifier of its own.
        labels: which concepts are true of each token, as in `score_concepts`.
        doc_ids: story (document) of each token, needed where the labels do not have them.
        train_frac: share of stories for training.
        min_count: fewest tokens of a concept on either side of the split; rarer ones are left out.
        seed: of the split, and of the permuted labels.

    Raises:
        ValueError: where sizes disagree, stories cannot be split, or no concept has enough tokens.

    >>> z = torch.eye(2).repeat(60, 1)
    >>> found = identifiability(z, {"a": z[:, 0] > 0, "b": z[:, 1] > 0}, torch.arange(120) // 6)
    >>> found.accuracy, found.accuracy_majority, found.balanced
    (1.0, 0.5, 1.0)
    """
    given = TokenLabels.of(labels, doc_ids=doc_ids)
    stories, values = given.require_documents(), read_values(codes)
    if len(stories) != values.shape[0]:
        raise ValueError(f"`codes` must have a row for each of the {len(stories)} tokens, got {values.shape[0]}.")
    is_train = split_documents(stories, train_frac, seed)
    sides = select_rows(values, is_train), select_rows(values, ~is_train)
    peaks = find_peaks(sides[0])
    levels = [grade(side, peaks) for side in sides]
    truths = [given.matrix[rows].astype(np.int32) for rows in (is_train, ~is_train)]

    def score(truth: list["csr_matrix"]) -> Identifiability:
        counted = [
            ClassifierCounts(*count_classifiers(level, true), np.asarray(true.sum(0)).ravel(), true.shape[0])
            for level, true in zip(levels, truth, strict=True)
        ]
        return _identify(counted[0], counted[1], min_count)

    moved = [move_truth(true, stories[rows], seed) for true, rows in zip(truths, (is_train, ~is_train), strict=True)]
    return replace(score(truths), moved=score(moved))


def _identify(train: ClassifierCounts, held: ClassifierCounts, min_count: int) -> Identifiability:
    rows = []
    for c in np.flatnonzero(np.minimum(train.n_true, held.n_true) >= min_count).tolist():
        often = 2 * train.n_true[c] > train.n_tokens
        majority, rate = (float(p if often else 1 - p) for p in (one.n_true[c] / one.n_tokens for one in (held, train)))
        plain, even = train.accuracy(c), train.balanced_accuracy(c)
        best = int(plain.argmax())
        accuracy = float(held.accuracy(c)[best]) if plain[best] > rate else majority
        rows.append((accuracy, majority, float(held.balanced_accuracy(c)[int(even.argmax())])))
    if not rows:
        raise ValueError(
            f"`labels` must have a concept with {min_count} tokens on either side of the split, got none; give more "
            "tokens, or a smaller `min_count`."
        )
    accuracy, majority, balanced = np.mean(rows, 0).tolist()
    return Identifiability(
        accuracy=accuracy,
        accuracy_majority=majority,
        balanced=balanced,
        n_concepts=len(rows),
        n_tokens=held.n_tokens,
        n_train=train.n_tokens,
    )


def connectivity(codes: CodeMatrix | FeatureStore) -> float:
    """`1 - |Z^T Z|_0 / d_sae^2`: the share of the pairs of features that never fire on one token; in [0, 1].

    Whatever the signs of the codes; a feature is a pair with itself. Source: arXiv:2502.12892, appendix.

    >>> connectivity(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]))  # 5 of 9 pairs fire together
    0.4444444444444444
    """
    values = _read_codes(codes)
    together = sum(block.nnz for _, block in _products(_mark(values)))
    return 1 - together / max(1, values.shape[1]) ** 2


def independent_connectivity(fires: Int[np.ndarray, "d_sae"], n_tokens: int) -> float:
    """The expected `connectivity` of features whose firings were each permuted at random over the tokens.

    A pair with a and b firings then fires on no common token with probability `C(n - a, b) / C(n, b)`.

    >>> independent_connectivity(np.array([1, 1]), 2)  # of 4 pairs, two fire together half of the time
    0.25
    """
    a, total = torch.from_numpy(fires).double(), 0.0
    own = torch.lgamma(n_tokens - a + 1)
    for start in range(0, len(a), BLOCK):
        part = slice(start, start + BLOCK)
        free = n_tokens - a[part, None] - a
        log = own[part, None] + own - torch.lgamma(free.clamp(min=0) + 1) - math.lgamma(n_tokens + 1)
        apart = torch.where(free < 0, 0.0, log.exp())
        apart.diagonal(start).copy_(a[part] == 0)
        total += float(apart.sum())
    return round(total, 9) / max(1, len(a)) ** 2


@torch.no_grad()
def negative_interference(sae: SAE, codes: CodeMatrix | FeatureStore, variance: float = 1.0) -> float:
    """Spectral norm of `relu(-(Z^T Z / n_tokens) * (D D^T))`: how much features that fire together cancel each other.

    At least 0, which is none. An entry is the mean over tokens of `<z_i d_i, z_j d_j>`, where it is negative; so it
    holds for signed codes, and is the same whatever the lengths of the rows. Source: arXiv:2502.12892, appendix, which
    takes the sum over tokens.

    Args:
        sae: the SAE whose directions the codes are of.
        codes: (n_tokens, d_sae) codes, or a feature store of them.
        variance: what the norm is divided by, such as the activations' `mean ||x - mean(x)||^2`.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=2, d_sae=2, activation=sl.TopK(k=2)))
    >>> _ = sae.W_dec.data.copy_(torch.tensor([[1.0, 0.0], [-0.6, 0.8]]))
    >>> round(negative_interference(sae, torch.tensor([[2.0, 1.0]])), 6)  # 2 x 1 x 0.6
    1.2
    """
    from scipy.sparse import csr_matrix, vstack

    values, rows = _read_codes(codes), sae.directions().float().cpu().numpy()
    if values.shape[1] != len(rows):
        raise ValueError(f"`codes` must have a column for each of the {len(rows)} features, got {values.shape[1]}.")
    parts = []
    for part, block in _products(values.astype(np.float64)):
        opposed = block.toarray() * (rows[part] @ rows.T) / max(1, values.shape[0])
        np.fill_diagonal(opposed[:, part], 0)  # rounding aside it is positive
        parts.append(csr_matrix(np.maximum(-opposed, 0)))
    norm = _spectral_norm(vstack(parts, format="csr"))
    return norm / variance if variance > 0 else math.nan


def _spectral_norm(matrix: "csr_matrix") -> float:
    """Of a symmetric matrix whose entries are at least 0, by power steps from ones: its first vector has no signs."""
    v, norm = np.full(matrix.shape[1], matrix.shape[1] ** -0.5), 0.0
    for _ in range(POWER_STEPS):
        image = matrix @ v
        before, norm = norm, float(np.linalg.norm(image))  # which never falls
        if norm <= before * (1 + POWER_GAIN):
            break
        v = image / norm
    return norm


def _read_codes(codes: CodeMatrix | FeatureStore) -> "csr_matrix":
    from scipy.sparse import csr_matrix

    values = csr_matrix(codes.matrix() if isinstance(codes, FeatureStore) else read_values(codes))
    values.eliminate_zeros()
    return values


def _mark(values: "csr_matrix") -> "csr_matrix":
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(values.nnz, np.int32), values.indices, values.indptr), shape=values.shape)


def _products(values: "csr_matrix") -> Iterator[tuple[slice, "csr_matrix"]]:
    """Rows of `Z^T Z`, a block of features at a time."""
    columns = values.tocsc()
    for start in range(0, values.shape[1], BLOCK):
        part = slice(start, min(start + BLOCK, values.shape[1]))
        yield part, (columns[:, part].T.tocsr() @ values).tocsr()


def measure_structure(
    sae: SAE,
    acts: Activations | Float[Tensor, "n_tokens d_in"],
    directions: Float[Tensor, "n d_in"],
    labels: LabelsLike | None = None,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    *,
    baselines: Mapping[str, SAE] | None = None,
    train_frac: float = 0.5,
    seed: int = 0,
) -> DictionaryStructure:
    """Plausibility, identifiability, connectivity and negative interference of an SAE and of baselines.

    Args:
        sae: the SAE.
        acts: (n_tokens, d_in) activations, all of which are encoded; best ones that the SAE was not trained on.
        directions: (n, d_in) known directions in the units of the activations, such as weights of linear probes.
        labels: which concepts are true of each token, as in `score_concepts`; None leaves identifiability out.
        doc_ids: story (document) of each token, needed where the labels do not have them.
        baselines: other dictionaries by name; None takes the centroids of k-means (`fit_baselines`). Random directions
            with the SAE's activation function, its encoder tied to them, are always among them.
        train_frac: share of stories that features are chosen on.
        seed: of the split, the permuted labels and the random directions.

    Raises:
        ValueError: for a transcoder, whose features are not of the activations that it reads, and where sizes disagree.
    """
    if sae.cfg.d_out is not None:
        raise ValueError(f"`sae` must reconstruct what it reads, got the transcoder {sae}; take `score_concepts`.")
    acts = Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts
    sample = draw_tokens(acts, SAMPLE_TOKENS, seed).to(sae.device)
    cfg = replace(sae.cfg, dictionary="unit", init="tied")  # an archetypal dictionary would start from the data
    others = {"random": prepare(cfg, sample, seed + OTHER_SEED)}
    if baselines is None:
        baselines = fit_baselines(sae, acts, methods=["kmeans"], seed=seed, progress=False)
    check_baselines(baselines, sae.cfg, list(others))
    x = acts[: len(acts)].float()
    given = None if labels is None else TokenLabels.of(labels, doc_ids=doc_ids)
    variance = float((exact(x) - exact(x).mean(0)).square().sum(1).mean())

    def measure(one: SAE) -> DictionaryStructure:
        codes = encode_csr(one, x)
        known = None if given is None else identifiability(codes, given, train_frac=train_frac, seed=seed)
        return DictionaryStructure(
            plausibility=plausibility(one, directions),
            identifiability=known,
            connectivity=connectivity(codes),
            connectivity_independent=independent_connectivity(_mark(codes).sum(0).A1, len(x)),
            negative_interference=negative_interference(one, codes, variance),
            d_sae=one.cfg.d_sae,
            signed=one.cfg.activation.signed,
            n_directions=len(directions),
            n_tokens=len(x),
        )

    return replace(measure(sae), baselines={name: measure(one) for name, one in (others | dict(baselines)).items()})
