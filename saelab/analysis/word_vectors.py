"""`word_geometry`: mean vectors of words in each layer: topics, norms against information gain, attention by topic."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.collecting.reader import DEFAULT_MASK, ActivationReader
from saelab.functional.metrics import exact
from saelab.functional.statistics import auroc, correlation
from saelab.lm.freezing import Freezing, ScoreTerms, ScoreWatch
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import batches_of, forward_size, logits
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.models import describe_model
from saelab.lm.tokens import Tokens
from saelab.lm.unwrapped import attach, run
from saelab.lm.verification import find_residuals
from saelab.stores.results import Result, find_row, format_table

MOST_TOKENS = 1024
ATTENDED_TOKENS = 4096
"""Tokens in whose attention topics are looked for."""
RIDGE = 1e-3
"""Of whitening, as a share of the mean variance."""
ABOUT = {
    "gain": "correlation of a word's squared distance from the mean with the information gain of what follows it",
    "gain_partial": "the same without what log frequency predicts of both",
    "topic_cosine": "mean cosine of centered words of one topic, less that of two topics",
    "topic_product": "the same of inner products, over the mean squared norm",
    "raw": "AUROC of the cosine for words of one topic against two",
    "centered": "the same of words less their mean",
    "centered_zipf": "the same, of the mean weighted by frequency",
    "whitened": "the same of whitened words",
    "whitened_zipf": "the same, whitened by frequency (Zipfian whitening)",
    "attention": "mean attention to an earlier word of the same topic over that to words of other topics, log ratio",
}
LIMITS = (
    "Means over contexts are no word's vector in any one of them, and frequent words have steadier ones. Words that "
    "occur together are alike for that reason alone. p is of permuted words: it knows nothing of other texts or models."
)


@dataclass(frozen=True, kw_only=True)
class WordScore:
    """One number of a layer, and what permuting the words gives of it."""

    layer: str
    measure: str
    value: float
    chance: float
    """mean over permutations"""
    chance_std: float
    p: float
    """share of permutations as far from the mean as the value, or farther, which is counted among them"""


@dataclass(frozen=True, kw_only=True)
class WordGeometry(Result):
    """Numbers of the mean vectors of words, by layer, each beside permuted words."""

    model: str
    source: str
    rows: tuple[WordScore, ...]
    n_words: int
    n_in_topics: int
    """words that are in a topic"""
    topics: dict[str, int]
    """words by topic"""
    n_tokens: int
    n_attended: int
    """tokens in whose attention topics were looked for; 0 for none"""
    n_permutations: int
    seed: int
    reason: str
    """why there is no attention; empty where there is"""
    limits: str = LIMITS

    def find(self, layer: str, measure: str) -> WordScore:
        """The number of a layer; KeyError that lists those that there are."""
        return find_row(self.rows, layer=layer, measure=measure)

    @property
    def untold(self) -> tuple[WordScore, ...]:
        """Numbers that are no different from permuted words, p > 0.05; one in twenty is told by chance."""
        return tuple(row for row in self.rows if not row.p <= 0.05)

    def __str__(self) -> str:
        failed = [f"{row.measure} at {row.layer} (p {row.p:.2f})" for row in self.untold]
        lines = [
            f"{self.model} on {self.source}: {self.n_words:,} words, {self.n_in_topics:,} in {len(self.topics)} "
            f"topics, {self.n_tokens:,} tokens, {self.n_permutations} permutations, seed {self.seed}",
            f"no different from permuted words (p > 0.05): {', '.join(failed) or 'none'}",
        ]
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        table = [["", *layers]]
        for name in dict.fromkeys(row.measure for row in self.rows):
            mine = {row.layer: row for row in self.rows if row.measure == name}
            table.append([name, *(f"{mine[layer].value:.3f}" if layer in mine else "-" for layer in layers)])
            nulls = [f"{mine[one].chance:.3f} ({mine[one].chance_std:.3f})" if one in mine else "-" for one in layers]
            table.append(["  permuted (sd)", *nulls])
        told = [f"{name}: {about}" for name, about in ABOUT.items() if any(row.measure == name for row in self.rows)]
        lines += ["", *format_table(table), "", *told]
        return "\n".join([*lines, *([f"no attention: {self.reason}"] if self.reason else []), self.limits])


def word_geometry(
    model: AnyModel,
    tokens: Tokens,
    topics: Mapping[str, Collection[int]] | None = None,
    hook_points: Sequence[str] | None = None,
    *,
    n_words: int = 512,
    min_count: int = 8,
    mask: TokenMask = DEFAULT_MASK,
    n_permutations: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> WordGeometry:
    """How the words of a text lie in each layer: norms against information gain, and topics, beside permuted words.

    A word is a token id, and its vector in a layer the mean of the activations at its occurrences: in front of the
    first block, where no positions are added, its embedding. Its information gain is the KL of its mean prediction from
    that of all tokens (arXiv:2212.09663). With topics, words of one are compared with words of two: by cosines,
    inner products, and after whitening with each word alike or weighted by its frequency (arXiv:2411.00680), and by the
    attention of later words of the topic (arXiv:2303.04245).

    Args:
        model: the language model.
        tokens: text.
        topics: token ids of each topic's words, each id in one topic; None measures the information gain alone.
        hook_points: layers; None is the input of each block and the output of the last.
        n_words: the most frequent words that are taken, at least 8.
        min_count: occurrences that a word must have.
        mask: tokens that count.
        n_permutations: permutations of the words for each null.
        batch_size: sequences in a forward pass; None takes as many as hold about 1,024 tokens.
        seed: of the permutations.
        progress: show progress.

    Raises:
        ValueError: for too few words, a word in two topics, fewer than two topics with two words each, and as
            `layer_profile`.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 60)], ctx_len=24)
    >>> word_geometry(model, tokens, progress=False).find("blocks.0.hook_in", "gain").p > 0
    True
    """
    model = as_model(model)
    if n_words < 8 or min_count < 1 or n_permutations < 19:
        raise ValueError(
            f"`n_words` must be at least 8, `min_count` 1 and `n_permutations` 19, got {n_words}, {min_count} and "
            f"{n_permutations}."
        )
    names = tuple(hook_points or find_residuals(hook_points_of(model)))
    n_seq = forward_size(tokens, batch_size, MOST_TOKENS)
    reader = ActivationReader.make(model, tokens, names, mask, torch.float32).calibrated(tokens, n_seq)
    words = _read_words(reader, tokens, n_seq, n_words, min_count, progress)
    topic = _place_topics(topics or {}, words.ids)
    if topics is not None and np.count_nonzero(np.bincount(topic[topic >= 0], minlength=1) >= 2) < 2:
        raise ValueError(
            f"`topics` must be at least two of which the text has two words {min_count} times each, got "
            f"{_count_topics(topics, topic)}. Give more text, or a smaller `min_count`."
        )
    rng = np.random.default_rng(seed)
    rows = []
    for name in names:
        vectors = words.vectors[name]
        for measure, of in _measures(vectors, words, topic, has_topics=topics is not None).items():
            rows.append(_test(name, measure, of, len(words.ids), n_permutations, rng))
    patterns: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    n_attended, reason = 0, "no topics were given"
    if topics is not None:
        patterns, n_attended, reason = _read_attention(model, tokens, mask)
        for layer, counts in patterns.items():
            attended = _TopicAttention.of(counts, words.ids, topic)
            rows.append(_test(layer, "attention", attended.ratio, len(words.ids), n_permutations, rng))
    return WordGeometry(
        model=describe_model(model).name,
        source=tokens.source,
        rows=tuple(rows),
        n_words=len(words.ids),
        n_in_topics=int((topic >= 0).sum()),
        topics=_count_topics(topics or {}, topic),
        n_tokens=words.n_tokens,
        n_attended=n_attended,
        n_permutations=n_permutations,
        seed=seed,
        reason=reason if not patterns else "",
    )


@dataclass(frozen=True, eq=False)
class _Words:
    """The words of a text, by frequency."""

    ids: Int[np.ndarray, "n"]
    counts: Int[np.ndarray, "n"]
    vectors: dict[str, Float[np.ndarray, "n d"]]
    """mean activations by layer"""
    gain: Float[np.ndarray, "n"]
    n_tokens: int


@torch.no_grad()
def _read_words(
    reader: ActivationReader, tokens: Tokens, n_seq: int, n_words: int, min_count: int, progress: bool
) -> _Words:
    kept = tokens.ids[reader.mask.apply(tokens).keep] if reader.mask.max_norm_ratio is None else tokens.ids.flatten()
    ids, counts = np.unique(kept.numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:n_words]
    ids = np.sort(ids[order][counts[order] >= min_count])
    if len(ids) < 8:
        raise ValueError(f"`tokens` must hold 8 words that occur {min_count} times, got {len(ids)}. Give more text.")
    sums: dict[str, Tensor] = {}
    seen, predicted, every, n_tokens = np.zeros(len(ids), np.int64), torch.zeros(()), torch.zeros(()), 0
    for batch in tqdm(list(batches_of(tokens, n_seq)), disable=not progress, desc="words"):
        if not reader.count_rows(batch):
            continue
        rows = reader.read(batch)
        own = rows.columns["token_ids"].cpu().numpy()
        places = np.minimum(np.searchsorted(ids, own), len(ids) - 1)
        known = ids[places] == own
        at, chosen = torch.from_numpy(places[known]), torch.from_numpy(known)
        seen += np.bincount(places[known], minlength=len(ids))
        n_tokens += len(own)
        made = logits(reader.model, batch.ids).float().flatten(0, 1)
        p = made[rows.index.to(made.device)].softmax(-1).cpu().double()
        every = every + p.sum(0)
        if not predicted.ndim:
            predicted = torch.zeros(len(ids), p.shape[1])
        predicted.index_add_(0, at, p[chosen].float())
        for name, x in rows.acts.items():
            sums.setdefault(name, torch.zeros(len(ids), x.shape[1], dtype=torch.float64))
            sums[name].index_add_(0, at, exact(x).cpu()[chosen])
    weight = torch.from_numpy(np.maximum(seen, 1))[:, None].double()
    p = predicted.double() / weight
    gain = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, every / n_tokens).sum(1)
    vectors = {name: (total / weight).numpy() for name, total in sums.items()}
    return _Words(ids, seen, vectors, gain.numpy(), n_tokens)


def _place_topics(topics: Mapping[str, Collection[int]], ids: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Number of each word's topic, -1 for none."""
    found: dict[int, int] = {}
    for i, (name, members) in enumerate(topics.items()):
        for word in members:
            if found.setdefault(int(word), i) != i:
                raise ValueError(
                    f"A word must be in one topic, got id {word} in two, '{name}' the second. Leave it out."
                )
    return np.array([found.get(int(word), -1) for word in ids], np.int64)


