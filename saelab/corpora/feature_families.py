"""`find_families`: features that fire in the documents of a more frequent one, as trees (arXiv:2408.00657)."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.corpora.document_features import Documents, SideId, as_documents
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.results import Result, format_table

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK = 1024
"""sides whose co-occurrence with all others is counted at a time"""
LEAST_BRANCHES = 3
"""sides directly below the parent of a family"""
MOST_ALIKE = 0.6
"""largest Jaccard index of two families' members; of those that are more alike the larger is kept"""
N_SHOWN = 15
N_MEMBERS = 6  # of a family that are shown


@dataclass(frozen=True, kw_only=True)
class Family:
    """A side of a feature with rarer ones that fire where it fires, and with those that fire where these do."""

    parent: tuple[int, int]
    """feature and sign"""
    name: str
    """its label; empty where it has none"""
    n_documents: int
    """documents in which the parent fires"""
    children: tuple[tuple[int, int], ...]
    """all below the parent: those directly below it first, of each generation the one with most overlap first"""
    names: tuple[str, ...]
    above: tuple[int, ...]
    """the place in `children` of the one that each is directly below; -1 stands for the parent"""
    inside: float
    """mean overlap of the parent with its children, 0 to 1: documents of both over (documents of the rarer + 1)"""
    outside: float
    """mean overlap of the parent with all sides that are not in the family"""
    excess: float
    """mean over children of the documents that both fire in less those expected, in standard deviations, where
    documents of each side are permuted"""
    q: float
    """share that is expected to be chance among families with as large an excess: by those of permuted columns"""

    @property
    def ratio(self) -> float:
        """Overlap inside over overlap outside; infinite where there is none outside."""
        return self.inside / self.outside if self.outside else float("inf")


