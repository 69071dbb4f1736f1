"""Sentence embeddings at several k: contrast with real pairs (neighboring sentences) and with none, and its baselines.

    python scripts/measure_objectives.py embeddings --embeddings FILE --model FOLDER --text FILE

Embeddings of sentences of stories, in order; FILE (.npz) is made where it is missing, by a Hugging Face encoder in
FOLDER (mean over tokens, unit length) from a text whose stories end with <|endoftext|>. Figures are of distinct
sentences of the last stories, a tenth of all, which training has not seen, and FVU also of sentences that it has seen.
`by x_hat` is the share of a sentence's 10 nearest neighbors by cosine that x_hat keeps, `by codes` the share that codes
keep; `story` is the share of the 10 nearest by codes that are of the sentence's own story.

`TopK` and others are read at each k by `SAE.with_k`, `apart` was trained at that k. CSR (arXiv:2503.01776) is MultiTopK
with a contrast of coefficient c, with neighboring sentences (`real`) or none (`self`); `pairs alone` has the batches of
`real` and a coefficient of 1e-6. The bar of Hierarchical is FVU within .02 of `apart` (arXiv:2505.24473).
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import saelab as sl
from objectives.shared import format_table
from saelab.functional.metrics import ReconstructionSums
from saelab.sae.objectives import ContrastiveLoss, HierarchicalLoss, LossTerm, MultiTopKLoss

N_NEAREST = 10
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"']?")
Read = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""From embeddings and a k to reconstructions and codes."""


def describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--embeddings", type=Path, required=True, help=".npz, made where it is missing")
    command.add_argument("--model", type=Path, help="folder of a Hugging Face encoder")
    command.add_argument("--text", type=Path, help="stories that end with <|endoftext|>")
    command.add_argument("--n-sentences", type=int, default=20_000)
    command.add_argument("--ks", type=int, nargs=3, default=[8, 32, 128])
    command.add_argument("--d-sae", type=int, default=1536)
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--coefficients", type=float, nargs="+", default=[0.03, 0.1], help="of the contrast")


def measure(args: argparse.Namespace) -> None:
    if not args.embeddings.exists():
        np.savez(args.embeddings, **embed(*read_sentences(args.text, args.n_sentences), args.model))
    found = np.load(args.embeddings)
    x, doc_ids = torch.from_numpy(found["embeddings"]), torch.from_numpy(found["doc_ids"])
    trained = doc_ids < doc_ids[len(x) * 9 // 10]
    train, docs = sl.Activations.from_tensor(x[trained], doc_ids=doc_ids[trained]), doc_ids[~trained]
    first = np.sort(np.unique(found["sentence_ids"][~trained.numpy()], return_index=True)[1])  # of equal sentences
    held_out, docs = x[~trained][first], docs[first]
    seen = train[: len(held_out)]
    configs = make_configs(args, train.d_in)
    tables: dict[int, dict[str, list[dict[str, float]]]] = {k: {} for k in args.ks}
    for seed in args.seeds:
        run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=args.batch_size, n_held_out=0, seed=seed)
        saes = {name: sl.SAE(cfg, seed=seed).fit(train, run, progress=False) for name, cfg in configs.items()}
        apart = {k: saes.pop(f"apart {k}", saes["TopK"]) for k in args.ks}
        ways = {name: read_sae(dict.fromkeys(args.ks, sae)) for name, sae in saes.items()}
        ways |= {"apart": read_sae(apart), "PCA": read_pca(train[:]), "first dimensions": read_first(train[:])}
        for k, rows in tables.items():
            for name, read in ways.items():
                figures = {"FVU, trained on": measure_fvu(seen, read(seen, k)[0])}
                rows.setdefault(name, []).append(figures | score(held_out, docs, *read(held_out, k)))
    own = same_story(nearest(held_out), docs)
    chance = float((docs[:, None] == docs).float().sum(1).sub(1).mean() / (len(docs) - 1))
    print(f"{len(train):,} sentences x {args.n_tokens / len(train):.0f} passes, batches of {args.batch_size}")
    print(f"{len(held_out):,} distinct sentences of {len(docs.unique())} other stories; d_sae {args.d_sae}")
    print(f"story: {own:.3f} by the embeddings, {chance:.3f} by chance; kept by chance {N_NEAREST / len(docs):.3f}")
    for k, rows in tables.items():
        print(f"\nk {k}\n{format_table(rows)}")


