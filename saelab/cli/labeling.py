"""`saelab label` and `saelab labels`: label the features of a store, and search, read and edit its labels.

Labels come from rules on tokens or from a language model, and are kept in the store's label store.
"""

import getpass
import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from saelab.analysis.direct_logits import LogitLens, logit_lens
from saelab.cli import options
from saelab.cli.inputs import PATIENCE, echo, find_base, open_recorded, read_numbers, share_temporary
from saelab.collecting.harvesting import harvest_untrained, require_harvested
from saelab.labels.autointerp.clients import Client, LocalClient, OpenAIClient
from saelab.labels.autointerp.explainers import estimate_labels, explain_features
from saelab.labels.autointerp.requests import RequestConfig
from saelab.labels.autointerp.response_cache import OfflineClient
from saelab.labels.label import BOTH, FORMATS, MARKS, Label, describe_origin, name_format
from saelab.labels.label_store import LabelStore
from saelab.labels.rules.predicates import N_PREDICATES, Predicate, Predicates, make_predicates
from saelab.labels.rules.rule_search import N_TOKENS, label_by_rules
from saelab.lm.models import load_model
from saelab.sae.compatibility import match_weights
from saelab.stores.feature_store import FeatureStore
from saelab.stores.jobs import hold_folder
from saelab.training.launch import launched
from saelab.training.ranks import RankGrid

if TYPE_CHECKING:
    from typer import Context
else:
    Context = find_base(typer.Context, "Context")  # what a command is given

FeatureNumber = Annotated[int, Argument(metavar="FEATURE", help="Number of the feature.")]
Author = Annotated[str, Argument(metavar="AUTHOR", help="Whose label; `show` lists the authors.")]
Sign = Annotated[int, Option(metavar="SIGN")]
BUILTIN, LOCAL, RULES = "builtin", "local", "rules"
SCORERS = ",".join(options.default_of(explain_features, "scorers"))


def open_book(context: Context, store: options.StoreFolder) -> None:
    """Search, read and write the labels of a store's features.

    They are in labels.sqlite in the store's folder. A label chosen by a person takes precedence over those of rules and
    models. Without a command: how many there are.
    """
    context.obj = store
    if context.invoked_subcommand is None:
        echo(make_printable(str(_open(context))))


def find_labels(
    context: Context,
    text: Annotated[
        str, Argument(metavar="TEXT", help="Words that the label has, as they are, longer or in another form.")
    ],
    every: Annotated[bool, Option("--all", help="Labels that are not chosen, too.")] = False,
    top: Annotated[int, Option(help="Labels to show.")] = 20,
) -> None:
    """Find features by their labels, the best first."""
    _print(_open(context).search(text, every=every), top)


def show_labels(context: Context, feature: FeatureNumber) -> None:
    """Show all labels of a feature; of each side the chosen one is marked by *."""
    book = _open(context)
    chosen = book.chosen(feature)
    for label in book.labels(feature):
        echo(f"{'*' if label in chosen else ' '} {_describe(label)}")
    if not chosen:
        echo(f"Feature {feature} has no label.", err=True)


@options.documented_by(LabelStore.set)
def set_label(
    context: Context,
    feature: FeatureNumber,
    text: Annotated[str, Argument(metavar="TEXT")],
    sign: Sign = BOTH,
    author: Annotated[str | None, Option(metavar="NAME", show_default="your user name")] = None,
) -> None:
    """Give a feature a label and choose it; it stays chosen until a person chooses another."""
    echo(_describe(_open(context).set(feature, text, author=author or getpass.getuser(), sign=sign)))


@options.documented_by(LabelStore.set)
def choose_label(context: Context, feature: FeatureNumber, author: Author, sign: Sign = BOTH) -> None:
    """Choose the newest label of an author; it stays chosen until a person chooses another."""
    echo(_describe(_open(context).choose(feature, author, sign=sign)))


@options.documented_by(LabelStore.set)
def delete_labels(context: Context, feature: FeatureNumber, author: Author, sign: Sign = BOTH) -> None:
    """Delete an author's labels of a feature."""
    n = _open(context).delete(feature, author=author, sign=sign)
    echo(f"{n} label{'' if n == 1 else 's'} deleted.")


@options.documented_by(LabelStore.save)
def export_labels(
    context: Context,
    file: Annotated[Path, Argument(metavar="FILE", help="File for the labels; an ending .gz compresses it.")],
    form: Annotated[
        str | None,
        Option("--format", help=f"{', '.join(FORMATS)}.", metavar="NAME", show_default="by the file's ending"),
    ] = None,
    model_id: Annotated[str, Option(metavar="NAME", show_default="the store's")] = "",
    source_id: Annotated[str, Option(metavar="NAME", show_default="the store's hook point")] = "",
) -> None:
    """Write all labels to a file: JSON, CSV, or Neuronpedia's explanation records, one per line."""
    if form is not None and form not in FORMATS:
        raise ValueError(f"`--format` must be one of {', '.join(FORMATS)}, got '{form}'.")
    labels = _open(context)
    n = labels.save(file, form or name_format(file), model_id=model_id, source_id=source_id)
    left_out = len(labels.labels()) - n
    more = f" Left out: {left_out:,} that say that there is no good name." if left_out else ""
    echo(f"{n:,} labels in {file}.{more}")


