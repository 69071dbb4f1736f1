"""Prompts whose next word is forced, in pairs that differ in one draw: for patching, probing and steering."""

import random
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Int32
from torch import Tensor, tensor

from saelab.worlds.grammar import Tale
from saelab.worlds.lexicon import TOWNS
from saelab.worlds.vocabulary import BOS, VOCABULARY

Task = Literal["names", "facts"]


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Two prompts alike but for one draw, and the word that each forces next."""

    prompt: Int32[Tensor, "n"]
    """token ids, BOS first"""
    other_prompt: Int32[Tensor, "n"]
    answer: int
    """the token id that `prompt` forces"""
    other_answer: int
    differ_at: tuple[int, ...]
    """places in the prompts where they differ"""


def counterfactuals(task: Task, n: int, seed: int = 0) -> list[Counterfactual]:
    """Pairs of prompts with opposite answers.

    "names": two people meet, one gives something, and the next word is the other's name; the pairs differ in the giver.
    "facts": a town is named or shown, and the next word is its people, language, weather, food or name; the pairs
    differ in the town.

    >>> pair = counterfactuals("names", 1)[0]
    >>> len(pair.differ_at), pair.answer == pair.other_answer
    (1, False)
    """
    return [_make_pair(task, f"{seed}/{task}/{i}") for i in range(n)]


def _make_pair(task: Task, seed: str) -> Counterfactual:
    if task == "names":
        draws: tuple[dict[str, object], ...] = ({"special": "gift", "giver": 0}, {"special": "gift", "giver": 1})
    else:
        two = random.Random(seed + "/towns").sample(list(TOWNS), 2)
        draws = ({"special": "town", "town": two[0]}, {"special": "town", "town": two[1]})
    tales = [Tale(random.Random(seed), forced).tell() for forced in draws]
    end = _last_forced(tales[0], "receiver" if task == "names" else "fact")
    (ids, answer), (other_ids, other_answer) = (_cut(tale, end) for tale in tales)
    differ = (ids != other_ids).nonzero().squeeze(1).tolist()
    return Counterfactual(ids, other_ids, answer, other_answer, tuple(differ))


def _last_forced(tale: Tale, mark: str) -> int:
    """The last forced word of a kind in the first paragraph's sequel."""
    end = dict(reversed(tale.marks))["special end"]
    return max(place for name, place in tale.marks if name == mark and place < end)


def _cut(tale: Tale, end: int) -> tuple[Tensor, int]:
    ids = [VOCABULARY.index(word) for word in (BOS, *tale.words[:end], tale.words[end])]
    return tensor(ids[:-1]).int(), ids[-1]
