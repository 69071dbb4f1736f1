"""Universal features: tables and filters of matched pairs, and recurrence over several dictionaries.

Filters keep pairs whose tokens are words, one-to-one pairs, or keywords. Tables list the most similar universal pairs,
with each feature's label and most frequent tokens. Comparisons of several dictionaries count in how many of the others
each feature recurs.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.analysis.top_tokens import weigh_words
from saelab.labels.encoders import EmbeddingFunction
from saelab.labels.label import join_texts
from saelab.labels.label_store import LabelStore
from saelab.lm.tokenizers import is_blank, is_punctuation
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, format_table
from saelab.training.ranks import RankGrid
from saelab.universality.comparison import compare
from saelab.universality.matching import Comparison, Matches, MatchingMethod

Tops = Sequence[Sequence[str]]
"""The strings of the top tokens of every pair, on one side."""
SPECIAL = re.compile(
    r"<\|[^\s|]+\|>|\|[be]os\||</?(?:s|[bes]os|pad|unk|mask|cls|sep|start_of_turn|end_of_turn)>|\[(?:CLS|SEP|PAD|UNK|MASK)\]",
    re.IGNORECASE,
)
"""Special tokens as tokenizers write them."""
N_WORDS = 3
SIGNS = {1: "+", -1: "-"}
FAINT = 0.1
"""a sign with a smaller share of |z| is not shown"""
CLEAR = 0.05
"""above this p, the value is shown as it is, without a "<" before it"""
Sources = Mapping[str, FeatureStore] | Mapping[str, SAE] | Sequence[FeatureStore] | Sequence[SAE]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairFilter(Result):
    """Pairs that pass a filter, and how many each rule removed.

    A pair is counted for the first rule that removes it, so `n_kept` and the counts add up to all pairs.
    """

    keep: Bool[np.ndarray, "n_pairs"]
    removed: dict[str, int]

    @property
    def n_kept(self) -> int:
        """Number of pairs kept."""
        return int(self.keep.sum())

    def __str__(self) -> str:
        total = max(len(self.keep), 1)
        rows = [*self.removed.items(), ("kept", self.n_kept)]
        return "\n".join(format_table([[name, f"{n:,}", f"{n / total:.2%}"] for name, n in rows]))

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON: `removed` by rule and `n_kept`."""
        return {"removed": dict(self.removed), "n_kept": self.n_kept}


def filter_token_pairs(tops_a: Tops, tops_b: Tops, *, special: Iterable[str] = ()) -> PairFilter:
    """The pairs that share a top token and whose top tokens are all words (arXiv:2410.06981).

    Rules, in this order: "nothing shared"; "special", as tokenizers write them or one of `special`; "blank", including
    new lines and invisible characters; "punctuation", including mathematical and currency signs, but not emoji. Case
    and surrounding spaces are ignored when tokens are compared, so that different tokenizers compare. A side without
    top tokens shares nothing. ValueError where the sides differ in number.

    >>> filter_token_pairs([[" Rain", "snow"], ["day", "."], ["a"]], [["rain"], [" day"], ["b"]]).removed
    {'nothing shared': 1, 'special': 0, 'blank': 0, 'punctuation': 1}
    """
    _check_number(tops_a, tops_b)
    named = frozenset(special)
    tests: dict[str, Callable[[Sequence[str], Sequence[str]], bool]] = {
        "nothing shared": lambda a, b: not set(map(_fold, a)) & set(map(_fold, b)),
        "special": lambda a, b: any(token in named or _is_special(token) for token in (*a, *b)),
        "blank": lambda a, b: any(map(is_blank, (*a, *b))),
        "punctuation": lambda a, b: any(map(is_punctuation, (*a, *b))),
    }
    removed = dict.fromkeys(tests, 0)
    keep = np.ones(len(tops_a), bool)
    for i, (a, b) in enumerate(zip(tops_a, tops_b, strict=True)):
        rule = next((name for name, fails in tests.items() if fails(a, b)), None)
        if rule is not None:
            keep[i] = False
            removed[rule] += 1
    return PairFilter(keep=keep, removed=removed)


