"""`saelab compare`: match the features of two stores, or of two SAEs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    import numpy as np

    from saelab.universality.matching import Comparison

COMPARE = Source("saelab.universality.comparison:compare")
NULL = Source("saelab.universality.comparison_sources:NullConfig")
SIMILARITIES = read_value("saelab.universality.similarity:Similarity")
METHODS = read_value("saelab.universality.matching:MatchingMethod")
ON_PAGE = 200


@options.documented_by(COMPARE, NULL, nearest="m", shifts="n_shifts")
def compare_folders(
    a: Annotated[Path, Argument(metavar="A", help="Folder of a feature store, or of an SAE.")],
    b: Annotated[Path, Argument(metavar="B", help="Another one: a store of the same text, an SAE of the same space.")],
    similarity: Annotated[
        str | None,
        Option(
            help=f"Similarity of features: {', '.join(SIMILARITIES)}.",
            metavar="NAME",
            show_default="correlation of stores, decoder of SAEs",
        ),
    ] = None,
    method: Annotated[
        str,
        Option(help=f"Which pairs are matches: {', '.join(METHODS)} (one to one).", metavar="NAME"),
    ] = "hungarian",
    sides: Annotated[bool, Option("--sides")] = False,
    nearest: options.Count = COMPARE.m,
    min_count: options.Count = COMPARE.min_count,
    shifts: options.Count = NULL.n_shifts,
    min_effect: float = NULL.min_effect,
    fdr: float = NULL.fdr,
    seed: options.Count = 0,
    out: Annotated[
        Path | None, Option(help="File for everything, as JSON.", metavar="FILE", show_default="none")
    ] = None,
    html: Annotated[
        Path | None,
        Option(
            help="Page, or folder, with the matched features of two stores side by side, the most similar 200.",
            metavar="PATH",
            show_default="none",
        ),
    ] = None,
    top: Annotated[int, Option(help="Pairs to show.")] = 10,
    untrained: Annotated[
        bool,
        Option(
            "--untrained/--no-untrained",
            help="Compare with untrained dictionaries of both shapes, too, which read the text again; where the "
            "stores' SAEs and models are at hand.",
        ),
    ] = True,
    baselines: options.Baselines = None,
    progress: options.Progress = True,
) -> None:
    """Find the features that two dictionaries share, compared with what chance would give.

    Stores are compared on the documents that they have in common, even with different tokenizers; SAEs of one space by
    direction.

    Several processes share the features: torchrun --nproc-per-node 4 -m saelab compare ...
    """
    from saelab.cli.inputs import PATIENCE, choose_device, harvest_baseline, open_dictionary, share_temporary
    from saelab.sae.baselines import load_baselines
    from saelab.stores.feature_store import FeatureStore
    from saelab.training.launch import launched
    from saelab.universality.comparison import compare
    from saelab.universality.comparison_sources import NullConfig
    from saelab.universality.similarity import choose_similarity
    from saelab.visualization.reports import report

    with launched(None, choose_device(None), PATIENCE) as (ranks, _), share_temporary(ranks) as folder:
        with ranks.together():
            if method not in METHODS:
                raise ValueError(f"`--method` must be one of {', '.join(METHODS)}, got '{method}'.")
            null = NullConfig(n_shifts=shifts, min_effect=min_effect, fdr=fdr)
            first, second = open_dictionary(a), open_dictionary(b)
            stores = isinstance(first, FeatureStore), isinstance(second, FeatureStore)
            _check_inputs(stores, html, sides, baselines)
            by = choose_similarity(similarity, stores[0])
            others = None if baselines is None else load_baselines(baselines)
        floors: list[FeatureStore | None] = [None, None]
        if untrained and isinstance(first, FeatureStore) and isinstance(second, FeatureStore):
            pair = enumerate((first, second))
            floors = [harvest_baseline(one, folder / str(i), progress, ranks) for i, one in pair]
        found = compare(
            first,
            second,
            untrained=(floors[0], floors[1]),
            similarity=by,
            sides=sides,
            m=nearest,
            min_count=min_count,
            null=null,
            seed=seed,
            progress=progress,
            baselines=others,
            mesh=ranks.mesh,
        )

        def show() -> None:
            pairs = _show(found, method, top, out)
            if html is not None and isinstance(first, FeatureStore) and isinstance(second, FeatureStore):
                shown = list(dict.fromkeys(pairs[:, 0].tolist()))[:ON_PAGE]
                made = report(first, html, features=shown, compare=second, comparison=found, progress=progress)
                echo(str(made))

        ranks.on_first(show)


def _check_inputs(stores: tuple[bool, bool], html: Path | None, sides: bool, baselines: Path | None) -> None:
    """Refuse options that do not go with what is compared: feature stores, or SAEs."""
    if html is not None and not all(stores):
        raise ValueError("`--html` shows features in text, so A and B must be feature stores, got SAEs.")
    if html is not None and sides:
        raise ValueError("`--html` shows whole features, got it with `--sides`. Leave one of them out.")
    if baselines is not None and stores[0]:
        raise ValueError("`--baselines` holds SAEs, so A and B must be SAEs, got feature stores. Leave it out.")


def _show(found: "Comparison", method: str, top: int, out: Path | None) -> "np.ndarray":
    """Print the result, and write all of it to a file; returns the matched pairs, the most similar first."""
    from saelab.stores.files import write_json
    from saelab.stores.results import format_table

    pairs, values = found.match(method)  # type: ignore[arg-type]
    echo(str(found))
    best = list(zip(pairs.tolist(), values.tolist(), strict=True))[:top]
    table = [["a", "b", f"{found.similarity}, {method}"], *([str(i), str(j), f"{x:+.3f}"] for (i, j), x in best)]
    echo("\n".join(format_table(table, left=(2,))))
    if out is not None:
        matched = [[i, j, value] for (i, j), value in zip(pairs.tolist(), values.tolist(), strict=True)]
        write_json(out, found.to_dict() | {"method": method, "matched": matched})
        echo(f"{len(matched):,} pairs in {out}.")
    return pairs
