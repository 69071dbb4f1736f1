"""On an accelerator no tensor meets one of the CPU, and a training step seldom waits for the device: on a fake one.

`READS` has how often a step makes the CPU wait. A smaller number is a faster step: lower the bound with the code.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configurations import CONFIGURATIONS, D_IN, D_SAE, PURSUITS, RECONSTRUCTION, SMALL
from fake_device import FakeDevice, MixedDevices, OnDevice, fake_device
from sampled import one_in
from unchecked import unchecked

import saelab as sl
from saelab.sae import (
    fit_dictionary,
    fit_normalizer,
    make_untrained,
    resample_dead_latents,
    start_from_core,
)
from saelab.sae.activation_registry import ACTIVATIONS
from saelab.sae.fitting import make_run
from saelab.sae.objectives import (
    AuxK,
)
from saelab.training.loop import TrainingRun

BATCH = 96
HOOK = "blocks.1.hook_resid_post"
WIDE = {"d_in": 512, "d_sae": 8192}
"""so wide that a search screens in low precision"""
CASES: dict[str, dict[str, Any]] = {
    **CONFIGURATIONS,
    "wide topk": WIDE,
    "wide batchtopk": {**WIDE, "activation": sl.BatchTopK(k=4)},
    "wide abstopk": {**WIDE, "activation": sl.AbsTopK(k=4)},
    **PURSUITS,
}
READS = {
    "topk": (5, 13),
    "abstopk": (5, 13),
    "batchtopk": (14, 19),
    "batchabstopk": (14, 19),
    "groupmax": (5, 9),
    "relu": (3, 6),
    "log1prelu": (3, 6),
    "jumprelu": (3, 6),
    "absjumprelu": (3, 6),
    "gated": (3, 6),
    "sparsemax": (9, 15),
    "wide topk": (6, 13),
    "wide batchtopk": (17, 30),
    "wide abstopk": (6, 13),
}
"""how often a step may wait: the best of some steps; and the worst, with dead latents and with sizes that are tied"""


def start(name: str, device: str, dead_after_tokens: int | None = None) -> TrainingRun:
    """A run of a case, ready for its first step."""
    settings = SMALL | CASES[name]
    if dead_after_tokens is not None:
        settings["objective"] = (RECONSTRUCTION, AuxK(dead_after_tokens=dead_after_tokens))
    cfg = sl.SAEConfig(**settings)
    x = torch.randn(2000, cfg.d_in, generator=torch.Generator().manual_seed(0))
    acts = x if cfg.d_out is None else (x, 2 * x[:, : cfg.d_out] + 1)
    budget = sl.TrainConfig(n_tokens=12 * BATCH, batch_size=BATCH, n_held_out=200)
    run = make_run([sl.SAE(cfg, seed=0).to(device)], acts, budget, None, None, False)
    run.prepare()
    return run


def train(name: str, device: str, n_steps: int) -> dict[str, Any]:
    """The entry of a run's history after some steps, held-out FVU among it."""
    run = start(name, device)
    for _ in range(n_steps):
        run.train_on(next(run.batches))
    return {**run.entry(), "fvu": run.trainables[0].held_out_fvu(run.held_out)}


@pytest.mark.parametrize("name", one_in(5, CASES, ("topk", "batchtopk", "transcoder")))
@unchecked()
def test_a_training_step_mixes_no_devices_and_computes_the_same(name: str) -> None:
    with fake_device():
        found = train(name, "cuda", 3)
    for key, value in train(name, "cpu", 3).items():
        assert found[key] == (value if value is None else pytest.approx(value, rel=2e-3, abs=1e-4)), key


@pytest.mark.parametrize(
    "name", one_in(3, ["topk", "batchtopk", "wide topk", "gated", "sparsemax", "transcoder", "lista", "whiten"])
)
@pytest.mark.filterwarnings("ignore:at..frobenius_norm is deprecated")  # PyTorch's own `norm` on MPS says so
@unchecked()
def test_a_training_step_runs_without_float64(name: str) -> None:
    """As on Apple's MPS, which is neither "cuda" nor "cpu" either."""
    with fake_device("mps"):
        train(name, "mps", 2)


