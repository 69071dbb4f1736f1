"""What is frozen is affine in its input, and gives what the functions give where it was frozen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saelab.lm.freezing import FREEZING_RULES, Freezing

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(1, 5, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
WEIGHT = torch.randn(8, generator=GENERATOR, dtype=torch.float64)
HEADS = torch.randn(3, 8, 16, generator=GENERATOR, dtype=torch.float64) / 4


def attend(x: Tensor, fused: bool) -> Tensor:
    """Causal attention of four heads, whose keys and values are shared by two."""
    query, key, value = ((x @ weight).view(len(x), 5, 4, 4).transpose(1, 2) for weight in HEADS)
    if fused:
        return F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], is_causal=True, enable_gqa=True)
    key, value = (part[:, :2].repeat_interleave(2, 1) for part in (key, value))
    scores = (query @ key.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ value


def scale(x: Tensor) -> Tensor:
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "LayerNorm": lambda x: F.layer_norm(x, (8,), WEIGHT, WEIGHT + 1),
    "RMSNorm": lambda x: F.rms_norm(x, (8,), WEIGHT, 1e-5),
    "RMSNorm without eps": nn.RMSNorm(8, elementwise_affine=False),
    "RMSNorm of parts": scale,
    "RMSNorm by a power": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5),
    "norm by a root": lambda x: x / (x**2).mean(-1, keepdim=True).sqrt(),
    "norm by an operator": lambda x: x / (x * x).mean(-1, keepdim=True) ** 0.5,
    "deviation": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "vector norm": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "softcap": lambda x: 3 * torch.tanh(x @ HEADS[0] / 3),
    "gate": lambda x: torch.sigmoid(x) * (x @ HEADS[0][:, :8]),
    "attention": lambda x: attend(x, False),
    "fused attention": lambda x: attend(x, True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_frozen_functions_are_affine_where_they_were_frozen(name: str) -> None:
    compute = FUNCTIONS[name]
    with Freezing() as first:
        at_x = compute(X)
    torch.testing.assert_close(at_x, compute(X))

    def again(x: Tensor) -> Tensor:
        with Freezing(first.constants):
            return compute(x)

    torch.testing.assert_close(again(X), at_x)
    bias = again(0 * X)
    torch.testing.assert_close(again(2 * X + Y) - bias, 2 * (again(X) - bias) + again(Y) - bias)
    assert not torch.allclose(compute(2 * X + Y), again(2 * X + Y))
    with Freezing(first.constants, n_rows=2):
        torch.testing.assert_close(compute(torch.cat([X, Y])), torch.cat([at_x, again(Y)]))


def test_gradients_pass_by_the_constants() -> None:
    x = X.clone().requires_grad_()
    with Freezing() as first:
        out = scale(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, first.constants[0] * WEIGHT.expand_as(X))
    with Freezing([]), pytest.raises(RuntimeError, match="same functions in each forward pass"):
        scale(X)


def test_fused_and_plain_attention_have_the_same_pattern() -> None:
    with Freezing() as plain:
        attend(X, False)
    with Freezing() as fused:
        attend(X, True)
    torch.testing.assert_close(fused.constants[0], plain.constants[0])
    assert len(FREEZING_RULES) > 20
