"""`saelab train`."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args

import typer
from typer import Option

from saelab.cli.info import describe_sae
from saelab.cli.options import Device, Progress, choose_device
from saelab.sae.activations import ACTIVATIONS, Activation, TopK, make_activation
from saelab.sae.checkpoint import CONFIG, WEIGHTS
from saelab.sae.config import AuxK, Dictionary, Init, RandomPrefixes, SAEConfig
from saelab.sae.normaliser import KINDS
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.training.config import TrainConfig

WRITTEN = (CONFIG, WEIGHTS, "history.jsonl", "history.csv")


def train_sae(
    acts: Annotated[Path, typer.Argument(metavar="ACTS", help="Folder of activations written by `saelab collect`.")],
    d_sae: Annotated[int, Option(help="Latents in the dictionary.")],
    out: Annotated[Path, Option(help="Folder for the SAE, its history and its checkpoint.", metavar="FOLDER")],
    activation: Annotated[
        str, Option(help=f"Which latents fire: {', '.join(ACTIVATIONS)}.", metavar="NAME")
    ] = TopK.name,
    k: Annotated[
        int,
        Option(
            help="Latents that fire for a token: kept (topk, abstopk), mean (batch...), target L0 (relu, jumprelu)."
        ),
    ] = TopK.k,
    prefixes: Annotated[
        str | None,
        Option(
            help="Matryoshka: sizes that end at d_sae, such as 64,256,1024, or `random`.",
            metavar="SIZES",
            show_default="none",
        ),
    ] = None,
    dictionary: Annotated[
        str, Option(help=f"Rows of the dictionary: {', '.join(get_args(Dictionary))}.", metavar="NAME")
    ] = SAEConfig.dictionary,
    normaliser: Annotated[
        str, Option(help=f"What is done to the activations first: {', '.join(KINDS)}.", metavar="NAME")
    ] = SAEConfig.normaliser,
    init: Annotated[
        str, Option(help=f"What the dictionary starts from: {', '.join(get_args(Init))}.", metavar="NAME")
    ] = SAEConfig.init,
    aux: Annotated[bool, Option("--aux/--no-aux", help="Bring dead latents back by the AuxK loss, or not.")] = True,
    dead_after_tokens: Annotated[
        int | None,
        Option(
            help="Tokens without firing after which a latent counts as dead.",
            show_default="10 million, or 5 % of a shorter run",
        ),
    ] = AuxK.dead_after_tokens,
    n_tokens: Annotated[
        int, Option(help="Tokens to train on; fewer activations are passed over again.")
    ] = TrainConfig.n_tokens,
    batch_size: Annotated[int, Option(help="Tokens in a step.")] = TrainConfig.batch_size,
    lr: Annotated[
        float | None, Option(help="Peak learning rate.", show_default="follows width, batch and length of the run")
    ] = TrainConfig.lr,
    seed: Annotated[int, Option(help="Of the first weights and the order of the data.")] = TrainConfig.seed,
    save_every_tokens: Annotated[
        int | None, Option(help="Tokens between checkpoints.", show_default="a tenth of the run")
    ] = TrainConfig.save_every_tokens,
    hook_point: Annotated[
        str | None,
        Option(help="Which one, where the folder holds several.", metavar="NAME", show_default="the only one"),
    ] = None,
    device: Device = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the checkpoint in the folder, if there is one.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the SAE in the folder and begin anew.")] = False,
    progress: Progress = True,
) -> None:
    """Train a sparse autoencoder on collected activations.

    Writes config.json and model.safetensors, the history as .jsonl and .csv, and a checkpoint. With the same seed and
    flags it writes the same bytes (on a CPU), interrupted and resumed or not.
    """
    rows = Activations.load(acts, hook_point)
    cfg = SAEConfig(
        d_in=rows.d_in,
        d_sae=d_sae,
        activation=read_activation(activation, k),
        prefixes=read_prefixes(prefixes),
        dictionary=dictionary,  # type: ignore[arg-type]  # checked by SAEConfig, as the next two
        normaliser=normaliser,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
        aux=AuxK(dead_after_tokens=dead_after_tokens) if aux else None,
    )
    budget = TrainConfig(
        n_tokens=n_tokens, batch_size=batch_size, lr=lr, seed=seed, save_every_tokens=save_every_tokens
    )
    sae = SAE(cfg, seed=seed).to(choose_device(device))
    claim_folder(out, resume, overwrite)
    finished = (out / CONFIG).is_file()
    sae.fit(rows, budget, out=out, resume=resume, progress=progress)
    sae.save_pretrained(out)
    if finished:
        typer.echo("This SAE was complete already.")
    typer.echo(describe_sae(out))


def read_activation(name: str, k: int) -> Activation:
    """The activation with `k` as its number of latents a token: kept ones, or the target of a penalised one."""
    known = {field.name for field in fields(ACTIVATIONS[name])} if name in ACTIVATIONS else set()
    return make_activation(name, **({"target_l0": float(k)} if "target_l0" in known else {"k": k}))


def read_prefixes(text: str | None) -> tuple[int, ...] | RandomPrefixes | None:
    """Prefixes as the command line spells them: `64,256,1024`, `random`, or nothing.

    >>> read_prefixes("64,256")
    (64, 256)
    """
    if text is None:
        return None
    if text == "random":
        return RandomPrefixes()
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(f"`--prefixes` must be sizes such as 64,256,1024, or random, got '{text}'.") from None


def claim_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something (ValueError), or empty it of an SAE where that is asked for."""
    if resume and overwrite:
        raise ValueError("`--resume` and `--overwrite` exclude each other; give one.")
    if (out / "manifest.json").is_file():
        raise ValueError(f"`--out` must not be a folder of activations, got '{out}'; choose another.")
    if resume:
        return
    found = "a finished SAE" if (out / CONFIG).is_file() else "an unfinished run"
    if not overwrite and ((out / CONFIG).is_file() or (out / "checkpoint").is_dir()):
        raise ValueError(f"'{out}' holds {found}; give --resume to go on, --overwrite to begin anew, or another --out.")
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
