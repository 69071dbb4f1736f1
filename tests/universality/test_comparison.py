"""`compare`: planted relations are found and none invented, and blocks give what dense products give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import saelab as sl
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure
from saelab.universality import nearest, similarity as products
from saelab.universality.comparison_sources import NullConfig
from saelab.universality.matching import assign, find_mutual, pooled_p
from saelab.universality.nearest import Nearest, find_nearest
from saelab.universality.similarity import ComparedCodes, ComparedRows, Moments, correlation_blocks, count_both

DOC = 50


class Made(sl.FeatureStore):
    """Codes in memory, on documents of fifty tokens."""

    def __init__(self, dense: np.ndarray, name: str = "made") -> None:
        self.codes = csr_matrix(dense.astype(np.float32))
        n = len(dense)
        places = np.arange(n, dtype=np.int32)
        text = StoredText(
            token_ids=places % 26,
            doc_ids=places // DOC,
            positions=places % DOC,
            strings={i: chr(97 + i) for i in range(26)},
        )
        columns = self.codes.tocsc()
        self.folder, self._starts = Path(name), [0, n]
        statistics = measure(dense.shape[1], [(columns.indptr, columns.data)])
        self.__dict__.update(text=text, places=places, statistics=statistics)

    @property
    def d_sae(self) -> int:
        return int(self.codes.shape[1])

    @property
    def n_entries(self) -> int:
        return int(self.codes.nnz)

    def matrix(self, start: int = 0, stop: int | None = None) -> csr_matrix:
        return self.codes[start:stop]


def codes(n: int, d: int, rng: np.random.Generator, rate: float = 0.05, signed: bool = True) -> np.ndarray:
    """Codes that come in runs, as those of text do."""
    runs = np.repeat(rng.random((n // 2 + 1, d)) < rate, 2, axis=0)[:n]
    found = runs * rng.gamma(2.0, 1.0, (n, d))
    return found * np.where(rng.random((n, d)) < 0.5, 1, -1) if signed else found


def naive(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All Pearson correlations; 0 where a column never varies."""
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((x**2).sum(0))[:, None] * np.sqrt((y**2).sum(0))
    return np.divide(x.T @ y, scale, out=np.zeros_like(scale), where=scale > 1e-9)


def search(x: np.ndarray, y: np.ndarray, m: int, signed: bool = True) -> tuple[Nearest, Nearest]:
    sides = ComparedCodes(Made(x)), ComparedCodes(Made(y))
    seen = Moments.of(sides[0]), Moments.of(sides[1])
    return find_nearest(correlation_blocks(*sides, seen, 1), x.shape[1], y.shape[1], m, signed)


