"""What a feature does: examples, the logit lens, neighbours; and dead latents resampled."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.analysis import dashboard
from saelab.evaluation.splicing import Stage
from saelab.functional.statistics import rank_correlation
from saelab.lm.hook_points import hook_points_of
from saelab.lm.unembedding import read_out
from saelab.training.optimizer import make_adam, step_adam

HOOK = "blocks.1.hook_resid_post"
D_SAE = 40


@pytest.fixture(scope="module")
def tokens(tiny):
    texts = [f"{a} {v} the {b}. Then {b} ran!" for a in ("Fox", "Owl", "Cat") for v in ("saw", "hid") for b in "xyzw"]
    return sl.tokenize(tiny, texts * 3, ctx_len=20)


@pytest.fixture(scope="module")
def sae():
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.AbsTopK(k=4)), seed=0)


@pytest.fixture(scope="module")
def store(sae, tiny, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return sl.harvest(sae, tiny, tokens, folder, hook_point=HOOK, shard_tokens=200, progress=False)


@pytest.fixture(scope="module")
def busy(store):
    """The feature whose rarer sign fires most."""
    return int(store.statistics.fires.min(1).argmax())


def test_examples_are_firings_of_their_sign_strongest_first(store, busy):
    found = sl.analysis.max_activating_examples(store, busy, n_top=6)
    dense = store.matrix().toarray()[:, busy]
    for side in (1, -1):
        values = [example.value for example in found.group("top", side).examples]
        assert values and all(value * side > 0 for value in values)
        assert values == sorted(values, key=lambda v: -abs(v))
        assert abs(values[0]) == found.group("top", side).high == (dense * side).max()
    for group in found.groups:
        for example in group.examples:
            assert example.value == dense[example.token]
            assert (example.value == 0) == (group.name == "near miss") or group.name == "random"
            assert len(example.words) == len(example.values) <= 25


def test_windows_show_the_codes_of_their_tokens(store, busy):
    """Every value of a window, not only the center's, against the dense codes; tokens masked out have none."""
    dense = store.matrix().toarray()[:, busy]
    at_place = np.zeros(len(store.text))
    at_place[store.places] = dense
    for group in sl.analysis.max_activating_examples(store, busy, before=5, after=9).groups:
        for example in group.examples:
            start = int(store.places[example.token]) - example.center
            assert np.array_equal(at_place[start : start + len(example.values)], example.values)
            assert list(example.words) == store.text.words(start, start + len(example.words))
            assert len(set(store.text.doc_ids[start : start + len(example.words)])) == 1


def test_no_window_is_shown_twice(store, busy):
    """The corpus repeats every document three times."""
    for group in sl.analysis.max_activating_examples(store, busy, n_top=30).groups:
        texts = [example.words for example in group.examples]
        assert len(set(texts)) == len(texts)


def test_quantiles_hold_equally_many_firings_and_ascend(store, busy):
    found = sl.analysis.max_activating_examples(store, busy, n_quantiles=4)
    groups = [found.group(f"quantile {i} of 4", 1) for i in range(1, 5)]
    sizes = [group.n_firings for group in groups]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == store.statistics.fires[busy, 0]
    assert all(a.high <= b.low for a, b in pairwise(groups))
    assert all(g.low <= example.value <= g.high for g in groups for example in g.examples)


def test_near_misses_share_the_word_and_rows_limit_the_view(store, busy):
    train = store.split(0.5, seed=0)
    found = sl.analysis.max_activating_examples(store, busy, rows=train)
    tops = {e.words[e.center] for g in found.groups if g.name == "top" for e in g.examples}
    for group in found.groups:
        assert all(train[example.token] for example in group.examples)
        if group.name == "near miss":
            assert {e.words[e.center] for e in group.examples} <= tops
    assert found.n_tokens == train.sum()
    assert (
        found
        == sl.analysis.max_activating_examples(store, busy, rows=train)
        != sl.analysis.max_activating_examples(store, busy, rows=train, seed=1)
    )
    with pytest.raises(ValueError, match="`rows`"):
        sl.analysis.max_activating_examples(store, busy, rows=train[:5])


def test_no_near_miss_fires(store):
    """Of the busiest features, and all of them: their tokens fire elsewhere, so that one too many would be seen."""
    busiest = store.statistics.fires.sum(1).argsort()[-4:].tolist()
    for feature in busiest:
        near = (
            sl.analysis.max_activating_examples(store, feature, n_near=40, n_quantiles=0, n_random=0)
            .group("near miss", 0)
            .examples
        )
        assert len(near) > 4 and all(example.value == 0 for example in near)


