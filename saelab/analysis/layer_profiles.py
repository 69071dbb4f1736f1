"""`layer_profile`: entropy, curvature, rank, dimension, anisotropy of each layer, beside shuffled tokens and chance."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from saelab.analysis.layer_measures import (
    KINDS,
    ByLayer,
    cut_prompts,
    measure_group,
    read_group,
    read_views,
    shuffle_prompts,
)
from saelab.collecting.reader import DEFAULT_MASK, ActivationReader
from saelab.functional.statistics import adjust
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.models import describe_model
from saelab.lm.tokens import Tokens
from saelab.lm.verification import find_residuals
from saelab.stores.results import Result, find_row, format_table

MOST_TOKENS = 1024
"""of a forward pass: logits of all of them are held"""
FEWEST = 3
"""prompts of a group"""
SHUFFLED = "shuffled text"
IN_A_TABLE = 4
LIMITS = (
    "These numbers describe where tokens lie, not what a layer computes or uses; they depend on the text, the number "
    "of tokens, the mean and a few large dimensions. Spread is over groups of prompts of one text and one model."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerMeasure:
    """One measure of every layer, by group of prompts; NaN where it is not defined."""

    name: str
    about: str
    """what it is, with its scale"""
    text: Float[np.ndarray, "n_layers n_groups"]
    shuffled: Float[np.ndarray, "n_layers n_groups"]
    """of the same prompts with their tokens in random order"""
    chance: Float[np.ndarray, "n_layers n_groups"] | None
    """of data without what is measured; None where there is none besides shuffled text"""
    chance_is: str
    """what those data are"""

    @property
    def mean(self) -> Float[np.ndarray, "n_layers"]:
        """Mean over groups, of the text as it is."""
        return self.text.mean(1)

    @property
    def std(self) -> Float[np.ndarray, "n_layers"]:
        """Standard deviation over groups, which are of different prompts."""
        return self.text.std(1, ddof=1)

    @property
    def p_shuffled(self) -> Float[np.ndarray, "n_layers"]:
        """p values of no difference from shuffled text: a paired t test over groups, two-sided; 1 where undefined."""
        return _test_pairs(self.text - self.shuffled)

    @property
    def p_chance(self) -> Float[np.ndarray, "n_layers"]:
        """p values of no difference from chance; 1 where undefined, and without chance."""
        return _test_pairs(self.text - (np.full_like(self.text, np.nan) if self.chance is None else self.chance))


@dataclass(frozen=True, kw_only=True)
class UntoldMeasure:
    """Layers in which a measure was not told from one of its nulls."""

    measure: str
    null: str
    layers: tuple[int, ...]
    n_layers: int
    """layers in which both are defined"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProfile(Result):
    """Measures of each layer of a model on a text, each beside shuffled tokens and chance.

    Layers are counted as blocks that were run: 0 is what the first block reads, the embedding.
    """

    model: str
    source: str
    """where the text came from"""
    hook_points: tuple[str, ...]
    measures: tuple[LayerMeasure, ...]
    outliers: tuple[tuple[int, ...], ...]
    """by layer, dimensions that are outliers in more than half of the groups"""
    loss: Float[np.ndarray, "n_groups"]
    """of the model, nats a prediction"""
    loss_shuffled: Float[np.ndarray, "n_groups"]
    n_prompts: int
    n_documents: int
    n_tokens: int
    """that the mask keeps"""
    length: int
    """tokens of a prompt"""
    n_groups: int
    n_views: int
    noise: float
    n_neighbors: int
    fdr: float
    """rate of false discoveries at which a measure is told from a null"""
    seed: int
    limits: str = LIMITS
    """what these numbers cannot show"""

    def __getitem__(self, name: str) -> LayerMeasure:
        return find_row(self.measures, name=name)

    @property
    def untold(self) -> tuple[UntoldMeasure, ...]:
        """Layers in which measures are not told from shuffled text, or chance, all p values adjusted together
        (Benjamini-Hochberg).
        """
        asked = [
            (one, null, null_values, p)
            for one in self.measures
            for null, null_values, p in (
                (SHUFFLED, one.shuffled, one.p_shuffled),
                (one.chance_is, one.chance, one.p_chance),
            )
            if null_values is not None
        ]
        known = [~np.isnan(one.text - null).any(1) for one, _, null, _ in asked]
        each = [p[mask] for (*_, p), mask in zip(asked, known, strict=True)]
        q = np.split(adjust(np.concatenate(each)), np.cumsum([len(p) for p in each])[:-1])
        found = []
        for (one, null, *_), mask, mine in zip(asked, known, q, strict=True):
            layers = tuple(np.flatnonzero(mask)[mine > self.fdr].tolist())
            if layers:
                found.append(UntoldMeasure(measure=one.name, null=null, layers=layers, n_layers=int(mask.sum())))
        return tuple(found)

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.source}: {self.n_prompts:,} prompts of {self.length} tokens, {self.n_tokens:,} "
            f"kept, of {self.n_documents:,} documents, in {self.n_groups} groups; seed {self.seed}",
            f"loss {self.loss.mean():.3f} nats (sd of groups {self.loss.std(ddof=1):.3f}), shuffled "
            f"{self.loss_shuffled.mean():.3f}",
            *self._tell_untold(),
        ]
        for start in range(0, len(self.measures), IN_A_TABLE):
            lines += ["", *self._tabulate(self.measures[start : start + IN_A_TABLE])]
        lines += ["", *(f"{one.name}: {one.about}" + self._tell_chance(one) for one in self.measures)]
        named = [f"{i}: {', '.join(map(str, dims))}" for i, dims in enumerate(self.outliers) if dims]
        return "\n".join([*lines, f"outlier dimensions by layer: {'; '.join(named) or 'none'}", self.limits])

    def _tell_untold(self) -> list[str]:
        if not self.untold:
            return [f"every measure is told from its nulls in every layer (q <= {self.fdr:g})"]
        rows = [
            [one.measure, f"no different from {one.null}", f"{len(one.layers)} of {one.n_layers} layers: "
             + ", ".join(map(str, one.layers))]
            for one in self.untold
        ]  # fmt: skip
        return [f"not told from a null (q > {self.fdr:g}):", *format_table(rows, left=(0, 1, 2))]

    def _tell_chance(self, one: LayerMeasure) -> str:
        return f" (chance: {one.chance_is})" if one.chance_is else ""

    def _tabulate(self, measures: Sequence[LayerMeasure]) -> list[str]:
        head = ["layer"]
        for one in measures:
            head += [one.name, "sd", "shuffled", *(["chance"] if one.chance is not None else [])]
        rows = [head]
        for layer in range(len(self.hook_points)):
            row = [str(layer)]
            for one in measures:
                nulls = [one.shuffled, *([one.chance] if one.chance is not None else [])]
                values = [one.mean[layer], one.std[layer], *(null[layer].mean() for null in nulls)]
                row += ["-" if value != value else f"{value:.{KINDS[one.name].digits}f}" for value in values]
            rows.append(row)
        return format_table(rows)


