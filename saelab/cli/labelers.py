"""Parts of `saelab label`: predicates of rules, clients of language models, features to label, labels kept."""

import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.analysis.direct_logits import LogitLens, logit_lens
from saelab.cli.inputs import open_recorded, share_temporary
from saelab.cli.terminal import echo, make_printable
from saelab.collecting.harvesting import harvest_untrained, require_harvested
from saelab.labels.autointerp.clients import Client, LocalClient
from saelab.labels.autointerp.embeddings import Embedding
from saelab.labels.autointerp.endpoints import TIMEOUT, OpenAIClient
from saelab.labels.autointerp.response_cache import OfflineClient
from saelab.labels.autointerp.scorers import Scorer
from saelab.labels.encoders import SentenceEncoder
from saelab.labels.label import BOTH, Label
from saelab.labels.label_store import LabelStore
from saelab.labels.rules.predicates import N_PREDICATES, Predicate, Predicates, make_predicates
from saelab.labels.rules.rule_search import label_by_rules
from saelab.lm.models import load_model
from saelab.sae.compatibility import match_weights
from saelab.stores.feature_store import FeatureStore
from saelab.stores.validation import parse_json
from saelab.training.ranks import RankGrid

BUILTIN, LOCAL, RULES = "builtin", "local", "rules"


def read_predicates(store: FeatureStore, names: str, size: int = N_PREDICATES) -> Predicates:
    """The predicates of `--rules`: the built-in ones, those of files, or both."""
    parts = [part for part in names.split(",") if part]
    own = [predicate for part in parts if part != BUILTIN for predicate in _run_file(Path(part))]
    if not parts:
        raise ValueError(f"`--rules` must name {BUILTIN} or files, got '{names}'.")
    made = make_predicates(store, size=size, own=own)
    if BUILTIN in parts:
        return made
    return made.without(*set(made.kinds) - {predicate.kind for predicate in own})


def _run_file(path: Path) -> list[Predicate]:
    if not path.is_file():
        raise FileNotFoundError(f"`--rules` must name {BUILTIN} or files of Python, got '{path}'. Check its name.")
    try:
        found = runpy.run_path(str(path)).get("PREDICATES")
    except Exception as error:
        raise ValueError(f"{path} must run as Python, got {type(error).__name__}: {error}.") from error
    if not isinstance(found, list | tuple) or not all(isinstance(one, Predicate) for one in found):
        raise ValueError(f"{path} must have a list PREDICATES of `Predicate`, got {type(found).__name__}.")
    return list(found)


def choose_client(
    llm: str | None,
    model: str | None,
    prompts: Path | None,
    answers: Path | None,
    progress: bool,
    settings: Sequence[str] = (),
    timeout: float = TIMEOUT,
) -> Client | None:
    """Who answers prompts; None where no language model is asked for.

    Args:
        llm: address of an endpoint, or `local`; None is OpenAI's.
        model: name of the model there, or a folder.
        prompts: file for the prompts, in the place of an endpoint.
        answers: file of answers to such prompts.
        progress: show a progress bar while a local model loads.
        settings: as `read_settings` reads them.
        timeout: seconds to wait for a response.
    """
    if prompts is not None or answers is not None:
        if llm is not None:
            raise ValueError("Prompts must go to a file or to `--llm`, got both. Give one of them.")
        return OfflineClient(answers, name=model) if model is not None else OfflineClient(answers)
    return open_client(llm, model, progress, settings=read_settings(settings), timeout=timeout)


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """The settings of `--setting NAME=VALUE`: values are JSON where they can be read as such, None where empty.

    >>> read_settings(["max_tokens=2048", "reasoning_effort=low", "temperature="])
    {'max_tokens': 2048, 'reasoning_effort': 'low', 'temperature': None}
    """
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise ValueError(f"`--setting` must be NAME=VALUE, or NAME= for a setting that is not sent, got '{one}'.")
        try:
            found[name] = parse_json(value) if value else None
        except ValueError:
            found[name] = value
    return found


def choose_scorers(names: Sequence[str], encoder: str | None) -> list[str | Scorer]:
    """Scorers by name; `embedding` compares by the encoder of a name or folder."""
    if Embedding.name in names and encoder is None:
        raise ValueError(f"The scorer `{Embedding.name}` needs `--encoder`, the name of a sentence-transformers model.")
    return [Embedding(SentenceEncoder(str(encoder))) if name == Embedding.name else name for name in names]


