"""`read`: codes of texts against `harvest`-like encoding one text at a time; names, masks, shapes and errors."""

import json

import numpy as np
import pandas
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.analysis import read
from saelab.lm.model_checks import find_context
from saelab.visualization.feature_cards import draw_texts

POINT = "blocks.1.hook_resid_post"
TEXTS = ["One cat", "Two dogs and an owl", "A", "Three", "né 世"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def chat(tiny):
    """A model of its own whose tokenizer has a chat template."""
    from saelab.lm.models import tiny_model

    model = tiny_model()
    model.tokenizer.chat_template = TEMPLATE
    return model


def read_alone(sae, model, text):
    """Tokens and dense codes of one text, by a forward pass of its own; zero at BOS."""
    tokens = sl.tokenize(model, [text], 64, packed=False, separator=None)
    ids = tokens.ids[:, : tokens.n_tokens].long()
    x = sl.lm.capture(model, ids, [POINT])[POINT][0]
    z = sae.encode(x).detach().clone()
    z[torch.isin(ids[0], torch.tensor(tokens.special_ids))] = 0
    return ids[0], z


def test_codes_are_those_of_each_text_alone(tiny, signed_sae):
    found = read(signed_sae, tiny, TEXTS, hook_point=POINT, progress=False)
    assert len(found) == len(TEXTS)
    for i, text in enumerate(TEXTS):
        ids, z = read_alone(signed_sae, tiny, text)
        one = found[i]
        assert one.token_ids.tolist() == ids.tolist()
        torch.testing.assert_close(one.codes.to_dense(), z, atol=1e-5, rtol=1e-4)
        assert "".join(one.tokens).endswith(text)
        assert one.positions.tolist() == list(range(len(ids)))
    assert len(found.tokens) == sum(len(one.tokens) for one in found)  # no padding
    assert (found.codes.values < 0).any() and (found.codes.values > 0).any()


def test_order_and_company_change_nothing(tiny, signed_sae):
    one = read(signed_sae, tiny, TEXTS, hook_point=POINT, progress=False)
    other = read(signed_sae, tiny, TEXTS[::-1], hook_point=POINT, progress=False)
    for a, b in zip(one, list(other)[::-1], strict=True):
        assert a.tokens == b.tokens and a.codes.indices.tolist() == b.codes.indices.tolist()
        torch.testing.assert_close(a.codes.values, b.codes.values, atol=1e-5, rtol=1e-4)


def test_lists_of_features_agree_with_the_codes(tiny, signed_sae):
    found = read(signed_sae, tiny, TEXTS, hook_point=POINT, labels={3: "three"}, progress=False)
    z = found.codes.to_dense().numpy()
    fired = {row.feature: row for row in found.features}
    assert sorted(fired) == np.flatnonzero((z != 0).any(0)).tolist()
    for feature, row in fired.items():
        column = z[:, feature]
        at = int(np.abs(column).argmax())
        assert row.peak == pytest.approx(column[at]) and row.n_tokens == (column != 0).sum()
        assert (row.text, row.position, row.token) == (found.text_ids[at], found.positions[at], found.tokens[at])
        assert row.n_texts == len(set(found.text_ids[column != 0].tolist()))
    sizes = [abs(row.peak) for row in found.features]
    assert sizes == sorted(sizes, reverse=True)
    for i, codes in enumerate(found.by_token):
        assert dict(codes) == pytest.approx({int(j): z[i, j] for j in np.flatnonzero(z[i])})
        assert [abs(v) for _, v in codes] == sorted((abs(v) for _, v in codes), reverse=True)
    assert found.l0 == pytest.approx((z != 0).sum() / found.kept.sum())


def test_names_are_of_the_sign_that_fires(tiny, signed_sae, signed_store, tmp_path):
    from saelab.labels import LabelStore

    with LabelStore(tmp_path / "labels.db", signed_store.manifest) as book:
        for feature in range(signed_store.d_sae):
            book.set(feature, f"up {feature}", sign=1, author="me")
        book.set(0, "both", sign=0, author="me")
        found = read(signed_sae, tiny, TEXTS, hook_point=POINT, labels=book, progress=False)
        frame = found.to_pandas()
    assert found.to_pandas().equals(frame)  # the store is closed
    assert found[0].to_pandas().equals(frame[frame["text"] == 0])
    assert "up" in str(found) and "up" in found._repr_html_()
    for row in frame.itertuples():
        if row.value > 0:
            assert row.name == f"up {row.feature}"
        else:
            assert row.name == ("\u2212 both" if row.feature == 0 else "")


def test_a_table_has_every_firing(tiny, signed_sae):
    found = read(signed_sae, tiny, TEXTS, hook_point=POINT, progress=False)
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(found.codes.values)
    dense = np.zeros((len(found), 64, signed_sae.cfg.d_sae))
    dense[frame["text"], frame["position"], frame["feature"]] = frame["value"]
    for i, one in enumerate(found):
        np.testing.assert_allclose(dense[i, : len(one.tokens)], one.codes.to_dense(), rtol=1e-6)


def test_what_the_mask_leaves_out_has_no_features(tiny, signed_sae):
    found = read(signed_sae, tiny, ["One cat"], hook_point=POINT, progress=False)
    assert found.kept.tolist() == [False] + [True] * 7
    assert not found.by_token[0] and all(found.by_token[1:])
    every = read(signed_sae, tiny, ["One cat"], hook_point=POINT, mask=sl.TokenMask(special=False), progress=False)
    assert every.kept.all() and every.by_token[0]
    later = read(signed_sae, tiny, "One cat", hook_point=POINT, mask=sl.TokenMask(positions=(3, None)), progress=False)
    assert later.kept.tolist() == [False] * 3 + [True] * 5


def test_ids_are_read_as_they_are(tiny, signed_sae):
    ids = tiny.tokenizer("cat", add_special_tokens=False)["input_ids"]
    for given in (ids, [ids], torch.tensor(ids), [np.array(ids)]):
        found = read(signed_sae, tiny, given, hook_point=POINT, progress=False)
        assert found.token_ids.tolist() == ids and len(found) == 1


def test_conversations_are_read_by_their_template(chat, signed_sae):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for given in (messages, [messages]):
        found = read(signed_sae, chat, given, hook_point=POINT, progress=False)
        assert "".join(found.tokens) == "<s>[user] Hi\n[assistant] Yes\n"
        assert found.kept.tolist() == [False] + [True] * (len(found.tokens) - 1)
    mixed = read(signed_sae, chat, ["One", messages], hook_point=POINT, progress=False)
    assert mixed[1].tokens == found.tokens and "".join(mixed[0].tokens) == "<s>One"


def test_it_prints_draws_and_saves(tiny, signed_sae, tmp_path):
    found = read(signed_sae, tiny, ["<b>x</b> cat", "dog"], hook_point=POINT, labels={1: "<i>"}, progress=False)
    assert str(found).startswith("2 texts, ") and "(left out)" in str(found)
    page = found._repr_html_()
    assert page == draw_texts(found) and "<b>x" not in page and "&lt;" in page and "<i></td>" not in page
    found.save(tmp_path / "read.json")
    plain = json.loads((tmp_path / "read.json").read_text())
    assert [len(text) for text in plain["texts"]] == [len(one.tokens) for one in found]
    assert plain["texts"][0][1]["features"][0]["feature"] == found.by_token[1][0][0]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "at least one text"),
        ("  ", "blank"),
        (["a", ""], "text 1 is"),
        ("word " * 5000, "context"),
        ([[]], "token"),
    ],
)
def test_what_is_no_text_is_refused(tiny, signed_sae, texts, said):
    with pytest.raises(ValueError, match=said):
        read(signed_sae, tiny, texts, hook_point=POINT, progress=False)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (pandas.DataFrame({"text": ["One"]}), "column of a table"),  # iterating would give names of columns
        (None, "a text or a list"),
        (["One", None], "NoneType at text 1"),
        (["One", b"two"], "bytes at text 1"),
        (torch.tensor([0.0, 1.0]), "at text 0"),
    ],
)
def test_what_holds_no_texts_is_refused(tiny, signed_sae, texts, said):
    with unchecked(), pytest.raises(TypeError, match=said):
        read(signed_sae, tiny, texts, hook_point=POINT, progress=False)


