"""Numbers of features are taken in every type of integer, and come out as Python's."""

import json

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.functional.indices import read_feature, read_features

HOOK = "blocks.1.hook_resid_post"
KINDS = {
    "int": int, "int64": np.int64, "uint8": np.uint8, "int16": np.int16, "array": np.array, "tensor": torch.tensor,
}  # fmt: skip
MANY = {
    "list": list, "range": lambda ids: range(min(ids), max(ids) + 1), "array": np.array, "tensor": torch.tensor,
    "uint16": lambda ids: np.array(ids, np.uint16), "of numpy": lambda ids: [np.int32(i) for i in ids], "tuple": tuple,
}  # fmt: skip


@pytest.fixture(scope="module")
def sae():
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=4), normalizer="none"))


@pytest.fixture(scope="module")
def store(sae, tiny, tiny_tokens, tmp_path_factory):
    return sl.harvest(
        sae, tiny, tiny_tokens[:8], tmp_path_factory.mktemp("ids") / "store", hook_point=HOOK, progress=False
    )


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_feature(kind, sae, store, tiny, tmp_path):
    j = KINDS[kind](3)
    assert store.feature(j).feature == 3 and type(store.feature(j).feature) is int
    card = sl.analysis.describe_feature(store, j)
    card.save(tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text())["feature"] == 3
    assert str(sl.analysis.max_activating_examples(store, j)) == str(sl.analysis.max_activating_examples(store, 3))
    with sl.labels.LabelStore.open(store) as book:
        book.set(j, "a name", author="me")
        assert book[j].text == "a name" and type(book.labels(j)[0].feature) is int
        assert book.delete(j) == 1
    if kind != "array":  # which no dictionary takes as a key
        assert list(sl.Intervention(sae, {j: 1.0}, hook_point=HOOK).strengths) == [3]


@pytest.mark.parametrize("kind", list(MANY))
def test_several_features(kind, sae, store, tiny, tmp_path):
    ids = MANY[kind]([2, 3, 4])
    assert [row.feature for row in sl.analysis.logit_lens(sae, tiny, ids, n=2).features] == [2, 3, 4]
    report = sl.report(store, tmp_path / "report.html", features=ids, progress=False)
    assert report is not None
    sl.interop.export_store(store, tmp_path / "out", "saedashboard", features=ids, progress=False)
    told = json.loads((tmp_path / "out" / "batch-0.json").read_text())["features"]
    assert [row["feature_index"] for row in told] == [2, 3, 4]
    assert list(sl.Intervention(sae, ids, mode="ablate", hook_point=HOOK).strengths) == [2, 3, 4]
    found = sl.interventions.patch(tiny, "One", "Two", "e", sources=(sae, ids), hook_point=HOOK)
    assert "2, 3, 4" in found.sources[0]
    scores = sl.steering.output_scores(tiny, sae, store, ids, prompts="One", hook_point=HOOK)
    assert {row.feature for row in scores.rows} <= {2, 3, 4}


def test_what_is_no_feature_is_said(sae, store):
    for wrong in (True, 3.0, "3", np.bool_(True), np.float32(3), torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="must be an integer"):
            read_feature(wrong)
    for wrong in ([48], np.array([-1]), [np.int64(99)]):
        with pytest.raises(ValueError, match=r"must be in 0\.\.47"):
            read_features(wrong, 48)


@pytest.mark.parametrize("bad", [-1, 64, True])
def test_one_number_is_checked_where_it_enters(bad: int) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    with pytest.raises((TypeError, ValueError), match=r"must be (an integer|in 0\.\.63), got"):
        sl.interventions.ActivationCondition(sae, bad)
    with pytest.raises((TypeError, ValueError), match=r"must be (an integer|in 0\.\.63), got"):
        sl.sae.resample_dead_latents(sae, torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), [bad])
    with pytest.raises((TypeError, ValueError), match=r"must be (an integer|in 0\.\.63), got"):
        sl.analysis.nearest_features(sae).of(bad)
    with pytest.raises((TypeError, KeyError), match=r"must be (an integer|one of those asked for), got"):
        sl.analysis.logit_lens(sae, sl.lm.tiny_model(), [3])[bad]


def test_a_list_is_asked_for() -> None:
    with pytest.raises(TypeError, match="`features` must be a list of integers, got"):
        read_features(np.array([[1, 2]]), 8)


def test_an_entry_of_the_lens_is_found_by_any_integer() -> None:
    lens = sl.analysis.logit_lens(
        sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4))), sl.lm.tiny_model(), [3]
    )
    assert lens[torch.tensor(3)] is lens[np.int64(3)] is lens[3]
