"""Modularity, explicitness and compactness of planted codes: one to one, mixed, repeated, and of nothing."""

import math

import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.sparse import csr_matrix
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.disentanglement import _bin, _inform, infomec
from saelab.lm.token_labels import TokenLabels

N, M = 6_000, 4
NAMES = [f"c{i}" for i in range(M)]
RNG = np.random.default_rng(0)
MARKS = RNG.random((N, M)) < 0.5
DOCUMENTS = np.arange(N) // 10
LABELS = TokenLabels.of(MARKS, NAMES, DOCUMENTS)
ONE_TO_ONE = MARKS * (1 + RNG.random((N, M)))
OTHERS = {
    "rotated": (2.0 * MARKS - 1) @ hadamard(M) / 2,  # each feature has as much of each concept
    "repeated": np.repeat(MARKS, 2, 1) * (1 + RNG.random((N, 2 * M))),  # and each concept has two features
    "noise": (RNG.random((N, 8)) < 0.3) * RNG.random((N, 8)),
    "signed": (2.0 * MARKS - 1) * (1 + RNG.random((N, M))),
}


@pytest.fixture(scope="module")
def found():
    return infomec(csr_matrix(ONE_TO_ONE), LABELS, baselines=OTHERS)


def test_one_to_one_codes_have_it_all_and_others_lack_what_they_should(found):
    few = 5 / math.sqrt(N)  # sampling error of an information that is shared evenly
    assert found.modularity == found.compactness == 1.0 and found.explicitness > 0.98
    rows = found.baselines
    assert rows["signed"].modularity == rows["signed"].compactness == 1.0
    assert rows["rotated"].modularity < few and rows["rotated"].compactness < few
    assert rows["rotated"].explicitness > 0.98  # a rotation takes nothing away from regressions
    assert rows["repeated"].modularity == 1.0
    assert rows["repeated"].compactness == pytest.approx((1 / 2 - 1 / 8) / (1 - 1 / 8), abs=few)
    for name in ("noise", "shuffled concepts"):
        # an entry is above those of four permutations with a chance of 1/5, five of them with 3e-4
        assert rows[name].n_informative <= 4 and abs(rows[name].explicitness) < 0.02, name
    assert found.n_informative == found.n_told == found.n_concepts == M and found.n_features == M


def test_information_is_that_of_scikit_learn():
    from sklearn.metrics import mutual_info_score

    z = np.round(OTHERS["rotated"] + 0.7 * RNG.normal(size=(N, M)), 1)  # with ties, and zeros
    bins = _bin(csr_matrix(z).tocsc())
    table = _inform(bins, csr_matrix(MARKS.astype(np.int32)))
    one_hot = bins.toarray().reshape(N, M, -1)
    for j in range(M):
        which = one_hot[:, j] @ np.arange(1, one_hot.shape[2] + 1)  # 0 is the bin of zeros
        assert ((which == 0) == (z[:, j] == 0)).all() and len(np.unique(which)) == 9
        for c in range(M):
            bias, entropy = (len(np.unique(which)) - 1) / (2 * N), mutual_info_score(MARKS[:, c], MARKS[:, c])
            wanted = max(mutual_info_score(MARKS[:, c], which) - bias, 0) / entropy
            assert table[j, c] == pytest.approx(wanted, abs=1e-12)


def test_it_prints_saves_and_is_drawn(found, tmp_path):
    assert sl.evaluation.InfoMEC is type(found) and sl.evaluation.infomec is infomec  # no module of its name
    text = str(found)
    assert "rotated" in text and "shuffled concepts" in text and "modularity" in found._repr_html_()
    found.save(tmp_path / "infomec.json")
    assert found.to_dict()["baselines"]["signed"]["n_informative"] == M
    again = infomec(ONE_TO_ONE, LABELS)
    assert np.array_equal(again.information, found.information) and again.explicitness == found.explicitness


@unchecked()
def test_what_cannot_be_measured_is_refused():
    for labels, more, why in (
        (TokenLabels.of(MARKS[:, :1], NAMES[:1], DOCUMENTS), {}, "at least 2 concepts"),
        (TokenLabels.of(MARKS & [1, 1, 1, 0], NAMES, DOCUMENTS), {}, r"not so: \['c3'\]"),
        (LABELS, {"baselines": {"short": MARKS[1:]}}, "`short` must have a row for each"),
    ):
        with pytest.raises(ValueError, match=why):
            infomec(ONE_TO_ONE, labels, **more)
    with pytest.raises(ValueError, match=r"a feature at least, got \(\d+, 0\)"):
        infomec(ONE_TO_ONE[:, :0], LABELS)