@pytest.mark.parametrize("name", one_in(4, READS))
@unchecked()
def test_a_training_step_seldom_waits(name: str) -> None:
    usual, most = READS[name]
    counts: dict[int, list[int]] = {}
    places = set()
    for dead_after_tokens in (10**9, 1):
        with fake_device() as device:
            run = start(name, "cuda", dead_after_tokens)
            for _ in range(3 if name.startswith("wide") else 5):
                device.forget()
                run.train_on(next(run.batches))
                counts.setdefault(dead_after_tokens, []).append(device.n_reads)
                places.update(device.reads)
    assert min(counts[10**9]) <= usual and max(map(max, counts.values())) <= most, (counts, sorted(places))


def test_every_activation_has_its_bound() -> None:
    own = {name for name, kind in ACTIVATIONS.items() if kind.__module__.startswith("saelab.")}
    assert own <= set(READS) and set(READS) <= set(CASES)


# What is asked of a trained SAE and its model


@dataclass
class Subject:
    """A model and an SAE on the device, what they were made from on the CPU, and an empty folder."""

    model: Any
    sae: sl.SAE
    tokens: Any
    acts: sl.Activations
    store: sl.FeatureStore
    folder: Path

    @property
    def x(self) -> torch.Tensor:
        return self.acts[:60].to(self.sae.device)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = sl.lm.tiny_model()
    animals = ("fox", "hen", "cow", "owl")
    texts = [f"The {one} met the {other}." for one in animals for other in animals]
    tokens = sl.tokenize(model, texts, ctx_len=24)
    acts = sl.collect(model, tokens, HOOK, progress=False)
    cfg = sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4))
    sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=1920, batch_size=BATCH), progress=False)
    store = sl.harvest(sae, model, tokens, tmp_path_factory.mktemp("store") / "store", progress=False)
    return Subject(model, sae, tokens, acts, store, tmp_path_factory.mktemp("nothing"))


@pytest.fixture
def subject(on_cpu: Subject, tmp_path: Path) -> Iterator[tuple[Subject, FakeDevice]]:
    with fake_device() as device:
        model = sl.load_model("tiny", device="cuda")
        sae = copy.deepcopy(on_cpu.sae).to("cuda")
        yield Subject(model, sae, on_cpu.tokens, on_cpu.acts, on_cpu.store, tmp_path), device


def encode(s: Subject) -> None:
    z, codes = s.sae.encode(s.x), s.sae.encode_sparse(s.x)
    assert torch.equal(z.cpu(), codes.to_dense().cpu())
    assert torch.equal(s.sae.encode_latents(s.x, [1, 5]).cpu(), z[:, [1, 5]].cpu())
    for x_hat in (s.sae.decode(z, x=s.x), s.sae.decode(codes, x=s.x), s.sae(s.x)):
        assert isinstance(x_hat, OnDevice)
    assert not isinstance(s.sae(s.acts[:9]), OnDevice)  # comes back to where it was


def variants(s: Subject) -> None:
    s.sae.with_k(2).encode(s.x)
    s.sae.fold()(s.x)
    s.sae.prune(0.1)(s.x)
    s.sae.to_jumprelu(s.acts[:200]).encode_sparse(s.x)
    s.sae.for_saebench().encode(s.x)
    make_untrained(s.sae, s.acts[:200])(s.x)
    resample_dead_latents(copy.deepcopy(s.sae), s.acts[:200], [1, 2])
    start_from_core(copy.deepcopy(s.sae), [1, 2], s.acts[:200])


def save(s: Subject) -> None:
    s.sae.save_pretrained(s.folder / "sae")
    assert (s.folder / "sae" / "model.safetensors").is_file()