def import_labels(
    context: Context,
    file: Annotated[
        Path, Argument(metavar="FILE", help="What `export` wrote, Neuronpedia's records, or a table as CSV.")
    ],
) -> None:
    """Add the labels of a file; earlier choices by a person are kept."""
    echo(f"{_open(context).load(file):,} labels added.")


VERBS: dict[str, Callable[..., None]] = {
    "search": find_labels,
    "show": show_labels,
    "set": set_label,
    "choose": choose_label,
    "delete": delete_labels,
    "export": export_labels,
    "import": import_labels,
}


def _open(context: Context) -> LabelStore:
    """Label database of the store, closed when the command ends."""
    return context.with_resource(LabelStore.open(context.obj))


def make_printable(text: str) -> str:
    r"""Text with what would steer a terminal spelt out.

    >>> make_printable("\x1b[2J")
    '\\x1b[2J'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _describe(label: Label) -> str:
    return make_printable(
        f"{label.feature:>6} {MARKS[label.sign]}{label.text} ({label.kind}, {describe_origin(label)})"
    )


def _print(labels: Sequence[Label], top: int) -> None:
    for label in labels[:top]:
        echo(_describe(label))
    if not labels:
        echo("No label.", err=True)
    elif len(labels) > top:
        echo(f"{len(labels) - top:,} more: give --top {len(labels)}.", err=True)


@options.documented_by(RequestConfig, parallel="n_parallel")
def label_features(
    store: options.StoreFolder,
    rules: Annotated[
        str | None,
        Option(
            help="Predicates of rules, joined by commas: `builtin`, and files of Python whose PREDICATES lists your "
            "own, which are run.",
            metavar="NAMES",
            show_default="builtin, where no language model is asked",
        ),
    ] = None,
    predicates: Annotated[int, Option(help="Approximate number of built-in predicates.", metavar="N")] = N_PREDICATES,
    rule_tokens: Annotated[
        int, Option(help="Tokens that rules are chosen and scored on; of a longer text, spread.", metavar="N")
    ] = N_TOKENS,
    untrained: Annotated[
        bool,
        Option(
            "--untrained/--no-untrained",
            help="Label an untrained dictionary of the same shape, too, which reads the text again and, of a language "
            "model, asks for as much again.",
        ),
    ] = False,
    lens: Annotated[
        bool, Option("--lens/--no-lens", help="Try the tokens that features promote as rules, too, or not.")
    ] = True,
    sae: options.StoreSAE = None,
    lens_model: Annotated[
        str | None,
        Option(help="The language model whose features they are.", metavar="MODEL", show_default="as the store has it"),
    ] = None,
    llm: Annotated[
        str | None,
        Option(
            help="URL of an OpenAI-compatible endpoint, or `local` for a model on this machine; the key is read from "
            "OPENAI_API_KEY.",
            metavar="URL",
            show_default="OpenAI's, where --model is given",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(help="The language model that labels and scores.", metavar="NAME", show_default="none is asked"),
    ] = None,
    scorers: Annotated[str, Option(help="Scorers of its labels, joined by commas.", metavar="NAMES")] = SCORERS,
    budget: Annotated[float | None, Option(show_default="no limit")] = None,
    price_in: Annotated[float | None, Option(show_default="unknown")] = None,
    price_out: Annotated[float | None, Option(show_default="unknown")] = None,
    parallel: int = RequestConfig.n_parallel,
    estimate: Annotated[bool, Option("--estimate", help="Estimate requests and cost, and request nothing.")] = False,
    features: options.FeatureList = None,
    resume: Annotated[
        bool, Option("--resume", help="Leave out features whose sides have scored labels of the same author.")
    ] = False,
    export_prompts: Annotated[
        Path | None, Option(help="File for the prompts without an answer.", metavar="FILE", show_default="none")
    ] = None,
    import_answers: Annotated[
        Path | None, Option(help="File of answers to such prompts.", metavar="FILE", show_default="none")
    ] = None,
    progress: options.Progress = True,
) -> None:
    """Label the features of a store, by rules or by a language model; labels are kept in its folder.

    Without a language model by rules: the best one for each side of a feature, on documents that it was not chosen on.
    With --model by a language model, which scores them too. Its answers are kept: a run that was interrupted, or that
    used up its budget, continues when the same command is run again. With --export-prompts and --import-answers the
    language model may be anywhere: prompts of scores come once the labels are there.

    Several processes share the features: torchrun --nproc-per-node 4 -m saelab label ...
    """
    with launched(None, options.choose_device(None), PATIENCE) as (ranks, _), ExitStack() as stack:
        with ranks.together():
            opened, numbers = FeatureStore.load(store), read_numbers(features)
            if bad := [j for j in numbers or () if not 0 <= j < opened.d_sae]:
                raise ValueError(f"`--features` must be in 0..{opened.d_sae - 1}, got {bad[:5]}.")
            client = _choose_client(llm, model, export_prompts, import_answers, progress and ranks.is_first)
            if estimate and client is None:
                raise ValueError("`--estimate` needs `--model`: rules cost nothing.")
            cfg = RequestConfig(n_parallel=parallel, budget=budget, price_in=price_in, price_out=price_out)
        if not estimate:
            ranks.on_first(lambda: stack.enter_context(hold_folder(store)))
        by_rules, names = rules is not None or client is None, [name for name in scorers.split(",") if name]

        def choose() -> str:
            author = client.name if client is not None else ""
            named = _wanted(opened, author, numbers, resume, bool(names)) if client is not None else []
            return json.dumps([_wanted(opened, RULES, numbers, resume) if by_rules else [], named])

        wanted, asked_of = json.loads(ranks.on_first(choose))
        floor = untrained and not estimate and (wanted != [] or asked_of != [])
        made = _open_floor(opened, sae, lens_model, progress, ranks) if floor else nullcontext()
        baseline = stack.enter_context(made)
        if by_rules:
            found = _read_lens(opened, wanted, sae, lens_model, progress, ranks) if lens and wanted != [] else None
            _by_rules(opened, rules or BUILTIN, predicates, rule_tokens, wanted, found, baseline, ranks)
        if client is None:
            return
        asked: dict[str, Any] = {"signs": (1, -1) if opened.signed else (BOTH,), "scorers": names, "asking": cfg}
        if asked_of == []:
            echo(f"No feature is left to label by {client.name}.", err=True)
            return
        if not isinstance(client, OfflineClient):

            def tell_cost() -> None:
                cost = estimate_labels(opened, client, asked_of, **asked).times(2.0 if untrained else 1.0)
                echo(str(replace(cost, seconds=cost.seconds / ranks.size)), err=not estimate)

            ranks.on_first(tell_cost)
        if estimate:
            return
        named = explain_features(
            opened, client, asked_of, untrained=baseline, progress=progress, mesh=ranks.mesh, **asked
        )

        def keep() -> None:
            _keep(opened, named.labels, str(named))
            if isinstance(client, OfflineClient):
                _exchange(client, export_prompts)

        ranks.on_first(keep)


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


def _choose_client(
    llm: str | None, model: str | None, prompts: Path | None, answers: Path | None, progress: bool
) -> Client | None:
    """Who answers prompts; None where no language model is asked for."""
    if prompts is not None or answers is not None:
        if llm is not None:
            raise ValueError("Prompts must go to a file or to `--llm`, got both. Give one of them.")
        return OfflineClient(answers, name=model) if model is not None else OfflineClient(answers)
    return open_client(llm, model, progress)


def open_client(llm: str | None, model: str | None, progress: bool, option: str = "--model") -> Client | None:
    """Client of a language model that labels features; None where none is named.

    Args:
        llm: address of an endpoint, or `local`; None is OpenAI's.
        model: name of the model there, or a folder.
        progress: show a progress bar while a local model loads.
        option: the option that `model` comes from.
    """
    if model is None:
        if llm is not None:
            raise ValueError(f"`--llm` needs `{option}`, the name of a language model there, got '{llm}' alone.")
        return None
    return LocalClient(load_model(model, progress=progress)) if llm == LOCAL else OpenAIClient(model, llm)


def _wanted(
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
def _open_floor(
    store: FeatureStore, sae: str | None, model: str | None, progress: bool, ranks: RankGrid
) -> Iterator[FeatureStore | None]:
    """The same rows from an untrained dictionary, for a while; None where the store's SAE and model are not at hand."""
    opened = open_recorded(store, sae, model, progress, "--lens-model", ranks)
    if opened is None:
        yield None
        return
    with share_temporary(ranks) as folder:
        yield harvest_untrained(store, *opened, folder / "untrained", progress=progress, mesh=ranks.mesh)


