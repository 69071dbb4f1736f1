"""Evaluation: known answers, what must not matter, and what must be refused or explained."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.evaluation import evaluate
from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import ReconstructionSums
from saelab.functional.statistics import DocumentSums, find_interval
from saelab.lm.hooks import logits
from saelab.stores.manifest import Provenance

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def own_words(tiny):
    """Text sampled from the tiny model itself: no edit of its activations can make it predict that better."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (64, 1), generator=generator)
    for _ in range(23):
        p = logits(tiny, ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    doc_ids = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 24).contiguous()
    return sl.Tokens(ids=ids.int(), doc_ids=doc_ids, special_ids=(0, 1, 2), source="own words")


def perfect_sae(d_in=32, prefixes=None):
    """x = relu(x) - relu(-x), in 2 d_in latents."""
    cfg = sl.SAEConfig(
        d_in=d_in, d_sae=2 * d_in, activation=sl.ReLU(), normalizer="none", dictionary="free", prefixes=prefixes
    )
    sae = sl.SAE(cfg)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def some_sae(k=4, activation=None, **settings):
    cfg = sl.SAEConfig(d_in=32, d_sae=96, activation=activation or sl.AbsTopK(k=k), **settings)
    return sl.SAE(cfg, seed=3)


def run(sae, model, tokens, **settings):
    return evaluate(sae, model, tokens, **{"hook_point": HOOK, "n_bootstrap": 50, "progress": False, **settings})


def constant(sae, x_hat):
    """Make an SAE that gives one vector whatever it is given."""
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x_hat)
    return sae


def test_a_perfect_sae_loses_nothing(tiny, own_words) -> None:
    found = run(perfect_sae(), tiny, own_words)
    assert found.fvu < 1e-10
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.bias == pytest.approx(1, abs=1e-6)
    assert found.l0 == pytest.approx(32, abs=0.1)
    assert found.loss_recovered == pytest.approx(1, abs=1e-4)
    assert found.loss_recovered_mean == pytest.approx(1, abs=1e-4)
    assert abs(found.kl) < 1e-6
    assert found.kl_score == pytest.approx(1, abs=1e-4)
    assert not found.reasons


def test_constant_reconstructions_are_the_ablations(tiny, own_words) -> None:
    stage = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask())
    x = stage.read(own_words)[0]
    average = run(constant(some_sae(normalizer="none"), x.mean(0)), tiny, own_words, baselines=False)
    assert average.fvu == pytest.approx(1, abs=1e-5)
    assert average.ce_sae == pytest.approx(average.ce_mean, abs=1e-6)
    assert average.loss_recovered_mean == pytest.approx(0, abs=1e-5)
    nothing = run(constant(some_sae(normalizer="none"), torch.zeros(32)), tiny, own_words, baselines=False)
    assert nothing.ce_sae == nothing.ce_zero
    assert nothing.loss_recovered == 0
    assert nothing.kl_score == 0
    assert math.isnan(nothing.bias)
    assert "bias" in nothing.reasons


def test_numbers_are_those_of_the_running_sums(tiny, own_words) -> None:
    sae = some_sae()
    found = run(sae, tiny, own_words)
    x = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask()).read(own_words)[0]
    sums = ReconstructionSums(32)
    with torch.no_grad():
        sums.add(x, sae(x))
        z = sae.encode(x)
    for name in ("fvu", "explained_variance", "cosine", "bias"):
        assert getattr(found, name) == pytest.approx(getattr(sums, name), rel=1e-6)
    assert found.n_tokens == len(x)
    assert found.l0 == float((z != 0).sum(1).float().mean())
    assert found.dead_frac == pytest.approx(float((z == 0).all(0).float().mean()))
    assert sum(found.density_counts) == int((z != 0).any(0).sum())


def test_on_its_own_words_every_loss_above_the_clean_one_is_a_divergence(tiny, own_words) -> None:
    """Sampled from the model, so E[ce] - E[ce_clean] = KL: two roads to one number, within sampling noise."""
    found = run(some_sae(), tiny, own_words, baselines=False)
    for ce, kl in ((found.ce_sae, found.kl), (found.ce_zero, found.kl_zero)):
        # The variance of log p / q is twice its mean where p and q are close, and of its square's order where not.
        error = ((2 * kl + kl**2) / found.n_tokens) ** 0.5
        assert kl > 5 * error and ce - found.ce_clean == pytest.approx(kl, abs=5 * error)


