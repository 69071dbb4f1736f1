"""Spaces of matched pairs: planted truth, naive computations of every measure, chance, and which pairs count."""

import json

import numpy as np
import pytest
from same_seeds import rng_of
from scipy.linalg import subspace_angles
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import spearmanr
from unchecked import unchecked

from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore
from saelab.universality import representation_similarity as paired_module
from saelab.universality.representation_similarity import (
    MEASURES,
    Paired,
    compare_spaces,
    linear_cka,
    neighbor_overlap,
    principal_angles,
    procrustes,
    relative_agreement,
    rsa,
    svcca,
    svcca_one,
)
from saelab.universality.universal_features import filter_one_to_one, filter_token_pairs, match_keywords, search_labels

PUBLIC = {
    "svcca": svcca,
    "svcca_one": svcca_one,
    "principal_angles": principal_angles,
    "linear_cka": linear_cka,
    "procrustes": procrustes,
    "rsa": rsa,
    "relative_agreement": relative_agreement,
    "neighbor_overlap": neighbor_overlap,
}
ROTATION_FREE = [name for name in PUBLIC if name != "rsa"]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def spectrum(seed, n, d):
    """Rows whose coordinates differ in variance, so that principal components are far apart."""
    return draw(seed, n, d) * np.linspace(3, 0.5, d)


def rotation(seed, d):
    return np.linalg.qr(draw(seed, d, d))[0]


def related(n=60, d_x=6, d_y=9):
    """Two spaces of different width that share something, shifted."""
    x = spectrum(0, n, d_x)
    return x, np.hstack([x[:, ::-1], draw(1, n, d_y - d_x)]) + draw(2, n, d_y) + 5


# ---- each measure beside a naive one
def unbiased_hsic(k, m):
    n, ones = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


def naive_cka(x, y):
    k, m = x @ x.T, y @ y.T
    return unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))


def plain_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def naive_components(x, frac=None, leading=None):
    centered = x - x.mean(0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    values, vectors = values[::-1], vectors[:, ::-1]
    shares = [values[:k].sum() / values.sum() for k in range(1, len(values) + 1)]
    k = leading or next(i + 1 for i, share in enumerate(shares) if share >= frac)
    return centered @ vectors[:, :k]


def naive_svcca(x, y):
    return np.cos(subspace_angles(naive_components(x, 0.99), naive_components(y, 0.99))).mean()


def naive_svcca_one(x, y):
    return abs(np.corrcoef(naive_components(x, leading=1)[:, 0], naive_components(y, leading=1)[:, 0])[0, 1])


def naive_angles(x, y):
    return np.cos(subspace_angles(naive_components(x, leading=10), naive_components(y, leading=10))).mean()


def naive_procrustes(x, y):
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (x, y))
    return 1 - scipy_procrustes(x, y)[2]


def naive_rsa(x, y):
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    tables = [[cosine(side[i] - side[i].mean(), side[j] - side[j].mean()) for i, j in pairs] for side in (x, y)]
    return spearmanr(*tables).statistic


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def naive_relative(x, y):
    is_anchor = Paired.make(x, y, rng_of(0).spawn(1)[0]).x.is_anchor
    assert is_anchor.sum() == len(x) // 2
    sides = (side - side.mean(0) for side in (x, y))
    return [np.array([[cosine(row, a) for a in side[is_anchor]] for row in side[~is_anchor]]) for side in sides]


def naive_agreement(x, y):
    return np.mean([cosine(a, b) for a, b in zip(*naive_relative(x, y), strict=True)])


