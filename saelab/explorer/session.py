"""`Explorer`: a feature store with its SAE, model, labels and results, checked to belong together, as one is shown.

The language model loads in a thread; until it is there, everything that needs no model works.
"""

import json
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast, get_args

from torch import nn

from saelab.collecting.harvesting import require_harvested
from saelab.evaluation.results import ConceptScores, Evaluation
from saelab.explorer.catalog import FeatureCatalog
from saelab.labels.annotations import Annotations
from saelab.labels.label import BOTH, ME, Format, Label, join_texts
from saelab.labels.label_store import LabelStore
from saelab.lm.hook_points import hook_points_of, share_weights
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.loading_guards import offline
from saelab.lm.model_checks import Model
from saelab.lm.models import load_model
from saelab.lm.unembedding import Unembedding
from saelab.sae.compatibility import match_places, match_weights
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import to_json
from saelab.stores.sharing import shareable
from saelab.stores.validation import read_json

if TYPE_CHECKING:  # what only some explorers show is imported with it, for the first page comes sooner
    from saelab.interventions.attribution import Attribution
    from saelab.universality.matching import Comparison
    from saelab.visualization.universality_plots import Matched

T = TypeVar("T")
ModelSource: TypeAlias = "AnyModel | str | Path | Callable[[], Model] | None"
"""a model, its name or folder, or a function that loads it"""


MEDIA = {
    "json": (".json", "application/json"),
    "csv": (".csv", "text/csv; charset=utf-8"),
    "neuronpedia": (".jsonl", "application/jsonl"),
}


class Recent(Generic[T]):
    """Results of the last `n` different pieces of work, so that pages that are read again are there at once."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._lock = threading.Lock()
        self._held: OrderedDict[Any, Any] = OrderedDict()

    def find(self, key: Any) -> Any:
        """The result of a key; None where it is not held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """The result of a key, made where it is not held."""
        found = self.find(key)
        if found is None:
            found = make()
            with self._lock:
                self._held[key] = found
                while len(self._held) > self._n:
                    self._held.popitem(last=False)
        return cast(T, found)

    def clear(self) -> None:
        """Let all results go."""
        with self._lock:
            self._held.clear()


END = 5.0
"""seconds that `close` waits for the work of threads"""
N_RECENT = 32
"""Pages of features whose parts are held; each takes some 100 KiB."""