def filter_one_to_one(
    features_a: Int[np.ndarray, "n_a"], features_b: Int[np.ndarray, "n_b"], strength: Float[np.ndarray, "n_strength"]
) -> PairFilter:
    """One-to-one pairs: of the pairs that share a feature only the one with the largest |`strength`|; the
    first of equals.

    Pairs are accepted from the strongest down, each unless one of its features is already used; NaN comes last. Removed
    pairs are counted by whether the feature of `a` was used, or that of `b` alone. ValueError for unequal lengths.

    >>> filter_one_to_one(np.array([3, 3, 5]), np.array([0, 1, 1]), np.array([0.5, -0.9, 0.7])).keep.tolist()
    [False, True, False]
    """
    _check_number(features_a, features_b, strength)
    keep, removed = np.zeros(len(strength), bool), {"repeated in a": 0, "repeated in b": 0}
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    for i in np.argsort(-np.abs(strength), kind="stable").tolist():
        a, b = int(features_a[i]), int(features_b[i])
        if a in taken_a or b in taken_b:
            removed["repeated in a" if a in taken_a else "repeated in b"] += 1
            continue
        keep[i] = True
        taken_a.add(a)
        taken_b.add(b)
    return PairFilter(keep=keep, removed=removed)


def match_keywords(tops: Tops, keywords: Iterable[str]) -> Bool[np.ndarray, "n_pairs"]:
    """Whether one of each pair's top tokens is one of the keywords; case and surrounding spaces are ignored.

    Whole tokens are compared: "may" does not match "maybe". ValueError where no keyword has a letter.

    >>> match_keywords([[" May", "x"], ["maybe"], []], ["may", "June"]).tolist()
    [True, False, False]
    """
    wanted = {_fold(keyword) for keyword in keywords} - {""}
    if not wanted:
        raise ValueError("`keywords` must hold a word, got none; give a list such as ['may', 'june'].")
    return np.array([not wanted.isdisjoint(map(_fold, tokens)) for tokens in tops], dtype=bool)


def search_labels(
    book: LabelStore, text: str, encoder: EmbeddingFunction | None = None, top: int = 20
) -> Int[np.ndarray, "n_features"]:
    """The features whose chosen label contains the words of `text`, best match first, for `np.isin(features, ...)`.

    Labels of kind "none" (no good name) are ignored.

    Args:
        book: the label database.
        text: the query.
        encoder: function from texts to vectors, by which features of similar labels follow; None searches words alone.
        top: with an encoder, number of labels up to which those by meaning are added; see `LabelStore.search`.
    """
    found = dict.fromkeys(
        label.feature for label in book.search(text, encoder=encoder, top=top) if label.kind != "none"
    )
    return np.array(list(found), dtype=np.int64)


def _check_number(*columns: Sequence[Any] | np.ndarray) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"All arguments must have one entry a pair, got {lengths} entries.")


def _fold(token: str) -> str:
    return token.strip().casefold()


def _is_special(token: str) -> bool:
    return SPECIAL.fullmatch(token.strip()) is not None


def matched_decoder_rows(
    found: Comparison, a: SAE, b: SAE, method: MatchingMethod = "hungarian", *, universal: bool = True
) -> tuple[Float[np.ndarray, "n d_a"], Float[np.ndarray, "n d_b"]]:
    """The decoder rows of matched pairs, as `compare_spaces` takes them; rows of flipped pairs are negated in b.

    Args:
        found: comparison of the features of a and b.
        a: the first SAE that was compared.
        b: the second SAE.
        method: "hungarian" (one-to-one), "mutual" or "best". "best" is many-to-one, which repeats rows and so inflates
            every measure; report it together with "hungarian".
        universal: True keeps only pairs whose features are both universal.

    Raises:
        ValueError: the SAEs do not have the features that were compared.
    """
    if (a.cfg.d_sae, b.cfg.d_sae) != (len(found.a.fires), len(found.b.fires)):
        raise ValueError(
            f"SAEs must have the features that were compared, {len(found.a.fires)} and {len(found.b.fires)} (without "
            f"`sides`), got {a.cfg.d_sae} and {b.cfg.d_sae}."
        )
    pairs, values = found.match(method)
    if universal:
        kept = found.a.universal[pairs[:, 0]] & found.b.universal[pairs[:, 1]]
        pairs, values = pairs[kept], values[kept]
    x, y = (sae.W_dec.detach().double().cpu().numpy()[side] for sae, side in zip((a, b), pairs.T, strict=True))
    return x, y * np.where(values < 0, -1.0, 1.0)[:, None]


