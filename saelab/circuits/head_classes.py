"""`classify_heads`: texts classified from a few examples by single attention heads, and by the vote of the best."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from saelab.circuits.placement import find_stack
from saelab.functional.screening import largest_first
from saelab.functional.statistics import fit_probe
from saelab.interventions.interventions import match_source
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import batches_of, capture, find_hook_point, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.models import describe_model
from saelab.lm.text_encoders import pool
from saelab.lm.tokens import Tokens
from saelab.sae.sae import SAE
from saelab.stores.results import Result, find_row, format_spread, format_table

BEST, RANDOM, ONE, CODES = "vote of the best heads", "vote of random heads", "best head alone", "SAE codes"
RESIDUAL, NEAREST, PROBE = "residual", "nearest class", "probe"
SHOWN = 10
LIMITS = (
    "It cannot show that the model uses a head for this: its output may be read by nobody, and tell only the words of "
    "the text. Heads are chosen by few examples, and the best of many is lucky on those."
)
HeadPooling = Literal["mean", "last"]
"""How the outputs of a text's tokens become one vector"""


@dataclass(frozen=True, kw_only=True)
class ClassifierScore:
    """Accuracy on texts without shots, for each draw of shots."""

    name: str
    accuracy: tuple[float, ...]
    shuffled: tuple[float, ...]
    """the same with labels of the shots permuted"""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadClasses(Result):
    """Result of `classify_heads`: accuracies of heads, of their vote and of what it is compared with."""

    model: str
    rows: tuple[ClassifierScore, ...]
    chosen_by: Float[np.ndarray, "n_layers n_heads"] = field(repr=False)
    """accuracy of each head on the shots, each left out of its class, mean over draws"""
    held_out: Float[np.ndarray, "n_layers n_heads"] = field(repr=False)
    """accuracy on the other texts, mean over draws"""
    best_shuffled: tuple[float, ...]
    """the largest accuracy of a head on its shots when their labels are permuted, for each draw"""
    classes: tuple[str, ...]
    majority: float
    """share of the most frequent class"""
    shots: int
    """of each class"""
    n_best: int
    n_texts: int
    n_tokens: int
    pooling: HeadPooling
    hook_point: str
    """of the residual stream"""
    seed: int

    def __getitem__(self, name: str) -> ClassifierScore:
        return find_row(self.rows, name=name)

    @property
    def failed(self) -> tuple[str, ...]:
        """What does as well as the vote of the best heads, on average: shuffled labels, random heads, other vectors."""
        best = self[BEST]
        vote, found = float(np.mean(best.accuracy)), []
        if (null := float(np.mean(best.shuffled))) >= vote:
            found.append(f"shots with shuffled labels reach {null:.3f}, the vote {vote:.3f}")
        for row in self.rows:
            if row.name not in (BEST, ONE) and (other := float(np.mean(row.accuracy))) >= vote:
                found.append(f"{row.name} reach{'' if row.name == RANDOM else 'es'} {other:.3f}, the vote {vote:.3f}")
        return tuple(found)

    def __str__(self) -> str:
        n_draws = len(self.rows[0].accuracy)
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(
            f"{self.model}: {len(self.classes)} classes, {self.n_texts:,} texts of {self.n_tokens:,} tokens, "
            f"{self.shots} shots a class, {n_draws} draws of them, seed {self.seed}; the most frequent class is "
            f"{self.majority:.3f}"
        )
        table = [["accuracy on the other texts", "", "labels of shots shuffled"]]
        table += [[row.name, format_spread(row.accuracy), format_spread(row.shuffled)] for row in self.rows]
        order = np.argsort(-self.chosen_by, axis=None, kind="stable")[: min(SHOWN, self.n_best)]
        heads = [["head", "shots", "other texts"]]
        for layer, head in zip(*np.unravel_index(order, self.chosen_by.shape), strict=True):
            heads.append([f"{layer}.{head}", f"{self.chosen_by[layer, head]:.3f}", f"{self.held_out[layer, head]:.3f}"])
        null = f"best head on shots with shuffled labels: {format_spread(self.best_shuffled)}"
        told = f"the vote is of {self.n_best} heads of {self.chosen_by.size}"
        return "\n".join([*lines, *format_table(table), told, *format_table(heads), null, LIMITS])


