"""The index beside a dense product of the same vectors, in several blocks, for codes of both signs."""

import numpy as np
import pytest
from corpora_made import harvest_codes
from scipy.sparse import csr_matrix, random as random_sparse
from unchecked import unchecked

from saelab.corpora import CodeIndex, code_index, pool_documents
from saelab.stores.files import save_tensors
from saelab.stores.tensors import TensorFile, load_tensors


def sparse(n: int, d: int, seed: int, signed: bool) -> csr_matrix:
    rng = np.random.default_rng(seed)
    codes = random_sparse(n, d, 0.1, "csr", random_state=rng, data_rvs=lambda size: rng.gamma(2, size=size) + 0.1)
    if signed:
        codes.data *= np.where(rng.random(codes.nnz) < 0.4, -1, 1)
    return codes


def vectors(codes: csr_matrix, weights: np.ndarray, values: str, steps: np.ndarray) -> np.ndarray:
    """Unit vectors of codes, one column a side: weights times magnitudes as they are stored."""
    dense = codes.toarray()
    sides = np.stack([np.maximum(dense, 0), np.maximum(-dense, 0)], axis=2).reshape(len(dense), -1)
    if values == "none":
        sides = (sides > 0).astype(float)
    if values == "uint8":
        sides = np.where(sides > 0, np.maximum(np.rint(sides / steps), 1) * steps, 0)
    found = sides * weights
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("values", ["none", "uint8", "float16"])
@pytest.mark.parametrize("idf", [False, True])
def test_scores_are_cosines_of_the_stored_vectors(signed, values, idf, monkeypatch) -> None:
    monkeypatch.setattr(code_index, "BLOCK", 64)
    codes, queries = sparse(300, 40, 0, signed), sparse(12, 40, 1, signed)
    index = CodeIndex.build(codes, values=values, idf=idf)
    both = np.zeros((2, 40, 300))
    both[0], both[1] = np.maximum(codes.toarray().T, 0), np.maximum(-codes.toarray().T, 0)
    counts, peaks = ((both > 0).sum(2).T.ravel(), np.maximum(both.max(2).T.ravel(), 1e-30))
    weights = np.log(300 / np.maximum(counts, 1)) if idf else np.ones(80)
    rows = vectors(codes, weights, values, peaks / 255)
    asked = vectors(queries, weights, "none" if values == "none" else "float16", peaks)
    flipped = rows.reshape(300, 40, 2)[:, :, ::-1].reshape(300, 80)
    expected = asked @ rows.T - asked @ flipped.T
    found, scores = index.search(queries, top=9)
    best = -np.sort(-expected, axis=1)[:, :9]
    assert np.allclose(scores, best, atol=2e-3 if values == "float16" else 1e-6)
    assert np.allclose(np.take_along_axis(expected, found, 1), scores, atol=2e-3 if values == "float16" else 1e-6)


def test_equal_rows_come_in_their_order_and_missing_ones_are_told(monkeypatch) -> None:
    monkeypatch.setattr(code_index, "BLOCK", 4)
    codes = csr_matrix(np.tile([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]], (5, 1)))
    rows, scores = CodeIndex.build(codes).search(codes[:2], top=4)
    assert rows.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]] and np.allclose(scores, 1)
    rows, scores = CodeIndex.build(codes).search(codes[:1], top=12)
    assert rows[0, 10:].tolist() == [-1, -1] and np.isneginf(scores[0, 10:]).all() and len(set(rows[0, :10])) == 10


def test_a_row_finds_itself_and_bytes_are_what_arrays_take() -> None:
    codes = sparse(2000, 200, 2, True)
    sizes = {}
    for values in ("none", "uint8", "float16"):
        index = CodeIndex.build(codes, values=values)
        rows, scores = index.search(codes[:50], top=1)
        assert np.allclose(scores, 1, atol=1e-2) and (rows[:, 0] == np.arange(50)).mean() > 0.9
        sizes[values] = index.n_bytes
    assert sizes["uint8"] - sizes["none"] == codes.nnz + 8 * 400  # a byte a code, and the step of each side
    assert sizes["float16"] - sizes["none"] == 2 * codes.nnz
    fixed = 400 * 8 + 401 * 4 + 2000 * 4
    assert sizes["none"] == 2 * codes.nnz + fixed