def check_nearest(found: Nearest, true: np.ndarray, m: int, signed: bool) -> None:
    sizes = np.abs(true) if signed else np.maximum(true, 0)
    best = -np.sort(-sizes, axis=1)[:, :m]
    got = np.nan_to_num(np.abs(found.values))
    assert got.shape == best.shape and np.abs(got - best).max() < 1e-5
    features, at = np.nonzero(found.indices >= 0)
    assert np.abs(found.values[features, at] - true[features, found.indices[features, at]]).max() < 1e-5


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("blocks", ["one", "many", "chunks"])
def test_blocks_give_what_dense_products_give(signed: bool, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = codes(600, 90, rng), codes(600, 70, rng)
    y[:, :30] += x[:, :30]
    x[:, 5] = y[:, 6] = 0  # never fire
    if blocks != "one":
        monkeypatch.setattr(products, "BLOCK_CELLS", 70 * 7)
        monkeypatch.setattr(products, "LARGE_BLOCK_CELLS", 70 * 7)
        monkeypatch.setattr(nearest, "GROUP", 3)
    if blocks == "chunks":
        monkeypatch.setattr(products, "CHUNK_ENTRIES", 500)
    found = search(x, y, 5, signed)
    true = naive(x, y)
    check_nearest(found[0], true, 5, signed)
    check_nearest(found[1], true.T, 5, signed)


def test_rows_of_unequal_lengths_are_multiplied_as_scipy_does() -> None:
    rng = np.random.default_rng(1)
    even, uneven = codes(300, 40, rng, rate=0.6), codes(300, 40, rng, rate=0.02)
    uneven[0] = 1.0
    assert (
        ComparedRows.pad(csr_matrix(even.astype(np.float32))) is not None
        and ComparedRows.pad(csr_matrix(uneven)) is None
    )
    for y in (even, uneven):
        x = codes(300, 30, rng)
        check_nearest(search(x, y, 40)[0], naive(x, y), 40, True)


def test_order_and_groups_and_sides_and_weights_are_what_they_say() -> None:
    rng = np.random.default_rng(2)
    x = codes(200, 12, rng)
    store = Made(x)
    order = rng.permutation(200)
    assert np.allclose(ComparedCodes(store).moved(order).matrix(0, 200).toarray(), x[order], atol=1e-5)
    assert np.allclose(ComparedCodes(store).moved(order).matrix(150, 190).toarray(), x[order[150:190]], atol=1e-5)
    groups = np.arange(0, 200, DOC)
    means = ComparedCodes(store, groups=groups).matrix(0, 4).toarray()
    assert np.allclose(means, x.reshape(4, DOC, 12).mean(1), atol=1e-5)
    sides = ComparedCodes(store, "sides").matrix(0, 200).toarray()
    assert np.allclose(sides[:, ::2], np.maximum(x, 0), atol=1e-5) and np.allclose(
        sides[:, 1::2], np.maximum(-x, 0), atol=1e-5
    )
    weights = csr_matrix(np.eye(200, dtype=np.float32)[::2] * 0.5 + np.eye(200, dtype=np.float32)[1::2] * 0.5)
    assert np.allclose(
        ComparedCodes(store, weights=weights).matrix(10, 60).toarray(), (x[::2] + x[1::2])[10:60] / 2, atol=1e-5
    )
    rows = np.array([3, 5, 8, 150])
    assert np.allclose(ComparedCodes(store, rows=rows).matrix(1, 4).toarray(), x[rows[1:]], atol=1e-5)


def test_both_are_counted() -> None:
    rng = np.random.default_rng(3)
    x, y = (csr_matrix(codes(100, 6, rng, rate=0.3)).tocsc() for _ in range(2))
    pairs = np.array([(i, j) for i in range(6) for j in range(6)])
    naive_counts = ((x.toarray() != 0).astype(int).T @ (y.toarray() != 0).astype(int)).ravel()
    assert (count_both(x, y, pairs) == naive_counts).all()


def test_the_assignment_is_scipys_where_all_pairs_are_there() -> None:
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(4)
    values = rng.uniform(-1, 1, (30, 40)).astype(np.float32)
    order = np.argsort(-np.abs(values), axis=1)
    of_a = Nearest(order, np.take_along_axis(values, order, 1))
    none = Nearest(np.full((40, 1), -1), np.full((40, 1), np.nan, np.float32))
    pairs, found = assign(of_a, none)
    i, j = linear_sum_assignment(-np.abs(values))
    assert np.isclose(np.abs(found).sum(), np.abs(values[i, j]).sum()) and len(set(pairs[:, 1].tolist())) == 30
    assert np.allclose(values[pairs[:, 0], pairs[:, 1]], found)


def test_p_is_uniform_by_chance_and_never_zero() -> None:
    rng = np.random.default_rng(5)
    fires = rng.integers(10, 1000, 4000)
    values, null = rng.random(4000) + fires / 500, rng.random(3000)
    their_fires = rng.integers(10, 1000, 3000)
    null = null + their_fires / 500  # chance depends on the rate
    p = pooled_p(values, null, fires, their_fires)
    assert p.min() > 0 and abs(p.mean() - 0.5) < 0.03 and abs((p < 0.1).mean() - 0.1) < 0.05
    for rare in (True, False):
        assert abs((p[(fires < 300) == rare] < 0.1).mean() - 0.1) < 0.06
    assert pooled_p(np.array([99.0, np.nan]), null, np.array([50, 50]), their_fires).tolist() == [1 / 3001, 1.0]
    assert pooled_p(np.array([0.5]), np.empty(0), np.array([50]), np.empty(0, int)).tolist() == [1.0]


def plant(seed: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray, dict[str, dict[int, tuple[int, ...]]]]:
    """Two dictionaries: features permuted, flipped, split in two, halved by sign, absent."""
    rng = np.random.default_rng(seed)
    x = codes(n, 60, rng)
    parts: list[np.ndarray] = []
    relations: dict[str, dict[int, list[int]]] = {kind: {} for kind in ("same", "flipped", "split", "halves")}

    def add(i: int, kind: str, *columns: np.ndarray) -> None:
        relations[kind][i] = [len(parts) + k for k in range(len(columns))]
        parts.extend(columns)

    def noisy(z: np.ndarray) -> np.ndarray:
        return z * rng.uniform(0.8, 1.2, n)

    for i in range(20):
        add(i, "same", noisy(x[:, i]))
    for i in range(20, 30):
        add(i, "flipped", -noisy(x[:, i]))
    for i in range(30, 36):
        first = np.repeat(rng.random(n // 2) < 0.5, 2)
        add(i, "split", x[:, i] * first, x[:, i] * ~first)
    for i in range(36, 42):
        add(i, "halves", np.maximum(x[:, i], 0), np.maximum(-x[:, i], 0))
    parts.extend(codes(n, 18, rng).T)  # of no one; 42 to 59 of the first are absent here
    order = rng.permutation(len(parts))
    place = np.argsort(order)
    truth = {
        kind: {i: tuple(sorted(place[at].tolist())) for i, at in found.items()} for kind, found in relations.items()
    }
    return x, np.stack(parts, 1)[:, order], truth


@pytest.mark.parametrize("seed", range(5))
def test_planted_relations_are_found_and_none_invented(seed: int) -> None:
    x, y, truth = plant(seed)
    found = sl.compare(Made(x), Made(y), seed=seed, null=NullConfig(n_null=64, n_shifts=10), progress=False)
    for kind, expected in truth.items():
        got = {one.feature: tuple(sorted(one.partners)) for one in found.relations[0] if one.kind == kind}
        assert got == expected, kind
    universal = set(np.flatnonzero(found.a.universal).tolist())
    assert not universal & set(range(42, 60))
    assert (
        found.signed
        and (
            found.signs(found.universal_pairs) == np.where(found.a.similarity[found.universal_pairs[:, 0]] < 0, -1, 1)
        ).all()
    )
    back = {one.feature: one for one in found.relations[1]}
    for expected in truth["split"].values():
        assert all(back[j].kind == "part" for j in expected if (found.mutual[:, 1] != j).all())
    assert found.a.p.min() > 0 and found.a.chance[1] < 0.5 < found.a.share("variance") < 1


def test_by_chance_the_rate_of_false_discoveries_is_the_stated_one() -> None:
    shares = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found = sl.compare(
            Made(codes(2000, 50, rng)),
            Made(codes(2000, 50, rng)),
            null=NullConfig(min_effect=0.0, n_null=50, n_shifts=20),
            seed=seed,
            progress=False,
        )
        shares += [found.a.universal.any(), found.b.universal.any()]
    assert np.mean(shares) <= 0.25  # at a rate of 0.05, of 8


@pytest.mark.parametrize("similarity", ["phi", "jaccard", "documents", "correlation"])
def test_every_similarity_finds_the_same_feature(similarity: str) -> None:
    x, y, truth = plant(7)
    found = sl.compare(Made(x), Made(y), similarity=similarity, min_count=3, null=NullConfig(n_null=50), progress=False)  # type: ignore[arg-type]
    assert [found.a.partners[i] for i in truth["same"]] == [j for (j,) in truth["same"].values()]
    assert found.signed == (similarity in ("correlation", "documents"))
    assert str(found) and found.to_dict()["similarity"] == similarity


def test_jaccard_and_phi_are_those_of_firing() -> None:
    rng = np.random.default_rng(8)
    x, y = codes(500, 20, rng, rate=0.2), codes(500, 25, rng, rate=0.2)
    fx, fy = x != 0, y != 0
    both = fx.astype(float).T @ fy
    jaccard = both / np.maximum(fx.sum(0)[:, None] + fy.sum(0) - both, 1)
    found = sl.compare(Made(x), Made(y), similarity="jaccard", min_count=1, null=NullConfig(n_shifts=0), progress=False)
    assert np.allclose(found.a.similarity, jaccard.max(1), atol=1e-5) and found.exact
    phi = sl.compare(Made(x), Made(y), similarity="phi", min_count=1, null=NullConfig(n_shifts=0), progress=False)
    assert np.allclose(phi.b.similarity, naive(fx.astype(float), fy.astype(float)).max(0), atol=1e-5)
    assert np.isnan(phi.a.chance[0]) and not phi.a.universal.any()


def test_sides_are_features_of_their_own() -> None:
    x, y, truth = plant(9)
    found = sl.compare(Made(x), Made(y), sides=True, null=NullConfig(n_null=50), progress=False)
    assert not found.signed and len(found.a.fires) == 2 * x.shape[1]
    i, (j,) = next(iter(truth["flipped"].items()))
    assert found.a.partners[2 * i] == 2 * j + 1 and found.a.partners[2 * i + 1] == 2 * j
    i, halves = next(iter(truth["halves"].items()))
    assert {found.a.partners[2 * i] // 2, found.a.partners[2 * i + 1] // 2} == set(halves)


def test_features_that_fire_together_once_are_no_match() -> None:
    rng = np.random.default_rng(10)
    x, y = codes(1000, 10, rng), codes(1000, 10, rng)
    x[:, 0] = y[:, 0] = 0
    x[500, 0] = y[500, 0] = 3.0  # r of 1, on one token
    rare = np.zeros(1000)
    rare[:12] = 1
    x[:, 1], y[:, 1] = rare, np.roll(rare, 4)  # each fires often enough, together only 8 times
    found = sl.compare(Made(x), Made(y), null=NullConfig(n_null=10, n_shifts=2), progress=False)
    assert found.a.partners[0] == -1 and found.a.partners[1] != 1 and np.isnan(found.a.similarity[0])
    assert found.a.p[0] == found.a.q[0] == 1
    few = sl.compare(Made(x), Made(y), min_count=1, null=NullConfig(n_null=10, n_shifts=2), progress=False)
    assert few.a.partners[0] == 0 and few.a.similarity[0] == pytest.approx(1, abs=1e-4)


def test_directions_of_two_saes() -> None:
    a, b = (sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=4)), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        b.W_dec[:10] = a.W_dec[20:30]
        b.W_dec[10:15] = -a.W_dec[30:35]
    found = sl.compare(a, b, progress=False)
    assert found.a.partners[20:35].tolist() == list(range(15)) and found.signed
    assert (found.a.similarity[20:30] > 0.99).all() and (found.a.similarity[30:35] < -0.99).all()
    assert found.a.universal[20:35].all() and found.a.universal.sum() <= 17 and found.n_tokens is None
    assert len(found.pairs) == 48 and set(map(tuple, found.pairs.tolist())) >= {(20 + i, i) for i in range(15)}
    other = sl.SAE(sl.SAEConfig(d_in=16, d_sae=48))
    with pytest.raises(ValueError, match="of one space"):
        sl.compare(a, other, progress=False)
    with pytest.raises(ValueError, match="`n_null` at least 1 and `fdr` in"):
        NullConfig(fdr=1.0)
    with pytest.raises(ValueError, match="`m` and `min_count`"):
        sl.compare(a, b, m=0)
    with pytest.raises(ValueError, match="one of each"):
        sl.compare(a, Made(codes(100, 5, np.random.default_rng(0))))
    with pytest.raises(ValueError, match="must be one of"):
        sl.compare(a, b, similarity="phi")


def test_one_seed_gives_one_answer_and_global_state_is_left_alone() -> None:
    x, y, _ = plant(11)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    found = [sl.compare(Made(x), Made(y), null=NullConfig(n_null=30), progress=False).to_dict() for _ in range(2)]
    assert str(found[0]) == str(found[1])
    assert (np.random.get_state()[1] == state[0]).all() and (torch.get_rng_state() == state[1]).all()  # noqa: NPY002


def test_mutual_pairs() -> None:
    assert find_mutual(np.array([-1, -1]), np.array([0])).shape == (0, 2)


def test_rows_of_pairs_are_turned_where_they_are_flipped() -> None:
    a, b = (sl.SAE(sl.SAEConfig(d_in=16, d_sae=24, activation=sl.AbsTopK(k=4)), seed=seed) for seed in (0, 1))
    with torch.no_grad():
        b.W_dec[:8], b.W_dec[8:16] = a.W_dec[:8], -a.W_dec[8:16]
    found = sl.compare(a, b, null=NullConfig(min_effect=0.95), progress=False)
    x, y = sl.universality.matched_decoder_rows(found, a, b)
    assert len(x) == 16 and np.allclose(x, y, atol=1e-6)
    assert len(sl.universality.matched_decoder_rows(found, a, b, "best", universal=False)[0]) == 24
    assert (
        sl.universality.compare_spaces(x, y, n_shuffles=9, measures=["linear_cka"], progress=False)["linear_cka"].value
        > 0.99
    )
    with pytest.raises(ValueError, match="that were compared"):
        sl.universality.matched_decoder_rows(found, a, sl.SAE(sl.SAEConfig(d_in=16, d_sae=40)))


def test_bases_are_matched_as_features_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 12, generator=generator) * torch.linspace(1, 3, 12)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    a, b = sl.Activations.from_tensor(x), sl.Activations.from_tensor(x @ turn + 5)
    options = {"null": NullConfig(n_shifts=4), "progress": False}
    neurons, pca = (sl.universality.compare_neurons_or_pcs(a, b, basis, **options) for basis in ("neurons", "pca"))  # type: ignore[arg-type]
    assert np.abs(pca.values).min() > 0.98 > np.abs(neurons.values).mean() and pca.a.share() == 1
    same = sl.universality.compare_neurons_or_pcs(a, sl.Activations.from_tensor(-x[:, [*range(1, 12), 0]]), **options)  # type: ignore[arg-type]
    assert same.a.partners.tolist() == [11, *range(11)] and (same.a.similarity < -0.999).all()
    with pytest.raises(ValueError, match="of the same tokens"):
        sl.universality.compare_neurons_or_pcs(a, sl.Activations.from_tensor(x[:10]))


def test_many_are_compared_two_by_two() -> None:
    x, y, _ = plant(12, n=2000)
    third = codes(2000, 20, np.random.default_rng(13))
    third[:, :5] = x[:, :5]
    stores = {"x": Made(x), "y": Made(y), "z": Made(third)}
    found = sl.universality.compare_many(stores, progress=False)
    assert list(found.found) == [("x", "y"), ("x", "z"), ("y", "z")]
    assert found.recurrence("x")[:5].tolist() == [2] * 5 and set(found.recurrence("x")[42:].tolist()) == {0}
    assert found.share("z", "x") == found.found["x", "z"].b.share() == 5 / 20 and found.share("x", "x") == 1
    assert "in all of the others: x 5, y 5, z 5" in str(found) and len(found.to_dict()["comparisons"]) == 3
    with pytest.raises(ValueError, match="two or more"):
        sl.universality.compare_many([stores["x"]])


@pytest.mark.parametrize("similarity", ["correlation", "phi", "jaccard"])
@pytest.mark.parametrize("docs", ["one", "templates", "pairs"])
def test_the_null_falls_where_the_text_is_periodic(docs: str, similarity: str) -> None:
    """Codes that are a matter of the place in a template: turned round as a whole they would be what they were."""
    n, period = 4000, {"one": 2, "templates": 10, "pairs": 2}[docs]
    places = np.arange(n) % period
    z = np.stack([(places == k) * (1.0 + k) for k in range(period)], 1)
    store = Made(z)
    numbers = {"one": np.zeros(n, int), "templates": np.arange(n) // period, "pairs": np.arange(n) // 2}[docs]
    store.text.doc_ids[:] = numbers
    found = sl.compare(store, store, similarity=similarity, null=NullConfig(n_null=period, n_shifts=40), progress=False)
    assert found.a.chance[1] < 0.7 and (np.abs(found.a.similarity) > 0.99).all()
    assert found.a.universal.all() and found.a.p.max() < 0.05


def test_untrained_dictionaries_are_a_floor() -> None:
    """Half of the features are those of tokens, which an untrained dictionary has too, less exactly."""
    rng = np.random.default_rng(0)
    n, d = 4000, 20
    tokens = np.arange(n) % 26
    token_codes = np.stack([tokens == j for j in range(d)], 1) * rng.gamma(4.0, 1.0, (n, d))
    own = (rng.random((n, d)) < 0.05) * rng.gamma(2.0, 1.0, (n, d))
    noisy = token_codes + (rng.random((n, d)) < 0.003) * rng.gamma(4.0, 1.0, (n, d))
    a = np.concatenate([token_codes + 1.5 * (token_codes > 0) * rng.normal(size=(n, d)), own], 1)
    b = np.concatenate([token_codes, own + 0.01 * (own > 0)], 1)
    empty = np.concatenate([noisy, (rng.random((n, d)) < 0.05) * 1.0], 1)
    plain = sl.compare(Made(a), Made(b), progress=False)
    assert plain.a.untrained is None and plain.a.universal.all() and "no untrained dictionary" in str(plain)
    floors = (Made(empty), Made(empty[:, rng.permutation(2 * d)]))
    found = sl.compare(Made(a), Made(b), untrained=floors, progress=False)
    assert found.a.untrained is not None
    assert found.a.untrained.trained["count"] == 1.0 and found.a.untrained.shares["count"] == pytest.approx(0.5)
    assert found.a.universal[d:].all() and found.a.universal[:d].sum() <= 0.1 * d
    assert f"{0.5:.1%}" in str(found) and found.to_dict()["a"]["untrained"]["level"] == found.a.untrained.level
    one = sl.compare(Made(a), Made(b), untrained=floors[1], progress=False)
    assert one.b.untrained is not None and one.a.untrained is not None
    many = sl.universality.compare_many([Made(a), Made(b)], untrained=list(floors), progress=False)
    assert many.floor("0", "1") == found.a.untrained.shares["count"] and "untrained" in str(many)
    with pytest.raises(ValueError, match="must be stores where stores are compared"):
        sl.compare(Made(a), Made(b), untrained=sl.SAE(sl.SAEConfig(d_in=4, d_sae=64)), progress=False)


def test_baselines_take_the_place_of_the_other_side() -> None:
    cfg = sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=4))
    a, b, other = (sl.SAE(cfg, seed=seed) for seed in (0, 0, 1))
    plain, found = (sl.compare(a, b, progress=False, **more) for more in ({}, {"baselines": {"other": other}}))
    alone = sl.compare(a, other, progress=False)
    assert plain.baselines == {} and {**found.to_dict(), "baselines": {}} == plain.to_dict()
    assert found.baselines["other"].to_dict() == alone.a.to_dict() == found.to_dict()["baselines"]["other"]
    assert found.a.median > 0.99 > 0.7 > found.baselines["other"].median
    assert "a's partners in" in str(found) and "a's partners in" not in str(plain)
    with pytest.raises(ValueError, match="Directions must be of one space"):
        sl.compare(a, b, progress=False, baselines={"other": sl.SAE(sl.SAEConfig(d_in=8, d_sae=48))})
