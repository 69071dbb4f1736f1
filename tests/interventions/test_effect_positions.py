"""Effects by positions: what must add up, what has no effect, and a part of the exchange by hand."""

import json

import numpy as np
import pytest
import torch
from same_seeds import generator_of
from unchecked import unchecked

import saelab as sl
from saelab.interventions.directions import Subspace
from saelab.interventions.effect_positions import draw_alike, locate_effect, mark_punctuation
from saelab.interventions.prompt_metrics import read_texts
from saelab.visualization.linear_concept_plots import plot_effect_positions

HOOK, LAST = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
PROMPTS = ["Ann, Tom.", "a longer text, too", "x", "I see: a, b", "Who knows?"]


def everything(hook_point):
    """A subspace that is the whole space, beside which a random one of its rank is the same."""
    return Subspace(torch.eye(32), hook_point)


def test_all_that_the_answer_reads_of_the_last_block_is_at_the_last_token(tiny):
    x = sl.lm.capture(tiny, read_texts(tiny, PROMPTS).ids, [LAST])[LAST]
    texts = read_texts(tiny, PROMPTS)
    ends = x[torch.arange(len(texts)), texts.lengths - 1]
    main = sl.Direction(torch.linalg.svd(ends - ends.mean(0)).Vh[0], LAST, "main")
    groups = {"end": [-1], "rest": slice(0, -1), "all": "all"}
    found = locate_effect(tiny, PROMPTS, main, "A", groups, n_random=4, seeds=[0, 1])
    effects = {row.name: row.effects for row in found.rows}
    np.testing.assert_allclose(effects["end"], found.total, atol=1e-5)
    np.testing.assert_allclose(effects["all"], found.total, atol=1e-5)
    np.testing.assert_allclose(effects["rest"], 0, atol=1e-5)
    assert [row.p for row in found.rows if row.name == "all"] == [1.0], "all positions are as many random ones"
    assert [row.n_tokens for row in found.rows] == [5, found.n_tokens - 5, found.n_tokens]


def test_a_group_takes_a_part_of_the_same_exchange(tiny):
    direction = sl.Direction(torch.randn(32, generator=torch.Generator().manual_seed(3)), HOOK)
    found = locate_effect(tiny, PROMPTS, direction, n_random=4, seeds=[5])
    texts = read_texts(tiny, PROMPTS)
    keep, marks = texts.select(tiny, "all"), mark_punctuation(tiny, texts.ids)
    x = sl.lm.capture(tiny, texts.ids, [HOOK])[HOOK]
    rows, v = x[keep], direction.vector
    order = torch.randperm(len(rows), generator=generator_of(5))
    x[keep] += ((rows[order] - rows) @ v)[:, None] * v * marks[keep][:, None]

    def losses(out):
        return sl.lm.next_token_loss(out, texts.ids)

    with sl.splice(tiny, {HOOK: lambda _: x}):
        edited = losses(sl.lm.logits(tiny, texts.ids))
    plain, counted = losses(sl.lm.logits(tiny, texts.ids)), keep[:, 1:]
    by_hand = (((edited - plain) * counted).sum(1) / counted.sum(1)).mean()
    assert found.rows[0].effects[0] == pytest.approx(float(by_hand), abs=1e-5)
    assert found.rows[0].n_tokens == int(marks.sum()) == 6


def test_no_shares_where_a_random_subspace_does_as_much(tiny, tmp_path):
    found = locate_effect(tiny, PROMPTS, everything(HOOK), n_random=4, seeds=[0])
    assert "no effect to divide" in str(found) and np.isnan(found.shares("punctuation")).all()
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["reason"] and kept["limits"] and kept["shares"]["punctuation"]["share"] == [None]
    assert "No shares" in plot_effect_positions(found).layout.annotations[-1].text


def test_random_positions_are_as_many_and_inside(tiny):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(6, 9, generator=generator) < 0.6
    marked = (torch.rand(6, 9, generator=generator) < 0.4) & keep
    drawn = torch.zeros_like(keep)
    drawn[keep] = draw_alike(keep, marked[keep], generator)
    assert torch.equal(drawn.sum(1), marked.sum(1)) and not (drawn & ~keep).any()


def test_nulls_come_first_and_limits_last(tiny):
    lines = str(locate_effect(tiny, PROMPTS, everything(HOOK), n_random=4, seeds=[0])).split("\n")
    assert lines[1].startswith("random subspaces") and lines[2].startswith("resampled everywhere")


@unchecked()
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"n_random": 3}, "`n_random` must be at least 4"),
        ({"seeds": []}, "with a seed"),
        ({"groups": {}}, "`groups` must each have tokens"),
        ({"groups": {"none": [99]}}, r"`groups` must each have tokens .* got \{'none': 0\}"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        locate_effect(tiny, PROMPTS, everything(HOOK), **settings)
