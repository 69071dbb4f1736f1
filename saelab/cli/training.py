"""`saelab collect`, `saelab train`, `saelab evaluate`: activations, a trained SAE, and its evaluation."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo
from saelab.stores.jobs import hold_folder

AUX_K = Source("saelab.sae.objectives.dead_latents:AuxK")
ARCHETYPAL = Source("saelab.sae.archetypal:Archetypal")
MASK = Source("saelab.lm.masks:TokenMask")
COLLECT = Source("saelab.collecting.collection:collect")
LOAD = Source("saelab.lm.models:load_model")
EVALUATE = Source("saelab.evaluation.evaluation:evaluate")
DICTIONARIES = read_value("saelab.sae.config:Dictionary")
SHARD_TOKENS = read_value("saelab.collecting.collection:SHARD_TOKENS")
N_TOKENS = 100_000


@options.documented_by(options.SAE_CONFIG, options.TRAINING, AUX_K, ARCHETYPAL)
def train_sae(
    acts: Annotated[Path, Argument(metavar="ACTS", help="Folder of activations written by `saelab collect`.")],
    d_sae: int,
    out: Annotated[Path, Option(help="Folder for the SAE, its history and its checkpoint.", metavar="FOLDER")],
    activation: Annotated[
        str,
        Option(
            help="Which latents fire, with its settings, such as NAME,key=0.1: "
            f"{', '.join(options.ACTIVATIONS.values())}.",
            metavar="NAME",
        ),
    ] = options.ACTIVATIONS["TopK"],
    k: Annotated[
        int | None,
        Option(
            help="Latents per token: kept (topk, abstopk), mean (batch...), target L0 (relu, jumprelu).",
            show_default=f"{options.TOPK.k}",
        ),
    ] = None,
    prefixes: options.Prefixes = None,
    dictionary: Annotated[
        str,
        Option(help=f"Rows of the dictionary: {', '.join(DICTIONARIES)}, archetypal, soft_frozen.", metavar="NAME"),
    ] = options.SAE_CONFIG.dictionary,
    n_points: int | None = None,
    delta: Annotated[float | None, Option(show_default=str(ARCHETYPAL.delta))] = None,
    normalizer: options.Name = options.SAE_CONFIG.normalizer,
    init: options.Name = options.SAE_CONFIG.init,
    train_encoder: bool = options.SAE_CONFIG.train_encoder,
    aux: Annotated[bool, Option("--aux/--no-aux", help="Revive dead latents by the AuxK loss, or not.")] = True,
    dead_after_tokens: int | None = AUX_K.dead_after_tokens,
    objective: Annotated[
        list[str] | None,
        Option(
            help="A further loss term with its settings, such as NAME,coefficient=0.1; may be repeated. The term "
            "replaces reconstruction or sparsity where it is a kind of it.",
            metavar="TERM",
            show_default="none",
        ),
    ] = None,
    n_tokens: int = options.TRAINING.n_tokens,
    batch_size: int | None = None,
    lr: float | None = options.TRAINING.lr,
    optim_bits: int = options.TRAINING.optim_bits,
    seed: Annotated[int, Option(help="Seed of the initial weights and the order of the data.")] = options.TRAINING.seed,
    save_every_tokens: int | None = options.TRAINING.save_every_tokens,
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
    beside: Annotated[
        list[Path] | None,
        Option(
            help="Another folder of activations of the same tokens, such as a fine-tuned model's, for a crosscoder; "
            "may be repeated. Sources have the names of their folders.",
            metavar="ACTS",
            show_default="none",
        ),
    ] = None,
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
    from saelab.cli import settings
    from saelab.cli.inputs import choose_device
    from saelab.sae.config import SAEConfig
    from saelab.sae.objectives.dead_latents import AuxK
    from saelab.sae.sae import SAE
    from saelab.sae.sharding import check_ranks
    from saelab.training.config import TrainConfig, default_batch_size
    from saelab.training.launch import launched

    shape, kind = settings.read_mesh(mesh), choose_device(device)
    rows, targets = settings.load_activations(acts, hook_point, target)
    if beside:
        rows = settings.join_activations(rows, acts, beside, hook_point, target)
    cfg = SAEConfig(
        d_in=rows.d_in,
        d_sae=d_sae,
        activation=settings.read_activation(activation, k),
        prefixes=settings.read_prefixes(prefixes),
        dictionary=settings.read_dictionary(dictionary, n_points, delta),  # type: ignore[arg-type]  # SAEConfig checks names
        normalizer=normalizer,  # type: ignore[arg-type]
        init=init,  # type: ignore[arg-type]
        train_encoder=train_encoder,
        objective=settings.read_objective(objective or [], AuxK(dead_after_tokens=dead_after_tokens) if aux else None),
        d_out=None if targets is None else targets.d_in,
        skip=skip,
        sources=rows.sources,
    )
    size = default_batch_size(n_tokens) if batch_size is None else batch_size
    budget = TrainConfig(
        n_tokens=n_tokens,
        batch_size=size,
        lr=lr,
        optim_bits=optim_bits,
        seed=seed,
        save_every_tokens=save_every_tokens,
    )
    data = rows if targets is None else (rows, targets)
    with launched(shape, kind) as (ranks, place), ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(hold_folder(out))
            settings.claim_folder(out, resume, overwrite)

        check_ranks(cfg, budget, ranks)
        ranks.on_first(claim)
        with ranks.together():
            own = None if ranks.alone else ranks.latents.split(cfg.d_sae)
            sae = SAE(cfg, seed=seed, latents=own).to(place)
        settings.train_into(out, sae, data, budget, resume, progress, ranks)


@options.documented_by(options.TOKENIZE, MASK, COLLECT, LOAD)
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
    max_norm_ratio: Annotated[float | None, Option(show_default="keep all")] = MASK.max_norm_ratio,
    batch_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    bos: options.Bos = True,
    weight_processing: options.Name = "none",
    device: options.Device = None,
    backend: options.BackendName = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Delete activations in the folder and start over.")] = False,
    progress: options.Progress = True,
) -> None:
    """Write the activations of a language model on a text to a folder.

    Reads the text from its start. Special tokens are left out. An interrupted run continues where it
    stopped when the same command is run again, and ends with the same bytes.

    Several processes share the work, into one folder: torchrun --nproc-per-node 4 -m saelab collect ...
    """
    import torch

    from saelab.cli.descriptions import describe_activations
    from saelab.cli.inputs import choose_device, read_head
    from saelab.collecting.collection import collect
    from saelab.lm.masks import TokenMask
    from saelab.lm.models import load_model
    from saelab.training.launch import launched

    if dtype not in options.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(options.DTYPES)}, got '{dtype}'.")
    with launched(None, choose_device(device)) as (ranks, place):
        shown = progress and ranks.is_first
        with ranks.together():
            lm = load_model(model, device=place, weight_processing=weight_processing, backend=backend, progress=shown)
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


@options.documented_by(EVALUATE, options.TOKENIZE)
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
    n_bootstrap: int = EVALUATE.n_bootstrap,
    seed: int = EVALUATE.seed,
    allow_mismatch: options.AllowMismatch = False,
    separator: options.Separator = options.SEPARATOR,
    field: options.Name = options.FIELD,
    bos: options.Bos = True,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    progress: options.Progress = True,
) -> None:
    """Evaluate an SAE in its language model, compared with baselines.

    Documents are taken from the END of the text, the last one first, because `collect` reads from the start. A warning
    is printed if an evaluated document was also trained on, as far as the names of the two files show.
    """
    from saelab.cli.inputs import announce, open_pair, read_head, read_tail
    from saelab.evaluation.evaluation import evaluate
    from saelab.interop.saebench import save_saebench
    from saelab.sae.baselines import load_baselines

    if no_baselines and baselines is not None:
        raise ValueError(
            f"`--no-baselines` must stand without `--baselines`, got '{baselines}'. Leave one of them out."
        )
    coder, lm = open_pair(sae, model, device, progress, backend)
    origin = coder.provenance
    length = ctx_len or (origin.ctx_len if origin else None) or options.CTX_LEN
    if from_start:
        tokens, n_before = read_head(lm, text, n_tokens, length, bos, separator, field), 0
    else:
        tokens, n_before = read_tail(lm, text, n_tokens, length, bos, separator, field)
    announce(tokens, n_before, origin)
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
