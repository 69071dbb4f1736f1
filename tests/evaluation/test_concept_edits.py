"""SCR and TPP where concepts have directions of their own: ideal, random and shared dictionaries."""

import numpy as np
import pytest
import torch
from dictionaries import sae_of

import saelab as sl
from saelab.evaluation.concept_edits import score_scr, score_tpp
from saelab.lm.token_labels import TokenLabels

N, D = 3000, 48
RELU = sl.ReLU(target_l0=1.0)


@pytest.fixture(scope="module")
def world():
    """Two opposed attributes, of sizes 1 and 3 along coordinates 0 and 1, four concepts on 2 to 5, and noise."""
    rng = np.random.default_rng(0)
    a, b, word = rng.random(N) < 0.5, rng.random(N) < 0.5, rng.integers(2, 6, N)
    x = 0.05 * rng.standard_normal((N, D))
    x[:, 0] += np.where(a, 1, -1)
    x[:, 1] += np.where(b, 3, -3)
    x[np.arange(N), word] += 1
    truth = {"a": a, "b": b} | {f"word {i}": word == i for i in range(2, 6)}
    return torch.from_numpy(x).float(), TokenLabels.of(truth, doc_ids=np.arange(N) // 10)


WORDS = [f"word {i}" for i in range(2, 6)]


def test_a_separable_dictionary_is_edited_concept_by_concept(world):
    sae = sae_of(torch.eye(D), sl.AbsTopK(k=D))
    tpp = score_tpp(sae, *world, concepts=WORDS, ns=(1, 2))
    assert tpp.means[1] == pytest.approx(0.5, abs=0.01)
    assert [row.features[0] for row in tpp.rows] == [f"{i}+" for i in range(2, 6)]
    assert tpp.rows[0].before > 0.99 and tpp.rows[0].after[1] == pytest.approx(0.5, abs=0.01)
    scr = score_scr(sae, *world, [("a", "b")], ns=(1, 2))
    row = scr.rows[0]
    assert (row.concept, row.ablated, set(row.features[:2])) == ("a", "b", {"1+", "1-"})
    assert row.before < 0.8 and row.clean > 0.98
    assert row.scores[2] == pytest.approx(1, abs=0.05) and row.scores[1] < 0.9  # one side of two is half a removal
    for found in (tpp, scr):
        assert set(found.baselines) == {"random", "untrained", "neurons", "shuffled"}
        assert "unreliable" in str(found) and found.to_dict()["means"]["2"] == found.means[2]
    assert tpp.baselines["shuffled"].means[1] < 0.3


def test_a_random_dictionary_separates_nothing(world):
    rows = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    sae = sae_of(rows / rows.norm(dim=1, keepdim=True), RELU)
    found = score_tpp(sae, *world, concepts=WORDS, ns=(2,), baselines=False)
    assert abs(found.means[2]) < 0.05 and not found.baselines


def test_shared_features_take_other_concepts_with_them(world):
    """One feature for all words, and errors are kept: ablating it leaves what the SAE did not rebuild."""
    row = torch.zeros(1, D)
    row[0, 2:6] = 0.5
    found = score_tpp(sae_of(row, RELU), *world, concepts=WORDS, ns=(1,), baselines=False)
    for one in found.rows:
        assert one.scores[1] == pytest.approx(one.before - one.after[1] - one.others[1])
    assert abs(found.means[1]) < 0.2


def test_what_has_no_meaning_has_a_reason(world):
    acts, labels = world
    sae = sae_of(torch.eye(D), RELU)
    found = score_scr(sae, acts, labels, [("word 2", "word 3"), ("b", "word 4")], ns=(1,), baselines=False)
    assert "under 20 tokens" in found.rows[0].reason and np.isnan(found.rows[0].before)
    with pytest.raises(ValueError, match="Two concepts must have"):
        score_tpp(sae, acts, labels, concepts=["a"], baselines=False)
    always = TokenLabels.of({name: labels[name] for name in WORDS[:2]} | {"always": np.ones(N, bool)})
    found = score_tpp(sae, acts, always, labels.doc_ids, ns=(1,), baselines=False)
    assert [bool(row.reason) for row in found.rows] == [False, False, True]
    with pytest.raises(ValueError, match="'acts' has NaN or infinity in 1 of"):
        score_tpp(sae, acts.index_fill(0, torch.tensor([5]), torch.nan), labels, concepts=WORDS)
    with pytest.raises(ValueError, match="must be one of the labels"):
        score_scr(sae, acts, labels, [("a", "nothing")])
    for ns in ((), (0, 1)):
        with pytest.raises(ValueError, match="`ns` must be numbers of features of at least 1"):
            score_tpp(sae, acts, labels, concepts=WORDS, ns=ns)
        with pytest.raises(ValueError, match="`ns` must be numbers of features of at least 1"):
            score_scr(sae, acts, labels, [("word 2", "word 3")], ns=ns)


def test_a_concept_in_two_features_takes_two_ablations(world):
    rows = torch.eye(D)[2:6].repeat(2, 1)
    sae = sae_of(rows, RELU)
    with torch.no_grad():
        sae.W_enc.mul_(0.25)  # one carries a quarter, the other the rest
        sae.W_enc[:, 4:].mul_(3)
    found = score_tpp(sae, *world, concepts=WORDS, ns=(1, 2), baselines=False)
    for i, row in enumerate(found.rows):
        assert row.features[:2] == (f"{i + 4}+", f"{i}+")
        assert row.after[2] < row.after[1] - 0.1
