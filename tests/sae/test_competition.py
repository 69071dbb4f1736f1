"""The latents that fire are those that one process finds, ties included, however rows and latents are divided."""

from typing import Any

import pytest
import torch
from ranks import Pool, mesh_of
from sampled import one_in

import saelab as sl
from saelab.functional.codes import SparseCodes
from saelab.sae.competition import activate_among, best_of_ranks, search_among
from saelab.training import GridAxis, RankGrid

D_IN, D_SAE, N = 5, 32, 24
SHAPES = ((1, 4), (2, 2), (4, 1))
ACTIVATIONS = {
    "topk": sl.TopK(k=3),
    "many": sl.AbsTopK(k=20),  # more than a rank of four has latents
    "abstopk": sl.AbsTopK(k=3),
    "batchtopk": sl.BatchTopK(k=3),
    "batchabstopk": sl.BatchAbsTopK(k=3),
    "nearly all": sl.BatchAbsTopK(k=30),
    "groupmax": sl.GroupMax(k=8),
}


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers, so that sums are exact in any order and many are equal; one half of the latents has equals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (N, D_IN), generator=generator).float()
    W = torch.randint(-2, 3, (D_SAE, D_IN), generator=generator).float()
    W[D_SAE // 2 :] = W[: D_SAE // 2]
    x[: N // 2] *= 3  # in a batch some tokens have most of the codes
    return x, W, torch.randint(-1, 2, (D_SAE,), generator=generator).float()


def dense(codes: SparseCodes | None) -> torch.Tensor:
    assert codes is not None
    return codes.to_dense()


def found(name: str, shape: tuple[int, int]) -> dict[str, Any]:
    """This process's part of the codes, searched and from dense pre-activations, and where it belongs."""
    ranks = RankGrid.of(mesh_of(*shape))
    x, W, bias = made()
    own = ranks.latents.split(D_SAE)
    x, W, bias = ranks.rows(x), W[own.start : own.stop], bias[own.start : own.stop]
    activation = ACTIVATIONS[name]
    searched = dense(search_among(activation, x, W, bias, None, ranks))
    from_dense = activate_among(activation, x @ W.T + bias, None, ranks)
    return {"searched": searched, "dense": from_dense, "rows": ranks.data.index, "latents": (own.start, own.stop)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", one_in(2, ACTIVATIONS))
def test_codes_are_those_of_one_process(pool: Pool, name: str, shape: tuple[int, int]) -> None:
    x, W, bias = made()
    activation = ACTIVATIONS[name]
    expected = dense(activation.search(x, W, bias, None, training=True))
    for part in pool.run(found, name, shape):
        first, last = part["latents"]
        whole = expected[part["rows"] :: shape[0], first:last]
        assert torch.equal(part["searched"], whole)
        if name != "nearly all":  # a dense choice among equal entries is not that of a search, in one process too
            assert int((part["dense"] != 0).sum()) <= whole.numel()
    parts = pool.run(found, name, shape)
    assert sum(int((part["searched"] != 0).sum()) for part in parts) == int((expected != 0).sum())
    sizes = torch.cat([part["dense"].abs().flatten() for part in parts]).sort().values
    assert torch.equal(sizes, activation(x @ W.T + bias, training=True).abs().flatten().sort().values)


def test_the_best_of_one_rank_are_its_own() -> None:
    size = torch.tensor([[3.0, 1.0], [2.0, -torch.inf]])
    assert best_of_ranks(size, 2, GridAxis()).tolist() == [[True, True], [True, False]]


def gradients(shape: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """Gradient of this process's pre-activations under an activation function in which all latents meet."""
    ranks = RankGrid.of(mesh_of(*shape))
    x, W, bias = made()
    own = ranks.latents.split(D_SAE)
    u = (ranks.rows(x) @ W[own.start : own.stop].T + bias[own.start : own.stop]).requires_grad_()
    z = activate_among(sl.sae.Sparsemax(), u, None, ranks)
    weights = torch.arange(float(D_SAE))[own.start : own.stop]
    (grad,) = torch.autograd.grad(ranks.latents.sum((z * weights).sum()), u)
    return grad, own.start


def test_gradients_reach_the_latents_of_other_processes(pool: Pool) -> None:
    x, W, bias = made()
    u = (x @ W.T + bias).requires_grad_()
    (expected,) = torch.autograd.grad((sl.sae.Sparsemax()(u) * torch.arange(float(D_SAE))).sum(), u)
    for grad, first in pool.run(gradients, (1, 4)):
        torch.testing.assert_close(grad, expected[:, first : first + grad.shape[1]])