def make_configs(args: argparse.Namespace, d_in: int) -> dict[str, sl.SAEConfig]:
    """Configurations of all SAEs, by name; the one trained at the middle k is read at the others too."""
    low, middle, high = args.ks
    multi = MultiTopKLoss(ks=(middle, high), weights=(1, 1 / 8))

    def config(k: int, loss: sl.ReconstructionLoss, *terms: LossTerm) -> sl.SAEConfig:
        objective = (loss, sl.AuxK(), *terms)
        return sl.SAEConfig(d_in=d_in, d_sae=args.d_sae, activation=sl.TopK(k=k), objective=objective)

    configs = {"TopK": config(middle, sl.ReconstructionLoss())}
    configs |= {f"apart {k}": config(k, sl.ReconstructionLoss()) for k in (low, high)}
    configs |= {"MultiTopK": config(middle, multi), "Hierarchical": config(high, HierarchicalLoss(ks=tuple(args.ks)))}
    configs["pairs alone"] = config(middle, multi, ContrastiveLoss(coefficient=1e-6))
    for c in args.coefficients:
        configs[f"CSR real, c {c:g}"] = config(middle, multi, ContrastiveLoss(coefficient=c))
    configs[f"CSR self, c {c:g}"] = config(middle, multi, ContrastiveLoss(coefficient=c, pairs="self"))
    return configs


# ---- codes and reconstructions
def read_sae(saes: Mapping[int, sl.SAE]) -> Read:
    @torch.no_grad()
    def read(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        sae = saes[k].with_k(k)
        codes = sae.encode(x)
        return sae.decode(codes), codes

    return read


def read_pca(train: torch.Tensor) -> Read:
    mean = train.mean(0)
    components = torch.linalg.svd(train - mean, full_matrices=False).Vh

    def read(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = (x - mean) @ components[:k].T
        return mean + codes @ components[:k], codes

    return read


def read_first(train: torch.Tensor) -> Read:
    rest = train.mean(0)

    def read(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([x[:, :k], rest[k:].expand(len(x), -1)], 1), x[:, :k]

    return read


# ---- figures
def score(x: torch.Tensor, docs: torch.Tensor, x_hat: torch.Tensor, codes: torch.Tensor) -> dict[str, float]:
    near, by_codes = nearest(x), nearest(codes)
    kept = {"by x_hat": share_kept(near, nearest(x_hat)), "by codes": share_kept(near, by_codes)}
    return {"FVU": measure_fvu(x, x_hat), **kept, "story": same_story(by_codes, docs)}


def measure_fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    sums = ReconstructionSums(x.shape[1])
    sums.add(x, x_hat)
    return sums.fvu


def nearest(rows: torch.Tensor) -> torch.Tensor:
    """(n, 10) indices of each row's nearest rows by cosine, itself left out."""
    unit = torch.nn.functional.normalize(rows)
    return (unit @ unit.T).fill_diagonal_(-2.0).topk(N_NEAREST).indices


def share_kept(near: torch.Tensor, others: torch.Tensor) -> float:
    return float((near[:, :, None] == others[:, None]).any(2).float().mean())


def same_story(near: torch.Tensor, docs: torch.Tensor) -> float:
    return float((docs[near] == docs[:, None]).float().mean())


# ---- embeddings
def read_sentences(text: Path, n: int) -> tuple[list[str], list[int]]:
    """The first `n` sentences of a text, up to the end of a story, and the story of each."""
    sentences: list[str] = []
    stories: list[int] = []
    for i, story in enumerate(text.read_text().split("<|endoftext|>")):
        found = [sentence.strip() for sentence in SENTENCE.findall(story)]
        if len(sentences) + len(found) > n:
            break
        sentences += found
        stories += [i] * len(found)
    return sentences, stories


@torch.no_grad()
def embed(sentences: list[str], stories: list[int], folder: Path) -> dict[str, np.ndarray]:
    """Embeddings (mean over tokens, unit length), the story of each, and numbers that equal sentences share."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # batches of one length have no padding
    out = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        batch = tokenizer([sentences[i] for i in part], padding=True, truncation=True, return_tensors="pt")
        mask, last = batch["attention_mask"][..., None], model(**batch).last_hidden_state
        out[part] = torch.nn.functional.normalize((last * mask).sum(1) / mask.sum(1)).float()
    ids = np.unique(sentences, return_inverse=True)[1]
    return {"embeddings": out.numpy(), "doc_ids": np.array(stories, np.int32), "sentence_ids": ids}
