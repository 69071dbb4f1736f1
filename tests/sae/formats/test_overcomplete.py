"""overcomplete's state dicts: what they leave out is asked for, and what saelab writes is complete."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import PLACE, D, F, K, above, load, overcomplete, some_activations, top
from safetensors.torch import save_file
from torch import Tensor, nn

import saelab as sl
from saelab.sae.activation_functions import Gated
from saelab.sae.encoders import Refined
from saelab.stores.manifest import Provenance

X = some_activations(200)


def change(path: Path, **changed: Any) -> None:
    """Replace entries of a state dict; None removes one. Two underscores stand for a dot."""
    held = torch.load(path, weights_only=True) | {name.replace("__", "."): value for name, value in changed.items()}
    torch.save({name: value for name, value in held.items() if value is not None}, path)


def read(folder: Path, **given: Any) -> sl.SAE:
    return sl.SAE.from_pretrained(folder, **(PLACE | {"activation": sl.TopK(k=K)} | given))


def test_what_a_state_dict_leaves_out_is_asked_for(tmp_path: Path) -> None:
    overcomplete(tmp_path)
    with pytest.raises(ValueError, match=r"`activation` must be given.*TopK\(k=16\).*BatchTopKSAE.*running_threshold"):
        read(tmp_path, activation=None)
    with pytest.raises(ValueError, match=r"`threshold` must be given.*float\(sae\.running_threshold\)"):
        read(tmp_path, activation=sl.JumpReLU())
    assert read(tmp_path, activation=sl.JumpReLU(), threshold=0.4).encode(X).count_nonzero() > 100


def test_a_code_at_its_threshold_fires(tmp_path: Path) -> None:
    """It keeps codes from the threshold on, saelab those above."""
    w = {"encoder.final_block.0.weight": torch.eye(4), "encoder.final_block.0.bias": torch.zeros(4)}
    w |= {"dictionary._weights": torch.eye(4), "dictionary.multiplier": torch.tensor(0.0)}
    torch.save(w | {"thresholds": torch.full((4,), 0.5).log()}, tmp_path / "jump.pt")
    sae = sl.SAE.from_pretrained(tmp_path, **PLACE)
    at = torch.full((4,), 0.5).log().exp()
    assert sae.encode(at[None]).tolist() == [at.tolist()]
    assert sae.encode(torch.nextafter(at, torch.tensor(0.0))[None]).count_nonzero() == 0


@pytest.mark.parametrize("kind", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_rows_are_normalized_as_is_said(kind: str, tmp_path: Path) -> None:
    overcomplete(tmp_path, said=True)
    held = torch.load(tmp_path / "trained.pt", weights_only=True)
    arguments = {"top_k": K, "dictionary_params": {"normalization": kind}}
    (tmp_path / "config.json").write_text(json.dumps({"sae_class": "TopKSAE", "arguments": arguments}))
    rows = held["dictionary._weights"].double()
    by = {"identity": torch.ones(F, 1).double()}
    by |= {name: rows.norm(p=int(name[-1]), dim=1, keepdim=True) for name in ("l2", "l1")}
    by |= {f"max_{name}": by[name].max() for name in ("l2", "l1")}
    sae = sl.SAE.from_pretrained(tmp_path, **PLACE)
    torch.testing.assert_close(sae.W_dec.double(), rows / by[kind], rtol=1e-6, atol=1e-6)
    # Saved after eval(), the norms say it themselves.
    (tmp_path / "config.json").unlink()
    change(tmp_path / "trained.pt", dictionary___weights=(rows / by[kind]).float())
    if kind == "identity":
        with pytest.raises(ValueError, match=r"rows were normalized, got norms.*sae\.eval\(\).*\"normalization\""):
            read(tmp_path)
    else:
        torch.testing.assert_close(read(tmp_path).W_dec.double(), rows / by[kind], rtol=1e-6, atol=1e-6)


def test_an_archetypal_dictionary_in_training(tmp_path: Path) -> None:
    """Rows of W become shares and rows of Relax at most delta long, as in its next forward."""
    overcomplete(tmp_path, "archetypal")
    g = torch.Generator().manual_seed(0)
    W, Relax = torch.randn(F, 9, generator=g), torch.randn(F, D, generator=g)
    change(tmp_path / "trained.pt", dictionary__W=W, dictionary__Relax=Relax)
    with pytest.raises(ValueError, match=r"rows of W are shares, got sums from.*sae\.eval\(\).*\"delta\""):
        read(tmp_path)
    arguments = {"top_k": K, "delta": 1.5}
    (tmp_path / "config.json").write_text(json.dumps({"sae_class": "RATopKSAE", "arguments": arguments}))
    sae = sl.SAE.from_pretrained(tmp_path, **PLACE)
    shares = W.relu() / W.relu().sum(1, keepdim=True)
    short = Relax * (1.5 / Relax.norm(dim=1, keepdim=True)).clamp(max=1)
    C = torch.load(tmp_path / "trained.pt", weights_only=True)["dictionary.C"]
    torch.testing.assert_close(sae.W_dec, shares @ C + short, rtol=1e-5, atol=1e-5)


def test_what_saelab_has_no_axis_for(tmp_path: Path) -> None:
    path = tmp_path / "trained.pt"

    def refuse(told: str, **changed: Any) -> None:
        overcomplete(tmp_path)
        change(path, **changed)
        with pytest.raises(ValueError, match=told):
            read(tmp_path)

    refuse("QSAE", Q=torch.linspace(0, 1, 4))
    nothing = {"encoder__final_block__0__weight": None, "encoder__final_block__0__bias": None}
    refuse("linear encoder, got none: that of MpSAE and OMPSAE", **nothing)
    refuse("linear encoder.*mlp_blocks", encoder__mlp_blocks__0__0__weight=torch.zeros(D, D))
    # LayerNorm over the latents has no running mean
    refuse("linear encoder.*final_block.1.weight", encoder__final_block__1__weight=torch.ones(F))
    refuse("must be floating-point|finite", dictionary__multiplier=torch.tensor(float("nan")))
    overcomplete(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"sae_class": "OMPSAE", "arguments": {}}))
    with pytest.raises(ValueError, match="OMPSAE, which saelab has no axis for"):
        read(tmp_path)


def test_a_whole_module_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(D, F)), tmp_path / "sae.pt")
    told = r"torch\.nn\.modules.*could run code.*torch\.save\(module\.state_dict\(\), path\)"
    with pytest.raises(ValueError, match=told):
        read(tmp_path)


def test_safetensors_by_their_name(tmp_path: Path) -> None:
    made = overcomplete(tmp_path)
    held = torch.load(tmp_path / "trained.pt", weights_only=True)
    save_file(held, tmp_path / "mine.safetensors")
    other = sl.SAE.from_pretrained(tmp_path, "mine.safetensors", **made.given)
    assert torch.equal(other.encode(X), load(tmp_path, made).encode(X))
    other.save_pretrained(tmp_path / "back", "overcomplete")
    assert (tmp_path / "back" / "mine.safetensors").is_file()


# ---- written
def theirs(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions by its formula, from what is in the folder alone."""
    said = json.loads((folder / "config.json").read_text())
    held = {name: t.double() for name, t in torch.load(folder / "sae.pt", weights_only=True).items()}
    u = x.double() @ held["encoder.final_block.0.weight"].T + held["encoder.final_block.0.bias"]
    if said["sae_class"] == "JumpSAE":
        z = above(u, held["thresholds"].exp())
    else:
        z = top(u, said["arguments"]["top_k"]) if said["sae_class"] == "TopKSAE" else u.relu()
    assert said["arguments"]["dictionary_params"] == {"normalization": "identity"}
    assert {"input_shape": D, "nb_concepts": F}.items() <= said["arguments"].items()
    return z, z @ (held["dictionary._weights"] * held["dictionary.multiplier"].exp())


