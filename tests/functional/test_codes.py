"""The sparse products against naive dense ones, forward and backward."""

import functools

import pytest
import torch

from saelab.functional import sparse_products as kernels
from saelab.functional.codes import Entries, SparseCodes, attach_encoder, sparse_decode
from saelab.functional.sparse_products import gather_sum, has_dot_kernel, sampled_dot, transpose_entries

SHAPES = [(5, 7, 3), (1, 1, 1), (40, 9, 16), (3, 50, 4)]  # n_rows, d_sae, d_in


def codes(n_rows, d_sae, fill=0.4, seed=0, dtype=torch.float64):
    """Random codes with empty rows and empty columns among them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_rows, d_sae, generator=generator, dtype=dtype)
    z *= torch.rand(n_rows, d_sae, generator=generator) < fill
    z[:, :1] = 0
    z[: n_rows // 3] = 0
    return SparseCodes.from_dense(z), z


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n_rows", "d_sae", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gather_sum_is_the_dense_product(n_rows, d_sae, d_in, dtype):
    sparse, z = codes(n_rows, d_sae, dtype=dtype)
    table = draw(d_sae, d_in, dtype=dtype)
    torch.testing.assert_close(gather_sum(sparse.indices, sparse.values, sparse.offsets, table), z @ table)


@pytest.mark.parametrize(("n_rows", "d_sae", "d_in"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_dot_is_the_dense_product_at_the_entries(n_rows, d_sae, d_in, dtype):
    sparse, _ = codes(n_rows, d_sae, dtype=dtype)
    left, table = draw(n_rows, d_in, dtype=dtype), draw(d_sae, d_in, seed=2, dtype=dtype)
    dots = sampled_dot(sparse.rows, sparse.indices, left, table)
    torch.testing.assert_close(dots, (left @ table.T)[sparse.rows, sparse.indices])


def test_products_take_any_memory_order():
    sparse, z = codes(12, 10)
    table, left = draw(6, 10).T, draw(6, 12).T
    assert not table.is_contiguous() and not left.is_contiguous()
    torch.testing.assert_close(gather_sum(sparse.indices, sparse.values, sparse.offsets, table), z @ table)
    dots = sampled_dot(sparse.rows, sparse.indices, left, table)
    torch.testing.assert_close(dots, (left @ table.T)[sparse.rows, sparse.indices])


def test_sampled_dot_needs_no_kernel_that_other_releases_may_not_have(monkeypatch):
    assert has_dot_kernel("cpu")  # the fast way is taken with the releases that are tested

    def gone(*_: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such kernel")

    sparse, _ = codes(12, 10)
    left, table = draw(12, 6), draw(10, 6, seed=2)
    for other in (gone, lambda rows, indices, left, table: torch.zeros(len(rows))):
        monkeypatch.setattr(kernels, "has_dot_kernel", functools.cache(has_dot_kernel.__wrapped__))
        monkeypatch.setattr(kernels, "_dot_by_kernel", other)
        dots = sampled_dot(sparse.rows, sparse.indices, left, table)
        torch.testing.assert_close(dots, (left @ table.T)[sparse.rows, sparse.indices])


def test_sampled_dot_reads_unsorted_repeated_entries():
    rows, indices = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 1, 0, 1])
    left, table = draw(3, 4), draw(2, 4, seed=2)
    torch.testing.assert_close(sampled_dot(rows, indices, left, table), (left @ table.T)[rows, indices])


def test_transposed_entries_are_sorted_stably_by_column():
    indices = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0))
    order, starts = transpose_entries(indices, 8)  # columns 6 and 7 have no entries
    assert starts.tolist() == [int((indices < column).sum()) for column in range(9)]
    for column in range(8):
        places = order[starts[column] : starts[column + 1]]
        assert places.tolist() == (indices == column).nonzero().flatten().tolist()


def test_no_entries_at_all():
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(
        gather_sum(none, torch.zeros(0), torch.zeros(4, dtype=torch.int64), torch.ones(5, 2)), torch.zeros(3, 2)
    )
    assert sampled_dot(none, none, torch.ones(3, 2), torch.ones(5, 2)).shape == (0,)
    order, starts = transpose_entries(none, 3)
    assert order.shape == (0,) and starts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("n_rows", "d_sae", "d_in"), SHAPES)
def test_sparse_decode_has_the_gradients_of_the_dense_product(n_rows, d_sae, d_in):
    sparse, z = codes(n_rows, d_sae)
    W_dec, values = draw(d_sae, d_in).requires_grad_(), sparse.values.clone().requires_grad_()
    dense_W, dense_z = W_dec.detach().clone().requires_grad_(), z.clone().requires_grad_()
    x_hat = sparse_decode(values, W_dec, sparse.indices, sparse.rows, sparse.offsets)
    weight = draw(n_rows, d_in, seed=3)
    (x_hat * weight).sum().backward()
    ((dense_z @ dense_W) * weight).sum().backward()
    torch.testing.assert_close(x_hat, z @ W_dec)
    torch.testing.assert_close(W_dec.grad, dense_W.grad)
    torch.testing.assert_close(values.grad, dense_z.grad[sparse.rows, sparse.indices])


def test_sparse_decode_passes_gradcheck_and_takes_expanded_gradients():
    sparse, _ = codes(4, 5)
    values, W_dec = sparse.values.clone().requires_grad_(), draw(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, W: sparse_decode(v, W, sparse.indices, sparse.rows, sparse.offsets), (values, W_dec)
    )
    sparse_decode(values, W_dec, sparse.indices, sparse.rows, sparse.offsets).sum().backward()  # a gradient of stride 0
    torch.testing.assert_close(values.grad, W_dec.detach().sum(1)[sparse.indices])


def dense_entries(x, W_enc, b_enc, b_dec, sparse):
    return ((x - b_dec) @ W_enc + b_enc)[sparse.rows, sparse.indices]


def encoder_tensors(n_rows, d_sae, d_in):
    shapes = [(n_rows, d_in), (d_in, d_sae), (d_sae,), (d_in,)]
    return [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("n_rows", "d_sae", "d_in"), SHAPES)
@pytest.mark.parametrize("by_latent", [True, False])
def test_attached_encoder_has_the_gradients_of_the_dense_product(n_rows, d_sae, d_in, by_latent):
    sparse, _ = codes(n_rows, d_sae)
    tensors = encoder_tensors(n_rows, d_sae, d_in)
    if by_latent:  # the memory order of a Coder's W_enc
        tensors[1] = tensors[1].detach().T.contiguous().T.requires_grad_()
    copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    found = dense_entries(*[t.detach() for t in tensors], sparse)
    values = attach_encoder(found, *tensors, Entries(sparse.indices, sparse.rows, sparse.offsets))
    weight = draw(len(found), seed=9)
    (values.square() * weight).sum().backward()
    (dense_entries(*copies, sparse).square() * weight).sum().backward()
    torch.testing.assert_close(values, found, rtol=0, atol=0)
    for name, sparse_way, dense_way in zip(("x", "W_enc", "b_enc", "b_dec"), tensors, copies, strict=True):
        torch.testing.assert_close(sparse_way.grad, dense_way.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_attached_encoder_where_one_input_needs_no_gradient(frozen):
    sparse, _ = codes(6, 5)
    tensors = encoder_tensors(6, 5, 3)
    tensors[frozen].requires_grad_(False)
    found = dense_entries(*[t.detach() for t in tensors], sparse)
    attach_encoder(found, *tensors, Entries(sparse.indices, sparse.rows, sparse.offsets)).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [i == frozen for i in range(4)]


def test_encoding_and_decoding_without_entries():
    tensors = encoder_tensors(3, 5, 4)
    W_dec = draw(5, 4).requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    offsets = torch.zeros(4, dtype=torch.int64)
    values = attach_encoder(torch.zeros(0, dtype=torch.float64), *tensors, Entries(none, none, offsets))
    x_hat = sparse_decode(values, W_dec, none, none, offsets)
    x_hat.sum().backward()
    assert torch.equal(x_hat, torch.zeros(3, 4, dtype=torch.float64))
    for tensor in (*tensors, W_dec):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), ()])
def test_codes_round_trip_dense_and_decode_like_it(shape):
    z = draw(*shape, 6).relu() - draw(*shape, 6, seed=4).relu()
    sparse, W_dec = SparseCodes.from_dense(z), draw(6, 3, seed=5)
    assert torch.equal(sparse.to_dense(), z)
    torch.testing.assert_close(sparse.decode(W_dec), z @ W_dec)
    torch.testing.assert_close(sparse.prefix(2).decode(W_dec), z[..., :2] @ W_dec[:2])
    assert sparse.l0.tolist() == (z != 0).sum(-1).flatten().tolist()


def test_equal_rows_have_equal_products_whatever_the_processors_blas_does(monkeypatch):
    """Some sum from the first address that is a multiple of 64 bytes: copies of a row of 31 numbers then differ."""
    for even in (None, True, False):
        if even is not None:
            monkeypatch.setattr(kernels, "_ignores_alignment", lambda even=even: even)
        for width in (31, 32):
            values = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
            left, table = values[:1].repeat(40, 1), values[1:].repeat(2_000, 1)
            rows, indices = torch.arange(40).repeat_interleave(2_000), torch.arange(2_000).repeat(40)
            products = sampled_dot(rows, indices, left, table)
            torch.testing.assert_close(products, (values[0] @ values[1]).expand(80_000))
            assert even or bool((products == products[0]).all())
