"""What steering is held against, and what is chosen to steer: planted directions, concepts and steering features."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, random as random_sparse
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import choose_threshold, score_guess
from saelab.lm.hook_points import hook_points_of
from saelab.lm.unembedding import read_out
from saelab.probing.labeled_activations import collect_labeled, read_chosen
from saelab.probing.linear_directions import density_matched_features, fit_direction
from saelab.probing.sparse_probing import probe_features
from saelab.steering.feature_scores import output_scores

POINT = "blocks.1.hook_resid_post"
METHODS = ("means", "probe", "pca", "kmeans")
RANKINGS = ("means", "f", "information", "l1", "pruning")


@pytest.fixture(scope="module")
def sae():
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=4)), seed=0)


@pytest.fixture(scope="module")
def store(sae, tiny, tiny_tokens, tmp_path_factory):
    return sl.harvest(sae, tiny, tiny_tokens, tmp_path_factory.mktemp("store"), hook_point=POINT, progress=False)


def planted(n=600, d=12, rate=0.5, apart=6.0, seed=0):
    """Points on two sides of an offset along a known unit vector."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(d, generator=generator)
    v = v / v.norm()
    y = torch.rand(n, generator=generator) < rate
    x = torch.randn(n, d, generator=generator) + apart * (y.float() - 0.5)[:, None] * v + 3.0
    return x, y, v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [0.5, 0.15])
def test_every_method_finds_a_planted_direction_and_its_sign(method, rate):
    x, y, v = planted(rate=rate, apart=8.0)
    found = fit_direction(x, y, POINT, method)
    assert float(found.vector @ v) > 0.95 and found.hook_point == POINT and found.name == method
    assert found.peak == pytest.approx(float((x @ found.vector).abs().max()))
    other = fit_direction(x, ~y, POINT, method)
    assert float(other.vector @ found.vector) < -0.99


def test_methods_say_what_they_are():
    """A loud nuisance takes the first component; the means and the probe look past it."""
    x, y, v = planted(apart=4.0)
    nuisance = torch.linalg.qr(torch.stack([v, torch.ones_like(v)], 1)).Q[:, 1]
    x = x + 10 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(1)) * nuisance
    cosines = {method: float(fit_direction(x, y, POINT, method).vector @ v) for method in METHODS}
    assert cosines["probe"] > 0.9 and cosines["pca"] < 0.5 and cosines["kmeans"] < 0.5
    torch.testing.assert_close(
        fit_direction(x, y, POINT).vector, torch.nn.functional.normalize(x[y].mean(0) - x[~y].mean(0), dim=0)
    )


@unchecked()
def test_directions_need_both_labels():
    x, y, _ = planted(n=20)
    for labels in (torch.ones_like(y), torch.zeros_like(y), y[:-1]):
        with pytest.raises(ValueError, match="must hold and not hold of some of the 20 rows"):
            fit_direction(x, labels, POINT)
    with pytest.raises(ValueError, match="must differ in their means"):
        fit_direction(torch.ones(20, 3), y, POINT)
    with pytest.raises(ValueError, match="`method` must be one of"):
        fit_direction(x, y, POINT, "svd")


def test_labeled_rows_are_those_of_collect_and_no_other_text_is_run(tiny, tiny_tokens, monkeypatch):
    labels = tiny_tokens.ids == int(tiny_tokens.ids[0, 3])
    found = collect_labeled(tiny, tiny_tokens, labels, POINT, n_tokens=40, seed=1)
    assert int(found.y.sum()) == 20 == int((~found.y).sum())
    x = sl.lm.capture(tiny, tiny_tokens.ids, [POINT])[POINT]
    flat, doc_ids = x.flatten(0, 1), tiny_tokens.doc_ids.flatten()
    nearest = torch.cdist(found.x, flat).argmin(1)
    torch.testing.assert_close(found.x, flat[nearest], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.doc_ids, doc_ids[nearest]) or len(flat.unique(dim=0)) < len(flat)
    assert torch.equal(labels.flatten()[nearest], found.y)
    again = collect_labeled(tiny, tiny_tokens, labels, POINT, n_tokens=40, seed=1)
    assert torch.equal(found.x, again.x)
    several = sl.lm.TokenLabels.of({"here": labels, "elsewhere": ~labels})
    named = collect_labeled(tiny, tiny_tokens, several, POINT, concept="here", n_tokens=40, seed=1)
    assert torch.equal(found.x, named.x) and torch.equal(found.y, named.y)
    with pytest.raises(ValueError, match="must be one of the labels"):
        collect_labeled(tiny, tiny_tokens, several, POINT)
    with pytest.raises(ValueError, match="`n_tokens` must be at least 2, one of each class, got -4"):
        collect_labeled(tiny, tiny_tokens, labels, POINT, n_tokens=-4)
    run = []
    monkeypatch.setattr(
        "saelab.probing.labeled_activations.capture", lambda m, ids, p: run.append(len(ids)) or sl.lm.capture(m, ids, p)
    )
    chosen = torch.zeros_like(labels)
    chosen[[5, 9], 2] = True
    torch.testing.assert_close(read_chosen(tiny, tiny_tokens, chosen, POINT), x[[5, 9], 2], rtol=1e-4, atol=1e-4)
    assert sum(run) == 2
    with pytest.raises(ValueError, match="got none True"):
        collect_labeled(tiny, tiny_tokens, torch.zeros_like(labels), POINT)
    with pytest.raises(ValueError, match="must have a mark for each token"):
        collect_labeled(tiny, tiny_tokens, labels[:3], POINT)