@pytest.mark.parametrize("activation", [sl.AbsTopK(k=4), sl.ReLU()])
def test_renaming_latents_changes_nothing(tiny, own_words, activation) -> None:
    sae = some_sae(activation=activation)
    renamed = some_sae(activation=activation)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("W_dec", "b_enc"):
            getattr(renamed, name).copy_(getattr(sae, name)[order])
        renamed.W_enc.copy_(sae.W_enc[:, order])
    a, b = (run(s, tiny, own_words, baselines=False) for s in (sae, renamed))
    for name in ("fvu", "l0", "dead_frac", "ce_sae", "loss_recovered", "kl"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5)
    assert a.density_counts == b.density_counts


def test_the_batch_size_does_not_matter(tiny, own_words) -> None:
    tokens = own_words[:8]
    results = [run(some_sae(prefixes=(8, 96)), tiny, tokens, batch_size=size) for size in (1, 3, 64)]
    first, *others = [flat(result.to_dict()) for result in results]
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert other[name] == (pytest.approx(value, abs=2e-6) if isinstance(value, float) else value), name


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value}


def test_batch_topk_is_judged_by_its_threshold(tiny, own_words) -> None:
    sae = some_sae(activation=sl.BatchTopK(k=4))
    with pytest.raises(ValueError, match="threshold"):
        run(sae, tiny, own_words)
    assert sae.threshold is not None
    sae.threshold.fill_(0.5)
    x = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask()).read(own_words)[0]
    found = run(sae, tiny, own_words)
    assert found.l0 == pytest.approx(float((sae.encode(x) > 0.5).sum(1).float().mean()))
    assert found.baselines["untrained"]["l0"] == pytest.approx(found.l0, rel=0.1)  # not 4: as many as the SAE


def test_masked_tokens_are_neither_measured_nor_spliced(tiny, own_words) -> None:
    mask = sl.TokenMask(positions=(4, 20))
    stage = Stage(model=tiny, hook_point=HOOK, mask=mask)
    clean = stage.run(own_words)
    seen = {}

    def look(x):
        seen["x"] = x.clone()
        return x

    with sl.splice(tiny, {"blocks.2.hook_in": look}):
        clean.splice(torch.full_like(clean.rows, 7.0))
    assert torch.equal(seen["x"][~clean.keep], clean.acts[HOOK][~clean.keep])
    assert (seen["x"][clean.keep] == 7).all()
    found = run(some_sae(), tiny, own_words, mask=mask, baselines=False)
    assert found.n_tokens == int(clean.keep.sum()) == found.n_predictions
    assert not clean.keep[:, :4].any()
    assert found.removed["positions"] > 0


def test_padding_is_never_predicted(tiny) -> None:
    tokens = sl.tokenize(tiny, ["a cat", "a dog sees the owl"], ctx_len=32, packed=False)
    found = run(some_sae(), tiny, tokens, baselines=False)
    n_kept = [len("a cat"), len("a dog sees the owl")]
    assert found.n_tokens == sum(n_kept)
    assert found.n_predictions == sum(n_kept) - 2
    assert found.n_documents == 2


