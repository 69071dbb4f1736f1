"""Labels of one feature by rules or by a language model, made in the background while somebody waits for them."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from saelab.analysis.direct_logits import logit_lens
from saelab.explorer.session import Explorer
from saelab.labels.autointerp.clients import Answer, Client, Messages, Waiting
from saelab.labels.autointerp.explainers import estimate_labels, explain_features
from saelab.labels.label import BOTH, Label
from saelab.labels.rules.predicates import make_predicates
from saelab.labels.rules.rule_search import N_TOKENS, label_by_rules
from saelab.stores.validation import read_fields, require_object

LabelingMethod = Literal["rules", "llm"]
POLL = 0.2
"""seconds between two looks whether the reader is still there"""


@dataclass(frozen=True, kw_only=True)
class LabelingRequest:
    """Which feature is labelled, and how."""

    feature: int
    method: LabelingMethod = "rules"
    sign: int = BOTH
    """1 or -1 for one side alone; 0 for whatever fires"""

    @classmethod
    def from_dict(cls, feature: int, plain: object) -> "LabelingRequest":
        """The request in a JSON object; ValueError for one that is wrong."""
        found = read_fields(cls, require_object(plain, "A request") | {"feature": feature})
        if found.sign not in (-1, BOTH, 1):
            raise ValueError(f"`sign` must be 1, -1, or 0 for the whole feature, got {found.sign}.")
        return found


def relabel(explorer: Explorer, wanted: LabelingRequest) -> Iterator[list[dict[str, Any]]]:
    """Events of one labelling: progress, and in the end the labels, which are in the label store then.

    A label that a person chose stays chosen. Closing the iterator ends a language model's labelling before its next
    request; rules are searched to their end, which takes seconds.

    Args:
        explorer: whose store, label store and client are used.
        wanted: feature and method.

    Raises:
        ValueError: before the first event, for a feature that does not exist, or without a client.
    """
    if not 0 <= wanted.feature < explorer.store.d_sae:
        raise ValueError(f"`feature` must be in 0..{explorer.store.d_sae - 1}, got {wanted.feature}.")
    if wanted.method == "llm" and explorer.client is None:
        raise ValueError("No language model was named that labels features. Start the explorer with --label-model.")
    return _Labeling(explorer, wanted).events()


class _Labeling:
    """One labelling in a thread of its own, and its events."""

    def __init__(self, explorer: Explorer, wanted: LabelingRequest) -> None:
        self.explorer, self.wanted = explorer, wanted
        self.queue: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self.left = threading.Event()

    def events(self) -> Iterator[list[dict[str, Any]]]:
        """What the thread tells, as it comes; an empty list where it told nothing for a while."""
        self.explorer.run(self._work)
        try:
            while True:
                try:
                    event = self.queue.get(timeout=POLL)
                except queue.Empty:
                    yield []
                    continue
                if isinstance(event, Exception):
                    raise event
                yield [event]
                if event.get("done"):
                    return
        finally:
            self.left.set()

    def _work(self) -> None:
        try:
            make = {"rules": self._by_rules, "llm": self._by_model}[self.wanted.method]
            labels = make()
            self.explorer.keep_labels(labels, afresh=self.wanted.sign == BOTH)
            self.queue.put({"done": True, "labels": [label.to_dict() for label in labels]})
        except Exception as error:
            self.queue.put(error)

    def _is_over(self) -> bool:
        """Whether nobody waits for the labels any more."""
        return self.left.is_set() or self.explorer.closed.is_set()

    def _tell(self, share: float, text: str) -> None:
        self.queue.put({"progress": share, "text": text})

    def _by_rules(self) -> list[Label]:
        feature = self.wanted.feature
        self._tell(0.05, "reading the text")
        part = self.explorer.store.spread(N_TOKENS)
        predicates = make_predicates(part)
        lens = None
        if self.explorer.model_state == "ready":
            self._tell(0.4, "reading what the feature promotes")
            sae, model = self.explorer.require_model()
            with self.explorer.lock:
                lens = logit_lens(sae, model, [feature], allow_mismatch=True)
        self._tell(0.5, f"comparing with {len(predicates):,} predicates")
        found = label_by_rules(part, predicates, features=[feature], lens=lens).labels()
        return [label for label in found if self.wanted.sign in (BOTH, label.sign)]

    def _by_model(self) -> list[Label]:
        client, store, feature = self.explorer.client, self.explorer.store, self.wanted.feature
        assert client is not None
        sides = (1, -1) if store.signed else (BOTH,)
        signs = sides if self.wanted.sign == BOTH else (self.wanted.sign,)
        self._tell(0.02, "choosing examples")
        n = max(1, estimate_labels(store, client, [feature], signs=signs).n_requests)
        asked = _Watched(
            client, lambda done: self._tell(min(0.98, done / n), f"{done} of about {n} answers"), self._is_over
        )
        found = explain_features(store, asked, [feature], signs=signs, progress=False)
        if not found.labels and found.missing:
            raise ValueError(f"No label was made: {found.missing[0].problem}.")
        return list(found.labels)


class _Watched:
    """A client that counts its answers, and asks no more once nobody waits for them."""

    def __init__(self, client: Client, count: Callable[[int], None], left: Callable[[], bool]) -> None:
        self.name, self.settings = client.name, client.settings
        self._client, self._count, self._left = client, count, left
        self._lock, self._n = threading.Lock(), 0

    def complete(self, messages: Messages) -> Answer:
        """The client's answer; `Waiting` once nobody waits for it."""
        if self._left():
            raise Waiting("whoever asked for the label has left")
        answer = self._client.complete(messages)
        with self._lock:
            self._n += 1
            self._count(self._n)
        return answer
