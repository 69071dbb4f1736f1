"""Feature stores whose codes and documents a test chooses."""

from pathlib import Path

import numpy as np
import torch

import saelab as sl


def harvest_codes(codes: np.ndarray, doc_ids: np.ndarray, folder: Path, shard_tokens: int = 65536) -> sl.FeatureStore:
    """A store of these codes, (n_tokens, n_features), by an SAE that returns what it gets; shards of so many tokens."""
    n, d = codes.shape
    where = sl.stores.Provenance(
        model="/nowhere/m", weight_processing="none", hook_point="", text="", tokens_sha256="", mask={},
        dtype="float32", ctx_len=1, n_tokens=n, seed=None, versions={},
    )  # fmt: skip
    first = np.searchsorted(doc_ids, doc_ids)
    columns = {
        "token_ids": torch.zeros(n, dtype=torch.int32),
        "doc_ids": torch.from_numpy(doc_ids.astype(np.int32)),
        "positions": torch.from_numpy((np.arange(n) - first).astype(np.int32)),
    }
    acts = sl.Activations.from_tensor(torch.from_numpy(codes.astype(np.float32)), where, **columns)
    sae = sl.SAE(sl.SAEConfig(d_in=d, d_sae=d, activation=sl.AbsTopK(k=d), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    out = folder / "store"
    return sl.harvest(sae, None, acts, out, shard_tokens=shard_tokens, allow_mismatch=True, progress=False)
