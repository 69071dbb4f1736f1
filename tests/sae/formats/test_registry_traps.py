"""What `findings/` and other libraries' files have in wait for who reads them: one test for each trap."""

import json
from pathlib import Path

import pytest
import torch
from foreign import LIBRARIES, MAKERS, PLACE, K, dictionary, load, overcomplete, some_activations

import saelab as sl
from saelab.sae.formats.hub import find_release

X = some_activations(200)


def test_a_registry_that_names_another_model() -> None:
    """findings/saelens_registry_names_another_model.sh: that release's SAEs are of the instruction-tuned model."""
    for name, id in (("", "average_l0_88"), ("-canonical", "canonical")):
        found = find_release(f"gemma-scope-9b-it-res{name}", f"layer_9/width_16k/{id}")
        assert found is not None and found[2].model == "google/gemma-2-9b-it"


@pytest.mark.parametrize("format", ["saelab", *LIBRARIES])
def test_files_of_one_sae_are_equal_bytes(format: str, tmp_path: Path) -> None:
    """findings/safetensors_header_in_random_order.sh: with two entries of metadata half of the files would differ."""
    (tmp_path / "made").mkdir()
    maker = {"saelab": "saelens topk", "saelens": "saelens topk", "sparsify": "sparsify topk"}.get(format)
    maker = maker or next(name for name in MAKERS if name.startswith(format))
    sae = load(tmp_path / "made", MAKERS[maker](tmp_path / "made"))
    written = set()
    for i in range(12):
        sae.save_pretrained(tmp_path / str(i), format)
        files = sorted(path for path in (tmp_path / str(i)).rglob("*") if path.is_file())
        written.add(tuple((path.name, path.read_bytes()) for path in files))
    assert len(written) == 1


def test_a_budget_of_a_batch_is_none_of_a_token(tmp_path: Path) -> None:
    """overcomplete's `BatchTopKSAE(top_k=)` counts the codes of a whole batch, so no k of a token follows from it."""
    overcomplete(tmp_path, "batch")
    said = {"sae_class": "BatchTopKSAE", "arguments": {"top_k": 400}, "running_threshold": 0.4}
    (tmp_path / "config.json").write_text(
        json.dumps(said | {"arguments": {"top_k": 400, "dictionary_params": {"normalization": "l2"}}})
    )
    sae = sl.SAE.from_pretrained(tmp_path, **PLACE)
    assert sae.cfg.activation.name == "jumprelu" and sae.threshold is not None
    torch.testing.assert_close(sae.threshold, torch.full_like(sae.threshold, 0.4))
    assert sae.encode(X).count_nonzero(1).unique().numel() > 3


def test_a_budget_that_is_a_fraction(tmp_path: Path) -> None:
    """SAELens' batchtopk has k = 3.5: on average, which only training reads; codes follow the threshold."""
    sae = load(tmp_path, MAKERS["saelens batchtopk checkpoint"](tmp_path))
    assert sae.cfg.activation == sl.BatchTopK(k=4) and float(sae.threshold) == pytest.approx(0.45)


def test_a_threshold_that_is_not_used(tmp_path: Path) -> None:
    """dictionary_learning's AutoEncoderTopK has a buffer `threshold`, by which it chooses only where asked to."""
    made = dictionary(tmp_path, "AutoEncoderTopK")
    held = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(held | {"threshold": torch.tensor(0.7), "k": torch.tensor(K, dtype=torch.int32)}, tmp_path / "ae.pt")
    sae = load(tmp_path, made)
    assert sae.threshold is None and int(sae.encode(X).count_nonzero(1).max()) == K


def test_a_dtype_that_no_file_says(tmp_path: Path) -> None:
    """SAELens' `dtype` may be of another library's spelling or of other weights: the file's own numbers are read."""
    MAKERS["saelens topk"](tmp_path)
    whole = sl.SAE.from_pretrained(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for said in ("torch.bfloat16", "float8", None):
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"dtype": said}))
        again = sl.SAE.from_pretrained(tmp_path)
        assert again.dtype == torch.float32 and torch.equal(again.encode(X), whole.encode(X))


def test_a_factor_on_the_dictionary_is_a_logarithm(tmp_path: Path) -> None:
    """overcomplete's `multiplier` is 0 for none; thresholds are logarithms, too."""
    made = overcomplete(tmp_path, "jump")
    sae, held = load(tmp_path, made), torch.load(tmp_path / "trained.pt", weights_only=True)
    assert float(held["dictionary.multiplier"]) != 0 and bool((held["thresholds"] < 0).all())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), held["dictionary.multiplier"].exp().expand(len(sae.W_dec)))
    torch.testing.assert_close(sae.threshold, held["thresholds"].exp())
