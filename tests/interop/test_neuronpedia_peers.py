"""SAEDashboard's own run over a model and SAE beside our dashboards of the same: `make peers`."""

import json
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.interop.neuronpedia import export_store
from saelab.lm.tokenizers import SpecialWords, word_tokenizer

if any(find_spec(name) is None for name in ("sae_dashboard", "sae_lens")):
    pytest.skip("sae-dashboard is not installed here (make peers)", allow_module_level=True)

from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE as SAELensSAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

pytestmark = pytest.mark.filterwarnings("ignore")
HOOK, D, F, VOCAB, N_SEQ, CTX = "blocks.1.hook_resid_post", 32, 24, 120, 48, 32
ALL = sl.TokenMask(special=False)
UNKNOWN = {"correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"}
UNKNOWN |= {"correlated_features_l1", "decoder_weights_dist"}
"""fields that saelab measures nothing for, left empty"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same features of the same SAE, model and tokens, as SAEDashboard and as saelab show them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": D, "n_head": 4, "n_positions": CTX, "vocab_size": VOCAB}
    hf = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("both")
    hf.save_pretrained(folder / "model")
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
    named = SpecialWords("<bos>", "<eos>", "<pad>", "<unk>")
    tokenizer = word_tokenizer(words, named, no_space_before="", no_space_after="")
    tokenizer.save_pretrained(folder / "model")
    model = sl.load_model(folder / "model", progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=F, activation=sl.JumpReLU(target_l0=4.0), normalizer="none"), seed=0)
    with torch.no_grad():
        sae.W_enc.mul_(2)
        sae.b_enc.fill_(-1.0)
        sae.b_dec.zero_()
        sae.threshold.fill_(0.3)
    ids = torch.randint(4, VOCAB, (N_SEQ, CTX))
    documents = torch.arange(N_SEQ, dtype=torch.int32)[:, None].expand(N_SEQ, CTX).contiguous()
    tokens = sl.lm.Tokens(ids=ids.int(), doc_ids=documents, source="text")
    store = sl.harvest(sae, model, tokens, folder / "s", hook_point=HOOK, mask=ALL, progress=False)
    ours = json.loads(
        (
            export_store(store, folder / "out", "saedashboard", sae=sae, model=model, progress=False) / "batch-0.json"
        ).read_text()
    )

    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D,
        n_ctx=CTX,
        d_head=D // 4,
        n_heads=4,
        d_vocab=VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
    )
    theirs_model = HookedSAETransformer(cfg)
    theirs_model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    _, cache = theirs_model.run_with_cache(ids, names_filter=HOOK)
    assert torch.allclose(
        cache[HOOK].flatten(0, 1), sl.collect(model, tokens, HOOK, mask=ALL, progress=False)[:], atol=1e-3
    )
    sae.save_pretrained(folder / "lens", "saelens")
    vis = SaeVisConfig(
        hook_point=HOOK,
        features=[one["feature_index"] for one in ours["features"]],
        minibatch_size_features=F,
        minibatch_size_tokens=16,
        device="cpu",
        dtype="float32",
        verbose=False,
    )
    made = SaeVisRunner(vis).run(encoder=SAELensSAE.load_from_disk(folder / "lens"), model=theirs_model, tokens=ids)
    place = NeuronpediaRunnerConfig(sae_set="saelab", sae_path="", outputs_dir="", model_id="model", layer=1)
    vocabulary = {i: f"<{i}>" for i in range(VOCAB)}
    return json.loads(NeuronpediaConverter.convert_to_np_json(theirs_model, made, place, vocabulary)), ours


def test_its_classes_take_ours(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, ours = both
    assert len(ours["features"]) > 15
    assert NeuronpediaDashboardBatch(**ours).to_dict() == ours


def test_fields_and_their_types_are_its(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both
    assert theirs.keys() == ours.keys()
    assert all(type(theirs[name]) is type(ours[name]) for name in theirs)
    attributed = {"dfa_values", "dfa_maxValue", "dfa_targetIndex"}  # which it may leave out
    for one, other in zip(theirs["features"], ours["features"], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert type(one[name]) is type(other[name]), name
            if one[name] and other[name] and isinstance(one[name], list) and name != "activations":
                assert {type(value) for value in one[name]} == {type(value) for value in other[name]}, name
        assert {name for name in one if one[name] and other[name] == []} <= UNKNOWN
        for a, b in ((a, b) for a in one["activations"] for b in other["activations"]):
            assert a.keys() - b.keys() <= attributed and not b.keys() - a.keys()


def test_what_is_measured_is_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = both
    n_aligned = 0
    for one, other in zip(theirs["features"], ours["features"], strict=True):
        assert one["feature_index"] == other["feature_index"]
        assert other["frac_nonzero"] == pytest.approx(one["frac_nonzero"], abs=2e-5)
        names = [f"neuron_alignment_{name}" for name in ("indices", "values", "l1")]
        aligned = [
            {i: (value, l1) for i, value, l1 in zip(*map(side.get, names), strict=True)} for side in (one, other)
        ]
        for neuron in aligned[0].keys() & aligned[1].keys():
            assert aligned[1][neuron] == pytest.approx(aligned[0][neuron], abs=1e-3)
            n_aligned += 1
        positive = [value for value, _ in aligned[1].values() if value > 0]  # it ranks by value, saelab by magnitude
        assert positive == pytest.approx([value for value, _ in aligned[0].values()][: len(positive)], abs=1e-3)
        if len(set(one["freq_hist_data_bar_values"])) == 1:  # one code: all of its bars are at that
            continue
        np.testing.assert_allclose(other["freq_hist_data_bar_values"], one["freq_hist_data_bar_values"], atol=5e-3)
        moved = np.subtract(other["freq_hist_data_bar_heights"], one["freq_hist_data_bar_heights"])
        assert moved.sum() == 0 and np.abs(moved.cumsum()).max() <= 3  # float16 codes at the edge of a bar
        top = [[a for a in side["activations"] if a["bin_contains"] == -1] for side in (one, other)]
        assert {a["bin_min"] for a in (*top[0], *top[1])} == {-1}
        (highest,), (ours_highest,) = ({a["bin_max"] for a in several} for several in top)
        assert ours_highest == pytest.approx(highest, abs=highest * 2**-11 + 1e-3)  # of float16, and three decimals
        assert ours_highest == pytest.approx(max(max(a["values"]) for a in top[1]), abs=1e-6)
        assert max(max(a["values"]) for a in top[0]) <= ours_highest * (1 + 2**-11) + 1e-3
        for window in top[1]:
            assert window["values"][window["qualifying_token_index"]] > 0
    assert n_aligned > len(ours["features"])
