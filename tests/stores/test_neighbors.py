"""Batches of neighboring rows: which pairs there are, in what order, and what is refused."""

import pytest
import torch

import saelab as sl
from saelab.stores.neighbors import NeighborBatches

N, D = 1_000, 3


def rows(n=N, doc=7):
    """Row i is (i, 10 i, -i), in documents of `doc` rows."""
    numbers = torch.arange(float(n))
    docs = (torch.arange(n) // doc).int()
    return sl.Activations.from_tensor(torch.stack([numbers, 10 * numbers, -numbers], 1), doc_ids=docs)


def firsts(batches, n_batches):
    """The first rows of pairs, after the second ones were compared with them."""
    found = []
    for _ in range(n_batches):
        batch = next(batches)
        first, second = batch[: len(batch) // 2, 0], batch[len(batch) // 2 :, 0]
        assert torch.equal(second, first + 1) and torch.equal(batch[:, 1], 10 * batch[:, 0])
        assert bool((first % 7 != 6).all())  # a document's last row is never first
        found.append(first)
    return torch.cat(found).int().tolist()


def test_every_pair_of_a_document_comes_once_an_epoch():
    n_pairs = sum(i % 7 != 6 for i in range(N - 1))
    found = firsts(NeighborBatches(rows(), 26), n_pairs // 13)
    assert len(set(found)) == len(found) == n_pairs // 13 * 13
    assert found != sorted(found) and found != firsts(NeighborBatches(rows(), 26, seed=1), n_pairs // 13)


def test_positions_are_saved_and_memory_is_that_of_the_buffer():
    batches, again = (rows(4_000).neighbor_batches(20, seed=3, buffer_tokens=512) for _ in range(2))
    for _ in range(57):
        next(batches)
    again.load_state_dict(batches.state_dict())
    assert torch.equal(next(batches), next(again))
    assert batches.d_in == D and iter(batches) is batches


def test_pairs_of_a_transcoder():
    inputs = rows()
    pairs = sl.stores.ActivationPairs(
        inputs, sl.Activations.from_tensor(inputs[:][:, :1] + 0.5, doc_ids=inputs.doc_ids)
    )
    batch = next(pairs.neighbor_batches(8))
    assert batch.shape == (8, D + 1) and torch.equal(batch[:, 3], batch[:, 0] + 0.5)
    assert torch.equal(batch[4:, 0], batch[:4, 0] + 1)


def test_what_has_no_neighbors_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        NeighborBatches(rows(), 7)
    with pytest.raises(ValueError, match="rows without `doc_ids`"):
        NeighborBatches(sl.Activations.from_tensor(torch.zeros(9, 2)), 4)
    with pytest.raises(ValueError, match="at most twice the 0 pairs"):
        NeighborBatches(rows(20, doc=1), 4)
