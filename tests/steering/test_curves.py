"""What steering did and what it cost: definitions, curves, what follows from them, texts side by side."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.metrics import find_frontier, mean_gain, read_cost, read_gain
from saelab.steering.baselines import mark_before, steering_baselines
from saelab.steering.curves import Measure, MeasureName, SteeringCurve
from saelab.steering.dose_response import distinct, entropy, log_mass, repetition, steering_curve
from saelab.steering.target_concepts import (
    ScoredConcept,
    TokenConcept,
    concept_from_words,
    make_concepts,
    synthetic_concept,
)
from saelab.steering.text_comparison import compare_generations
from saelab.visualization.intervention_plots import plot_dose_response, plot_tradeoff, show_curve, show_generations
from tests.pages import check_policy

HOOK = "blocks.1.hook_resid_post"
LAST = "blocks.2.hook_resid_post"
PROMPTS = ["One", "Two, three", "Four", "Five six seven"]
HOSTILE = "<script>alert(1)</script><b>$x$</b> %{x}"
TAGS = {"<br>", "<extra>", "</extra>", '<span style="font-size:12px">', "</span>"}


@pytest.fixture(scope="module")
def concept(tiny):
    return concept_from_words(tiny, "a,b,c", "letters")


@pytest.fixture(scope="module")
def up(tiny, concept):
    """The direction that the unembedding of the concept's tokens shares, at the end of the model."""
    rows = tiny.original_model.lm_head.weight.detach().float()
    return sl.Direction(rows[list(concept.ids)].mean(0) - rows.mean(0), LAST, "up")


@pytest.fixture(scope="module")
def curve(tiny, concept, up):
    """A direction that raises the concept beside a random one, at strengths of both signs and at none."""
    return steering_curve(
        tiny,
        {"up": up, "random": sl.interventions.make_random(up, seed=3)},
        concept,
        PROMPTS,
        strengths=[-0.5, 0, 0.5, 1.0],
        others={"digits": "1,2,3", "x": ["x"]},
        n=2,
        n_tokens=5,
        progress=False,
    )


def at(curve: SteeringCurve, measure: MeasureName, source: str, strength: float) -> float:
    return float(curve.values(measure)[curve.points.index((source, strength))])


# --- definitions


def test_measures_are_what_they_are_defined_as() -> None:
    log_p = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert float(log_mass(log_p, torch.tensor([0, 2])).exp()) == pytest.approx(0.625)
    assert float(entropy(log_p)) == pytest.approx(1.75 * math.log(2))
    assert float(entropy(torch.tensor([0.0, -torch.inf]))) == 0.0
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)
    assert repetition([1, 1, 1]) == 0.0 == repetition(range(20))
    assert distinct([[1, 2, 1], [2]], 1) == 0.5 and distinct([[1, 2, 1], [1, 2]], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct([[1]], 2))


def test_a_word_is_every_token_that_reads_like_it(tiny) -> None:
    found = concept_from_words(tiny, "A, b", "ab")
    assert found == TokenConcept("ab", tuple(sorted(tiny.tokenizer.convert_tokens_to_ids([*"abAB"]))))
    tales = sl.load_model("tales", progress=False)
    assert tales.tokenizer.batch_decode([[i] for i in concept_from_words(tales, ["SHE"]).ids]) == ["She", "she"]
    glad = synthetic_concept(tales, "glad")
    assert {"happy", "smiled", "joy"} <= set(tales.tokenizer.batch_decode([[i] for i in glad.ids]))
    with pytest.raises(ValueError, match="any word can stand in"):
        synthetic_concept(tales, "quote")
    with pytest.raises(ValueError, match=r"got 'gladd'; near it are .*'glad'"):
        synthetic_concept(tales, "gladd")


