"""Directions of traits: planted differences, exchanges of ends, and files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.lm.models import tiny_model
from saelab.steering.traits import Trait, ask_under, cosines_left_out, draw_exchanges, trait_vector

POINT = "blocks.1.hook_resid_post"
ENDS = {
    "cat": ".",
    "dog": " now.",
    "hen": " again.",
    "fox": " today.",
    "owl": "!",
    "cow": " at last.",
    "pig": ", it said.",
}
PAIRS = [(f"The {a} is glad{b}", f"The {a} is sad{b}") for a, b in ENDS.items()]


def naive(differences: np.ndarray, signs: np.ndarray) -> np.ndarray:
    turned = differences * signs[:, None]
    found = []
    for i, own in enumerate(turned):
        other = np.delete(turned, i, 0).mean(0)
        found.append(own @ other / np.linalg.norm(own) / np.linalg.norm(other))
    return np.array(found)


def test_cosines_of_pairs_left_out_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    d, signs = rng.standard_normal((6, 9)), draw_exchanges(6, 20, 1)
    found = cosines_left_out(d @ d.T, signs)
    assert signs.shape == (21, 6) and (signs[0] == 1).all() and set(np.unique(signs)) == {-1, 1}
    np.testing.assert_allclose(found, [naive(d, row) for row in signs], atol=1e-12)


def test_all_exchanges_are_drawn_once_where_they_are_few() -> None:
    signs = draw_exchanges(5, 32, 0)
    assert len(np.unique(signs, axis=0)) == len(signs) == 32 and (signs[0] == 1).all()


def test_a_pair_without_difference_says_nothing() -> None:
    d = np.array([[1.0, 0], [0, 0], [1, 1]])
    assert np.isnan(cosines_left_out(d @ d.T, np.ones((1, 3)))[0]).tolist() == [False, True, False]


def test_the_vector_is_the_difference_of_means_and_levels_are_0_and_1_at_the_ends(tiny) -> None:
    found = trait_vector(tiny, PAIRS, name="glad", seed=1, progress=False)
    ends = []
    for texts in zip(*PAIRS, strict=True):
        rows = []
        for text in texts:
            ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
            x = sl.lm.capture(tiny, ids, [POINT])[POINT][0]
            rows.append(x[ids[0] != tiny.tokenizer.bos_token_id].mean(0))
        ends.append(torch.stack(rows))
    np.testing.assert_allclose(found.vector(POINT), (ends[0] - ends[1]).mean(0), atol=1e-5)
    means = [found.level(end, POINT).mean() for end in ends]
    assert [float(m) for m in means] == pytest.approx([1, 0], abs=1e-4)
    row = next(row for row in found.rows if row.hook_point == POINT)
    assert row.cosine == pytest.approx(naive((ends[0] - ends[1]).numpy(), np.ones(7)).mean(), abs=1e-4)
    assert row.accuracy == 1 and row.p == pytest.approx(2 / 2**7) == found.p, "the same word was exchanged in all"
    assert found.direction().peak == pytest.approx(float(np.linalg.norm(found.vector())))
    assert "p 0.016 of the best of 3" in str(found) and "no trait" not in str(found)


def test_ends_that_differ_by_nothing_in_common_are_no_trait(tiny) -> None:
    """Texts drawn from one pool: p is at most .05 about as often as it says."""
    rng, words = np.random.default_rng(0), "abcdefghijklmnop"
    found = []
    for _ in range(12):
        texts = ["".join(rng.choice(list(words), 12)) for _ in range(12)]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        found.append(trait_vector(tiny, pairs, hook_points=[POINT], progress=False))
    from scipy.stats import binom

    low = [one.p <= 0.05 for one in found]
    assert sum(low) <= binom.ppf(0.9999, len(low), 0.05)
    assert "no trait was found" in str(found[low.index(False)])


def test_answers_are_read_under_each_description(tiny) -> None:
    found = trait_vector(tiny, PAIRS[:2], questions=["How are you?", "And now?"], n_tokens=4, seed=3, progress=False)
    assert found.read == "answers" and found.n_texts == 8 and found.n_tokens <= 32
    asked = [f"{text}\n\n{q}" for text, _ in PAIRS[:2] for q in ("How are you?", "And now?")]
    made = sl.generate(tiny, asked, 4, seed=3, progress=False)
    rows = []
    for one in made:
        ids = torch.tensor([one.all_ids])
        x = sl.lm.capture(tiny, ids, [POINT])[POINT][0, len(one.prompt_ids) :]
        rows.append(x[ids[0, len(one.prompt_ids) :] > 3].mean(0))
    np.testing.assert_allclose(found.positive[POINT], torch.stack(rows).mean(0), atol=1e-5)
    again = trait_vector(tiny, PAIRS[:2], questions=["How are you?", "And now?"], n_tokens=4, seed=3, progress=False)
    assert np.array_equal(found.vector(), again.vector()) and "leave no p below 0.5" in str(found)


def test_a_chat_model_gets_descriptions_as_system_messages() -> None:
    model = tiny_model()
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    asked = ask_under(model, "Be kind.", "Why?")
    assert asked.messages == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"})  # type: ignore[union-attr]
    own = ask_under(model, [{"role": "user", "content": "Hi"}], "Why?")
    assert [message["content"] for message in own.messages] == ["Hi", "Why?"]  # type: ignore[union-attr]


def test_a_trait_comes_back_from_its_file(tiny, tmp_path: Path) -> None:
    found = trait_vector(tiny, [("same", "same"), *PAIRS[:2]], read="last", progress=False)
    found.save(tmp_path / "trait.json")
    read = Trait.load(tmp_path / "trait.json")
    assert str(read) == str(found) and np.array_equal(read.vector(), found.vector()) and read.read == "last"
    data = json.loads((tmp_path / "trait.json").read_text())
    for change in (
        {"rows": 3},
        {"positive": {POINT: [1.0]}},
        {"more": 1},
        {"differences": [[1.0]]},
        {"hook_point": "blocks.9.hook_out"},
    ):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=r"json must (be a trait|have one)"):
            Trait.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="was read at"):
        read.vector("blocks.7.hook_resid_post")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": PAIRS[:1]}, "two or more"),
        ({"pairs": ["ab", "cd"]}, "two or more"),
        ({"read": "first"}, "`read` must be one of"),
        ({"n_exchanges": 0}, "at least 1"),
        ({"hook_points": ["blocks.77.hook_resid_post"]}, "blocks.77"),
        ({"pairs": [(" ", "a"), ("b", "c")]}, "blank"),
    ],
)
def test_bad_input_is_refused(tiny, options, message) -> None:
    with unchecked(), pytest.raises(ValueError, match=message):
        trait_vector(tiny, **{"pairs": PAIRS, "progress": False} | options)
