"""Planted topics and gains told from permuted words, attention as Hugging Face gives it, and naive means."""

from collections import Counter

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis import WordGeometry, word_geometry
from saelab.analysis.word_vectors import _left, _measures, _read_attention, _test, _whiten, _Words
from saelab.synthetic.lexicon import TOPICS
from saelab.synthetic.tales import generate_stories


@pytest.fixture(scope="module")
def tales() -> object:
    return sl.load_model("tales", progress=False)


@pytest.fixture(scope="module")
def stories() -> sl.Tokens:
    return generate_stories(60, first=94_000_000).tokens()


@pytest.fixture(scope="module")
def topics(tales) -> dict[str, list[int]]:
    known = tales.tokenizer.get_vocab()
    listed = {name: f"{one.places} {one.workers} {one.animals} {one.things}".split() for name, one in TOPICS.items()}
    counts = Counter(word for words in listed.values() for word in words)
    return {name: [known[word] for word in words if counts[word] == 1] for name, words in listed.items()}


@pytest.fixture(scope="module")
def found(tales, stories, topics) -> WordGeometry:
    return word_geometry(tales, stories, topics, min_count=4, n_permutations=99, progress=False)


def test_topics_of_tales_are_in_the_embedding(found: WordGeometry) -> None:
    for measure in ("topic_cosine", "topic_product", "raw", "whitened_zipf"):
        row = found.find("blocks.0.hook_in", measure)
        assert row.p == 0.01 and row.value > row.chance + 5 * row.chance_std
        assert row not in found.untold
    for row in found.rows:
        # a mean over 99 draws, six of its deviations; AUROCs of permuted topics are half
        middle = 0.5 if row.measure in ("raw", "centered", "centered_zipf", "whitened", "whitened_zipf") else 0.0
        assert row.measure == "attention" or abs(row.chance - middle) < 6 * row.chance_std / 99**0.5
    assert sum(found.topics.values()) == found.n_in_topics > 40 and not found.reason and found.n_attended > 4000
    lines = str(found).split("\n")
    assert lines[1].startswith("no different from permuted words") and lines[-1] == found.limits


def test_vectors_are_means_over_occurrences(tales, stories, found) -> None:
    few = word_geometry(tales, stories, hook_points=["blocks.1.hook_in"], n_words=20, n_permutations=19, progress=False)
    keep = sl.TokenMask().apply(stories).keep
    ids, counts = stories.ids[keep].unique(return_counts=True)
    order = np.argsort(-counts.numpy(), kind="stable")[:20]
    chosen = np.sort(ids.numpy()[order])
    x = sl.lm.capture(tales, stories.ids, ["blocks.1.hook_in"])["blocks.1.hook_in"]
    p = sl.lm.logits(tales, stories.ids).softmax(-1)
    every, gains, vectors, weights = p[keep].double().mean(0), [], [], []
    for i in chosen:
        here = keep & (stories.ids == int(i))
        mean = p[here].double().mean(0)
        gains.append(float((mean * (mean / every).log()).sum()))
        vectors.append(x[here].double().mean(0))
        weights.append(float(here.sum()))
    rows, share = torch.stack(vectors), torch.tensor(weights).double() / sum(weights)
    norms = (rows - share @ rows).square().sum(1).numpy()
    expected = np.corrcoef(norms, gains)[0, 1]
    assert few.find("blocks.1.hook_in", "gain").value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(KeyError, match="topic_cosine"):
        few.find("blocks.1.hook_in", "topic_cosine")
    assert few.reason == "no topics were given" and few.n_words == 20


