"""`saelab collect`."""

import torch

from saelab.cli import options
from saelab.cli.info import describe_activations
from saelab.cli.saying import say
from saelab.cli.texts import read_head
from saelab.collecting.collection import SHARD_TOKENS, collect
from saelab.lm.masks import TokenMask
from saelab.lm.models import load_model


def collect_text(
    model: options.ModelName,
    text: options.TextFile,
    hook_point: options.HookPoints,
    out: options.OutActs,
    n_tokens: options.HeadTokens = None,
    ctx_len: options.CtxLen = options.CTX_LEN,
    dtype: options.DType = options.DTYPES[0],
    max_norm_ratio: options.MaxNormRatio = TokenMask.max_norm_ratio,
    batch_size: options.ForwardSize = None,
    shard_tokens: options.ShardTokens = SHARD_TOKENS,
    separator: options.Separator = options.SEPARATOR,
    field: options.Field = options.FIELD,
    bos: options.Bos = True,
    weight_processing: options.WeightProcessing = "none",
    device: options.Device = None,
    overwrite: options.OverwriteActs = False,
    progress: options.Progress = True,
) -> None:
    """Write the activations of a language model on a text to a folder.

    Reads the text from its start. Special tokens are left out. A run that was cut off goes on where it stopped when
    the same command is given again, and ends with the same bytes.
    """
    if dtype not in options.DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(options.DTYPES)}, got '{dtype}'.")
    lm = load_model(model, device=options.choose_device(device), weight_processing=weight_processing, progress=progress)
    tokens = read_head(lm, text, n_tokens, ctx_len, bos, separator, field)
    if n_tokens is not None and tokens.n_tokens < n_tokens:
        say(f"note: the text holds {tokens.n_tokens:,} tokens, fewer than --n-tokens {n_tokens:,}.", err=True)
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
    )
    say(describe_activations(out))
