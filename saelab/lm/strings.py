"""How tokens read, one by one, with the spaces that belong to them."""

from collections.abc import Iterable
from typing import Any


def token_strings(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """The text that each token adds after another: "the" in the middle of a sentence reads " the".

    Decoding a token alone would lose the space that some tokenizers keep apart, so each is decoded behind an anchor,
    whose own text is cut off. Special tokens read as they are written.

    >>> tokenizer = sl.tiny_model().tokenizer
    >>> list(token_strings(tokenizer, tokenizer("hi")["input_ids"]).values())
    ['<s>', 'h', 'i']
    """
    ids = sorted({int(i) for i in token_ids})
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **settings)
    texts = tokenizer.batch_decode([[*anchor, i] for i in ids], **settings)
    alone = tokenizer.batch_decode([[i] for i in ids], **settings)
    return {
        i: text[len(before) :] if text.startswith(before) else by_itself
        for i, text, by_itself in zip(ids, texts, alone, strict=True)
    }
