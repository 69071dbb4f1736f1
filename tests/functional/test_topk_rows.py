"""`row_topk` against a full sort: the values exactly, and places that hold them, however the largest lie."""

import pytest
import torch

from saelab.functional.row_topk import BLOCK, row_topk


def draw(kind: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(50, n, generator=generator)
    if kind == "tied":
        return x.mul(2).round()
    if kind == "one block":  # the largest of a row are all entries of one block
        x[:, 3 :: n // BLOCK if n % BLOCK == 0 else 7] += 100
    if kind == "not finite":
        x[::2, 5], x[1::3, 1], x[2::3, 7] = torch.nan, torch.inf, -torch.inf
    return x


@pytest.mark.parametrize("kind", ["plain", "tied", "one block", "not finite"])
@pytest.mark.parametrize(("n", "k"), [(1024, 17), (512, 5), (520, 1), (96, 4), (96, 30), (77, 3), (8, 8)])
def test_the_largest_are_found(kind, n, k):
    sizes = draw(kind, n)
    values, places = row_topk(sizes, k)
    expected = sizes.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sizes.gather(1, places), expected, rtol=0, atol=0, equal_nan=True)
    assert all(len(row.unique()) == k for row in places), "a place is taken twice"


def test_no_rows():
    values, places = row_topk(torch.empty(0, 1024), 3)
    assert values.shape == places.shape == (0, 3)
