"""Scores against known concepts: planted truth, and the fast path against plain dense arithmetic."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score, roc_auc_score

import saelab as sl
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.feature_classifiers import concept_baselines, encode_csr
from saelab.lm.token_labels import Concept, TokenLabels
from saelab.stores.corpus import split_documents
from saelab.synthetic.tales import generate_stories

N_STORIES, STORY = 60, 40
STORY_IDS = np.repeat(np.arange(N_STORIES), STORY)
N_TOKENS = len(STORY_IDS)
TRAIN = split_documents(STORY_IDS)
FRACTIONS = np.arange(10) / 10
TABLE = (
    Concept("animal", "root"),
    Concept("cat", "word", parent="animal"),
    Concept("dog", "word", parent="animal"),
    Concept("hot", "pole", opposite="cold"),
    Concept("cold", "pole", opposite="hot"),
    Concept("round", "one-sided"),
    Concept("magic", "one-sided"),
    Concept("often", "state", opposite="seldom"),
    Concept("seldom", "state", opposite="often"),
    Concept("never", "fact"),
)
PLACE = {concept.name: c for c, concept in enumerate(TABLE)}


@pytest.fixture(scope="module")
def truth():
    """Exclusive words of about a tenth of the tokens each, a state of every second story, and one that never holds."""
    rng = np.random.default_rng(0)
    word = rng.integers(0, 10, N_TOKENS)
    t = np.zeros((N_TOKENS, len(TABLE)), bool)
    for i, name in enumerate(("cat", "dog", "hot", "cold", "round", "magic")):
        t[:, PLACE[name]] = word == i
    t[:, PLACE["animal"]] = word < 2
    t[:, PLACE["often"]] = rng.random(N_STORIES)[STORY_IDS] < 0.5
    t[:, PLACE["seldom"]] = ~t[:, PLACE["often"]]
    return t


def label(truth, table=TABLE):
    return TokenLabels.of(csr_matrix(truth), table, STORY_IDS)


def score(codes, truth, **options):
    return score_concepts(csr_matrix(codes), label(truth), **options)


def row_of(scores, name):
    return scores.concepts[PLACE[name]]


def perfect(truth):
    """One positive feature a concept."""
    return truth.astype(np.float32)


def noisy(seed=1, d_sae=12, k=4):
    """Signed codes, k a token, that know nothing for sure."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((N_TOKENS, d_sae)).astype(np.float32)
    return np.where(np.abs(z) >= np.sort(np.abs(z), 1)[:, [-k]], z, 0)


def informed(truth, seed=2):
    """Noise and, in the first features, noisy news of the concepts."""
    rng = np.random.default_rng(seed)
    z = noisy(seed)
    z[:, : truth.shape[1]] += (truth * rng.random(truth.shape) * 4).astype(np.float32)
    return z


# Plain dense arithmetic, one classifier at a time


def classifiers(z):
    """Every (feature, side, t) with the tokens it fires on, thresholds from training tokens."""
    for f, side in itertools.product(range(z.shape[1]), (1, -1)):
        peak = max(0.0, float((side * z[TRAIN, f]).max()))
        for t in FRACTIONS:
            yield f, side, t, (side * z[:, f] > 0) & (side * z[:, f].astype(float) > t * peak) & (peak > 0)


def plain_f1(yes, true):
    return 2 * (yes & true).sum() / max(1, yes.sum() + true.sum())


def plain_best(z, true):
    return max(classifiers(z), key=lambda one: plain_f1(one[3][TRAIN], true[TRAIN]))


def plain_split(z, true):
    yes, n = plain_best(z, true)[3][TRAIN], 1
    while n < 10:
        union = max((yes | one[3][TRAIN] for one in classifiers(z)), key=lambda yes: plain_f1(yes, true[TRAIN]))
        if plain_f1(union, true[TRAIN]) <= plain_f1(yes, true[TRAIN]) + 0.03:
            break
        yes, n = union, n + 1
    return n


