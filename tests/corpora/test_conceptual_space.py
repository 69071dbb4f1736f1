"""A planted hierarchy is split where the embeddings are; neighbors, medoids and bad input."""

import numpy as np
import pytest

from saelab.corpora import ConceptBank, conceptualize, neighbors_kept, representative_points


def world(seed: int = 0) -> tuple[ConceptBank, np.ndarray, np.ndarray]:
    """Three roots of three concepts each; 300 embeddings, all near the concepts of the second root."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(3, 32))
    leaves = np.repeat(roots, 3, axis=0) + 0.7 * rng.normal(size=(9, 32))
    names = ["animal", "tool", "place", *(f"{root} {i}" for root in ("animal", "tool", "place") for i in range(3))]
    bank = ConceptBank(
        names=names, vectors=np.concatenate([roots, leaves]), parents=[-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    )
    leaf = rng.integers(3, 6, 300)
    return bank, leaves[leaf] + 0.4 * rng.normal(size=(300, 32)), leaf


def test_the_concepts_are_split_where_the_embeddings_are() -> None:
    bank, x, leaf = world()
    space = conceptualize(x, bank, 5, center=False)
    assert space.splits == ("tool",) and set(space.names) == {"animal", "place", "tool 0", "tool 1", "tool 2"}
    said = np.array([space.describe(i, 1)[0][0] for i in range(300)])
    assert (said == np.array([f"tool {j - 3}" for j in leaf])).mean() > 0.9
    assert conceptualize(x, bank, 4).splits == () and len(conceptualize(x, bank, 99).names) == 9
    cosine = x[7] @ bank.vectors[6] / np.linalg.norm(x[7]) / np.linalg.norm(bank.vectors[6])
    assert space.coordinates[7, space.concepts.index(6)] == pytest.approx(cosine)
    assert "300 embeddings by 5 concepts" in str(space)


def test_centering_takes_out_what_all_have_in_common() -> None:
    bank, x, _ = world(1)
    shift = 30 * np.ones(32)
    moved = ConceptBank(names=bank.names, vectors=bank.vectors + shift, parents=bank.parents)
    plain, centered = (conceptualize(x + shift, moved, 9, center=center) for center in (False, True))
    assert plain.coordinates.min() > 0.9 and centered.coordinates.min() < 0
    assert np.allclose(centered.coordinates, conceptualize(x, bank, 9).coordinates)


def test_more_concepts_keep_more_neighbors_than_a_shuffled_bank() -> None:
    bank, _, _ = world(2)
    rng = np.random.default_rng(3)
    x = rng.gamma(0.5, size=(300, 9)) @ bank.vectors[3:] + 0.1 * rng.normal(size=(300, 32))
    few, many = (neighbors_kept(x, conceptualize(x, bank, n).coordinates) for n in (3, 9))
    shuffled = ConceptBank(names=bank.names, vectors=rng.permuted(bank.vectors, axis=1), parents=bank.parents)
    null = neighbors_kept(x, conceptualize(x, shuffled, 9).coordinates)
    assert many > few and many > null > 10 / 299


def test_kept_neighbors_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    shares = []
    for i in range(40):
        sets = []
        for rows in (x, y):
            near = rows @ rows[i] / np.linalg.norm(rows, axis=1)
            near[i] = -np.inf
            sets.append(set(np.argsort(-near)[:6].tolist()))
        shares.append(len(sets[0] & sets[1]) / 6)
    assert neighbors_kept(x, y, 6) == pytest.approx(np.mean(shares)) and neighbors_kept(x, x, 6) == 1


def test_medoids_stand_for_planted_clusters() -> None:
    rng = np.random.default_rng(5)
    centers = np.eye(12)[:4]
    of = np.repeat(np.arange(4), [40, 30, 20, 10])
    x = centers[of] + 0.15 * rng.normal(size=(100, 12))
    found = representative_points(x, 4, seed=1)
    assert found.sizes.tolist() == [40, 30, 20, 10] and of[found.rows].tolist() == [0, 1, 2, 3]
    assert np.array_equal(found.cluster, of) and found.similarity > 0.8
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i, row in enumerate(found.rows.tolist()):  # no other row of the cluster is nearer to it on average
        own = unit[found.cluster == i]
        assert (own @ unit[row]).mean() >= (own @ own.T).mean(0).max() - 1e-12
    same = representative_points(np.ones((5, 3)), 3)
    assert len(set(same.rows.tolist())) == 3 and same.similarity == pytest.approx(1)


def test_what_does_not_fit_is_refused() -> None:
    bank, x, _ = world()
    for vectors, parents in ((np.zeros((2, 4)), None), (np.full((1, 4), np.nan), None), (np.ones((1, 4)), [-1, 0])):
        with pytest.raises(ValueError, match="A bank must have a finite vector and a parent"):
            ConceptBank(names=["a"], vectors=vectors, parents=parents)
    with pytest.raises(ValueError, match="a circle at 'a'"):
        ConceptBank(names=["a", "b"], vectors=np.eye(2), parents=[1, 0])
    with pytest.raises(ValueError, match=r"-1 for a root or 0\.\.1"):
        ConceptBank(names=["a", "b"], vectors=np.eye(2), parents=[-1, 2])
    with pytest.raises(ValueError, match="at least the 3 roots"):
        conceptualize(x, bank, 2)
    with pytest.raises(ValueError, match="one row of 32 finite numbers"):
        conceptualize(x[:, :5], bank, 3)
    with pytest.raises(ValueError, match="`n_nearest` be 1 to one less"):
        neighbors_kept(x, x, 300)
    with pytest.raises(ValueError, match="`k` must be 1 to the number of rows"):
        representative_points(x, 301)
