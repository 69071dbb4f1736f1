"""Generation: Hugging Face's own greedy texts, the right distribution, and samples that depend on nothing else."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import saelab as sl
from saelab.lm.generation import GREEDY, Sampler, SamplingConfig
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import watch
from saelab.lm.models import WORLD_MODELS

PROMPTS = ["Once upon a time there was", "Tom saw a dog.", "Anna"]


@pytest.fixture(scope="module")
def tales() -> Any:
    return sl.load_model("tales", progress=False)


def go_on(model: Any, prompts: Any = PROMPTS, n_tokens: int = 8, **options: Any) -> sl.lm.Generation:
    return sl.generate(model, prompts, n_tokens, progress=False, **options)


def test_greedy_texts_are_those_of_hugging_face(tales: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(WORLD_MODELS / "tales")
    made = go_on(tales, sampling=GREEDY, stop_at_eos=False)
    for sample in made:
        ids = torch.tensor([sample.prompt_ids])
        theirs = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=-1
        )
        assert tuple(theirs[0].tolist()) == sample.all_ids
        assert sample.prompt + sample.text == made.texts[PROMPTS.index(sample.prompt)]


def test_a_sample_depends_on_its_seed_and_number_alone(tales: Any) -> None:
    made = go_on(tales, n=3, seed=5)
    for options in ({"batch_size": 1}, {"use_cache": False}, {"batch_size": 2, "use_cache": False}):
        assert [s.ids for s in go_on(tales, n=3, seed=5, **options)] == [s.ids for s in made]
    assert [s.ids for s in go_on(tales, n=2, seed=5)] == [s.ids for i, s in enumerate(made) if i % 3 < 2]
    assert [s.ids for s in go_on(tales, n=3, seed=6)] != [s.ids for s in made]
    assert len({s.ids for s in made}) > 3


def test_global_random_state_is_left_alone(tales: Any) -> None:
    before = torch.get_rng_state()
    go_on(tales, PROMPTS[:1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_training_is_read_in_evaluation_and_left_in_training() -> None:
    model = sl.lm.tiny_model(architecture="gpt2")
    calm = go_on(model, "Tom", stop_at_eos=False)
    model.original_model.train()
    assert go_on(model, "Tom", stop_at_eos=False) == calm
    assert model.original_model.training


def test_log_probabilities_are_those_of_one_forward(tales: Any) -> None:
    for sample in go_on(tales, seed=2, sampling=SamplingConfig(temperature=0.7)):
        ids = torch.tensor([sample.all_ids])
        log_p = sl.lm.logits(tales, ids)[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.log_probs), expected, atol=1e-4, rtol=1e-3)


def test_a_text_ends_where_the_model_ends_it(tales: Any) -> None:
    eos = tales.tokenizer.eos_token_id

    def end_now(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x).index_fill(-1, torch.tensor([eos]), 9.0)

    with sl.splice(tales, {"unembed.hook_out": end_now}):
        assert all(s.ids == (eos,) and s.text == "" for s in go_on(tales))
        assert all(s.ids == (eos,) * 3 for s in go_on(tales, n_tokens=3, stop_at_eos=False))


def draw(logits: torch.Tensor, n: int, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(SamplingConfig(**options), [generator] * n)
    return torch.bincount(sampler(logits.expand(n, -1)), minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 5), ({"temperature": 0.5}, 5), ({"top_k": 2}, 2), ({"top_p": 0.8}, 3), ({"top_p": 1.0}, 5)],
)
def test_samples_follow_the_distribution(options: Any, kept: int) -> None:
    p = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05])
    scaled = (p.log() / options.get("temperature", 1.0)).softmax(0)
    cut = torch.where(scaled >= scaled.sort(descending=True).values[kept - 1], scaled, 0.0)
    torch.testing.assert_close(draw(p.log(), 20_000, **options), cut / cut.sum(), atol=0.015, rtol=0)


def test_a_flow_follows_both_ways_of_generating(tales: Any) -> None:
    ids = torch.tensor([[1, 60, 61, 62], [1, 1, 60, 61]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with watch(tales) as flow:
        tales.original_model(ids, attention_mask=mask)
        assert flow.now is not None
        assert flow.now.positions.tolist() == [[0, 1, 2, 3], [-1, 0, 1, 2]] and flow.now.lengths.tolist() == [4, 3]
        longer, wider = torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask[:, :1] * 0 + 1], 1)
        tales.original_model(longer, attention_mask=wider)
        assert flow.now.positions[:, -1].tolist() == [4, 3] and flow.now.n_prompt == 4  # the same text, without a cache
        plain = hook_points_of(tales).running
        more = hook_points_of(tales).caching.go_on(plain(ids, attention_mask=mask, use_cache=True), wider, 4, 5)
        plain(longer[:, -1:], **more)
        assert flow.now.positions.tolist() == [[4], [3]] and flow.now.n_prompt == 4 and flow.now.n_past == 4
        tales.original_model(ids[:1])
        assert flow.now.positions.tolist() == [[0, 1, 2, 3]] and flow.now.n_prompt == 4


def test_mistakes_are_explained(tales: Any) -> None:
    for prompts, options, rule in [
        ([], {}, "at least one prompt"),
        (["Tom", " "], {}, "prompt 1 is blank"),
        ("Tom", {"n_tokens": 0}, "at least 1"),
        ("Tom", {"n_tokens": 5000}, "context of"),
    ]:
        with pytest.raises(ValueError, match=rule):
            go_on(tales, prompts, **options)
    for wrong in ({"temperature": -1.0}, {"temperature": float("inf")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            SamplingConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=1e-320), SamplingConfig(top_p=1e-300)])
def test_values_that_float32_rounds_to_zero_are_greedy(sampling: SamplingConfig) -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    draws = Sampler(sampling, [torch.Generator().manual_seed(i) for i in range(8)])(logits)
    assert torch.equal(draws, logits.argmax(1))


def test_a_negative_seed_is_named(tales: Any) -> None:
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -3"):
        go_on(tales, "Tom", seed=-3)
