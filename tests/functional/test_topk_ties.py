"""Of equal scores the lowest latent wins, and of equal scores of a batch the first row's: on every path."""

import pytest
import torch
from torch.nn.functional import one_hot

import saelab as sl
from saelab.functional import row_topk
from saelab.functional.activation_functions import keep_batch_topk, keep_group_max, keep_topk
from saelab.functional.row_topk import largest_latents, topk_latents
from saelab.functional.screening import first_largest, largest_first
from saelab.functional.topk import batch_topk_entries, search_batch_topk, search_group_max, search_topk
from saelab.sae.activation_functions import AbsTopK, BatchAbsTopK, BatchTopK, GroupMax, TopK
from saelab.sae.config import SAEConfig
from saelab.sae.training_sae import TrainingSAE
from saelab.training.config import TrainConfig
from saelab.universality.nearest import find_nearest

PRECISIONS = [None, "float32", "bfloat16", "int8"]
SIGNED = pytest.mark.parametrize("signed", [False, True])


def whole_numbers(n_rows=70, d_sae=1040, d_in=6, seed=0):
    """Scores that every way to sum gives exactly, and most of which are tied."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n_rows, d_in), generator=generator).float()
    W = torch.randint(-2, 3, (d_sae, d_in), generator=generator).float()
    return x, W, torch.randint(-1, 2, (d_sae,), generator=generator).float()


def copies(n_rows=40, d_sae=1040, d_in=31, n_kinds=90, seed=0):
    """Latents that are copies of each other, in no order; their scores are no whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, n_kinds, (d_sae,), generator=generator)
    W, bias = torch.randn(n_kinds, d_in, generator=generator), torch.randn(n_kinds, generator=generator)
    return torch.randn(n_rows, d_in, generator=generator), W[kind], bias[kind], kind


def by_rule(size, k):
    """Python's own sort, which is stable, row by row."""
    return [sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k] for row in size.tolist()]


def members(codes):
    return {(r, j) for r, j in zip(codes.rows.tolist(), codes.indices.tolist(), strict=True)}


@pytest.mark.parametrize("n", [1, 5, 40, 2000])
@pytest.mark.parametrize("k", [1, 3, 5, 40])
def test_largest_first_is_a_stable_sort(n, k):
    sizes = torch.randint(-3, 4, (50, n), generator=torch.Generator().manual_seed(n)).float()
    sizes[0] = 0.0
    k = min(k, n)
    assert largest_first(sizes, k).tolist() == by_rule(sizes, k)
    flat = sizes.flatten()
    assert first_largest(flat, 50 * k).tolist() == sorted(by_rule(flat[None], 50 * k)[0])


def test_largest_first_of_infinities_and_what_is_no_number():
    sizes = torch.tensor([[1.0, torch.nan, 1.0, -torch.inf, torch.inf, 1.0], [-torch.inf] * 6])
    assert largest_first(sizes, 4).tolist() == [[1, 4, 0, 2], [0, 1, 2, 3]]


@SIGNED
@pytest.mark.parametrize("k", [1, 12, 100])
def test_every_path_keeps_the_same_of_tied_whole_numbers(k, signed):
    x, W, bias = whole_numbers()
    u = x @ W.T + bias
    size = u.abs() if signed else u
    wanted = {(r, j) for r, row in enumerate(by_rule(size, k)) for j in row if size[r, j] > 0}
    z = keep_topk(u, k, signed)
    assert {(r, j) for r, j in z.nonzero().tolist()} == wanted
    for precision in PRECISIONS:
        assert members(search_topk(x, W, bias, k, signed, precision)) == wanted, precision
        split = [search_topk(part, W, bias, k, signed, precision).to_dense() for part in x.split(9)]
        assert torch.equal(torch.cat(split), z), precision
    entries = by_rule(size.flatten()[None], k * len(x))[0]
    in_batch = {divmod(e, len(W)) for e in entries if size.flatten()[e] > 0}
    assert {(r, j) for r, j in keep_batch_topk(u, k, signed).nonzero().tolist()} == in_batch
    for precision in PRECISIONS:
        assert members(search_batch_topk(x, W, bias, k, signed, precision)) == in_batch, precision


@pytest.mark.parametrize("k", [10, 104, 520])
def test_group_maxima_of_tied_whole_numbers(k):
    x, W, bias = whole_numbers()
    u = (x @ W.T + bias).unflatten(1, (k, -1))
    first = u == u.amax(2, keepdim=True)
    wanted = one_hot(first.int().argmax(2), u.shape[2]) * u.relu()
    assert torch.equal(keep_group_max(u.flatten(1), k), wanted.flatten(1))
    assert torch.equal(search_group_max(x, W, bias, k).to_dense(), wanted.flatten(1))


