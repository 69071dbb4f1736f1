"""`align`: distributed alignment search, the subspace whose exchange between two prompts exchanges their answers.

Beside it stand subspaces that are not fitted to the exchange: random ones, means, a probe, principal components.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from saelab.functional.statistics import fit_probe
from saelab.interventions.directions import Subspace, make_random_subspaces
from saelab.interventions.edited_runs import EditedRuns, LayersBelow, find_layers_below
from saelab.interventions.prompt_metrics import Prompt, Texts, find_token, read_last, read_texts
from saelab.lm.hooks import find_hook_point
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.probing.linear_directions import UNSUPERVISED
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, find_row, format_spread, format_table
from saelab.synthetic.tasks import Counterfactual

InterchangePair: TypeAlias = Counterfactual | tuple[Prompt, Prompt, str | int, str | int]
"""Two prompts, and the answer to each: what the next token is"""
N_RANDOM = 8
CLIP = 1.0
CLEAR = 2  # standard errors that the prompts' logit differences must be apart
FEWEST_PAIRS = 4
RANDOM, SHUFFLED, MEANS, PROBE, COMPONENTS, DIFFERENCES, SEARCH, WHOLE = (
    "random", "search, answers shuffled", "means", "probe", "pca", "pca of differences", "search", "whole activation",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InterchangeScore:
    """How well exchanging one kind of subspace exchanges answers, in held-out pairs; one number for each seed."""

    name: str
    rank: int
    """of the subspace; below the rank asked for where there are fewer classes"""
    accuracies: tuple[float, ...]
    """share of runs in which the source's answer has the larger logit of the two; nothing exchanged: about 0"""
    scores: tuple[float, ...]
    """share of the logit difference between the answers that the exchange turns: 0 as base, 1 as source"""
    variances: tuple[float, ...]
    """share of the activations' variance in the subspace, over its share of the dimensions: 1 for a random one"""


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentSearch(Result):
    """Result of `align`; rows in the order in which they are printed, nulls first."""

    limits: ClassVar[str] = (
        "A subspace that exchanges answers need not be where the model keeps them: a search can find a direction that "
        "the model hardly uses and drive what it reads through it (arXiv:2311.17030), for which a variance below 1 is "
        "a warning. Other positions, layers and kinds of prompts are not told."
    )
    """what the result cannot show"""
    hook_point: str
    position: str
    rank: int
    base: float
    """mean logit of a prompt's own answer less that of the other, nothing exchanged, over all pairs"""
    correct: float
    """share of prompts whose own answer has the larger logit"""
    rows: tuple[InterchangeScore, ...]
    overlap: float
    """mean squared cosine of the searches' subspaces of different seeds; NaN for one seed"""
    overlap_with_means: float
    """the same of the search's subspace with that of the means, over the smaller rank, same seed; a random one has
    about rank / d_in"""
    n_train: int
    """pairs, each exchanged both ways"""
    n_held: int
    n_tokens: int
    """tokens of all prompts"""
    seeds: tuple[int, ...]
    subspaces: dict[str, tuple[Subspace, ...]] = field(repr=False)
    """by name of the row, one for each seed, for `patch`, `resample_ablation` and `splice`; not saved"""

    def __getitem__(self, name: str) -> InterchangeScore:
        return find_row(self.rows, name=name)

    def to_dict(self) -> dict[str, Any]:
        """Every field but the subspaces, and what they cannot show, ready for JSON."""
        found: dict[str, Any] = Result.to_dict(replace(self, subspaces={}))
        del found["subspaces"]
        return found | {"limits": self.limits}

    def __str__(self) -> str:
        head = (
            f"interchange at {self.hook_point}, {self.position}, rank {self.rank}: {self.n_train:,} pairs fitted, "
            f"{self.n_held:,} held out, {self.n_tokens:,} tokens, {len(self.seeds)} seeds; without it the answer is "
            f"right in {self.correct:.1%}, by {self.base:.3g} logits"
        )
        table = [["", "rank", "interchange accuracy", "score", "variance"]]
        for row in self.rows:
            cells = [format_spread(row.accuracies), format_spread(row.scores), format_spread(row.variances, ".2f")]
            table.append([row.name, str(row.rank), *cells])
        tail = (
            f"overlap of searches of different seeds {self.overlap:.3f}, with the means {self.overlap_with_means:.3f} "
            f"(random: {self.rank / self.subspaces[SEARCH][0].vectors.shape[1]:.3f})"
        )
        return "\n".join([head, *format_table(table), tail, f"{COMPONENTS}: {UNSUPERVISED}", self.limits])