def _count_topics(topics: Mapping[str, Any], topic: Int[np.ndarray, "n"]) -> dict[str, int]:
    return {name: int((topic == i).sum()) for i, name in enumerate(topics)}


Permuted = Callable[[np.ndarray], float]
"""the number with words exchanged"""


def _measures(
    vectors: Float[np.ndarray, "n d"], words: _Words, topic: Int[np.ndarray, "n"], has_topics: bool
) -> dict[str, Permuted]:
    """Each measure as a function of an order of the words: their gains or topics are those of others."""
    weights = words.counts / words.counts.sum()
    norms = ((vectors - weights @ vectors) ** 2).sum(1)
    log_count = np.log(words.counts)
    found: dict[str, Permuted] = {
        "gain": lambda order: correlation(norms, words.gain[order]),
        "gain_partial": lambda order: correlation(_left(norms, log_count), _left(words.gain, log_count)[order]),
    }
    if not has_topics:
        return found
    inside = np.flatnonzero(topic >= 0)
    pairs = np.triu_indices(len(inside), 1)

    def same(order: np.ndarray) -> np.ndarray:
        mine = topic[inside][np.argsort(np.argsort(order[inside]))]  # topics of other words that have one
        return mine[pairs[0]] == mine[pairs[1]]

    alike = np.full(len(vectors), 1 / len(vectors))
    centered = vectors - weights @ vectors
    spaces = {
        "raw": vectors,
        "centered": vectors - alike @ vectors,
        "centered_zipf": centered,
        "whitened": _whiten(vectors, alike),
        "whitened_zipf": _whiten(vectors, weights),
    }
    cosines = {name: _cosines(rows[inside])[pairs] for name, rows in spaces.items()}
    products = (centered[inside] @ centered[inside].T)[pairs] / np.mean((centered[inside] ** 2).sum(1))
    found["topic_cosine"] = lambda order: _gap(cosines["centered_zipf"], same(order))
    found["topic_product"] = lambda order: _gap(products, same(order))
    for name, values in cosines.items():
        found[name] = lambda order, values=values: auroc(values, same(order))  # type: ignore[misc]
    return found


