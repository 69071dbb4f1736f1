"""Steering over turns: what earlier turns leave behind, held against caches kept by hand."""

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.generation import GREEDY
from saelab.lm.models import tiny_model
from saelab.steering.dialogues import converse

POINT = "blocks.1.hook_resid_post"
UP = sl.Intervention(sl.Direction(torch.arange(32.0) - 9, POINT), 30.0)
DOWN = sl.Intervention(sl.Direction(torch.arange(32.0) - 9, POINT), -20.0)
SAYS = ["Once there was", " But then", " In the end"]


def keep_a_cache(model, dialogue, each):
    """Log-probabilities of the replies where one cache is kept over all turns and strengths change between them."""
    module = model.original_model if hasattr(model, "original_model") else model
    past, read, found = None, 0, []
    for turn, now in zip(dialogue.turns, each, strict=True):
        ids = torch.tensor([turn.reply.all_ids])
        log_probs = []
        with torch.no_grad():
            for stop in range(len(turn.reply.prompt_ids), ids.shape[1]):
                new = ids[:, read:stop]
                with sl.splice(model, {POINT: lambda x, now=now: x + sum(one.features for one in now) * UP.source.vector
                                       if now else x}):  # fmt: skip
                    out = module(new, past_key_values=past, use_cache=True)
                if past is None:  # BOS is not steered
                    out = first(module, model, new, now)
                past, read = out.past_key_values, stop
                log_probs.append(float(out.logits[0, -1].log_softmax(0)[ids[0, stop]]))
        found.append(log_probs)
    return found


def first(module, model, new, now):
    def edit(x):
        if now:
            x[:, 1:] += sum(one.features for one in now) * UP.source.vector
        return x

    with sl.splice(model, {POINT: edit}):
        return module(new, use_cache=True)


def test_a_steered_history_is_a_cache_that_is_kept(tiny) -> None:
    each = [[UP], [], [DOWN]]
    found = converse(tiny, SAYS, each, history="steered", n_tokens=5, seed=2, stop_at_eos=False)
    expected = keep_a_cache(tiny, found, each)
    for turn, log_probs in zip(found.turns, expected, strict=True):
        np.testing.assert_allclose(turn.reply.log_probs, log_probs, atol=1e-3)
    clean = converse(tiny, SAYS, each, n_tokens=5, seed=2, stop_at_eos=False)
    assert np.abs(np.subtract(clean.turns[1].reply.log_probs, expected[1])).max() > 0.05, "steering would go on"


def test_a_turn_without_steering_is_the_models_own(tiny) -> None:
    found = converse(tiny, SAYS, [[UP], [DOWN], []], n_tokens=5, seed=4)
    last = found.turns[2].reply
    seed = int(np.random.SeedSequence((4, 2)).generate_state(1)[0])
    own = sl.generate(tiny, torch.tensor([last.prompt_ids]), 5, seed=seed, progress=False)[0]
    assert own.ids == last.ids and own.log_probs == last.log_probs
    assert last.prompt_ids[: len(found.turns[1].reply.all_ids)] == found.turns[1].reply.all_ids, "as it was drawn"


@pytest.mark.parametrize("history", ["clean", "steered"])
@pytest.mark.parametrize("part", ["all", "prompt", "generated"])
def test_the_cache_of_a_turn_changes_nothing(tiny, history, part) -> None:
    from dataclasses import replace

    each = [[replace(UP, where=part)], [replace(DOWN, where=part)], []]
    one, other = (
        converse(tiny, SAYS, each, history=history, n_tokens=4, sampling=GREEDY, use_cache=cache)
        for cache in (True, False)
    )
    for a, b in zip(one.turns, other.turns, strict=True):
        assert a.reply.ids == b.reply.ids
        np.testing.assert_allclose(a.reply.log_probs, b.reply.log_probs, atol=1e-4)


def test_each_turn_steers_its_own_tokens_alone(tiny) -> None:
    """The reply to the same text, steered by hand from the turn's first token on."""
    found = converse(tiny, SAYS[:2], [[], [UP]], n_tokens=4, seed=1)
    turn = found.turns[1]
    from dataclasses import replace

    seed = int(np.random.SeedSequence((1, 1)).generate_state(1)[0])
    assert turn.start == len(found.turns[0].reply.all_ids)
    with steer_all(tiny, [replace(UP, where=slice(turn.start, None))]):
        own = sl.generate(tiny, torch.tensor([turn.reply.prompt_ids]), 4, seed=seed, progress=False)[0]
    assert own.log_probs == turn.reply.log_probs


def test_a_dialogue_goes_on(tiny) -> None:
    whole = converse(tiny, SAYS, [UP], n_tokens=3, seed=5, history="steered")
    begun = converse(tiny, SAYS[:1], [UP], n_tokens=3, seed=5, history="steered")
    rest = converse(tiny, SAYS[1:], [UP], n_tokens=3, before=begun)
    assert rest.ids == whole.ids and rest.to_dict() == whole.to_dict() and str(rest) == str(whole)
    assert len(begun.turns) == 1 and rest.conversation.messages[0] == {"role": "user", "content": SAYS[0]}


def test_a_chat_template_makes_the_text() -> None:
    model = tiny_model()
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    found = converse(model, ["Hi", "Bye"], [UP], system="Be kind.", n_tokens=3, history="steered", seed=1)
    texts = [model.tokenizer.decode(turn.reply.prompt_ids) for turn in found.turns]
    assert found.is_chat and texts[0].endswith("[system] Be kind.\n[user] Hi\n[assistant] ")
    assert texts[1].endswith(f"[assistant] {found.turns[0].reply.text}\n[user] Bye\n[assistant] ")
    assert 0 < found.turns[1].start < len(found.turns[0].reply.all_ids)
    assert [message["role"] for message in found.conversation.messages] == ["system", *["user", "assistant"] * 2]


def test_bad_input_is_refused(tiny) -> None:
    from dataclasses import replace

    for options, message in (
        ({"history": "kept"}, "`history` must be one of"),
        ({"interventions": [[UP]]}, "one for each of the 3 turns, got 1"),
        ({"interventions": [replace(UP, where=[1])]}, "got positions or a mask"),
        ({"system": "Be kind."}, "`system` needs"),
        ({"n_tokens": 400}, "context of 256"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            converse(tiny, **{"says": SAYS, "n_tokens": 2} | options)
