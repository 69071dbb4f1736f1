"""`Embedding`: score of labels by a text encoder, which needs no language model."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saelab.functional.statistics import auroc
from saelab.labels.autointerp.example_windows import FeatureExamplesSplit
from saelab.labels.autointerp.requests import Reply
from saelab.labels.autointerp.scorers import CONFIDENCE, Score
from saelab.labels.encoders import EmbeddingFunction, encode_texts

STEP = 1e-9


class Embedding:
    """Embedding score: how well the similarity of a label to a window tells whether the feature fires there.

    AUROC of the cosine between the vectors of label and window, over firing and silent windows, half of the latter
    hard; chance is 1/2, by which also labels of other features score on average. The encoder sees the window's text
    alone, not which token fires. After the embedding scorer of arXiv:2410.13928, which has easy windows only.

    Args:
        encoder: function from texts to vectors.
        instruction: put before a label, for encoders that were trained with such; others score worse by it.

    >>> Embedding(lambda texts: [[1.0, float(len(text))] for text in texts]).name
    'embedding'
    """

    name = "embedding"

    def __init__(self, encoder: EmbeddingFunction, instruction: str = "") -> None:
        self.encoder, self.instruction = encoder, instruction
        encoder_name = getattr(encoder, "name", getattr(encoder, "__name__", type(encoder).__name__))
        self.settings = {"encoder": str(encoder_name), "instruction": instruction}

    def score(self, texts: Sequence[str], cases: Sequence[FeatureExamplesSplit]) -> list[Reply[Score]]:
        """A score for each label text on its case; labels and windows of all cases are encoded together."""
        able = [i for i, case in enumerate(cases) if not case.problem]
        replies: list[Reply[Score]] = [Reply(problem=case.problem) for case in cases]
        if not able:
            return replies
        windows = [[e.text for e in (*cases[i].fires, *cases[i].hard, *cases[i].easy)] for i in able]
        labels = encode_texts(self.encoder, [self.instruction + texts[i] for i in able], queries=True)
        rows = encode_texts(self.encoder, [text for some in windows for text in some])
        starts = np.cumsum([0, *map(len, windows)])
        for label, i, start, stop in zip(labels, able, starts[:-1], starts[1:], strict=True):
            replies[i] = Reply(value=_judge(rows[start:stop] @ label, len(cases[i].fires), self.name))
        return replies


def _judge(similarities: Float[np.ndarray, "n"], n_fires: int, name: str) -> Score:
    y = np.arange(len(similarities)) < n_fires
    value = auroc(similarities, y)
    low, high = auroc_interval(value, n_fires, len(y) - n_fires)
    return Score(name=name, value=value, chance=0.5, low=low, high=high, n_windows=len(y))


def auroc_interval(value: float, n_true: int, n_false: int) -> tuple[float, float]:
    """95 % confidence limits of an AUROC: the values from which the one found is as many standard errors away.

    The standard error is that of Hanley and McNeil, taken at the limit, with both group sizes replaced by their mean
    (Newcombe 2006, Statistics in Medicine 25:559, method 5). Unlike a bootstrap it is no point where all is right.

    >>> [round(x, 2) for x in auroc_interval(1.0, 20, 20)]
    [0.9, 1.0]
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, n = norm.ppf((1 + CONFIDENCE) / 2), (n_true + n_false) / 2 - 1

    def excess(limit: float) -> float:
        spread = 1 + n * (1 - limit) / (2 - limit) + n * limit / (1 + limit)
        return float((value - limit) ** 2 - z**2 * limit * (1 - limit) * spread / (n_true * n_false))

    # Where all is right or wrong, the value itself is a limit without a standard error, and not the one that is meant.
    low = float(brentq(excess, 0.0, value - STEP)) if value > STEP else 0.0
    high = float(brentq(excess, value + STEP, 1.0)) if value < 1 - STEP else 1.0
    return low, high