def plain_reconstruction(z, truth, t):
    predicted = np.zeros_like(truth)
    for _, _, at, yes in classifiers(z):
        n = yes[TRAIN].sum()
        if at == t and n >= 10:
            precise = truth[TRAIN & yes].sum(0) >= 0.95 * n
            predicted[np.ix_(yes, precise)] = True
    return predicted


def test_the_fast_path_agrees_with_plain_arithmetic(truth) -> None:
    z = informed(truth)
    scores = score(z, truth)
    for row, true in zip(scores.concepts[:-1], truth.T, strict=False):
        f, side, t, yes = plain_best(z, true)
        assert (row.feature, row.side, row.fraction) == (f, side, pytest.approx(t))
        np.testing.assert_array_equal(yes, side * z[:, f] > row.threshold)
        held = yes[~TRAIN], true[~TRAIN]
        assert row.f1 == pytest.approx(f1_score(held[1], held[0]))
        assert row.precision == pytest.approx((held[0] & held[1]).sum() / held[0].sum())
        assert row.recall == pytest.approx((held[0] & held[1]).sum() / held[1].sum())
        assert row.auroc == pytest.approx(roc_auc_score(true[~TRAIN], (side * z[~TRAIN, f]).clip(0)))
        assert (row.n_train, row.n_tokens, row.n_fires) == (true[TRAIN].sum(), true[~TRAIN].sum(), held[0].sum())
        assert row.n_split == plain_split(z, true)
    assert scores.coverage == pytest.approx(np.mean([row.f1 for row in scores.concepts[:-1]]))


def test_codes_of_every_kind_are_read(truth) -> None:
    z = informed(truth)
    codes = torch.from_numpy(z)
    for same in (z, codes, sl.functional.SparseCodes.from_dense(codes)):
        assert score_concepts(same, label(truth)).to_dict() == score(z, truth).to_dict()


def test_reconstruction_agrees_with_plain_arithmetic(truth) -> None:
    rng = np.random.default_rng(3)
    z = np.concatenate([truth * rng.random(truth.shape) * (rng.random(truth.shape) < 0.6), noisy()], 1)
    # a feature precise only where it is strong
    z[:, 0] += 0.5 * rng.random(N_TOKENS) * (rng.random(N_TOKENS) < 0.2)
    z = z.astype(np.float32)
    scores = score(z, truth)
    of_t = [plain_reconstruction(z, truth, t) for t in FRACTIONS]
    best = int(np.argmax([plain_f1(p[TRAIN], truth[TRAIN]) for p in of_t]))
    assert scores.reconstruction_fraction == FRACTIONS[best]
    assert scores.reconstruction == pytest.approx(plain_f1(of_t[best][~TRAIN], truth[~TRAIN]))
    by_token = zip(of_t[best][~TRAIN], truth[~TRAIN], strict=True)
    assert scores.reconstruction_macro == pytest.approx(np.mean([plain_f1(p, t) for p, t in by_token if (p | t).any()]))


def test_perfect_features_score_one_and_nothing_is_dropped(truth) -> None:
    scores = score(perfect(truth), truth)
    for row in scores.scored:
        assert (row.f1, row.precision, row.recall, row.auroc, row.n_split) == (1, 1, 1, 1, 1)
    assert (scores.coverage, scores.reconstruction, scores.parent_recall) == (1, 1, 1)
    assert len(scores.concepts) == len(TABLE)
    never = row_of(scores, "never")
    assert never.reason == "fewer than 20 tokens in training and held-out stories"
    assert math.isnan(never.f1) and math.isnan(never.auroc) and never.feature is None and never.n_split is None
    feature, side, threshold, f1 = scores.best("cat")
    assert (feature, side, f1) == (PLACE["cat"], 1, 1) and 0 <= threshold < 1
    with pytest.raises(KeyError, match="got 'unicorn'"):
        scores.best("unicorn")