def some_sae(activation: Any, **axes: Any) -> sl.SAE:
    cfg = {"d_in": D, "d_sae": F, "activation": activation, "normalizer": "none", "dictionary": "free"}
    sae, g = sl.SAE(sl.SAEConfig(**cfg | axes), seed=0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, part in sae.named_parameters():
            part.copy_(torch.randn(part.shape, generator=g) * 0.5)
            part.abs_() if name == "threshold" else None
        sae.b_dec.zero_()
        sae.threshold.fill_(0.6) if sae.cfg.activation.threshold == "running" else None
    return sae


@pytest.mark.parametrize(
    "activation",
    [sl.ReLU(target_l0=4.0), sl.TopK(k=K), sl.JumpReLU(target_l0=4.0), Gated(target_l0=4.0), sl.BatchTopK(k=K)],
    ids=lambda activation: activation.name,
)
def test_what_is_written_gives_its_codes_there(activation: Any, tmp_path: Path) -> None:
    sae = some_sae(activation)
    sae.save_pretrained(tmp_path, "overcomplete")
    z, x_hat = theirs(tmp_path, X)
    assert (z != 0).any()
    torch.testing.assert_close(sae.encode(X).double(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(X).double(), x_hat, rtol=1e-5, atol=1e-5)
    again = sl.SAE.from_pretrained(tmp_path, **PLACE)
    torch.testing.assert_close(again(X), sae(X), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_express(tmp_path: Path) -> None:
    def refuse(told: str, sae: sl.SAE) -> None:
        with pytest.raises(ValueError, match=told):
            sae.save_pretrained(tmp_path, "overcomplete")

    sae = some_sae(sl.TopK(k=K))
    sae.b_dec.data[2] = 0.1
    refuse("adds no bias to a reconstruction", sae)
    refuse("got AbsTopK.*no codes of both signs", some_sae(sl.AbsTopK(k=K)))
    refuse("got a transcoder", some_sae(sl.TopK(k=K), d_out=D))
    refuse("encoder Refined", some_sae(sl.TopK(k=K), encoder=Refined()))
    refuse("normalizer 'token_norm'", some_sae(sl.TopK(k=K), normalizer="token_norm"))
    assert not list(tmp_path.iterdir())


def test_model_and_place_are_kept_and_no_private_path(tmp_path: Path) -> None:
    sae = some_sae(sl.TopK(k=K))
    plain = {"weight_processing": "none", "text": "t", "tokens_sha256": "", "mask": {}, "dtype": "unknown"}
    plain |= {"ctx_len": None, "n_tokens": 0, "seed": None, "versions": {}}
    sae.provenance = Provenance(model="/home/ada/tiny", hook_point="blocks.1.hook_resid_post", **plain)
    sae.save_pretrained(tmp_path, "overcomplete")
    again = sl.SAE.from_pretrained(tmp_path).provenance
    assert again is not None and (again.model, again.hook_point) == ("tiny", "blocks.1.hook_resid_post")
    assert "ada" not in (tmp_path / "config.json").read_text()
