"""Signs of codes and antipodal directions: counts by hand, planted pairs, and what is refused."""

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis.sign_balance import antipodal, sign_audit


def test_balance_is_the_share_of_the_rarer_sign(signed_store, signed_sae) -> None:
    z = signed_store.matrix().toarray()
    found = sign_audit(signed_store, signed_sae, min_firings=5, n_shown=3, n_windows=2)
    for j in range(z.shape[1]):
        counts = [(z[:, j] > 0).sum(), (z[:, j] < 0).sum()]
        if sum(counts) < 5:
            assert np.isnan(found.balance[j])
        else:
            assert found.balance[j] == min(counts) / sum(counts)
    known = found.balance[~np.isnan(found.balance)]
    assert found.n_features == len(known) and found.two_sided_frac == (known >= 0.1).mean() > 0
    assert [one.balance for one in found.windows] == sorted(known, reverse=True)[:3]
    for one in found.windows:
        assert 1 <= len(one.positive) <= 2 and 1 <= len(one.negative) <= 2
        assert one.positive[0].value == pytest.approx(z[:, one.feature].max(), rel=1e-3)
        assert one.negative[0].value == pytest.approx(z[:, one.feature].min(), rel=1e-3)
        assert f"feature {one.feature}, balance" in str(found)
    same = sign_audit(signed_store, untrained=signed_store, min_firings=5, n_shown=0)
    assert same.two_sided_untrained == found.two_sided_frac and np.isnan(same.antipodal_frac) and not same.windows


def test_planted_opposites_are_found(signed_store, signed_sae) -> None:
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    rows[30:] = -3 * rows[:10] + 0.1 * rows[10:20]
    assert antipodal(rows).nonzero()[0].tolist() == [*range(10), *range(30, 40)]
    audit = sign_audit(signed_store, signed_sae, min_firings=1, n_shown=0)
    cosines = torch.nn.functional.normalize(signed_sae.directions()[~np.isnan(audit.balance)])
    assert audit.antipodal_frac == ((cosines @ cosines.T).amin(1) < -0.7).float().mean()


def test_what_does_not_belong_together_is_refused(signed_store) -> None:
    with pytest.raises(ValueError, match="`min_firings`"):
        sign_audit(signed_store, min_firings=0)
    with pytest.raises(ValueError, match="harvested"):
        sign_audit(signed_store, sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=3)), seed=5))
