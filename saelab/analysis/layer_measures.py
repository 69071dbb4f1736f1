"""What `layer_profile` measures in one group of prompts: forward passes, and numbers of each layer beside chance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.collecting.reader import ActivationReader
from saelab.functional.indices import find_runs
from saelab.functional.metrics import effective_rank, exact
from saelab.functional.row_geometry import (
    curvature,
    draw_rotation,
    find_neighbors,
    intrinsic_dimension,
    lidar,
    matrix_entropy,
    mean_cosine,
    outlier_dimensions,
    permute_columns,
    shared_neighbors,
)
from saelab.functional.statistics import correlation, rank_correlation
from saelab.lm.hooks import batches_of, logits, next_token_loss
from saelab.lm.tokens import PADDING, Tokens

N_PAIRED = 1024
"""Most rows that are compared with each other."""
ByLayer = dict[str, list[float]]
"""numbers by measure, one a layer"""


@dataclass(frozen=True, eq=False)
class MeasureKind:
    """A measure of a layer, and what it is compared with besides shuffled text."""

    about: str
    chance_is: str = ""
    digits: int = 3


KINDS: dict[str, MeasureKind] = {
    "entropy": MeasureKind("entropy of a prompt's tokens, share of the largest", "tokens of other prompts"),
    "curvature": MeasureKind("angle between steps of a prompt, degrees", "tokens of other prompts", 1),
    "rank": MeasureKind("effective rank of the tokens", digits=1),
    "lidar": MeasureKind("LiDAR: rank of what tells prompts apart", "views of other prompts", 1),
    "dimension": MeasureKind("intrinsic dimension of the tokens", "principal components permuted", 2),
    "prompt_dimension": MeasureKind("intrinsic dimension of a prompt's tokens", "tokens of other prompts", 2),
    "cosine": MeasureKind("mean cosine of two tokens"),
    "outliers": MeasureKind("outlier dimensions", "dimensions turned at random", 1),
    "neighbors": MeasureKind("share of a token's neighbors that the next layer keeps", "neighbors drawn at random"),
    "norm_gain": MeasureKind("correlation of squared norm and information gain", "tokens permuted"),
    "dimension_loss": MeasureKind("rank correlation of a prompt's dimension and loss", "prompts permuted"),
}


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """Activations of a group of prompts, and what the model predicts in them."""

    acts: tuple[Float[Tensor, "n_tokens d"], ...]
    """of the kept tokens, by layer"""
    starts: Int[np.ndarray, "n_prompts_1"]
    """where each prompt's tokens begin, and where the last ends"""
    loss: Float[np.ndarray, "n_prompts"]
    """mean loss of each prompt, nats a prediction"""
    gain: Float[np.ndarray, "n_tokens"]
    """KL of each token's prediction from the mean prediction of the group, nats"""


def cut_prompts(tokens: Tokens, length: int, n_prompts: int, rng: np.random.Generator) -> Tokens:
    """Up to `n_prompts` prompts of one document each and of `length` tokens, drawn at random, in the order of the text.

    A prompt is the beginning of what a row has of a document. ValueError where no row has so many of one.

    Args:
        tokens: the text.
        length: tokens of a prompt.
        n_prompts: most prompts.
        rng: draws them.
    """
    found: list[tuple[int, int]] = []
    longest = 0
    for row, documents in enumerate(tokens.doc_ids.numpy()):
        bounds = [*find_runs(documents).tolist(), len(documents)]
        for start, stop in pairwise(bounds):
            if documents[start] != PADDING:
                longest = max(longest, stop - start)
                if stop - start >= length:
                    found.append((row, start))
    if not found:
        raise ValueError(
            f"`length` must be at most what a row holds of one document ({longest} tokens), got {length}. Take a "
            "smaller one, or longer rows."
        )
    chosen = np.sort(rng.permutation(len(found))[:n_prompts]).tolist()
    rows, starts = (torch.tensor([found[i][side] for i in chosen])[:, None] for side in (0, 1))
    places = starts + torch.arange(length)
    return replace(tokens, ids=tokens.ids[rows, places], doc_ids=tokens.doc_ids[rows, places], packed=False)


