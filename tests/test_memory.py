"""What is held of a text does not grow with it: maps are let go, and orders of rows are made piece by piece."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.analysis import max_activating
from saelab.functional import indices
from saelab.functional.indices import WINDOW_ROWS, ChosenRuns, MarkedRows, draw_rows, find_runs, move_blocks
from saelab.labels.autointerp.example_windows import ExampleConfig, build_case
from saelab.stores import corpus, feature_store, packing
from saelab.stores.corpus import StoredText
from saelab.stores.feature_store import Feature
from saelab.universality import alignment, document_text
from saelab.universality.alignment import AlignedRows, find_common_rows
from saelab.universality.comparison_sources import StoreSource
from saelab.universality.similarity import ComparedCodes

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    tokens = sl.tokenize(tiny, ["The fox saw the owl. Then it ran!"] * 40, ctx_len=20)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)), seed=0)
    folder = tmp_path_factory.mktemp("store")
    return sl.harvest(sae, tiny, tokens, folder, hook_point=HOOK, shard_tokens=200, progress=False)


def test_maps_are_let_go_after_so_many_bytes_and_read_the_same(store, monkeypatch):
    whole = store.matrix().toarray()
    monkeypatch.setattr(packing, "MAPPED_BYTES", 3 * packing.FAULT_BYTES)
    opened = sl.FeatureStore.load(store.folder)
    held = []
    for start in range(0, len(opened), 150):
        assert np.array_equal(opened.matrix(start, start + 150).toarray(), whole[start : start + 150])
        held.append(sum(len(arrays._maps) for arrays in opened._shards))
    assert max(held) <= 4 < 3 * len(opened._shards)  # of three arrays a shard
    for j in range(5):
        assert np.array_equal(opened.feature(j).indices, np.flatnonzero(whole[:, j]))


def test_a_file_that_took_the_place_of_one_let_go_is_refused(store, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(packing, "MAPPED_BYTES", 0)
    folder = shutil.copytree(store.folder, tmp_path / "store")
    opened = sl.FeatureStore.load(folder)
    opened.feature(0)
    file = next(folder.glob("shard-*"))
    shutil.copy(file, tmp_path / "other")
    (tmp_path / "other").replace(file)
    with pytest.raises(ValueError, match="Load the store again"):
        opened.feature(0)


@pytest.mark.parametrize("n", [1, 700, 2 * WINDOW_ROWS + 17])
def test_an_order_of_blocks_is_the_same_in_pieces(n):
    rng = np.random.default_rng(n)
    starts = np.unique(np.append(0, rng.integers(0, n, n // 100)))
    order = move_blocks(starts, n, rng)
    whole = order[0:n]
    assert np.array_equal(np.sort(whole), np.arange(n)) and len(order) == n
    assert np.array_equal(np.concatenate([order[i : i + 333] for i in range(0, n, 333)]), whole)
    assert np.array_equal(whole // WINDOW_ROWS, np.arange(n) // WINDOW_ROWS)
    sizes = [array.size for array in (order.places, order.first, order.steps)]
    assert max(sizes) <= 2 * len(starts) + n // min(256, max(1, n // 64)) + 3


def test_documents_far_apart_are_read_one_by_one(store):
    """Chance of `documents` puts them anywhere: what lies between is not read, and the means are those of all."""
    starts = find_runs(store.doc_ids)
    codes = ComparedCodes(store, groups=starts)
    means = codes.matrix(0, len(starts)).toarray()
    order = np.random.default_rng(0).permutation(len(starts))
    read = []

    class Watched:
        d_sae, l0 = store.d_sae, store.l0

        def __len__(self):
            return len(store)

        def matrix(self, start=0, stop=None):
            read.append(stop - start)
            return store.matrix(start, stop)

    found = ComparedCodes(Watched(), groups=starts).moved(order).matrix(3, 8).toarray()
    assert np.array_equal(found, means[order[3:8]])
    assert sum(read) < len(store) // 4


@pytest.mark.parametrize("width", [40, 400])
def test_weights_on_rows_far_apart_read_these_alone(store, width):
    """Documents of the other side stand in any order."""
    rng = np.random.default_rng(width)
    at = np.sort(rng.permutation(width)[:30]) + 11
    weights = csr_matrix((rng.random(60, np.float32), (np.arange(60) % 20, rng.permutation(np.tile(at, 2)))))
    weights.resize(20, len(store))
    expected = weights[3:17].toarray() @ store.matrix().toarray()
    np.testing.assert_allclose(
        ComparedCodes(store, weights=weights).matrix(3, 17).toarray(), expected, rtol=1e-5, atol=1e-6
    )


def test_stores_of_the_same_tokens_need_no_list_of_rows(store):
    assert find_common_rows(store, store) == (None, None)
    source = StoreSource.make(store, store, "correlation", False, 1, False)
    assert source.a.rows is None and source.b.rows is None and len(source.documents) == len(np.unique(store.doc_ids))


def test_comparing_leaves_no_column_of_the_text_behind(store):
    a, b = (sl.FeatureStore.load(store.folder) for _ in range(2))
    sl.compare(a, b, min_count=1, null=sl.universality.NullConfig(n_shifts=1), progress=False)
    held = {"places", "doc_ids", "token_ids"}
    assert not held & {*a.__dict__, *b.__dict__}
    assert np.array_equal(a.where[3:450], store.places[3:450]) and len(a.where[450:450]) == 0
    places = np.arange(len(store.text))[::-1]
    before, rows = a.where.find(places)
    assert np.array_equal(before, np.searchsorted(store.places, places))
    assert np.array_equal(np.flatnonzero(rows[::-1] >= 0), store.places)
    assert np.array_equal(rows[rows >= 0], np.arange(len(store))[::-1])


class Planted(sl.FeatureStore):
    """Words of documents, of which feature 0 fires on few, whatever the size; cut in halves with `split`."""

    def __init__(self, n_docs, split=False):
        words = [f" w{i:03d}" for i in range(100)]
        drawn = np.random.default_rng(0).integers(100, size=n_docs * DOC)
        ids, strings = drawn, words
        if split:
            ids = np.stack([drawn, drawn + 100], 1).ravel()
            strings = [word[:3] for word in words] + [word[3:] for word in words]
        at = np.arange(len(ids))
        text = StoredText(
            token_ids=ids.astype(np.int32), doc_ids=at // (len(at) // n_docs), positions=at % DOC,
            strings=dict(enumerate(strings)),
        )  # fmt: skip
        self._starts, self.folder = [0, len(ids)], Path("planted")
        self.__dict__.update(text=text, places=at.astype(np.int32))

    d_sae = 1

    def feature(self, j):
        rows = np.linspace(0, len(self) - 1, 60).astype(np.int64)
        return Feature(rows, np.linspace(0.1, 1, 60).astype(np.float32), self, j)


DOC = 400


def bytes_a_token(work, monkeypatch, *sizes):
    """How much more is held at most for each further token, where work is done in small parts."""
    parts = {"TOKENS_AT_ONCE": (800, document_text, alignment), "PART": (4096, indices)}
    parts["ROWS_AT_ONCE"] = 4096, document_text, corpus, feature_store, max_activating, indices
    for name, (size, *modules) in parts.items():
        for module in modules:
            monkeypatch.setattr(module, name, size)
    peaks = []
    gc.freeze()  # what other tests hold is not looked through again and again
    for n_docs in (4, *sizes):  # the first warms up
        stores = Planted(n_docs), Planted(n_docs, split=True)
        least = []
        for _ in range(2 if peaks else 1):  # a peak has whatever garbage happens to lie there
            gc.collect()
            tracemalloc.start()
            held = work(*stores)
            least.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            del held
        peaks.append(min(least))
    return (peaks[2] - peaks[1]) / (sizes[1] - sizes[0]) / DOC


def test_rows_of_other_tokens_are_aligned_without_a_list_of_tokens(monkeypatch):
    def work(a, b):
        found = AlignedRows(a, b)
        assert found.n_aligned == (len(a), len(b)) and found[5:9].nnz == 8
        return found

    # one bool a row is held; digests, numbers and sizes of a document are some 500 bytes, here of 400 tokens
    assert bytes_a_token(work, monkeypatch, 6, 18) < 4


def test_windows_of_a_feature_are_found_without_a_mark_a_token(monkeypatch):
    def work(a, b):
        return build_case(a, 0, 1, a.split_runs(), ExampleConfig(n_scored=1))

    assert bytes_a_token(work, monkeypatch, 11, 31) < 0.5


def test_masks_that_differ_leave_the_rows_that_both_kept(tiny, tmp_path):
    tokens = sl.tokenize(tiny, ["The fox saw the owl."] * 9, ctx_len=12)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)), seed=0)
    masks = [sl.TokenMask(), sl.TokenMask(special=False)]
    a, b = (
        sl.harvest(sae, tiny, tokens, tmp_path / str(i), hook_point=HOOK, mask=mask, progress=False)
        for i, mask in enumerate(masks)
    )
    assert len(a) < len(b)
    rows, rows_b = find_common_rows(a, b)
    assert np.array_equal(a.places[rows[:]], b.places[rows_b[:]]) and len(rows) == len(
        np.intersect1d(a.places, b.places)
    )
    found = sl.compare(a, b, min_count=1, null=sl.universality.NullConfig(n_shifts=1), progress=False)
    live = found.a.partners >= 0
    assert live.any() and np.allclose(np.abs(found.a.similarity[live]), 1.0, atol=1e-4)


def test_rows_drawn_from_a_mask_are_those_of_numpys_choice():
    rows = np.random.default_rng(0).random(200_000) < 0.01
    drawn = draw_rows(lambda start, stop: rows[start:stop], len(rows), 50, np.random.default_rng(1))
    assert np.array_equal(drawn, np.random.default_rng(1).choice(np.flatnonzero(rows), size=50))
    marked = MarkedRows(rows)
    assert len(marked) == rows.sum() and np.array_equal(marked[5:1500], np.flatnonzero(rows)[5:1500])
    assert len(marked[7:7]) == len(marked[len(marked) :]) == len(MarkedRows(rows[:0])[:]) == 0


def test_runs_are_read_like_one_bool_a_row():
    rng = np.random.default_rng(0)
    starts = np.unique(np.append(0, rng.integers(0, 1000, 40)))
    runs = ChosenRuns(starts, rng.random(len(starts)) < 0.5, 1000)
    whole = np.repeat(runs.chosen, np.diff(np.append(starts, 1000)))
    assert runs.sum() == whole.sum() and np.array_equal((~runs)[:], ~whole)
    for start, stop in ((0, 1000), (17, 17), (3, 4), (990, 1200), (1000, 1000), (starts[3], starts[5])):
        assert np.array_equal(runs[start:stop], whole[start:stop])
    assert np.array_equal(runs[np.array([999, 0, 500])], whole[[999, 0, 500]])
