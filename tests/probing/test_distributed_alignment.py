"""Distributed alignment search: held against patching, a planted direction, splits, nulls."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm
from unchecked import unchecked

from saelab.interventions.patching import patch
from saelab.interventions.prompt_metrics import read_texts
from saelab.probing.distributed_alignment import _find_places, _fit, _group, _How, _Pairs, align, held_pairs
from saelab.synthetic.tasks import counterfactuals
from saelab.visualization.linear_concept_plots import plot_alignment

HOOK, LAST = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
WHO = ("I", "He", "She", "It", "Who", "One", "Any", "Two", "My", "Sue")
PAIRS = [(f"{a} sees Ann", f"{a} sees Tom", "R", "^") for a in WHO]
"""with answers that the tiny random model tells apart by these prompts"""
SHORT = {"seeds": [0], "n_epochs": 2, "progress": False}


@pytest.fixture(scope="module")
def found(tiny):
    return align(tiny, PAIRS, LAST, rank=2, seeds=[0, 1], n_epochs=30, lr=0.02, progress=False)


def test_scores_are_those_of_patching_one_prompt_into_the_other(tiny):
    found = align(tiny, PAIRS, HOOK, rank=3, train_frac=0.5, **SHORT)
    space = found.subspaces["search"][0]
    read = _Pairs.read(tiny, PAIRS, HOOK, -1, None)
    _, held = read.split(0.5, 0)
    by_hand = []
    for base, other, answer, other_answer in [PAIRS[i] for i in sorted({int(run) // 2 for run in held})]:
        for clean, corrupt, metric in ((other, base, (other_answer, answer)), (base, other, (answer, other_answer))):
            result = patch(tiny, clean, corrupt, metric, sources=space, positions=[-1])
            by_hand.append((result.values[0, 0], result.corrupt, result.clean))
    after, before, target = np.array(by_hand).T
    assert found["search"].scores[0] == pytest.approx((after - before).mean() / (target - before).mean(), abs=1e-3)
    assert found["search"].accuracies[0] == pytest.approx((after > 0).mean())
    assert all(parameter.grad is None for parameter in tiny.parameters()), "the user's model is left as it was"


def test_what_the_last_block_hands_on_is_the_answer(found):
    assert found["whole activation"].scores == pytest.approx((1, 1), abs=1e-4)


def test_the_search_beats_what_was_not_fitted_to_the_exchange(found):
    assert np.mean(found["search"].scores) > np.mean(found["random"].scores) + 0.2
    assert found.n_train == found.n_held == 5
    assert len(found["random"].scores) == 16 and len(found["search"].scores) == 2
    assert [row.name for row in found.rows][:2] == ["random", "search, answers shuffled"]


def test_subspaces_are_orthonormal_and_of_the_rank(found):
    for name in ("search", "pca", "random"):
        for space in found.subspaces[name]:
            torch.testing.assert_close(space.basis @ space.basis.T, torch.eye(2), rtol=0, atol=1e-4)
    assert found["means"].rank == found["probe"].rank == 1  # two answers have one difference
    assert 0 <= found.overlap <= 1 and np.mean(found["whole activation"].variances) == 1


def test_a_search_of_one_line_ends_between_it_and_what_reads_it(tiny):
    """Along v the exchange moves logits by (v . line)(v . w): most between the line and w, more than along the line."""
    read = _Pairs.read(tiny, PAIRS, LAST, -1, None)
    apart = (read.x[::2] - read.x[1::2]).mean(0)
    line = apart / apart.norm()
    signs = torch.tensor([1.0, -1.0]).repeat(len(PAIRS))
    planted = replace(read, x=apart.norm() / 2 * signs[:, None] * line)
    rows, start = torch.arange(len(signs)), torch.randn(32, 1, generator=torch.Generator().manual_seed(2))
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    found = _fit(planted, rows, start, _How(1, 60, 0.03, 32), nothing, 0, tqdm(disable=True))[:, 0]
    turned, along, before = (
        float(planted.exchange(rows, one[:, None]).mean()) for one in (found, line, start[:, 0] / start.norm())
    )
    assert turned > along > before
    assert abs(float(found @ line)) > 0.7 > 2 * abs(float(start[:, 0] @ line / start.norm()))


def test_pairs_that_share_a_prompt_stay_on_one_side(tiny):
    pairs = [*PAIRS, ("I sees Tom", "We sees Tom", "R", "^"), ("We sees Tom", "You sees Tom", "R", "^")]
    texts = read_texts(tiny, [prompt for pair in pairs for prompt in pair[:2]])
    assert _group(texts) == (0, *range(1, 10), 0, 0)
    read = _Pairs.read(tiny, pairs, HOOK, -1, None)
    for seed in range(5):
        train, held = read.split(0.5, seed)
        assert not set(train.tolist()) & set(held.tolist()) and len(train) + len(held) == 24
        assert len({run // 2 in {int(i) // 2 for i in train} for run in (0, 20, 22)}) == 1
        assert torch.equal(held[held_pairs(held)], held ^ 1)


def test_labels_make_the_means(tiny):
    kinds = [("b", "a"), ("a", "b")] * 5
    found = align(tiny, PAIRS, HOOK, labels=kinds, **SHORT)
    read = _Pairs.read(tiny, PAIRS, HOOK, -1, kinds)
    train, _ = read.split(0.5, 0)
    flat = np.array(kinds).reshape(-1)[train.numpy()]
    apart = read.x[train][flat == "a"].mean(0) - read.x[train][flat == "b"].mean(0)
    cosine = found.subspaces["means"][0].basis[0] @ apart / apart.norm()
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-4)


def test_positions_are_counted_in_each_prompt(tiny):
    texts = read_texts(tiny, ["One", "Three"])
    assert _find_places(texts, -1).tolist() == [3, 5] and _find_places(texts, [(0, -2)]).tolist() == [0, 4]
    moved = align(tiny, PAIRS, LAST, positions=-2, **SHORT)
    np.testing.assert_allclose(moved["whole activation"].scores, 0, atol=1e-5)  # nothing of it is read again


def test_tasks_tell_their_poles():
    for task, poles in (("mood", {"glad", "sad"}), ("gender", {"girl", "boy"})):
        for pair in counterfactuals(task, 6, seed=3):
            assert set(pair.poles) == poles and pair.answer != pair.other_answer
            assert len(pair.prompt) == len(pair.other_prompt) and pair.differ_at
    assert len({pair.poles[0] for pair in counterfactuals("mood", 12, seed=1)}) == 2, "either may come first"


def test_results_are_repeated_saved_and_drawn(tiny, tmp_path):
    found = align(tiny, PAIRS, HOOK, **SHORT)
    again = align(tiny, PAIRS, HOOK, **SHORT)
    assert found.rows == again.rows
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["limits"] and "subspaces" not in kept
    assert "found without labels" in str(found) and str(found).endswith(found.limits)
    assert [len(trace.x) for trace in plot_alignment(found).data] == [8 + 7] * 2


@unchecked()
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairs": PAIRS[:3]}, "`pairs` must hold 4 that share no prompt, got 3"),
        ({"pairs": []}, "got 0"),
        ({"pairs": [(a, b, "A", "A") for a, b, *_ in PAIRS]}, "Answers of a pair must differ"),
        ({"pairs": [(a, b, "^", "R") for a, b, *_ in PAIRS]}, "must prefer a prompt's own answer"),
        ({"pairs": [pair[:3] for pair in PAIRS]}, r"got 3 things"),
        ({"rank": 32}, r"`rank` must be in 1\.\.31"),
        ({"positions": 99}, "inside of prompts"),
        ({"positions": [(1, 1)]}, "two for each of 10 pairs"),
        ({"labels": [("a", "b")]}, "`labels` must be two for each"),
        ({"seeds": []}, "needs a seed"),
        ({"hook_point": "blocks.9.hook_resid_post"}, "hook point"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        align(**{"model": tiny, "pairs": PAIRS, "hook_point": HOOK, **SHORT} | settings)