def test_attention_is_what_hugging_face_computes(tales, stories) -> None:
    import copy

    patterns, n, _ = _read_attention(tales, stories[:2], sl.TokenMask())
    keep = sl.TokenMask().apply(stories[:2]).keep
    assert list(patterns) == [f"blocks.{i}" for i in range(4)] and n == int(keep.sum())
    theirs = copy.deepcopy(sl.load_model("tales", backend="huggingface", progress=False).original_model)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        weights = theirs(stories.ids[:2].long(), output_attentions=True).attentions
    for layer, (query, key, mass) in zip(weights, patterns.values(), strict=True):
        at = 0
        for row in range(2):
            places = keep[row].nonzero()[:, 0]
            expected = layer[row].mean(0)[places][:, places]
            size = len(places) * (len(places) - 1) // 2
            assert np.allclose(mass[at : at + size], expected[tuple(np.tril_indices(len(places), -1))], atol=1e-5)
            assert set(query[at : at + size]) | set(key[at : at + size]) == set(stories.ids[row][keep[row]].tolist())
            at += size
        assert at == len(mass)


def make(n: int = 60, strength: float = 1.0) -> tuple[_Words, np.ndarray]:
    rng = np.random.default_rng(0)
    topic = np.repeat([0, 1, 2, -1], n // 4)
    vectors = rng.normal(size=(n, 12))
    vectors[topic >= 0] += 3 * strength * rng.normal(size=(3, 12))[topic[topic >= 0]]
    counts = rng.integers(5, 500, n)
    norms = ((vectors - counts / counts.sum() @ vectors) ** 2).sum(1)
    return _Words(np.arange(n), counts, {"layer": vectors}, norms + rng.normal(size=n), 1000), topic


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_planted_topics_and_gains_are_told_and_their_absence_is_not(strength: float) -> None:
    words, topic = make(strength=strength)
    rng = np.random.default_rng(1)
    vectors = words.vectors["layer"]
    measures = _measures(vectors, words, topic, has_topics=True)
    rows = {name: _test("layer", name, of, 60, 199, rng) for name, of in measures.items()}
    assert rows["gain"].value > 0.9 and rows["gain"].p == 1 / 200 and rows["gain_partial"].p == 1 / 200
    for name in ("topic_cosine", "raw", "whitened"):
        assert rows[name].p == 1 / 200 if strength else rows[name].p > 1 / 200


def test_whitened_rows_are_white_and_what_is_left_is_uncorrelated() -> None:
    words, _ = make(strength=0.0)  # all directions alike, of which the ridge is 0.001
    rows, weights = words.vectors["layer"], words.counts / words.counts.sum()
    white = _whiten(rows, weights)
    assert np.allclose(weights @ white, 0, atol=1e-9)
    assert np.allclose((white * weights[:, None]).T @ white, np.eye(12), atol=0.02)
    left = _left(words.gain, np.log(words.counts))
    assert abs(np.corrcoef(left, np.log(words.counts))[0, 1]) < 1e-9 and abs(left.mean()) < 1e-9


def test_bad_input_is_said(tales, stories, topics) -> None:
    for given, said in [
        ({"n_words": 2}, "`n_words` must be at least 8"),
        ({"min_count": 10_000}, "must hold 8 words that occur 10000 times"),
        ({"topics": {"a": [5, 6], "b": [6, 7]}}, "in one topic, got id 6 in two"),
        ({"topics": {"a": topics["sea"]}}, "at least two of which the text has two words"),
    ]:
        with pytest.raises(ValueError, match=said):
            word_geometry(tales, stories, progress=False, **given)


def test_a_model_without_attention_says_so() -> None:
    import transformers

    config = transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=259)
    theirs, tokenizer = transformers.MambaForCausalLM(config), sl.lm.tiny_model().tokenizer
    model = sl.load_model(theirs, tokenizer=tokenizer, backend="huggingface", progress=False)
    tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 60)], ctx_len=24)
    ids = [i for i in tokens.ids.unique().tolist() if i > 5]
    found = word_geometry(model, tokens, {"a": ids[:6], "b": ids[6:]}, min_count=2, n_permutations=19, progress=False)
    assert "no '" in found.reason and not [row for row in found.rows if row.measure == "attention"]
