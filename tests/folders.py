"""Activation folders for tests, written without a model."""

import torch

from saelab.stores.files import save_tensors
from saelab.stores.manifest import ActivationsManifest, Provenance, Shard, dtype_name

HOOK = "blocks.0.hook_resid_post"
ORIGIN = Provenance(
    model="m", weight_processing="none", hook_point=HOOK, text="t", tokens_sha256="0", mask={}, dtype="float32",
    ctx_len=4, n_tokens=0, seed=None, versions={},
)  # fmt: skip


def write_folder(folder, x, shard_tokens, hook_points=(HOOK,), complete=True):
    """A folder as `collect` writes it, with row i of each hook point equal to x[i] (times 2 for the second)."""
    shards = []
    for number, start in enumerate(range(0, len(x), shard_tokens)):
        piece = x[start : start + shard_tokens]
        ids = torch.arange(start, start + len(piece), dtype=torch.int32)
        tensors = {name: piece * (i + 1) for i, name in enumerate(hook_points)}
        file = f"shard-{number:05d}.safetensors"
        crc32 = save_tensors(folder / file, tensors | {"token_ids": ids, "doc_ids": ids // 10, "positions": ids % 4})
        shards.append(Shard(file=file, n_tokens=len(piece), crc32=crc32))
    manifest = ActivationsManifest(
        d_in=dict.fromkeys(hook_points, x.shape[1]), dtype=dtype_name(x.dtype), request={}, shards=tuple(shards),
        provenance=ORIGIN.to_dict(), complete=complete,
    )  # fmt: skip
    manifest.save(folder)
    return folder
