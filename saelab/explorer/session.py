"""`Explorer`: a feature store with its SAE, model, labels and results, checked to belong together, as one is shown.

The language model loads in a thread; until it is there, everything that needs no model works.
"""

import getpass
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from saelab.collecting.harvesting import require_harvested
from saelab.evaluation.results import ConceptScores, Evaluation
from saelab.explorer.catalog import FeatureCatalog
from saelab.interventions.attribution import Attribution
from saelab.labels.annotations import Annotations
from saelab.labels.label import BOTH, Label
from saelab.labels.label_store import LabelStore
from saelab.lm.hook_points import hook_points_of
from saelab.lm.model_checks import Model
from saelab.lm.models import load_model, offline
from saelab.sae.compatibility import match_places, match_weights
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import shareable
from saelab.stores.validation import read_json

ModelSource: TypeAlias = "Model | str | Path | Callable[[], Model] | None"
"""a model, its name or folder, or a function that loads it"""


class Explorer:
    """A feature store with everything that is shown of it: SAE, model, labels, notes, another store, results.

    Made by `Explorer.open`, which checks that its parts belong together. `lock` is held for one piece of work with the
    model at a time.
    """

    def __init__(
        self,
        store: FeatureStore,
        sae: SAE | None,
        other: FeatureStore | None,
        evaluation: Mapping[str, Any] | None,
        attribution: Attribution | None,
        concepts: ConceptScores | None = None,
        *,
        client: Any = None,
        read_only: bool = False,
        title: str = "",
    ) -> None:
        self.store, self.sae, self.other = store, sae, other
        self.evaluation, self.attribution, self.client = evaluation, attribution, client
        self.comparison: Any = None
        self.concepts = concepts
        self.labels = LabelStore.open(store)
        self.annotations = Annotations(self.labels, store.d_sae)
        self.catalog = FeatureCatalog(store, self.labels, self.annotations, sae, concepts)
        self.read_only = read_only
        self.title = title or _name(store)
        self.lock = threading.RLock()
        self.model: Model | None = None
        self.model_state = "none"
        self.author = _find_user()

    @classmethod
    def open(
        cls,
        store: FeatureStore | str | Path,
        model: ModelSource = None,
        sae: SAE | str | Path | None = None,
        *,
        compare: FeatureStore | str | Path | None = None,
        evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
        attribution: Attribution | None = None,
        concepts: ConceptScores | None = None,
        client: Any = None,
        read_only: bool = False,
        title: str = "",
    ) -> "Explorer":
        """The explorer of a store; the model, where one is named, goes on loading in a thread.

        Args:
            store: feature store, or its folder.
            model: language model of the store, its name or folder, or a function that loads it; None shows what needs
                no model.
            sae: the SAE that was harvested, or its name or folder; None takes the one that the store names, if it is
                there.
            compare: another store of the same text, whose best partners are shown.
            evaluation: result of `evaluate`, or the JSON file that it was saved to.
            attribution: result of `attribute`.
            concepts: result of `score_concepts`.
            client: language model client that writes labels, see `sl.labels.explain_features`; None offers rules alone.
            read_only: True keeps labels, notes, lists and set-ups as they are.
            title: title of the page; empty names the store.

        Raises:
            FileNotFoundError: the store or a file is missing.
            ValueError: store, SAE, model and other store do not belong together.
        """
        opened = store if isinstance(store, FeatureStore) else FeatureStore.load(store)
        coder = _open_sae(opened, sae)
        if coder is not None:
            require_harvested(opened, coder)
        other = FeatureStore.load(compare) if isinstance(compare, str | Path) else compare
        found = _read_evaluation(evaluation)
        made = cls(opened, coder, other, found, attribution, concepts, client=client, read_only=read_only, title=title)
        made.catalog.start()
        made._start(model)
        return made

    def _start(self, model: ModelSource) -> None:
        if model is None:
            return
        if isinstance(model, str | Path) or not isinstance(model, Model):
            self.model_state = "loading"
            threading.Thread(target=self._load, args=(model,), name="saelab-model", daemon=True).start()
        else:
            self._admit(model)

    def _load(self, source: Any) -> None:
        try:
            processing = self.store.provenance.weight_processing
            self._admit(
                source() if callable(source) else load_model(source, weight_processing=processing, progress=False)
            )
        except Exception as error:  # a page that needs no model stays; the reason is shown on those that do
            self.model_state = f"failed: {' '.join(str(error).split()) or type(error).__name__}"

    def _admit(self, model: Model) -> None:
        """Take a model; ValueError for one that the store was not made with."""
        match_weights(self.store.provenance, model)
        hook_points_of(model).find(self.store.provenance.hook_point)
        if self.sae is not None:
            match_places(self.sae, model, self.store.provenance.hook_point)
        self.model, self.model_state = model, "ready"

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
        held = {"evaluation": self.evaluation, "compare": self.other, "attribution": self.attribution}
        return [
            "features",
            "prompt",
            "steer",
            "lists",
            "dead",
            *(name for name, part in held.items() if part is not None),
        ]

    # ---- labels by people
    def set_label(self, feature: int, text: str, sign: int = BOTH) -> Label:
        """Add the reader's label and choose it; can be undone."""
        return self.annotations.set_label(feature, text, author=self.author, sign=sign)

    def choose_label(self, feature: int, author: str | None, sign: int = BOTH) -> Label:
        """Choose an author's label for the reader; can be undone."""
        return self.annotations.choose_label(feature, author, sign=sign)

    def delete_label(self, feature: int, author: str, sign: int = BOTH) -> int:
        """Delete an author's label; can be undone."""
        return self.annotations.delete_label(feature, author, sign=sign)

    def close(self) -> None:
        """Stop the work in the background and close the files."""
        self.catalog.close()
        self.labels.close()


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without a user of that number
        return "me"


def _name(store: FeatureStore) -> str:
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
