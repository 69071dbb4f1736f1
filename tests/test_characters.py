"""Characters of several tokens, through stores: predicates, windows, prompts, exports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saelab as sl
from saelab.labels.rules.token_view import TokenView
from saelab.stores.corpus import StoredText

TEXTS = ["The café of 世界 is nice.", "“Straße” said née \U0001f600!", "plain words, no more", "世 and 界 and é"] * 4


@pytest.fixture(scope="module")
def store(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every byte is a token; rows of 16 cut some characters in two."""
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=6)))
    tokens = sl.tokenize(tiny, TEXTS, ctx_len=16)
    out = tmp_path_factory.mktemp("store")
    mask = sl.TokenMask(special=False)
    return sl.harvest(sae, tiny, tokens, out=out, hook_point="blocks.1.hook_out", mask=mask, progress=False)


def find_bytes(text: StoredText, wanted: str) -> list[int]:
    """Places of the bytes of a text, found in the bytes of each document."""
    found = []
    raw = [ord("\0") if text.strings[i] == "<s>" else text.spelling(p, p + 1).pieces[0][0]
           for p, i in enumerate(text.token_ids.tolist())]  # fmt: skip
    doc_ids = np.asarray(text.doc_ids)
    for doc in np.unique(doc_ids):
        places = np.flatnonzero(doc_ids == doc)
        data = bytes(raw[p] for p in places)
        start = data.find(wanted.encode())
        while start >= 0:
            found += places[start : start + len(wanted.encode())].tolist()
            start = data.find(wanted.encode(), start + 1)
    return sorted(found)


def test_patterns_hold_at_the_bytes_of_what_they_match(store: Any) -> None:
    text = store.text
    # By document, as the bytes are; a store's sequences are read one by one.
    single = StoredText(
        token_ids=text.token_ids, doc_ids=text.doc_ids, positions=np.arange(len(text)), strings=text.strings
    )
    view = TokenView(single)
    for wanted in ("世界", "café", "é", "“", "\U0001f600", "words", "世", "ße"):
        assert np.flatnonzero(view.find(wanted)).tolist() == find_bytes(text, wanted) != [], wanted
    assert not TokenView(text).find("\ufffd").any()


def test_words_are_whole_whatever_their_tokens(store: Any) -> None:
    view = TokenView(StoredText(
        token_ids=store.text.token_ids, doc_ids=store.text.doc_ids, positions=np.arange(len(store.text)),
        strings=store.text.strings,
    ))  # fmt: skip
    assert {"café", "世界", "Straße", "née", "plain"} <= set(view.words)
    for word in ("café", "世界", "Straße"):
        assert np.flatnonzero(view.mark_words(word.__eq__)).tolist() == find_bytes(store.text, word)
    assert np.flatnonzero(view.mark(lambda string: "“" in string)).tolist() == find_bytes(store.text, "“")


def test_own_patterns_are_kept_or_named(store: Any) -> None:
    kept = sl.labels.rules.make_predicates(
        store,
        own=[
            sl.labels.rules.text_pattern("世界"),
            sl.labels.rules.text_pattern("café"),
            sl.labels.rules.word_pattern("世界"),
        ],
    )
    assert {"text like /世界/", "text like /café/", "words like /世界/"} <= set(kept.names)
    assert len(set(kept.names)) == len(kept.names)
    with pytest.warns(UserWarning, match=r"'text like /nowhere/' \(holds of no token\)"):
        found = sl.labels.rules.make_predicates(
            store, own=[sl.labels.rules.text_pattern("nowhere"), sl.labels.rules.text_pattern("é")]
        )
    assert found.left_out["text like /nowhere/"] == "holds of no token" and "text like /é/" in found.names
    with pytest.warns(UserWarning, match="another has its name"):
        sl.labels.rules.make_predicates(
            store, own=[sl.labels.rules.text_pattern("é", "x"), sl.labels.rules.text_pattern("a", "x")]
        )


def test_windows_show_characters_whole(store: Any) -> None:
    characters = set("".join(TEXTS)) | {"<s>"}
    n_split = 0
    for feature in range(6):
        for group in sl.analysis.max_activating_examples(store, feature, before=5, after=4).groups:
            for example in group.examples:
                assert len(example.words) == len(example.values) and all(example.words)
                assert set(example.text.replace("<s>", "")) <= characters, example.text
                assert abs(example.value) >= abs(store_value(store, feature, example.token))
                n_split += any(len(word.encode()) > 1 and len(word) == 1 for word in example.words)
    assert n_split > 10


def store_value(store: Any, feature: int, row: int) -> float:
    firings = store.feature(feature)
    return float(firings.values[firings.indices == row].sum())


def test_what_goes_out_has_no_replacement_characters(store: Any, tiny: Any, tmp_path: Path) -> None:
    from saelab.labels.autointerp.example_windows import ExampleConfig, build_case
    from saelab.labels.autointerp.prompts import explaining_prompt

    train = store.split(0.5)
    cases = [build_case(store, j, 0, train, ExampleConfig(width=12)) for j in range(6)]
    prompts = [explaining_prompt(case)[0]["content"] for case in cases if case is not None]
    assert any("世" in prompt for prompt in prompts)
    sl.interop.export_store(store, tmp_path / "out", format="saedashboard", features=[0, 1, 2], progress=False)
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
    sl.report(store, tmp_path / "report", model=tiny, features=range(6), progress=False)
    pages = "".join(path.read_text() for path in (tmp_path / "report").rglob("*") if path.suffix in (".js", ".html"))
    for text in (*prompts, written, pages, *(str(sl.analysis.describe_feature(store, j)) for j in range(4))):
        assert "\ufffd" not in text and "\\ufffd" not in json.dumps(text)


def test_a_store_reads_the_same_after_loading(store: Any) -> None:
    again = sl.FeatureStore.load(store.folder)
    n = len(store.text)
    assert again.text.words(0, n) == store.text.words(0, n) and "".join(again.text.words(0, n)).count("世") == 8