def test_a_feature_that_fires_less_often_than_there_are_groups(store):
    fires = store.statistics.fires
    rare = int(np.where(fires.sum(1) > 0, fires.sum(1), 10**9).argmin())
    found = sl.analysis.max_activating_examples(store, rare, n_quantiles=500)
    groups = [group for group in found.groups if group.name.startswith("quantile")]
    assert sum(group.n_firings for group in groups) == fires[rare].sum() and all(g.n_firings == 1 for g in groups)


def test_a_dead_feature_has_only_random_windows(tiny, tokens, tmp_path):
    silent = sl.SAE(sl.SAEConfig(d_in=32, d_sae=8, activation=sl.ReLU(target_l0=4.0)), seed=0)
    silent.b_enc.data[3] = -1e6
    store = sl.harvest(silent, tiny, tokens, tmp_path, hook_point=HOOK, progress=False)
    assert [group.name for group in sl.analysis.max_activating_examples(store, 3).groups] == ["random"]
    assert "feature 3" in str(sl.analysis.max_activating_examples(store, 3))


@pytest.mark.parametrize("backend", ["huggingface", "transformer_lens"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_read_out_is_exact(kind, backend):
    """Against a direct computation: the logits of a residual with and without the direction, the norm's scale held."""
    d = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    model = sl.lm.tiny_model(architecture="gpt2" if kind == "layer" else "llama", backend=backend)
    norm, unembed = (hook_points_of(model).components[name] for name in ("ln_final", "unembed"))
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(32, generator=torch.Generator().manual_seed(2))
    centered = x - x.mean() if kind == "layer" else x
    scale = centered.square().mean().sqrt()
    moved = d - d.mean(1, keepdim=True) if kind == "layer" else d
    direct = unembed(moved / scale * norm.weight) - unembed(torch.zeros(32))
    torch.testing.assert_close(read_out(model, d) / scale, direct.detach(), rtol=1e-3, atol=1e-4)
    # and as a small step of the whole thing: the part along the residual aside, which also changes the scale
    step = 1e-3 * (d - (d @ centered)[:, None] * centered / centered.square().sum())
    with torch.no_grad():
        there, here = (unembed(norm(r[None]))[0] for r in (x + step, x[None]))
    torch.testing.assert_close(read_out(model, step) / scale, there - here, rtol=2e-2, atol=1e-5)


def test_folded_weights_are_read_as_they_are():
    model = sl.load_model("tiny", weight_processing="folded")
    d = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    d = d - d.mean(1, keepdim=True)
    found, direct = read_out(model, d), (d @ model.W_U).detach()  # the norm's weight is in W_U, its scale is 1
    centered = [x - x.mean(1, keepdim=True) for x in (found, direct)]  # folding centres the unembedding
    torch.testing.assert_close(centered[0], centered[1], rtol=1e-3, atol=1e-4)


def test_the_lens_ranks_the_vocabulary(tiny, sae):
    lens = sl.analysis.logit_lens(sae, tiny, [5, 2], n=4)
    effect = read_out(tiny, sae.fold().W_dec.detach()[[5]])[0]
    effect = effect - effect.mean()
    assert [value for _, value in lens[5].promoted] == pytest.approx(effect.topk(4).values.tolist())
    assert [value for _, value in lens[5].suppressed] == pytest.approx((-(-effect).topk(4).values).tolist())
    assert lens[5].spread == pytest.approx(float(effect.std()))
    assert repr(lens[5].promoted[0][0]) in str(lens) and repr(lens[5].suppressed[0][0]) in str(lens)
    assert [row.feature for row in lens.features] == [5, 2] and len(sl.analysis.logit_lens(sae, tiny).features) == D_SAE
    with pytest.raises(ValueError, match="`features`"):
        sl.analysis.logit_lens(sae, tiny, [D_SAE])
    with pytest.raises(ValueError, match="width"):
        sl.analysis.logit_lens(sl.SAE(sl.SAEConfig(d_in=8, d_sae=40)), tiny)


@pytest.mark.parametrize("by", ["correlation", "phi"])
def test_neighbors_equal_the_dense_correlation(store, by):
    dense = store.matrix().toarray().astype(np.float64)
    dense = (dense != 0).astype(float) if by == "phi" else dense
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(dense.T))
    np.fill_diagonal(r, 0)
    found = sl.analysis.nearest_features(store, by, m=5)
    for j in range(D_SAE):
        best = np.sort(np.abs(r[j]))[::-1][:5]
        assert np.allclose(np.abs(np.nan_to_num(found.values[j])), best, atol=1e-5)
        for i, value in found.of(j):
            assert value == pytest.approx(r[j, i], abs=1e-5)


def test_neighbors_by_direction_find_twins_and_antipodes(sae):
    twin = sl.SAE(sae.cfg, seed=0)
    with torch.no_grad():
        twin.W_dec[7], twin.W_dec[9] = twin.W_dec[3], -twin.W_dec[4]
    found = sl.analysis.nearest_features(twin, m=3)
    assert found.of(7)[0] == (3, pytest.approx(1)) and found.of(9)[0] == (4, pytest.approx(-1))
    assert found.n_tokens is None and all(j not in dict(found.of(j)) for j in range(D_SAE))
    with pytest.raises(ValueError, match="`by`"):
        sl.analysis.nearest_features(twin, "phi")


def test_resampled_latents_take_the_worst_tokens(tiny, tokens):
    acts = sl.collect(tiny, tokens, HOOK, progress=False)
    cfg = sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.TopK(k=4), objective=(sl.ReconstructionLoss(),))
    sae = sl.SAE(cfg).fit(acts, sl.TrainConfig(n_tokens=4096, batch_size=256), progress=False)
    x = acts[:]
    optimizer = make_adam(sae, 1e-3, sl.TrainConfig(n_tokens=4096, batch_size=256))
    (sae(x) - x).square().sum().backward()
    step_adam(sae, optimizer)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    before_sae = copy.deepcopy(sae)
    errors = (sae(x) - x).square().sum(1).detach()
    latents = [3, 11, 30]
    many = sl.sae.resample_dead_latents(copy.deepcopy(sae), x, list(range(D_SAE)), seed=2)
    assert len(set(many)) == D_SAE and errors[many].mean() > 1.1 * errors.mean()
    taken = sl.sae.resample_dead_latents(sae, x, latents, optimizer=optimizer, seed=1)
    residual = x[taken] - before_sae(x[taken])
    assert torch.nn.functional.cosine_similarity(residual, sae.W_dec[latents]).min() > 0.999
    others = [j for j in range(D_SAE) if j not in latents]
    assert torch.equal(sae.W_dec[others], before["W_dec"][others]) and torch.equal(sae.b_dec, before["b_dec"])
    assert torch.allclose(sae.W_dec[latents].norm(dim=1), torch.ones(3))
    assert torch.nn.functional.cosine_similarity(sae.W_enc.T[latents], sae.W_dec[latents]).min() > 0.999
    assert not sae.W_dec[latents].allclose(before["W_dec"][latents]) and not sae.b_enc[latents].any()
    for parameter in optimizer.param_groups[0]["params"]:
        for moment in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[parameter][moment]
            if len(moments) == D_SAE:
                assert not moments[latents].any() and moments[others].any()
    assert sl.sae.resample_dead_latents(sae, x, []) == []
    with pytest.raises(ValueError, match="different"):
        sl.sae.resample_dead_latents(sae, x, [1, 1])


