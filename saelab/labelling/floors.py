"""Label scores of an untrained dictionary, as a baseline for those of a trained one."""

from collections.abc import Sequence

import numpy as np

from saelab.labelling.label import Label
from saelab.stores.features import FeatureStore


def require_same_tokens(store: FeatureStore, untrained: FeatureStore) -> None:
    """Check that an untrained dictionary's store is of the trained one's tokens; ValueError where it is not."""
    if not np.array_equal(untrained.token_ids, store.token_ids):
        raise ValueError(
            f"`untrained` must be a store of the same {len(store)} tokens, got {len(untrained)} tokens, or others; "
            "make it with `harvest_untrained`."
        )


def average_scores(labels: Sequence[Label], n_sides: int) -> dict[str, float]:
    """The share of sides with a label as "named", and the mean of each score that has a chance level.

    >>> made = [Label(feature=i, text="x", author="me", scores={"a": i / 4, "a_chance": 0.5}) for i in (2, 3)]
    >>> average_scores(made, 4)
    {'named': 0.5, 'a': 0.625}
    """
    found = {"named": sum(bool(label.text) for label in labels) / max(1, n_sides)}
    names = dict.fromkeys(name for label in labels for name in label.scores if f"{name}_chance" in label.scores)
    means = {name: np.mean([label.scores[name] for label in labels if name in label.scores]) for name in names}
    return found | {name: float(value) for name, value in means.items()}


def tell_floor(trained: dict[str, float], untrained: dict[str, float] | None, chance: dict[str, float]) -> str:
    """One line with the mean scores of trained and untrained dictionaries and the chance levels.

    >>> tell_floor({"named": 1.0, "a": 0.75}, {"named": 0.5, "a": 0.625}, {"a": 0.5})
    'sides named 100% (untrained 50%), mean a 0.75 (untrained 0.62, chance 0.5)'
    """

    def beside(name: str) -> str:
        return "none scored" if untrained is None or name not in untrained else f"untrained {untrained[name]:.2f}"

    parts = [f"sides named {trained['named']:.0%}" + (f" (untrained {untrained['named']:.0%})" if untrained else "")]
    parts += [f"mean {name} {trained[name]:.2f} ({beside(name)}, chance {chance[name]:g})" for name in chance]
    note = "" if untrained is not None else "; no untrained dictionary was labelled beside it"
    return ", ".join(parts).replace("none scored, ", "") + note