def _by_rules(
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
    ranks.on_first(lambda: _keep(part, found.labels(), str(found), afresh=True))


def _read_lens(
    store: FeatureStore,
    wanted: list[int] | None,
    sae: str | None,
    model: str | None,
    progress: bool,
    ranks: RankGrid,
) -> LogitLens | None:
    """What features promote, where the store's SAE and model are at hand."""
    opened = open_recorded(store, sae, model, progress, "--lens-model", ranks)
    if opened is None:
        return None
    coder, lm = opened
    with ranks.together():
        require_harvested(store, coder)
        match_weights(store.provenance, lm)
    return logit_lens(coder, lm, wanted, allow_mismatch=True, mesh=ranks.mesh)


def _keep(store: FeatureStore, labels: Sequence[Label], summary: str, afresh: bool = False) -> None:
    """Add labels to the database and print a summary."""
    with LabelStore.open(store) as book:
        n = book.add(labels, afresh=afresh)
        echo("\n".join(map(make_printable, summary.split("\n"))))
        echo(f"{n:,} labels added to {book.path}.")


def _exchange(client: OfflineClient, prompts: Path | None) -> None:
    """Write the prompts without an answer, and report which answers belong to which prompts."""
    if prompts is not None:
        echo(f"{client.export(prompts):,} prompts in {prompts}.")
    echo(str(client.report()))
