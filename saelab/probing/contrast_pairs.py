"""`find_unsupervised_directions`: CCS, truth sought without labels in contrast pairs, with checks that it fails."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.statistics import CONSTANT, fit_balanced_probe
from saelab.interventions.directions import Direction
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.prompt_metrics import Prompt, find_token, read_last, read_texts
from saelab.lm.hooks import find_hook_point
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.probing.linear_directions import UNSUPERVISED
from saelab.stores.results import Result, find_row, format_spread, format_table

N_RESTARTS, N_STEPS, LR, DECAY = 10, 300, 1e-2, 1e-2
N_RANDOM = 10
FEWEST_PAIRS = 8
RANDOM, CCS, COMPONENT, SUPERVISED = "random", "ccs", "pca of differences", "supervised"
METHODS = (RANDOM, CCS, COMPONENT, SUPERVISED)


@dataclass(frozen=True, kw_only=True)
class ContrastScore:
    """Held-out accuracies of one method; one number for each seed (and each random direction)."""

    name: str
    accuracies: tuple[float, ...]
    """of the label in the pairs as they are, of either sign, so at least .5 for any direction"""
    distracted: tuple[float, ...]
    """the same of the label, with the distractor appended, found anew there; NaN without distractors"""
    distractor: tuple[float, ...]
    """of which distractor was appended, with the same directions"""
    losses: tuple[float, ...]
    """CCS's loss in held-out pairs as they are; NaN for methods other than CCS"""


@dataclass(frozen=True, kw_only=True, eq=False)
class UnsupervisedDirections(Result):
    """Result of `find_unsupervised_directions`: rows of CCS, and of what it is held against."""

    warning: ClassVar[str] = UNSUPERVISED
    limits: ClassVar[str] = (
        "A loss near 0 is no evidence: any feature that a pair's two halves have opposite values of reaches it. A good "
        "accuracy says that the label was the most prominent such feature in these pairs, not that the model knows it, "
        "or that the direction means it elsewhere."
    )
    """what the result cannot show"""
    hook_point: str
    rows: tuple[ContrastScore, ...]
    distractors: tuple[str, ...]
    """texts of the two distractors"""
    rate: float
    """share of pairs whose first half has the label"""
    n_train: int
    n_held: int
    n_tokens: int
    """tokens of all halves as they are; 0 where activations were given"""
    seeds: tuple[int, ...]
    directions: dict[str, tuple[Direction, ...]] = field(repr=False)
    """by method, one for each seed, of the pairs as they are, in normalized activations; not saved"""

    def __getitem__(self, name: str) -> ContrastScore:
        return find_row(self.rows, name=name)

    @property
    def verdict(self) -> str:
        """What the checks say of CCS, beginning with those that it fails."""
        ccs, random = self[CCS], self[RANDOM]
        failed, passed = list[str](), list[str]()
        best = float(np.quantile(random.accuracies, 0.95))
        mean = float(np.mean(ccs.accuracies))
        (passed if mean > best else failed).append(f"accuracy {mean:.3f} against random directions' 95 % {best:.3f}")
        if self.distractors:
            label, planted = float(np.mean(ccs.distracted)), float(np.mean(ccs.distractor))
            said = f"with a random distractor it tells the label at {label:.3f}, the distractor at {planted:.3f}"
            (passed if label > planted and label > best else failed).append(said)
        parts = [f"{name}: {'; '.join(found)}" for name, found in (("fails", failed), ("passes", passed)) if found]
        return ". ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the directions, with warning, verdict and limits, ready for JSON."""
        found: dict[str, Any] = Result.to_dict(replace(self, directions={}))
        del found["directions"]
        return found | {"warning": self.warning, "verdict": self.verdict, "limits": self.limits}

    def __str__(self) -> str:
        head = (
            f"contrast pairs at {self.hook_point}: {self.n_train:,} fitted, {self.n_held:,} held out, "
            f"{self.n_tokens:,} tokens, {len(self.seeds)} seeds; label true of the first half in {self.rate:.1%}"
        )
        columns = ["", "accuracy", "loss"]
        if self.distractors:
            columns += ["label, distracted", f"which of {' / '.join(map(repr, self.distractors))}"]
        table = [columns]
        for row in self.rows:
            losses = format_spread(row.losses) if np.isfinite(row.losses).all() else ""
            cells = [row.name, format_spread(row.accuracies), losses]
            if self.distractors:
                cells += [format_spread(row.distracted), format_spread(row.distractor)]
            table.append(cells)
        return "\n".join([f"CCS {self.verdict}", head, *format_table(table), f"warning: {self.warning}", self.limits])