def _left(values: Float[np.ndarray, "n"], by: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """What a linear function of `by` leaves of values."""
    columns = np.stack([np.ones(len(by)), by], 1)
    return np.asarray(values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0])


def _gap(values: Float[np.ndarray, "n"], same: np.ndarray) -> float:
    return float(values[same].mean() - values[~same].mean())


def _cosines(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    return np.asarray(unit @ unit.T)


def _whiten(rows: Float[np.ndarray, "n d"], weights: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n d"]:
    """Rows whose weighted mean is 0 and covariance 1, but for a ridge."""
    centered = rows - weights @ rows
    values, axes = np.linalg.eigh((centered * weights[:, None]).T @ centered)
    return np.asarray(centered @ (axes / np.sqrt(values.clip(min=0) + RIDGE * values.mean())))


def _test(layer: str, measure: str, of: Permuted, n: int, n_permutations: int, rng: np.random.Generator) -> WordScore:
    value = of(np.arange(n))
    drawn = np.array([of(rng.permutation(n)) for _ in range(n_permutations)])
    mean = float(np.nanmean(drawn)) if not np.isnan(drawn).all() else math.nan
    as_far = np.abs(drawn - mean) >= abs(value - mean) - 1e-12
    p = math.nan if math.isnan(value) else float((1 + as_far.sum()) / (1 + n_permutations))
    std = float(np.nanstd(drawn)) if not math.isnan(mean) else math.nan
    return WordScore(layer=layer, measure=measure, value=value, chance=mean, chance_std=std, p=p)


@dataclass(frozen=True, eq=False)
class _TopicAttention:
    """Attention of words to words: its sum and the number of pairs of occurrences, of those in a topic."""

    mass: Float[np.ndarray, "n n"]
    pairs: Float[np.ndarray, "n n"]
    topic: Int[np.ndarray, "n"]
    words: Int[np.ndarray, "n"]
    """places among all words"""

    @classmethod
    def of(
        cls, counts: tuple[np.ndarray, np.ndarray, np.ndarray], ids: Int[np.ndarray, "m"], topic: Int[np.ndarray, "m"]
    ) -> "_TopicAttention":
        query, key, mass = counts
        inside = np.flatnonzero(topic >= 0)
        places = np.full(int(max(ids.max(), query.max(initial=0), key.max(initial=0))) + 1, -1)
        places[ids[inside]] = np.arange(len(inside))
        known = (places[query] >= 0) & (places[key] >= 0) & (query != key)  # a word's own earlier places are no topic
        flat, n = places[query[known]] * len(inside) + places[key[known]], len(inside)
        sums = np.bincount(flat, mass[known], n * n).reshape(n, n)
        return cls(sums, np.bincount(flat, minlength=n * n).reshape(n, n).astype(float), topic[inside], inside)

    def ratio(self, order: Int[np.ndarray, "m"]) -> float:
        """Log ratio of mean attention within topics to that between, with topics exchanged."""
        mine = self.topic[np.argsort(np.argsort(order[self.words]))]
        same = mine[:, None] == mine
        inside, between = (self.mass[one].sum() / max(1.0, self.pairs[one].sum()) for one in (same, ~same))
        return math.log(inside / between) if inside > 0 and between > 0 else math.nan


@torch.no_grad()
def _read_attention(
    model: Model, tokens: Tokens, mask: TokenMask
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], int, str]:
    """By layer, ids of query and key and their attention, mean over heads, for all pairs of kept tokens of a document;
    the number of tokens; and why there is none.
    """
    home = hook_points_of(model)
    layers = [name.removesuffix(".hook_in") for name in find_residuals(home)[:-1]]
    points = [f"{layer}.attn.hook_{side}" for layer in layers for side in ("in", "out")]
    if missing := [name for name in points if name not in home.points]:
        return {}, 0, f"the model has no '{missing[0]}'"
    running, sites = home.route(points)
    found: dict[str, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in layers}
    n_seen = 0
    for row in range(len(tokens)):
        batch = tokens[row]
        keep = mask.apply(batch).keep[0]
        ids, documents = batch.ids[0].numpy(), batch.doc_ids[0]
        watches = [ScoreWatch() for _ in layers]
        with ExitStack() as stack:
            for i, watch in enumerate(watches):
                stack.enter_context(attach(sites[2 * i], watch.begin))
                stack.enter_context(attach(sites[2 * i + 1], watch.end))
            stack.enter_context(Freezing(watch=partial(_show, watches)))
            run(running, batch.ids.long().to(home.probe.device))
        if any(watch.found is None for watch in watches):
            return {}, 0, "attention is computed in another way than from queries and keys"
        pairs = keep[:, None] & keep & (documents[:, None] == documents)
        query, key = (one.numpy() for one in pairs.tril(-1).nonzero(as_tuple=True))
        for layer, watch in zip(layers, watches, strict=True):
            assert watch.found is not None
            pattern = _find_pattern(watch.found).cpu().numpy()
            found[layer].append((ids[query], ids[key], pattern[query, key]))
        n_seen += int(keep.sum())
        if n_seen >= ATTENDED_TOKENS:
            break
    joined = {layer: [np.concatenate(one) for one in zip(*parts, strict=True)] for layer, parts in found.items()}
    return {layer: (parts[0], parts[1], parts[2]) for layer, parts in joined.items()}, n_seen, ""


def _show(watches: Sequence[ScoreWatch], *seen: Any) -> None:
    for one in watches:
        one(*seen)


def _find_pattern(terms: ScoreTerms) -> Float[Tensor, "n n"]:
    """Attention of a causal model, mean over heads."""
    if terms.scale is None:
        scores = terms.scores[0]
    else:
        keys = terms.keys[0].repeat_interleave(terms.queries.shape[1] // terms.keys.shape[1], 0)
        scores = terms.queries[0] @ keys.transpose(1, 2) * terms.scale
        scores = scores + (terms.scores[0] if terms.scores.ndim == 4 else terms.scores)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.float().masked_fill(hidden, -torch.inf).softmax(-1).mean(0)
