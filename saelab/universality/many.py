"""Pairwise comparisons of several dictionaries, and in how many of the others each feature recurs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int

from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.stores.progress import hidden
from saelab.stores.results import Result
from saelab.universality.comparison import compare
from saelab.universality.matches import Comparison

Sources = Mapping[str, FeatureStore] | Mapping[str, SAE] | Sequence[FeatureStore] | Sequence[SAE]


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
        """The same share with an untrained dictionary in place of a trained one, tested against chance only.

        NaN where no untrained dictionary was compared.
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
            lines.append("share of an untrained dictionary in place of a trained one, beside chance alone")
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
    sources: Sources, *, untrained: Sources | None = None, progress: bool = True, **options: Any
) -> Comparisons:
    """The comparison of every pair of several stores or SAEs.

    False discoveries are controlled within each comparison.

    Args:
        sources: two or more stores or SAEs; names are those of the mapping, or 0, 1, 2, ... for a sequence.
        untrained: an untrained dictionary for each source, by the same names or in the same order; some may be left
            out.
        progress: whether to show a progress bar over pairs.
        **options: options of `compare`.

    Raises:
        ValueError: there are fewer than two sources, `untrained` has other names, or as in `compare`.

    >>> saes = [sl.SAE(sl.SAEConfig(d_in=8, d_sae=40), seed=seed) for seed in (0, 0, 1)]
    >>> found = compare_many(saes, n_shifts=2, progress=False)
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
    for a, b in tqdm(list(combinations(named, 2)), unit=" pairs", disable=hidden(progress)):
        beside = (floors.get(a), floors.get(b))
        found[a, b] = compare(named[a], named[b], untrained=beside, progress=False, **options)
    return Comparisons(names=tuple(named), found=found)


def _name(sources: Sources) -> dict[str, Any]:
    return dict(sources.items() if isinstance(sources, Mapping) else ((str(i), one) for i, one in enumerate(sources)))
