"""Settings of training as the command line spells them, the activations it reads, and the folder it writes."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from saelab.cli.descriptions import describe_sae
from saelab.cli.terminal import echo
from saelab.sae.activation_functions import make_activation
from saelab.sae.activation_registry import ACTIVATIONS, Activation
from saelab.sae.archetypal import Archetypal
from saelab.sae.config import RandomPrefixes, read_loss_terms
from saelab.sae.fitting import Data
from saelab.sae.objectives.dead_latents import AuxK
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import LossTerm
from saelab.sae.pretrained import CONFIG, WEIGHTS
from saelab.sae.sae import SAE
from saelab.sae.soft_frozen import SoftFrozen
from saelab.stores.activations import Activations
from saelab.stores.files import settle
from saelab.stores.manifest import ActivationsManifest
from saelab.training.checkpoint import FOLDER, find_checkpoint
from saelab.training.config import TrainConfig
from saelab.training.ranks import RankGrid

WRITTEN = (CONFIG, WEIGHTS, "history.jsonl", "history.csv")


def train_into(
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


def join_activations(
    rows: Activations, acts: Path, beside: Sequence[Path], hook_point: str | None, target: str | None
) -> Activations:
    """Activations with those of other folders side by side, by the names of the folders.

    Args:
        rows: activations that were read.
        acts: their folder.
        beside: the other folders.
        hook_point: hook point in each, or None.
        target: a transcoder's target; must be None.

    Raises:
        ValueError: a target, folders of one name, and activations of other tokens.
    """
    folders = [acts, *beside]
    names = [folder.resolve().name for folder in folders]
    if target is not None or len(set(names)) < len(names):
        raise ValueError(f"`--beside` must name folders of other names, without `--target`, got {names}.")
    others = {name: Activations.load(folder, hook_point) for name, folder in zip(names[1:], beside, strict=True)}
    return Activations.join({names[0]: rows, **others})


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
