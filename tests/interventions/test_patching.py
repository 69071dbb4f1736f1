"""Patching: whole hook points, directions and features put into another run, held against doing it by hand."""

import json
import math

import numpy as np
import pytest
import torch
from same_seeds import generator_of
from unchecked import unchecked

import saelab as sl
from saelab.interventions.directions import Subspace, make_random_subspaces
from saelab.interventions.patching import patch
from saelab.interventions.prompt_metrics import make_prompt_metric, read_texts
from saelab.interventions.resampling import resample_ablation
from saelab.visualization.intervention_plots import plot_patching

HOOK = "blocks.1.hook_resid_post"
CLEAN, CORRUPT, METRIC = "I see Ann now", "I see Tom now", ("A", "T")
FIRST, N = 7, 14  # position of the first letter that differs; tokens


@pytest.fixture(scope="module")
def sae():
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=5), normalizer="scale"), seed=1)
    sae.normalizer.fit(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    return sae


def read(model, prompt):
    return sl.lm.capture(model, read_texts(model, prompt).ids, [HOOK])[HOOK][0]


def measure(model, prompt, edit, hook_point=HOOK):
    """The metric with an edit of the (n, d) activations of the corrupt run."""
    texts = read_texts(model, prompt)
    with sl.splice(model, {hook_point: lambda x: edit(x[0])[None]}):
        return float(make_prompt_metric(model, METRIC)(sl.lm.logits(model, texts.ids), texts, torch.tensor([0])))


def test_hook_points_restore_what_flows_through_them(tiny):
    found = patch(tiny, CLEAN, CORRUPT, METRIC)
    assert found.sources == tuple(f"blocks.{i}.hook_resid_post" for i in range(3))
    assert found.values.shape == (3, N)
    np.testing.assert_allclose(found.scores[:, :FIRST], 0, atol=1e-5)  # the prompts are still the same there
    assert found.scores[2, -1] == pytest.approx(1, abs=1e-5)  # all that the logits are made of
    np.testing.assert_allclose(found.scores[2, :-1], 0, atol=1e-5)  # nothing of it is read again
    assert np.abs(found.scores[0, FIRST:-1]).max() > 0.01
    everything = patch(tiny, CLEAN, CORRUPT, METRIC, positions="all")
    np.testing.assert_allclose(everything.scores, 1, atol=1e-4)


def test_groups_of_positions_are_patched_together(tiny):
    ours = read(tiny, CLEAN)

    def edit(x):
        x[[8, 9]] = ours[[8, 9]]
        return x

    found = patch(tiny, CLEAN, CORRUPT, METRIC, sources=HOOK, positions=[[8, -5], 2])
    assert found.positions == ((8, 9), (2,))
    assert found.values[0, 0] == pytest.approx(measure(tiny, CORRUPT, edit), abs=1e-5)
    assert found.name_column(0) == "8 o>n 9 m>n"


def test_a_subspace_is_projected_on_even_where_its_vectors_are_not_orthogonal(tiny):
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    vectors[1] += 5 * vectors[0]
    space = Subspace(torch.cat([vectors, vectors[:1] + vectors[2:]]), HOOK)  # the fourth adds nothing
    assert space.basis.shape == (3, 32)
    x = torch.randn(5, 32)
    by_least_squares = (x @ torch.linalg.pinv(vectors)) @ vectors
    torch.testing.assert_close(space.project(x), by_least_squares, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(space.project(space.remove(x)), torch.zeros_like(x), rtol=0, atol=1e-5)
    found = patch(tiny, CLEAN, CORRUPT, METRIC, sources=[space], positions=[10])
    ours = read(tiny, CLEAN)

    def edit(row):
        row[10] += ((ours[10] - row[10]) @ torch.linalg.pinv(vectors)) @ vectors
        return row

    assert found.values[0, 0] == pytest.approx(measure(tiny, CORRUPT, edit), abs=1e-4)


def test_a_direction_carries_its_part_alone(tiny):
    direction = sl.Direction(torch.randn(32, generator=torch.Generator().manual_seed(2)), HOOK, "mine")
    ours = read(tiny, CLEAN)
    found = patch(tiny, CLEAN, CORRUPT, METRIC, sources=direction, positions="all")
    by_hand = measure(tiny, CORRUPT, lambda x: x + ((ours - x) @ direction.vector)[:, None] * direction.vector)
    assert found.sources == ("mine",)
    assert found.values[0, 0] == pytest.approx(by_hand, abs=1e-5)
    whole = patch(tiny, CLEAN, CORRUPT, METRIC, sources=Subspace(torch.randn(40, 32), HOOK), positions="all")
    assert whole.scores[0, 0] == pytest.approx(1, abs=1e-3), "all directions together are the hook point"


def test_features_are_patched_with_the_error_left_alone(tiny, sae):
    ours = read(tiny, CLEAN)

    def edit(x):
        z, wanted = sae.encode(x), sae.encode(ours)
        error, mixed = x - sae.decode(z), z.clone()
        mixed[:, [3, 11]] = wanted[:, [3, 11]]
        return sae.decode(mixed) + error

    sources = [(sae, [3, 11]), sae, (sae, [])]
    found = patch(tiny, CLEAN, CORRUPT, METRIC, sources=sources, positions="all", hook_point=HOOK)
    with torch.no_grad():
        assert found.values[0, 0] == pytest.approx(measure(tiny, CORRUPT, edit), abs=1e-5)
        all_codes = measure(tiny, CORRUPT, lambda x: sae.decode(sae.encode(ours)) + x - sae.decode(sae.encode(x)))
    assert found.values[1, 0] == pytest.approx(all_codes, abs=1e-5)
    assert found.scores[2, 0] == pytest.approx(0, abs=1e-5)
    assert found.sources == ("features 3, 11", "all features", "features ")


def test_features_of_a_normalizer_that_measures_tokens_are_patched_in_their_own_size(tiny):
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=5), normalizer="token_norm"), seed=1)
    ours = read(tiny, CLEAN)
    found = patch(tiny, CLEAN, CORRUPT, METRIC, sources=[sae], positions="all", hook_point=HOOK)
    with torch.no_grad():
        by_hand = measure(tiny, CORRUPT, lambda x: sae(ours) + x - sae(x))
    assert found.values[0, 0] == pytest.approx(by_hand, abs=1e-5)


