"""A typed prompt's answer: rankings, two prompts, labels, and only what is JSON."""

import json
from typing import Any

import numpy as np
import pytest

import saelab as sl
from saelab.analysis.prompt_features import read_prompt
from saelab.explorer import prompt_features
from saelab.explorer.prompt_features import PromptQuery, describe_prompt
from saelab.explorer.security import ExplorerLimits

HOOK = "blocks.1.hook_resid_post"
HOSTILE = "<img src=x onerror=alert(1)>"


def ask(tiny: Any, signed_sae: Any, signed_store: Any, **plain: Any) -> dict[str, Any]:
    query = PromptQuery.from_dict(plain)
    answer = describe_prompt(
        signed_sae, tiny, signed_store, query, lambda features: {j: HOSTILE for j in features if j % 2}
    )
    assert json.loads(json.dumps(answer, allow_nan=False)) == json.loads(json.dumps(answer))
    return answer


def test_by_activation_the_largest_codes_come_first(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    answer = ask(tiny, signed_sae, signed_store, text="né ✓", k=2)
    found = read_prompt(signed_sae, tiny, "né ✓", signed_store.provenance)
    assert answer["words"] == list(found.words)
    for row, codes in zip(answer["tokens"], found.by_word, strict=True):
        assert row["codes"] == [[j, z, z] for j, z in list(codes.items())[:2]]
    peaks = [abs(row["peak"]) for row in answer["features"]]
    assert peaks == sorted(peaks, reverse=True) and {row["feature"] for row in answer["features"]} == set(
        found.by_feature
    )
    for row in answer["features"]:
        assert dict(row["where"]) == dict(found.by_feature[row["feature"]])
        assert row["label"] == (HOSTILE if row["feature"] % 2 else "")
    chances = [row["p"] for row in answer["predictions"]]
    assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1


def test_by_rarity_and_by_attribution(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    rare = ask(tiny, signed_sae, signed_store, text="The fox", rank="rarity")
    density = signed_store.statistics.fires.sum(1) / len(signed_store)
    scores = [row["score"] for row in rare["features"]]
    assert scores == sorted(scores, reverse=True)
    assert all(
        row["score"] == pytest.approx(-np.log(density[row["feature"]]))
        for row in rare["features"]
        if density[row["feature"]] > 0
    )
    made = ask(tiny, signed_sae, signed_store, text="The fox", rank="attribution", target="a")
    effects = sl.interventions.attribute(tiny, signed_sae, "The fox", "a", hook_point=HOOK, progress=False)
    assert made["target"] == "a" and made["log_prob"] == effects.clean
    assert {row["feature"]: row["score"] for row in made["features"]} == pytest.approx(effects.by_feature, abs=1e-6)
    sizes = [abs(row["score"]) for row in made["features"]]
    assert sizes == sorted(sizes, reverse=True)
    by_token = {
        (int(position), int(feature)): float(effect)
        for position, feature, effect in zip(effects.positions, effects.features, effects.effects, strict=True)
    }
    for place, row in enumerate(made["tokens"]):
        assert all(score == pytest.approx(by_token[place, j], abs=1e-6) for j, _, score in row["codes"])
    likely = ask(tiny, signed_sae, signed_store, text="The fox", rank="attribution")
    assert likely["target"] == likely["predictions"][0]["token"]


def test_two_prompts_are_compared(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    answer = ask(tiny, signed_sae, signed_store, text="The fox", other="An owl")
    one, other = (read_prompt(signed_sae, tiny, text, signed_store.provenance) for text in ("The fox", "An owl"))
    assert answer["other"]["words"] == list(other.words)
    assert {row["feature"] for row in answer["difference"]} == {*one.by_feature, *other.by_feature}
    for row in answer["difference"]:
        assert row["difference"] == one.peak(row["feature"]) - other.peak(row["feature"])
    sizes = [abs(row["difference"]) for row in answer["difference"]]
    assert sizes == sorted(sizes, reverse=True)
    same = ask(tiny, signed_sae, signed_store, text="The fox", other="The fox")
    assert not any(row["difference"] for row in same["difference"])


def test_one_forward_pass_and_one_encoding_are_enough(
    tiny: Any, signed_sae: Any, signed_store: Any, monkeypatch: Any
) -> None:
    n_forwards, n_encodings = [], []
    hook = tiny.original_model.register_forward_pre_hook(lambda *_: n_forwards.append(1))
    encode = sl.SAE.encode_sparse
    monkeypatch.setattr(sl.SAE, "encode_sparse", lambda *args, **how: n_encodings.append(1) or encode(*args, **how))
    try:
        ask(tiny, signed_sae, signed_store, text="The fox hears the owl")
    finally:
        hook.remove()
    assert len(n_forwards) == len(n_encodings) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": ""}, "must hold text"),
        ({"text": "a" * 101}, "at most 100 characters"),
        ({"other": "a" * 101}, "at most 100 characters"),
        ({"rank": "size"}, "`rank` must be"),
        ({"k": 0}, "`k` must be"),
        ({"k": 1.5}, "`k` must be"),
        ({"more": 1}, "has no key 'more'"),
        ({"text": ["a"]}, "`text` must be"),
    ],
)
def test_a_wrong_query_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PromptQuery.from_dict({"text": "a"} | change, ExplorerLimits(prompt=100))


def test_a_target_that_is_no_token_is_refused(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    with pytest.raises(ValueError, match="must be one token of the model"):
        ask(tiny, signed_sae, signed_store, text="The fox", rank="attribution", target="nothing like it")


def test_only_so_many_features_are_listed(tiny: Any, signed_sae: Any, signed_store: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompt_features, "N_FEATURES", 2)
    answer = ask(tiny, signed_sae, signed_store, text="The fox", other="An owl")
    assert len(answer["features"]) == len(answer["difference"]) == 2
