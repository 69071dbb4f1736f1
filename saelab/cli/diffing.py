"""`saelab diff`, `saelab find`: features that differ between two corpora, and documents that have some features."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from saelab.corpora import DocumentFeatures
    from saelab.labels.label_store import LabelStore

DIFF = Source("saelab.corpora.corpus_diffing:diff_corpora")
POOL = Source("saelab.corpora.document_features:pool_documents")
RANK = Source("saelab.corpora.document_search:rank_documents")
POOLINGS = read_value("saelab.corpora.document_features:DocumentPooling")

By = Annotated[
    str,
    Option(
        "--by",
        help=f"How codes are pooled over a document: {', '.join(POOLINGS)} (share of tokens); not max where corpora "
        "differ in the length of documents.",
        metavar="NAME",
    ),
]


@options.documented_by(DIFF, draws="n_null")
def diff_stores(
    a: Annotated[Path, Argument(metavar="A", help="Feature store of one corpus.")],
    b: Annotated[Path, Argument(metavar="B", help="Feature store of another, of the same SAE.")],
    by: By = POOL.by,
    labels: Annotated[
        Path | None,
        Option(help="Feature store whose labels name features.", metavar="STORE", show_default="A"),
    ] = None,
    fdr: float = DIFF.fdr,
    min_documents: options.Count = DIFF.min_documents,
    draws: options.Count = DIFF.n_null,
    hypotheses: Annotated[
        int,
        Option(
            help="Say what tells the corpora apart in so many sentences, scored on the half of the documents that they "
            "were not chosen on; 0 says nothing.",
            metavar="N",
        ),
    ] = 0,
    seed: options.Count = DIFF.seed,
    out: options.JSONFile = None,
    json: options.AsJSON = False,
) -> None:
    """Find the features that differ between two corpora, by documents, with effect sizes, p values and FDR."""
    from saelab.corpora.corpus_diffing import diff_corpora
    from saelab.corpora.hypotheses import propose_hypotheses
    from saelab.stores.files import to_json, write_json

    with ExitStack() as stack:
        first, second = open_documents(a, by), open_documents(b, by)
        names = stack.enter_context(open_labels(labels or a))
        found = diff_corpora(first, second, labels=names, fdr=fdr, min_documents=min_documents, n_null=draws, seed=seed)
        said = None
        if hypotheses:
            said = propose_hypotheses(first, second, names, n=hypotheses, fdr=fdr, names=(a.name, b.name), seed=seed)
    told = found.to_dict() | ({"hypotheses": said.to_dict()} if said is not None else {})
    if out is not None:
        write_json(out, told)
    echo(to_json(told) if json else "\n\n".join(str(one) for one in (found, said) if one is not None))


@options.documented_by(RANK)
def find_documents(
    store: options.StoreFolder,
    words: Annotated[
        str | None,
        Argument(metavar="WORDS", help="Words in the labels of features.", show_default="features are given"),
    ] = None,
    features: Annotated[
        str | None,
        Option(
            help="Features instead of words, each with its weight if not 1: 12,7:0.5,-3 (the negative side of 3), "
            "9:-1 (documents without 9).",
            metavar="LIST",
            show_default="by words",
        ),
    ] = None,
    by: By = POOL.by,
    top: options.Count = RANK.top,
    json: options.AsJSON = False,
) -> None:
    """List the documents of a feature store that have most of some features, found by their labels or given."""
    from saelab.corpora.document_search import rank_documents
    from saelab.stores.files import to_json

    if (words is None) == (features is None):
        raise ValueError("`find` takes WORDS or --features, got both or neither; give one of them.")
    with open_labels(store) as names:
        wanted = words if words is not None else _read_weights(features or "")
        found = rank_documents(open_documents(store, by), wanted, labels=names, top=top)
    echo(to_json(found.to_dict()) if json else str(found))


def open_documents(folder: Path, by: str) -> "DocumentFeatures":
    """The documents of a store, pooled; ValueError for an unknown pooling."""
    from saelab.corpora.document_features import pool_documents
    from saelab.stores.feature_store import FeatureStore

    if by not in POOLINGS:
        raise ValueError(f"`--by` must be one of {', '.join(POOLINGS)}, got '{by}'.")
    return pool_documents(FeatureStore.load(folder), by)  # type: ignore[arg-type]


def open_labels(folder: Path) -> "LabelStore":
    """The labels beside a store."""
    from saelab.labels.label_store import LabelStore

    return LabelStore.open(folder)


def _read_weights(text: str) -> dict[tuple[int, int], float]:
    """Weights by feature and sign, from a list such as 12,7:0.5,-3.

    >>> _read_weights("12,7:0.5,-3")
    {(12, 1): 1.0, (7, 1): 0.5, (3, -1): 1.0}
    """
    found: dict[tuple[int, int], float] = {}
    for part in text.split(","):
        number, _, weight = part.strip().partition(":")
        try:
            side = int(number.removeprefix("-")), -1 if number.startswith("-") else 1
            found[side] = float(weight or 1)
        except ValueError:
            raise ValueError(
                f"`--features` must be numbers joined by commas, each with a weight after a colon or without, got "
                f"'{text}'."
            ) from None
    return found