def test_arrays_columns_and_rows_hold_texts(tiny, signed_sae):
    ids = read(signed_sae, tiny, ["One", "Two cats"], hook_point=POINT, progress=False).token_ids.tolist()
    several = (
        np.array(["One", "Two cats"]),
        pandas.Series(["One", "Two cats"], index=[7, 9]),
        [{"text": "One"}, {"text": "Two cats"}],  # rows of a data set
        (text for text in ("One", "Two cats")),
    )
    for given in several:
        assert read(signed_sae, tiny, given, hook_point=POINT, progress=False).token_ids.tolist() == ids


@pytest.mark.parametrize("labels", [["one"], "runs/store"])
def test_what_names_no_features_is_refused(tiny, signed_sae, labels):
    with unchecked(), pytest.raises(TypeError, match="LabelStore"):
        read(signed_sae, tiny, "One", hook_point=POINT, labels=labels, progress=False)


def test_kinds_of_text_stay_in_order_among_each_other(chat, signed_sae):
    messages, ids = [{"role": "user", "content": "Hi"}], [5, 6]
    given = ["One", ids, messages, "Two"]
    found = read(signed_sae, chat, given, hook_point=POINT, progress=False)
    for one, text in zip(found, given, strict=True):
        alone = read(signed_sae, chat, [text], hook_point=POINT, progress=False)
        assert one.token_ids.tolist() == alone.token_ids.tolist() and one.tokens == alone.tokens
    assert found[1].token_ids.tolist() == ids


