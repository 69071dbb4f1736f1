"""Conversations as documents and prompts: as the tokenizer's chat template has them, BOS once."""

import numpy as np
import pandas
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.lm.conversations import Conversation
from saelab.lm.models import tiny_model

TEMPLATE = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501
HI = [{"role": "user", "content": "Hi"}]
LONG = [*HI, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def chat():
    model = tiny_model()
    model.tokenizer.chat_template = TEMPLATE
    return model


def expect(model, messages, reply=False):
    """What Hugging Face makes of them."""
    made = model.tokenizer.apply_chat_template(messages, add_generation_prompt=reply, tokenize=True)
    return list(made["input_ids"] if hasattr(made, "keys") else made)


@pytest.mark.parametrize("bos", [True, False, None])
def test_documents_are_as_hugging_face_makes_them(chat, bos):
    tokens = sl.tokenize(chat, [HI, LONG], 64, packed=False, bos=bos)
    for i, messages in enumerate((HI, LONG)):
        own = tokens.ids[i][tokens.attention_mask[i]].tolist()
        assert own == expect(chat, messages)
        assert own.count(chat.tokenizer.bos_token_id) == 1
    assert tokens.bos is (bos is not False)


def test_a_template_without_bos_gets_none(chat):
    model = tiny_model()
    model.tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    tokens = sl.tokenize(model, [HI, "One"], 32, packed=False)
    assert tokens.ids[0][tokens.attention_mask[0]].tolist() == expect(model, HI)
    assert not tokens.bos
    assert sl.tokenize(model, ["One"], 32).bos


@pytest.mark.parametrize(
    "texts",
    [
        {"messages": [HI, LONG]},
        [{"messages": HI}, {"messages": LONG}],
        pandas.DataFrame({"messages": [HI, LONG]}),
        pandas.DataFrame({"messages": [np.array(HI, dtype=object), np.array(LONG, dtype=object)]}),
    ],
)
def test_columns_of_messages_are_read(chat, texts):
    tokens = sl.tokenize(chat, texts, 64, field="messages", packed=False)
    assert [tokens.ids[i][tokens.attention_mask[i]].tolist() for i in range(2)] == [expect(chat, m) for m in (HI, LONG)]


def test_data_sets_and_files_of_messages_are_read(chat, tmp_path):
    import json

    datasets = pytest.importorskip("datasets")
    made = sl.tokenize(chat, datasets.Dataset.from_dict({"messages": [HI, LONG]}), 64, field="messages")
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in (HI, LONG)))
    for tokens in (made, sl.tokenize(chat, path, 64, field="messages")):
        assert tokens.ids[tokens.attention_mask].tolist() == expect(chat, HI) + expect(chat, LONG)


def test_generation_continues_the_assistants_turn(chat):
    ids = torch.tensor([expect(chat, HI, reply=True)])
    plain = sl.generate(chat, ids, 6, seed=3, progress=False).samples[0]
    for prompts in (HI, [HI], (Conversation(tuple(HI)),)):
        made = sl.generate(chat, prompts, 6, seed=3, progress=False).samples
        assert len(made) == 1 and torch.equal(torch.as_tensor(made[0].ids), torch.as_tensor(plain.ids))
    assert made[0].prompt == "<s>[user] Hi\n[assistant] "
    stream = sl.lm.stream_tokens(chat, HI, 6, seed=3)
    list(stream)
    assert list(stream.sample.ids) == list(plain.ids)
    several = sl.generate(chat, [HI, "One"], 4, progress=False)
    assert [sample.prompt for sample in several.samples] == [made[0].prompt, "One"]


def test_prompts_of_metrics_are_conversations_too(chat):
    from saelab.interventions.prompt_metrics import read_texts

    texts = read_texts(chat, [HI, "One"])
    assert texts.ids[0, : texts.lengths[0]].tolist() == expect(chat, HI, reply=True)
    assert read_texts(chat, HI).ids.tolist() == texts.ids[:1].tolist()


def test_steering_takes_conversations(chat):
    up = sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    texts = sl.steering.compare_generations(chat, sl.Intervention(up, 0.0), HI, 4, progress=False)
    assert texts.rows[0].kl == {"steered": 0.0}


def test_what_cannot_be_is_said(tiny, chat):
    with pytest.raises(ValueError, match="chat template"):
        sl.tokenize(tiny, [HI])
    with pytest.raises(ValueError, match=r"roles \['system'\].*no system"):
        sl.tokenize(chat, [[{"role": "system", "content": "x"}]])
    with pytest.raises(ValueError, match="Put a conversation into a list"):
        sl.tokenize(chat, HI)
    with pytest.raises(TypeError, match="needs a role"):
        sl.tokenize(chat, [[{"content": "x"}]])
    with pytest.raises(TypeError, match="got a conversation"):
        list(sl.lm.documents.read_documents([HI]))


@pytest.mark.parametrize("prompts", [["One", [0, 5]], [HI, None], [[]]])
def test_prompts_that_are_no_texts_are_refused(chat, prompts):
    with unchecked(), pytest.raises(TypeError, match="texts or conversations, got"):
        sl.generate(chat, prompts, 2, progress=False)
