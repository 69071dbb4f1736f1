"""Absorption and splitting where they are planted: a parent, 40 children, and half of them absorbed."""

import numpy as np
import pytest
import torch
from dictionaries import sae_of

import saelab as sl
from saelab.evaluation.absorption import measure_absorption, score_absorption
from saelab.evaluation.coded_tokens import CodedTokens
from saelab.lm.token_labels import Concept, TokenLabels

N_CHILDREN, N_OTHER, PER_WORD = 40, 8, 60
D = 1 + N_CHILDREN + N_OTHER
ABSORBED = range(1, 1 + N_CHILDREN // 2)


@pytest.fixture(scope="module")
def world():
    """Activations and labels of shuffled words, each a child of the parent (coordinate 0) or another word."""
    words = np.repeat(np.arange(1, D), PER_WORD)
    np.random.default_rng(0).shuffle(words)
    truth = words[:, None] == np.arange(D)
    truth[:, 0] = words <= N_CHILDREN
    table = [
        Concept("parent"),
        *(Concept(f"word {i}", parent="parent" if i <= N_CHILDREN else None) for i in range(1, D)),
    ]
    return torch.from_numpy(truth).float(), TokenLabels.of(truth, table, np.arange(len(words)) // 20)


@pytest.fixture(scope="module")
def absorbing(world):
    """The features of half of the children carry the parent's direction, and the parent's own is silent there."""
    encoder, rows = torch.eye(D), torch.eye(D)
    for child in ABSORBED:
        encoder[0, child] = -1.0
        encoder[child, child], rows[child, child], rows[child, 0] = 2**0.5, 0.5**0.5, 0.5**0.5
    return sae_of(rows, sl.ReLU(), encoder)


def test_planted_absorption_is_found_child_by_child(world, absorbing):
    found = score_absorption(absorbing, *world)
    assert len(found.parents) == 1
    parent = found["parent"]
    assert parent.features == ("0+",) and parent.n_split == 1
    for child in parent.children:
        planted = float(int(child.child.split()[1]) in ABSORBED)
        assert (child.full, child.fraction) == (planted, planted), child
    # held-out words are as many of each kind as there are documents for: a binomial spread around one half
    assert parent.full == pytest.approx(0.5, abs=4 * 0.5 / parent.n_tokens**0.5) and parent.probe_f1 == 1.0
    assert parent.recall == pytest.approx(1 - parent.full)
    assert found.baselines["shuffled"].full > 0.8 > found.baselines["shuffled"]["parent"].recall
    assert set(found.baselines) == {"random", "untrained", "neurons", "shuffled"}
    assert "parent" in str(found) and found.to_dict()["means"]["full"] == parent.full
    assert "<pre>" in found._repr_html_()


def test_an_ideal_dictionary_absorbs_nothing(world):
    parent = score_absorption(sae_of(torch.eye(D), sl.ReLU()), *world, baselines=False)["parent"]
    assert (parent.full, parent.fraction, parent.f1, parent.recall, parent.n_split) == (0.0, 0.0, 1.0, 1.0, 1)


def test_a_parent_in_three_parts_is_split_not_absorbed(world):
    """No feature of its own; three features share the children."""
    encoder, rows = torch.eye(D), torch.eye(D)
    encoder[0] = 0
    for part in range(3):
        mine = [c for c in range(1, N_CHILDREN + 1) if c % 3 == part]
        encoder[part + 1, 0], rows[part + 1] = 1.0, torch.eye(D)[0]
        encoder[part + 1, [c for c in range(1, D) if c not in mine]] = -1.0
        encoder[part + 1, mine] = 0
    parent = score_absorption(sae_of(rows, sl.ReLU(), encoder), *world, baselines=False)["parent"]
    assert parent.n_split == 3 and set(parent.features) == {"1+", "2+", "3+"}
    assert parent.full == 0.0 and parent.recall == 1.0


def test_what_a_probe_does_not_find_is_not_scored(world):
    acts, labels = world
    rare, always = np.arange(len(acts)) < 5, np.ones(len(acts), bool)
    few = TokenLabels.of({"rare": rare, "always": always, "chance": np.random.default_rng(1).random(len(acts)) < 0.1})
    found = score_absorption(sae_of(torch.eye(D), sl.ReLU()), acts, few, labels.doc_ids, baselines=False)
    assert all("fewer than 20" in found[name].reason for name in ("rare", "always"))
    assert "probe" in found["chance"].reason
    assert np.isnan(found.full) and np.isnan(found["chance"].full)
    with pytest.raises(ValueError, match="'acts' has NaN or infinity in 1 of"):
        score_absorption(sae_of(torch.eye(D), sl.ReLU()), acts.index_fill(0, torch.tensor([5]), torch.nan), labels)
    with pytest.raises(ValueError, match="must have a row for each"):
        score_absorption(sae_of(torch.eye(D), sl.ReLU()), acts[1:], labels)


def plain_absorption(z, rows, offset, main, x, p):
    """The formulas, one token at a time, of codes with a column for each sign."""
    a = float((x - offset) @ p)
    part = [z[j] * float(rows[j] @ p) for j in range(len(z))]
    cos = [float(rows[j] @ p) / np.linalg.norm(rows[j]) for j in range(len(z))]
    fires = [j for j in range(len(z)) if z[j] != 0]
    top = max(fires, key=lambda j: part[j], default=None)
    full = top is not None and not any(z[j] for j in main) and a >= 0 and cos[top] >= 0.025 and part[top] >= 0.4 * a
    m = sum(part[j] for j in main)
    s = sum(sorted((part[j] for j in fires if j not in main and cos[j] >= 0.1 and part[j] > 0), reverse=True)[:3])
    if a <= 0 or m >= a or s < 0.4 * a:
        return full, 0.0
    return full, 1.0 if m <= 0 else min(s, a - m) / (min(s, a - m) + m)


def test_formulas_on_signed_codes():
    rng = np.random.default_rng(0)
    z = np.where(rng.random((300, 24)) < 0.25, rng.standard_normal((300, 24)), 0)
    z[:5] = 0
    rows, offset = rng.standard_normal((24, 6)), rng.standard_normal(6)
    coded = CodedTokens.split(z, rows, offset)
    assert len(coded.features) == 48 and np.allclose(coded.codes @ coded.rows, z @ rows)
    p = rng.standard_normal(6)
    p /= np.linalg.norm(p)
    x, places, main = z @ rows + offset + 0.5 * p, rng.permutation(300)[:200], [0, 3, 30]
    full, fraction = measure_absorption(coded, main, x[places], p, places)
    dense = coded.codes.toarray()
    plain = [plain_absorption(dense[i], coded.rows, offset, main, x[i], p) for i in places]
    assert full.tolist() == [one[0] for one in plain] and 10 < full.sum() < 190
    np.testing.assert_allclose(fraction, [one[1] for one in plain], atol=1e-9)
    assert ((fraction > 0) & (fraction < 1)).sum() > 10
