"""`erase_concept`: erase a concept from activations, with probe accuracies and losses before and after.

Each edit is evaluated (`RemovalBench`) by the accuracy of retrained probes for each concept, and next-token loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.statistics import auroc, balanced_accuracy, choose_threshold, fit_probe
from saelab.interventions.edited_runs import ReadActivations
from saelab.interventions.interventions import match_source
from saelab.lm.hooks import find_hook_point, forward_size, logits, next_token_loss, replace_activations
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.lm.tokens import Tokens
from saelab.probing.feature_ranking import Ranking
from saelab.probing.labeled_activations import ALL_BUT_SPECIAL, draw_rows, read_chosen, require_shape
from saelab.probing.linear_directions import (
    AffineErasure,
    Edit,
    FeatureErasure,
    To,
    choose_sides,
    draw_directions,
    draw_like,
    erase_direction,
    erase_least,
    fit_direction,
)
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents
from saelab.stores.results import Result, find_row, format_table

MIN_COUNT = 20
ErasureMethod = Literal["features", "means", "probe", "erasure"]


@dataclass(frozen=True, kw_only=True)
class ProbedConcept:
    """Held-out scores of a probe for one concept, retrained on edited activations."""

    concept: str
    accuracy: float
    """balanced accuracy at the threshold chosen in training; 0.5 is chance"""
    auroc: float
    """0.5 is chance"""


@dataclass(frozen=True, kw_only=True)
class RemovalScore:
    """Probe accuracies and losses under one edit."""

    name: str
    n: int
    """number of features (with sign), or directions, removed"""
    concept: ProbedConcept
    others: tuple[ProbedConcept, ...]
    loss_without: float
    """nats a token where the concept is not present: the collateral damage"""
    loss_with: float
    """nats a token where it is present"""
    size: float
    """mean squared change over mean squared activation, of tokens without the concept"""

    @property
    def accuracy_of_others(self) -> float:
        """Mean balanced accuracy over the other concepts."""
        return float(np.mean([one.accuracy for one in self.others])) if self.others else float("nan")


@dataclass(frozen=True, kw_only=True)
class ErasureResult(Result):
    """Result of `erase_concept`, one row for each edit; the first row, `untouched`, is the unmodified model."""

    concept: str
    hook_point: str
    """where activations are edited"""
    read_at: str
    """where probes are trained"""
    rows: tuple[RemovalScore, ...]
    features: tuple[int, ...]
    """features removed by "features"."""
    signs: tuple[int, ...]
    """signs of their codes"""
    rate: float
    """share of held-out tokens with the concept"""
    n_train: int
    """tokens that probes are fitted to"""
    n_tokens: int
    """held-out tokens that probes are tested on"""
    n_predictions: int
    """number of held-out predictions that `loss_without` averages"""
    edits: dict[str, Edit] = field(repr=False)
    """by name, for `sl.splice(model, {hook_point: edit})`; not saved"""

    def __getitem__(self, name: str) -> RemovalScore:
        return find_row(self.rows, name=name)

    def harmed(self, name: str, n: int = 5) -> tuple[tuple[str, float], ...]:
        """The `n` other concepts that lost most balanced accuracy by the edit `name`, as (concept, loss) pairs."""
        before = {one.concept: one.accuracy for one in self.rows[0].others}
        lost = [(one.concept, before[one.concept] - one.accuracy) for one in self[name].others]
        return tuple(sorted(lost, key=lambda pair: -pair[1])[:n])

    def to_dict(self) -> dict[str, Any]:
        """Every field but the edits, ready for JSON."""
        found: dict[str, Any] = Result.to_dict(replace(self, edits={}))
        del found["edits"]
        return found

    def __str__(self) -> str:
        first = self.rows[0]
        lines = [
            f"{self.concept} ({self.rate:.2%} of tokens) taken out at {self.hook_point}, probed at {self.read_at}: "
            f"fresh probes of {self.n_train:,} tokens, tested on {self.n_tokens:,} of other documents; "
            f"{len(first.others)} other concepts; {self.n_predictions:,} predictions without it",
        ]
        table = [["", "n", "accuracy", "AUROC", "others", "worst", "loss without", "with", "size"]]
        for row in self.rows:
            worst = self.harmed(row.name, 1) if row is not first else ()
            sign, base = ("", 0) if row is first else ("+", 1)
            cells = [
                f"{row.accuracy_of_others - base * first.accuracy_of_others:{sign}.3f}",
                f"{-worst[0][1]:+.3f}" if worst else "",
                f"{row.loss_without - base * first.loss_without:{sign}.4f}",
                f"{row.loss_with - base * first.loss_with:{sign}.3f}",
                f"{row.size:.4f}",
            ]
            table.append([row.name, str(row.n), f"{row.concept.accuracy:.3f}", f"{row.concept.auroc:.3f}", *cells])
        return "\n".join(
            [*lines, *format_table(table), "others, worst and losses of edits are changes from the first row"]
        )


def average_scores(name: str, scores: list[RemovalScore]) -> RemovalScore:
    """The mean of scores over random draws, as one row."""

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    def pool(some: list[ProbedConcept]) -> ProbedConcept:
        accuracy, auroc = mean([one.accuracy for one in some]), mean([one.auroc for one in some])
        return ProbedConcept(concept=some[0].concept, accuracy=accuracy, auroc=auroc)

    return RemovalScore(
        name=name,
        n=scores[0].n,
        concept=pool([score.concept for score in scores]),
        others=tuple(pool(list(some)) for some in zip(*(score.others for score in scores), strict=True)),
        loss_without=mean([score.loss_without for score in scores]),
        loss_with=mean([score.loss_with for score in scores]),
        size=mean([score.size for score in scores]),
    )


@dataclass(frozen=True, eq=False)
class RemovalBench:
    """Labeled text on which any edit of activations is evaluated in the same way."""

    model: Model
    tokens: Tokens
    truth: dict[str, Bool[Tensor, "n_seq ctx_len"]]
    """labels of the concepts with at least 20 true and 20 false tokens on both sides of the split"""
    concept: str
    """the one to be removed"""
    hook_point: str
    """where edits apply"""
    read_at: str
    """where probes are trained"""
    keep: Bool[Tensor, "n_seq ctx_len"]
    """tokens that edits change: all but special ones"""
    train: Bool[Tensor, "n_seq ctx_len"]
    """tokens that probes are fitted to"""
    held: Bool[Tensor, "n_seq ctx_len"]
    """tokens that probes are tested on"""
    is_held: Bool[Tensor, "n_seq ctx_len"]
    """all tokens of held-out documents"""

    @classmethod
    def make(
        cls,
        model: Model,
        tokens: Tokens,
        labels: TokenLabels,
        concept: str,
        hook_point: str,
        read_at: str | None,
        draw: tuple[float, int, int],
    ) -> "RemovalBench":
        """The benchmark for one concept: documents split into training and held-out, rare concepts left out.

        Args:
            model: language model.
            tokens: text to measure on.
            labels: which concepts are true of each token.
            concept: the one to be removed.
            hook_point: where edits apply.
            read_at: hook point whose activations probes are trained on; None for the last residual stream.
            draw: share of documents for training, most tokens for probes on each side, and seed.

        Raises:
            ValueError: where the concept is unknown or true, or false, of fewer than 20 tokens on a side.
        """
        train_frac, n_rows, seed = draw
        labels.find(concept)
        keep = ALL_BUT_SPECIAL.apply(tokens).keep
        is_train = torch.zeros_like(keep)
        is_train[keep] = torch.from_numpy(split_documents(tokens.doc_ids[keep].numpy(), train_frac, seed))
        flat = [(keep & side).flatten().numpy() for side in (is_train, ~is_train)]
        train, held = (torch.from_numpy(draw_rows(rows, n_rows, seed)).view_as(keep) for rows in flat)
        truth = {
            name: marks
            for name, marks in labels.items()
            if all(min(int(marks[rows].sum()), int((~marks[rows]).sum())) >= MIN_COUNT for rows in (train, held))
        }
        if concept not in truth:
            raise ValueError(
                f"'{concept}' must hold, and not hold, of {MIN_COUNT} tokens on both sides; give more text."
            )
        last = find_hook_point(model, read_at or f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
        return cls(model, tokens, truth, concept, hook_point, last, keep, train, held, keep & ~is_train)

    def predictions(self, with_concept: bool) -> Bool[Tensor, "n_seq ctx_len_1"]:
        """Mask of the held-out predictions near the concept (`with_concept`), or of all others.

        A prediction is near it if the concept is true of its token or of the next one; only predictions inside a
        document count.
        """
        has = self.truth[self.concept]
        either = has[:, 1:] | has[:, :-1]
        inside = self.tokens.predicts[:, :-1] & self.is_held[:, 1:] & self.is_held[:, :-1]
        return inside & (either == with_concept)

    def score(self, name: str, edit: Edit | None, n: int) -> RemovalScore:
        """Probe accuracies and losses under one edit; `n` is the number of features or directions it removes."""
        seen, (loss_without, loss_with), size = self._run(edit)
        probed = {one.concept: one for one in self._probe(seen)}
        return RemovalScore(
            name=name,
            n=n,
            concept=probed.pop(self.concept),
            others=tuple(probed.values()),
            loss_without=loss_without,
            loss_with=loss_with,
            size=size,
        )

    def _run(self, edit: Edit | None) -> tuple[Tensor, tuple[float, float], float]:
        """Activations at `read_at` of the probed tokens, mean losses without and with the concept, relative size of the
        change.
        """
        rows: list[Tensor] = []
        wanted, places = self.train | self.held, [self.predictions(with_concept) for with_concept in (False, True)]
        sums, changes = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for batch in torch.arange(len(self.tokens)).split(forward_size(self.tokens, None)):
            n = int(self.tokens.attention_mask[batch].sum(1).max())  # what is behind the longest text is padding
            ids, keep = self.tokens.ids[batch, :n], self.keep[batch, :n]
            counted = keep & ~self.truth[self.concept][batch, :n]
            reading = ReadActivations(_pick(wanted[batch, :n]))
            editing: dict[str, Edit] = {self.hook_point: _Editing(edit, keep, counted, changes)} if edit else {}
            with replace_activations(self.model, editing), replace_activations(self.model, {self.read_at: reading}):
                losses = next_token_loss(logits(self.model, ids), ids).cpu().double()
            rows.append(reading.take())
            sums += torch.stack([losses[place[batch, : n - 1]].sum() for place in places])
        means = sums / torch.stack([place.sum() for place in places])
        return torch.cat(rows), (float(means[0]), float(means[1])), float(changes[0] / changes[1].clamp(min=1e-30))

    def _probe(self, x: Float[Tensor, "n d"]) -> Iterator[ProbedConcept]:
        """Scores of newly trained probes of all concepts."""
        wanted = self.train | self.held
        is_train = self.train[wanted]
        labels = torch.stack([marks[wanted] for marks in self.truth.values()], 1)
        x = (x - x[is_train].mean(0)) / x[is_train].std(0).clamp(min=1e-6)
        scores = fit_probe(x[is_train], labels[is_train].float())(x)
        for name, column, y in zip(self.truth, scores.unbind(1), labels.unbind(1), strict=True):
            accuracy, auroc = _test(column.numpy(), y.numpy(), is_train.numpy())
            yield ProbedConcept(concept=name, accuracy=accuracy, auroc=auroc)


def _pick(chosen: Bool[Tensor, "batch ctx_len"]) -> Callable[[Tensor], Tensor]:
    return lambda x: x[chosen.to(x.device)].float().cpu()


@dataclass(frozen=True, eq=False)
class _Editing:
    """Hook that edits the tokens kept and adds up squared changes and squared activations, in `sums`."""

    edit: Edit
    keep: Bool[Tensor, "batch ctx_len"]
    counted: Bool[Tensor, "batch ctx_len"]
    sums: Float[Tensor, "2"]

    def __call__(self, x: Tensor) -> Tensor:
        keep = self.keep.to(x.device)
        before = x[keep]
        after = self.edit(before.float())
        some = self.counted[self.keep].to(x.device)
        self.sums[0] += float((after - before)[some].double().square().sum())
        self.sums[1] += float(before[some].double().square().sum())
        x[keep] = after.to(x)
        return x


def _test(scores: np.ndarray, y: np.ndarray, is_train: np.ndarray) -> tuple[float, float]:
    """Held-out balanced accuracy at the threshold that is best in training, and AUROC."""
    threshold, _ = choose_threshold(scores[is_train], y[is_train], by="balanced")
    held, y_held = scores[~is_train], y[~is_train]
    return balanced_accuracy(held >= threshold, y_held), auroc(held, y_held)


def erase_concept(
    model: AnyModel,
    tokens: Tokens,
    labels: LabelsLike,
    concept: str,
    sae: SAE | None = None,
    *,
    hook_point: str | None = None,
    read_at: str | None = None,
    methods: Sequence[ErasureMethod] | None = None,
    k: int = 8,
    ranking: Ranking | Literal["effect"] = "pruning",
    n_directions: int = 1,
    to: To = "usual",
    n_random: int = 3,
    train_frac: float = 0.5,
    n_rows: int = 20_000,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> ErasureResult:
    """Probe accuracies and losses after a concept is erased at a hook point by several methods and by random controls.

        features  the codes of the `k` features, each with one sign, that best predict the concept and fire more where
                  it is true become 0, the reconstruction error kept
        means     directional ablation along the difference of means, `x - ((x - c) . v) v`
        probe     the same along `n_directions` logistic probes, one after another
        erasure   the smallest affine edit that defeats linear probes (LEACE, arXiv:2306.03819)

    c is the mean of tokens without the concept. Controls: for "features" as many random features with similar firing
    rates, for the others as many random directions. Everything is chosen and fitted on training documents and scored on
    the others: balanced accuracy and AUROC of probes retrained on the edited activations at `read_at`, for every
    concept with 20 true and 20 false tokens on each side of the split; and the loss on predictions with the concept
    neither at the token nor at the next one.

    Args:
        model: language model.
        tokens: the text.
        labels: which concepts are true of each token, (n_seq, ctx_len): `TokenLabels` or tensors by name.
        concept: name of the one to erase.
        sae: SAE for "features".
        hook_point: where activations are edited; by default where the SAE was trained, must be given without an SAE.
        read_at: hook point downstream where probes are trained; by default the last residual stream.
        methods: any of the four, "features" only with an SAE; None takes all that are possible.
        k: number of features for "features".
        ranking: how they are chosen: one of `probe_features`' rankings, or "effect" (arXiv:2411.18895).
        n_directions: number of probes' directions for "probe".
        to: center of "means" and "probe": "usual" for c as above, "zero" for the origin in its place.
        n_random: random draws that each control is the mean of; 0 for none.
        train_frac: share of documents for training.
        n_rows: most tokens for probes on each side of the split.
        seed: of the split, the samples and the controls.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: where the concept is unknown or too rare, without an SAE where "features" or the SAE's hook point
            are needed, for an SAE of another model, weight processing or hook point (unless `allow_mismatch`), and for
            a negative number of draws.
    """
    if n_random < 0:
        raise ValueError(f"`n_random` must be at least 0, got {n_random}; use 0 for no random controls.")
    model = as_model(model)
    given = TokenLabels.of(labels)
    require_shape(given.shape, tokens)
    point = _find_point(model, sae, hook_point, allow_mismatch)
    bench = RemovalBench.make(model, tokens, given, concept, point, read_at, (train_frac, n_rows, seed))
    kinds = list(
        methods if methods is not None else [m for m in get_args(ErasureMethod) if m != "features" or sae is not None]
    )
    if bad := [kind for kind in kinds if kind not in get_args(ErasureMethod) or (kind == "features" and sae is None)]:
        raise ValueError(f"`methods` must be of {get_args(ErasureMethod)}, 'features' with an SAE, got {bad}.")
    chooser = _Chooser(sae, bench, k, ranking, n_directions, to, seed)
    edits: dict[str, Edit] = {}
    rows = [bench.score("untouched", None, 0)]
    for kind in kinds:
        edits[kind] = chooser.make(kind)
        rows.append(bench.score(kind, edits[kind], _count(edits[kind])))
    for name, drawn in chooser.draw(edits, n_random):
        rows.append(average_scores(name, [bench.score(name, edit, _count(edit)) for edit in drawn]))
    chosen = edits.get("features")
    return ErasureResult(
        concept=concept,
        hook_point=point,
        read_at=bench.read_at,
        rows=tuple(rows),
        features=chosen.features if isinstance(chosen, FeatureErasure) else (),
        signs=chosen.signs if isinstance(chosen, FeatureErasure) else (),
        rate=float(bench.truth[concept][bench.held].float().mean()),
        n_train=int(bench.train.sum()),
        n_tokens=int(bench.held.sum()),
        n_predictions=int(bench.predictions(False).sum()),
        edits=edits,
    )


def _find_point(model: Model, sae: SAE | None, hook_point: str | None, allow_mismatch: bool) -> str:
    if sae is not None:
        return match_source(sae, model, hook_point, allow_mismatch)
    if hook_point is None:
        raise ValueError("`hook_point` must be given where no SAE records it, got None.")
    return find_hook_point(model, hook_point)


def _count(edit: Edit) -> int:
    return len(edit.features) if isinstance(edit, FeatureErasure) else len(edit.read)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Makes the edits from training tokens, and their random controls."""

    sae: SAE | None
    bench: RemovalBench
    k: int
    ranking: Ranking | Literal["effect"]
    n_directions: int
    to: To
    seed: int

    def __post_init__(self) -> None:
        x = read_chosen(self.bench.model, self.bench.tokens, self.bench.train, self.bench.hook_point)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", self.bench.truth[self.bench.concept][self.bench.train])
        object.__setattr__(self, "codes", encode_csr(self.sae, x) if self.sae is not None else None)

    x: Any = field(init=False, repr=False)
    y: Any = field(init=False, repr=False)
    codes: Any = field(init=False, repr=False)

    def make(self, kind: ErasureMethod) -> Edit:
        """The edit of one method."""
        if kind == "features":
            assert self.sae is not None
            probe = fit_direction(self.x, self.y, self.bench.hook_point, "probe").vector
            pull = (self.sae.directions().detach().cpu() @ probe).numpy()
            return FeatureErasure(self.sae, *choose_sides(self.codes, self.y.numpy(), self.k, self.ranking, pull))
        if kind == "erasure":
            return erase_least(self.x, self.y)
        n = self.n_directions if kind == "probe" else 1
        return erase_direction(self.x, self.y, self.bench.hook_point, kind, n, self.to)

    def draw(self, edits: dict[str, Edit], n: int) -> Iterator[tuple[str, list[Edit]]]:
        """Random controls, for features and for each number of directions among the edits."""
        rng, done = np.random.default_rng(self.seed), set()
        for edit in edits.values() if n else ():
            if isinstance(edit, FeatureErasure):
                pairs = [draw_like(self.codes, edit.features, edit.signs, rng) for _ in range(n)]
                yield "random features", [FeatureErasure(edit.sae, *pair) for pair in pairs]
            elif isinstance(edit, AffineErasure) and (rank := len(edit.read)) not in done:
                done.add(rank)
                name = "random direction" if rank == 1 else f"{rank} random directions"
                yield name, [draw_directions(edit, self.seed + i) for i in range(n)]
