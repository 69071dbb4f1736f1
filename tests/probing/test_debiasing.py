"""A planted bias taken out of words, what neighbors still tell, and losses of the running model."""

import json

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.probing import bias_subspace, equalize, neutralize, score_debiasing
from saelab.probing.debiasing import EQUALIZED, NEUTRALIZED, RANDOM, UNTOUCHED

D, N = 20, 7
LISTS = [[f"{kind}{i}" for i in range(N)] for kind in "xyabpq"]


def plant(seed: int, beside: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """Words whose bias lies along the first axis, and `beside` it along one that pairs do not have."""
    rng = np.random.default_rng(seed)
    axis, other = np.eye(D)[:2]
    x = 0.4 * rng.standard_normal((6 * N + 20, D))
    for i, sign in enumerate((1, -1)):
        x[i * N : (i + 1) * N] += sign * (axis + beside * other)
        x[(2 + i) * N : (3 + i) * N] += 3 * sign * axis
        x[(4 + i) * N : (5 + i) * N] = x[4 * N : 5 * N] * (1 - 2 * np.outer(np.full(N, i), axis)) + 2 * sign * axis
    return x + 0.3, [word for words in LISTS for word in words] + [f"other {i}" for i in range(20)]


def score(x: np.ndarray, names: list[str], **options) -> sl.probing.Debiasing:
    x_words, y_words, a, b, p, q = LISTS
    return score_debiasing(x, names, (x_words, y_words), (a, b), list(zip(p, q, strict=True)), **options)


def test_the_subspace_is_the_planted_one() -> None:
    x, _ = plant(0)
    found = bias_subspace(x[4 * N : 5 * N], x[5 * N : 6 * N], 1)
    assert found.basis[0, 0] > 0.99 and found.shares[0] > 0.9 and np.mean(found.repaired) < found.shares[0]
    turned = bias_subspace(x[5 * N : 6 * N], x[4 * N : 5 * N], 1)
    assert np.allclose(turned.basis, -found.basis)
    for seed in range(4):
        a, b = np.random.default_rng(seed).standard_normal((2, N, D))
        assert (bias_subspace(a, b, 4).basis @ (a - b).mean(0) >= 0).all()
    assert "words paired at random" in bias_subspace(a, b).failed[0]
    two = bias_subspace(x[4 * N : 5 * N], x[5 * N : 6 * N], 2)
    assert np.allclose(two.basis @ two.basis.T, np.eye(2)) and two.shares[0] > two.shares[1]


def test_neutral_words_have_the_center_in_the_subspace_and_keep_the_rest() -> None:
    x, _ = plant(1)
    found = bias_subspace(x[4 * N : 5 * N], x[5 * N : 6 * N], 2)
    basis, words, center = torch.from_numpy(found.basis), torch.from_numpy(x), torch.arange(D).double()
    after, moved = neutralize(words, found), neutralize(words, found, center)
    assert torch.allclose(after @ basis.T, torch.zeros(len(x), 2, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(moved @ basis.T, (center @ basis.T).expand(len(x), 2))
    assert torch.allclose(words - after, (words @ basis.T) @ basis) and torch.allclose(neutralize(after, found), after)


def test_equalized_pairs_are_equally_far_from_neutral_words() -> None:
    x, _ = plant(2)
    p, q = (torch.from_numpy(x[i * N : (i + 1) * N]) for i in (4, 5))
    found = bias_subspace(p, q)
    a, b = equalize(p, q, found)
    neutral = neutralize(torch.from_numpy(x[6 * N :]), found)
    assert torch.allclose(torch.cdist(a, neutral), torch.cdist(b, neutral)) and torch.allclose(
        a.norm(dim=1), b.norm(dim=1)
    )
    assert torch.allclose((a.square() + b.square()).sum(1), (p.square() + q.square()).sum(1))
    assert torch.equal(
        ((a - b) @ torch.from_numpy(found.basis[0])).sign(), ((p - q) @ torch.from_numpy(found.basis[0])).sign()
    )
    unit_p, unit_q = p / p.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
    ones = torch.ones(N, dtype=torch.float64)
    assert all(torch.allclose(one.norm(dim=1), ones) for one in equalize(unit_p, unit_q, found))
    with pytest.raises(ValueError, match="not so pair 0"):
        equalize(p, p, found)


def test_a_planted_bias_goes_and_random_directions_leave_it() -> None:
    found = score(*plant(3))
    before, after, random = found[UNTOUCHED], found[NEUTRALIZED], found[RANDOM]
    assert before.effects[0] > 1 and before.p[0] < 0.01 and before.neighbors_kept == 1
    assert abs(after.statistic) < 0.25 * before.statistic and random.statistic > 0.7 * before.statistic
    assert after.neighbors_kept < random.neighbors_kept < 1 and len(random.effects) == 5
    assert found[EQUALIZED].statistic == after.statistic and np.isnan(after.loss) and found.n_tokens == 0
    assert not any("random directions" in one or "after the edit" in one for one in found.failed)
    assert json.loads(json.dumps(found.to_dict()))["n_words"] == 6 * N + 20


def test_what_all_words_share_changes_nothing() -> None:
    x, names = plant(7)
    for one, other in zip(score(x, names).rows, score(x + 5 * np.arange(D), names).rows, strict=True):
        assert one.effects == pytest.approx(other.effects) and one.statistic == pytest.approx(other.statistic)
        assert one.neighbors_kept == pytest.approx(other.neighbors_kept, abs=0.01)


def test_bias_beside_the_subspace_is_told_by_neighbors() -> None:
    """Words that are apart along another axis too: the test falls silent, and their neighbors do not."""
    found = score(*plant(4, beside=2.0), n_neighbors=5)
    assert abs(found[NEUTRALIZED].statistic) < 0.25 * found[UNTOUCHED].statistic
    assert found[NEUTRALIZED].neighbor_bias > 0.4 > np.mean(null := found.neighbor_bias_permuted) + np.std(null)
    told = [one for one in found.failed if one.startswith("neighbors of neutralized words still tell")]
    assert bool(told) == (found[UNTOUCHED].neighbor_bias > max(null)) and all(one in str(found) for one in told)
    gone = score(*plant(4), n_neighbors=5)
    assert gone[NEUTRALIZED].neighbor_bias < found[NEUTRALIZED].neighbor_bias - 0.2


def test_a_subspace_that_is_not_the_bias_is_told() -> None:
    x, names = plant(5)
    x[4 * N : 6 * N] = np.random.default_rng(0).standard_normal((2 * N, D)) * np.linspace(0, 1, D)
    found = score(x, names)
    assert any("after the edit" in one for one in found.failed) and found.subspace.failed


def test_losses_are_of_the_edited_model_and_leave_it_as_it_was() -> None:
    model, (x, names) = sl.lm.tiny_model(), plant(6)
    x = np.pad(x, ((0, 0), (0, 32 - D)))
    tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(20)], ctx_len=16, packed=False)
    place = {"model": model, "tokens": tokens, "hook_point": "blocks.1.hook_resid_post"}
    found = score(x, names, n_directions=2, **place)
    assert found.n_tokens == int(tokens.predicts[:, :-1].sum()) and np.isnan(found[EQUALIZED].loss)
    mean, basis = torch.from_numpy(x.mean(0)).float(), torch.from_numpy(found.subspace.basis).float()
    keep = tokens.attention_mask & ~torch.isin(tokens.ids, torch.tensor(tokens.special_ids))

    def edit(h: torch.Tensor) -> torch.Tensor:
        h[keep] -= ((h[keep] - mean) @ basis.T) @ basis
        return h

    counted = tokens.predicts[:, :-1]
    with sl.splice(model, {place["hook_point"]: edit}):
        expected = sl.lm.next_token_loss(sl.lm.logits(model, tokens.ids), tokens.ids)[counted].mean()
    before = sl.lm.next_token_loss(sl.lm.logits(model, tokens.ids), tokens.ids)[counted].mean()
    assert found[NEUTRALIZED].loss == pytest.approx(float(expected), abs=1e-5)
    assert found[UNTOUCHED].loss == pytest.approx(float(before), abs=1e-5) and abs(float(expected - before)) > 1e-5


def test_words_that_do_not_fit_are_told() -> None:
    x, names = plant(0)
    with pytest.raises(ValueError, match="not so: \\['x0'\\]"):
        score(x, ["z", *names[1:]])
    with pytest.raises(ValueError, match="in no pair and no attribute"):
        score_debiasing(x, names, (["x0", "a1"], LISTS[1]), (LISTS[2], LISTS[3]), [("p0", "q0"), ("p1", "q1")])
    with pytest.raises(ValueError, match="n_neighbors"):
        score(x, names, n_neighbors=40)
    with pytest.raises(ValueError, match="given together"):
        score(x, names, model=sl.lm.tiny_model())
    with pytest.raises(ValueError, match="different"):
        score(x, [names[1], *names[1:]])
    with pytest.raises(ValueError, match="n_directions"):
        bias_subspace(x[:3], x[3:6], 4)
    with pytest.raises(ValueError, match="must differ"):
        bias_subspace(x[:3], x[:3])
