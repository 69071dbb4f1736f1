"""Direct effects on the logits, through all that a family does between its last norm and its logits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hook_points import LLAMA_LIKE, random_model, some_ids
from torch import Tensor

import saelab as sl
from saelab.lm.model_checks import find_known_ids
from saelab.lm.unembedding import Unembedding, _find_factor, _follow_all, read_out

POINT = "blocks.1.hook_resid_post"
KEYS = {"num_key_value_heads": 2}
MIXER = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "granite": ("Granite", {"logits_scaling": 8.0}),
    "cohere": ("Cohere", {"logit_scale": 0.0625}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0, **KEYS}),
    "falcon_h1": ("FalconH1", {"lm_head_multiplier": 0.3, **KEYS, **MIXER}),
}


def measure(model: Any, ids: Tensor, along: Tensor, step: float = 1e-2) -> Tensor:
    """Central differences of the last token's logits along directions in the residual stream."""
    found = []
    for direction in along:
        sides = []
        for sign in (step, -step):

            def push(x: Tensor, by: Tensor = sign * direction) -> Tensor:
                x[:, -1] += by.to(x)
                return x

            with sl.splice(model, {POINT: push}):
                sides.append(sl.lm.logits(model, ids)[0, -1].double())
        found.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:A TransformerBridge must compute")  # Cohere's of transformer-lens 3.9 does not
@pytest.mark.parametrize("family", FAMILIES)
def test_read_out_is_the_measured_derivative(family: str) -> None:
    name, sizes = FAMILIES[family]
    _, model = random_model(f"{name}ForCausalLM", f"{name}Config", hidden_size=32, **LLAMA_LIKE, **sizes)
    ids = some_ids(1, 6)
    x = sl.lm.capture(model, ids, [POINT])[POINT][0, -1].double()
    along = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if family == "cohere":  # a LayerNorm, which takes the mean away
        x, along = x - x.mean(), along - along.mean(1, keepdim=True)
    along -= (along @ x)[:, None] * x / (x @ x)  # so that the norm's scale stays as it is
    expected = read_out(model, along.float()) / x.square().mean().sqrt()
    if family == "gemma2":  # a cap's slope where the logits are
        expected = expected * (1 - (sl.lm.logits(model, ids)[0, -1].double() / 30).square())
    measured = measure(model, ids, along)
    assert float((expected - measured).norm() / measured.norm()) < 1e-3


def test_a_head_with_layers_of_its_own_has_no_direct_effects() -> None:
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    name = "ModernBertDecoder"
    _, model = random_model(f"{name}ForCausalLM", f"{name}Config", hidden_size=32, **sizes)
    with pytest.raises(ValueError, match="head that is linear behind the final norm, got a ModernBertDecoder"):
        read_out(model, torch.ones(1, 32))


class Tail(torch.nn.Module):
    """What stands behind a norm: a projection, a head, and a cap."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap, self.norm = cap, torch.nn.Identity()
        self.project, self.head = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(16, 40, bias=False)

    def forward(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        made = self.head(self.project(self.norm(ids[..., None].float().expand(-1, -1, 32))))
        return SimpleNamespace(logits=self.cap * (made / self.cap).tanh())


@pytest.mark.parametrize("cap", [0.5, 1e4])
def test_a_cap_bends_each_logit_by_itself_and_is_taken_where_its_slope_is_one(cap: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tail, x = Tail(cap), torch.randn(5, 1, 32)
    site = tail.norm, "hook_out"
    assert _find_factor(tail, site, tail.head, x) is None
    found = _follow_all(tail, site, x)
    torch.testing.assert_close(found, tail.head(tail.project(x)), rtol=1e-4, atol=1e-5)


def test_ids_without_a_token_do_not_rank_nor_count() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=32, **LLAMA_LIKE, **KEYS)).eval()
    with torch.no_grad():
        hf_model.lm_head.weight[259:] *= 100
    model = sl.load_model(hf_model, tokenizer=sl.lm.tiny_model().tokenizer)
    assert int(find_known_ids(model).sum()) == 259
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48), seed=0)
    lens = sl.analysis.logit_lens(sae, model, [3], n=400)
    effects = read_out(model, sae.directions()[[3]])[0, :259]
    effects = effects - effects.mean()
    assert [value for _, value in lens[3].promoted] == pytest.approx(effects.sort(descending=True).values.tolist())
    assert lens[3].spread == pytest.approx(float(effects.std())) and lens.d_vocab == 259


def test_what_was_measured_once_reads_out_beside_hooks_and_edits_until_a_weight_changes() -> None:
    model = sl.lm.tiny_model(seed=3)
    along = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    expected, measured = read_out(model, along), Unembedding.measure(model)
    assert measured.is_alone and measured.is_current and torch.equal(measured(along), expected)
    with sl.splice(model, {"ln_final.hook_out": lambda x: 0 * x, POINT: lambda x: x + 1}):
        assert torch.equal(measured(along), expected) and torch.equal(read_out(model, along), expected)
    with torch.no_grad():
        next(measured.head.parameters()).mul_(2)
    assert not measured.is_current
    torch.testing.assert_close(Unembedding.measure(model)(along), 2 * expected)
    with pytest.raises(ValueError, match="residual stream's width"):
        measured(along[:, 1:])
