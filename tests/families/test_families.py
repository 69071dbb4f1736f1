"""Families that differ most, in every use; `make families` has all of them."""

from contextlib import nullcontext

import pytest
import torch
from family import Family, same, texts_of
from run import judge
from table import build, list_architectures, list_unbridged
from uses import USES

import saelab as sl
from saelab.lm.hook_points import hook_points_of, share_weights
from saelab.lm.unembedding import read_out

SOME = {
    "dense": "LlamaForCausalLM",
    "mixture of experts": "MixtralForCausalLM",
    "state space": "MambaForCausalLM",
    "hybrid": "FalconH1ForCausalLM",
    "longrope": "Phi3ForCausalLM",
    "pictures": "LlavaForConditionalGeneration",
}


def test_the_registries_are_read() -> None:
    assert set(SOME.values()) < set(list_architectures()) and len(list_architectures()) > 50
    assert "BioGptForCausalLM" in list_unbridged() and not set(list_unbridged()) & set(list_architectures())


def test_a_family_without_a_bridge_is_right_in_every_use() -> None:
    found = judge("BioGptForCausalLM")
    assert set(found) == set(USES) and {verdict for verdict, _ in found.values()} == {"right"}, found


@pytest.mark.parametrize(
    ("kind", "backend"), [*((kind, "auto") for kind in SOME), ("hybrid", "huggingface"), ("longrope", "huggingface")]
)
def test_a_family_is_right_in_every_use(kind: str, backend: str) -> None:
    found = judge(SOME[kind], backend)
    # transformer-lens 3.9 warns of hook points of pictures, which no text-only use reads
    warned = found.pop("warned", ("warned", ""))[1]
    assert not warned.replace("UserWarning: Hook alias", "", 1) or warned.startswith("UserWarning: Hook alias")
    assert set(found) == set(USES) and {verdict for verdict, _ in found.values()} == {"right"}, found


def test_what_a_model_noted_of_a_picture_does_not_reach_a_text() -> None:
    """Hugging Face's Qwen-VL keeps the places of the last prompt's pictures, and counts a text's from there."""
    if (name := "Qwen3VLForConditionalGeneration") not in list_architectures():
        pytest.skip("this transformer_lens has no bridge for it")
    family = Family(build(name))
    expected = family.write("Hello you")
    for hooked in (False, True):  # without a hook a bridge's plain twin runs, with one the bridge
        with family.hooked(lambda x: x) if hooked else nullcontext():
            assert texts_of(family, ["Hello you"]) == [expected]
            running, _ = hook_points_of(family.model).route([])
            noting = [module for module in running.modules() if hasattr(module, "rope_deltas")]
            assert len(noting) == 1
            noting[0].rope_deltas = torch.tensor([[5]])
            assert texts_of(family, ["Hello you"]) == [expected]


def test_a_norm_that_reads_several_blocks_has_no_direct_effects() -> None:
    if (name := "Inkling2ForCausalLM") not in list_unbridged():
        pytest.skip("this transformers has no model that mixes the blocks before its final norm")
    with pytest.raises(ValueError, match="reads what the last block hands on"):
        read_out(Family(build(name)).model, torch.ones(1, 32))


def test_hooks_that_lead_to_other_modules_lead_to_the_copies() -> None:
    """The bridge of OPT has no module for an MLP as a whole: hooks on its parts fire the hook points of the whole."""
    family, point = Family(build("OPTForCausalLM"), "transformer_lens"), "blocks.1.mlp.hook_out"
    other = share_weights(family.model)
    seen: list[torch.Tensor] = []
    family.model.hook_dict[point].add_hook(lambda x, hook: seen.append(x))
    expected = family.run(family.ids)
    with sl.splice(other, {point: torch.zeros_like}):
        moved = sl.lm.logits(other, family.ids)
    assert not seen and not torch.allclose(moved, expected, atol=1e-3)
    same(sl.lm.logits(other, family.ids), expected, "logits")
