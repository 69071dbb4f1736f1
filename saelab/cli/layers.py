"""`saelab layers`, `saelab lens`: how tokens lie in each layer of a model, and the words that each layer stands for."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source
from saelab.cli.terminal import echo

PROFILE = Source("saelab.analysis.layer_profiles:layer_profile")
LENS = Source("saelab.analysis.token_lens:lens")
FIT = Source("saelab.analysis.tuned_lens:fit_lens")
N_TOKENS = 50_000
TextTokens = Annotated[int, Option(help="Tokens of the text that are read, from its beginning.", metavar="N")]


@options.documented_by(PROFILE, options.TOKENIZE)
def profile_layers(
    model: options.ModelName,
    text: options.TextFile,
    n_tokens: TextTokens = N_TOKENS,
    n_prompts: options.Count = PROFILE.n_prompts,
    n_groups: options.Count = PROFILE.n_groups,
    length: options.Count = PROFILE.length,
    n_views: options.Count = PROFILE.n_views,
    fdr: float = PROFILE.fdr,
    ctx_len: options.Count = options.CTX_LEN,
    bos: options.Bos = True,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    seed: options.Count = PROFILE.seed,
    out: options.JSONFile = None,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    json: options.AsJSON = False,
    progress: options.Progress = True,
) -> None:
    """Show how the tokens of a text lie in each layer: entropy, curvature, rank, dimension, anisotropy, neighbors.

    Every measure stands beside that of shuffled text and of chance; those that are no different come first.
    """
    from saelab.analysis.layer_profiles import layer_profile
    from saelab.cli.inputs import choose_device, read_head
    from saelab.lm.models import load_model
    from saelab.stores.files import to_json, write_json

    lm = load_model(model, device=choose_device(device), backend=backend, progress=progress)
    tokens = read_head(lm, text, n_tokens, ctx_len, bos, separator, field)
    found = layer_profile(
        lm, tokens, n_prompts=n_prompts, n_groups=n_groups, length=length, n_views=n_views, fdr=fdr, seed=seed,
        progress=progress,
    )  # fmt: skip
    if out is not None:
        write_json(out, found.to_dict())
    echo(to_json(found.to_dict()) if json else str(found))


@options.documented_by(LENS, FIT, options.TOKENIZE)
def show_lens(
    model: options.ModelName,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text whose tokens are read.")],
    tuned: Annotated[
        Path | None,
        Option(help="Folder of a tuned lens; with --fit it is written there.", metavar="FOLDER",
               show_default="the logit lens"),
    ] = None,
    fit: Annotated[
        Path | None,
        Option(help="Text to fit a tuned lens to, as --tuned names it.", metavar="TEXT", show_default="none is fitted"),
    ] = None,
    n_tokens: TextTokens = N_TOKENS,
    n_steps: options.Count = FIT.n_steps,
    ctx_len: options.Count = options.CTX_LEN,
    bos: options.Bos = True,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    n: options.Count = LENS.n,
    allow_mismatch: options.AllowMismatch = False,
    seed: options.Count = LENS.seed,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    json: options.AsJSON = False,
    progress: options.Progress = True,
) -> None:  # fmt: skip
    """Show the next words that each layer of a model stands for, at every token of a prompt.

    By the model's own last norm and head (logit lens), or through a tuned lens, which --fit fits and scores first.
    """
    from saelab.analysis.token_lens import lens
    from saelab.analysis.tuned_lens import TunedLens, fit_lens
    from saelab.cli.inputs import choose_device, read_head
    from saelab.lm.models import load_model
    from saelab.stores.files import to_json

    if fit is not None and tuned is None:
        raise ValueError("`--fit` needs a folder for the lens, got none. Name it with --tuned.")
    lm = load_model(model, device=choose_device(device), backend=backend, progress=progress)
    read = None
    if fit is not None and tuned is not None:
        tokens = read_head(lm, fit, n_tokens, ctx_len, bos, separator, field)
        read = fit_lens(lm, tokens, n_steps=n_steps, seed=seed, progress=progress)
        read.save_pretrained(tuned)
        echo(str(read), err=True)
    elif tuned is not None:
        read = TunedLens.from_pretrained(tuned)
    found = lens(lm, prompt, read, n=n, allow_mismatch=allow_mismatch, seed=seed)
    echo(to_json(found.to_dict()) if json else str(found))
