"""`saelab demo`: the whole way in about a minute, offline, on a language model that saelab builds itself."""

import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer import Option

from saelab.cli.commands import dispatch
from saelab.cli.options import SEPARATOR, Progress
from saelab.lm.models import tiny_model
from saelab.lm.teach import make_stories, save_model, teach
from saelab.lm.tokens import tokenize

CTX_LEN = 64
HOOK_POINT = "blocks.1.hook_resid_post"
INTRODUCTION = """\
saelab's demo. The language model is an embedded stand-in: 36 thousand weights that spell single letters, taught here
and now on made-up stories. It shows the way from text to an evaluated SAE; its numbers say nothing of real models."""


def run_demo(
    out: Annotated[
        Path, Option(help="Folder for all that is made; an older demo there is replaced.", metavar="FOLDER")
    ] = Path("runs/demo"),
    n_steps: Annotated[int, Option(help="Steps that the stand-in is taught for.")] = 400,
    n_tokens: Annotated[int, Option(help="Tokens that the SAE is trained on.")] = 1_000_000,
    progress: Progress = True,
) -> None:
    """Go the whole way on a built-in stand-in: teach, collect, train, evaluate; offline, in about a minute.

    Each command is printed before it runs, so that it can be given again with other flags.
    """
    typer.echo(INTRODUCTION)
    torch.set_num_threads(1)  # everything here is tiny: more threads only get in each other's way
    loss = make_stand_in(out, n_steps, progress)
    typer.echo(
        f"\nIts loss is {loss:.2f} nats a letter now (5.6 before). Saved to {out / 'model'}, the stories beside it."
    )
    model, text, acts, sae, scores = (
        shlex.quote(str(out / name)) for name in ("model", "stories.txt", "acts", "sae", "eval.json")
    )
    for command in (
        f"collect {model} {text} --hook-point {HOOK_POINT} --n-tokens 200000 --ctx-len {CTX_LEN} "
        f"--out {acts} --overwrite",
        f"train {acts} --activation abstopk --k 8 --d-sae 128 --prefixes 16,48,128 --n-tokens {n_tokens} "
        f"--batch-size 1024 --seed 0 --out {sae} --overwrite",
        f"evaluate {sae} {model} {text} --n-tokens 20000 --json {scores}",
    ):
        _run(command, progress)


def make_stand_in(out: Path, n_steps: int, progress: bool) -> float:
    """Write stories and a tiny model that was taught on most of them; returns its loss in nats a letter."""
    out.mkdir(parents=True, exist_ok=True)
    stories = make_stories(6000)
    (out / "stories.txt").write_text(f"\n{SEPARATOR}\n".join(stories), encoding="utf-8")
    model = tiny_model()
    loss = teach(model, tokenize(model, stories[:5000], CTX_LEN)[:-1], n_steps=n_steps, progress=progress)
    save_model(model, out / "model")
    return loss


def _run(command: str, progress: bool) -> None:
    typer.echo(f"\n$ saelab {command}")
    words = shlex.split(command) + ([] if progress else ["--no-progress"])
    if code := dispatch(words):
        raise typer.Exit(code)