def layer_profile(
    model: AnyModel,
    tokens: Tokens,
    hook_points: Sequence[str] | None = None,
    *,
    n_prompts: int = 160,
    n_groups: int = 5,
    length: int = 64,
    n_views: int = 4,
    noise: float = 0.15,
    n_neighbors: int = 10,
    mask: TokenMask = DEFAULT_MASK,
    fdr: float = 0.05,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerProfile:
    """How the tokens of a text lie in each layer: eleven measures, each beside shuffled tokens and chance.

    Prompts are cut from the text and divided into groups; every number is of one group, and the groups give its spread.
    All measures are repeated on the same prompts with their tokens in random order, which keeps words and loses syntax
    and meaning. A measure of a layer that is no different there, or by chance, is listed first.

        entropy           of a prompt's Gram matrix (arXiv:2502.02013)
        curvature         mean angle between successive steps (arXiv:2311.04930)
        rank              exp of the entropy of the singular values of all centered tokens
        lidar             rank of prompts' means in units of their spread over views with replaced tokens
                          (arXiv:2312.04000)
        dimension         two-nearest-neighbor dimension of up to 1,024 tokens of all prompts; prompt_dimension that
                          within prompts (arXiv:2501.10573)
        cosine            mean cosine of two tokens, anisotropy
        outliers          dimensions whose mean |x| is three standard deviations above that of all (arXiv:2109.04404)
        neighbors         share of a token's nearest ones that are its nearest in the next layer (arXiv:2007.03506)
        norm_gain         correlation of a token's squared distance from the mean with the information gain of the
                          prediction there, its KL from the mean prediction (arXiv:2212.09663)
        dimension_loss    rank correlation over prompts of prompt_dimension with the loss (arXiv:2501.10573)

    Memory is that of one group's activations at all layers, and of the predictions of about 1,024 tokens; the model
    runs about 2 (n_views + 3) times over the prompts.

    Args:
        model: the language model.
        tokens: text; a prompt is the beginning of what a row holds of one document.
        hook_points: layers, in order, all of one width; None is the input of each block and the output of the last.
        n_prompts: most prompts, drawn at random.
        n_groups: groups that they are divided into, at least 3; each needs 3 prompts or more.
        length: tokens of a prompt.
        n_views: views of each prompt for `lidar`, at least 2.
        noise: share of tokens that a view replaces by others of the text.
        n_neighbors: nearest tokens for `neighbors`.
        mask: tokens that are measured; shuffling moves these alone.
        fdr: rate of false discoveries at which a measure is told from a null.
        batch_size: prompts in a forward pass; None takes as many as hold about 1,024 tokens.
        seed: of prompts, shuffles, views and samples.
        progress: show progress.

    Raises:
        ValueError: for too few prompts of this length, a number out of range, a model whose layers are not `blocks`,
            and hook points that do not exist, or of several widths.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 40)], ctx_len=12)
    >>> found = layer_profile(model, tokens, length=10, n_groups=3, progress=False)
    >>> found["entropy"].text.shape, found.hook_points[0]
    ((4, 3), 'blocks.0.hook_in')
    """
    model = as_model(model)
    if n_groups < 3 or n_views < 2 or not 0 < noise <= 1 or n_neighbors < 1 or not 0 < fdr < 1 or length < 4:
        raise ValueError(
            "`n_groups` must be at least 3, `n_views` 2, `n_neighbors` 1 and `length` 4, `noise` in (0, 1] and `fdr` "
            f"in (0, 1), got {n_groups}, {n_views}, {n_neighbors}, {length}, {noise} and {fdr}."
        )
    names = tuple(hook_points or find_residuals(hook_points_of(model)))
    rng = np.random.default_rng(seed)
    prompts = cut_prompts(tokens, length, n_prompts, rng)
    if len(prompts) < FEWEST * n_groups:
        raise ValueError(
            f"`tokens` must hold {FEWEST} prompts for each of {n_groups} groups, got {len(prompts)} of {length} "
            "tokens. Give more text, or take fewer groups or a smaller `length`."
        )
    n_seq = forward_size(prompts, batch_size, MOST_TOKENS)
    reader = ActivationReader.make(model, prompts, names, mask, torch.float32).calibrated(prompts, n_seq)
    if len(widths := Counter(reader.widths(prompts).values())) > 1:
        raise ValueError(f"`hook_points` must be of one width, got {sorted(widths)}. Profile them apart.")
    runs = [
        _measure(reader, prompts[part.tolist()], n_seq, n_views, noise, n_neighbors, rng)
        for part in tqdm(np.array_split(np.arange(len(prompts)), n_groups), disable=not progress, desc="groups")
    ]
    measures = tuple(
        LayerMeasure(
            name=name,
            about=kind.about,
            text=np.array([run.text[name] for run in runs]).T,
            shuffled=np.array([run.shuffled[name] for run in runs]).T,
            chance=np.array([run.chance[name] for run in runs]).T if kind.chance_is else None,
            chance_is=kind.chance_is,
        )
        for name, kind in KINDS.items()
    )
    return LayerProfile(
        model=describe_model(model).name,
        source=tokens.source,
        hook_points=names,
        measures=measures,
        outliers=tuple(_often([run.outliers[layer] for run in runs]) for layer in range(len(names))),
        loss=np.array([run.loss for run in runs]),
        loss_shuffled=np.array([run.loss_shuffled for run in runs]),
        n_prompts=len(prompts),
        n_documents=len(prompts.doc_ids[:, 0].unique()),
        n_tokens=sum(run.n_tokens for run in runs),
        length=length,
        n_groups=n_groups,
        n_views=n_views,
        noise=noise,
        n_neighbors=n_neighbors,
        fdr=fdr,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _GroupRun:
    """Measures of one group of prompts."""

    text: ByLayer
    shuffled: ByLayer
    chance: ByLayer
    outliers: list[list[int]]
    loss: float
    loss_shuffled: float
    n_tokens: int


def _measure(
    reader: ActivationReader,
    prompts: Tokens,
    n_seq: int,
    n_views: int,
    noise: float,
    n_neighbors: int,
    rng: np.random.Generator,
) -> _GroupRun:
    group = read_group(reader, prompts, n_seq)
    views = read_views(reader, prompts, n_seq, n_views, noise, rng)
    text, chance, outliers = measure_group(group, views, n_neighbors, rng)
    loss, n_tokens = float(group.loss.mean()), len(group.gain)
    moved = shuffle_prompts(prompts, reader, rng)
    group = read_group(reader, moved, n_seq)
    views = read_views(reader, moved, n_seq, n_views, noise, rng)
    shuffled, _, _ = measure_group(group, views, n_neighbors, rng, with_chance=False)
    return _GroupRun(text, shuffled, chance, outliers, loss, float(group.loss.mean()), n_tokens)


def _often(groups: list[list[int]]) -> tuple[int, ...]:
    counts = Counter(dimension for one in groups for dimension in one)
    return tuple(sorted(dimension for dimension, n in counts.items() if 2 * n > len(groups)))


def _test_pairs(differences: Float[np.ndarray, "n_layers n_groups"]) -> Float[np.ndarray, "n_layers"]:
    """Two-sided p values of a mean of 0, by Student's t over the groups; 1 where any is NaN or all are 0."""
    from scipy.special import stdtr

    n = differences.shape[1]
    mean, std = differences.mean(1), differences.std(1, ddof=1)
    t = np.divide(np.abs(mean), std / math.sqrt(n), out=np.where(mean != 0, np.inf, 0.0), where=std > 0)
    return np.where(np.isnan(mean), 1.0, 2 * stdtr(n - 1, -t))
