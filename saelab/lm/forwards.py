"""Batching of forward passes: sequences per batch, median activation norms, and a check that activations are finite."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens

FORWARD_TOKENS = 4096
CALIBRATION_TOKENS = 16384


def forward_size(tokens: Tokens, n_seq: int | None, most_tokens: int = FORWARD_TOKENS) -> int:
    """Number of sequences per forward pass: `n_seq`, or about 4096 tokens' worth, and `most_tokens` where that is
    less.
    """
    if n_seq is not None and n_seq < 1:
        raise ValueError(
            f"`batch_size` (`n_seq` of a stream) must be at least 1 sequence, got {n_seq}; use None for the default."
        )
    return n_seq or max(1, min(FORWARD_TOKENS, most_tokens) // tokens.ctx_len)


def batches_of(tokens: Tokens, n_seq: int) -> Iterator[Tokens]:
    """Iterator over the sequences in order, `n_seq` at a time."""
    return (tokens[start : start + n_seq] for start in range(0, len(tokens), n_seq))


def norms_of(x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
    """Euclidean norms in float32, on the CPU like the masks; 0 where not finite.

    Rows that are not finite get norm 0 so that a mask's norm rule keeps them and the finiteness check can raise.
    """
    return x.float().norm(dim=-1).nan_to_num(0.0, 0.0).cpu()


def find_median_norms(
    read: Callable[[Tokens], dict[str, Tensor]], tokens: Tokens, mask: TokenMask, n_seq: int
) -> dict[str, float]:
    """Median activation norms by hook point, which a mask's norm rule compares with: over the tokens that its other
    rules keep.

    Only the first 16384 of the tokens are used.

    Args:
        read: function from a batch of tokens to activations (n_seq, ctx_len, d) by hook point.
        tokens: rows of token ids.
        mask: the mask; its norm rule is ignored.
        n_seq: sequences per batch.

    Raises:
        ValueError: where a kept row is not finite.
    """
    others = replace(mask, max_norm_ratio=None)
    norms: dict[str, list[Tensor]] = {}
    for batch in batches_of(tokens[: max(1, CALIBRATION_TOKENS // tokens.ctx_len)], n_seq):
        keep = others.apply(batch).keep
        for name, x in read(batch).items():
            rows = x[keep.to(x.device)]
            require_finite(name, rows)
            norms.setdefault(name, []).append(norms_of(rows))
    return {name: float(torch.cat(pieces).median()) for name, pieces in norms.items()}


def require_finite(name: str, x: Float[Tensor, "n d"]) -> None:
    """Raise ValueError for rows of a hook point that hold NaN or infinity."""
    # One pass and no copy, unlike isfinite: NaN shows in both minimum and maximum, an infinity in one of them.
    if len(x) and not torch.stack(torch.aminmax(x)).isfinite().all():
        n_bad = int((~x.isfinite().all(1)).sum())
        raise ValueError(
            f"Activations must be finite in {x.dtype}; '{name}' has NaN or infinity in {n_bad} of {len(x)} rows of a "
            "batch. Take bfloat16 or float32 where float16 overflows, or check the model's weights and dtype."
        )
