"""`Comparison`: result of matching two dictionaries, with pairs, similarities, relations and p values.

From the largest similarities of every feature on both sides come a one-to-one assignment, pooled p values, best
partners and universal shares. Relations between features are same, flipped, split, halves, copies or part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.stores.results import Result, format_table
from saelab.universality.nearest import Nearest

N_BINS, POOL = 8, 200
"""Number of groups of equally many features by firing count, each with its own null distribution, and the smallest size
of a group; fewer groups where one would be smaller."""
RecurrenceWeight = Literal["count", "frequency", "variance"]
BY: tuple[RecurrenceWeight, ...] = get_args(RecurrenceWeight)
RelationKind = Literal["same", "flipped", "split", "halves", "copies", "part"]
COPIED = 1.3
"""If the partners' joint firings are more than so many times a feature's own, they are copies, else a split."""
MatchingMethod = Literal["best", "mutual", "hungarian"]
"""best: the best partner of every feature of a; mutual: pairs that are each other's best; hungarian: one-to-one pairs
"""
LEVEL = 0.95


def find_mutual(of_a: Int[np.ndarray, "d_a"], of_b: Int[np.ndarray, "d_b"]) -> Int[np.ndarray, "n 2"]:
    """Pairs of features that are each other's best partner; -1 stands for no partner.

    >>> find_mutual(np.array([1, 1, -1]), np.array([0, 1])).tolist()
    [[1, 1]]
    """
    features = np.flatnonzero(of_a >= 0)
    partners = of_a[features]
    kept = of_b[partners] == features
    return np.stack([features[kept], partners[kept]], 1)


def assign(of_a: Nearest, of_b: Nearest) -> tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
    """The one-to-one pairs with the largest sum of |similarity| (Hungarian algorithm), and their similarities.

    Only pairs among the nearest of either side are considered; where those are all pairs, the result is exact. A
    feature may stay without a partner.
    """
    from scipy.sparse import csr_matrix, hstack
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows_a, at_a = np.nonzero(of_a.indices >= 0)
    rows_b, at_b = np.nonzero(of_b.indices >= 0)
    i = np.concatenate([rows_a, of_b.indices[rows_b, at_b]])
    j = np.concatenate([of_a.indices[rows_a, at_a], rows_b])
    values = np.concatenate([of_a.values[rows_a, at_a], of_b.values[rows_b, at_b]]).astype(np.float64)
    d_a, d_b = len(of_a.indices), len(of_b.indices)
    _, first = np.unique(i.astype(np.int64) * d_b + j, return_index=True)
    i, j, values = i[first], j[first], values[first]
    # A dummy partner without gain for every feature, so that none has to be paired.
    edges = csr_matrix((2 - np.abs(values), (i, j)), shape=(d_a, d_b))
    alone = csr_matrix((np.full(d_a, 2.0), (np.arange(d_a), np.arange(d_a))), shape=(d_a, d_a))
    matched, partners = min_weight_full_bipartite_matching(hstack([edges, alone], format="csr"))
    kept = partners < d_b
    pairs = np.stack([matched[kept], partners[kept]], 1).astype(np.int64)
    at = np.searchsorted(i.astype(np.int64) * d_b + j, pairs[:, 0] * d_b + pairs[:, 1])
    return pairs, values[at]


def pooled_p(
    values: Float[np.ndarray, "n"],
    by_chance: Float[np.ndarray, "n_null"],
    fires: Int[np.ndarray, "n"],
    fires_by_chance: Int[np.ndarray, "n_null"],
) -> Float[np.ndarray, "n"]:
    """The p value of each similarity: (1 + how many of the null are as large) / (1 + size of the null).

    Rare features reach large similarities by chance more easily, so values are standardized by the median and
    interquartile range of the null of features that fire about as often; after that the null is one pool. p is never 0.

    Args:
        values: best similarities; NaN has p = 1.
        by_chance: best similarities under the null hypothesis.
        fires: number of rows on which the feature of each value fires.
        fires_by_chance: number of rows on which the feature of each null value fires.
    """
    n_bins = int(np.clip(len(by_chance) // POOL, 1, N_BINS))
    borders = np.quantile(fires_by_chance, np.linspace(0, 1, n_bins + 1)[1:-1]) if len(fires_by_chance) else []
    mine, theirs = np.searchsorted(borders, fires), np.searchsorted(borders, fires_by_chance)
    scaled, pool = np.full(len(values), np.nan), np.full(len(by_chance), np.nan)
    for group in np.unique(theirs):
        here = by_chance[theirs == group]
        low, middle, high = np.quantile(here, [0.25, 0.5, 0.75])
        width = max(float(high - low), 1e-6)
        scaled[mine == group] = (values[mine == group] - middle) / width
        pool[theirs == group] = (here - middle) / width
    pool.sort()
    larger = len(pool) - np.searchsorted(pool, scaled, "left")
    return np.where(np.isnan(scaled), 1.0, (1 + larger) / (1 + len(pool)))


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Similarities and universal shares when one of the two dictionaries is untrained, of the same shape on the same
    tokens.
    """

    level: float
    """95th percentile of the live features' best similarities there; universal features must reach it"""
    median: float
    shares: dict[str, float]
    """universal share there, by number, by firings and by variance, tested against chance only"""
    trained: dict[str, float]
    """the same shares of this side's trained dictionary, tested against chance only: compare with `shares`"""

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {"level": self.level, "median": self.median, "shares": self.shares, "trained": self.trained}


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The best partner of each feature of one dictionary in the other; -1 and NaN where there is none."""

    fires: Int[np.ndarray, "d"]
    """number of rows on which each feature fires"""
    variance: Float[np.ndarray, "d"]
    """sum of squared deviations of each feature's codes from their mean; 1 for directions"""
    partners: Int[np.ndarray, "d"]
    """the feature of the other dictionary with the largest similarity"""
    similarity: Float[np.ndarray, "d"]
    n_both: Int[np.ndarray, "d"]
    """number of rows on which both fire; -1 for directions"""
    p: Float[np.ndarray, "d"]
    """probability of so large a similarity under the null; never 0"""
    q: Float[np.ndarray, "d"]
    """smallest false discovery rate at which the match is significant, among all features that fire"""
    universal: Bool[np.ndarray, "d"]
    """whether the match is significant, reaches the minimum effect, and the level of untrained dictionaries where those
    were compared"""
    chance: tuple[float, float]
    """median and 95th percentile of the best similarity under the null; NaN where it was not measured"""
    nearest: Nearest
    """the m best, before significance and counts are tested"""
    untrained: Untrained | None = None
    """matches with an untrained dictionary; None where none was compared"""

    @property
    def live(self) -> Bool[np.ndarray, "d"]:
        """Whether each feature fires at all."""
        return self.fires > 0

    @property
    def median(self) -> float:
        """Median |similarity| of features with a partner; NaN without any."""
        known = np.abs(self.similarity[~np.isnan(self.similarity)])
        return float(np.median(known)) if len(known) else float("nan")

    def share(self, by: RecurrenceWeight = "count") -> float:
        """Share of universal features among those that fire: by number, by firings or by variance; NaN if none fire."""
        weights = {"count": self.live.astype(float), "frequency": self.fires.astype(float), "variance": self.variance}
        total = float(weights[by][self.live].sum())
        return float(weights[by][self.universal].sum()) / total if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, without the m best."""
        names = ("fires", "variance", "partners", "similarity", "n_both", "p", "q", "universal")
        found = {name: getattr(self, name).tolist() for name in names} | {"chance": list(self.chance)}
        return found | {"untrained": None if self.untrained is None else self.untrained.to_dict()}


@dataclass(frozen=True)
class Relation:
    """The relation of one feature to its partners in another dictionary.

    - same, flipped: one partner, and each is the other's best.
    - split: several features have it as their best partner and share its firings.
    - halves: some of its partners go with its positive codes, some with its negative ones.
    - copies: its partners fire where it fires, all of them.
    - part: its best partner is one that is split, halved or copied.
    """

    feature: int
    kind: RelationKind
    partners: tuple[int, ...]
    similarities: tuple[float, ...]


def relate(mine: Matches, theirs: Matches) -> tuple[Relation, ...]:
    """The relations of one side's features.

    A feature that is neither universal nor the best partner of several universal ones has none.
    """
    followers: dict[int, list[int]] = {}
    for j in np.flatnonzero(theirs.universal).tolist():
        followers.setdefault(int(theirs.partners[j]), []).append(j)
    found = [_relate(i, followers.get(i, []), mine, theirs) for i in range(len(mine.fires))]
    return tuple(one for one in found if one is not None)


def _relate(i: int, followers: list[int], mine: Matches, theirs: Matches) -> Relation | None:
    if len(followers) > 1:
        values = theirs.similarity[followers]
        return Relation(i, _kind_of(i, followers, mine, theirs), tuple(followers), tuple(values.tolist()))
    if not mine.universal[i]:
        return None
    partner, value = int(mine.partners[i]), float(mine.similarity[i])
    kind: RelationKind = "part" if followers != [partner] else "flipped" if value < 0 else "same"
    return Relation(i, kind, (partner,), (value,))


def _kind_of(i: int, followers: list[int], mine: Matches, theirs: Matches) -> RelationKind:
    values = theirs.similarity[followers]
    if (values < 0).any() and (values > 0).any():
        return "halves"
    both = theirs.n_both[followers].sum()
    return "copies" if both < 0 or both > COPIED * mine.fires[i] else "split"


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(Result):
    """Matches between the features of two dictionaries, with p values from a null distribution."""

    similarity: str
    a: Matches = field(repr=False)
    b: Matches = field(repr=False)
    mutual: Int[np.ndarray, "n 2"] = field(repr=False)
    """pairs that are each other's best, significant or not"""
    pairs: Int[np.ndarray, "m 2"] = field(repr=False)
    """one-to-one pairs (Hungarian)"""
    values: Float[np.ndarray, "m"] = field(repr=False)
    """similarities of the one-to-one pairs"""
    exact: bool
    """whether the assignment considered every pair, not only the m nearest of either side"""
    signed: bool
    """whether similarities are ranked by absolute value, negative ones meaning flipped"""
    sides: bool
    """whether features are the positive and negative sides of codes, 2 j and 2 j + 1"""
    m: int
    n_shifts: int
    fdr: float
    min_effect: float
    seed: int
    sources: tuple[str, str]
    n_rows: int | None = None
    """number of tokens, or documents, that similarities were measured on; None for directions"""
    n_tokens: int | None = None
    alignment: str = ""
    baselines: Mapping[str, Matches] = field(default_factory=dict, repr=False)
    """a's features in other dictionaries, by name"""
    counted: str = "tokens"
    """what `n_tokens` counts: "tokens" or, of stores whose rows are documents, "documents\""""

    @property
    def rows_are(self) -> str:
        """What similarities were measured on: "tokens" or "documents"."""
        return "documents" if self.similarity == "documents" else self.counted

    @cached_property
    def universal_pairs(self) -> Int[np.ndarray, "n 2"]:
        """Mutual pairs that are universal on both sides, the most similar first."""
        kept = self.a.universal[self.mutual[:, 0]] & self.b.universal[self.mutual[:, 1]]
        pairs = self.mutual[kept]
        return pairs[np.argsort(-np.abs(self.a.similarity[pairs[:, 0]]), kind="stable")]

    def match(self, method: MatchingMethod) -> tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
        """The pairs of a matching method and their similarities, the most similar first, significant or not."""
        known = np.flatnonzero(self.a.partners >= 0)
        pairs = {
            "best": np.stack([known, self.a.partners[known]], 1), "mutual": self.mutual, "hungarian": self.pairs,
        }[method]  # fmt: skip
        values = self.values if method == "hungarian" else self.a.similarity[pairs[:, 0]]
        order = np.argsort(-np.abs(values), kind="stable")
        return pairs[order], values[order]

    @cached_property
    def relations(self) -> tuple[tuple[Relation, ...], tuple[Relation, ...]]:
        """The relation of every universal feature of either side: same, flipped, split, halves, copies, or part of
        another.
        """
        return relate(self.a, self.b), relate(self.b, self.a)

    def signs(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Sign of the similarity of each mutual pair (feature of a, feature of b), by which rows of one side are
        multiplied before `compare_spaces`: 1 or -1.
        """
        return np.where(self.a.similarity[pairs[:, 0]] < 0, -1, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, without the m nearest of each feature."""
        plain = ("similarity", "exact", "signed", "sides", "m", "n_shifts", "fdr", "min_effect", "seed", "n_rows")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*plain, "n_tokens", "counted", "alignment")}
        found |= {name: getattr(self, name).tolist() for name in ("mutual", "pairs", "values")}
        others = {name: one.to_dict() for name, one in self.baselines.items()}
        sides = {"a": self.a.to_dict(), "b": self.b.to_dict(), "baselines": others}
        return found | {"sources": list(self.sources), **sides}

    def __str__(self) -> str:
        rows = "" if self.n_rows is None else f" over {self.n_rows:,} common {self.rows_are}"
        what = "sides of features" if self.sides else "features"
        floor = (
            ""
            if self.a.untrained is None and self.b.untrained is None
            else ", and what 95 % of untrained ones stay below"
        )
        lines = [
            f"{what} by {self.similarity}{rows}; universal: q <= {self.fdr:g} and at least {self.min_effect:g}{floor}"
        ]
        table = [["", "live", "median", "chance", "(95 %)", "universal", "by freq.", "by var."]]
        for name, side in (("a", self.a), ("b", self.b)):
            middle = side.median
            shares = [f"{share:.1%}" for share in (side.share(), side.share("frequency"), side.share("variance"))]
            levels = [f"{level:.3f}" for level in (middle, *side.chance)]
            table.append([name, f"{int(side.live.sum()):,}", *levels, *shares])
        lines += [*format_table(table), *_describe_floors(self)]
        if self.baselines:
            table = [["a's partners in", "median", "universal by chance alone"]]
            for name, one in self.baselines.items():
                table.append([name, f"{one.median:.3f}", f"{one.share():.1%}"])
            lines += format_table(table)
        flipped = int((self.a.similarity[self.universal_pairs[:, 0]] < 0).sum())
        mean = float(np.abs(self.values).mean()) if len(self.values) else float("nan")
        kind = "" if self.exact else f", among the {self.m} nearest"
        lines.append(f"mutual pairs that are universal: {len(self.universal_pairs):,}, of them flipped {flipped:,}")
        lines.append(f"one-to-one pairs: {len(self.pairs):,}, mean similarity {mean:.3f}{kind}")
        for name, found in zip("ab", self.relations, strict=True):
            kinds = sorted({one.kind for one in found})
            counts = ", ".join(f"{kind} {sum(one.kind == kind for one in found):,}" for kind in kinds)
            lines.append(f"relations of {name}: {counts or 'none'}")
        return "\n".join([*lines, *([self.alignment] if self.alignment else [])])


