"""Does a sparse dictionary explain labels of documents through attention for each label? Label heads on stories.

    python scripts/measure_label_attention.py --out label_attention.json

As in DILA (arXiv:2409.10504): documents are stories of `tales`, their labels what is true of some token (its topics,
registers, facts, names, traits), several a story. A head has a matrix A of features by labels: a label attends to the
tokens by the softmax of z A over the story, and a logistic regression reads the attended mean of the activations. An
L1 penalty on A leaves few features a label. The paper trains SAE and head together; here the SAE is trained before and
stays as it is. No SAE saw the stories: three fifths to learn from, a fifth to choose each label's threshold on (by
Cohen's kappa), a fifth to measure on.

    features      that a label keeps: entries of A other than 0
    attention     share of a label's attention on tokens of which it is true, in stories that have it
    own F1        F1 of the feature with the largest A (|A| of activations), by its largest code in the story
    in kept       labels whose best feature by that F1 (`score_concepts` on largest codes) is among those with A not 0

Beside it: the same head on an untrained SAE's codes, on the activations themselves ("x"), without attention (all tokens
alike) and with the stories' labels permuted; logistic regressions on the largest codes; the best single feature.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from measure_dissection import format_rows, read_stories, trained_sae
from objectives.shared import FIRST_STORY, HOOK, tales_activations
from saelab.evaluation import encode_csr, score_concepts
from saelab.functional.statistics import choose_threshold, f1, fit_probe
from saelab.lm.token_labels import Concept, TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json

KINDS = ("topic", "register", "fact", "relation", "role", "pole", "one-sided", "state")
NAMES = ("girl name", "boy name")  # whose words are who is in the story
RATES = (0.03, 0.6)  # share of stories that have a label
D_SAE, K = 512, 16
BATCH, WEIGHT_DECAY = 32, 1e-4


@dataclass(frozen=True)
class Documents:
    """Stories as tokens, and what each is labeled with."""

    raw: Tensor  # (n_tokens, d_in), activations as the SAE reads them
    x: Tensor  # the same with mean 0 and mean square 1
    z: Any  # codes of the tokens, scipy csr, or None for the activations themselves
    starts: np.ndarray  # first token of each story, and the end of the last
    y: Tensor  # (n_stories, n_labels)
    labels: TokenLabels

    def rows(self, stories: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens of stories, padded, and where there are any."""
        first, last = (torch.from_numpy(one)[torch.as_tensor(stories), None] for one in (self.starts, self.starts[1:]))
        rows = first + torch.arange(int((last - first).max()))
        return rows * (rows < last), rows < last

    def largest(self) -> np.ndarray:
        """The largest code of each feature in each story; of activations also the largest of -x, in columns behind."""
        if self.z is None:
            x = self.x.numpy()
            return np.hstack([np.maximum.reduceat(side * x, self.starts[:-1], axis=0) for side in (1, -1)])
        return np.vstack([self.z[i:j].max(0).toarray() for i, j in zip(self.starts, self.starts[1:], strict=False)])

    @property
    def n_features(self) -> int:
        return int(self.x.shape[1] if self.z is None else self.z.shape[1])


def read_documents(n_stories: int, first: int) -> Documents:
    """Words of stories, the concepts of each, and labels of the stories, those that neither few nor most have."""
    acts, labels = read_stories(n_stories, first, [HOOK])
    x, documents = acts[HOOK], labels.require_documents()
    starts = np.append(np.flatnonzero(np.diff(documents, prepend=-1)), len(documents))
    y = np.maximum.reduceat(labels.matrix.toarray().astype(np.uint8), starts[:-1], axis=0)
    meant = np.array([one.kind in KINDS or one.parent in NAMES for one in labels.concepts])
    chosen = np.flatnonzero(meant & (RATES[0] <= y.mean(0)) & (y.mean(0) <= RATES[1]))
    # parents and opposites that are no labels here would be asked for
    own = TokenLabels.of(labels.matrix[:, chosen], [Concept(labels.concepts[i].name) for i in chosen], documents)
    center = x - x.mean(0)
    found = torch.from_numpy(y[:, chosen]).float()
    return Documents(x, center / center.square().mean().sqrt(), None, starts, found, own)


