"""Inputs that commands open: documents, the SAE, its language model, folders to compare, concepts to steer.

Collecting reads documents from the start of a text, evaluating from its end.
"""

import re
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from saelab.cli import options
from saelab.cli.terminal import echo
from saelab.collecting.harvesting import harvest_untrained
from saelab.lm.documents import Row, read_rows
from saelab.lm.loading_guards import offline
from saelab.lm.model_checks import Model, find_context
from saelab.lm.models import load_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.sae.clt import CLT
from saelab.sae.compatibility import match_model
from saelab.sae.formats.registry import is_cross_layer
from saelab.sae.formats.sources import SAEFiles
from saelab.sae.pretrained import CONFIG
from saelab.sae.sae import SAE
from saelab.steering.baselines import write_own
from saelab.steering.target_concepts import TokenConcept, concept_from_words, synthetic_concept
from saelab.stores.feature_store import FeatureStore
from saelab.stores.manifest import Provenance
from saelab.stores.validation import read_json, require_object
from saelab.training.ranks import RankGrid

TEXT_TOKENS = 50_000
PATIENCE = timedelta(days=1)
"""How long a process waits for another, whose share of the features may take longer"""


def choose_device(name: str | None) -> torch.device:
    """The named device, or the accelerator where there is one; ValueError for one that this machine does not have."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name; known, but not on this machine
        raise ValueError(
            f"`--device` must be one that this machine has, got '{name}' ({str(error).splitlines()[0]})"
        ) from error


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


def open_model(
    store: FeatureStore, named: str | None, progress: bool, option: str = "--model", backend: str = "auto"
) -> "Model | None":
    """The model that is named, else the one that the store has; None, with a line on stderr, where that is gone, and
    without one where rows are documents, whose features promote no tokens.
    """
    processing = store.provenance.weight_processing
    if store.of_documents and named is None:
        return None
    if named is not None:
        return load_model(named, weight_processing=processing, backend=backend, progress=progress)
    recorded = store.provenance.model
    try:
        with offline():
            found = store.find_recorded(recorded)
            return load_model(found, weight_processing=processing, backend=backend, progress=progress)
    except (OSError, ValueError) as error:
        _leave_out(f"model '{recorded}'", error, option)
    return None


def load_recorded(store: FeatureStore, named: str | None, device: torch.device, backend: str = "auto") -> Model:
    """The model that is named, else the one that the store has, where that is on this machine."""
    processing = store.provenance.weight_processing
    if named is not None:
        return load_model(named, device=device, weight_processing=processing, backend=backend, progress=False)
    with offline():
        recorded = store.find_recorded(store.provenance.model)
        return load_model(recorded, device=device, weight_processing=processing, backend=backend, progress=False)


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
    store: FeatureStore,
    sae: str | None,
    model: str | None,
    progress: bool,
    option: str,
    ranks: RankGrid,
    backend: str = "auto",
) -> tuple[SAE, Model] | None:
    """The SAE and the model of a store, by name or as the store has them; None, with a line on stderr, where one is
    gone. ValueError where that is so in some processes only.
    """
    with ranks.together():
        coder = open_sae(store, sae)
        lm = open_model(store, model, progress and ranks.is_first, option, backend) if coder is not None else None
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


def announce(tokens: Tokens, n_before: int, origin: Provenance | None) -> None:
    """Say on stderr what is evaluated on, and how much of it the SAE has seen."""
    if origin and (n_both := count_overlap(tokens, n_before, origin.text)):
        echo(f"warning: the SAE was trained on {n_both:,} of these documents ({origin.text}).", err=True)
    echo(f"Evaluating on {tokens.n_tokens:,} tokens of {tokens.source}.", err=True)


def _count_documents(tokens: Tokens) -> int:
    return int(tokens.doc_ids.max()) + 1


def open_pair(sae: str, model: str, device: str | None, progress: bool, backend: str = "auto") -> tuple[SAE, Model]:
    """An SAE and its model, whose weights are processed as those that the SAE was trained on were."""
    chosen = choose_device(device)
    coder = SAE.from_pretrained(sae, device=chosen)
    processing = coder.provenance.weight_processing if coder.provenance else "none"
    lm = load_model(model, device=chosen, weight_processing=processing, backend=backend, progress=progress)
    return coder, lm


def open_several(
    saes: list[str], model: str, device: str | None, progress: bool, backend: str = "auto"
) -> tuple[list[SAE | CLT], Model]:
    """SAEs, transcoders and cross-layer transcoders of one model, and the model, whose weights are processed as those
    that they were trained on were.

    ValueError where they need differently processed ones.
    """
    chosen = choose_device(device)
    coders = [_open_coder(name, chosen) for name in saes]
    origins = [(coder.provenances or ()) if isinstance(coder, CLT) else (coder.provenance,) for coder in coders]
    needed = sorted({one.weight_processing for each in origins for one in each if one} or {"none"})
    if len(needed) > 1:
        raise ValueError(f"SAEs of one graph must be of one processing of the model's weights, got {needed}.")
    lm = load_model(model, device=chosen, weight_processing=needed[0], backend=backend, progress=progress)
    return coders, lm


def _open_coder(name: str, device: torch.device) -> SAE | CLT:
    place = Path(name).expanduser()
    if place.is_dir() and is_cross_layer(SAEFiles.open(place)):
        return CLT.from_pretrained(place, device=device)
    return SAE.from_pretrained(name, device=device)


def is_collected(path: str | Path) -> bool:
    """Whether a folder holds activations, of `saelab collect` or `saelab embed`."""
    manifest = Path(path) / "manifest.json"
    return manifest.is_file() and require_object(read_json(manifest), f"{manifest}").get("kind") == "activations"


def harvest_baseline(store: FeatureStore, out: Path, progress: bool, ranks: RankGrid) -> FeatureStore | None:
    """The same rows from an untrained dictionary, where the store's SAE and model are at hand."""
    opened = open_recorded(store, None, None, progress, "--model", ranks)
    if opened is None:
        return None
    try:
        return harvest_untrained(store, *opened, out, progress=progress, mesh=ranks.mesh)
    except Exception as error:  # whatever it was, all processes are here
        told = [text for text in ranks.gather_json(str(error) if isinstance(error, ValueError) else "") if text]
        if not told:
            raise
        echo(f"No untrained dictionary for comparison with {store.folder}: {told[0]}", err=True)
        return None


