"""Prompts with a determined next word, in counterfactual pairs, for patching, probing and steering."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Int32
from torch import Tensor, tensor

from saelab.synthetic.grammar import NAMES, Tale
from saelab.synthetic.lexicon import HEROES, MOODS, PRONOUNS, TOWNS
from saelab.synthetic.vocabulary import BOS, VOCABULARY

TaskName = Literal["names", "facts", "mood", "gender"]
NAME_EDITS = ("receiver", "giver", "order", "roles")
LONGEST = 80
"""most words of a prompt of the tasks "mood" and "gender\""""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Two prompts that differ in one random choice, and the next token of each."""

    prompt: Int32[Tensor, "n"]
    """token ids, BOS first"""
    other_prompt: Int32[Tensor, "n"]
    answer: int
    """the token id that follows `prompt`"""
    other_answer: int
    """the token id that follows `other_prompt`"""
    differ_at: tuple[int, ...]
    """positions at which the prompts differ"""
    poles: tuple[str, str] | None = None
    """"glad" or "sad", "girl" or "boy", of the prompt and of the other; None for other tasks"""


def counterfactuals(task: TaskName, n: int, seed: int = 0) -> list[Counterfactual]:
    """Pairs of prompts that differ in one random choice, and in the next token.

    "names": two people meet, one gives something, and the next word is the other's name; the pairs differ in the giver.
    "facts": a town is named or described, and the next word is its people, language, weather, food or name; the pairs
    differ in the town. "mood": a word has told a mood, glad or sad, and the next word has it too. "gender": the story
    is of a girl or a boy, who has another name, and the next word is a pronoun. Of "names" and "facts" the prompt
    determines the next token; of the others it determines which of two the next token may be, but not that it is one.

    >>> pair = counterfactuals("names", 1)[0]
    >>> len(pair.differ_at), pair.answer == pair.other_answer
    (1, False)
    """
    make = _make_pole_pair if task in ("mood", "gender") else _make_pair
    return [make(task, f"{seed}/{task}/{i}") for i in range(n)]


def _make_pair(task: TaskName, seed: str) -> Counterfactual:
    if task == "names":
        draws: tuple[dict[str, object], ...] = ({"special": "gift", "giver": 0}, {"special": "gift", "giver": 1})
    else:
        two = random.Random(seed + "/towns").sample(list(TOWNS), 2)
        draws = ({"special": "town", "town": two[0]}, {"special": "town", "town": two[1]})
    tales = [Tale(random.Random(seed), forced).generate() for forced in draws]
    return _cut_pair(tales, _last_forced(tales[0], "receiver" if task == "names" else "fact"))


def _make_pole_pair(task: TaskName, seed: str) -> Counterfactual:
    """The first story of a seed, and its opposite, that have the pole again within reach."""
    for again in range(1000):
        rng = random.Random(f"{seed}/{again}")
        draws = [{"mood": mood} for mood in MOODS] if task == "mood" else _draw_genders(rng)
        rng.shuffle(draws)
        tales = [Tale(random.Random(f"{seed}/{again}/story"), forced).generate() for forced in draws]
        pairs = list(enumerate(zip(*(tale.words[: LONGEST + 1] for tale in tales), strict=False)))
        differ = [i for i, (word, other) in pairs if word != other]
        if task == "gender":
            pronouns = {word for words in PRONOUNS.values() for word in words.values()}
            told = [i for i in differ if tales[0].words[i].lower() in pronouns]
        else:
            told = differ[1:2]
        if told:
            poles = str(draws[0][task]), str(draws[1][task])
            return replace(_cut_pair(tales, rng.choice(told)), poles=poles)
    raise AssertionError(f"no story of a thousand has the {task} twice")


def _draw_genders(rng: random.Random) -> list[dict[str, object]]:
    friend = rng.choice(list(NAMES))
    return [
        {"gender": gender, "hero": rng.choice([name for name in names if name != friend]), "friend": friend}
        for gender, names in HEROES.items()
    ]


def _cut_pair(tales: Sequence[Tale], end: int) -> Counterfactual:
    (ids, answer), (other_ids, other_answer) = (_cut(tale, end) for tale in tales)
    differ = (ids != other_ids).nonzero().squeeze(1).tolist()
    return Counterfactual(ids, other_ids, answer, other_answer, tuple(differ))


def _last_forced(tale: Tale, mark: str) -> int:
    """Position of the last determined word of a kind in the passage after the first paragraph."""
    end = dict(reversed(tale.marks))["special end"]
    return max(place for name, place in tale.marks if name == mark and place < end)


def _cut(tale: Tale, end: int) -> tuple[Tensor, int]:
    ids = [VOCABULARY.index(word) for word in (BOS, *tale.words[:end], tale.words[end])]
    return tensor(ids[:-1]).int(), ids[-1]


@dataclass(frozen=True, eq=False)
class NamePrompt:
    """A prompt of the task "names" with its attributes."""

    ids: Int32[Tensor, "n"]
    """token ids, BOS first"""
    giver_at: int
    """position of the giver's name as subject of the giving; the last token precedes the receiver's name"""
    attributes: Mapping[str, str]
    """"giver" and "receiver": names; "order": which of them is named first where they meet"""

    @property
    def answer(self) -> int:
        """The id of the next token: the receiver's name."""
        return VOCABULARY.index(self.attributes["receiver"])

    @property
    def other_answer(self) -> int:
        """The id of the giver's name."""
        return VOCABULARY.index(self.attributes["giver"])


