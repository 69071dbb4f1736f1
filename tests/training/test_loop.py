"""Training: seeded, resumable to the bit, safe when killed, clear when the data or the disk is not what it should be.

Numbers of defects refer to the list of peers' defects that the project keeps.
"""

import csv
import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from processes import Child
from unchecked import unchecked

import saelab as sl
from saelab.collecting.collection import stream
from saelab.stores import files
from saelab.training.optimizer import clip_gradients

D_IN, D_SAE = 8, 24
RUN = sl.TrainConfig(n_tokens=12 * 40, batch_size=40, log_every_tokens=80, save_every_tokens=160, n_held_out=50)


def data(n=600, seed=0):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)).cumsum(1)


def config(activation=None, **axes):
    aux = sl.AuxK(dead_after_tokens=120, k=3)
    return sl.SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=activation or sl.TopK(k=3),
        **{"objective": (sl.ReconstructionLoss(), aux)} | axes,
    )


KINDS = {
    "topk": config(),
    "batchabstopk": config(sl.BatchAbsTopK(k=3), prefixes=sl.RandomPrefixes(n=3, smallest=4)),
    "jumprelu": config(sl.JumpReLU(target_l0=3.0), prefixes=(4, 12, D_SAE), normalizer="whiten"),
    "gated": config(sl.sae.Gated(target_l0=3.0), prefixes=(4, 12, D_SAE)),
    "absjumprelu": config(sl.sae.AbsJumpReLU(target_l0=3.0)),
    "relu": config(sl.ReLU(target_l0=0.5), dictionary="free", init="data"),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
few_kinds = pytest.mark.parametrize("kind", ["batchabstopk", "jumprelu"])


def fit(cfg, x=None, run=RUN, seed=0, **arguments):
    return sl.SAE(cfg, seed=seed).fit(data() if x is None else x, run, progress=False, **arguments)


def bits(sae):
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_folders(one, other):
    one, other = contents(one), contents(other)
    assert list(one) == list(other) and len(one) >= 6
    for name in one:
        assert one[name] == other[name], name


class StopError(Exception):
    """Ends a run from outside, as a crash would."""


def stop_at(step):
    def sink(entry):
        if entry["step"] == step:
            raise StopError

    return sink


class Faulty:
    """Batches that go wrong at some step."""

    d_in = D_IN

    def __init__(self, bad_from, end=10**9):
        self.step, self.bad_from, self.end = 0, bad_from, end

    def __next__(self):
        if self.step == self.end:
            raise StopIteration
        self.step += 1
        batch = data(40, seed=self.step)
        if self.step > self.bad_from:
            batch[5] = torch.nan
        return batch

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


# --- seeds: peers' defects 5 and 16 (a seed that does nothing)


@each_kind
def test_same_seed_same_bits_and_other_seeds_other_bits(kind):
    before = torch.get_rng_state()
    first = bits(fit(KINDS[kind]))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1234)  # nothing is drawn from the global state
    assert same(first, bits(fit(KINDS[kind])))
    torch.set_rng_state(before)
    assert not same(first, bits(fit(KINDS[kind], seed=1)))
    assert not same(first, bits(fit(KINDS[kind], run=replace(RUN, seed=1))))


def test_training_together_is_training_alone():
    together = [sl.SAE(cfg, seed=i) for i, cfg in enumerate(KINDS.values())]
    sl.fit(together, data(), RUN, progress=False)
    for i, (sae, cfg) in enumerate(zip(together, KINDS.values(), strict=True)):
        alone = fit(cfg, seed=i)
        assert same(bits(sae), bits(alone))
        mine = [
            {k.removeprefix(f"{i}/"): v for k, v in e.items() if "/" not in k or k.startswith(f"{i}/")}
            for e in sae.history_
        ]
        assert mine == alone.history_
        assert {k: v for k, v in sae.training_.items() if k != "last"} == {
            k: v for k, v in alone.training_.items() if k != "last"
        }


