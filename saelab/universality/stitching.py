"""What one model has, used in another: probes, directions and the head, scored beside cheaper ways.

Each figure stands beside the thing in its own space, direct use without a map, and maps of shuffled pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from saelab.functional.statistics import auroc, fit_probe
from saelab.lm.hooks import capture, forward_size, logits, next_token_loss, replace_activations
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.lm.tokenizers import token_strings
from saelab.lm.tokens import Tokens
from saelab.stores.activations import Activations
from saelab.stores.corpus import split_documents
from saelab.stores.results import Result, format_spread, format_table
from saelab.universality.paired_spaces import CHANNELS, AnchorChoice, Anchors, Channel, choose_anchors
from saelab.universality.space_maps import MapMethod, SpaceMap, SpaceRows, fit_map, read_pairs

Readout = Literal["probes", "directions"]
RelativeSpace = Channel | Literal["product"]
METHODS: tuple[MapMethod, ...] = get_args(MapMethod)
SPACES: dict[RelativeSpace, tuple[Channel, ...]] = {
    "cosine": ("cosine",),
    "euclidean": ("euclidean",),
    "l1": ("l1",),
    "linf": ("linf",),
    "product": CHANNELS,
}
SHUFFLED = "linear map, shuffled pairs"
FEW = 6
"""columns that are shown one by one"""
Figures: TypeAlias = dict[str, dict[str, float]]


class SeedRun(NamedTuple):
    """Figures of one seed by row and column."""

    figures: Figures
    n_train: int
    n_test: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StitchTable(Result):
    """Figures of one model's probes, directions, features or head in another model, by way of using them."""

    what: str
    """what is carried, and the figure"""
    figures: dict[str, dict[str, tuple[float, ...]]]
    """figures over seeds by row and column: ways of use in rows; concepts or measures in columns"""
    reasons: dict[str, str]
    """why a row, or a figure of it, is NaN"""
    n_pairs: int
    """paired rows that maps are fitted to, and that are anchors"""
    n_train: int
    """rows that probes learn from and partners are chosen on"""
    n_test: int
    """held-out rows that figures are of"""
    seeds: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(next(iter(self.figures.values())))

    def mean(self, row: str, column: str | None = None) -> float:
        """Mean of a row over seeds, and over all columns that are not NaN where none is named; NaN for none."""
        chosen = self.columns if column is None else (column,)
        values = np.array([self.figures[row][name] for name in chosen])
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def format(self, columns: bool | None = None) -> str:
        """The table as text, each figure with its smallest and largest over seeds.

        Args:
            columns: whether every column is shown; None shows them where they are few, else their mean.
        """
        split = len(self.columns) <= FEW if columns is None else columns
        lines = [f"{self.what}; {self.n_pairs:,} pairs, {self.n_train:,} rows to learn from, {self.n_test:,} to test, "
                 f"seeds {', '.join(map(str, self.seeds))}"]  # fmt: skip
        head = list(self.columns) if split else [f"mean of {len(self.columns)}"]
        table = [["", *head]]
        for name, row in self.figures.items():
            values = [np.array(one) for one in row.values()]
            values = values if split else [_mean_of(np.stack(values))]
            table.append([name, *map(format_spread, values), self.reasons.get(name, "")])
        return "\n".join([*lines, *format_table(table, left=(0, len(head) + 1))])

    def __str__(self) -> str:
        return self.format()


