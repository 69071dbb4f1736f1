"""`saelab collect`, `saelab train`, `saelab evaluate`: activations, a trained SAE, and its evaluation."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from typer import Argument, Option

from saelab.cli import options
from saelab.cli.info import describe_activations, describe_sae
from saelab.cli.inputs import count_overlap, echo, open_pair, read_head, read_tail
from saelab.collecting.collection import SHARD_TOKENS, collect
from saelab.evaluation.evaluation import evaluate
from saelab.interop.saebench import save_saebench
from saelab.lm.masks import TokenMask
from saelab.lm.models import load_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.sae.activation_functions import TopK, make_activation
from saelab.sae.activation_registry import ACTIVATIONS, Activation
from saelab.sae.archetypal import Archetypal
from saelab.sae.baselines import load_baselines
from saelab.sae.config import Dictionary, RandomPrefixes, SAEConfig, read_loss_terms
from saelab.sae.fitting import Data
from saelab.sae.objectives.dead_latents import AuxK
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import LossTerm
from saelab.sae.pretrained import CONFIG, WEIGHTS
from saelab.sae.sae import SAE
from saelab.sae.sharding import check_ranks
from saelab.sae.soft_frozen import SoftFrozen
from saelab.stores.activations import Activations
from saelab.stores.files import settle
from saelab.stores.jobs import hold_folder
from saelab.stores.manifest import ActivationsManifest, Provenance
from saelab.training.checkpoint import FOLDER, find_checkpoint
from saelab.training.config import TrainConfig
from saelab.training.launch import launched
from saelab.training.ranks import RankGrid

WRITTEN = (CONFIG, WEIGHTS, "history.jsonl", "history.csv")
N_TOKENS = 100_000
N_BOOTSTRAP, SEED = (options.default_of(evaluate, name) for name in ("n_bootstrap", "seed"))


@options.documented_by(SAEConfig, TrainConfig, AuxK, Archetypal)
def train_sae(
    acts: Annotated[Path, Argument(metavar="ACTS", help="Folder of activations written by `saelab collect`.")],
    d_sae: int,
    out: Annotated[Path, Option(help="Folder for the SAE, its history and its checkpoint.", metavar="FOLDER")],
    activation: Annotated[
        str,
        Option(
            help=f"Which latents fire, with its settings, such as NAME,key=0.1: {', '.join(ACTIVATIONS)}.",
            metavar="NAME",
        ),
    ] = TopK.name,
    k: Annotated[
        int | None,
        Option(
            help="Latents per token: kept (topk, abstopk), mean (batch...), target L0 (relu, jumprelu).",
            show_default=f"{TopK.k}",
        ),
    ] = None,
    prefixes: options.Prefixes = None,
    dictionary: Annotated[
        str,
        Option(
            help=f"Rows of the dictionary: {', '.join(get_args(Dictionary))}, archetypal, soft_frozen.", metavar="NAME"
        ),
    ] = SAEConfig.dictionary,  # type: ignore[assignment]  # the default is a name
    n_points: int | None = None,
    delta: Annotated[float | None, Option(show_default=str(Archetypal.delta))] = None,
    normalizer: options.Name = SAEConfig.normalizer,
    init: options.Name = SAEConfig.init,
    train_encoder: bool = SAEConfig.train_encoder,
    aux: Annotated[bool, Option("--aux/--no-aux", help="Revive dead latents by the AuxK loss, or not.")] = True,
    dead_after_tokens: int | None = AuxK.dead_after_tokens,
    objective: Annotated[
        list[str] | None,
        Option(
            help="A further loss term with its settings, such as NAME,coefficient=0.1; may be repeated. The term "
            "replaces reconstruction or sparsity where it is a kind of it.",
            metavar="TERM",
            show_default="none",
        ),
    ] = None,
    n_tokens: int = TrainConfig.n_tokens,
    batch_size: int = TrainConfig.batch_size,
    lr: float | None = TrainConfig.lr,
    seed: Annotated[int, Option(help="Seed of the initial weights and the order of the data.")] = TrainConfig.seed,
    save_every_tokens: int | None = TrainConfig.save_every_tokens,
    hook_point: Annotated[
        str | None,
        Option(help="Hook point to train on, where ACTS holds several.", metavar="NAME", show_default="the only one"),
    ] = None,
    target: Annotated[
        str | None,
        Option(
            help="Hook point whose activations a transcoder reconstructs; it reads at the other one.",
            metavar="NAME",
            show_default="none: an autoencoder",
        ),
    ] = None,
    skip: Annotated[
        bool, Option("--skip", help="Give the transcoder a linear connection in parallel to its latents.")
    ] = False,
    device: options.Device = None,
    mesh: Annotated[
        str | None,
        Option(
            help="How processes started by torchrun share the work: ranks that divide each batch, times ranks that "
            "divide the latents, such as 2x4.",
            metavar="DATAxLATENTS",
            show_default="all divide the latents",
        ),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue from the checkpoint in the folder, if there is one.")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the SAE in the folder and start over.")] = False,
    progress: options.Progress = True,
) -> None:
    """Train a sparse autoencoder on collected activations, or with --target a transcoder to another hook point.

    Writes config.json and model.safetensors, the history as .jsonl and .csv, and a checkpoint. With the same seed and
    flags it writes the same bytes (on a CPU), interrupted and resumed or not.

    Several processes train one SAE together: torchrun --nproc-per-node 4 -m saelab train ...
    """
    shape, kind = read_mesh(mesh), options.choose_device(device)
    rows, targets = load_activations(acts, hook_point, target)
    cfg = SAEConfig(
        d_in=rows.d_in,
        d_sae=d_sae,
        activation=read_activation(activation, k),
        prefixes=read_prefixes(prefixes),
        dictionary=read_dictionary(dictionary, n_points, delta),  # type: ignore[arg-type]  # SAEConfig checks names
        normalizer=normalizer,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
        train_encoder=train_encoder,
        objective=read_objective(objective or [], AuxK(dead_after_tokens=dead_after_tokens) if aux else None),
        d_out=None if targets is None else targets.d_in,
        skip=skip,
    )
    budget = TrainConfig(
        n_tokens=n_tokens, batch_size=batch_size, lr=lr, seed=seed, save_every_tokens=save_every_tokens
    )
    data = rows if targets is None else (rows, targets)
    with launched(shape, kind) as (ranks, place), ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(hold_folder(out))
            claim_folder(out, resume, overwrite)

        check_ranks(cfg, budget, ranks)
        ranks.on_first(claim)
        with ranks.together():
            own = None if ranks.alone else ranks.latents.split(cfg.d_sae)
            sae = SAE(cfg, seed=seed, latents=own).to(place)
        _train_into(out, sae, data, budget, resume, progress, ranks)


def _train_into(
    out: Path, sae: SAE, rows: Data, budget: TrainConfig, resume: bool, progress: bool, ranks: RankGrid
) -> None:
    """Train, save, and print a summary."""
    finished = (out / CONFIG).is_file()
    sae.fit(rows, budget, out=out, resume=resume, progress=progress, mesh=ranks.mesh)

    def save() -> None:
        sae.save_pretrained(out)
        if finished:
            echo("This SAE was complete already.")
        echo(describe_sae(out))

    ranks.on_first(save)


def read_mesh(text: str | None) -> tuple[int, int] | None:
    """Ranks that divide the batch, and ranks that divide the latents, as the command line spells them.

    >>> read_mesh("2x4")
    (2, 4)
    """
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"`--mesh` must be two numbers of ranks, DATAxLATENTS such as 2x4, got '{text}'.")
    return int(parts[0]), int(parts[1])


def load_activations(
    folder: Path, hook_point: str | None, target: str | None
) -> tuple[Activations, Activations | None]:
    """What is read, and a transcoder's target; of a folder that holds two hook points the one that is not the target
    is read.
    """
    if target is None:
        return Activations.load(folder, hook_point), None
    others = [name for name in ActivationsManifest.load(folder).d_in if name != target]
    read = hook_point or (others[0] if len(others) == 1 else None)
    return Activations.load(folder, read), Activations.load(folder, target)


def read_activation(text: str, k: int | None = None) -> Activation:
    """An activation spelled as `NAME,setting=value,...`, with `k` as its number of latents a token: kept ones, or the
    target of a penalized one; None is its own default.

    >>> read_activation("sparsemax,scale=4.0"), read_activation("relu", 8).target_l0
    (Sparsemax(scale=4.0), 8.0)
    """
    settings = read_named("--activation", text)
    name = settings.pop("name")
    known = {field.name for field in fields(ACTIVATIONS[name])} if name in ACTIVATIONS else set()
    if k is not None:
        settings |= {"target_l0": float(k)} if "target_l0" in known else {"k": k}
    return make_activation(name, **settings)


def read_dictionary(name: str, n_points: int | None, delta: float | None) -> str | Archetypal | SoftFrozen:
    """The dictionary by its name, an archetypal one with its two settings; ValueError for settings of another.

    >>> read_dictionary("archetypal", None, 0.2), read_dictionary("soft_frozen", None, None)
    (Archetypal(n_points=None, delta=0.2), SoftFrozen(cosine=0.8))
    """
    if name == "archetypal":
        return Archetypal(n_points=n_points, delta=Archetypal.delta if delta is None else delta)
    if n_points is not None or delta is not None:
        raise ValueError(
            f"`--n-points` and `--delta` must go with `--dictionary archetypal`, got '{name}'; leave them out."
        )
    return SoftFrozen() if name == "soft_frozen" else name


def read_named(option: str, text: str) -> dict[str, Any]:
    """A name and settings, spelled as `NAME,setting=value,...` with values as in JSON.

    >>> read_named("--objective", "aux_k,coefficient=0.1")
    {'name': 'aux_k', 'coefficient': 0.1}
    """
    name, *settings = text.split(",")
    pairs = [setting.partition("=") for setting in settings]
    try:
        return {"name": name, **{key: json.loads(value) for key, _, value in pairs}}
    except json.JSONDecodeError:
        raise ValueError(f"`{option}` must be a name and settings such as NAME,key=0.5, got '{text}'.") from None


def read_objective(texts: Sequence[str], aux: AuxK | None) -> tuple[LossTerm, ...]:
    """Reconstruction, the terms that the command line spells as `NAME,setting=value,...`, and AuxK where it is given.

    >>> read_objective(["sparsity,coefficient=0.5"], None)
    (ReconstructionLoss(coefficient=1.0), SparsityLoss(coefficient=0.5))
    """
    terms = read_loss_terms([read_named("--objective", text) for text in texts])
    own = () if any(isinstance(term, ReconstructionLoss) for term in terms) else (ReconstructionLoss(),)
    return (*own, *terms, *(() if aux is None else (aux,)))


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
    """Refuse a folder that holds something (ValueError), or empty it of an SAE where that is asked for; for whoever
    holds it.
    """
    if resume and overwrite:
        raise ValueError("`--resume` and `--overwrite` exclude each other; give one.")
    if (out / "manifest.json").is_file():
        raise ValueError(f"`--out` must not be a folder of activations, got '{out}'; choose another.")
    settle(out)
    if resume:
        return
    found = "a finished SAE" if (out / CONFIG).is_file() else "an unfinished run"
    if not overwrite and ((out / CONFIG).is_file() or find_checkpoint(out)):
        raise ValueError(f"'{out}' holds {found}; give --resume to go on, --overwrite to start over, or another --out.")
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER, ignore_errors=True)


@options.documented_by(tokenize, TokenMask, collect, load_model)
def collect_text(
    model: options.ModelName,
    text: options.TextFile,
    hook_point: Annotated[
        list[str],
        Option(help="Hook point, such as blocks.2.hook_resid_post; may be given again for several.", metavar="NAME"),
    ],
    out: Annotated[Path, Option(help="Folder for the activations.", metavar="FOLDER")],
    n_tokens: int | None = None,
    ctx_len: int = options.CTX_LEN,
    dtype: Annotated[
        str, Option(help=f"Dtype of the stored rows: {', '.join(options.DTYPES)}.", metavar="NAME")
    ] = options.DTYPES[0],
    max_norm_ratio: Annotated[float | None, Option(show_default="keep all")] = TokenMask.max_norm_ratio,
    batch_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    bos: options.Bos = True,
    weight_processing: options.Name = "none",
    device: options.Device = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete activations in the folder and start over.")] = False,
    progress: options.Progress = True,
) -> None:
    """Write the activations of a language model on a text to a folder.

    Reads the text from its start. Special tokens are left out. An interrupted run continues where it
    stopped when the same command is run again, and ends with the same bytes.

    Several processes share the work, into one folder: torchrun --nproc-per-node 4 -m saelab collect ...
    """
    if dtype not in options.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(options.DTYPES)}, got '{dtype}'.")
    with launched(None, options.choose_device(device)) as (ranks, place):
        shown = progress and ranks.is_first
        with ranks.together():
            lm = load_model(model, device=place, weight_processing=weight_processing, progress=shown)
        tokens = read_head(lm, text, n_tokens, ctx_len, bos, separator, field, ranks.mesh)
        if n_tokens is not None and tokens.n_tokens < n_tokens:
            echo(f"note: the text holds {tokens.n_tokens:,} tokens, fewer than --n-tokens {n_tokens:,}.", err=True)
        collect(
            lm,
            tokens,
            hook_point,
            out,
            dtype=getattr(torch, dtype),
            mask=TokenMask(max_norm_ratio=max_norm_ratio),
            batch_size=batch_size,
            shard_tokens=shard_tokens,
            progress=progress,
            resume=not overwrite,
            mesh=ranks.mesh,
        )
        ranks.on_first(lambda: echo(describe_activations(out)))


@options.documented_by(evaluate, tokenize)
def evaluate_sae(
    sae: options.SAEName,
    model: options.ModelName,
    text: options.TextFile,
    n_tokens: Annotated[int, Option(help="Tokens to evaluate on, BOS included.")] = N_TOKENS,
    ctx_len: options.SAECtxLen = None,
    from_start: Annotated[
        bool,
        Option("--from-start", help="Read the text from its start, where `collect` reads too, not from its end."),
    ] = False,
    json: options.JSONFile = None,
    saebench: Annotated[
        Path | None,
        Option(help="File for the numbers in SAEBench's schema.", metavar="FILE", show_default="none is written"),
    ] = None,
    baselines: options.Baselines = None,
    no_baselines: Annotated[
        bool, Option("--no-baselines", help="Leave out the untrained SAE, the random dictionary and PCA, too.")
    ] = False,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = SEED,
    allow_mismatch: options.AllowMismatch = False,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    bos: options.Bos = True,
    device: options.Device = None,
    progress: options.Progress = True,
) -> None:
    """Evaluate an SAE in its language model, compared with baselines.

    Documents are taken from the END of the text, the last one first, because `collect` reads from the start. A warning
    is printed if an evaluated document was also trained on, as far as the names of the two files show.
    """
    if no_baselines and baselines is not None:
        raise ValueError(
            f"`--no-baselines` must stand without `--baselines`, got '{baselines}'. Leave one of them out."
        )
    coder, lm = open_pair(sae, model, device, progress)
    origin = coder.provenance
    length = ctx_len or (origin.ctx_len if origin else None) or options.CTX_LEN
    if from_start:
        tokens, n_before = read_head(lm, text, n_tokens, length, bos, separator, field), 0
    else:
        tokens, n_before = read_tail(lm, text, n_tokens, length, bos, separator, field)
    _announce(tokens, n_before, origin)
    result = evaluate(
        coder,
        lm,
        tokens,
        baselines=load_baselines(baselines) if baselines is not None else not no_baselines,
        n_bootstrap=n_bootstrap,
        seed=seed,
        allow_mismatch=allow_mismatch,
        progress=progress,
    )
    echo(str(result))
    if json is not None:
        result.save(json)
    if saebench is not None:
        save_saebench(result, saebench, coder)


def _announce(tokens: Tokens, n_before: int, origin: Provenance | None) -> None:
    """Say on stderr what is evaluated on, and how much of it the SAE has seen."""
    if origin and (n_both := count_overlap(tokens, n_before, origin.text)):
        echo(f"warning: the SAE was trained on {n_both:,} of these documents ({origin.text}).", err=True)
    echo(f"Evaluating on {tokens.n_tokens:,} tokens of {tokens.source}.", err=True)