def open_client(
    llm: str | None,
    model: str | None,
    progress: bool,
    option: str = "--model",
    settings: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
) -> Client | None:
    """Client of a language model that labels features; None where none is named.

    Args:
        llm: address of an endpoint, or `local`; None is OpenAI's.
        model: name of the model there, or a folder.
        progress: show a progress bar while a local model loads.
        option: the option that `model` comes from.
        settings: sent with each request, besides the client's own or in their place.
        timeout: seconds to wait for a response.
    """
    if model is None:
        if llm is not None:
            raise ValueError(f"`--llm` needs `{option}`, the name of a language model there, got '{llm}' alone.")
        return None
    if llm == LOCAL:
        if unknown := sorted(set(settings or ()) - {"max_tokens"}):
            raise ValueError(f"A local model takes the setting max_tokens alone, got {', '.join(unknown)}.")
        length = {"n_tokens": settings["max_tokens"]} if settings and settings["max_tokens"] else {}
        return LocalClient(load_model(model, progress=progress), **length)
    return OpenAIClient(model, llm, timeout=timeout, settings=settings)


def find_wanted(
    store: FeatureStore, author: str, numbers: list[int] | None, resume: bool, scored: bool = True
) -> list[int] | None:
    """The features to label: with `--resume` those of which a side that fires lacks a label, or its scores."""
    if not resume:
        return numbers
    with LabelStore.open(store) as book:
        done = {
            (one.feature, one.sign)
            for one in book.labels()
            if one.author == author and (one.scores or not scored or not one.text)
        }
    fires = store.statistics.fires
    sides = {sign: fires[:, column] for column, sign in enumerate((1, -1))} if store.signed else {BOTH: fires.sum(1)}
    asked = range(store.d_sae) if numbers is None else numbers
    return [j for j in asked if any(counts[j] and (j, sign) not in done for sign, counts in sides.items())]


@contextmanager
def open_floor(
    store: FeatureStore, sae: str | None, model: str | None, progress: bool, ranks: RankGrid, backend: str = "auto"
) -> Iterator[FeatureStore | None]:
    """The same rows from an untrained dictionary, for a while; None where the store's SAE and model are not at hand."""
    if store.of_documents:
        raise ValueError(
            "`--untrained` must be of a store of tokens, got one of documents. Make their baseline in Python: "
            "`harvest_untrained` takes their activations."
        )
    opened = open_recorded(store, sae, model, progress, "--lens-model", ranks, backend)
    if opened is None:
        yield None
        return
    with share_temporary(ranks) as folder:
        yield harvest_untrained(store, *opened, folder / "untrained", progress=progress, mesh=ranks.mesh)


def keep_rules(
    store: FeatureStore,
    names: str,
    size: int,
    n_tokens: int,
    wanted: list[int] | None,
    lens: LogitLens | None,
    untrained: FeatureStore | None,
    ranks: RankGrid,
) -> None:
    """Label features by rules on some of the tokens, and keep the labels."""
    with ranks.together():
        part, other = store.spread(n_tokens), None if untrained is None else untrained.spread(n_tokens)
        predicates = read_predicates(part, names, size)
    if wanted == []:
        echo(f"No feature is left to label by {RULES}.", err=True)
        return
    found = label_by_rules(part, predicates, features=wanted, lens=lens, untrained=other, mesh=ranks.mesh)
    ranks.on_first(lambda: keep(part, found.labels(), str(found), afresh=True))


def read_lens(
    store: FeatureStore,
    wanted: list[int] | None,
    sae: str | None,
    model: str | None,
    progress: bool,
    ranks: RankGrid,
    backend: str = "auto",
) -> LogitLens | None:
    """What features promote, where the store's SAE and model are at hand; those of documents promote no tokens."""
    if store.of_documents and model is None:
        return None
    opened = open_recorded(store, sae, model, progress, "--lens-model", ranks, backend)
    if opened is None:
        return None
    coder, lm = opened
    with ranks.together():
        require_harvested(store, coder)
        match_weights(store.provenance, lm)
    return logit_lens(coder, lm, wanted, allow_mismatch=True, mesh=ranks.mesh)


def keep(store: FeatureStore, labels: Sequence[Label], summary: str, afresh: bool = False) -> None:
    """Add labels to the database and print a summary."""
    with LabelStore.open(store) as book:
        n = book.add(labels, afresh=afresh)
        echo("\n".join(map(make_printable, summary.split("\n"))))
        echo(f"{n:,} labels added to {book.path}.")


def exchange(client: OfflineClient, prompts: Path | None) -> None:
    """Write the prompts without an answer, and report which answers belong to which prompts."""
    if prompts is not None:
        echo(f"{client.export(prompts):,} prompts in {prompts}.")
    echo(str(client.report()))
