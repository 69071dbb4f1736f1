"""Alignment of documents with tokens whose text is unknown (<unk>): the other side supplies what they stand for."""

import numpy as np
from jaxtyping import Int

UNKNOWN = 0xFE
"""Byte for a token whose text is not known; UTF-8 has no such byte."""
ANCHOR, REACH = 5, 400
"""Number of bytes that must agree after an unknown token, and number of bytes searched for them."""


def bridge(a: bytes, b: bytes) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]] | None:
    """Corresponding byte positions in two spellings of one document; None where the texts differ apart from unknown
    tokens.

    Each unknown token may stand for any characters. After one, the spellings continue at the nearest position where the
    next five bytes agree.

    >>> at = bridge(b"the" + bytes([UNKNOWN]) + b"ranaway.", b"thefoxranaway.")
    >>> at[0].tolist(), at[1].tolist()
    ([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11], [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13])
    """
    x, y = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    i = j = 0
    parts: list[tuple[int, int, int]] = []
    while i < len(x) and j < len(y):
        n = _agree(x[i:], y[j:])
        if n:
            parts.append((i, j, n))
            i, j = i + n, j + n
        if i == len(x) or j == len(y):
            break
        if UNKNOWN not in (x[i], y[j]):
            return None
        found = _resume(a, b, i, j)
        if found is None:
            break
        i, j = found
    if not parts:
        return None
    at = [np.concatenate([np.arange(part[k], part[k] + part[2]) for part in parts]) for k in (0, 1)]
    return at[0], at[1]


def _agree(x: np.ndarray, y: np.ndarray) -> int:
    """Number of leading bytes on which two spellings agree, unknown tokens excluded."""
    n = min(len(x), len(y))
    differ = np.flatnonzero((x[:n] != y[:n]) | (x[:n] == UNKNOWN))
    return int(differ[0]) if len(differ) else n


def _resume(a: bytes, b: bytes, i: int, j: int) -> tuple[int, int] | None:
    """The nearest positions from which both spellings agree again."""
    least_a, least_b = int(b[j] == UNKNOWN), int(a[i] == UNKNOWN)  # an unknown token stands for at least one byte
    for start in range(i + least_a, i + REACH):
        anchor = a[start : start + ANCHOR]
        if len(anchor) < ANCHOR:  # too few for an anchor: only the end of both counts
            place = len(b) - len(anchor)
            ends = anchor and start == i + least_a and b.endswith(anchor) and place >= j + least_b
            return (start, place) if ends and UNKNOWN not in anchor else None
        if UNKNOWN in anchor:
            continue
        place = b.find(anchor, j + least_b, j + REACH + ANCHOR)
        if place >= 0:
            return start, place
    return None