def test_rare_concepts_say_on_which_side(truth) -> None:
    rare = truth.copy()
    rare[:, PLACE["cat"]] &= TRAIN
    rare[:, PLACE["dog"]] &= ~TRAIN
    scores = score(perfect(rare), rare)
    assert row_of(scores, "cat").reason == "fewer than 20 tokens in held-out stories"
    assert row_of(scores, "dog").reason == "fewer than 20 tokens in training stories"
    assert not scores.parents
    assert row_of(score(perfect(rare), rare, min_count=10_000), "hot").reason
    cold = replace(TABLE[PLACE["cat"]], opposite="hot")
    table = (*TABLE[:1], cold, *TABLE[2:3], replace(TABLE[3], opposite="cat"), *TABLE[4:])
    pair = score_concepts(perfect(rare), label(rare, table)).pairs[0]
    assert (pair.a, pair.b, pair.on_two_sides) == ("cat", "hot", False) and math.isnan(pair.f1)
    assert pair.reason.startswith("cat: fewer than 20")


def test_the_negative_side_counts_like_the_positive_one(truth) -> None:
    z = informed(truth)
    up, down = score(z, truth), score(-z, truth)
    for a, b in zip(up.scored, down.scored, strict=True):
        assert (a.feature, a.side, a.f1, a.auroc, a.n_split) == (b.feature, -b.side, b.f1, b.auroc, b.n_split)
    assert up.reconstruction == down.reconstruction


def test_held_out_is_held_out(truth) -> None:
    z = perfect(truth)
    z[~TRAIN, PLACE["cat"]] = np.random.default_rng(4).random((~TRAIN).sum()) < 0.1
    row = row_of(score(z, truth), "cat")
    assert row.feature == PLACE["cat"] and row.f1_train == 1 and row.f1 < 0.3 and row.auroc < 0.6
    # what only works on held-out stories is not chosen
    z = perfect(truth)
    z[TRAIN, PLACE["cat"]] = 0
    row = row_of(score(z, truth), "cat")
    assert row.feature == PLACE["animal"] and row.f1 < 0.8


def test_a_split_depends_on_stories_and_seed_alone() -> None:
    assert not (set(STORY_IDS[TRAIN]) & set(STORY_IDS[~TRAIN])) and len(set(STORY_IDS[TRAIN])) == N_STORIES // 2
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - that it is left alone is the point
    assert (split_documents(STORY_IDS) == TRAIN).all() and (split_documents(STORY_IDS, seed=1) != TRAIN).any()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_absorption_lowers_the_pair_it_is_in(truth) -> None:
    z = perfect(truth)
    # of every second token: of all, the feature of the more frequent child would tell the parent best
    z[truth[:, PLACE["cat"]] & (np.arange(N_TOKENS) % 2 == 0), PLACE["animal"]] = 0
    recall = {pair.child: pair.recall for pair in score(z, truth).parents}
    assert recall["dog"] == 1 and 0.3 < recall["cat"] < 0.7
    pair = score(z, truth).parents[0]
    assert pair.parent == "animal" and 0.6 < pair.parent_recall < 0.9 and 0.75 < pair.parent_f1 < 0.95


def test_a_parent_without_a_feature_does_not_look_good(truth) -> None:
    z = perfect(truth)
    z[:, PLACE["animal"]] = 1  # fires always: recall is perfect, F1 tells
    z[:, [PLACE["cat"], PLACE["dog"]]] = 0
    scores = score(z, truth)
    assert scores.parent_recall == 1 and scores.parent_f1 < 0.4
    silent = score(np.zeros_like(z), truth)
    assert (silent.parent_recall, silent.parent_f1, silent.coverage) == (0, 0, 0)
    assert math.isnan(row_of(silent, "cat").precision) and row_of(silent, "cat").auroc == 0.5
    assert row_of(silent, "cat").feature is None and silent.reconstruction == 0


def test_a_split_concept_is_counted(truth) -> None:
    z = perfect(truth)
    thirds = np.arange(N_TOKENS) % 3
    hot = truth[:, PLACE["hot"]]
    parts = np.stack([hot & (thirds == i) for i in range(3)], 1)
    z[:, PLACE["hot"]] = 0
    scores = score(np.concatenate([z, parts], 1), truth)
    assert row_of(scores, "hot").n_split == 3
    assert {row.n_split for row in scores.scored if row.name != "hot"} == {1}