def test_no_loss_is_recovered_where_ablation_does_not_hurt(tiny) -> None:
    """Zeros before the last norm give the uniform prediction, which on random tokens beats an overconfident model's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 259, (32, 16), generator=generator, dtype=torch.int32)
    doc_ids = torch.arange(32, dtype=torch.int32)[:, None].expand(32, 16).contiguous()
    tokens = sl.Tokens(ids=ids, doc_ids=doc_ids)
    found = run(some_sae(), tiny, tokens, hook_point="blocks.2.hook_resid_post")
    assert found.ce_zero == pytest.approx(math.log(259), abs=1e-4)
    assert found.ce_zero < found.ce_clean
    assert math.isnan(found.loss_recovered)
    assert "does not hurt" in found.reasons["loss_recovered"]
    assert math.isnan(found.baselines["pca"]["loss_recovered"])
    assert "loss_recovered" not in found.intervals
    assert json.dumps(found.reasons)


def test_damage_within_noise_is_no_damage(tiny, own_words) -> None:
    """Two documents, one of which gains: the sign of the mean is luck."""
    found = [run(some_sae(), tiny, own_words[[i, i + 1]], baselines=False) for i in range(0, 64, 4)]
    damages = [f.ce_mean - f.ce_clean for f in found]
    assert any(damage > 0 and math.isnan(f.loss_recovered_mean) for damage, f in zip(damages, found, strict=True))
    noisy = next(f for d, f in zip(damages, found, strict=True) if d > 0 and math.isnan(f.loss_recovered_mean))
    assert "within noise" in noisy.reasons["loss_recovered_mean"]


def test_one_document_has_no_interval(tiny, own_words) -> None:
    found = run(some_sae(), tiny, own_words[:1], baselines=False)
    assert found.intervals == {}
    assert "documents" in found.reasons["intervals"]


def test_baselines_are_what_they_say(tiny, own_words) -> None:
    found = run(some_sae(k=4), tiny, own_words)
    assert set(found.baselines) == {"untrained", "random", "pca"}
    x = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask()).read(own_words)[0].double()
    spectrum = torch.linalg.svdvals(x - x.mean(0)).square()
    assert found.baselines["pca"]["fvu"] == pytest.approx(float(spectrum[4:].sum() / spectrum.sum()), rel=1e-5)
    for scores in found.baselines.values():
        assert scores["l0"] == pytest.approx(4, abs=1e-9)
        assert 0 < scores["fvu"] < 1
    assert set(found.baselines["pca"]) <= {field.name for field in dataclasses.fields(found)} | {"ce"}
    assert run(some_sae(k=4), tiny, own_words, baselines=False).baselines == {}


def test_prefixes_have_an_fvu_each(tiny, own_words) -> None:
    found = run(perfect_sae(prefixes=(32, 64)), tiny, own_words, baselines=False)
    assert list(found.prefixes) == [32, 64]
    assert found.prefixes[64] == pytest.approx(found.fvu, abs=1e-9)
    assert found.prefixes[32] > 0.2
    random = run(some_sae(prefixes=sl.RandomPrefixes(n=3, smallest=6)), tiny, own_words, baselines=False)
    assert list(random.prefixes) == [6, 24, 96]


def test_nothing_is_changed_by_looking(tiny, own_words) -> None:
    sae = some_sae(activation=sl.BatchAbsTopK(k=4))
    assert sae.threshold is not None
    sae.threshold.fill_(0.3)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    weights = {name: value.clone() for name, value in tiny.named_parameters()}
    clean, random = logits(tiny, own_words.ids), torch.random.get_rng_state()
    a, b = run(sae, tiny, own_words), run(sae, tiny, own_words)
    assert a == b
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert all(torch.equal(value, weights[name]) for name, value in tiny.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(logits(tiny, own_words.ids), clean)
    assert sae.training
    assert all(p.grad is None for p in sae.parameters())


@pytest.fixture(scope="module")
def trained(tiny, own_words):
    mask = sl.TokenMask(positions=(1, None), max_norm_ratio=1.5)
    acts = sl.collect(tiny, own_words, HOOK, mask=mask, progress=False)
    sae = some_sae()
    return sae.fit(acts, sl.TrainConfig(n_tokens=4096, batch_size=256), progress=False)


def test_hook_point_and_mask_come_from_the_provenance(tiny, own_words, trained) -> None:
    found = evaluate(trained, tiny, own_words, progress=False, n_bootstrap=50)
    assert found.hook_point == HOOK
    assert found.n_tokens == trained.provenance.n_tokens
    assert found.removed == trained.provenance.removed
    assert found.removed["norm"] > 0
    assert found.fvu < min(scores["fvu"] for scores in found.baselines.values())
    assert found.provenance == trained.provenance.to_dict()
    other_spelling = evaluate(trained, tiny, own_words, hook_point="blocks.1.hook_out", progress=False, n_bootstrap=0)
    assert other_spelling.fvu == found.fvu


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_refused_and_not_taken_for_an_outlier(tiny, own_words, trained, monkeypatch, bad) -> None:
    def planted(model, ids, names):
        acts = sl.lm.capture(model, ids, names)
        acts[HOOK][0, 3, 5] = bad
        return acts

    monkeypatch.setattr("saelab.evaluation.splicing.capture", planted)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of"):
        evaluate(trained, tiny, own_words[:4], n_bootstrap=0, baselines=False, progress=False)


@pytest.mark.parametrize(
    ("change", "settings", "complaint"),
    [
        ({"model": "gpt2"}, {}, "model"),
        ({"weight_processing": "folded"}, {}, "weight processing"),
        ({}, {"hook_point": "blocks.2.hook_resid_post"}, "hook point"),
        ({"hook_point": "blocks.9.hook_out"}, {"hook_point": HOOK}, "hook point"),
    ],
)
def test_another_model_is_refused_unless_asked_for(tiny, own_words, change, settings, complaint) -> None:
    sae = some_sae()
    origin = Provenance(
        model=tiny.cfg.model_name, weight_processing="none", hook_point=HOOK, text="", tokens_sha256="", mask={},
        dtype="float32", ctx_len=24, n_tokens=1, seed=None, versions={},
    )  # fmt: skip
    sae.provenance = replace(origin, model="some/folder/" + origin.model)
    evaluate(sae, tiny, own_words[:4], n_bootstrap=0, baselines=False, progress=False)
    sae.provenance = replace(origin, **change)
    quiet = {"n_bootstrap": 0, "baselines": False, "progress": False, **settings}
    with pytest.raises(ValueError, match=complaint):
        evaluate(sae, tiny, own_words[:4], **quiet)
    evaluate(sae, tiny, own_words[:4], allow_mismatch=True, **quiet)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"hook_point": None}, "`hook_point` must be given"),
        ({"hook_point": "blocks.1.hook_resid_pots"}, "Did you mean"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"n_bootstrap": -1}, "`n_bootstrap`"),
        ({"mask": sl.TokenMask(positions=(100, None))}, "at least one token"),
    ],
)
def test_wrong_use_is_explained(tiny, own_words, settings, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        run(some_sae(), tiny, own_words, **settings)


def test_activations_must_be_finite(tiny, own_words) -> None:
    def spoil(x):
        x[0, 5] = torch.nan
        return x

    with sl.splice(tiny, {"blocks.0.hook_out": spoil}), pytest.raises(ValueError, match="finite"):
        run(some_sae(), tiny, own_words)


def test_the_bootstrap_covers_the_truth() -> None:
    """Documents of 50 tokens share half their variance; intervals that took tokens for independent cover far less."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        shared = torch.randn(40, 1, generator=generator, dtype=torch.float64)
        values = shared + torch.randn(40, 50, generator=generator, dtype=torch.float64) + 3
        sums = DocumentSums(torch.arange(40))
        docs = torch.arange(40).repeat_interleave(50)
        sums.add(docs, {"n_tokens": torch.ones(2000), "value": values.flatten()})
        drawn = sums.resample(200, seed=trial)
        low, high = find_interval(drawn["value"] / drawn["n_tokens"])
        covered += low < 3 < high
    assert 0.88 <= covered / 200 <= 0.99