def test_words_of_several_tokens_are_refused_or_taken_by_their_first(tiny) -> None:
    with pytest.raises(ValueError, match=re.escape("got ['bad'] (1 of 2 are not)")):
        concept_from_words(tiny, "a,bad")
    assert concept_from_words(tiny, "bad", first_token=True).ids == (tiny.tokenizer.convert_tokens_to_ids("b"),)
    with pytest.raises(ValueError, match="at least one word"):
        concept_from_words(tiny, " ,")
    scored, known = make_concepts(tiny, {"long": len_of, "": TokenConcept("a", (67,))})
    assert isinstance(scored, ScoredConcept) and scored.name == "long" and known.name == "a"


def len_of(texts: list[str]) -> list[float]:
    return [len(text) / 100 for text in texts]


# --- the curve


def test_numbers_are_those_of_the_models_own_predictions(tiny, concept, curve, up) -> None:
    """One source and strength, computed another way: forward by forward, text by text."""
    made = sl.generate(tiny, PROMPTS, 5, n=2, progress=False)
    others = [torch.tensor(one.ids) for one in make_concepts(tiny, {"digits": "1,2,3", "x": "x"})]
    terms: dict[str, list] = {name: [] for name in ("lift", "selectivity", "kl", "prompt_kl", "p", "q")}
    for sample in made:
        ids, start = torch.tensor([sample.all_ids]), len(sample.prompt_ids)
        p = sl.lm.logits(tiny, ids)[0].double().log_softmax(1)
        with sl.steer(tiny, up, 1.0, unit="norm"):
            q = sl.lm.logits(tiny, ids)[0].double().log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        terms["kl"] += kl[start - 1 : -1].tolist()
        terms["prompt_kl"] += kl[1:start].tolist()  # nothing is steered at BOS, and it does not count
        p, q = (x[start - 1 : -1].exp() for x in (p, q))
        lift, *rest = [(q[:, one].sum(1) / p[:, one].sum(1)).log() for one in (list(concept.ids), *others)]
        terms["lift"] += lift.tolist()
        terms["selectivity"] += (lift - sum(rest) / 2).tolist()
        for name, x in (("p", p), ("q", q)):
            terms[name] += x[:, list(concept.ids)].sum(1).tolist()
    means = {name: float(np.mean(values)) for name, values in terms.items()}
    for name in ("lift", "selectivity", "kl", "prompt_kl"):
        assert at(curve, name, "up", 1.0) == pytest.approx(means[name], rel=1e-3)
    assert at(curve, "gain", "up", 1.0) == pytest.approx(math.log(means["q"] / means["p"]), rel=1e-3)
    with sl.steer(tiny, up, 1.0, unit="norm"):
        steered = sl.generate(tiny, PROMPTS, 5, n=2, progress=False)
    words = [i for sample in steered for i in sample.ids if i > 2]
    assert at(curve, "rate", "up", 1.0) == pytest.approx(np.mean([i in concept.ids for i in words]))
    nll = []
    for sample in steered:
        loss = sl.lm.next_token_loss(sl.lm.logits(tiny, torch.tensor([sample.all_ids])), torch.tensor([sample.all_ids]))
        nll += loss[0, len(sample.prompt_ids) - 1 :].tolist()
    assert at(curve, "nll", "up", 1.0) == pytest.approx(np.mean(nll), rel=1e-4)
    assert at(curve, "perplexity", "unsteered", 0.0) == pytest.approx(math.exp(curve.values("nll")[0]))


def test_what_raises_a_concept_beats_a_random_direction(curve) -> None:
    measures: tuple[MeasureName, ...] = ("lift", "selectivity", "gain")
    for measure in measures:
        values = [at(curve, measure, "up", s) for s in (-0.5, 0.0, 0.5, 1.0)]
        assert values == sorted(values) and values[1] == 0.0
        assert values[2] > 3 * abs(at(curve, measure, "random", 0.5))
    kl = curve.common_kl()
    assert curve.along("up").at_kl(kl).value > curve.along("up").at_kl(kl).low > curve.along("random").at_kl(kl).high
    assert curve.along("up", side=-1).at_kl(curve.common_kl(-1)).value < 0
    assert (
        curve.along("up").area().value > 3 * curve.along("random").area().value
        and curve.along("up", side=-1).area().value < 0
    )
    assert {source for source, _ in curve.frontier()} == {"up"}


