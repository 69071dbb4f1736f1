"""Arguments and options that several commands share, with their help; defaults are the library's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from typer import Argument, Option

from saelab.analysis.dashboard import COLUMNS
from saelab.lm.tokens import tokenize
from saelab.sae.activation_functions import ACTIVATIONS
from saelab.sae.archetypal import Archetypal
from saelab.sae.config import Dictionary, Init
from saelab.sae.normalizer import KINDS


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of a library function's parameter, so that the command line's is the same."""
    return inspect.signature(function).parameters[name].default


CTX_LEN: int = default_of(tokenize, "ctx_len")
SEPARATOR: str = default_of(tokenize, "separator")
FIELD: str = default_of(tokenize, "field")
CTX_HELP = "Tokens in a sequence."
DTYPES = ("float32", "bfloat16", "float16")

# several commands
ModelName = Annotated[
    str,
    Argument(
        metavar="MODEL", help="Hub id or local folder of a causal language model; `tiny`: a random one, built in."
    ),
]
TextFile = Annotated[
    Path, Argument(metavar="TEXT", help="Documents in a file: .jsonl, .parquet, or UTF-8 text with separator lines.")
]
Separator = Annotated[
    str, Option(help="Line that ends a document in a text file; '' makes every line a document.", metavar="LINE")
]
Field = Annotated[str, Option(help="Name of the text in the rows of .jsonl and .parquet.", metavar="NAME")]
Bos = Annotated[bool, Option("--bos/--no-bos", help="Put the model's BOS token before every document, or not.")]
WeightProcessing = Annotated[
    str, Option(help="none: the weights as they are; folded: as TransformerLens 2 folded and centred them.")
]
Device = Annotated[
    str | None,
    Option(
        help="Where to compute, such as cpu, cuda or mps.", metavar="NAME", show_default="an accelerator if present"
    ),
]
Progress = Annotated[bool, Option("--progress/--no-progress", help="Show progress on stderr, or not.")]

# `saelab collect`
HookPointsOption = Annotated[
    list[str],
    Option(
        help="Place in the model, such as blocks.2.hook_resid_post; several by giving the flag again.", metavar="NAME"
    ),
]
OutActs = Annotated[Path, Option(help="Folder for the activations.", metavar="FOLDER")]
HeadTokens = Annotated[
    int | None, Option(help="Tokens to read from the start of the text, BOS included.", show_default="all")
]
CtxLen = Annotated[int, Option(help=CTX_HELP)]
DType = Annotated[str, Option(help=f"What the activations are stored as: {', '.join(DTYPES)}.", metavar="NAME")]
MaxNormRatio = Annotated[
    float | None,
    Option(help="Leave out tokens whose norm exceeds this many times the median norm.", show_default="keep all"),
]
ForwardSize = Annotated[int | None, Option(help="Sequences in a forward.", show_default="about 4096 tokens")]
ShardTokens = Annotated[int, Option(help="Tokens in a file of the folder.")]
OverwriteActs = Annotated[bool, Option("--overwrite", help="Delete activations in the folder and begin anew.")]

# `saelab train`
ActsFolder = Annotated[Path, Argument(metavar="ACTS", help="Folder of activations written by `saelab collect`.")]
Width = Annotated[int, Option(help="Latents in the dictionary.")]
OutSAE = Annotated[Path, Option(help="Folder for the SAE, its history and its checkpoint.", metavar="FOLDER")]
ActivationName = Annotated[str, Option(help=f"Which latents fire: {', '.join(ACTIVATIONS)}.", metavar="NAME")]
K = Annotated[
    int,
    Option(help="Latents that fire for a token: kept (topk, abstopk), mean (batch...), target L0 (relu, jumprelu)."),
]
Prefixes = Annotated[
    str | None,
    Option(
        help="Matryoshka: sizes that end at d_sae, such as 64,256,1024, or `random`.",
        metavar="SIZES",
        show_default="none",
    ),
]
DictionaryName = Annotated[
    str, Option(help=f"Rows of the dictionary: {', '.join(get_args(Dictionary))}, archetypal.", metavar="NAME")
]
NPoints = Annotated[
    int | None, Option(help="Points an archetypal dictionary is mixed from.", show_default="as many as latents")
]
Delta = Annotated[
    float | None,
    Option(help="How far an archetypal dictionary may leave the points' hull.", show_default=str(Archetypal.delta)),
]
NormalizerName = Annotated[
    str, Option(help=f"What is done to the activations first: {', '.join(KINDS)}.", metavar="NAME")
]
InitName = Annotated[str, Option(help=f"What the dictionary starts from: {', '.join(get_args(Init))}.", metavar="NAME")]
Aux = Annotated[bool, Option("--aux/--no-aux", help="Bring dead latents back by the AuxK loss, or not.")]
DeadAfter = Annotated[
    int | None,
    Option(
        help="Tokens without firing after which a latent counts as dead.",
        show_default="10 million, or 5 % of a shorter run",
    ),
]
TrainTokens = Annotated[int, Option(help="Tokens to train on; fewer activations are passed over again.")]
BatchSize = Annotated[int, Option(help="Tokens in a step.")]
LR = Annotated[
    float | None, Option(help="Peak learning rate.", show_default="follows width, batch and length of the run")
]
TrainSeed = Annotated[int, Option(help="Of the first weights and the order of the data.")]
SaveEvery = Annotated[int | None, Option(help="Tokens between checkpoints.", show_default="a tenth of the run")]
HookPoint = Annotated[
    str | None,
    Option(help="Which one, where the folder holds several.", metavar="NAME", show_default="the only one"),
]
TargetHookPoint = Annotated[
    str | None,
    Option(
        help="Hook point whose activations a transcoder reconstructs; it reads at the other one.",
        metavar="NAME",
        show_default="none: an autoencoder",
    ),
]
Skip = Annotated[bool, Option("--skip", help="Give the transcoder a linear connection beside its latents.")]
Resume = Annotated[bool, Option("--resume", help="Go on from the checkpoint in the folder, if there is one.")]
OverwriteSAE = Annotated[bool, Option("--overwrite", help="Delete the SAE in the folder and begin anew.")]