def shuffle_prompts(prompts: Tokens, reader: ActivationReader, rng: np.random.Generator) -> Tokens:
    """The same prompts with the tokens that the mask keeps in random order."""
    ids = prompts.ids.clone()
    for row, keep in zip(ids, _find_kept(reader, prompts), strict=True):
        kept = row[keep]
        row[keep] = kept[torch.from_numpy(rng.permutation(len(kept)))]
    return replace(prompts, ids=ids)


def _find_kept(reader: ActivationReader, prompts: Tokens) -> Bool[Tensor, "n_prompts length"]:
    """Tokens that the mask keeps, but for its norm rule."""
    return replace(reader.mask, max_norm_ratio=None).apply(prompts).keep


def replace_some(prompts: Tokens, reader: ActivationReader, share: float, rng: np.random.Generator) -> Tokens:
    """The same prompts with a share of the kept tokens replaced by kept ones of any prompt.

    Args:
        prompts: a prompt a row.
        reader: its mask keeps tokens.
        share: probability that a token is replaced.
        rng: source of the replacements.
    """
    ids, keep = prompts.ids.clone(), _find_kept(reader, prompts)
    known = ids[keep].numpy()
    changed = keep & torch.from_numpy(rng.random(ids.shape) < share)
    ids[changed] = torch.from_numpy(rng.choice(known, int(changed.sum())))
    return replace(prompts, ids=ids)


@torch.no_grad()
def read_group(reader: ActivationReader, prompts: Tokens, n_seq: int) -> PromptGroup:
    """Activations, losses and information gains of a group of prompts, in forward passes of `n_seq` prompts."""
    acts: dict[str, list[Tensor]] = {name: [] for name in reader.hook_points}
    places, losses, mean = list[Tensor](), list[Tensor](), torch.zeros(())
    batches = list(batches_of(prompts, n_seq))
    for batch in batches:
        rows = reader.read(batch)
        for name, x in rows.acts.items():
            acts[name].append(x.float().cpu())
        places.append(rows.index)
        made = logits(reader.model, batch.ids).float()
        loss, counted = next_token_loss(made, batch.ids).cpu(), batch.predicts[:, :-1]
        losses.append((loss * counted).sum(1).double() / counted.sum(1).clamp(min=1))
        mean = mean.to(made.device) + made.flatten(0, 1)[rows.index.to(made.device)].softmax(-1).double().sum(0)
    log_mean = (mean / mean.sum()).clamp(min=1e-300).log().float()
    gains = list[Tensor]()
    for batch, index in zip(batches, places, strict=True):  # again, as all predictions may not fit in memory
        log_p = logits(reader.model, batch.ids).float().flatten(0, 1)[index.to(log_mean.device)].log_softmax(-1)
        gains.append((log_p.exp() * (log_p - log_mean)).sum(1).cpu())
    lengths = torch.cat([_count(index, batch) for index, batch in zip(places, batches, strict=True)])
    return PromptGroup(
        acts=tuple(torch.cat(parts) for parts in acts.values()),
        starts=np.concatenate([[0], lengths.cumsum(0).numpy()]),
        loss=torch.cat(losses).numpy(),
        gain=torch.cat(gains).double().numpy(),
    )


