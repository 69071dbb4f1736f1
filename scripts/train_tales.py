"""Train the language models of tales from nothing, and measure them on stories they have not seen.

    python scripts/train_tales.py tales        # about 1 million parameters, 40 minutes on one core
    python scripts/train_tales.py tales-b
    python scripts/train_tales.py tales --density 0.05 --out runs/tales-sparse    # one weight in twenty stays

Writes `saelab/synthetic/models/<name>/` (config.json, 16-bit safetensors, tokenizer) and prints the curve.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saelab.synthetic.tales import CTX_LEN, Stories, generate_stories
from saelab.synthetic.tasks import counterfactuals
from saelab.synthetic.vocabulary import BOS, EOS, PAD, VOCABULARY, save_tokenizer

SHAPES = {
    "tales": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "seed": 0,
    },
    "tales-b": {
        "hidden_size": 112,
        "intermediate_size": 336,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "seed": 1,
    },
}
STORY_SEED = 0
HELD_OUT = 10_000_000  # number of the first story that training never sees
GROUP = 512  # stories generated at a time, batches of like length cut from them
PAD_ID = VOCABULARY.index(PAD)


def make_model(name: str) -> torch.nn.Module:
    """A Llama of the name's shape, drawn from its seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(SHAPES[name])
    torch.manual_seed(shape.pop("seed"))
    cfg = LlamaConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=CTX_LEN,
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=PAD_ID,
        initializer_range=0.04,
        **shape,
    )
    return LlamaForCausalLM(cfg)


def rows_of(stories: Stories) -> list[Tensor]:
    return [torch.from_numpy(part).long() for part in np.split(stories.token_ids, stories.offsets[1:-1])]


def batches(batch_size: int) -> Iterator[Tensor]:
    """Batches of new stories for ever, in two forms by turns: a story a row, padded, and packed windows."""
    first = 0
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = rows_of(generate_stories(GROUP, STORY_SEED, first))
        first += GROUP
        for pair in zip(
            padded_batches(rows[: GROUP // 2], batch_size, generator),
            packed_batches(rows[GROUP // 2 :], batch_size, generator),
            strict=False,
        ):
            yield from pair


def padded_batches(rows: list[Tensor], batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Stories of like length share a batch; batches come in any order."""
    rows = sorted(rows, key=len)
    for i in torch.randperm(len(rows) // batch_size, generator=generator).tolist():
        part = rows[i * batch_size : (i + 1) * batch_size]
        yield torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=PAD_ID)


def packed_batches(rows: list[Tensor], batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Windows over stories one after another, as `tokenize` packs text: each with its BOS and without EOS."""
    offset = int(torch.randint(1, CTX_LEN, (), generator=generator))
    stream = torch.cat([row[:-1] for row in rows])[offset:]
    windows = stream[: len(stream) // CTX_LEN * CTX_LEN].view(-1, CTX_LEN)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    yield from windows.chunk(len(rows) // batch_size)


def loss_of(model: torch.nn.Module, ids: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID, reduction=reduction)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, n_stories: int = 200) -> tuple[float, float]:
    """Loss in nats a token on unseen stories, and the oracle's on the same."""
    stories = generate_stories(n_stories, STORY_SEED, HELD_OUT)
    total = sum(float(loss_of(model, row[None], "sum")) for row in rows_of(stories))
    return total / (len(stories.token_ids) - len(stories)), stories.oracle_loss


@torch.no_grad()
def names_right(model: torch.nn.Module, n: int = 50) -> float:
    """Share of forced names that are the likeliest word; 0.5 is chance."""
    pairs = counterfactuals("names", n)
    prompts = [(p.prompt, p.answer) for p in pairs] + [(p.other_prompt, p.other_answer) for p in pairs]
    return sum(int(model(ids[None].long()).logits[0, -1].argmax()) == answer for ids, answer in prompts) / (2 * n)


@torch.no_grad()
def keep_largest(model: torch.nn.Module, density: float) -> None:
    """Set all but the largest weights of each matrix of the layers to 0 (arXiv:2511.13653)."""
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.ndim == 2:
            n_dropped = weight.numel() - round(density * weight.numel())
            if n_dropped:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(n_dropped).values] = 0.0


def train(name: str, steps: int, batch_size: int, peak_lr: float, density: float = 1.0) -> torch.nn.Module:
    """Train a model, of whose weights the share `density` is left after the first half of the run."""
    model = make_model(name)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    start, n_tokens = time.time(), 0
    for step, ids in zip(range(steps), batches(batch_size), strict=False):
        scale = min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * scale
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if density < 1:
            keep_largest(model, density ** min(1.0, (step + 1) / (0.5 * steps)))
        n_tokens += int((ids != PAD_ID).sum())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            held, oracle = held_out_loss(model)
            row: dict[str, float] = {
                "step": step + 1,
                "n_tokens": n_tokens,
                "loss": round(loss.item(), 4),
                "held_out": round(held, 4),
            }
            row |= {"oracle": round(oracle, 4), "names": names_right(model), "seconds": round(time.time() - start)}
            print(json.dumps(row), flush=True)
    return model


def save(model: torch.nn.Module, folder: Path) -> None:
    model.to(torch.float16)
    model.save_pretrained(folder)  # type: ignore[operator]
    save_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="stories a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--density", type=float, default=1.0, help="share of the layers' weights that are not 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: saelab/synthetic/models/<name>")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = train(args.name, args.steps, args.batch_size, args.lr, args.density)
    save(model, args.out or Path(__file__).parents[1] / "saelab" / "synthetic" / "models" / args.name)


if __name__ == "__main__":
    main()
