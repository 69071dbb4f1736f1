"""How far a model reaches: rows as long as the model itself takes them, and ids that have a token."""

import sys
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import saelab as sl
from saelab.lm.model_checks import find_context, find_known_ids, find_row
from saelab.lm.models import load_model, tiny_model


def load(made: Any) -> Any:
    return load_model(made.eval(), tokenizer=tiny_model().tokenizer)


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_models_without_positions_take_rows_of_any_length(family: str) -> None:
    hf_model = {
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=2)),
    }[family]()
    model = load(hf_model)
    assert find_context(model) == sys.maxsize
    tokens = sl.tokenize(model, ["once more " * 250], ctx_len=2100)
    with torch.no_grad():
        expected = hf_model(tokens.ids.long(), use_cache=False).logits
    torch.testing.assert_close(sl.lm.logits(model, tokens.ids), expected, rtol=1e-3, atol=1e-3)


def test_positions_that_run_out_are_a_limit() -> None:
    for architecture in ("llama", "gpt2"):
        model = tiny_model(architecture=architecture, ctx_len=32)
        assert find_context(model) == 32
        with pytest.raises(ValueError, match=r"1\.\.32"):
            sl.tokenize(model, ["a"], ctx_len=33)


def test_a_limit_of_another_name_is_taken_and_told() -> None:
    model = load(MambaForCausalLM(MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1)))
    config: Any = model.original_model.config
    config.longest_context, config.n_position_tables = 48, 64
    with pytest.warns(UserWarning, match=r"'longest_context': 48.* 48 tokens"):
        assert find_context(model) == 48
    config.max_seq_len = 40
    assert find_context(model) == 40


@pytest.mark.parametrize("text", ["", "a", "\u4e16\u754c" * 40, "caf\u00e9 " * 9])
def test_a_row_holds_its_text(tiny: Any, text: str) -> None:
    assert find_row(tiny, text) <= find_context(tiny)
    assert find_row(tiny, text) >= min(len(tiny.tokenizer(text)["input_ids"]), find_context(tiny))


def test_ids_behind_the_tokenizer_are_unknown(tiny: Any) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = load(LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)))
    known = find_known_ids(model)
    assert known.shape == (320,) and known[:259].all() and not known[259:].any()
    assert find_known_ids(tiny).all()