def test_results_print_draw_and_save(tiny, own_words, trained, tmp_path) -> None:
    found = evaluate(trained, tiny, own_words, progress=False, n_bootstrap=50)
    found = replace(found, text="<b>text</b>", kl_score=math.nan)
    shown = str(found)
    for word in ("fvu", "loss_recovered", "untrained", "random", "pca", HOOK, "95 %"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 140
    assert "<b>" not in found._repr_html_()
    found.save(tmp_path / "eval.json")
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert set(saved) == {field.name for field in dataclasses.fields(found)}
    assert saved["kl_score"] is None
    assert saved["fvu"] == found.fvu
    assert saved["intervals"]["fvu"] == list(found.intervals["fvu"])
    assert found.intervals["fvu"][0] <= found.fvu <= found.intervals["fvu"][1]


@unchecked()
def test_a_trained_model_suffers_from_ablation(shared_data) -> None:
    model = sl.load_model(shared_data / "stories260k")
    tokens = sl.tokenize(model, shared_data / "tinystories" / "tinystories.txt", ctx_len=64, n_tokens=6400)
    acts = sl.collect(model, tokens[20:], "blocks.2.hook_resid_post", progress=False)
    cfg = sl.SAEConfig(d_in=64, d_sae=128, activation=sl.AbsTopK(k=16))
    sae = sl.SAE(cfg).fit(acts, sl.TrainConfig(n_tokens=60_000, batch_size=512), progress=False)
    found = evaluate(sae, model, tokens[:20], n_bootstrap=100, progress=False)
    assert found.fvu < min(scores["fvu"] for scores in found.baselines.values())
    assert found.loss_recovered > max(scores["loss_recovered"] for scores in found.baselines.values())
    assert found.ce_clean < found.ce_sae < found.ce_mean < found.ce_zero
    assert 0.8 < found.loss_recovered_mean < found.loss_recovered < 1


def test_saes_given_as_baselines_are_rows_like_the_evaluated_one(tiny, own_words):
    sae, other = some_sae(), some_sae(k=9)
    plain, found = run(sae, tiny, own_words), run(sae, tiny, own_words, baselines={"other": other})
    assert list(found.baselines) == [*plain.baselines, "other"]
    assert {**found.to_dict(), "baselines": 0} == {**plain.to_dict(), "baselines": 0}
    assert all(found.baselines[name] == plain.baselines[name] for name in plain.baselines)
    alone = run(other, tiny, own_words, baselines=False)
    row = found.baselines["other"]
    assert alone.baselines == {} and row["ce"] == alone.ce_sae
    assert all(row[name] == getattr(alone, name) for name in ("fvu", "l0", "kl", "cosine", "loss_recovered"))
    with pytest.raises(ValueError, match=r"Names of `baselines` must differ .* got 'pca'"):
        run(sae, tiny, own_words, baselines={"pca": other})
    with pytest.raises(ValueError, match="`baselines` must have the SAE's widths"):
        run(sae, tiny, own_words, baselines={"other": sl.SAE(sl.SAEConfig(d_in=16, d_sae=32))})
