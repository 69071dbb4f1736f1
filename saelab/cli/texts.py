"""Which documents a command reads: collecting from the start of a text, evaluating from its end."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from saelab.lm.models import Model
from saelab.lm.text import Row, read_rows
from saelab.lm.tokens import Tokens, tokenize


def read_head(
    model: Model, path: Path, n_tokens: int | None, ctx_len: int, bos: bool, separator: str, field: str
) -> Tokens:
    """The first `n_tokens` of a text; the source names the documents as a slice, such as `stories.txt[:120]`."""
    tokens = tokenize(model, path, ctx_len, n_tokens=n_tokens, bos=bos, separator=separator or None, field=field)
    return replace(tokens, source=f"{tokens.source}[:{_count_documents(tokens)}]")


def read_tail(
    model: Model, path: Path, n_tokens: int, ctx_len: int, bos: bool, separator: str, field: str
) -> tuple[Tokens, int]:
    """`n_tokens` from the last documents of a text, the last document first; and how many documents lie before those.

    The source is a slice from the end, such as `stories.txt[-120:]`.
    """
    if n_tokens < 1:
        raise ValueError(f"`--n-tokens` must be at least 1, got {n_tokens}.")
    n_documents = 0

    def counted() -> Iterator[Row]:
        nonlocal n_documents
        for document in read_rows(path, separator=separator or None, field=field):
            n_documents += 1
            yield document

    last = deque(counted(), maxlen=n_tokens)  # a document holds at least one token, so more are never needed
    tokens = tokenize(model, reversed(last), ctx_len, n_tokens=n_tokens, bos=bos)
    n_read = _count_documents(tokens)
    return replace(tokens, source=f"{path.name}[-{n_read}:]"), n_documents - n_read


def count_overlap(evaluated: Tokens, n_before: int, trained_text: str) -> int:
    """How many evaluated documents the SAE was also trained on, as far as the names of the two texts tell.

    `n_before` documents of the text lie before the evaluated ones; `trained_text` is the source in the SAE's
    provenance. 0 where that does not name a slice of the same file.
    """
    match = re.fullmatch(r"(.*)\[:(\d+)\]", trained_text)
    if match is None or match[1] != evaluated.source.rpartition("[")[0]:
        return 0
    return min(_count_documents(evaluated), max(0, int(match[2]) - n_before))


def _count_documents(tokens: Tokens) -> int:
    return int(tokens.doc_ids.max()) + 1
