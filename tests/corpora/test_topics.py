"""Planted topics are found by every method but chance; coherence, diversity and agreement have known values."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from unchecked import unchecked

from saelab.corpora import Topics, find_topics, score_topics

N, TOPICS, WORDS = 400, 5, 60
VOCABULARY = [f"w{j}" for j in range(WORDS)]


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, csr_matrix, csr_matrix, np.ndarray]:
    """Topics, counts of 12 words a topic, codes of 8 features a topic, embeddings of a direction each; with noise."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, TOPICS, N)
    own_words, own_features = np.arange(WORDS) // 12, np.arange(8 * TOPICS) // 8
    counts = rng.poisson(np.where(topic[:, None] == own_words, 1.0, 0.15))
    codes = rng.gamma(2, size=(N, 8 * TOPICS)) * (
        rng.random((N, 8 * TOPICS)) < np.where(topic[:, None] == own_features, 0.5, 0.05)
    )
    x = np.linalg.qr(rng.normal(size=(16, 16)))[0][topic] * 3 + 0.7 * rng.normal(size=(N, 16))
    return topic, csr_matrix(counts), csr_matrix(codes), x


@pytest.mark.parametrize(
    ("method", "kind"),
    [("features", "codes"), ("nmf", "codes"), ("kmeans", "codes"), ("kmeans", "x"), ("ica", "x"), ("lda", "x")],
)
def test_planted_topics_are_found(planted, method, kind) -> None:
    topic, counts, codes, x = planted
    found = find_topics(codes if kind == "codes" else x, counts, VOCABULARY, method=method, n_topics=TOPICS)
    scores = score_topics(found, counts, VOCABULARY, topic)
    drawn = find_topics(x, counts, VOCABULARY, method="random", n_topics=TOPICS, seed=7)
    chance = score_topics(drawn, counts, VOCABULARY, topic)
    # one feature a topic knows half of its documents, and five clusters lie in four dimensions for ICA
    assert scores.ami > {"features": 0.15, "ica": 0.3}.get(method, 0.6) and abs(chance.ami) < 0.05
    assert scores.coherence > 0.1 > chance.coherence and scores.purity > chance.purity
    if method not in ("features", "ica"):
        groups = [np.bincount([int(word[1:]) // 12 for word in words]).max() / len(words) for words in found.words]
        assert np.mean(groups) > 0.8 and scores.diversity > 0.8
    assert len(found.weights) == N and (found.weights >= 0).all() and "topics of 400 documents" in str(found)


def test_coherence_is_the_mean_npmi_of_pairs() -> None:
    has = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    topics = Topics(method="nmf", weights=np.ones((8, 2)), words=(("w0", "w1"), ("w1", "w2")))
    scores = score_topics(topics, csr_matrix(has), ["w0", "w1", "w2"])
    a = np.log((2 / 8) / (3 / 8 * 2 / 8)) / -np.log(2 / 8)  # twice together, of 3 and 2 in 8 documents
    assert scores.coherence == pytest.approx((a - 1) / 2)  # w1 and w2 never meet
    assert scores.diversity == 3 / 4 and np.isnan(scores.ami)


def test_agreement_does_not_depend_on_the_names_of_topics() -> None:
    weights = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    topics = Topics(method="nmf", weights=weights, words=(("w0",), ("w1",), ("w2",)))
    counts = csr_matrix(np.ones((4, 3)))
    same = score_topics(topics, counts, ["w0", "w1", "w2"], np.array(list("bbccaa")))
    assert (same.ami, same.nmi, same.purity) == (1, pytest.approx(1), 1)
    other = score_topics(topics, counts, ["w0", "w1", "w2"], np.array(list("abcabc")))
    assert other.purity == 0.5 and other.ami < 0.1


def test_a_document_without_any_topic_has_none() -> None:
    codes = csr_matrix(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 0.0]]))
    found = find_topics(codes, csr_matrix(np.ones((5, 2))), ["a", "b"], method="features", n_topics=2)
    assert found.topic[4] == -1 and found.topic[0] == found.topic[1] != found.topic[2]


def test_what_does_not_fit_is_refused(planted) -> None:
    _, counts, codes, x = planted
    with unchecked(), pytest.raises(ValueError, match="`method` must be one of"):
        find_topics(codes, counts, VOCABULARY, method="bertopic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative for 'nmf'"):
        find_topics(x, counts, VOCABULARY)
    with pytest.raises(ValueError, match="a row for each of the 400 documents"):
        find_topics(codes[:9], counts, VOCABULARY)
    with pytest.raises(ValueError, match="`n_topics` must be 2 to 40"):
        find_topics(codes, counts, VOCABULARY, n_topics=41)
    found = find_topics(codes, counts, VOCABULARY, n_topics=2)
    with pytest.raises(ValueError, match="`held_out` must have a column for each"):
        score_topics(found, counts[:, :5], VOCABULARY)
    with pytest.raises(ValueError, match="`truth` must have a topic for each of 400"):
        score_topics(found, counts, VOCABULARY, np.zeros(3))
