"""A planted world has the rates, trees, overlaps and codes that it says it has."""

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.synthetic.planted import LARGEST_RATE, PlantedConfig, PlantedWorld

N = 40_000
SMALL = {"n_features": 200, "d_in": 48, "l0": 8.0, "n_roots": 3, "branching": 3, "depth": 2}


def world_of(seed=0, **knobs):
    return PlantedWorld(PlantedConfig(**(SMALL | knobs)), seed=seed)


def firing(codes):
    return codes.to_dense() != 0


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("zipf", [0.0, 0.5, 1.0])
def test_features_fire_at_their_rates(zipf, correlation):
    world = world_of(zipf=zipf, correlation=correlation)
    _, codes = world.sample(N, seed=1)
    assert abs(world.rates.sum() - 8.0) < 1e-6
    counts = np.bincount(codes.indices.numpy(), minlength=200)
    # tokens are independent, so counts are binomial whatever the features have in common
    z = (counts - N * world.rates) / np.sqrt(N * world.rates * (1 - world.rates))
    assert np.abs(z).max() < 5 and 0.8 < z.std() < 1.2
    free = np.flatnonzero(world.parents < 0)
    assert (np.diff(world.rates[free]) <= 1e-12).all()


def test_trees_are_what_the_configuration_says():
    world = world_of()
    nested = np.flatnonzero(world.parents >= 0)
    assert len(nested) == 3 * (3 + 9) and world.cfg.n_nested == len(nested) + 3
    assert set(np.bincount(world.parents[nested])) == {0, 3}
    assert (world.rates[nested] < world.rates[world.parents[nested]]).all()
    _, codes = world.sample(N, seed=2)
    fires = firing(codes)
    for child in nested:
        assert not (fires[:, child] & ~fires[:, world.parents[child]]).any()
    for children in world.children:
        assert fires[:, children].sum(1).max() == 1 and len(set(world.parents[children])) == 1
        assert world.rates[children].sum() <= LARGEST_RATE * world.rates[world.parents[children[0]]] + 1e-12


def test_common_factors_make_features_fire_together():
    def spread(correlation):
        world = world_of(n_roots=0, correlation=correlation, zipf=0.0, n_factors=2)
        return float(np.corrcoef(firing(world.sample(N, seed=3)[1]).float().T).__abs__().mean())

    # |r| of independent ones averages sqrt(2 / (pi N)); the diagonal adds 1 / 200
    assert abs(spread(0.0) - 0.005 - (2 / np.pi / N) ** 0.5) < 0.001
    assert spread(0.8) > 3 * spread(0.0)


def test_activations_are_the_sums_that_the_codes_say():
    world = world_of(bias=2.0, signed_frac=0.5, spread=0.3, magnitude=2.0)
    x, codes = world.sample(500, seed=4)
    torch.testing.assert_close(x, codes.to_dense() @ world.directions + world.bias)
    torch.testing.assert_close(world.bias.norm(), torch.tensor(2.0))
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(200))
    _, codes = world.sample(N, seed=4)
    negative = torch.bincount(codes.indices, (codes.values < 0).double(), minlength=200).numpy()
    counts = np.bincount(codes.indices.numpy(), minlength=200)
    assert (negative[~world.two_sided.numpy()] == 0).all() and 60 < int(world.two_sided.sum()) < 140
    two = world.two_sided.numpy()
    assert np.abs((negative - counts / 2)[two] / np.sqrt(counts[two] / 4)).max() < 5
    size = codes.values.abs()
    assert size.min() >= 0.2 - 1e-6 and abs(float(size.mean()) - 2) < 0.01 and abs(float(size.std()) - 0.3) < 0.01
    noisy = world_of(bias=2.0, signed_frac=0.5, spread=0.3, magnitude=2.0, noise=0.1).sample(500, seed=4)[0]
    assert abs(float((noisy - x).std()) - 0.1) < 0.005


def test_directions_are_pushed_apart_as_far_as_asked():
    def largest(world):
        return float((world.directions @ world.directions.T - torch.eye(200)).abs().max())

    assert largest(world_of()) > 0.45 and largest(world_of(overlap=0.35)) <= 0.35
    with pytest.raises(ValueError, match=r"`overlap` must be above 0\.126, the least for 200 directions in 48"):
        world_of(overlap=0.1)
    with pytest.raises(ValueError, match=r"0\.13 was not reached"):
        world_of(overlap=0.13)


def test_the_same_seed_gives_the_same_and_batches_go_on_where_they_were():
    world, again, other = world_of(), world_of(), world_of(seed=1)
    before = torch.get_rng_state()
    assert torch.equal(world.sample(100, seed=5)[0], again.sample(100, seed=5)[0])
    assert not torch.equal(world.sample(100, seed=5)[0], world.sample(100, seed=6)[0])
    assert not torch.equal(world.directions, other.directions)
    batches, later = world.batches(64, seed=2), again.batches(64, seed=2)
    parts = [next(batches) for _ in range(3)]
    state = batches.state_dict()
    later.load_state_dict(state)
    assert torch.equal(next(batches), next(later)) and not torch.equal(parts[0], parts[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_world_and_an_sae_of_one_seed_have_nothing_in_common():
    """Drawn from one stream they would be the same directions, and an untrained SAE would be perfect."""
    world = PlantedWorld(PlantedConfig(n_features=64, d_in=16, l0=3.0, n_roots=0), seed=0)
    sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=64), seed=0)
    assert float((sae.W_dec.detach() * world.directions).sum(1).abs().max()) < 0.95


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"n_features": 0}, "`n_features` must be a whole number of at least 1"),
        ({"d_in": 16.5}, "`d_in` must be a whole number"),
        ({"n_factors": -1}, "`n_factors` must be a whole number of at least 0"),
        ({"l0": 190.0}, "`l0` must be above 0 and at most"),
        ({"l0": 175.0}, "for these trees, whose siblings exclude each other"),
        ({"noise": -1.0}, "`noise` must be at least 0"),
        ({"signed_frac": 1.5}, r"`signed_frac` must be in \[0, 1\]"),
        ({"n_roots": 40}, "must have at most n_features"),
        ({"branching": 0}, "`branching` and `depth` must be whole numbers of at least 1"),
    ],
)
def test_impossible_worlds_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message), unchecked():
        world_of(**knobs)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="`n_tokens` must be at least 1, got 0"):
        world_of().sample(0)
