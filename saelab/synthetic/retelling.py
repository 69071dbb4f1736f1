"""`retell_stories`: stories told twice, with the same people, things and events in other sentences."""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from saelab.synthetic.grammar import Tale
from saelab.synthetic.tales import Stories, gather
from saelab.synthetic.templates import BODY
from saelab.synthetic.vocabulary import T

KINDS = {*BODY, "stop"}


class Retelling(Tale):
    """A story whose plan and whose sentences are drawn apart: with the same plan, another telling of it.

    Every choice has a generator of its own, by its name and how often it was made, so that a sentence which needs fewer
    of them does not change those that follow.

    >>> first, second = (Retelling("0", telling).generate() for telling in (0, 1))
    >>> first.known["hero"] == second.known["hero"], first.words == second.words
    (True, False)
    """

    def __init__(self, plan: str, telling: int) -> None:
        super().__init__(random.Random(f"{plan}/rest"))
        self.plan, self.telling = plan, telling
        self.counts: Counter[str] = Counter()
        self.starts: list[int] = []
        """place of the first word of every sentence template"""
        self.templates: list[str] = []

    def pick(self, options: Sequence[T], name: str = "") -> T:
        """A random option by the plan, or by the telling where the options are sentences."""
        first = options[0]
        is_line = not name and isinstance(first, str) and " " in first and first[-1] in ".\u201d"
        kind = "line" if is_line else name or ("kind" if set(options) <= KINDS else "other")
        key = f"{self.plan}/{kind}/{self.counts[kind]}" + (f"/{self.telling}" if is_line else "")
        self.counts[kind] += 1
        self.rng = random.Random(key)
        return super().pick(options, name)

    def say(self, line: str) -> None:
        """Append a template, and remember where it starts."""
        self.starts.append(len(self.words))
        self.templates.append(line)
        super().say(line)


def retell_stories(
    n_stories: int, seed: int = 0
) -> tuple[tuple[Stories, Int[np.ndarray, "n_tokens"]], tuple[Stories, Int[np.ndarray, "n_other"]]]:
    """Stories and another telling of each, both with the number of each token's sentence; -1 for one told alike.

    Sentences with the same number say the same thing of the same people and things by different templates. ValueError
    for a negative number.

    >>> (stories, places), (others, other_places) = retell_stories(2)
    >>> set(places) == set(other_places), len(stories) == len(others)
    (True, True)
    """
    if n_stories < 0:
        raise ValueError(f"`n_stories` must not be negative, got {n_stories}.")
    pairs = [[_tell(f"{seed}/retold/{i}", telling) for telling in (0, 1)] for i in range(n_stories)]
    pairs = [pair for pair in pairs if len(pair[0].starts) == len(pair[1].starts)]
    told: list[list[np.ndarray]] = [[], []]
    n = 0
    for pair in pairs:
        differ = np.array([a != b for a, b in zip(pair[0].templates, pair[1].templates, strict=True)])
        numbers = np.where(differ, n + np.cumsum(differ) - 1, -1)
        n += int(differ.sum())
        for tale, parts in zip(pair, told, strict=True):
            lengths = np.diff(np.append(tale.starts, len(tale.words)))
            parts.append(np.concatenate([[-1], np.repeat(numbers, lengths), [-1]]))  # with BOS and EOS
    found = [
        (gather([pair[i] for pair in pairs], f"tales retold, seed {seed}, telling {i}"), np.concatenate(told[i]))
        for i in (0, 1)
    ]
    return found[0], found[1]


def _tell(plan: str, telling: int) -> Retelling:
    tale = Retelling(plan, telling)
    tale.generate()
    return tale