def name_edits(n: int, seed: int = 0) -> list[dict[str, NamePrompt]]:
    """Prompts of the task "names", each with counterfactual versions of the same length.

    Each is a dictionary by version; the unedited prompt is "original". "receiver" and "giver": that person has another
    name of the same gender throughout; "order": the two meet in the other order; "roles": giver and receiver are
    exchanged.

    >>> versions = name_edits(1)[0]
    >>> names = versions["original"].attributes, versions["roles"].attributes
    >>> names[0]["giver"] == names[1]["receiver"], names[0]["order"] == names[1]["order"]
    (True, False)
    """
    return [_edit_names(f"{seed}/name edits/{i}") for i in range(n)]


def _edit_names(seed: str) -> dict[str, NamePrompt]:
    rng = random.Random(seed + "/edits")
    giver = rng.choice((0, 1))  # the hero, or the friend
    original = {"special": "gift", "giver": giver}
    drawn = _generate_names(seed, original).attributes
    people = [drawn["giver"], drawn["receiver"]][:: 1 - 2 * giver]
    other = {p: rng.choice([name for name in HEROES[NAMES[p]] if name not in people]) for p in people}
    meets = drawn[drawn["order"]]
    original |= {"hero": people[0], "friend": people[1], "one": meets}
    changed = {"receiver": people[1 - giver], "giver": people[giver]}
    edits: dict[str, dict[str, object]] = {"original": original}
    for edit, person in changed.items():
        named = {"hero": people[0], "friend": people[1], "one": meets}
        edits[edit] = original | {slot: other[person] for slot, name in named.items() if name == person}
    edits["order"] = original | {"one": next(name for name in people if name != meets)}
    edits["roles"] = original | {"giver": 1 - giver}
    return {edit: _generate_names(seed, forced) for edit, forced in edits.items()}


def _generate_names(seed: str, forced: Mapping[str, object]) -> NamePrompt:
    tale = Tale(random.Random(seed), forced).generate()
    end = _last_forced(tale, "receiver")
    giver_at = max(place for name, place in tale.marks if name == "giver" and place < end)
    giver, receiver = tale.words[giver_at], tale.words[end]
    met = {name: max(i for i, word in enumerate(tale.words[:giver_at]) if word == name) for name in (giver, receiver)}
    order = "giver" if met[giver] < met[receiver] else "receiver"
    attributes = {"giver": giver, "receiver": receiver, "order": order}
    return NamePrompt(_cut(tale, end)[0], giver_at + 1, attributes)
