"""Nulls beside effects on a running model and scores of concepts: data made to tempt them, and truth planted in it.

A verdict at level 5 % over 24 draws is false at most five times but in one of a thousand runs (binomial).
"""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.stats import binom

import saelab as sl
from saelab.evaluation.concepts import score_concepts
from saelab.functional.metrics import mean_gain
from saelab.interventions.attribution import Attribution
from saelab.lm.token_labels import Concept, TokenLabels
from saelab.steering.curves import SteeringCurve
from saelab.steering.feature_scores import output_scores

N_DRAWN = 24
MOST = int(binom.ppf(0.999, N_DRAWN, 0.05))
POINT = "blocks.1.hook_resid_post"


# --- steering curves


def curve(seed: int, n_prompts: int, effect: float = 0.0) -> SteeringCurve:
    """Six strengths, each of which raises or lowers the concept by luck on every prompt, and by `effect` times it."""
    rng, n, tokens = np.random.default_rng(seed), 3, 40.0
    strengths = [-1.0, -0.5, -0.25, 0.25, 0.5, 1.0]
    ones = np.ones((len(strengths) + 1, n_prompts, n))
    s = np.array([0.0, *strengths])[:, None, None]
    luck = 0.5 * np.abs(s) * rng.standard_normal((len(ones), n_prompts, 1)) + 0.1 * rng.standard_normal(ones.shape)
    mass = rng.gamma(2.0, 0.02, (1, n_prompts, 1)) * np.exp(np.where(s == 0, 0, luck - 0.125 * s**2) + effect * s)
    kl = s**2 * rng.gamma(20.0, 0.05, ones.shape)
    sums = {"mass": mass, "kl": kl, "lift": luck, "nll": 2 * ones, "repetition": 0 * ones, "hits": mass, "held": ones}
    counts = dict.fromkeys(("n_text", "n_prompt", "n_written", "n_words"), tokens * ones) | {"n_texts": ones}
    return SteeringCurve(
        concept="c", others=(), sources={"s": "s"}, neutral={"s": 0.0}, seed=0, n=n, n_tokens=40, temperature=1.0,
        points=(("unsteered", 0.0), *(("s", x) for x in strengths)),
        cells=counts | {name: tokens * x for name, x in sums.items()},
        diversity={"distinct_1": ones[:, 0]}, prompts=tuple(map(str, range(n_prompts))),
    )  # fmt: skip


def misses(found) -> bool:
    return found.low > 0 or found.high < 0


def test_few_prompts_claim_no_effect_of_steering() -> None:
    """What differs among four prompts by luck; quantiles of draws call that an effect, so does the best strength."""
    curves = [curve(seed, 4) for seed in range(N_DRAWN)]
    point = curves[0].along("s").points[-1]
    ends = [np.quantile(curve(seed, 2).draws("gain")[point], [0.025, 0.975]) for seed in range(N_DRAWN)]
    assert sum(low > 0 or high < 0 for low, high in ends) > 2  # what tempts: half of two prompts, here with 1 - 2e-5
    lines = [[one.values(name)[one.along("s").points, None] for name in ("gain", "kl")] for one in curves]
    best_of_all = [float(mean_gain(gain, kl, 0.5)[0]) for gain, kl in lines]
    assert np.mean(best_of_all) > 4 * np.std(best_of_all) / N_DRAWN**0.5  # and so does this
    for side in (1, -1):
        areas = [one.along("s", side).area(max_kl=0.5) for one in curves]
        assert abs(np.mean([one.value for one in areas])) < 4 * np.std([one.value for one in areas]) / N_DRAWN**0.5
        told = {
            "gain": [one.estimate("gain")[point] for one in curves],
            "at a KL": [one.along("s", side).at_kl(0.2) for one in curves],
            "area": areas,
        }
        assert {name: sum(map(misses, found)) <= MOST for name, found in told.items()} == dict.fromkeys(told, True)
        assert sum(one.along("s", side).best().effect_low > 0 for one in curves) <= MOST
    for n_prompts in (2, 3):
        found = [curve(seed, n_prompts) for seed in range(N_DRAWN)]
        assert sum(misses(one.estimate("gain")[point]) for one in found) <= MOST
        areas = [one.along("s").area() for one in found]
        assert all(np.isnan(one.low) and one.value == one.value for one in areas)


def test_a_planted_effect_of_steering_is_claimed() -> None:
    """An effect of two nats at strength 1, four spreads of a prompt, on sixteen prompts."""
    for seed in range(5):
        one = curve(seed, 16, effect=2.0)
        up, down = one.along("s"), one.along("s", -1)
        assert one.estimate("gain")[up.points[-1]].low > 0 and up.at_kl(0.2).low > 0
        assert up.area().low > 0 and down.area().high < 0 and up.best().effect_low > 0


# --- concept scores


