"""Reading other people's SAEs: codes and reconstructions are those of the formula that the file was written for."""

import json
from pathlib import Path

import pytest
import torch
from foreign import (
    MAKERS,
    PLACE,
    WRITABLE,
    D,
    F,
    Made,
    dictionary,
    draw,
    load,
    openmoss,
    saelens,
    saelens_transcoder,
    some_activations,
    write_json,
)
from safetensors.torch import load_file
from torch import Tensor

import saelab as sl
from saelab.sae.activation_registry import Activation
from saelab.sae.formats.conventions import Convention, compose
from saelab.sae.formats.registry import READERS

X = some_activations()


@pytest.fixture
def each(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Made]:
    folder = tmp_path / "a"
    folder.mkdir()
    return folder, MAKERS[request.param](folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in a file of weights, or in those of a folder, dtypes included."""
    held: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path.suffix == ".safetensors":
            held |= load_file(path)
        if path.suffix == ".pt":
            held |= torch.load(path, weights_only=True)
    return held


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("each", MAKERS, indirect=True)
def test_codes_and_reconstructions_are_the_sources(each: tuple[Path, Made], tmp_path: Path) -> None:
    folder, made = each
    sae = load(folder, made)
    z, x_hat = made.encode(X.double()), made.decode(made.encode(X.double()), X.double())
    assert (z != 0).any()
    assert torch.allclose(sae.encode(X).double(), z, rtol=0, atol=1e-5)
    assert torch.allclose(sae.encode_sparse(X).to_dense().double(), z, rtol=0, atol=1e-5)
    assert torch.allclose(sae(X).double(), x_hat, rtol=0, atol=1e-5)
    assert sae.provenance is not None and sae.provenance.hook_point.startswith("blocks.")
    assert sae.provenance.model == ("gemma-3-1b-pt" if made.format == "gemma_scope_2" else PLACE["model"])
    assert (sae.provenance.hook_point_out is None) == (sae.cfg.d_out is None)

    sae.save_pretrained(tmp_path / "own")
    again = sl.SAE.from_pretrained(tmp_path / "own")
    assert again.cfg == sae.cfg and again.provenance == sae.provenance
    assert same(dict(again.state_dict()), dict(sae.state_dict()))
    assert again.origin is not None and again.origin.format == made.format


@pytest.mark.parametrize("each", ["saelens topk", "sparsify topk"], indirect=True)
def test_training_goes_on_from_what_was_read(each: tuple[Path, Made], tmp_path: Path) -> None:
    load(*each).save_pretrained(tmp_path / "own")
    for sae in (load(*each), sl.SAE.from_pretrained(tmp_path / "own")):
        before = sae.W_dec.detach().clone()
        sae.fit(X, sl.TrainConfig(n_tokens=32, batch_size=32, lr=1e-9), progress=False)
        torch.testing.assert_close(sae.W_dec, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("each", WRITABLE, indirect=True)
def test_there_and_back_changes_no_bit(each: tuple[Path, Made], tmp_path: Path) -> None:
    folder, made = each
    load(folder, made).save_pretrained(tmp_path / "own")
    sl.SAE.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "back", made.format)
    place = folder / made.file if made.file else folder
    assert same(tensors_of(tmp_path / "back"), tensors_of(place))
    for path in place.glob("*.json"):
        if path.name != "activation_scaler.json":
            assert json.loads((tmp_path / "back" / path.name).read_text()) == json.loads(path.read_text())
    # and once more: the very bytes
    given = made.given | ({"model": PLACE["model"]} if made.format == "sparsify" else {})  # which the run's file had
    given |= {"scale": 0.7} if (place / "activation_scaler.json").exists() else {}
    file = made.file if made.format == "circuit_tracer" else None
    sl.SAE.from_pretrained(tmp_path / "back", file, **given).save_pretrained(tmp_path / "twice", made.format)
    for path in (tmp_path / "back").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("each", WRITABLE, indirect=True)
def test_an_sae_that_was_trained_on_is_not_written_as_it_was(each: tuple[Path, Made], tmp_path: Path) -> None:
    folder, made = each
    file = made.file if made.format == "circuit_tracer" else None
    before = load(folder, made)(X)
    for part in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"):
        sae, to = load(folder, made), tmp_path / part
        if getattr(sae, part) is None or (part == "b_enc" and sae.cfg.encoder != "linear"):
            continue
        with torch.no_grad():
            getattr(sae, part).add_(0.25)
        try:
            sae.save_pretrained(to, made.format)
        except ValueError as error:  # overcomplete's add nothing to reconstructions, circuit-tracer's are of one width
            assert "got a b_dec that is not 0" in str(error) or "places of one width" in str(error)
            continue
        given = made.given | ({"model": PLACE["model"]} if made.format == "sparsify" else {})
        if made.format == "saelens" and "expected_average" in (to / "cfg.json").read_text():
            given |= {"scale": 0.7}
        if made.format == "overcomplete":  # what the file left out was written beside it
            given = PLACE
        again = sl.SAE.from_pretrained(to, file, **given)
        assert torch.allclose(again(X), sae(X), atol=1e-5), part
        assert not torch.allclose(before, sae(X), atol=1e-3), part


def test_what_the_caller_says_goes_before_what_files_say(tmp_path: Path) -> None:
    made = MAKERS["saelens topk"](tmp_path)
    said = load(tmp_path, made).provenance
    assert said is not None and (said.text, said.ctx_len, said.mask["special"]) == ("some/text", 64, False)
    other = load(tmp_path, made, model="other/model", hook_point="blocks.3.hook_mlp_out", weight_processing="folded")
    assert other.provenance is not None
    assert (other.provenance.model, other.provenance.weight_processing) == ("other/model", "folded")
    assert other.provenance.hook_point == "blocks.3.hook_mlp_out"


@pytest.mark.parametrize(
    ("centered", "folded", "at", "processing"),
    [
        (False, False, "blocks.1.hook_resid_pre", "none"),
        (True, False, "blocks.1.hook_resid_pre", "folded"),  # folding layer norms changes nothing there
        (True, True, "blocks.1.ln1.hook_normalized", "folded"),
        (True, False, "blocks.1.ln1.hook_normalized", "centered"),
        (False, True, "blocks.1.hook_resid_post", "none"),
    ],
)
def test_processed_weights_are_stated(centered: bool, folded: bool, at: str, processing: str, tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    kwargs = {"center_writing_weights": centered, "fold_ln": folded}
    cfg["metadata"] |= {"hook_name": at, "model_from_pretrained_kwargs": kwargs, "model_name": "gpt2-small"}
    write_json(tmp_path / "cfg.json", cfg)
    origin = sl.SAE.from_pretrained(tmp_path).provenance
    assert origin is not None and (origin.weight_processing, origin.model) == (processing, "gpt2")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gemma scope", "model"),
        ("gemma scope", "hook_point"),
        ("openai topk", "hook_point"),
        ("sparsify topk", "hook_point"),
        ("sparsify transcoder", "hook_point_out"),
        ("llama scope", "model"),
        ("qwen scope", "activation"),
    ],
)
def test_what_no_file_says_is_asked_for(name: str, missing: str, tmp_path: Path) -> None:
    made = MAKERS[name](tmp_path)
    given = {key: value for key, value in made.given.items() if key != missing}
    with pytest.raises(ValueError, match=f"`{missing}` must be given, as this file does not say"):
        sl.SAE.from_pretrained(tmp_path, made.file, **given)


def test_a_scale_that_was_not_folded_is_asked_for(tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="`scale` must be given"):
        sl.SAE.from_pretrained(tmp_path)
    w = {name: tensor.double() for name, tensor in draw().items()}
    u = (0.25 * X.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    x_hat = ((u.relu() * (u > w["threshold"])) @ w["W_dec"] + w["b_dec"]) / 0.25
    assert torch.allclose(sl.SAE.from_pretrained(tmp_path, scale=0.25)(X).double(), x_hat, atol=1e-5)


def test_one_scale_is_not_two(tmp_path: Path) -> None:
    """A transcoder's target has a norm of its own."""
    saelens_transcoder(tmp_path)
    with pytest.raises(ValueError, match="does not say what its target was multiplied by"):
        sl.SAE.from_pretrained(tmp_path, scale=0.25)
    assert sl.SAE.from_pretrained(tmp_path, scale=1.0).cfg.normalizer == "none"


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_training_never_set_is_asked_for(name: str, tmp_path: Path) -> None:
    made = dictionary(tmp_path, name)
    held = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(held | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=r"`threshold` must be given, as training had not set that"):
        load(tmp_path, made)
    assert torch.allclose(load(tmp_path, made, threshold=0.3).encode(X).double(), made.encode(X.double()), atol=1e-5)


def test_numbers_that_are_not_what_they_are_taken_for(tmp_path: Path) -> None:
    saelens(tmp_path, draw(), "jumprelu")
    with pytest.raises(ValueError, match="must hold one threshold for all latents"):
        sl.SAE.from_pretrained(tmp_path, activation=sl.BatchTopK(k=4))
    saelens(tmp_path, draw() | {"scaling_factor": torch.full((F,), 2.0)}, "jumprelu")
    with pytest.raises(ValueError, match="must say `finetuning_scaling_factor`"):
        sl.SAE.from_pretrained(tmp_path)


def test_two_classes_of_the_same_keys_are_told_apart_by_who_knows(tmp_path: Path) -> None:
    made = dictionary(tmp_path, "BatchTopKSAE")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="may be an AutoEncoderTopK or a BatchTopKSAE"):
        sl.SAE.from_pretrained(tmp_path, **PLACE)
    sae = sl.SAE.from_pretrained(tmp_path, **PLACE, activation=sl.BatchTopK(k=4))
    assert torch.allclose(sae.encode(X).double(), made.encode(X.double()), atol=1e-5)
    assert sl.SAE.from_pretrained(tmp_path, **PLACE, activation=sl.TopK(k=4)).cfg.activation == sl.TopK(k=4)


