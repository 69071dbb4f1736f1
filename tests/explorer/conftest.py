"""A small signed store of made-up text, for the explorer's pages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.explorer.session import Explorer

HOOK = "blocks.1.hook_resid_post"
D_SAE, DEAD = 48, (46, 47)


@pytest.fixture(scope="session")
def shown_sae(tmp_path_factory: pytest.TempPathFactory) -> sl.SAE:
    """An SAE whose last two latents never fire."""
    made = sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=3), normalizer="none"), seed=0)
    with torch.no_grad():
        made.W_enc[:, list(DEAD)] = 0
    made.save_pretrained(tmp_path_factory.mktemp("shown") / "sae")
    return made


@pytest.fixture(scope="session")
def harvested(tiny: Any, tiny_tokens: Any, shown_sae: sl.SAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store in four shards, without labels."""
    out: Path = tmp_path_factory.mktemp("shown") / "store"
    sl.harvest(shown_sae, tiny, tiny_tokens[:32], out, hook_point=HOOK, progress=False, shard_tokens=256)
    return out


@pytest.fixture
def shown_store(harvested: Path, tmp_path: Path) -> sl.FeatureStore:
    """The store, linked into a folder where a test may write labels."""
    folder = tmp_path / "store"
    folder.mkdir()
    for file in harvested.iterdir():
        (folder / file.name).hardlink_to(file)
    return sl.FeatureStore.load(folder)


@pytest.fixture
def explorer(shown_store: sl.FeatureStore, shown_sae: sl.SAE) -> Iterator[Explorer]:
    """The explorer of the store, without a model, its tokens counted."""
    made = Explorer.open(shown_store, sae=shown_sae)
    made.catalog.wait()
    yield made
    made.close()
