"""Types are checked as the suite runs, every function of the package among them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beartype import beartype
from checked import check
from jaxtyping import Float, TypeCheckError
from torch import Tensor
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import auroc


def add(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, bias: float = 0.0) -> Float[Tensor, "n d"]:
    return (x + y + bias)[: 1 if bias == 5 else None]


def name_of(config: "sl.TopK", at: "Unknown" = 0, many: "list[int] | None" = None) -> "str":  # type: ignore[name-defined]
    return at if at else "k"


X, Y = torch.zeros(2, 3), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        (add, [(X, X), (Y, Y)], [(X, Y), (X, X.int()), (X, 3), (X[0], X[0])]),
        (name_of, [(sl.TopK(k=1),), (sl.TopK(k=1), "x", [3])], [(3,), (sl.TopK(k=1), 5), (sl.TopK(k=1), 0, ["a"])]),
    ],
)
def test_what_annotations_say_is_checked(function: Callable[..., Any], right: Any, wrong: Any) -> None:
    checked = check(typechecker=beartype)(function)
    for arguments in right:
        checked(*arguments)
    for arguments in wrong:
        with pytest.raises(TypeCheckError):
            checked(*arguments)
    assert checked.__annotations__ == function.__annotations__ and checked.__wrapped__ is function


def test_axes_of_a_result_are_those_of_the_arguments_and_each_call_has_its_own() -> None:
    checked = check(typechecker=beartype)(add)
    with pytest.raises(TypeCheckError, match="violates"):
        checked(X, X, bias=5.0)
    with pytest.raises(TypeCheckError, match="violates"):
        checked(X, X, bias=1)  # an int is not a float
    assert checked(checked(X, X), X).shape == (2, 3) and checked(Y, Y).shape == (2, 4)
    with unchecked():
        assert checked(X, X, bias=5.0).shape == (1, 3)


def either(x: Float[Tensor, "n n d"] | Float[Tensor, "d n n"]) -> None:
    """Neither gives the other its names."""


def test_an_array_that_does_not_fit_names_no_axes() -> None:
    checked = check(typechecker=beartype)(either)
    checked(torch.zeros(2, 2, 3))
    checked(torch.zeros(2, 3, 3))
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(2, 3, 4))


def test_a_dataclass_is_checked_where_it_is_made() -> None:
    @dataclass
    class Pair:
        x: Float[Tensor, "n d"]
        y: Float[Tensor, "n d"]
        name: str = ""

    checked = check(typechecker=beartype)(Pair)
    assert checked is Pair and check(typechecker=beartype)(Pair).__init__ is checked.__init__
    assert Pair(X, X, name="a").x is X
    for wrong in [(X, Y), (X, X.int()), (X, X, 3)]:
        with pytest.raises(TypeCheckError):
            Pair(*wrong)


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError, match="violates"):
        auroc("a", "b")
    sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.TopK(k=1)))
    with pytest.raises(TypeCheckError, match="violates"):
        sae.encode(torch.zeros(2, 4).int())
