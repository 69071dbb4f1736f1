"""Search for the documents that two texts have in common, by their characters, in batches of documents."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import islice

import numpy as np
from jaxtyping import Bool

from saelab.universality.documents import BEGINNING, BLUR, HIGH, Spelled, SpelledText, find_overlap

PREFIX = 256
"""Number of leading ASCII characters by which longer versions of a cut document are searched."""
Key = Callable[[Spelled, int], bytes | None]


class Versions:
    """The common documents of two texts; for each document a digest is held instead of its text."""

    def __init__(self, sides: tuple[SpelledText, SpelledText]) -> None:
        self.sides = sides
        self.partners = np.full(len(sides[0]), -1, np.int32)
        """the document of b that each one of a has; -1 for none"""
        self.n_cut = 0
        """pairs of which one ends before the other"""
        self._open: list[dict[int, tuple[Spelled, int]]] = [{}, {}]
        filled, readable = zip(*(_sort_out(side) for side in sides), strict=True)
        self._free = [_list(documents) for documents in readable]
        self._match_readable()
        # documents with unknown tokens are matched by their number: their text is no key
        self._free = [_list(documents & ~self._taken(k)) for k, documents in enumerate(filled)]
        self._match_equal(_number)

    def _match_readable(self) -> None:
        """Match equal texts, then texts equal but for unknown parts of characters, then documents that were cut."""
        self._match_equal(lambda side, i: side.documents[i])
        self._match_equal(lambda side, i: side.documents[i].translate(BLUR))
        self._match_equal(lambda side, i: side.skeleton(i) or None)
        self._match_equal(_number)
        for short in (0, 1):
            self._match_beginnings(short)

    def _match_equal(self, key: Key) -> None:
        """Match documents with the same key, in their order; None is no key."""
        waiting: dict[bytes, list[int]] = defaultdict(list)
        for batch, spelled in self._spell(1):
            for j, digest in zip(batch, _digest(spelled, key), strict=True):
                if digest is not None:
                    waiting[digest].append(j)
        for batch, spelled in self._spell(0) if waiting else ():
            digests = _digest(spelled, key)
            wanted = Counter(digest for digest in digests if digest in waiting)
            self._hold(1, [j for digest, n in wanted.items() for j in islice(waiting[digest], n)])
            for i, digest in zip(batch, digests, strict=True):
                queue = waiting.get(digest, []) if digest is not None else []
                taken = next((j for j in queue if self._take(i, j)), None)
                if taken is not None:
                    queue.remove(taken)

    def _match_beginnings(self, short: int) -> None:
        """Match documents of one side with those of the other that begin like them, but for unknown parts of
        characters.
        """
        ordered = sorted(
            (spelled.skeleton(k)[:PREFIX], j)
            for batch, spelled in self._spell(1 - short, hold=False)
            for k, j in enumerate(batch)
        )
        keys = [skeleton for skeleton, _ in ordered]
        for batch, spelled in self._spell(short) if ordered else ():
            longer = []
            for k in range(len(batch)):
                key = spelled.skeleton(k)[:PREFIX]
                first, stop = bisect_left(keys, key), bisect_left(keys, key + HIGH[:1])
                longer.append(sorted(j for _, j in ordered[first:stop]) if key else [])
            self._hold(1 - short, sorted({found[0] for found in longer if found}))
            for k, i in enumerate(batch):
                any(self._take_longer(short, i, spelled.skeleton(k), j) for j in longer[k])  # up to the first that fits

    def _take_longer(self, short: int, i: int, skeleton: bytes, j: int) -> bool:
        """Match a document with an unmatched one of the other side that continues it."""
        if j not in self._free[1 - short]:
            return False
        other, k = self._find(1 - short, j)
        return other.skeleton(k).startswith(skeleton) and self._take(*((j, i) if short else (i, j)))

    def _take(self, i: int, j: int) -> bool:
        """Match two documents if they agree."""
        (a, mine), (b, theirs) = self._find(0, i), self._find(1, j)
        overlap = find_overlap(a, b, mine, theirs)
        if overlap is None or len(overlap.shares) == 0:
            return False
        self.partners[i] = j
        self.n_cut += not all(overlap.ends)
        del self._free[0][i], self._free[1][j]
        return True

    def _spell(self, side: int, hold: bool = True) -> Iterator[tuple[list[int], Spelled]]:
        """The unmatched documents of a side, batch by batch; each batch is held until the next."""
        for batch in self.sides[side].batches(list(self._free[side])):
            spelled = self.sides[side].spell(batch)
            if hold:
                self._open[side] = {i: (spelled, k) for k, i in enumerate(batch)}
            yield batch, spelled
        self._open[side] = {}

    def _hold(self, side: int, documents: list[int]) -> None:
        """Spell documents that are likely to be needed, and hold them."""
        spelled = self.sides[side].spell(documents)
        self._open[side] = {i: (spelled, k) for k, i in enumerate(documents)}

    def _find(self, side: int, document: int) -> tuple[Spelled, int]:
        if document in self._open[side]:
            return self._open[side][document]
        return self.sides[side].spell([document]), 0

    def _taken(self, side: int) -> Bool[np.ndarray, "n_docs"]:
        if side == 0:
            return self.partners >= 0
        taken = np.zeros(len(self.sides[1]), bool)
        taken[self.partners[self.partners >= 0]] = True
        return taken

    def without(self, side: int) -> list[int]:
        """The documents of a side that have no partner."""
        return np.flatnonzero(~self._taken(side)).tolist()

    def left_out(self) -> dict[str, dict[str, int]]:
        """How many documents have no partner, by reason."""
        known = [set(self._tell_left(k, lambda spelled, i: spelled.skeleton(i)[:BEGINNING])) - {b""} for k in (0, 1)]
        whys = [Counter(self._tell_left(k, lambda one, i, k=k: one.why_left(i, known[1 - k]))) for k in (0, 1)]  # type: ignore[misc]
        return {
            name: {str(reason): n for reason, n in why.items()} for name, why in zip("ab", whys, strict=True) if why
        }

    def _tell_left(self, side: int, tell: Callable[[Spelled, int], str | bytes]) -> Iterator[str | bytes]:
        for batch in self.sides[side].batches(self.without(side)):
            spelled = self.sides[side].spell(batch)
            yield from (tell(spelled, i) for i in range(len(batch)))


def _sort_out(side: SpelledText) -> tuple[Bool[np.ndarray, "n_docs"], Bool[np.ndarray, "n_docs"]]:
    """Which documents have characters, and which of these are known completely."""
    filled, opaque = np.zeros((2, len(side)), bool)
    for batch in side.batches(range(len(side))):
        spelled = side.spell(batch)
        filled[batch], opaque[batch] = np.diff(spelled.starts) > 0, spelled.opaque
    return filled, filled & ~opaque


def _list(documents: Bool[np.ndarray, "n_docs"]) -> dict[int, None]:
    """Documents in their order, as a dictionary: removing one takes constant time."""
    return dict.fromkeys(np.flatnonzero(documents).tolist())


def _number(side: Spelled, i: int) -> bytes:
    return str(side.doc_ids[i]).encode()


def _digest(spelled: Spelled, key: Key) -> list[bytes | None]:
    """The keys of some documents, hashed to sixteen bytes each; None is no key."""
    keys: Iterable[bytes | None] = (key(spelled, i) for i in range(len(spelled.documents)))
    return [None if one is None else blake2b(one, digest_size=16).digest() for one in keys]
