"""Train a language model of Othello games from nothing, and measure what it knows of the board.

    python scripts/train_othello.py runs/othello                      # 4 layers of width 128, 20 minutes on two cores
    python scripts/train_othello.py runs/othello --layers 8 --steps 20000

Writes a folder that `saelab.load_model` reads. Prints, now and then, the loss on games it has not seen, the share of
its likeliest next moves that are legal, and at the end of each layer the accuracy of linear probes of every square
(mine, yours, empty), beside that of the most frequent state: no dictionary should be judged below .95 at the middle.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import saelab as sl
from saelab.synthetic.othello import BOS, CTX_LEN, EOS, PAD, SQUARES, VOCABULARY, generate_games, play, save_tokenizer

HELD_OUT = 10_000_000  # number of the first game that training never sees
PAD_ID = VOCABULARY.index(PAD)


def make_model(n_layers: int, width: int, seed: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    cfg = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=CTX_LEN,
        n_embd=width,
        n_layer=n_layers,
        n_head=max(1, width // 32),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=PAD_ID,
    )
    return GPT2LMHeadModel(cfg)


def draw(n_games: int, first: int) -> Tensor:
    """Token ids of games, padded."""
    moves, _ = play(n_games, seed=0, first=first, labeled=False)
    place = {square: i for i, square in enumerate(VOCABULARY)}
    ids = np.array([PAD_ID, *(place.get(square, PAD_ID) for square in SQUARES)])[moves + 1]
    return torch.from_numpy(np.concatenate([np.full((n_games, 1), place[BOS]), ids], 1))


def loss_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID)


@torch.no_grad()
def measure(model: torch.nn.Module, n_games: int = 100) -> dict[str, float]:
    """Loss and share of legal moves among the likeliest, on games that training never sees."""
    games = generate_games(n_games, 0, HELD_OUT)
    ids = games.tokens().ids.long()
    likeliest = model(ids).logits.argmax(-1)
    legal = games.labels.matrix.toarray().reshape(-1, 5, 64)[:, 3]
    played = torch.from_numpy(np.array([SQUARES.index(x) if x in SQUARES else 0 for x in VOCABULARY]))
    square = played[likeliest[ids != PAD_ID]].numpy()
    open_ = legal.any(1)
    return {
        "held_out": round(float(loss_of(model, ids)), 4),
        "legal": round(float(legal[np.arange(len(square)), square][open_].mean()), 4),
    }


def train(model: torch.nn.Module, steps: int, batch_size: int, peak_lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 100, (steps - step) / (0.5 * steps))
        loss = loss_of(model, draw(batch_size, step * batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            row = {"step": step + 1, "games": (step + 1) * batch_size, "loss": round(loss.item(), 4)}
            print(json.dumps(row | measure(model) | {"seconds": round(time.time() - start)}), flush=True)


def probe(folder: Path, n_games: int) -> None:
    """Accuracy of a linear probe of each square at every layer, on games that training never saw."""
    from sklearn.linear_model import LogisticRegression

    model = sl.load_model(str(folder))
    games = generate_games(n_games, 0, HELD_OUT)
    tokens = games.tokens()
    for layer in range(model.cfg.n_layers):
        place = f"blocks.{layer}.hook_resid_post"
        acts = sl.collect(model, tokens, place, mask=sl.TokenMask(special=True), progress=False)
        labels, x = games.labels_at(acts.doc_ids, acts.positions), acts[:].numpy()
        states = labels.matrix.toarray().reshape(-1, 5, 64)[:, :3].argmax(1)
        seen = labels.doc_ids < n_games // 2
        unseen = ~seen
        right, often = [], []
        for square in range(64):
            y = states[:, square]
            often.append(float((y[unseen] == np.bincount(y[seen]).argmax()).mean()))
            if len(set(y[seen])) == 1:
                right.append(often[-1])
                continue
            right.append(LogisticRegression(max_iter=200).fit(x[seen], y[seen]).score(x[unseen], y[unseen]))
        row = {
            "layer": layer,
            "probe": round(float(np.mean(right)), 4),
            "most_frequent": round(float(np.mean(often)), 4),
        }
        print(json.dumps(row | {"worst_square": round(min(right), 4), "tokens": int(unseen.sum())}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch-size", type=int, default=64, help="games a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-probe-games", type=int, default=400)
    args = parser.parse_args()
    model = make_model(args.layers, args.width, args.seed)
    train(model, args.steps, args.batch_size, args.lr)
    model.save_pretrained(args.out)  # type: ignore[operator]
    save_tokenizer(args.out)
    probe(args.out, args.n_probe_games)


if __name__ == "__main__":
    main()
