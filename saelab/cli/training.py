"""`saelab train`."""

import shutil
from dataclasses import fields
from pathlib import Path

from saelab.cli import options
from saelab.cli.info import describe_sae
from saelab.cli.saying import say
from saelab.sae.activations import TopK
from saelab.sae.archetypes import Archetypal
from saelab.sae.checkpoint import CONFIG, WEIGHTS
from saelab.sae.config import AuxK, RandomPrefixes, SAEConfig
from saelab.sae.fitting import Data
from saelab.sae.registry import ACTIVATIONS, Activation, make_activation
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.disk import hold_folder
from saelab.stores.files import settle
from saelab.stores.manifest import ActivationsManifest
from saelab.training.checkpoint import FOLDER, find_checkpoint
from saelab.training.config import TrainConfig

WRITTEN = (CONFIG, WEIGHTS, "history.jsonl", "history.csv")


def train_sae(
    acts: options.ActsFolder,
    d_sae: options.Width,
    out: options.OutSAE,
    activation: options.ActivationName = TopK.name,
    k: options.K = TopK.k,
    prefixes: options.Prefixes = None,
    dictionary: options.DictionaryName = SAEConfig.dictionary,  # type: ignore[assignment]  # the default is a name
    n_points: options.NPoints = None,
    delta: options.Delta = None,
    normaliser: options.NormaliserName = SAEConfig.normaliser,
    init: options.InitName = SAEConfig.init,
    aux: options.Aux = True,
    dead_after_tokens: options.DeadAfter = AuxK.dead_after_tokens,
    n_tokens: options.TrainTokens = TrainConfig.n_tokens,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    lr: options.LR = TrainConfig.lr,
    seed: options.TrainSeed = TrainConfig.seed,
    save_every_tokens: options.SaveEvery = TrainConfig.save_every_tokens,
    hook_point: options.HookPoint = None,
    target: options.Target = None,
    skip: options.Skip = False,
    device: options.Device = None,
    resume: options.Resume = False,
    overwrite: options.OverwriteSAE = False,
    progress: options.Progress = True,
) -> None:
    """Train a sparse autoencoder on collected activations, or with --target a transcoder to another hook point.

    Writes config.json and model.safetensors, the history as .jsonl and .csv, and a checkpoint. With the same seed and
    flags it writes the same bytes (on a CPU), interrupted and resumed or not.
    """
    rows, targets = load_activations(acts, hook_point, target)
    cfg = SAEConfig(
        d_in=rows.d_in,
        d_sae=d_sae,
        activation=read_activation(activation, k),
        prefixes=read_prefixes(prefixes),
        dictionary=read_dictionary(dictionary, n_points, delta),  # type: ignore[arg-type]  # SAEConfig checks names
        normaliser=normaliser,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
        aux=AuxK(dead_after_tokens=dead_after_tokens) if aux else None,
        d_out=None if targets is None else targets.d_in,
        skip=skip,
    )
    budget = TrainConfig(
        n_tokens=n_tokens, batch_size=batch_size, lr=lr, seed=seed, save_every_tokens=save_every_tokens
    )
    sae = SAE(cfg, seed=seed).to(options.choose_device(device))
    with hold_folder(out):
        claim_folder(out, resume, overwrite)
        _train_into(out, sae, rows if targets is None else (rows, targets), budget, resume, progress)


def _train_into(out: Path, sae: SAE, rows: Data, budget: TrainConfig, resume: bool, progress: bool) -> None:
    """Train, save, and say what came of it."""
    finished = (out / CONFIG).is_file()
    sae.fit(rows, budget, out=out, resume=resume, progress=progress)
    sae.save_pretrained(out)
    if finished:
        say("This SAE was complete already.")
    say(describe_sae(out))


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


def read_activation(name: str, k: int) -> Activation:
    """The activation with `k` as its number of latents a token: kept ones, or the target of a penalised one."""
    known = {field.name for field in fields(ACTIVATIONS[name])} if name in ACTIVATIONS else set()
    return make_activation(name, **({"target_l0": float(k)} if "target_l0" in known else {"k": k}))


def read_dictionary(name: str, n_points: int | None, delta: float | None) -> str | Archetypal:
    """The dictionary by its name, an archetypal one with its two settings; ValueError for settings of another.

    >>> read_dictionary("archetypal", None, 0.2)
    Archetypal(n_points=None, delta=0.2)
    """
    if name == "archetypal":
        return Archetypal(n_points=n_points, delta=Archetypal.delta if delta is None else delta)
    if n_points is not None or delta is not None:
        raise ValueError(
            f"`--n-points` and `--delta` must go with `--dictionary archetypal`, got '{name}'; leave them out."
        )
    return name


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
        raise ValueError(f"'{out}' holds {found}; give --resume to go on, --overwrite to begin anew, or another --out.")
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FOLDER, ignore_errors=True)
