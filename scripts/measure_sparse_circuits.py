"""How few channels do a task, in a model with sparse weights and in one with dense ones?

    python scripts/train_tales.py tales --density 0.05 --out runs/tales-sparse
    python scripts/measure_sparse_circuits.py saelab/synthetic/models/tales runs/tales-sparse

Channels are the neurons of MLPs and the value channels of attention heads. They are ranked by the mean size of their
estimated effect, (activation - mean) x gradient summed over a prompt, on half of the prompts; on the other half the
first n are kept and all others are held at their mean over stories. Prints, by n, the share of prompts whose answer
still beats that of the counterfactual, beside as many random channels, and how many weights other than 0 the kept
channels have.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import counterfactuals

FIRST_STORY = 20_000_000  # beyond those that the models were trained on
Prompts = list[tuple[Tensor, int, int]]


def read_prompts(task: str, n: int, seed: int) -> Prompts:
    """Token ids, what they determine, and what the counterfactual determines."""
    pairs = counterfactuals(task, n, seed)
    both = [(p.prompt, p.answer, p.other_answer) for p in pairs]
    both += [(p.other_prompt, p.other_answer, p.answer) for p in pairs]
    return [(ids[None].long(), answer, other) for ids, answer, other in both]


class Channels:
    """The channels of a Llama: what its layers' two output projections read."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, list(model.model.layers)
        self.outputs = [part for layer in self.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        self.sizes = [part.in_features for part in self.outputs]

    @contextmanager
    def tapped(self, tap: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """The model with each output projection reading what `tap` makes of its input."""
        hooks = [
            part.register_forward_pre_hook(lambda _, given, i=i: (tap(i, given[0]),))
            for i, part in enumerate(self.outputs)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def means(self, n_stories: int) -> list[Tensor]:
        """Mean of each channel over the tokens of stories."""
        sums, n = [torch.zeros(size) for size in self.sizes], 0

        def add(i: int, x: Tensor) -> Tensor:
            sums[i] += x[0].sum(0)
            return x

        stories = generate_stories(n_stories, first=FIRST_STORY)
        with self.tapped(add):
            for k in range(n_stories):
                ids = torch.from_numpy(stories.token_ids[stories.offsets[k] : stories.offsets[k + 1]]).long()
                self.model(ids[None])
                n += len(ids)
        return [one / n for one in sums]

    def effects(self, prompts: Prompts, means: list[Tensor]) -> Tensor:
        """Mean size of each channel's estimated effect on answer - other answer."""
        total = torch.zeros(sum(self.sizes))
        for ids, answer, other in prompts:
            seen: dict[int, Tensor] = {}

            def keep(i: int, x: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
                seen[i] = x
                return x

            with self.tapped(keep):
                end = self.model(ids).logits[0, -1]
            grads = torch.autograd.grad(end[answer] - end[other], [seen[i] for i in range(len(self.sizes))])
            parts = [((seen[i] - means[i]) * grad).sum((0, 1)).abs() for i, grad in enumerate(grads)]
            total += torch.cat(parts).detach()
        return total / len(prompts)

    @torch.no_grad()
    def right(self, prompts: Prompts, means: list[Tensor], kept: Tensor) -> float:
        """Share of prompts whose answer beats the other with all channels but the kept ones at their means."""
        masks = kept.split(self.sizes)
        with self.tapped(lambda i, x: torch.where(masks[i], x, means[i])):
            ends = [(self.model(ids).logits[0, -1], answer, other) for ids, answer, other in prompts]
        return sum(float(end[answer] > end[other]) for end, answer, other in ends) / len(ends)

    def count_weights(self, kept: Tensor) -> int:
        """Weights other than 0 into and out of the kept channels, those of gates among them."""
        n = 0
        for i, mask in enumerate(kept.split(self.sizes)):
            layer = self.layers[i // 2]
            into = (layer.mlp.gate_proj, layer.mlp.up_proj) if i % 2 else (layer.self_attn.v_proj,)
            n += sum(int((part.weight[mask] != 0).sum()) for part in into)
            n += int((self.outputs[i].weight[:, mask] != 0).sum())
        return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tasks", nargs="+", choices=["names", "facts"], default=["names", "facts"])
    parser.add_argument("--n-prompts", type=int, default=50, help="pairs to rank channels on, and to measure on")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256, 512, 1024])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(True)
        channels = Channels(model)
        means = channels.means(40)
        layers = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2]
        share = sum(int((w != 0).sum()) for w in layers) / sum(w.numel() for w in layers)
        print(f"{folder}: {sum(channels.sizes)} channels, {share:.3f} of the layers' weights are not 0")
        for task in args.tasks:
            seen, unseen = (read_prompts(task, args.n_prompts, seed) for seed in (1, 2))
            order = channels.effects(seen, means).argsort(descending=True, stable=True)
            shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
            every = torch.ones(len(order), dtype=torch.bool)
            print(f"  {task}: all channels {channels.right(unseen, means, every):.3f}")
            for n in args.sizes:
                kept, random = (torch.zeros_like(every).index_fill(0, ids[:n], True) for ids in (order, shuffled))
                found = channels.right(unseen, means, kept), channels.right(unseen, means, random)
                print(
                    f"    {n:5d} kept: {found[0]:.3f}, random {found[1]:.3f}, {channels.count_weights(kept):,} weights"
                )


if __name__ == "__main__":
    main()
