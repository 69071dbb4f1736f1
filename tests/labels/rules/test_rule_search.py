"""Labels by rules: planted features get their planted rules, chance gets none, and the counts are what they say."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_matrix
from scipy.stats import hypergeom

import saelab as sl
from saelab.analysis.direct_logits import LogitLens, Promoted
from saelab.functional.statistics import adjust, tail
from saelab.labels.autointerp.token_prediction import token_baseline
from saelab.labels.label import describe_scores
from saelab.labels.rules.contingency import Judge, SideFirings, SplitCounts
from saelab.labels.rules.predicate_sums import PackedBits
from saelab.labels.rules.predicates import Predicate, make_predicates, text_pattern, word_pattern
from saelab.labels.rules.rule_labels import NO_RULE, score_groups
from saelab.labels.rules.rule_search import FRACTIONS, label_by_rules
from saelab.labels.rules.token_view import TokenView
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure

WORDS = [
    "the",
    "cat",
    "dog",
    "saw",
    "Anna",
    "ran",
    "fast",
    "home",
    "red",
    "hat",
    "in",
    "to",
    "big",
    "old",
    "far",
    "Tom",
]
STRINGS = ["<s>", ".", '"', "?", "(", ")", "\n", *(f" {word}" for word in WORDS), " jump", "ing", "ed", "7"]
ID = {string: i for i, string in enumerate(STRINGS)}
N_DOCS, LENGTH = 240, 60


class Planted(sl.FeatureStore):
    """A store in memory with codes of one's own."""

    def __init__(self, codes, text, places=None):
        self.codes = csc_matrix(np.asarray(codes, np.float32))
        self.folder, self._starts = Path("planted"), [0, self.codes.shape[0]]
        places = np.arange(len(text)) if places is None else places
        statistics = measure(self.codes.shape[1], [(self.codes.indptr, self.codes.data)])
        self.__dict__.update(text=text, places=places, statistics=statistics)

    @property
    def d_sae(self):
        return self.codes.shape[1]

    def columns(self, start=0, stop=None):
        return self.codes[:, start:stop]