def naive_overlap(x, y):
    n_near, found = len(x) // 2 // 10, []
    for rows in naive_relative(x, y):
        near = [sorted((-cosine(a, b), j) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
        found.append([{j for _, j in row[:n_near]} for row in near])
    return np.mean([len(a & b) / n_near for a, b in zip(*found, strict=True)])


NAIVE = {
    "svcca": naive_svcca,
    "svcca_one": naive_svcca_one,
    "principal_angles": naive_angles,
    "linear_cka": naive_cka,
    "procrustes": naive_procrustes,
    "rsa": naive_rsa,
    "relative_agreement": naive_agreement,
    "neighbor_overlap": naive_overlap,
}


def test_every_measure_is_public_and_tested():
    assert list(PUBLIC) == list(MEASURES) == list(NAIVE)


@pytest.mark.parametrize(
    ("name", "d_x", "d_y"),  # scipy's angles want fewer dimensions than rows, and ten components ten dimensions
    [(name, 6, 9) for name in NAIVE if name != "principal_angles"]
    + [(name, 30, 80) for name in NAIVE if name != "svcca"],
)
def test_a_measure_is_what_a_naive_computation_gives(name, d_x, d_y):
    x, y = related(40, d_x, d_y)
    assert PUBLIC[name](x, y) == pytest.approx(NAIVE[name](x, y), abs=1e-6)
    assert PUBLIC[name](y, x) == pytest.approx(NAIVE[name](x, y), abs=1e-6)


@pytest.mark.parametrize("name", NAIVE)
def test_shuffles_are_what_recomputation_gives(name):
    x, y = related(30)
    found = compare_spaces(x, y, measures=[name], n_shuffles=20, seed=3)[name]
    sampling, shuffling = rng_of(3).spawn(2)
    state = sampling.bit_generator.state
    values = []
    for _ in range(20):
        order = shuffling.permutation(30)
        sampling.bit_generator.state = state
        values.append(MEASURES[name](Paired.make(x, y[order], sampling)))
    assert found.chance == pytest.approx(np.mean(values), abs=1e-7)
    assert found.chance_95 == pytest.approx(np.quantile(values, 0.95), abs=1e-7)
    assert found.excess == pytest.approx(found.value - np.mean(values), abs=1e-7)
    assert found.p == pytest.approx((1 + sum(v >= found.value - 1e-7 for v in values)) / 21)
    assert np.ptp(values) > 1e-4


# ---- planted truth
def test_equal_spaces_up_to_rotation_are_found_so():
    x = spectrum(0, 300, 12)
    found = compare_spaces(x, 0.01 * x @ rotation(1, 12) + 7, n_shuffles=30)
    assert found.n_pairs == 300 and found.n_components == (11, 11)  # the last has half a percent
    for name in ROTATION_FREE:
        assert found[name].value == pytest.approx(1, abs=1e-5), name
        assert found[name].p == pytest.approx(1 / 31)
        assert found[name].chance <= found[name].chance_95 < 0.35
        assert found[name].excess > 0.7
    assert found["rsa"].p == pytest.approx(1 / 31)
    assert str(found).count("< 1/31") == len(MEASURES) and " 0.032" not in str(found)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_changes_nothing(name):
    x, y = related(80)
    value = PUBLIC[name](x, y)
    turned = rotation(4, 9) if name != "rsa" else np.eye(9)[::-1]
    assert PUBLIC[name](x * 1e60, y @ turned * 1e60) == pytest.approx(value, abs=1e-6)
    assert PUBLIC[name](x + 4, y * 1e-30) == pytest.approx(value, abs=1e-6)
    assert PUBLIC[name](-x, y.astype(np.float32)) == pytest.approx(value, abs=1e-5)
    assert PUBLIC[name](np.hstack([x, x]), y) == pytest.approx(value, abs=1e-6)
    if name == "rsa":  # rows may be scaled one by one
        assert rsa(x * np.arange(1, 81)[:, None], y + np.arange(80)[:, None]) == pytest.approx(value, abs=1e-6)
        assert abs(rsa(x, y @ rotation(4, 9)) - value) > 1e-3
    if name not in ("relative_agreement", "neighbor_overlap"):  # whose anchors are drawn by place
        order = np.random.default_rng(0).permutation(80)
        assert PUBLIC[name](x[order], y[order]) == pytest.approx(value, abs=1e-6)


def test_a_flipped_pair_is_the_callers_to_turn():
    x = draw(0, 200, 8)
    sign = np.where(draw(1, 200) > 0, 1.0, -1.0)
    flipped = x * sign[:, None]
    assert linear_cka(x, flipped) < 0.1 and svcca(x, flipped) < 0.4
    assert linear_cka(x, flipped * sign[:, None]) == pytest.approx(1)


@unchecked()
def test_independent_rows_are_within_chance():
    p = {name: [] for name in MEASURES}
    for seed in range(25):
        found = compare_spaces(draw(2 * seed, 30, 4), draw(2 * seed + 1, 30, 5), n_shuffles=19, seed=seed)
        for name in MEASURES:
            p[name].append(found[name].p)
    for name, values in p.items():
        assert min(values) >= 1 / 20
        assert np.mean(values) > 0.525 - 4 * 0.29 / np.sqrt(25), name
        assert np.mean(np.array(values) <= 0.25) < 0.6, name
        if name != "neighbor_overlap":  # a share of few has ties, which count against it
            assert np.mean(values) < 0.525 + 4 * 0.29 / np.sqrt(25), name


@unchecked()
def test_one_component_has_the_published_chance():
    n = 101
    score = compare_spaces(spectrum(0, n, 6), spectrum(1, n, 6), measures=["svcca_one"], n_shuffles=1500)["svcca_one"]
    assert score.chance == pytest.approx(np.sqrt(2 / (np.pi * n)), rel=0.08)
    fresh = [svcca_one(spectrum(2 * i, n, 6), spectrum(2 * i + 1, n, 6)) for i in range(200)]
    assert np.mean(fresh) == pytest.approx(np.sqrt(2 / (np.pi * n)), rel=0.2)


def test_few_pairs_overfit_and_the_excess_says_so():
    few = compare_spaces(draw(0, 50, 40), draw(1, 50, 40), measures=["svcca", "linear_cka"], n_shuffles=50)
    assert few["svcca"].value > 0.7 and few["svcca"].chance > 0.7
    assert abs(few["svcca"].excess) < 0.02 and few["svcca"].p > 0.02
    assert "read the excess" in few["svcca"].note and "read the excess" in str(few)
    assert abs(few["linear_cka"].value) < 0.1 < plain_cka(draw(0, 50, 40), draw(1, 50, 40)) - 0.2
    none = compare_spaces(draw(0, 20, 400), draw(1, 20, 400), measures=["svcca"], n_shuffles=9)["svcca"]
    assert none.value == pytest.approx(1) and none.excess == pytest.approx(0, abs=1e-6) and none.p == 1
    many = compare_spaces(draw(0, 500, 4), draw(1, 500, 4), measures=["svcca"], n_shuffles=5)
    assert many["svcca"].note == "" and many["svcca"].chance < 0.15


def test_more_pairs_than_are_compared_with_each_other(monkeypatch):
    monkeypatch.setattr(paired_module, "SAMPLED_ROWS", 40)
    x = spectrum(0, 300, 6)
    names = ["rsa", "relative_agreement", "neighbor_overlap"]
    found = compare_spaces(x, x + 0.2 * draw(1, 300, 6), measures=names, n_shuffles=30)
    for name in names:
        assert "of 40 rows" in found[name].note
        assert found[name].p == pytest.approx(1 / 31) and abs(found[name].chance) < 0.2
    assert found["rsa"].value > 0.8
    assert rsa(x, x[:, :5] ** 3, seed=0) != rsa(x, x[:, :5] ** 3, seed=1)
    assert rsa(x, x[:, :5] ** 3, seed=1) == rsa(x, x[:, :5] ** 3, seed=1)


# ---- where nothing can be said
@pytest.mark.parametrize(
    ("x", "y", "name", "reason"),
    [
        (draw(0, 2, 4), draw(1, 2, 4), "svcca", "needs 3 pairs"),
        (np.zeros((0, 4)), np.zeros((0, 4)), "procrustes", "needs 3 pairs"),
        (draw(0, 3, 4), draw(1, 3, 4), "linear_cka", "needs 4 pairs"),
        (draw(0, 5, 4), draw(1, 5, 4), "neighbor_overlap", "needs 6 pairs"),
        (np.full((9, 4), 0.1), draw(1, 9, 4), "svcca_one", "all rows of x are equal"),
        (draw(0, 9, 4), np.zeros((9, 4)), "rsa", "all rows of y are equal"),
        (draw(0, 9, 0), draw(1, 9, 2), "relative_agreement", "all rows of x are equal"),
        (draw(0, 9, 4), np.eye(9), "linear_cka", "all rows of y are equally far apart"),
        (draw(0, 9, 4), np.eye(9), "rsa", "all rows of y are equally alike"),
        (draw(0, 9, 4), np.vstack([np.ones((2, 4)), draw(1, 7, 4)]), "rsa", "2 rows of y are constant"),
        (draw(0, 9, 1), draw(1, 9, 4), "rsa", "9 rows of x are constant"),
    ],
)
def test_what_means_nothing_is_nan_and_says_why(x, y, name, reason):
    found = compare_spaces(x, y, measures=[name], n_shuffles=3)
    score = found[name]
    assert reason in score.note and reason in str(found)
    assert np.isnan([score.value, score.chance, score.chance_95, score.excess, score.p]).all()
    assert np.isnan(PUBLIC[name](x, y))


def test_one_dimension_is_a_space():
    x = draw(0, 50, 1)
    found = compare_spaces(x, -2 * x, n_shuffles=5)
    assert all(found[name].value == pytest.approx(1) for name in ROTATION_FREE if name != "neighbor_overlap")


def test_wrong_input_is_refused():
    x = draw(0, 9, 4)
    with pytest.raises(ValueError, match="as many on both sides, got"):
        compare_spaces(x, x[:8])
    with pytest.raises(ValueError, match="one row a pair"):
        Paired.make(x[0], x[0], np.random.default_rng(0))
    with pytest.raises(ValueError, match="must be finite"):
        compare_spaces(x, np.where(x > 1, np.nan, x))
    with pytest.raises(ValueError, match="must be among svcca"):
        compare_spaces(x, x, measures=["cca"])
    with pytest.raises(ValueError, match="`n_shuffles` at least 1"):
        compare_spaces(x, x, n_shuffles=0)


def test_a_comparison_is_written_and_repeats_itself(tmp_path):
    x, y = related(40)
    found = compare_spaces(x, y, n_shuffles=4, seed=2)
    assert compare_spaces(x, y, n_shuffles=4, seed=2) == found != compare_spaces(x, y, n_shuffles=4, seed=3)
    found.save(tmp_path / "spaces.json")
    written = json.loads((tmp_path / "spaces.json").read_text())
    assert written["scores"]["rsa"]["p"] == found["rsa"].p and written["n_components"] == [*found.n_components]
    assert str(found).splitlines()[0].startswith("40 pairs, 4 shuffled pairings")


# ---- which pairs count
def test_concept_filters_count_each_pair_once():
    good = [[" Rain", "snow"], ["Straße"], ["\U0001f327"], ["2024"], ["<b>x"], ["don't"], ["\ufeffrain"]]
    bad = {
        "nothing shared": [(["rain"], ["rains"]), ([], []), (["."], [","]), (["a"], [])],
        "special": [(["x", s], ["x"]) for s in ("<|endoftext|>", "<bos>", "</s>", "[SEP]", "|bos|", " <PAD>", "Q")],
        "blank": [(["x"], ["x", s]) for s in ("", " ", "\n", "\r\n\t", "\u00a0", "\u200b", "\x00", " \u2028")],
        "punctuation": [(["x", s], ["x"]) for s in (".", " -", "...", "\u201d", "|", "$", "\u3002", "\n}", "_", "`")],
    }
    pairs = [(tokens, tokens[::-1]) for tokens in good] + [pair for rule in bad.values() for pair in rule]
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    kept = filter_token_pairs([pairs[i][0] for i in order], [pairs[i][1] for i in order], special=["Q"])
    assert [i < len(good) for i in order] == kept.keep.tolist()
    assert kept.removed == {name: len(listed) for name, listed in bad.items()}
    assert kept.n_kept + sum(kept.removed.values()) == len(pairs)
    assert kept.to_dict() == {"removed": kept.removed, "n_kept": len(good)}
    assert str(kept).splitlines()[-1].split() == ["kept", "7", f"{7 / len(pairs):.2%}"]


def test_tokens_are_shared_across_tokenizers():
    assert filter_token_pairs([[" The", "a"]], [["the"]]).n_kept == 1
    assert filter_token_pairs([], []).n_kept == 0 and "kept" in str(filter_token_pairs([], []))
    with pytest.raises(ValueError, match=r"one entry a pair, got \[1, 2\]"):
        filter_token_pairs([["a"]], [["a"], ["b"]])


def test_one_to_one_keeps_the_strongest():
    rng = np.random.default_rng(0)
    a, b, strength = rng.integers(40, size=300), rng.integers(30, size=300), rng.uniform(-1, 1, size=300)
    kept = filter_one_to_one(a, b, strength)
    chosen = np.flatnonzero(kept.keep)
    assert len(set(a[chosen])) == len(chosen) == len(set(b[chosen]))
    assert kept.n_kept + sum(kept.removed.values()) == 300
    for i in np.flatnonzero(~kept.keep):  # something stronger stands in its way
        baselines = chosen[(a[chosen] == a[i]) | (b[chosen] == b[i])]
        assert abs(strength[baselines]).max() > abs(strength[i])


def test_one_to_one_of_many_to_one_and_of_equals():
    many = filter_one_to_one(np.array([7, 7, 7, 2]), np.arange(4), np.array([0.1, np.nan, -0.8, 0.3]))
    assert many.keep.tolist() == [False, False, True, True]
    assert many.removed == {"repeated in a": 2, "repeated in b": 0}
    assert filter_one_to_one(np.array([1, 2]), np.array([0, 0]), np.ones(2)).keep.tolist() == [True, False]
    assert filter_one_to_one(np.array([1, 2]), np.array([0, 0]), np.ones(2)).removed["repeated in b"] == 1
    with pytest.raises(ValueError, match="one entry a pair"):
        filter_one_to_one(np.array([1]), np.array([0, 0]), np.ones(2))


def test_keywords_are_whole_tokens():
    tops = [[" Monday", "x"], ["monday\n"], ["mondays"], [], ["MAY"], ["maybe"]]
    assert match_keywords(tops, [" MONDAY", "May", ""]).tolist() == [True, True, False, False, True, False]
    for nothing in ([], ["", " "]):
        with pytest.raises(ValueError, match="must hold a word"):
            match_keywords(tops, nothing)


def test_features_by_label(tmp_path):
    with LabelStore(tmp_path / "labels.sqlite") as book:
        texts = {5: "heavy storms", 2: "storm", 9: "calm seas"}
        book.add(Label(feature=i, text=text, author="me") for i, text in texts.items())
        book.add([Label(feature=2, sign=-1, text="storm over", author="me")])
        book.add([Label(feature=3, text="no good name: storm", kind="none", author="me")])
        assert sorted(search_labels(book, "storm").tolist()) == [2, 5]
        assert np.isin([9, 5], search_labels(book, "storm")).tolist() == [False, True]
        assert search_labels(book, "desert").tolist() == []
