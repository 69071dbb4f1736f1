"""Published SAEs by name: every id leads where SAELens finds it, and what is mistyped is told what is near."""

import json
import time
from pathlib import Path

import pytest

import saelab as sl
from saelab.sae.formats.hub import find_release
from saelab.sae.formats.releases import find_near, find_published, read_table

SAMPLE = json.loads((Path(__file__).parent / "saelens_ids.json").read_text())
"""release, id, repository and path of some SAEs of every release, copied from the registry of sae-lens 6.54.12"""


def test_ids_lead_where_saelens_finds_them() -> None:
    assert len({row[0] for row in SAMPLE}) == 170
    for release, id, repo, path in SAMPLE:
        found = find_published(release, id)
        assert found is not None and [found.repo, found.path] == [repo, path]
        if found.unread is None:
            place = find_release(release, id)
            assert place is not None and list(place[:2]) == [repo, path]


def test_the_table_is_whole() -> None:
    everything = sl.list_releases()
    assert len(everything) >= 13_857 and set(everything.releases) == set(read_table())
    assert len({(sae.release, sae.id) for sae in everything}) == len(everything)
    for sae in everything:
        assert sae.repo.count("/") == 1 and sae.path and "{" not in f"{sae.path}{sae.hook_point}{sae.hook_point_out}"
        numbered = sae.hook_point is not None and sae.hook_point.startswith("blocks.")
        assert not numbered or f"{sae.hook_point}".split(".")[1] == str(sae.layer)
        assert sae.d_sae is None or 256 <= sae.d_sae <= 2**20


def test_widths_are_those_that_names_mean() -> None:
    said = {
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"): 2**12,
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_65k/canonical"): 2**16,
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_1m/canonical"): 2**20,
        ("llama_scope_lxr_32x", "l3r_32x"): 32 * 4096,
        ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_98304"): 98304,
        ("sae_bench_gemma-2-2b_topk_width-2pow14_date-1109", "blocks.5.hook_resid_post__trainer_5_step_46322"): 2**14,
        ("qwen-scope-3.5-27b-w80k-l50", "layer3"): 80 * 1024,
        ("goodfire-llama-3.1-8b-instruct", "layer_19"): None,
    }
    for (release, id), d_sae in said.items():
        found = find_published(release, id)
        assert found is not None and found.d_sae == d_sae, release


def test_canonical_releases_carry_their_facts() -> None:
    found = find_release("gemma-scope-9b-it-res-canonical", "layer_9/width_16k/canonical")
    assert found is not None and found[:2] == ("google/gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_88")
    assert (found[2].model, found[2].hook_point) == ("google/gemma-2-9b-it", "blocks.9.hook_resid_post")
    embedding = find_release("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6")
    assert embedding is not None and embedding[2].hook_point == "hook_embed"
    folded = find_release("gpt2-small-mlp-tm", "blocks.11.hook_mlp_out")
    assert folded is not None and folded[2].weight_processing == "folded" and folded[2].model is None
    assert folded[2].scale is None and folded[2].likely_scale == pytest.approx(0.28515, abs=1e-5)


@pytest.mark.parametrize(
    ("release", "id", "reason"),
    [
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "a temporal SAE"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3", "one layer of a cross-layer transcoder"),
    ],
)
def test_what_is_not_read_says_why(release: str, id: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"must be of a kind that saelab has, got '{id}' of .*, which is {reason}"):
        sl.SAE.from_pretrained(release, id)
    listed = sl.list_releases(release)
    assert all(sae.unread and sae.unread.startswith(reason) for sae in listed) and "not read" in str(listed)


def test_typing_errors_are_told_what_is_near() -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean one of: gemma-scope-2b-pt-res-canonical,"):
        sl.SAE.from_pretrained("gemma-scope-2b-pt-res-cannonical", "layer_12/width_16k/canonical")
    with pytest.raises(ValueError, match=r"Did you mean one of: layer_12/width_16k/canonical,") as error:
        sl.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_12/width16k/canonical")
    assert "(?P<" not in str(error.value) and "lists all 58" in str(error.value)
    with pytest.raises(ValueError, match=r"got None. There are: layer_0/width_16k/canonical, "):
        sl.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical")
    with pytest.raises(ValueError, match=r"`model` must be .* Did you mean one of: gemma-2-2b,"):
        sl.list_releases(model="gema-2-2b")


def test_near_names_are_those_of_a_full_comparison_and_quick() -> None:
    ids = {sae.id for sae in sl.list_releases()}
    for text in ("layer_12/width_16k/averge_l0_82", "blocks.8.hook_resid_pree", "L15r_8x", "transcoder/layer_9_width"):
        start = time.perf_counter()
        near = find_near(text, ids)
        assert time.perf_counter() - start < 5, "tens of milliseconds, where comparing all takes seconds"
        assert near and len(near) <= 5
    assert find_near("layer_12/width_16k/averge_l0_82", ids)[0] == "layer_12/width_16k/average_l0_82"
    assert find_near("L15r_8x", ids)[0] == "l15r_8x"
    assert find_near("nothing like any", ids) == ()


def test_a_search_keeps_what_has_all_of_it() -> None:
    everything = sl.list_releases()

    def keep(condition) -> set[tuple[str, str]]:
        return {(sae.release, sae.id) for sae in everything if condition(sae)}

    def names(**wanted) -> set[tuple[str, str]]:
        return {(sae.release, sae.id) for sae in sl.list_releases(**wanted)}

    assert names(search="Gemma canonical", layer=12) == keep(
        lambda sae: "gemma" in sae.release and "canonical" in sae.release and sae.layer == 12
    )
    assert names(model="gpt2-small") == names(model="GPT2") == keep(lambda sae: sae.model == "gpt2") != set()
    assert names(model="google/gemma-2-2b") == names(model="gemma-2-2b")
    assert names(hook_point="hook_resid_mid", d_sae=32768) == keep(
        lambda sae: f"{sae.hook_point}".endswith(".hook_resid_mid") and sae.d_sae == 32768
    )
    assert names(hook_point="mid") == set()


def test_what_is_found_prints_and_saves(tmp_path: Path) -> None:
    few = sl.list_releases("gemma-scope-2b-pt-res-canonical", layer=12)
    lines = str(few).splitlines()
    assert len(lines) == 2 + len(few) and lines[-1] == "6 SAEs of 1 release" and few[0].id in lines[1]
    many = sl.list_releases("gemma", layer=12)
    assert len(str(many).splitlines()) == 2 + len(many.releases)
    assert "... and " in str(sl.list_releases("gemma-scope-2b-pt-res"))
    none = sl.list_releases("gema-scope-2b-pt-res")
    assert len(none) == 0 and "Did you mean one of: gemma-scope-2b-pt-res," in str(none)
    few.save(tmp_path / "few.json")
    assert json.loads((tmp_path / "few.json").read_text())["saes"][0]["l0"] == 82
    assert few._repr_html_().startswith("<")


def test_the_whole_name_of_a_release_is_that_release_in_any_case() -> None:
    found = sl.list_releases("GPT2-Small-Res-JB")
    assert found.releases == ("gpt2-small-res-jb",) == sl.list_releases("gpt2-small-res-jb").releases
    assert len(sl.list_releases("gpt2-small-res-").releases) > 1
