"""`Lobes`: clusters of features by co-firing, how far they are clusters of directions, and which nulls they fail."""

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from saelab.geometry.group_agreement import REACHES
from saelab.stores.results import Result, find_row, format_spread, format_table

N_SHOWN = 16
LIMITS = (
    "It cannot show why: features of like directions fire on the same tokens in any dictionary, see an untrained one's "
    "row; and clusters are found in every cloud, whether it has gaps or not."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LobeScore:
    """Lobes of one number, and how far they are clusters of directions."""

    n_lobes: int
    contrast: float
    """mean cosine of the directions of two features of one lobe less that of two lobes"""
    contrast_z: float
    """standard deviations above lobes of the same sizes at random, by the exact mean and variance of all permutations
    (Mantel)"""
    contrast_z_random: tuple[float, ...]
    """the same of Gaussian directions, for each draw"""
    ami: float
    """adjusted mutual information of lobes and as many clusters of directions by cosine: 0 is chance, 1 the same"""
    ami_z: float
    """standard deviations of its information above permuted clusters"""
    ami_random: tuple[float, ...]
    """of lobes and clusters of Gaussian directions, for each draw"""
    ami_starts: float
    """of two clusterings of the directions that differ in the seed of k-means: where it is low these have no clusters
    to agree with"""
    ami_halves: float
    """of lobes found in either half of the documents: more agreement than this cannot be had"""
    accuracy: float
    """balanced accuracy of logistic regression from directions to lobes, on a fifth of the features; NaN where fewer
    than two lobes have ten"""
    accuracy_random: float
    """the same from Gaussian directions"""
    largest: float
    """share of the features that the largest lobe has"""
    meaning: float = math.nan
    """AMI of lobes in one half of the documents and the concept that each feature agrees with best (Cohen's kappa) in
    the other; NaN without labels"""
    meaning_permuted: float = math.nan
    """the same with the concepts of features permuted"""
    meaning_directions: float = math.nan
    """the same of clusters of directions"""
    lobes: Int[np.ndarray, "d_sae"] = field(repr=False)
    """lobe of each feature, from 0; -1 for features left out"""


@dataclass(frozen=True, kw_only=True)
class Lobe:
    """Features that fire in the same windows, the most central first."""

    members: tuple[int, ...]
    inside: float
    """mean phi of its pairs; NaN of one member"""
    outside: float
    """mean phi with features of other lobes"""
    concept: str = ""
    """the concept that most of its features agree with best, compared with all features; empty without labels"""
    share: float = math.nan
    """share of its features with that concept"""
    share_all: float = math.nan
    """share of all features with it"""


@dataclass(frozen=True, kw_only=True)
class Lobes(Result):
    """Clusters of features by co-firing, of several numbers, against the geometry of their directions."""

    affinity: str
    window: int
    """rows of a window, of one document"""
    n_windows: int
    n_rows: int
    counted: str
    """what rows are, "tokens" or "documents" """
    n_documents: int
    n_features: int
    """features that fire in enough windows of either half of the documents"""
    d_sae: int
    seed: int
    scores: tuple[LobeScore, ...]
    """for each number of lobes"""
    lobes: tuple[Lobe, ...]
    """those of the largest number, the largest first"""
    baselines: "dict[str, Lobes]" = field(default_factory=dict)
    """the same of other dictionaries, by name"""

    def at(self, n_lobes: int) -> LobeScore:
        """The scores of one number of lobes; KeyError for another one."""
        return find_row(self.scores, n_lobes=n_lobes)

    @property
    def failed(self) -> tuple[str, ...]:
        """Nulls that reach half of a figure of the largest number of lobes, or a z of 3."""
        own, found = self.scores[-1], []
        for name, other in self.baselines.items():
            theirs = other.scores[-1]
            for what in ("contrast", "ami", "meaning"):
                a, b = getattr(own, what), getattr(theirs, what)
                if b >= REACHES * a:
                    found.append(f"{name} reaches {what} {b:.3f}, of {a:.3f}")
        if abs(z := float(np.mean(own.contrast_z_random))) > 3:
            found.append(f"Gaussian directions reach a contrast of z {z:.1f}")
        if own.contrast_z < 3:
            found.append(f"lobes at random: the contrast is only z {own.contrast_z:.1f}")
        return tuple(found)

    def __str__(self) -> str:
        lines = [f"A null is not passed: {one}" for one in self.failed]
        lines.append(
            f"{self.n_features:,} of {self.d_sae:,} features in {self.n_windows:,} windows of {self.window} "
            f"{self.counted} ({self.n_rows:,} in {self.n_documents:,} documents), seed {self.seed}; affinity "
            f"{self.affinity} of co-firing (phi)"
        )
        table = [list(HEAD)]
        for name, one in {"": self, **self.baselines}.items():
            table += [[f"{score.n_lobes}  {name}".rstrip(), *_cells(score)] for score in one.scores]
        lines += format_table(table)
        if self.lobes:
            lines.append(f"the {len(self.lobes)} lobes:")
            rows = [["size", "phi inside", "outside", "features", "concept"]]
            for lobe in self.lobes[:N_SHOWN]:
                shown = ", ".join(map(str, lobe.members[:6])) + (", ..." if len(lobe.members) > 6 else "")
                told = f"{lobe.concept} ({lobe.share:.0%} of them, {lobe.share_all:.0%} of all)" if lobe.concept else ""
                rows.append([f"{len(lobe.members):,}", f"{lobe.inside:+.3f}", f"{lobe.outside:+.3f}", shown, told])
            lines += format_table(rows, left=(3, 4))
        return "\n".join([*lines, LIMITS])


HEAD = (
    "lobes", "contrast", "z", "z, Gaussian", "AMI", "z", "Gaussian", "of halves", "of starts", "accuracy", "Gaussian",
    "largest", "meaning", "permuted", "of directions",
)  # fmt: skip


def _cells(score: LobeScore) -> list[str]:
    told = [
        f"{score.contrast:+.4f}", f"{score.contrast_z:.1f}", format_spread(score.contrast_z_random, 1),
        f"{score.ami:.3f}", f"{score.ami_z:.1f}", format_spread(score.ami_random), f"{score.ami_halves:.3f}",
        f"{score.ami_starts:.3f}", f"{score.accuracy:.3f}", f"{score.accuracy_random:.3f}", f"{score.largest:.0%}",
    ]  # fmt: skip
    meanings = (score.meaning, score.meaning_permuted, score.meaning_directions)
    return told + ["-" if one != one else f"{one:.3f}" for one in meanings]