class Explorer:
    """A feature store with everything that is shown of it: SAE, model, labels, notes, another store, results.

    Made by `Explorer.open`, which checks that its parts belong together. `lock` is held for one piece of work with the
    model at a time.

    Args:
        store: feature store.
        sae: the SAE that was harvested; None shows what needs none.
        other: another store of the same text; None compares with none.
        evaluation: result of `evaluate` as a dictionary; None for none.
        attribution: result of `attribute`; None for none.
        concepts: result of `score_concepts`; None for none.
        client: client of a language model that writes labels; None for none.
        read_only: True keeps labels, notes, lists and set-ups as they are.
        title: title of the page; empty names the store.
    """

    def __init__(
        self,
        store: FeatureStore,
        sae: SAE | None = None,
        other: FeatureStore | None = None,
        evaluation: Mapping[str, Any] | None = None,
        attribution: "Attribution | None" = None,
        concepts: ConceptScores | None = None,
        *,
        client: Any = None,
        read_only: bool = False,
        title: str = "",
    ) -> None:
        self.store, self.sae, self.other = store, sae, other
        self.evaluation, self.attribution, self.concepts = evaluation, attribution, concepts
        self.client, self.read_only = client, read_only
        self.title = title or name_store(store)
        self.author = ME
        self.labels = LabelStore.open(store)
        self.annotations = Annotations(self.labels, store.d_sae, read_only)
        self.catalog = FeatureCatalog(store, self.labels, self.annotations, sae, concepts)
        self.cache: Recent[Any] = Recent(N_RECENT)
        self.lock = threading.RLock()
        self.closed = threading.Event()
        """set once the explorer is closed; streams end then"""
        self._threads: list[threading.Thread] = []
        self._keeping = threading.Lock()
        self.model: Model | None = None
        self.model_state = "none"
        """none, loading, ready, or "failed: " and the reason"""
        self.unembedding: Unembedding | None = None
        """what logit effects need of the model, once it was measured"""
        self.has_no_effects = False
        """whether the features of this model have no direct effect on the logits"""
        self.matched: Matched | None = None
        self.comparison_state = "none"
        """none, comparing, ready, or "failed: " and the reason"""

    @classmethod
    def open(
        cls,
        store: FeatureStore | str | Path,
        model: ModelSource = None,
        sae: SAE | str | Path | None = None,
        *,
        compare: FeatureStore | str | Path | None = None,
        comparison: "Comparison | None" = None,
        evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
        attribution: "Attribution | None" = None,
        concepts: ConceptScores | None = None,
        client: Any = None,
        read_only: bool = False,
        title: str = "",
    ) -> "Explorer":
        """The explorer of a store. The model loads in a thread, where another compares the stores, if one is given.

        Args:
            store: feature store, or its folder.
            model: language model of the store, its name or folder, or a function that loads it; None takes the folder
                that the store names, if it is there.
            sae: the SAE that was harvested, or its name or folder; None takes the one that the store names, if it is
                there.
            compare: another store of the same text, whose best partners are shown.
            comparison: result of `compare(store, other)`; None computes it.
            evaluation: result of `evaluate`, or the JSON file that it was saved to.
            attribution: result of `attribute`.
            concepts: result of `score_concepts`.
            client: client of a language model that writes labels; None offers rules alone.
            read_only: True keeps labels, notes, lists and set-ups as they are.
            title: title of the page; empty names the store.

        Raises:
            FileNotFoundError: the store or a file is missing.
            ValueError: store, SAE, model, other store and results do not belong together.
        """
        opened = store if isinstance(store, FeatureStore) else FeatureStore.load(store)
        coder = _open_sae(opened, sae)
        if coder is not None:
            require_harvested(opened, coder)
        other = FeatureStore.load(compare) if isinstance(compare, str | Path) else compare
        _check_comparison(opened, other, comparison)
        _check_results(opened, attribution, concepts)
        found = _read_evaluation(evaluation)
        made = cls(opened, coder, other, found, attribution, concepts, client=client, read_only=read_only, title=title)
        made._start(model, comparison)
        return made

    def _start(self, model: ModelSource, comparison: "Comparison | None") -> None:
        recorded = self.store.find_recorded(self.store.provenance.model)
        source = recorded if model is None and Path(recorded).is_dir() else model
        if isinstance(source, nn.Module | Model):
            match_weights(self.store.provenance, as_model(source))  # before its weights are asked for
            self._admit(share_weights(source))  # hooks of this explorer's threads are not felt where it is used
        elif source is not None:
            self.model_state = "loading"
            self.run(self._load, source)
        if self.other is not None:
            self.comparison_state = "comparing"
            self.run(self._compare, comparison)
        self.catalog.start()

    def run(self, work: Callable[..., None], *given: Any) -> None:
        """Begin some work in a thread, which `close` waits for."""
        thread = threading.Thread(target=work, args=given, name=f"saelab{work.__name__}", daemon=True)
        with self._keeping:
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]
            thread.start()

    def measure_unembedding(self) -> Unembedding:
        """What logit effects need of the model, measured where its weights have changed; `lock` must be held.

        Raises:
            ValueError: there is no model, or it has no final norm.
        """
        if self.model is None:
            raise ValueError("This needs the language model, which is not there.")
        if self.unembedding is None or not self.unembedding.is_current:
            self.unembedding = Unembedding.measure(self.model)
        return self.unembedding

    def _load(self, source: str | Path | Callable[[], Model]) -> None:
        """Load the model; pages that need none stay when that fails, the others show why."""
        processing = self.store.provenance.weight_processing
        try:
            found = source() if callable(source) else load_model(source, weight_processing=processing, progress=False)
            if not self.closed.is_set():
                self._admit(found)
                with self.lock, suppress(ValueError):  # that of a model without logit effects
                    self.measure_unembedding()
        except Exception as error:
            self.model_state = f"failed: {_say(error)}"

    def _admit(self, model: Model) -> None:
        """Take a model; ValueError for one that the store was not made with."""
        origin = self.store.provenance
        match_weights(origin, model)
        if self.sae is not None:
            match_places(self.sae, model, origin.hook_point or None)
        elif origin.hook_point:
            hook_points_of(model).find(origin.hook_point)
        self.model, self.model_state = model, "ready"

    def _compare(self, comparison: "Comparison | None") -> None:
        from saelab.visualization.universality_plots import Matched

        assert self.other is not None
        try:
            with LabelStore.open(self.other) as labels:
                chosen = groupby(labels.chosen(), key=lambda label: label.feature)
                names = {feature: join_texts(list(group)) for feature, group in chosen}
            self.matched = Matched.make(self.store, self.other, comparison, names, progress=False)
            self.catalog.match(self.matched)
            self.comparison_state = "ready"
        except Exception as error:
            self.comparison_state = f"failed: {_say(error)}"

    @property
    def comparison(self) -> "Comparison | None":
        """The comparison with the other store, once it is there."""
        return self.matched.comparison if self.matched is not None else None

    def require_model(self) -> tuple[SAE, Model]:
        """The SAE and the model; ValueError with the reason where one of them is not there."""
        if self.sae is None:
            raise ValueError("This needs the SAE of the store, which was not found. Start again with `sae`.")
        if self.model is None:
            why = {"none": "no model was given: start again with one", "loading": "it is still loading: try again soon"}
            raise ValueError(f"This needs the language model, but {why.get(self.model_state, self.model_state)}.")
        return self.sae, self.model

    def names(self, features: Iterable[int]) -> dict[int, str]:
        """The label of each of some features as one line of text, empty where it has none."""
        return self.catalog.names(features)

    def describe_lists(self) -> dict[str, Any]:
        """All lists of features, and the labels of what is in them, ready for JSON."""
        lists = self.annotations.lists()
        return {"lists": lists, "names": self.names({j for each in lists for j in each["features"]})}

    def about(self) -> dict[str, Any]:
        """What the explorer holds and can do, ready for JSON."""
        ready, has_sae = self.model_state == "ready", self.sae is not None
        origin, store = self.store.provenance, self.store
        return {
            "title": self.title,
            "store": {
                "d_sae": store.d_sae,
                "n_tokens": len(store),
                "l0": store.l0,
                "signed": store.signed,
                "hook_point": origin.hook_point,
                "model": shareable(origin.model),
                "sae": store.manifest.source,
                "text": shareable(origin.text),
            },
            "model_state": self.model_state,
            "comparison_state": self.comparison_state,
            "can": {
                "prompt": ready and has_sae,
                "steer": ready and has_sae,
                "attribute": ready and has_sae,
                "label_rules": not self.read_only,
                "label_llm": not self.read_only and self.client is not None,
                "edit": not self.read_only,
            },
            "views": self._views(),
            "has": {"concepts": self.concepts is not None, "compare": self.other is not None},
            "kinds": self.catalog.kinds(),
            "index_state": "ready" if self.catalog.progress == 1 else f"building {self.catalog.progress:.2f}",
        }

    def _views(self) -> list[str]:
        held = {"evaluation": self.evaluation or None, "compare": self.other, "attribution": self.attribution}
        return [
            "features",
            "prompt",
            "steer",
            "lists",
            "dead",
            *(name for name, part in held.items() if part is not None),
        ]

    # ---- labels by people
    def set_label(self, feature: int, text: str, sign: int = BOTH) -> None:
        """Add the reader's label and choose it; can be undone."""
        self.annotations.set_label(feature, text, author=self.author, sign=sign)

    def choose_label(self, feature: int, author: str | None, sign: int = BOTH) -> None:
        """Choose an author's label for the reader; can be undone."""
        self.annotations.choose_label(feature, author, sign=sign)

    def delete_label(self, feature: int, author: str, sign: int = BOTH) -> None:
        """Delete an author's label; can be undone."""
        self.annotations.delete_label(feature, author, sign=sign)

    def keep_labels(self, labels: Sequence[Label], *, afresh: bool = False) -> None:
        """Add labels that were made in the background to the label store; ValueError once the explorer is closed."""
        with self._keeping:
            if self.closed.is_set():
                raise ValueError("The explorer is closed, so the labels were not kept. Open it again.")
            self.labels.add(labels, afresh=afresh)

    def export(self, form: str) -> tuple[str, str, bytes]:
        """All labels as a file: its name, media type and bytes; "json" also holds notes, lists and set-ups.

        Raises:
            ValueError: `form` is not "json", "csv" or "neuronpedia".
        """
        if form not in MEDIA:
            raise ValueError(f"`format` must be one of {list(get_args(Format))}, got {form[:40]!r}.")
        ending, media = MEDIA[form]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"labels{ending}"
            self.labels.save(path, form)  # type: ignore[arg-type]
            data = path.read_bytes()
        if form == "json":
            data = to_json(json.loads(data) | self.annotations.to_dict()).encode()
        return f"labels{ending}", media, data

    def count_unnamed(self) -> int:
        """Number of labels that say that there is no good name, which Neuronpedia's format does not hold."""
        return sum(n for (n,) in self.labels.read("SELECT count(*) FROM labels WHERE kind = 'none'"))

    def close(self) -> None:
        """Stop the work in the background and close the files.

        Work that cannot be stopped, such as the loading of a model, is waited for `END` seconds; what it makes later is
        dropped.
        """
        self.closed.set()
        self.catalog.close()
        last = time.monotonic() + END
        for thread in self._threads:
            thread.join(max(0.0, last - time.monotonic()))
        with self._keeping:
            self.labels.close()


