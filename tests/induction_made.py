"""A model of two layers of attention whose weights are set by hand: "a b ... a" goes on with "b"."""

from typing import Any

import torch
from torch import Tensor

import saelab as sl
from saelab.lm.tokenizers import SpecialWords, word_tokenizer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"]
N, WIDTH, D_HEAD = len(WORDS), 3 * len(WORDS), 18
BEFORE, COPIES = (0, 1), (1, 0)
"""layer and head that write what was one token before, and that copy what came after the same token"""
FIRST, LAST = "blocks.0.hook_attn_out", "blocks.1.hook_attn_out"


def make_induction(seed: int = 0) -> Any:
    """The residual stream holds a token, its position, and the token before, in 12 dimensions each. The other two heads
    are random and small, MLPs write nothing.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch_state = torch.get_rng_state()
    cfg = GPT2Config(vocab_size=N, n_positions=N, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(cfg).eval()
    torch.set_rng_state(torch_state)
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(N)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_()
            if ".attn." in name and name.endswith("weight"):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 20)
            elif "ln_" in name and name.endswith("weight"):
                weight.fill_(1)
        model.transformer.wte.weight[:, :N] = eye
        model.transformer.wpe.weight[:, N : 2 * N] = eye
        token, place, before = (slice(i * N, (i + 1) * N) for i in range(3))
        one_back = torch.zeros(N, N)
        one_back[range(1, N), range(N - 1)] = 1  # from a position to the one before
        _set(model, BEFORE, (place, 3 * one_back), (place, 3 * eye), token, (before, eye))
        _set(model, COPIES, (token, 3 * eye), (before, 3 * eye), token, (token, 4 * eye))
    tokenizer = word_tokenizer(
        WORDS, SpecialWords("<bos>", "<eos>", "<pad>", "<unk>"), no_space_before="", no_space_after=""
    )
    return sl.load_model(model, tokenizer=tokenizer)


def _set(
    model: Any,
    head: tuple[int, int],
    query: tuple[slice, Tensor],
    key: tuple[slice, Tensor],
    value: slice,
    output: tuple[slice, Tensor],
) -> None:
    """Weights of one head, whose dimensions are tokens or positions."""
    attention, start = model.transformer.h[head[0]].attn, head[1] * D_HEAD
    own = slice(start, start + D_HEAD)
    for i, (rows, weight) in enumerate((query, key, (value, torch.eye(N)))):
        part = attention.c_attn.weight[:, i * WIDTH : (i + 1) * WIDTH]
        part[:, own] = 0
        part[rows, start : start + N] = weight
    attention.c_proj.weight[own] = 0
    attention.c_proj.weight[start : start + N, output[0]] = output[1]


def make_saes() -> dict[str, sl.SAE]:
    """By hand: one feature a token, "the token before is" behind the first attention, "it is copied" behind the
    second.
    """
    found = {}
    for name, first in ((FIRST, 2 * N), (LAST, 0)):
        sae = sl.SAE(sl.SAEConfig(d_in=WIDTH, d_sae=N, activation=sl.TopK(k=1), normalizer="none"))
        with torch.no_grad():
            for weight in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
                weight.zero_()
            sae.W_enc[first : first + N] = torch.eye(N)
            sae.W_dec[:, first : first + N] = torch.eye(N)
        found[name] = sae
    return found
