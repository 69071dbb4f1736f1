"""Explainers: objects that label features from example windows, here with a language model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saelab.labelling.asking import Asker
from saelab.labelling.cases import Case
from saelab.labelling.prompts import explaining_prompt, read_label
from saelab.labelling.questions import Question, Reply


@runtime_checkable
class Explainer(Protocol):
    """Protocol for explainers, which label features by their training windows `shown` and `silent`."""

    name: str
    """author of the labels that the explainer gives"""

    def explain(self, cases: Sequence[Case]) -> list[Reply[str]]:
        """A label for each case, an empty text where no label fits, or the reason why there is none."""
        ...


class LLMExplainer:
    """Explainer that shows a language model the windows with firing tokens marked, and requests a short phrase."""

    def __init__(self, asker: Asker) -> None:
        self.asker, self.name = asker, asker.client.name

    def questions(self, cases: Sequence[Case]) -> list[Question[str]]:
        """The prompt of each case."""
        return [Question(messages=explaining_prompt(case), read=_read, tokens_out=25) for case in cases]

    def explain(self, cases: Sequence[Case]) -> list[Reply[str]]:
        """A label for each case, requested for all cases at once."""
        return self.asker.ask(self.questions(cases), "explain")


def _read(answer: str) -> str:
    return read_label(answer) or ""
