"""A word-level tokenizer in Hugging Face format, for models whose vocabulary is a list of words."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class SpecialWords(NamedTuple):
    """Words of the vocabulary that are no text."""

    bos: str
    eos: str
    pad: str
    unk: str


def word_tokenizer(words: Sequence[str], special: SpecialWords, *, no_space_before: str, no_space_after: str) -> Any:
    """A `PreTrainedTokenizerFast` whose token i is `words[i]`; texts begin with BOS.

    Words are runs of letters and digits; every other mark is a token. Decoding puts one space between tokens, but none
    before the marks in `no_space_before` and none after those in `no_space_after`.

    >>> words = ["<pad>", "<bos>", "<eos>", "<unk>", "Hello", "you", "."]
    >>> special = SpecialWords("<bos>", "<eos>", "<pad>", "<unk>")
    >>> tokenizer = word_tokenizer(words, special, no_space_before=".", no_space_after="")
    >>> tokenizer("Hello you.").input_ids, tokenizer.decode([4, 5, 6])
    ([1, 4, 5, 6], 'Hello you.')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special.unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    joined = [decoders.Replace(f" {mark}", mark) for mark in no_space_before]
    joined += [decoders.Replace(f"{mark} ", mark) for mark in no_space_after]
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), *joined])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special.bos} $A", special_tokens=[(special.bos, words.index(special.bos))]
    )
    names = {f"{name}_token": word for name, word in special._asdict().items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)