def find_unsupervised_directions(
    model: AnyModel,
    pairs: Sequence[tuple[Prompt, Prompt]],
    labels: Bool[Tensor | np.ndarray, "n_pairs"] | Sequence[bool],
    hook_point: str,
    *,
    distractors: tuple[str | int, str | int] | None = None,
    train_frac: float = 0.6,
    n_restarts: int = N_RESTARTS,
    seeds: Sequence[int] = (0, 1, 2),
) -> UnsupervisedDirections:
    """Contrast-consistent search over pairs of statements of which one is true, beside what it must beat.

        p = sigmoid(w x + b)        of first (p+) and second (p-) halves, x over the mean and deviation of its half
        loss = mean (p+ + p- - 1)^2 + min(p+, p-)^2        by Adam, the best of `n_restarts`

    Activations are those of the last tokens. The label is used to score alone, and for the row "supervised", a logistic
    regression on the difference of the halves. The check of arXiv:2312.10029: one of two distractors, drawn at random
    for each pair, is appended to both of its halves, and all is found anew; what finds the distractor in place of the
    label has not looked for truth. Source of CCS: arXiv:2212.03827.

    Args:
        model: language model.
        pairs: two statements each, such as a question with either answer.
        labels: whether the first statement of each pair is the true one; both must occur.
        hook_point: where activations are read.
        distractors: two tokens, by text or id; None leaves the check out.
        train_frac: share of pairs that directions are found in; accuracies are of the others.
        n_restarts: random starts of CCS, of which the one with the smallest loss in training is taken.
        seeds: each of a split, starts, random directions, and draws of distractors.

    Raises:
        ValueError: for fewer than 8 pairs, labels of one class, and distractors that are not two tokens.

    >>> model = sl.lm.tiny_model()
    >>> pairs = [(f"{i} is odd", f"{i} is even") for i in range(12)]
    >>> found = find_unsupervised_directions(model, pairs, [i % 2 == 1 for i in range(12)], "blocks.1.hook_resid_post")
    >>> [row.name for row in found.rows]
    ['random', 'ccs', 'pca of differences', 'supervised']
    """
    model = as_model(model)
    find_hook_point(model, hook_point)
    y = torch.as_tensor(np.asarray(labels)).bool()
    if len(pairs) != len(y):
        raise ValueError(f"`labels` must have one for each of {len(pairs)} pairs, got {len(y)}.")
    texts = read_texts(model, [half for pair in pairs for half in pair]) if pairs else None
    if texts is None:
        raise ValueError(f"`pairs` must hold at least {FEWEST_PAIRS}, got none.")
    given = () if distractors is None else tuple(distractors)
    if len(given) not in (0, 2) or (len(given) == 2 and given[0] == given[1]):
        raise ValueError(f"`distractors` must be two different tokens, got {given}.")
    rows = [ids[:n] for ids, n in zip(texts.ids, texts.lengths.tolist(), strict=True)]
    drawn = [_draw_marks(len(pairs), seed) for seed in seeds if given]
    tokens = torch.tensor([find_token(model, one) for one in given], dtype=torch.long)
    found = score_contrasts(
        _read_halves(model, rows, hook_point),
        y,
        hook_point,
        distracted=[_read_halves(model, _append(rows, tokens, which), hook_point) for which in drawn],
        drawn=drawn,
        train_frac=train_frac,
        n_restarts=n_restarts,
        seeds=seeds,
    )
    return replace(found, distractors=tuple(map(str, given)), n_tokens=int(texts.lengths.sum()))


