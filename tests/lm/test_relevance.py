"""Propagation rules: each function's against its formula, attention's against the papers', and what is conserved."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families.table import build
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import saelab as sl
from saelab.lm.models import _byte_tokenizer
from saelab.lm.relevance import RELEVANCE_RULES, RelevanceMethod, _Propagation, propagating, require_rules

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
A, B, C = torch.randn(3, 8, 8, generator=GENERATOR, dtype=torch.float64) / 2
OUT = torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64)
POINT = "blocks.0.hook_out"


def coefficients(compute: Callable[..., Tensor], *inputs: Tensor, method: RelevanceMethod = "relp") -> list[Tensor]:
    """Propagation coefficients of OUT . compute(inputs), whose value stays what it is without rules."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with _Propagation(RELEVANCE_RULES[method]):
        found = compute(*leaves)
    torch.testing.assert_close(found, compute(*leaves))
    return list(torch.autograd.grad((OUT * found).sum(), leaves))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: ACT2FN[name]
    for name in ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "quick_gelu",
                 "silu", "relu", "relu2", "mish", "leaky_relu")
} | {
    "cube": lambda h: h**3, "square": lambda h: h.pow(2), "softcap": lambda h: 2 * torch.tanh(h / 2),
    "mish by parts": lambda h: h * torch.tanh(F.softplus(h)), "gate": lambda h: torch.sigmoid(1.5 * h) * h,
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("method", ["relp", "attnlrp"])
def test_activation_functions_are_slopes(name: str, method: RelevanceMethod) -> None:
    act = ACTIVATIONS[name]
    (found,) = coefficients(act, X, method=method)
    torch.testing.assert_close(found, OUT * act(X) / X)
    half = coefficients(act, torch.zeros_like(X), method=method)[0] / OUT
    near = act(torch.full_like(X, 1e-6)) / 1e-6
    torch.testing.assert_close(half, near, atol=2e-3, rtol=0)  # act'(0), but for a step of 1e-3


def gated(x: Tensor) -> Tensor:
    return F.silu(x @ A) * (x @ B)


def test_factors_of_a_product_get_half_each() -> None:
    (found,) = coefficients(gated, X)
    gate, up = X @ A, X @ B
    by_gate = (OUT * up * F.silu(gate) / gate) @ A.T
    torch.testing.assert_close(found, by_gate / 2 + (OUT * F.silu(gate)) @ B.T / 2)
    weighed = lambda x: A[0] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))  # noqa: E731
    scale = X.pow(2).mean(-1, keepdim=True).rsqrt()
    torch.testing.assert_close(coefficients(weighed, X)[0], OUT * A[0] * scale)  # a weight or constant gets nothing
    by_name = lambda a, b: torch.ones(2, 3, 5).baddbmm(batch1=a, batch2=b)  # noqa: E731
    ones, twos = torch.ones(2, 3, 4), torch.full((2, 4, 5), 2.0)
    added = lambda a, b: torch.baddbmm(torch.ones(2, 3, 5), a, b)  # noqa: E731
    summed = lambda a, b: torch.einsum("bij,bjk->bik", a, b)  # noqa: E731
    for compute, summand in ((torch.bmm, 0), (summed, 0), (added, 1), (by_name, 1)):
        a, b = ones.clone().requires_grad_(), twos.clone().requires_grad_()
        with _Propagation(RELEVANCE_RULES["relp"]):
            product = compute(a, b)
        assert torch.equal(product, torch.full((2, 3, 5), 8.0 + summand))
        left, right = torch.autograd.grad(product.sum(), [a, b])
        assert torch.equal(left, torch.full_like(a, 10 / 2)) and torch.equal(right, torch.full_like(b, 3 / 2))


def attend(query: Tensor, key: Tensor, value: Tensor, fused: bool) -> Tensor:
    """Causal attention of one head."""
    if fused:
        parts = (part[None, None] for part in (query, key, value))
        return F.scaled_dot_product_attention(*parts, is_causal=True)[0, 0]
    scores = (query @ key.mT / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ value


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor, method: RelevanceMethod) -> tuple[Tensor, ...]:
    """Relevance of queries, keys and values, number by number, as the papers define it."""
    q, k, v = (torch.zeros(5, 8, dtype=torch.float64) for _ in range(3))
    for i in range(5):
        scores = [float(query[i] @ key[j]) / math.sqrt(8) for j in range(i + 1)]
        pattern = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        of_pattern = [0.0] * (i + 1)
        for j in range(i + 1):
            passed = OUT[i] * pattern[j] * value[j]
            v[j] += passed if method == "relp" else passed / 2
            of_pattern[j] = float(passed.sum()) / 2
        if method == "relp":
            continue
        for j in range(i + 1):
            of_score = scores[j] * (of_pattern[j] - pattern[j] * sum(of_pattern))
            share = of_score * query[i] * key[j] / math.sqrt(8) / scores[j]
            q[i] += share / 2
            k[j] += share / 2
    return q, k, v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["relp", "attnlrp"])
