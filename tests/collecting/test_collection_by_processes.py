"""A stream that several processes feed has the batches of one."""

import itertools
from typing import Any

import pytest
import torch
from ranks import Pool, mesh_of

import saelab as sl
from saelab.lm.models import tiny_model

HOOK = "blocks.1.hook_resid_post"


def made() -> tuple[Any, sl.Tokens]:
    model = tiny_model()
    animals = ("cat", "dog", "owl", "fox", "hen")
    texts = [f"The {a} sees the {b}, and the {b} sees nobody." for a in animals for b in animals]
    return model, sl.tokenize(model, texts, ctx_len=16, n_tokens=600)


def batches(shape: tuple[int, int] | None, resumed: bool = False) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Two passes' batches of a stream; with `resumed` the last of them from its state after the third."""
    model, tokens = made()
    mesh = None if shape is None else mesh_of(*shape)

    def make() -> Any:
        return sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, epochs=2, mesh=mesh, seed=1)

    flow = make()
    if not resumed:
        return list(flow), dict(flow.removed)
    first = list(itertools.islice(flow, 3))
    again = make()
    again.load_state_dict(flow.state_dict())
    return [*first, *again], dict(again.removed)


def test_several_processes_feed_one_stream(pool: Pool) -> None:
    expected, removed = batches(None)
    assert len(expected) > 20
    for shape, resumed in (((1, 4), False), ((2, 2), True)):
        for found, counts in pool.run(batches, shape, resumed):
            assert len(found) == len(expected) and counts == removed
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def trained(shape: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """An SAE trained while the model runs."""
    model, tokens = made()
    mesh = None if shape is None else mesh_of(*shape)
    flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh)
    cfg = sl.SAEConfig(d_in=flow.d_in, d_sae=64, activation=sl.TopK(k=4))
    sae = sl.SAE(cfg, seed=0).fit(flow, sl.TrainConfig(n_tokens=240, batch_size=24), progress=False, mesh=mesh)
    return {key: held.clone() for key, held in sae.state_dict().items()}


@pytest.mark.slow
def test_the_model_runs_in_the_processes_that_train(pool: Pool) -> None:
    expected = trained(None)
    for found in pool.run(trained, (2, 2)):
        for key, held in expected.items():
            torch.testing.assert_close(found[key], held, rtol=1e-4, atol=1e-5)


def refused() -> str:
    """What a stream says whose third process cannot read: the others do not wait."""
    model, tokens = made()
    if torch.distributed.get_rank() == 2:
        flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh_of(2, 2))

        def broken(*_: Any) -> None:
            raise ValueError("no activations here")

        object.__setattr__(flow._reader, "read", broken)
    else:
        flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh_of(2, 2))
    try:
        next(flow)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def test_a_process_that_cannot_read_is_named(pool: Pool) -> None:
    said = pool.run(refused)
    assert said[2] == "ValueError: no activations here"
    assert all("process 2 on " in said[i] and "no activations here" in said[i] for i in (0, 1, 3))
