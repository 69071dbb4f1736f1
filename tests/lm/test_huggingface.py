"""Plain Hugging Face models: accepted as they are everywhere, with a bridge's names and a bridge's numbers."""

import ast
import gc
import re
import subprocess
import sys
import weakref
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import nodes, parse
from torch import Tensor

import saelab as sl
from saelab.lm import hook_points, models
from saelab.lm.generation import GREEDY
from saelab.lm.hook_points import hook_points_of, share_weights
from saelab.lm.huggingface import HuggingFaceModel, as_model
from saelab.lm.models import describe_model, load_model, tiny_model
from saelab.lm.module_names import UnknownLayers

POST = "blocks.1.hook_resid_post"
QUIET: dict[str, Any] = {"progress": False}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "OPTForCausalLM": (
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    "MambaForCausalLM": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "Olmo2ForCausalLM": ("Olmo2Config", {**SMALL, "num_key_value_heads": 2}),
}


def make(kind: str, config: str, **sizes: Any) -> Any:
    """A Hugging Face model of random weights, all of which matter."""
    import transformers

    special = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = getattr(transformers, kind)(getattr(transformers, config)(**special, **sizes)).eval()
        with torch.no_grad():
            for name, weight in hf_model.named_parameters():
                torch.nn.init.normal_(weight, mean=float("norm" in name and weight.ndim == 1), std=0.15)
    return hf_model


