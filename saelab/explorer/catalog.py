"""`FeatureCatalog`: the list of all features of a store: sorted, filtered, searched and read page by page.

Columns are arrays with one entry per feature; nothing grows with the number of tokens. The most frequent tokens of each
feature, which the search covers, are counted in a thread over blocks of features.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from saelab.analysis.density import KINDS, find_kinds
from saelab.analysis.feature_similarity import spread_evenly
from saelab.analysis.top_tokens import count_top_tokens, name_token, rank_tokens
from saelab.evaluation.results import ConceptScores
from saelab.labels.annotations import Annotations
from saelab.labels.label import MARKS, ShownLabel, join_texts, main_score
from saelab.labels.label_store import LabelStore
from saelab.labels.text_search import TextIndex
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from saelab.visualization.universality_plots import Matched

N_TOKENS, N_SHOWN = 12, 3
"""Most frequent tokens of a feature that the search covers, and that a row of the list shows."""
BLOCK_ENTRIES = 2**19
"""Codes of a block of features whose tokens are counted together; they take some tens of MiB."""
BLOCK_FEATURES = 1024
GLANCE = 4096
"""Firings that are enough to see a feature's most frequent tokens before all are counted."""
PAUSE = 0.005
"""Seconds between blocks, in which pages are answered."""
AHEAD = 100
"""Rows of the list that are read before a browser asks for them, so that the store's strings and checks are there."""
HEAD_START = 1.5
"""Seconds at most that counting waits for the first page of the list, which would come later beside it."""
MOST_ROWS = 500
FEW = 400
"""Features whose labels are read one by one; of more, all labels are read."""
SIGNS = ("+", "-", "both")
LABELED = ("yes", "no", "person")