def _count(index: Tensor, batch: Tokens) -> Int[Tensor, "n_prompts"]:
    """Number of kept tokens of each row."""
    return torch.bincount(index.cpu() // batch.ctx_len, minlength=len(batch))


@torch.no_grad()
def read_views(
    reader: ActivationReader, prompts: Tokens, n_seq: int, n_views: int, noise: float, rng: np.random.Generator
) -> tuple[Float[Tensor, "n_prompts n_views d"], ...]:
    """Mean activation of each prompt's kept tokens in several views of it, with tokens replaced at random, by layer.

    Args:
        reader: reads the layers.
        prompts: a prompt a row.
        n_seq: prompts in a forward pass.
        n_views: views of each prompt.
        noise: share of the tokens that are replaced.
        rng: source of the replacements.
    """
    views: list[list[Tensor]] = [[] for _ in reader.hook_points]
    for _ in range(n_views):
        parts: list[list[Tensor]] = [[] for _ in reader.hook_points]
        for batch in batches_of(replace_some(prompts, reader, noise, rng), n_seq):
            rows = reader.read(batch)
            counts = _count(rows.index, batch)
            for part, x in zip(parts, rows.acts.values(), strict=True):
                sums = torch.zeros(len(batch), x.shape[1], dtype=torch.float64)
                sums.index_add_(0, rows.index.cpu() // batch.ctx_len, exact(x).cpu())
                part.append(sums / counts[:, None].clamp(min=1))
        for view, part in zip(views, parts, strict=True):
            view.append(torch.cat(part))
    return tuple(torch.stack(view, 1) for view in views)


def measure_group(
    group: PromptGroup,
    views: tuple[Float[Tensor, "n_prompts n_views d"], ...],
    n_neighbors: int,
    rng: np.random.Generator,
    with_chance: bool = True,
) -> tuple[ByLayer, ByLayer, list[list[int]]]:
    """Every measure of every layer, what chance gives of it, and the outlier dimensions of each layer.

    Args:
        group: the prompts' activations.
        views: means of their views.
        n_neighbors: nearest tokens that `neighbors` compares.
        rng: source of the permutations.
        with_chance: whether chance is measured.
    """
    found: ByLayer = {name: [] for name in KINDS}
    chance: ByLayer = {name: [] for name, kind in KINDS.items() if kind.chance_is and with_chance}
    outliers: list[list[int]] = []
    n_tokens = len(group.gain)
    sample = np.sort(rng.permutation(n_tokens)[:N_PAIRED])
    mixed, paired = rng.permutation(n_tokens), rng.permutation(n_tokens)
    others, chosen = rng.permutation(len(group.loss)), torch.from_numpy(sample)
    k = min(n_neighbors, len(sample) - 1)
    near = [find_neighbors(x[chosen], k) for x in group.acts]
    for layer, x in enumerate(group.acts):
        dimensions = _of_prompts(intrinsic_dimension, x, group)
        norms = (exact(x) - exact(x).mean(0)).square().sum(1).numpy()
        large = outlier_dimensions(x)
        outliers.append(large.tolist())
        numbers = {
            "entropy": _mean(_of_prompts(matrix_entropy, x, group)),
            "curvature": _mean(_of_prompts(curvature, x, group)),
            "rank": effective_rank(torch.linalg.svdvals(exact(x) - exact(x).mean(0))),
            "lidar": lidar(views[layer]),
            "dimension": intrinsic_dimension(x[chosen]),
            "prompt_dimension": _mean(dimensions),
            "cosine": mean_cosine(x),
            "outliers": float(len(large)),
            "neighbors": shared_neighbors(near[layer], near[layer + 1]) if layer + 1 < len(near) else math.nan,
            "norm_gain": correlation(norms, group.gain),
            "dimension_loss": _relate(dimensions, group.loss),
        }
        for name, value in numbers.items():
            found[name].append(value)
        if not with_chance:
            continue
        y = x[torch.from_numpy(mixed)]
        numbers = {
            "entropy": _mean(_of_prompts(matrix_entropy, y, group)),
            "curvature": _mean(_of_prompts(curvature, y, group)),
            "lidar": lidar(_exchange_views(views[layer], rng)),
            "dimension": intrinsic_dimension(permute_columns(x[chosen], rng)),
            "prompt_dimension": _mean(_of_prompts(intrinsic_dimension, y, group)),
            "outliers": float(len(outlier_dimensions(exact(x) @ draw_rotation(x.shape[1], rng)))),
            "neighbors": k / (len(sample) - 1) if layer + 1 < len(near) else math.nan,
            "norm_gain": correlation(norms, group.gain[paired]),
            "dimension_loss": _relate(dimensions, group.loss[others]),
        }
        for name, value in numbers.items():
            chance[name].append(value)
    return found, chance, outliers


def _of_prompts(measure: Callable[[Tensor], float], x: Tensor, group: PromptGroup) -> Float[np.ndarray, "n_prompts"]:
    bounds = group.starts.tolist()
    return np.array([measure(x[start:stop]) for start, stop in pairwise(bounds)])


def _mean(values: Float[np.ndarray, "n"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _relate(values: Float[np.ndarray, "n"], loss: Float[np.ndarray, "n"]) -> float:
    known = ~np.isnan(values)
    return rank_correlation(values[known], loss[known]) if known.sum() > 2 else math.nan


def _exchange_views(views: Tensor, rng: np.random.Generator) -> Float[Tensor, "n_prompts n_views d"]:
    """Each view's prompts in another order, so that views of one class are of different prompts."""
    orders = [torch.from_numpy(rng.permutation(len(views))) for _ in range(views.shape[1])]
    return torch.stack([views[order, i] for i, order in enumerate(orders)], 1)
