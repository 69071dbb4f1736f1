"""Heads as classifiers: planted words, the figures beside a naive computation, and labels that say nothing."""

import json

import numpy as np
import pytest
import torch
from same_seeds import rng_of

import saelab as sl
from saelab.circuits import classify_heads
from saelab.circuits.head_classes import BEST, CODES, NEAREST, ONE, PROBE, RANDOM, RESIDUAL

PLACE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def setup():
    """Texts of one of two words among others."""
    model, rng = sl.lm.tiny_model(), np.random.default_rng(0)
    labels = ["owl" if one else "cat" for one in rng.random(40) < 0.5]
    texts = [f"{rng.integers(10, 99)} {label} {label} {rng.integers(10, 99)}" for label in labels]
    return model, sl.tokenize(model, texts, ctx_len=24, packed=False), labels


@pytest.fixture(scope="module")
def sae():
    cfg = sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=8))
    return sl.SAE(cfg, seed=0)


@pytest.fixture(scope="module")
def found(setup, sae):
    return classify_heads(*setup, 6, sae=sae, hook_point=PLACE, n_draws=8, allow_mismatch=True)


def test_words_are_told_by_heads_and_not_from_shuffled_labels(found, setup) -> None:
    assert found.chosen_by.shape == found.held_out.shape == (3, 4) and found.n_best == 6
    best = found[BEST]
    assert np.mean(best.accuracy) > 0.7 and np.mean(best.shuffled) < np.mean(best.accuracy)
    names = {f"{place}, {how}" for place in (RESIDUAL, CODES) for how in (NEAREST, PROBE)}
    assert {row.name for row in found.rows} == {BEST, RANDOM, ONE} | names
    assert found.classes == ("cat", "owl") and found.majority == pytest.approx(max(map(setup[2].count, setup[2])) / 40)
    assert found.n_tokens == int(
        (setup[1].attention_mask & ~torch.isin(setup[1].ids, torch.tensor(setup[1].special_ids))).sum()
    )
    assert json.loads(json.dumps(found.to_dict()))["hook_point"] == PLACE and "the vote is of 6 heads of 12" in str(
        found
    )


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_figures_are_those_of_a_naive_computation(setup, pooling) -> None:
    """Each head's accuracy on its shots, each left out, and on the others, for the same draws."""
    model, tokens, labels = setup
    found = classify_heads(model, tokens, labels, 5, pooling=pooling, n_draws=2, seed=3)
    y = np.array([("cat", "owl").index(label) for label in labels])
    names = [f"blocks.{i}.attn.hook_z" for i in range(3)]
    seen = sl.lm.capture(model, tokens.ids, names)
    keep = sl.TokenMask().apply(tokens).keep
    rows = [seen[name][i][keep[i]] for name in names for i in range(len(y))]
    pooled = torch.stack([one.mean(0) if pooling == "mean" else one[-1] for one in rows]).view(3, len(y), 4, -1)
    rng, shots, others = rng_of(3), [], []

    def nearest(x: torch.Tensor, rows: list[list[int]]) -> int:
        return int(np.argmax([torch.cosine_similarity(x, v[some].mean(0), dim=0) for some in rows]))

    for _ in range(2):
        chosen = [rng.choice(np.flatnonzero(y == c), 5, replace=False).tolist() for c in (0, 1)]
        rng.permutation(12), rng.permutation(10)
        rest = [i for i in range(len(y)) if i not in chosen[0] + chosen[1]]
        for layer in range(3):
            for head in range(4):
                v = pooled[layer, :, head]
                hits = [
                    nearest(v[i], [[j for j in some if j != i] for some in chosen]) == y[i]
                    for i in chosen[0] + chosen[1]
                ]
                shots.append(np.mean(hits))
                others.append(np.mean([nearest(v[i], chosen) == y[i] for i in rest]))
    assert np.allclose(np.reshape(shots, (2, 3, 4)).mean(0), found.chosen_by)
    assert np.allclose(np.reshape(others, (2, 3, 4)).mean(0), found.held_out, atol=0.02)  # ties of rounding


def test_labels_that_say_nothing_are_told(setup) -> None:
    model, tokens, _ = setup
    labels = np.random.default_rng(5).permutation(["a", "b"] * 20).tolist()
    found = classify_heads(model, tokens, labels, 4, n_draws=8)
    # 8 draws of 32 texts, of one set of labels: five standard errors of one draw
    assert abs(np.mean(found[BEST].accuracy) - 0.5) < 5 * np.sqrt(0.25 / 32) / 2
    assert max(found.best_shuffled) > 0.6  # the best of many heads is lucky
    assert all(one in str(found).split(f"{found.model}:")[0] for one in found.failed)


def test_a_vote_follows_the_majority_and_cosines_decide_ties() -> None:
    from saelab.circuits.head_classes import _ShotLabels

    task = _ShotLabels(np.arange(2), np.arange(2, 4), torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    heads = torch.tensor([[[0.6, 0.5], [0.1, 0.2]], [[0.6, 0.5], [0.1, 0.2]], [[-1.0, 1.0], [1.0, -1.0]]])
    assert task.vote(heads) == 1.0
    assert task.vote(heads[[0, 2]]) == 0.0  # one vote each: the surer head decides


def test_what_does_not_fit_is_told(setup, sae) -> None:
    model, tokens, labels = setup
    with pytest.raises(ValueError, match="one for each of the 40 rows"):
        classify_heads(model, tokens, labels[1:])
    with pytest.raises(ValueError, match="two classes or more"):
        classify_heads(model, tokens, ["a"] * 40)
    with pytest.raises(ValueError, match="more than 30 texts"):
        classify_heads(model, tokens, labels, 30)
    with pytest.raises(ValueError, match="`shots`"):
        classify_heads(model, tokens, labels, 1)
    packed = sl.tokenize(model, ["a tin can", "an owl"] * 20, ctx_len=24)
    with pytest.raises(ValueError, match="one text in each row"):
        classify_heads(model, packed, ["a", "b"] * (len(packed) // 2) + ["a"] * (len(packed) % 2), 2)
