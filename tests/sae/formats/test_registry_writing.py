"""Writing SAEs as other libraries read them, converting them, and speaking to SAEBench."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import MAKERS, PLACE, D, F, load, some_activations
from safetensors.torch import load_file
from torch import Tensor

import saelab as sl
from saelab.cli.app import main
from saelab.evaluation.results import Evaluation
from saelab.interop.saebench import describe_core, save_saebench
from saelab.sae.activation_functions import AbsJumpReLU, Gated, GroupMax
from saelab.sae.archetypal import Archetypal
from saelab.sae.encoders import MatchingPursuit
from saelab.sae.training_sae import TrainingSAE
from saelab.stores.manifest import Provenance
from saelab.stores.results import Result

X = some_activations(200)
AXES: dict[str, dict[str, Any]] = {
    "relu": {"activation": sl.ReLU(target_l0=4.0)},
    "jumprelu": {"activation": sl.JumpReLU(target_l0=4.0)},
    "gated": {"activation": Gated(target_l0=4.0)},
    "absjumprelu": {"activation": AbsJumpReLU(target_l0=4.0)},
    "topk": {"activation": sl.TopK(k=4)},
    "abstopk": {"activation": sl.AbsTopK(k=4)},
    "batchtopk": {"activation": sl.BatchTopK(k=4), "prefixes": (4, 10, F)},
    "batchabstopk": {"activation": sl.BatchAbsTopK(k=4)},
    "groupmax": {"activation": GroupMax(k=4)},
    "pursuit": {"activation": sl.TopK(k=4), "encoder": MatchingPursuit(), "normalizer": "none"},
    "relu transcoder": {"activation": sl.ReLU(target_l0=4.0), "d_out": D - 1, "skip": True},
    "topk transcoder": {"activation": sl.TopK(k=4), "d_out": D},
    "narrow topk transcoder": {"activation": sl.TopK(k=4), "d_out": D - 1},
    "archetypal": {"activation": sl.JumpReLU(target_l0=4.0), "dictionary": Archetypal(n_points=8)},
    "token norm": {"activation": sl.TopK(k=4), "normalizer": "token_norm"},
}
CAN = {
    "saelens": {
        "archetypal",
        "relu",
        "jumprelu",
        "gated",
        "topk",
        "abstopk",
        "batchtopk",
        "pursuit",
        "relu transcoder",
        "token norm",
    },
    "sparsify": {"topk", "groupmax", "topk transcoder"},
    "dictionary_learning": {"archetypal", "relu", "jumprelu", "gated", "topk", "batchtopk"},
    "circuit_tracer": set(),  # whose transcoders have one width: test_circuit_tracer_layers.py
    "overcomplete": set(),  # whose SAEs have no b_dec: test_overcomplete.py
}


def some_provenance(hook_point_out: str | None = None) -> Provenance:
    return Provenance(
        model="some/model",
        weight_processing="none",
        hook_point="blocks.1.hook_resid_post",
        text="a.txt",
        tokens_sha256="00",
        mask={"special": True, "positions": [0, None], "max_norm_ratio": None},
        dtype="float32",
        ctx_len=64,
        n_tokens=200,
        seed=None,
        versions={},
        hook_point_out=hook_point_out,
    )


def some_sae(name: str, normalizer: str = "none", seed: int = 0) -> sl.SAE:
    """Seeded weights, biases and thresholds that are nothing special; a normalizer that was fitted."""
    cfg = sl.SAEConfig(**{"d_in": D, "d_sae": F, "normalizer": normalizer, "dictionary": "free", **AXES[name]})
    sae, g = sl.SAE(cfg, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, part in sae.named_parameters():
            near = part if key == "W_dec" and name == "pursuit" else torch.randn(part.shape, generator=g) * 0.5
            part.copy_(near.abs() if key == "threshold" else near)
        if cfg.activation.threshold == "running":
            sae.threshold.fill_(0.6)
    sae.normalizer.fit(X)
    if sae.target_normalizer is not None:
        sae.target_normalizer.fit(X[:, : cfg.d_target] * 2 - 1)
    sae.provenance = some_provenance("blocks.1.hook_mlp_out" if cfg.d_out else None)
    return sae


@pytest.mark.parametrize("format", CAN)
@pytest.mark.parametrize("name", AXES)
def test_what_is_written_is_the_same_sae_or_refused(name: str, format: str, tmp_path: Path) -> None:
    """25, 26, 29: folding a normalizer moves every weight, bias and threshold that it must."""
    if name not in CAN[format]:
        with pytest.raises(ValueError, match=r"SAELens|sparsify|dictionary_learning|circuit-tracer|overcomplete"):
            some_sae(name).save_pretrained(tmp_path, format)
        assert not list(tmp_path.iterdir())
        return
    for normalizer in ("none",) if "normalizer" in AXES[name] else ("none", "scale", "whiten"):
        sae = some_sae(name, normalizer)
        sae.save_pretrained(tmp_path, format)
        out = {"hook_point_out": "blocks.1.hook_mlp_out"} if sae.cfg.d_out else {}
        again = sl.SAE.from_pretrained(tmp_path, **({} if format == "saelens" else PLACE | out))
        assert torch.allclose(again.encode(X), sae.encode(X), atol=1e-5)
        assert torch.allclose(again(X), sae(X), atol=1e-5)
        if normalizer == "none" and format != "dictionary_learning":  # whose jumprelu has another bias
            assert all(torch.equal(t, sae.state_dict()[n]) for n, t in again.state_dict().items())
        if format == "saelens":  # in files of our own writing nothing is lost but gates, which only training needs
            assert again.provenance == sae.provenance and again.cfg.prefixes == sae.cfg.prefixes
            assert again.cfg.activation.name == ("jumprelu" if name == "gated" else sae.cfg.activation.name)


def test_30_a_batch_threshold_is_that_of_the_codes_it_is_compared_with(tmp_path: Path) -> None:
    """With a scale and decoder norms both to fold, it has to stay in the units of the codes."""
    made = MAKERS["saelens batchtopk checkpoint"](tmp_path)
    sae = load(tmp_path, made)
    sae.origin = None
    sae.save_pretrained(tmp_path / "b", "saelens")
    assert torch.allclose(load_file(tmp_path / "b" / "sae_weights.safetensors")["threshold"], torch.tensor(0.45))
    again = sl.SAE.from_pretrained(tmp_path / "b")
    assert torch.allclose(again.encode(X).double(), made.encode(X.double()), atol=1e-5)


def test_27_28_34_units_are_those_of_the_activations(tmp_path: Path) -> None:
    """Normalized within, raw outside: what training, evaluation and others see of reconstructions."""
    x = X * 40 + 7
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=F, activation=sl.TopK(k=4), normalizer="scale"))
    TrainingSAE(sae, sl.TrainConfig(n_tokens=200, batch_size=100)).prepare(x)
    assert torch.allclose(sae.normalizer.unnormalize(sae.b_dec), x.mean(0), atol=1e-3)  # 28: it begins at the mean
    fvu = ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
    sae.save_pretrained(tmp_path, "saelens")
    again = sl.SAE.from_pretrained(tmp_path)
    folded = ((x - again(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert fvu < 1 and folded == pytest.approx(fvu, rel=1e-4)


def test_a_threshold_must_be_there_to_be_written(tmp_path: Path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=D, d_sae=F, activation=sl.BatchTopK(k=4)))
    with pytest.raises(ValueError, match="must have its inference threshold"):
        sae.save_pretrained(tmp_path, "saelens")
    with pytest.raises(ValueError, match="`format` must be 'saelab' or one of"):
        sae.save_pretrained(tmp_path, "keras")


def test_an_sae_of_no_known_place_stays_so(tmp_path: Path) -> None:
    sae = some_sae("jumprelu")
    sae.provenance = None
    sae.save_pretrained(tmp_path / "a", "saelens")
    assert sl.SAE.from_pretrained(tmp_path / "a").provenance is None
    sae.save_pretrained(tmp_path / "b", "dictionary_learning")
    with pytest.raises(ValueError, match="`model` must be given"):
        sl.SAE.from_pretrained(tmp_path / "b")


def test_saving_over_another_keeps_nothing_of_its_origin(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    load(tmp_path / "a", MAKERS["saelens gated"](tmp_path / "a")).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "origin.safetensors").is_file()
    some_sae("topk").save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "origin.safetensors").exists()
    assert sl.SAE.from_pretrained(tmp_path / "b").origin is None


# ---- the command
def shell(*words: object) -> int:
    import sys

    before, sys.argv = sys.argv, ["saelab", *map(str, words)]
    try:
        return main()
    finally:
        sys.argv = before


@pytest.mark.parametrize(
    "name", ["saelens gated, reads x", "sparsify skip transcoder", "dictionary_learning BatchTopKSAE"]
)
def test_convert_both_ways_changes_no_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    made = MAKERS[name](tmp_path / "a")
    source = tmp_path / "a" / (made.file or "")
    given = [word for key, value in made.given.items() for word in (f"--{key.replace('_', '-')}", value)]
    assert shell("convert", source, tmp_path / "own", *given) == 0
    assert f"read as {made.format}" in capsys.readouterr().out
    assert shell("convert", tmp_path / "own", tmp_path / "back", "--format", made.format) == 0
    weights = next(path.name for path in source.iterdir() if path.suffix in (".pt", ".safetensors"))
    read = load_file if weights.endswith(".safetensors") else lambda path: torch.load(path, weights_only=True)
    there: dict[str, Tensor] = read(source / weights)
    back: dict[str, Tensor] = read(tmp_path / "back" / weights)
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)
    assert shell("info", source) == 0
    assert made.format in capsys.readouterr().out
    assert shell("info", tmp_path / "own") == 0
    assert f"read from   {made.format}" in capsys.readouterr().out.replace("    ", "   ").replace("   ", "   ")


def test_convert_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = MAKERS["qwen scope"](tmp_path)
    source = tmp_path / str(made.file)
    assert shell("convert", source, tmp_path / "own", "--model", "m", "--hook-point", "blocks.1.hook_resid_post") == 2
    assert "`activation` must be given" in capsys.readouterr().err
    place = ("--model", "m", "--hook-point", "blocks.1.hook_resid_post")
    assert shell("convert", source, tmp_path / "own", *place, "--activation", "topk", "--k", 4) == 0
    assert torch.allclose(sl.SAE.from_pretrained(tmp_path / "own")(X), load(tmp_path, made)(X), atol=1e-6)
    assert shell("convert", source, tmp_path / "own") == 2
    assert "must be new or an empty folder" in capsys.readouterr().err
    assert shell("convert", source, tmp_path / "x", "--k", 4) == 2
    assert shell("info", source) == 0
    assert "to be given" in capsys.readouterr().out


# ---- the Hub
def test_a_card_says_how_to_load_it_and_how_good_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, *a: object, **k: object) -> None: ...

        def file_exists(self, *a: object, **k: object) -> bool:
            return False

        def upload_folder(self, repo_id: str, folder_path: str, **k: object) -> str:
            for path in Path(folder_path).iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return f"https://hub/{repo_id}"

    class Numbers(Result):
        def __str__(self) -> str:
            return "fvu 0.25"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    sae = some_sae("jumprelu")
    assert sae.push_to_hub("me/mine", evaluation=Numbers(), format="saelens") == "https://hub/me/mine"
    card = (tmp_path / "README.md").read_text()
    for text in (
        'base_model: "some/model"',
        "from sae_lens import SAE",
        "fvu 0.25",
        "blocks.1.hook_resid_post",
        "me/mine",
    ):
        assert text in card
    assert torch.allclose(sl.SAE.from_pretrained(tmp_path)(X), sae(X), atol=1e-5)


# ---- SAEBench
def test_saebench_finds_what_it_expects() -> None:
    sae = some_sae("abstopk", "scale")
    view = sae.for_saebench()
    assert torch.allclose(view.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)
    assert view.W_enc.shape == (D, F) and view.b_enc.shape == (F,) and view.device.type == "cpu"
    assert torch.allclose(view(X), sae(X), atol=1e-5)
    assert torch.allclose(view.decode(view.encode(X)), sae(X), atol=1e-5)
    u = (X - view.b_dec) @ view.W_enc + view.b_enc
    fires = view.encode(X) != 0
    assert torch.allclose(view.encode(X)[fires], u[fires], atol=1e-5)
    cfg = view.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("some/model", "blocks.1.hook_resid_post", 1)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.architecture) == (D, F, "float32", "abstopk")
    for wrong in (some_sae("relu transcoder"), some_sae("token norm")):
        with pytest.raises(ValueError, match=r"SAEBench measures|must be linear"):
            wrong.for_saebench()
    sae.provenance = None
    with pytest.raises(ValueError, match="SAEBench asks for the model"):
        sae.for_saebench()


def some_evaluation() -> Evaluation:
    numbers = dict.fromkeys(
        (
            "fvu",
            "cosine",
            "bias",
            "l0",
            "ce_clean",
            "ce_sae",
            "ce_zero",
            "ce_mean",
            "loss_recovered_mean",
            "kl",
            "kl_zero",
        ),
        0.5,
    )
    return Evaluation(
        **numbers,
        explained_variance=0.5,
        dead_frac=0.25,
        loss_recovered=float("nan"),
        kl_score=0.0,
        n_tokens=1000,
        n_predictions=900,
        n_documents=10,
        removed={},
        density_edges=[-1.0, 0.0],
        density_counts=[3],
        prefixes={},
        intervals={"fvu": (0.4, 0.6)},
        baselines={},
        reasons={"loss_recovered": "ablation helps"},
        sae="SAE(...)",
        hook_point="blocks.1.hook_resid_post",
        model="some/model",
        text="a.txt",
        mask={"special": True},
        provenance=None,
        versions={"saelab": "0.1.0"},
    )


def test_saebench_gets_null_where_it_would_write_minus_one(tmp_path: Path) -> None:
    sae = some_sae("topk")
    save_saebench(some_evaluation(), tmp_path / "core.json", sae)
    held = json.loads((tmp_path / "core.json").read_text())
    metrics = held["eval_result_metrics"]
    assert held["eval_type_id"] == "core" and held["sae_cfg_dict"]["d_sae"] == F
    assert metrics["model_performance_preservation"]["ce_loss_score"] is None  # NaN
    assert metrics["model_behavior_preservation"]["kl_div_score"] == 0.0
    assert metrics["reconstruction_quality"]["mse"] is None  # not measured
    assert metrics["misc_metrics"]["frac_alive"] == 0.75
    assert {type(value) for group in metrics.values() for value in group.values()} <= {float, int, type(None)}
    assert -1 not in [value for group in metrics.values() for value in group.values()]
    again = describe_core(replace(some_evaluation(), l0=3.0))
    assert again["eval_id"] != held["eval_id"] and again["eval_result_metrics"]["sparsity"]["l0"] == 3.0


def test_evaluate_takes_anybodys_sae_and_writes_for_saebench(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelab.lm.models.tiny_model", lambda: tiny)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4)), seed=0)
    sae.provenance = replace(some_provenance(), model=tiny.cfg.model_name)
    sae.save_pretrained(tmp_path / "theirs", "saelens")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"The fox met hen {n}." for n in range(40)))
    out, how = tmp_path / "core.json", ("--n-tokens", 300, "--ctx-len", 32, "--n-bootstrap", 20, "--no-progress")
    assert shell("evaluate", tmp_path / "theirs", "tiny", tmp_path / "text.txt", *how, "--saebench", out) == 0
    held = json.loads(out.read_text())
    assert held["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(4.0)
    assert held["sae_cfg_dict"]["d_sae"] == 48 and held["eval_config"]["model_name"] == tiny.cfg.model_name


@pytest.mark.parametrize(
    "hook_point",
    ["blocks.1.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.0.attn.hook_z", "blocks.2.ln1.hook_normalized"],
)
def test_dictionary_learning_knows_model_and_hook_point_there_and_back(tmp_path: Path, hook_point: str) -> None:
    from dataclasses import replace

    sae = some_sae("relu")
    sae.provenance = replace(some_provenance(), model="some/model", hook_point=hook_point)
    sae.save_pretrained(tmp_path, "dictionary_learning")
    again = sl.SAE.from_pretrained(tmp_path)
    assert again.provenance is not None
    assert (again.provenance.model, again.provenance.hook_point) == ("some/model", hook_point)


@pytest.mark.parametrize("first", ["saelab", "saelens", "sparsify", "dictionary_learning"])
def test_a_folder_holds_one_sae(first: str, tmp_path: Path) -> None:
    provenance = Provenance(
        model="m", weight_processing="none", hook_point=PLACE["hook_point"], text="t", tokens_sha256="0", mask={},
        dtype="float32", ctx_len=4, n_tokens=0, seed=None, versions={},
    )  # fmt: skip
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2), normalizer="none"))
    sae.provenance = provenance
    sae.save_pretrained(tmp_path, format=first)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for other in {"saelab", "saelens", "sparsify", "dictionary_learning"} - {first}:
        with pytest.raises(ValueError, match=f"A folder must hold one SAE, got .* which holds one of {first}"):
            sae.save_pretrained(tmp_path, format=other)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sae.save_pretrained(tmp_path, format=first)


def test_a_changed_threshold_of_a_training_checkpoint_is_written(tmp_path: Path) -> None:
    """It has another name in that file, which is kept for an SAE that has not changed."""
    (tmp_path / "a").mkdir()
    made = MAKERS["saelens batchtopk checkpoint"](tmp_path / "a")
    sae = load(tmp_path / "a", made)
    sae.threshold.fill_(0.9)
    sae.save_pretrained(tmp_path / "b", "saelens")
    again = sl.SAE.from_pretrained(tmp_path / "b")
    assert torch.allclose(again.encode(X), sae.encode(X), atol=1e-5) and bool((sae.encode(X) != 0).any())
