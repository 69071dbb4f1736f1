"""The table of concepts of the synthetic stories, and the concepts of each word."""

from saelab.worlds import lexicon as lex
from saelab.worlds.lexicon import Concept

STATES = ["quote", "question", "past", "present", "future", "singular-subject", "plural-subject", "opening", "ending"]
ROLES = ["giver", "receiver", "first-mention"]
REGISTERS = ["recipe", "weather-report"]
RELATIONS = ["young-of", "home-of", "partner-of"]
FALLBACKS = ("punctuation", "function word", "plain word")
FEMALE = ["girl", "she", "her", "woman", "queen", "princess", "mother", "sister", "aunt"]
MALE = ["boy", "he", "his", "him", "man", "king", "prince", "father", "brother", "uncle"]
FUNCTION = [
    "a",
    "an",
    "the",
    "there",
    "was",
    "were",
    "is",
    "are",
    "be",
    "to",
    "of",
    "in",
    "on",
    "at",
    "with",
    "for",
    "so",
    "and",
    "that",
    "it",
    "they",
    "them",
    "this",
    "no",
    "not",
    "had",
    "has",
    "have",
    "i",
    "my",
    "who",
    "where",
    "some",
    "two",
    "every",
    "will",
    "then",
    "near",
    "under",
    "behind",
    "because",
    "once",
    "upon",
    "one",
    "what",
    "whose",
    "all",
    "such",
    "than",
]


def _nouns() -> list[Concept]:
    table = []
    for root, classes in lex.CLASSES.items():
        table.append(Concept(root, "root"))
        for name, words in classes.items():
            table.append(Concept(name, "class", parent=root))
            table += [Concept(word, "word", parent=name) for word in words.split()]
    return table


def _names() -> list[Concept]:
    table = [Concept("name", "root")]
    for gender, names in lex.HEROES.items():
        table.append(Concept(f"{gender} name", "class", parent="name"))
        table += [Concept(name, "word", parent=f"{gender} name") for name in names]
    return table


def _poles() -> list[Concept]:
    pairs = [axis.poles for axis in (*lex.AXES.values(), lex.DISTANCE)]
    pairs += [("glad", "sad"), ("female", "male")]
    table = [Concept(a, "pole", opposite=b) for pair in pairs for a, b in (pair, pair[::-1])]
    return table + [Concept(name, "one-sided") for name in lex.ONE_SIDED]


def _states() -> list[Concept]:
    opposite = {"past": "future", "future": "past"}
    opposite |= {"singular-subject": "plural-subject", "plural-subject": "singular-subject"}
    table = [Concept(name, "state", opposite=opposite.get(name)) for name in STATES]
    table += [
        Concept(f"story of a {a}", "state", opposite=f"story of a {b}") for a, b in (("girl", "boy"), ("boy", "girl"))
    ]
    table += [Concept(f"topic {name}", "topic", topic=name) for name in lex.TOPICS]
    table += [Concept(name, "role") for name in ROLES]
    table += [Concept(name, "register") for name in REGISTERS]
    table += [Concept(name, "relation") for name in RELATIONS]
    table += [Concept(f"about {town}", "fact") for town in lex.TOWNS]
    kinds = ("town", "people", "language", "young animal", "animal home", "weather")
    return table + [Concept(name, "class") for name in kinds] + [Concept(name, "grammar") for name in FALLBACKS]


CONCEPTS: tuple[Concept, ...] = (*_nouns(), *_names(), *_poles(), *_states())
CONCEPT_IDS = {concept.name: i for i, concept in enumerate(CONCEPTS)}


def concepts_of_word(word: str) -> tuple[str, ...]:
    """The concepts that a word has in every context, in any capitalization.

    >>> concepts_of_word("queen")
    ('queen', 'noble', 'person', 'female')
    """
    return _WORDS.get(word) or _WORDS.get(word.lower()) or _fallback(word.lower())


def _fallback(word: str) -> tuple[str, ...]:
    if not word.isalpha():
        return ("punctuation",)
    return ("function word",) if word in FUNCTION else ("plain word",)


def _word_concepts() -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for root, classes in lex.CLASSES.items():
        for name, members in classes.items():
            words |= {word: (word, name, root) for word in members.split()}
            words[name], words[root] = (name, root), (root,)
    singular = {"wolves": "wolf", "foxes": "fox"}
    words |= {plural: words[singular.get(plural, plural[:-1])] for plural in (*lex.PLURALS, *lex.VEGETABLES)}
    for axis in (*lex.AXES.values(), *lex.ONE_SIDED.values(), lex.DISTANCE):
        words |= {word: (pole,) for pole, listed in zip(axis.poles, axis.words, strict=True) for word in listed.split()}
    for gender, pole in (("girl", "female"), ("boy", "male")):
        words |= {name: (name, f"{gender} name", "name", pole) for name in lex.HEROES[gender]}
    for name, town in lex.TOWNS.items():
        words |= {name: ("town",), town.people: ("people",), town.language: ("language",), town.weather: ("weather",)}
    words |= dict.fromkeys(lex.YOUNG.values(), ("young animal",)) | dict.fromkeys(lex.HOMES.values(), ("animal home",))
    for pole, listed in (("female", FEMALE), ("male", MALE)):
        words |= {word: (*words.get(word, ()), pole) for word in listed}
    return words


_WORDS = _word_concepts()
