"""`RemovalBench`: evaluation of an edit: accuracy of retrained probes for each concept, and next-token loss."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.evaluation.rivals import fit_probe
from saelab.lm.forwards import forward_size
from saelab.lm.hooks import find_hook_point, logits, next_token_loss, splice
from saelab.lm.models import Model
from saelab.lm.tokens import Tokens
from saelab.steering.erasing import Edit
from saelab.steering.guesses import auroc
from saelab.steering.labelled import ALL_BUT_SPECIAL, draw_rows
from saelab.steering.removals import ProbedConcept, RemovalScore
from saelab.stores.corpus import split_documents

MIN_COUNT = 20


@dataclass(frozen=True, eq=False)
class RemovalBench:
    """Labelled text on which any edit of activations is evaluated in the same way."""

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
        labels: Mapping[str, Tensor],
        concept: str,
        hook_point: str,
        read_at: str | None,
        draw: tuple[float, int, int],
    ) -> "RemovalBench":
        """The benchmark for one concept: documents split into training and held-out, rare concepts left out.

        Args:
            model: language model.
            tokens: text to measure on.
            labels: for each concept by name, (n_seq, ctx_len) whether it is true of each token.
            concept: the one to be removed.
            hook_point: where edits apply.
            read_at: hook point whose activations probes are trained on; None for the last residual stream.
            draw: share of documents for training, most tokens for probes on each side, and seed.

        Raises:
            ValueError: where the concept is unknown or true, or false, of fewer than 20 tokens on a side.
        """
        train_frac, n_rows, seed = draw
        if concept not in labels:
            raise ValueError(f"`concept` must be one of the labels, got '{concept}'; there are {list(labels)[:5]}...")
        keep = ALL_BUT_SPECIAL.apply(tokens).keep
        is_train = torch.zeros_like(keep)
        is_train[keep] = torch.from_numpy(split_documents(tokens.doc_ids[keep].numpy(), train_frac, seed))
        flat = [(keep & side).flatten().numpy() for side in (is_train, ~is_train)]
        train, held = (torch.from_numpy(draw_rows(rows, n_rows, seed)).view_as(keep) for rows in flat)
        truth = {
            name: marks.cpu()
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
            reading = _Reading(wanted[batch, :n], rows)
            editing: dict[str, Edit] = {self.hook_point: _Editing(edit, keep, counted, changes)} if edit else {}
            with splice(self.model, editing), splice(self.model, {self.read_at: reading}):
                losses = next_token_loss(logits(self.model, ids), ids).cpu().double()
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
            accuracy, auroc = _test(column[is_train], y[is_train], column[~is_train], y[~is_train])
            yield ProbedConcept(concept=name, accuracy=accuracy, auroc=auroc)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Hook that stores the activations of chosen tokens."""

    chosen: Bool[Tensor, "batch ctx_len"]
    rows: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(x[self.chosen.to(x.device)].float().cpu())
        return x


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


def _test(scores: Tensor, y: Tensor, held_scores: Tensor, y_held: Tensor) -> tuple[float, float]:
    """Balanced accuracy at the threshold that is best in training, and AUROC."""
    order = scores.argsort(descending=True, stable=True)
    hits, alarms = (part[order].double().cumsum(0) / part.sum() for part in (y, ~y))
    guess = held_scores >= scores[order][(hits - alarms).argmax()]
    accuracy = (float(guess[y_held].double().mean()) + float((~guess[~y_held]).double().mean())) / 2
    return accuracy, auroc(held_scores.numpy(), y_held.numpy())