# `saelab evaluate`
SAEName = Annotated[str, Argument(metavar="SAE", help="Folder of an SAE, or a Hub id.")]
EvalTokens = Annotated[int, Option(help="Tokens to evaluate on, BOS included.")]
EvalCtxLen = Annotated[int | None, Option(help=CTX_HELP, show_default=f"the SAE's, else {CTX_LEN}")]
FromStart = Annotated[
    bool, Option("--from-start", help="Read the text from its start, where `collect` reads too, not from its end.")
]
JSONFile = Annotated[Path | None, Option(help="File for the numbers.", metavar="FILE", show_default="none is written")]
SAEBenchFile = Annotated[
    Path | None,
    Option(help="File for the numbers in SAEBench's schema.", metavar="FILE", show_default="none is written"),
]
Baselines = Annotated[
    bool,
    Option("--baselines/--no-baselines", help="Measure an untrained SAE, a random dictionary and PCA too, or not."),
]
Draws = Annotated[int, Option(help="Draws of documents behind the 95 % intervals.")]
EvalSeed = Annotated[int, Option(help="Of the baselines and the draws.")]
AllowMismatch = Annotated[
    bool, Option("--allow-mismatch", help="Go ahead with another model than the SAE was trained on.")
]

# `saelab demo`
OutDemo = Annotated[
    Path, Option(help="Folder for the report and the dictionaries; an older demo is replaced.", metavar="FOLDER")
]
TalesModel = Annotated[str, Option(help="A model of tales: its name, or a folder that holds one.", metavar="NAME")]
DemoHookPoint = Annotated[str, Option(help="Whose activations are taken apart.", metavar="NAME")]
NStories = Annotated[int, Option(help="Stories to train on; half as many others to score on.")]
DemoTokens = Annotated[int, Option(help="Tokens that each dictionary is trained on.")]
DemoWidth = Annotated[int, Option(help="Latents in each dictionary.")]
DemoK = Annotated[int, Option(help="Latents that fire for a token: kept, or their mean.")]
DemoSeed = Annotated[int, Option(help="Of the dictionaries, the order of the data and the split of the stories.")]


def choose_device(name: str | None) -> torch.device:
    """The named device, or the accelerator where there is one; ValueError for one that this machine does not have."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown name; known, but not on this machine
        raise ValueError(
            f"`--device` must be one that this machine has, got '{name}' ({str(error).splitlines()[0]})"
        ) from error


# `saelab harvest`, `features`, `dead`
OutStore = Annotated[Path, Option(help="Folder for the feature store.", metavar="FOLDER")]
OverwriteStore = Annotated[bool, Option("--overwrite", help="Delete the store in the folder and begin anew.")]
ValueType = Annotated[str, Option(help="Type of the stored codes: float16 or float32.", metavar="NAME")]
StoreFolder = Annotated[Path, Argument(metavar="STORE", help="Folder written by `saelab harvest`.")]
SortColumn = Annotated[str, Option(help=f"Column to sort by: {', '.join(COLUMNS)}.", metavar="NAME")]
TopRows = Annotated[int, Option(help="Rows to show.")]
Ascending = Annotated[bool, Option("--ascending", help="Smallest first.")]
AsJSON = Annotated[bool, Option("--json", help="Print JSON.")]
StoreSAE = Annotated[str | None, Option(help="The SAE that was harvested.", metavar="SAE", show_default="no causes")]
NearDead = Annotated[float, Option(help="Share of tokens below which a feature is near-dead.")]
Dense = Annotated[float, Option(help="Share of tokens above which a feature is dense.")]
OutReport = Annotated[Path, Option(help="Folder for the report, or one page where it ends in .html.", metavar="PATH")]
ReportSAE = Annotated[
    str | None, Option("--sae", help="The SAE that was harvested.", metavar="SAE", show_default="as the store has it")
]
ReportModel = Annotated[
    str | None, Option("--model", help="The language model.", metavar="MODEL", show_default="as the store has it")
]
Prompts = Annotated[list[str], Option("--prompt", help="A text to show token by token; may be given again.")]
FeatureList = Annotated[
    str | None, Option("--features", help="Numbers joined by commas.", metavar="1,2,3", show_default="all")
]
EvaluationFile = Annotated[
    Path | None, Option(help="What `saelab evaluate --json` wrote.", metavar="FILE", show_default="not shown")
]
Title = Annotated[str, Option(help="Of the report.", show_default="features, hook point and model")]
