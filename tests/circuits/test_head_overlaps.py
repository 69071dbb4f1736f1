"""Overlap of what heads write and read: by the weights, a planted pair stands out, random subspaces do not."""

import numpy as np
import pytest
import torch
from families.table import build
from induction_made import BEFORE, COPIES, N, make_induction
from unchecked import unchecked

import saelab as sl
from saelab.circuits.head_overlaps import head_overlap
from saelab.lm.hook_points import hook_points_of
from saelab.lm.models import _byte_tokenizer


def span(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[2][:rank]


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("reads", ["query", "key", "value"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_overlaps_are_those_of_the_weights(architecture: str, reads: str, rank: int) -> None:
    model = sl.lm.tiny_model(n_layers=2, architecture=architecture)  # type: ignore[arg-type]
    twin, which = hook_points_of(model).running, ("query", "key", "value").index(reads)
    found = head_overlap(model, reads=reads, rank=rank, n_null=20)  # type: ignore[arg-type]
    assert np.isnan(found.overlap[1]).all() and np.isnan(found.overlap[0, :, 0]).all()
    for first in range(4):
        for second in range(4):
            if architecture == "gpt2":
                a, b = (block.attn for block in twin.transformer.h)  # type: ignore[union-attr]
                center = torch.eye(32).double() - 1 / 32
                norms = [center * block.ln_1.weight.double() for block in twin.transformer.h]  # type: ignore[union-attr]
                value = norms[0] @ a.c_attn.weight.double()[:, 64 + 8 * first :][:, :8]
                written = value @ a.c_proj.weight.double()[8 * first : 8 * first + 8]
                read = (norms[1] @ b.c_attn.weight.double()[:, 32 * which + 8 * second :][:, :8]).T
            else:
                layers = twin.model.layers  # type: ignore[union-attr]
                norms = [torch.diag(block.input_layernorm.weight.double()) for block in layers]
                a, b = (block.self_attn for block in layers)
                own = first // 2
                value = norms[0] @ a.v_proj.weight.double()[8 * own : 8 * own + 8].T
                written = value @ a.o_proj.weight.double()[:, 8 * first : 8 * first + 8].T
                own = second if which == 0 else second // 2
                read = (b.q_proj, b.k_proj, b.v_proj)[which].weight.double()[8 * own : 8 * own + 8] @ norms[1]
            expected = (span(written, rank) @ span(read, rank).T).square().sum() / rank
            assert found.overlap[0, first, 1, second] == pytest.approx(float(expected.detach()), rel=1e-4)


def test_random_subspaces_overlap_by_chance() -> None:
    """A tiny random model's heads are such: their mean is within four standard errors, 24 pairs of layers' heads."""
    found = head_overlap(sl.lm.tiny_model(architecture="gpt2"), rank=4)
    known = found.overlap[~np.isnan(found.overlap)]
    assert len(known) == 48 and found.chance == 4 / 32
    assert abs(known.mean() - found.chance) < 4 * found.chance_std / np.sqrt(12)
    assert found.chance < found.chance_95 < found.chance + 4 * found.chance_std
    z = found.z[~np.isnan(found.z)]
    np.testing.assert_allclose(z, (known - found.chance) / found.chance_std)


def test_the_planted_pair_is_found_and_not_once_its_output_is_turned_away(tmp_path) -> None:
    model = make_induction()
    found = head_overlap(model)
    value, writes, reads = found.top(1)[0]
    assert (writes, reads) == (BEFORE, COPIES) and found.z[(*writes, *reads)] > 6
    assert sorted(found.overlap[0, :, 1].ravel())[-2] < found.chance + 4 * found.chance_std
    assert "0.1    1.0" in str(found).splitlines()[2] and f"{value:.3f}" in str(found)
    found.save(tmp_path / "overlap.json")
    output = model.original_model.transformer.h[0].attn.c_proj.weight
    with torch.no_grad():  # what was the token before goes where positions are
        output.copy_(torch.cat([output[:, :N], output[:, 2 * N :], output[:, N : 2 * N]], 1))
    turned = head_overlap(model)
    assert turned.overlap[0, 1, 1, 0] < found.chance < value and turned.top(1)[0][1:] != (BEFORE, COPIES)


@pytest.mark.parametrize(
    "name", ["Gemma2ForCausalLM", "GPTNeoXForCausalLM", "DeepseekV3ForCausalLM", "Olmo2ForCausalLM"]
)
def test_other_families_have_overlaps_in_range(name: str) -> None:
    model = sl.load_model(build(name), tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))
    found = head_overlap(model, n_null=20)
    known = found.overlap[~np.isnan(found.overlap)]
    assert len(known) == 48 and (known >= 0).all() and (known <= 1 + 1e-9).all()


def test_what_cannot_be_compared_is_refused(tiny) -> None:
    for options, complaint in (
        ({"reads": "output"}, "`reads` must be"),
        ({"rank": 9}, r"`rank` must be in 1\.\.8"),
        ({"n_null": 1}, "`n_null` must be at least 20"),
    ):
        with unchecked(), pytest.raises(ValueError, match=complaint):
            head_overlap(tiny, **options)
    tokenizer = _byte_tokenizer(("<s>", "</s>", "<pad>"))
    bloom = sl.load_model(build("BloomForCausalLM"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"must be products of queries and keys .* reads='value'"):
        head_overlap(bloom)
    assert head_overlap(bloom, reads="value", n_null=20).overlap.shape == (3, 4, 3, 4)
    with pytest.raises(ValueError, match="must have heads of attention to be compared"):
        head_overlap(sl.load_model(build("Lfm2ForCausalLM"), tokenizer=tokenizer))
