"""`score_sensitivity`: whether a feature fires on paraphrases of the texts that it fires on (arXiv:2509.23717)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from saelab.evaluation.feature_classifiers import CodeMatrix, read_values
from saelab.stores.results import Result, format_table

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityScores(Result):
    """Result of `score_sensitivity`: one number for each side of a feature that has enough examples."""

    features: Int[np.ndarray, "n_sides"]
    signs: Int[np.ndarray, "n_sides"]
    """1 or -1: sign of the codes that count"""
    sensitivity: Float[np.ndarray, "n_sides"]
    """share of the examples on whose paraphrase the side fires; 0 to 1, higher is better"""
    chance: Float[np.ndarray, "n_sides"]
    """share of all paraphrases on which it fires: what it would be for paraphrases of anything else"""
    n_examples: int
    """most examples of a side"""
    n_texts: int
    """texts that have a paraphrase"""
    n_few: int
    """sides that fire on too few texts to be scored"""

    @property
    def mean(self) -> float:
        """Mean sensitivity; NaN where nothing is scored."""
        return float(self.sensitivity.mean()) if len(self.sensitivity) else math.nan

    @property
    def mean_chance(self) -> float:
        """Mean chance level of the same sides."""
        return float(self.chance.mean()) if len(self.chance) else math.nan

    def __str__(self) -> str:
        head = (
            f"sensitivity {self.mean:.3f}, by chance {self.mean_chance:.3f}: {len(self.sensitivity):,} sides of "
            f"features, up to {self.n_examples} of {self.n_texts:,} texts each; {self.n_few:,} fire on too few"
        )
        table = [["quantile", *(f"{q:g}" for q in QUANTILES)]]
        for name, values in (("sensitivity", self.sensitivity), ("chance", self.chance)):
            shown = np.quantile(values, QUANTILES) if len(values) else [math.nan] * len(QUANTILES)
            table.append([name, *(f"{value:.3f}" for value in shown)])
        return "\n".join([head, *format_table(table)])

    def to_dict(self) -> dict[str, Any]:
        """Every field by name and the means, ready for JSON."""
        return super().to_dict() | {"mean": self.mean, "mean_chance": self.mean_chance}


def score_sensitivity(
    codes: CodeMatrix,
    texts: Shaped[np.ndarray, "n_tokens"],
    other_codes: CodeMatrix,
    other_texts: Shaped[np.ndarray, "n_other"],
    *,
    n_examples: int = 10,
    min_examples: int = 5,
) -> SensitivityScores:
    """Share of the texts that a feature fires on most whose paraphrases it fires on, too.

    The examples of a side are the texts with its largest codes. A feature of what a text says fires on paraphrases, one
    of a word or a turn of phrase need not. Those that fire on most texts do so by chance: compare with `chance`. In
    place of a language model that writes more texts like the examples, paraphrases are given. Source: arXiv:2509.23717.

    Args:
        codes: codes of the tokens, as `score_concepts` takes them.
        texts: number of each token's text (a sentence, a document); -1 for tokens that count for none.
        other_codes: codes of the paraphrases' tokens.
        other_texts: number of the text that each of these tokens paraphrases, or -1.
        n_examples: most examples of a side.
        min_examples: fewest texts that a side must fire on to be scored.

    Raises:
        ValueError: for sizes that disagree, where no text has a paraphrase, and for numbers below 1.

    >>> z = np.eye(3)[[0, 0, 1, 1]]
    >>> found = score_sensitivity(z, np.arange(4), z[[0, 0, 1, 2]], np.arange(4), min_examples=2)
    >>> found.features.tolist(), found.sensitivity.tolist(), found.chance.tolist()
    ([0, 1], [1.0, 0.5], [0.75, 0.25])
    """
    if n_examples < 1 or min_examples < 1:
        raise ValueError(f"`n_examples` and `min_examples` must be at least 1, got {n_examples} and {min_examples}.")
    sides = _read(codes, texts, "codes"), _read(other_codes, other_texts, "other_codes")
    known = np.intersect1d(texts[texts >= 0], other_texts[other_texts >= 0])
    if not len(known):
        raise ValueError("Texts must have paraphrases with the same number, got none.")
    width, n_texts = read_values(codes).shape[1], len(known)
    keys, peaks = _peaks(*sides[0], known)
    there, _ = _peaks(*sides[1], known)
    order = np.lexsort((-peaks, keys // n_texts))
    keys = keys[order]
    side, starts, counts = np.unique(keys // n_texts, return_index=True, return_counts=True)
    first = np.arange(len(keys)) - np.repeat(starts, counts) < n_examples
    owner = np.repeat(np.arange(len(side)), counts)[first]
    hits = np.bincount(owner, np.isin(keys[first], there), minlength=len(side))
    fires = np.bincount(there // n_texts, minlength=2 * width)[side] / n_texts
    kept = counts >= min_examples
    return SensitivityScores(
        features=side[kept] % width,
        signs=np.where(side[kept] < width, 1, -1),
        sensitivity=hits[kept] / np.minimum(counts[kept], n_examples),
        chance=fires[kept],
        n_examples=n_examples,
        n_texts=n_texts,
        n_few=int((~kept).sum()),
    )


def _read(codes: CodeMatrix, texts: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Side (negative ones after all positive ones), text and size of every nonzero code."""
    from scipy.sparse import csr_matrix

    z = csr_matrix(read_values(codes))
    if z.shape[0] != len(texts):
        raise ValueError(f"`{name}` must have a row for each of the {len(texts)} tokens, got {z.shape[0]}.")
    z.eliminate_zeros()
    side = z.indices.astype(np.int64) + np.where(z.data < 0, z.shape[1], 0)
    return side, np.repeat(np.asarray(texts), np.diff(z.indptr)), np.abs(z.data)


def _peaks(
    side: np.ndarray, text: np.ndarray, size: np.ndarray, known: np.ndarray
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The largest code of each side in each text where it fires, by the key `side n_texts + place of the text`."""
    place = np.searchsorted(known, text)
    some = np.isin(text, known)
    keys, inverse = np.unique(side[some] * len(known) + place[some], return_inverse=True)
    peaks = np.zeros(len(keys))
    np.maximum.at(peaks, inverse, size[some])
    return keys, peaks