def test_attention_is_propagated_as_the_papers_say(method: RelevanceMethod, fused: bool) -> None:
    parts = X @ A, X @ B, X @ C
    expected = attend_by_hand(*parts, method)
    if method == "relp":
        found = [torch.zeros_like(X), torch.zeros_like(X)]
        found += coefficients(lambda value: attend(parts[0], parts[1], value, fused), parts[2])
    else:
        found = coefficients(lambda *all_three: attend(*all_three, fused), *parts, method=method)
    for part, coefficient, relevance in zip(parts, found, expected, strict=True):
        torch.testing.assert_close(part * coefficient, relevance)
    (whole,) = coefficients(lambda x: attend(x @ A, x @ B, x @ C, fused), X, method=method)
    by_parts = sum(c @ w.T for c, w in zip(found, (A, B, C), strict=True))
    torch.testing.assert_close(whole, by_parts)


FAMILIES = ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "Qwen3MoeForCausalLM"]


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_adds_up_to_the_logit_in_every_family(name: str) -> None:
    """RelP conserves: the relevance of all tokens, and of the biases behind them, is the logit; AttnLRP's softmax and
    gradients do not conserve it.
    """
    model = sl.load_model(build(name), tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))
    biases = [p for path, p in model.original_model.named_parameters() if path.endswith("bias")]
    ids = torch.randint(3, 250, (1, 6), generator=torch.Generator().manual_seed(1))
    x = sl.lm.capture(model, ids, [POINT])[POINT]
    missing = {}
    for method in ("relp", "attnlrp", "gradient"):
        leaf = x.clone().requires_grad_()
        logit, found = propagate(model, ids, leaf, biases, method)
        torch.testing.assert_close(logit, sl.lm.logits(model, ids)[0, -1, 7], rtol=1e-4, atol=1e-5)
        whole = sum(
            float((at.detach() * c).sum()) for at, c in zip([leaf, *biases], found, strict=True) if c is not None
        )
        missing[method] = abs(whole / float(logit.detach()) - 1)
    assert missing["relp"] < 1e-4
    assert min(missing["attnlrp"], missing["gradient"]) > 1e-2


def propagate(model: Any, ids: Tensor, leaf: Tensor, biases: list[nn.Parameter], method: str) -> Any:
    if method == "gradient":
        with sl.splice(model, {POINT: lambda _: leaf}):
            logit = sl.lm.logits(model, ids, grad=True)[0, -1, 7]
        return logit, torch.autograd.grad(logit, [leaf, *biases], allow_unused=True)
    with propagating(model, method), sl.splice(model, {POINT: lambda _: leaf}):
        for bias in biases:
            bias.requires_grad_(True)
        logit = sl.lm.logits(model, ids, grad=True)[0, -1, 7]
        return logit, torch.autograd.grad(logit, [leaf, *biases], allow_unused=True)


def test_weights_require_gradients_again_behind_the_rules() -> None:
    model = sl.lm.tiny_model(n_layers=1)
    kept = next(model.original_model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.original_model.parameters()]
    assert any(before) and not all(before)
    with pytest.raises(KeyError), propagating(model, "relp"):
        assert not any(p.requires_grad for p in model.original_model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.original_model.parameters()] == before and not kept.requires_grad


def test_a_gradient_that_a_model_brings_along_is_refused() -> None:
    """BLOOM's GELU is an autograd function with a gradient of its own."""
    model = sl.load_model(build("BloomForCausalLM"), tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4)))
    with pytest.raises(ValueError, match="got one with a gradient of its own, GeLUFunctionBackward"):
        sl.interventions.attribute(model, sae, "A fox", 7, method="relp", hook_point="blocks.1.hook_out")
    last = sl.interventions.attribute(model, sae, "A fox", 7, method="relp", hook_point="blocks.2.hook_out")
    assert abs(last.effects).max() > 0  # no such function is behind the last block
    require_rules(torch.ones(()))
