"""Lenses and profiles on families that differ most, with a bridge and without."""

import numpy as np
import pytest
import torch
from family import Family, same
from table import build

import saelab as sl
from saelab.analysis import fit_lens, layer_profile, lens, word_geometry

SOME = [
    ("Gemma2ForCausalLM", "auto"),
    ("MixtralForCausalLM", "huggingface"),
    ("MambaForCausalLM", "auto"),
    ("OPTForCausalLM", "auto"),
    ("BioGptForCausalLM", "huggingface"),
]
"""a softcap, experts, a state space, rows of all texts in one, no bridge"""


@pytest.mark.parametrize(("name", "backend"), SOME)
def test_layers_are_read_in_every_family(name: str, backend: str) -> None:
    family = Family(build(name), backend)
    model = family.model
    tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 22)], ctx_len=24, packed=False)
    found = lens(model, family.ids[0], n=3)
    expected = family.run(family.ids[:1])[0].float()
    same(torch.from_numpy(found.probabilities[-1]), expected[:, :259].softmax(-1).topk(3).values, "words")
    assert (found.kl[-1] < 1e-4).all() and not found.rank[-1].any()
    fitted = fit_lens(model, tokens, n_steps=2, progress=False)
    assert fitted.scores is not None and len(fitted.hook_points) == 3
    assert bool(fitted.W.isfinite().all()) and float(fitted.W.abs().amax()) > 0
    profile = layer_profile(model, tokens, length=12, n_groups=3, n_views=2, progress=False)
    assert np.isfinite(profile["entropy"].text).all() and profile.n_prompts == 12
    ids = [i for i in tokens.ids.unique().tolist() if i > 5]
    words = word_geometry(model, tokens, {"a": ids[:8], "b": ids[8:]}, min_count=2, n_permutations=19, progress=False)
    assert bool(words.reason) is (name == "MambaForCausalLM")
    assert all(weight.grad is None for weight in family.theirs.parameters())
