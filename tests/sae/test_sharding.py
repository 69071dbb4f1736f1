"""Training by several processes gives what one gives, for every kind of SAE and every way to divide the work."""

import errno
import functools
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from configurations import CONFIGURATIONS, D_IN, D_SAE, PURSUITS, RECONSTRUCTION, SMALL
from ranks import Pool, mesh_of
from sampled import one_in

import saelab as sl
from saelab.sae import Refined
from saelab.sae.objectives import AuxK, ContrastiveLoss, LossTerm
from saelab.stores.jobs import hold_folder
from saelab.training import RankGrid, shared_checkpoint

MESHES = ((1, 4), (2, 2), (4, 1))
BATCH = 96


@sl.register_loss_term("of_all")
@dataclass(frozen=True)
class OfAll(LossTerm):
    """A term that knows nothing of processes and reads all there is, in ways that no mean or sum of parts gives."""

    def __call__(self, step):
        dense = step.z.mean(0).std() + step.y_hat.var(0).sqrt().mean() + step.errors.sum().sqrt() / step.n_tokens
        weights = (step.W_dec @ step.W_dec.T).square().mean() + step.sae.W_enc.std() + step.sae.b_enc.mean() ** 2
        revived = len(step.dead) * step.sae.W_enc[:, step.dead].square().sum()
        return dense + weights + revived + step.sae.b_dec.norm() * step.residual.norm()


@sl.register_loss_term("of_all_dense")
@dataclass(frozen=True)
class OfAllDense(LossTerm):
    needs = frozenset({"dense"})

    def __call__(self, step):
        return (step.u.softmax(1) * step.z).mean(0).std()


@sl.register_activation("half_of_largest")
@dataclass(frozen=True)
class HalfOfLargest(sl.sae.Activation):
    """An activation function that knows nothing of processes: latents compete in the batch."""

    def __call__(self, u, threshold=None, training=False):
        return (u - 0.5 * u.amax()).relu()


CASES: dict[str, dict[str, Any]] = {
    **CONFIGURATIONS,
    "own activation": {"activation": HalfOfLargest()},
    "neighbors": {"prefixes": (16, 64), "objective": (RECONSTRUCTION, AuxK(), ContrastiveLoss(prefix=0.25))},
    "own term": {"objective": (RECONSTRUCTION, AuxK(), OfAll(coefficient=0.01))},
    "own dense term": {
        "activation": sl.JumpReLU(target_l0=4.0),
        "objective": (RECONSTRUCTION, AuxK(), OfAllDense(coefficient=0.1)),
    },
    **PURSUITS,
}
WITH_ALL_MESHES = ("topk", "own term")
GROWING = ("archetypal",)  # Adam divides what is nearly 0 by its own size there, so that rounding errors grow


@functools.cache
def sample() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, D_IN, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    fires = torch.rand(6000, 60, generator=generator) < 0.06
    z = fires * torch.rand(6000, 60, generator=generator)
    return z @ rows * 3 + 0.02 * torch.randn(6000, D_IN, generator=generator)


