"""`saelab plan`: memory, disk, bytes sent and time of a training run, before it is begun."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from saelab.sae.planning import StepRates

WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""how configurations of Hugging Face call the width of the residual stream"""


@options.documented_by(options.SAE_CONFIG, options.TRAINING)
def plan_run(
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="Local folder of a language model, or a built-in one, whose width is d_in; only its configuration "
            "and the headers of its files are read.",
            show_default="none: give --d-in",
        ),
    ] = None,
    *,
    d_sae: int,
    d_in: Annotated[int | None, Option(show_default="the model's width")] = None,
    n_tokens: Annotated[
        float, Option("--n-tokens", "--tokens", help="Tokens to collect and to train on, such as 1e9.", metavar="N")
    ] = options.TRAINING.n_tokens,
    activation: Annotated[
        str, Option(help="Activation that keeps k latents: topk, abstopk, batchtopk, batchabstopk, groupmax.")
    ] = options.ACTIVATIONS["TopK"],
    k: Annotated[int, Option(help="Latents kept per token.")] = options.TOPK.k,
    prefixes: options.Prefixes = None,
    batch_size: int | None = None,
    optim_bits: int = options.TRAINING.optim_bits,
    mesh: Annotated[
        str | None,
        Option(
            help="Processes: ranks that divide each batch, times ranks that divide the latents, such as 2x4.",
            metavar="DATAxLATENTS",
            show_default="one process",
        ),
    ] = None,
    dtype: Annotated[
        str, Option(help=f"Dtype of the collected activations: {', '.join(options.DTYPES)}.", metavar="NAME")
    ] = options.DTYPES[0],
    rates: Annotated[
        Path | None,
        Option(
            help="File that --json wrote before, whose rates are used; `link` in it is the bytes that a process can "
            "send in a second.",
            metavar="FILE",
            show_default="measured now, in some seconds",
        ),
    ] = None,
    time: Annotated[bool, Option("--time/--no-time", help="Estimate the time, or not.")] = True,
    json: options.JSONFile = None,
) -> None:
    """Say what training an SAE will take: memory of each process, disk, bytes sent in a step, and time.

    Nothing is trained but, for the time, a few steps of smaller SAEs on this machine's CPU.
    """
    import torch

    from saelab.cli.settings import read_activation, read_mesh, read_prefixes
    from saelab.sae.config import SAEConfig
    from saelab.sae.planning import measure_rates, plan_training
    from saelab.stores.results import format_table
    from saelab.training.config import TrainConfig, default_batch_size

    if dtype not in options.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(options.DTYPES)}, got '{dtype}'.")
    if not (math.isfinite(n_tokens) and n_tokens >= 1):
        raise ValueError(f"`--n-tokens` must be a number of at least 1, got {n_tokens}.")
    found = None if model is None else read_model(model)
    width = d_in or (found.d_model if found else None)
    if width is None:
        raise ValueError("`--d-in` must be given where no model is, got neither; give --d-in, or a MODEL.")
    cfg = SAEConfig(
        d_in=width, d_sae=d_sae, activation=read_activation(activation, k), prefixes=read_prefixes(prefixes)
    )
    size = default_batch_size(int(n_tokens)) if batch_size is None else batch_size
    run = TrainConfig(n_tokens=int(n_tokens), batch_size=size, optim_bits=optim_bits)
    n_data, n_latents = read_mesh(mesh) or (1, 1)
    # refuses what cannot be planned before anything is measured
    plan = plan_training(cfg, run, n_data, n_latents, dtype=getattr(torch, dtype))
    if time or rates is not None:
        known = measure_rates(cfg) if rates is None else _load_rates(rates)
        plan = plan_training(cfg, run, n_data, n_latents, dtype=getattr(torch, dtype), rates=known)
    echo(str(plan))
    if found is not None:
        echo("\n".join(format_table(_model_rows(found))))
    if json is not None:
        plan.save(json)


class ModelSize(NamedTuple):
    """Size of a language model."""

    name: str
    d_model: int
    n_parameters: int | None
    """None where the files do not say"""


def read_model(name: str) -> ModelSize:
    """Width and number of parameters of a local model, from its configuration and the headers of its files.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the configuration does not say its width.

    >>> read_model("tales").d_model
    128
    """
    from saelab.lm.models import BUILT_IN, WORLD_MODELS, tiny_model
    from saelab.stores.tensors import TensorFile
    from saelab.stores.validation import naming, read_json, require_object

    if name == "tiny":
        lm = tiny_model()
        return ModelSize(name, int(lm.cfg.d_model), sum(p.numel() for p in lm.original_model.parameters()))
    folder = WORLD_MODELS / name if name in BUILT_IN else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"MODEL must be a folder with a config.json, or built in ({', '.join(BUILT_IN)}, tiny), got '{name}'; give "
            "--d-in instead, or download the model."
        )
    with naming(folder / "config.json"):
        said: dict[str, Any] = dict(require_object(read_json(folder / "config.json"), "A model's configuration"))
        said |= said.get("text_config") or {}  # of a multimodal model
        widths = [said[key] for key in WIDTHS if isinstance(said.get(key), int)]
        if not widths:
            raise ValueError(f"A model's configuration must say its width as one of {', '.join(WIDTHS)}; give --d-in.")
    files = [TensorFile.open(path) for path in sorted(folder.glob("*.safetensors"))]
    sizes = [math.prod(spec.shape) for file in files for spec in file.specs.values()]
    return ModelSize(name, widths[0], sum(sizes) if sizes else None)


def _model_rows(found: ModelSize) -> list[list[str]]:
    rows = [["model", found.name], ["  width", f"{found.d_model:,}"]]
    if found.n_parameters is not None:
        rows.append(["  parameters", f"{found.n_parameters:,}"])
        rows.append(["  memory while collecting (float32)", f"{4 * found.n_parameters / 2**30:,.3f} GiB"])
    return rows


def _load_rates(path: Path) -> "StepRates":
    from saelab.sae.planning import read_rates
    from saelab.stores.validation import naming, read_json, require_object

    with naming(path):
        return read_rates(require_object(read_json(path), "A file of rates"))
