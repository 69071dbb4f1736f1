"""Relations between features of two dictionaries: same, flipped, split, halves, copies or part."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from saelab.universality.partners import Matches

Kind = Literal["same", "flipped", "split", "halves", "copies", "part"]
COPIED = 1.3
"""If the partners' joint firings are more than so many times a feature's own, they are copies, else a split."""


@dataclass(frozen=True)
class Relation:
    """The relation of one feature to its partners in another dictionary.

    - same, flipped: one partner, and each is the other's best.
    - split: several features have it as their best partner and share its firings.
    - halves: some of its partners go with its positive codes, some with its negative ones.
    - copies: its partners fire where it fires, all of them.
    - part: its best partner is one that is split, halved or copied.
    """

    feature: int
    kind: Kind
    partners: tuple[int, ...]
    similarities: tuple[float, ...]


def relate(mine: Matches, theirs: Matches) -> tuple[Relation, ...]:
    """The relations of one side's features.

    A feature that is neither universal nor the best partner of several universal ones has none.
    """
    followers: dict[int, list[int]] = {}
    for j in np.flatnonzero(theirs.universal).tolist():
        followers.setdefault(int(theirs.partners[j]), []).append(j)
    found = [_relate(i, followers.get(i, []), mine, theirs) for i in range(len(mine.fires))]
    return tuple(one for one in found if one is not None)


def _relate(i: int, followers: list[int], mine: Matches, theirs: Matches) -> Relation | None:
    if len(followers) > 1:
        values = theirs.similarity[followers]
        return Relation(i, _kind_of(i, followers, mine, theirs), tuple(followers), tuple(values.tolist()))
    if not mine.universal[i]:
        return None
    partner, value = int(mine.partners[i]), float(mine.similarity[i])
    kind: Kind = "part" if followers != [partner] else "flipped" if value < 0 else "same"
    return Relation(i, kind, (partner,), (value,))


def _kind_of(i: int, followers: list[int], mine: Matches, theirs: Matches) -> Kind:
    values = theirs.similarity[followers]
    if (values < 0).any() and (values > 0).any():
        return "halves"
    both = theirs.n_both[followers].sum()
    return "copies" if both < 0 or both > COPIED * mine.fires[i] else "split"