def train(name: str, n_steps: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """History, weights, dead latents and codes of a case, trained by this process alone or in a mesh."""
    x = sample()
    cfg = sl.SAEConfig(**SMALL | CASES[name])
    places = torch.arange(len(x), dtype=torch.int32)
    texts = {"token_ids": places, "doc_ids": places // 50, "positions": places % 50}
    acts = sl.Activations.from_tensor(x, **texts) if cfg.d_out is None else (x, 2 * x[:, : cfg.d_out] + 1)
    run = sl.TrainConfig(
        n_tokens=n_steps * BATCH, batch_size=BATCH, n_held_out=200, log_every_tokens=BATCH, save_every_tokens=10 * BATCH
    )
    mesh = None if shape is None else mesh_of(*shape)
    sae = sl.SAE(cfg, seed=0).fit(acts, run, progress=False, mesh=mesh)
    assert sae.training_ is not None
    codes = sae.encode_sparse(x[-500:])
    return {
        "history": sae.history_,
        "weights": {key: held.clone() for key, held in sae.state_dict().items()},
        "dead": sae.training_["dead"],
        "codes": (codes.rows, codes.indices),
    }


@functools.cache
def alone(name: str, n_steps: int) -> dict[str, Any]:
    return train(name, n_steps)


def meshes(name: str, every: bool) -> Sequence[tuple[int, int]]:
    if name in PURSUITS:
        return ((4, 1),)
    return MESHES if every else ((2, 2),)


@pytest.mark.parametrize(
    ("name", "shape"),
    one_in(4, [(name, shape) for name in CASES for shape in meshes(name, name in WITH_ALL_MESHES)], WITH_ALL_MESHES),
    ids=str,
)
def test_several_processes_give_what_one_gives(pool: Pool, name: str, shape: tuple[int, int]) -> None:
    check(pool, name, 12, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in CASES for shape in meshes(name, True)], ids=str)
def test_several_processes_give_what_one_gives_in_50_steps(pool: Pool, name: str, shape: tuple[int, int]) -> None:
    check(pool, name, 50, shape)


def check(pool: Pool, name: str, n_steps: int, shape: tuple[int, int]) -> None:
    one, several = alone(name, n_steps), pool.run(train, name, n_steps, shape)
    for found in several:
        assert same(found, several[0])  # to the bit in all processes
    for before, after in zip(one["history"], several[0]["history"], strict=True):
        assert before.keys() == after.keys()
        near = 2e-6 if name not in GROWING else 1e-5 if before["step"] <= 3 else 1e-4
        for key, value in before.items():
            if value is not None:
                assert after[key] == pytest.approx(value, rel=near, abs=1e-6), key
    if name not in GROWING:
        for key, held in one["weights"].items():
            torch.testing.assert_close(several[0]["weights"][key], held, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert several[0]["dead"] == one["dead"]
        assert agreement(several[0]["codes"], one["codes"]) > 0.999


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    weights = all(torch.equal(a["weights"][key].nan_to_num(), b["weights"][key].nan_to_num()) for key in b["weights"])
    return weights and a["history"] == b["history"] and a["dead"] == b["dead"]


def agreement(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of codes that both have."""
    first, second = (set((rows * D_SAE + latents).tolist()) for rows, latents in (a, b))
    return len(first & second) / max(1, len(first | second))


def stopped(name: str, folder: str, shape: tuple[int, int] | None, after: int, optim_bits: int = 32) -> str:
    """Train a case in a folder until a signal reaches one of the processes; what they say."""
    try:
        train_in(name, folder, shape, after, optim_bits)
    except KeyboardInterrupt as stop:
        return str(stop)
    return "not stopped"


def train_in(
    name: str, folder: str, shape: tuple[int, int] | None, stop: int = 0, optim_bits: int = 32
) -> dict[str, Any]:
    """A case trained in a folder, going on from its checkpoint; its weights and history."""
    cfg = sl.SAEConfig(**SMALL | CASES[name])
    run = sl.TrainConfig(
        n_tokens=20 * BATCH,
        batch_size=BATCH,
        optim_bits=optim_bits,
        n_held_out=200,
        log_every_tokens=BATCH,
        save_every_tokens=6 * BATCH,
    )

    def interrupt(entry: dict[str, Any]) -> None:
        if entry["step"] == stop:
            signal.raise_signal(signal.SIGTERM)

    mesh = None if shape is None else mesh_of(*shape)
    acts = sample() if cfg.d_out is None else (sample(), 2 * sample()[:, : cfg.d_out] + 1)
    sae = sl.SAE(cfg, seed=0)
    sae.fit(acts, run, out=folder, resume=True, sinks=[interrupt], progress=False, mesh=mesh)
    return {"weights": {key: held.clone() for key, held in sae.state_dict().items()}, "history": sae.history_}


@pytest.mark.parametrize("name", one_in(4, ["topk", "soft frozen", "lista", "annealed"]))
def test_a_stopped_run_goes_on_with_other_processes(pool: Pool, tmp_path: Path, name: str) -> None:
    whole = train_in(name, str(tmp_path / "whole"), None)
    places = [(1, 4), (2, 2), None, (4, 1), (1, 4)]
    for i, (first, second) in enumerate(itertools.pairwise(places)):
        folder = str(tmp_path / f"{i}")
        told = pool.run(stopped, name, folder, first, 8) if first else [stopped(name, folder, None, 8)]
        assert set(told) == {
            f"Training stopped after 8 of 20 steps, saved to {folder}/checkpoint; go on with resume=True."
        }
        found = pool.run(train_in, name, folder, second)[0] if second else train_in(name, folder, None)
        for key, held in whole["weights"].items():
            torch.testing.assert_close(found["weights"][key], held, rtol=1e-4, atol=1e-5, equal_nan=True)
        lines = Path(folder, "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


@pytest.mark.parametrize("bits", [32, 16])
def test_a_resumed_run_of_the_same_processes_ends_with_the_same_bytes(pool: Pool, tmp_path: Path, bits: int) -> None:
    whole, *others = pool.run(train_in, "topk", str(tmp_path / "whole"), (2, 2), 0, bits)
    pool.run(stopped, "topk", str(tmp_path / "part"), (2, 2), 9, bits)
    found = pool.run(train_in, "topk", str(tmp_path / "part"), (2, 2), 0, bits)[0]
    assert all(torch.equal(other["weights"][key], held) for other in others for key, held in whole["weights"].items())
    assert all(torch.equal(found["weights"][key], held) for key, held in whole["weights"].items())
    assert found["history"] == whole["history"]
    for name in ("history.jsonl", "history.csv"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    parts = sorted(path.name for path in (tmp_path / "part" / "checkpoint").iterdir())
    assert not [name for name in parts if not name.endswith((".safetensors", ".json"))]  # no pickles


def share_of(shape: tuple[int, int]) -> Any:
    """What a share that was made as one becomes: whole weights in the first process, a share in the others."""
    mesh = mesh_of(*shape)
    own = RankGrid.of(mesh).latents.split(D_SAE)
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.BatchTopK(k=4))
    sae = sl.SAE(cfg, seed=0, latents=own)
    sae.fit(sample(), sl.TrainConfig(n_tokens=10 * BATCH, batch_size=BATCH), progress=False, mesh=mesh)
    return {key: held.clone() for key, held in sae.state_dict().items()}, sae.training_ is not None


def test_a_share_needs_no_whole_sae(pool: Pool) -> None:
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.BatchTopK(k=4))
    run = sl.TrainConfig(n_tokens=10 * BATCH, batch_size=BATCH)
    whole = sl.SAE(cfg, seed=0).fit(sample(), run, progress=False).state_dict()
    for shape in ((1, 4), (2, 2)):
        found = pool.run(share_of, shape)
        for key, held in found[0][0].items():
            torch.testing.assert_close(held, whole[key], rtol=1e-4, atol=1e-5)
        assert [recorded for _, recorded in found] == [True, False, False, False]
        assert len(found[-1][0]["W_dec"]) == D_SAE // shape[1]


@pytest.mark.parametrize("cfg", [{}, {"d_out": 9}, {"activation": sl.JumpReLU(target_l0=4.0)}, {"encoder": Refined()}])
def test_shares_are_drawn_as_the_whole(cfg: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.sae.module.DRAWN_NUMBERS", 16 * 7 * 5)
    for d_in, d_sae in ((7, 50), (16, 96), (5, 33)):
        made = sl.SAEConfig(**{"d_in": d_in, "d_sae": d_sae, "activation": sl.TopK(k=4)} | cfg)
        whole = dict(sl.SAE(made, seed=3).named_parameters())
        for own in (range(10), range(10, d_sae), range(d_sae - 3, d_sae)):
            for key, held in sl.SAE(made, seed=3, latents=own).named_parameters():
                rows = whole[key].T if key == "W_enc" else whole[key]
                part = rows if len(rows) != d_sae else rows[own.start : own.stop]
                assert torch.equal(held.T if key == "W_enc" else held, part), key


def refused(kind: str) -> str:
    """What a run says that cannot be, in this process."""
    rank = torch.distributed.get_rank()
    cfg = {"d_in": D_IN, "d_sae": D_SAE, "activation": sl.TopK(k=4)}
    run = {"n_tokens": 10 * BATCH, "batch_size": BATCH}
    shape, x, out, sae_seed = (2, 2), sample(), None, 0
    if kind == "latents":
        cfg["d_sae"] = D_SAE + 1
    elif kind == "batch":
        run["batch_size"] = BATCH + 1
    elif kind == "groups":
        cfg["activation"] = sl.GroupMax(k=1)
    elif kind == "pursuit":
        cfg |= {"activation": sl.AbsTopK(k=4), "encoder": sl.ICFL(latents_per_round=2), "objective": (RECONSTRUCTION,)}
    elif kind == "neighbors":
        cfg |= {"objective": (RECONSTRUCTION, ContrastiveLoss()), "d_sae": D_SAE}
        run["batch_size"] = 6
    elif kind == "data" and rank == 2:
        x = x + 1
    elif kind == "settings" and rank == 1:
        run["seed"] = 5
    elif kind == "config" and rank == 3:
        cfg["activation"] = sl.TopK(k=5)
    elif kind == "weights" and rank == 1:
        sae_seed = 7
    elif kind == "folder":
        out = tempfile.mkdtemp() if rank else "/tmp/saelab-of-rank-0"
    try:
        sl.SAE(sl.SAEConfig(**cfg), seed=sae_seed).fit(
            x, sl.TrainConfig(**run), out=out, progress=False, mesh=mesh_of(*shape)
        )
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("latents", "`mesh` must divide the latents into equal shares, got d_sae 65 for 2 ranks"),
        ("batch", "`mesh` must divide the batch into equal shares, got batch_size 97 for 2 ranks"),
        ("groups", "`mesh` must not cut the groups of GroupMax(k=1), got 2 ranks"),
        ("pursuit", "its latents cannot be divided, got ICFL"),
        ("neighbors", "`mesh` must not separate neighboring tokens, which 'contrastive' compares, got batch_size 6"),
        ("data", "All processes must have the same activations, got"),
        ("settings", "All processes must have the same TrainConfig, got"),
        ("config", "All processes must have the same SAEConfig, got"),
        ("folder", "All processes must have the same folder, got"),
        ("weights", "All processes must have the same weights to start from, got"),
    ],
)
def test_what_cannot_be_divided_is_said_by_all(pool: Pool, kind: str, said: str) -> None:
    for text in pool.run(refused, kind):
        assert said in text
    assert pool.run(train, "topk", 2, (2, 2))  # nobody waits for anybody


def test_a_folder_that_others_do_not_see(pool: Pool, tmp_path: Path) -> None:
    """Each process has a folder of its own under one name, as two machines without a shared disk have."""
    for text in pool.run(in_own_folder, str(tmp_path)):
        assert "`out` must be one folder that all processes see, got run" in text


def in_own_folder(place: str) -> str:
    before, own = Path.cwd(), Path(place, str(torch.distributed.get_rank()))
    own.mkdir()
    os.chdir(own)
    try:
        cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=4))
        run = sl.TrainConfig(n_tokens=2 * BATCH, batch_size=BATCH)
        sl.SAE(cfg).fit(sample(), run, out="run", progress=False, mesh=mesh_of(2, 2))
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(before)
    return "trained"


def meshes_refused() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    said = []
    for shape, names in (((4,), ("tp",)), ((2, 2), None), ((2, 2), ("data", "tp"))):
        with pytest.raises(ValueError, match="`mesh` must have axes named") as error:
            RankGrid.of(init_device_mesh("cpu", shape, mesh_dim_names=names))
        said.append(str(error.value))
    grid = RankGrid.of(init_device_mesh("cpu", (4,)))
    assert grid.latents.size == 4 and grid.data.size == 1
    return said


def test_axes_of_a_mesh_have_names(pool: Pool) -> None:
    for said in pool.run(meshes_refused):
        assert "('data', 'tp')" in said[2] and "init_device_mesh" in said[2]


def on_a_full_disk(folder: str) -> str:
    """What each process says where the disk of the third is full."""
    if torch.distributed.get_rank() == 2:
        made = shared_checkpoint._writer

        def full(place: str) -> Any:
            def refuse(*_: Any) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            writer = made(place)
            writer.write_data = refuse
            return writer

        shared_checkpoint._writer = full
    try:
        train_in("topk", folder, (2, 2))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if torch.distributed.get_rank() == 2:
            shared_checkpoint._writer = made
    return "saved"


def test_a_process_whose_disk_is_full_is_named_and_the_checkpoint_stays(pool: Pool, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    pool.run(stopped, "topk", folder, (2, 2), 7)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()}
    said = pool.run(on_a_full_disk, folder)
    assert said[2] == "OSError: [Errno 28] No space left on device"
    for i in (0, 1, 3):
        assert said[i].startswith("RuntimeError: Stopped, as another process failed. process 2 on ")
        assert said[i].endswith("OSError: [Errno 28] No space left on device")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "checkpoint").iterdir()} == before
    whole = pool.run(train_in, "topk", str(tmp_path / "whole"), (2, 2))[0]
    found = pool.run(train_in, "topk", folder, (2, 2))[0]
    assert all(torch.equal(found["weights"][key], held) for key, held in whole["weights"].items())


def two_at_once(shape: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Two SAEs trained on the same batches, one of them wider."""
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=4))
    saes = [sl.SAE(cfg, seed=0), sl.SAE(replace(cfg, d_sae=2 * D_SAE, activation=sl.BatchAbsTopK(k=3)), seed=1)]
    run = sl.TrainConfig(n_tokens=12 * BATCH, batch_size=BATCH, log_every_tokens=BATCH)
    sl.fit(saes, sample(), run, progress=False, mesh=None if shape is None else mesh_of(*shape))
    return [{"history": sae.history_, "weights": dict(sae.state_dict())} for sae in saes]


def test_several_saes_on_the_same_batches(pool: Pool) -> None:
    alone = two_at_once(None)
    for one, found in zip(alone, pool.run(two_at_once, (2, 2))[3], strict=True):
        for key, held in one["weights"].items():
            torch.testing.assert_close(found["weights"][key], held, rtol=1e-4, atol=1e-5)
        for before, after in zip(one["history"], found["history"], strict=True):
            assert after == pytest.approx(before, rel=2e-6, abs=1e-6)


def beside_another(folder: str) -> str:
    """What each process says where somebody else writes the run's folder."""
    try:
        train_in("topk", folder, (2, 2))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_folder_that_somebody_else_writes(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with hold_folder(folder):
        said = pool.run(beside_another, str(folder))
    assert said[0].startswith("FolderInUse: ")
    assert all("process 0 on " in text and "FolderInUse" in text for text in said[1:])
    assert pool.run(beside_another, str(folder)) == ["trained"] * 4


def beside_a_broken_sink() -> str:
    """What each process says where a logger of the first one fails after some steps."""

    def broken(entry: dict[str, Any]) -> None:
        raise ValueError("no room for the history")

    cfg, run = sl.SAEConfig(**SMALL), sl.TrainConfig(n_tokens=9 * BATCH, batch_size=BATCH, log_every_tokens=3 * BATCH)
    try:
        sl.SAE(cfg).fit(sample(), run, sinks=[broken], progress=False, mesh=mesh_of(2, 2))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_logger_that_fails_stops_all(pool: Pool) -> None:
    said = pool.run(beside_a_broken_sink)
    assert said[0] == "ValueError: no room for the history"
    assert all("process 0 on " in text and "no room for the history" in text for text in said[1:])
    assert pool.run(train, "topk", 2, (2, 2))


def streamed(mesh: Any) -> Any:
    """A stream of activations by the processes outside of a mesh."""
    sizes = {"batch_size": 24, "buffer_tokens": 192, "n_seq": 3}
    if mesh.get_coordinate() is not None:
        return sl.stream(None, None, "blocks.0.hook_resid_post", mesh=mesh, **sizes)
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, [f"{i} cats sat on a mat." for i in range(40)], ctx_len=16)
    return sl.stream(model, tokens, "blocks.0.hook_resid_post", mesh=mesh, **sizes)


def trained_apart(shape: tuple[int, int], folder: str, stop: int = 0) -> dict[str, torch.Tensor] | str | None:
    """Weights of an SAE whose training goes on in a folder while others run the model; what is said where it stops."""

    def interrupt(entry: dict[str, Any]) -> None:
        if entry["step"] == stop:
            signal.raise_signal(signal.SIGTERM)

    mesh = mesh_of(*shape)
    run = sl.TrainConfig(n_tokens=480, batch_size=24, log_every_tokens=24, save_every_tokens=240)
    try:
        with streamed(mesh) as flow:
            if flow.is_reader:
                return flow.serve()
            cfg = sl.SAEConfig(d_in=flow.d_in, d_sae=66, activation=sl.TopK(k=4))
            sae = sl.SAE(cfg, seed=0).fit(
                flow, run, out=folder, resume=True, progress=False, mesh=mesh, sinks=[interrupt]
            )
    except KeyboardInterrupt as stopped:
        return str(stopped)
    assert sae.provenance is not None and sae.provenance.hook_point == "blocks.0.hook_resid_post"
    return {key: held.clone() for key, held in sae.state_dict().items()}


def test_an_sae_is_trained_while_others_run_the_model(pool: Pool, tmp_path: Path) -> None:
    whole = pool.run(trained_apart, (1, 2), str(tmp_path / "whole"))
    said = pool.run(trained_apart, (1, 2), str(tmp_path / "part"), 13)
    assert whole[2:] == said[2:] == [None, None]
    assert all(text.startswith("Training stopped after 13 of 20 steps, saved to") for text in said[:2])
    again = pool.run(trained_apart, (1, 2), str(tmp_path / "part"))
    assert all(torch.equal(again[i][key], held) for i in (0, 1) for key, held in whole[0].items())
    pool.run(trained_apart, (1, 1), str(tmp_path / "other"), 13)
    for key, held in pool.run(trained_apart, (3, 1), str(tmp_path / "other"))[0].items():
        torch.testing.assert_close(held, whole[0][key], rtol=1e-4, atol=1e-5)


def in_a_larger_world() -> str:
    """What is said of a mesh of two axes beside which there are other processes, that have not heard of it."""
    mesh = mesh_of(2, 2)
    with patch("torch.distributed.get_world_size", lambda *_: 5):
        try:
            RankGrid.of(mesh)
        except ValueError as error:
            return str(error)
    return "made"


def test_a_mesh_of_two_axes_beside_others_is_refused(pool: Pool) -> None:
    assert set(pool.run(in_a_larger_world)) == {
        "`mesh` of two axes must hold all 5 processes, got (2, 2); start as many as it has, or give it to `sl.stream` "
        "first, in all of them."
    }