def assert_first_copies(kept, kind):
    """Wherever some copies of a latent are kept and some are not, the lowest are kept."""
    for row in kept:
        for of_kind in one_hot(kind).T.bool():
            flags = row[of_kind]
            assert flags[: int(flags.sum())].all()


@SIGNED
def test_copies_of_a_latent_win_in_order_on_every_path(signed):
    x, W, bias, kind = copies()
    reference = None
    for precision in PRECISIONS:
        for size in (1, 7, len(x)):
            parts = [search_topk(part, W, bias, 20, signed, precision).to_dense() != 0 for part in x.split(size)]
            kept = torch.cat(parts)
            reference = kept if reference is None else reference
            assert torch.equal(kept, reference), f"{precision}, {size} rows at a time"
    assert_first_copies(reference, kind)
    batches = [search_batch_topk(x, W, bias, 20, signed, precision).to_dense() != 0 for precision in PRECISIONS]
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    assert_first_copies(batches[0], kind)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("k", [1, 12, 100])
def test_of_equal_values_below_zero_the_lowest_latents_are_the_largest(k, compiled, monkeypatch):
    """As dead latents have them, of which the largest are asked for though none fires."""
    if not compiled:
        monkeypatch.setattr(row_topk, "finds_exactly", lambda W, k: False)
    x, W, bias = whole_numbers()
    x[3] = 0
    for shift in (0, -100):  # some are at zero, or all below it
        wanted = by_rule(x @ W.T + bias + shift, k)
        for rows in (1, 9, len(x)):
            found = torch.cat([largest_latents(part, W, bias + shift, k, False)[0] for part in x.split(rows)])
            assert found.sort(1).values.tolist() == [sorted(row) for row in wanted], (shift, rows)
    x, W, bias, kind = copies()
    bias = bias - 100
    found = [torch.cat([largest_latents(part, W, bias, k, False)[0] for part in x.split(n)]) for n in (1, 7, len(x))]
    assert all(torch.equal(one.sort(1).values, found[0].sort(1).values) for one in found)
    assert_first_copies(torch.zeros(len(x), len(W)).scatter(1, found[0], 1.0) != 0, kind)


def test_too_close_to_call_is_told_apart_by_the_scores_one_by_one():
    """A product with its last bits shuffled, as another processor may give it, changes no member."""
    x, W, bias, _ = copies(n_rows=30)
    u = x @ W.T + bias
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        shaken = u * (1 + 2e-7 * torch.randn(u.shape, generator=generator))
        assert torch.equal(
            topk_latents(shaken, x, W, bias, 20, False).sort(1).values,
            topk_latents(u, x, W, bias, 20, False).sort(1).values,
        )
        found, wanted = (batch_topk_entries(one, x, W, bias, 600, True) for one in (shaken, u))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("activation", [TopK(k=6), AbsTopK(k=6), BatchTopK(k=6), BatchAbsTopK(k=6), GroupMax(k=8)])
@pytest.mark.parametrize("d_sae", [1040, 8216])  # found densely, and through a screen
def test_encode_encode_sparse_and_training_fire_the_same_latents(activation, d_sae):
    x, W, bias, kind = copies(d_sae=d_sae)
    sae = sl.SAE(SAEConfig(d_in=31, d_sae=d_sae, activation=activation, prefixes=(200, d_sae)))
    with torch.no_grad():
        sae.W_enc.copy_(W.T)
        sae.b_enc.copy_(bias)
    dense, sparse = sae.encode(x) != 0, sae.encode_sparse(x)
    assert torch.equal(dense, sparse.to_dense() != 0)
    trainee = TrainingSAE(sae, TrainConfig(n_tokens=40, batch_size=40))
    assert torch.equal(trainee.objective(x).fired, dense.any(0))
    if not isinstance(activation, BatchTopK):
        assert torch.equal(sae.encode_latents(x, list(range(0, d_sae, 3))) != 0, dense[:, ::3])
        parts = torch.cat([sae.encode_sparse(part).to_dense() != 0 for part in x.split(3)])
        assert torch.equal(parts, dense)
    if not isinstance(activation, GroupMax):
        assert_first_copies(dense, kind)


def test_nearest_partners_of_equal_similarity_come_in_order():
    similarity = torch.randint(-2, 3, (90, 700), generator=torch.Generator().manual_seed(3)).float()
    for n_rows in (7, 90):
        starts = range(0, 90, n_rows)
        blocks = [(start, lambda rows=slice(start, start + n_rows): similarity[rows].clone()) for start in starts]
        of_a, of_b = find_nearest(blocks, 90, 700, 3, signed=True)
        assert of_a.indices.tolist() == by_rule(similarity.abs(), 3)
        assert of_b.indices.tolist() == by_rule(similarity.T.abs(), 3)
