"""Train a language model of Othello games from nothing, and measure what it knows of the board.

    python scripts/train_othello.py runs/othello                               # 4 layers of width 128
    python scripts/train_othello.py saelab/synthetic/models/othello --steps 0  # probes of the bundled model

The bundled model was trained in three stages, in three hours of a core in all:

    python scripts/train_othello.py runs/first --width 256 --steps 18000 --lr 3e-3 --bfloat16
    python scripts/train_othello.py runs/second --start runs/first --layers 8 --period 2 --first 1152000 --steps 500
                                                --bfloat16
    python scripts/train_othello.py runs/third --start runs/second --layers 8 --period 2 --first 1184000 --steps 3600
                                                --lr 3e-3 --bfloat16 --board

In the second the inner blocks of the first repeat three times, with the same weights (`--period`), so that the board
after a move can be worked out from that before it, again and again. In the third a linear head that reads the board at
the middle learns with the model (`--board`); it is not kept. Without it the middle holds less of the board. (In the
first two all moves weighed alike, and in the first the learning rate was constant up to 60 % of the steps.)

Writes a folder that `saelab.load_model` reads. Prints, now and then, the loss on games it has not seen, the share of
its likeliest next moves that are legal, and at the end of each layer the accuracy of linear probes of every square
(mine, yours, empty), beside that of the most frequent state: no dictionary should be judged below .95 at the middle.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import saelab as sl
from saelab.functional.statistics import fit_probe
from saelab.lm.token_labels import Concept
from saelab.synthetic.othello import (
    BOS,
    CONCEPTS,
    CTX_LEN,
    EOS,
    PAD,
    SQUARES,
    VOCABULARY,
    generate_games,
    play,
    save_tokenizer,
)

DRAWN = 16  # batches of games that are played at once
HELD_OUT = 10_000_000  # number of the first game that training never sees
PAD_ID = VOCABULARY.index(PAD)


def make_model(n_layers: int, width: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    cfg = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=CTX_LEN,
        n_embd=width,
        n_layer=n_layers,
        n_head=max(1, width // 32),
        activation_function="relu",
        attn_implementation="eager",  # two products of short sequences, five times as fast in bfloat16 as one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=PAD_ID,
    )
    return GPT2LMHeadModel(cfg)


def deepen(model: torch.nn.Module, n_layers: int) -> torch.nn.Module:
    """A deeper model, between whose first and last block those of `model` repeat in turn, with weights of their own."""
    cfg = model.config
    deeper = make_model(n_layers, cfg.n_embd, 0)  # type: ignore[union-attr,arg-type]
    inner = cfg.n_layer - 2  # type: ignore[union-attr,operator]
    state = {name: value for name, value in model.state_dict().items() if ".h." not in name}
    for i in range(n_layers):
        old = 0 if i == 0 else inner + 1 if i == n_layers - 1 else 1 + (i - 1) % inner
        block = model.transformer.h[old].state_dict()  # type: ignore[union-attr,index]
        state |= {f"transformer.h.{i}.{name}": value for name, value in block.items()}
    deeper.load_state_dict(state)
    return deeper


def share(model: torch.nn.Module, period: int) -> None:
    """Make every block between the first and the last one with the one `period` blocks before it."""
    blocks = model.transformer.h  # type: ignore[union-attr]
    for i in range(1 + period, len(blocks) - 1):  # type: ignore[arg-type]
        blocks[i] = blocks[i - period]  # type: ignore[index,operator]


def save(model: torch.nn.Module, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model with weights of its own for each block."""
    alone = make_model(model.config.n_layer, model.config.n_embd, 0)  # type: ignore[union-attr,arg-type]
    alone.load_state_dict(model.state_dict())
    alone.to(dtype).save_pretrained(out)  # type: ignore[operator]


