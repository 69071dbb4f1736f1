"""Sparse codes in the form of a feature store's shards: by token and by feature, in the smallest integers that fit."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Integer

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TINIEST = 2.0**-24
"""The smallest float16 above 0: a code that fires must not become a code that does not."""
LARGEST = 65504.0
"""The largest finite float16."""


def pack_codes(
    offsets: Integer[np.ndarray, "n_1"],
    latents: Integer[np.ndarray, "nnz"],
    values: Float[np.ndarray, "nnz"],
    d_sae: int,
) -> dict[str, np.ndarray]:
    """The arrays of a shard by name: codes ordered by token (latents ascending) and by feature (tokens ascending).

    Args:
        offsets: (n_tokens + 1,) token i owns the codes `offsets[i]` to `offsets[i + 1]`.
        latents: latent of each code.
        values: the codes, float16 or float32; they keep their dtype and bits.
        d_sae: number of latents.
    """
    bits = values.view(np.int16 if values.dtype == np.float16 else np.int32)  # scipy does not sort float16
    n = len(offsets) - 1
    by_token = as_csr(bits, latents, offsets, (n, d_sae))
    by_feature = by_token.tocsc()
    if not _ascend(latents, offsets):
        by_token = by_feature.tocsr()
    return {
        "offsets": by_token.indptr.astype(np.int32, copy=False),
        "latents": by_token.indices.astype(smallest_int(d_sae - 1)),
        "values": by_token.data.view(values.dtype),
        "feature_offsets": by_feature.indptr.astype(np.int32, copy=False),
        "feature_tokens": by_feature.indices.astype(smallest_int(n - 1)),
        "feature_values": by_feature.data.view(values.dtype),
    }


def _ascend(latents: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether the latents of every token are in ascending order."""
    if len(latents) < 2:
        return True
    rises = latents[1:] > latents[:-1]
    borders = offsets[1:-1]
    rises[borders[(borders > 0) & (borders < len(latents))] - 1] = True
    return bool(rises.all())


def as_csr(values: Any, indices: Any, offsets: Any, shape: tuple[int, int]) -> "csr_matrix":
    """A scipy CSR matrix made from its arrays without checks, and without copies where their types allow.

    Args:
        values: the non-zero entries, row by row.
        indices: column of each entry.
        offsets: (n_rows + 1,) row i owns the entries `offsets[i]` to `offsets[i + 1]`.
        shape: (n_rows, n_columns).
    """
    from scipy.sparse import csr_matrix

    found = csr_matrix(shape, dtype=values.dtype)
    found.data, found.indices, found.indptr = values, indices.astype(np.int32, copy=False), offsets
    return found


def round_values(values: Float[np.ndarray, "nnz"], dtype: str) -> Float[np.ndarray, "nnz"]:
    """Codes in the dtype of a store: "float32" unchanged, "float16" rounded to nearest, but never to 0.

    The error of float16 is at most 2^-11 of the value, and at most 2^-24 for values below 2^-14.

    Raises:
        ValueError: a value is not finite, or beyond 65504, the largest float16.

    >>> round_values(np.array([1.0, -1e-12], np.float32), "float16").tolist()
    [1.0, -5.960464477539063e-08]
    """
    if not bool(np.isfinite(values).all()):
        raise ValueError(
            f"Codes must be finite to be stored, {int((~np.isfinite(values)).sum())} of {len(values)} are NaN or "
            "infinite. Are the SAE's weights?"
        )
    if dtype == "float32":
        return values.astype(np.float32, copy=False)
    peak = float(np.abs(values).max(initial=0.0))
    if peak > LARGEST:
        raise ValueError(f"Codes must be at most {LARGEST:.0f} to be stored in float16, got {peak:.6g}; use float32.")
    rounded = values.astype(np.float16)
    lost = (rounded == 0) & (values != 0)
    rounded[lost] = np.copysign(np.float16(TINIEST), values[lost])
    return rounded


def smallest_int(largest: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and int32 that holds 0..largest; ValueError from 2^31 on.

    >>> smallest_int(24_575)
    dtype('uint16')
    """
    for dtype in (np.uint8, np.uint16, np.int32):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"Sizes must be below 2^31, got {largest}.")
