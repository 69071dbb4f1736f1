"""`trait_vector`: the direction between texts that describe opposite ends of a trait, judged on pairs left out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saelab.interventions.directions import Direction
from saelab.interventions.prompt_metrics import read_one_text
from saelab.lm.conversations import Conversation, Messages
from saelab.lm.generation import SAMPLING, SamplingConfig, generate
from saelab.lm.hooks import capture, find_hook_point
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import find_special_ids
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, format_table

DescriptionPart = Literal["mean", "last"]
Text: TypeAlias = str | Messages | Conversation
FEW = 6
"""pairs below which all divisions of signs leave no p below 1/16"""


@dataclass(frozen=True, kw_only=True)
class TraitRow:
    """How well the direction of a trait at one hook point holds of pairs that it was not made of."""

    hook_point: str
    cosine: float
    """mean over pairs of cos(difference of the pair, mean difference of all others)"""
    accuracy: float
    """share of pairs whose difference has a positive product with the mean of the others"""
    chance: float
    """95 % quantile of `cosine` where the ends of pairs are exchanged at random"""
    p: float
    """share of such exchanges with a `cosine` at least as large"""
    norm: float
    """norm of the mean difference, as a share of the mean norm of the activations"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trait(Result):
    """The direction of a trait at several hook points, and how far it holds of pairs left out.

    It tells what the descriptions have in common, whatever that is: where all positive ones are longer, it is length.
    """

    name: str
    hook_point: str
    """the hook point whose direction holds best of pairs left out"""
    rows: tuple[TraitRow, ...]
    p: float
    """share of random exchanges whose best hook point reaches the `cosine` of this one"""
    positive: dict[str, Float[np.ndarray, "d_in"]] = field(repr=False)
    """mean activation of the positive ends by hook point"""
    negative: dict[str, Float[np.ndarray, "d_in"]] = field(repr=False)
    """mean activation of the negative ends by hook point"""
    differences: Float[np.ndarray, "n_pairs d_in"] = field(repr=False)
    """positive less negative end of each pair at `hook_point`"""
    n_pairs: int
    n_texts: int
    """number of texts that were read, of both ends"""
    n_tokens: int
    """number of tokens whose activations were averaged"""
    read: str
    """"mean" or "last" of the descriptions' tokens, or "answers" where questions were answered"""
    seed: int

    def vector(self, hook_point: str | None = None) -> Float[np.ndarray, "d_in"]:
        """Mean of the positive ends less that of the negative ones, in the activations' own units."""
        at = self._find(hook_point)
        found: np.ndarray = self.positive[at] - self.negative[at]
        return found

    def direction(self, hook_point: str | None = None) -> Direction:
        """The direction to steer and project with; its peak is the distance between the ends, so that a strength of 1
        in unit "max" moves an activation from the negative end to the positive one.
        """
        vector = torch.from_numpy(self.vector(hook_point))
        return Direction(vector, self._find(hook_point), self.name, float(vector.norm()))

    def level(self, x: Float[Tensor, "*batch d_in"], hook_point: str | None = None) -> Float[Tensor, "*batch"]:
        """Place of activations between the ends: `(x - negative) . v / |v|^2`, 0 at the negative, 1 at the positive."""
        at = self._find(hook_point)
        v = torch.from_numpy(self.vector(at)).to(x.device)
        return (x.float() - torch.from_numpy(self.negative[at]).to(x.device)) @ v / v.square().sum()

    def draw_exchanged(self, n: int, seed: int = 0) -> Float[Tensor, "n d_in"]:
        """Directions as long as the trait's of the same pairs, the ends of a random half of which are exchanged: what
        the pairs differ in beside the trait.
        """
        rng = np.random.default_rng(seed)
        signs = np.where(np.arange(self.n_pairs) < self.n_pairs // 2, -1.0, 1.0)
        drawn = np.stack([rng.permutation(signs) * rng.choice([-1.0, 1.0]) for _ in range(n)]) @ self.differences
        size = np.linalg.norm(drawn, axis=1, keepdims=True)
        length = np.linalg.norm(self.vector())
        return torch.from_numpy((drawn * (length / np.maximum(size, 1e-30))).astype(np.float32))

    def _find(self, hook_point: str | None) -> str:
        at = hook_point or self.hook_point
        if at not in self.positive:
            raise ValueError(f"The trait was read at {list(self.positive)}, got '{at}'.")
        return at

    def __str__(self) -> str:
        pairs = f"{self.n_pairs} pairs ({self.n_texts} texts, {self.n_tokens:,} tokens, {self.read}, seed {self.seed})"
        lines = [f"{self.name}: {pairs}; best at {self.hook_point}, p {self.p:.2g} of the best of {len(self.rows)}"]
        if self.n_pairs < FEW:
            least = 2.0 ** (1 - self.n_pairs)
            lines.append(f"{self.n_pairs} pairs leave no p below {least:.2g}; give {FEW} or more")
        elif not self.p <= 0.05:
            lines.append("pairs left out do not lie along it more than pairs exchanged at random: no trait was found")
        table = [["hook point", "chance (95 %)", "cosine", "accuracy", "p", "norm"]]
        for row in self.rows:
            cells = (row.chance, row.cosine, row.accuracy, row.p, row.norm)
            table.append([row.hook_point, *(f"{value:.3g}" for value in cells)])
        return "\n".join([*lines, *format_table(table)])

    @classmethod
    def load(cls, path: str | Path) -> "Trait":
        """The trait that `save` wrote; ValueError for another file."""
        try:
            data = json.loads(Path(path).read_text())
            rows = tuple(TraitRow(**{n: _number(v) for n, v in row.items()}) for row in data.pop("rows"))
            ends: dict[str, Any] = {
                name: {at: np.array(vector, np.float32) for at, vector in data.pop(name).items()}
                for name in ("positive", "negative")
            }
            ends["differences"] = np.array(data.pop("differences"), np.float32)
            found = cls(rows=rows, **ends, **{n: _number(v) for n, v in data.items()})
        except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            names = [one.name for one in fields(cls)]
            raise ValueError(f"{path} must be a trait as `save` writes it, with {names}, got: {error}.") from error
        shapes = [(name, vector.shape) for end in (found.positive, found.negative) for name, vector in end.items()]
        same = len(set(shapes)) * 2 == len(shapes) and found.hook_point in found.positive
        if not same or found.differences.shape != (found.n_pairs, len(found.positive[found.hook_point])):
            raise ValueError(
                f"{path} must have one vector of each end at each hook point, and of each pair, got shapes {shapes}."
            )
        return found


def _number(value: Any) -> Any:
    """NaN is written as null."""
    return math.nan if value is None else value


def trait_vector(
    model: AnyModel,
    pairs: Sequence[tuple[Text, Text]],
    *,
    questions: Sequence[str] = (),
    hook_points: Sequence[str] | None = None,
    read: DescriptionPart = "mean",
    n_tokens: int = 48,
    sampling: SamplingConfig = SAMPLING,
    n_exchanges: int = 2000,
    name: str = "trait",
    seed: int = 0,
    progress: bool = True,
) -> Trait:
    """The direction of a trait, from pairs of texts that describe its two ends, at every layer.

        v = mean over pairs of (x(positive) - x(negative))

    Without questions x is the mean activation, or that of the last token, of the description itself. With questions the
    model answers each of them under each description (a system message, or where the tokenizer has no chat template a
    text before the question), and x is the mean over the tokens of its answers (arXiv:2507.21509). The ends should
    differ in the trait alone: same length, same form.

    The hook point is chosen by pairs left out: mean cosine of a pair's difference with the mean of the others. Its p is
    that of the best hook point among exchanges of the ends of pairs, all of them up to `n_exchanges`.

    Args:
        model: language model.
        pairs: (positive, negative) descriptions, texts or conversations; two or more.
        questions: what the model is asked under each description; empty reads the descriptions themselves.
        hook_points: where activations are read; by default the end of every block.
        read: "mean" of a description's tokens, special ones left out, or "last".
        n_tokens: largest length of an answer.
        sampling: of answers.
        n_exchanges: random exchanges of ends behind the p values.
        name: of the trait.
        seed: of answers and exchanges.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for fewer than two pairs, unknown `read` and hook points, answers without a token, and descriptions
            that do not fit the model's context.

    >>> pairs = [("I am glad", "I am sad"), ("so glad", "so sad"), ("glad again", "sad again")]
    >>> found = trait_vector(sl.lm.tiny_model(), pairs, progress=False)
    >>> len(found.rows), found.n_texts, found.direction().d_in
    (3, 6, 32)
    """
    model = as_model(model)
    if len(pairs) < 2 or any(len(pair) != 2 or isinstance(pair, str | Mapping) for pair in pairs):
        raise ValueError(f"`pairs` must hold two or more (positive, negative) texts, got {len(pairs)}: {pairs!r:.80}.")
    if read not in get_args(DescriptionPart):
        raise ValueError(f"`read` must be one of {get_args(DescriptionPart)}, got '{read}'.")
    if n_exchanges < 1 or n_tokens < 1:
        raise ValueError(f"`n_exchanges` and `n_tokens` must be at least 1, got {n_exchanges} and {n_tokens}.")
    points = hook_points or [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    points = list(dict.fromkeys(find_hook_point(model, point) for point in points))
    reader = _TraitReader(model, points, read, progress)
    ends = []
    for side in range(2):  # with the same noise
        texts = [pair[side] for pair in pairs]
        if questions:
            asked = [ask_under(model, text, question) for text in texts for question in questions]
            x = reader.read_answers(asked, n_tokens, sampling, seed)
        else:
            x = reader.read_texts(texts)
        ends.append({point: found.double().unflatten(0, (len(pairs), -1)).mean(1) for point, found in x.items()})
    rows, p = _judge(ends, n_exchanges, seed)
    best = max(rows, key=lambda row: (np.nan_to_num(row.cosine, nan=-2.0), points.index(row.hook_point)))
    means = [{point: x.mean(0).float().numpy() for point, x in end.items()} for end in ends]
    return Trait(
        name=name, hook_point=best.hook_point, rows=tuple(rows), p=p, positive=means[0], negative=means[1],
        differences=(ends[0][best.hook_point] - ends[1][best.hook_point]).float().numpy(),
        n_pairs=len(pairs), n_texts=2 * len(pairs) * max(1, len(questions)), n_tokens=reader.n_tokens,
        read="answers" if questions else read, seed=seed,
    )  # fmt: skip


def ask_under(model: Model, description: Text, question: str) -> str | Conversation:
    """A question under a description: a system message and the user's; one text where there is no chat template."""
    tokenizer: Any = model.tokenizer
    given = Conversation.find(description)
    if given is None and not getattr(tokenizer, "chat_template", None):
        return f"{description}\n\n{question}"
    before = given.messages if given is not None else ({"role": "system", "content": description},)
    return Conversation((*before, {"role": "user", "content": question}))


class _TraitReader:
    """Mean activations of texts and of answers at some hook points."""

    def __init__(self, model: Model, points: list[str], read: DescriptionPart, progress: bool) -> None:
        self.model, self.points, self.read, self.progress, self.n_tokens = model, points, read, progress, 0
        special = find_special_ids(model) if model.tokenizer is not None else ()
        self.special = torch.tensor(sorted(special), dtype=torch.long)

    def read_texts(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """(n_texts, d_in) activations of texts by hook point."""
        found: list[Any] = [text if isinstance(text, str) else Conversation.find(text) or text for text in texts]
        ids = [read_one_text(self.model, text, "pairs").ids[0] for text in found]
        return self._average(ids, [0] * len(ids), self.read)

    def read_answers(
        self, prompts: Sequence[str | Conversation], n_tokens: int, sampling: SamplingConfig, seed: int
    ) -> dict[str, Tensor]:
        """(n_prompts, d_in) mean activations of one answer to each prompt by hook point."""
        made = generate(self.model, prompts, n_tokens, seed=seed, sampling=sampling, progress=self.progress)
        return self._average([torch.tensor(one.all_ids) for one in made], [len(one.prompt_ids) for one in made], "mean")

    def _average(self, rows: Sequence[Tensor], starts: Sequence[int], read: DescriptionPart) -> dict[str, Tensor]:
        """Mean activation of the tokens of each row from its start on, special ones left out."""
        found: dict[str, list[Tensor]] = {point: [] for point in self.points}
        bar = tqdm(zip(rows, starts, strict=True), total=len(rows), delay=2, disable=hidden(self.progress))
        for ids, start in bar:
            keep = torch.isin(ids, self.special, invert=True)
            keep[:start] = False
            places = keep.nonzero()[:, 0]
            if not len(places):
                what = "An answer" if start else "A description"
                raise ValueError(f"{what} must have a token that is not special, got ids {ids[start:].tolist()[:8]}.")
            places = places[-1:] if read == "last" else places
            self.n_tokens += len(places)
            x = capture(self.model, ids[None], self.points)
            for point in self.points:
                found[point].append(x[point][0, places.to(x[point].device)].float().mean(0).cpu())
        return {point: torch.stack(means) for point, means in found.items()}


def _judge(ends: list[dict[str, Tensor]], n_exchanges: int, seed: int) -> tuple[list[TraitRow], float]:
    """The row of each hook point, and the p of the best one."""
    n = len(next(iter(ends[0].values())))
    signs = draw_exchanges(n, n_exchanges, seed)
    drawn, rows = [], []
    for point in ends[0]:
        positive, negative = (end[point] for end in ends)
        differences = (positive - negative).numpy()
        cosines = cosines_left_out(differences @ differences.T, signs)
        means = cosines.mean(1)
        norm = float(np.linalg.norm(differences.mean(0)) / torch.cat([positive, negative]).norm(dim=1).mean())
        drawn.append(means)
        rows.append(
            TraitRow(
                hook_point=point, cosine=float(means[0]), accuracy=float((cosines[0] > 0).mean()),
                chance=float(np.quantile(means, 0.95)), p=_share_as_large(means), norm=norm,
            )
        )  # fmt: skip
    return rows, _share_as_large(np.nan_to_num(np.stack(drawn), nan=-1.0).max(0))


def _share_as_large(drawn: np.ndarray) -> float:
    """Share of exchanges that reach the first of them, which exchanges nothing."""
    return float((drawn >= drawn[0] - 1e-9).mean()) if np.isfinite(drawn[0]) else math.nan


def draw_exchanges(n: int, n_exchanges: int, seed: int) -> Float[np.ndarray, "n_drawn n"]:
    """Signs of n pairs, -1 where the ends are exchanged: none first, then all others or, of more, `n_exchanges` drawn.

    >>> draw_exchanges(2, 10, 0).tolist()
    [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
    """
    if 2.0**n <= n_exchanges:
        return 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n - 1, -1, -1)) & 1)
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], (n_exchanges, n))
    return np.concatenate([np.ones((1, n)), drawn])


def cosines_left_out(
    gram: Float[np.ndarray, "n n"], signs: Float[np.ndarray, "n_drawn n"]
) -> Float[np.ndarray, "n_drawn n"]:
    """cos(s_i d_i, sum over j != i of s_j d_j) of each difference d_i, for each row of signs, from `gram` = d d^T.

    NaN where a difference, or the sum of the others, is zero.

    >>> d = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> cosines_left_out(d @ d.T, np.ones((1, 3))).round(3).tolist()
    [[0.447, 1.0, 0.447]]
    """
    own = np.diag(gram)
    along = signs * (signs @ gram)  # s_i d_i . sum over all j of s_j d_j
    whole = along.sum(1, keepdims=True)
    others = whole - 2 * along + own  # squared norm of the sum of the others
    size = np.sqrt(np.maximum(others, 0) * own)
    tiny = 1e-12 * max(float(own.max()), 1e-300)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (along - own) / size
    found[size <= tiny] = np.nan
    return found