def test_a_text_may_fill_the_context(tiny, signed_sae):
    n = find_context(tiny)
    for given in ("a" * (n - 1), [3] * n):
        assert len(read(signed_sae, tiny, ["One", given], hook_point=POINT, progress=False)[1].tokens) == n
    for given in ("a" * n, [3] * (n + 1)):
        with pytest.raises(ValueError, match=f"text 1 has {n + 1}"):
            read(signed_sae, tiny, ["One", given], hook_point=POINT, progress=False)


def test_texts_are_tokenized_together(tiny, signed_sae, monkeypatch):
    from saelab.analysis import text_features

    calls = []
    monkeypatch.setattr(text_features, "tokenize", lambda *args, **kw: calls.append(1) or sl.tokenize(*args, **kw))
    read(signed_sae, tiny, ["One", "Two", "Three"] * 20, hook_point=POINT, progress=False)
    assert len(calls) == 2  # all strings, and the rows


def test_other_types_and_other_models_are_refused(tiny, signed_sae, signed_store):
    with pytest.raises(TypeError, match="a text or a list"):
        read(signed_sae, tiny, {"text": "one"}, hook_point=POINT, progress=False)
    with pytest.raises(ValueError, match="chat template"):
        read(signed_sae, tiny, [{"role": "user", "content": "Hi"}], hook_point=POINT, progress=False)
    with pytest.raises(ValueError, match="hook_point"):
        read(signed_sae, tiny, "One", progress=False)
    with unchecked(), pytest.raises(TypeError, match="must be an integer"):
        _ = read(signed_sae, tiny, "One", hook_point=POINT, progress=False)[:1]
    with pytest.raises(IndexError, match="Text must be"):
        _ = read(signed_sae, tiny, "One", hook_point=POINT, progress=False)[1]


def test_a_norm_rule_that_cannot_apply_is_refused(tiny, signed_sae):
    with pytest.raises(ValueError, match="median norm"):
        read(signed_sae, tiny, "One", hook_point=POINT, mask=sl.TokenMask(max_norm_ratio=2.0), progress=False)


def test_a_table_without_firings_has_the_same_columns(tiny, signed_sae):
    some = read(signed_sae, tiny, "One", hook_point=POINT, progress=False).to_pandas()
    none = read(signed_sae, tiny, [0], hook_point=POINT, progress=False).to_pandas()  # BOS alone
    assert len(none) == 0 and none.dtypes.to_dict() == some.iloc[:0].dtypes.to_dict()


def test_labels_of_another_sae_are_refused(tiny, signed_sae, signed_store, tmp_path):
    from saelab.labels import LabelStore

    other = sl.SAE(signed_sae.cfg, seed=9)
    with LabelStore(tmp_path / "labels.db", signed_store.manifest) as book:
        book.set(3, "mine", author="me")
        read(signed_sae, tiny, "One", hook_point=POINT, labels=book, progress=False)
        with pytest.raises(ValueError, match="of another"):
            read(other, tiny, "One", hook_point=POINT, labels=book, progress=False)
