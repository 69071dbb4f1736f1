"""What shuffling must leave alone, planted differences told from nulls, prompts of the right tokens, and bad input."""

import json
import math

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis import LayerMeasure, LayerProfile, layer_profile
from saelab.analysis.layer_measures import KINDS, cut_prompts, read_group, replace_some, shuffle_prompts
from saelab.analysis.layer_profiles import LIMITS
from saelab.collecting.reader import ActivationReader
from saelab.functional.metrics import effective_rank
from saelab.functional.row_geometry import intrinsic_dimension, mean_cosine
from saelab.synthetic.tales import generate_stories

LENGTH = 24


@pytest.fixture(scope="module")
def tales() -> object:
    return sl.load_model("tales", progress=False)


@pytest.fixture(scope="module")
def stories() -> sl.Tokens:
    return generate_stories(60, first=94_000_000).tokens()


@pytest.fixture(scope="module")
def profile(tales, stories) -> LayerProfile:
    return layer_profile(tales, stories, length=LENGTH, n_prompts=48, n_groups=4, n_views=2, progress=False)


def test_an_embedding_does_not_know_the_order_and_layers_do(profile: LayerProfile) -> None:
    """Of rotary models the first block reads one vector a word: what forgets the order is equal in shuffled text."""
    for name in ("entropy", "rank", "cosine", "prompt_dimension"):
        one = profile[name]
        assert np.allclose(one.text[0], one.shuffled[0], rtol=1e-5), name
        assert next(untold for untold in profile.untold if untold.measure == name).layers[0] == 0
    assert np.array_equal(profile["outliers"].text[0], profile["outliers"].shuffled[0])
    assert not np.allclose(profile["curvature"].text[0], profile["curvature"].shuffled[0], rtol=1e-3)
    assert (profile["entropy"].text[1:] > profile["entropy"].shuffled[1:]).all()
    assert (profile.loss_shuffled > profile.loss + 3).all()


def test_chance_is_what_it_says(profile: LayerProfile) -> None:
    n_tokens = profile.n_tokens / profile.n_groups
    near = profile["neighbors"]
    assert near.chance is not None and np.allclose(near.chance[:-1], 10 / (n_tokens - 1), rtol=0.01)
    assert np.isnan(near.text[-1]).all() and (near.text[:-1] > 10 * near.chance[:-1]).all()
    gain, dimension = profile["norm_gain"], profile["dimension"]
    assert gain.chance is not None and dimension.chance is not None
    assert (np.abs(gain.chance) < 5 / n_tokens**0.5).all()  # five standard errors of a correlation of 0
    assert (dimension.chance > 2 * dimension.text).all()


def test_numbers_are_those_of_the_groups_own_tokens(tales, stories) -> None:
    point = "blocks.2.hook_in"
    found = layer_profile(tales, stories, [point], length=LENGTH, n_prompts=9, n_groups=3, n_views=2, progress=False)
    prompts = cut_prompts(stories, LENGTH, 9, np.random.default_rng(0))
    for group in range(3):
        mine = prompts[3 * group : 3 * group + 3]
        keep = sl.TokenMask().apply(mine).keep
        x = sl.lm.capture(tales, mine.ids, [point])[point][keep]
        assert found["cosine"].text[0, group] == pytest.approx(mean_cosine(x), rel=1e-4)
        centered = x.double() - x.double().mean(0)
        assert found["rank"].text[0, group] == pytest.approx(effective_rank(torch.linalg.svdvals(centered)), rel=1e-4)
        assert found["dimension"].text[0, group] == pytest.approx(intrinsic_dimension(x), rel=1e-3)
        made = sl.lm.logits(tales, mine.ids)
        loss = sl.lm.next_token_loss(made, mine.ids)[mine.predicts[:, :-1]]
        assert found.loss[group] == pytest.approx(float(loss.mean()), rel=1e-4)
        p = made[keep].double().softmax(-1)
        gain = (p * (p / p.mean(0)).log()).sum(1)
        norms = centered.square().sum(1)
        assert found["norm_gain"].text[0, group] == pytest.approx(
            float(torch.corrcoef(torch.stack([gain, norms]))[0, 1]), abs=1e-3
        )
    assert found.n_tokens == int(sl.TokenMask().apply(prompts).keep.sum())


