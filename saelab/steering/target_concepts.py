"""Target concepts of steering: a set of tokens, or a function that scores texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeAlias

from saelab.lm.documents import list_prompts
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import find_special_ids, token_strings
from saelab.synthetic.lexicon import MOODS
from saelab.synthetic.tales import CONCEPT_IDS, concepts_of_word
from saelab.synthetic.vocabulary import SPECIAL, VOCABULARY


@dataclass(frozen=True)
class TokenConcept:
    """A target concept given as the set of token ids that express it."""

    name: str
    ids: tuple[int, ...]
    """in increasing order, each once"""


@dataclass(frozen=True, eq=False)
class ScoredConcept:
    """A target concept given as a function from texts to scores, such as a classifier's probability; best in [0, 1]."""

    name: str
    scorer: Callable[[list[str]], Sequence[float]]
    """takes generated texts without their prompts, returns one finite number for each"""


TargetConcept: TypeAlias = TokenConcept | ScoredConcept
ConceptLike: TypeAlias = TargetConcept | str | Iterable[str] | Callable[[list[str]], Sequence[float]]
"""A concept, its words (a list, or one string separated by commas), or a function from texts to scores"""


def concept_from_words(
    model: AnyModel, target: ConceptLike, name: str = "", *, first_token: bool = False
) -> TargetConcept:
    """The target concept for a list of words or a scoring function.

    A word stands for every token that spells it, in any capitalization, with or without a leading space.

    Args:
        model: language model whose vocabulary is searched.
        target: a concept (returned as it is, but for its name), words (a list, or one string separated by commas), or a
            function from texts to scores. A function receives the generated texts without their prompts and returns one
            number for each.
        name: name of the concept; by default the concept's own, the first three words, or the function's name.
        first_token: accept words of several tokens and use the first token of each, with which other words may begin,
            too.

    Raises:
        ValueError: for a word that is no single token of the model (unless `first_token`); the message names it.

    >>> concept_from_words(sl.lm.tiny_model(), "a,b").ids
    (35, 36, 67, 68)
    """
    model = as_model(model)
    return make_concepts(model, {name: target}, first_token=first_token)[0]


def make_concepts(
    model: Model, targets: Mapping[str, ConceptLike], *, first_token: bool = False
) -> list[TargetConcept]:
    """`concept_from_words` for several targets by name, reading the vocabulary once; concepts take the names given
    here.
    """
    found: list[TargetConcept] = []
    reads: dict[str, list[int]] = {}
    for name, target in targets.items():
        if isinstance(target, TokenConcept | ScoredConcept):
            found.append(replace(target, name=name or target.name))
        elif callable(target):
            found.append(ScoredConcept(name or getattr(target, "__name__", "score"), target))
        else:
            reads = reads or _read_vocabulary(model)
            words = [word for part in list_prompts(target, "Words", conversations=False) for word in part.split(",")]
            found.append(_gather(model, reads, [word.strip() for word in words if word.strip()], name, first_token))
    return found


def synthetic_concept(model: AnyModel, name: str) -> TokenConcept:
    """A concept of the synthetic stories (`tales`) as the words that always mean it; for a model of their vocabulary.

    ValueError for an unknown concept, and for one that no word means by itself.

    >>> concept = synthetic_concept(sl.load_model("tales", progress=False), "hot")
    >>> len(concept.ids)
    3
    """
    model = as_model(model)
    if name not in CONCEPT_IDS:
        raise ValueError(f"`name` must be a concept of tales, got '{name}'; near it are {_near(name, CONCEPT_IDS)}.")
    words = [word for kind in MOODS.get(name, {}).values() for word in kind.split()]
    words += [word for word in VOCABULARY[len(SPECIAL) :] if name in concepts_of_word(word)]
    if not words:
        raise ValueError(f"A concept must have words of its own, '{name}' is a state that any word can stand in.")
    found = concept_from_words(model, words, name)
    assert isinstance(found, TokenConcept)
    return found


def _read_vocabulary(model: Model) -> dict[str, list[int]]:
    """Token ids by lower-cased text without surrounding spaces; special and unknown tokens are left out."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ValueError("Words need a model with a tokenizer, got one without; give the ids as a `TokenConcept`.")
    left_out = {*find_special_ids(model), tokenizer.unk_token_id}
    reads: dict[str, list[int]] = {}
    for i, text in token_strings(tokenizer, range(min(len(tokenizer), model.cfg.d_vocab))).items():
        if i not in left_out and text.strip():
            reads.setdefault(text.strip().casefold(), []).append(i)
    return reads


def _gather(
    model: Model, reads: dict[str, list[int]], words: Sequence[str], name: str, first_token: bool
) -> TokenConcept:
    if not words:
        raise ValueError("A concept must have at least one word, got none.")
    ids = {word: reads.get(word.casefold(), []) or (_first_ids(model, word) if first_token else []) for word in words}
    if bad := [word for word, found in ids.items() if not found]:
        more = "" if first_token else ", or give `first_token=True` to count the tokens that they begin with"
        near = {word: _near(word.casefold(), reads) for word in bad[:3]}
        raise ValueError(
            f"The words of a concept must be single tokens of the model, got {bad[:5]} ({len(bad)} of {len(words)} "
            f"are not); leave them out{more}. Tokens like them: {near}."
        )
    named = name or (",".join(words[:3]) + (",..." if len(words) > 3 else ""))
    return TokenConcept(named, tuple(sorted({i for found in ids.values() for i in found})))


def _first_ids(model: Model, word: str) -> list[int]:
    """First token of a word, with and without a leading space."""
    tokenizer: Any = model.tokenizer
    found = []
    for spelling in (word, " " + word):
        ids = tokenizer(spelling, add_special_tokens=False)["input_ids"]
        strings = token_strings(tokenizer, ids)
        found += [i for i in ids if strings[i].strip() and i != tokenizer.unk_token_id][:1]
    return found


def _near(word: str, known: Iterable[str]) -> list[str]:
    return get_close_matches(word, list(known), n=5)
