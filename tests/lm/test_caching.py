"""Caches and padding on families that treat them in their own ways: texts are Hugging Face's."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import saelab as sl
from saelab.lm.caching import count_columns, find_border, find_given, find_returned
from saelab.lm.continuations import read_continuations
from saelab.lm.generation import GREEDY
from saelab.lm.hook_points import hook_points_of
from saelab.lm.models import _byte_tokenizer

N = 8
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 259,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}
GRIFFIN = {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64, "head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | HEADS,
    "mistral": SIZES | HEADS | {"sliding_window": 6},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259},
    "mamba": SIZES | {"state_size": 8},
    "rwkv": SIZES | {"attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": SIZES | HEADS | GRIFFIN,
    "phi3": SIZES | HEADS | {"rope_parameters": LONG, "original_max_position_embeddings": 16},
    "dynamic": SIZES | HEADS | {"max_position_embeddings": 16, "rope_parameters": DYNAMIC},
}  # fmt: skip
RECURRENT = ("mamba", "rwkv", "recurrent_gemma")


def build(name: str) -> tuple[Any, Any]:
    """A random Hugging Face model of a family, and saelab's of the same weights."""
    config = transformers.AutoConfig.for_model("llama" if name == "dynamic" else name, **FAMILIES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs: Any = AutoModelForCausalLM.from_config(config).eval()
        for weight in theirs.parameters():
            torch.nn.init.normal_(weight, std=0.15)
    if "max_position_embeddings" in FAMILIES[name]:
        theirs.config.max_position_embeddings = 128  # behind the border texts may go on
    return theirs, sl.load_model(theirs, tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> tuple[str, Any, Any]:
    return request.param, *build(request.param)


def go_on(model: Any, prompts: list[str], **options: Any) -> list[tuple[int, ...]]:
    made = sl.generate(model, prompts, N, sampling=GREEDY, stop_at_eos=False, progress=False, **options)
    return [sample.all_ids for sample in made]


def test_texts_are_hugging_faces_cached_uncached_and_in_a_batch(family) -> None:
    name, theirs, model = family
    prompts = ["hello there you", "Hi", "a longer beginning than the others, by far"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        made = theirs.generate(
            ids, do_sample=False, max_new_tokens=N, min_new_tokens=N, use_cache=False, pad_token_id=2, eos_token_id=-1
        )
        expected.append(tuple(made[0].tolist()))
    assert go_on(model, prompts[:1]) == expected[:1] == go_on(model, prompts[:1], use_cache=False)
    assert go_on(model, prompts) == expected == go_on(model, prompts, use_cache=False)
    padded = hook_points_of(model).caching.padded
    assert padded == (name not in RECURRENT), name


def test_steered_texts_are_the_same_cached_and_uncached(family) -> None:
    _, _, model = family
    direction = sl.Direction(torch.arange(32.0).cos(), "blocks.1.hook_resid_post")
    prompts = ["hello there you", "Hi"]
    plain = go_on(model, prompts)
    for where in ("all", "generated"):
        with sl.steer(model, direction, 40.0, where=where):
            cached, uncached = go_on(model, prompts), go_on(model, prompts, use_cache=False)
            alone = [go_on(model, [prompt])[0] for prompt in prompts]
        assert cached == uncached == alone, where
        assert cached != plain  # it moves something at all


def test_continuations_are_what_generation_met(family) -> None:
    _, _, model = family
    made = sl.generate(model, ["hello there you", "Hi"], N, sampling=GREEDY, stop_at_eos=False, progress=False)
    found = read_continuations(model, [s.prompt_ids for s in made], [s.ids for s in made])
    log_probs = found.logits.float().log_softmax(-1).gather(2, found.ids[..., None])[..., 0]
    for row, sample in zip(log_probs, made, strict=True):
        assert row.tolist() == pytest.approx(list(sample.log_probs), abs=1e-3)
    assert found.prompt_mask.sum(1).tolist() == [len(s.prompt_ids) for s in made]


def test_a_cache_of_a_name_or_kind_that_is_not_known_is_an_error() -> None:
    cache = transformers.DynamicCache()
    assert find_given({"use_cache": True, "state": None}) is None
    assert find_given({"past_key_values": cache}) is cache is find_given({"cache": cache})
    with pytest.raises(ValueError, match="must go by one of the names"):
        find_given({"memory": cache})
    for given in ({"layer_states": [torch.zeros(1)]}, {"kv_cache": {}}, {"held": cache}):
        with pytest.raises(ValueError, match="must go by one of the names"):
            find_given(given)
    assert find_given({"output_hidden_states": True, "encoder_hidden_states": torch.zeros(1), "past_length": 3}) is None
    with pytest.raises(ValueError, match="must return its cache"):
        find_returned(transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(1)))
    assert count_columns(None) == 0 == count_columns(cache)
    assert count_columns(((torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4)),)) == 7
    assert count_columns([torch.zeros(1, 8, 2)]) is None
    with pytest.raises(ValueError, match="got Wallet"):
        count_columns(type("Wallet", (), {})())


@pytest.mark.parametrize("told", [{"attention_mask": torch.ones(1, 5)}, {"position_ids": torch.tensor([[4]])}])
def test_a_forward_in_the_middle_without_a_cache_that_is_known_is_an_error(told) -> None:
    model = sl.lm.tiny_model()
    direction = sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    with (
        sl.steer(model, direction, 1.0, where="generated"),
        pytest.raises(ValueError, match="must bring its whole text"),
    ):
        model.original_model(torch.tensor([[7]]), **told)


def test_borders_of_positions_are_read_from_the_configuration() -> None:
    assert find_border(build("phi3")[0]) == (16, False)
    assert find_border(build("llama")[0]) is None


def test_positions_of_a_scheme_that_is_not_known_are_read_anew_behind_their_border() -> None:
    model = build("llama")[0]
    length = model.config.max_position_embeddings
    for kind, border in (("yarn", None), ("spiral", (length, True)), ("dynamic", (length, True))):
        model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
        assert find_border(model) == border