def _mean_of(values: Float[np.ndarray, "n_columns n_seeds"]) -> Float[np.ndarray, "n_seeds"]:
    """Means over columns that are not NaN."""
    known = np.isfinite(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def tabulate(
    what: str, seeds: Sequence[int], n_pairs: int, reasons: dict[str, str], run: Callable[[int], SeedRun]
) -> StitchTable:
    """One table of the runs of all seeds.

    Args:
        what: what the table is of.
        seeds: seeds of the runs, at least one.
        n_pairs: paired rows that maps are fitted to.
        reasons: why rows are NaN; filled by the runs.
        run: the figures of a seed.
    """
    if not seeds:
        raise ValueError("`seeds` must have one at least, got none.")
    runs = [run(seed) for seed in seeds]
    first = runs[0].figures
    figures = {
        row: {column: tuple(one.figures[row][column] for one in runs) for column in columns}
        for row, columns in first.items()
    }
    return StitchTable(
        what=what, figures=figures, reasons=reasons, n_pairs=n_pairs, n_train=runs[-1].n_train, n_test=runs[-1].n_test,
        seeds=tuple(seeds),
    )  # fmt: skip


class TokenSplit(NamedTuple):
    """Rows of paired activations by use; learning and testing have no document in common."""

    pairs: Int[Tensor, "n_pairs"]
    train: Int[Tensor, "n_train"]
    test: Int[Tensor, "n_test"]

    @classmethod
    def make(
        cls, x: Tensor, documents: np.ndarray, n: tuple[int, int, int], anchors: AnchorChoice, seed: int
    ) -> "TokenSplit":
        """Pairs and rows to learn from, of one half of the documents; rows to test on, of the other.

        Args:
            x: rows of the first space, among which pairs are chosen.
            documents: document of each row.
            n: numbers of pairs, and most rows to learn from and to test on.
            anchors: how pairs are chosen.
            seed: of all draws.
        """
        learns = torch.from_numpy(split_documents(documents, 0.5, seed))
        generator = torch.Generator().manual_seed(seed)
        learn, test = (rows[torch.randperm(len(rows), generator=generator)] for rows in
                       (learns.nonzero()[:, 0], (~learns).nonzero()[:, 0]))  # fmt: skip
        n_pairs, n_train, n_test = n
        if min(n_train, n_test) < 1:
            raise ValueError(f"`n_train` and `n_test` must be at least 1, got {n_train} and {n_test}.")
        if not 3 <= n_pairs < len(learn):
            raise ValueError(
                f"`n_pairs` must be at least 3 and leave rows to learn from, of the {len(learn)} rows of half of the "
                f"documents, got {n_pairs}; give more text."
            )
        chosen = choose_anchors(x[learn], n_pairs, anchors, seed=seed)
        rest = torch.ones(len(learn), dtype=torch.bool)
        rest[chosen] = False
        return cls(learn[chosen], learn[rest][:n_train], test[:n_test])

    def run(self, figures: Figures) -> SeedRun:
        """Figures with the sizes of this split."""
        return SeedRun(figures, len(self.train), len(self.test))


def number_documents(documents: np.ndarray | None, n: int) -> np.ndarray:
    """Documents numbered so that each is one run; every row is its own where none are known."""
    return np.arange(n) if documents is None else np.unique(documents, return_inverse=True)[1]


def tell_widths(d_a: int, d_b: int) -> dict[str, str]:
    """Why direct use means nothing for spaces of two widths; empty for one width."""
    return {} if d_a == d_b else {"direct": f"widths {d_a} and {d_b} differ"}


def fit_maps(
    x: Tensor, y: Tensor, methods: Sequence[MapMethod], documents: np.ndarray, seed: int
) -> dict[str, SpaceMap]:
    """A map for each method, and a linear one of shuffled pairs.

    Args:
        x: (n, d_a) rows.
        y: (n, d_b) their partners.
        methods: names of the maps, see `fit_map`.
        documents: document of each row.
        seed: of folds and of the shuffled pairs.
    """
    found = {f"{name} map": fit_map(x, y, name, doc_ids=documents, seed=seed) for name in methods}
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return found | {SHUFFLED: fit_map(x, y[order], doc_ids=documents, seed=seed)}


# ---- probes and directions
def stitch_probes(
    a: SpaceRows,
    b: SpaceRows,
    labels: LabelsLike,
    *,
    readout: Readout = "probes",
    n_pairs: int = 300,
    channels: Sequence[RelativeSpace] = ("cosine",),
    anchors: AnchorChoice = "random",
    methods: Sequence[MapMethod] = METHODS,
    n_train: int = 10_000,
    n_test: int = 10_000,
    doc_ids: Shaped[Any, "n"] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> StitchTable:
    """AUROC of one model's probes of concepts, or its directions, on another model's activations, by way of use.

        own, other's own      on the model itself; the other model's own probe there
        token alone           how often the concept holds of the token's id, without any activation
        relative, own         a probe of similarities to anchors, on the model itself
        relative              the same probe on the other's similarities to the same anchors (arXiv:2209.15430)
        ..., shuffled         with the other's anchors in another order
        direct                the probe as it is; NaN for spaces of two widths
        linear map, ...       carried by maps fitted to the pairs, and by one fitted to shuffled pairs

    A probe is a logistic regression, carried by the map back; a direction is the difference of the means of tokens
    where the concept holds and does not, carried forward as it is for steering, and read by projection. "product" is
    all channels side by side (arXiv:2310.01211). Anchors are the pairs. Pairs and probes are from one half of the
    documents, figures from the other.

    Args:
        a: (n, d_a) rows of the model that probes learn from, such as `AlignedActivations.a`.
        b: (n, d_b) rows of the model that they are used in, row i paired with row i of a.
        labels: of the n rows, some concepts by name.
        readout: "probes" or "directions".
        n_pairs: pairs that maps are fitted to, which are the anchors too.
        channels: relative representations: any of "cosine", "euclidean", "l1", "linf", and "product".
        anchors: how pairs are chosen among a's rows, see `choose_anchors`.
        methods: maps that are fitted, see `fit_map`.
        n_train: most rows that probes learn from.
        n_test: most rows that figures are of.
        doc_ids: document of each row; None takes those of collected activations, or every row for one.
        seeds: of the choice of documents, pairs and rows.

    Raises:
        ValueError: for rows that are not pairs, labels of other rows, too few rows, and unknown choices.

    >>> x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    >>> table = stitch_probes(x, x.flip(1), {"first": x[:, 0] > 0}, n_pairs=50, seeds=(0,))
    >>> table.mean("orthogonal map") > 0.95, table.mean("direct") < 0.6
    (True, True)
    """
    unknown = [name for name in channels if name not in SPACES]
    if readout not in get_args(Readout) or unknown:
        raise ValueError(
            f"`readout` must be one of {get_args(Readout)} and `channels` among {tuple(SPACES)}, got "
            f"'{readout}' and {unknown or list(channels)}."
        )
    x, y, documents = read_pairs(a, b, doc_ids)
    of, numbers, reasons = TokenLabels.of(labels), number_documents(documents, len(x)), dict[str, str]()
    if of.n_tokens != len(x):
        raise ValueError(f"`labels` must be of the {len(x)} rows, got {of.n_tokens}; select those of the pairs.")
    truth = torch.from_numpy(of.matrix.toarray().astype(np.float32))
    ids = a.token_ids if isinstance(a, Activations) else None

    def run(seed: int) -> SeedRun:
        split = TokenSplit.make(x, numbers, (n_pairs, n_train, n_test), anchors, seed)
        work = _Probes(x.float(), y.float(), truth, ids, split, readout, numbers, seed)
        scores = work.score_all(channels, methods, reasons)
        return split.run({name: work.judge(name, one, of.names, reasons) for name, one in scores.items()})

    return tabulate(f"AUROC of {readout} of a on b", seeds, n_pairs, reasons, run)


@dataclass(frozen=True, eq=False)
class _Probes:
    """Probes of one split of the rows."""

    x: Float32[Tensor, "n d_a"]
    y: Float32[Tensor, "n d_b"]
    truth: Float32[Tensor, "n n_concepts"]
    ids: Tensor | None
    split: TokenSplit
    readout: Readout
    documents: np.ndarray
    seed: int

    def score_all(
        self, channels: Sequence[RelativeSpace], methods: Sequence[MapMethod], reasons: dict[str, str]
    ) -> dict[str, Tensor]:
        """Scores of the test rows by way of use."""
        pairs, train, test = self.split
        weight, bias = self.fit(self.x[train])
        found = {"own": self.x[test] @ weight.T + bias}
        other_weight, other_bias = self.fit(self.y[train])
        found["other's own"] = self.y[test] @ other_weight.T + other_bias
        if self.ids is not None:
            found["token alone"] = self.rate()
        for name in channels:
            found |= self.relate(name)
        same = self.x.shape[1] == self.y.shape[1]
        reasons |= tell_widths(self.x.shape[1], self.y.shape[1])
        found["direct"] = self.y[test] @ weight.T + bias if same else torch.full_like(self.truth[test], torch.nan)
        for title, one in fit_maps(self.x[pairs], self.y[pairs], methods, self.documents[pairs], self.seed).items():
            carried, start = one.carry_probe(weight, bias) if self.readout == "probes" else (weight @ one.W, bias)
            found[title] = self.y[test] @ carried.T + start
        return found

    def fit(self, x: Float32[Tensor, "n_train d"]) -> tuple[Tensor, Tensor]:
        """Weights and biases of all concepts."""
        truth = self.truth[self.split.train]
        if self.readout == "probes":
            probe = fit_probe(x, truth, standardize=True)
            return probe.weight, probe.bias
        n_true = truth.sum(0)[:, None]
        means = truth.T @ x / n_true.clamp(min=1), (1 - truth).T @ x / (len(x) - n_true).clamp(min=1)
        return means[0] - means[1], torch.zeros(truth.shape[1])

    def relate(self, name: RelativeSpace) -> dict[str, Tensor]:
        """Scores of a probe of similarities to anchors, on both models, and with shuffled anchors on the other."""
        pairs, train, test = self.split
        channels = SPACES[name]
        mine, other = Anchors(self.x[pairs]), self.y[pairs]
        weight, bias = self.fit(mine.relate(self.x[train], channels))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.seed))
        theirs = {"": other, ", shuffled anchors": other[order]}
        title = f"relative {name}"
        found = {f"{title}, own": mine.relate(self.x[test], channels) @ weight.T + bias}
        for kind, rows in theirs.items():
            found[title + kind] = Anchors(rows).relate(self.y[test], channels) @ weight.T + bias
        return found

    def rate(self) -> Tensor:
        """How often each concept holds of tokens of the same id."""
        assert self.ids is not None
        own, asked = (self.ids[rows].long() for rows in (self.split.train, self.split.test))
        truth = self.truth[self.split.train]
        n = int(max(own.max(), asked.max())) + 1
        sums = torch.zeros(n, truth.shape[1]).index_add(0, own, truth)
        return ((sums + truth.mean(0)) / (torch.bincount(own, minlength=n)[:, None] + 1))[asked]

    def judge(self, name: str, scores: Tensor, concepts: Sequence[str], reasons: dict[str, str]) -> dict[str, float]:
        """AUROC by concept; NaN where it holds of no row, or of all, on either side."""
        learned, truth = self.truth[self.split.train].mean(0), self.truth[self.split.test].bool().numpy()
        found = {}
        for i, concept in enumerate(concepts):
            sound = 0 < float(learned[i]) < 1 and bool(scores[:, i].isfinite().all())
            found[concept] = auroc(scores[:, i].numpy(), truth[:, i]) if sound else float("nan")
            if np.isnan(found[concept]) and name not in reasons:
                reasons[name] = f"'{concept}' holds of no row or of all in some split"
        return found


