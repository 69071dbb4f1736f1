"""Significance of rules: tail probabilities of counts over dependent tokens, and false discovery rates."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped

N_SHIFTS = 24
SHIFTED_FIRINGS = 512
"""Number of neighbouring firings on which the spread of the null is measured."""


def dispersion(
    holds: Callable[[np.ndarray], np.ndarray],
    fires: Integer[np.ndarray, "n"],
    rate: float,
    n_tokens: int,
    rng: np.random.Generator,
    blocks: Int[np.ndarray, "n_tokens"] | None = None,
) -> float:
    """Overdispersion: variance of a rule's hits under the null, relative to independent tokens; at least 1.

    Firings and rules both come in runs, so tokens are not independent samples. The firings are shifted circularly
    through the documents by random steps, those of one block together, which keeps their runs and breaks every tie to
    the text, also where the text is periodic. The variance of the hits is divided by that of independent ones.

    Args:
        holds: function from token positions to whether the rule holds there.
        fires: positions at which the feature fires.
        rate: share of all tokens on which the rule holds.
        n_tokens: number of tokens.
        rng: generator of the random steps.
        blocks: number of the block (a document, or a piece of one) of each token; None shifts all firings together.
    """
    if len(fires) > SHIFTED_FIRINGS:
        start = int(rng.integers(len(fires)))
        fires = fires.take(np.arange(start, start + SHIFTED_FIRINGS), mode="wrap")
    own = np.unique(blocks[fires], return_inverse=True)[1] if blocks is not None else np.zeros(len(fires), np.int64)
    steps = rng.integers(1, max(n_tokens, 2), size=(N_SHIFTS, int(own.max(initial=0)) + 1))[:, own]
    hits = np.count_nonzero(holds((fires + steps) % n_tokens), axis=1)
    expected = len(fires) * rate * (1 - rate)
    spread = float(np.mean((hits - len(fires) * rate) ** 2))
    return max(1.0, spread / expected) if expected > 0 else 1.0


def tail(
    hits: Float[np.ndarray, "n"],
    fires: Float[np.ndarray, "n"],
    holds: Float[np.ndarray, "n"],
    n_tokens: int,
    spread: Float[np.ndarray, "n"],
) -> Float[np.ndarray, "n"]:
    """Probability of at least so many hits under the null, with every count divided by `spread`.

    The binomial tail `I_q(hits, trials - hits + 1)`, the larger of taking firings or the rule's tokens as trials.
    Beyond the mean it is above the hypergeometric tail (Fisher's exact test), and it stays accurate where that
    underflows.

    Args:
        hits: number of tokens on which feature and rule coincide, one per rule.
        fires: number of tokens on which the feature fires.
        holds: number of tokens on which the rule holds.
        n_tokens: number of tokens.
        spread: overdispersion of each rule, from `dispersion`.
    """
    from scipy.special import betainc

    found = np.zeros(len(hits))
    for trials, marked in ((fires, holds), (holds, fires)):
        k, m = hits / spread, trials / spread
        with np.errstate(invalid="ignore"):
            p = betainc(np.maximum(k, 1e-9), m - k + 1, np.clip(marked / n_tokens, 0, 1))
        found = np.maximum(found, np.where(hits > 0, p, 1.0))
    return found


def adjust(p: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Benjamini-Hochberg q values: the smallest false discovery rate at which each hypothesis would be a discovery.

    >>> adjust(np.array([0.01, 0.04, 1.0])).round(3).tolist()
    [0.03, 0.06, 1.0]
    """
    order = np.argsort(p, kind="stable")
    ranked = p[order] * len(p) / np.arange(1, len(p) + 1)
    found = np.empty(len(p))
    found[order] = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1.0)
    return found


def window_auroc(
    holds: Callable[[np.ndarray], np.ndarray],
    fires: Integer[np.ndarray, "n"],
    active: Bool[np.ndarray, "n_tokens"],
    doc_ids: Shaped[np.ndarray, "n_tokens"],
    rng: np.random.Generator,
    *,
    reach: int = 8,
    n_windows: int = 64,
) -> float:
    """AUROC of a yes/no rule for which tokens fire, in windows around firings; 0.5 is chance.

    Near a firing the topic is the same, so the rule must identify the token. NaN where all tokens of the windows fire.

    Args:
        holds: function from token positions to whether the rule holds there.
        fires: positions at which the feature fires.
        active: whether the feature fires, for each token.
        doc_ids: document of each token; windows end at its borders.
        rng: generator that draws the windows.
        reach: tokens on each side of a firing.
        n_windows: largest number of windows, drawn where there are more firings.
    """
    chosen = fires if len(fires) <= n_windows else fires[rng.integers(len(fires), size=n_windows)]
    near = chosen[:, None] + np.arange(-reach, reach + 1)
    inside = (near >= 0) & (near < len(active))
    near = np.clip(near, 0, len(active) - 1)
    rows = np.sort(near[inside & (doc_ids[near] == doc_ids[chosen][:, None])])
    rows = rows[np.diff(rows, prepend=-1) > 0]
    truth, said = active[rows], holds(rows)
    if truth.all():
        return float("nan")
    return 0.5 * (1 + float(said[truth].mean()) - float(said[~truth].mean()))
