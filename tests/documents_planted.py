"""A store of documents in which feature j fires where, and as strongly as, a document holds word j."""

from pathlib import Path

import numpy as np
import torch

import saelab as sl

PLANTED = ("lantern", "harbor", "violin", "meadow")
OTHERS = [f"{a}{b}" for a in ("ba", "do", "ke", "li", "mu") for b in ("nt", "rk", "sh", "lp", "st", "ff")]


def make_documents(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts, and (n, 4) how often each holds each planted word; the first is rare, and the last stands in capitals."""
    rng = np.random.default_rng(seed)
    texts, counts = [], np.zeros((n, len(PLANTED)), np.float32)
    for i in range(n):
        words = list(rng.choice(OTHERS, rng.integers(4, 12)))
        for j, rate in enumerate((0.03, 0.1, 0.2, 0.3)):
            if rng.random() < rate:
                counts[i, j] = rng.integers(1, 3)
                spelled = PLANTED[j].upper() if j == 3 and rng.random() < 0.5 else PLANTED[j]
                words += [spelled] * int(counts[i, j])
        rng.shuffle(words)
        text = " ".join(words)
        texts.append(text[0].upper() + text[1:] + ".")
    return texts, counts


def word_sae() -> sl.SAE:
    """The SAE whose codes are its inputs."""
    n = len(PLANTED)
    sae = sl.SAE(sl.SAEConfig(d_in=n, d_sae=n, activation=sl.TopK(k=n)), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(n))
        sae.W_dec.copy_(torch.eye(n))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def plant_store(folder: Path, n: int = 1200, seed: int = 0) -> tuple[sl.FeatureStore, list[str], np.ndarray]:
    """The store, its texts and its codes."""
    texts, counts = make_documents(n, seed)
    acts = sl.embed(counts, texts, progress=False)
    return sl.harvest(word_sae(), None, acts, folder, shard_tokens=500, progress=False), texts, counts
