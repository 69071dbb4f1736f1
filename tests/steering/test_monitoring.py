"""Levels of traits by token and message, held against the formula."""

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.lm.models import tiny_model
from saelab.steering.dialogues import converse
from saelab.steering.monitoring import monitor
from saelab.steering.traits import trait_vector

PAIRS = [("I am glad", "I am sad"), ("so glad", "so sad"), ("glad again", "sad again")]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and messages|length == 1 %}"
    "{{ raise_exception('no user') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def trait(tiny):
    return trait_vector(tiny, PAIRS, name="glad", progress=False)


def test_levels_are_those_of_the_formula(tiny, trait) -> None:
    found = monitor(tiny, "I am glad", trait)
    ids = torch.tensor([tiny.tokenizer("I am glad")["input_ids"]])
    x = sl.lm.capture(tiny, ids, [trait.hook_point])[trait.hook_point][0].numpy()
    v = trait.vector()
    np.testing.assert_allclose(found.levels[0], (x - trait.negative[trait.hook_point]) @ v / (v @ v), atol=1e-4)
    [row] = found.rows
    assert found.kept.tolist() == [False] + [True] * 9 and row.n_tokens == 9 and (row.start, row.stop) == (0, 10)
    assert row.levels["glad"] == pytest.approx(found.levels[0, 1:].mean())
    assert row.last["glad"] == pytest.approx(found.levels[0, -1])
    assert "".join(found.tokens[1:]) == "I am glad"
    drawn = trait.draw_exchanged(200, 0).numpy()
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(v), rtol=1e-5)
    middle = (trait.positive[trait.hook_point] + trait.negative[trait.hook_point]) / 2
    by_chance = 0.5 + (x[1:] - middle) @ drawn.T / (v @ v)
    np.testing.assert_allclose(row.chance["glad"], np.quantile(by_chance.mean(0), [0.025, 0.975]), atol=1e-4)


def test_a_trait_of_nothing_is_seldom_outside_of_chance(tiny) -> None:
    """Pairs drawn from one pool, text of the same pool: exchanging their ends changes nothing in distribution."""
    rng, words = np.random.default_rng(0), list("abcdefghijklmnop")
    outside = []
    for _ in range(12):
        texts = ["".join(rng.choice(words, 12)) for _ in range(17)]
        pairs = list(zip(texts[:8], texts[8:16], strict=True))
        own = trait_vector(tiny, pairs, hook_points=["blocks.1.hook_resid_post"], progress=False)
        [row] = monitor(tiny, texts[16], own).rows
        low, high = row.chance["trait"]
        outside.append(not low <= row.levels["trait"] <= high)
    from scipy.stats import binom

    assert sum(outside) <= binom.ppf(0.9999, len(outside), 0.08), "0.05, and what 35 different halves leave uneven"


def test_the_descriptions_themselves_lie_at_0_and_1(tiny, trait) -> None:
    for side, level in ((0, 1.0), (1, 0.0)):
        mean = np.mean([monitor(tiny, pair[side], trait).rows[0].levels["glad"] for pair in PAIRS])
        assert mean == pytest.approx(level, abs=1e-4)


def test_messages_of_a_conversation_are_told_apart() -> None:
    model = tiny_model()
    model.tokenizer.chat_template = TEMPLATE
    trait = trait_vector(model, PAIRS, name="glad", progress=False)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]  # fmt: skip
    found = monitor(model, messages, [trait])
    assert [row.role for row in found.rows] == ["user", "assistant", "user"], "the template refuses a system alone"
    texts = ["".join(found.tokens[row.start : row.stop]) for row in found.rows]
    assert texts[0].endswith("[system] Be kind.\n[user] Hi\n")
    assert texts[1:] == ["[assistant] Hello\n", "[user] Bye\n"]
    assert found.rows[-1].stop == len(found.tokens)


def test_a_dialogue_is_read_by_turn(tiny, trait) -> None:
    dialogue = converse(tiny, ["Once there was", " But then"], n_tokens=4, seed=3, stop_at_eos=False)
    found = monitor(tiny, dialogue, trait)
    assert [row.role for row in found.rows] == ["user", "assistant"] * 2
    assert [row.stop - row.start for row in found.rows[1::2]] == [4, 4]
    assert "".join(found.tokens[found.rows[2].start : found.rows[2].stop]) == " But then"
    assert "4 assistant" in str(found) and found.to_dict()["rows"][0]["role"] == "user"


def test_a_steered_model_is_read_as_it_is(tiny, trait) -> None:
    plain = monitor(tiny, "I am here", trait)
    with sl.steer(tiny, trait.direction(), 1.0, unit="max"):
        moved = monitor(tiny, "I am here", trait)
    np.testing.assert_allclose((moved.levels - plain.levels)[0, 1:], 1, atol=1e-4)


def test_bad_input_is_refused(tiny, trait) -> None:
    for traits, text, options, message in (
        ([], "Hi", {}, "at least one"),
        ([trait, trait], "Hi", {}, "different names"),
        (trait, "Hi", {"n_exchanges": 5}, "at least 20"),
        (trait, " ", {}, "blank"),
        (trait, "x" * 400, {}, "context"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor(tiny, text, traits, **options)