# ---- misreadings of other tools, each by its number in the study of them
def test_03_sparsify_is_neither_transposed_nor_without_its_bias(tmp_path: Path) -> None:
    for normalize in (True, False):
        made = MAKERS["sparsify topk"](tmp_path)
        path = tmp_path / "layers.1" / "cfg.json"
        write_json(path, json.loads(path.read_text()) | {"normalize_decoder": normalize})
        sae = load(tmp_path, made)
        assert torch.equal(sae.W_dec, load_file(tmp_path / "layers.1" / "sae.safetensors")["W_dec"])
        support = (sae.encode(X) != 0) == (made.encode(X.double()) != 0)
        assert support.all()


def test_19_an_ordinary_sae_of_openmoss_can_be_converted(tmp_path: Path) -> None:
    """Its own converter refuses every autoencoder and takes transcoders for them."""
    made = openmoss(tmp_path, "jumprelu")
    sae = load(tmp_path, made)
    assert sae.cfg.d_out is None
    sae.save_pretrained(tmp_path / "b", "saelens")
    assert torch.allclose(sl.SAE.from_pretrained(tmp_path / "b")(X), sae(X), atol=1e-5)
    settings = json.loads((tmp_path / "config.json").read_text())
    write_json(
        tmp_path / "config.json", settings | {"hook_point_out": "blocks.1.hook_mlp_out", "norm_activation": "inference"}
    )
    assert load(tmp_path, made).cfg.d_out == D


