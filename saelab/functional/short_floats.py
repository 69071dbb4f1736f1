"""Positive and signed numbers in 16 bits, rounded at random: how Adam's moments are stored in half of their memory.

A code is a float of 7 bits of exponent: 9 bits of fraction for a number that is not negative (`encode_positive`), or a
sign and 8 bits (`encode_signed`). Numbers are rounded up or down with the probability that makes the mean exact:
rounded to the nearest, a running mean that moves by a thousandth a step would stand still. The random bits are a hash
of a key and of the number's place, so that they depend neither on threads nor on what was drawn before.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

LIMIT = 2.0**24
"""largest size of a gradient that is taken into the moments, so that their codes hold them"""
SQUARE_SCALE, SQUARE_BITS = 2.0**48, 14
"""what positive numbers are divided by, and how many bits of their float32 are rounded away"""
MEAN_SCALE, MEAN_BITS = 2.0**25, 15
"""the same of signed numbers"""
SQUARE_SPACING, MEAN_SPACING = 2.0**-9, 2.0**-8
"""largest distance of neighboring codes over the smaller one's value, for values above the smallest normal ones"""
SMALLEST_SQUARE, SMALLEST_MEAN = 2.0**-126 * SQUARE_SCALE, 2.0**-126 * MEAN_SCALE
"""below these the distance is constant"""


def hash_places(key: int, rows: range, width: int, device: torch.device | None = None) -> Int[Tensor, "n_rows width"]:
    """32 random bits, as int64, for each place in some rows of a matrix.

    Args:
        key: 32 bits that select the draw.
        rows: numbers of the rows.
        width: length of a row.
        device: where to compute.
    """
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    return _mix(_mix(row ^ key) ^ torch.arange(width, device=device))


def _mix(bits: Tensor) -> Tensor:
    """The last step of MurmurHash3, a bijection of 32 bits."""
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ bits >> 16


def encode_positive(x: Float[Tensor, "*shape"], random: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Codes, as int16, of numbers from 0 to `LIMIT**2`.

    Args:
        x: the numbers, float32.
        random: random bits of each, of which the highest are used (`hash_places`).

    >>> x = torch.tensor([0.0, 1.0, 1e-9])
    >>> decode_positive(encode_positive(x, hash_places(0, range(1), 3)[0])) / x
    tensor([   nan, 1.0000, 0.9986])
    """
    bits = (x / SQUARE_SCALE).view(torch.int32).long()
    return _as_int16((bits + (random >> 32 - SQUARE_BITS)) >> SQUARE_BITS)


def decode_positive(codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The numbers of codes that `encode_positive` made."""
    bits = (codes.int() & 0xFFFF) << SQUARE_BITS
    return bits.view(torch.float32) * SQUARE_SCALE


def encode_signed(x: Float[Tensor, "*shape"], random: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Codes, as int16, of numbers from `-LIMIT` to `LIMIT`.

    Args:
        x: the numbers, float32.
        random: random bits of each, of which the lowest are used (`hash_places`).
    """
    size = (x.abs() / MEAN_SCALE).view(torch.int32).long()
    code = (size + (random & (1 << MEAN_BITS) - 1)) >> MEAN_BITS
    return _as_int16(code | torch.signbit(x).long() << 15)


def decode_signed(codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The numbers of codes that `encode_signed` made."""
    size = ((codes.int() & 0x7FFF) << MEAN_BITS).view(torch.float32) * MEAN_SCALE
    return torch.where(codes < 0, -size, size)


def _as_int16(code: Tensor) -> Tensor:
    return ((code & 0xFFFF ^ 0x8000) - 0x8000).to(torch.int16)