def test_prompts_are_cut_shuffled_and_changed_where_the_mask_keeps(tales, stories) -> None:
    rng = np.random.default_rng(0)
    prompts = cut_prompts(stories, LENGTH, 10, rng)
    assert prompts.ids.shape == (10, LENGTH) and (prompts.doc_ids == prompts.doc_ids[:, :1]).all()
    text = {doc: stories.ids[stories.doc_ids == doc].tolist() for doc in prompts.doc_ids[:, 0].tolist()}
    for row, doc in zip(prompts.ids.tolist(), prompts.doc_ids[:, 0].tolist(), strict=True):
        assert any(text[doc][i : i + LENGTH] == row for i in range(len(text[doc])))
    reader = ActivationReader.make(tales, prompts, ["blocks.1.hook_in"], sl.TokenMask(), torch.float32)
    moved, keep = shuffle_prompts(prompts, reader, rng), sl.TokenMask().apply(prompts).keep
    assert torch.equal(moved.ids.sort(1).values, prompts.ids.sort(1).values)
    assert (
        torch.equal(moved.ids[~keep], prompts.ids[~keep]) and not keep.all() and not torch.equal(moved.ids, prompts.ids)
    )
    noisy = replace_some(prompts, reader, 0.5, rng)
    changed = noisy.ids != prompts.ids
    # of 230 tokens half are drawn, of which few are drawn as they were: 5 deviations
    assert not changed[~keep].any() and abs(float(changed[keep].double().mean()) - 0.48) < 5 * 0.5 / keep.sum() ** 0.5
    group = read_group(reader, prompts, 3)
    assert group.starts.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    x = sl.lm.capture(tales, prompts.ids, ["blocks.1.hook_in"])["blocks.1.hook_in"]
    assert torch.allclose(group.acts[0], x[keep], atol=1e-4)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_rest(tiny, tiny_tokens) -> None:
    state = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in tiny.named_parameters()}
    given = {"length": 10, "n_prompts": 24, "n_groups": 3, "n_views": 2, "progress": False}
    first, again, other = (layer_profile(tiny, tiny_tokens, seed=seed, **given) for seed in (0, 0, 1))
    assert json.dumps(first.to_dict()) == json.dumps(again.to_dict()) != json.dumps(other.to_dict())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in tiny.named_parameters())


def make(text: np.ndarray, shuffled: np.ndarray, chance: np.ndarray | None = None) -> LayerMeasure:
    return LayerMeasure(name="entropy", about="x", text=text, shuffled=shuffled, chance=chance, chance_is="noise")


def test_p_values_are_those_of_a_paired_t_test() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    text, shuffled = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)) + 1
    one = make(text, shuffled, shuffled + 1)
    assert np.allclose(one.p_shuffled, ttest_rel(text, shuffled, axis=1).pvalue)
    assert np.allclose(one.p_chance, ttest_rel(text, shuffled + 1, axis=1).pvalue)
    zeros = np.zeros((4, 6))
    assert make(text, text).p_shuffled.tolist() == [1] * 4 and make(zeros, zeros + 1).p_shuffled.tolist() == [0] * 4
    assert (
        make(np.full((2, 3), math.nan), text[:2, :3]).p_shuffled.tolist() == [1, 1] and (one.mean == text.mean(1)).all()
    )
    assert make(text, shuffled).p_chance.tolist() == [1] * 4


def test_it_prints_what_fails_first_and_what_it_cannot_show(profile: LayerProfile, tmp_path) -> None:
    lines = str(profile).split("\n")
    assert "48 prompts" in lines[0] and "seed 0" in lines[0] and lines[2].startswith("not told from a null")
    assert lines[3].split()[0] == profile.untold[0].measure and lines[-1] == LIMITS == profile.limits
    assert [one.name for one in profile.measures] == list(KINDS)
    drawn = profile._repr_html_()
    assert drawn.index("no different from") < drawn.index("mean \u00b1 sd")
    profile.save(tmp_path / "profile.json")
    assert len(json.loads((tmp_path / "profile.json").read_text())["measures"]) == len(KINDS)
    figure = sl.visualization.plot_layer_profile(profile)
    assert len(figure.data) == sum(3 if one.chance is not None else 2 for one in profile.measures)
    assert figure.data[0].y[1] == pytest.approx(profile["entropy"].mean[1])
    for names in (None, ["entropy"]):  # a legend of 20 pixels lies between the note's lines of 22 and the panels
        at = sl.visualization.plot_layer_profile(profile, names).layout
        panels = at.height - at.margin.t - at.margin.b
        assert at.margin.t - 44 - 22 * at.title.text.count("<br>") > (at.legend.y - 1) * panels + 20
    with pytest.raises(KeyError, match="entropi"):
        profile["entropi"]


def test_bad_input_is_said(tiny, tiny_tokens) -> None:
    for given, said in [
        ({"length": 999}, "`length` must be at most what a row holds"),
        ({"length": 10, "n_groups": 40}, "must hold 3 prompts for each of 40 groups"),
        ({"n_groups": 2}, "`n_groups` must be at least 3"),
        ({"noise": 0.0}, "`noise`"),
        ({"hook_points": ["blocks.9.hook_in"]}, "must be a hook point"),
        ({"length": 10, "hook_points": ["blocks.1.hook_in", "blocks.1.mlp.out.hook_in"]}, "of one width"),
        ({"length": 10, "mask": sl.TokenMask(positions=(99, None))}, "must keep at least one token"),
    ]:
        with pytest.raises(ValueError, match=said):
            layer_profile(tiny, tiny_tokens, progress=False, **{"length": 10} | given)