def _draw_marks(n: int, seed: int) -> Bool[Tensor, "n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5


def _append(
    rows: Sequence[Int[Tensor, "_"]], tokens: Int[Tensor, "2"], which: Bool[Tensor, "n_pairs"]
) -> list[Int[Tensor, "_"]]:
    """Both halves of each pair with its distractor behind them: the first where it is marked."""
    added = torch.where(which, tokens[0], tokens[1]).repeat_interleave(2)
    return [torch.cat([row, one[None]]) for row, one in zip(rows, added, strict=True)]


def _read_halves(model: Model, rows: Sequence[Int[Tensor, "_"]], hook_point: str) -> Float[Tensor, "n_pairs 2 d_in"]:
    """Activations of the last tokens of both halves of each pair."""
    texts = read_texts(model, list(rows))
    x = EditedRuns(model, texts, read_last).activations(
        hook_point, lambda x, i: x[torch.arange(len(i)), texts.lengths[i] - 1]
    )
    return x.view(len(rows) // 2, 2, -1)


def score_contrasts(
    x: Float[Tensor, "n_pairs 2 d_in"],
    y: Bool[Tensor, "n_pairs"],
    hook_point: str,
    *,
    distracted: Sequence[Float[Tensor, "n_pairs 2 d_in"]] = (),
    drawn: Sequence[Bool[Tensor, "n_pairs"]] = (),
    train_frac: float = 0.6,
    n_restarts: int = N_RESTARTS,
    seeds: Sequence[int] = (0, 1, 2),
) -> UnsupervisedDirections:
    """As `find_unsupervised_directions`, of given activations of the two halves.

    Args:
        x: activations of both halves.
        y: whether the first half is the true one.
        hook_point: where activations are from.
        distracted: for each seed, activations with a distractor appended; empty leaves the check out.
        drawn: for each seed, whether it was the first distractor.
        train_frac: share of pairs that directions are found in.
        n_restarts: random starts of CCS.
        seeds: each of a split, starts and random directions.

    Raises:
        ValueError: for fewer than 8 pairs, or where a label is missing on a side of a split.
    """
    if len(x) < FEWEST_PAIRS or not seeds or not 0 < train_frac < 1 or n_restarts < 1:
        raise ValueError(
            f"Contrasts need {FEWEST_PAIRS} pairs, a seed, a start and `train_frac` between 0 and 1, got {len(x)}, "
            f"{len(seeds)}, {n_restarts}, {train_frac}."
        )
    if distracted and not len(distracted) == len(drawn) == len(seeds):
        raise ValueError(f"Distractors must be there for each seed, got {len(distracted)} of {len(seeds)}.")
    clean = [_find(_ContrastSplit.make(x, train_frac, seed), y, n_restarts, seed) for seed in seeds]
    planted = zip(distracted, drawn, seeds, strict=True) if distracted else ()
    other = [
        (_find(_ContrastSplit.make(one, train_frac, seed), y, n_restarts, seed), which) for one, which, seed in planted
    ]
    n_train = int(_ContrastSplit.make(x, train_frac, seeds[0]).is_train.sum())
    return UnsupervisedDirections(
        hook_point=hook_point,
        rows=tuple(_gather(name, y, clean, other) for name in METHODS),
        distractors=("first", "second") if distracted else (),
        rate=float(y.double().mean()),
        n_train=n_train,
        n_held=len(x) - n_train,
        n_tokens=0,
        seeds=tuple(seeds),
        directions={name: tuple(one[name].direction(hook_point, name) for one in clean) for name in METHODS},
    )


@dataclass(frozen=True, eq=False)
class _ContrastSplit:
    """Normalized halves of pairs, and which are fitted to."""

    halves: Float[Tensor, "n_pairs 2 d_in"]
    """each of the two over the mean and deviation of its training pairs"""
    is_train: Bool[Tensor, "n_pairs"]

    @classmethod
    def make(cls, x: Float[Tensor, "n_pairs 2 d_in"], train_frac: float, seed: int) -> "_ContrastSplit":
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
        is_train = torch.zeros(len(x), dtype=torch.bool)
        is_train[order[: min(max(2, round(train_frac * len(x))), len(x) - 1)]] = True
        known = x[is_train].float()
        spread = known.std(0)
        spread[spread <= CONSTANT * known.square().mean(0).sqrt()] = 1
        return cls((x.float() - known.mean(0)) / spread, is_train)

    @property
    def differences(self) -> Float[Tensor, "n_pairs d_in"]:
        """First halves less second ones."""
        return self.halves[:, 0] - self.halves[:, 1]


class _ContrastFit(NamedTuple):
    """Directions of one method, what they read of all pairs, and the held-out loss."""

    vectors: Float[Tensor, "n d_in"]
    read: Float[Tensor, "n n_pairs"]
    is_train: Bool[Tensor, "n_pairs"]
    loss: float

    def score(self, y: Bool[Tensor, "n_pairs"]) -> list[float]:
        """Held-out accuracies of either sign."""
        truth = y[~self.is_train]
        right = [float(((one[~self.is_train] > 0) == truth).double().mean()) for one in self.read]
        return [max(one, 1 - one) for one in right]

    def direction(self, hook_point: str, name: str) -> Direction:
        """The first of the directions, with the warning where no label was used."""
        return Direction(self.vectors[0], hook_point, name, warning="" if name == SUPERVISED else UNSUPERVISED)


def _gather(
    name: str,
    y: Bool[Tensor, "n_pairs"],
    clean: Sequence[dict[str, "_ContrastFit"]],
    other: Sequence[tuple[dict[str, "_ContrastFit"], Bool[Tensor, "n_pairs"]]],
) -> ContrastScore:
    """The row of a method, of all seeds."""
    return ContrastScore(
        name=name,
        accuracies=tuple(a for one in clean for a in one[name].score(y)),
        distracted=tuple(a for one, _ in other for a in one[name].score(y)) or (np.nan,),
        distractor=tuple(a for one, which in other for a in one[name].score(which)) or (np.nan,),
        losses=tuple(one[name].loss for one in clean),
    )


def _find(split: _ContrastSplit, y: Bool[Tensor, "n_pairs"], n_restarts: int, seed: int) -> dict[str, _ContrastFit]:
    train, held = y[split.is_train], y[~split.is_train]
    if not (train.any() and not train.all() and held.any() and not held.all()):
        raise ValueError("`labels` must be true and false of some pairs on both sides of the split; give more pairs.")
    generator = torch.Generator().manual_seed(seed)
    apart, is_train = split.differences, split.is_train
    random = torch.randn(N_RANDOM, apart.shape[1], generator=generator)
    w, b = fit_ccs(split.halves[is_train], n_restarts, seed)
    p = torch.sigmoid(split.halves @ w + b)
    component = torch.linalg.svd(apart[is_train] - apart[is_train].mean(0), full_matrices=False).Vh[:1]
    probe = torch.from_numpy(fit_balanced_probe(apart[is_train].numpy(), train.numpy())).float()[None]
    middle = apart[is_train].mean(0)
    plain = {RANDOM: random, COMPONENT: component, SUPERVISED: probe}
    found = {name: _ContrastFit(v, v @ (apart - middle).T, is_train, np.nan) for name, v in plain.items()}
    loss = float(ccs_loss(p[~is_train]))
    return found | {CCS: _ContrastFit(w[None], (0.5 * (p[:, 0] + 1 - p[:, 1]) - 0.5)[None], is_train, loss)}


def ccs_loss(p: Float[Tensor, "*starts n_pairs 2"]) -> Float[Tensor, "*starts"]:
    """CCS's loss of the probabilities of both halves: `mean (p+ + p- - 1)^2 + min(p+, p-)^2`, at most 1.25.

    >>> ccs_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor(0.1250)
    """
    return ((p.sum(-1) - 1).square() + p.amin(-1).square()).mean(-1)


def fit_ccs(
    halves: Float[Tensor, "n_pairs 2 d_in"], n_restarts: int = N_RESTARTS, seed: int = 0
) -> tuple[Float[Tensor, "d_in"], Float[Tensor, ""]]:
    """Weights and bias with the smallest loss of CCS from several starts, all followed at once.

    Args:
        halves: normalized activations.
        n_restarts: random starts.
        seed: of the starts.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n_restarts, halves.shape[2], generator=generator)
    w = (w / w.norm(dim=1, keepdim=True)).requires_grad_()
    b = torch.zeros(n_restarts, requires_grad=True)
    optimizer = torch.optim.AdamW([w, b], lr=LR, weight_decay=DECAY)

    def losses() -> Float[Tensor, "n_restarts"]:
        return ccs_loss(torch.sigmoid(torch.einsum("nhd,rd->rnh", halves, w) + b[:, None, None]))

    with torch.enable_grad():
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            losses().sum().backward()
            optimizer.step()
    best = int(losses().argmin())
    return w.detach()[best], b.detach()[best]