def open_dictionary(folder: Path) -> FeatureStore | SAE:
    """The store or SAE in a folder; FileNotFoundError where there is no folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"A and B must be folders of feature stores or SAEs, got '{folder}'. Check the name.")
    return SAE.from_pretrained(folder) if (folder / CONFIG).is_file() else FeatureStore.load(folder)


def open_placed(
    sae: str,
    model: str,
    hook_point: str | None,
    allow_mismatch: bool,
    device: str | None,
    progress: bool,
    backend: str = "auto",
) -> tuple[SAE, Model, str]:
    """The SAE, the model, and the place of the one in the other."""
    coder, lm = open_pair(sae, model, device, progress, backend)
    return coder, lm, match_model(coder, lm, hook_point, None, allow_mismatch).hook_point


def as_messages(texts: Sequence[str]) -> list[list[dict[str, str]]]:
    """Each text as a conversation of one message, the user's.

    >>> as_messages(["Hi"])
    [[{'role': 'user', 'content': 'Hi'}]]
    """
    return [[{"role": "user", "content": text}] for text in texts]


def read_concept(model: Model, words: str, first_token: bool) -> TokenConcept:
    """A concept of tales by its name, or one made of words."""
    if words.startswith(options.WORLD):
        return synthetic_concept(model, words.removeprefix(options.WORLD))
    found = concept_from_words(model, words, first_token=first_token)
    assert isinstance(found, TokenConcept)
    return found


def read_or_write(model: Model, text: Path | None, openings: list[str], seed: int, progress: bool) -> Tokens:
    """What directions are found in: texts of another seed than those that are measured, where none are given."""
    if text is None:
        return write_own(model, openings, seed + 1, progress=progress)
    length = min(options.CTX_LEN, find_context(model))
    return read_head(model, text, TEXT_TOKENS, length, True, options.SEPARATOR, options.FIELD)


@contextmanager
def share_temporary(ranks: RankGrid) -> Iterator[Path]:
    """Context with a temporary folder, which the first process makes and removes."""
    with ExitStack() as stack:

        def make() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))

        yield Path(ranks.on_first(make))
