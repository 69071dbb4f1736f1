"""Stores on the Hub, through Hugging Face's own client: what is uploaded, what is fetched, and what is kept."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_made import Hub, serve_hub

import saelab as sl
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore
from saelab.stores import hub as hub_module

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own upload
REPO, PLACE = "me/stores", "blocks.1.hook_resid_post"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "cache") as made:
        yield made


@pytest.fixture(scope="module")
def store(tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=3)), seed=1)
    folder = tmp_path_factory.mktemp("own") / "store"
    return sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point=PLACE, shard_tokens=200, progress=False)


def test_a_store_comes_back(hub: Hub, store: sl.FeatureStore) -> None:
    where = store.push_to_hub(REPO, path_in_repo="deep/one", commit_message="Codes", private=True, token="hf_given")
    assert "/datasets/me/stores/commit/" in where and hub.tokens == {
        "hf_given",
        None,
    }  # objects go to addresses that need none
    assert hub.private == {REPO: True} and hub.messages[1:] == ["Codes (1 of 2)", "Codes (2 of 2)"]
    names = {shard.file for shard in store.manifest.shards} | {*store.manifest.files, "manifest.json", "README.md"}
    assert len(store.manifest.shards) > 2 and set(hub.files(REPO)) == {f"deep/one/{name}" for name in names}
    read = sl.FeatureStore.from_pretrained(REPO, "deep/one", token="hf_given")
    assert (read.matrix() != store.matrix()).nnz == 0 and (read.columns() != store.columns()).nnz == 0
    assert read.text.strings == store.text.strings and np.array_equal(read.doc_ids, store.doc_ids)
    assert np.array_equal(read.statistics.fires, store.statistics.fires)
    read.verify()  # all of it is here now
    card = hub.files(REPO)["deep/one/README.md"].decode()
    assert 'sl.FeatureStore.from_pretrained("me/stores", "deep/one")' in card and PLACE in card


def test_offline_each_folder_is_that_of_its_last_fetch(hub: Hub, store: sl.FeatureStore) -> None:
    """Another folder fetched from a later commit takes nothing away."""
    store.push_to_hub(REPO, path_in_repo="one")
    sl.FeatureStore.from_pretrained(REPO, "one")
    store.push_to_hub(REPO, path_in_repo="two")
    sl.FeatureStore.from_pretrained(REPO, "two")
    for name in ("one", "two"):
        read = sl.FeatureStore.from_pretrained(REPO, name, local_files_only=True)
        assert np.array_equal(read.statistics.fires, store.statistics.fires)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, tiny: Any, tiny_tokens: Any) -> sl.FeatureStore:
    """A store with many blocks: the rows of a small one, many times over."""
    from saelab.stores.files import save_tensors
    from saelab.stores.manifest import Shard
    from saelab.stores.packing import pack_codes

    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=4096, activation=sl.TopK(k=4)), seed=1)
    folder = tmp_path_factory.mktemp("large") / "store"
    small = sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point=PLACE, progress=False)
    rng, n, k = np.random.default_rng(0), len(small), 2500
    latents = np.sort(np.stack([rng.choice(4096, k, replace=False) for _ in range(n)]), 1).astype(np.int64)
    values = rng.random(n * k).astype(np.float32) + 1
    arrays = pack_codes(np.arange(n + 1) * k, latents.ravel(), values.astype(small.manifest.dtype), 4096)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors |= {"places": torch.from_numpy(np.asarray(small.places, dtype=np.int32))}
    crc = save_tensors(folder / "shard-00000.safetensors", tensors)
    from dataclasses import replace

    shard = Shard(file="shard-00000.safetensors", n_tokens=n, crc32=crc)
    replace(small.manifest, shards=(shard,), n_entries=n * k).save(folder)
    return sl.FeatureStore.load(folder)


def test_a_look_at_one_feature_fetches_little(hub: Hub, large: sl.FeatureStore) -> None:
    large.push_to_hub(REPO)
    total = (large.folder / "shard-00000.safetensors").stat().st_size
    assert total > 8e6
    read = sl.FeatureStore.from_pretrained(REPO)
    opened = hub.served["shard-00000.safetensors"]
    assert opened <= 2 * 65536 and "tokens.safetensors" not in hub.served
    assert np.array_equal(read.feature(3000).values, large.feature(3000).values)
    assert np.array_equal(read.feature(3000).indices, large.feature(3000).indices)
    after = hub.served["shard-00000.safetensors"]
    assert opened < after < total / 4
    read.feature(3000)
    again = sl.FeatureStore.from_pretrained(REPO)  # a later process finds what was fetched
    again.feature(3000)
    assert hub.served["shard-00000.safetensors"] == after
    without = sl.FeatureStore.from_pretrained(REPO, local_files_only=True)
    assert np.array_equal(without.feature(3000).values, large.feature(3000).values)


def test_a_damaged_part_is_fetched_once_more(hub: Hub, large: sl.FeatureStore) -> None:
    large.push_to_hub(REPO)
    read = sl.FeatureStore.from_pretrained(REPO)
    hub.spoil = True
    assert np.array_equal(read.token(100).values, large.token(100).values) and not hub.spoil
    file = hub.files(REPO)["shard-00000.safetensors"]
    hub.files(REPO)["shard-00000.safetensors"] = file[:-300_000] + bytes(300_000)
    with pytest.raises(ValueError, match="another checksum"):
        read.matrix()


@pytest.mark.parametrize("left", ["file", "record", "short"])
def test_what_a_killed_process_left_is_made_again(hub: Hub, large: sl.FeatureStore, left: str) -> None:
    large.push_to_hub(REPO)
    file = sl.FeatureStore.from_pretrained(REPO).folder / "shard-00000.safetensors"
    record = file.with_name(f".{file.name}.parts")
    if left == "record":
        file.unlink()
    else:
        file.write_bytes(bytes(file.stat().st_size if left == "file" else 100))
    if left == "file":
        record.unlink()
    read = sl.FeatureStore.from_pretrained(REPO)
    assert np.array_equal(read.feature(7).values, large.feature(7).values)


def test_parts_alone_are_no_store(hub: Hub, large: sl.FeatureStore) -> None:
    """A folder of parts asks nobody in a process that did not open it."""
    from saelab.stores import partial_files

    large.push_to_hub(REPO)
    folder = sl.FeatureStore.from_pretrained(REPO).folder
    partial_files._readers.clear()
    n = len(hub.log)
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        sl.FeatureStore.load(folder).feature(7)
    assert len(hub.log) == n


def test_an_upload_that_was_cut_off_goes_on(hub: Hub, store: sl.FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "PER_COMMIT", 1)
    hub.break_after = 2
    with pytest.raises(Exception, match="Error while uploading"):
        store.push_to_hub(REPO)
    assert "manifest.json" not in hub.files(REPO)
    with pytest.raises(FileNotFoundError, match="must hold a store at its top"):
        sl.FeatureStore.from_pretrained(REPO)
    sent, hub.break_after = list(hub.sent), None
    store.push_to_hub(REPO)
    assert len(sent) == 2 and len(set(hub.sent)) == len(hub.sent), "nothing is sent twice"
    assert (sl.FeatureStore.from_pretrained(REPO).matrix() != store.matrix()).nnz == 0
    n = len(hub.messages)
    store.push_to_hub(REPO)  # what is there already takes no commit, and the manifest stays meanwhile
    assert len(hub.messages) <= n + 1 and all("manifest.json" in files for files in list(hub.commits.values())[n:])


def test_another_store_takes_the_place_of_one(hub: Hub, store: sl.FeatureStore, large: sl.FeatureStore) -> None:
    store.push_to_hub(REPO, revision="dev")
    first = hub.branches[REPO, "dev"]
    large.push_to_hub(REPO, revision="dev")
    assert set(hub.files(REPO, "main")) == set()
    assert {name for name in hub.files(REPO, "dev") if name.startswith("shard")} == {"shard-00000.safetensors"}
    between = [
        files
        for files in hub.commits.values()
        if files.get("shard-00000.safetensors") and files != hub.files(REPO, "dev")
    ]
    for files in between:  # at no commit does a manifest stand beside shards that it does not describe
        if "manifest.json" in files:
            assert files == hub.commits[first]
    assert len(sl.FeatureStore.from_pretrained(REPO, revision=first)) == len(store)
    assert sl.FeatureStore.from_pretrained(REPO, revision="dev").d_sae == 4096


def test_a_store_of_the_same_sizes_is_sent(hub: Hub, tmp_path: Path, tiny: Any, tiny_tokens: Any) -> None:
    sizes = []
    for name in (PLACE, PLACE.replace("1", "0")):
        acts = sl.collect(tiny, tiny_tokens[:8], name, tmp_path / name, progress=False)
        assert isinstance(acts, sl.Activations)
        sizes.append({file.name: file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors")})
        acts.push_to_hub(REPO)
        assert torch.equal(sl.Activations.from_pretrained(REPO)[:], acts[:])
    assert sizes[0] == sizes[1] and sizes[0]


def test_a_pull_request_holds_all_commits(hub: Hub, store: sl.FeatureStore) -> None:
    assert store.push_to_hub(REPO, create_pr=True).endswith("/datasets/me/stores/discussions/1")
    assert not hub.files(REPO) and "manifest.json" in hub.files(REPO, "refs/pr/1")


def test_activations_come_back(hub: Hub, tiny: Any, tiny_tokens: Any, tmp_path: Path) -> None:
    points = [PLACE, "blocks.0.hook_mlp_out"]
    sl.collect(tiny, tiny_tokens[:24], points, tmp_path / "acts", shard_tokens=150, progress=False)
    acts = sl.Activations.load(tmp_path / "acts", PLACE)
    acts.push_to_hub(REPO, path_in_repo="acts")
    read = sl.Activations.from_pretrained(REPO, "acts", hook_point=PLACE)
    rows = torch.tensor([len(acts) - 1, 3, 160])
    assert torch.equal(read[rows], acts[rows]) and torch.equal(read[:], acts[:])
    assert torch.equal(next(iter(read.batches(64))), next(iter(acts.batches(64))))
    assert f'hook_point="{PLACE}"' in hub.files(REPO)["acts/README.md"].decode()
    with pytest.raises(ValueError, match="in memory"):
        sl.Activations.from_tensor(acts[:4]).push_to_hub(REPO)


def test_labels_come_with_their_store(hub: Hub, store: sl.FeatureStore, tmp_path: Path) -> None:
    store.push_to_hub(REPO, path_in_repo="one")
    with LabelStore(tmp_path / "labels.sqlite") as book:
        book.set(3, "a name", author="ada")
        book.add([Label(feature=3, text="other", author="rules", scores={"f1": 0.5}, provenance={"at": "/home/ada/s"})])
        book.push_to_hub(REPO, path_in_repo="one")
        book.push_to_hub("me/labels", names=True)
    raw = hub.files(REPO)["one/labels.json.gz"]
    assert b"ada" not in gzip.decompress(raw) and len(json.loads(gzip.decompress(raw))["labels"]) == 2
    read = sl.FeatureStore.from_pretrained(REPO, "one")
    with LabelStore.open(read) as book, LabelStore.from_pretrained(REPO, "one") as same:
        assert book[3].text == same[3].text == "a name" and book[3].author == "a person" and len(book.labels(3)) == 2
        book.set(4, "mine", author="me")
    with LabelStore.from_pretrained(REPO, "one") as book:
        assert book[4].text == "mine", "what was added stays"
    with LabelStore.from_pretrained("me/labels") as book:
        assert book[3].author == "ada" and dict(book.labels(3)[1].provenance) == {"at": "s"}
    with pytest.raises(FileNotFoundError, match="got no manifest"):
        sl.FeatureStore.from_pretrained(REPO)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "me/nothing"}, "must be a local folder or a repository"),
        ({"source": REPO, "revision": "v9"}, "`revision` must be a branch"),
        ({"source": REPO, "name": "other"}, "must hold a store at 'other'"),
        ({"source": REPO, "local_files_only": True}, "local_files_only forbids"),
        ({"source": "no-folder"}, "A folder of features must be one"),
    ],
)
def test_what_is_not_there(hub: Hub, store: sl.FeatureStore, given: dict[str, Any], said: str) -> None:
    store.push_to_hub(REPO, path_in_repo="one")
    with pytest.raises(FileNotFoundError, match=said):
        sl.FeatureStore.from_pretrained(**given)
    with pytest.raises(ValueError, match="leaves it"):
        sl.FeatureStore.from_pretrained(REPO, "../up")
