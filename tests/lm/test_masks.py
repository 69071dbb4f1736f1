"""The token mask: each rule removes what it says, counts it, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.lm.masks import TokenMask
from saelab.lm.models import tiny_model
from saelab.lm.tokens import Tokens, tokenize


def made(ids: list[list[int]], doc_ids: list[list[int]], special_ids: tuple[int, ...] = (0,)) -> Tokens:
    ids_, doc_ids_ = (torch.tensor(x, dtype=torch.int32) for x in (ids, doc_ids))
    return Tokens(ids=ids_, doc_ids=doc_ids_, special_ids=special_ids)


TOKENS = made([[0, 5, 6, 7], [0, 5, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, -1]])


def test_rules_count_what_they_remove_once() -> None:
    result = TokenMask(positions=(0, 3)).apply(TOKENS)
    assert result.keep.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert result.removed == {"padding": 1, "special": 3, "positions": 1, "norm": 0}
    assert result.n_kept + sum(result.removed.values()) == TOKENS.ids.numel()


def test_special_tokens_may_stay() -> None:
    result = TokenMask(special=False).apply(TOKENS)
    assert torch.equal(result.keep, TOKENS.attention_mask)


def test_padding_goes_by_document_not_by_id() -> None:
    """One id for BOS, EOS and padding must not make ordinary tokens padding, nor padding ordinary."""
    model = tiny_model(architecture="gpt2")
    tokens = tokenize(model, ["one", "three"], ctx_len=8, packed=False)
    assert tokens.special_ids == (model.tokenizer.pad_token_id,)
    everything = TokenMask(special=False).apply(tokens)
    assert everything.n_kept == len("one") + len("three") + 2
    ordinary = TokenMask().apply(tokens)
    assert ordinary.n_kept == len("one") + len("three")
    assert ordinary.removed == {"padding": 6, "special": 2, "positions": 0, "norm": 0}


def test_norms_are_compared_with_the_median_of_what_is_kept() -> None:
    norms = torch.tensor([[900.0, 1.0, 2.0, 3.0], [900.0, 30.0, 900.0, 900.0]])
    result = TokenMask(max_norm_ratio=10.0).apply(TOKENS, norms)  # median of 1, 2, 3, 30 is 2
    assert result.keep.tolist() == [[False, True, True, True], [False, False, False, False]]
    assert result.removed["norm"] == 1
    assert TokenMask(max_norm_ratio=10.0).apply(TOKENS, norms, median=3.0).removed["norm"] == 0


def test_a_norm_that_is_no_number_is_removed() -> None:
    norms = torch.ones(2, 4)
    norms[0, 1] = torch.nan
    assert TokenMask(max_norm_ratio=10.0).apply(TOKENS, norms, median=1.0).removed["norm"] == 1


def test_a_mask_by_rows_is_the_mask_of_the_rows(tiny_tokens: Any) -> None:
    mask = TokenMask(positions=(1, 30))
    whole = mask.apply(tiny_tokens)
    parts = [mask.apply(tiny_tokens[i : i + 10]) for i in range(0, len(tiny_tokens), 10)]
    assert torch.equal(torch.cat([part.keep for part in parts]), whole.keep)
    assert {rule: sum(part.removed[rule] for part in parts) for rule in whole.removed} == whole.removed


def test_bad_rules_are_clear_errors() -> None:
    for positions in ((-1, None), (3, 3)):
        with pytest.raises(ValueError, match="positions"):
            TokenMask(positions=positions)
    with pytest.raises(ValueError, match="max_norm_ratio"):
        TokenMask(max_norm_ratio=0.0)
    with pytest.raises(ValueError, match="needs the activations' norms"):
        TokenMask(max_norm_ratio=10.0).apply(TOKENS)


def test_results_print_and_save(tmp_path: Path) -> None:
    result = TokenMask().apply(TOKENS)
    assert "padding" in str(result) and "kept" in str(result)
    assert result._repr_html_().startswith("<pre>")
    result.save(tmp_path / "mask.json")
    assert json.loads((tmp_path / "mask.json").read_text()) == result.to_dict()
    assert TokenMask().to_dict() == {"special": True, "positions": (0, None), "max_norm_ratio": None}