# --- resuming: peers' defects 6 and 7


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The SAE of a kind and the folder of its run, which nothing stopped; each is made once."""

    @cache
    def trained(kind):
        folder = tmp_path_factory.mktemp("whole") / kind
        return fit(KINDS[kind], out=folder), folder

    return trained


@pytest.mark.parametrize("stop", [2, 10])
@each_kind
def test_a_crashed_run_goes_on_bit_for_bit(kind, stop, whole, tmp_path):
    wanted, folder = whole(kind)
    with pytest.raises(StopError):
        fit(KINDS[kind], out=tmp_path, sinks=[stop_at(stop)])
    resumed = fit(KINDS[kind], out=tmp_path, resume=True)
    assert same(bits(wanted), bits(resumed)) and wanted.training_ == resumed.training_
    assert json.dumps(wanted.history_) == json.dumps(resumed.history_)
    assert_same_folders(folder, tmp_path)


def test_several_saes_go_on_bit_for_bit(tmp_path):
    def train(folder, **arguments):
        saes = [sl.SAE(cfg, seed=i) for i, cfg in enumerate(KINDS.values())]
        sl.fit(saes, data(), RUN, out=tmp_path / folder, progress=False, **arguments)

    train("whole")
    with pytest.raises(StopError):
        train("crashed", sinks=[stop_at(6)])
    train("crashed", resume=True)
    assert_same_folders(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize("stop", [7])
def test_a_streamed_run_goes_on_bit_for_bit(tiny, tiny_tokens, stop, tmp_path):
    cfg = sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4))
    run = sl.TrainConfig(n_tokens=12 * 64, batch_size=64, save_every_tokens=192, log_every_tokens=64)

    def train(folder, **arguments):
        batches = stream(tiny, tiny_tokens, "blocks.0.hook_resid_post", batch_size=64, buffer_tokens=512, n_seq=4)
        return sl.SAE(cfg).fit(batches, run, out=tmp_path / folder, progress=False, **arguments)

    whole = train("whole")
    with pytest.raises(StopError):
        train("crashed", sinks=[stop_at(stop)])
    assert same(bits(whole), bits(train("crashed", resume=True)))
    assert_same_folders(tmp_path / "whole", tmp_path / "crashed")


def test_resuming_what_is_finished_or_never_began(tmp_path):
    fresh = fit(KINDS["topk"], out=tmp_path, resume=True)  # nothing there yet: starts anew
    before = contents(tmp_path)
    again = fit(KINDS["topk"], out=tmp_path, resume=True)
    assert same(bits(fresh), bits(again)) and contents(tmp_path) == before


def test_resuming_writes_no_checkpoints_that_are_not_due(tmp_path, monkeypatch):
    """Defect 7: one spurious checkpoint a step after resuming."""
    with pytest.raises(StopError):
        fit(KINDS["topk"], out=tmp_path, sinks=[stop_at(6)])
    saved = []
    from saelab.training import checkpoint, loop

    write = checkpoint.save_checkpoint
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda f, progress, *a: saved.append(progress["step"]) or write(f, progress, *a)
    )
    fit(KINDS["topk"], out=tmp_path, resume=True)
    assert saved == [8, 12]


@pytest.mark.parametrize(
    "change", [{"lr": 1e-4}, {"seed": 3}, {"n_tokens": 24 * 40}, {"batch_size": 20}, {"betas": (0.5, 0.9)}]
)
def test_changed_settings_are_refused_on_resume(change, tmp_path):
    with pytest.raises(StopError):
        fit(KINDS["topk"], out=tmp_path, sinks=[stop_at(6)])
    before = contents(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=next(iter(change))):
        fit(KINDS["topk"], run=replace(RUN, **change), out=tmp_path, resume=True)
    assert contents(tmp_path / "checkpoint") == before


@pytest.mark.parametrize(
    "other",
    [
        config(sl.TopK(k=2)),
        config(sl.AbsTopK(k=3)),
        config(prefixes=(4, D_SAE)),
        config(dictionary="free"),
        config(objective=(sl.ReconstructionLoss(),)),
    ],
)
def test_another_sae_is_refused_on_resume(other, tmp_path):
    """All of these have weights of the same shapes, so only the config tells them apart."""
    with pytest.raises(StopError):
        fit(KINDS["topk"], out=tmp_path, sinks=[stop_at(6)])
    with pytest.raises(ValueError, match="resumed run must keep"):
        fit(other, out=tmp_path, resume=True)


def test_other_data_is_refused_on_resume(tmp_path):
    with pytest.raises(StopError):
        fit(KINDS["topk"], out=tmp_path, sinks=[stop_at(6)])
    with pytest.raises(ValueError, match="`n_tokens` must be what it was"):
        fit(KINDS["topk"], x=data(900), out=tmp_path, resume=True)


# --- real processes


def train_slowly(folder):
    fit(KINDS["batchabstopk"], out=folder, sinks=[lambda entry: time.sleep(0.15)])


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_goes_on_to_the_same_bytes(sent, whole, tmp_path):
    """Defect 6: Ctrl-C that saves nothing. What is resumed here is what another process left."""
    history = tmp_path / "stopped/history.jsonl"
    process = Child(tmp_path / "errors.txt", train_slowly, tmp_path / "stopped")
    process.wait_until(lambda: history.exists() and len(history.read_text().splitlines()) >= 3)  # after step 6
    process.send(sent)
    code, text = process.wait()
    saved = json.loads((tmp_path / "stopped/checkpoint/progress.json").read_text())["step"]
    if sent == signal.SIGKILL:
        assert code == -signal.SIGKILL and saved in (4, 8)
    else:
        assert code == 1 and 6 <= saved < 12
        assert (
            f"KeyboardInterrupt: Training stopped after {saved} of 12 steps, saved to" in text and "resume=True" in text
        )
    fit(KINDS["batchabstopk"], out=tmp_path / "stopped", resume=True)
    assert_same_folders(whole("batchabstopk")[1], tmp_path / "stopped")


def test_a_second_interrupt_stops_at_once_and_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def twice(entry):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(KINDS["topk"], out=tmp_path, sinks=[twice])
    assert signal.getsignal(signal.SIGINT) is before
    fit(KINDS["topk"])
    assert signal.getsignal(signal.SIGINT) is before


class Interrupting(Faulty):
    """Ctrl-C comes while the batch of one step is read."""

    def __next__(self):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__next__()


def test_an_interrupt_between_two_entries_loses_no_sum(tmp_path, monkeypatch):
    """The run stops after step 7, where neither an entry nor a checkpoint is due."""
    run = replace(RUN, log_every_tokens=120)
    monkeypatch.setattr("saelab.training.loop.SAMPLE_TOKENS", 160)
    sl.SAE(KINDS["topk"]).fit(Faulty(99), run, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt, match="after 7 of 12 steps"):
        sl.SAE(KINDS["topk"]).fit(Interrupting(99), run, out=tmp_path / "stopped", progress=False)
    sl.SAE(KINDS["topk"]).fit(Faulty(99), run, out=tmp_path / "stopped", resume=True, progress=False)
    assert_same_folders(tmp_path / "whole", tmp_path / "stopped")


def test_an_interrupt_without_a_folder_says_that_nothing_is_saved():
    with pytest.raises(KeyboardInterrupt, match=r"after 2 of 12 steps, not saved: no folder given"):
        fit(KINDS["topk"], sinks=[lambda entry: os.kill(os.getpid(), signal.SIGINT)])


# --- bad data


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_are_refused_at_once(bad, tmp_path):
    x = data()
    x[77, 3] = bad
    sae = sl.SAE(KINDS["topk"])
    with pytest.raises(ValueError, match=r"Activations must be finite, 1 of 40 tokens"):
        sae.fit(x, RUN, out=tmp_path, progress=False)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize(
    ("batches", "match"), [(Faulty(9), "Activations must be finite"), (Faulty(99, 9), "data must last")]
)
def test_data_that_goes_wrong_late_loses_nothing(batches, match, tmp_path, monkeypatch):
    monkeypatch.setattr("saelab.training.loop.SAMPLE_TOKENS", 160)
    whole = sl.SAE(KINDS["topk"]).fit(Faulty(99), RUN, progress=False)
    sae = sl.SAE(KINDS["topk"])
    with pytest.raises(ValueError, match=match) as raised:
        sae.fit(batches, RUN, out=tmp_path, progress=False)
    assert "9" in str(raised.value) and json.loads((tmp_path / "checkpoint/progress.json").read_text())["step"] == 9
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())
    # once there is more data the run goes on as if nothing had been; a faulty batch is left out
    resumed = sl.SAE(KINDS["topk"]).fit(Faulty(99), RUN, out=tmp_path, resume=True, progress=False)
    assert resumed.training_["n_tokens_seen"] == 480
    assert same(bits(whole), bits(resumed)) == (batches.end == 9)


def test_data_that_lasts_just_long_enough(tiny, tiny_tokens):
    """A first look at the data must not ask for more of it than training would."""
    batches = Faulty(99, end=2)
    sl.SAE(KINDS["topk"]).fit(batches, replace(RUN, n_tokens=80), progress=False)


def test_data_shorter_than_the_run_is_passed_over_again():
    assert fit(KINDS["topk"], x=data(100)).training_["n_tokens_seen"] == 480


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match=r"`d_in` of the SAE must be the activations' \(9\), got 8"):
        fit(KINDS["topk"], x=torch.zeros(600, 9))


def test_too_few_tokens_are_named():
    with pytest.raises(ValueError, match=r"`batch_size` must be at most the 27 tokens to train on, got 40"):
        fit(KINDS["topk"], x=data(30))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_tokens": 39}, "batch"),
        ({"batch_size": 0}, "batch"),
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": -1e-3}, "`lr` must be positive"),
        ({"warmup_frac": 0.9, "decay_frac": 0.2}, "must share one run"),
        ({"decay_frac": -0.1}, "must share one run"),
        ({"clip_norm": 0.0}, "`clip_norm` must be positive"),
        ({"log_every_tokens": 0}, "`log_every_tokens` must be at least 1"),
        ({"save_every_tokens": 0}, "`save_every_tokens` must be at least 1"),
    ],
)
def test_wrong_settings_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        replace(RUN, **change)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
@pytest.mark.parametrize(
    "x",
    [torch.ones(600, D_IN), torch.zeros(600, D_IN), 1e4 * data(), 1e-6 * data()],
    ids=["ones", "zeros", "large", "small"],
)
def test_odd_data_trains_to_finite_weights(kind, x):
    sae = fit(KINDS[kind], x=x)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values()) and sae(x).isfinite().all()


# --- bad disks


def test_a_full_disk_leaves_the_old_checkpoint(whole, tmp_path, monkeypatch):
    write, n_writes = files._write, []

    def full(*arguments):
        n_writes.append(1)
        if len(n_writes) > 14:  # in the middle of a checkpoint's files
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(OSError, match="full"):
            fit(KINDS["topk"], out=tmp_path / "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["checkpoint", "history.csv", "history.jsonl"]
    assert json.loads((tmp_path / "full/checkpoint/progress.json").read_text())["step"] in (4, 8)
    assert same(bits(whole("topk")[0]), bits(fit(KINDS["topk"], out=tmp_path / "full", resume=True)))
    assert_same_folders(whole("topk")[1], tmp_path / "full")


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    seen = []
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match="file"):
            fit(KINDS["topk"], out=out, sinks=[seen.append])
    assert not seen and (tmp_path / "file").read_text() == "not a folder"


# --- history: peers' defects 14 and 27


@few_kinds
def test_logging_and_saving_do_not_change_training(kind, tmp_path):
    often = replace(RUN, log_every_tokens=40, save_every_tokens=40)
    never = replace(RUN, log_every_tokens=10**6, save_every_tokens=10**6, n_held_out=50)
    assert same(bits(fit(KINDS[kind], run=often, out=tmp_path)), bits(fit(KINDS[kind], run=never)))


@few_kinds
def test_history_files_say_the_same_in_every_row(kind, tmp_path):
    sae = fit(KINDS[kind], out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert lines == sae.history_ and [entry["step"] for entry in lines] == list(range(2, 13, 2))
    for entry, row in zip(lines, rows[1:], strict=True):
        assert len(row) == len(rows[0]) and list(entry) == rows[0]
        assert [float(cell) if cell else None for cell in row] == list(entry.values())
    assert {"reconstruction", "l0", "dead_frac", "lr", "held_out_fvu", "aux"} <= set(lines[0])
    assert lines[-1]["held_out_fvu"] is not None and [e["n_tokens"] for e in lines] == [40 * e["step"] for e in lines]


def test_entries_are_means_over_their_steps(tmp_path):
    every, second = fit(KINDS["topk"], run=replace(RUN, log_every_tokens=40)).history_, fit(KINDS["topk"]).history_
    for entry in second:
        pair = [e["reconstruction"] for e in every if entry["step"] - 2 < e["step"] <= entry["step"]]
        assert entry["reconstruction"] == pytest.approx(sum(pair) / 2)


def test_held_out_tokens_are_not_trained_on():
    x = data()
    other = x.clone()
    other[-50:] *= 3
    one, two = fit(KINDS["topk"], x=x), fit(KINDS["topk"], x=other)
    assert same(bits(one), bits(two)) and one.history_[-1]["held_out_fvu"] != two.history_[-1]["held_out_fvu"]


def test_held_out_fvu_is_that_of_the_sae():
    sae, x = fit(KINDS["topk"]), data()[-50:]
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert sae.history_[-1]["held_out_fvu"] == pytest.approx(float(fvu.detach()), rel=1e-4)


# --- schedule and clipping: peers' defect 24


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 100])
def test_rate_rises_stays_and_falls(warmup, decay, n_steps):
    """No warm-up and no decay divide by nothing (defect 24)."""
    if warmup + decay > 1:
        return
    cfg = sl.TrainConfig(n_tokens=n_steps * 10, batch_size=10, warmup_frac=warmup, decay_frac=decay)
    scales = [cfg.lr_scale(step) for step in range(n_steps)]
    assert all(0 < scale <= 1 for scale in scales)
    peak = scales.index(max(scales))
    assert scales[:peak] == sorted(scales[:peak]) and scales[peak:] == sorted(scales[peak:], reverse=True)
    assert n_steps < 7 or max(scales) == 1.0
    if decay and n_steps >= 7:
        assert scales[-1] == pytest.approx(1 / math.ceil(decay * n_steps))


def test_warm_up_is_at_most_a_thousand_steps():
    cfg = sl.TrainConfig(n_tokens=10**6, batch_size=10, warmup_frac=0.5)
    assert cfg.lr_scale(998) < cfg.lr_scale(999) == cfg.lr_scale(1000) == 1.0


def test_the_history_holds_the_rate_used():
    sae = fit(KINDS["topk"], run=replace(RUN, lr=0.01))
    assert [entry["lr"] for entry in sae.history_] == [0.01 * RUN.lr_scale(entry["step"] - 1) for entry in sae.history_]


@pytest.mark.parametrize("size", [0.1, 5.0])
def test_clipping_bounds_the_whole_gradient(size):
    module = torch.nn.Linear(3, 2)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter) * size
    before = [p.grad.clone() for p in module.parameters()]
    norm = clip_gradients(module, 1.0)
    torch.testing.assert_close(norm, torch.tensor(size * math.sqrt(8)))
    after = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    torch.testing.assert_close(after, norm.clamp(max=1.0))
    for parameter, grad in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad / grad, torch.full_like(grad, float(after / norm)))


def test_adam_is_adam():
    """Two steps of a run against the update rule, written out, on the transposed and the plain weights."""
    run = replace(RUN, n_tokens=80, lr=0.01, warmup_frac=0.0, decay_frac=0.0, clip_norm=math.inf)
    cfg = config(dictionary="free", objective=(sl.ReconstructionLoss(),), normalizer="none")
    from saelab.sae.training_sae import TrainingSAE
    from saelab.training.loop import TrainingRun

    sae = sl.SAE(cfg)
    loop = TrainingRun([TrainingSAE(sae, run)], Faulty(99), run, None, None)
    weights = {name: p.detach().double().clone() for name, p in sae.named_parameters()}
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in weights.items()}
    for step in (1, 2):
        batch = data(40, seed=step)
        copy = sl.SAE(cfg)
        copy.load_state_dict(sae.state_dict())
        TrainingSAE(copy, run).objective(batch).total.backward()
        loop.train_on(batch)
        for name, parameter in copy.named_parameters():
            grad, (m, v) = parameter.grad.double(), moments[name]
            m.lerp_(grad, 0.1)
            v.lerp_(grad.square(), 0.001)
            weights[name] -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-3, atol=2e-4, msg=name)


# --- defaults and small things: peers' defects 4, 15, 17


@unchecked()
def test_default_settings_train():
    """Defect 4: a default that cannot run. Also that a short run with all defaults learns."""
    atoms = torch.randn(12, D_IN, generator=torch.Generator().manual_seed(1))
    z = torch.rand(8000, 12, generator=torch.Generator().manual_seed(2)) ** 6
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=sl.TopK(k=4))
    sae = sl.SAE(cfg).fit(z @ atoms, sl.TrainConfig(n_tokens=250_000), progress=False)
    assert sae.history_[-1]["held_out_fvu"] < 0.25


def test_fit_returns_the_sae_and_leaves_its_arguments_alone():
    """Defect 17: a training function that returns nothing and eats its caller's settings."""
    x, held_out = data(), data(50, seed=3)
    kept, kept_held_out = x.clone(), held_out.clone()
    sae = sl.SAE(KINDS["topk"])
    assert sae.fit(x, RUN, progress=False, held_out=held_out) is sae
    assert torch.equal(x, kept) and torch.equal(held_out, kept_held_out)
    assert sae.training_["n_tokens_seen"] == 480 and sae.training_["seed"] == 0 and sae.training_["lr"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_stay_float32_whatever_the_data(dtype):
    """Defect 15: a parameter that takes on the data's dtype."""
    sae = fit(KINDS["batchabstopk"], x=data().to(dtype))
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}


def test_saving_a_trained_sae_keeps_its_training(tmp_path):
    sae = fit(KINDS["batchabstopk"])
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.training_ == sae.training_ and torch.equal(loaded(data()), sae(data()))


def test_progress_is_shown_only_where_asked(capfd):
    fit(KINDS["topk"])
    assert capfd.readouterr() == ("", "")
    sae = sl.SAE(KINDS["topk"]).fit(data(), RUN, progress=True)
    shown = capfd.readouterr()
    assert sae.history_[-1]["step"] == 12 and shown.out == "" and "480/480" in shown.err and "tok/s" in shown.err
