"""The story grammar: its labels against its text, its surprisal against its frequencies, and the models' folder."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from unchecked import unchecked

from saelab.lm.hooks import logits, next_token_loss
from saelab.lm.models import load_model
from saelab.lm.tokens import tokenize
from saelab.synthetic import lexicon as lex
from saelab.synthetic.grammar import Tale
from saelab.synthetic.tales import CONCEPT_IDS, CONCEPTS, CTX_LEN, concepts_of_word, generate_stories
from saelab.synthetic.tasks import counterfactuals
from saelab.synthetic.vocabulary import CLOSE, OPEN, SPECIAL, VOCABULARY, make_tokenizer


@pytest.fixture(scope="module")
@unchecked()
def stories():
    return generate_stories(400, seed=3)


@pytest.fixture(scope="module")
def words(stories):
    return [VOCABULARY[i] for i in stories.token_ids]


@pytest.fixture(scope="module")
def truth(stories):
    """Columns of the concept matrix by name."""
    columns = stories.labels.matrix.tocsc()
    return lambda name: columns[:, CONCEPT_IDS[name]].toarray()[:, 0].astype(bool)


def test_a_story_depends_on_its_seed_and_number_alone():
    all_five, last_two = generate_stories(5, seed=1), generate_stories(2, seed=1, first=3)
    start = all_five.offsets[3]
    assert np.array_equal(all_five.token_ids[start:], last_two.token_ids)
    assert (all_five.labels.matrix[start:] != last_two.labels.matrix).nnz == 0
    assert not np.array_equal(all_five.token_ids, generate_stories(5, seed=2).token_ids)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        generate_stories(-1)


def test_the_table_is_whole():
    assert len(CONCEPT_IDS) == len(CONCEPTS), "two concepts share a name"
    for concept in CONCEPTS:
        assert concept.parent is None or concept.parent in CONCEPT_IDS
        assert concept.opposite is None or CONCEPTS[CONCEPT_IDS[concept.opposite]].opposite == concept.name
    count = Counter(concept.kind for concept in CONCEPTS)
    assert count["root"] >= 10 and count["topic"] >= 8 and count["one-sided"] >= 6 and count["register"] == 2
    assert count["pole"] >= 12 and 400 <= len(VOCABULARY) <= 1000
    assert all(concept.parent for concept in CONCEPTS if concept.kind == "word")


def test_children_carry_their_parents(stories):
    for concept in CONCEPTS:
        if concept.parent is not None:
            child, parent = (stories.labels.matrix[:, CONCEPT_IDS[name]] for name in (concept.name, concept.parent))
            assert child.nnz == child.multiply(parent).nnz, concept.name


def test_no_token_is_unlabeled_and_the_ends_are(stories, words):
    labeled = np.diff(stories.labels.matrix.indptr) > 0
    special = np.array([word in SPECIAL for word in words])
    assert np.array_equal(labeled, ~special)
    assert special.sum() == 2 * len(stories)


def test_every_concept_is_told_of(stories):
    count = np.asarray(stories.labels.matrix.sum(0)).ravel()
    assert not [concept.name for concept, n in zip(CONCEPTS, count, strict=True) if n < 5]


def test_words_carry_what_they_mean(stories, truth):
    meanings = {word: concepts_of_word(word) for word in VOCABULARY if word not in SPECIAL}
    for concept in CONCEPTS:
        if concept.kind in ("word", "grammar"):
            carries = np.array([concept.name in meanings.get(word, ()) for word in VOCABULARY])
            assert np.array_equal(truth(concept.name), carries[stories.token_ids]), concept.name


def test_no_word_of_the_vocabulary_means_nothing_by_accident():
    plain = {word.lower() for word in VOCABULARY if concepts_of_word(word) == ("plain word",)}
    listed = {word for classes in lex.CLASSES.values() for words in classes.values() for word in words.split()}
    listed |= {w for axis in (*lex.AXES.values(), lex.DISTANCE) for line in axis.words for w in line.split()}
    assert not plain & listed


def test_quotes_and_questions(words, truth):
    inside = False
    for word, quoted, question in zip(words, truth("quote"), truth("question"), strict=True):
        inside = inside or word == OPEN
        assert quoted == inside and (quoted or not question)
        assert question or word != "?"
        inside = inside and word != CLOSE
    assert not inside


def test_opposites_exclude_each_other(truth):
    """A token has one tense and one number of subject, and lies in a story of one hero of one mood."""
    for concept in CONCEPTS:
        if concept.opposite is not None:
            assert not (truth(concept.name) & truth(concept.opposite)).any(), concept.name
    assert (truth("story of a girl") | truth("story of a boy")).mean() > 0.9


def test_moods_last(truth):
    """A mood colours the words: glad words stand where the mood is glad, to the end of the paragraph."""
    sad_words = {word for listed in lex.MOODS["sad"].values() for word in listed.split()}
    tale = Tale(random.Random(5), {"mood": "glad"}).generate()
    assert not sad_words & set(tale.words)
    assert any("glad" in states for states in tale.states)


def test_a_topic_is_of_its_paragraph_and_of_nothing_special(words, truth):
    """A topic holds from its place on; recipes, forecasts, gifts and lore after the paragraph have none."""
    topics = np.stack([truth(concept.name) for concept in CONCEPTS if concept.kind == "topic"])
    assert topics.sum(0).max() == 1
    special = [truth(c.name) for c in CONCEPTS if c.kind in ("register", "relation") or c.name in ("giver", "receiver")]
    assert not (topics.any(0) & np.any(special, axis=0)).any()
    for name, topic in lex.TOPICS.items():
        at_place = topics.any(0) & np.array([word in topic.places.split() for word in words])
        assert (truth(f"topic {name}") & at_place).any()


def test_one_sided_traits_are_as_frequent_as_poles(stories, words):
    count = Counter(words)
    poles = [sum(count[w] for w in line.split()) for axis in lex.AXES.values() for line in axis.words]
    single = [sum(count[w] for w in axis.words[0].split()) for axis in lex.ONE_SIDED.values()]
    assert 0.7 < np.mean(poles) / np.mean(single) < 1.4


def told(name, rng):
    """One part of a story alone: its text and its surprisal."""
    tale = Tale(rng, {"hero": "Anna"})
    tale.known["gender"] = "girl"
    tale.slot_hero()
    tale.slot_friend()
    tale._pending, tale.words[:], tale.surprisal[:] = 0.0, [], []
    getattr(tale, name)()
    return " ".join(tale.words), sum(tale.surprisal) + tale._pending


@pytest.mark.parametrize("part", ["special_lore", "special_gift", "special_forecast"])
@unchecked()
def test_surprisal_is_minus_the_log_of_the_frequency(part):
    """Kraft: over different texts exp(-surprisal) sums to at most 1, so no two draws give one text; and a sample's mean
    says that none is missed.
    """
    rng = random.Random(0)
    sample = [told(part, rng) for _ in range(4000)]
    by_text = dict(sample)
    assert all(abs(by_text[text] - surprisal) < 1e-9 for text, surprisal in sample), "one text, two surprisals"
    count = Counter(text for text, _ in sample)
    if part == "special_lore":
        n_friends = 1  # the friend does not appear
        assert sum(math.exp(-s) for s in by_text.values()) <= 1 + 1e-9
        for text, n in count.most_common(10):
            expected = len(sample) * math.exp(-by_text[text]) * n_friends
            assert abs(n - expected) < 6 * expected**0.5 + 1


def test_rows_of_tokens_and_their_truth(stories):
    part = generate_stories(20, seed=9)
    tokens = part.tokens()
    assert tokens.ids.shape == (20, CTX_LEN) and tokens.n_tokens == len(part.token_ids)
    rows, columns = tokens.attention_mask.nonzero(as_tuple=True)
    assert torch.equal(tokens.ids[rows, columns], torch.from_numpy(part.token_ids))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    found = part.labels_at(tokens.doc_ids[rows, columns][order], columns[order].int())
    assert (found.matrix != part.labels.matrix[order.numpy()]).nnz == 0
    assert np.array_equal(found.doc_ids, part.story_ids[order.numpy()])
    laid = part.labels.spread(tokens.attention_mask)
    assert (laid.select(tokens.attention_mask).matrix != part.labels.matrix).nnz == 0
    with pytest.raises(ValueError, match="must hold the longest story"):
        part.tokens(ctx_len=64)


@pytest.mark.parametrize(
    ("story", "position", "rule"),
    [
        (2, 0, "`story_ids` must be 0 to 1"),
        (-1, 0, "`story_ids` must be"),
        (0, -1, "`positions`"),
        (0, 999, "`positions`"),
    ],
)
def test_labels_are_of_tokens_that_there_are(story, position, rule):
    part = generate_stories(2, seed=9)
    n = int(part.offsets[1])
    assert part.labels_at(np.array([0]), np.array([n - 1])).matrix.shape[0] == 1
    with pytest.raises(ValueError, match=rule):
        part.labels_at(np.array([0, story]), np.array([0, position]))


def test_every_story_fits(stories):
    assert np.diff(stories.offsets).max() <= CTX_LEN


def test_the_tokenizer_reads_what_it_writes(stories):
    tokenizer = make_tokenizer()
    for i in range(40):
        ids = stories.token_ids[stories.offsets[i] : stories.offsets[i + 1] - 1].tolist()
        assert tokenizer(stories.text(i)).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == stories.text(i)
    assert tokenizer("Zebra").input_ids[1] == tokenizer.unk_token_id


@unchecked()
def test_name_pairs_differ_in_the_giver_alone():
    for pair in counterfactuals("names", 60):
        (place,) = pair.differ_at
        assert {int(pair.prompt[place]), pair.answer} == {int(pair.other_prompt[place]), pair.other_answer}
        assert pair.answer == pair.other_prompt[place] and pair.other_answer == pair.prompt[place]
        assert (pair.prompt == pair.answer).sum() >= 1, "the answer has been named"


@unchecked()
def test_fact_pairs_differ_in_the_town_alone():
    of_town = {word: name for name, town in lex.TOWNS.items() for word in (name, *town)}
    for pair in counterfactuals("facts", 60):
        for prompt, answer in ((pair.prompt, pair.answer), (pair.other_prompt, pair.other_answer)):
            shown = {of_town[VOCABULARY[int(prompt[i])]] for i in pair.differ_at}
            assert shown == {of_town[VOCABULARY[answer]]}


@pytest.fixture(scope="module", params=["tales", "tales-b"])
def model(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def unseen():
    return generate_stories(24, seed=0, first=20_000_000)


def mean_loss(model, tokens):
    losses = next_token_loss(logits(model, tokens.ids), tokens.ids)
    return float(losses[tokens.attention_mask[:, 1:]].mean())


def test_the_models_lose_little_to_the_oracle(model, unseen):
    """Loosely: the figures are in LOG.md."""
    loss = mean_loss(model, unseen.tokens())
    assert unseen.oracle_loss - 0.05 < loss < unseen.oracle_loss + 0.1


def test_the_models_read_packed_text_as_well(model, unseen):
    """A window that begins inside a story hides its people and things, and so costs more than a story, but not much."""
    tokens = tokenize(model, [unseen.text(i) for i in range(len(unseen))], ctx_len=128)
    assert mean_loss(model, tokens) < unseen.oracle_loss + 0.35


def test_the_models_track_names(model):
    pairs = counterfactuals("names", 20, seed=5)
    right = [int(logits(model, pair.prompt[None])[0, -1].argmax()) == pair.answer for pair in pairs]
    assert sum(right) >= 17
