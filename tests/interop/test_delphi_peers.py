"""delphi's own cache, writer and reader, on what we write and it writes: `make peers`."""

import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import saelab as sl
from saelab.interop.delphi import convert_delphi, write_delphi

if find_spec("delphi") is None:
    pytest.skip("delphi is not installed here (make peers)", allow_module_level=True)


class Unused(types.ModuleType):
    """What delphi imports for embeddings, remote files and servers, none of which a cache needs."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


for name in ("faiss", "sentence_transformers", "blobfile"):
    if find_spec(name) is None:
        sys.modules[name] = Unused(name)
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig  # noqa: E402
from delphi.latents.cache import LatentCache  # noqa: E402
from delphi.latents.loader import LatentDataset, TensorBuffer  # noqa: E402

for name in [name for name, module in sys.modules.items() if isinstance(module, Unused)]:
    del sys.modules[name]  # others look for it, too

pytestmark = pytest.mark.filterwarnings("ignore")
HOOK, CTX, D_SAE, WINDOW = "blocks.1.hook_resid_post", 32, 40, 8
PLAN = {"n_tokens": 20 * CTX, "cache_ctx_len": CTX}


@pytest.fixture(scope="module")
def signed(tiny: Any) -> sl.SAE:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=3)), seed=1)
    sae.W_dec.data += 0.1 * torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(0))
    return sae


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 120, (20, CTX), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def store(signed: sl.SAE, tiny: Any, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    plain = sl.lm.Tokens(
        ids=tokens.int(), doc_ids=torch.arange(20, dtype=torch.int32)[:, None].expand(20, CTX).contiguous(), source="t"
    )
    folder = tmp_path_factory.mktemp("store") / "s"
    return sl.harvest(signed, tiny, plain, folder, hook_point=HOOK, mask=sl.TokenMask(special=False), progress=False)


def as_dense(store: sl.FeatureStore) -> np.ndarray:
    return store.matrix().toarray()


def test_it_reads_what_we_write(store: sl.FeatureStore, tokens: Tensor, tmp_path: Path) -> None:
    place = write_delphi(store, tmp_path / "latents", n_splits=3)
    dense = as_dense(store).reshape(20, CTX, D_SAE).astype(np.float16)
    assert (dense < 0).any() and (dense > 0).any()
    files = sorted(place.glob("*.safetensors"))
    found = np.zeros_like(dense)
    for path in files:
        locations, activations, ids = TensorBuffer(str(path), place.name).load()
        assert torch.equal(ids, tokens)
        found[tuple(locations.T.numpy())] = activations.numpy()
    assert len(files) == 3 and np.array_equal(found, np.where(np.abs(dense) > 1e-5, dense, 0))


@pytest.mark.parametrize("center", [True, False])
def test_its_examples_are_ours(center: bool, store: sl.FeatureStore, tiny: Any, tmp_path: Path) -> None:
    """Its whole way from the folder to the records that are explained; modules are listed by itself."""
    place = write_delphi(store, tmp_path / "latents", n_splits=3)
    data = LatentDataset(
        tmp_path / "latents",
        SamplerConfig(n_examples_train=5, n_examples_test=5, n_quantiles=2),
        ConstructorConfig(example_ctx_len=WINDOW, min_examples=1, n_non_activating=2, center_examples=center),
        tokenizer=tiny.tokenizer,
    )
    assert data.modules == [place.name] and len(data) == 3
    dense, seen = as_dense(store).reshape(-1, WINDOW, D_SAE), set()
    for record in data:
        latent = record.latent.latent_index
        seen.add(latent)
        codes = dense[..., latent]
        assert record.per_token_frequency == pytest.approx((codes != 0).mean())
        assert record.per_context_frequency == pytest.approx((codes != 0).any(1).mean())
    fires = set((dense != 0).any((0, 1)).nonzero()[0].tolist())
    assert seen == fires if center else len(seen) > 5 and seen <= fires  # whose windows have neighbors in their row


@pytest.mark.parametrize("n_splits", [1, 3])
def test_we_read_what_it_writes(
    n_splits: int, signed: sl.SAE, store: sl.FeatureStore, tiny: Any, tokens: Tensor, tmp_path: Path
) -> None:
    """Its own run over the model, with our SAE as its encoder."""
    model = tiny.original_model
    path = next(name for name, _ in model.named_modules() if name.endswith(".1"))
    cache = LatentCache(model, {path: lambda x: signed.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2])}, 4)
    with torch.no_grad():
        cache.run(20 * CTX, tokens)
    assert [*cache.cache.latent_locations] == [path]
    cache.save_splits(n_splits, tmp_path)
    cache.save_config(tmp_path, CacheConfig(**PLAN, batch_size=4, n_splits=n_splits), "some/model")
    ours = convert_delphi(tmp_path / path, tmp_path / "store", hook_point=HOOK, progress=False)
    dense = as_dense(store).astype(np.float16).astype(np.float32)
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(as_dense(ours), np.where(np.abs(dense) > 1e-5, dense, 0), rtol=2e-3, atol=2e-3)
    assert np.array_equal(ours.token_ids, tokens.flatten().numpy())
    assert ours.provenance.model == "some/model" and ours.provenance.ctx_len == CTX
    # And back: the very locations and codes.
    again = write_delphi(ours, tmp_path / "again", n_splits=n_splits)
    for file in (tmp_path / path).glob("*.safetensors"):
        one, other = (TensorBuffer(str(folder / file.name), "m").load() for folder in (tmp_path / path, again))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
