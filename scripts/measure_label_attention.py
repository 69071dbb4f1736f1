"""Does a sparse dictionary explain labels of documents through attention for each label? Label heads on stories.

    python scripts/measure_label_attention.py --out label_attention.json

`sl.label_head` (arXiv:2409.10504; the SAE is trained before and stays as it is). "tales": labels are what is true of
some token of a story (its topics, registers, facts, names, traits), several a story. "codes": medical codes as far as
they can be planted in vectors: a document of 120 tokens of 40 background directions; each of 60 codes has three
directions, and a document with the code has one to three tokens with one of them, half of them shared with another
code; the rates of codes fall as 1 / rank, from .3 to .005. No SAE saw the documents.

    attention   of a label on tokens of which it is true (codes: the planted ones), in documents that have it
    own share   share of the contributions to its logit that come from these tokens
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from measure_dissection import format_rows, read_stories, trained_sae
from objectives.shared import FIRST_STORY, HOOK, tales_activations
from saelab.corpora import LabelHead, label_documents
from saelab.evaluation import encode_csr
from saelab.lm.token_labels import TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json

KINDS = ("topic", "register", "fact", "relation", "role", "pole", "one-sided", "state")
NAMES = ("girl name", "boy name")  # whose words are who is in the story
RATES = (0.03, 0.6)  # share of stories that have a label
D_SAE, K = 512, 16
D_IN, N_CODES, N_DIRECTIONS, N_BACKGROUND, N_TOKENS = 64, 60, 3, 40, 120


def read_tales(n_stories: int, first: int) -> tuple[torch.Tensor, TokenLabels, TokenLabels]:
    """Activations of words, what is true of each, and labels of the stories, those that neither few nor most have."""
    acts, tokens = read_stories(n_stories, first, [HOOK])
    stories = label_documents(tokens)
    meant = np.array([one.kind in KINDS or one.parent in NAMES for one in stories.concepts])
    rates = np.asarray(stories.matrix.mean(0)).ravel()
    chosen = np.flatnonzero(meant & (RATES[0] <= rates) & (rates <= RATES[1]))
    names = [stories.names[i] for i in chosen]
    return acts[HOOK], *(TokenLabels.of(one.matrix[:, chosen], names, one.doc_ids) for one in (tokens, stories))


def plant_codes(n_documents: int, seed: int) -> tuple[torch.Tensor, TokenLabels, TokenLabels]:
    """Vectors of tokens, which code's evidence each token is, and the codes of the documents."""
    world = np.random.default_rng(0)  # one for all seeds
    basis = world.normal(size=(N_BACKGROUND + N_CODES * N_DIRECTIONS, D_IN))
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    of_code = N_BACKGROUND + np.arange(N_CODES * N_DIRECTIONS).reshape(N_CODES, N_DIRECTIONS)
    of_code[1::2, 0] = of_code[::2, 0]  # a sign of two codes is evidence of neither alone
    rng = np.random.default_rng(1 + seed)
    rates = np.maximum(0.3 / np.arange(1, N_CODES + 1), 0.005)
    y = rng.random((n_documents, N_CODES)) < rates
    words = rng.integers(N_BACKGROUND, size=(n_documents, N_TOKENS))
    marks = np.zeros((n_documents, N_TOKENS, N_CODES), bool)
    for i, c in zip(*y.nonzero(), strict=True):
        own = of_code[c, 1:]  # one at least that is this code's alone
        for n, at in enumerate(rng.choice(N_TOKENS, int(rng.integers(1, 4)), replace=False)):
            words[i, at] = rng.choice(own if n == 0 else of_code[c])
            marks[i, at], marks[i, at, c] = False, True
    x = basis[words] * rng.uniform(1, 2, (n_documents, N_TOKENS, 1)) + 0.5 * basis[rng.permuted(words, axis=1)]
    x = x.reshape(-1, D_IN) + 0.05 * rng.normal(size=(n_documents * N_TOKENS, D_IN))
    documents = np.repeat(np.arange(n_documents), N_TOKENS)
    names = [f"code {c}" for c in range(N_CODES)]
    y = marks.any(1)
    tokens = TokenLabels.of(marks.reshape(-1, N_CODES), names, documents)
    return torch.from_numpy(x).float(), tokens, TokenLabels.of(y, names)


