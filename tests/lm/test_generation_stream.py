"""`stream_tokens`: what `generate` draws, bit for bit, token by token; whole characters; nothing held once closed."""

import gc
import weakref
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.lm.generation import GREEDY, SamplingConfig
from saelab.lm.models import tiny_model

SETTINGS: list[dict[str, Any]] = [
    {"seed": 3},
    {"seed": 4, "sampling": GREEDY},
    {"seed": 5, "sampling": SamplingConfig(temperature=0.7, top_k=20, top_p=0.9)},
    {"seed": 6, "use_cache": False},
    {"seed": 7, "bos": False},
]


@pytest.fixture(scope="module")
def tales() -> Any:
    return sl.load_model("tales", progress=False)


def is_same_text(streamed: str, whole: str) -> bool:
    """Equal but for spaces that decoders of older releases leave out behind quotation marks."""
    return streamed == whole or streamed.replace("\u201c ", "\u201c") == whole


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.original_model.modules())


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_stream_is_the_sample_of_generate(tales: Any, settings: dict[str, Any]) -> None:
    made = sl.generate(tales, "Tom saw a", 20, progress=False, **settings)[0]
    stream = sl.lm.stream_tokens(tales, "Tom saw a", 20, **settings)
    drawn = list(stream)
    assert tuple(token.id for token in drawn) == made.ids
    assert tuple(token.log_prob for token in drawn) == made.log_probs
    assert is_same_text("".join(token.text for token in drawn), made.text)
    assert stream.sample == made


def test_generation_tells_of_its_tokens(tales: Any) -> None:
    """The tokens of every sample in turn, and the samples of a run that tells nothing."""
    told: list[tuple[int, int, str]] = []
    given: dict[str, Any] = {"n": 2, "seed": 5, "progress": False}
    prompts = ["Tom saw a", "Mary went to the"]
    made = sl.generate(tales, prompts, 9, on_token=lambda i, token: told.append((i, token.id, token.text)), **given)
    assert [sample.ids for sample in made] == [sample.ids for sample in sl.generate(tales, prompts, 9, **given)]
    assert [number for number, _, _ in told] == sorted(number for number, _, _ in told)
    for number, sample in enumerate(made):
        mine = [(id, text) for i, id, text in told if i == number]
        assert tuple(id for id, _ in mine) == sample.ids
        assert is_same_text("".join(text for _, text in mine), sample.text)


def test_rows_of_ids_are_continued_as_they_are(tiny: Any) -> None:
    ids = torch.tensor([5, 70, 71])
    drawn = [token.id for token in sl.lm.stream_tokens(tiny, ids, 6)]
    assert tuple(drawn) == sl.generate(tiny, ids[None], 6, progress=False)[0].ids


def test_edits_apply_to_the_tokens_that_are_drawn_under_them(tales: Any) -> None:
    up = sl.Direction(torch.ones(tales.cfg.d_model), "blocks.1.hook_resid_post")
    with sl.steer(tales, up, 8.0):
        steered = sl.generate(tales, "Tom", 8, seed=1, progress=False)[0]
        assert tuple(token.id for token in sl.lm.stream_tokens(tales, "Tom", 8, seed=1)) == steered.ids
    plain = sl.generate(tales, "Tom", 8, seed=1, progress=False)[0]
    assert steered.log_probs != plain.log_probs
    stream = sl.lm.stream_tokens(tales, "Tom", 8, seed=1)
    before = [next(stream) for _ in range(4)]
    with sl.steer(tales, up, 8.0):
        after = next(stream)
    assert tuple(token.log_prob for token in before) == plain.log_probs[:4]
    assert after.log_prob not in plain.log_probs


def test_a_character_of_several_tokens_comes_whole_with_its_last(tiny: Any) -> None:
    ids = tiny.tokenizer("é✓", add_special_tokens=False)["input_ids"]
    stream = sl.lm.stream_tokens(tiny, "a", 9)
    [b] = tiny.tokenizer("b", add_special_tokens=False)["input_ids"]
    assert [stream._text.read(i) for i in [*ids, ids[0], b]] == [
        "", "é", "", "", "✓", "", "<0xC3>b",
    ]  # fmt: skip
    assert stream._text.read(tiny.tokenizer.eos_token_id) == ""


def test_a_closed_stream_draws_no_more_and_holds_no_cache() -> None:
    model = tiny_model()
    sl.generate(model, "One", 1, progress=False)  # what is measured of a model once
    n_hooks = count_hooks(model)
    stream = sl.lm.stream_tokens(model, "One", 50)
    drawn = [next(stream) for _ in range(3)]
    frame = stream._steps.gi_frame  # type: ignore[attr-defined]
    cache = weakref.ref(frame.f_locals["self"].before)
    del frame
    assert cache() is not None
    stream.close()
    gc.collect()
    assert cache() is None and list(stream) == []
    assert stream.sample.ids == tuple(token.id for token in drawn)
    assert count_hooks(model) == n_hooks


def test_no_gradient_is_recorded_and_the_random_state_stays(tiny: Any) -> None:
    before = torch.get_rng_state()
    stream = sl.lm.stream_tokens(tiny, "One", 4)
    with torch.enable_grad():
        next(stream)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_generate_refuses_is_refused_at_once(tiny: Any) -> None:
    with pytest.raises(ValueError, match="`n_tokens` must be at least 1, got 0"):
        sl.lm.stream_tokens(tiny, "One", 0)
    with pytest.raises(ValueError, match="prompt 0 is blank"):
        sl.lm.stream_tokens(tiny, " ")
    with pytest.raises(ValueError, match="must fit the model's context"):
        sl.lm.stream_tokens(tiny, "One", 100_000)
