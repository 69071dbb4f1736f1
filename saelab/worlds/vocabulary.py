"""The vocabulary of the synthetic stories, and its tokenizer in Hugging Face format."""

import re
from pathlib import Path
from typing import Any

from saelab.lm.wordlevel import SpecialWords, word_tokenizer
from saelab.worlds import lexicon as lex
from saelab.worlds import templates
from saelab.worlds.teller import CLOSE, OPEN

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
SPECIAL_WORDS = SpecialWords(bos=BOS, eos=EOS, pad=PAD, unk=UNK)


def _lexicon_words() -> set[str]:
    """Every word that a slot can write."""
    lists = [*lex.TOWNS, *lex.PLURALS, *lex.VEGETABLES, *lex.YOUNG.values(), *lex.HOMES.values(), *lex.DIRECTIONS]
    lists += [*lex.NUMBERS, *lex.PARTNERS, *lex.PARTNERS.values(), "soup", "stew", "girl", "boy", "a", "an", "A", "An"]
    lists += [line for town in lex.TOWNS.values() for line in town]
    lists += [name for names in lex.HEROES.values() for name in names]
    lists += [word for root, classes in lex.CLASSES.items() for word in (root, *classes, *classes.values())]
    axes = (*lex.AXES.values(), *lex.ONE_SIDED.values(), lex.DISTANCE)
    lists += [line for axis in axes for line in (*axis.words, *axis.results)]
    lists += [line for kinds in lex.MOODS.values() for line in kinds.values()]
    lists += [
        line for topic in lex.TOPICS.values() for line in (topic.places, topic.things, topic.workers, *topic.deeds)
    ]
    lists += [form for forms in lex.PRONOUNS.values() for word in forms.values() for form in (word, word.capitalize())]
    return {word for line in lists for word in line.split()}


def _template_words() -> set[str]:
    groups = [
        group for name, group in vars(templates).items() if name.isupper() and name not in ("BODY", "PRESENT", "FUTURE")
    ]
    return {word for group in groups for line in group for word in line.lstrip("+!").split()}


VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *sorted(word for word in _lexicon_words() | _template_words() if word[0] != "{"),
)
"""the word of each token id"""


def write_out(words: list[str]) -> str:
    """Words as running text, with normal spacing of punctuation and quotation marks.

    >>> write_out(["Once", ",", "he", "ran", "."])
    'Once, he ran.'
    """
    text = " ".join(words)
    return re.sub(f" ([.,?{CLOSE}])", r"\1", text).replace(OPEN + " ", OPEN)


def make_tokenizer() -> Any:
    """A word-level Hugging Face tokenizer over `VOCABULARY`; it decodes to the spacing of `write_out`."""
    return word_tokenizer(VOCABULARY, SPECIAL_WORDS, no_space_before=".,?" + CLOSE, no_space_after=OPEN)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a folder, such as a model's."""
    make_tokenizer().save_pretrained(folder)