def _describe_floors(found: Comparison) -> Iterator[str]:
    """Lines that compare the universal shares with those of untrained dictionaries."""
    if found.a.untrained is None and found.b.untrained is None:
        yield "no untrained dictionary was compared: what the text alone makes alike is among these"
        return
    yield "chance alone as the floor: share of this dictionary, and of an untrained one of its shape in its place"
    table = [["", "untrained", "(95 %)", "trained", "untrained"]]
    for name, floor in (("a", found.a.untrained), ("b", found.b.untrained)):
        if floor is not None:
            shares = [f"{floor.trained['count']:.1%}", f"{floor.shares['count']:.1%}"]
            table.append([name, f"{floor.median:.3f}", f"{floor.level:.3f}", *shares])
    yield from format_table(table)


def measure_floor(side: Matches, baselines: Sequence[Matches]) -> Untrained:
    """Similarity level and universal shares of untrained dictionaries, the larger of several comparisons.

    Each comparison is given by its side that stands for this one. Shares are those of the comparison with the largest
    share by number.
    """
    sizes = [np.nan_to_num(np.abs(other.similarity[other.live])) for other in baselines]
    sizes = [one if len(one) else np.zeros(1) for one in sizes]
    most = max(baselines, key=lambda other: np.nan_to_num(other.share()))
    return Untrained(
        level=max(float(np.quantile(one, LEVEL)) for one in sizes),
        median=max(float(np.median(one)) for one in sizes),
        shares={by: most.share(by) for by in BY},
        trained={by: side.share(by) for by in BY},
    )


def above(side: Matches, floor: Untrained) -> Bool[np.ndarray, "d"]:
    """Features that are universal by the null distribution and also reach the level of untrained dictionaries."""
    return side.universal & (np.nan_to_num(np.abs(side.similarity)) >= floor.level)


def raise_floor(found: Comparison, baselines: list[Comparison]) -> Comparison:
    """The same comparison, universal matches limited to those above the similarity level of untrained dictionaries.

    `baselines` are comparisons in which one side is untrained; empty leaves the comparison as it is.
    """
    if not baselines:
        return found
    sides = []
    for name in ("a", "b"):
        side = getattr(found, name)
        floor = measure_floor(side, [getattr(one, name) for one in baselines])
        sides.append(replace(side, universal=above(side, floor), untrained=floor))
    return replace(found, a=sides[0], b=sides[1])