# ---- heads
def stitch_heads(
    model_a: AnyModel,
    model_b: AnyModel,
    tokens: Tokens,
    *,
    hook_points: tuple[str, str] | None = None,
    n_pairs: int = 2000,
    methods: Sequence[MapMethod] = METHODS,
    n_test: int = 50,
    seeds: Sequence[int] = (0, 1, 2),
) -> StitchTable:
    """How well one model predicts the next token from another's activations: the first model up to a hook point, a
    map, and what follows the second model's hook point. At the last block that is the second model's head.

    Columns: `loss` in nats per token, `perplexity`, and `top1`, the share of tokens that are predicted first. Rows: the
    models by themselves, maps, the activations without a map (NaN for two widths), a map fitted to shuffled pairs, and
    the frequency of tokens in the text that maps are fitted to.

    Args:
        model_a: model that reads the text.
        model_b: model whose rest predicts.
        tokens: text of a vocabulary that both have.
        hook_points: where the models are cut; None is the output of the last block of each.
        n_pairs: tokens that maps are fitted to, from the first half of the rows.
        methods: maps that are fitted.
        n_test: most rows of tokens that figures are of, from the other half.
        seeds: of the halves and pairs.

    Raises:
        ValueError: for models of different vocabularies, too few tokens, and hook points that do not exist.
    """
    model_a = as_model(model_a)
    model_b = as_model(model_b)
    _require_one_vocabulary(model_a, model_b, tokens)
    models = (model_a, model_b)
    at = hook_points or tuple(f"blocks.{one.cfg.n_layers - 1}.hook_resid_post" for one in models)
    if len(tokens) < 4:
        raise ValueError(f"`tokens` must have at least 4 rows, got {len(tokens)}.")
    widths = [capture(one, tokens.ids[:1], [p])[p].shape[-1] for one, p in zip(models, at, strict=True)]

    def run(seed: int) -> SeedRun:
        generator = torch.Generator().manual_seed(seed)
        half = len(tokens) // 2
        learn, test = (
            tokens[rows] for rows in torch.randperm(len(tokens), generator=generator).split([half, len(tokens) - half])
        )
        x, y = (_read_rows(one, learn, p) for one, p in zip(models, at, strict=True))
        rows = torch.randperm(len(x), generator=generator)[:n_pairs]
        documents = learn.doc_ids[learn.attention_mask].numpy()[rows]
        maps = fit_maps(x[rows], y[rows], methods, documents, seed)
        edits: dict[str, Callable[[Tensor], Tensor] | None] = {
            "direct": torch.clone if widths[0] == widths[1] else None
        }
        edits |= {name: one.apply for name, one in maps.items()}
        test = test[:n_test]
        return SeedRun(_score_heads(models, (at[0], at[1]), learn, test, edits), len(x), int(test.predicts.sum()))

    return tabulate("next tokens by b's rest from a's activations", seeds, n_pairs, tell_widths(*widths), run)


