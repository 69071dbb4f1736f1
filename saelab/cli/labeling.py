"""`saelab label` and `saelab labels`: label the features of a store, and search, read and edit its labels.

Labels come from rules on tokens or from a language model, and are kept in the store's label store.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import Context, echo, make_printable
from saelab.stores.jobs import hold_folder

if TYPE_CHECKING:
    from saelab.labels.label import Label
    from saelab.labels.label_store import LabelStore

SET, SAVE = Source("saelab.labels.label_store:LabelStore.set"), Source("saelab.labels.label_store:LabelStore.save")
REQUESTS = Source("saelab.labels.autointerp.requests:RequestConfig")
TIMEOUT: float = read_value("saelab.labels.autointerp.endpoints:TIMEOUT")
ALL_SCORERS = (*read_value("saelab.labels.autointerp.scorers:NAMES"), "embedding")
SCORERS = ",".join(Source("saelab.labels.autointerp.explainers:explain_features").scorers)
N_PREDICATES = read_value("saelab.labels.rules.predicates:N_PREDICATES")
N_TOKENS = read_value("saelab.labels.rules.rule_search:N_TOKENS")
BOTH, FORMATS = read_value("saelab.labels.label:BOTH"), read_value("saelab.labels.label:Format")
ME = read_value("saelab.labels.label:ME")

FeatureNumber = Annotated[int, Argument(metavar="FEATURE", help="Number of the feature.")]
Author = Annotated[str, Argument(metavar="AUTHOR", help="Whose label; `show` lists the authors.")]
Sign = Annotated[int, Option(metavar="SIGN")]


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
    encoder: Annotated[
        str | None,
        Option(
            help="A sentence-transformers model, by which labels of similar meaning follow.",
            metavar="NAME",
            show_default="words alone",
        ),
    ] = None,
    top: Annotated[int, Option(help="Labels to show.")] = 20,
) -> None:
    """Find features by their labels, the best first: by words and, with --encoder, by meaning."""
    from saelab.labels.encoders import SentenceEncoder

    _print(
        _open(context).search(text, every, encoder=None if encoder is None else SentenceEncoder(encoder), top=top), top
    )


def show_labels(context: Context, feature: FeatureNumber) -> None:
    """Show all labels of a feature; of each side the chosen one is marked by *."""
    book = _open(context)
    chosen = book.chosen(feature)
    for label in book.labels(feature):
        echo(f"{'*' if label in chosen else ' '} {_describe(label)}")
    if not chosen:
        echo(f"Feature {feature} has no label.", err=True)


@options.documented_by(SET)
def set_label(
    context: Context,
    feature: FeatureNumber,
    text: Annotated[str, Argument(metavar="TEXT")],
    sign: Sign = BOTH,
    author: Annotated[str, Option(metavar="NAME")] = ME,
) -> None:
    """Give a feature a label and choose it; it stays chosen until a person chooses another."""
    echo(_describe(_open(context).set(feature, text, author=author, sign=sign)))


@options.documented_by(SET)
def choose_label(context: Context, feature: FeatureNumber, author: Author, sign: Sign = BOTH) -> None:
    """Choose the newest label of an author; it stays chosen until a person chooses another."""
    echo(_describe(_open(context).choose(feature, author, sign=sign)))


@options.documented_by(SET)
def delete_labels(context: Context, feature: FeatureNumber, author: Author, sign: Sign = BOTH) -> None:
    """Delete an author's labels of a feature."""
    n = _open(context).delete(feature, author=author, sign=sign)
    echo(f"{n} label{'' if n == 1 else 's'} deleted.")


@options.documented_by(SAVE)
def export_labels(
    context: Context,
    file: Annotated[Path, Argument(metavar="FILE", help="File for the labels; an ending .gz compresses it.")],
    form: Annotated[
        str | None,
        Option("--format", help=f"{', '.join(FORMATS)}.", metavar="NAME", show_default="by the file's ending"),
    ] = None,
    model_id: Annotated[str, Option(metavar="NAME", show_default="the store's")] = "",
    source_id: Annotated[str, Option(metavar="NAME", show_default="layer and saelab, such as 6-saelab")] = "",
) -> None:
    """Write all labels to a file: JSON, CSV, or Neuronpedia's explanation records, one per line."""
    from saelab.labels.label import name_format

    if form is not None and form not in FORMATS:
        raise ValueError(f"`--format` must be one of {', '.join(FORMATS)}, got '{form}'.")
    labels = _open(context)
    n = labels.save(file, form or name_format(file), model_id=model_id, source_id=source_id)  # type: ignore[arg-type]
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