@dataclass(frozen=True)
class Split:
    """Numbers of the stories to learn from, to choose thresholds on, and to measure on."""

    learned: np.ndarray
    chosen: np.ndarray
    held: np.ndarray


class LabelHead(torch.nn.Module):
    """Attention of each label to a story's tokens by their features, and a logistic regression of what it gives."""

    def __init__(self, n_features: int, d_in: int, n_labels: int, seed: int) -> None:
        super().__init__()
        draws = torch.randn(d_in, n_labels, generator=torch.Generator().manual_seed(seed))
        self.A = torch.nn.Parameter(torch.zeros(n_features, n_labels))
        self.W = torch.nn.Parameter(0.1 * draws)
        self.b = torch.nn.Parameter(torch.full((n_labels,), -2.0))

    def forward(self, text: Documents, stories: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n_stories, n_labels); attention (n_stories, n_tokens, n_labels); the tokens that it is of."""
        rows, there = text.rows(stories)
        flat = rows[there]
        if text.z is None:
            own = text.x[flat] @ self.A
        else:
            part = text.z[flat.numpy()]
            ids, begins = (torch.from_numpy(one.astype(np.int64)) for one in (part.indices, part.indptr[:-1]))
            own = embedding_bag(ids, self.A, begins, mode="sum", per_sample_weights=torch.from_numpy(part.data))
        scores = torch.full((*there.shape, self.A.shape[1]), -torch.inf).masked_scatter(there[..., None], own)
        attention = scores.softmax(1)
        # W first: (tokens, labels) in place of an attended vector for every label
        read = (text.x[rows] @ self.W * attention).sum(1)
        return read + self.b, attention, rows


def train_head(text: Documents, stories: np.ndarray, args: argparse.Namespace, l1: float, seed: int) -> LabelHead:
    """A head that learned from some stories; an infinite `l1` leaves it without attention."""
    head = LabelHead(text.n_features, text.x.shape[1], text.y.shape[1], seed)
    parts = [{"params": [head.A, head.b]}, {"params": [head.W], "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.Adam(parts, lr=args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, args.n_epochs)
    rng, n_steps = np.random.default_rng(seed), 0
    for _ in range(args.n_epochs):
        for batch in np.array_split(rng.permutation(stories), len(stories) // BATCH):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(head(text, batch)[0], text.y[batch], reduction="none")
            loss.sum(1).mean().backward()
            optimizer.step()
            n_steps += 1
            # the penalty's proximal step in Adam's metric, in which a zero stays where the gradient is below `l1`
            metric = (optimizer.state[head.A]["exp_avg_sq"] / (1 - 0.999**n_steps)).sqrt() + 1e-8
            with torch.no_grad():
                size = (head.A.abs() - schedule.get_last_lr()[0] * l1 / metric).clamp(min=0)
                head.A.copy_(head.A.sign() * size)
        schedule.step()
    return head


@torch.no_grad()
def read_head(head: LabelHead, text: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all stories; share of attention on tokens of which the label is true, NaN for stories without it."""
    logits, shares = [], []
    truth = torch.from_numpy(text.labels.matrix.toarray())
    for batch in np.array_split(np.arange(len(text.y)), len(text.y) // BATCH):
        out, attention, rows = head(text, batch)
        inside = (attention * truth[rows]).sum(1)
        logits.append(out)
        shares.append(torch.where(text.y[batch] > 0, inside, torch.nan))
    return torch.cat(logits).numpy(), torch.cat(shares).numpy()


def score_labels(scores: np.ndarray, y: np.ndarray, split: Split) -> dict[str, float]:
    """Micro and macro F1 on held-out stories, with a threshold for each label from others."""
    cuts = [choose_threshold(scores[split.chosen, c], y[split.chosen, c])[0] for c in range(y.shape[1])]
    guess, true = scores[split.held] >= np.array(cuts), y[split.held]
    counts = np.stack([(guess & true).sum(0), guess.sum(0), true.sum(0)])
    return {"micro F1": float(f1(*counts.sum(1))), "macro F1": float(f1(*counts).mean())}


def find_best(codes: Any, labels: TokenLabels) -> np.ndarray:
    """The best feature for each label, -1 where there is none."""
    rows = score_concepts(codes, labels, min_count=5).concepts
    return np.array([-1 if row.feature is None else row.feature for row in rows])


def explain(head: LabelHead, text: Documents, split: Split, largest: np.ndarray, best: np.ndarray) -> dict[str, float]:
    """How many features a label keeps, and whether they are the label's by their own F1."""
    weights = head.A.detach().numpy()
    # a label attends to a feature where A is positive; to activations with either sign
    labels, top = np.arange(weights.shape[1]), (np.abs(weights) if text.z is None else weights).argmax(0)
    most = weights[top, labels]
    columns = top + (most < 0) * len(weights) if text.z is None else np.where(most > 0, top, -1)
    own = np.where(columns >= 0, largest[:, columns], 0)
    return {
        "features": float((weights != 0).sum(0).mean()),
        "own F1": score_labels(own, text.y.numpy() > 0, split)["macro F1"],
        "in kept": float((weights[best % len(weights), labels] != 0).mean()),
    }


def measure(text: Documents, args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Figures by method, of one SAE and one split of the stories."""
    sae = trained_sae(D_SAE, K, args.n_tokens, seed)
    saes = {"SAE": sae, "untrained": make_untrained(sae, tales_activations()[:10_000], seed=100 + seed), "x": None}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(text.y))
    split = Split(*np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5]))
    known, y = np.concatenate([split.learned, split.chosen]), text.y.numpy() > 0
    found = {"always": score_labels(np.zeros(y.shape), y, split)}
    for name, made in saes.items():
        z = None if made is None else encode_csr(made, text.raw)
        one = replace(text, z=None if z is None else (z / z.data.mean()).astype(np.float32).tocsr())
        largest = one.largest()
        best = find_best(largest[known], TokenLabels.of(y[known], text.labels.concepts, known))
        found[f"{name}, best feature"] = score_labels(largest[:, best], y, split)
        pooled = torch.from_numpy(largest).float()
        probe = fit_probe(pooled[split.learned], text.y[split.learned], standardize=True)
        found[f"{name}, largest codes"] = score_labels(probe(pooled).numpy(), y, split)
        given = {f"{name}, l1 {l1:g}": (one, l1) for l1 in args.l1}
        if name == "SAE":
            moved = replace(one, y=text.y[torch.from_numpy(rng.permutation(len(y)))])
            given[f"{name}, permuted"] = (moved, args.l1[0])
        if name == "x":
            given["no attention"] = (one, np.inf)
        for title, (read, l1) in given.items():
            head = train_head(read, split.learned, args, l1, seed)
            scores, inside = read_head(head, read)
            found[title] = score_labels(scores, read.y.numpy() > 0, split)
            found[title]["attention"] = float(np.nanmean(inside[split.held]))
            found[title] |= explain(head, read, split, largest, best) if l1 < np.inf else {}
            print(f"seed {seed}  {title:<26}" + "  ".join(f"{k} {v:.3f}" for k, v in found[title].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-stories", type=int, default=800, help="three fifths of them to learn from")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--l1", type=float, nargs="+", default=[0.01, 0.0], help="the first also with labels permuted")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--n-epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = read_documents(args.n_stories, FIRST_STORY + 14_000_000)
    n, n_labels = text.y.shape
    print(
        f"{n:,} stories of {len(text.x) / n:.0f} tokens, {n_labels} labels, {float(text.y.sum(1).mean()):.1f} a story: "
        + ", ".join(text.labels.names)
    )
    tables = [measure(text, args, seed) for seed in args.seeds]
    print(format_rows({title: [table[title] for table in tables] for title in tables[0]}))
    if args.out:
        write_json(args.out, {"labels": text.labels.names, "seeds": args.seeds, "tables": tables})


if __name__ == "__main__":
    main()