def _read_rows(model: Model, tokens: Tokens, hook_point: str) -> Float[Tensor, "n d"]:
    """Activations of all tokens but padding."""
    parts = [capture(model, part.ids, [hook_point])[hook_point][part.attention_mask] for part in _batches(tokens)]
    return torch.cat(parts).float().cpu()


def _require_one_vocabulary(model_a: Model, model_b: Model, tokens: Tokens) -> None:
    ids = tokens.ids[tokens.attention_mask].unique().tolist()
    sizes = (model_a.cfg.d_vocab, model_b.cfg.d_vocab)
    strings = [token_strings(m.tokenizer, ids) if m.tokenizer is not None and sizes[0] == sizes[1] else {} for m in
               (model_a, model_b)]  # fmt: skip
    if sizes[0] != sizes[1] or (all(strings) and strings[0] != strings[1]):
        raise ValueError(
            f"Models must have one vocabulary for one's head to predict the other's tokens, got {sizes[0]} and "
            f"{sizes[1]} tokens{', with other texts' if sizes[0] == sizes[1] else ''}; probes, directions and SAEs can "
            "be carried."
        )


def _batches(tokens: Tokens) -> list[Tokens]:
    size = forward_size(tokens, None)
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


@torch.no_grad()
def _score_heads(
    models: tuple[Model, Model],
    at: tuple[str, str],
    learn: Tokens,
    test: Tokens,
    edits: dict[str, Callable[[Tensor], Tensor] | None],
) -> Figures:
    """Loss and share of right predictions of the models alone, by token frequency, and with activations replaced."""
    counts = torch.bincount(learn.ids[learn.attention_mask].long(), minlength=models[0].cfg.d_vocab) + 1.0
    found: dict[str, list[tuple[float, float, int]]] = {}
    for part in _batches(test):
        x = capture(models[0], part.ids, [at[0]])[at[0]]
        by_name = {"own": logits(models[0], part.ids), "other's own": logits(models[1], part.ids)}
        by_name["token frequency"] = counts.log().expand(*part.ids.shape, -1)
        for name, edit in edits.items():
            if edit is not None:
                new = edit(x)
                with replace_activations(models[1], {at[1]: lambda _, new=new: new}):  # type: ignore[misc]
                    by_name[name] = logits(models[1], part.ids)
        for name, predicted in by_name.items():
            found.setdefault(name, []).append(_sum_up(predicted.cpu(), part))
    nan = dict.fromkeys(("loss", "perplexity", "top1"), float("nan"))
    return {name: _read_sums(found[name]) for name in ("own", "other's own", "token frequency")} | {
        name: nan if edit is None else _read_sums(found[name]) for name, edit in edits.items()
    }


def _sum_up(predicted: Tensor, part: Tokens) -> tuple[float, float, int]:
    counted = part.predicts[:, :-1]
    right = predicted[:, :-1].argmax(-1) == part.ids[:, 1:]
    losses = next_token_loss(predicted, part.ids)[counted]
    return float(losses.double().sum()), float(right[counted].sum()), int(counted.sum())


def _read_sums(parts: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    loss, right, n = (sum(one) for one in zip(*parts, strict=True))
    return {"loss": loss / n, "perplexity": float(np.exp(loss / n)), "top1": right / n}