def test_scores_are_nan_with_a_reason_where_the_prompts_do_not_differ(tiny, tmp_path):
    found = patch(tiny, CLEAN, CLEAN, METRIC, sources=HOOK)
    assert np.isnan(found.scores).all()
    assert "nothing to restore" in str(found)
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["scores"][0][0] is None and kept["reason"]
    assert "nothing to restore" in plot_patching(found).layout.annotations[-1].text
    assert "nothing to restore" in found._repr_html_()


def test_figure_holds_the_scores_and_no_tags(tiny):
    found = patch(tiny, "I see <b", "I see To", METRIC)
    figure = plot_patching(found)
    np.testing.assert_allclose(np.array(figure.data[0].z, float), found.scores[::-1])
    assert all("<" not in text for text in figure.layout.xaxis.ticktext)
    assert "&lt;" in found._repr_html_() and "T>&lt;" not in found._repr_html_()


@unchecked()
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"corrupt": "I see"}, "equally many tokens, got 14 and 6"),
        ({"sources": []}, "`sources` must name at least one"),
        ({"sources": "blocks.9.hook_resid_post"}, "must be a hook point of this model"),
        ({"positions": [99]}, r"`positions` must be in -14\.\.13, got \[99\]"),
        ({"positions": "some"}, "`positions` must be 'each', 'all' or a list"),
    ],
)
def test_what_does_not_exist_is_refused(tiny, settings, complaint):
    asked = {"clean": CLEAN, "corrupt": CORRUPT, "metric": METRIC} | settings
    with pytest.raises(ValueError, match=complaint):
        patch(tiny, **asked)


def test_features_must_exist_and_say_where(tiny, sae):
    with pytest.raises(ValueError, match=r"Features` must be in 0\.\.47, got \[48\]"):
        patch(tiny, CLEAN, CORRUPT, METRIC, sources=(sae, [48]), hook_point=HOOK)
    with pytest.raises(ValueError, match="`hook_point` must be given"):
        patch(tiny, CLEAN, CORRUPT, METRIC, sources=(sae, [4]))


