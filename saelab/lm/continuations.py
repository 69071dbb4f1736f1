"""`read_continuations`: logits of given texts as continuations of prompts, as generation would have written them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.lm.caching import Caching, place_columns
from saelab.lm.hook_points import hook_points_of
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import evaluating


@dataclass(frozen=True, eq=False)
class Continuations:
    """Logits of a batch of prompts and of their continuations; the masks are False at padding."""

    prompt_ids: Int[Tensor, "batch n_prompt"]
    """token ids of the prompts"""
    prompt_logits: Float[Tensor, "batch n_prompt d_vocab"]
    """logits after each token of a prompt; prompts are padded on the left"""
    prompt_mask: Bool[Tensor, "batch n_prompt"]
    """which of them are not padding"""
    logits: Float[Tensor, "batch n_text d_vocab"]
    """logits that each token of a continuation is predicted by, the first of them after the prompt's last token; padded
    on the right
    """
    ids: Int[Tensor, "batch n_text"]
    """token ids of the continuations"""
    mask: Bool[Tensor, "batch n_text"]
    """which of them are not padding"""


@torch.no_grad()
def read_continuations(model: Model, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Continuations:
    """Logits of texts as continuations of prompts, equal to those of `generate` writing them; two forward passes, with
    a cache where that is correct.

    Edits of `splice` and `steer` apply, with the same distinction of prompt and generated tokens. ValueError where a
    prompt or a text is empty, or their numbers differ.

    >>> found = read_continuations(sl.lm.tiny_model(), [[65, 66], [67]], [[68, 69, 70], [71]])
    >>> found.logits.shape, found.mask.sum(1).tolist()
    (torch.Size([2, 3, 259]), [3, 1])
    """
    if len(prompts) != len(texts) or not all(map(len, (*prompts, *texts))) or not prompts:
        raise ValueError(
            f"Each prompt must have a text, both of at least one token, got {len(prompts)} prompts and {len(texts)} "
            "texts, or an empty one among them."
        )
    home, lengths = hook_points_of(model), sorted({len(prompt) for prompt in prompts})
    module, caching = home.running, home.caching
    if len(lengths) == 1 or caching.pads(module, max(map(len, prompts)) + max(map(len, texts))):
        return _read(module, caching, prompts, texts)
    groups = [[i for i, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    parts = [_read(module, caching, [prompts[i] for i in rows], [texts[i] for i in rows]) for rows in groups]
    return _join(parts, torch.tensor([i for rows in groups for i in rows]))


def _read(
    module: nn.Module, caching: Caching, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Continuations:
    """Logits of one batch: prompts in one forward pass, continuations in another, with the first one's cache or from
    the start.
    """
    device = next(module.parameters()).device
    start, is_prompt = (x.to(device) for x in pad_rows(prompts, left=True))
    ids, is_text = (x.to(device) for x in pad_rows(texts, left=False))
    real, n, end = torch.cat([is_prompt, is_text], 1), start.shape[1], start.shape[1] + ids.shape[1] - 1
    use_cache = caching.in_pieces and caching.keeps(module, n, ids.shape[1])
    with evaluating(module):
        first = module(start, use_cache=use_cache, **place_columns(real, 0, n))
        logits = first.logits[:, -1:]
        if end > n and use_cache:
            rest = module(ids[:, :-1], use_cache=True, **caching.go_on(first, real, n, end))
            logits = torch.cat([logits, rest.logits], 1)
        elif end > n:
            rest = module(torch.cat([start, ids[:, :-1]], 1), use_cache=False, **place_columns(real, 0, end))
            logits = torch.cat([logits, rest.logits[:, n:]], 1)
    return Continuations(start, first.logits, is_prompt, logits, ids, is_text)


def _join(parts: Sequence[Continuations], order: Int[Tensor, "batch"]) -> Continuations:
    """Several parts as one batch, row i of them at index `order[i]`, padded to a common length."""
    back = order.argsort()

    def stack(name: str, left: bool) -> Tensor:
        found = [getattr(part, name) for part in parts]
        width = max(x.shape[1] for x in found)
        whole = found[0].new_zeros((len(order), width, *found[0].shape[2:]))
        rows = torch.arange(len(order)).split([len(x) for x in found])
        for x, where in zip(found, rows, strict=True):
            whole[where[0] : where[-1] + 1, width - x.shape[1] if left else 0 : width if left else x.shape[1]] = x
        return whole[back.to(whole.device)]

    before = ("prompt_ids", "prompt_logits", "prompt_mask")
    return Continuations(**{f.name: stack(f.name, f.name in before) for f in fields(Continuations)})


def pad_rows(rows: Sequence[Sequence[int]], left: bool) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """Rows of ids as one padded tensor, and the mask of what is not padding."""
    longest = max(map(len, rows))
    ids, real = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, part], real[i, part] = torch.tensor(list(row)), True
    return ids, real
