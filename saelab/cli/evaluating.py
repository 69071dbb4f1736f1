"""`saelab evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from saelab.cli.options import (
    CTX_LEN,
    FIELD,
    SEPARATOR,
    Bos,
    Device,
    Field,
    ModelName,
    Progress,
    Separator,
    TextFile,
    choose_device,
    default_of,
)
from saelab.cli.texts import count_overlap, read_head, read_tail
from saelab.evaluation.evaluation import evaluate
from saelab.lm.models import load_model
from saelab.sae.sae import SAE

N_TOKENS = 100_000


def evaluate_sae(
    sae: Annotated[str, Argument(metavar="SAE", help="Folder of an SAE, or a Hub id.")],
    model: ModelName,
    text: TextFile,
    n_tokens: Annotated[int, Option(help="Tokens to evaluate on, BOS included.")] = N_TOKENS,
    ctx_len: Annotated[
        int | None, Option(help="Tokens in a sequence.", show_default=f"the SAE's, else {CTX_LEN}")
    ] = None,
    from_start: Annotated[
        bool, Option("--from-start", help="Read the text from its start, where `collect` reads too, not from its end.")
    ] = False,
    json: Annotated[
        Path | None, Option(help="File for the numbers.", metavar="FILE", show_default="none is written")
    ] = None,
    baselines: Annotated[
        bool,
        Option("--baselines/--no-baselines", help="Measure an untrained SAE, a random dictionary and PCA too, or not."),
    ] = default_of(evaluate, "baselines"),
    n_bootstrap: Annotated[int, Option(help="Draws of documents behind the 95 % intervals.")] = default_of(
        evaluate, "n_bootstrap"
    ),
    seed: Annotated[int, Option(help="Of the baselines and the draws.")] = default_of(evaluate, "seed"),
    allow_mismatch: Annotated[
        bool, Option("--allow-mismatch", help="Go ahead with another model than the SAE was trained on.")
    ] = False,
    separator: Separator = SEPARATOR,
    field: Field = FIELD,
    bos: Bos = True,
    device: Device = None,
    progress: Progress = True,
) -> None:
    """Evaluate an SAE in its language model, beside its baselines.

    Documents are taken from the END of the text, the last one first, because `collect` reads from the start. A warning
    says so when an evaluated document was trained on nevertheless, as far as the two file names tell.
    """
    coder = SAE.from_pretrained(sae, device=choose_device(device))
    origin = coder.provenance
    length = ctx_len or (origin.ctx_len if origin else None) or CTX_LEN
    lm = load_model(model, device=choose_device(device))
    if from_start:
        tokens, n_before = read_head(lm, text, n_tokens, length, bos, separator, field), 0
    else:
        tokens, n_before = read_tail(lm, text, n_tokens, length, bos, separator, field)
    if origin and (n_both := count_overlap(tokens, n_before, origin.text)):
        _note(f"warning: the SAE was trained on {n_both:,} of these documents ({origin.text}).")
    _note(f"Evaluating on {tokens.n_tokens:,} tokens of {tokens.source}.")
    result = evaluate(
        coder,
        lm,
        tokens,
        baselines=baselines,
        n_bootstrap=n_bootstrap,
        seed=seed,
        allow_mismatch=allow_mismatch,
        progress=progress,
    )
    typer.echo(str(result))
    if json is not None:
        result.save(json)


def _note(line: str) -> None:
    typer.echo(line, err=True)