def classify_heads(
    model: AnyModel,
    tokens: Tokens,
    labels: Sequence[str],
    shots: int = 8,
    *,
    n_best: int = 20,
    pooling: HeadPooling = "mean",
    sae: SAE | None = None,
    hook_point: str | None = None,
    n_draws: int = 5,
    batch_size: int | None = None,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> HeadClasses:
    """Accuracy of attention heads as features of texts: by nearest class mean in heads, and by a vote of heads.

        v_h(text) = pooled outputs of head h in front of W_O,    class of h = argmax_c cos(v_h, mean of class c's shots)

    Heads are ranked by their accuracy on the shots, each left out of its class' mean, and the `n_best` vote; of classes
    with as many votes the one of the larger mean cosine wins. Beside it stand as many random heads, the best head
    alone, and the pooled residual stream and codes of an SAE, by nearest class and by a logistic probe, all of the same
    shots; and each of them with shuffled labels.

    Source: sparse attention vectors, arXiv:2412.00142, where "last" pools.

    Args:
        model: language model.
        tokens: texts, one in each row.
        labels: class of each row.
        shots: examples of each class, at least 2; all other texts are classified.
        n_best: heads that vote, at most half of all.
        pooling: "mean" of a text's tokens, special ones left out, or the "last" one.
        sae: an SAE whose codes are compared.
        hook_point: of the residual stream, and of the SAE; by default the SAE's, or the last one.
        n_draws: draws of the shots.
        batch_size: sequences in a forward pass; by default chosen for memory.
        seed: of draws.
        allow_mismatch: accept an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: rows of several documents, labels of another number, one class, a class without more texts than
            shots, and a model that has no hook point of its heads' outputs.
    """
    model = as_model(model)
    if pooling not in ("mean", "last") or shots < 2 or n_draws < 2 or n_best < 1:
        raise ValueError(
            "`pooling` must be 'mean' or 'last', `shots` and `n_draws` at least 2 and `n_best` 1, got "
            f"'{pooling}', {shots}, {n_draws} and {n_best}."
        )
    y, classes = _read_labels(tokens, labels, shots)
    stack, n_layers = find_stack(model)
    last = f"{stack}.{n_layers - 1}.hook_resid_post"
    place = find_hook_point(model, hook_point or last)
    if sae is not None:
        place = match_source(sae, model, hook_point, allow_mismatch)
    heads, others = _read_vectors(model, tokens, (stack, n_layers), place, pooling, sae, batch_size)
    n_heads = heads.shape[0] // n_layers
    n_best, rng = min(n_best, max(1, len(heads) // 2)), np.random.default_rng(seed)
    scores: dict[str, tuple[list[float], list[float]]] = {}
    chosen_by, held_out, best_shuffled = [], [], []
    for _ in range(n_draws):
        shot = np.concatenate([rng.choice(np.flatnonzero(y == i), shots, replace=False) for i in range(len(classes))])
        test = np.setdiff1d(np.arange(len(y)), shot)
        at_random = rng.permutation(len(heads))[:n_best]
        for kind, given in enumerate((y[shot], rng.permutation(y[shot]))):
            task = _ShotLabels(shot, test, torch.from_numpy(given), torch.from_numpy(y[test]), len(classes))
            on_shots, cosines = task.leave_out(heads), task.nearest(heads)
            if kind == 0:
                chosen_by.append(on_shots)
                held_out.append((cosines.argmax(2) == task.truth).double().mean(1))
            else:
                best_shuffled.append(float(on_shots.max()))
            best = largest_first(on_shots, n_best)
            found = {
                BEST: task.vote(cosines[best]),
                RANDOM: task.vote(cosines[at_random]),
                ONE: task.vote(cosines[best[:1]]),
            }
            for name, x in others.items():
                found[f"{name}, {NEAREST}"] = task.score(task.nearest(x[None])[0])
                found[f"{name}, {PROBE}"] = task.score(task.probe(x))
            for name, accuracy in found.items():
                scores.setdefault(name, ([], []))[kind].append(accuracy)
    return HeadClasses(
        model=describe_model(model).name,
        rows=tuple(
            ClassifierScore(name=name, accuracy=tuple(own), shuffled=tuple(null))
            for name, (own, null) in scores.items()
        ),
        chosen_by=torch.stack(chosen_by).mean(0).view(n_layers, n_heads).numpy(),
        held_out=torch.stack(held_out).mean(0).view(n_layers, n_heads).numpy(),
        best_shuffled=tuple(best_shuffled),
        classes=classes,
        majority=float(np.bincount(y).max()) / len(y),
        shots=shots,
        n_best=n_best,
        n_texts=len(y),
        n_tokens=int(TokenMask().apply(tokens).keep.sum()),
        pooling=pooling,
        hook_point=place,
        seed=seed,
    )


def _read_labels(tokens: Tokens, labels: Sequence[str], shots: int) -> tuple[Int[np.ndarray, "n"], tuple[str, ...]]:
    """Number of each text's class, and the classes."""
    if len(labels) != len(tokens):
        raise ValueError(f"`labels` must be one for each of the {len(tokens)} rows of `tokens`, got {len(labels)}.")
    keep = TokenMask().apply(tokens).keep
    documents = tokens.doc_ids.masked_fill(~keep, -1).amax(1)
    if not keep.any(1).all() or ((tokens.doc_ids != documents[:, None]) & keep).any():
        raise ValueError("`tokens` must have one text in each row; tokenize with `packed=False`.")
    classes, y, counts = np.unique(np.asarray(labels, str), return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() <= shots:
        told = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"`labels` must be of two classes or more, each with more than {shots} texts, got {told}.")
    return y.astype(np.int64), tuple(classes.tolist())


def _read_vectors(
    model: Model,
    tokens: Tokens,
    layers: tuple[str, int],
    place: str,
    pooling: HeadPooling,
    sae: SAE | None,
    batch_size: int | None,
) -> tuple[Float[Tensor, "n_heads_of_all n d_head"], dict[str, Float[Tensor, "n d"]]]:
    """Pooled outputs of all heads, layer by layer, and the pooled residual stream and codes."""
    points = [f"{layers[0]}.{layer}.attn.hook_z" for layer in range(layers[1])]
    if missing := [name for name in points if name not in hook_points_of(model).points]:
        raise ValueError(f"The model must have a hook point at its heads' outputs, none at {missing[:3]}.")
    heads: list[Tensor] = []
    others: dict[str, list[Tensor]] = {}
    for batch in batches_of(tokens, forward_size(tokens, batch_size)):
        found = capture(model, batch.ids, [*points, place])
        keep = TokenMask().apply(batch).keep.to(found[place].device)
        heads.append(torch.stack([pool(found[name].flatten(2), keep, pooling).cpu() for name in points], 1))
        for name, x in _others(found[place], sae):
            others.setdefault(name, []).append(pool(x, keep.to(x.device), pooling).cpu())
    rows = torch.cat(heads)  # (n, n_layers, n_heads x d_head)
    n_heads = int(model.cfg.n_heads)  # type: ignore[attr-defined]
    split = rows.view(len(rows), layers[1] * n_heads, rows.shape[2] // n_heads)
    return split.transpose(0, 1).contiguous(), {name: torch.cat(parts) for name, parts in others.items()}


def _others(x: Float[Tensor, "batch n d"], sae: SAE | None) -> Iterator[tuple[str, Tensor]]:
    yield RESIDUAL, x
    if sae is not None:
        with torch.no_grad():
            yield CODES, sae.encode(x.float().to(sae.device))


@dataclass(frozen=True, eq=False)
class _ShotLabels:
    """One draw of shots and the labels given to them."""

    shot: Int[np.ndarray, "m"]
    test: Int[np.ndarray, "n_test"]
    given: Int[Tensor, "m"]
    truth: Int[Tensor, "n_test"]
    n_classes: int

    @property
    def _members(self) -> Float32[Tensor, "m n_classes"]:
        return torch.nn.functional.one_hot(self.given, self.n_classes).float()

    def nearest(self, x: Float[Tensor, "h n d"]) -> Float[Tensor, "h n_test n_classes"]:
        """Cosines of each text with the mean of each class."""
        means = torch.einsum("hmd,mc->hcd", x[:, self.shot], self._members)
        return _normalize(x[:, self.test]) @ _normalize(means).transpose(1, 2)

    def leave_out(self, x: Float[Tensor, "h n d"]) -> Float[Tensor, "h"]:
        """Accuracy on the shots, each left out of the mean of its class."""
        rows, own = x[:, self.shot], self._members
        sums = torch.einsum("hmd,mc->hcd", rows, own)
        counts = own.sum(0)
        cosines = _normalize(rows) @ _normalize(sums).transpose(1, 2)
        left = (sums[:, self.given] - rows) / (counts[self.given] - 1).clamp(min=1)[:, None]
        cosines[:, torch.arange(len(self.given)), self.given] = (_normalize(rows) * _normalize(left)).sum(2)
        return (cosines.argmax(2) == self.given).double().mean(1)

    def vote(self, cosines: Float[Tensor, "h n_test n_classes"]) -> float:
        votes = torch.nn.functional.one_hot(cosines.argmax(2), self.n_classes).sum(0)
        return self.score(votes + cosines.mean(0) / 4)  # less than half a vote: decides ties alone

    def probe(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n_test n_classes"]:
        return fit_probe(x[self.shot].float(), self._members, standardize=True)(x[self.test].float())

    def score(self, scores: Float[Tensor, "n_test n_classes"]) -> float:
        return float((scores.argmax(1) == self.truth).double().mean())


def _normalize(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