def test_30_the_bias_of_autoencodernew_is_read(tmp_path: Path) -> None:
    made = dictionary(tmp_path, "AutoEncoderNew")
    assert torch.equal(load(tmp_path, made).b_dec, draw(9)["b_dec"])


# ---- norms, folded and not: mistakes that others made
def test_29_thresholds_move_with_the_norms_that_they_are_compared_with(tmp_path: Path) -> None:
    made = openmoss(tmp_path, "jumprelu")
    sae = load(tmp_path, made)
    norms = sae.W_dec.norm(dim=1)
    read = load_file(tmp_path / "sae_weights.safetensors")["activation_function.log_jumprelu_threshold"].exp()
    assert torch.allclose(sae.threshold * norms, read, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "norms"), [(sl.JumpReLU(), "choice"), (sl.TopK(k=F), "choice"), (sl.TopK(k=F), "codes")]
)
def test_29_a_latent_without_a_decoder_row_never_fires(activation: Activation, norms: str) -> None:
    """Times its norm it is 0, which is above nothing; and nothing is divided by 0."""
    parts = draw()
    parts["W_dec"][3], parts["threshold"] = 0.0, torch.zeros(F)
    cfg, tensors, _ = compose(parts, Convention(activation=activation, decoder_norms=norms))
    sae = sl.SAE(cfg)
    sae.load_state_dict(tensors)
    codes = sae.encode(X)
    assert codes.isfinite().all() and (codes[:, 3] == 0).all() and (codes != 0).any(0).sum() > F // 2
    assert sae(X).isfinite().all()


