"""Features of a prompt by token and by feature: those of a direct encoding, with masks, characters and rankings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.analysis.prompt_features import read_prompt

HOOK = "blocks.1.hook_resid_post"


def test_codes_are_those_of_a_direct_encoding_by_token_word_and_feature(
    tiny: Any, signed_sae: Any, signed_store: Any
) -> None:
    text = "né ✓"
    found = read_prompt(signed_sae, tiny, text, signed_store.provenance, predict=True)
    ids = sl.tokenize(tiny, [text], ctx_len=len(found.ids), packed=False).ids
    z = signed_sae.encode(sl.lm.capture(tiny, ids, [HOOK])[HOOK][0]).detach()
    assert found.words == ("<s>", "n", "é", " ", "✓") and "".join(found.words[1:]) == text
    assert [group.stop - group.start for group in found.groups] == [1, 1, 2, 1, 3]
    assert found.by_token[0] == {} and found.by_word[0] == {}  # BOS
    for place, codes in enumerate(found.by_token[1:], 1):
        assert set(codes) == set(z[place].nonzero()[:, 0].tolist())
        assert all(value == pytest.approx(float(z[place, j]), abs=1e-6) for j, value in codes.items())
    for group, codes in zip(found.groups[1:], found.by_word[1:], strict=True):
        for j, value in codes.items():
            rows = z[group, j]
            assert value == pytest.approx(float(rows[rows.abs().argmax()]), abs=1e-6)
        sizes = [abs(value) for value in codes.values()]
        assert sizes == sorted(sizes, reverse=True)
    assert {(word, j) for j, places in found.by_feature.items() for word, _ in places} == {
        (word, j) for word, codes in enumerate(found.by_word) for j in codes
    }
    assert all(found.peak(j) == max((value for _, value in places), key=abs) for j, places in found.by_feature.items())
    assert found.predicts is not None
    assert torch.allclose(found.predicts, sl.lm.logits(tiny, ids)[0, -1].float(), atol=1e-5)


def test_running_to_the_end_changes_no_code(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    whole, part = (
        read_prompt(signed_sae, tiny, "an owl", signed_store.provenance, predict=predict) for predict in (True, False)
    )
    assert whole.by_word == part.by_word and part.predicts is None


def test_the_line_that_parts_documents_is_text_here(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    text = "a\n<|endoftext|>\nb"
    assert "".join(read_prompt(signed_sae, tiny, text, signed_store.provenance).words[1:]) == text


def test_tokens_that_the_mask_leaves_out_have_no_codes(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    origin = replace(signed_store.provenance, mask={"special": False, "positions": [2, 4], "max_norm_ratio": 3.0})
    found = read_prompt(signed_sae, tiny, "a fox", origin)
    assert [bool(codes) for codes in found.by_word] == [False, False, True, True, False, False]


def test_rarity_is_the_information_of_firing(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    found = read_prompt(signed_sae, tiny, "The owl hears the fox.", signed_store.provenance)
    rarity = found.rarity(signed_store)
    fires = signed_store.statistics.fires.sum(1)
    assert set(rarity) == set(found.by_feature)
    for j, nats in rarity.items():
        assert nats == pytest.approx(-np.log(max(fires[j], 0.5) / len(signed_store)))
    assert list(rarity.values()) == sorted(rarity.values(), reverse=True)


def test_effects_of_an_attribution_add_up_over_words(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    found = read_prompt(signed_sae, tiny, "né ✓", signed_store.provenance)
    made = sl.interventions.attribute(tiny, signed_sae, found.ids, "a", hook_point=HOOK, progress=False)
    by_word = found.effects(made)
    assert sum(sum(effects.values()) for effects in by_word) == pytest.approx(float(made.effects.sum()), abs=1e-6)
    sums: dict[int, float] = {}
    for effects in by_word:
        for j, effect in effects.items():
            sums[j] = sums.get(j, 0.0) + effect
    assert sums == pytest.approx(made.by_feature, abs=1e-6)


def test_a_prompt_that_does_not_fit_is_refused(tiny: Any, signed_sae: Any, signed_store: Any) -> None:
    with pytest.raises(ValueError, match="must fit the model's context of"):
        read_prompt(signed_sae, tiny, "a" * 5000, signed_store.provenance)