def test_a_rival_fires_as_often_and_has_nothing_to_do_with_the_concept(store):
    fires, dense = store.statistics.fires.sum(1), store.matrix().toarray()
    feature = int(np.argsort(fires)[len(fires) // 2])
    for labels in (None, dense[:, feature] > 0):
        limit = 0.1
        rivals = density_matched_features(store, feature, labels, n=3, most_correlated=limit)
        y = dense[:, feature] if labels is None else labels.astype(float)
        r = np.array([
            max(abs(np.corrcoef(column, y)[0, 1]), abs(np.corrcoef(np.abs(column), y)[0, 1])) if column.any() else 1.0
            for column in dense.T
        ])  # fmt: skip
        apart = np.abs(np.log(np.maximum(fires, 1) / fires[feature]))
        allowed = [j for j in range(len(fires)) if j != feature and fires[j] and r[j] <= limit]
        assert len(allowed) > 3 and sorted(apart[rivals]) == pytest.approx(sorted(apart[allowed])[:3])
        assert feature not in rivals and r[rivals].max() <= limit
    several = sl.lm.TokenLabels.of({"fires": labels, "quiet": ~labels})
    assert rivals == density_matched_features(store, feature, several, concept="fires", n=3, most_correlated=limit)
    with pytest.raises(ValueError, match="must have a mark for each"):
        density_matched_features(store, feature, labels[1:])
    assert rivals[0] not in density_matched_features(store, feature, n=2, most_correlated=limit, avoid=(rivals[0],))
    with pytest.raises(ValueError, match="must leave 41 features"):
        density_matched_features(store, feature, n=41)


def concept_codes(seed=0, n=4000, d=60):
    """Codes of 400 documents: the concept is feature 3 above 0 or feature 5 below 0; 7 fires in a quarter of it.

    Feature 9 fires rarely, and a thousand times as strongly; 11 tells the concept in the last documents alone.
    """
    rng = np.random.default_rng(seed)
    z = random_sparse(n, d, density=0.05, random_state=seed, format="csr", data_rvs=rng.standard_normal).toarray()
    y, doc_ids = rng.random(n) < 0.1, np.arange(n) // 10
    half = rng.random(n) < 0.5
    z[:, [3, 5, 7, 9, 11]] = 0
    z[y & half, 3] = rng.random((y & half).sum()) + 0.5
    z[y & ~half, 5] = -rng.random((y & ~half).sum()) - 0.5
    z[~y & (rng.random(n) < 0.1), 5] = 1.0
    z[y & (rng.random(n) < 0.25), 7] = 1.0
    z[rng.random(n) < 0.002, 9] = 1000.0
    return csr_matrix(z), y, doc_ids


@pytest.fixture(scope="module")
def probes():
    return probe_features(*concept_codes(), ks=(1, 2, 4), concept="planted")


@pytest.mark.parametrize("ranking", RANKINGS)
def test_probes_name_the_sides_of_a_planted_concept(probes, ranking):
    two = next(p for p in probes.probes if (p.ranking, p.k) == (ranking, 2))
    one = next(p for p in probes.probes if (p.ranking, p.k) == (ranking, 1))
    assert {(f.feature, f.sign) for f in two.features} == {(3, 1), (5, -1)} and all(f.weight > 0 for f in two.features)
    # What is told apart in training may lie beyond its extremes held out: as much text there, so m tokens with 2^-m.
    few, n_true = 10, probes.rate * probes.n_tokens
    wanted = dataclasses.replace(two.held_out, f1=1.0, auroc=1.0, accuracy=1.0, balanced=1.0, mcc=1.0, yes=probes.rate)
    found, wanted = dataclasses.asdict(two.held_out), dataclasses.asdict(wanted)
    assert found == pytest.approx(wanted, abs=few / n_true)
    assert 0.55 < one.held_out.f1 < 0.8  # either side alone has half of it
    assert two.shuffled.f1 < 0.3 and abs(two.shuffled.auroc - 0.5) < 0.15
    assert probes.random[2].f1 < 0.5


def test_the_best_probe_is_the_smallest_that_is_as_good(probes):
    assert probes.best().k == 2 and len(probes.features) == 2 and probes.best(4).k == 4
    assert probes.f1_always == pytest.approx(2 * probes.rate / (1 + probes.rate)) and 0.07 < probes.rate < 0.13
    assert probes.n_train + probes.n_tokens == 4000 and probes.n_documents == 120
    assert "3+" in str(probes) and "5-" in str(probes) and probes.to_dict()["concept"] == "planted"
    with pytest.raises(ValueError, match=r"`k` must be one that was probed, \[1, 2, 4\], got 3"):
        probes.best(3)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_loud_rare_feature_is_not_first(ranking):
    codes, y, doc_ids = concept_codes()
    codes = codes.toarray()
    codes[np.flatnonzero(y)[::40], 9] = (
        1000.0  # of a tenth of its firings, always with the concept: means differ by much
    )
    found = probe_features(codes, y, doc_ids, ks=(2,), rankings=(ranking,))
    assert {f.feature for f in found.features} == {3, 5}


def test_ranking_and_threshold_see_training_documents_alone():
    """A feature that tells held-out documents perfectly is not chosen; one that tells training ones is, and fails."""
    from saelab.stores.corpus import split_documents

    _, y, doc_ids = concept_codes()
    is_train = split_documents(doc_ids, 0.7, 0)
    z = np.zeros((len(y), 4))
    z[y & ~is_train, 0] = 1.0
    z[y & is_train, 1] = 1.0
    z[:, 2:] = np.random.default_rng(0).random((len(y), 2)) < 0.1
    found = probe_features(z, y, doc_ids, ks=(1,), rankings=("f", "pruning"))
    for probe in found.probes:
        assert probe.features[0].feature == 1 and probe.f1_train == 1.0 and probe.held_out.f1 < 0.3


def test_a_store_is_probed_like_its_codes(store):
    y = np.asarray(store.token_ids == np.bincount(store.token_ids).argmax())
    options = {"ks": (1, 3), "rankings": ("f",)}
    a, b = probe_features(store, y, **options), probe_features(store.matrix(), y, store.doc_ids, **options)
    assert str(a) == str(b) and a.probes[0].held_out == b.probes[0].held_out and a.best(3).held_out.auroc > 0.8
    few = probe_features(store, y, n_tokens=1000, **options)
    assert few.n_train + few.n_tokens <= 1100
    with pytest.raises(ValueError, match="`n_tokens` must be at least 1, got 0"):
        probe_features(store, y, n_tokens=0, **options)
    with pytest.raises(ValueError, match="`n_tokens` must be at least 1, got -5"):
        store.spread(-5)


def test_f1_mcc_and_auroc_are_those_of_scikit_learn():
    from sklearn.metrics import (
        accuracy_score,
        balanced_accuracy_score,
        cohen_kappa_score,
        f1_score,
        matthews_corrcoef,
        roc_auc_score,
    )

    rng = np.random.default_rng(0)
    y, scores = rng.random(300) < 0.2, rng.integers(0, 5, 300).astype(float)
    scores += y
    threshold, f1 = choose_threshold(scores, y)
    best = max(cohen_kappa_score(y, scores >= t) for t in np.unique(scores))
    assert cohen_kappa_score(y, scores >= threshold) == pytest.approx(best)
    assert f1 == pytest.approx(f1_score(y, scores >= threshold))
    told = score_guess(scores, y, threshold)
    assert told.f1 == pytest.approx(f1) and told.auroc == pytest.approx(roc_auc_score(y, scores))
    assert told.mcc == pytest.approx(matthews_corrcoef(y, scores >= threshold))
    assert told.accuracy == pytest.approx(accuracy_score(y, scores >= threshold))
    assert told.balanced == pytest.approx(balanced_accuracy_score(y, scores >= threshold))


def periodic_labels(kind, n=4000):
    """Labels that a text turned round keeps, and documents."""
    rows = np.arange(n)
    return {
        "alternating": (rows % 2 == 0, rows // 20),
        "paired": (rows % 2 == 0, rows // 2),
        "every row a document": (rows % 2 == 0, rows),
        "blocks": (rows // 10 % 2 == 0, rows // 100),
        "halves of documents": (rows % 50 < 25, rows // 50),
        "whole documents": (rows // 20 % 2 == 0, rows // 20),
        "whole documents of other lengths": (np.arange(n) ** 0.6 // 3 % 2 == 0, np.arange(n) ** 0.6 // 3),
        "mixed": (np.where(rows // 20 % 3 == 0, rows % 2 == 0, rows // 20 % 3 == 1), rows // 20),
    }[kind]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "kind",
    ["alternating", "paired", "every row a document", "blocks", "halves of documents", "whole documents",
     "whole documents of other lengths", "mixed"],
)  # fmt: skip
def test_the_null_of_a_probe_falls_whatever_the_labels_are_like(kind, seed):
    """A feature tells the label exactly; labels put elsewhere must not be told by it."""
    y, doc_ids = periodic_labels(kind)
    z = np.stack([y, np.random.default_rng(seed + 100).random(len(y)) < 0.3], 1).astype(float)
    found = probe_features(z, y, doc_ids, ks=(1,), rankings=("f",), seed=seed)
    probe = found.probes[0]
    n_exchanged = len(np.unique(doc_ids[:]))  # what is exchanged, where documents are
    allowed = 4 * 0.5 / np.sqrt(min(found.n_tokens, 0.3 * n_exchanged if "exchanged" in found.null else found.n_tokens))
    assert probe.held_out.balanced == 1.0
    assert abs(probe.shuffled.balanced - 0.5) < allowed and probe.shuffled.mcc < 2 * allowed
    assert found.null in str(found)


def test_always_yes_is_never_chosen_unnoticed():
    """Weak codes of a balanced label: F1 alone would say yes always, at .667."""
    rng = np.random.default_rng(0)
    y, doc_ids = rng.random(6000) < 0.5, np.arange(6000) // 10
    z = (rng.random(6000) < 0.45 + 0.1 * y).astype(float)[:, None]
    found = probe_features(z, y, doc_ids, ks=(1,), rankings=("f",))
    told, always = found.probes[0].held_out, found.baselines["always yes"]
    assert always.yes == 1.0 and always.balanced == 0.5 and always.f1 > told.f1
    low = 0.55 - 4 * (0.25 / 1800) ** 0.5  # 1,800 held-out tokens, 4 standard errors
    assert told.yes < 0.6 and told.balanced > low and told.mcc > 2 * (low - 0.5) * 0.99


def test_a_dense_probe_the_best_neuron_and_an_untrained_dictionary_stand_beside_a_probe():
    rng = np.random.default_rng(0)
    codes, y, doc_ids = concept_codes()
    x = rng.normal(size=(len(y), 6)).astype(np.float32)
    x[:, 4] -= 2.0 * y
    x[:, 2] += 1.0 * y
    empty = (rng.random(codes.shape) < 0.05).astype(float)
    options = {"ks": (2,), "rankings": ("f",)}
    found = probe_features(codes, y, doc_ids, acts=x, untrained=empty, **options)
    beside = found.baselines
    assert beside["activations"].auroc > beside["best neuron"].auroc > 0.85
    assert beside["all features"].balanced > 0.95 and "best neuron" in str(found)
    assert found.probes[0].untrained.mcc < 0.2 < 0.9 < found.probes[0].held_out.mcc
    plain = probe_features(codes, y, doc_ids, **options)
    assert np.isnan(plain.probes[0].untrained.f1) and set(plain.baselines) == {"always yes", "all features"}
    with pytest.raises(ValueError, match="`acts` must have a row for each of the 4000 tokens, got 9"):
        probe_features(codes, y, doc_ids, acts=x[:9], **options)
    with pytest.raises(ValueError, match="`untrained` and `doc_ids` must have one for each token, got 9"):
        probe_features(codes, y, doc_ids, untrained=empty[:9], **options)


@unchecked()
def test_probing_refuses_what_makes_no_sense():
    codes, y, doc_ids = concept_codes()
    for change, match in (
        ({"doc_ids": None}, "`doc_ids` must be given"),
        ({"labels": np.zeros_like(y)}, "Both labels must occur in training documents"),
        ({"labels": y[:-1]}, "must have one for each"),
        ({"ks": (0,)}, "`ks` must be numbers of sides"),
        ({"ks": (500,)}, "at most the number of sides that fire"),
        ({"rankings": ("svd",)}, "`rankings` must be of"),
    ):
        with pytest.raises(ValueError, match=match):
            probe_features(**({"codes": codes, "labels": y, "doc_ids": doc_ids} | change))


def test_output_scores_are_those_of_steering_one_by_one(tiny, sae, store):
    prompts, strength = ["The owl", "A fox sees"], 3.0
    found = output_scores(tiny, sae, store, prompts=prompts, strength=strength, n_top=5, n_contexts=7, hook_point=POINT)
    peaks = store.statistics.peaks
    assert [(r.feature, r.sign) for r in found.rows] == [(j, 1 - 2 * s) for j, s in np.argwhere(peaks > 0).tolist()]
    effects = read_out(tiny, sae.directions())
    for row in found.rows[::5]:
        promoted = (row.sign * effects[row.feature]).topk(5).indices.tolist()
        scores, chances = [], []
        for prompt in prompts:
            ids = sl.tokenize(tiny, [prompt], 32, packed=False, separator=None)
            change = {row.feature: strength * float(peaks[row.feature, int(row.sign < 0)]) * row.sign}
            with sl.steer(tiny, sae, change, where=[-1], hook_point=POINT):
                p = sl.lm.logits(tiny, ids.ids[:, : ids.n_tokens])[0, -1].softmax(-1)
            rank = min(int((p > p[t]).sum()) for t in promoted)
            scores.append(float(p[promoted].max()) * (1 - rank / len(p)))
            chances.append(p[promoted])
        assert row.output == pytest.approx(np.mean(scores), rel=1e-3, abs=1e-6)
        assert row.probability == pytest.approx(float(torch.stack(chances).mean(0).max()), rel=1e-3)
        # the strongest token of each document, the strongest documents first
        firings, tops = store.feature(row.feature), {}
        for i in np.argsort(-firings.values * row.sign, kind="stable"):
            if firings.values[i] * row.sign > 0 and len(tops) < 7:
                tops.setdefault(store.doc_ids[firings.indices[i]], store.token_ids[firings.indices[i]])
        assert row.n_contexts == len(tops)
        assert row.input == pytest.approx(np.mean([token in promoted for token in tops.values()]))


def test_a_feature_that_writes_a_token_steers_best(tiny, tiny_tokens, tmp_path):
    """The direction of one token's unembedding, among random ones."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=4), normalizer="none"), seed=0)
    token = 70
    with torch.no_grad():
        weight = hook_points_of(tiny).components["unembed"].weight
        sae.W_dec[6] = torch.nn.functional.normalize(
            weight[token] if weight.shape[1] == 32 else weight[:, token], dim=0
        )
    store = sl.harvest(sae, tiny, tiny_tokens[:8], tmp_path / "store", hook_point=POINT, progress=False)
    found = output_scores(tiny, sae, store, [5, 6], prompts="The", strength=1000.0, n_top=1, hook_point=POINT)
    best = found.top(1)[0]
    assert (best.feature, best.sign, best.token) == (6, 1, tiny.tokenizer.decode([token]))
    assert best.output > 3 * max(row.output for row in found.rows if row is not best)
    assert {row.feature for row in found.rows} == {5, 6} and "6+" in str(found)
    with pytest.raises(ValueError, match=r"`features` must be in 0\.\.39"):
        output_scores(tiny, sae, store, [40], hook_point=POINT)
    with pytest.raises(ValueError, match="`by` must be"):
        found.top(by="luck")


def test_prompts_of_unknown_words_are_refused(sae, store):
    with pytest.raises(ValueError, match="must be of words that the model knows, got 'From my experience,'"):
        output_scores(sl.load_model("tales", progress=False), sae, store, hook_point="blocks.2.hook_resid_post")


def test_blocks_do_not_matter(tiny, sae, store, monkeypatch):
    whole = output_scores(tiny, sae, store, prompts="The", hook_point=POINT)
    monkeypatch.setattr("saelab.steering.feature_scores.BLOCK", 7)
    parts = output_scores(tiny, sae, store, prompts="The", hook_point=POINT)
    for a, b in itertools.zip_longest(whole.rows, parts.rows):
        assert (a.feature, a.sign, a.input, a.n_contexts) == (b.feature, b.sign, b.input, b.n_contexts)
        assert a.output == pytest.approx(b.output, abs=1e-5)