@dataclass(frozen=True, kw_only=True)
class FeatureQuery:
    """What part of the list is asked for; "" and None do not restrict."""

    q: str = ""
    """words of labels and tokens, or the number of a feature"""
    sort: str = ""
    """a column; "" is the best match first where there are words, else by density"""
    order: str = "desc"
    sign: str = ""
    """signs of the codes: "+" only positive, "-" only negative, "both" """
    kind: str = ""
    labeled: str = ""
    author: str = ""
    list: str = ""
    density_min: float | None = None
    density_max: float | None = None
    peak_min: float | None = None
    score_min: float | None = None
    match_min: float | None = None
    concept_min: float | None = None
    offset: int = 0
    limit: int = 100

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "FeatureQuery":
        """The query in the values of an address, as text; ValueError for a wrong one."""
        kinds = {field.name: field.type for field in fields(cls)}
        if unknown := [name for name in given if name not in kinds]:
            raise ValueError(f"A list is asked for by {', '.join(kinds)}, got {unknown[0][:40]!r}.")
        made = cls(**{name: _read_value(name, value, kinds[name]) for name, value in given.items() if value != ""})
        choices = {"sort": (*COLUMNS, ""), "order": ("asc", "desc"), "sign": (*SIGNS, ""), "kind": (*KINDS, "")}
        for name, allowed in (choices | {"labeled": (*LABELED, "")}).items():
            if getattr(made, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {[*allowed][:10]}, got {getattr(made, name)[:40]!r}.")
        if made.offset < 0 or not 1 <= made.limit <= MOST_ROWS:
            raise ValueError(
                f"`offset` must be at least 0 and `limit` in 1..{MOST_ROWS}, got {made.offset} and {made.limit}."
            )
        return made


def _read_value(name: str, value: Any, kind: Any) -> Any:
    if kind is str:
        return str(value)
    try:
        number = int(value) if kind is int else float(value)
    except ValueError:
        number = float("nan")
    if number != number:
        raise ValueError(f"`{name}` must be a number, got {str(value)[:40]!r}.")
    return number


COLUMNS = ("feature", "label", "score", "density", "balance", "peak", "kind", "match", "concept")


class FeatureCatalog:
    """All features of a store as rows with statistics, label, most frequent tokens, partner and concept.

    Labels and notes that other people or processes change show up at the next page.

    Args:
        store: feature store of the features.
        labels: label database of the store.
        annotations: notes and lists of the store.
        sae: the SAE of the store, for outliers; None finds none.
        concepts: result of `score_concepts`; None has no concepts.
    """

    def __init__(
        self,
        store: FeatureStore,
        labels: LabelStore,
        annotations: Annotations,
        sae: SAE | None = None,
        concepts: ConceptScores | None = None,
    ) -> None:
        self.store, self.labels, self.annotations = store, labels, annotations
        self.columns = _measure(store, sae)
        self.concepts = _find_concepts(concepts)
        for feature, (_, score) in self.concepts.items():
            self.columns["concept"][feature] = score
        self._matched: Matched | None = None
        self._names = _Names(labels, annotations, store.d_sae)
        self._tokens = np.full((store.d_sae, N_TOKENS), -1, np.int32)
        self._counted = np.zeros(store.d_sae, bool)
        self._index = TextIndex(2)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._asked = threading.Event()
        self._found: dict[Any, NDArray[np.int64]] = {}
        self._thread = threading.Thread(target=self._count_all, name="saelab-tokens", daemon=True)

    def start(self) -> None:
        """Start counting tokens in a thread, which ends with the last feature or with `close`."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the tokens of all features are counted."""
        self._asked.set()
        self._thread.join()

    def close(self) -> None:
        """Stop counting."""
        self._closed.set()
        self._asked.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def progress(self) -> float:
        """Share of the features whose tokens are counted, and so can be searched for."""
        return float(self._counted.mean())

    def kinds(self) -> dict[str, int]:
        """Number of features of each kind that occurs."""
        counts = Counter(self.columns["kind"].tolist())
        return {kind: counts[i] for i, kind in enumerate(KINDS) if counts[i]}

    def match(self, matched: "Matched") -> None:
        """Add the partners of the features in another store."""
        side = matched.comparison.a
        sides = side.similarity.reshape(self.store.d_sae, -1)
        known = np.where(side.partners.reshape(sides.shape) >= 0, np.abs(sides), -1.0)
        best = known.argmax(1)[:, None]
        values = np.where(np.take_along_axis(known, best, 1) >= 0, np.take_along_axis(sides, best, 1), np.nan)
        with self._lock:
            self._matched = matched
            self.columns["match"] = values[:, 0].astype(np.float64)
            self._found.clear()

    # ---- reading
    def names(self, features: Iterable[int]) -> dict[int, str]:
        """The label of each of some features as one line of text, empty where it has none."""
        self._refresh()
        return {feature: self._names.texts.get(feature, "") for feature in features}

    def page(self, **query: Any) -> dict[str, Any]:
        """Rows of the list, ready for JSON: {"total", "offset", "rows"}; see `FeatureQuery` for the query."""
        asked = FeatureQuery.read(query)
        self._refresh()
        found = self.find(asked)
        shown = found[asked.offset : asked.offset + asked.limit].tolist()
        rows = [self.describe(feature) for feature in shown]
        self._asked.set()
        return {"total": len(found), "offset": asked.offset, "rows": rows}

    def find(self, query: FeatureQuery) -> Int[np.ndarray, "n"]:
        """All features that a query asks for, in its order, whatever its offset and limit."""
        key = tuple(getattr(query, field.name) for field in fields(query) if field.name not in ("offset", "limit"))
        with self._lock:
            if key not in self._found:
                if len(self._found) > 8:  # the pages of a few lists
                    self._found.clear()
                found = self._sort(query, self._filter(query))
                if query.q and self.progress < 1:
                    return found
                self._found[key] = found
            return self._found[key]

    def describe(self, feature: int) -> dict[str, Any]:
        """The row of one feature, ready for JSON."""
        seen, columns = self.store.statistics, self.columns
        number = {name: _plain(columns[name][feature]) for name in ("score", "density", "balance", "peak", "match")}
        partner = self._matched.describe(feature) if self._matched is not None else {}
        tokens = [name_token(self.store, i) for i in self.top_tokens(feature)[:N_SHOWN]]
        return number | {
            "feature": feature,
            "label": self._names.texts.get(feature, ""),
            "by_person": feature in self._names.by_person,
            "n_positive": int(seen.fires[feature, 0]),
            "n_negative": int(seen.fires[feature, 1]),
            "kind": KINDS[int(columns["kind"][feature])],
            "tokens": tokens,
            "partner": partner.get("partner", ""),
            "universal": partner.get("universal", False),
            "concept": self.concepts.get(feature, ("", 0.0))[0],
            "noted": feature in self._names.noted,
        }

    def top_tokens(self, feature: int) -> list[int]:
        """Ids of the tokens on which a feature fires most often.

        Those that have not been counted yet are counted now, of a frequent feature at some `GLANCE` of its firings.
        """
        if self._counted[feature]:
            tops = self._tokens[feature]
            return [int(i) for i in tops[tops >= 0]]
        rows = self.store.sample_firings(feature, GLANCE)
        return [i for i, _ in rank_tokens(self.store, rows[spread_evenly(len(rows), GLANCE)], N_TOKENS)]

    # ---- filters and orders
    def _filter(self, query: FeatureQuery) -> Bool[np.ndarray, "d_sae"]:
        positive, negative = (self.store.statistics.fires > 0).T
        columns, kept = self.columns, np.ones(self.store.d_sae, bool)
        if query.sign:
            kept &= {"+": positive & ~negative, "-": negative & ~positive, "both": positive & negative}[query.sign]
        if query.kind:
            kept &= columns["kind"] == KINDS.index(query.kind)
        if query.labeled:
            of = self._names.by_person if query.labeled == "person" else self._names.texts
            kept &= _mark(of, len(kept)) == (query.labeled != "no")
        if query.author:
            kept &= _mark(self._names.by_author.get(query.author, ()), len(kept))
        if query.list:
            kept &= _mark(self._names.lists.get(query.list, ()), len(kept))
        with np.errstate(invalid="ignore"):
            for name in ("density", "peak", "score", "match", "concept"):
                low, values = getattr(query, f"{name}_min"), columns[name]
                if low is not None:
                    kept &= (np.abs(values) if name == "match" else values) >= low
            if query.density_max is not None:
                kept &= columns["density"] <= query.density_max
        return kept

    def _sort(self, query: FeatureQuery, kept: Bool[np.ndarray, "d_sae"]) -> Int[np.ndarray, "n"]:
        asked = query.q.strip()
        if not asked:
            return self._order(query.sort or "density", query.order, kept)
        found = self._search(asked, ranked=not query.sort)
        ranked = found[kept[found]]
        if not query.sort:
            return ranked
        chosen = np.zeros(len(kept), bool)
        chosen[ranked] = True
        return self._order(query.sort, query.order, chosen)

    def _search(self, asked: str, ranked: bool) -> Int[np.ndarray, "n"]:
        """Features that match a search, best first; the one whose number is asked for comes first."""
        found = self._index.search(asked, ranked)
        if asked.isdecimal() and len(asked) < 12 and int(asked) < self.store.d_sae:
            found = [int(asked), *(feature for feature in found if feature != int(asked))]
        return np.array(found, np.int64)

    def _order(self, sort: str, order: str, kept: Bool[np.ndarray, "d_sae"]) -> Int[np.ndarray, "n"]:
        """The kept features by a column; equal ones by number, unknown values last."""
        features = np.flatnonzero(kept)
        keys = self._names.ranks() if sort == "label" else self.columns[sort]
        values = np.abs(keys[features]) if sort == "match" else keys[features].astype(np.float64)
        return features[np.argsort(-values if order == "desc" else values, kind="stable")]

    # ---- what changes
    def _refresh(self) -> None:
        """Read labels, notes and lists again where they have changed."""
        with self._lock:
            changed = self._names.refresh()
            if changed is None:
                return
            self.columns["score"] = self._names.scores
            self._found.clear()
            self._update_index(changed)

    def _update_index(self, features: Iterable[int]) -> None:
        texts = {}
        for feature in features:
            tops = self._tokens[feature]
            tokens = " ".join(name_token(self.store, i) for i in tops[tops >= 0].tolist())
            texts[feature] = (self._names.texts.get(feature, ""), tokens)
        self._index.update(texts)

    def _count(self, start: int, stop: int) -> None:
        tops = count_top_tokens(self.store, start, stop, N_TOKENS)
        self._tokens[start:stop] = tops
        self._counted[start:stop] = True

    def _count_all(self) -> None:
        self._refresh()
        for feature in self.find(FeatureQuery())[:AHEAD].tolist():
            if self._asked.is_set():
                break
            self.describe(feature)
        self._asked.wait(HEAD_START)
        for start, stop in self._blocks():
            if self._closed.wait(PAUSE):
                return
            self._count(start, stop)
            with self._lock:
                self._update_index(range(start, stop))
        self._found.clear()

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of features with a bounded number of codes, but for one feature with more."""
        ends = np.cumsum(self.store.statistics.fires.sum(1))
        start = 0
        while start < self.store.d_sae:
            before = ends[start - 1] if start else 0
            stop = int(np.searchsorted(ends, before + BLOCK_ENTRIES, "right"))
            stop = min(max(stop, start + 1), start + BLOCK_FEATURES, self.store.d_sae)
            yield start, stop
            start = stop


class _Names:
    """Labels, notes and lists of a store, as they were when the file was last read."""

    def __init__(self, labels: LabelStore, annotations: Annotations, d_sae: int) -> None:
        self._labels, self._annotations, self._d_sae = labels, annotations, d_sae
        self._version: tuple[int, ...] | None = None
        self._stamps: dict[int, tuple[int, ...]] = {}
        self._ranks: Float[np.ndarray, d_sae] | None = None
        self.texts: dict[int, str] = {}
        self.by_person: set[int] = set()
        self.by_author: dict[str, set[int]] = {}
        self.scores = np.full(d_sae, np.nan)
        self.noted: set[int] = set()
        self.lists: dict[str, list[int]] = {}

    def refresh(self) -> set[int] | None:
        """The features whose label has changed since the last call; None where nothing at all has."""
        version = self._labels.version()
        if version == self._version:
            return None
        self.noted = set(self._annotations.notes())
        self.lists = {each["name"]: each["features"] for each in self._annotations.lists()}
        stamps = self._labels.stamps()
        changed = {j for j in {*stamps, *self._stamps} if stamps.get(j) != self._stamps.get(j) and 0 <= j < self._d_sae}
        for feature in changed:
            self._remove(feature)
        few = len(changed) <= FEW
        for feature, group in groupby(self._labels.shown(changed if few else None), key=lambda label: label.feature):
            if feature in changed:
                self._add(feature, list(group))
        self._stamps, self._version = stamps, version
        self._ranks = None if changed else self._ranks
        return changed

    def _remove(self, feature: int) -> None:
        self.texts.pop(feature, None)
        self.by_person.discard(feature)
        self.scores[feature] = np.nan
        for features in self.by_author.values():
            features.discard(feature)

    def _add(self, feature: int, labels: Sequence[ShownLabel]) -> None:
        text = join_texts(labels)
        if text:
            self.texts[feature] = text
        if any(label.by_person for label in labels):
            self.by_person.add(feature)
        for label in labels:
            self.by_author.setdefault(label.author, set()).add(feature)
        scores = [score for label in labels if (score := main_score(label)) is not None]
        if scores:
            self.scores[feature] = sum(scores) / len(scores)

    def ranks(self) -> Float[np.ndarray, "d_sae"]:
        """The place of each feature's label in the alphabet; NaN without one."""
        if self._ranks is None:
            features, texts = list(self.texts), [text.casefold() for text in self.texts.values()]
            places = {text: i for i, text in enumerate(sorted(set(texts)))}
            self._ranks = np.full(self._d_sae, np.nan)
            self._ranks[features] = [places[text] for text in texts]
        return self._ranks


def _measure(store: FeatureStore, sae: SAE | None) -> dict[str, np.ndarray]:
    seen, d_sae = store.statistics, store.d_sae
    fires = seen.fires.sum(1)
    with np.errstate(invalid="ignore"):
        balance = seen.fires.min(1) / fires
    kinds = np.array([KINDS.index(kind) for kind in find_kinds(store, sae)], np.int8)
    columns = {"feature": np.arange(d_sae), "density": fires / len(store), "balance": balance, "kind": kinds}
    unknown = {name: np.full(d_sae, np.nan) for name in ("score", "match", "concept")}
    return columns | {"peak": seen.peaks.max(1)} | unknown


def _find_concepts(concepts: ConceptScores | None) -> dict[int, tuple[str, float]]:
    """The concept that each feature is the best for, as text, and its F1: of several the one with the highest."""
    found: dict[int, tuple[str, float]] = {}
    for row in concepts.scored if concepts is not None else ():
        if row.feature is not None and row.f1 > found.get(row.feature, ("", -1.0))[1]:
            found[row.feature] = (f"{MARKS[row.side] if row.side < 0 else ''}{row.name} {row.f1:.2f}", row.f1)
    return found


def _mark(features: Iterable[int], d_sae: int) -> NDArray[np.bool_]:
    marks = np.zeros(d_sae, bool)
    marks[[feature for feature in features if feature < d_sae]] = True
    return marks


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
