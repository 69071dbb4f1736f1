"""Some families in every use; `make families` has all of them."""

import pytest
from run import judge
from table import list_architectures
from uses import USES

SOME = ["LlamaForCausalLM", "MambaForCausalLM", "GraniteForCausalLM"]


def test_the_registries_are_read() -> None:
    assert set(SOME) < set(list_architectures()) and len(list_architectures()) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_family_is_right_in_every_use(name: str) -> None:
    found = judge(name)
    assert set(found) == set(USES) and {verdict for verdict, _ in found.values()} == {"right"}, found
