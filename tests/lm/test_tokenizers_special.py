"""Special tokens: what the tokenizer marks, no more; BOS once; nothing of the caller's changed."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_made import byte_level, wordpiece

import saelab as sl
from saelab.lm.generation import GREEDY
from saelab.lm.tokenizers import find_bos, find_ends, find_special_ids


def llama(n_words: int, **ids: Any) -> Any:
    """A random Hugging Face model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | ids
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=n_words, max_position_embeddings=128, **sizes, **settings)
        ).eval()


def words(*more: str, **names: str) -> Any:
    """A tokenizer of words, which knows <unk> and the names given, and no other special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = ["<unk>", "one", "two", "three", *more]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def state_of(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), dict(tokenizer.init_kwargs)


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["object", "folder", "folder and tokenizer", "a bridge of the user's"])
def test_what_the_bridge_fills_in_is_not_the_tokenizers(way: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer, hf_model = words(), llama(8)
    before = state_of(tokenizer)
    if way == "object":
        model = sl.load_model(hf_model, tokenizer=tokenizer)
    elif way == "folder":
        model = sl.load_model(save(hf_model, tokenizer, tmp_path), progress=False)
    elif way == "folder and tokenizer":
        model = sl.load_model(save(hf_model, tokenizer, tmp_path), tokenizer=tokenizer, progress=False)
    else:
        own = copy.deepcopy(tokenizer)
        own.init_kwargs = {"name_or_path": "x", **own.init_kwargs, "add_bos_token": True}
        name = str(save(hf_model, tokenizer, tmp_path))
        model = sl.load_model(TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=own))
    assert state_of(tokenizer) == before
    assert find_special_ids(model) == () and find_bos(model) is None and find_ends(model) == frozenset()
    with pytest.raises(ValueError, match="BOS"):
        sl.tokenize(model, ["one strange two"])
    tokens = sl.tokenize(model, ["one strange two"], ctx_len=4, bos=None)
    assert tokens.ids.tolist()[0][:3] == [1, 0, 2] and not tokens.bos
    assert sl.TokenMask().apply(tokens).n_kept == 3  # an unknown word is text
    made = sl.generate(model, torch.tensor([[1]]), 20, sampling=GREEDY, progress=False)
    assert len(made[0].ids) == 20


def test_generation_goes_on_behind_unknown_words() -> None:
    model = sl.load_model(llama(5), tokenizer=words("four"))
    made = sl.generate(model, torch.tensor([[1]]), 20, n=8, progress=False)
    assert all(len(sample.ids) == 20 for sample in made) and any(0 in sample.ids[:-1] for sample in made)
    assert all(sample.text.count("<unk>") == sample.ids.count(0) for sample in made)


def test_a_tokenizer_with_an_end_alone_has_no_beginning() -> None:
    model = sl.load_model(llama(8), tokenizer=words("</s>", eos_token="</s>"))
    assert find_special_ids(model) == (4,) and find_ends(model) == {4} and find_bos(model) is None
    with pytest.raises(ValueError, match="BOS"):
        sl.tokenize(model, ["one"])


def test_ends_that_a_model_does_not_name_are_an_error() -> None:
    model = sl.load_model(llama(8), tokenizer=words("</s>", eos_token="</s>"))
    model.original_model.generation_config = None
    with pytest.raises(ValueError, match="which tokens end a text"):
        find_ends(model)


def test_names_given_later_are_the_users_own() -> None:
    tokenizer = words("</s>", eos_token="</s>")
    tokenizer.bos_token = "</s>"
    assert find_bos(sl.load_model(llama(8), tokenizer=tokenizer)) == 4


def test_everything_marked_as_special_is_special() -> None:
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(byte_level())
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|user|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in headers] + [AddedToken("<plain>", special=False)])
    model = sl.load_model(llama(len(tokenizer)), tokenizer=tokenizer)
    wanted = [tokenizer.convert_tokens_to_ids(name) for name in ["<|endoftext|>", *headers]]
    assert find_special_ids(model) == tuple(sorted(wanted))
    tokens = sl.tokenize(model, ["<|user|>hi<plain>"], bos=False)
    assert sl.TokenMask().apply(tokens).removed["special"] == 1
    assert find_special_ids(sl.load_model(llama(len(wordpiece())), tokenizer=wordpiece())) == (0, 2, 3, 4)  # not [UNK]


def test_a_text_with_a_beginning_of_its_own_gets_no_second(tiny: Any) -> None:
    tokens = sl.tokenize(tiny, ["<s>one", "two"], ctx_len=16, packed=False)
    assert (tokens.ids == 0).sum(1).tolist() == [1, 1]
    made = sl.generate(tiny, ["<s>one", "one"], 3, sampling=GREEDY, progress=False)
    assert made[0].prompt_ids == made[1].prompt_ids and made[0].ids == made[1].ids


def test_settings_of_the_tokenizer_do_not_act() -> None:
    tokenizer = copy.deepcopy(byte_level())
    model = sl.load_model(llama(len(tokenizer)), tokenizer=tokenizer)
    wanted = sl.tokenize(model, ["a long text, longer than four", "short"], ctx_len=16)
    model.tokenizer.backend_tokenizer.enable_truncation(4)
    model.tokenizer.backend_tokenizer.enable_padding(length=40)
    found = sl.tokenize(model, ["a long text, longer than four", "short"], ctx_len=16)
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.doc_ids, wanted.doc_ids)


@pytest.mark.parametrize("bos", [True, False])
def test_only_predictions_inside_a_document_count(tiny: Any, bos: bool) -> None:
    texts = ["one", "a b", "three words here", "x"] * 6
    tokens = sl.tokenize(tiny, texts, ctx_len=16, bos=bos)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    mask = sl.TokenMask(special=False)
    found = sl.evaluate(sae, tiny, tokens, hook_point="blocks.1.hook_out", mask=mask, n_bootstrap=0, progress=False)
    losses = sl.lm.next_token_loss(sl.lm.logits(tiny, tokens.ids), tokens.ids)
    inside = [
        float(losses[row, t])
        for row in range(len(tokens))
        for t in range(tokens.ctx_len - 1)
        if tokens.doc_ids[row, t] == tokens.doc_ids[row, t + 1] != -1
    ]
    assert found.n_predictions == len(inside) and found.ce_clean == pytest.approx(np.mean(inside), rel=1e-5)
    alone = sl.tokenize(tiny, texts, ctx_len=32, packed=False)
    assert int(alone.predicts.sum()) == sum(len(text) for text in texts)