@dataclass(frozen=True, kw_only=True)
class FamilyScores(Result):
    """Families measured on documents that they were not found in."""

    n_documents: int
    inside: tuple[float, ...]
    """mean overlap of each family's parent with its children"""
    outside: tuple[float, ...]
    excess: tuple[float, ...]
    """mean excess of documents of both over those expected by chance, standard deviations"""

    @property
    def ratio(self) -> float:
        """Mean overlap inside over mean overlap outside, over all families; NaN without any."""
        return _contrast(self.inside, self.outside)

    def __str__(self) -> str:
        mean = float(np.mean(self.excess)) if self.excess else float("nan")
        return (
            f"{len(self.inside):,} families by {self.n_documents:,} other documents: overlap inside over outside "
            f"{self.ratio:.2f}, excess {mean:+.1f} standard deviations"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureFamilies(Result):
    """Families of features, the largest first."""

    n_documents: int
    sides: Int[np.ndarray, "n_sides 2"]
    """feature and sign of each side that could be in one"""
    min_overlap: float
    null_counts: tuple[int, ...]
    """families found after the documents of each side were permuted, one number a draw"""
    families: tuple[Family, ...]

    @property
    def ratio(self) -> float:
        """Mean overlap inside over mean overlap outside, over all families; NaN without any."""
        return _contrast([one.inside for one in self.families], [one.outside for one in self.families])

    @cached_property
    def members(self) -> frozenset[tuple[int, int]]:
        """Every side that is in a family."""
        return frozenset(side for one in self.families for side in (one.parent, *one.children))

    def of(self, side: SideId) -> tuple[Family, ...]:
        """The families that a side of a feature is in, as parent or below it; a number is its positive side."""
        wanted = side if isinstance(side, tuple) else (side, 1)
        return tuple(one for one in self.families if wanted == one.parent or wanted in one.children)

    def score(self, documents: Documents) -> FamilyScores:
        """The overlaps of the same families in other documents: what of them is not chance of those they were found in.

        Raises:
            ValueError: documents with other features.
        """
        documents = as_documents(documents)
        columns = [documents.column_of((feature, sign)) for feature, sign in self.sides.tolist()]
        place = {column: i for i, column in enumerate(columns)}
        groups = [
            _Group(place[documents.column_of(one.parent)], [place[documents.column_of(side)] for side in one.children])
            for one in self.families
        ]
        found = measure(_firings(documents.matrix[:, columns]), groups)
        return FamilyScores(
            n_documents=len(documents),
            inside=tuple(one.inside for one in found),
            outside=tuple(one.outside for one in found),
            excess=tuple(one.excess for one in found),
        )

    def __str__(self) -> str:
        null = self.null_counts
        chance = f"; {np.mean(null):.3g} where documents of each are permuted ({len(null)} draws)" if null else ""
        lines = [
            f"{len(self.families):,} families of {len(self.sides):,} sides of features by {self.n_documents:,} "
            f"documents{chance}; overlap inside over outside {self.ratio:.2f}"
        ]
        table = [["size", "documents", "inside", "outside", "excess", "q", "parent and children"]]
        for one in self.families[:N_SHOWN]:
            shown = zip((one.parent, *one.children), (one.name, *one.names), strict=True)
            table.append(
                [
                    f"{len(one.children):,}",
                    f"{one.n_documents:,}",
                    f"{one.inside:.3f}",
                    f"{one.outside:.3f}",
                    f"{one.excess:+.1f}",
                    f"{one.q:.2g}",
                    ", ".join(
                        f"{j}{'' if sign > 0 else ' -'}{f' ({name})' if name else ''}"
                        for (j, sign), name in list(shown)[: N_MEMBERS + 1]
                    ),
                ]
            )
        return "\n".join(lines + (format_table(table, left=(6,)) if self.families else []))


def find_families(
    documents: Documents,
    *,
    sides: Collection[SideId] | None = None,
    labels: FeatureNames | None = None,
    min_overlap: float = 0.1,
    min_excess: float | None = None,
    min_children: int = 4,
    max_density: float = 0.2,
    min_documents: int = 10,
    n_rounds: int = 3,
    n_null: int = 3,
    seed: int = 0,
) -> FeatureFamilies:
    """Families of sides of features: what lies below a side in the maximum spanning forest of overlaps.

    The overlap of two sides is documents of both / (documents of the rarer + 1); those below `min_overlap` are none.
    Each edge of the forest points from the denser side to the rarer. A side with at least three directly below it is
    the parent of all that lies below it. Parents are then taken out and a forest is made of the rest, `n_rounds` times
    in all; of families whose members are alike (Jaccard index above .6) the largest is kept. As in arXiv:2408.00657,
    with overlaps by the rarer side, so that they are symmetric.

    A side in a fifth of all documents overlaps with any rare one by .2, so there are families by chance: the same
    search in documents that are permuted for each side says how many, and how likely each is one of them.

    Args:
        documents: feature store, or documents from `pool_documents`.
        sides: sides that may be in a family, such as those with good labels; None is all.
        labels: names of features, as texts by feature or a label store.
        min_overlap: smallest overlap of an edge, in (0, 1).
        min_excess: smallest excess of an edge's documents over chance, in standard deviations; None asks for none, as
            the paper.
        min_children: smallest number of members below the parent.
        max_density: sides that fire in a larger share of documents are left out.
        min_documents: sides that fire in fewer documents are left out.
        n_rounds: number of forests.
        n_null: draws of permuted documents; 0 measures no chance, and q is NaN.
        seed: of the permutations.

    Raises:
        ValueError: settings out of range, sides that do not exist, or fewer than two sides to choose from.
    """
    require_names(labels)
    documents = as_documents(documents)
    if not (0 < min_overlap < 1 and 0 < max_density <= 1) or min(min_children, min_documents, n_rounds) < 1:
        raise ValueError(
            "`min_overlap` must be in (0, 1), `max_density` in (0, 1], `min_children`, `min_documents` and `n_rounds` "
            f"at least 1, got {min_overlap}, {max_density}, {min_children}, {min_documents} and {n_rounds}."
        )
    if n_null < 0:
        raise ValueError(f"`n_null` must be at least 0, got {n_null}.")
    counts = documents.n_fires
    kept = np.flatnonzero((counts >= min_documents) & (counts <= max_density * len(documents)))
    if sides is not None:
        kept = np.intersect1d(kept, [documents.column_of(side) for side in sides])
    if len(kept) < 2:
        raise ValueError(
            f"There must be at least two sides that fire in {min_documents} documents or more and in at most "
            f"{max_density:g} of all {len(documents)}, got {len(kept)}; change `min_documents` or `max_density`."
        )
    fires = _firings(documents.matrix[:, kept])
    rules = _Rules(min_overlap, min_excess, min_children, n_rounds)
    found = _search(fires, rules)
    null = [_search(permute_columns(fires, (seed, i)), rules) for i in range(n_null)]
    q = _chance([one.excess for one in found], [one.excess for draw in null for one in draw], n_null)
    name = name_sides(labels, (kept // 2).tolist())
    return FeatureFamilies(
        n_documents=len(documents),
        sides=np.stack([kept // 2, 1 - 2 * (kept % 2)], 1),
        min_overlap=min_overlap,
        null_counts=tuple(len(draw) for draw in null),
        families=tuple(
            _describe(one, kept, counts, name, chance) for one, chance in zip(found, q.tolist(), strict=True)
        ),
    )


class _Rules(NamedTuple):
    """What an edge and a family must have."""

    min_overlap: float
    min_excess: float | None
    min_children: int
    n_rounds: int


class _Group(NamedTuple):
    """A family before it is measured: columns of a matrix of firings."""

    parent: int
    children: list[int]
    above: Sequence[int] = ()


class _Measured(NamedTuple):
    group: _Group
    inside: float
    outside: float
    excess: float


def _firings(codes: "csr_matrix") -> "csr_matrix":
    """1 where a code is not 0."""
    from scipy.sparse import csr_matrix

    given = csr_matrix(codes)
    return csr_matrix((np.ones(given.nnz, np.int32), given.indices, given.indptr), given.shape)


def permute_columns(fires: "csr_matrix", seed: int | tuple[int, ...]) -> "csr_matrix":
    """Firings with as many in each column, in rows drawn at random: what columns share by chance."""
    from scipy.sparse import csc_matrix

    rng, columns = np.random.default_rng(seed), fires.tocsc()
    rows = np.empty(columns.nnz, np.int32)
    for start, stop in zip(columns.indptr[:-1].tolist(), columns.indptr[1:].tolist(), strict=True):
        rows[start:stop] = rng.choice(fires.shape[0], stop - start, replace=False, shuffle=False)
    return csc_matrix((columns.data, rows, columns.indptr), fires.shape).tocsr()


def _search(fires: "csr_matrix", rules: _Rules) -> list[_Measured]:
    """The families of a matrix of firings, measured in it, the largest first."""
    counts = np.bincount(fires.indices, minlength=fires.shape[1])
    i, j, overlap = _find_edges(fires, counts, rules)
    swapped = (counts[j] > counts[i]) | ((counts[j] == counts[i]) & (j < i))
    dense, rare = np.where(swapped, j, i), np.where(swapped, i, j)
    groups: list[_Group] = []
    left = np.ones(len(counts), bool)
    for _ in range(rules.n_rounds):
        edges = np.flatnonzero(left[dense] & left[rare])
        tree = edges[_span(dense[edges], rare[edges], overlap[edges], counts)]
        found = _gather(dense[tree], rare[tree], overlap[tree])
        groups += found
        left[[group.parent for group in found]] = False
        if not found:
            break
    return measure(fires, _drop_copies([one for one in groups if len(one.children) >= rules.min_children], len(counts)))


def _find_edges(
    fires: "csr_matrix", counts: Int[np.ndarray, "n"], rules: _Rules
) -> tuple[Int[np.ndarray, "n_edges"], Int[np.ndarray, "n_edges"], Float[np.ndarray, "n_edges"]]:
    """Pairs of columns with at least this overlap, each once, and their overlaps; a block of columns at a time."""
    columns, parts = fires.tocsc(), []
    for start in range(0, len(counts), BLOCK):
        shared = (columns[:, start : start + BLOCK].T.tocsr() @ fires[:, start:]).tocoo()
        i, j = shared.row.astype(np.int64) + start, shared.col.astype(np.int64) + start
        overlap = shared.data / (np.minimum(counts[i], counts[j]) + 1.0)
        kept = (overlap >= rules.min_overlap) & (i < j)
        if rules.min_excess is not None:
            kept[kept] = excess(shared.data[kept], counts[i[kept]], counts[j[kept]], fires.shape[0]) >= rules.min_excess
        parts.append((i[kept], j[kept], overlap[kept]))
    i, j, overlap = (np.concatenate(part) for part in zip(*parts, strict=True))
    return i, j, overlap


def _span(
    dense: np.ndarray, rare: np.ndarray, overlap: np.ndarray, counts: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "n_tree"]:
    """Which edges are in the maximum spanning forest; of equal overlaps that with the rarer parent, the lower columns.

    A side that fires only where a second does, and this only where a third does, overlaps with both alike: it belongs
    below the second. The forest depends on the order of edges alone, so ranks are what is spanned: it is the only one.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import minimum_spanning_tree

    order = np.lexsort((rare, dense, counts[dense], -overlap))
    rank = np.empty(len(order))
    rank[order] = np.arange(1, len(order) + 1)
    tree = minimum_spanning_tree(csr_matrix((rank, (dense, rare)), (len(counts), len(counts))))
    return order[np.sort(tree.data.astype(np.int64)) - 1]


def _gather(dense: np.ndarray, rare: np.ndarray, overlap: np.ndarray) -> list[_Group]:
    """Every column with enough others directly below it, with all below it, breadth first."""
    below: dict[int, list[int]] = {}
    for at in np.lexsort((rare, -overlap)).tolist():
        below.setdefault(int(dense[at]), []).append(int(rare[at]))
    groups = []
    for parent in sorted(one for one, direct in below.items() if len(direct) >= LEAST_BRANCHES):
        children, above, seen = list(below[parent]), [-1] * len(below[parent]), {*below[parent]}
        for at, child in enumerate(children):  # grows while it is read
            new = [one for one in below.get(child, ()) if one not in seen]
            seen.update(new)
            children += new
            above += [at] * len(new)
        groups.append(_Group(parent, children, above))
    return groups


def _drop_copies(groups: list[_Group], n: int) -> list[_Group]:
    """The groups, largest first, without those that are nearly a larger one."""
    from scipy.sparse import csr_matrix

    groups = sorted(groups, key=lambda one: (-len(one.children), one.parent))
    sizes = np.array([len(one.children) for one in groups], np.int64)
    rows = np.repeat(np.arange(len(groups)), sizes)
    columns = np.array([child for one in groups for child in one.children], np.int64)
    members = csr_matrix((np.ones(len(rows), np.int64), (rows, columns)), (len(groups), n))
    shared = (members @ members.T).tocsr()
    kept = np.zeros(len(groups), bool)
    for i in range(len(groups)):
        part = slice(*shared.indptr[i : i + 2])
        others, both = shared.indices[part], shared.data[part]
        kept[i] = not (kept[others] & (both > MOST_ALIKE * (sizes[i] + sizes[others] - both))).any()
    return [group for group, keep in zip(groups, kept, strict=True) if keep]


def measure(fires: "csr_matrix", groups: list[_Group]) -> list[_Measured]:
    """The groups with the overlaps of their parents and how far they exceed chance, in a matrix of firings."""
    return [one for start in range(0, len(groups), BLOCK // 4) for one in _measure(fires, groups[start:][: BLOCK // 4])]


def _measure(fires: "csr_matrix", groups: list[_Group]) -> Iterator[_Measured]:
    n, counts = fires.shape[0], np.bincount(fires.indices, minlength=fires.shape[1]).astype(np.float64)
    both = (fires[:, [one.parent for one in groups]].T.tocsr() @ fires).tocsr()
    for i, group in enumerate(groups):
        shared = both[i].toarray().ravel().astype(np.float64)
        own, children = counts[group.parent], np.array(group.children)
        overlap = shared / (np.minimum(counts, own) + 1)
        rest = len(counts) - 1 - len(children)
        outside = overlap.sum() - overlap[children].sum() - overlap[group.parent]
        yield _Measured(
            group=group,
            inside=float(overlap[children].mean()),
            outside=float(outside / rest) if rest else float("nan"),
            excess=float(excess(shared[children], own, counts[children], n).mean()),
        )


def excess(both: Shaped[np.ndarray, "n_pairs"], n_a: Any, n_b: Any, n: int) -> Float[np.ndarray, "n_pairs"]:
    """Documents of both of two sides less those expected where they are independent, in standard deviations of that
    count (hypergeometric).

    Args:
        both: documents in which both fire.
        n_a: documents of the one side.
        n_b: documents of the other.
        n: all documents.

    >>> excess(np.array([30]), np.array([40]), np.array([50]), 100).round(3)
    array([4.062])
    """
    a, rate = np.asarray(n_a, np.float64), np.asarray(n_b, np.float64) / n
    spread = np.sqrt(a * rate * (1 - rate) * (n - a) / max(n - 1, 1))
    return np.asarray((both - a * rate) / np.maximum(spread, 1e-12))


def _chance(excess: list[float], null: list[float], n_null: int) -> Float[np.ndarray, "n"]:
    """The expected share of chance among families with at least the excess of each: (1 + those of all draws) / draws
    over those found, which never grows with the excess.
    """
    if n_null == 0:
        return np.full(len(excess), np.nan)
    order = np.argsort(excess)  # the weakest first
    as_strong = len(null) - np.searchsorted(np.sort(null), np.array(excess, float)[order], "left")
    shares = (1 + as_strong) / n_null / np.arange(len(excess), 0, -1)
    q = np.empty(len(excess))
    q[order] = np.minimum.accumulate(np.minimum(shares, 1)) if len(excess) else shares
    return q


def _contrast(inside: Collection[float], outside: Collection[float]) -> float:
    """Mean overlap inside over mean overlap outside."""
    if not inside or not (apart := float(np.nanmean(list(outside)))):
        return float("nan")
    return float(np.mean(list(inside))) / apart


def _describe(one: _Measured, kept: np.ndarray, counts: np.ndarray, name: object, q: float) -> Family:
    assert callable(name)
    parent, *children = (
        (int(kept[at]) // 2, 1 - 2 * (int(kept[at]) % 2)) for at in (one.group.parent, *one.group.children)
    )
    return Family(
        parent=parent,
        name=name(*parent),
        n_documents=int(counts[kept[one.group.parent]]),
        children=tuple(children),
        names=tuple(name(*child) for child in children),
        above=tuple(one.group.above),
        inside=one.inside,
        outside=one.outside,
        excess=one.excess,
        q=q,
    )
