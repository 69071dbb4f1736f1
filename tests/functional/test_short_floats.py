"""Numbers in 16 bits: their spacing, their mean, and the random bits that they are rounded by."""

import pytest
import torch

from saelab.functional import short_floats
from saelab.functional.short_floats import (
    LIMIT,
    MEAN_SPACING,
    SMALLEST_MEAN,
    SMALLEST_SQUARE,
    SQUARE_SPACING,
    decode_positive,
    decode_signed,
    encode_positive,
    encode_signed,
    hash_places,
)

KINDS = {
    "positive": (encode_positive, decode_positive, SQUARE_SPACING, SMALLEST_SQUARE, LIMIT**2),
    "signed": (encode_signed, decode_signed, MEAN_SPACING, SMALLEST_MEAN, LIMIT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_to_a_neighbor_and_exact_in_the_mean(kind):
    encode, decode, spacing, smallest, limit = KINDS[kind]
    n = 20_000
    sizes = torch.tensor([1e-3, 0.7, 1.0, 1.0019, 3.3e-9, 1.2345e6, limit, 2 * smallest])
    x = torch.cat([sizes, -sizes]) if kind == "signed" else sizes
    random = hash_places(5, range(n), len(x))
    found = decode(encode(x.expand(n, -1).contiguous(), random)).double()
    error = found / x.double() - 1
    assert error.abs().max() < spacing
    below, above = found.amin(0), found.amax(0)
    assert ((above - below).abs() <= 1.0001 * spacing * x.abs()).all()
    # of n draws that take one of two values a spacing apart, the mean is off by at most half of it over n^1/2
    assert error.mean(0).abs().max() < 5 * spacing / 2 / n**0.5
    held = decode(torch.arange(0, 2**15, 7).to(torch.int16))
    again = decode(encode(held, hash_places(1, range(1), len(held))[0]))
    assert torch.equal(again[held <= limit], held[held <= limit])  # what is a code's value stays


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_tiny_numbers_stay_near_zero(kind):
    encode, decode, _, smallest, _ = KINDS[kind]
    x = torch.tensor([0.0, smallest / 3000, smallest / 3]).expand(1000, 3).contiguous()
    found = decode(encode(x, hash_places(2, range(1000), 3)))
    assert not found[:, 0].any() and (found - x).abs().max() < smallest / 100
    assert (found >= 0).all()


def test_random_bits_are_even_and_differ_between_keys_rows_and_columns():
    bits = hash_places(7, range(3, 503), 200)
    assert ((bits >= 0) & (bits < 2**32)).all()
    assert torch.equal(hash_places(7, range(100, 110), 200), bits[97:107])
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / bits.numel() ** 0.5
    low, high = (bits & 0x7FFF).double(), (bits >> 18).double()
    others = {
        "next key": hash_places(8, range(3, 503), 200) & 0x7FFF,
        "next row": (bits & 0x7FFF).roll(1, 0),
        "next column": (bits & 0x7FFF).roll(1, 1),
        "high bits": high,
    }
    for name, other in others.items():
        pair = torch.stack([low.flatten(), other.double().flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / bits.numel() ** 0.5, name
    assert short_floats.LIMIT**2 <= short_floats.SQUARE_SCALE and short_floats.LIMIT < short_floats.MEAN_SCALE
