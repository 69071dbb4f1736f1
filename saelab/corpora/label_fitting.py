"""`label_head`: a head that labels documents from sparse codes of their tokens is fitted, and scored beside others."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.corpora.coded_documents import CodedDocuments, TokenCodes, attend
from saelab.corpora.label_attention import HeadScore, LabelHead, Reads
from saelab.evaluation.side_masks import Coded
from saelab.functional.sparse_products import gather_sum
from saelab.functional.statistics import auroc, choose_threshold, f1
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.probing.feature_ranking import Columns, Labeled
from saelab.stores.corpus import choose_documents

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

THRESHOLD_FRAC = 0.25  # of training documents, on which thresholds are chosen
BATCH = 32  # documents of a step
KEPT_ENTRIES = 2**25  # codes of all batches that are held rather than read again
LR, LAST_LR, DECAY = 0.05, 0.05, 1e-4
FEW = 3  # documents with a label, below which its threshold is chosen on all training documents
N_FIRST, FIRST_WEIGHT, FIRST_TAU = 5, 3.0, math.e  # sides that a label begins with, and how
KS = (1, 5)
_Numbers: TypeAlias = Int[np.ndarray, "_"]


@torch.inference_mode(False)  # it learns, whatever the caller's mode
def label_head(
    codes: Coded,
    labels: LabelsLike,
    doc_ids: Shaped[Any, "_"] | None = None,
    *,
    acts: Float[Tensor, "_ _"] | None = None,
    untrained: Coded | None = None,
    reads: Reads = "codes",
    l1: float = 0.01,
    n_epochs: int = 16,
    train_frac: float = 0.75,
    min_count: int = 8,
    baselines: bool = True,
    seed: int = 0,
) -> LabelHead:
    """A head that labels documents by attention of each label to their tokens, from sparse codes (arXiv:2409.10504).

    Its one matrix, sides of features by labels, is kept sparse by an L1 penalty; see `LabelHead` for what it computes.
    Codes enter by magnitude, positive and negative ones apart, relative to the side's usual magnitude. It is fitted to
    three quarters of the training documents; thresholds are chosen (by Cohen's kappa) on the others, and all scores are
    of held-out documents. Unlike in the paper, the SAE stays as it is.

    `scores` has the head first. With `baselines` also: the head without attention, all tokens alike; a logistic
    regression on the largest code of each side in the document; regressions on the 1 and 5 best of these (k-sparse
    probes); the head fitted to labels of other documents; with `acts` a head on dense activations, and with `untrained`
    one on the codes of an untrained SAE.

    Args:
        codes: a store, or codes as `score_concepts` takes them.
        labels: which labels each document has, documents in ascending order of their number; see `label_documents`.
        doc_ids: document of each token, where `codes` is not a store.
        acts: activations of the same tokens.
        untrained: codes of an untrained SAE on the same tokens, as `sl.collecting.harvest_untrained` makes them.
        reads: "codes", so that logits are sums over features; "activations" as in the paper, where features give the
            attention alone.
        l1: weight of the sum of the matrix' magnitudes, in nats per document.
        n_epochs: passes over the training documents.
        train_frac: share of documents for training.
        min_count: labels with fewer training or held-out documents, or fewer without it, are left out.
        baselines: whether to fit what the head is compared with; each takes about as long as the head.
        seed: of the split, of batches and of exchanged labels.

    Raises:
        ValueError: sizes that disagree, labels that are all too rare, activations that are missing, or settings out of
            range.
    """
    if reads not in get_args(Reads):
        raise ValueError(f"`reads` must be one of {get_args(Reads)}, got {reads!r}.")
    if not 0 <= l1 < math.inf or n_epochs < 1 or min_count < 2:
        raise ValueError(
            "`l1` must be finite and not negative, `n_epochs` at least 1 and `min_count` at least 2, got "
            f"{l1}, {n_epochs} and {min_count}."
        )
    text = CodedDocuments(codes, doc_ids, acts)
    if reads == "activations" and acts is None:
        raise ValueError("`acts` must be given for a head that reads activations, got None.")
    bench = _LabelSplit.make(text, labels, train_frac, min_count, seed)
    settings = _Settings(reads, l1, n_epochs, seed)
    found = _fit(text, bench, settings)
    scores = [found.score("head", bench)]
    if baselines:
        scores += _compare(text, bench, settings, acts, untrained)
    held = bench.y[bench.held]
    head = _freeze(text, bench, settings, found)
    return replace(head, scores=tuple(scores), n_documents=len(held), rate=float(held.sum(1).mean()))


class _Settings(NamedTuple):
    reads: Reads
    l1: float
    n_epochs: int
    seed: int


@dataclass(frozen=True, eq=False)
class _LabelSplit:
    """Labels of documents, and which are learned from, chosen thresholds on, and measured on."""

    names: tuple[str, ...]
    skipped: tuple[str, ...]
    y: Bool[np.ndarray, "n_documents n_labels"]
    learned: _Numbers
    chosen: _Numbers
    held: _Numbers

    @classmethod
    def make(
        cls, text: CodedDocuments, labels: LabelsLike, train_frac: float, min_count: int, seed: int
    ) -> "_LabelSplit":
        given = TokenLabels.of(labels)
        if given.n_tokens != len(text):
            raise ValueError(
                f"`labels` must have a row for each of the {len(text)} documents, got {given.n_tokens}; of labels of "
                "tokens make such with `label_documents`."
            )
        if given.doc_ids is not None and not np.array_equal(given.doc_ids, text.ids):
            raise ValueError(
                f"`labels` must be of the codes' documents, in ascending order, got {given.doc_ids[:5].tolist()}... "
                f"for {text.ids[:5].tolist()}..."
            )
        is_train = choose_documents(text.ids, train_frac, seed)
        train = np.random.default_rng(seed).permutation(np.flatnonzero(is_train))
        n = round(THRESHOLD_FRAC * len(train))
        if n < 2:
            raise ValueError(
                f"{THRESHOLD_FRAC:.0%} of the training documents, for thresholds, must be 2 or more, got {len(train)} "
                f"training documents of {len(text)}; give more documents, or a larger `train_frac`."
            )
        y = given.matrix.toarray()
        sides = [y[rows] for rows in (is_train, ~is_train)]
        counts = np.min([np.minimum(side.sum(0), (~side).sum(0)) for side in sides], axis=0)
        keep = counts >= min_count
        if not keep.any():
            raise ValueError(
                f"`labels` must have one that {min_count} training and {min_count} held-out documents have and as many "
                f"have not (`min_count`), got at most {int(counts.max(initial=0))}; give more documents."
            )
        names = np.array(given.names, dtype=object)
        return cls(
            names=tuple(names[keep]),
            skipped=tuple(names[~keep]),
            y=y[:, keep],
            learned=np.sort(train[n:]),
            chosen=np.sort(train[:n]),
            held=np.flatnonzero(~is_train),
        )

    def thresholds(self, logits: Float[np.ndarray, "n n_labels"]) -> Float[np.ndarray, "n_labels"]:
        """The threshold of each label with the highest kappa on documents that it was not fitted to.

        It is infinite where no side of a feature is left for the label, so that it is never predicted.
        """
        found = np.empty(logits.shape[1])
        for c in range(logits.shape[1]):
            rows = self.chosen
            if min(n := self.y[rows, c].sum(), len(rows) - n) < FEW:
                rows = np.concatenate([self.learned, self.chosen])
            constant = np.ptp(logits[rows, c]) == 0
            found[c] = math.inf if constant else choose_threshold(logits[rows, c], self.y[rows, c])[0]
        return found

    def score(self, name: str, logits: Float[np.ndarray, "n n_labels"], n_features: float) -> HeadScore:
        """Scores on held-out documents."""
        guess, true = logits[self.held] >= self.thresholds(logits), self.y[self.held]
        counts = np.stack([(guess & true).sum(0), guess.sum(0), true.sum(0)])
        areas = [auroc(logits[self.held, c], true[:, c]) for c in range(true.shape[1])]
        return HeadScore(
            name=name,
            micro_f1=float(f1(*counts.sum(1))),
            macro_f1=float(f1(*counts).mean()),
            auroc=float(np.mean(areas)),
            n_features=n_features,
        )

    def exchanged(self, seed: int) -> "_LabelSplit":
        """The same with the labels of other documents of the same part."""
        y, rng = self.y.copy(), np.random.default_rng(seed)
        for rows in (self.learned, self.chosen, self.held):
            y[rows] = self.y[rng.permutation(rows)]
        return replace(self, y=y)


class _Batch(NamedTuple):
    """Tokens of some documents."""

    documents: _Numbers
    own: Int[Tensor, "n"]
    codes: TokenCodes | None
    x: Float[Tensor, "n d_in"] | None

    @property
    def n_entries(self) -> int:
        return (0 if self.codes is None else len(self.codes.values)) + (0 if self.x is None else self.x.numel())

    def score(self, A: Tensor) -> Tensor:
        """What features say of each token for each label, or without codes what the activations say."""
        if self.codes is None:
            assert self.x is not None
            return self.x @ A
        return gather_sum(self.codes.sides, self.codes.values, self.codes.offsets, A)


@dataclass(frozen=True, eq=False)
class _HeadSides:
    """Sides that fire in enough training documents, and how codes of theirs are read."""

    place: Int[np.ndarray, "n"]
    usual: Float[Tensor, "n_sides"]

    @classmethod
    def count(cls, text: CodedDocuments, documents: _Numbers) -> "_HeadSides":
        """Those that fire in two of some documents at least."""
        n = 2 * text.d_sae
        fires, sums, counts = np.zeros(n, np.int64), np.zeros(n), np.zeros(n, np.int64)
        every = np.arange(n)
        for part in text.batches(documents):
            rows, own = text.tokens_of(part)
            codes = text.codes_of(rows, every)
            sides = codes.sides.numpy()
            fires += np.bincount(sides, minlength=n)
            sums += np.bincount(sides, codes.values.numpy(), minlength=n)
            both = np.unique(np.repeat(own, np.diff(codes.offsets.numpy())) * n + sides)
            counts += np.bincount(both % n, minlength=n)
        kept = np.flatnonzero(counts >= 2)
        place = np.full(n, -1)
        place[kept] = np.arange(len(kept))
        return cls(place, torch.from_numpy(sums[kept] / fires[kept]).float())


@dataclass(frozen=True, eq=False)
class _Scale:
    """Activations with mean 0 and mean square 1."""

    mean: Float[Tensor, "d_in"]
    size: float

    @classmethod
    def of(cls, text: CodedDocuments, documents: _Numbers) -> "_Scale":
        rows, _ = text.tokens_of(documents)
        x = text.acts_of(rows)
        mean = x.mean(0)
        return cls(mean, float((x - mean).square().mean().sqrt()) or 1.0)

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.size


@dataclass(frozen=True, eq=False)
class _Reader:
    """Documents as they are read: codes of some sides, scaled activations, or both."""

    text: CodedDocuments
    sides: _HeadSides | None
    scale: _Scale | None

    def read(self, documents: _Numbers) -> _Batch:
        """The tokens of some documents."""
        rows, own = self.text.tokens_of(documents)
        codes = None
        if self.sides is not None:
            codes = self.text.codes_of(rows, self.sides.place)
            codes = codes._replace(values=codes.values / self.sides.usual[codes.sides])
        x = None if self.scale is None else self.scale.apply(self.text.acts_of(rows))
        return _Batch(documents, torch.from_numpy(own), codes, x)


class _Batches:
    """Batches of documents; of those that fit in memory each is read once."""

    def __init__(self, reader: _Reader, parts: Sequence[_Numbers]) -> None:
        self.reader, self.parts = reader, parts
        self.kept: dict[int, _Batch] = {}
        self.n_kept = 0

    def read(self, i: int) -> _Batch:
        """Batch i."""
        if i in self.kept:
            return self.kept[i]
        batch = self.reader.read(self.parts[i])
        if self.n_kept < KEPT_ENTRIES:
            self.kept[i] = batch
            self.n_kept += batch.n_entries
        return batch


class _Weights(torch.nn.Module):
    """What is learned: the matrix, what is read of activations, temperatures, and biases."""

    def __init__(self, n_columns: int, d_in: int, rate: Float[Tensor, "n_labels"], attention: bool) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.zeros(n_columns, len(rate)))
        self.W = torch.nn.Parameter(torch.zeros(d_in, len(rate)))
        self.log_tau = torch.nn.Parameter(torch.zeros(len(rate)), requires_grad=attention)
        self.bias = torch.nn.Parameter(rate.logit())
        self.attention = attention

    @property
    def temperature(self) -> Tensor:
        return self.log_tau.exp() if self.attention else torch.zeros_like(self.log_tau)

    def forward(self, batch: _Batch) -> Tensor:
        """Logits of the documents of a batch."""
        scores, n = batch.score(self.A), len(batch.documents)
        said = scores if not len(self.W) else batch.x @ self.W  # type: ignore[operator]
        weights = attend(scores * self.temperature, batch.own, n)
        return self.bias + scores.new_zeros(n, scores.shape[1]).index_add(0, batch.own, weights * said)


def _learn(weights: _Weights, batches: _Batches, y: Tensor, settings: _Settings) -> None:
    """Adam on the summed cross-entropy of all labels; the penalty's proximal step is in Adam's metric, in which an
    entry of 0 stays where its gradient is below the penalty.
    """
    parts: list[dict[str, Any]] = [
        {"params": [weights.A, weights.bias, weights.log_tau]},
        {"params": [weights.W], "weight_decay": DECAY},
    ]
    optimizer = torch.optim.Adam(parts, lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_LR, settings.n_epochs)
    rng, n_steps = np.random.default_rng(settings.seed), 0
    for _ in range(settings.n_epochs):
        for i in rng.permutation(len(batches.parts)).tolist():
            batch = batches.read(i)
            optimizer.zero_grad()
            logits = weights(batch)
            loss = binary_cross_entropy_with_logits(logits, y[torch.from_numpy(batch.documents)], reduction="none")
            loss.sum(1).mean().backward()
            optimizer.step()
            n_steps += 1
            metric = (optimizer.state[weights.A]["exp_avg_sq"] / (1 - 0.999**n_steps)).sqrt_().add_(1e-8)
            with torch.no_grad():
                step = metric.reciprocal_().mul_(schedule.get_last_lr()[0] * settings.l1)
                weights.A.copy_(weights.A.sign() * (weights.A.abs() - step).clamp_(min=0))
        schedule.step()


def _fit(
    text: CodedDocuments, bench: _LabelSplit, settings: _Settings, *, dense: bool = False, attention: bool = True
) -> "_LearnedHead":
    """What is learned, and its logits of all documents.

    Args:
        text: the documents.
        bench: their labels.
        settings: those of `label_head`.
        dense: whether the attention is by activations too, and not by codes.
        attention: False for all tokens alike.
    """
    sides = None if dense else _HeadSides.count(text, bench.learned)
    scale = _Scale.of(text, bench.learned) if settings.reads == "activations" else None
    reader = _Reader(text, sides, scale)
    order = np.random.default_rng(settings.seed).permutation(bench.learned)
    parts = np.array_split(order, max(1, round(len(order) / BATCH)))
    batches = _Batches(reader, [np.sort(part) for part in parts])
    rate = torch.from_numpy((bench.y[bench.learned].sum(0) + 0.5) / (len(bench.learned) + 1)).float()
    width = 0 if scale is None else len(scale.mean)
    weights = _Weights(width if sides is None else len(sides.usual), width, rate, attention)
    if sides is not None:
        weights.log_tau.data.fill_(math.log(FIRST_TAU))
        weights.A.data = _begin(text.largest(sides.place, len(sides.usual), bench.learned), bench.y[bench.learned])
    with torch.enable_grad():
        _learn(weights, batches, torch.from_numpy(bench.y).float(), settings)
    logits = torch.zeros(len(text), len(bench.names))
    with torch.no_grad():
        for documents in text.batches():
            logits[torch.from_numpy(documents)] = weights(reader.read(documents))
    return _LearnedHead(weights.requires_grad_(False), sides, scale, logits.numpy().astype(np.float64))


def _begin(largest: "csr_matrix", y: Bool[np.ndarray, "n n_labels"]) -> Float[Tensor, "n_sides n_labels"]:
    """The matrix to begin with: correlations of each label with the largest codes of the sides most like it.

    With a matrix of zeros a label attends to all tokens alike, and evidence in a few of many tokens is never found.
    """
    columns, truth = Columns(largest.tocsc()), y - y.mean(0)
    likeness = (columns.matrix.T @ truth) / (columns.deviations[:, None] * np.sqrt(len(y) * (truth**2).sum(0)))
    at = max(0, len(likeness) - N_FIRST)
    least = np.partition(np.abs(likeness), at, axis=0)[at]
    return torch.from_numpy(np.where(np.abs(likeness) >= least, FIRST_WEIGHT * likeness, 0)).float()


@dataclass(frozen=True, eq=False)
class _LearnedHead:
    """What was learned, and its logits."""

    weights: _Weights
    sides: _HeadSides | None
    scale: _Scale | None
    logits: Float[np.ndarray, "n_documents n_labels"]

    def score(self, name: str, bench: _LabelSplit) -> HeadScore:
        return bench.score(name, self.logits, float((self.weights.A != 0).sum(0).float().mean()))


def _freeze(text: CodedDocuments, bench: _LabelSplit, settings: _Settings, found: _LearnedHead) -> LabelHead:
    """The head as it is kept: weights per unit of code and of activations, without rows that are 0."""
    weights, sides, scale = found.weights, found.sides, found.scale
    assert sides is not None
    A, W, bias = weights.A.data, weights.W.data, weights.bias.data
    if scale is not None:  # attention sums to 1, so that a mean becomes a part of the bias
        W = W / scale.size
        bias = bias - scale.mean @ W
    kept = A.any(1).nonzero()[:, 0]
    usual = sides.usual[kept]
    own = np.flatnonzero(sides.place >= 0)[kept.numpy()]
    return LabelHead(
        labels=bench.names,
        skipped=bench.skipped,
        d_sae=text.d_sae,
        reads=settings.reads,
        features=own // 2,
        signs=1 - 2 * (own % 2),
        usual=usual.numpy(),
        A=A[kept] / usual[:, None],
        W=W,
        bias=bias,
        temperature=weights.temperature.data,
        thresholds=torch.from_numpy(bench.thresholds(found.logits)).float(),
        scores=(),
        n_train=len(bench.learned) + len(bench.chosen),
        n_documents=0,
        rate=0.0,
        l1=settings.l1,
        seed=settings.seed,
    )


def _compare(
    text: CodedDocuments, bench: _LabelSplit, settings: _Settings, acts: Tensor | None, untrained: Coded | None
) -> Iterator[HeadScore]:
    """Scores of what the head is compared with."""

    def fit(name: str, text: CodedDocuments, bench: _LabelSplit, settings: _Settings, **how: bool) -> HeadScore:
        return _fit(text, bench, settings, **how).score(name, bench)

    yield fit("no attention", text, bench, settings, attention=False)
    sides = _HeadSides.count(text, bench.learned)
    largest = text.largest(sides.place, len(sides.usual))
    pooled = CodedDocuments(largest, text.ids)
    yield fit("largest codes", pooled, bench, settings._replace(reads="codes"))
    yield from _probe(largest, bench)
    if acts is not None:
        yield fit("dense head", text, bench, settings._replace(reads="activations", l1=0.0), dense=True)
    if untrained is not None:
        other = CodedDocuments(untrained, _documents_of(text), acts)
        yield fit("untrained SAE", other, bench, settings)
    yield fit("labels exchanged", text, bench.exchanged(settings.seed), settings)


def _documents_of(text: CodedDocuments) -> Shaped[np.ndarray, "n_tokens"]:
    """Document of each token, in the order of the tokens."""
    found = np.empty(len(text.rows), text.ids.dtype)
    found[text.rows] = np.repeat(text.ids, np.diff(text.starts))
    return found


def _probe(largest: "csr_matrix", bench: _LabelSplit) -> Iterator[HeadScore]:
    """Logistic regressions on the k sides with the largest ANOVA F for each label."""
    columns = Columns(largest[bench.learned].tocsc())
    by_column = largest.tocsc()
    logits = {k: np.zeros(bench.y.shape) for k in KS if k <= largest.shape[1]}
    for c in range(bench.y.shape[1]):
        y = bench.y[bench.learned, c]
        one = Labeled(columns, y, np.arange(len(y)))
        for k, chosen in one.choose("f", list(logits)).items():
            logits[k][:, c] = by_column[:, chosen] @ (one.fit(chosen) / columns.deviations[chosen])
    for k, found in logits.items():
        yield bench.score(f"{k} best feature{'s' if k > 1 else ''}", found, float(k))
