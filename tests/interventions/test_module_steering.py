"""Vectors added at any module: exact against plain arithmetic, where they are asked for, and nothing left behind."""

import pytest
import torch
from torch import nn
from unchecked import unchecked

import saelab as sl

D = 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer() -> nn.Linear:
    layer = nn.Linear(D, D)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(D))
        layer.bias.zero_()
    return layer


@pytest.mark.parametrize("unit", ["raw", "norm"])
@pytest.mark.parametrize("strength", [1.5, -0.7])
@pytest.mark.parametrize("places", [None, [0, -1], slice(1, None, 2)])
def test_what_is_added_is_the_formula_at_the_positions_asked_for(layer, unit, strength, places) -> None:
    x, v = draw(3, 5, D), draw(D, seed=1)
    step = strength * (v if unit == "raw" else x.norm(dim=-1, keepdim=True) * v / v.norm())
    expected, chosen = x.clone(), slice(None) if places is None else places
    expected[:, chosen] = (x + step)[:, chosen]
    with sl.steer_module(layer, v, strength, unit=unit, where="all" if places is None else places) as same:
        assert same is layer and torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.equal(layer(x), x)


def test_vectors_by_position_go_to_the_first_positions_in_order(layer) -> None:
    v = draw(4, D, seed=1)
    for n in (3, 4, 6):
        x = draw(2, n, D)
        expected = x.clone()
        expected[:, :4] += 2 * v[:n]
        with sl.steer_module(layer, v, 2.0):
            assert torch.allclose(layer(x), expected, atol=1e-6)


def test_masks_and_conditions_choose_positions(layer) -> None:
    x, v = draw(2, 4, D), draw(D, seed=1)
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    with sl.steer_module(layer, v, where=mask):
        assert torch.equal((layer(x) != x).any(-1), mask)
    axis = sl.Direction(torch.eye(D)[2], "anywhere")
    with sl.steer_module(layer, v, where=sl.interventions.ActivationCondition(axis, above=0.1, side="positive")):
        assert torch.equal((layer(x) != x).any(-1), x[..., 2] > 0.1)
    with pytest.raises(ValueError, match="without parts of a text"), sl.steer_module(layer, v, where="prompt"):
        pass


def test_features_are_edited_as_in_a_language_model(layer) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=12, activation=sl.AbsTopK(k=3)), seed=0)
    x = draw(2, 4, D)
    z = sae.encode(x)
    for mode, strengths, goal in (("clamp", {5: -2.0}, -2.0), ("ablate", [5], 0.0), ("scale", {5: 3.0}, 3 * z[..., 5])):
        edit = sl.Intervention(sae, strengths, mode, hook_point="layer")
        expected = x + ((goal - z[..., 5])[..., None]) * sae.directions()[5]
        with sl.steer_module(layer, edit):
            assert torch.allclose(layer(x), expected, atol=1e-5)
    only = sl.Intervention(sae, {5: 2.0}, where=[1], hook_point="layer")
    with sl.steer_module(layer, only):
        assert torch.equal((layer(x) != x).any(-1), torch.tensor([[False, True, False, False]] * 2))


def test_feature_maps_tuples_inputs_and_single_rows() -> None:
    v = draw(D, seed=1)
    convolution, x = nn.Conv2d(D, D, 1), draw(2, D, 3, 4)
    plain = convolution(x)
    with sl.steer_module(convolution, v, 2.0, axis=1, where=[0, -1]):
        moved = convolution(x) - plain
    assert torch.allclose(moved[:, :, 0, 0], (2 * v).expand(2, D), atol=1e-5)
    assert torch.allclose(moved[:, :, 2, 3], (2 * v).expand(2, D), atol=1e-5) and not moved[:, :, 1].any()
    recurrent, rows = nn.GRU(D, D, batch_first=True), draw(2, 3, D)
    with sl.steer_module(recurrent, v):
        assert torch.allclose(recurrent(rows)[0], recurrent_plain(recurrent, rows) + v, atol=1e-6)
    linear, x = nn.Linear(D, 3), draw(5, D)
    with sl.steer_module(linear, v, side="input"):
        assert torch.allclose(linear(x), nn.functional.linear(x + v, linear.weight, linear.bias), atol=1e-6)


def recurrent_plain(recurrent: nn.GRU, rows: torch.Tensor) -> torch.Tensor:
    copy = nn.GRU(D, D, batch_first=True)
    copy.load_state_dict(recurrent.state_dict())
    return copy(rows)[0]


def test_nothing_is_left_after_an_error_blocks_nest_and_gradients_flow(layer) -> None:
    x, v = draw(2, 3, D), draw(D, seed=1).requires_grad_()
    strength = torch.tensor(0.5, requires_grad=True)
    with sl.steer_module(layer, v, strength), sl.steer_module(layer, v, 2.0):
        layer(x).sum().backward()
        assert torch.allclose(layer(x), x + 2.5 * v)
    assert v.grad is not None and torch.allclose(v.grad, torch.full((D,), 2.5 * 6)) and strength.grad is not None
    assert torch.allclose(strength.grad, 6 * v.detach().sum())
    with pytest.raises(RuntimeError, match="stopped"), sl.steer_module(layer, v.detach()):
        raise RuntimeError("stopped")
    assert not layer._forward_hooks and torch.equal(layer(x), x)
    signed_zeros = -torch.zeros(1, 2, D)
    with sl.steer_module(layer, v.detach(), 0.0):
        assert torch.equal(torch.signbit(layer(signed_zeros)), torch.signbit(layer(signed_zeros)))


def test_half_precision_stays_half(layer) -> None:
    x = draw(2, 3, D).bfloat16()
    with sl.steer_module(layer.bfloat16(), draw(D), 0.5):
        assert layer(x).dtype == torch.bfloat16


class Named(nn.Module):
    """Puts out a dictionary, as whole models do."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": x}


def test_what_cannot_be_steered_is_refused(layer) -> None:
    x, v = draw(2, 3, D), draw(D)
    with (
        pytest.raises(ValueError, match="must have the width of what it is added to, 6"),
        sl.steer_module(layer, v[:4]),
    ):
        layer(x)
    with pytest.raises(TypeError, match="must put out a tensor"), sl.steer_module(named := Named(), v):
        named(x)
    with pytest.raises(ValueError, match=r"put out \(batch"), sl.steer_module(layer, v):
        layer(x[0, 0])
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=40), seed=0)
    edit = sl.Intervention(sae, {3: 1.0}, hook_point="layer")
    for vector, how, message in (
        (v * torch.nan, {}, "must be finite"),
        (draw(2, 2, D), {}, "must be finite"),
        (v, {"strength": float("inf")}, "one finite number"),
        (v, {"strength": torch.ones(2)}, "one finite number"),
        (v, {"unit": "max"}, "`unit` must be one of"),
        (v, {"side": "both"}, "`side` must be one of"),
        (edit, {"strength": 2.0}, "strengths and a unit of its own"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message), sl.steer_module(layer, vector, **how):
            pass
