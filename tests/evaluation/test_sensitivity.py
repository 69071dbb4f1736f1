"""Sensitivity where features of meaning and of wording are planted, against a loop; stories told twice."""

import numpy as np
import pytest

from saelab.evaluation.sensitivity import score_sensitivity
from saelab.synthetic.retelling import retell_stories
from saelab.synthetic.vocabulary import VOCABULARY


def test_meaning_is_found_again_and_wording_is_not():
    """Signed feature 0 says the text's subject, one side for each of two; feature 1 fires on one wording alone."""
    rng = np.random.default_rng(0)
    subject = rng.integers(0, 4, 200)
    z = np.zeros((200, 3))
    z[subject == 0, 0], z[subject == 1, 0] = 1.0, -2.0
    other = z.copy()
    z[subject == 2, 1], other[subject == 3, 1] = 1.0, 1.0
    z[:3, 2] = 1.0
    found = score_sensitivity(z, np.arange(200), other, np.arange(200))
    rows = {(f, s): v for f, s, v in zip(found.features, found.signs, found.sensitivity, strict=True)}
    assert rows == {(0, 1): 1.0, (0, -1): 1.0, (1, 1): 0.0} and found.n_few == 1
    assert found.chance[0] == (subject == 0).mean()
    assert f"{found.mean:.3f}" in str(found) and found.to_dict()["mean"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="with the same number"):
        score_sensitivity(z, np.arange(200), other, np.full(200, -1))
    with pytest.raises(ValueError, match="must have a row for each"):
        score_sensitivity(z, np.arange(9), other, np.arange(200))
    for wrong in ({"n_examples": 0}, {"min_examples": -1}):
        with pytest.raises(ValueError, match="must be at least 1, got"):
            score_sensitivity(z, np.arange(200), other, np.arange(200), **wrong)


def test_as_a_loop():
    rng = np.random.default_rng(1)
    z, other = (np.where(rng.random((300, 6)) < 0.1, rng.standard_normal((300, 6)), 0) for _ in range(2))
    texts, other_texts = rng.integers(-1, 60, 300), rng.integers(-1, 60, 300)
    found = score_sensitivity(z, texts, other, other_texts, n_examples=7, min_examples=3)
    known = sorted(set(texts[texts >= 0]) & set(other_texts[other_texts >= 0]))
    for f, sign, value, chance in zip(found.features, found.signs, found.sensitivity, found.chance, strict=True):
        peaks = {t: (sign * z[texts == t, f]).max() for t in known}
        best = [t for t in sorted(known, key=lambda t: -peaks[t]) if peaks[t] > 0][:7]
        again = {t: (sign * other[other_texts == t, f]).max() > 0 for t in known}
        assert value == pytest.approx(np.mean([again[t] for t in best])) and chance == np.mean(list(again.values()))


def test_retold_sentences_have_the_same_people_and_things():
    (stories, places), (others, other_places) = retell_stories(20)
    numbers = set(places[places >= 0])
    assert numbers == set(other_places[other_places >= 0]) and len(numbers) > 100
    names = [
        i for i, c in enumerate(stories.labels.concepts) if c.kind == "word" and c.parent in ("girl name", "boy name")
    ]
    things = [i for i, c in enumerate(stories.labels.concepts) if c.kind in ("class", "pole")]
    shared, differ = [], []
    for i in numbers:
        a, b = places == i, other_places == i
        differ.append(stories.token_ids[a].tolist() != others.token_ids[b].tolist())
        mine, theirs = (set(s.labels.matrix[m].indices) for s, m in ((stories, a), (others, b)))
        for kind in (names, things):
            if mine & set(kind) and theirs & set(kind):
                shared.append(bool(mine & theirs & set(kind)))
    assert all(differ) and np.mean(shared) > 0.9
    heroes = [[VOCABULARY[t] for t in s.token_ids[s.offsets[0] : s.offsets[1]]] for s in (stories, others)]
    assert set(heroes[0]) & set(heroes[1]) and heroes[0] != heroes[1]
