"""Planted trees of features are found as families; independent features have as many as their permuted columns."""

import json

import networkx as nx
import numpy as np
import pytest
from corpora_made import harvest_codes

from saelab.corpora import feature_families, find_families, pool_documents

N = 3000


def plant(seed: int, n: int = N) -> np.ndarray:
    """Codes of two trees: 0 above 1, 2, 3 and 4 above 5, 6, 7; 8, 9, 10 below 1; then ten features of no tree.

    Odd features have negative codes.
    """
    rng = np.random.default_rng(seed)
    z = np.zeros((n, 21), bool)
    for root, at in ((0, slice(0, n // 2)), (4, slice(n // 2, n))):
        z[at, root] = rng.random(n // 2) < 0.3
        for child in range(root + 1, root + 4):
            z[:, child] = z[:, root] & (rng.random(n) < 0.35)
    for child in (8, 9, 10):
        z[:, child] = z[:, 1] & (rng.random(n) < 0.4)
    z[:, 11:] = rng.random((n, 10)) < 0.03
    return z * np.where(np.arange(21) % 2, -1, 1) * rng.uniform(1, 2, z.shape)


def side(feature: int) -> tuple[int, int]:
    return feature, -1 if feature % 2 else 1


def documents_of(codes: np.ndarray, folder):
    return pool_documents(harvest_codes(codes, np.arange(len(codes)), folder))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return documents_of(plant(0), tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def found(planted):
    return find_families(planted, labels={0: "root"}, min_children=3, min_excess=5.0, n_rounds=1, n_null=10)


def test_planted_trees_are_the_families(found) -> None:
    trees = {side(0): {1, 2, 3, 8, 9, 10}, side(1): {8, 9, 10}, side(4): {5, 6, 7}}
    assert {one.parent: set(one.children) for one in found.families} == {
        parent: {side(child) for child in below} for parent, below in trees.items()
    }
    assert all(one.q <= 0.05 for one in found.families) and found.null_counts == (0,) * 10
    first = found.families[0]
    assert first.parent == side(0) and first.name == "root"
    up = {
        child: first.children[at] if at >= 0 else first.parent
        for child, at in zip(first.children, first.above, strict=True)
    }
    assert all(up[side(child)] == side(0) for child in (1, 2, 3)) and all(up[side(c)] == side(1) for c in (8, 9, 10))
    assert found.of(0) == found.of(side(0)) == (first,) and first in found.of(side(9)) and found.of((9, 1)) == ()
    assert first.inside > 0.9 > 3 * first.outside and first.ratio == first.inside / first.outside


def test_the_papers_rules_attach_what_overlaps_by_chance(planted, found) -> None:
    """A side in .15 of documents overlaps with every rarer one by about as much; an excess is what tells them."""
    loose = find_families(planted, min_children=3, n_rounds=1, n_null=0)
    tree = {one.parent: set(one.children) for one in found.families}
    attached = {one.parent: set(one.children) for one in loose.families}
    assert all(tree[parent] <= attached[parent] for parent in tree)
    assert any(child[0] > 10 for one in loose.families for child in one.children)
    assert not any(child[0] > 10 for child in found.members)
    assert [len(one.children) for one in found.families] == sorted(len(f.children) for f in found.families)[::-1]


def test_figures_are_those_of_a_plain_count(found, planted) -> None:
    fires = planted.matrix.toarray() > 0
    columns = [planted.column_of((int(j), int(sign))) for j, sign in found.sides]
    own = fires[:, columns]
    counts = own.sum(0)
    assert counts.min() >= 10 and counts.max() <= 0.2 * N and found.n_documents == N
    for one in found.families:
        parent = planted.column_of(one.parent)
        children = [planted.column_of(child) for child in one.children]
        overlap = {
            c: (fires[:, c] & fires[:, parent]).sum() / (min(fires[:, c].sum(), fires[:, parent].sum()) + 1)
            for c in columns
        }
        assert one.n_documents == fires[:, parent].sum()
        assert one.inside == pytest.approx(np.mean([overlap[c] for c in children]))
        rest = [overlap[c] for c in columns if c != parent and c not in children]
        assert one.outside == pytest.approx(np.mean(rest))
        expected = [fires[:, c].sum() * one.n_documents / N for c in children]
        spread = [
            e * (1 - fires[:, c].mean()) * (N - one.n_documents) / (N - 1)
            for e, c in zip(expected, children, strict=True)
        ]
        both = [(fires[:, c] & fires[:, parent]).sum() for c in children]
        assert one.excess == pytest.approx(np.mean((np.array(both) - expected) / np.sqrt(spread)))


def naive(fires: np.ndarray, min_overlap: float, n_rounds: int) -> set[tuple[int, frozenset[int]]]:
    """Parents and their descendants in maximum spanning forests by networkx, rounds and duplicates included."""
    counts, found, left = fires.sum(0), [], list(range(fires.shape[1]))
    both = fires.T.astype(int) @ fires.astype(int)
    for _ in range(n_rounds):
        graph = nx.Graph()
        for i in left:
            for j in left:
                if i < j and (overlap := both[i, j] / (min(counts[i], counts[j]) + 1)) >= min_overlap:
                    dense, rare = sorted((i, j), key=lambda one: (-counts[one], one))
                    # of equal ones that with the rarer parent, then the lower columns
                    graph.add_edge(i, j, weight=overlap - 1e-11 * (3600 * counts[dense] + 60 * dense + rare))
        tree, directed = nx.maximum_spanning_tree(graph), nx.DiGraph()
        directed.add_edges_from(sorted(edge, key=lambda i: (-counts[i], i)) for edge in tree.edges)
        new = [(i, frozenset(nx.descendants(directed, i))) for i in directed if directed.out_degree(i) > 2]
        left = [i for i in left if i not in {parent for parent, _ in new}]
        found += new
    kept: list[tuple[int, frozenset[int]]] = []
    for parent, below in sorted((one for one in found if len(one[1]) > 3), key=lambda one: (-len(one[1]), one[0])):
        if all(len(below & other) <= 0.6 * len(below | other) for _, other in kept):
            kept.append((parent, below))
    return set(kept)


def test_families_are_those_of_a_plain_implementation(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(1)
    topics = rng.random((800, 6)) < 0.15
    rates = 0.02 + 0.5 * (topics @ (rng.random((6, 60)) < 0.2)) * rng.uniform(0.1, 1, 60)
    codes = (rng.random(rates.shape) < rates) * rng.uniform(1, 2, rates.shape)
    documents = documents_of(codes, tmp_path)
    found = find_families(documents, max_density=1.0, min_documents=1, n_null=0)
    mine = {(one.parent[0], frozenset(child for child, _ in one.children)) for one in found.families}
    fires = codes != 0
    overlaps = (fires.T.astype(int) @ fires.astype(int))[np.triu_indices(60, 1)]
    assert len(mine) > 5 and overlaps.max() > 20
    assert mine == naive(fires, 0.1, 3)
    monkeypatch.setattr(feature_families, "BLOCK", 7)
    again = find_families(documents, max_density=1.0, min_documents=1, n_null=0)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict()) and all(np.isnan(one.q) for one in again.families)


def test_the_order_of_documents_changes_nothing(planted, found) -> None:
    order = np.random.default_rng(2).permutation(N)
    again = find_families(planted.rows(order), labels={0: "root"}, min_children=3, min_excess=5.0, n_rounds=1, n_null=0)
    told = [{name: value for name, value in vars(one).items() if name != "q"} for one in found.families]
    assert [{name: value for name, value in vars(one).items() if name != "q"} for one in again.families] == told


def test_families_hold_in_other_documents_and_chance_does_not(found, tmp_path) -> None:
    scores = found.score(documents_of(plant(3), tmp_path))
    strong = [i for i, one in enumerate(found.families) if one.q <= 0.05]
    assert len(scores.inside) == len(found.families) and scores.n_documents == N
    for i in strong:  # means of hundreds of documents: within a tenth
        assert scores.inside[i] == pytest.approx(found.families[i].inside, abs=0.1) and scores.excess[i] > 5
    assert "families by 3,000 other documents" in str(scores)


def test_independent_features_have_the_families_of_their_null(tmp_path) -> None:
    """Of features that fire independently, as many families as after permuting; few are called real."""
    rng = np.random.default_rng(4)
    rates = np.concatenate([np.full(8, 0.15), rng.uniform(0.01, 0.04, 150)])
    called, counts, null = 0, [], []
    for i in range(6):
        codes = (rng.random((1000, len(rates))) < rates).astype(float)
        one = find_families(documents_of(codes, tmp_path / str(i)), n_null=4, seed=i)
        counts.append(len(one.families))
        null += one.null_counts
        called += any(family.q <= 0.05 for family in one.families)
    assert np.mean(null) > 3  # a side in .15 of documents overlaps with rare ones by chance
    spread = np.std(null, ddof=1) * (1 / len(counts) + 1 / len(null)) ** 0.5
    assert abs(np.mean(counts) - np.mean(null)) < 4 * spread  # four standard errors of the difference
    assert called <= 3  # binomial(6, .05): four or more has probability 9e-5


def test_permuted_columns_keep_their_counts(planted) -> None:
    fires = feature_families._firings(planted.matrix)
    moved = feature_families.permute_columns(fires, 5)
    assert (moved.sum(0) == fires.sum(0)).all() and moved.max() == 1 and (moved != fires).nnz > 0
    assert (feature_families.permute_columns(fires, 5) != moved).nnz == 0


def test_chosen_sides_alone_are_in_families(planted) -> None:
    chosen = [side(j) for j in (0, 2, 3, 8, 9, 10, 12)]
    found = find_families(planted, sides=chosen, min_children=3, n_null=0)
    assert found.members <= set(chosen) and found.families[0].parent == side(0)
    with pytest.raises(ValueError, match="at least two sides"):
        find_families(planted, sides=[side(0)])
    with pytest.raises(ValueError, match="A side must be"):
        find_families(planted, sides=[(99, 1), side(0)])


def test_what_is_printed_and_saved(found, tmp_path) -> None:
    assert "families of" in str(found) and "0 (root)" in str(found) and "1 -" in str(found)
    found.save(tmp_path / "families.json")
    told = json.loads((tmp_path / "families.json").read_text())
    assert told["families"][0]["parent"] == [0, 1] and told["null_counts"] == list(found.null_counts)
    assert "<li>1 \u2212<" in found._repr_html_()


@pytest.mark.parametrize("given", [{"min_overlap": 0.0}, {"min_overlap": 1.0}, {"max_density": 0.0}, {"n_rounds": 0}])
def test_settings_out_of_range_are_refused(planted, given) -> None:
    with pytest.raises(ValueError, match="`min_overlap` must be in"):
        find_families(planted, **given)
    with pytest.raises(ValueError, match="`n_null` must be"):
        find_families(planted, n_null=-1)


def test_no_family_is_no_error(tmp_path) -> None:
    codes = np.eye(40).repeat(20, axis=0)
    found = find_families(documents_of(codes, tmp_path), n_null=2)
    assert found.families == () and found.null_counts == (0, 0) and np.isnan(found.ratio)
    assert "0 families of 40 sides" in str(found) and found.score(documents_of(codes, tmp_path / "b")).inside == ()
