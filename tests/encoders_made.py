"""A small text encoder of transformers with random weights, and its tokenizer."""

from typing import Any

import torch

from saelab.lm.tokenizers import SpecialWords, word_tokenizer

WORDS = ("dog", "cat", "boat", "a", "the", "ran", "sat", "here")


def make_encoder() -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    special = SpecialWords("<bos>", "<eos>", "<pad>", "<unk>")
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    tokenizer = word_tokenizer(words, special, no_space_before="", no_space_after="")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False).eval(), tokenizer