@dataclass(frozen=True, kw_only=True)
class UniversalTable(Result):
    """A table of universal pairs, the most similar first; `pandas.DataFrame(table.rows)` converts it."""

    similarity: str
    n_pairs: int
    """number of universal pairs, of which the rows are the first"""
    rows: tuple[dict[str, Any], ...]
    """one per pair, with a and b, the features; side_a and side_b, 1 or -1 where sides were compared, else 0;
    similarity with its sign; n_both, rows on which both fire, -1 for directions; p and q, the larger of both features;
    p_text, with < where no null value was so large; label_a and label_b, empty where there is none; words_a and
    words_b, by sign the tokens with the largest shares of the sum of |z|"""

    def __str__(self) -> str:
        lines = [f"{len(self.rows):,} of {self.n_pairs:,} universal pairs by {self.similarity}"]
        table = [["a", "b", "similar", "p", "both", "what they fire on"]]
        for row in self.rows:
            said = [" ".join(filter(None, (row[f"label_{x}"], format_words(row[f"words_{x}"])))) for x in "ab"]
            table.append([*map(str, self.cells(row)), f"{said[0]} | {said[1]}"])
        return "\n".join([*lines, *format_table(table, left=(5,))])

    @staticmethod
    def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
        """Features, similarity, p and number of common rows of a table row, as text."""
        a, b = (f"{row[x]}{SIGNS.get(row[f'side_{x}'], '')}" for x in "ab")
        both = "-" if row["n_both"] < 0 else f"{row['n_both']:,}"
        return a, b, f"{row['similarity']:+.3f}", row["p_text"], both


def list_universal(
    comparison: Comparison, store_a: FeatureStore, store_b: FeatureStore, *, top: int | None = 20
) -> UniversalTable:
    """A table of the `top` universal pairs with the largest |similarity|, with the labels of the features.

    The pairs are each other's best and universal on both sides; labels are the chosen ones of the stores' label
    databases.

    Args:
        comparison: result of `compare`.
        store_a: the first store compared or, where directions were compared, a store of the same SAE.
        store_b: the second, likewise.
        top: number of pairs; None lists all.

    Raises:
        ValueError: the stores are not those of the comparison, or `top` is below 1.
    """
    check_stores(comparison, store_a, store_b)
    if top is not None and top < 1:
        raise ValueError(f"`top` must be at least 1, or None for all, got {top}.")
    with LabelStore.open(store_a) as book_a, LabelStore.open(store_b) as book_b:
        rows = tuple(
            _describe(comparison, pair, (store_a, store_b), (book_a, book_b))
            for pair in comparison.universal_pairs[:top].tolist()
        )
    return UniversalTable(similarity=comparison.similarity, n_pairs=len(comparison.universal_pairs), rows=rows)


def check_stores(comparison: Comparison, store_a: FeatureStore, store_b: FeatureStore) -> None:
    """Check that two stores are those of a comparison, by widths and firing counts; ValueError where they are not."""
    for name, side, store in (("a", comparison.a, store_a), ("b", comparison.b, store_b)):
        width = len(side.fires) // (2 if comparison.sides else 1)
        if store.d_sae != width:
            raise ValueError(
                f"`store_{name}` must be of the {width} features compared as {name}, got {store.d_sae}; give those "
                "that were compared, in their order."
            )
        counted = comparison.n_rows is not None and (name == "a" or not comparison.alignment)  # rows of the store
        fires = store.statistics.fires
        if counted and (side.fires > (fires.ravel() if comparison.sides else fires.sum(1))).any():
            raise ValueError(
                f"`store_{name}` must be the one compared as {name}, got one in which features fire less often; give "
                "those that were compared, in their order."
            )