def test_strength_zero_is_the_unsteered_model_to_the_last_bit(curve) -> None:
    for source in ("up", "random"):
        i = curve.points.index((source, 0.0))
        for name in ("lift", "selectivity", "kl", "prompt_lift", "prompt_kl"):
            assert (curve.cells[name][i] == 0).all()
        assert all((cells[i] == cells[0]).all() for cells in (*curve.cells.values(), *curve.diversity.values()))


def test_batches_do_not_change_what_is_measured(tiny, concept, curve, up) -> None:
    how: dict[str, Any] = {"strengths": [1.0], "others": {"digits": "1,2,3", "x": "x"}, "n": 2, "n_tokens": 5}
    small = steering_curve(tiny, {"up": up}, concept, PROMPTS, batch_size=3, progress=False, **how)
    i = curve.points.index(("up", 1.0))
    for name, cells in small.cells.items():
        assert np.allclose(cells[1], curve.cells[name][i], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_places_are_those_of_generation(tiny, concept, up, where) -> None:
    """Texts are read as they were written: what is steered behind the prompt leaves the prompt as it is."""
    found = steering_curve(
        tiny, {"up": up}, concept, PROMPTS[:2], strengths=[1.0], where=where, n=1, n_tokens=3, progress=False
    )
    kl = {name: found.cells[name][1] for name in ("kl", "prompt_kl")}
    assert (kl["prompt_kl"] > 0).all() == (where == "prompt") and (kl["kl"] > 0).all()
    assert (kl["prompt_kl"] == 0).all() == (where == "generated")


def test_sources_of_every_kind_stand_on_the_same_axes(tiny, concept, up) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=8, activation=sl.TopK(k=2), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_dec[5] = up.vector
    intervention = sl.Intervention(up, 2.0, unit="norm")
    sources: dict[str, Any] = {
        "intervention": intervention,
        "two": [sl.Intervention(up, 1.0, unit="norm")] * 2,
        "sae": sl.Intervention(sae, {5: 2.0}, unit="norm", hook_point=LAST),
        "block": lambda s: sl.steer(tiny, up, 2 * s, unit="norm"),
    }
    found = steering_curve(tiny, sources, concept, "One", strengths=[0.25], n=1, n_tokens=3, progress=False)
    lifts = found.values("lift")[1:]
    assert lifts[0] == lifts[3] == pytest.approx(lifts[2], rel=1e-4) and lifts[0] > 0.01
    assert lifts[1] == pytest.approx(lifts[0], rel=0.1)  # the second reads what the first left, a little longer
    assert found.sources["sae"].startswith("feature 5 +2 (add, norm)") and found.sources["block"]
    scaled = sl.Intervention(up, 1.0, mode="scale")
    found = steering_curve(tiny, {"x": scaled}, concept, "One", strengths=[1, 0, 3], n=1, n_tokens=2, progress=False)
    assert found.along("x", 1).points == [1, 3] and found.along("x", -1).points == [1, 2] and found.values("kl")[1] == 0


def test_a_scorer_is_an_effect_too(tiny, up) -> None:
    found = steering_curve(
        tiny, {"up": up}, ScoredConcept("length", len_of), PROMPTS[:2], strengths=[2.0], n=1, n_tokens=4, progress=False
    )
    steered = [len(sample.text) / 100 for sample in _steered(tiny, up)]
    assert found.effect == Measure("score", extra=True) and at(found, "score", "up", 2.0) == pytest.approx(
        np.mean(steered)
    )
    assert Measure("lift") not in found.measures and "length" in str(found) and "score" in str(found)
    with pytest.raises(ValueError, match=r"'broken' returned 2 numbers or one that is not finite"):
        broken = ScoredConcept("broken", lambda texts: [math.nan for _ in texts])
        steering_curve(tiny, {"up": up}, broken, PROMPTS[:2], strengths=[1], n=1, n_tokens=2, progress=False)


def _steered(tiny, up) -> Sequence[sl.lm.Generated]:
    with sl.steer(tiny, up, 2.0, unit="norm"):
        return list(sl.generate(tiny, PROMPTS[:2], 4, progress=False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": {}}, "must name at least one"),
        ({"sources": {"unsteered": 0}}, "none of them 'unsteered'"),
        ({"mode": "ablate"}, "curve needs strengths"),
        ({"mode": "scale", "strengths": None}, "`strengths` must be given for 'up'"),
        ({"unit": "raw", "strengths": None}, "`strengths` must be given for 'up'"),
        ({"unit": "max"}, "need a direction with a `peak`"),
        ({"concept": len_of, "others": {"x": "x"}}, "concepts of tokens"),
        ({"n_tokens": 300}, "must fit the model's context"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, concept, up, change, said) -> None:
    given = {"sources": {"up": up}, "concept": concept, "prompts": "One", "strengths": [1.0], "progress": False}
    given |= change
    if given["sources"] == {"unsteered": 0}:
        given["sources"] = {"unsteered": up}
    with pytest.raises(ValueError, match=said):
        steering_curve(tiny, **given)


# --- what follows from a curve


def planted(gain: Sequence[float], kl: Sequence[float], n_prompts: int = 4, nll: Sequence[float] = ()) -> SteeringCurve:
    """Of one source with strengths 1, 2, ...: on every prompt the same, ten tokens each."""
    ones = np.ones((len(gain) + 1, n_prompts, 1))

    def fill(values: Sequence[float]) -> np.ndarray:
        return ones * np.array([0.0, *values])[:, None, None]

    counts = dict.fromkeys(("n_text", "n_prompt", "n_written", "n_words"), 10 * ones) | {"n_texts": ones}
    sums = {"lift": 10 * fill(gain), "kl": 10 * fill(kl), "mass": 0.1 * np.exp(fill(gain)) * 10}
    sums |= {"nll": 10 * fill(nll or [0.0] * len(gain)), "repetition": fill([0.0] * len(gain)), "hits": fill(gain)}
    return SteeringCurve(
        concept="planted", others=(), sources={"s": "planted"}, neutral={"s": 0.0}, cells=counts | sums,
        points=(("unsteered", 0.0), *(("s", float(i + 1)) for i in range(len(gain)))), seed=0,
        diversity={"distinct_1": ones[:, 0] / 2}, prompts=("p",) * n_prompts, n=1, n_tokens=10, temperature=1.0,
    )  # fmt: skip


def test_frontiers() -> None:
    gain, cost = np.array([1.0, 3.0, 2.0, np.nan, 3.0]), np.array([0.1, 0.4, 0.5, 0.0, 0.3])
    assert find_frontier(gain, cost).tolist() == [0, 4]
    pair = np.array([[1.0, 1.0], [3.0, 0.5]]), np.array([[0.1, 0.1], [0.4, 0.05]])  # two draws
    assert read_gain(*pair, 0.1).tolist() == [1.0, 1.0] and np.isnan(read_gain(*pair, 0.2)).tolist() == [False, True]
    grows, quadratic = np.array([[1.0], [2.0], [4.0]]), np.array([[0.01], [0.04], [0.16]])
    assert read_gain(grows, quadratic, 0.09) == pytest.approx(3.0)  # exact: the gain grows with the strength
    assert read_cost(grows, quadratic, 3.0) == pytest.approx(0.09) and np.isnan(read_cost(grows, quadratic, 5.0))
    assert mean_gain(grows, quadratic, 0.16) == pytest.approx(4 * 2 / 3, rel=0.05)
    assert mean_gain(-grows, quadratic, 0.2) == 0.0
    back = np.array([[2.0], [1.0]])  # a curve that falls again keeps the best that it had
    assert mean_gain(back, quadratic[:2], 4.0) == pytest.approx(2.0, rel=0.02)


def test_matched_kl_is_interpolated_or_says_why_not() -> None:
    curve = planted([1.0, 2.0], [0.01, 0.04])
    found = curve.along("s").at_kl(0.0225, measure="lift")
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert curve.along("s").kl_at(1.5).value == pytest.approx(0.0225)
    beyond = curve.along("s").at_kl(0.05)
    assert math.isnan(beyond.value) and "do not reach 0.05: KL up to 0.04" in beyond.reason and str(beyond) == "-"
    assert curve.common_kl() == 0.02 and curve.sides == (1,)
    assert curve.along("s", side=-1).at_kl(0.01).reason == "no strength on this side"
    with pytest.raises(ValueError, match=r"one of \['s'\]"):
        curve.along("t").at_kl(0.01)
    assert np.array_equal(curve.values(Measure("nll", extra=True)), curve.values("nll") - curve.values("nll")[0])
    with unchecked(), pytest.raises(ValueError, match="must be one of"):
        Measure("joy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'gain' and 'mass'"):
        Measure("lift", concept="joy")
    with pytest.raises(ValueError, match="got 'gain joy'"):
        curve.values(Measure("gain", concept="joy"))


def test_the_best_strength_is_chosen_on_other_prompts_than_it_is_judged_on() -> None:
    curve = planted([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], nll=[0.0, 0.1, 3.0])
    best = curve.along("s").best()
    effect, fluency = 1 - math.exp(-2), math.exp(-0.1)
    assert best.strength == 2 and best.score == pytest.approx(2 / (1 / effect + 1 / fluency))
    assert (best.effect, best.fluency) == pytest.approx((effect, fluency)) and best.chosen_score == best.score
    curve.cells["nll"][2, 1::2] = 30  # where it is judged, not where it is chosen
    assert curve.along("s").best().strength == 2 and curve.along("s").best().fluency == pytest.approx(math.exp(-3))
    curve.cells["nll"][2, ::2] = 30
    assert curve.along("s").best().strength == 1
    curve.cells["repetition"][1] = 1.0  # a loop is likely text, and worth nothing
    assert curve.along("s").best().strength != 1
    assert "two prompts" in planted([1.0], [0.1], n_prompts=1).along("s").best().reason
    assert "no strength has an effect" in planted([-1.0], [0.1]).along("s").best().reason


def test_intervals_come_from_prompts() -> None:
    curve = planted([1.0], [0.1], n_prompts=8)
    assert curve.estimate("lift")[1].low == curve.estimate("lift")[1].high == 1
    curve.cells["lift"][1, :4] = 30.0
    wide = curve.estimate("lift")[1]
    assert wide.value == 2 and 1 <= wide.low < 1.8 and 2.2 < wide.high <= 3
    assert math.isnan(planted([1.0], [0.1], n_prompts=1).estimate("lift")[1].low)


def test_a_curve_prints_and_saves_itself(curve, tmp_path) -> None:
    said = str(curve)
    assert "letters against digits, x" in said and "upwards, KL" in said and "random" in said
    curve.save(tmp_path / "curve.json")
    saved = sl.stores.files.read_json(tmp_path / "curve.json")
    assert len(saved["rows"]) == len(curve.points) and saved["rows"][3]["lift"]["value"] == curve.values("lift")[3]
    assert {row["source"] for row in saved["summary"]} == {"up", "random"} and saved["temperature"] == 1


# --- baselines


def test_a_feature_stands_beside_its_rivals(tiny, tmp_path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=8)), seed=0)
    tokens = sl.tokenize(tiny, ["a tin can, a bin, a pan"] * 9, ctx_len=24)
    store = sl.harvest(sae, tiny, tokens, tmp_path, hook_point=HOOK, progress=False)
    concept = concept_from_words(tiny, "n")
    before, x = mark_before(tokens, concept), sl.lm.capture(tiny, tokens.ids, [HOOK])[HOOK]
    assert tokens.ids[:, 1:][before[:, :-1]].unique().tolist() == list(concept.ids)[1:]
    ends = sl.Tokens(ids=torch.tensor([[5, 9, 5]]).int(), doc_ids=torch.tensor([[0, 0, 1]]).int())
    assert mark_before(ends, TokenConcept("five", (5,))).tolist() == [[False] * 3]  # not in the next document or row
    round_ = sl.Tokens(ids=torch.tensor([[5, 9]]).int(), doc_ids=torch.tensor([[0, 0]]).int())
    assert not mark_before(round_, TokenConcept("five", (5,))).any()
    feature = int(store.statistics.fires.sum(1).argmax())
    for unit, given in (("norm", None), ("raw", None), ("max", store)):
        found = steering_baselines(tiny, sae, feature, concept, tokens, unit=unit, store=given, hook_point=HOOK)
        assert list(found)[:4] == [f"feature {feature}", "means", "probe", "random"] and len(found) == 4 + (
            unit == "max"
        )
        lengths = [(one.change(x[0], x[0]) - x[0]).norm(dim=1) for one in list(found.values())[:4]]
        assert all(torch.allclose(length, lengths[0], rtol=1e-4) for length in lengths)
        means, own = found["means"].source, found[f"feature {feature}"]
        z = sae.encode(x)[..., feature].detach()
        for up in (means.encode(x)[..., 0], z * own.strengths[feature]):  # both grow where the concept comes next
            assert up[before].mean() > up[~before & (tokens.ids > 2)].mean()
    several = steering_baselines(tiny, sae, feature, concept, tokens, n_random=3, hook_point=HOOK)
    drawn = torch.stack([several[name].source.vector for name in ("random", "random 2", "random 3")])
    assert torch.linalg.matrix_rank(drawn) == 3 and torch.equal(drawn[0], found["random"].source.vector)
    with pytest.raises(ValueError, match="`n_random` must be at least 1, got 0"):
        steering_baselines(tiny, sae, feature, concept, tokens, n_random=0, hook_point=HOOK)
    with pytest.raises(ValueError, match="Directions need 10 tokens before words of the concept, got 0"):
        steering_baselines(tiny, sae, 3, concept_from_words(tiny, "z"), tokens, hook_point=HOOK)


# --- texts


def test_texts_side_by_side_know_what_both_models_think(tiny, up) -> None:
    found = compare_generations(
        tiny, sl.Intervention(up, 1.0, unit="norm"), PROMPTS[:2], 6, n=2, seed=4, progress=False
    )
    plain = sl.generate(tiny, PROMPTS[:2], 6, n=2, seed=4, progress=False)
    with sl.steer(tiny, up, 1.0, unit="norm"):
        steered = sl.generate(tiny, PROMPTS[:2], 6, n=2, seed=4, progress=False)
    assert len(found) == 4
    for row, before, after in zip(found.rows, plain, steered, strict=True):
        told = row.steered["steered"]
        assert row.prompt == before.prompt and row.unsteered.text == before.text and told.text == after.text
        assert row.unsteered.log_probs["unsteered"] == pytest.approx(before.log_probs, abs=1e-4)
        assert told.log_probs["steered"] == pytest.approx(after.log_probs, abs=1e-4)
        assert told.perplexity("steered") == pytest.approx(math.exp(-np.mean(after.log_probs)), rel=1e-3)
        assert len(told.words) == len(after.ids) and row.kl["steered"] > 0
    assert found.interventions == {"steered": f"up +1 (add, norm) at {LAST}, all tokens"}
    assert "perplexity" in str(found) and found.to_dict()["rows"][0]["prompt"] == "One"
    both = {"up": sl.Intervention(up, 1.0), "none": [sl.Intervention(up, 0.0)]}
    [row] = compare_generations(tiny, both, "One", 4, progress=False).rows
    assert set(row.unsteered.log_probs) == {"unsteered", "up", "none"} and row.kl["none"] == 0.0
    assert row.steered["none"].log_probs["none"] == row.unsteered.log_probs["unsteered"]
    with pytest.raises(ValueError, match="names other than 'unsteered'"):
        compare_generations(tiny, {"unsteered": sl.Intervention(up, 1.0)}, "One", 2)


# --- pictures


def strings(thing: Any) -> list[str]:
    """Every string in a figure's JSON."""
    if isinstance(thing, dict):
        return [s for key, value in thing.items() if key != "template" for s in strings(value)]
    if isinstance(thing, list | tuple):
        return [s for value in thing for s in strings(value)]
    return [thing] if isinstance(thing, str) else []


def test_figures_show_what_was_measured(curve) -> None:
    figure = plot_dose_response(curve)
    line = next(trace for trace in figure.data if trace.name == "up")
    mine = [i for i, (name, _) in enumerate(curve.points) if name == "up"]
    assert line.x.tolist() == [-0.5, 0.0, 0.5, 1.0] and np.array_equal(line.y, curve.values("gain")[mine])
    assert {axis.title.text for axis in figure.select_yaxes()} >= {"gain of the concept, nats"}
    kls = [trace for trace in figure.data if trace.yaxis == "y3" and trace.name == "up"]
    assert figure.layout.yaxis3.type == "log" and 0.0 not in kls[0].x
    figure = plot_tradeoff(curve, "lift")
    lines = [trace for trace in figure.data if trace.name == "up"]
    assert [list(trace.customdata) for trace in lines] == [["+0.5", "+1"], ["-0.5"]]
    assert np.array_equal(lines[0].x, curve.values("kl")[mine][2:]) and lines[1].y[0] < 0
    assert (
        len(plot_dose_response(curve, ["rate", Measure("nll", extra=True), Measure("gain", concept="digits")]).data)
        == 2 * 2 * 3
    )


def test_nobodys_text_becomes_markup(tiny, up) -> None:
    bad = sl.Direction(up.vector, LAST, HOSTILE)
    found = steering_curve(
        tiny, {HOSTILE: bad}, TokenConcept(HOSTILE, (67,)), PROMPTS[:2], strengths=[1.0, -1.0], n=1, n_tokens=2,
        others={"": TokenConcept(HOSTILE + "2", (68,))}, progress=False,
    )  # fmt: skip
    for figure in (plot_dose_response(found, ["gain", Measure("gain", concept=f"{HOSTILE}2")]), plot_tradeoff(found)):
        said = strings(figure.to_plotly_json())
        assert {tag for s in said for tag in re.findall(r"<[^<>]*>", s)} <= TAGS
        assert not any("alert" in (trace.hovertemplate or "") for trace in figure.data)
    check_policy(show_curve(found, HOSTILE))  # its figures are drawn: their scripts may run
    for html in (show_curve(found, HOSTILE), found._repr_html_()):
        assert "<script>alert" not in html and "&lt;script&gt;" in html and "<b>$x$" not in html
    made = compare_generations(tiny, {HOSTILE: sl.Intervention(bad, 1.0)}, [HOSTILE], 3, progress=False)
    html = made._repr_html_()
    check_policy(show_generations(made))
    for page in (html, show_generations(made)):
        assert "<script>alert" not in page and page.count("&lt;script&gt;") >= 3 and "<b>$x$" not in page
    rows = made.rows[0].steered[HOSTILE]
    assert html.count("<b ") == len(rows.words) + len(made.rows[0].unsteered.words)
