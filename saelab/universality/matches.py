"""Result of a comparison of two dictionaries: matched pairs, similarities and relations, as arrays and as a table."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from saelab.stores.results import Result
from saelab.universality.partners import Matches
from saelab.universality.relations import Relation, relate

Method = Literal["best", "mutual", "hungarian"]
"""best: the best partner of every feature of a; mutual: pairs that are each other's best; hungarian: one-to-one pairs
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison(Result):
    """Matches between the features of two dictionaries, with p values from a null distribution."""

    similarity: str
    a: Matches = field(repr=False)
    b: Matches = field(repr=False)
    mutual: Int[np.ndarray, "n 2"] = field(repr=False)
    """pairs that are each other's best, significant or not"""
    pairs: Int[np.ndarray, "m 2"] = field(repr=False)
    """one-to-one pairs (Hungarian)"""
    values: Float[np.ndarray, "m"] = field(repr=False)
    """similarities of the one-to-one pairs"""
    exact: bool
    """whether the assignment considered every pair, not only the m nearest of either side"""
    signed: bool
    """whether similarities count by size, so that negative ones mean flipped"""
    sides: bool
    """whether features are the positive and negative sides of codes, 2 j and 2 j + 1"""
    m: int
    n_shifts: int
    fdr: float
    min_effect: float
    seed: int
    sources: tuple[str, str]
    n_rows: int | None = None
    """number of tokens, or documents, that similarities were measured on; None for directions"""
    n_tokens: int | None = None
    alignment: str = ""

    @cached_property
    def universal_pairs(self) -> Int[np.ndarray, "n 2"]:
        """Mutual pairs that are universal on both sides, the most similar first."""
        kept = self.a.universal[self.mutual[:, 0]] & self.b.universal[self.mutual[:, 1]]
        pairs = self.mutual[kept]
        return pairs[np.argsort(-np.abs(self.a.similarity[pairs[:, 0]]), kind="stable")]

    def match(self, method: Method) -> tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n"]]:
        """The pairs of a matching method and their similarities, the most similar first, significant or not."""
        known = np.flatnonzero(self.a.partners >= 0)
        pairs = {
            "best": np.stack([known, self.a.partners[known]], 1), "mutual": self.mutual, "hungarian": self.pairs,
        }[method]  # fmt: skip
        values = self.values if method == "hungarian" else self.a.similarity[pairs[:, 0]]
        order = np.argsort(-np.abs(values), kind="stable")
        return pairs[order], values[order]

    @cached_property
    def relations(self) -> tuple[tuple[Relation, ...], tuple[Relation, ...]]:
        """The relation of every universal feature of either side: same, flipped, split, halves, copies, or part of
        another.
        """
        return relate(self.a, self.b), relate(self.b, self.a)

    def signs(self, pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """1 or -1 for each mutual pair, by which rows of one side are multiplied before `compare_spaces`."""
        return np.where(self.a.similarity[pairs[:, 0]] < 0, -1, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON, without the m nearest of each feature."""
        plain = ("similarity", "exact", "signed", "sides", "m", "n_shifts", "fdr", "min_effect", "seed", "n_rows")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*plain, "n_tokens", "alignment")}
        found |= {name: getattr(self, name).tolist() for name in ("mutual", "pairs", "values")}
        return found | {"sources": list(self.sources), "a": self.a.to_dict(), "b": self.b.to_dict()}

    def __str__(self) -> str:
        units = "documents" if self.similarity == "documents" else "tokens"
        rows = "" if self.n_rows is None else f" over {self.n_rows:,} common {units}"
        what = "sides of features" if self.sides else "features"
        floor = (
            ""
            if self.a.untrained is None and self.b.untrained is None
            else ", and what 95 % of untrained ones stay below"
        )
        lines = [
            f"{what} by {self.similarity}{rows}; universal: q <= {self.fdr:g} and at least {self.min_effect:g}{floor}"
        ]
        titles = {"live": 8, "median": 9, "chance": 9, "(95 %)": 9, "universal": 11, "by freq.": 10, "by var.": 9}
        lines.append(" " * 4 + "".join(f"{title:>{width}}" for title, width in titles.items()))
        for name, side in (("a", self.a), ("b", self.b)):
            known = np.abs(side.similarity[~np.isnan(side.similarity)])
            middle = float(np.median(known)) if len(known) else float("nan")
            shares = f"{side.share():>11.1%}{side.share('frequency'):>10.1%}{side.share('variance'):>9.1%}"
            lines.append(
                f"{name:<4}{int(side.live.sum()):>8,}{middle:>9.3f}{side.chance[0]:>9.3f}{side.chance[1]:>9.3f}{shares}"
            )
        lines += _describe_floors(self)
        flipped = int((self.a.similarity[self.universal_pairs[:, 0]] < 0).sum())
        mean = float(np.abs(self.values).mean()) if len(self.values) else float("nan")
        kind = "" if self.exact else f", among the {self.m} nearest"
        lines.append(f"mutual pairs that are universal: {len(self.universal_pairs):,}, of them flipped {flipped:,}")
        lines.append(f"one-to-one pairs: {len(self.pairs):,}, mean similarity {mean:.3f}{kind}")
        for name, found in zip("ab", self.relations, strict=True):
            kinds = sorted({one.kind for one in found})
            counts = ", ".join(f"{kind} {sum(one.kind == kind for one in found):,}" for kind in kinds)
            lines.append(f"relations of {name}: {counts or 'none'}")
        return "\n".join([*lines, *([self.alignment] if self.alignment else [])])


def _describe_floors(found: Comparison) -> Iterator[str]:
    """Lines that compare the universal shares with those of untrained dictionaries."""
    if found.a.untrained is None and found.b.untrained is None:
        yield "no untrained dictionary was compared: what the text alone makes alike is among these"
        return
    yield "chance alone as the floor: share of this dictionary, and of an untrained one of its shape in its place"
    yield " " * 4 + f"{'':>8}{'untrained':>18}{'(95 %)':>9}{'trained':>11}{'untrained':>11}"
    for name, floor in (("a", found.a.untrained), ("b", found.b.untrained)):
        if floor is not None:
            shares = f"{floor.trained['count']:>11.1%}{floor.shares['count']:>11.1%}"
            yield f"{name:<4}{'':>8}{floor.median:>18.3f}{floor.level:>9.3f}{shares}"
