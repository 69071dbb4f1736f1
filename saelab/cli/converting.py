"""`saelab convert`: convert an SAE from one library's files to another's."""

import filecmp
import tempfile
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo
from saelab.stores.jobs import LOCK, hold_folder

OWN = read_value("saelab.sae.formats.registry:OWN")
FORMATS = (OWN, *read_value("saelab.sae.formats.registry:READERS"))
WRITERS = read_value("saelab.sae.formats.registry:WRITERS")

FromFiles = Annotated[str | None, Option(show_default="as the files say")]


@options.documented_by(Source("saelab.sae.sae:SAE.from_pretrained"))
def convert_sae(
    source: Annotated[str, Argument(metavar="SRC")],
    target: Annotated[Path, Argument(metavar="DST", help="Folder to write; it must be new or empty.")],
    format: Annotated[
        str, Option(help=f"What to write: {OWN}, {', '.join(WRITERS)}.", metavar="NAME", show_default=True)
    ] = OWN,
    name: Annotated[str | None, Option(show_default="SRC itself")] = None,
    source_format: Annotated[
        str | None,
        Option(help=f"What SRC is, where it holds several: {', '.join(FORMATS)}.", show_default="found out"),
    ] = None,
    revision: str | None = None,
    token: Annotated[str | None, Option(metavar="TOKEN")] = None,
    cache_dir: Annotated[Path | None, Option(metavar="FOLDER")] = None,
    local_files_only: Annotated[bool, Option("--local-files-only")] = False,
    model: FromFiles = None,
    hook_point: FromFiles = None,
    hook_point_out: FromFiles = None,
    weight_processing: FromFiles = None,
    activation: Annotated[
        str | None, Option(help="Activation function, such as topk.", show_default="as the files say")
    ] = None,
    k: Annotated[
        int | None, Option(help="Latents that fire for a token, with --activation.", show_default="as the files say")
    ] = None,
    threshold: Annotated[float | None, Option(show_default="as the files say")] = None,
    scale: Annotated[float | None, Option(show_default="as the files say")] = None,
) -> None:
    """Convert an SAE or transcoder between libraries: same codes, same reconstructions.

    One that was read from a library's files is written back unchanged, bit for bit. A setting that the format cannot
    express is folded into the weights where that is exact; otherwise it is an error.
    """
    from saelab.cli.settings import read_activation
    from saelab.sae.sae import SAE
    from saelab.stores.files import is_empty, settle

    if target.is_file():
        raise ValueError(f"DST must be new or an empty folder, got the file '{target}'; choose another.")
    if k is not None and activation is None:
        raise ValueError(f"`--k` must go with `--activation`, got {k} alone; add --activation topk.")
    with hold_folder(target):
        settle(target)
        occupied = not is_empty(target)
        try:
            sae = SAE.from_pretrained(
                source,
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                format=source_format,
                model=model,
                hook_point=hook_point,
                hook_point_out=hook_point_out,
                weight_processing=weight_processing,
                activation=read_activation(activation, k) if activation is not None else None,
                threshold=threshold,
                scale=scale,
            )
        except ValueError:
            if occupied:
                raise _refuse(target) from None
            raise
        if occupied:
            with tempfile.TemporaryDirectory() as folder:
                sae.save_pretrained(folder, format)
                _require_same(target, Path(folder))
        else:
            sae.save_pretrained(target, format)
    echo(f"{sae}\n{target}: {format}")
    if sae.origin is not None:
        echo(f"read as {sae.origin.format}")


def _refuse(target: Path) -> ValueError:
    return ValueError(f"DST must be new or an empty folder, got '{target}'; choose another.")


def _require_same(target: Path, written: Path) -> None:
    """ValueError where a folder holds anything but what would be written there: a command that was cut off at its very
    end may be given again.
    """
    names = {file.name for file in target.iterdir() if file.name != LOCK}
    wanted = {file.name for file in written.iterdir()}
    if names != wanted or set(filecmp.cmpfiles(written, target, wanted, shallow=False)[0]) != wanted:
        raise _refuse(target)
    echo("This SAE was converted already.")
