"""Crystals: translations that were planted, classes that only look like them, and distractors that hide them."""

import json

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.geometry.relation_crystals import HELD_OUT, OUT, RANDOM, RAW

D, N = 24, 15
PAIRS = {name: [(f"{name} {i}", f"{name} {i}'") for i in range(N)] for name in ("young", "home", "partner")}
NAMES = [word for found in PAIRS.values() for pair in found for word in pair] + [f"other {i}" for i in range(60)]


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def plant(rng: np.random.Generator, kind: str, noise: float = 0.3) -> np.ndarray:
    """Vectors of the names, where a pair differs by its relation's vector, or its words are of two classes."""
    found = {name: rng.standard_normal(D) for name in NAMES}
    for pairs in PAIRS.values():
        step, classes = rng.standard_normal(D), 3 * rng.standard_normal((2, D))
        for a, b in pairs:
            if kind == "translation":
                found[b] = found[a] + step + noise * rng.standard_normal(D)
            elif kind == "classes":
                found[a], found[b] = classes + 0.5 * rng.standard_normal((2, D))
    return np.stack([found[name] for name in NAMES])


def test_translations_are_found_and_permuted_pairs_are_not(rng):
    found = sl.crystals(torch.from_numpy(plant(rng, "translation")), PAIRS, names=NAMES)
    raw, held = found.at(RAW), found.at(HELD_OUT)
    assert raw.contrast > 0.7 and max(raw.permuted_pairs) < 0.5 * raw.contrast and raw.z > 5
    assert abs(np.mean(raw.permuted_relations)) < 0.1 and held.contrast > 0.7 > 2 * abs(
        np.mean(held.permuted_relations)
    )
    assert not any("(raw)" in one for one in found.failed)
    assert all(row.n_pairs == N and row.cosine > 0.7 > row.cosine_permuted for row in found.relations)
    assert json.loads(json.dumps(found.to_dict()))["n_pairs"] == 3 * N == found.n_differ


def test_two_classes_are_told_to_be_no_translation(rng):
    found = sl.crystals(plant(rng, "classes"), PAIRS, names=NAMES)
    assert found.at(RAW).contrast > 0.7 and abs(found.at(RAW).z) < 4
    first = str(found).splitlines()[0]
    assert first.startswith("A null is not passed: permuted pairs reach") and "(raw)" in first


def test_vectors_without_relations_have_no_contrast(rng):
    found = sl.crystals(plant(rng, "none"), PAIRS, names=NAMES)
    assert abs(found.at(RAW).contrast) < 0.1 and abs(found.at(HELD_OUT).contrast) < 0.15
    assert found.at("LDA, fitted").contrast > found.at(HELD_OUT).contrast
    assert any("permuted relations reach" in one and "(LDA, fitted)" in one for one in found.failed)


def test_a_distractor_hides_translations_until_it_is_projected_out(rng):
    x, length = plant(rng, "translation"), rng.standard_normal(len(NAMES))
    hidden = x + 8 * length[:, None] * np.linalg.qr(rng.standard_normal((D, 1)))[0].T
    found = sl.crystals(hidden, PAIRS, names=NAMES, distractors=length)
    raw, out, random = (found.at(name) for name in (RAW, OUT, RANDOM))
    assert raw.contrast < 0.4 and out.contrast > 0.7 and abs(random.contrast - raw.contrast) < 0.15
    assert found.n_distractors == 1 and not any("gain" in one for one in found.failed)
    two = sl.crystals(hidden, PAIRS, names=NAMES, distractors=np.stack([length, 2 * length], 1))
    assert two.n_distractors == 1 and two.at(OUT).contrast == pytest.approx(out.contrast)


def test_directions_of_distractors_come_from_words_outside_of_pairs(rng):
    """A property that only words of pairs have is no distractor: it would take the relations out."""
    x = plant(rng, "translation")
    second = np.array([name.endswith("'") for name in NAMES], float)
    with_noise = second + 1e-3 * rng.standard_normal(len(NAMES))
    found = sl.crystals(x, PAIRS, names=NAMES, distractors=with_noise)
    assert found.at(OUT).contrast == pytest.approx(found.at(RAW).contrast, abs=0.1)


def test_pairs_of_equal_vectors_count_in_no_cosine(rng):
    x = plant(rng, "translation")
    place = {name: i for i, name in enumerate(NAMES)}
    for a, b in PAIRS["home"][:5]:
        x[place[b]] = x[place[a]]
    found = sl.crystals(x, {name: [(place[a], place[b]) for a, b in pairs] for name, pairs in PAIRS.items()})
    assert found.n_differ == found.n_pairs - 5 and found.at(RAW).contrast > 0.7


def test_wrong_input_is_refused(rng):
    x = plant(rng, "none")
    for kwargs, match in (
        ({"pairs": {"a": PAIRS["home"]}}, "at least two relations with three pairs"),
        ({"pairs": PAIRS | {"b": [("x", "y")] * 3}}, r"must be among those of `vectors`, not so: \['x'"),
        ({"names": NAMES[1:]}, "`names` must be those of the 150 rows"),
        ({"distractors": np.ones((3, 1))}, "with a row for each of the 150 words"),
        ({"distractors": np.ones((150, D))}, "must be fewer than the 24 dimensions"),
        ({"n_draws": 1}, "`n_draws` at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            sl.crystals(x, **{"pairs": PAIRS, "names": NAMES} | kwargs)