def align(
    model: AnyModel,
    pairs: Sequence[InterchangePair],
    hook_point: str,
    *,
    rank: int = 1,
    positions: int | Sequence[tuple[int, int]] = -1,
    labels: Sequence[tuple[Hashable, Hashable]] | None = None,
    train_frac: float = 0.5,
    n_epochs: int = 64,
    lr: float = 1e-3,
    batch_size: int = 32,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> AlignmentSearch:
    """The subspace whose exchange between prompts best exchanges their answers, by distributed alignment search.

        x' = x + R R^T (x_source - x)        R: orthonormal columns, (d_in, rank), fitted by Adam from a random start
        loss = 1 - (D' - D) / (D_source - D)        D: mean logit of the source's answer less that of the base's

    Each pair is exchanged both ways. Accuracies are of pairs that nothing was fitted to; pairs of equal prompts stay on
    one side of the split. Beside the search, with the same pairs: random subspaces of the rank; a search whose answers
    were shuffled, in half of the runs that of the base; the largest components of the labels' means (of two labels,
    their difference) and of the weights of a logistic probe for the labels; principal components of the activations and
    of the differences within pairs; the whole activation.
    Sources: arXiv:2303.02536, arXiv:2310.15154.

    Args:
        model: language model.
        pairs: prompts with answers, as `counterfactuals` makes them, or tuples (prompt, other prompt, answer, other
            answer).
        hook_point: where the subspace is.
        rank: its dimensions.
        positions: one position that is exchanged in all prompts, from the end where negative, or for each pair one in
            the prompt and one in the other.
        labels: for each pair what its prompt and the other one are to the means and the probe; by default their poles,
            where `counterfactuals` tells them, or their answers.
        train_frac: share of pairs that are fitted to.
        n_epochs: passes over them.
        lr: learning rate of Adam.
        batch_size: runs in a step.
        seeds: each of a split, a start and an order; figures are of all of them.
        progress: show a progress bar.

    Raises:
        ValueError: for fewer than 4 different pairs, positions outside of prompts, pairs of equal answers, a model
            that does not tell the prompts of pairs apart by their answers, and a rank that does not fit.

    >>> model = sl.lm.tiny_model()
    >>> pairs = [(f"{a} sees Ann", f"{a} sees Tom", "R", "^") for a in ("I", "He", "She", "It", "Who", "One")]
    >>> found = align(model, pairs, "blocks.2.hook_resid_post", seeds=[0], n_epochs=1, progress=False)
    >>> found["whole activation"].scores, [row.name for row in found.rows][:2]
    ((1.0,), ['random', 'search, answers shuffled'])
    """
    model = as_model(model)
    find_hook_point(model, hook_point)
    read = _Pairs.read(model, pairs, hook_point, positions, labels)
    d_in = read.x.shape[1]
    if not 1 <= rank < d_in:
        raise ValueError(f"`rank` must be in 1..{d_in - 1}, got {rank}.")
    if not seeds or n_epochs < 1 or not 0 < train_frac < 1:
        raise ValueError(
            f"A search needs a seed, an epoch, and `train_frac` between 0 and 1, got {len(seeds)}, {n_epochs}, "
            f"{train_frac}."
        )
    how = _How(rank, n_epochs, lr, batch_size)
    with tqdm(total=2 * n_epochs * len(seeds), unit="epoch", desc="align", delay=2, disable=hidden(progress)) as bar:
        found = [_search(read, how, train_frac, seed, bar) for seed in seeds]
    names = list(found[0])
    spaces = {name: tuple(one[name][0].space for one in found) for name in names}
    train, held = read.split(train_frac, seeds[0])
    return AlignmentSearch(
        hook_point=hook_point,
        position=f"position {positions}" if isinstance(positions, int) else "positions of each pair",
        rank=rank,
        base=-float(read.before.mean()),
        correct=float((read.before < 0).double().mean()),
        rows=tuple(_gather(name, [one[name] for one in found]) for name in names),
        overlap=_mean_overlap([(a, b) for i, a in enumerate(spaces[SEARCH]) for b in spaces[SEARCH][:i]]),
        overlap_with_means=_mean_overlap(list(zip(spaces[SEARCH], spaces[MEANS], strict=True))),
        n_train=len(train) // 2,
        n_held=len(held) // 2,
        n_tokens=int(read.runs.texts.lengths.sum()),
        seeds=tuple(seeds),
        subspaces={name: spaces[name] for name in names if name != WHOLE},
    )


class _How(NamedTuple):
    rank: int
    n_epochs: int
    lr: float
    batch_size: int


class _Tested(NamedTuple):
    """A subspace, and its scores in held-out pairs."""

    space: Subspace
    accuracy: float
    score: float
    variance: float


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of prompts, each as a base with the other as its source: base `i` has source `i ^ 1`."""

    runs: EditedRuns
    hook_point: str
    places: Int[Tensor, "n_runs"]
    """position that is exchanged"""
    kinds: Int[Tensor, "n_runs"]
    """number of the label of each base"""
    x: Float[Tensor, "n_runs d_in"]
    """activations there"""
    before: Float[Tensor, "n_runs"]
    """logit of the source's answer less that of the base's, nothing exchanged"""
    groups: tuple[int, ...]
    """number of each pair; pairs that share a prompt have the same"""
    below: LayersBelow | None
    """layers that no exchange changes"""
    output: Float[Tensor, "n_runs n d"] | None
    """what comes out of them"""

    @classmethod
    def read(
        cls,
        model: Model,
        pairs: Sequence[InterchangePair],
        hook_point: str,
        positions: int | Sequence[tuple[int, int]],
        labels: Sequence[tuple[Hashable, Hashable]] | None,
    ) -> "_Pairs":
        plain = [_read_pair(model, pair) for pair in pairs]
        texts = read_texts(model, [prompt for one in plain for prompt in one[:2]]) if plain else None
        groups = _group(texts) if texts is not None else ()
        if texts is None or len(set(groups)) < FEWEST_PAIRS:
            raise ValueError(f"`pairs` must hold {FEWEST_PAIRS} that share no prompt, got {len(set(groups))}.")
        answers = torch.tensor([answer for one in plain for answer in one[2:]])
        if (answers[::2] == answers[1::2]).any():
            raise ValueError("Answers of a pair must differ, got the same; leave such pairs out.")
        places = _find_places(texts, positions)
        runs = EditedRuns(model, texts, _Difference(answers))
        x = runs.activations(hook_point, lambda x, rows: x[torch.arange(len(rows)), places[rows]])
        before = runs.run().double()
        gaps = -before.view(-1, 2).sum(1)  # of the difference, between the two prompts of each pair
        if not gaps.mean() > CLEAR * gaps.std() / len(gaps) ** 0.5:
            raise ValueError(
                f"The model must prefer a prompt's own answer to the other's, got a difference of {gaps.mean():.3g} "
                f"logits between prompts, deviation {gaps.std():.3g}, in {len(gaps)} pairs."
            )
        given = list(map(_label, pairs, answers.view(-1, 2).tolist())) if labels is None else list(labels)
        if len(given) != len(pairs):
            raise ValueError(f"`labels` must be two for each of {len(pairs)} pairs, got {len(given)}.")
        numbers: dict[Hashable, int] = {}
        kinds = torch.tensor([numbers.setdefault(one, len(numbers)) for pair in given for one in pair])
        below = find_layers_below(model, hook_point)
        output = None if below is None else torch.cat([below.read(model, i) for i in texts.ids.split(runs.batch_size)])
        return cls(runs, hook_point, places, kinds, x, before, groups, below, output)

    def split(self, train_frac: float, seed: int) -> tuple[Int[Tensor, "n_train"], Int[Tensor, "n_held"]]:
        """Runs of pairs to fit to and of held-out ones; pairs that share a prompt are on one side."""
        names = sorted(set(self.groups))
        order = np.random.default_rng(seed).permutation(len(names))
        n = min(max(1, round(train_frac * len(names))), len(names) - 1)
        chosen = {names[i] for i in order[:n].tolist()}
        is_train = torch.tensor([group in chosen for group in self.groups]).repeat_interleave(2)
        return is_train.nonzero()[:, 0], (~is_train).nonzero()[:, 0]

    def exchange(
        self, rows: Int[Tensor, "n_runs"], basis: Float[Tensor, "d_in rank"] | None, *, grad: bool = False
    ) -> Float[Tensor, "n_runs"]:
        """The difference of the answers' logits with a subspace exchanged; None for the whole activation."""
        parts = rows.split(self.runs.batch_size)
        return torch.cat([self._exchange(part, basis, grad) for part in parts])

    def _exchange(self, rows: Tensor, basis: Tensor | None, grad: bool) -> Tensor:
        moves = self.x[rows ^ 1] - self.x[rows]
        if basis is not None:
            moves = (moves @ basis) @ basis.T

        def edit(x: Tensor, i: Tensor) -> Tensor:
            change = torch.zeros_like(x)
            change[torch.arange(len(x)), self.places[rows[i]]] = moves[i].to(x)
            return x + change

        known = (
            nullcontext() if self.below is None or self.output is None else self.below.passed_over(self.output[rows])
        )
        with known:
            return self.runs.run({self.hook_point: edit}, rows, grad=grad)

    def test(self, space: Subspace | None, held: Int[Tensor, "n_held"]) -> tuple[float, float]:
        """Accuracy and score of an exchange."""
        with torch.no_grad():
            after = self.exchange(held, None if space is None else space.basis.T).double()
        before = self.before[held]
        gap = -before[held_pairs(held)] - before
        return float((after > 0).double().mean()), float((after - before).mean() / gap.mean())


def held_pairs(rows: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The place of each run's source among runs that stand in pairs.

    >>> held_pairs(torch.tensor([4, 5, 8, 9]))
    tensor([1, 0, 3, 2])
    """
    return torch.arange(len(rows)) ^ 1


@dataclass(frozen=True, eq=False)
class _Difference:
    """Logit of the source's answer less that of the base's, after the last token."""

    answers: Int[Tensor, "n_runs"]

    def __call__(self, logits: Tensor, texts: Texts, rows: Tensor) -> Tensor:
        last = read_last(logits, texts, rows)
        own, other = (self.answers[place].to(last.device) for place in (rows.cpu(), rows.cpu() ^ 1))
        return (last.gather(1, other[:, None]) - last.gather(1, own[:, None]))[:, 0]


def _read_pair(model: Model, pair: InterchangePair) -> tuple[Prompt, Prompt, int, int]:
    if isinstance(pair, Counterfactual):
        return pair.prompt, pair.other_prompt, pair.answer, pair.other_answer
    if len(pair) != 4:
        raise ValueError(f"A pair must be (prompt, other prompt, answer, other answer), got {len(pair)} things.")
    return pair[0], pair[1], find_token(model, pair[2]), find_token(model, pair[3])


def _label(pair: InterchangePair, answers: Sequence[int]) -> tuple[Hashable, Hashable]:
    poles = pair.poles if isinstance(pair, Counterfactual) else None
    return poles or (answers[0], answers[1])


def _group(texts: Texts) -> tuple[int, ...]:
    """A number for each pair, the same for pairs that share a prompt, directly or through others."""
    rows = [tuple(ids[:n].tolist()) for ids, n in zip(texts.ids, texts.lengths.tolist(), strict=True)]
    home: dict[tuple[int, ...], int] = {}
    found = list(range(len(rows) // 2))
    for i in range(len(found)):
        for row in rows[2 * i : 2 * i + 2]:
            if (other := found[home.setdefault(row, i)]) != found[i]:
                old = found[i]
                found = [other if one == old else one for one in found]
    return tuple(found)


def _find_places(texts: Texts, positions: int | Sequence[tuple[int, int]]) -> Int[Tensor, "n_runs"]:
    if isinstance(positions, int):
        given = torch.full((len(texts),), positions)
    else:
        given = torch.tensor([place for pair in positions for place in pair])
        if len(given) != len(texts):
            raise ValueError(f"`positions` must be one number, or two for each of {len(texts) // 2} pairs.")
    if ((given >= texts.lengths) | (given < -texts.lengths)).any():
        raise ValueError(
            f"`positions` must lie inside of prompts, of which the shortest has {int(texts.lengths.min())}."
        )
    return torch.where(given < 0, given + texts.lengths, given)


def _search(read: _Pairs, how: _How, train_frac: float, seed: int, bar: tqdm) -> dict[str, list[_Tested]]:
    """All subspaces of one seed, tested; several of "random"."""
    train, held = read.split(train_frac, seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(read.x.shape[1], how.rank, generator=generator)
    swapped = torch.rand(len(train), generator=generator) < 0.5
    fit = {SHUFFLED: swapped, SEARCH: torch.zeros_like(swapped)}
    bases = {name: _fit(read, train, start, how, back, seed, bar) for name, back in fit.items()}
    x, kinds = read.x[train], read.kinds[train]
    made: dict[str, Callable[[], Tensor]] = {
        SHUFFLED: lambda: bases[SHUFFLED].T,
        MEANS: lambda: _span_means(x, kinds, how.rank),
        PROBE: lambda: _span_probe(x, kinds, how.rank),
        COMPONENTS: lambda: torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: how.rank],
        DIFFERENCES: lambda: torch.linalg.svd(x[::2] - x[1::2], full_matrices=False).Vh[: how.rank],
        SEARCH: lambda: bases[SEARCH].T,
    }
    spaces = {name: Subspace(make(), read.hook_point, name) for name, make in made.items()}
    random = make_random_subspaces(Subspace(bases[SEARCH].T, read.hook_point), N_RANDOM, seed)
    found = {RANDOM: [_test(read, one, held) for one in random]}
    found |= {name: [_test(read, space, held)] for name, space in spaces.items()}
    whole = Subspace(torch.eye(read.x.shape[1]), read.hook_point)
    return found | {WHOLE: [_Tested(whole, *read.test(None, held), 1.0)]}


def _fit(
    read: _Pairs, train: Tensor, start: Tensor, how: _How, back: Tensor, seed: int, bar: tqdm
) -> Float[Tensor, "d_in rank"]:
    """The orthonormal columns that a search ends with; `back` marks runs whose answer is to stay that of the base."""
    weights = torch.linalg.qr(start).Q.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=how.lr)
    toward = 1 - 2 * back.to(torch.float32)
    gap = -2 * float(read.before[train].mean())
    for rows in _draw_batches(len(train), how, seed):
        if rows is None:
            bar.update()
            continue
        after = read.exchange(train[rows], torch.linalg.qr(weights).Q, grad=True)
        score = (toward[rows] * (after - read.before[train[rows]].to(after))).mean() / gap
        optimizer.zero_grad()
        (weights.grad,) = torch.autograd.grad(1 - score, weights)  # the model's own weights get none
        torch.nn.utils.clip_grad_norm_([weights], CLIP)
        optimizer.step()
    return torch.linalg.qr(weights.detach()).Q


def _draw_batches(n: int, how: _How, seed: int) -> Iterator[Tensor | None]:
    """Numbers of runs in random order, a batch at a time; None at the end of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(how.n_epochs):
        yield from torch.randperm(n, generator=generator).split(how.batch_size)
        yield None


def _span_means(x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n"], rank: int) -> Float[Tensor, "rank_or_less d_in"]:
    """The largest components of the means of activations with each label, about their middle."""
    means = torch.stack([x[labels == one].mean(0) for one in labels.unique()])
    return torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[: min(rank, len(means) - 1)]


def _span_probe(x: Float[Tensor, "n d_in"], labels: Int[Tensor, "n"], rank: int) -> Float[Tensor, "rank_or_less d_in"]:
    """The largest components of the weights of a logistic regression for each label, on x over its one scale."""
    kinds = labels.unique()
    centered = x - x.mean(0)
    probe = fit_probe(centered / centered.square().mean().sqrt(), (labels[:, None] == kinds).float())
    weights = probe.weight - probe.weight.mean(0)
    return torch.linalg.svd(weights, full_matrices=False).Vh[: min(rank, len(kinds) - 1)]


def _test(read: _Pairs, space: Subspace, held: Tensor) -> _Tested:
    x = read.x - read.x.mean(0)
    share = float(space.project(x).square().sum() / x.square().sum())
    return _Tested(space, *read.test(space, held), share * x.shape[1] / len(space.basis))


def _gather(name: str, found: Sequence[Sequence[_Tested]]) -> InterchangeScore:
    """A row of all seeds; of several subspaces of a seed, all are listed."""
    each = [one for seed in found for one in seed]
    return InterchangeScore(
        name=name,
        rank=len(each[0].space.basis),
        accuracies=tuple(one.accuracy for one in each),
        scores=tuple(round(one.score, 9) for one in each),
        variances=tuple(one.variance for one in each),
    )


def _mean_overlap(pairs: Sequence[tuple[Subspace, Subspace]]) -> float:
    """Mean over pairs of subspaces of `|A B^T|^2` over the smaller rank; NaN for none."""
    found = [float((a.basis @ b.basis.T).square().sum()) / min(len(a.basis), len(b.basis)) for a, b in pairs]
    return float(np.mean(found)) if found else float("nan")
