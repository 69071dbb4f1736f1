"""`name_sides`: the texts by which features are shown, from a mapping or a label store."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

NEGATIVE = "\u2212 "
"""put before the label of a whole feature where its code is negative"""


@runtime_checkable
class LabelSource(Protocol):
    """Something that holds labels of one dictionary's features, such as `LabelStore`."""

    def shown(self, features: Iterable[int] | None = None) -> Sequence[Any]:
        """The chosen labels of these features, each with `feature`, `sign`, `text` and `kind`."""


FeatureNames: TypeAlias = Mapping[int, str] | LabelSource
"""texts by feature, or a label store"""


@dataclass(frozen=True)
class _KeptLabels:
    """Labels as they were when a store was read."""

    rows: tuple[Any, ...]

    def shown(self, features: Iterable[int] | None = None) -> Sequence[Any]:
        wanted = None if features is None else set(features)
        return [row for row in self.rows if wanted is None or row.feature in wanted]


def require_names(labels: Any) -> None:
    """Raise TypeError for what names no features, such as the path of a store."""
    if labels is not None and not isinstance(labels, Mapping | LabelSource):
        raise TypeError(
            "`labels` must be a dictionary of texts by feature or a label store, got "
            f"{type(labels).__name__}; open a store with saelab.labels.LabelStore.open(path)."
        )


def keep_names(labels: FeatureNames | None, features: Iterable[int]) -> FeatureNames | None:
    """A copy of the names of some features, which stays as it is when a store is closed or a dictionary changes.

    >>> keep_names({3: "fruit", 4: "car"}, [3])
    {3: 'fruit'}
    """
    wanted = sorted({int(feature) for feature in features})
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        named = {int(feature): text for feature, text in labels.items()}
        return {feature: named[feature] for feature in wanted if feature in named}
    return _KeptLabels(tuple(labels.shown(wanted)))


def name_sides(labels: FeatureNames | None, features: Iterable[int]) -> Callable[[int, float | int], str]:
    """Function from a feature and a code to the text for the code's sign; empty where there is none.

    A label of the whole feature is marked with a minus at negative codes. Labels that say that no good name was found
    are none.

    Args:
        labels: texts by feature, or a label store; None names nothing.
        features: the features that will be asked for.

    >>> name = name_sides({3: "fruit"}, [3, 4])
    >>> name(3, 0.5), name(3, -2.0), name(4, 1.0)
    ('fruit', '\u2212 fruit', '')
    """
    if labels is None or isinstance(labels, Mapping):
        sides = {(int(feature), 0): text for feature, text in (labels or {}).items()}
    else:
        rows = [row for row in labels.shown(sorted({int(feature) for feature in features})) if row.kind != "none"]
        sides = {(row.feature, row.sign): row.text for row in rows}

    def name(feature: int, code: float | int) -> str:
        whole = sides.get((feature, 0), "")
        return sides.get((feature, 1 if code > 0 else -1)) or (NEGATIVE + whole if whole and code < 0 else whole)

    return name
