"""What each process of a training run holds in memory, counted from the configuration; see `plan_training`."""

import math

import torch

from saelab.functional.compiled import takes_numba
from saelab.functional.screening import SCAN_ROWS, choose_precision
from saelab.functional.sparse_products import MOST_PRODUCTS
from saelab.functional.threshold_search import DENSE_WIDTH
from saelab.sae.config import RandomPrefixes, SAEConfig
from saelab.sae.module import SAEModule
from saelab.sae.placement import DENSE_NUMBERS, SCALE_TOKENS
from saelab.stores.shuffling import BUFFER_TOKENS
from saelab.training.config import TrainConfig
from saelab.training.loop import SAMPLE_TOKENS

PROGRAM_BYTES = (
    310 * 2**20
)  # resident memory of a process with torch and saelab, before any weights (torch 2.13, Linux)
ENTRY_BYTES = 64  # of a candidate code while the search compares it: numbers, order and values of int64 and float32
ROW_COPIES = 8  # float32 tensors of the size of a batch that a step holds at its peak: inputs, residuals, gradients
DENSE_COPIES = {"token": 3, "group": 3, "batch": 5}  # tensors of all pre-activations that initialization holds
DEAD_FRAC = 0.1  # of the latents, for which AuxK is counted
DEAD_COPIES = 5  # tensors of the dead latents' pre-activations: ranking, codes and gradients
FLOAT = 4  # bytes of float32


def k_of(cfg: SAEConfig) -> int:
    """Latents kept for a token in training."""
    k: int = cfg.reconstruction.training_k(getattr(cfg.activation, "k", 1))
    return k


def n_groups_of(cfg: SAEConfig) -> int:
    """Number of prefixes."""
    return cfg.prefixes.n if isinstance(cfg.prefixes, RandomPrefixes) else len(cfg.prefixes or (1,))


def n_trained(share: SAEModule) -> int:
    """Number of trained numbers."""
    return sum(parameter.numel() for parameter in share.parameters() if parameter.requires_grad)


def count_memory(
    cfg: SAEConfig,
    run: TrainConfig,
    share: SAEModule,
    collected: int,
    dtype: torch.dtype,
    n_rows: int,
    alone: bool,
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Bytes that one rank holds throughout, in addition at the start, and in addition in a step.

    Args:
        cfg: configuration of the SAE.
        run: configuration of the run.
        share: the SAE of one rank.
        collected: tokens collected.
        dtype: dtype of the activations.
        n_rows: rows of a batch that the rank has.
        alone: whether there is one rank.
    """
    width = cfg.d_in + (cfg.d_out or 0)
    n_held_out = min(run.n_held_out, collected // 10)
    n_here, weights = len(share.W_dec), sum(t.numel() for t in share.state_dict().values())
    held = {
        "program": PROGRAM_BYTES,
        "window of shuffled activations": min(BUFFER_TOKENS, collected - n_held_out) * width * dtype.itemsize,
        "held-out activations": n_held_out * width * dtype.itemsize,
        "weights": FLOAT * weights,
    }
    n_sample = min(SAMPLE_TOKENS // run.batch_size or 1, run.n_steps) * run.batch_size
    n_scale = min(SCALE_TOKENS, n_sample)
    searched = not alone or n_scale * n_here > DENSE_NUMBERS
    codes = _screen_bytes(cfg, n_here, n_scale) if searched else FLOAT * n_scale * n_here
    start = {
        "sample": n_sample * width * (dtype.itemsize + 3 * FLOAT),
        "codes": codes * (1 if searched else DENSE_COPIES[cfg.activation.competition]),
    }
    large = sum(weight.numel() for weight in (share.W_enc, share.W_dec) if weight.requires_grad)
    keeps_products = alone and _keeps_products(cfg, n_here, n_rows)
    matrices = sum(weight.numel() for weight in share.parameters() if weight.requires_grad and weight.ndim == 2)
    saved = FLOAT // 2 * matrices if run.optim_bits == 16 else 0
    step = {
        "gradients": FLOAT * (n_trained(share) - large * keeps_products),
        "Adam's moments": 2 * (FLOAT * n_trained(share) - saved),
        "screening": _screen_bytes(cfg, n_here, n_rows),
        "codes": ENTRY_BYTES * n_rows * _n_candidates(cfg, n_here),
        "rows": FLOAT * n_rows * (ROW_COPIES * cfg.d_in + (2 * n_groups_of(cfg) - 2) * cfg.d_target),
    }
    if cfg.aux is not None:
        n_dead, n_aux = int(DEAD_FRAC * n_here), math.ceil(cfg.aux.token_frac * n_rows)
        dead_rows = FLOAT * n_dead * (cfg.d_in + cfg.d_target + DEAD_COPIES * n_aux)
        step[f"AuxK, with {DEAD_FRAC:.0%} of the latents dead"] = (
            FLOAT * n_here * cfg.d_target * (not keeps_products) + dead_rows
        )
    return held, start, step


def _keeps_products(cfg: SAEConfig, n_here: int, n_rows: int) -> bool:
    """Whether gradients of both weights are kept as products, on a CPU (`GradientMemory.keep`)."""
    smaller = n_here * min(cfg.d_in, cfg.d_target)
    return takes_numba(smaller) and n_rows * k_of(cfg) <= MOST_PRODUCTS * n_here


def _precision(cfg: SAEConfig, n_here: int) -> str:
    """Dtype of the product that a search makes of all latents; "" where it makes it in parts of 256 rows."""
    if n_here < DENSE_WIDTH or cfg.activation.competition == "group":
        return ""
    return choose_precision(cfg.d_in, n_here, torch.device("cpu"))


def _screen_bytes(cfg: SAEConfig, n_here: int, n_rows: int) -> int:
    precision = _precision(cfg, n_here)
    if not precision:
        whole = cfg.activation.competition == "batch"
        return 3 * FLOAT * (n_rows if whole else min(256, n_rows)) * n_here
    itemsize = 2 if precision == "bfloat16" else FLOAT
    copies = {"int8": 2 * (cfg.d_in + 1), "bfloat16": 2 * cfg.d_in, "float32": 0}[precision]
    return min(SCAN_ROWS, n_rows) * n_here * itemsize + n_here * copies


def _n_candidates(cfg: SAEConfig, n_here: int) -> int:
    """Latents of a token that a search compares."""
    k = min(k_of(cfg), n_here)
    return min(n_here, {"int8": 2 * k - k // 4 + 4, "": k}.get(_precision(cfg, n_here), k + k // 4 + 8))
