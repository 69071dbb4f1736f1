"""Contrast pairs without labels: a planted label is found, a larger distractor in its place."""

import json

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.probing.contrast_pairs import ccs_loss, find_unsupervised_directions, fit_ccs, score_contrasts
from saelab.visualization.linear_concept_plots import plot_contrasts

HOOK, D, N = "blocks.1.hook_resid_post", 24, 200


def plant(seed, label=4.0, distractor=0.0):
    """Halves that are opposite along a direction of the label, and along one of the distractor; both random."""
    generator = torch.Generator().manual_seed(seed)
    y, which = (torch.rand(N, generator=generator) < 0.5 for _ in range(2))
    v, u = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q.T
    x = torch.randn(N, 2, D, generator=generator)
    half = torch.tensor([1.0, -1.0])
    for marks, line, size in ((y, v, label), (which, u, distractor)):
        x = x + size * (2 * marks.float() - 1)[:, None, None] * half[:, None] * line
    return x, y, which


def test_a_label_that_halves_are_opposite_along_is_found():
    x, y, _ = plant(0)
    found = score_contrasts(x, y, HOOK, seeds=[0, 1], n_restarts=4)
    for name in ("ccs", "pca of differences", "supervised"):
        assert min(found[name].accuracies) > 0.95
    assert max(found["ccs"].losses) < 0.1 and found.verdict.startswith("passes")
    # of ten random directions and 80 held-out pairs none comes near, and their accuracies are of either sign
    assert len(found["random"].accuracies) == 20 and 0.5 <= np.mean(found["random"].accuracies) < 0.8


def test_a_larger_distractor_is_found_instead_and_said_first():
    (x, y, _), (other, _, which) = plant(0), plant(0, distractor=12.0)
    found = score_contrasts(x, y, HOOK, distracted=[other], drawn=[which], seeds=[0])
    for name in ("ccs", "pca of differences"):
        assert found[name].distractor[0] > 0.95 and found[name].distracted[0] < 0.75
    assert found["supervised"].distracted[0] > 0.95, "the label is there all the same"
    assert str(found).startswith("CCS fails: with a random distractor") and found.warning in str(found)


def test_a_smaller_distractor_is_not():
    (x, y, _), (other, _, which) = plant(0), plant(0, distractor=0.1)
    found = score_contrasts(x, y, HOOK, distracted=[other], drawn=[which], seeds=[0])
    assert found["ccs"].distracted[0] > 0.9 > found["ccs"].distractor[0] and "fails" not in found.verdict


def test_noise_fails():
    x, y, _ = plant(0, label=0.0)
    found = score_contrasts(x, y, HOOK, seeds=[0, 1, 2])
    assert found.verdict.startswith("fails: accuracy")


def test_the_loss_is_that_of_the_paper():
    p = torch.tensor([[0.9, 0.2], [0.4, 0.4]])
    by_hand = ((0.9 - 0.8) ** 2 + 0.2**2 + (0.4 - 0.6) ** 2 + 0.4**2) / 2
    assert float(ccs_loss(p)) == pytest.approx(by_hand, abs=1e-6)


def test_the_best_of_several_starts_is_taken():
    halves = torch.randn(30, 2, 6, generator=torch.Generator().manual_seed(0))

    def loss(w, b):
        return float(ccs_loss(torch.sigmoid(halves @ w + b)))

    assert loss(*fit_ccs(halves, 8, seed=0)) <= loss(*fit_ccs(halves, 1, seed=0)) + 1e-6
    assert torch.equal(fit_ccs(halves, 2, seed=3)[0], fit_ccs(halves, 2, seed=3)[0])


def test_a_shift_of_all_first_halves_tells_nothing():
    """Halves are normalized apart: which half it is must not be found."""
    x, y, _ = plant(1)
    moved = x.clone()
    moved[:, 0] += 50
    ours, theirs = (score_contrasts(one, y, HOOK, seeds=[0])["ccs"].accuracies[0] for one in (x, moved))
    assert ours == pytest.approx(theirs, abs=0.03)


def test_distractors_are_appended_to_both_halves(tiny, monkeypatch):
    from saelab.probing import contrast_pairs

    seen = []
    read = contrast_pairs._read_halves
    monkeypatch.setattr(
        contrast_pairs, "_read_halves", lambda model, rows, point: seen.append(rows) or read(model, rows, point)
    )
    pairs = [(f"{i} is odd", f"{i} is even") for i in range(12)]
    found = find_unsupervised_directions(
        tiny, pairs, [i % 2 == 1 for i in range(12)], HOOK, distractors=("x", "y"), n_restarts=1, seeds=[0]
    )
    plain, longer = seen
    ends = [int(row[-1]) for row in longer]
    assert all(torch.equal(a, b[:-1]) for a, b in zip(plain, longer, strict=True))
    assert ends[::2] == ends[1::2] and len(set(ends)) == 2 and found.distractors == ("x", "y")
    assert found.n_tokens == sum(map(len, plain))


def test_results_are_saved_drawn_and_carry_the_warning(tmp_path):
    x, y, which = plant(2)
    found = score_contrasts(x, y, HOOK, distracted=[x], drawn=[which], seeds=[0], n_restarts=1)
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["warning"] and kept["verdict"] and kept["limits"] and "directions" not in kept
    assert found.directions["ccs"][0].warning and not found.directions["supervised"][0].warning
    assert len(plot_contrasts(found).data) == 3


def test_directions_of_components_and_clusters_carry_the_warning():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    y = x[:, 0] > 0
    warned = {m: bool(sl.probing.fit_direction(x, y, HOOK, m).warning) for m in ("means", "probe", "pca", "kmeans")}
    assert warned == {"means": False, "probe": False, "pca": True, "kmeans": True}
    assert (-sl.probing.fit_direction(x, y, HOOK, "pca")).warning


@unchecked()
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"y": torch.ones(N, dtype=torch.bool)}, "true and false of some pairs on both sides"),
        ({"seeds": []}, "Contrasts need 8 pairs"),
        ({"n_restarts": 0}, "Contrasts need 8 pairs"),
        ({"distracted": [plant(0)[0]], "drawn": []}, "for each seed"),
    ],
)
def test_what_cannot_be_scored_is_refused(settings, complaint):
    x, y, _ = plant(0)
    with pytest.raises(ValueError, match=complaint):
        score_contrasts(**{"x": x, "y": y, "hook_point": HOOK, "seeds": [0], "n_restarts": 1} | settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairs": [], "labels": []}, "got none"),
        ({"labels": [True]}, "one for each of 12 pairs"),
        ({"distractors": ("x", "x")}, "two different tokens"),
    ],
)
def test_statements_must_fit(tiny, settings, complaint):
    asked = {"pairs": [("a", "b")] * 12, "labels": [True, False] * 6} | settings
    with pytest.raises(ValueError, match=complaint):
        find_unsupervised_directions(tiny, hook_point=HOOK, **asked)
