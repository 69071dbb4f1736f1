"""`score_debiasing`: association of words with attributes before and after a bias subspace is taken out, and losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.screening import largest_first
from saelab.functional.statistics import rank_correlation
from saelab.lm.hooks import batches_of, forward_size, logits, next_token_loss, replace_activations
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokens import Tokens
from saelab.probing.association_tests import AssociationTest, association_test, read_rows
from saelab.probing.bias_subspaces import REACHES, BiasSubspace, bias_subspace, equalize
from saelab.probing.labeled_activations import ALL_BUT_SPECIAL
from saelab.probing.linear_directions import AffineErasure, Edit, draw_directions, project_out
from saelab.stores.results import Result, find_row, format_spread, format_table

UNTOUCHED, NEUTRALIZED, EQUALIZED, RANDOM = "untouched", "neutralized", "and equalized", "random directions"
N_PERMUTED = 20
LIMITS = (
    "It cannot show that a bias is gone: a test that falls silent measures the directions that were taken out, and "
    "neighbors (or a fresh probe: erase_concept) may still tell the words apart. Words only stand for what they name "
    "as far as their lists do."
)


@dataclass(frozen=True, kw_only=True)
class DebiasingScore:
    """One edit of the vectors: association of the words, and what else changed."""

    name: str
    effects: tuple[float, ...]
    """effect size, for each draw of a random edit"""
    p: tuple[float, ...]
    """with words permuted, for each draw"""
    p_attributes: tuple[float, ...]
    """with attributes permuted, for each draw"""
    statistic: float
    """difference of cosines, mean over draws"""
    neighbors_kept: float
    """share of the nearest neighbors of words that still are"""
    neighbor_bias: float
    """rank correlation of a word's component along the first direction before the edit with that of its neighbors
    after it; NaN where words do not differ"""
    loss: float
    """nats a token with the edit in the running model; NaN where it was not run"""


@dataclass(frozen=True, kw_only=True)
class Debiasing(Result):
    """Result of `score_debiasing`: association tests and what is lost, one row for each edit."""

    test: AssociationTest
    """of the vectors as they are"""
    subspace: BiasSubspace
    rows: tuple[DebiasingScore, ...]
    neighbor_bias_permuted: tuple[float, ...]
    """`neighbor_bias` of untouched words, when components are exchanged between words, for each draw"""
    n_words: int
    n_neighbors: int
    n_tokens: int
    """predictions that losses are means of; 0 where no model was given"""
    seed: int

    def __getitem__(self, name: str) -> DebiasingScore:
        return find_row(self.rows, name=name)

    @property
    def failed(self) -> tuple[str, ...]:
        """Nulls of the test and of the subspace that are not passed, and what is left after the edit."""
        found = [*self.test.failed, *self.subspace.failed]
        before, after, random = (self[name] for name in (UNTOUCHED, NEUTRALIZED, RANDOM))
        taken, by_chance = (abs(before.statistic) - abs(row.statistic) for row in (after, random))
        if by_chance >= REACHES * taken:
            found.append(
                f"random directions take {by_chance:.4f} off the difference of cosines, the subspace {taken:.4f}"
            )
        if abs(after.statistic) >= REACHES * abs(before.statistic):
            found.append(
                f"the difference of cosines is {after.statistic:+.4f} after the edit, before {before.statistic:+.4f}"
            )
        if after.neighbor_bias >= REACHES * before.neighbor_bias > float(np.max(self.neighbor_bias_permuted)):
            found.append(
                f"neighbors of neutralized words still tell their bias: {after.neighbor_bias:.3f}, before "
                f"{before.neighbor_bias:.3f}"
            )
        return tuple(found)

    def __str__(self) -> str:
        x, y, a, b = self.test.sizes
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(
            f"{x} and {y} words, {a} and {b} attributes, {self.subspace.n_pairs} pairs, among {self.n_words:,} words; "
            f"{self.n_neighbors} neighbors; losses of {self.n_tokens:,} predictions; seed {self.seed}"
        )
        table = [["", "effect size", "cosines", "p, words", "attributes", "neighbors kept", "their bias", "loss"]]
        for i, row in enumerate(self.rows):
            loss = "-" if row.loss != row.loss else f"{row.loss - self.rows[0].loss:+.4f}" if i else f"{row.loss:.4f}"
            ps = [f"{np.mean(p):.3f}" for p in (row.p, row.p_attributes)]
            bias = "-" if row.neighbor_bias != row.neighbor_bias else f"{row.neighbor_bias:.3f}"
            cells = [f"{row.statistic:+.4f}", *ps, f"{row.neighbors_kept:.3f}", bias, loss]
            table.append([row.name, format_spread(row.effects, "+.2f"), *cells])
        null = f"neighbors' bias of permuted words: {format_spread(self.neighbor_bias_permuted)}"
        return "\n".join(
            [
                *lines,
                *format_table(table),
                "losses of edits are changes; an effect size is in deviations of what an edit leaves, cosines are not",
                null,
                str(self.subspace),
                LIMITS,
            ]
        )


def score_debiasing(
    vectors: Float[Tensor, "n_words d"] | Float[np.ndarray, "n_words d"],
    names: Sequence[str],
    targets: tuple[Sequence[str], Sequence[str]],
    attributes: tuple[Sequence[str], Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    *,
    n_directions: int = 1,
    n_neighbors: int = 10,
    model: AnyModel | None = None,
    tokens: Tokens | None = None,
    hook_point: str | None = None,
    n_random: int = 5,
    n_permutations: int = 20_000,
    seed: int = 0,
) -> Debiasing:
    """Association of words with attributes before and after a bias subspace is taken out, and what else is lost.

        neutralized        all words but those of pairs and attributes lose their component in the subspace
        and equalized      and the words of each pair are brought to one distance from all of these
        random directions  as many random ones, in place of the subspace

    All vectors are taken less their mean first, which neutralized words have in the subspace. The subspace is fitted to
    the pairs: choose attributes that are in none of them, or the test is of what was fitted. `neighbor_bias` is what
    arXiv:1903.03862 found to survive. With a model each edit is made at all tokens of a text; that of words cannot be.

    Args:
        vectors: of words, such as mean activations.
        names: the word of each row.
        targets: the two sets of words that should not differ.
        attributes: the two sets of words that they are compared with.
        pairs: words that differ in what is to be taken out, such as ("she", "he").
        n_directions: of the subspace.
        n_neighbors: nearest by cosine that are compared before and after.
        model: language model that vectors are from.
        tokens: text for its loss.
        hook_point: where vectors were read.
        n_random: draws of random directions and of permuted words.
        n_permutations: most partitions of each association test.
        seed: of draws.

    Raises:
        ValueError: words that are not there or in both a target and a pair, some but not all of `model`, `tokens` and
            `hook_point`, too few words for the neighbors, and as `association_test` and `bias_subspace`.
    """
    if len({value is None for value in (model, tokens, hook_point)}) > 1:
        raise ValueError("`model`, `tokens` and `hook_point` must be given together or not at all; give all three.")
    lists = _Lists.read(vectors, names, targets, attributes, pairs)
    if not 1 <= n_neighbors < int(lists.neutral.sum()) or n_random < 2:
        raise ValueError(
            f"`n_neighbors` must be fewer than the {int(lists.neutral.sum())} words that are in no pair and no "
            f"attribute, and `n_random` at least 2, got {n_neighbors} and {n_random}."
        )
    subspace = bias_subspace(lists.x[lists.pairs[0]], lists.x[lists.pairs[1]], n_directions, seed=seed)
    bias = (lists.x[lists.neutral] @ torch.from_numpy(subspace.basis[0])).numpy()
    before = _find_neighbors(lists.x, n_neighbors)

    def score(name: str, spaces: Sequence[Tensor], losses: Sequence[float]) -> DebiasingScore:
        tests = [lists.test(x, n_permutations, seed) for x in spaces]
        own = [_find_neighbors(x, n_neighbors) for x in spaces]
        kept = [len(np.intersect1d(*both)) for after in own for both in zip(before, after, strict=True)]
        return DebiasingScore(
            name=name,
            effects=tuple(test.effect for test in tests),
            p=tuple(test.p for test in tests),
            p_attributes=tuple(test.p_attributes for test in tests),
            statistic=float(np.mean([test.statistic for test in tests])),
            neighbors_kept=float(np.mean(kept)) / n_neighbors,
            neighbor_bias=float(np.mean([_follow(bias, x[lists.neutral], n_neighbors) for x in spaces])),
            loss=float(np.mean(losses)),
        )

    edit = project_out(torch.from_numpy(subspace.basis), lists.mean)
    random = [draw_directions(edit, seed + i) for i in range(n_random)]
    losses, n_tokens = [math.nan] * (n_random + 2), 0
    if model is not None and tokens is not None and hook_point is not None:
        found = [_find_loss(as_model(model), tokens, hook_point, one) for one in (None, edit, *random)]
        losses, n_tokens = [loss for loss, _ in found], found[0][1]
    rng = np.random.default_rng(seed)
    neutral = lists.x[lists.neutral]
    return Debiasing(
        test=lists.test(lists.x, n_permutations, seed),
        subspace=subspace,
        rows=(
            score(UNTOUCHED, [lists.x], losses[:1]),
            score(NEUTRALIZED, [lists.take_out(edit)], losses[1:2]),
            score(EQUALIZED, [lists.equalize(lists.take_out(edit), subspace)], [math.nan]),
            score(RANDOM, [lists.take_out(one) for one in random], losses[2:]),
        ),
        neighbor_bias_permuted=tuple(_follow(rng.permutation(bias), neutral, n_neighbors) for _ in range(N_PERMUTED)),
        n_words=len(lists.x),
        n_neighbors=n_neighbors,
        n_tokens=n_tokens,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Lists:
    """Vectors less their mean, and the rows of each list of words."""

    x: Float[Tensor, "n_words d"]
    mean: Float[Tensor, "d"]
    targets: tuple[Int[np.ndarray, "n"], ...]
    attributes: tuple[Int[np.ndarray, "n"], ...]
    pairs: tuple[Int[np.ndarray, "n"], ...]
    neutral: np.ndarray
    """words that are in no pair and no attribute"""

    @classmethod
    def read(
        cls,
        vectors: Any,
        names: Sequence[str],
        targets: tuple[Sequence[str], Sequence[str]],
        attributes: tuple[Sequence[str], Sequence[str]],
        pairs: Sequence[tuple[str, str]],
    ) -> "_Lists":
        rows = read_rows(vectors, "vectors")
        if len(set(names)) != len(rows) or len(names) != len(rows):
            raise ValueError(f"`names` must be different, one for each of the {len(rows)} vectors, got {len(names)}.")
        place = {name: i for i, name in enumerate(names)}
        listed = [*targets, *attributes, *([pair[i] for pair in pairs] for i in range(2))]
        if unknown := [word for words in listed for word in words if word not in place]:
            raise ValueError(f"Words must be among `names`, not so: {unknown[:5]}; leave them out.")
        found = [np.array([place[word] for word in words], np.int64) for words in listed]
        neutral = np.ones(len(rows), bool)
        neutral[np.concatenate(found[2:])] = False
        if twice := [names[i] for i in np.concatenate(found[:2]) if not neutral[i]]:
            raise ValueError(f"Words of `targets` must be in no pair and no attribute, not so: {twice[:5]}.")
        x = torch.from_numpy(rows)
        first, second, third = (tuple(found[i : i + 2]) for i in (0, 2, 4))
        return cls(x - x.mean(0), x.mean(0), first, second, third, neutral)

    def test(self, x: Float[Tensor, "n_words d"], n_permutations: int, seed: int) -> AssociationTest:
        sets = [x[rows] for rows in (*self.targets, *self.attributes)]
        return association_test(*sets, n_permutations=n_permutations, seed=seed)

    def take_out(self, edit: AffineErasure) -> Float[Tensor, "n_words d"]:
        """Neutral words after an edit."""
        after = self.x.clone()
        after[self.neutral] = edit(self.x[self.neutral] + self.mean) - self.mean
        return after

    def equalize(self, x: Float[Tensor, "n_words d"], subspace: BiasSubspace) -> Float[Tensor, "n_words d"]:
        after = x.clone()
        after[self.pairs[0]], after[self.pairs[1]] = equalize(x[self.pairs[0]], x[self.pairs[1]], subspace)
        return after


def _find_neighbors(x: Float[Tensor, "n d"], k: int) -> Int[np.ndarray, "n k"]:
    """Rows of the k largest cosines with each row, but for itself."""
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return largest_first((x @ x.T).fill_diagonal_(-math.inf), k).numpy()


def _follow(bias: Float[np.ndarray, "n"], x: Float[Tensor, "n d"], k: int) -> float:
    """Rank correlation of each row's bias with the mean bias of its neighbors."""
    return rank_correlation(bias, bias[_find_neighbors(x, k)].mean(1))


def _find_loss(model: Model, tokens: Tokens, hook_point: str, edit: AffineErasure | None) -> tuple[float, int]:
    """Mean next-token loss with an edit of all tokens but special ones, and the number of predictions."""
    total, n = 0.0, 0
    for batch in batches_of(tokens, forward_size(tokens, None)):
        keep = ALL_BUT_SPECIAL.apply(batch).keep
        edits: dict[str, Edit] = {} if edit is None else {hook_point: partial(_edit_kept, edit, keep)}
        with replace_activations(model, edits):
            losses = next_token_loss(logits(model, batch.ids), batch.ids).cpu().double()
        counted = batch.predicts[:, :-1]
        total, n = total + float(losses[counted].sum()), n + int(counted.sum())
    return total / max(n, 1), n


def _edit_kept(edit: AffineErasure, keep: Tensor, x: Tensor) -> Tensor:
    keep = keep.to(x.device)
    x[keep] = edit(x[keep].float()).to(x)
    return x
