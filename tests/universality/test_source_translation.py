"""SAEs stitched into another model: planted turns that cost nothing, and figures beside naive ones."""

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.universality import StitchTable, stitch_sae
from saelab.universality.source_translation import _correlate, _find_partners


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n: int = 3000, d: int = 10) -> torch.Tensor:
    """Sparse sums of 16 directions."""
    g = torch.Generator().manual_seed(2)
    codes = (torch.rand(n, 16, generator=g) < 0.15) * (1 + torch.rand(n, 16, generator=g))
    return codes @ torch.nn.functional.normalize(draw(3, 16, d)) + 0.02 * torch.randn(n, d, generator=g)


def train(x: torch.Tensor, seed: int) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=x.shape[1], d_sae=32, activation=sl.TopK(k=3))
    run = sl.TrainConfig(n_tokens=30_000, batch_size=200, n_held_out=0, seed=seed)
    return sl.SAE(cfg, seed=seed).fit(x, run, progress=False)


@pytest.fixture(scope="module")
def spaces() -> tuple[torch.Tensor, torch.Tensor]:
    x = rows()
    return x, 2 * x @ torch.linalg.qr(draw(4, 10, 10)).Q + 1


@pytest.fixture(scope="module")
def table(spaces) -> StitchTable:
    x, y = spaces
    return stitch_sae(train(x, 0), x, y, train(y, 1), n_pairs=500, seeds=(0, 1))


def test_a_turned_space_is_served_as_the_own(table) -> None:
    own = table.mean("own", "fvu")
    assert table.mean("own", "r") == table.mean("own", "f1") == 1 and table.mean("own", "l0") == 3
    assert table.mean("orthogonal map", "fvu") == pytest.approx(own, rel=1e-3)
    # ties of the third code aside
    assert table.mean("orthogonal map", "r") > 0.99 and table.mean("orthogonal map", "f1") > 0.99
    assert table.mean("linear map", "r") > 0.95
    assert table.mean("other's own", "fvu") < 0.5 and 0.3 < table.mean("other's own", "r") < table.mean(
        "linear map", "r"
    )


def test_baselines_are_far_from_it(table) -> None:
    for name in ("random dictionary", "direct", "linear map, shuffled pairs"):
        assert table.mean(name, "r") < 0.6 * table.mean("orthogonal map", "r")
        assert table.mean(name, "fvu") > 2 * table.mean("orthogonal map", "fvu")
    assert table.columns == ("fvu", "l0", "r", "f1") and "SAE features of a on b; 500 pairs" in str(table)


def test_correlations_and_partners_are_naive_ones() -> None:
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    z, other = (rng.normal(size=(200, 6)) * (rng.random((200, 6)) < 0.3) for _ in range(2))
    other[:, 3] = -z[:, 1] + 0.1 * other[:, 3]
    z[:, 5] = 0
    table = np.corrcoef(np.hstack([z[:, :5], other]).T)[:5, 5:]
    assert np.allclose(_correlate(csr_matrix(z), csr_matrix(other))[:5], table.diagonal())
    assert _correlate(csr_matrix(z), csr_matrix(other))[5] == 0
    found = _find_partners(csr_matrix(z), csr_matrix(other))
    assert found[:5].tolist() == np.abs(table).argmax(1).tolist() and found[1] == 3


def test_other_activations_and_kinds_are_refused(spaces) -> None:
    x, y = spaces
    sae = sl.SAE(sl.SAEConfig(d_in=10, d_sae=16, activation=sl.TopK(k=2)), seed=0)
    with pytest.raises(ValueError, match="inference threshold"):
        stitch_sae(sl.SAE(sl.SAEConfig(d_in=10, d_sae=16, activation=sl.BatchTopK(k=2)), seed=0), x, y)
    with pytest.raises(ValueError, match="must be pairs"):
        stitch_sae(sae, x, y[1:])
    with pytest.raises(ValueError, match="a transcoder or a crosscoder"):
        stitch_sae(sl.SAE(sl.SAEConfig(d_in=10, d_sae=16, d_out=10, activation=sl.TopK(k=2)), seed=0), x, y, n_pairs=50)
    table = stitch_sae(sae, x, y[:, :7], n_pairs=50, methods=("linear",), seeds=(0,))
    assert np.isnan(table.mean("direct", "fvu")) and table.reasons["direct"] == "widths 10 and 7 differ"
    assert "other's own" not in table.figures
    origin = sl.stores.Provenance(model="one", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="",
        mask={}, tokens_sha256="", dtype="float32", ctx_len=8, n_tokens=0, seed=None, versions={})  # fmt: skip
    sae.provenance = origin
    acts = [sl.Activations.from_tensor(one, origin.at("blocks.1.hook_resid_post")) for one in (x, y)]
    with pytest.raises(ValueError, match="got another hook point"):
        stitch_sae(sae, *acts, n_pairs=50)
    assert stitch_sae(sae, *acts, n_pairs=50, methods=("linear",), seeds=(0,), allow_mismatch=True).n_test > 0


def test_a_flipped_feature_is_a_partner() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    sae = sl.SAE(sl.SAEConfig(d_in=x.shape[1], d_sae=16, activation=sl.AbsTopK(k=3)), seed=0)
    flipped = sl.SAE(sae.cfg, seed=0)
    with torch.no_grad():
        for weight in (flipped.W_enc, flipped.W_dec, flipped.b_enc):
            weight.neg_()
    table = stitch_sae(sae, x, x, flipped, n_pairs=20, seeds=(0,), methods=())
    assert table.mean("other's own", "r") == pytest.approx(1) == table.mean("other's own", "f1")