def draw(n_games: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of games, padded; which tokens are legal moves after each, (n_games, 61, vocabulary); and the state of
    every square then, 0 to 2 (mine, yours, empty), (n_games, 61, 64).
    """
    moves, boards = play(n_games, seed=0, first=first)
    assert boards is not None
    place = {square: i for i, square in enumerate(VOCABULARY)}
    ids = np.array([PAD_ID, *(place.get(square, PAD_ID) for square in SQUARES)])[moves + 1]
    ids = np.concatenate([np.full((n_games, 1), place[BOS]), ids], 1)
    legal = np.zeros((*ids.shape, len(VOCABULARY)), bool)
    played = [square for square in SQUARES if square in place]
    columns = [CONCEPTS.index(Concept(f"legal {s}", "legal", parent=f"empty {s}")) for s in played]
    legal[..., [place[square] for square in played]] = boards[..., columns] & (ids != PAD_ID)[..., None]
    states = boards[..., :192].reshape(*ids.shape, 3, 64).argmax(2)
    return torch.from_numpy(ids), torch.from_numpy(legal), torch.from_numpy(states)


def loss_of(model: torch.nn.Module, ids: Tensor, legal: Tensor) -> Tensor:
    """Cross-entropy of the next move in expectation: all legal moves are equally likely, so none has to be drawn."""
    return losses_of(model, ids, legal)[0].mean()


def losses_of(
    model: torch.nn.Module,
    ids: Tensor,
    legal: Tensor,
    head: torch.nn.Module | None = None,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Those of every move and its number, from 0; with a head, the loss of what it reads of the board at the middle is
    added.
    """
    going = legal.any(-1)
    chances = legal[going] / legal[going].sum(-1, keepdim=True)
    found = model(ids, use_cache=False, output_hidden_states=head is not None)
    losses = cross_entropy(found.logits[going].float(), chances, reduction="none")
    if head is not None and states is not None:
        middle = found.hidden_states[1 + (len(found.hidden_states) - 1) // 2][going]
        read = head(middle).float().view(-1, 3, 64)
        losses = losses + cross_entropy(read, states[going], reduction="none").mean(1)
    return losses, going.nonzero()[:, 1]


@torch.no_grad()
def measure(model: torch.nn.Module, n_games: int = 100) -> dict[str, float]:
    """Loss and share of legal moves among the likeliest, on games that training never sees."""
    ids, legal, _ = draw(n_games, HELD_OUT)
    going = legal.any(-1)
    likeliest = model(ids, use_cache=False).logits.argmax(-1, keepdim=True)
    return {
        "held_out": round(float(loss_of(model, ids, legal)), 4),
        "least": round(float(legal[going].sum(-1).log().mean()), 4),
        "legal": round(float(legal.gather(-1, likeliest)[going].float().mean()), 4),
    }


class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are drawn to 1, for matrices (Jordan, 2024), in a `dtype` of choice.

    Torch's own works in bfloat16, which processors without such instructions emulate.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                ahead = orthogonalize(torch.lerp(p.grad, mean, group["momentum"]).to(self.dtype)).float()
                p.mul_(1 - 0.01 * group["lr"]).add_(ahead, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def orthogonalize(m: Tensor) -> Tensor:
    """A matrix of the same singular vectors with singular values near 1, by five Newton-Schulz steps."""
    wide = m if m.shape[0] <= m.shape[1] else m.T
    x = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x if wide is m else x.T


def train(
    model: torch.nn.Module,
    steps: int,
    batch_size: int,
    peak_lr: float,
    first: int,
    dtype: torch.dtype,
    out: Path,
    board: bool,
) -> None:
    """Steps of a copy of the model in `dtype`, whose gradients move the model in float32."""
    head = torch.nn.Linear(model.config.n_embd, 192) if board else None  # type: ignore[union-attr,arg-type]
    whole = torch.nn.ModuleList([model] if head is None else [model, head])
    copied_whole = copy.deepcopy(whole).to(dtype)
    worker, reader = copied_whole[0], copied_whole[1] if board else None
    pairs = list(zip(whole.parameters(), copied_whole.parameters(), strict=True))
    inner = {p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    outer = [p for p in whole.parameters() if p not in inner]
    optimizers = [
        Muon(list(inner), peak_lr, dtype),
        torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    start = time.time()
    for step in range(steps):
        if step % DRAWN == 0:
            games = draw(DRAWN * batch_size, first + step * batch_size)
            batches = list(zip(*(part.split(batch_size) for part in games), strict=True))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = peak_lr * min((step + 1) / 50, 1 - step / steps)
        ids, legal, states = batches[step % DRAWN]
        losses, number = losses_of(worker, ids, legal, reader, states)
        loss = losses.mean()
        (losses * (0.5 + number / CTX_LEN)).mean().backward()  # boards of early moves are learned soon
        for p, copied in pairs:
            p.grad, copied.grad = copied.grad.float(), None
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p, copied in pairs:
                copied.copy_(p)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            row = {"step": step + 1, "games": first + (step + 1) * batch_size, "loss": round(loss.item(), 4)}
            print(json.dumps(row | measure(model) | {"seconds": round(time.time() - start)}), flush=True)
            save(model, out)


def probe(folder: Path, n_games: int) -> None:
    """Accuracy of a linear probe of each square at every layer, on a fifth of games that training never saw."""
    model = sl.load_model(str(folder), progress=False)
    games = generate_games(n_games, 0, HELD_OUT)
    places = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    found = sl.collect(model, games.tokens(), places, mask=sl.TokenMask(special=True), progress=False)
    for layer, place in enumerate(places):
        acts = found[place]  # type: ignore[index]
        labels, x = games.labels_at(acts.doc_ids, acts.positions), acts[:]  # type: ignore[arg-type]
        states = torch.from_numpy(labels.matrix[:, :192].toarray().astype(np.float32))  # mine, yours, empty
        seen = torch.from_numpy(np.asarray(labels.doc_ids) < 0.8 * n_games)
        guess = fit_probe(x[seen], states[seen], standardize=True)(x[~seen]).view(-1, 3, 64).argmax(1)
        truth = states[~seen].view(-1, 3, 64).argmax(1)
        often = states[seen].mean(0).view(3, 64).argmax(0)
        right = (guess == truth).double().mean(0)
        row = {"layer": layer, "probe": round(float(right.mean()), 4), "worst_square": round(float(right.min()), 4)}
        often_right = round(float((truth == often).double().mean()), 4)
        print(json.dumps(row | {"most_frequent": often_right, "tokens": len(truth)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6_000, help="0 only measures the probes")
    parser.add_argument("--batch-size", type=int, default=64, help="games a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="folder of a model to go on with")
    parser.add_argument("--period", type=int, default=0, help="inner blocks so far apart share weights; 0 for none")
    parser.add_argument("--first", type=int, default=0, help="number of the first game, beyond those that it has seen")
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors with instructions for it")
    parser.add_argument("--board", action="store_true", help="train a linear head at the middle to read the board, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-probe-games", type=int, default=2000)
    args = parser.parse_args()
    if args.start:
        model = GPT2LMHeadModel.from_pretrained(args.start, dtype=torch.float32, attn_implementation="eager")
        if args.layers > model.config.n_layer and args.steps:
            model = deepen(model, args.layers)
    else:
        model = make_model(args.layers, args.width, args.seed)
    if args.steps == 0:
        probe(args.start or args.out, args.n_probe_games)
        return
    if args.period:
        share(model, args.period)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(args.out)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    train(model, args.steps, args.batch_size, args.lr, args.first, dtype, args.out, args.board)
    save(model, args.out, torch.float16)  # as the package has it
    probe(args.out, args.n_probe_games)


if __name__ == "__main__":
    main()
