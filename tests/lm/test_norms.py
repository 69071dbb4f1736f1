"""`hook_normalized` of plain models: a bridge's numbers, felt edits with gradients, and every use of a hook point."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saelab as sl
from saelab.circuits.frozen_model import FrozenModel
from saelab.lm.hook_points import hook_points_of, share_weights
from saelab.lm.hooks import capture, logits
from saelab.lm.models import load_model, tiny_model
from saelab.lm.norms import find_neutral, neutral, with_gain

READ, WRITTEN = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},  # weight
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},  # 1 + weight, norms behind both parts
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},  # norms of queries and keys
    "GPTNeoX": {},  # LayerNorm with a bias
    "Olmo": {},  # no weights at all
    "Cohere": {"num_key_value_heads": 4},  # centered, without a bias
    "Nemotron": {"num_key_value_heads": 2},  # LayerNorm with 1 + weight
}


def some_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def make(family: str) -> Any:
    """A Hugging Face model of random weights, those of norms among them."""
    import transformers

    special = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**special, **SIZES, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in hf_model.named_parameters():
                weight.add_(0.2 * torch.randn_like(weight)) if "norm" in name else weight.normal_(std=0.15)
    return hf_model


def wrap(hf_model: Any, backend: str = "huggingface") -> Any:
    return load_model(hf_model, tokenizer=tiny_model().tokenizer, backend=backend)


its_warning = pytest.mark.filterwarnings("ignore:A forward hook edited")  # of an edit in a bridge


@its_warning
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_a_bridge_s_and_so_are_edits(family: str) -> None:
    hf_model, ids = make(family), some_ids()
    plain = wrap(hf_model)
    ours = {name for name in hook_points_of(plain).points if name.endswith(".hook_normalized")}
    assert {"blocks.0.ln1.hook_normalized", "ln_final.hook_normalized"} <= ours
    bridge = wrap(hf_model, "transformer_lens")
    clean, n_compared = logits(plain, ids), 0
    _, cache = bridge.run_with_cache(ids)
    for name in sorted(ours & set(hook_points_of(bridge).points)):
        module = hook_points_of(plain).components[name.removesuffix(".hook_normalized")]
        side = name.replace("hook_normalized", "hook_out")
        if name not in cache or cache[name].ndim != 3:  # of a bridge some never fire; those of heads are no vectors
            continue
        found = capture(plain, ids, [name, side], stop=False)
        torch.testing.assert_close(found[name], cache[name], rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(
            with_gain(module, find_neutral(module, 32) or 0.0, found[name]), found[side], rtol=1e-5, atol=1e-5
        )
        moved = []
        other = (
            (plain, side) if family == "Olmo" else (bridge, name)
        )  # its bridge takes no edit: "no attribute 'weight'"
        for model, place in ((plain, name), other):
            with sl.splice(model, {place: lambda x: x.roll(1, -1) + 0.1}):
                moved.append(logits(model, ids))
        torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4, msg=name)
        assert not torch.allclose(moved[0], clean, atol=1e-2)
        n_compared += 1
    assert n_compared >= 3
    assert torch.equal(logits(plain, ids), clean)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.GroupNorm(2, 8),
        nn.BatchNorm1d(3),
        nn.Embedding(4, 8),
        nn.LayerNorm((3, 8)),
        type("ScaleNorm", (nn.LayerNorm,), {"forward": lambda self, x: self.weight * x})(8),
        type("GatedNorm", (nn.LayerNorm,), {"forward": lambda self, x, gate=None: nn.LayerNorm.forward(self, x)})(8),
        type(
            "SquaredNorm",
            (nn.LayerNorm,),
            {"forward": lambda self, x: self.weight**2 * nn.functional.rms_norm(x, (8,))},
        )(8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data.add_(0.3 * torch.arange(weight.numel()).cos().view(weight.shape))
    assert find_neutral(module, 8) is None
    if isinstance(module, nn.LayerNorm):
        with pytest.raises(ValueError, match=r"Only a norm has a `hook_normalized`"):
            sl.lm.unwrapped.NormHook(module)


def test_a_norm_keeps_its_parameters() -> None:
    norm, x = nn.LayerNorm(8), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.mul_(3), norm.bias.add_(2)
    before = dict(norm.named_parameters())
    with pytest.raises(ZeroDivisionError), neutral(norm, 1.0):
        assert all(weight is before[name] for name, weight in norm.named_parameters())
        assert norm(x).square().mean(-1) == pytest.approx(1, abs=1e-3)
        raise ZeroDivisionError
    torch.testing.assert_close(norm(x), 3 * nn.functional.layer_norm(x, (8,)) + 2)
    assert "weight" not in vars(norm) and find_neutral(nn.LayerNorm(8, elementwise_affine=False)) is None


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX"])
def test_gradients_are_those_of_the_formula(family: str) -> None:
    """To what an edit uses, to the stream below through the norm's scale, and to gain and bias."""
    plain, ids, name = wrap(make(family)), some_ids(), "blocks.1.ln1.hook_normalized"
    push = torch.zeros(32, requires_grad=True)
    with sl.splice(plain, {name: lambda x: x + push}):
        said = logits(plain, ids, grad=True)[..., -1, 7].sum()
    (found,) = torch.autograd.grad(said, push)
    step = torch.arange(32).cos() * 1e-3
    ends = []
    for sign in (1, -1):
        with sl.splice(plain, {name: lambda x, sign=sign: x + sign * step}):
            ends.append(float(logits(plain, ids)[..., -1, 7].double().sum()))
    assert float(found @ step) == pytest.approx((ends[0] - ends[1]) / 2, rel=0.02)
    norm = hook_points_of(plain).components["blocks.1.ln1"]
    weights = [*norm.parameters(), plain.original_model.get_input_embeddings().weight]
    expected = torch.autograd.grad(logits(plain, ids, grad=True).square().sum(), weights)
    with sl.splice(plain, {name: lambda x: x}):
        kept = torch.autograd.grad(logits(plain, ids, grad=True).square().sum(), weights)
    for one, two in zip(kept, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_edits_run_in_order_of_entry_and_before_those_of_the_output() -> None:
    plain, ids, seen = tiny_model(backend="huggingface"), some_ids(), []
    out = READ.replace("hook_normalized", "hook_out")
    clean = capture(plain, ids, [READ, out], stop=False)
    norm = hook_points_of(plain).components["blocks.1.ln2"]
    with sl.splice(plain, {out: lambda x: seen.append(x) or x}), sl.splice(plain, {READ: lambda x: 2 * x}):
        with sl.splice(plain, {READ: lambda x: x + 1}):
            found = capture(plain, ids, [READ])[READ]
            logits(plain, ids)
        torch.testing.assert_close(capture(plain, ids, [READ])[READ], 2 * clean[READ])
    torch.testing.assert_close(found, 2 * clean[READ] + 1)
    torch.testing.assert_close(seen[0], (2 * clean[READ] + 1) * norm.weight)
    assert torch.equal(capture(plain, ids, [out])[out], clean[out])
    assert not norm._forward_hooks and not norm._forward_pre_hooks and "weight" not in vars(norm)


def test_what_fails_leaves_the_norm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ids = tiny_model(backend="huggingface"), some_ids()
    clean, norm = logits(plain, ids), hook_points_of(plain).components["blocks.1.ln2"]
    hook_points_of(plain).look(READ)

    def fail(*_: Any) -> Tensor:
        raise ZeroDivisionError

    with sl.splice(plain, {READ: fail}), pytest.raises(ZeroDivisionError):
        logits(plain, ids)
    assert torch.equal(logits(plain, ids), clean)
    with sl.splice(plain, {READ: lambda x: 0 * x}):
        with monkeypatch.context() as patch:
            right = type(norm).forward
            patch.setattr(type(norm), "forward", lambda one, x: fail() if one is norm else right(one, x))
            with pytest.raises(ZeroDivisionError):
                logits(plain, ids)
        assert "weight" not in vars(norm)
        other = share_weights(plain)
        assert torch.equal(logits(other, ids), clean) and not torch.allclose(logits(plain, ids), clean, atol=1e-3)
    assert torch.equal(logits(plain, ids), clean)


@its_warning
def test_every_use_of_a_hook_point(tmp_path: Any, tiny_tokens: Any) -> None:
    """The same as with a bridge: collected, an SAE, a transcoder with its circuit, steered and measured."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=1)
    cfg = sl.SAEConfig(d_in=32, d_out=32, d_sae=48, activation=sl.TopK(k=4))
    coders = {(f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out"): sl.SAE(cfg, seed=2) for i in range(3)}
    direction, tokens, results = sl.Direction(torch.arange(32.0).cos(), READ), tiny_tokens[:8], []
    for backend in ("huggingface", "transformer_lens"):
        model = tiny_model(backend=backend)
        acts = sl.collect(model, tokens, [READ, WRITTEN], tmp_path / backend, progress=False)
        x = acts[READ][:20]
        scores = sl.evaluate(sae, model, tokens, hook_point=READ, n_bootstrap=0, baselines=False, progress=False)
        with sl.steer(model, direction, 4.0):
            steered = logits(model, tokens.ids[:2])
        effects = sl.interventions.attribute(model, sae, "ab", "c", hook_point=READ, progress=False)
        graph = sl.circuits.trace(model, coders, "the cat", targets=[70])
        results.append((x, scores, steered, effects, graph))
        assert x.square().mean(-1) == pytest.approx(1, abs=0.01)
    (x, scores, steered, effects, graph), (x_2, scores_2, steered_2, effects_2, graph_2) = results
    torch.testing.assert_close(x, x_2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steered, steered_2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, logits(model, tokens.ids[:2]), atol=1e-2)
    assert (scores.ce_sae, scores.ce_zero) == pytest.approx((scores_2.ce_sae, scores_2.ce_zero), abs=1e-4)
    np.testing.assert_allclose(effects.effects, effects_2.effects, atol=1e-4)
    assert np.abs(effects.effects).max() > 1e-3
    np.testing.assert_allclose(graph.values, graph_2.values, atol=1e-4)
    np.testing.assert_allclose(graph.edge_weights, graph_2.edge_weights, atol=1e-4)
    assert len(graph.edge_weights) > 10 and graph.completeness_error < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_frozen_norms_stay_frozen(family: str) -> None:
    """Constants that were computed without a hook fit a pass with one: the norm is computed once, not twice."""
    plain, ids = wrap(make(family)), some_ids(1, 7)
    neurons = [(f"blocks.{i}.mlp.in.hook_out", f"blocks.{i}.mlp.out.hook_in") for i in range(2)]
    frozen, push = FrozenModel.make(plain, ids, [READ], neurons), torch.arange(32).cos()
    clean, constants = frozen.forward([])
    torch.testing.assert_close(clean, logits(plain, ids)[:, -1], rtol=1e-4, atol=1e-4)
    one, two = (frozen.forward([(READ, lambda x, f=f: x + f * push)], constants)[0] - clean for f in (1, 2))
    torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-3)
    assert one.abs().max() > 0.1