def _say(error: Exception) -> str:
    said = str(error).replace(", or pass allow_mismatch=True", "")  # which the explorer does not offer
    return " ".join(said.split()) or type(error).__name__


def _check_comparison(store: FeatureStore, other: FeatureStore | None, comparison: "Comparison | None") -> None:
    """Raise ValueError where two stores have no text in common, or a comparison is not of these two."""
    if other is None:
        if comparison is not None:
            raise ValueError("`comparison` needs the other store as `compare`, got none; give both.")
        return
    from saelab.universality.alignment import AlignedRows, find_common_rows
    from saelab.universality.universal_features import check_stores

    if comparison is not None:
        check_stores(comparison, store, other)
        return
    try:
        _ = find_common_rows(store, other) or AlignedRows(store, other)
    except ValueError:
        raise ValueError(
            f"`compare` must be a store of the same text, got {other.folder}, which has no text in common with "
            f"{store.folder}. Harvest both from one text."
        ) from None


def _check_results(store: FeatureStore, attribution: "Attribution | None", concepts: ConceptScores | None) -> None:
    """Raise ValueError for results of another SAE's features."""
    if attribution is not None and int(attribution.features.max(initial=-1)) >= store.d_sae:
        raise ValueError(
            f"`attribution` must be of the {store.d_sae} features of the store, got one with feature "
            f"{attribution.features.max()}. Attribute with its SAE."
        )
    if concepts is not None and concepts.n_features != store.d_sae:
        raise ValueError(
            f"`concepts` must score the {store.d_sae} features of the store, got scores of {concepts.n_features}. "
            "Score the codes of its SAE."
        )


def name_store(store: FeatureStore) -> str:
    """What a store holds, as a title."""
    origin = store.provenance
    return f"{store.d_sae:,} features at {origin.hook_point} of {Path(origin.model).name}"


def _open_sae(store: FeatureStore, sae: SAE | str | Path | None) -> SAE | None:
    if isinstance(sae, str | Path):
        return SAE.from_pretrained(sae)
    recorded = store.manifest.sae.get("name_or_path") or ""
    if sae is not None or not recorded:
        return sae
    with offline():
        try:
            return SAE.from_pretrained(store.find_recorded(recorded))
        except (OSError, ValueError):  # moved or never saved; `about` has it
            return None


def _read_evaluation(given: Evaluation | Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | None:
    if isinstance(given, str | Path):
        return read_json(Path(given))
    return given.to_dict() if isinstance(given, Evaluation) else given