def test_parts_that_overlap_are_counted_as_plain_unions_are(truth) -> None:
    """Parts share their false alarms, so that what a part adds is better than what it is alone."""
    rng = np.random.default_rng(7)
    shared = rng.random(N_TOKENS) < 0.05
    for name in ("animal", "often", "seldom"):  # large ones: equal gains, of which either may be taken, are rare
        true = truth[:, PLACE[name]]
        parts = (true[:, None] & (rng.random((N_TOKENS, 6)) < 0.35)) | shared[:, None]
        z = parts * rng.random(parts.shape).astype(np.float32)
        n_split = row_of(score(z, truth), name).n_split
        assert n_split == plain_split(z, true) and n_split > 2


@pytest.mark.parametrize("n_fires", [9, 10])
def test_precision_of_a_few_firings_is_not_believed(truth, n_fires) -> None:
    z = np.zeros((N_TOKENS, 2), np.float32)
    cats = truth[:, PLACE["cat"]]
    z[np.flatnonzero(cats & TRAIN)[:n_fires], 1] = z[cats & ~TRAIN, 1] = 1
    scores = score(z, truth)
    assert scores.n_precise == (n_fires == 10) and (scores.reconstruction > 0) == (n_fires == 10)


def test_an_opposed_pair_on_one_signed_feature_is_found(truth) -> None:
    z = perfect(truth)
    z[:, PLACE["hot"]] = truth[:, PLACE["cold"]] * 3.0 - truth[:, PLACE["hot"]]
    z[:, PLACE["cold"]] = 0
    scores = score(z, truth)
    pair = scores.opposed_pairs[0]
    assert (pair.a, pair.b, pair.feature, pair.side_of_a, pair.f1) == ("hot", "cold", PLACE["hot"], -1, 1)
    assert pair.on_two_sides and scores.n_opposed_on_two_sides == 1 and scores.n_control_on_two_sides == 0
    assert [(p.a, p.b) for p in scores.control_pairs] == [("round", "magic"), ("magic", "round")]
    controls = score(z, truth, control_pairs=[("hot", "cold"), ("hot", "round")])
    assert [p.on_two_sides for p in controls.control_pairs] == [True, False]
    assert score(np.abs(z), truth).n_opposed_on_two_sides == 0


def test_chance_is_no_opposed_pair(truth) -> None:
    """Two sides of noise each get a fair F1 for what is true of half of all tokens; kappa knows better."""
    z = np.random.default_rng(5).standard_normal((N_TOKENS, 4)).astype(np.float32)
    pair = score(z, truth).opposed_pairs[1]
    assert (pair.a, pair.b) == ("often", "seldom") and max(abs(pair.kappa_a), abs(pair.kappa_b)) < 0.2
    assert row_of(score(z, truth), "often").f1 > 0.3 and not pair.on_two_sides
    z[:, 0] = np.where(truth[:, PLACE["often"]], 1, -1) * (np.abs(z[:, 0]) + 0.5)
    assert score(z, truth).opposed_pairs[1].on_two_sides


def test_results_print_draw_and_save(truth, tmp_path) -> None:
    scores = score(informed(truth), truth, baselines={"<perfect>": perfect(truth)})
    alone = score(perfect(truth), truth)
    assert scores.baselines["<perfect>"].to_dict() == alone.to_dict()
    text = str(scores)
    assert "<perfect>" in text and "1.000" in text and "not scored, 1 concepts: fewer than 20" in text
    assert "&lt;perfect&gt;" in scores._repr_html_() and "<perfect>" not in scores._repr_html_()
    scores.save(tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["coverage"] == scores.coverage and saved["concepts"][-1]["f1"] is None
    assert saved["baselines"]["<perfect>"]["reconstruction"] == 1
    read = sl.evaluation.ConceptScores.load(tmp_path / "scores.json")
    assert str(read) == text and repr(read) == repr(scores)  # NaN included, which is equal to nothing
    assert read.best("cat") == scores.best("cat") and read.baselines["<perfect>"].moved is not None


def test_a_file_of_other_scores_is_refused_by_name(truth, tmp_path) -> None:
    path = tmp_path / "scores.json"
    score(perfect(truth), truth).save(path)
    plain = json.loads(path.read_text())
    cases: dict[str, dict] = {
        "none for `pairs`": {name: value for name, value in plain.items() if name != "pairs"},
        "no key 'colour'": plain | {"colour": 1},
        "`l0` must be a valid number, got 'many'": plain | {"l0": "many"},
        "`concepts` must be": plain | {"concepts": 3},
        r"in 0\.\.9, got 99": plain | {"concepts": [plain["concepts"][0] | {"feature": 99}]},
        "none for `name`": plain | {"concepts": [{}]},
        "ConceptScore must be a JSON object, got 7": plain | {"concepts": [7]},
        "Concept scores must be a JSON object": plain | {"baselines": {"x": []}},
    }
    for said, wrong in cases.items():
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=said) as error:
            sl.evaluation.ConceptScores.load(path)
        assert str(error.value).startswith(str(path)), error.value
    with pytest.raises(FileNotFoundError):
        sl.evaluation.ConceptScores.load(tmp_path / "none.json")


