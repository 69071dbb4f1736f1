"""A word-level tokenizer in Hugging Face format, for models whose vocabulary is a list of words."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class SpecialWords(NamedTuple):
    """Words of the vocabulary that are special tokens."""

    bos: str
    eos: str
    pad: str
    unk: str


def word_tokenizer(words: Sequence[str], special: SpecialWords, *, no_space_before: str, no_space_after: str) -> Any:
    """A `PreTrainedTokenizerFast` whose token i is `words[i]`; texts begin with BOS.

    Words are runs of letters and digits; every other character is a token of its own. Decoding puts one space between
    tokens, with the exceptions below.

    Args:
        words: the vocabulary in order of ids, special tokens included.
        special: which of the words are BOS, EOS, padding and the unknown token.
        no_space_before: characters that are decoded without a space before them.
        no_space_after: characters that are decoded without a space after them.

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
