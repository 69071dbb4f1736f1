"""Resample ablation: the component along a direction is replaced by another token's; random directions as controls."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.interventions.directions import Direction, Subspace, as_subspace, make_random_subspaces
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.interventions import TokenSelection
from saelab.interventions.prompt_metrics import Metric, Prompt, make_prompt_metric, read_texts
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.tokens import Tokens
from saelab.stores.results import Result, format_table

FEWEST = 4


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Metric with one direction or subspace resampled, and with random ones of the same rank."""

    name: str
    hook_point: str
    rank: int
    value: float
    """the metric's mean with it resampled"""
    random: tuple[float, ...]
    """the same for each random one"""


@dataclass(frozen=True, kw_only=True)
class ResampleAblation(Result):
    """Result of `resample_ablation`, in the order of the directions."""

    metric: str
    clean: float
    """mean over texts, in the unmodified model"""
    rows: tuple[Resampled, ...]
    n_texts: int
    n_tokens: int
    """tokens that were resampled"""
    seed: int

    def __str__(self) -> str:
        head = f"{self.metric}: {self.clean:.4g} on {self.n_texts:,} texts, {self.n_tokens:,} tokens resampled"
        table = [["change", "random, mean", "most", "rank", "direction"]]
        for row in self.rows:
            random = [value - self.clean for value in row.random]
            most = max(random, key=abs)
            mean = sum(random) / len(random)
            changes = [f"{change:+.4f}" for change in (row.value - self.clean, mean, most)]
            table.append([*changes, str(row.rank), f"{row.name} ({row.hook_point})"])
        return "\n".join([head, *format_table(table, left=(4,))])


def resample_ablation(
    model: AnyModel,
    prompts: Prompt | Sequence[Prompt] | Tokens,
    directions: Direction | Subspace | Sequence[Direction | Subspace],
    metric: Metric = "loss",
    *,
    where: TokenSelection = "all",
    n_random: int = FEWEST,
    seed: int = 0,
) -> ResampleAblation:
    """The mean of a metric with the component along each direction replaced by that of another token.

        x' = x + P (x_other - x)        P projects on the direction or subspace; `other` is a random token of `where`

    The component keeps its distribution and loses its relation to the token: milder than setting it to zero, which
    moves activations off their distribution. Source: arXiv:2310.15154.

    Args:
        model: language model.
        prompts: texts or token ids.
        directions: one or several directions or subspaces, each ablated on its own.
        metric: as in `attribute`, with one target for each text where it is a tensor; a function of the logits
            is called on some rows at a time.
        where: tokens that are resampled.
        n_random: random directions of the same rank to compare with, under the same permutation of the tokens; at least
            4.
        seed: of the permutation and of the random directions.

    Raises:
        ValueError: for fewer than 4 random directions, and for fewer than two tokens.

    >>> model, point = sl.lm.tiny_model(), "blocks.1.hook_resid_post"
    >>> found = resample_ablation(model, ["One, two", "Three"], sl.Direction(torch.ones(32), point))
    >>> len(found.rows[0].random), found.n_tokens
    (4, 13)
    """
    model = as_model(model)
    if n_random < FEWEST:
        raise ValueError(f"`n_random` must be at least {FEWEST}, got {n_random}.")
    outcome = make_prompt_metric(model, metric)
    runs = EditedRuns(model, read_texts(model, prompts), outcome)
    resampling = Resampling.draw(runs, where, seed)
    several = [directions] if isinstance(directions, Direction | Subspace) else list(directions)
    return ResampleAblation(
        metric=outcome.name,
        clean=mean_of(runs.run()),
        rows=tuple(resampling.compare(as_subspace(one), n_random, seed) for one in several),
        n_texts=len(runs.texts),
        n_tokens=len(resampling.order),
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class Resampling:
    """Tokens whose components are exchanged, in the order in which they are."""

    runs: EditedRuns
    keep: Bool[Tensor, "n_texts n"]
    order: Int[Tensor, "n_tokens"]

    @classmethod
    def draw(cls, runs: EditedRuns, where: TokenSelection, seed: int) -> "Resampling":
        """The tokens of a place, and an order drawn by `seed`; ValueError for fewer than two."""
        keep = runs.texts.select(runs.model, where)
        if (n_tokens := int(keep.sum())) < 2:
            raise ValueError(f"`where` must leave at least two tokens to resample from, got {n_tokens}.")
        return cls(runs, keep, torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed)))

    def compare(self, space: Subspace, n_random: int, seed: int) -> Resampled:
        """The metric's mean over texts with a subspace resampled, and with random ones."""
        spaces = [space, *make_random_subspaces(space, n_random, seed)]
        value, *random = [
            self.mean(one.hook_point, moves) for one, moves in zip(spaces, self.moves(spaces), strict=True)
        ]
        return Resampled(
            name=space.name, hook_point=space.hook_point, rank=len(space.basis), value=value, random=tuple(random)
        )

    def moves(self, spaces: Sequence[Subspace]) -> list[Float[Tensor, "n_tokens d_in"]]:
        """What each token's exchange adds to it, for subspaces of one hook point."""
        x = self.runs.activations(spaces[0].hook_point, lambda x, rows: x[self.keep[rows].to(x.device)])
        return [space.project(x[self.order] - x) for space in spaces]

    def mean(
        self, hook_point: str, moves: Float[Tensor, "n_tokens d_in"], only: Bool[Tensor, "n_tokens"] | None = None
    ) -> float:
        """The metric's mean over texts with `moves` added at the tokens kept, or at some of these."""
        numbers = self.keep.flatten().cumsum(0).view_as(self.keep) - 1
        added = moves if only is None else moves * only[:, None].to(moves)

        def add(x: Tensor, rows: Tensor) -> Tensor:
            keep = self.keep[rows]
            x[keep.to(x.device)] += added[numbers[rows][keep]].to(x)
            return x

        return mean_of(self.runs.run({hook_point: add}))


def mean_of(values: Float[Tensor, "n_texts"]) -> float:
    """The mean over texts, summed in float64."""
    return float(values.double().mean())