def test_the_subspace_start_lies_where_activations_are():
    """Rank 6 of 32 and a little noise: random directions are mostly outside, and more of those latents stay silent."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q
    x = torch.randn(2048, 6, generator=generator) @ basis.T + 1e-3 * torch.randn(2048, 32, generator=generator)
    inside, dead = {}, {}
    for init in ("tied", "subspace"):
        cfg = sl.SAEConfig(d_in=32, d_sae=512, activation=sl.TopK(k=2), init=init, objective=(sl.ReconstructionLoss(),))
        sae = sl.SAE(cfg).fit(x, sl.TrainConfig(n_tokens=512, batch_size=512, lr=1e-9), progress=False)
        rows = sae.W_dec.detach()
        inside[init] = float((rows @ basis).norm(dim=1).mean())
        dead[init] = int((~sae.encode(x).ne(0).any(0)).sum())
    assert inside["tied"] < 0.6 and inside["subspace"] > 0.9
    assert dead["subspace"] < dead["tied"]


@unchecked()
def test_progressive_keeps_what_matters(tiny, tokens):
    acts = sl.collect(tiny, tokens, HOOK, progress=False)
    cfg = sl.SAEConfig(d_in=32, d_sae=96, activation=sl.AbsTopK(k=6), prefixes=(12, 48, 96))
    sae = sl.SAE(cfg).fit(acts, sl.TrainConfig(n_tokens=10_000, batch_size=256), progress=False)
    found = sl.analysis.prune_dictionary(sae, tiny, tokens)
    whole = sl.evaluate(sae, tiny, tokens[len(tokens) // 2 :], baselines=False, n_bootstrap=0, progress=False)
    for order in ("energy", "frequency", "random", "prefix"):
        row = found.get(order, 96)
        assert row.fvu == pytest.approx(whole.fvu) and row.ce == pytest.approx(whole.ce_sae)
        assert row.l0 == pytest.approx(whole.l0)
    for size in (12, 48):
        assert found.get("prefix", size).fvu == pytest.approx(whole.prefixes[size])
        assert found.get("energy", size).fvu < found.get("random", size).fvu
        assert found.get("energy", size).l0 < found.get("energy", 96).l0
    assert found.n_tokens == whole.n_tokens and str(found)
    assert 0 < found.n_compared <= found.n_tokens
    assert found.get("energy", 12).rsa < found.get("energy", 96).rsa == found.get("random", 96).rsa < 1
    with torch.no_grad():
        x = Stage(model=tiny, hook_point=HOOK, mask=sl.TokenMask()).read(tokens[len(tokens) // 2 :])[0]
        z = sae.encode(x) * (torch.arange(96) < 48)
        pairs = torch.tril_indices(len(x), len(x), -1)
        likeness = [torch.corrcoef(one.double())[tuple(pairs)].numpy() for one in (x, sae.decode(z))]
    assert found.get("prefix", 48).rsa == pytest.approx(rank_correlation(*likeness), abs=1e-4)
    assert math.isnan(sl.analysis.prune_dictionary(sae, tiny, tokens, (96,), n_compared=2).rows[0].rsa)
    with pytest.raises(ValueError, match="`sizes`"):
        sl.analysis.prune_dictionary(sae, tiny, tokens, (97,))


def test_importance_does_not_depend_on_how_a_feature_is_scaled(tiny, tokens):
    """Codes half as large on rows twice as long are the same feature, which must keep its rank."""
    cfg = sl.SAEConfig(d_in=32, d_sae=D_SAE, activation=sl.ReLU(target_l0=4.0), dictionary="free", normalizer="none")
    sae, scaled = sl.SAE(cfg, seed=0), sl.SAE(cfg, seed=0)
    scale = torch.logspace(-1, 1, D_SAE)
    with torch.no_grad():
        scaled.W_enc.div_(scale)
        scaled.b_enc.div_(scale)
        scaled.W_dec.mul_(scale[:, None])
    one, other = (sl.analysis.prune_dictionary(each, tiny, tokens, (5, 20), hook_point=HOOK) for each in (sae, scaled))
    for size in (5, 20):
        assert one.get("energy", size).fvu == pytest.approx(other.get("energy", size).fvu, rel=1e-4)
        assert one.get("energy", size).ce == pytest.approx(other.get("energy", size).ce, rel=1e-4)


def test_windows_of_characters_are_as_long_as_those_of_words(store):
    """A token of a character says a quarter of what a word does: defaults are four times as wide, given numbers not."""
    from dataclasses import replace

    text = store.text
    assert replace(text, strings={i: f" word{i}" for i in range(400)}).widen(16) == 16
    letters = replace(text, strings={i: chr(97 + i % 26) for i in range(400)})
    assert letters.widen(16) == 64
    wide = sl.FeatureStore.load(store.folder)
    wide.text = replace(letters, doc_ids=np.zeros(len(text), np.int32), positions=np.arange(len(text), dtype=np.int32))
    longest = {}
    for before in (None, 5):
        groups = sl.analysis.max_activating_examples(wide, 0, before=before, after=before).groups
        longest[before] = max(len(example.text) for group in groups for example in group.examples)
    assert longest == {None: 64 + 32 + 1, 5: 11}


def test_columns_of_tables_never_touch():
    from saelab.stores.results import format_table

    rng = np.random.default_rng(0)
    rows = [
        ["x" * rng.integers(0, 60), *("9" * rng.integers(0, 20) for _ in range(rng.integers(1, 5)))] for _ in range(9)
    ]
    for line, row in zip(format_table(rows), rows, strict=True):
        assert line.split() == [cell for cell in row if cell]


def test_several_features_at_a_time_are_described_as_each_alone(store, monkeypatch):
    features = [5, 1, *range(store.d_sae - 3, store.d_sae)]
    alone = [sl.analysis.describe_feature(store, j, label=str(j)) for j in features]
    monkeypatch.setattr(dashboard, "HELD_CODES", int(store.statistics.fires.sum(1)[features].max()) + 1)
    found = sl.analysis.describe_features(store, features, labels={j: str(j) for j in features})
    assert list(found) == alone


def test_places_are_read_in_pieces_as_whole(store):
    opened = sl.FeatureStore.load(store.folder)
    whole = np.concatenate([arrays["places"] for _, arrays in opened.shards()])
    for start, stop in ((0, 5), (195, 205), (200, 400), (3, 3), (len(whole) - 2, len(whole) + 5)):
        assert np.array_equal(opened.where[start:stop], whole[start:stop])
