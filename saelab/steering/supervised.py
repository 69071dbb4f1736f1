"""`fit_attributes`: a supervised dictionary, one vector for each value of each known attribute (arXiv:2405.08366)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact

Fit = Literal["means", "least-squares"]
Attributes = Mapping[str, str]
"""The attributes of a prompt: their values by name"""


@dataclass(frozen=True, eq=False)
class AttributeDictionary:
    """Supervised dictionary, `x_hat = mean + sum over attributes of u(attribute = value)`, one row for each value."""

    mean: Float[Tensor, "d_in"]
    rows: Float[Tensor, "n_values d_in"]
    """u(attribute = value)"""
    names: tuple[tuple[str, str], ...]
    """attribute and value of each row"""

    def __repr__(self) -> str:
        return f"AttributeDictionary({len(self.names)} values of {sorted({name for name, _ in self.names})})"

    def encode(self, attributes: Sequence[Attributes]) -> Float[Tensor, "n n_values"]:
        """Indicator codes, 1 where a prompt has a value, else 0; ValueError for a value unknown to the dictionary."""
        return _mark(attributes, {pair: i for i, pair in enumerate(self.names)})

    def decode(self, z: Float[Tensor, "n n_values"]) -> Float[Tensor, "n d_in"]:
        """`mean + z rows`."""
        return self.mean + z @ self.rows

    def edit(
        self, x: Float[Tensor, "n d_in"], before: Sequence[Attributes], after: Sequence[Attributes]
    ) -> Float[Tensor, "n d_in"]:
        """Activations with the values of their attributes exchanged, `x - u_before + u_after`."""
        return x + (self.encode(after) - self.encode(before)) @ self.rows


def fit_attributes(
    x: Float[Tensor, "n d_in"], attributes: Sequence[Attributes], method: Fit = "means"
) -> AttributeDictionary:
    """The supervised dictionary of activations with known attributes.

        means           u(a = v) = mean(x | a = v) - mean(x)
        least-squares   the u that make the squared error of x_hat least; of all such u, the shortest

    Means count twice what correlated attributes share, least squares do not. ValueError unless each row has the same
    attributes. Source: arXiv:2405.08366.

    >>> told = [{"who": "Ann", "when": "now"}, {"who": "Tom", "when": "now"}]
    >>> fit_attributes(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), told).rows
    tensor([[ 0.,  0.],
            [-1.,  0.],
            [ 1.,  0.]])
    """
    if method not in get_args(Fit):
        raise ValueError(f"`method` must be one of {get_args(Fit)}, got '{method}'.")
    if not attributes or len(attributes) != len(x) or len({frozenset(one) for one in attributes}) > 1:
        raise ValueError(
            f"`attributes` must say the same things of each of the {len(x)} rows, got {len(attributes)} of them with "
            f"{len({frozenset(one) for one in attributes})} sets of attributes."
        )
    names = tuple(sorted({pair for one in attributes for pair in one.items()}))
    z = exact(_mark(attributes, {pair: i for i, pair in enumerate(names)}))
    x = exact(x.cpu())
    mean = x.mean(0)
    if method == "means":
        rows = (z.T @ (x - mean)) / z.sum(0)[:, None]
    else:
        rows = torch.linalg.lstsq(z, x - mean, driver="gelsd").solution  # the rows of an attribute add up to any vector
    return AttributeDictionary(mean.float(), rows.float(), names)


def _mark(attributes: Sequence[Attributes], places: Mapping[tuple[str, str], int]) -> Tensor:
    pairs = [(row, pair) for row, one in enumerate(attributes) for pair in one.items()]
    if unknown := sorted({pair for _, pair in pairs} - set(places)):
        raise ValueError(f"Attributes must have values that were there in fitting, got {unknown[:5]}.")
    z = torch.zeros(len(attributes), len(places))
    z[[row for row, _ in pairs], [places[pair] for _, pair in pairs]] = 1
    return z
