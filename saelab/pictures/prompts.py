"""Chosen prompts token by token: which features fire where."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from saelab.lm.extent import find_context, find_row
from saelab.lm.hooks import capture
from saelab.lm.masks import TokenMask
from saelab.lm.strings import token_strings
from saelab.lm.tokens import tokenize
from saelab.stores.provenance import Provenance

if TYPE_CHECKING:
    from saelab.lm.models import Model
    from saelab.sae.sae import SAE

N_SHOWN = 12
"""features a token, the strongest first"""


def read_prompts(sae: "SAE", model: "Model", prompts: Sequence[str], origin: Provenance) -> list[dict[str, Any]]:
    """The words of each prompt, and for each word the features that fire there with their codes, largest |z| first.

    Read at the place of `origin`, under its mask without the norm rule, which is relative to a corpus: a token that the
    mask leaves out has no codes. ValueError for a prompt that is blank or longer than the model's context.
    """
    return [_read(sae, model, prompt, origin) for prompt in prompts]


@torch.no_grad()
def _read(sae: "SAE", model: "Model", prompt: str, origin: Provenance) -> dict[str, Any]:
    tokens = tokenize(model, [prompt], ctx_len=find_row(model, prompt), packed=False)
    if tokens.n_truncated:
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens, got {prompt[:40]!r}..."
        )
    ids = tokens.ids[:, : tokens.n_tokens]
    keep = _mask_of(origin).apply(tokens).keep[0, : tokens.n_tokens]
    x = capture(model, ids, [origin.hook_point])[origin.hook_point][0].to(sae.device)
    codes = sae.encode_sparse(x)
    bounds = codes.offsets.tolist()
    strings = token_strings(model.tokenizer, ids[0].tolist())
    found = [_strongest(codes.indices[a:b], codes.values[a:b]) for a, b in pairwise(bounds)]
    return {
        "words": [strings[i] for i in ids[0].tolist()],
        "codes": [pairs if kept else [] for pairs, kept in zip(found, keep.tolist(), strict=True)],
    }


def _mask_of(origin: Provenance) -> TokenMask:
    rules = origin.mask | {"positions": tuple(origin.mask["positions"]), "max_norm_ratio": None}
    return TokenMask(**rules)


def _strongest(features: torch.Tensor, values: torch.Tensor) -> list[tuple[int, float]]:
    order = values.abs().argsort(descending=True, stable=True)[:N_SHOWN]
    return list(zip(features[order].tolist(), values[order].tolist(), strict=True))
