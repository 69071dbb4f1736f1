"""Activations of labeled tokens: a balanced sample of tokens where the label is true and where it is false."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.lm.hooks import capture, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.token_labels import LabelsLike, pick_marks
from saelab.lm.tokens import Tokens

ALL_BUT_SPECIAL = TokenMask()


@dataclass(frozen=True, eq=False)
class LabeledActivations:
    """Activations of sampled tokens with the label and document of each."""

    x: Float[Tensor, "n d_in"]
    y: Bool[Tensor, "n"]
    doc_ids: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"LabeledActivations({int(self.y.sum()):,} of {len(self):,} true, d_in={self.x.shape[1]})"


def collect_labeled(
    model: AnyModel,
    tokens: Tokens,
    labels: LabelsLike | Bool[Tensor, "n_seq ctx_len"],
    hook_point: str,
    *,
    concept: str | None = None,
    n_tokens: int = 10_000,
    mask: TokenMask = ALL_BUT_SPECIAL,
    batch_size: int | None = None,
    seed: int = 0,
) -> LabeledActivations:
    """Activations of a balanced sample of tokens: half of them where a label is true, half where it is false.

    Only the sampled tokens' sequences are run and only their activations are held.

    Args:
        model: language model.
        tokens: the text.
        labels: (n_seq, ctx_len) the label of each token, or labels of several concepts.
        hook_point: where activations are read.
        concept: which of several labels.
        n_tokens: most tokens in the sample; at most half of each class.
        mask: tokens to sample from; by default all but special ones.
        batch_size: sequences in a forward pass; by default chosen for memory.
        seed: draws the sample.

    Raises:
        ValueError: where the label is true of none or of all tokens kept, and for labels of another shape than the
            tokens, or of several concepts without `concept`.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, ["a tin can"] * 4, ctx_len=8)
    >>> collect_labeled(model, tokens, tokens.ids == int(tokens.ids[0, 1]), "blocks.1.hook_resid_post", n_tokens=4)
    LabeledActivations(2 of 4 true, d_in=32)
    """
    if n_tokens < 2:
        raise ValueError(f"`n_tokens` must be at least 2, one of each class, got {n_tokens}.")
    model = as_model(model)
    marks = pick_marks(labels, concept)
    require_shape(marks.shape, tokens)
    keep = mask.apply(tokens).keep
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(keep)
    for kind, places in ((True, keep & marks), (False, keep & ~marks)):
        found = places.flatten().nonzero().squeeze(1)
        if len(found) == 0:
            raise ValueError(f"`labels` must hold and not hold of some tokens that the mask keeps, got none {kind}.")
        drawn = found[torch.randperm(len(found), generator=generator)[: max(1, n_tokens // 2)]]
        chosen.view(-1)[drawn] = True
    x = read_chosen(model, tokens, chosen, hook_point, batch_size=batch_size)
    return LabeledActivations(x, marks[chosen], tokens.doc_ids[chosen])


def read_chosen(
    model: Model,
    tokens: Tokens,
    chosen: Bool[Tensor, "n_seq ctx_len"],
    hook_point: str,
    *,
    batch_size: int | None = None,
) -> Float[Tensor, "n d_in"]:
    """Activations of chosen tokens in the order of the text, float32 on the CPU; sequences without any are not run.

    Edits by `splice` and `steer` blocks around the call apply.

    Args:
        model: language model.
        tokens: the text.
        chosen: (n_seq, ctx_len) tokens to return.
        hook_point: where activations are read.
        batch_size: sequences in a forward pass; by default chosen for memory.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, ["a tin can"] * 4, ctx_len=8)
    >>> read_chosen(model, tokens, tokens.ids == int(tokens.ids[0, 1]), "blocks.1.hook_resid_post").shape
    torch.Size([8, 32])
    """
    require_shape(chosen.shape, tokens)
    wanted = chosen.any(1).nonzero().squeeze(1)
    parts = []
    for rows in wanted.split(forward_size(tokens, batch_size)):
        x = capture(model, tokens.ids[rows], [hook_point])[hook_point]
        parts.append(x[chosen[rows].to(x.device)].float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def require_shape(shape: Sequence[int], tokens: Tokens) -> None:
    """Raise ValueError unless labels of this shape have one value for each token."""
    if tuple(shape) != tuple(tokens.ids.shape):
        raise ValueError(
            f"Labels must have a mark for each token, {tuple(tokens.ids.shape)}, got shape {tuple(shape)}."
        )


def draw_rows(keep: Bool[np.ndarray, "n"], n: int, seed: int) -> Bool[np.ndarray, "n"]:
    """A mask of at most `n` of the rows kept, sampled with `seed`.

    >>> int(draw_rows(np.ones(9, bool), 4, seed=0).sum())
    4
    """
    places = np.flatnonzero(keep)
    if len(places) <= n:
        return keep
    drawn = np.zeros_like(keep)
    drawn[np.random.default_rng(seed).choice(places, n, replace=False)] = True
    return drawn
