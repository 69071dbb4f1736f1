"""Inputs that several commands share: documents, the SAE, its language model; and printing to the terminal.

Collecting reads documents from the start of a text, evaluating from its end.
"""

import re
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer

from saelab.cli import options
from saelab.lm.documents import Row, read_rows
from saelab.lm.model_checks import Model
from saelab.lm.models import load_model, offline
from saelab.lm.tokens import Tokens, tokenize
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import printable
from saelab.training.launch import name_process
from saelab.training.ranks import RankGrid

PATIENCE = timedelta(days=1)
"""How long a process waits for another, whose share of the features may take longer"""


def read_numbers(given: str | None) -> list[int] | None:
    """The numbers of `--features`; None where it is not given."""
    if given is None:
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"`--features` must be numbers joined by commas, got '{given}'.") from None


def _leave_out(what: str, error: Exception, option: str) -> None:
    reason = " ".join(str(error).split())[:200]
    echo(f"The {what} could not be opened ({reason}). What rests on it is left out: give {option}.", err=True)


def open_model(store: FeatureStore, named: str | None, progress: bool, option: str = "--model") -> "Model | None":
    """The model that is named, else the one that the store has; None, with a line on stderr, where that is gone."""
    processing = store.provenance.weight_processing
    if named is not None:
        return load_model(named, weight_processing=processing, progress=progress)
    recorded = store.provenance.model
    try:
        with offline():
            return load_model(store.find_recorded(recorded), weight_processing=processing, progress=progress)
    except (OSError, ValueError) as error:
        _leave_out(f"model '{recorded}'", error, option)
    return None


def open_sae(store: FeatureStore, named: str | None) -> SAE | None:
    """The SAE that is named, else the one that the store has; None, with a line on stderr, where that is gone."""
    if named is not None:
        return SAE.from_pretrained(named)
    recorded = store.manifest.sae.get("name_or_path") or ""
    try:
        if not recorded:
            raise ValueError("it was harvested before it was saved")
        with offline():
            return SAE.from_pretrained(store.find_recorded(recorded))
    except (OSError, ValueError) as error:
        _leave_out(f"SAE '{recorded}'", error, "--sae")
    return None


def open_recorded(
    store: FeatureStore, sae: str | None, model: str | None, progress: bool, option: str, ranks: RankGrid
) -> tuple[SAE, Model] | None:
    """The SAE and the model of a store, by name or as the store has them; None, with a line on stderr, where one is
    gone. ValueError where that is so in some processes only.
    """
    with ranks.together():
        coder = open_sae(store, sae)
        lm = open_model(store, model, progress and ranks.is_first, option) if coder is not None else None
    ranks.require_equal({"SAE and model of the store at hand": coder is not None and lm is not None})
    return None if coder is None or lm is None else (coder, lm)


def read_head(
    model: Model,
    path: Path,
    n_tokens: int | None,
    ctx_len: int,
    bos: bool,
    separator: str,
    field: str,
    mesh: Any = None,
) -> Tokens:
    """The first `n_tokens` of a text, of which the processes of a mesh tokenize a share each; the source names the
    documents as a slice, such as `stories.txt[:120]`.
    """
    tokens = tokenize(
        model, path, ctx_len, n_tokens=n_tokens, bos=bos, separator=separator or None, field=field, mesh=mesh
    )
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
    """How many evaluated documents the SAE was also trained on, as far as the names of the two texts show.

    `n_before` documents of the text lie before the evaluated ones; `trained_text` is the source in the SAE's
    provenance. 0 where that does not name a slice of the same file.
    """
    match = re.fullmatch(r"(.*)\[:(\d+)\]", trained_text)
    if match is None or match[1] != evaluated.source.rpartition("[")[0]:
        return 0
    return min(_count_documents(evaluated), max(0, int(match[2]) - n_before))


def _count_documents(tokens: Tokens) -> int:
    return int(tokens.doc_ids.max()) + 1


def open_pair(sae: str, model: str, device: str | None, progress: bool) -> tuple[SAE, Model]:
    """An SAE and its model, whose weights are processed as those that the SAE was trained on were."""
    chosen = options.choose_device(device)
    coder = SAE.from_pretrained(sae, device=chosen)
    processing = coder.provenance.weight_processing if coder.provenance else "none"
    return coder, load_model(model, device=chosen, weight_processing=processing, progress=progress)


def find_base(cls: type, name: str) -> Any:
    """The class called `name` among those that a class of typer is made from: typer keeps click's to itself.

    ImportError where there is none.
    """
    for base in cls.__mro__[1:]:
        if base.__name__ == name:
            return base
    raise ImportError(
        f"`{cls.__name__}` of typer must be made from a class `{name}`, got version {typer.__version__}, where it is "
        "not. Take a release that saelab was tested with (see README)."
    )


def echo(text: str, err: bool = False, always: bool = False) -> None:
    """Print a text, on stderr with `err`; what a terminal would obey in it, whoever wrote it, is shown as its code.

    Of several processes the first prints, with `always` this one, too.
    """
    if always or not name_process():
        typer.echo(printable(text), err=err)


@contextmanager
def share_temporary(ranks: RankGrid) -> Iterator[Path]:
    """Context with a temporary folder, which the first process makes and removes."""
    with ExitStack() as stack:

        def make() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))

        yield Path(ranks.on_first(make))
