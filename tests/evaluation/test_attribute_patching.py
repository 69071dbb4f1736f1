"""Patching of attributes, where a linear model answers from planted directions."""

import math
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from dictionaries import sae_of
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.attribute_patching import OWN, _SourcePairs, score_disentanglement
from saelab.evaluation.sparse_control import ORIGINAL, EditTask
from saelab.functional.statistics import fit_probe

N, D, N_VALUES = 120, 32, 4
DIRECTIONS = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
KINDS = ("shape", "color", "size")
QUIET = 0.02


class LinearTask(EditTask):
    """x is the sum of a direction for each value; the answer to a question is the value with the largest projection."""

    @cached_property
    def activations(self):
        values = torch.tensor([[int(one[kind][-1]) for kind in KINDS] for one in self.attributes[ORIGINAL]])
        x = DIRECTIONS[values + N_VALUES * torch.arange(len(KINDS))].sum(1)
        noise = torch.randn(len(self), 1, D, generator=torch.Generator().manual_seed(int(self.ids[ORIGINAL][0, 0])))
        return {ORIGINAL: x[:, None] + QUIET * noise}

    def predict(self, x=None, version=ORIGINAL):
        x = self.activations[version] if x is None else x
        kinds = torch.arange(len(KINDS)).repeat_interleave(N_VALUES)
        asked = torch.tensor([KINDS.index(one) for one in self.asks])
        return (x[:, 0] @ DIRECTIONS[: len(kinds)].T).masked_fill(kinds != asked[:, None], -9.0)


def make_task(tiny, seed, asked=KINDS[:2]):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, N_VALUES, (N, len(KINDS)), generator=generator)
    asks = [asked[i % len(asked)] for i in range(N)]
    answers = torch.tensor(
        [N_VALUES * KINDS.index(a) + int(v[KINDS.index(a)]) for a, v in zip(asks, values, strict=True)]
    )
    return LinearTask(
        model=tiny,
        hook_point="blocks.2.hook_resid_post",
        ids={ORIGINAL: torch.full((N, 1), seed)},
        lengths=torch.ones(N, dtype=torch.long),
        places=torch.full((N, 1), -1),
        place_names=("end",),
        attributes={ORIGINAL: [{k: f"{k}{int(v)}" for k, v in zip(KINDS, row, strict=True)} for row in values]},
        answers=answers,
        other_answers=answers,
        asks=asks,
    )


def make(rows):
    """An SAE of these rows of which every latent fires."""
    return sae_of(rows, sl.AbsTopK(k=len(rows)))


@pytest.fixture(scope="module")
def tasks(tiny):
    return make_task(tiny, 1), make_task(tiny, 2)


@pytest.fixture(scope="module")
def mixed():
    """Every latent is a shape with a color added or taken off; sizes are apart."""
    shapes, colors, sizes = DIRECTIONS[: 3 * N_VALUES].split(N_VALUES)
    return make(torch.cat([(shapes + colors) / 2**0.5, (shapes - colors) / 2**0.5, sizes]))


@pytest.fixture(scope="module")
def scores(tasks, mixed):
    separate = make(DIRECTIONS[: 3 * N_VALUES] * torch.tensor([1.0, -1.0]).repeat(6)[:, None])  # either sign
    return score_disentanglement(separate, *tasks, ns=(0, 1, N_VALUES, 32), baselines={"mixed": mixed})


def test_features_of_one_attribute_move_it_alone(scores):
    assert scores.scores[0] == 0.5 and scores.isolation[0] == 1 and scores.cause[0] == 0
    assert scores.cause[1] < 0.9 and scores.isolation[1] == 1
    assert scores.scores[N_VALUES] == scores.cause[N_VALUES] == scores.isolation[N_VALUES] == 1
    for row, first in zip(scores.rows, (0, N_VALUES, 2 * N_VALUES), strict=True):
        assert set(row.features[0][:N_VALUES]) == set(range(first, first + N_VALUES))
    size = scores.rows[2]
    assert math.isnan(size.cause[1]) and (size.n_cause, size.n_isolation) == (0, scores.n_prompts)
    assert scores.n_prompts == N and scores.n_left_out == 0 and scores.n_train == N


def test_mixed_features_lose_isolation(scores):
    mixed = scores.baselines["mixed"]
    assert mixed.cause[32] == 1 and mixed.scores[N_VALUES] < 0.8
    for row in mixed.rows[:2]:
        # by hand: all latents of both move both, and a source drawn at random has the base's own value in 1 of 4
        assert row.isolation[32] < 0.25 + 5 * (0.25 * 0.75 / row.n_isolation) ** 0.5
    assert mixed.rows[2].isolation[N_VALUES] == 1


