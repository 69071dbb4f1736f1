"""`read_continuations`: what a model predicts of texts that go on from prompts, as if it were writing them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.lm.door import door
from saelab.lm.models import Model


@dataclass(frozen=True, eq=False)
class Continuations:
    """Logits of a batch of prompts and of the texts behind them; the masks are false at padding."""

    prompt_ids: Int[Tensor, "batch n_prompt"]
    prompt_logits: Float[Tensor, "batch n_prompt d_vocab"]
    """behind each token of a prompt; prompts are padded on the left"""
    prompt_mask: Bool[Tensor, "batch n_prompt"]
    logits: Float[Tensor, "batch n_text d_vocab"]
    """what each token of a text was drawn from: the first behind the prompt's last token; padded on the right"""
    ids: Int[Tensor, "batch n_text"]
    mask: Bool[Tensor, "batch n_text"]


@torch.no_grad()
def read_continuations(model: Model, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Continuations:
    """The logits that `generate` would have met, writing these texts after these prompts: two forwards, with a cache.

    Edits of `splice` and `steer` apply, and know the prompts from what was generated. ValueError where a prompt or a
    text is empty, or there are not as many of one as of the other.

    >>> found = read_continuations(sl.tiny_model(), [[65, 66], [67]], [[68, 69, 70], [71]])
    >>> found.logits.shape, found.mask.sum(1).tolist()
    (torch.Size([2, 3, 259]), [3, 1])
    """
    if len(prompts) != len(texts) or not all(map(len, (*prompts, *texts))) or not prompts:
        raise ValueError(
            f"Each prompt must have a text, both of at least one token, got {len(prompts)} prompts and {len(texts)} "
            "texts, or an empty one among them."
        )
    module, _ = door(model).route([])
    device = next(module.parameters()).device
    start, is_prompt = (x.to(device) for x in _pad(prompts, left=True))
    ids, is_text = (x.to(device) for x in _pad(texts, left=False))
    real = torch.cat([is_prompt, is_text], 1)
    first = module(start, use_cache=True, **_places(real, 0, start.shape[1]))
    logits = first.logits[:, -1:]
    if ids.shape[1] > 1:
        places = _places(real, start.shape[1], start.shape[1] + ids.shape[1] - 1)
        rest = module(ids[:, :-1], use_cache=True, past_key_values=first.past_key_values, **places)
        logits = torch.cat([logits, rest.logits], 1)
    return Continuations(start, first.logits, is_prompt, logits, ids, is_text)


def _pad(rows: Sequence[Sequence[int]], left: bool) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    longest = max(map(len, rows))
    ids, real = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, part], real[i, part] = torch.tensor(list(row)), True
    return ids, real


def _places(real: Tensor, begin: int, end: int) -> dict[str, Any]:
    """Mask and positions of some columns; none where nothing is padded, which is faster."""
    seen = real[:, :end]
    if seen.all():
        return {}
    return {"attention_mask": seen.long(), "position_ids": (seen.cumsum(1) - 1).clamp_min(0)[:, begin:]}