def split_side(comparison: Comparison, number: int) -> tuple[int, int]:
    """The feature that a number of the comparison stands for, and its side: 1 or -1, or 0 where sides were not
    compared.
    """
    return (number // 2, 1 - 2 * (number % 2)) if comparison.sides else (number, 0)


def format_p(side: Matches, number: int) -> str:
    """p of a feature as text, such as "< 1/1,025" where none of 1,024 null values is as large.

    The lowest p of one side is 1 / (n + 1), with an n that is about the same for rare and frequent features.
    """
    p, lowest = float(side.p[number]), float(side.p.min())
    n = round(1 / p)
    return f"< 1/{n:,}" if p < min(CLEAR, 2 * lowest) and abs(n * p - 1) < 1e-9 else f"{p:.2g}"


def format_words(words: dict[str, list[str]]) -> str:
    """Tokens by sign as one line of text; the sign is left out where there is only +."""
    plain = list(words) == ["+"]
    return "  ".join(("" if plain else f"{sign} ") + " ".join(map(repr, some)) for sign, some in words.items())


def _describe(
    comparison: Comparison,
    pair: list[int],
    stores: tuple[FeatureStore, FeatureStore],
    books: tuple[LabelStore, LabelStore],
) -> dict[str, Any]:
    sides = comparison.a, comparison.b
    weaker = int(sides[1].p[pair[1]] > sides[0].p[pair[0]])
    row: dict[str, Any] = {
        "similarity": float(sides[0].similarity[pair[0]]),
        "n_both": int(sides[0].n_both[pair[0]]),
        "p": float(sides[weaker].p[pair[weaker]]),
        "q": max(float(side.q[j]) for side, j in zip(sides, pair, strict=True)),
        "p_text": format_p(sides[weaker], pair[weaker]),
    }
    for name, number, store, book in zip("ab", pair, stores, books, strict=True):
        feature, sign = split_side(comparison, number)
        chosen = book.chosen(feature)
        labels = [label for label in chosen if label.sign == sign] or chosen if sign else chosen
        found = {"": feature, "side": sign, "label": join_texts(labels), "words": _words(store, feature, sign)}
        row |= {f"{key}_{name}".lstrip("_"): value for key, value in found.items()}
    return row


def _words(store: FeatureStore, feature: int, side: int) -> dict[str, list[str]]:
    """By sign the tokens with most of the sum of |z|: of one side, or of each side with a tenth of it or more."""
    at = store.feature(feature)
    rows, ids = store.words.at(at.indices)
    sums = np.abs(at.values.astype(np.float64))[rows]
    signs = at.values[rows]
    words = {}
    for sign in (side,) if side else (1, -1):
        kept = signs * sign > 0
        if sums[kept].sum() > (0 if side else FAINT * sums.sum()):
            known, place = np.unique(ids[kept], return_inverse=True)
            weights = np.bincount(place, sums[kept])
            if store.of_documents:
                weights = weigh_words(store, known, np.bincount(place), len(np.unique(rows[kept])))
            order = np.argsort(-weights, kind="stable")[:N_WORDS]
            words[SIGNS[sign]] = [store.text.strings.get(int(i), f"<{i}>") for i in known[order]]
    return words


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparisons(Result):
    """The comparisons of every pair of several dictionaries."""

    names: tuple[str, ...]
    found: Mapping[tuple[str, str], Comparison] = field(repr=False)
    """comparisons by the two names, in the order of `names`"""

    def share(self, a: str, b: str) -> float:
        """Share of the live features of `a` that are universal in `b`; 1 for a dictionary and itself."""
        if a == b:
            return 1.0
        return self.found[a, b].a.share() if (a, b) in self.found else self.found[b, a].b.share()

    def floor(self, a: str, b: str) -> float:
        """The share that `share` gives when one of the two dictionaries is an untrained one of the same shape.

        Tested against chance only. NaN where no untrained dictionary was compared.
        """
        side = self.found[a, b].a if (a, b) in self.found else self.found[b, a].b
        return side.untrained.shares["count"] if side.untrained is not None else float("nan")

    def recurrence(self, name: str) -> Int[np.ndarray, "d_sae"]:
        """For each feature of a dictionary, the number of other dictionaries in which it is universal."""
        sides = [one.a if pair[0] == name else one.b for pair, one in self.found.items() if name in pair]
        return np.sum([side.universal for side in sides], axis=0).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Names and every comparison, ready for JSON."""
        listed = [{"names": list(pair), **one.to_dict()} for pair, one in self.found.items()]
        return {"names": list(self.names), "comparisons": listed}

    def __str__(self) -> str:
        width = max(8, *(len(name) + 2 for name in self.names))
        lines = [f"share of the features of a row's dictionary that are universal in a column's, of {len(self.names)}"]
        lines.append(" " * width + "".join(f"{name:>{width}}" for name in self.names))
        for a in self.names:
            lines.append(f"{a:<{width}}" + "".join(f"{self.share(a, b):>{width}.3f}" for b in self.names))
        if any(one.a.untrained is not None for one in self.found.values()):
            lines.append("share of an untrained dictionary in place of a trained one, and by chance alone")
            for a in self.names:
                cells = ("-" if a == b else f"{self.floor(a, b):.3f}" for b in self.names)
                lines.append(f"{a:<{width}}" + "".join(f"{cell:>{width}}" for cell in cells))
        lines.append("in all of the others: " + ", ".join(f"{name} {self._in_all(name):,}" for name in self.names))
        chance = [side.chance[1] for one in self.found.values() for side in (one.a, one.b)]
        least = min(one.min_effect for one in self.found.values())
        lines.append(f"universal: at least {least:g}; best similarity by chance (95 %): at most {max(chance):.3f}")
        return "\n".join(lines)

    def _in_all(self, name: str) -> int:
        return int((self.recurrence(name) == len(self.names) - 1).sum())


def compare_many(
    sources: Sources, *, untrained: Sources | None = None, progress: bool = True, mesh: Any = None, **options: Any
) -> Comparisons:
    """The comparison of every pair of several stores or SAEs.

    False discoveries are controlled within each comparison.

    Args:
        sources: two or more stores or SAEs; names are those of the mapping, or 0, 1, 2, ... for a sequence.
        untrained: an untrained dictionary for each source, by the same names or in the same order; some may be left
            out.
        progress: whether to show a progress bar over pairs.
        mesh: `DeviceMesh` of processes that make every comparison together, as in `compare`; None is this process
            alone.
        **options: options of `compare`.

    Raises:
        ValueError: there are fewer than two sources, `untrained` has other names, or as in `compare`.

    >>> saes = [sl.SAE(sl.SAEConfig(d_in=8, d_sae=40), seed=seed) for seed in (0, 0, 1)]
    >>> found = compare_many(saes, progress=False)
    >>> found.share("0", "1"), int(found.recurrence("0").min())
    (1.0, 1)
    """
    named, floors = _name(sources), _name(untrained or {})
    if len(named) < 2:
        raise ValueError(f"`sources` must be two or more stores or SAEs, got {len(named)}.")
    if unknown := sorted(set(floors) - set(named)):
        raise ValueError(f"`untrained` must have the names of `sources`, {list(named)}, got {unknown} besides.")
    from tqdm.auto import tqdm

    found = {}
    shown = progress and RankGrid.of(mesh).is_first
    for a, b in tqdm(list(combinations(named, 2)), unit=" pairs", disable=hidden(shown)):
        baselines = (floors.get(a), floors.get(b))
        found[a, b] = compare(named[a], named[b], untrained=baselines, progress=False, mesh=mesh, **options)
    return Comparisons(names=tuple(named), found=found)


def _name(sources: Sources) -> dict[str, Any]:
    return dict(sources.items() if isinstance(sources, Mapping) else ((str(i), one) for i, one in enumerate(sources)))
