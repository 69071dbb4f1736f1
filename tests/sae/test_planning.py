"""A plan says what training takes: memory to 20 %, files and messages to the byte, time by the rates it is given."""

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Pool, mesh_of
from sampled import one_in

import saelab as sl
from saelab.functional import compiled
from saelab.sae import planning
from saelab.sae.planning import StepRates, measure_rates, plan_training, read_rates

MESHES = ((1, 4), (2, 2), (4, 1))
BATCH, D_IN, D_SAE = 256, 16, 512
TRAIN = """
import sys, torch
import saelab as sl
d_in, d_sae = int(sys.argv[1]), int(sys.argv[2])
x = torch.randn(20_000, d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
activation = sl.BatchTopK(k=32) if sys.argv[3] == "batchtopk" else sl.TopK(k=32)
cfg = sl.SAEConfig(d_in=d_in, d_sae=d_sae, activation=activation)
sl.SAE(cfg, seed=0).fit(x, sl.TrainConfig(n_tokens=3 * 4096, batch_size=4096), progress=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from Linux")
@pytest.mark.parametrize(
    ("d_in", "d_sae", "activation"),
    [
        (768, 16_384, sl.TopK(k=32)),
        pytest.param(256, 16_384, sl.TopK(k=32), marks=pytest.mark.slow),
        pytest.param(256, 65_536, sl.TopK(k=32), marks=pytest.mark.slow),
        pytest.param(256, 16_384, sl.BatchTopK(k=32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_memory_is_that_of_a_process_that_trains(d_in: int, d_sae: int, activation: Any) -> None:
    """The narrow ones are largest at the start, the others in a step."""
    words = [str(d_in), str(d_sae), activation.name]
    said = subprocess.run([sys.executable, "-c", TRAIN, *words], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    measured = int(said.stdout) * 2**10
    cfg = sl.SAEConfig(d_in=d_in, d_sae=d_sae, activation=activation)
    plan = plan_training(cfg, sl.TrainConfig(n_tokens=3 * 4096, batch_size=4096), dtype=torch.bfloat16, n_tokens=20_000)
    planned = plan.peak_bytes + 20_000 * d_in * 2  # the tensor, which is not read from a folder
    assert planned == pytest.approx(measured, rel=0.2)
    at_start = sum(plan.start_bytes.values()) > sum(plan.step_bytes.values())
    assert at_start == (d_in == 256)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": sl.TopK(k=4)},
        {"activation": sl.BatchTopK(k=4), "normalizer": "whiten", "dictionary": "frozen", "optim_bits": 16},
    ],
    ids=str,
)
def test_files_have_the_sizes_that_were_planned(
    tiny: Any, tiny_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    monkeypatch.setattr(planning, "SHARD_TOKENS", 600)
    hook_point = "blocks.1.hook_resid_post"
    acts = sl.collect(
        tiny, tiny_tokens, hook_point, tmp_path / "acts", dtype=torch.bfloat16, shard_tokens=600, progress=False
    )
    run = sl.TrainConfig(n_tokens=1024, batch_size=256, optim_bits=settings.pop("optim_bits", 32))
    cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=4096, **settings)  # some weights have several blocks of checksums
    sae = sl.SAE(cfg, seed=0).fit(acts, run, out=tmp_path / "run", progress=False)
    sae.save_pretrained(tmp_path / "sae")
    disk = plan_training(cfg, run, dtype=torch.bfloat16, n_tokens=acts.n_tokens).disk_bytes
    found = [tensor_bytes(tmp_path / name) for name in ("acts", "sae", "run/checkpoint")]
    assert list(disk.values()) == found and acts.n_tokens > 1200


def tensor_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pool = Pool()
    yield pool
    pool.close()


def config(batch: bool, dead_after_tokens: int) -> sl.SAEConfig:
    return sl.SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=sl.BatchTopK(k=4) if batch else sl.TopK(k=4),
        objective=(sl.ReconstructionLoss(), sl.AuxK(k=3, dead_after_tokens=dead_after_tokens)),
    )


def count_sent(shape: tuple[int, int], batch: bool, dead_after_tokens: int, n_steps: int) -> float:
    """Bytes that this process would send in rings, while it trains in a mesh."""
    x = torch.randn(4000, D_IN, generator=torch.Generator().manual_seed(0))
    rare = 10**9
    run = sl.TrainConfig(
        n_tokens=n_steps * BATCH, batch_size=BATCH, n_held_out=0, log_every_tokens=rare, save_every_tokens=rare
    )
    sent, kept = 0.0, {}

    def counted(name: str, bytes_of: Any) -> Any:
        kept[name] = call = getattr(torch.distributed, name)

        def send(*args: Any, **options: Any) -> Any:
            nonlocal sent
            size = torch.distributed.get_world_size(options["group"])
            sent += bytes_of(*args, size)
            return call(*args, **options)

        return send

    forms = {
        "all_reduce": lambda x, size: 2 * x.nbytes * (size - 1) / size,
        "all_gather": lambda found, x, size: x.nbytes * (size - 1),
        "broadcast": lambda x, *rest: x.nbytes * (rest[-1] - 1) / rest[-1],
    }
    for name, form in forms.items():
        setattr(torch.distributed, name, counted(name, form))
    try:
        sl.SAE(config(batch, dead_after_tokens), seed=0).fit(x, run, progress=False, mesh=mesh_of(*shape))
    finally:
        for name, call in kept.items():
            setattr(torch.distributed, name, call)
    return sent


NEVER, AT_ONCE = 10**9, 1


@pytest.mark.parametrize(
    ("shape", "dead_after_tokens"), one_in(6, itertools.product(MESHES, (NEVER, AT_ONCE))), ids=str
)
def test_bytes_sent_are_those_that_a_process_sends(pool: Pool, shape: tuple[int, int], dead_after_tokens: int) -> None:
    """Steps 5 to 7 of a run, as what is sent before and after them is the same in a run of 4 steps."""
    longer, shorter = (pool.run(count_sent, shape, False, dead_after_tokens, n)[0] for n in (7, 4))
    plan = plan_training(config(False, dead_after_tokens), sl.TrainConfig(n_tokens=BATCH, batch_size=BATCH), *shape)
    planned = sum(plan.sent_bytes.values()) + (plan.sent_while_dead if dead_after_tokens == AT_ONCE else 0)
    assert planned == pytest.approx((longer - shorter) / 3, abs=1e-6)
    assert plan.sent_while_dead > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_bytes_sent_for_a_batch_activation_are_about_right(pool: Pool, shape: tuple[int, int]) -> None:
    longer, shorter = (pool.run(count_sent, shape, True, NEVER, n)[0] for n in (7, 4))
    plan = plan_training(config(True, NEVER), sl.TrainConfig(n_tokens=BATCH, batch_size=BATCH), *shape)
    assert sum(plan.sent_bytes.values()) == pytest.approx((longer - shorter) / 3, rel=0.1)


def test_one_process_sends_nothing_and_shares_shrink() -> None:
    cfg, run = sl.SAEConfig(d_in=768, d_sae=98_304, activation=sl.TopK(k=32)), sl.TrainConfig(n_tokens=10**9)
    alone, four = plan_training(cfg, run), plan_training(cfg, run, 1, 4)
    assert not alone.sent_bytes and alone.sent_while_dead == 0
    per_latent = 2 * 768 + 1
    assert alone.n_parameters == four.n_parameters == 98_304 * per_latent + 768
    assert four.step_bytes["gradients"] == 4 * (98_304 // 4 * per_latent + 768)
    assert four.disk_bytes["SAE"] == alone.disk_bytes["SAE"] and four.peak_bytes < 0.6 * alone.peak_bytes


def test_moments_in_16_bits_take_half_and_kept_products_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, matrices = 131_072 + 768, 2 * 131_072 * 768
    cfg = sl.SAEConfig(d_in=768, d_sae=131_072, activation=sl.TopK(k=32))

    def count(optim_bits: int, n_data: int = 1, batch_size: int = 4096) -> tuple[int, int]:
        run = sl.TrainConfig(n_tokens=10**9, batch_size=batch_size, optim_bits=optim_bits)
        bytes_of = plan_training(cfg, run, n_data).step_bytes
        return bytes_of["gradients"], bytes_of["Adam's moments"]

    whole = 4 * (matrices + vectors)
    monkeypatch.setenv("SAELAB_NUMBA", "0")
    assert count(32) == (whole, 2 * whole) and count(16) == (whole, 2 * whole - 4 * matrices)
    monkeypatch.delenv("SAELAB_NUMBA")
    monkeypatch.setattr(compiled, "has_numba", lambda: True)
    assert count(16) == (4 * vectors, 2 * whole - 4 * matrices)
    assert count(32, batch_size=3 * 4096)[0] == 4 * vectors
    assert count(32, batch_size=3 * 4096 + 1)[0] == count(32, n_data=2)[0] == whole


def test_rates_are_found_from_the_times_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    true = StepRates(product=2e-12, codes=3e-9, weights=5e-9, step=0.01)
    monkeypatch.setattr(
        planning, "_time_steps", lambda cfg, n_rows, seed: true.seconds(cfg, n_rows, cfg.d_sae, cfg.activation.k)
    )
    cfg = sl.SAEConfig(d_in=512, d_sae=131_072, activation=sl.TopK(k=16))
    found = measure_rates(cfg, link=1e9)
    for name in ("product", "codes", "weights", "step"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    run = sl.TrainConfig(n_tokens=4096 * 1000)
    plan = plan_training(cfg, run, 2, 4, rates=found)
    here = 2048 * (131_072 / 4 * 512 * 2e-12 + 16 / 4 * 512 * 3e-9) + 131_072 / 4 * 512 * 5e-9 + 0.01
    assert plan.seconds_per_step == pytest.approx(here + sum(plan.sent_bytes.values()) / 1e9)
    assert plan.seconds == pytest.approx(1000 * plan.seconds_per_step)


def test_steps_that_are_timed_are_real() -> None:
    cfg = sl.SAEConfig(d_in=8, d_sae=64, activation=sl.TopK(k=4))
    found = measure_rates(cfg)
    assert found.seconds(cfg, 4096, 64, 4) > 0


def test_a_plan_prints_and_its_rates_are_read_again(tmp_path: Path) -> None:
    rates = StepRates(1e-12, 2e-9, 3e-9, link=1e9)
    cfg = sl.SAEConfig(d_in=64, d_sae=256, activation=sl.TopK(k=4))
    plan = plan_training(cfg, sl.TrainConfig(n_tokens=40_960, batch_size=4096), 2, 2, rates=rates)
    text = str(plan)
    for part in ("2x2 (data x latents)", "peak", "checkpoint", "decoded rows", "time of the run", "without AuxK"):
        assert part in text
    plan.save(tmp_path / "plan.json")
    rates.save(tmp_path / "rates.json")
    for name in ("plan", "rates"):
        assert read_rates(json.loads((tmp_path / f"{name}.json").read_text())) == rates


@pytest.mark.parametrize("plain", [{}, {"product": 1.0}, {"product": -1, "codes": 1, "weights": 1}, {"rates": {}}])
def test_other_files_of_rates_are_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Rates must be numbers"):
        read_rates(plain)


@pytest.mark.parametrize(
    ("settings", "ranks", "said"),
    [
        ({"activation": sl.ReLU(target_l0=4.0)}, (1, 1), "number k of latents"),
        ({"encoder": sl.OrthogonalMatchingPursuit(), "activation": sl.AbsTopK(k=4)}, (1, 1), "linear encoder"),
        ({}, (1, 3), "must divide"),
        ({}, (3, 1), "must divide"),
        ({"activation": sl.GroupMax(k=2)}, (1, 4), "divide the groups"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], ranks: tuple[int, int], said: str) -> None:
    cfg = sl.SAEConfig(**{"d_in": 16, "d_sae": 64, "activation": sl.TopK(k=4)} | settings)
    with pytest.raises(ValueError, match=said):
        plan_training(cfg, sl.TrainConfig(n_tokens=4096), *ranks)
