"""Forward passes that begin above known layers: the same logits to the bit, or none where more is handed up."""

from typing import Any

import pytest
import torch
from torch import Tensor

import saelab as sl
from saelab.interventions.edited_runs import _try, find_layers_below
from saelab.lm.hook_points import hook_points_of
from saelab.lm.unwrapped import run

POST = "blocks.0.hook_resid_post"
IDS = torch.tensor([[1, 5, 9, 30], [2, 6, 11, 8]])


@pytest.fixture
def model() -> Any:
    return sl.lm.tiny_model()


@pytest.mark.parametrize(
    ("hook_point", "n"),
    [("blocks.0.hook_resid_post", 1), ("blocks.1.hook_in", 1), ("blocks.1.hook_mlp_out", 1), ("blocks.2.hook_out", 3)],
)
def test_a_forward_begins_above_known_layers(model: Any, hook_point: str, n: int) -> None:
    below, plain = find_layers_below(model, hook_point), hook_points_of(model).running
    assert below is not None and len(below.layers) == n
    said, output, computed = run(plain, IDS), below.read(model, IDS), list[int]()
    for i, layer in enumerate(plain.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: computed.append(i))
    with below.passed_over(output):
        assert torch.equal(run(plain, IDS), said)
    assert computed == list(range(n, 3))
    with below.passed_over(output.flip(0)):  # what is put in is what comes out
        torch.testing.assert_close(run(plain, IDS), said.flip(0))
    assert torch.equal(run(plain, IDS), said) and computed[-3:] == [0, 1, 2]


def test_edits_of_the_last_layers_output_apply(model: Any) -> None:
    below = find_layers_below(model, "blocks.1.hook_resid_post")
    assert below is not None
    output = below.read(model, IDS)
    with sl.splice(model, {"blocks.1.hook_resid_post": lambda x: 2 * x}):
        said = sl.lm.logits(model, IDS)
        with below.passed_over(output):
            assert torch.equal(sl.lm.logits(model, IDS), said)
    with pytest.raises(ZeroDivisionError), below.passed_over(output):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in below.layers)


def test_nothing_is_passed_over_below_the_first_layer_or_while_hooks_are_on_the_model(model: Any) -> None:
    assert find_layers_below(model, "blocks.0.hook_resid_pre") is None
    assert find_layers_below(model, "blocks.1.hook_resid_post") is not None
    with sl.splice(model, {"blocks.0.hook_resid_post": lambda x: x}):
        assert find_layers_below(model, "blocks.1.hook_resid_post") is None
    handle = hook_points_of(model).components["blocks.0"].register_forward_hook(lambda *_: None)
    assert find_layers_below(model, "blocks.1.hook_resid_post") is None
    handle.remove()
    assert find_layers_below(model, "blocks.1.hook_resid_post") is not None


@pytest.mark.parametrize("fresh", [False, True], ids=["what remains", "what is handed up anew"])
def test_a_model_that_hands_more_than_one_tensor_up_is_run_whole(model: Any, fresh: bool) -> None:
    """A second path from the first layer to the next, as in models whose layers share keys and values."""
    home, kept = hook_points_of(model), list[Tensor]()
    plain: Any = home.running
    assert _try(home, plain, POST) is not None
    mlp, attention = plain.model.layers[0].mlp, plain.model.layers[1].self_attn
    multiply, attend = mlp.forward, attention.forward

    def keep(x: Tensor) -> Tensor:
        kept.append(multiply(x))
        return kept[-1]

    def add(hidden_states: Tensor, **options: Any) -> Any:
        return attend(hidden_states=hidden_states + (kept.pop() if fresh else kept[-1]), **options)

    mlp.forward, attention.forward = keep, add
    assert _try(home, plain, POST) is None
    assert _try(home, plain, "blocks.1.hook_resid_post") is not None  # both ends of the path are below