def _open(context: Context) -> "LabelStore":
    """Label database of the store, closed when the command ends."""
    from saelab.labels.label_store import LabelStore

    return context.with_resource(LabelStore.open(context.obj))


def _describe(label: "Label") -> str:
    from saelab.labels.label import MARKS, describe_origin

    return make_printable(
        f"{label.feature:>6} {MARKS[label.sign]}{label.text} ({label.kind}, {describe_origin(label)})"
    )


def _print(labels: "Sequence[Label]", top: int) -> None:
    for label in labels[:top]:
        echo(_describe(label))
    if not labels:
        echo("No label.", err=True)
    elif len(labels) > top:
        echo(f"{len(labels) - top:,} more: give --top {len(labels)}.", err=True)


@options.documented_by(REQUESTS, parallel="n_parallel")
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
    backend: options.BackendName = "auto",
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
    setting: Annotated[
        list[str] | None,
        Option(
            help="What is sent with each prompt, such as max_tokens=2048; NAME= leaves a setting out; may be given "
            "again.",
            metavar="NAME=VALUE",
            show_default="temperature=0 and max_tokens=512, or what the model takes in their place",
        ),
    ] = None,
    timeout: Annotated[
        float, Option(help="Seconds to wait for an answer of the endpoint.", metavar="SECONDS")
    ] = TIMEOUT,
    scorers: Annotated[
        str, Option(help=f"Scorers of its labels, joined by commas: {', '.join(ALL_SCORERS)}.", metavar="NAMES")
    ] = SCORERS,
    encoder: Annotated[
        str | None,
        Option(help="A sentence-transformers model, for the scorer embedding.", metavar="NAME", show_default="none"),
    ] = None,
    budget: Annotated[float | None, Option(show_default="no limit")] = None,
    price_in: Annotated[float | None, Option(show_default="unknown")] = None,
    price_out: Annotated[float | None, Option(show_default="unknown")] = None,
    parallel: int = REQUESTS.n_parallel,
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
    from saelab.cli import labelers
    from saelab.cli.inputs import PATIENCE, choose_device, read_numbers
    from saelab.labels.autointerp.explainers import estimate_labels, explain_features
    from saelab.labels.autointerp.requests import RequestConfig
    from saelab.labels.autointerp.response_cache import OfflineClient
    from saelab.stores.feature_store import FeatureStore
    from saelab.training.launch import launched

    with launched(None, choose_device(None), PATIENCE) as (ranks, _), ExitStack() as stack:
        with ranks.together():
            opened, numbers = FeatureStore.load(store), read_numbers(features)
            if bad := [j for j in numbers or () if not 0 <= j < opened.d_sae]:
                raise ValueError(f"`--features` must be in 0..{opened.d_sae - 1}, got {bad[:5]}.")
            client = labelers.choose_client(
                llm, model, export_prompts, import_answers, progress and ranks.is_first, setting or (), timeout
            )
            if estimate and client is None:
                raise ValueError("`--estimate` needs `--model`: rules cost nothing.")
            cfg = RequestConfig(n_parallel=parallel, budget=budget, price_in=price_in, price_out=price_out)
        if not estimate:
            ranks.on_first(lambda: stack.enter_context(hold_folder(store)))
        by_rules, names = rules is not None or client is None, [name for name in scorers.split(",") if name]
        judges = labelers.choose_scorers(names, encoder) if client is not None else []

        def choose() -> str:
            author = client.name if client is not None else ""
            named = labelers.find_wanted(opened, author, numbers, resume, bool(names)) if client is not None else []
            return json.dumps(
                [labelers.find_wanted(opened, labelers.RULES, numbers, resume) if by_rules else [], named]
            )

        wanted, asked_of = json.loads(ranks.on_first(choose))
        floor = untrained and not estimate and (wanted != [] or asked_of != [])
        made = labelers.open_floor(opened, sae, lens_model, progress, ranks, backend) if floor else nullcontext()
        baseline = stack.enter_context(made)
        if by_rules:
            reads = lens and wanted != []
            found = labelers.read_lens(opened, wanted, sae, lens_model, progress, ranks, backend) if reads else None
            labelers.keep_rules(
                opened, rules or labelers.BUILTIN, predicates, rule_tokens, wanted, found, baseline, ranks
            )
        if client is None:
            return
        asked: dict[str, Any] = {"signs": (1, -1) if opened.signed else (BOTH,), "scorers": judges, "asking": cfg}
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
            labelers.keep(opened, named.labels, str(named))
            if isinstance(client, OfflineClient):
                labelers.exchange(client, export_prompts)

        ranks.on_first(keep)