def text_of(*documents):
    """One sequence a document, each a list of strings."""
    ids = np.array([ID[string] for document in documents for string in document])
    lengths = [len(document) for document in documents]
    doc_ids = np.repeat(np.arange(len(documents)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return StoredText(token_ids=ids, doc_ids=doc_ids, positions=positions, strings=dict(enumerate(STRINGS)))


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    words = [f" {word}" for word in WORDS]
    documents = []
    for _ in range(N_DOCS):
        document = ["<s>"]
        while len(document) < LENGTH:
            sentence = [words[i] for i in rng.integers(len(words), size=rng.integers(3, 7))]
            sentence += [" jump", ("ing", "ed")[rng.integers(2)]] if rng.random() < 0.5 else []
            document += [*sentence, ".?"[int(rng.random() < 0.3)]]
        documents.append(document[:LENGTH])
    return text_of(*documents)


@pytest.fixture(scope="module")
def at(text):
    """Where a token stands."""
    return lambda string: text.token_ids == ID[string]


def noisy(marks, rng, keep=0.9, extra=0.002):
    """Firings that miss some tokens and hit some others, of different strength."""
    fires = (marks & (rng.random(len(marks)) < keep)) | (rng.random(len(marks)) < extra)
    return fires * (1 + rng.random(len(marks)))


@pytest.fixture(scope="module")
def planted(text, at):
    rng = np.random.default_rng(1)
    first = TokenView(text).in_sentence == 0
    plus, minus = noisy(at(" Anna"), rng), noisy(at(" Tom"), rng)
    codes = {
        "token": at(" cat") * 1.0,
        "signed": np.where(plus > 0, plus, -minus),
        "and": noisy(at(" the") & first, rng),
        "or": noisy(at(" red") | TokenView(text).sentences_with(at("?")) & at("."), rng)
        + noisy(at(" hat"), rng, extra=0),
        "list": noisy(np.isin(text.token_ids, [ID[s] for s in (" dog", " saw", " ran", " fast")]), rng),
        "position": noisy(TokenView(text).in_document < 4, rng),
        "chance": noisy(np.zeros(len(text), bool), rng, extra=0.05),
        "after": noisy(np.roll(at(" big"), 1) & ~TokenView(text).begins, rng),
        "loud": np.where(at(" far"), 3.0, (rng.random(len(text)) < 0.05) * 0.2),
        "silent": np.zeros(len(text)),
    }
    return list(codes), Planted(np.stack(list(codes.values()), 1), text)


@pytest.fixture(scope="module")
def labels(planted):
    return label_by_rules(planted[1], make_predicates(planted[1], size=260))


def test_planted_features_get_their_rules(planted, labels):
    names = planted[0]

    def row(name, sign=1):
        return next(row for row in labels.of(names.index(name)) if row.sign == sign)

    assert row("token").text == "the token ' cat'" and row("token").kind == "input"
    assert row("signed").text in ("the token ' Anna'", "the word 'Anna'")
    assert row("signed", -1).text in ("the token ' Tom'", "the word 'Tom'")
    assert row("and").joined == "and" and any("' the'" in part or "'the'" in part for part in row("and").parts)
    assert any("first" in part or "after" in part for part in row("and").parts)
    assert set(row("list").parts) == {f"the token ' {word}'" for word in ("dog", "saw", "ran", "fast")}
    assert row("list").text.startswith("the token ' ") and " or ' " in row("list").text
    assert row("position").kind == "position" and row("position").text == "first 4 tokens of the document"
    known = "after the token ' big'" in make_predicates(planted[1], size=260).names  # frequent enough in this text
    assert row("after").text == ("after the token ' big'" if known else NO_RULE)
    assert row("loud").text == "the token ' far'" and row("loud").fraction > 0 and row("loud").share < 0.7
    assert row("chance").text == NO_RULE and row("chance").kind == "none"
    assert not labels.of(names.index("silent"))


def test_scores_of_the_strongest_firings_say_so(planted, labels):
    by_feature = {label.feature: label for label in labels.labels() if label.sign > 0}
    loud, every = (by_feature[planted[0].index(name)] for name in ("loud", "token"))
    assert f"; of codes with |z| from {labels.of(loud.feature)[0].threshold:.3g} on, " in describe_scores(loud)
    assert describe_scores(loud).endswith(f"{loud.scores['share']:.2g} of the firings")
    assert every.scores["share"] == 1 and "of codes" not in describe_scores(every)


def test_a_union_of_two_is_polysemantic(text, at):
    rng = np.random.default_rng(2)
    store = Planted(noisy(at(" red") | at("7") | at("?"), rng)[:, None], text)
    (row,) = label_by_rules(store).rows
    assert row.kind == "polysemantic" and row.joined == "or" and len(row.parts) == 2 and row.f1 > 0.85


def test_a_perfect_rule_scores_one(planted, labels):
    (row,) = labels.of(planted[0].index("token"))
    assert row.f1 == row.precision == row.recall == row.auroc == 1.0
    assert row.f1_chance < 0.1 and row.q < 1e-6 and row.lift == pytest.approx(1 / (row.f1_chance), rel=1e-6)


@pytest.mark.parametrize("says", [True, False])
def test_saying_always_the_same_scores_chance(planted, says):
    """And so does the rule of another feature."""
    names, store = planted
    split = SplitCounts(make_predicates(store, size=100), ~store.split())
    z = store.codes[:, [names.index("token")]].toarray().ravel()
    fires, codes = np.flatnonzero(z[split.rows]), (np.flatnonzero(z), np.abs(z[z != 0]))
    marks = np.full(split.n_tokens, says)
    verdict = Judge(split, store.doc_ids, 0).test(marks.__getitem__, int(marks.sum()), fires, 0, codes)
    assert np.isnan(verdict.r)
    assert verdict.skill == pytest.approx(0, abs=1e-9)
    assert np.isnan(verdict.auroc) or verdict.auroc == 0.5
    other = store.codes[:, [names.index("chance")]].toarray().ravel()[split.rows] != 0
    verdict = Judge(split, store.doc_ids, 0).test(other.__getitem__, int(other.sum()), fires, 0, codes)
    assert abs(verdict.skill) < 0.1 and 0.4 < verdict.auroc < 0.6


def test_chance_gets_no_rules(text):
    """Features that fire in long runs at random places, and predicates that do: their tokens are not independent."""
    rng, found, named = np.random.default_rng(3), 0, 0
    for run in range(3):
        starts = rng.random((len(text), 12)) < 0.002
        runs = np.stack([np.convolve(column, np.ones(rng.integers(20, 60)))[: len(text)] for column in starts.T], 1)
        signed = np.minimum(runs, 1) * (1 + rng.random(runs.shape)) * np.where(starts.cumsum(0) % 2, 1, -1)
        store = Planted(signed, text)
        sorts = {doc: str(rng.integers(8)) for doc in range(N_DOCS)}
        rows = label_by_rules(store, make_predicates(store, size=80, metadata=sorts), seed=run).rows
        found += sum(row.q <= 0.05 for row in rows)
        named += sum(row.text != NO_RULE for row in rows)
        assert len(rows) == 24
    assert found <= 1 and named <= 1  # of 72, at a false discovery rate of .05 where all are false


def test_q_is_small_only_where_chance_is_excluded_on_held_out_documents(planted):
    rows = label_by_rules(planted[1], fdr=1e-3).rows
    for row in rows:
        assert row.good == (row.q <= 1e-3 and (row.f1 - row.f1_chance) / (1 - row.f1_chance) >= 0.25)


def test_contingencies_equal_dense_ones(planted):
    _, store = planted
    predicates, is_train = make_predicates(store, size=120), store.split()
    split, codes = SplitCounts(predicates, is_train), store.codes.toarray()
    sides = SideFirings.sort(store.columns(), is_train, FRACTIONS)
    counts, marks = split.count(sides).of(np.arange(len(sides))), predicates.matrix.toarray()[is_train]
    for side in range(len(sides)):
        z = codes[:, side // 2] * (1 - 2 * (side % 2))
        for level, fraction in enumerate(FRACTIONS):
            fires = (z > 0) & (z >= np.float32(fraction) * z[is_train].max())
            assert np.array_equal(np.sort(sides.of(side, level)), np.flatnonzero(fires))
            assert np.array_equal(counts.both[side, level], marks[fires[is_train]].sum(0))
            assert counts.fires[side, level] == fires[is_train].sum()
    assert np.array_equal(split.pairs, marks.T.astype(int) @ marks)
    rows, columns = np.arange(0, 300, 7), np.array([0, 9, 8, 30])
    assert np.array_equal(PackedBits.pack(split.matrix).at(rows, columns), marks[rows][:, columns])
    for joined, join in (("and", np.logical_and), ("or", np.logical_or)):
        expected = join(marks[:, 3], marks[:, 10])
        assert np.array_equal(split.mark([3, 10], joined), expected)


def test_r_is_that_of_the_rule_with_magnitudes_on_held_out_rows(planted, labels):
    _, store = planted
    predicates, held, z = make_predicates(store), ~store.split(), store.codes.toarray()
    names, seen = list(predicates.names), 0
    for row in labels.rows:
        if row.parts and not row.joined and row.parts[0] in names:
            holds = predicates.matrix[:, [names.index(row.parts[0])]].toarray().ravel()[held]
            sizes = np.maximum(row.sign * z[held, row.feature], 0)
            assert row.r == pytest.approx(np.corrcoef(holds, sizes)[0, 1])
            seen += 1
    clean = labels.clean_sides(0.9, 0.5)
    assert seen > 3 and 0 < len(clean) < len(labels.good)
    assert set(clean) == {(row.feature, row.sign) for row in labels.good if row.f1 >= 0.9 and row.r >= 0.5}


def test_the_tail_bounds_fishers_exact_test():
    hits, fires, holds = np.array([3, 20, 40, 0, 9]), np.array([10, 50, 40, 8, 9]), np.array([30, 100, 40, 30, 200])
    exact = hypergeom.sf(hits - 1, 1000, fires, holds)
    found = tail(hits.astype(float), fires.astype(float), holds.astype(float), 1000, np.ones(5))
    assert (found >= exact * (1 - 1e-9)).all() and (found <= 1).all() and found[2] < 1e-20
    wider = tail(hits.astype(float), fires.astype(float), holds.astype(float), 1000, np.full(5, 3.0))
    assert (wider >= found).all()
    q = adjust(np.array([0.02, 0.5, 0.001]))
    assert q.tolist() == pytest.approx([0.03, 0.5, 0.003])


def test_words_over_several_tokens():
    text = text_of(
        ["<s>", " the", " jump", "ing", " cat", " jump", "ed", "."], ["<s>", " jump", ".", '"', " Anna", "7"]
    )
    store = Planted(np.ones((len(text), 1)), text)
    view = TokenView(text)
    assert [view.words[i] for i in view.word_ids if i >= 0] == [
        "the", "jumping", "jumping", "cat", "jumped", "jumped", "jump", "Anna7", "Anna7"
    ]  # fmt: skip
    own = [word_pattern("jump.*", part=part, name=part) for part in ("all", "first", "last")]
    predicates = make_predicates(store, size=300, own=own)
    places = {name: np.flatnonzero(predicates.column(name)).tolist() for name in predicates.names}
    assert places["all"] == [2, 3, 5, 6, 9] and places["first"] == [2, 5, 9] and places["last"] == [3, 6, 9]
    assert places["the word 'jumping'"] == [2, 3] and places["the last token of the word 'jumping'"] == [3]
    assert places["words of the stem 'jump'"] == [2, 3, 5, 6, 9]
    assert places["words beginning with 'ju'"] == [2, 3, 5, 6, 9]


def test_what_surrounds_a_token():
    document = [
        "<s>",
        " Anna",
        " saw",
        "(",
        " the",
        " cat",
        ")",
        ".",
        '"',
        " Tom",
        " ran",
        "?",
        '"',
        " ran",
        "\n",
        " the",
    ]
    text = text_of(document, [" the", " dog"])
    predicates = make_predicates(Planted(np.ones((len(text), 1)), text), metadata={0: "tale", 1: "note"})
    found = {name: np.flatnonzero(predicates.column(name)).tolist() for name in predicates.names}
    assert found["inside quotation marks"] == [9, 10, 11]
    assert found["first token of a sentence"] == [0, 1, 9, 13, 15, 16]
    assert found["in a question"] == [9, 10, 11, 12]
    assert found["tokens seen before in the document"] == [12, 13, 15]
    assert found["first token of the document"] == [0, 1, 16] and found["inside brackets"] == [4, 5]
    assert found["after the token ' the'"] == [5, 17] and found["before the token ' ran'"] == [9, 12]
    assert found["the token ' ran' after ' Tom'"] == [10]
    assert "capitalized words inside a sentence" not in found  # it holds of none
    assert found["documents of 'note'"] == [16, 17] and found["sentence-final punctuation"] == [7, 11]


def test_own_predicates_and_concepts(text, at):
    """A function, regular expressions on words and on text, and a matrix: each becomes the rule it should be."""
    in_to = np.roll(at(" in"), 1) & at(" to") | np.roll(at(" to"), -1) & at(" in")
    mine, cloth = at(" home") | at(" far") | at("?"), at(" hat") | at(" red")
    store_codes = np.stack([at(" big") | at(" old"), in_to, mine, cloth], 1)
    store = Planted(store_codes * 1.0, text)
    concept = at(" hat") | at(" red")
    own = [
        word_pattern("big|old", "sizes and ages"),
        text_pattern(r" in to\b", "in to"),
        Predicate("mine", lambda view: np.isin(view.token_ids, [ID[" home"], ID[" far"], ID["?"]])),
    ]
    predicates = make_predicates(store, own=own, concepts={"colour or cloth": concept})
    texts = [row.text for row in label_by_rules(store, predicates).rows]
    assert texts == ["sizes and ages", "in to", "mine", "colour or cloth"]
    with pytest.raises(ValueError, match="one boolean for each"):
        make_predicates(store, own=[Predicate("bad", lambda view: [True])])
    with pytest.raises(ValueError, match="must label"):
        make_predicates(store, concepts={"a": concept[:5]})
    with pytest.raises(ValueError, match="must name families"):
        make_predicates(store, sizes={"tokens": 3})


def test_an_output_feature_is_named_by_what_it_promotes(text, at):
    rng = np.random.default_rng(5)
    fires = noisy(np.roll(at(" cat"), -1) | np.roll(at(" dog"), -1), rng)
    store = Planted(np.stack([fires, -fires], 1), text)
    promoted = ((" cat", 4.0), (" dog", 3.5), (" to", 0.1))
    effects = Promoted(feature=0, promoted=promoted, suppressed=((" in", -1.0),), spread=1.0, kurtosis=0.0)
    lens = LogitLens(features=(effects,), d_vocab=len(STRINGS))
    hidden = make_predicates(store).without("next token", "next")
    rows = label_by_rules(store, hidden, lens=lens).rows
    assert rows[0].kind == "output" and rows[0].text == "promotes ' cat' or ' dog'" and rows[0].f1 > 0.85
    assert rows[1].kind == "none"  # the lens does not know it


def test_rows_become_labels(planted, labels):
    names, found = planted[0], labels.labels()
    two = [label for label in found if label.kind == "two-sided"]
    assert [label.feature for label in two] == [names.index("signed")] and two[0].sign == 0
    assert " Anna" in two[0].text.replace("'Anna", " Anna") and "(-)" in two[0].text
    one = next(label for label in found if label.feature == names.index("token"))
    assert one.sign == 1 and one.scores["f1"] == 1.0 and one.scores["f1_chance"] < 0.1 and one.author == "rules"
    assert {label.text for label in found if label.kind == "none"} == {NO_RULE}
    assert sl.FeatureStore.__name__ and "have a good rule" in str(labels) and labels.to_dict()["rows"]


def test_only_the_features_asked_for(planted, labels):
    predicates = make_predicates(planted[1], size=260)
    some = label_by_rules(planted[1], predicates, features=[1, 4])
    assert [(row.feature, row.sign) for row in some.rows] == [(1, 1), (1, -1), (4, 1)]
    assert [row.f1 for row in some.rows] == [row.f1 for row in labels.rows if row.feature in (1, 4)]
    with pytest.raises(ValueError, match="a row for each"):
        label_by_rules(Planted(np.ones((60, 1)), text_of(["<s>"] * 30, ["."] * 30)), predicates)


def test_token_tables_simulate_what_tokens_decide(text, at):
    rng = np.random.default_rng(6)
    pair = np.roll(at(" the"), 1) & ~TokenView(text).begins
    codes = np.stack([at(" cat") * 2.0 - at(" dog"), np.where(pair, text.token_ids % 3, 0) * 1.0,
                      (rng.random(len(text)) < 0.1) * 1.0], 1)  # fmt: skip
    found = token_baseline(Planted(codes, text))
    assert found.by_token[0] == pytest.approx(1) and found.by_pair[0] > 0.99
    assert found.by_pair[1] > 0.9 > 0.5 > found.by_token[1]
    assert max(abs(found.by_token[2]), abs(found.by_pair[2])) < 0.1
    assert np.abs(found.by_token_chance).max() < 0.1 and np.abs(found.by_pair_chance).max() < 0.1
    naive = np.zeros(len(text))
    is_train = Planted(codes, text).split()
    for token in np.unique(text.token_ids):
        naive[text.token_ids == token] = codes[is_train & (text.token_ids == token), 1].mean()
    assert found.by_token[1] == pytest.approx(np.corrcoef(naive[~is_train], codes[~is_train, 1])[0, 1])


def plain_text(ids, per_document, strings):
    numbers = np.arange(len(ids))
    return StoredText(
        token_ids=ids,
        doc_ids=numbers // per_document,
        positions=numbers % per_document,
        strings=dict(enumerate(strings)),
    )


def test_a_side_that_one_rare_token_tells_gets_that_rule():
    """None of the tokens is among the frequent ones that predicates are made of."""
    rng = np.random.default_rng(0)
    n = 300 * 40
    ids = np.where(rng.random(n) < 0.7, rng.integers(400, size=n), rng.integers(400, 500, size=n))
    dense = np.stack([ids == 400 + j for j in range(40)], 1) * (1.0 + rng.random((n, 40)))
    store = Planted(dense, plain_text(ids, 40, [f" w{i}x" for i in range(500)]))
    few = make_predicates(store, size=90, sizes={"word": 0, "bigram": 0})
    found = label_by_rules(store, few)
    named = {row.rule for row in found.good if row.f1 > 0.99}
    # a side fires some 36 times; a third of them is held out, and one of 40 may have too few there
    assert len(found.good) >= 38 and len(named) >= 38 and named <= {f"the token ' w{400 + j}x'" for j in range(40)}
    without = label_by_rules(store, few.without("token"))
    assert not without.good  # none are added to what somebody chose
    half, rest, none = score_groups(found, {"half": range(20), "rest": range(20, 40), "none": []})
    assert half.f1 == pytest.approx(np.mean([row.f1 if row.rule else 0 for row in found.rows if row.feature < 20]))
    assert half.n_sides == rest.n_sides == 20 and half.good + rest.good >= 1.9 and math.isnan(none.f1)
    assert abs(score_groups(without, {"half": range(20)})[0].skill) < 0.25 < half.skill


def test_rules_of_a_periodic_text_are_found():
    """Every second token is the same, and so are the firings: turning the text round would keep both or neither."""
    n = 60 * 40
    ids = np.arange(n) % 2
    dense = np.stack([ids * (1 + np.random.default_rng(0).random(n)), np.zeros(n)], 1)
    store = Planted(dense, plain_text(ids, 40, [" tock", " tick"]))
    row = label_by_rules(store, make_predicates(store, size=80)).of(0)[0]
    assert row.good and row.f1 == 1.0 and row.q < 0.05