def collect(s: Subject) -> None:
    found = sl.collect(s.model, s.tokens, HOOK, progress=False)
    torch.testing.assert_close(found[:], s.acts[:], rtol=1e-4, atol=1e-5)
    mask = sl.TokenMask(max_norm_ratio=5.0)
    sl.collect(s.model, s.tokens, [HOOK, "blocks.0.hook_mlp_out"], s.folder / "acts", mask=mask, progress=False)


def stream(s: Subject) -> None:
    batches = sl.stream(s.model, s.tokens, HOOK, batch_size=BATCH, buffer_tokens=1024)
    assert isinstance(next(batches), OnDevice)
    run = make_run([s.sae], batches, sl.TrainConfig(n_tokens=2 * BATCH, batch_size=BATCH), None, None, False)
    run.train_on(next(run.batches))


def harvest(s: Subject) -> None:
    store = sl.harvest(s.sae, s.model, s.tokens, s.folder / "store", progress=False)
    found, expected = store.matrix().toarray(), s.store.matrix().toarray()
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-5)  # values are stored as float16


def evaluate(s: Subject) -> None:
    sl.evaluate(s.sae, s.model, s.tokens, n_bootstrap=5, progress=False)


def splice(s: Subject) -> None:
    with sl.splice(s.model, s.sae):
        assert isinstance(s.model(s.tokens.ids.to("cuda")).logits, OnDevice)


def steer(s: Subject) -> None:
    for mode in ("add", "clamp", "scale", "ablate"):
        with sl.steer(s.model, s.sae, {3: 2.0, 5: 1.0}, mode=mode, where="prompt"):
            sl.generate(s.model, ["The cat", "The dog met the"], n_tokens=2, progress=False)
    with sl.steer(s.model, s.sae, {3: 2.0}, unit="max", store=s.store):
        sl.generate(s.model, "The cat", n_tokens=2, n=2, progress=False)


def steer_along_a_direction(s: Subject) -> None:
    direction = sl.Direction(vector=torch.ones(32), hook_point=HOOK, name="ones")
    with sl.steer(s.model, direction, 2.0):
        sl.generate(s.model, "The cat", n_tokens=2, progress=False)
    sl.interventions.resample_ablation(s.model, ["The fox met the", "The cow met the"], direction, "!")


def steer_to_a_prototype(s: Subject) -> None:
    means = sl.interventions.mean_codes(s.sae, s.x, ["a", "b"] * 30)
    with sl.interventions.steer_to_prototype(s.model, s.sae, means, "a", n_steps=2):
        sl.generate(s.model, "The cat", n_tokens=2, progress=False)


def attribute(s: Subject) -> None:
    for method in ("gradient", "integrated", "relp", "attnlrp", "exact"):
        sl.interventions.attribute(s.model, s.sae, "The fox met the", ("!", "a"), method=method, progress=False)
    sl.interventions.patch(s.model, "The fox met the", "The cow met the", ("f", "c"), sources=HOOK)


def analyze(s: Subject) -> None:
    sl.analysis.logit_lens(s.sae, s.model, [3], n=5)
    sl.analysis.read_prompt(s.sae, s.model, "The cat met", s.sae.provenance, predict=True)
    sl.analysis.prune_dictionary(s.sae, s.model, s.tokens, sizes=(16, 64))
    sl.analysis.similar_features(s.sae, 3)
    sl.evaluation.spectrum(s.acts, s.model, s.tokens)
    sl.evaluation.description_length(s.sae, s.acts[:200], bins=(4, 8), baselines=False)
    sl.compare(s.sae, s.sae, progress=False)


def fit_others(s: Subject) -> None:
    fit_normalizer(sl.SAE(s.sae.cfg, seed=1).to("cuda"), s.acts)
    for method in ("ica", "pca", "kmeans", "random"):
        fit_dictionary(s.acts[:200].to("cuda"), method)  # type: ignore[arg-type]
    sl.probing.fit_direction(s.x, torch.arange(60) % 2 == 0, HOOK)