def test_stores_and_documents_are_indexed(tmp_path) -> None:
    codes = sparse(60, 12, 3, True).toarray()
    store = harvest_codes(codes, np.repeat(np.arange(20), 3), tmp_path)
    index = CodeIndex.build(store, values="float16")
    assert len(index) == 60 and index.n_features == 12 and index.search(store.matrix(0, 5))[0].shape == (5, 10)
    documents = pool_documents(store)
    of_documents = CodeIndex.build(documents)
    assert len(of_documents) == 20 and of_documents.search(documents.matrix[:3], top=1)[0].ravel().tolist() == [0, 1, 2]
    assert "bytes a row" in repr(of_documents)


def test_what_cannot_be_searched_is_refused() -> None:
    codes = sparse(10, 5, 4, False)
    with unchecked(), pytest.raises(ValueError, match="`values` must be one of"):
        CodeIndex.build(codes, values="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one row of finite numbers"):
        CodeIndex.build(csr_matrix(np.array([[np.nan, 1.0]])))
    with pytest.raises(ValueError, match="at least one row"):
        CodeIndex.build(csr_matrix((0, 5)))
    for queries, top in ((csr_matrix((1, 4)), 3), (codes, 0)):
        with pytest.raises(ValueError, match="`queries` must have 5 columns"):
            CodeIndex.build(codes).search(queries, top=top)
    assert CodeIndex.build(codes).search(csr_matrix((1, 5)), top=2)[1].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("values", ["none", "uint8", "float16"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_saved_index_finds_the_same_to_the_bit(values, signed, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(code_index, "BLOCK", 64)
    index = CodeIndex.build(sparse(150, 30, 5, signed), values=values)
    index.save(tmp_path / "index.safetensors")
    again = CodeIndex.load(tmp_path / "index.safetensors")
    queries = sparse(20, 30, 6, signed)
    for mine, theirs in zip(index.search(queries, top=5), again.search(queries, top=5), strict=True):
        assert np.array_equal(mine, theirs)
    assert repr(again) == repr(index) and again.n_bytes == index.n_bytes
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "index.safetensors").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.safetensors", "index.safetensors"]


def test_a_file_whose_parts_do_not_fit_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(code_index, "BLOCK", 64)
    path, edited = tmp_path / "index.safetensors", tmp_path / "edited.safetensors"
    CodeIndex.build(sparse(150, 30, 5, False), values="uint8").save(path)
    tensors, facts = load_tensors(path), TensorFile.open(path).metadata
    save_tensors(edited, tensors, facts)
    assert len(CodeIndex.load(edited)) == 150

    def with_first(name: str, value: float) -> dict:
        changed = tensors[name].clone()
        changed[0] = value
        return {name: changed}

    for change in (
        with_first("rows.0", 64),
        with_first("rows.2", 22),
        with_first("offsets.0", -1),
        {"offsets.1": tensors["offsets.1"].flip(0)},
        {"offsets.1": tensors["offsets.1"].long()},
        {"rows.0": tensors["rows.0"][:-1]},
        {"values.0": tensors["values.0"][:-1]},
        {"values.0": tensors["values.0"].half()},
        {"scale.0": tensors["scale.0"][:-1]},
        with_first("scale.0", float("nan")),
        with_first("weights", float("inf")),
        with_first("steps", -1.0),
        {"weights": tensors["weights"][:-1]},
        {"weights": tensors["weights"][None]},
    ):
        save_tensors(edited, tensors | change, facts)
        with pytest.raises(ValueError, match="must hold arrays that fit each other"):
            CodeIndex.load(edited)
    for change in ({"kind": "another"}, {"version": "2"}, {"values": "int4"}, {"n_blocks": "-3"}, {"n_features": "31"},
                   {"n_blocks": "2"}, {"n_blocks": "999999999"}, {"n_features": ""}):  # fmt: skip
        save_tensors(edited, tensors, facts | change)
        with pytest.raises(ValueError, match=r"must (be an index|hold)"):
            CodeIndex.load(edited)
    save_tensors(edited, {name: one for name, one in tensors.items() if name != "steps"}, facts)
    with pytest.raises(ValueError, match="must hold the 3 blocks"):
        CodeIndex.load(edited)
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    edited.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"crc|CRC|checksum|damaged"):
        CodeIndex.load(edited)
    with pytest.raises(FileNotFoundError):
        CodeIndex.load(tmp_path / "none.safetensors")