def test_31_llama_scope_fires_as_rarely_as_its_threshold_says(tmp_path: Path) -> None:
    made = MAKERS["llama scope"](tmp_path)
    sae, s, e = load(tmp_path, made), D**0.5 / 3.0, draw(13)
    assert torch.allclose(sae.threshold, torch.full((F,), s * 0.4))
    h = (s * X) @ e["W_enc"] + e["b_enc"]
    assert (sae.encode(X) != 0).sum() == (h > s * 0.4).sum() != (h > 0.4).sum()


def test_32_gemma_scope_subtracts_nothing(tmp_path: Path) -> None:
    """With b_dec subtracted its reconstructions are far off, which looks like a bad SAE."""
    made = MAKERS["gemma scope"](tmp_path)
    sae, e = load(tmp_path, made), draw(10)
    u = X @ e["W_enc"] + e["b_enc"]
    assert torch.allclose(sae.encode(X), u.relu() * (u > e["threshold"]), atol=1e-5)
    wrong = (X - e["b_dec"]) @ e["W_enc"] + e["b_enc"]
    assert not torch.allclose(sae.encode(X), wrong.relu() * (wrong > e["threshold"]), atol=0.1)


@pytest.mark.parametrize("name", ["openai topk", "saelens jumprelu, constant norm"])
def test_33_norms_of_single_tokens_need_the_tokens(name: str, tmp_path: Path) -> None:
    made = MAKERS[name](tmp_path)
    sae = load(tmp_path, made)
    with pytest.raises(ValueError, match=r"`x` must be given to decode"):
        sae.decode(sae.encode(X))
    assert torch.allclose(sae.decode(sae.encode(X), x=X), sae(X), atol=1e-6)
    with pytest.raises(ValueError, match="must be linear to be folded"):
        sae.fold()


# ---- frugal
def test_some_latents_alone(tmp_path: Path) -> None:
    made = MAKERS["saelens jumprelu"](tmp_path)
    whole, part = load(tmp_path, made), load(tmp_path, made, latents=[7, 2, 11])
    assert part.cfg.d_sae == 3
    assert torch.allclose(part.encode(X), whole.encode(X)[:, [7, 2, 11]], atol=1e-6)
    whole.save_pretrained(tmp_path / "own")
    own = sl.SAE.from_pretrained(tmp_path / "own", latents=[7, 2, 11])
    assert torch.equal(own.encode(X), part.encode(X))
    for wrong in ([], [F], [-1], [3, 3]):
        with pytest.raises(ValueError, match="`latents` must"):
            load(tmp_path, made, latents=wrong)


def test_some_latents_alone_are_in_no_groups(tmp_path: Path) -> None:
    """Groups of a Matryoshka dictionary end where latents end that are not there any more."""
    made = MAKERS["dictionary_learning MatryoshkaBatchTopKSAE"](tmp_path)
    whole, part = load(tmp_path, made), load(tmp_path, made, latents=[1, 19])
    assert whole.cfg.prefixes == (4, 10, F) and part.cfg.prefixes is None
    assert torch.allclose(part.encode(X), whole.encode(X)[:, [1, 19]], atol=1e-6)


@pytest.mark.parametrize("name", ["saelens topk", "sparsify groupmax", "saelens matching pursuit"])
def test_latents_that_depend_on_others_cannot_be_had_alone(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`latents` needs codes that do not depend on one another"):
        load(tmp_path, MAKERS[name](tmp_path), latents=[0, 1])


def test_one_copy_in_the_dtype_asked_for(tmp_path: Path) -> None:
    made = MAKERS["saelens jumprelu"](tmp_path)
    sae = load(tmp_path, made, dtype=torch.bfloat16)
    assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}
    held = load_file(tmp_path / "sae_weights.safetensors")
    assert torch.equal(sae.W_enc, held["W_enc"].bfloat16())
    assert sae.W_enc.T.is_contiguous()  # latent by latent, as training and search want it


def test_nothing_is_drawn_for_weights_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MAKERS["saelens jumprelu"](tmp_path)
    monkeypatch.setattr(torch, "randn", lambda *sizes, **options: pytest.fail("weights were drawn"))
    load(tmp_path, made)


def test_shapes_are_checked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path, draw() | {"b_enc": torch.zeros(F + 1)}, "jumprelu")
    monkeypatch.setattr("saelab.sae.formats.conventions.own", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"b_enc must have shape \(20,\), got \(21,\)"):
        sl.SAE.from_pretrained(tmp_path)


def test_every_format_has_a_file_here() -> None:
    first_words = {name.split()[0] for name in MAKERS}
    assert {name.split("_")[0] for name in READERS} == {name.split("_")[0] for name in first_words}