def llama() -> Any:
    return make("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=2)


def some_ids(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(0))


def wrap(hf_model: Any, backend: str = "huggingface") -> Any:
    return load_model(hf_model, tokenizer=tiny_model().tokenizer, backend=backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_names_mean_the_same_numbers(family: str) -> None:
    """Wherever both back ends have a hook point, by any of its names: equal activations, equal effects of edits."""
    config, sizes = FAMILIES[family]
    hf_model, ids = make(family, config, **sizes), some_ids()
    plain, bridge = wrap(hf_model), wrap(hf_model, "transformer_lens")
    ours, theirs = hook_points_of(plain), hook_points_of(bridge)
    shared = {name for name in ours.points if name in theirs.points}
    shared = {name for name in shared if not name.startswith("blocks.0.")}  # block 1 is like it
    assert len(shared) > 20 and {"blocks.1.hook_resid_pre", POST, "hook_embed", "ln_final.hook_in"} <= shared
    read, short = [], []
    for name in sorted(shared):
        try:
            site = theirs.look(name)
        except RuntimeError:  # fires more than once, or never
            continue
        if name != "hook_pos_embed":  # of rotary positions the bridge's is a pair of tensors
            is_flat = ours.look(name).flat  # OPT's MLP begins with flat rows, before which a bridge has its hook point
            assert ours.look(name) == replace(site, flat=site.flat or (is_flat and ".mlp." in name)), name
            read.append(name)
    found, expected = (_read_all(home, read, ids) for home in (ours, theirs))
    for name in read:
        torch.testing.assert_close(found[name].view_as(expected[name]), expected[name], rtol=1e-5, atol=1e-5, msg=name)
        short += [name] if ours.points[name] != name else []
    assert len(read) > 15 and len(short) > 5
    for name in (POST, "blocks.1.hook_mlp_out") if "blocks.1.hook_mlp_out" in read else (POST,):
        moved = []
        for model in (plain, bridge):
            with sl.splice(model, {name: lambda x: x + torch.arange(x.shape[-1]).cos()}):
                moved.append(sl.lm.logits(model, ids))
        torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(moved[0], sl.lm.logits(plain, ids), atol=1e-3)


def _read_all(home: Any, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What is at hook points of any shape, one forward pass each."""
    return {name: home._read(site, ids)[0] for name, site in zip(names, home.route(names)[1], strict=True)}


def test_hook_points_that_add_the_stream_inside_are_without_it() -> None:
    """BLOOM's and MPT's modules of attention and MLP return the residual stream with what they add to it."""
    hf_model, ids = make("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4), some_ids()
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"]
    before, attention, middle, mlp, after = sl.lm.capture(wrap(hf_model), ids, [*names, POST]).values()
    torch.testing.assert_close(before + attention, middle)
    torch.testing.assert_close(middle + mlp, after)


@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_whose_parts_read_the_same_have_no_middle(parallel: bool) -> None:
    hf_model = make("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, use_parallel_residual=parallel)
    assert ("blocks.0.hook_resid_mid" in hook_points_of(wrap(hf_model)).points) != parallel


def test_parts_inside_of_parts_have_their_names() -> None:
    """GPT-Neo's attention is inside of another module; what the tables do not know keeps its own."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
    neo = hook_points_of(make("GPTNeoForCausalLM", "GPTNeoConfig", **sizes)).components
    assert {"blocks.1.attn.q", "blocks.1.attn.o", "blocks.1.mlp.in", "pos_embed", "ln_final"} <= set(neo)
    mixture = hook_points_of(make("MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=2))
    assert {"blocks.0.mlp.gate", "blocks.0.mlp.experts", "blocks.0.mlp.experts.act_fn"} <= set(mixture.components)
    assert mixture.find("blocks.0.mlp.hook_post") == "blocks.0.mlp.hook_out"


def test_what_a_plain_model_cannot_do_is_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    both_sides = make("BertGenerationDecoder", "BertGenerationConfig", **sizes)
    with pytest.raises(ValueError, match="earlier tokens only, got BertGenerationDecoder"):
        sl.lm.logits(both_sides, some_ids())
    angles = sl.Direction(torch.ones(8), "rotary_emb.hook_out")  # one row for all texts
    with (
        pytest.raises(ValueError, match="must carry one vector per token, got"),
        sl.steer(llama(), angles, 1.0) as model,
    ):
        sl.lm.logits(model, some_ids())


def test_fused_attention_is_taken_where_it_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    kinds = []
    for agrees in (True, False):
        monkeypatch.setattr(models, "is_close", lambda *_, agrees=agrees: agrees)
        opened: Any = load_model(tmp_path, device="cpu", backend="huggingface", **QUIET)
        kinds.append(opened.original_model.config._attn_implementation)
    assert kinds == ["sdpa", "eager"]


def test_what_only_a_bridge_has_is_said_to_be_there() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.hook_pattern'.*backend='transformer_lens'"):
        sl.lm.capture(llama(), some_ids(), ["blocks.0.attn.hook_pattern"])
    with pytest.raises(ValueError, match=r"'folded' needs transformer_lens, got backend='huggingface'"):
        load_model("tiny", weight_processing="folded", backend="huggingface")
    with pytest.raises(ValueError, match="`backend` must be one of"):
        load_model("tiny", backend="vllm")


def test_nothing_of_transformer_lens_is_imported(tmp_path: Path) -> None:
    hf_model = llama()
    hf_model.save_pretrained(tmp_path / "model")
    tiny_model().tokenizer.save_pretrained(tmp_path / "model")
    script = f"""
import sys, torch, saelab as sl
from transformers import AutoModelForCausalLM
folder = {str(tmp_path / "model")!r}
model = sl.load_model(folder, backend="huggingface", device="cpu", progress=False)
theirs = AutoModelForCausalLM.from_pretrained(folder)
for one in (model, theirs):
    tokens = sl.tokenize(one, ["the cat met the dog and went on its way home"], ctx_len=16)
    acts = sl.collect(one, tokens, {POST!r}, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=0)
    sae.provenance = acts.provenance
    sl.evaluate(sae, one, tokens, n_bootstrap=0, baselines=False, progress=False)
    store = sl.harvest(sae, one, tokens, folder + type(one).__name__, progress=False)
    sl.analysis.logit_lens(sae, one, [1])
    with sl.steer(one, sae, {{1: 2.0}}, unit="norm"):
        sl.generate(one, ["the"], 3, progress=False)
    sl.read(sae, one, "the cat")
    sl.lm.verify_hooks(one)
assert acts.provenance.backend == "huggingface" and acts.provenance.model == "model"
assert "transformer_lens" not in sys.modules, "imported"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_hugging_face_model_is_used_as_it_is() -> None:
    """Its own hooks take part, its own forwards are edited in the blocks, and nothing is left on it behind them."""
    hf_model, ids = llama(), some_ids()
    settings, modules = dict(vars(hf_model.config)), list(hf_model.modules())
    state = {name: weight.clone() for name, weight in hf_model.state_dict().items()}
    with torch.no_grad():
        clean = hf_model(ids).logits
    torch.testing.assert_close(sl.lm.logits(hf_model, ids), clean)
    with sl.splice(hf_model, {POST: torch.zeros_like}), torch.no_grad():
        moved = hf_model(ids).logits
        assert torch.equal(sl.lm.logits(hf_model, ids), moved) and not torch.allclose(moved, clean, atol=1e-3)
    with hf_model.model.layers[1].register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)):
        torch.testing.assert_close(sl.lm.logits(hf_model, ids), moved)
        assert not sl.lm.capture(hf_model, ids, [POST])[POST].any()
    with pytest.raises(ZeroDivisionError), sl.splice(hf_model, {POST: lambda x: x * (1 / 0)}):
        sl.lm.logits(hf_model, ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf_model.modules())
    assert vars(hf_model.config) == settings and list(hf_model.modules()) == modules
    assert all(torch.equal(weight, state[name]) for name, weight in hf_model.state_dict().items())
    assert not hf_model.training


def test_steering_holds_for_its_own_generation() -> None:
    hf_model, point = llama(), "blocks.0.hook_resid_post"
    push = sl.Direction(4 * torch.arange(32.0).cos(), point)
    prompt = torch.tensor([[0, 75, 80, 90]])
    hf_model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    plain = hf_model.generate(prompt, **options)
    with sl.steer(hf_model, push, 5.0):
        steered = hf_model.generate(prompt, **options)
        ours = sl.generate(hf_model, prompt, 6, sampling=GREEDY, stop_at_eos=False, **QUIET)[0]
        uncached = sl.generate(hf_model, prompt, 6, sampling=GREEDY, stop_at_eos=False, use_cache=False, **QUIET)[0]
    assert ours.all_ids == uncached.all_ids == tuple(steered[0].tolist()) != tuple(plain[0].tolist())


def test_blocks_of_one_model_know_of_each_other() -> None:
    """Each function finds the same wrapper while another uses the model, which is freed with its user's last name."""
    hf_model, ids = llama(), some_ids()
    with sl.splice(hf_model, {POST: torch.zeros_like}) as model:
        assert as_model(hf_model) is model and not hook_points_of(hf_model).is_bare
        assert not sl.lm.capture(hf_model, ids, [POST])[POST].any()
    assert hook_points_of(hf_model).is_bare
    gone = weakref.ref(hf_model)
    del hf_model, model
    gc.collect()
    assert gone() is None


def test_edited_weights_are_seen() -> None:
    hf_model, ids = llama(), some_ids()
    model = wrap(hf_model)
    before, home = sl.lm.logits(model, ids), hook_points_of(model)
    with torch.no_grad():
        next(hf_model.model.layers[0].parameters()).mul_(2)
    assert hook_points_of(model) is not home and not torch.allclose(sl.lm.logits(model, ids), before)
    other = share_weights(model)
    with sl.splice(other, {POST: torch.zeros_like}), torch.no_grad():
        torch.testing.assert_close(sl.lm.logits(model, ids), hf_model(ids).logits)


def test_which_back_end_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Plain modules, a bridge where that is asked for; recorded."""
    hf_model = llama()
    assert describe_model(wrap(hf_model, "transformer_lens")).backend == "transformer_lens"
    assert {describe_model(one).backend for one in (wrap(hf_model, "auto"), wrap(hf_model), hf_model)} == {
        "huggingface"
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    alibi = make("FalconForCausalLM", "FalconConfig", **sizes, alibi=True)
    found, ids = wrap(alibi, "auto"), some_ids()
    assert isinstance(found, HuggingFaceModel) and not caplog.text
    with torch.no_grad():
        torch.testing.assert_close(sl.lm.logits(found, ids), alibi(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="away from Hugging Face's"):
        wrap(alibi, "transformer_lens")
    assert isinstance(wrap(make("BioGptForCausalLM", "BioGptConfig", **SMALL), "auto"), HuggingFaceModel)


def test_layers_of_unknown_names_are_run_by_a_bridge(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(_model: Any) -> None:
        raise UnknownLayers("A model must have one list of its layers, got none.")

    monkeypatch.setattr(hook_points, "name_modules", fail)
    assert describe_model(wrap(llama(), "auto")).backend == "transformer_lens" and "got none" in caplog.text
    with pytest.raises(UnknownLayers):
        wrap(llama())


def test_blocks_that_return_lists_are_read() -> None:
    """OpenAI GPT's blocks return lists, which no hook point of a bridge sees."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    with torch.random.fork_rng(devices=[]):
        plain = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    model = load_model(plain, tokenizer=tiny_model().tokenizer, weight_processing="none")
    tokens = sl.tokenize(model, ["the cat sat on the mat"], 16)
    assert len(sl.collect(model, tokens, "blocks.1.hook_resid_post", progress=False)) > 8


def test_folders_open_alike(tmp_path: Path) -> None:
    hf_model, ids = llama(), some_ids()
    hf_model.save_pretrained(tmp_path)
    tiny_model().tokenizer.save_pretrained(tmp_path)
    plain, bridge = (load_model(tmp_path, device="cpu", backend=one, **QUIET) for one in ("auto", "transformer_lens"))
    assert isinstance(plain, HuggingFaceModel) and not isinstance(bridge, HuggingFaceModel)
    torch.testing.assert_close(sl.lm.logits(plain, ids), sl.lm.logits(bridge, ids))
    assert plain.tokenizer("a b")["input_ids"] == bridge.tokenizer("a b")["input_ids"]
    for name in ("d_model", "d_vocab", "n_layers", "n_heads", "d_head", "n_ctx"):
        assert getattr(plain.cfg, name) == getattr(bridge.cfg, name), name
    half = load_model(tmp_path, device="cpu", dtype=torch.bfloat16, backend="huggingface", **QUIET)
    assert next(half.parameters()).dtype == torch.bfloat16
    opened = load_model(bridge, backend="huggingface")
    assert isinstance(opened, HuggingFaceModel)
    torch.testing.assert_close(sl.lm.logits(opened, ids), sl.lm.logits(plain, ids))
    assert load_model(plain) is plain and load_model(bridge) is bridge
    assert describe_model(load_model(plain, backend="transformer_lens")).backend == "transformer_lens"
    another: Any = load_model(plain, tokenizer=tiny_model(architecture="gpt2").tokenizer)
    assert another.original_model is plain.original_model and another.tokenizer.bos_token == "<|endoftext|>"
    bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match="has folded"):
        load_model(bridge, backend="huggingface")


@pytest.mark.parametrize("backends", [("huggingface", "transformer_lens"), ("transformer_lens", "huggingface")])
def test_what_one_collected_the_other_goes_on_with(backends: tuple[str, str], tmp_path: Path) -> None:
    """An SAE and a store of one back end are used with the other."""
    hf_model = llama()
    first, second = (wrap(hf_model, one) for one in backends)
    tokens = sl.tokenize(first, ["The cat met the dog, and the owl."] * 6, ctx_len=16)
    acts = sl.collect(first, tokens, POST, tmp_path / "acts", **QUIET)
    again = sl.collect(second, tokens, POST, **QUIET)
    assert (acts.provenance.backend, again.provenance.backend) == backends
    torch.testing.assert_close(acts[:], again[:], rtol=1e-5, atol=1e-5)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=0)
    sae.provenance = acts.provenance
    scores = [sl.evaluate(sae, one, tokens, n_bootstrap=0, baselines=False, **QUIET).ce_sae for one in (first, second)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    stores = [sl.harvest(sae, one, tokens, tmp_path / f"s{i}", **QUIET) for i, one in enumerate((first, second))]
    assert stores[0].l0 == stores[1].l0
    found = [sl.interventions.attribute(one, sae, "The cat", 7, **QUIET).effects for one in (first, second)]
    torch.testing.assert_close(*map(torch.as_tensor, found), rtol=1e-4, atol=1e-5)


PACKAGE = Path(sl.__file__).parent
INSIDE = {"HookPoints", "BridgeHookPoints", "ModelDiff"}
"""classes that are made from what `as_model` has returned, and one whose parameter is no language model"""


def list_doors() -> dict[str, str]:
    """Public functions and methods that take a model, by name, and their code."""
    found = {}
    for init in PACKAGE.rglob("__init__.py"):
        lines = [node for node in nodes(parse(init)) if isinstance(node, ast.ImportFrom) and node.module]
        for line in lines:
            file = PACKAGE.parent / (str(line.module).replace(".", "/") + ".py")
            public = {alias.name for alias in line.names}
            for node in parse(file).body if file.is_file() else ():
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in public - INSIDE:
                    continue
                for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                    if isinstance(function, ast.FunctionDef) and (
                        function.name[0] != "_" or "__init__" in function.name
                    ):
                        hints = [ast.unparse(arg.annotation) for arg in arguments(function) if arg.annotation]
                        if any(re.search(r"\b(Any)?Model\b", hint) for hint in hints):
                            found[f"{line.module}:{node.name}.{function.name}"] = ast.unparse(function)
    return found


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.args, *function.args.kwonlyargs]


def test_every_door_takes_a_plain_model() -> None:
    doors = list_doors()
    assert len(doors) > 45 and {"saelab.collecting.collection:collect.collect"} <= set(doors)
    handed_on = {"as_model", "hook_points_of", "explore", "load_model"}  # to one that does
    closed = [
        name
        for name, code in doors.items()
        if "AnyModel" not in code or ("as_model(" not in code and name.rpartition(".")[2] not in handed_on)
    ]
    assert not closed, closed


def test_a_model_moved_to_another_dtype_is_measured_again() -> None:
    model = sl.load_model("tiny", backend="huggingface")
    home = hook_points_of(model)
    model.to(torch.bfloat16)
    assert hook_points_of(model) is not home
    assert hook_points_of(model)._last.dtype == torch.bfloat16


def test_parts_in_training_mode_are_evaluated_and_left_so() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5)).eval()
    model.transformer.h[0].train()
    flags = [module.training for module in model.modules()]
    ids = torch.arange(8)[None]
    assert torch.equal(sl.lm.logits(model, ids), sl.lm.logits(model, ids))
    assert flags == [module.training for module in model.modules()]


def test_a_tokenizer_saved_later_is_found(tmp_path: Path) -> None:
    tiny = sl.load_model("tiny", backend="huggingface")
    tiny.original_model.save_pretrained(tmp_path)
    tiny.original_model.config._name_or_path = str(tmp_path)
    assert HuggingFaceModel(tiny.original_model).tokenizer is None
    tiny.tokenizer.save_pretrained(tmp_path)
    assert HuggingFaceModel(tiny.original_model).tokenizer is not None


def test_what_a_plain_model_has_not_is_told_where_it_is() -> None:
    model = load_model("tiny", backend="huggingface")
    with pytest.raises(AttributeError, match="backend='transformer_lens'"):
        model.run_with_cache  # noqa: B018
    with pytest.raises(AttributeError, match=r"original_model\.generate"):
        model.generate  # noqa: B018
    assert not hasattr(model, "blocks") and copy(model).cfg is model.cfg