def stories(seed: int, real: bool = False):
    """Concepts of whole stories, and of every third token; codes that are matters of other stories, or as periodic."""
    rng, n_stories, length = np.random.default_rng(seed), 24, 60
    ids = np.repeat(np.arange(n_stories), length)
    n, often = len(ids), rng.permutation(n_stories) % 2 == 0
    truth = np.zeros((n, 4), bool)
    truth[:, 0] = np.isin(ids, rng.permutation(n_stories)[: n_stories // 3])
    truth[:, 1], truth[:, 2], truth[:, 3] = often[ids], ~often[ids], np.arange(n) % 3 == 0
    topics = rng.random((n_stories, 40)) < 0.25
    codes = topics[ids] * rng.gamma(4, 0.25, (n, 40)) * (rng.random((n, 40)) < 0.7)
    side = often if real else rng.random(n_stories) < 0.5
    codes[:, 5] = (np.arange(n) % 3 == 1) * rng.gamma(4, 0.25, n)
    codes[:, 6] = np.where(side[ids], 1, -1) * rng.gamma(4, 0.25, n)
    if real:
        codes[:, :4] = truth * rng.gamma(4, 0.25, (n, 4))
    pole = {"often": "seldom", "seldom": "often"}
    table = [Concept(name, "fact", opposite=pole.get(name)) for name in ("topic", "often", "seldom", "beat")]
    return csr_matrix(codes), TokenLabels.of(csr_matrix(truth), table, ids)


def test_the_best_of_many_features_knows_nothing_of_other_stories() -> None:
    """Stories are few, and so one feature of forty goes with any concept of whole stories in some of them."""
    found = [score_concepts(*stories(seed), seed=seed) for seed in range(N_DRAWN)]
    rows = [row for one in found for row in one.concepts]
    assert np.nanmean([row.f1_train for row in rows]) > 0.4  # what tempts
    assert np.nanmean([one.reconstruction for one in found]) > 0.2  # and so does this
    for c in range(4):
        assert sum(one.concepts[c].kappa_low > 0 for one in found) <= MOST
    for name in ("coverage", "auroc", "reconstruction"):
        value, moved = (np.array([getattr(one, name) for one in some]) for some in (found, [x.moved for x in found]))
        difference = value - moved
        assert abs(np.nanmean(difference)) < 4 * np.nanstd(difference) / N_DRAWN**0.5, name
    pairs = [(one.n_opposed_on_two_sides, one.moved.n_opposed_on_two_sides) for one in found]
    both = np.sum(pairs, 0)  # discordant draws fall on either side alike
    assert abs(both[0] - both[1]) <= 4 * max(1, sum(a != b for a, b in pairs)) ** 0.5


def test_planted_features_are_far_above_moved_labels() -> None:
    for seed in range(5):
        found = score_concepts(*stories(seed, real=True), seed=seed)
        assert found.coverage == 1 and found.coverage - found.moved.coverage > 0.3
        assert all(row.kappa == 1 and row.kappa_low > 0.99 for row in found.scored)
        assert found.n_opposed_on_two_sides == 1 and found.moved.moved is None and "labels moved" in str(found)


# --- what amplified features say


def amplify(tiny, tokens, folder, seed: int, change=None, **how):
    """Scores of a dictionary whose directions have nothing to do with what makes its features fire."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=4), normalizer="none"), seed=seed)
    drawn = torch.randn(40, 32, generator=torch.Generator().manual_seed(100 + seed))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(drawn if change is None else change(drawn), dim=1))
    store = sl.harvest(sae, tiny, tokens, folder / str(seed), hook_point=POINT, progress=False)
    return output_scores(tiny, sae, store, prompts="The", hook_point=POINT, seed=seed, **how)


def test_scores_of_steering_stand_beside_what_any_direction_says(tiny, tiny_tokens, tmp_path) -> None:
    """Directions that all push one way make the model say one thing, which all of them promote; and long lists of
    promoted tokens hold what is frequent."""
    hub = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(7)), dim=0)
    alike = amplify(
        tiny, tiny_tokens[:8], tmp_path / "hub", 0, lambda rows: rows / 8 + 3 * hub, strength=300.0, n_top=130
    )
    scores = {
        name: np.array([getattr(row, name) for row in alike.rows])
        for name in ("output", "output_chance", "input", "input_chance")
    }
    assert scores["input"].mean() > 0.2 and scores["output"].mean() > 3 / tiny.cfg.d_vocab  # what tempts
    for name in ("input", "output"):
        difference = scores[name] - scores[f"{name}_chance"]
        assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5 + 0.01, name


def test_a_share_of_random_directions_says_what_it_promotes(tiny, tiny_tokens, tmp_path) -> None:
    """Any long step makes the model say what it promotes: a share of .05 of sides is above random ones, no more."""
    found = [amplify(tiny, tiny_tokens[:8], tmp_path, seed, strength=100.0, n_top=5) for seed in range(5)]
    outputs = np.concatenate([[row.output for row in one.rows] for one in found])
    assert np.mean(outputs) > 3 / tiny.cfg.d_vocab  # what tempts
    # a share among n sides of what a quantile of 32 says, five times
    n = min(len(one.rows) for one in found)
    spread = (0.05 * 0.95 * (1 / n + 1 / 32) / 5) ** 0.5
    assert np.mean([one.above_random_frac for one in found]) < 0.05 + 4 * spread


# --- attribution


def attributed(seed: int, exact_too: bool) -> Attribution:
    """Three features at each of twelve tokens, which differ in how much they matter; estimates know only that."""
    rng, positions = np.random.default_rng(seed), np.repeat(np.arange(12), 3)
    exact = (rng.standard_normal(36) + 0.7 * positions).astype(np.float32)
    effects = (exact if exact_too else rng.standard_normal(36) + 0.7 * positions).astype(np.float32)
    ones = np.ones(36, np.float32)
    return Attribution(
        hook_point=POINT, metric="m", method="gradient", baseline="zero", n_steps=0, clean=0.0, patched=1.0,
        tokens=("t",) * 12, positions=positions, features=np.arange(36), codes=ones, sizes=ones, effects=effects,
        errors=np.zeros(12, np.float32), exact=exact,
    )  # fmt: skip


def test_estimates_that_know_only_the_token_agree_with_no_effect() -> None:
    """Correlations and shares of the largest are high where tokens differ, and above their null in 5 % of draws."""
    found = [attributed(seed, False).agreement for seed in range(N_DRAWN)]
    assert np.mean([one.spearman for one in found]) > 0.7 and np.mean([one.top for one in found]) > 0.5  # what tempts
    assert sum(one.spearman > one.shuffled_95 for one in found) <= MOST
    difference = np.array([one.top - one.top_shuffled for one in found])
    assert abs(difference.mean()) < 4 * difference.std() / N_DRAWN**0.5
    real = attributed(0, True).agreement
    assert real.spearman > real.shuffled_95 and real.top == 1 > real.top_shuffled


# --- patching


def test_patches_of_what_does_not_differ_restore_nothing(tiny) -> None:
    """A prompt that differs from the fourth token on, random directions, and the direction in which the runs differ."""
    clean, corrupt, metric = "I see Ann", "I see Tom", ("A", "T")
    ids = [sl.tokenize(tiny, [text], 32, packed=False, separator=None) for text in (clean, corrupt)]
    ours, theirs = (sl.lm.capture(tiny, one.ids[:, : one.n_tokens], [POINT])[POINT][0] for one in ids)
    first = int((ours - theirs).abs().sum(1).nonzero()[0])
    step = (ours - theirs)[-1]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(32, generator=generator) for _ in range(24)]
    sources = [sl.Direction(step, POINT, "difference"), *(sl.Direction(v, POINT, "random") for v in drawn)]
    found = sl.interventions.patch(tiny, clean, corrupt, metric, sources=sources)
    assert first > 3 and (found.scores[:, :first] == 0).all()
    alone = sl.interventions.patch(tiny, clean, corrupt, metric, sources=sources, positions=[-1]).scores[:, 0]
    whole = float(sl.interventions.patch(tiny, clean, corrupt, metric, sources=POINT, positions=[-1]).scores[0, 0])
    assert alone[0] == pytest.approx(whole, rel=1e-3)
    # a random direction carries a share v (v . step) of the change: 1 / 32 on average
    assert abs(alone[1:].mean() - whole / 32) < 4 * alone[1:].std() / len(drawn) ** 0.5
    across = torch.linalg.qr(torch.stack([step, *drawn[:5]], 1)).Q[:, 1:].T
    none = sl.interventions.patch(
        tiny, clean, corrupt, metric, sources=[sl.Direction(v, POINT) for v in across], positions=[-1]
    )
    assert np.abs(none.scores).max() < 1e-2 * abs(whole)


# --- a concept taken out


def test_a_label_of_whole_documents_is_not_read_off_other_documents() -> None:
    """Tokens of a document go together, and so a probe fits a random label of documents; held-out ones stay at .5."""
    model, generator = sl.lm.tiny_model(seed=3), torch.Generator().manual_seed(0)
    own = torch.randint(3, 250, (24, 4), generator=generator)  # each document has words of its own
    ids = own.gather(1, torch.randint(4, (24, 16), generator=generator)).int()
    doc_ids = torch.arange(24, dtype=torch.int32)[:, None].expand(-1, 16).contiguous()
    tokens = sl.Tokens(ids=ids, doc_ids=doc_ids, special_ids=(0, 1, 2), source="words", bos=False, packed=False)
    how = {"hook_point": "blocks.0.hook_resid_pre", "read_at": "blocks.0.hook_resid_pre", "methods": ["means"]}
    aurocs = []
    for seed in range(20):
        which = torch.randperm(24, generator=generator) < 12
        labels = {"label": which[:, None].expand(-1, 16).clone()}
        found = sl.probing.erase_concept(model, tokens, labels, "label", n_random=0, seed=seed, **how)
        aurocs.append(found["untouched"].concept.auroc)
    assert abs(np.mean(aurocs) - 0.5) < 4 * np.std(aurocs) / 20**0.5