def test_resampling_is_what_it_says(tiny):
    direction = sl.Direction(torch.randn(32, generator=torch.Generator().manual_seed(3)), HOOK)
    prompts = ["Once", "a longer text"]
    found = resample_ablation(tiny, prompts, direction, seed=5)
    texts, v = read_texts(tiny, prompts), direction.vector
    keep = texts.select(tiny, "all")
    assert found.n_tokens == int(keep.sum()) == 17
    x = sl.lm.capture(tiny, texts.ids, [HOOK])[HOOK]
    rows = x[keep]
    order = torch.randperm(17, generator=generator_of(5))
    x[keep] += ((rows[order] - rows) @ v)[:, None] * v
    with sl.splice(tiny, {HOOK: lambda _: x}):
        losses = sl.lm.next_token_loss(sl.lm.logits(tiny, texts.ids), texts.ids)
    by_hand = (losses[0, :4].mean() + losses[1].mean()) / 2
    assert found.rows[0].value == pytest.approx(float(by_hand), abs=1e-5)
    assert found.rows[0].value != pytest.approx(found.clean, abs=1e-5)
    assert found == resample_ablation(tiny, prompts, direction, seed=5)


def test_a_direction_that_matters_loses_more_than_random_ones(tiny):
    texts = [f"I see {name}" for name in ("Ann", "Tom", "Eve", "Bob", "Una", "Kim")]
    targets = torch.tensor([40, 50, 60, 70, 80, 90])
    last = "blocks.2.hook_resid_post"
    x = sl.lm.capture(tiny, read_texts(tiny, texts).ids, [last])[last][:, -1]
    # the line along which the last activations differ most is what their predictions differ by
    main = torch.linalg.svd(x - x.mean(0)).Vh[0]
    found = resample_ablation(tiny, texts, sl.Direction(main, last, "main"), targets, where=[-1], n_random=8)
    row = found.rows[0]
    assert len(row.random) == 8
    assert abs(row.value - found.clean) > np.mean([abs(value - found.clean) for value in row.random])
    assert "main" in str(found)


def test_a_random_direction_beats_random_ones_as_often_as_chance_says(tiny):
    # the text repeats itself and the stream has a few large directions: what tempts a null to be too small
    n, n_random = 24, 4
    changes = []
    for seed in range(n):
        drawn = torch.randn(32, generator=torch.Generator().manual_seed(1000 + seed))
        found = sl.interventions.resample_ablation(
            tiny, ["abab" * 6, "baba" * 6], sl.Direction(drawn, HOOK), n_random=n_random, seed=seed
        )
        [row] = found.rows
        changes.append([abs(value - found.clean) for value in (row.value, *row.random)])
    won = sum(max(row) == row[0] for row in changes)
    chance = 1 / (n_random + 1)
    assert abs(won - n * chance) <= 4 * (n * chance * (1 - chance)) ** 0.5


def test_resampling_needs_rivals_and_tokens(tiny):
    direction = sl.Direction(torch.ones(32), HOOK)
    with pytest.raises(ValueError, match="`n_random` must be at least 4"):
        resample_ablation(tiny, "One", direction, n_random=3)
    with pytest.raises(ValueError, match="at least two tokens"):
        resample_ablation(tiny, "One", direction, where=[1])


def test_random_subspaces_are_orthonormal_and_seeded():
    space = Subspace(torch.eye(8)[:3], HOOK)
    first, second = make_random_subspaces(space, 2, seed=4)
    torch.testing.assert_close(first.basis @ first.basis.T, torch.eye(3))
    assert torch.equal(first.basis, make_random_subspaces(space, 1, seed=4)[0].basis)
    assert not torch.equal(first.basis, second.basis)
    with pytest.raises(ValueError, match="not all zero"):
        Subspace(torch.zeros(2, 8), HOOK)


def test_outcomes_are_read_behind_the_last_token_of_each_text(tiny):
    texts = read_texts(tiny, ["One", "Three", "Seven"])
    out = sl.lm.logits(tiny, texts.ids)
    expected = out[torch.arange(3), texts.lengths - 1].log_softmax(-1)
    targets = torch.tensor([40, 41, 42])
    rows = torch.tensor([2, 0])
    found = make_prompt_metric(tiny, targets)(out[rows], texts, rows)
    torch.testing.assert_close(found, expected[rows, targets[rows]])
    loss = make_prompt_metric(tiny, "loss")(out, texts, torch.arange(3))
    alone = read_texts(tiny, "One")
    torch.testing.assert_close(loss[0], sl.lm.next_token_loss(sl.lm.logits(tiny, alone.ids), alone.ids).mean())
    assert math.isfinite(float(loss.sum()))