USES: tuple[Callable[[Subject], None], ...] = (
    encode, variants, save, collect, stream, harvest, evaluate, splice, steer, steer_along_a_direction,
    steer_to_a_prototype, attribute, analyze, fit_others,
)  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@unchecked()
def test_what_is_done_with_an_sae_mixes_no_devices(subject: tuple[Subject, FakeDevice], use: Any) -> None:
    use(subject[0])


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_whole_run_mixes_no_devices(where: str, tmp_path: Path) -> None:
    with fake_device():
        x = torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(0))
        cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.BatchTopK(k=4))
        budget = sl.TrainConfig(n_tokens=4 * BATCH, batch_size=BATCH, n_held_out=200)
        sae = sl.SAE(cfg, seed=0).to("cuda").fit(x.to(where), budget, out=tmp_path, progress=False)
        assert sae.training_ is not None


# The fake device itself


def test_mixed_devices_are_refused_as_an_accelerator_refuses_them() -> None:
    with fake_device():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mix in (
            lambda: there + here,
            lambda: here.add_(there),
            lambda: torch.tensor(1.0).add_(there[0]),
            lambda: torch.cat([there, here]),
            lambda: torch.stack([there[0], torch.tensor(1.0)]),
            lambda: here[torch.tensor([0, 1], device="cuda")],
            lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
            lambda: torch.add(there, there, out=here),
            lambda: there.numpy(),
        ):
            with pytest.raises(MixedDevices):
                mix()
        for fine in (there + torch.tensor(1.0), there[torch.tensor([0, 1])], there.copy_(here), here.to(there)):
            assert isinstance(fine, OnDevice) and fine.device == torch.device("cuda", 0)
        assert not isinstance(there.cpu(), OnDevice) and torch.ones(2).device.type == "cpu"
    with fake_device("mps"), pytest.raises(MixedDevices, match="float64"):
        torch.ones(2, device="mps").double()


def test_waiting_for_the_device_is_counted() -> None:
    with fake_device() as device:
        x = torch.arange(4.0, device="cuda")
        for wait in (
            lambda: float(x[1]), lambda: bool(x.sum() > 0), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[x > 1],
            lambda: x.cpu(), lambda: torch.equal(x, x), lambda: x.unique(), lambda: torch.zeros(4).copy_(x),
        ):  # fmt: skip
            device.forget()
            wait()
            assert device.n_reads == 1
        first = torch.tensor([0], device="cuda")
        device.forget()
        _ = (x * 2).sum() + x[first]
        assert device.n_reads == 0 and not device.sent
        _ = torch.tensor([1.0], device="cuda"), torch.ones(2).to(x), x[torch.tensor([0])]
        assert sum(device.sent.values()) == 3


def test_lists_of_numbers_index_as_they_do_on_the_cpu() -> None:
    stranger = torch.empty(2, device="meta")
    with fake_device():
        here = torch.arange(12.0).view(3, 4)
        there = here.to("cuda")
        for index in ([], [2, 0], (slice(None), [1, 3]), np.array([1]), ([0, 1], [2, 3])):
            assert torch.equal(there[index].cpu(), here[index])
        there[:, [1, 3]] = 7
        assert there.cpu()[:, 1].tolist() == [7, 7, 7] and there.cpu()[0, 0] == 0
        with pytest.raises(MixedDevices, match="does not know"):
            stranger.relu()


def test_gradients_are_those_of_the_cpu() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    there_and_here = []
    with fake_device():
        for device in ("cuda", "cpu"):
            w = x.T.contiguous().to(device, copy=True).requires_grad_()
            (x.to(device) @ w).relu().square().sum().backward()
            assert w.grad is not None
            there_and_here.append(w.grad.cpu())
    assert torch.equal(*there_and_here) and bool(there_and_here[0].any())


def test_a_fault_in_saelab_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a normalizer forgets where it is."""
    run = None
    with fake_device():
        run = start("topk", "cuda")
        monkeypatch.setattr(type(run.trainables[0].sae.normalizer), "normalize", lambda self, x: x.cpu())  # type: ignore[attr-defined]
        with pytest.raises(MixedDevices, match=r"saelab/sae/\w+\.py:\d+"):
            run.train_on(next(run.batches))