def test_baselines_stand_where_they_must(scores):
    assert set(scores.baselines) == {*OWN, "mixed"}
    assert all(value == 1 for value in scores.baselines["supervised"].scores.values())
    whole = scores.baselines["whole activation"]
    assert whole.cause[1] == 1 and whole.isolation[1] < 0.7
    assert scores.baselines["shuffled"].scores[N_VALUES] < 0.9 and scores.baselines["random"].scores[N_VALUES] < 0.9
    text, saved = str(scores), scores.to_dict()
    assert "1.000 (1.00, 1.00)" in text and "SAE" in scores._repr_html_()
    assert saved["scores"]["4"] == 1 and saved["baselines"]["mixed"]["cause"]["32"] == 1


def test_the_formulas_by_hand(tasks, mixed):
    task, train = tasks
    found = score_disentanglement(mixed, task, train, ns=(3,), baselines=False, seed=5)
    generator = torch.Generator().manual_seed(5)
    pairs = _SourcePairs.draw(task, train, generator)
    x, known = train.activations[ORIGINAL][:, 0], train.attributes[ORIGINAL]
    sources = torch.randperm(N, generator=generator).tolist()
    values = [(kind, f"{kind}{v}") for kind in KINDS for v in range(N_VALUES)]
    labels = torch.tensor([[float(one[kind] == value) for kind, value in values] for one in known])
    weights = dict(zip(values, fit_probe((x - x.mean(0)) / x.std(0), labels).weight / x.std(0), strict=True))
    z, z_held, rows = (
        each.detach() for each in (mixed.encode(x), mixed.encode(task.activations[ORIGINAL][:, 0]), mixed.W_dec)
    )
    for row in found.rows:
        pulls = [weights[row.attribute, known[i][row.attribute]] for i in range(N)]
        effects = [
            sum(float((z[s, i] - z[b, i]) * ((pulls[s] - pulls[b]) @ rows[i])) for b, s in enumerate(sources)) / N
            for i in range(mixed.cfg.d_sae)
        ]
        chosen = sorted(range(len(effects)), key=lambda i: -effects[i])[:3]
        assert list(row.features[0][:3]) == chosen
        moved, held = task.activations[ORIGINAL].clone(), task.attributes[ORIGINAL]
        for b, s in enumerate(pairs.sources.tolist()):
            moved[b, 0] += sum((z_held[s, i] - z_held[b, i]) * rows[i] for i in chosen)
        hits = {True: [], False: []}
        for b, guess in enumerate(task.predict(moved).argmax(1).tolist()):
            s, asked = int(pairs.sources[b]), task.asks[b]
            assert s != b and held[s][asked] != held[b][asked]
            hits[asked == row.attribute].append(values[guess][1] == held[s if asked == row.attribute else b][asked])
        for shares, mine in ((row.cause, hits[True]), (row.isolation, hits[False])):
            assert shares[3] == pytest.approx(sum(mine) / len(mine), abs=1e-6) if mine else math.isnan(shares[3])


def test_only_prompts_that_are_answered_right_count(tasks):
    task, train = tasks
    wrong = replace(task)
    wrong.activations[ORIGINAL][:10] *= -1
    found = score_disentanglement(make(DIRECTIONS[:12]), wrong, train, ns=(4,), baselines=False)
    assert (found.n_prompts, found.n_left_out) == (N - 10, 10)
    assert found.scores[4] == 1


@unchecked()
def test_tasks_must_say_what_they_ask(tasks):
    task, train = tasks
    sae = make(DIRECTIONS[:12])
    with pytest.raises(ValueError, match="got no `asks`"):
        score_disentanglement(sae, task, replace(train, asks=()))
    with pytest.raises(ValueError, match="`asks` must have one of"):
        replace(task, asks=("taste",) * N)
    with pytest.raises(ValueError, match="A value must have one token as answer, got"):
        score_disentanglement(sae, replace(task, answers=task.answers.roll(1)), train)
    nobody = replace(task, attributes={ORIGINAL: [dict.fromkeys(KINDS, "shape0")] * N}, answers=0 * task.answers)
    with pytest.raises(ValueError, match="a source with another answer, got none of 120"):
        score_disentanglement(sae, nobody, nobody)
    with pytest.raises(ValueError, match=r"must differ from .*'supervised'"):
        score_disentanglement(sae, task, train, baselines={"supervised": sae})
