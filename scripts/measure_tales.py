"""What the models of tales know, on stories that training never saw.

    python scripts/measure_tales.py tales tales-b

Loss compared with the oracle's, forced names and facts, and linear probes for every concept at every layer.
"""

import argparse
import sys

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from saelab.lm.model_checks import Model
from saelab.synthetic.tales import CONCEPTS, Stories, generate_stories
from saelab.synthetic.tasks import TaskName, counterfactuals

UNSEEN = 20_000_000  # number of the first story here; training began at 0, its held-out stories at 10,000,000
MIN_COUNT = 20  # held-out tokens of a concept below which its AUROC says little


def loss_of(model: Model, stories: Stories) -> float:
    """Nats a predicted token."""
    tokens, total = stories.tokens(), 0.0
    for rows in torch.arange(len(tokens)).split(50):
        part = tokens[rows]
        losses = sl.lm.next_token_loss(sl.lm.logits(model, part.ids), part.ids)
        total += float(losses[part.attention_mask[:, 1:]].sum())
    return total / (len(stories.token_ids) - len(stories))


@torch.no_grad()
def accuracy(model: Model, task: TaskName, n: int) -> float:
    """Share of prompts whose forced next word is the likeliest one."""
    right = 0
    for pair in counterfactuals(task, n, seed=1):
        for prompt, answer in ((pair.prompt, pair.answer), (pair.other_prompt, pair.other_answer)):
            right += int(sl.lm.logits(model, prompt[None])[0, -1].argmax()) == answer
    return right / (2 * n)


def probe(model: Model, n_stories: int) -> dict[str, np.ndarray]:
    """Held-out AUROC of a linear probe for each concept (NaN for rare ones), by hook point."""
    train, test = generate_stories(n_stories, 0, UNSEEN), generate_stories(n_stories // 3, 0, UNSEEN + n_stories)
    return {
        hook_point: _auroc_by_concept(*_rows(model, train, hook_point), *_rows(model, test, hook_point))
        for hook_point in (f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))
    }


def _rows(model: Model, stories: Stories, hook_point: str) -> tuple[Tensor, np.ndarray]:
    tokens = stories.tokens()
    parts = [
        sl.lm.capture(model, tokens[rows].ids, [hook_point])[hook_point] for rows in torch.arange(len(tokens)).split(50)
    ]
    acts = torch.cat(parts)
    kept = tokens.attention_mask & (tokens.ids >= 4)  # words, not the ends
    rows, columns = kept.nonzero(as_tuple=True)
    return acts[kept], stories.labels_at(rows, columns).matrix.toarray()


def _auroc_by_concept(x: Tensor, y: np.ndarray, x_test: Tensor, y_test: np.ndarray) -> np.ndarray:
    """Ridge regression on the labels, all concepts at once, and logistic regression where that falls short."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x.numpy())
    inputs, test_inputs = scaler.transform(x.numpy()), scaler.transform(x_test.numpy())
    scores = Ridge(alpha=1.0).fit(inputs, y.astype(np.float32)).predict(test_inputs)
    found = np.full(y.shape[1], np.nan)
    for j in np.flatnonzero((y_test.sum(0) >= MIN_COUNT) & (y.sum(0) >= MIN_COUNT)):
        found[j] = roc_auc_score(y_test[:, j], scores[:, j])
        if found[j] < 0.95:
            logistic = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200).fit(inputs, y[:, j])
            found[j] = max(found[j], roc_auc_score(y_test[:, j], logistic.decision_function(test_inputs)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--n-stories", type=int, default=600)
    args = parser.parse_args()
    for name in args.names:
        model = sl.load_model(name)
        stories = generate_stories(args.n_stories, 0, UNSEEN)
        print(f"{name}: loss {loss_of(model, stories):.4f}, oracle {stories.oracle_loss:.4f} nats a token ({stories})")
        for task in ("names", "facts"):
            print(f"  {task}: {accuracy(model, task, 300):.3f} of 600 prompts right")
        for hook_point, auroc in probe(model, args.n_stories).items():
            known = auroc[~np.isnan(auroc)]
            low = [f"{CONCEPTS[j].name} {auroc[j]:.3f}" for j in np.argsort(auroc)[:12] if auroc[j] < 0.95]
            print(
                f"  {hook_point}: AUROC >= 0.95 for {(known >= 0.95).mean():.3f} of {len(known)} concepts; lowest {low}"
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
