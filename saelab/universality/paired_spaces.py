"""Activations of two models token by token, how well pairs are told, and rows as similarities to anchors.

Models with different tokenizers have no token in common; their tokens are paired where they end at the same character,
when both models have read the same text. Similarities to anchors put two spaces side by side without any map.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelab.collecting.reader import make_text, text_of
from saelab.functional.indices import find_runs, move_blocks
from saelab.functional.metrics import exact
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import mask_of
from saelab.stores.activations import Activations
from saelab.stores.corpus import Places, StoredText
from saelab.stores.manifest import INT_COLUMNS
from saelab.stores.results import Result, format_table
from saelab.universality.alignment import AlignedRows, Overview, TokenPairs, find_common_rows, format_counts
from saelab.universality.document_text import Spelled
from saelab.universality.representation_similarity import ROUNDING, SAMPLED_ROWS, SpaceScore

PairRule = Literal["ends", "same"]
Channel = Literal["cosine", "euclidean", "l1", "linf"]
CHANNELS: tuple[Channel, ...] = get_args(Channel)
AnchorChoice = Literal["random", "kmeans", "farthest"]
POWERS = {"euclidean": 2.0, "l1": 1.0, "linf": float("inf")}
LOWER_IS_BETTER = ("mean_rank",)
FLAT = 1e-9
"""deviation of similarities below which it is rounding"""
ROWS = 4096
"""rows whose distances are computed at a time"""


# ---- pairs of tokens
@dataclass(frozen=True, kw_only=True, eq=False)
class AlignedActivations(Result):
    """Paired activations of two models: row i of `a` and row i of `b` are of tokens that belong together."""

    a: Activations
    """rows of the first model that have a partner, in memory"""
    b: Activations
    """their partners, with the documents, positions and token ids of the first model's rows"""
    rows_a: Int[Tensor, "n_pairs"]
    """row of each pair in the activations that were given"""
    rows_b: Int[Tensor, "n_pairs"]
    match: PairRule
    """"ends": the tokens end at the same character; "same": they also begin at the same"""
    n_rows: tuple[int, int]
    """number of rows of either side"""
    alignment: Overview | None
    """counts of the alignment by characters; None for the same tokens"""

    def __len__(self) -> int:
        return len(self.rows_a)

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON, without rows."""
        alignment = None if self.alignment is None else self.alignment.to_dict()
        return {"match": self.match, "n_pairs": len(self), "n_rows": list(self.n_rows), "alignment": alignment}

    def __str__(self) -> str:
        how = {"ends": "end at the same character", "same": "cover the same characters"}[self.match]
        how = "are of the same tokens" if self.alignment is None else how
        return f"{len(self):,} pairs of rows that {how}, of {self.n_rows[0]:,} and {self.n_rows[1]:,} rows"


@dataclass(frozen=True)
class _LocatedRows:
    """Rows of activations with the text that they are of."""

    text: StoredText
    places: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def where(self) -> Places:
        return Places([len(self)], lambda _, start, stop: self.places[start:stop], len(self.text), Path("activations"))


def align_activations(
    a: Activations,
    b: Activations,
    models: tuple[AnyModel, AnyModel],
    *,
    tokens: tuple[Tokens, Tokens] | None = None,
    match: PairRule = "ends",
) -> AlignedActivations:
    """Rows of two models' activations on the same documents whose tokens belong together; tokenizers may differ.

    Tokens are located by the characters that they cover, white space aside (see `align_rows`). Two tokens that end at
    the same character are a pair: there both models have read the same text. Every row is in one pair at most. For a
    crosscoder, join `a` and `b` of the result, or give its `rows_a` and `rows_b` as the `rows` of `Activations.join`.

    Args:
        a: activations of the first model, with token ids, documents and positions.
        b: activations of the second model on the same documents.
        models: the two models, whose tokenizers give the text of the tokens.
        tokens: the texts that the activations were collected from; needed where a mask left out tokens with text. None
            takes the text of the rows themselves.
        match: "ends", or "same" for tokens that cover exactly the same characters.

    Raises:
        ValueError: where rows do not know their tokens, `tokens` are others, or no two tokens belong together.

    >>> model = sl.lm.tiny_model()
    >>> acts = sl.collect(model, sl.tokenize(model, ["a tin can"] * 4), "blocks.1.hook_resid_post", progress=False)
    >>> len(align_activations(acts, acts, (model, model))) == len(acts)
    True
    """
    models = as_model(models[0]), as_model(models[1])
    if match not in get_args(PairRule):
        raise ValueError(f"`match` must be one of {get_args(PairRule)}, got '{match}'.")
    given = tokens or (None, None)
    sides = [_locate("a", a, models[0], given[0]), _locate("b", b, models[1], given[1])]
    found, common = None, find_common_rows(sides[0], sides[1])
    if common is None:
        found = AlignedRows(sides[0], sides[1])
        rows = _pair_tokens(found, sides, match)
    else:
        rows = tuple(np.arange(len(sides[0])) if own is None else np.asarray(own[:]) for own in common)
    at = [torch.from_numpy(own.astype(np.int64)) for own in rows]
    if len(at[0]) == 0:
        raise ValueError(
            f"Tokens of `a` and `b` must {'end at' if match == 'ends' else 'cover'} the same characters somewhere, got "
            "no pair; try match='ends', or give `tokens` where masks left out text."
        )
    columns: dict[str, Tensor] = {name: getattr(a, name)[at[0]] for name in INT_COLUMNS}
    taken = [
        Activations.from_tensor(acts[own], acts.provenance, **columns) for acts, own in zip((a, b), at, strict=True)
    ]
    return AlignedActivations(
        a=taken[0], b=taken[1], rows_a=at[0], rows_b=at[1], match=match, n_rows=(len(a), len(b)),
        alignment=None if found is None else Overview(**format_counts(found)),
    )  # fmt: skip


def _locate(name: str, acts: Activations, model: Model, tokens: Tokens | None) -> _LocatedRows:
    """The rows in their text."""
    columns = [getattr(acts, column) for column in INT_COLUMNS]
    if any(column is None for column in columns):
        raise ValueError(
            f"`{name}` must know tokens, documents and positions of its rows to be aligned, got activations that do "
            "not; give what `collect` returned."
        )
    own = [column.numpy() for column in columns]
    if tokens is None:
        return _LocatedRows(make_text(own, model), np.arange(len(acts)))
    mask = None if acts.provenance is None else mask_of(acts.provenance)
    keep = tokens.attention_mask if mask is None or mask.max_norm_ratio is not None else mask.apply(tokens).keep
    text, places = text_of(tokens, model), (tokens.attention_mask.flatten().cumsum(0) - 1)[keep.flatten()].numpy()
    there = [getattr(text, column)[places] for column in INT_COLUMNS]
    if not all(np.array_equal(x, y) for x, y in zip(own, there, strict=True)):
        raise ValueError(
            f"`tokens` must be those that `{name}` was collected from, with a mask that needs no norms, got others "
            f"({len(places)} tokens that the mask keeps for {len(acts)} rows)."
        )
    return _LocatedRows(text, places)


def _pair_tokens(found: AlignedRows, sides: list[_LocatedRows], match: PairRule) -> tuple[np.ndarray, ...]:
    """Rows of both sides whose tokens end at the same characters, in the order of a."""
    parts: list[np.ndarray] = [np.zeros((2, 0), np.int64)]
    for documents in found.texts[0].batches(found.documents.tolist()):
        pairs = found.pair(np.array(documents))
        chosen = _find_ends(pairs) if match == "ends" else [own[pairs.sole] for own in pairs.tokens]
        rows = np.stack([
            side.where.find(spelled.places[own])[1]
            for side, spelled, own in zip(sides, pairs.sides, chosen, strict=True)
        ])  # fmt: skip
        parts.append(rows[:, (rows >= 0).all(0)])
    rows = np.concatenate(parts, axis=1)
    return tuple(rows[:, np.argsort(rows[0], kind="stable")])


def _find_ends(pairs: TokenPairs) -> list[np.ndarray]:
    """Tokens of both sides whose last bytes belong together."""
    both = np.logical_and(*(_is_last(side)[at] for side, at in zip(pairs.sides, pairs.at, strict=True)))
    return [side.tokens[at[both]] for side, at in zip(pairs.sides, pairs.at, strict=True)]


def _is_last(side: Spelled) -> Bool[np.ndarray, "n_bytes"]:
    """Which bytes are the last of their token."""
    return np.append(np.diff(side.tokens) != 0, np.ones(min(len(side.tokens), 1), bool))


# ---- similarities to anchors
def choose_anchors(
    x: Float[Tensor, "n d"], n: int = 300, method: AnchorChoice = "random", *, seed: int = 0
) -> Int[Tensor, "n_anchors"]:
    """Row numbers of `n` different rows that serve as anchors, in increasing order; take the same rows in both spaces.

    Args:
        x: (n, d) rows of one of the spaces.
        n: number of anchors, more than the space has dimensions that matter.
        method: "random"; "kmeans", the row nearest to each of `n` centroids; or "farthest", each the row farthest from
            all before, the first drawn at random.
        seed: of the draw, and of the start of k-means.

    Raises:
        ValueError: for fewer rows than anchors, fewer than 2 anchors, values that are not finite where distances
            choose, and an unknown method.

    >>> choose_anchors(torch.tensor([[0.0], [0.1], [1.0], [5.0]]), 3, "farthest").tolist()
    [0, 2, 3]
    """
    if method not in get_args(AnchorChoice):
        raise ValueError(f"`method` must be one of {get_args(AnchorChoice)}, got '{method}'.")
    if not 2 <= n <= len(x):
        raise ValueError(f"`n` must be at least 2 and at most the number of rows ({len(x)}), got {n}.")
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return torch.randperm(len(x), generator=generator)[:n].sort().values
    if not x.isfinite().all():
        raise ValueError(f"`x` must be finite for anchors by '{method}', got NaN or infinity; leave those rows out.")
    x = exact(x).cpu()
    return (_spread if method == "farthest" else _cluster)(x, n, seed).sort().values


def _spread(x: Tensor, n: int, seed: int) -> Tensor:
    """Rows each of which is farthest from those before."""
    first = int(torch.randint(len(x), (), generator=torch.Generator().manual_seed(seed)))
    chosen, nearest = [first], (x - x[first]).square().sum(1)
    for _ in range(n - 1):
        nearest[chosen[-1]] = -1  # never again, where rows are equal
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def _cluster(x: Tensor, n: int, seed: int) -> Tensor:
    """The row nearest to each centroid that is not nearest to one before."""
    from sklearn.cluster import KMeans

    centers = torch.from_numpy(KMeans(n, n_init=1, random_state=seed).fit(x.numpy()).cluster_centers_)
    free, chosen = torch.ones(len(x), dtype=torch.bool), []
    for row in torch.cdist(centers, x):
        chosen.append(int(row.where(free, torch.inf).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


@dataclass(frozen=True, eq=False)
class Anchors:
    """Rows of a space that all others are described by, as similarities to each.

        cosine      (x - m) . (a - m) / (|x - m| |a - m|)       m the mean of the anchors
        euclidean   1 - |x - a|_2 / mean of |a - a'|_2 over pairs of anchors
        l1, linf    the same with the sum, and the largest, of the differences

    Each is 1 for the anchor itself and near 0 for a row as far as another anchor. "cosine" and "euclidean" do not
    change with rotation, shift and scale of the space, "cosine" not with the distance of a row from `m` either; "l1"
    and "linf" do not change with shift, scale, and order and signs of the coordinates. Sources: arXiv:2209.15430, and
    arXiv:2310.01211 for several side by side.

    Raises:
        ValueError: for fewer than 2 anchors, anchors that are all equal, and values that are not finite.

    >>> anchors = Anchors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    >>> anchors.relate(torch.tensor([[2.0, 0.0]]))
    tensor([[ 1.0000,  0.0000, -0.7071]])
    """

    rows: Float[Tensor, "n_anchors d"]

    def __post_init__(self) -> None:
        rows = self.rows.detach()
        if len(rows) < 2 or not rows.isfinite().all() or bool((rows == rows[:1]).all()):
            raise ValueError(
                f"Anchors must be at least 2 rows, finite and not all equal, got {tuple(rows.shape)} or such values."
            )
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def relate(
        self, x: Float[Tensor, "n d"], channels: Channel | tuple[Channel, ...] = "cosine", *, scaled: bool | None = None
    ) -> Float[Tensor, "n n_relative"]:
        """Similarities of rows to all anchors, (n, n_channels * n_anchors), channels side by side.

        Args:
            x: (n, d) rows of the anchors' space.
            channels: one or several of "cosine", "euclidean", "l1" and "linf".
            scaled: whether each channel has mean 0 and deviation 1 over pairs of different anchors, so that none
                outweighs the others; None where there are several.

        Raises:
            ValueError: for an unknown channel and rows of another width.
        """
        names = (channels,) if isinstance(channels, str) else tuple(channels)
        if not names or (unknown := [name for name in names if name not in CHANNELS]):
            raise ValueError(f"`channels` must be among {CHANNELS}, at least one, got {unknown if names else names}.")
        if x.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"Rows must be as wide as the anchors ({self.rows.shape[1]}), got {x.shape[1]}; each space has anchors "
                "of its own."
            )
        parts = []
        for name in names:
            shift, scale = self._levels(name) if (len(names) > 1 if scaled is None else scaled) else (0.0, 1.0)
            parts.append((self._compare(x, name) - shift) / scale)
        return torch.cat(parts, 1).float()

    def _levels(self, channel: Channel) -> tuple[float, float]:
        """Mean and deviation of a channel over pairs of different anchors."""
        between = self._compare(self.rows, channel)
        others = between[~torch.eye(len(self), dtype=torch.bool)]
        deviation = float(others.std())
        return float(others.mean()), deviation if deviation > FLAT else 1.0  # all are as far from each other

    def _compare(self, x: Tensor, channel: Channel) -> Float[Tensor, "n n_anchors"]:
        """Similarities of one channel, float64."""
        x, rows = exact(x).cpu(), exact(self.rows).cpu()
        if channel == "cosine":
            center = rows.mean(0)
            unit = torch.nn.functional.normalize(rows - center, dim=1, eps=1e-30)
            return torch.nn.functional.normalize(x - center, dim=1, eps=1e-30) @ unit.T
        parts = [_distances(part, rows, channel) for part in x.split(ROWS)] or [x.new_zeros(0, len(rows))]
        return 1 - torch.cat(parts) / self._typical(channel)

    def _typical(self, channel: Channel) -> float:
        """Mean distance of two anchors."""
        rows = exact(self.rows).cpu()
        return float(_distances(rows, rows, channel).sum()) / (len(rows) * (len(rows) - 1))


def _distances(x: Tensor, rows: Tensor, channel: Channel) -> Tensor:
    # the fast way by products loses what is close, and an anchor is at distance 0 of itself
    return torch.cdist(x, rows, p=POWERS[channel], compute_mode="donot_use_mm_for_euclid_dist")


# ---- how well pairs are told
@dataclass(frozen=True, kw_only=True, eq=False)
class PairScores(Result):
    """How near rows come to their partners, each score beside shuffled pairs; made by `score_pairs`."""

    scores: dict[str, SpaceScore]
    """`r2`, `cosine`, `mean_rank` and `top1`; the 95 % of `mean_rank` is the rank that 95 of 100 shuffled pairings stay
    above"""
    n_pairs: int
    n_searched: int
    """rows among which partners are searched"""
    n_shuffles: int
    in_blocks: bool
    """whether rows were shuffled in blocks of neighbors within documents"""

    def __getitem__(self, name: str) -> SpaceScore:
        return self.scores[name]

    def __str__(self) -> str:
        how = "pairings shuffled in blocks" if self.in_blocks else "shuffled pairings"
        lines = [f"{self.n_pairs:,} held-out pairs, {self.n_searched:,} of them searched, {self.n_shuffles:,} {how}"]
        table = [["", "value", "chance", "95 %", "p"]]
        for name, one in self.scores.items():
            digits = 1 if name == "mean_rank" else 3
            marks = [f"{value:.{digits}f}" for value in (one.value, one.chance, one.chance_95)]
            table.append([name.replace("_", " "), *marks, f"{one.p:.3g}", one.note])
        return "\n".join([*lines, *format_table(table, left=(0, 5))])


def score_pairs(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "n d"],
    *,
    doc_ids: Shaped[Any, "n"] | None = None,
    n_shuffles: int = 100,
    seed: int = 0,
) -> PairScores:
    """How near the rows of x are to their partners in y, beside shuffled pairs: rows that a map brought to y's space,
    or similarities to the same anchors in two spaces.

        r2         1 - |x - y|^2 / |y - mean(y)|^2, at most 1
        cosine     mean cosine of partners about the mean of y, -1 to 1
        mean_rank  mean rank of the partner by that cosine among all rows of y: 1 is best, (n + 1) / 2 chance
        top1       share of rows whose partner is the nearest; 1 / n by chance

    Ties share their ranks. At most 2,000 rows are searched.

    Args:
        x: (n, d) rows.
        y: (n, d) their partners.
        doc_ids: document of each row, where rows are tokens; shuffled pairings then keep runs of neighbors.
        n_shuffles: number of shuffled pairings; 0 for none.
        seed: of the shuffles, and of the rows that are searched.

    Raises:
        ValueError: for rows that are not pairs of one width, fewer than 3, values that are not finite, and a negative
            number of shuffles.

    >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    >>> score_pairs(x, x)["top1"].value
    1.0
    """
    if x.shape != y.shape or len(x) < 3:
        raise ValueError(f"`x` and `y` must be pairs of one width, at least 3, got {tuple(x.shape)}, {tuple(y.shape)}.")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("`x` and `y` must be finite, got NaN or infinity; leave those pairs out.")
    if n_shuffles < 0:
        raise ValueError(f"`n_shuffles` must be at least 0, got {n_shuffles}; use 0 for no shuffled pairings.")
    x, y = exact(x).cpu(), exact(y).cpu()
    drawing, shuffling = np.random.default_rng(seed).spawn(2)
    n, documents = len(y), None if doc_ids is None else np.asarray(doc_ids)
    measured = _PairTable.make(x, y, np.sort(drawing.permutation(n)[:SAMPLED_ROWS]))
    own = None if documents is None else documents[measured.sample]
    value = measured.score(np.arange(n), np.arange(len(measured.sample)))
    shuffled = [
        measured.score(_shuffle(documents, n, shuffling), _shuffle(own, len(measured.sample), shuffling))
        for _ in range(n_shuffles)
    ]
    fault = "" if measured.spread > 0 else "all rows of y are equal"
    return PairScores(
        scores={name: _beside(value[name], [one[name] for one in shuffled], name, fault) for name in value},
        n_pairs=n, n_searched=len(measured.sample), n_shuffles=n_shuffles, in_blocks=documents is not None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _PairTable:
    """What scores of all pairings are read from."""

    x: Tensor
    y: Tensor
    normed_x: Tensor
    normed_y: Tensor
    sample: Int[np.ndarray, "m"]
    ranks: Float[np.ndarray, "m m"]
    """rank of every sampled row of y for every one of x, 1 for the nearest"""
    first: Float[np.ndarray, "m m"]
    """share of each in being the nearest"""
    spread: float

    @classmethod
    def make(cls, x: Tensor, y: Tensor, sample: np.ndarray) -> "_PairTable":
        from scipy.stats import rankdata

        mean = y.mean(0)
        normed_x, normed_y = (torch.nn.functional.normalize(rows - mean, dim=1, eps=1e-300) for rows in (x, y))
        ranks = rankdata(-(normed_x[sample] @ normed_y[sample].T).numpy().round(12), axis=1)
        first = ranks == ranks.min(1, keepdims=True)
        spread = float((y - mean).square().sum())
        return cls(x, y, normed_x, normed_y, sample, ranks, first / first.sum(1, keepdims=True), spread)

    def score(self, order: np.ndarray, sampled: np.ndarray) -> dict[str, float]:
        """The scores of a pairing, of all rows and of the sampled ones."""
        rows = np.arange(len(sampled))
        missed = float((self.x - self.y[order]).square().sum())
        return {
            "r2": 1 - missed / self.spread if self.spread > 0 else float("nan"),
            "cosine": float((self.normed_x * self.normed_y[order]).sum(1).mean()),
            "mean_rank": float(self.ranks[rows, sampled].mean()),
            "top1": float(self.first[rows, sampled].mean()),
        }


def _shuffle(documents: np.ndarray | None, n: int, rng: "np.random.Generator") -> np.ndarray:
    return rng.permutation(n) if documents is None else move_blocks(find_runs(documents), n, rng)[:]


def _beside(value: float, shuffled: list[float], name: str, fault: str) -> SpaceScore:
    """A score beside shuffled pairings; NaN with the reason where it means nothing."""
    nan = float("nan")
    if fault or not shuffled:
        value = nan if fault else value
        return SpaceScore(value=value, chance=nan, chance_95=nan, excess=nan, p=nan, note=fault or "not shuffled")
    sign = -1 if name in LOWER_IS_BETTER else 1
    drawn = np.array(shuffled)
    reached = int(np.count_nonzero(sign * drawn >= sign * value - ROUNDING))
    return SpaceScore(
        value=value, chance=float(drawn.mean()), chance_95=float(np.quantile(drawn, 0.95 if sign > 0 else 0.05)),
        excess=value - float(drawn.mean()), p=(reached + 1) / (len(drawn) + 1), note="",
    )  # fmt: skip
