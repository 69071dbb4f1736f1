"""Stability over seeds: planted dictionaries whose agreement is known, and the figures beside naive ones."""

import json
import math

import numpy as np
import pytest
import torch
from dictionaries import sae_of
from folders import write_folder
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

import saelab as sl
from saelab.universality import assignment, seed_comparison
from saelab.universality.seed_comparison import (
    _draw_matched,
    _largest_cosines,
    match_rows,
    measure_directions,
    measure_usage,
    seed_stability,
)

D_IN, D_SAE = 16, 48


def directions(seed: int = 0, d_sae: int = D_SAE, d_in: int = D_IN) -> Tensor:
    return normalize(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)), dim=1)


def permuted(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def flipped(rows: Tensor, seed: int) -> Tensor:
    signs = torch.randint(2, (len(rows), 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return rows * signs


def data(n: int = 3000, seed: int = 0) -> Tensor:
    """Few of the planted directions at a time, the first far more often than the last."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.logspace(-0.5, -2.5, D_SAE)
    z = torch.rand(n, D_SAE, generator=generator) * (torch.rand(n, D_SAE, generator=generator) < rates)
    return z @ directions()


# --- planted agreement


def test_permutations_are_the_same_dictionary():
    found = seed_stability([sae_of(permuted(directions(), seed)) for seed in range(3)])
    for numbers in (found.trained.matched, found.trained.nearest, found.trained.overlap, found.trained.found):
        np.testing.assert_allclose(numbers, 1, atol=1e-5)
    assert len(found.trained.matched) == 3 and found.trained.features.shape == (3, D_SAE)
    assert found.random.matched.max() < 0.75 and found.matched_random.matched.max() < 0.75


def test_flipped_directions_are_the_same_only_where_codes_are_signed():
    rows = directions()
    flips = [sae_of(flipped(permuted(rows, seed), seed), sl.AbsTopK(k=4)) for seed in range(2)]
    found = seed_stability(flips)
    assert found.signed and found.trained.matched[0] == pytest.approx(1, abs=1e-5)
    unsigned = seed_stability([sae_of(sae.W_dec.detach()) for sae in flips])
    assert not unsigned.signed and unsigned.trained.matched[0] < 0.9 and unsigned.trained.found.max() < 0.9
    mixed = seed_stability([sae_of(rows), flips[0]])
    assert mixed.signed and mixed.trained.matched[0] == pytest.approx(1, abs=1e-5)


def test_random_dictionaries_are_at_chance():
    found = seed_stability([sae_of(directions(seed)) for seed in range(4)], seed=9)
    for name in ("matched", "nearest", "overlap"):
        trained, random, alike = (
            getattr(one, name).mean() for one in (found.trained, found.random, found.matched_random)
        )
        slack = 0.1 if name == "overlap" else 0.03
        assert trained == pytest.approx(random, abs=slack) and trained == pytest.approx(alike, abs=slack)
    assert found.trained.overlap.mean() == pytest.approx(found.rank / D_IN, abs=0.15)


def test_chance_knows_how_the_rows_are_spread():
    """In few dimensions unrelated rows are near each other: only the second chance level says so."""
    output_scale = torch.logspace(0, -2, D_IN)
    rows = normalize(directions() * output_scale, dim=1)
    alike = _draw_matched(rows, torch.Generator().manual_seed(0))

    def moments(x):
        return x.T @ x / len(x)

    found = seed_stability([sae_of(normalize(directions(seed) * output_scale, dim=1)) for seed in range(2)])
    assert found.random.matched[0] < found.trained.matched[0] - 0.1
    assert found.matched_random.matched[0] == pytest.approx(found.trained.matched[0], abs=0.03)
    np.testing.assert_allclose(moments(alike), moments(rows), atol=0.06)
    assert found.figures[0].effective_rank < 0.7 * found.random_figures.effective_rank


def test_the_shared_half_is_found():
    rows = directions()
    half = D_SAE // 2
    others = [torch.cat([rows[:half], directions(seed)[half:]]) for seed in (1, 2)]
    found = seed_stability([sae_of(rows), *(sae_of(permuted(other, 3)) for other in others)], threshold=0.97)
    np.testing.assert_allclose(found.trained.found, 0.5)
    np.testing.assert_allclose(found.trained.features[0, :half], 1, atol=1e-5)
    assert found.trained.features[0, half:].max() < 0.97
    # a feature that only one of the others has is not found by all
    apart = seed_stability(
        [sae_of(rows), *(sae_of(other) for other in (others[0], torch.cat([others[1][half:], rows[half:]])))],
        threshold=0.97,
    )
    assert apart.trained.found[0] == 0 and apart.trained.features[0].mean() > 0.7
    everything = seed_stability([sae_of(rows), *(sae_of(other) for other in others)], threshold=0.05)
    assert everything.trained.found.min() > 0.9


def test_rows_count_by_direction_and_in_the_activations_own_units():
    rows = directions()
    lengths = torch.linspace(0.1, 5, D_SAE)[:, None]
    assert seed_stability([sae_of(rows), sae_of(rows * lengths, dictionary="free")]).trained.matched[0] > 0.9999
    # one direction, seen through two ways of whitening
    whitened = []
    for seed in (0, 1):
        sae = sae_of(rows, normalizer="whiten")
        sae.normalizer.fit(data(seed=seed) @ torch.diag(torch.linspace(0.5 + seed, 3, D_IN)))
        with torch.no_grad():
            sae.W_dec.copy_(rows @ sae.normalizer.matrix)
        whitened.append(sae)
    assert seed_stability(whitened).trained.matched[0] == pytest.approx(1, abs=1e-3)


def test_subspaces_are_those_of_most_energy():
    """Both dictionaries hold the same loud directions, in other mixtures, and quiet ones that differ."""
    axes = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5)))[0]
    loud = [normalize(directions(seed, 20, 4) @ axes[:4], dim=1) for seed in (0, 1)]
    quiet = [directions(seed, 28) for seed in (2, 3)]
    saes = [sae_of(torch.cat(pair)) for pair in zip(loud, quiet, strict=True)]
    x = 5 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(6)) @ axes[:4]
    x = x + 0.05 * torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(7))
    known = seed_stability(saes, x, rank=4)
    assert known.trained.overlap[0] > 0.95 > 2 * known.random.overlap[0]
    assert known.trained.matched[0] < 0.95


# --- matching


@pytest.mark.parametrize("signed", [False, True])
def test_matching_is_the_best_of_all_assignments(signed):
    a, b = directions(0).numpy(), directions(1).numpy()
    sizes = np.abs(a @ b.T) if signed else a @ b.T
    rows, partners = linear_sum_assignment(-sizes)
    of_a, of_b, near = match_rows(a, b, signed)
    np.testing.assert_allclose(of_a, sizes[rows, partners], atol=1e-6)
    np.testing.assert_allclose(of_b[partners], of_a, atol=1e-6)
    assert near == pytest.approx((sizes.max(1).mean() + sizes.max(0).mean()) / 2, abs=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_wide_dictionaries_are_matched_among_candidates(signed, monkeypatch):
    rows = directions(d_sae=300).numpy()
    noisy = normalize(
        torch.from_numpy(rows) + 0.15 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
    )
    other = permuted(flipped(noisy, 2) if signed else noisy, 3).numpy()
    whole = match_rows(rows, other, signed)
    monkeypatch.setattr(seed_comparison, "EXACT", 100)
    sparse = match_rows(rows, other, signed)
    np.testing.assert_allclose(sparse[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(sparse[1], whole[1], atol=1e-5)
    assert sparse[2] == pytest.approx(whole[2], abs=1e-6)
    assert not seed_stability([sae_of(torch.from_numpy(rows)), sae_of(torch.from_numpy(other))]).exact


# --- the figures of one dictionary


def test_figures_are_those_of_their_formulas(monkeypatch):
    rows, x = directions(3), data(200)
    monkeypatch.setattr("saelab.universality.seed_comparison.BLOCK_CELLS", 7 * D_SAE)
    found = measure_directions(3 * rows, x)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    values = torch.linalg.svdvals(rows.double())
    shares = values / values.sum()
    assert found.coherence == pytest.approx(float(cosines.max()), abs=1e-6)
    assert found.crowding == pytest.approx(float(cosines.amax(1).mean()), abs=1e-6)
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
    assert found.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
    near = rows @ normalize(x, dim=1).T
    assert found.ood == pytest.approx(1 - float(near.amax(1).mean()), abs=1e-6)
    assert measure_directions(rows, x, signed=True).ood == pytest.approx(1 - float(near.abs().amax(1).mean()), abs=1e-6)
    assert math.isnan(measure_directions(rows).ood)


def test_known_figures():
    unit = measure_directions(torch.eye(8), torch.eye(8))
    assert (unit.stable_rank, unit.effective_rank, unit.coherence, unit.crowding, unit.ood) == (8, 8, 0, 0, 0)
    line = measure_directions(torch.ones(5, 8), -torch.ones(1, 8))
    assert line.stable_rank == pytest.approx(1) and line.effective_rank == pytest.approx(1, abs=1e-3)
    assert line.coherence == pytest.approx(1) and line.ood == pytest.approx(2)
    assert measure_directions(torch.ones(5, 8), -torch.ones(1, 8), signed=True).ood == pytest.approx(0, abs=1e-6)
    assert float(_largest_cosines(torch.ones(1, 3), torch.ones(1, 3), signed=True, itself=False)) == 0


def test_usage_is_what_the_codes_say():
    lengths = torch.linspace(0.5, 1.5, D_SAE)[:, None]
    sae, x = sae_of(directions() * lengths, sl.AbsTopK(k=4), dictionary="free"), data(500)
    found = measure_usage(sae, sl.Activations.from_tensor(x))
    z = sae.encode(x).detach()
    np.testing.assert_allclose(found.density, (z != 0).double().mean(0).numpy())
    np.testing.assert_allclose(found.energy, (z * lengths.T).square().mean(0).numpy(), rtol=1e-4)
    error = (x - sae(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(error), rel=1e-4) and found.n_tokens == 500
    assert found.dead_frac == pytest.approx(float((z == 0).all(0).double().mean()))


# --- what is unstable


def test_the_rare_are_seen_to_be_unstable():
    rows = directions()
    saes = []
    for seed in range(3):  # the later, and rarer, the more each dictionary has its own mind
        noise = torch.linspace(0, 1.5, D_SAE)[:, None] * directions(seed + 10)
        saes.append(sae_of(permuted(normalize(rows + noise, dim=1), seed)))
    found = seed_stability(saes, data())
    assert found.trends["density"] > 0.4 and found.trends["energy"] > 0.4
    assert len(found.quarters) == 4 and found.quarters[0] < found.quarters[-1] - 0.1
    density = np.stack([measure_usage(sae, sl.Activations.from_tensor(data())).density for sae in saes])
    live = density > 0
    naive = spearmanr(found.trained.features[live], density[live]).statistic
    assert found.trends["density"] == pytest.approx(naive)
    assert seed_stability([sae_of(directions(s)) for s in (0, 1)]).trends == {}


def test_stores_tell_use_as_activations_do(tmp_path):
    acts = sl.Activations.load(write_folder(tmp_path / "acts", data(400), shard_tokens=150))
    saes = [sae_of(directions(seed), sl.AbsTopK(k=4)) for seed in range(2)]
    stores = []
    for i, sae in enumerate(saes):
        sae.provenance = acts.provenance
        stores.append(sl.harvest(sae, None, acts, tmp_path / str(i), dtype="float32", progress=False))
    by_acts, by_stores = seed_stability(saes, acts), seed_stability(saes, stores=stores)
    assert by_acts.usage[0].n_tokens == by_stores.usage[0].n_tokens == len(acts)
    np.testing.assert_allclose(by_acts.usage[0].energy, by_stores.usage[0].energy, rtol=1e-2, atol=1e-6)
    assert by_acts.trends["energy"] == pytest.approx(by_stores.trends["energy"], abs=0.02)
    assert math.isnan(by_stores.usage[0].fvu) and by_acts.usage[0].fvu > 0
    assert math.isnan(by_stores.figures[0].ood) and by_acts.figures[0].ood < by_acts.random_figures.ood


# --- the result


def test_prints_saves_and_repeats(tmp_path):
    saes, x = [sae_of(directions(seed)) for seed in range(2)], data(300)
    state = torch.get_rng_state()
    found = seed_stability(saes, x, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    text = str(found)
    for words in (
        "2 dictionaries of 48 directions",
        "matched one to one",
        "found by all (>= 0.7)",
        "random",
        "quarter",
    ):
        assert words in text
    assert max(map(len, text.split("\n"))) < 90
    found.save(tmp_path / "stability.json")
    saved = json.loads((tmp_path / "stability.json").read_text())
    assert saved["trained"]["matched"] == found.trained.matched.tolist() and len(saved["figures"]) == 2
    assert seed_stability(saes, x, seed=3).to_dict() == found.to_dict()
    assert not np.array_equal(seed_stability(saes, x, seed=4).random.matched, found.random.matched)
    assert "quarter" not in str(seed_stability(saes))


@pytest.mark.parametrize(
    ("saes", "more", "match"),
    [
        ([(D_SAE, D_IN)], {}, "two or more of one shape"),
        ([(D_SAE, D_IN), (D_SAE + 1, D_IN)], {}, r"got 2 of \[\(48, 16\), \(49, 16\)\]"),
        ([(D_SAE, D_IN), (D_SAE, D_IN + 1)], {}, "of one shape"),
        ([(D_SAE, D_IN)] * 2, {"acts": torch.zeros(9, D_IN + 1)}, r"must have the SAEs' d_in \(16\), got 17"),
        ([(D_SAE, D_IN)] * 2, {"rank": 17}, r"`rank` must be in 1\.\.d_in \(16\)"),
        ([(D_SAE, D_IN)] * 2, {"threshold": 1.5}, "`threshold` in"),
        ([(D_SAE, D_IN)] * 2, {"stores": []}, "must be one for each of 2 SAEs"),
        ([(D_SAE, D_IN)] * 2, {"stores": [], "acts": torch.zeros(9, D_IN)}, "must not both be given"),
    ],
)
def test_what_cannot_be_compared_is_named(saes, more, match):
    with pytest.raises(ValueError, match=match):
        seed_stability([sae_of(directions(0, *shape)) for shape in saes], **more)


def test_baselines_of_each_seed_are_compared_by_name():
    saes = [sae_of(directions(seed)) for seed in (0, 1, 2)]
    same = [{"same": sae_of(directions(5)), "other": sae_of(directions(10 + i))} for i in range(3)]
    plain, found = (sl.universality.seed_stability(saes, **more) for more in ({}, {"baselines": same}))
    assert plain.baselines == {} and {**found.to_dict(), "baselines": {}} == plain.to_dict()
    assert np.allclose(found.baselines["same"].matched, 1, atol=1e-5) and (found.baselines["other"].matched < 0.9).all()
    own = sl.universality.seed_stability([one["other"] for one in same]).trained
    np.testing.assert_array_equal(found.baselines["other"].matched, own.matched)
    assert "same" in str(found).splitlines()[1]
    with pytest.raises(ValueError, match="the same names for each of the 3 SAEs"):
        sl.universality.seed_stability(saes, baselines=[*same[:2], {"same": saes[0]}])
    with pytest.raises(ValueError, match="Names of `baselines` must differ"):
        sl.universality.seed_stability(saes, baselines=[{"random": sae} for sae in saes])


@pytest.mark.parametrize("kind", ["far", "near", "equal", "ties"])
def test_the_assignment_among_candidates_is_the_best_of_all(kind, monkeypatch):
    rng, d = np.random.default_rng(3), 300
    sizes = rng.random((d, d)).astype(np.float32)
    if kind == "near":  # every row likes the same columns most, so that few candidates are too few
        sizes = (np.linspace(0, 1, d) + 0.01 * sizes).astype(np.float32)
    elif kind == "equal":
        sizes[np.arange(d), rng.permutation(d)] = 1
    elif kind == "ties":
        sizes[:, 7:] = 0
    monkeypatch.setattr(assignment, "CANDIDATES", 2)
    rows, partners = linear_sum_assignment(sizes, maximize=True)
    found = assignment.pair_all(sizes)
    assert sorted(found.tolist()) == list(range(d))
    assert np.isclose(sizes[rows, found].sum(dtype=float), sizes[rows, partners].sum(dtype=float), rtol=0, atol=1e-9)
    assert kind == "ties" or np.array_equal(found, partners)