def make_saes(world: str, x: torch.Tensor, n_tokens: int, seed: int) -> tuple[sl.SAE, sl.SAE]:
    """A trained SAE and an untrained one."""
    if world == "tales":
        sae = trained_sae(D_SAE, K, n_tokens, seed)
        return sae, make_untrained(sae, tales_activations()[:10_000], seed=100 + seed)
    other = plant_codes(1500, 1000 + seed)[0]  # documents of their own
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=256, activation=sl.TopK(k=4))
    sae = sl.SAE(cfg, seed).fit(other, sl.TrainConfig(n_tokens=n_tokens, batch_size=512, seed=seed), progress=False)
    return sae, make_untrained(sae, other[:10_000], seed=100 + seed)


def explain(head: LabelHead, codes: Any, x: torch.Tensor, tokens: TokenLabels) -> dict[str, float]:
    """Attention and contributions on tokens of which a label is true, in 60 documents that have some."""
    documents = tokens.require_documents()
    marks, inside, shares = tokens.matrix.tocsr(), [], []
    for document in np.unique(documents)[-60:].tolist():
        rows = np.flatnonzero(documents == document)
        own = [name for name in head.labels if marks[rows][:, [tokens.names.index(name)]].nnz]
        if not own:
            continue
        told = head.explain(codes, document, documents, labels=own, acts=x, n_top=len(rows))
        for one in told.labels:
            c = tokens.names.index(one.label)
            true = set(rows[marks[rows][:, [c]].toarray()[:, 0]].tolist())
            inside.append(sum(token.attention for token in one.tokens if token.index in true))
            shares.append(sum(token.share for token in one.tokens if token.index in true))
    return {"attention": float(np.mean(inside)), "own share": float(np.mean(shares))}


def measure(world: str, args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Figures by method, of one SAE, one sample of documents and one split."""
    first = FIRST_STORY + 14_000_000 + 10_000 * seed
    x, tokens, labels = read_tales(args.n_documents, first) if world == "tales" else plant_codes(args.n_documents, seed)
    sae, untrained = make_saes(world, x, args.n_tokens, seed)
    codes, others, documents = encode_csr(sae, x), encode_csr(untrained, x), tokens.require_documents()
    rates = np.asarray(labels.matrix.mean(0)).ravel()
    print(
        f"{world}, seed {seed}: {labels.n_tokens:,} documents, {len(x):,} tokens, {len(labels)} labels, "
        f"{rates.sum():.1f} a document",
        flush=True,
    )
    found: dict[str, dict[str, float]] = {}
    given: Mapping[str, dict[str, Any]] = {
        "codes": {"baselines": True, "untrained": others},
        "activations": {"reads": "activations"},
        **{f"codes, l1 {l1:g}": {"l1": l1} for l1 in args.l1},
    }
    for title, settings in given.items():
        how = {"acts": x, "baselines": False, "seed": seed} | settings
        head = sl.label_head(codes, labels, documents, **how)
        for score in head.scores:
            name = f"head on {title}" if score.name == "head" else score.name
            found[name] = {
                "micro F1": score.micro_f1,
                "macro F1": score.macro_f1,
                "AUROC": score.auroc,
                "features": score.n_features,
            }
        found[f"head on {title}"] |= explain(head, codes, x, tokens)
    how = {"acts": x, "baselines": False, "seed": seed, "reads": "activations"}
    score = sl.label_head(others, labels, documents, **how).scores[0]
    found["untrained SAE, activations"] = {
        "micro F1": score.micro_f1, "macro F1": score.macro_f1, "AUROC": score.auroc, "features": score.n_features
    }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=("tales", "codes"), default=["tales", "codes"])
    parser.add_argument("--n-documents", type=int, default=800, help="three quarters of them to learn from")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens that each SAE is trained on")
    parser.add_argument("--l1", type=float, nargs="+", default=[0.001, 0.03], help="other penalties, codes alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {world: [measure(world, args, seed) for seed in args.seeds] for world in args.worlds}
    for world, found in tables.items():
        print(f"\n{world}\n" + format_rows({title: [table[title] for table in found] for title in found[0]}))
    if args.out:
        write_json(args.out, {"seeds": args.seeds, "tables": tables})


if __name__ == "__main__":
    main()
