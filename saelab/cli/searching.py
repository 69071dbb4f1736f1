"""`saelab families`, `saelab search`: trees of features, and documents near a query in which features were edited."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.diffing import By, open_documents, open_labels
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from torch import Tensor

    from saelab.corpora import EmbeddingSearch

FIND = Source("saelab.corpora.feature_families:find_families")
POOL = Source("saelab.corpora.document_features:pool_documents")
EMBED = Source("saelab.collecting.embedding:embed")
TOP = read_value("saelab.corpora.embedding_search:TOP")


@options.documented_by(FIND, draws="n_null")
def show_families(
    store: options.StoreFolder,
    by: By = POOL.by,
    min_overlap: float = FIND.min_overlap,
    min_excess: float | None = None,
    min_children: options.Count = FIND.min_children,
    max_density: float = FIND.max_density,
    min_documents: options.Count = FIND.min_documents,
    draws: options.Count = FIND.n_null,
    seed: options.Count = FIND.seed,
    out: options.JSONFile = None,
    json: options.AsJSON = False,
) -> None:
    """Find families of features, which fire in the documents of a more frequent one, beside permuted documents."""
    from saelab.corpora.feature_families import find_families
    from saelab.stores.files import to_json, write_json

    with open_labels(store) as names:
        found = find_families(
            open_documents(store, by), labels=names, min_overlap=min_overlap, min_excess=min_excess,
            min_children=min_children, max_density=max_density, min_documents=min_documents, n_null=draws, seed=seed,
        )  # fmt: skip
    if out is not None:
        write_json(out, found.to_dict())
    echo(to_json(found.to_dict()) if json else str(found))


@options.documented_by(EMBED)
def search_documents(
    sae: options.SAEName,
    acts: Annotated[Path, Argument(metavar="ACTS", help="Embeddings of documents, written by `saelab embed`.")],
    row: Annotated[
        int | None, Option(help="Document that is the query, by its row.", metavar="N", show_default="a text is given")
    ] = None,
    text: Annotated[
        str | None,
        Option(help="Text that is the query; needs --encoder.", metavar="TEXT", show_default="a row is given"),
    ] = None,
    encoder: Annotated[
        str | None, Option(help="What embedded the documents, for --text.", metavar="ENCODER", show_default="none")
    ] = None,
    pooling: Annotated[str | None, Option(metavar="NAME")] = None,
    hook_point: Annotated[str | None, Option(metavar="NAME", show_default="its last hidden state")] = None,
    normalize: Annotated[bool, Option("--normalize")] = False,
    edit: Annotated[
        str | None,
        Option(
            help="Codes that features of the query are set to, such as 12:4.5,7:0 (without 7), 3:2x (twice its largest "
            "code in the documents) or 3:-2x (negative ones).",
            metavar="LIST",
            show_default="none",
        ),
    ] = None,
    top: Annotated[int, Option(help="Most documents.", metavar="N")] = TOP,
    json: options.AsJSON = False,
) -> None:
    """List the documents nearest to a query in which features of an SAE were edited, and their places before."""
    from saelab.corpora.embedding_search import EmbeddingSearch
    from saelab.sae.sae import SAE
    from saelab.stores.activations import Activations
    from saelab.stores.files import to_json

    if (row is None) == (text is None) or (text is None) != (encoder is None):
        raise ValueError("`search` takes --row, or --text with --encoder, got another choice of them.")
    search = EmbeddingSearch(SAE.from_pretrained(sae), Activations.load(acts))
    query: int | Tensor = (
        row if row is not None else _embed(search, text or "", encoder, pooling, hook_point, normalize)
    )
    found = search.query(query, _read_edits(edit or "", search), top=top)
    echo(to_json(found.to_dict()) if json else str(found))


def _embed(
    search: "EmbeddingSearch",
    text: str,
    encoder: str | None,
    pooling: str | None,
    hook_point: str | None,
    normalize: bool,
) -> "Tensor":
    """The embedding of a text; ValueError where the encoder is another than the documents'."""
    from saelab.cli.inputs import choose_device
    from saelab.collecting.embedding import embed
    from saelab.lm.text_encoders import load_text_encoder
    from saelab.sae.compatibility import match_activations

    model, tokenizer = load_text_encoder(str(encoder), hook_point=hook_point, device=choose_device(None))
    found = embed(
        model, [text], pooling=pooling, normalize=normalize, hook_point=hook_point, tokenizer=tokenizer, progress=False
    )
    match_activations(search.sae, found, allow_mismatch=False)
    return found[:][0]


def _read_edits(text: str, search: "EmbeddingSearch") -> dict[int, float]:
    """Codes by feature, from a list such as 12:4.5,7:0,3:2x."""
    found: dict[int, float] = {}
    for part in text.split(",") if text else ():
        number, _, code = part.strip().partition(":")
        try:
            feature, value = int(number), float(code.removesuffix("x"))
        except ValueError:
            raise ValueError(
                f"`--edit` must be features with codes, joined by commas, such as 12:4.5,7:0,3:2x, got '{text}'."
            ) from None
        if code.endswith("x") and 0 <= feature < len(search.peaks):
            value *= float(search.peaks[feature, int(value < 0)])
        found[feature] = value
    return found