def test_what_does_not_fit_is_refused(truth) -> None:
    z = perfect(truth)
    with pytest.raises(ValueError, match="a row for each of the 2400 tokens, got 2399"):
        score(z[1:], truth)
    with pytest.raises(ValueError, match="Labels must be"):
        score(z, truth[:, 1:])
    with pytest.raises(ValueError, match="finite"):
        score(np.where(z > 0, np.nan, z), truth)
    with pytest.raises(ValueError, match="a document on each side"):
        score(z, truth, train_frac=0.001)
    with pytest.raises(ValueError, match="`min_count` must be at least 1"):
        score(z, truth, min_count=0)
    with pytest.raises(ValueError, match="got 'roundd'"):
        score(z, truth, control_pairs=[("roundd", "magic")])
    with pytest.raises(ValueError, match="two axes"):
        score_concepts(torch.zeros(2, 3, 4), label(truth))


def test_baselines_of_tales() -> None:
    """Concepts on random directions: the probe reads them all, and what is not trained for them is below it."""
    stories = generate_stories(40)
    rng = np.random.default_rng(6)
    truth = stories.labels.matrix[:, :100]
    labels = TokenLabels.of(truth, stories.labels.concepts[:100], stories.story_ids)
    x = truth.astype(np.float32) @ rng.standard_normal((100, 48)).astype(np.float32)
    acts = torch.from_numpy(x + 0.1 * rng.standard_normal(x.shape).astype(np.float32))
    cfg = sl.SAEConfig(d_in=48, d_sae=96, activation=sl.AbsTopK(k=6))
    state = torch.get_rng_state()
    baselines = concept_baselines(acts, cfg, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(baselines) == ["neurons", "pca", "random", "untrained", "probe"]
    other = sl.SAE(cfg, seed=4)
    more = concept_baselines(acts, cfg, labels, baselines={"other": other})
    assert list(more) == [*baselines, "other"] and (more["other"] != encode_csr(other, acts)).nnz == 0
    assert torch.equal(more["pca"], baselines["pca"]) and (more["random"] != baselines["random"]).nnz == 0
    with pytest.raises(ValueError, match=r"Names of `baselines` must differ .* got 'probe'"):
        concept_baselines(acts, cfg, labels, baselines={"probe": other})
    codes = encode_csr(sl.SAE(cfg), acts)
    assert codes.shape == (len(acts), 96) and (np.diff(codes.indptr) == 6).all()
    scores = score_concepts(codes, labels, min_count=5, baselines=baselines)
    others = [one.coverage for name, one in scores.baselines.items() if name != "probe"]
    assert scores.baselines["probe"].coverage > 0.9 > max(*others, scores.coverage)
    assert scores.baselines["probe"].auroc > 0.95
    # nothing of the held-out stories goes into them
    train = torch.from_numpy(split_documents(stories.story_ids))
    noise = torch.where(train[:, None], acts, torch.randn(acts.shape, generator=torch.Generator().manual_seed(0)))
    changed = concept_baselines(noise, cfg, labels)
    for name in ("pca", "probe"):
        torch.testing.assert_close(baselines[name][train], changed[name][train])
