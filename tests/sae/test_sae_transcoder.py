"""Transcoders, skip connections and matching pursuit: learned from pairs of hook points, judged where they write."""

import json
from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.evaluation import make_linear
from saelab.sae.activation_functions import AbsJumpReLU, GroupMax
from saelab.sae.training_sae import TrainingSAE
from saelab.stores.activations import ActivationPairs

D_IN, D_OUT, D_SAE = 8, 5, 24
READ, WRITTEN = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
RUN = sl.TrainConfig(n_tokens=12 * 40, batch_size=40, log_every_tokens=80, save_every_tokens=160, n_held_out=50)


def data(n=600, seed=0, d_out=D_OUT):
    """Inputs, and targets that a small network makes of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator) + 2.0
    first, second = torch.randn(D_IN, 12, generator=generator), torch.randn(12, d_out, generator=generator)
    return x, (x @ first).relu() @ second * 4.0 - 7.0


def config(**axes):
    aux = sl.AuxK(dead_after_tokens=120, k=3)
    return sl.SAEConfig(
        **(
            {
                "d_in": D_IN,
                "d_sae": D_SAE,
                "d_out": D_OUT,
                "activation": sl.TopK(k=3),
                "objective": (sl.ReconstructionLoss(), aux),
            }
            | axes
        )
    )


def fit(cfg, pairs=None, run=RUN, **arguments):
    return sl.SAE(cfg).fit(data() if pairs is None else pairs, run, progress=False, **arguments)


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


# ---- the two formulas, and the gradients of the fast step


@pytest.mark.parametrize("skip", [False, True])
def test_reconstruction_by_its_formula(skip):
    sae = fit(config(skip=skip, normalizer="whiten"))
    x, _ = data(seed=1)
    read = (x - sae.normalizer.mean) @ sae.normalizer.matrix
    z = sl.TopK(k=3)(read @ sae.W_enc + sae.b_enc)
    written = z @ sae.W_dec + sae.b_dec + (read @ sae.W_skip if skip else 0.0)
    expected = written @ sae.target_normalizer.inverse + sae.target_normalizer.mean
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)
    assert sae.directions().shape == (D_SAE, D_OUT)


PENALISED = [
    sl.ReLU(target_l0=3.0, coefficient=0.02),
    sl.JumpReLU(target_l0=3.0, coefficient=0.02, bandwidth=0.3, start=0.4),
    AbsJumpReLU(target_l0=3.0, coefficient=0.02, bandwidth=0.3, start=0.4),
]
STRUCTURAL = [sl.TopK(k=3), sl.AbsTopK(k=3), sl.BatchTopK(k=3), sl.BatchAbsTopK(k=3), GroupMax(k=3)]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("prefixes", [None, (6, D_SAE)])
@pytest.mark.parametrize("activation", STRUCTURAL + PENALISED, ids=lambda a: a.name)
def test_the_sparse_step_has_the_gradients_of_the_formula(activation, prefixes, skip):
    d_out = D_IN if skip else D_OUT  # of one width or not, b_dec is the target's
    cfg = config(activation=activation, prefixes=prefixes, skip=skip, d_out=d_out, objective=(sl.ReconstructionLoss(),))
    sae, pairs = sl.SAE(cfg), torch.cat(data(64, d_out=d_out), 1)
    trainee = TrainingSAE(sae, RUN)
    trainee.prepare(pairs)
    with torch.no_grad():
        for i, weight in enumerate(sae.parameters()):  # W_skip starts at zero, where it would hide its own errors
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
        if cfg.activation.threshold == "learned":
            sae.threshold.clamp_(min=0.1)
    x, y = sae.normalizer.normalize(pairs[:, :D_IN]), sae.target_normalizer.normalize(pairs[:, D_IN:])
    u = x @ sae.W_enc + sae.b_enc
    z = activation(u, sae.threshold, training=True)
    beside = sae.b_dec + (x @ sae.W_skip if skip else 0.0)
    errors = [(y - beside - z[:, :n] @ sae.W_dec[:n]).square().sum() for n in prefixes or (D_SAE,)]
    loss = sum(errors) / len(errors) / (64 * trainee.state["variance"])
    if (penalty := activation.penalty(u, z, sae.threshold)) is not None:
        loss = loss + trainee.state["coefficient"] * penalty.sum() / 64
    wanted = torch.autograd.grad(loss, list(sae.parameters()))
    objective = trainee.objective(pairs)
    objective.total.backward()
    torch.testing.assert_close(objective.total, loss)
    for (name, parameter), grad in zip(sae.named_parameters(), wanted, strict=True):
        assert grad.any(), name
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dead_latents_hear_of_the_target():
    sae, pairs = (
        sl.SAE(config(objective=(sl.ReconstructionLoss(), sl.AuxK(k=2, dead_after_tokens=10)))),
        torch.cat(data(64), 1),
    )
    trainee = TrainingSAE(sae, RUN)
    trainee.prepare(pairs)
    with torch.no_grad():
        sae.b_enc[-4:] = -100.0
    trainee.state["tokens_since_fired"][-4:] = 10
    trainee.objective(pairs).terms["aux"].backward()
    assert sae.W_enc.grad[:, -4:].any() and sae.W_dec.grad[-4:].any() and not sae.W_dec.grad[:-4].any()
    assert sae.b_dec.grad is None  # the residual is detached, and nothing is taken from the input


# ---- learning from pairs


@unchecked()
def test_it_learns_the_target_and_a_skip_connection_what_is_linear():
    (x, y), run = data(2000), sl.TrainConfig(n_tokens=8000, batch_size=200)
    by_line = (y - make_linear(x, y, k=D_OUT)(x)[0]).square().sum() / (y - y.mean(0)).square().sum()
    plain, skip = (fit(config(skip=skip), (x, y), run).history_[-1]["held_out_fvu"] for skip in (False, True))
    # No worse than the best line where the target is all but linear: an FVU of n tokens is sqrt(2 / n) of itself wrong.
    assert skip < 0.8 * plain and skip < (1 + 4 * (2 / (len(x) // 10)) ** 0.5) * by_line
    straight = fit(config(skip=True), (x, x @ torch.ones(D_IN, D_OUT) + 3.0 * x[:, :D_OUT]), run)
    assert straight.history_[-1]["held_out_fvu"] < 0.05


@unchecked()
def test_all_forms_of_a_pair_are_one():
    x, y = data()
    acts = tuple(sl.Activations.from_tensor(part) for part in (x, y))
    wanted = fit(config(), (x, y))
    assert same(fit(config(), acts), wanted) and same(fit(config(), ActivationPairs(*acts)), wanted)


class StopError(Exception):
    """Ends a run from outside, as a crash would."""


def stop(entry):
    if entry["step"] == 6:
        raise StopError


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("cfg", [config(skip=True), config(activation=sl.JumpReLU(target_l0=3.0), prefixes=(6, D_SAE))])
def test_an_interrupted_run_goes_on_bit_for_bit(cfg, tmp_path):
    whole = fit(cfg, out=tmp_path / "whole")
    with pytest.raises(StopError):
        fit(cfg, out=tmp_path / "crashed", sinks=[stop])
    assert same(fit(cfg, out=tmp_path / "crashed", resume=True), whole)
    assert contents(tmp_path / "whole") == contents(tmp_path / "crashed")


@unchecked()
def test_trained_together_as_alone_and_trained_further():
    cfgs = [config(), config(skip=True)]
    together = sl.fit([sl.SAE(cfg) for cfg in cfgs], data(), RUN, progress=False)
    assert all(same(sae, fit(cfg)) for sae, cfg in zip(together, cfgs, strict=True))
    before = together[0].normalizer.mean.clone()
    together[0].fit(tuple(part[:300] for part in data()), RUN, progress=False)
    assert torch.equal(together[0].normalizer.mean, before)


def test_reading_pairs_is_bounded_and_the_same_whatever_the_shards(tiny, tiny_tokens, tmp_path):
    memory = sl.collect(tiny, tiny_tokens, [READ, WRITTEN], progress=False)
    folder = sl.collect(tiny, tiny_tokens, [WRITTEN, READ], tmp_path, shard_tokens=300, progress=False)
    one, other = (ActivationPairs(acts[READ], acts[WRITTEN]) for acts in (memory, folder))
    assert torch.equal(one[100:140], other[100:140]) and one[100:140].shape == (40, 64)
    batches = [pairs.rows(7, 1500).batches(32, seed=1, buffer_tokens=256) for pairs in (one, other)]
    assert all(torch.equal(next(batches[0]), next(batches[1])) for _ in range(60))
    assert batches[0]._buffer.shape == (256, 64)
    known = {row.tobytes() for row in one[:].numpy()}
    assert all(row.tobytes() in known for row in next(batches[0]).numpy()), "an input stands before another's target"


def test_streamed_pairs_are_the_collected_ones(tiny, tiny_tokens, tmp_path):
    acts = sl.collect(tiny, tiny_tokens, [READ, WRITTEN], progress=False)
    sizes = {"batch_size": 1, "buffer_tokens": 1024, "n_seq": 8}
    stream = sl.stream(tiny, tiny_tokens, (READ, WRITTEN), epochs=1, **sizes)
    rows = torch.cat(list(stream))
    collected = ActivationPairs(acts[READ], acts[WRITTEN])[:]
    assert (stream.d_in, stream.d_out) == (32, 32) and rows.shape == collected.shape
    # float32 rows of other forwards differ in the last bits, whose order is not that of the rows
    by_first, by_other = (x[x[:, 0].argsort()] for x in (rows, collected))
    torch.testing.assert_close(by_first, by_other, atol=1e-4, rtol=1e-4)
    assert stream.provenance.place == f"from {READ} to {WRITTEN}"
    state = sl.stream(tiny, tiny_tokens, (READ, WRITTEN), **sizes).state_dict()
    with pytest.raises(ValueError, match="`hook_point` must be what it was"):
        sl.stream(tiny, tiny_tokens, (WRITTEN, READ), **sizes).load_state_dict(state)


def test_rows_of_other_tokens_are_refused(tiny, tiny_tokens):
    acts = sl.collect(tiny, tiny_tokens, [READ, WRITTEN], progress=False)
    x, y = acts[READ], acts[WRITTEN]
    with pytest.raises(ValueError, match="as many inputs as targets"):
        ActivationPairs(x.rows(0, 100), y)
    with pytest.raises(ValueError, match=r"their token_ids differ from row \d+ on"):
        ActivationPairs(x.rows(0, 100), y.rows(1, 101))
    part = sl.collect(tiny, tiny_tokens[:32], WRITTEN, progress=False)
    with pytest.raises(ValueError, match="`tokens_sha256`"):
        ActivationPairs(x.rows(0, len(part)), part)
    masked = sl.collect(tiny, tiny_tokens, WRITTEN, mask=sl.TokenMask(positions=(1, None)), progress=False)
    with pytest.raises(ValueError, match="`mask`"):
        ActivationPairs(x.rows(0, len(masked)), masked)


@pytest.mark.parametrize(
    ("cfg", "given", "match"),
    [
        (config(), data()[0], "must have pairs to learn from"),
        (config(d_out=None), data(), "must have activations of one hook point"),
        (config(d_in=7), data(), r"`d_in` of the SAE must be the activations' \(8\)"),
        (config(d_out=4), data(), r"`d_out` of the transcoder must be the targets' \(5\)"),
    ],
)
def test_data_that_does_not_go_with_the_sae_is_named(cfg, given, match):
    with pytest.raises(ValueError, match=match):
        fit(cfg, given)


def test_settings_that_exclude_each_other_are_named():
    with pytest.raises(ValueError, match="`skip` must go with `d_out`"):
        config(d_out=None, skip=True)
    with pytest.raises(ValueError, match="`d_out` must be at least 1"):
        config(d_out=0)
    with pytest.raises(ValueError, match="`normalizer` of a transcoder"):
        config(normalizer="layer_norm")
    with pytest.raises(ValueError, match="must divide d_sae"):
        config(activation=GroupMax(k=5))


# ---- what is kept on disk


def test_saved_loaded_and_plain_configs_stay_plain(tmp_path):
    sae = fit(config(skip=True))
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert same(sae, loaded) and loaded.cfg == sae.cfg and torch.equal(loaded(data()[0]), sae(data()[0]))
    described = json.loads((tmp_path / "config.json").read_text())["config"]
    assert described["d_out"] == D_OUT and described["skip"] is True
    plain = config(d_out=None)
    assert not {"d_out", "skip", "encoder"} & plain.to_dict().keys()
    assert sl.SAEConfig.from_dict(plain.to_dict() | {"skip": False}) == plain


def test_fold_is_exact_far_from_the_origin():
    x, y = data()
    sae = fit(config(skip=True, normalizer="whiten"), (x * torch.logspace(-2, 2, D_IN) + 50.0, 1e3 * y - 1e4))
    far = x * torch.logspace(-2, 2, D_IN) + 50.0
    torch.testing.assert_close(sae.fold()(far), sae(far), rtol=1e-3, atol=1.0)  # of targets of 1e4
    assert sae.fold().cfg == replace(sae.cfg, normalizer="none", dictionary="free")


# ---- in the model


@pytest.fixture(scope="module")
def trained(tiny, tiny_tokens):
    acts = sl.collect(tiny, tiny_tokens, [READ, WRITTEN], progress=False)
    run = sl.TrainConfig(n_tokens=10_000, batch_size=200)
    cfg = config(d_in=32, d_out=32, d_sae=64, activation=sl.TopK(k=8), prefixes=(16, 64), skip=True)
    return fit(cfg, (acts[READ], acts[WRITTEN]), run)


def test_it_says_where_it_reads_and_writes(trained, tmp_path):
    assert (trained.provenance.hook_point, trained.provenance.hook_point_out) == (READ, WRITTEN)
    assert f"from {READ} to {WRITTEN}" in repr(trained) and "d_out=32, skip" in repr(trained)
    trained.save_pretrained(tmp_path)
    assert sl.SAE.from_pretrained(tmp_path).provenance == trained.provenance
    plain = replace(trained.provenance, hook_point_out=None)
    assert "hook_point_out" not in plain.to_dict() and sl.stores.Provenance.from_dict(plain.to_dict()) == plain


def test_evaluated_by_splicing_at_its_target(trained, tiny, tiny_tokens):
    tokens = tiny_tokens[:8]
    found = sl.evaluate(trained, tiny, tokens, n_bootstrap=0, batch_size=3, progress=False)
    keep = sl.TokenMask().apply(tokens).keep
    acts = sl.lm.capture(tiny, tokens.ids, [READ, WRITTEN])
    y, y_hat = acts[WRITTEN], trained(acts[READ]).detach()
    residual, variance = (y - y_hat)[keep].square().sum(), (y[keep] - y[keep].mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(residual / variance), rel=1e-4)
    assert found.l0 == pytest.approx(float(trained.encode(acts[READ])[keep].count_nonzero(-1).float().mean()))
    for name, value in {"ce_sae": y_hat, "ce_zero": 0 * y, "ce_mean": y[keep].mean(0).expand_as(y)}.items():
        edit = torch.where(keep[..., None], value, y)
        with sl.splice(tiny, {WRITTEN: lambda x, edit=edit: edit}):
            loss = sl.lm.next_token_loss(sl.lm.logits(tiny, tokens.ids), tokens.ids)
        counts = keep[:, :-1] & (tokens.doc_ids[:, 1:] == tokens.doc_ids[:, :-1])
        assert getattr(found, name) == pytest.approx(float(loss[counts].mean()), rel=1e-5), name
    assert found.prefixes[64] == pytest.approx(found.fvu, rel=1e-4) and found.prefixes[16] > found.fvu
    assert found.hook_point_out == WRITTEN and f"from {READ} to {WRITTEN}" in str(found)
    assert found.baselines["linear"]["l0"] == 32  # a skip connection is compared with any linear map
    assert found.fvu < min(found.baselines[name]["fvu"] for name in ("untrained", "random"))


def test_an_outlier_at_either_place_counts_as_one(trained, tiny, tiny_tokens):
    mask = sl.TokenMask(max_norm_ratio=1.05)
    acts = sl.collect(tiny, tiny_tokens, [READ, WRITTEN], mask=mask, progress=False)
    found = sl.evaluate(trained, tiny, tiny_tokens, mask=mask, baselines=False, n_bootstrap=0, progress=False)
    assert found.n_tokens == len(acts[READ]) < tiny_tokens.n_tokens
    assert found.removed == acts[READ].provenance.removed


def test_harvest_lens_and_progressive_know_transcoders(trained, tiny, tiny_tokens, tmp_path):
    store = sl.harvest(trained, tiny, tiny_tokens[:8], tmp_path / "text", progress=False)
    acts = sl.collect(tiny, tiny_tokens[:8], READ, progress=False)
    codes = trained.encode_sparse(acts[:])
    again = sl.harvest(trained, tiny, acts, tmp_path / "acts", progress=False)
    assert len(store) == len(acts) and store.n_entries == again.n_entries == codes.indices.numel()
    with pytest.raises(ValueError, match="another hook point"):
        wrong = sl.collect(tiny, tiny_tokens[:8], WRITTEN, progress=False)
        sl.harvest(trained, tiny, wrong, tmp_path / "wrong", progress=False)
    assert len(sl.analysis.logit_lens(trained, tiny, [3], n=4)[3].promoted) == 4
    whole = sl.analysis.prune_dictionary(trained, tiny, tiny_tokens[:8], (64,)).get("energy", 64)
    rest = sl.evaluate(trained, tiny, tiny_tokens[4:8], baselines=False, n_bootstrap=0, progress=False)
    assert whole.fvu == pytest.approx(rest.fvu, rel=1e-3) and whole.ce == pytest.approx(rest.ce_sae, rel=1e-5)


def test_places_are_asked_for_and_compared(trained, tiny, tiny_tokens):
    bare, tokens = sl.SAE(trained.cfg), tiny_tokens[:2]
    quick = {"baselines": False, "n_bootstrap": 0, "progress": False}
    with pytest.raises(ValueError, match="`hook_point` must be given"):
        sl.evaluate(bare, tiny, tokens, **quick)
    with pytest.raises(ValueError, match="must be a pair for a transcoder"):
        sl.evaluate(bare, tiny, tokens, hook_point=READ, **quick)
    assert sl.evaluate(bare, tiny, tokens, hook_point=(READ, WRITTEN), **quick).hook_point_out == WRITTEN
    with pytest.raises(ValueError, match="another target"):
        sl.evaluate(trained, tiny, tokens, hook_point=(READ, "blocks.2.hook_mlp_out"), **quick)
    with pytest.raises(ValueError, match="must be one for an autoencoder"):
        sl.evaluate(sl.SAE(config(d_in=32, d_out=None)), tiny, tokens, hook_point=(READ, WRITTEN), **quick)


def test_a_linear_baseline_is_the_best_of_its_rank():
    x, y = data(300)
    errors = []
    for k in range(1, D_OUT + 1):
        y_hat, used = make_linear(x, y, k)(x)
        errors.append(float((y - y_hat).square().sum()))
        assert int(torch.linalg.matrix_rank(y_hat - y_hat.mean(0), rtol=1e-6)) == k and (used == k).all()
    assert errors == sorted(errors, reverse=True)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1), y).solution
    best = (y - torch.cat([x, torch.ones(300, 1)], 1) @ solution).square().sum()
    assert errors[-1] == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
def test_hook_normalized_is_the_stream_at_unit_scale_before_the_norms_weight(shared_data, backend):
    """TransformerLens' `ln2.hook_normalized`; what the MLP reads is that times the norm's weight."""
    model = sl.load_model(shared_data / "stories260k", device="cpu", backend=backend)
    names = ["blocks.2.hook_resid_mid", "blocks.2.ln2.hook_normalized", "blocks.2.ln2.hook_out"]
    acts = sl.lm.capture(model, torch.arange(3, 43).view(2, 20), names)
    stream, normalized, read = (acts[name] for name in names)
    scale = stream.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(normalized, stream / scale, rtol=1e-3, atol=1e-4)
    factor = (read / normalized).median(0).values.median(0).values  # the norm's weight: one number a dimension
    torch.testing.assert_close(read, normalized * factor, rtol=1e-3, atol=1e-4)
    assert factor.std() > 0.05


def test_other_analyses_know_transcoders_or_refuse_them(trained, tiny, tiny_tokens, tmp_path):
    store = sl.harvest(trained, tiny, tiny_tokens[:8], tmp_path / "store", progress=False)
    assert float(sl.universality.seed_stability([trained, trained]).trained.matched.mean()) == pytest.approx(1.0)
    x = sl.lm.capture(tiny, tiny_tokens[:8].ids, [READ])[READ].flatten(0, 1)
    with pytest.raises(ValueError, match="`acts` must not be given for transcoders"):
        sl.universality.seed_stability([trained, trained], x)
    assert "live" in str(sl.analysis.dead_features(store, trained, x))
    with pytest.raises(ValueError, match="got a transcoder; use AuxK"):
        sl.sae.resample_dead_latents(trained, x, [0])
    page = tmp_path / "report.html"
    sl.report(store, page, tiny, features=[0, 1], sae=trained, prompts=["The cat."], progress=False)
    assert READ in page.read_text(encoding="utf-8")
