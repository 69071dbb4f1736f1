"""Files of other libraries' SAEs, written here by hand to the documented layouts, each beside its formula.

A maker writes one SAE into a folder and returns a `Made`: what to call `from_pretrained` with, and how its library
encodes and decodes, spelled out in float64.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import saelab as sl

D, F, OUT, K = 6, 20, 5, 4
PLACE = {"model": "some/model", "hook_point": "blocks.1.hook_resid_post"}
TO = {"hook_point_out": "blocks.1.hook_mlp_out"}
Coder = Callable[[Tensor], Tensor]


@dataclass
class Made:
    """One SAE on disk, and its formulas."""

    format: str
    encode: Coder
    decode: Callable[[Tensor, Tensor], Tensor]
    """of codes and activations"""
    given: dict[str, Any] = field(default_factory=dict)
    file: str | None = None


def draw(seed: int = 0, d_out: int = D) -> dict[str, Tensor]:
    """Seeded weights with norms, biases and thresholds that are nothing special."""
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, F, generator=g) * 0.4,
        "b_enc": torch.randn(F, generator=g) * 0.3,
        "W_dec": torch.randn(F, d_out, generator=g) * (0.2 + torch.rand(F, 1, generator=g)),
        "b_dec": torch.randn(d_out, generator=g) * 0.5,
        "threshold": torch.rand(F, generator=g) * 0.6 - 0.1,
    }


def exact(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in w.items()}


def top(u: Tensor, k: int = K, signed: bool = False) -> Tensor:
    """max(u, 0), or u itself where signed, of each row's k largest."""
    size = u.abs() if signed else u
    kept = torch.zeros_like(u).scatter(1, size.topk(k, dim=1).indices, 1.0)
    return (u if signed else u.relu()) * kept


def above(u: Tensor, threshold: Tensor | float) -> Tensor:
    return u.relu() * (u > threshold)


def write_json(path: Path, held: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held))


# ---- SAELens
def saelens(folder: Path, tensors: dict[str, Tensor], architecture: str, **cfg: Any) -> None:
    metadata = {
        "sae_lens_version": "6.5.0",
        "model_name": PLACE["model"],
        "hook_name": PLACE["hook_point"],
        "hook_name_out": TO["hook_point_out"],
        "context_size": 64,
        "dataset_path": "some/text",
        "exclude_special_tokens": False,
    }
    cfg = {"apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": metadata, **cfg}
    write_json(folder / "cfg.json", {"d_in": D, "d_sae": F, "dtype": "float32", "architecture": architecture, **cfg})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")


def pick(w: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: w[name] for name in names or ("W_enc", "b_enc", "W_dec", "b_dec")}


def saelens_standard(folder: Path, subtract: bool = True) -> Made:
    w = draw()
    saelens(folder, pick(w), "standard", apply_b_dec_to_input=subtract)
    e = exact(w)
    return Made(
        "saelens",
        lambda x: ((x - subtract * e["b_dec"]) @ e["W_enc"] + e["b_enc"]).relu(),
        lambda z, x: z @ e["W_dec"] + e["b_dec"],
    )


def saelens_topk(folder: Path, rescale: bool = False, signed: bool = False) -> Made:
    w = draw(1)
    saelens(folder, pick(w), "abstopk" if signed else "topk", k=K, rescale_acts_by_decoder_norm=rescale)
    e = exact(w)
    n = e["W_dec"].norm(dim=1) if rescale else torch.ones(F).double()
    return Made(
        "saelens",
        lambda x: top(((x - e["b_dec"]) @ e["W_enc"] + e["b_enc"]) * n, signed=signed),
        lambda z, x: (z / n) @ e["W_dec"] + e["b_dec"],
    )


def saelens_jumprelu(folder: Path, normalize: str = "none") -> Made:
    """Thresholds below 0 let no negative code through: relu(u) (u > threshold)."""
    w = draw(2)
    saelens(folder, pick(w, *w), "jumprelu", normalize_activations=normalize)
    e = exact(w)

    def measure(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        norm = x.norm(dim=1, keepdim=True) / math.sqrt(D)
        return {
            "none": (torch.zeros_like(mean), torch.ones_like(mean), torch.ones_like(mean)),
            "layer_norm": (mean, std + 1e-5, std),
            "constant_norm_rescale": (torch.zeros_like(mean), norm, norm),
        }[normalize]

    def encode(x: Tensor) -> Tensor:
        shift, scale, _ = measure(x)
        return above(((x - shift) / scale - e["b_dec"]) @ e["W_enc"] + e["b_enc"], e["threshold"])

    def decode(z: Tensor, x: Tensor) -> Tensor:
        shift, _, scale = measure(x)
        return (z @ e["W_dec"] + e["b_dec"]) * scale + shift

    return Made("saelens", encode, decode)


def saelens_gated(folder: Path, subtract: bool = True) -> Made:
    w, g = draw(3), torch.Generator().manual_seed(33)
    w |= {name: torch.randn(F, generator=g) * 0.4 for name in ("b_gate", "b_mag", "r_mag")}
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    saelens(folder, pick(w, *names), "gated", apply_b_dec_to_input=subtract)
    e = exact(w)

    def encode(x: Tensor) -> Tensor:
        p = (x - subtract * e["b_dec"]) @ e["W_enc"]
        return (p + e["b_gate"] > 0) * (e["r_mag"].exp() * p + e["b_mag"]).relu()

    return Made("saelens", encode, lambda z, x: z @ e["W_dec"] + e["b_dec"])


def saelens_batchtopk(folder: Path) -> Made:
    """A training checkpoint: one threshold, of codes times ||W_dec_i||, and what activations were multiplied by."""
    w, scale = draw(4), 0.7
    tensors = pick(w) | {"topk_threshold": torch.tensor(0.45, dtype=torch.float64)}
    cfg = {"normalize_activations": "expected_average_only_in", "k": 3.5, "rescale_acts_by_decoder_norm": True}
    saelens(folder, tensors, "batchtopk", **cfg)
    write_json(folder / "activation_scaler.json", {"scaling_factor": scale, "has_whitening": False})
    e = exact(w)
    n = e["W_dec"].norm(dim=1)
    return Made(
        "saelens",
        lambda x: above(((scale * x - e["b_dec"]) @ e["W_enc"] + e["b_enc"]) * n, 0.45),
        lambda z, x: ((z / n) @ e["W_dec"] + e["b_dec"]) / scale,
    )


def saelens_old(folder: Path) -> Made:
    """From before 6.0: flat, names of its own, codes multiplied by a factor each before they are decoded."""
    w = draw(5)
    factor = torch.rand(F, generator=torch.Generator().manual_seed(55)) + 0.5
    save_file(pick(w) | {"scaling_factor": factor}, folder / "sae_weights.safetensors")
    cfg = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "model_name": PLACE["model"],
        "hook_point": PLACE["hook_point"],
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "finetuning_scaling_factor": True,
    }
    write_json(folder / "cfg.json", cfg)
    e, f = exact(w), factor.double()
    return Made(
        "saelens",
        lambda x: top((x - e["b_dec"]) @ e["W_enc"] + e["b_enc"]),
        lambda z, x: (z * f) @ e["W_dec"] + e["b_dec"],
    )


def saelens_transcoder(folder: Path, skip: bool = False) -> Made:
    w = draw(6, OUT)
    w["W_skip"] = torch.randn(OUT, D, generator=torch.Generator().manual_seed(66)) * 0.3
    names = ("W_enc", "b_enc", "W_dec", "b_dec") + (("threshold", "W_skip") if skip else ())
    architecture = "jumprelu_skip_transcoder" if skip else "transcoder"
    saelens(folder, pick(w, *names), architecture, apply_b_dec_to_input=False, d_out=OUT)
    e = exact(w)
    return Made(
        "saelens",
        lambda x: above(x @ e["W_enc"] + e["b_enc"], e["threshold"] if skip else 0.0),
        lambda z, x: z @ e["W_dec"] + e["b_dec"] + skip * (x @ e["W_skip"].T),
    )


def saelens_pursuit(folder: Path, subtract: bool = True) -> Made:
    """Where b_dec is not subtracted, SAELens does not add it either."""
    w = draw(7)
    w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    how = {"residual_threshold": 0.2, "max_iterations": 3, "apply_b_dec_to_input": subtract}
    saelens(folder, pick(w, "W_dec", "b_dec"), "matching_pursuit", **how)
    e = exact(w) | {"b_dec": subtract * w["b_dec"].double()}

    def encode(x: Tensor) -> Tensor:
        z, residual = torch.zeros(len(x), F).double(), x - e["b_dec"]
        for row in range(len(x)):
            for _ in range(3):
                before = set(z[row].nonzero().flatten().tolist())
                u = (e["W_dec"] @ residual[row]).relu()
                best = int(u.argmax())
                z[row, best] += u[best]
                residual[row] -= u[best] * e["W_dec"][best]
                if before == set(z[row].nonzero().flatten().tolist()) or residual[row].norm() < 0.2:
                    break
        return z

    return Made("saelens", encode, lambda z, x: z @ e["W_dec"] + e["b_dec"])


# ---- sparsify
def sparsify(folder: Path, activation: str = "topk", transcode: bool = False, skip: bool = False, **cfg: Any) -> Made:
    """Everything but a transcoder subtracts b_dec, whatever `normalize_decoder` says; W_dec is not transposed."""
    w = draw(8)
    w["W_skip"] = torch.randn(D, D, generator=torch.Generator().manual_seed(88)) * 0.3
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"W_skip": w["W_skip"]} if skip else {}
    place = folder / "layers.1"
    cfg = {"activation": activation, "expansion_factor": 32, "num_latents": F, "k": K, "d_in": D, **cfg}
    write_json(place / "cfg.json", cfg | {"skip_connection": skip, "transcode": transcode})
    write_json(folder / "config.json", {"sae": {}, "model": PLACE["model"], "ctx_len": 64})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "sae.safetensors")
    e = exact(w)

    def encode(x: Tensor) -> Tensor:
        u = (x if transcode else x - e["b_dec"]) @ e["W_enc"] + e["b_enc"]
        if activation == "topk":
            return top(u, signed=bool(cfg.get("signed")))
        groups = u.relu().unflatten(1, (K, -1))
        return (groups * (groups == groups.amax(2, keepdim=True))).flatten(1)

    given = {"hook_point": PLACE["hook_point"]} | (TO if transcode or skip else {})
    decode = lambda z, x: z @ e["W_dec"] + e["b_dec"] + skip * (x @ e["W_skip"].T)  # noqa: E731
    return Made("sparsify", encode, decode, given, "layers.1")


# ---- dictionary_learning
def dictionary(folder: Path, name: str) -> Made:
    w, g = draw(9), torch.Generator().manual_seed(99)
    r, gate, mag = (torch.randn(F, generator=g) * 0.4 for _ in range(3))
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    plain, one = pick(w), {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.3)}
    held = {
        "AutoEncoder": linear | {"bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": w["b_dec"]},
        "GatedAutoEncoder": {
            "decoder_bias": w["b_dec"],
            "encoder.weight": linear["encoder.weight"],
            "decoder.weight": linear["decoder.weight"],
            "r_mag": r,
            "gate_bias": gate,
            "mag_bias": mag,
        },
        "AutoEncoderTopK": linear | {"b_dec": w["b_dec"], **one},
        "BatchTopKSAE": linear | {"b_dec": w["b_dec"], **one},
        "MatryoshkaBatchTopKSAE": plain | one | {"group_sizes": torch.tensor([4, 6, 10])},
        "JumpReluAutoEncoder": plain | {"threshold": w["threshold"]},
    }[name]
    torch.save({key: tensor.contiguous() for key, tensor in held.items()}, folder / "ae.pt")
    trainer = {"dict_class": name, "k": K, "lm_name": PLACE["model"], "submodule_name": "resid_post_layer_1"}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 64}})
    e = exact(w)
    subtract = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")

    def encode(x: Tensor) -> Tensor:
        p = (x - subtract * e["b_dec"]) @ e["W_enc"]
        u = p + e["b_enc"]
        return {
            "AutoEncoder": lambda: u.relu(),
            "AutoEncoderNew": lambda: u.relu(),
            "GatedAutoEncoder": lambda: (p + gate.double() > 0) * (r.double().exp() * p + mag.double()).relu(),
            "AutoEncoderTopK": lambda: top(u),
            "JumpReluAutoEncoder": lambda: above(u, e["threshold"]),
        }.get(name, lambda: above(u, 0.3))()

    return Made("dictionary_learning", encode, lambda z, x: z @ e["W_dec"] + e["b_dec"])


# ---- Gemma Scope
def gemma_scope(folder: Path, transcoder: bool = False, compressed: bool = False) -> Made:
    w = draw(10)
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **{k: v.numpy() for k, v in w.items()})
    e = exact(w)
    return Made(
        "gemma_scope",
        lambda x: above(x @ e["W_enc"] + e["b_enc"], e["threshold"]),
        lambda z, x: z @ e["W_dec"] + e["b_dec"],
        PLACE | (TO if transcoder else {}),
    )


def gemma_scope_2(folder: Path, affine: bool = False) -> Made:
    """The affine connection is (d_in, d_out), where SAELens has (d_out, d_in)."""
    w = draw(11, OUT if affine else D)
    w["affine_skip_connection"] = torch.randn(D, OUT, generator=torch.Generator().manual_seed(1)) * 0.3
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    held = {theirs: w[ours] for theirs, ours in names.items()}
    held |= {"affine_skip_connection": w["affine_skip_connection"]} if affine else {}
    save_file(held, folder / "params.safetensors")
    cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": affine}
    layer = "model.layers.7"
    place = {"hf_hook_point_in": f"{layer}.output"}
    if affine:
        place = {
            "hf_hook_point_in": f"{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"{layer}.post_feedforward_layernorm.output",
        }
    write_json(folder / "config.json", cfg | place)
    e = exact(w)
    return Made(
        "gemma_scope_2",
        lambda x: above(x @ e["W_enc"] + e["b_enc"], e["threshold"]),
        lambda z, x: z @ e["W_dec"] + e["b_dec"] + (x @ e["affine_skip_connection"] if affine else 0),
    )


# ---- OpenMOSS and Llama Scope
def openmoss(
    folder: Path, act_fn: str, *, norms: bool = True, mode: str = "dataset-wise", pickled: bool = False
) -> Made:
    """h = s x W_E + b_E; the choice looks at h ||W_D_i||; x_hat = (z W_D + b_D) / s."""
    w, mean_norm = draw(12), 3.0
    w["threshold"] = w["threshold"].abs() + 0.1
    place = PLACE["hook_point"]
    held = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    if act_fn == "jumprelu":
        held["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    held[f"dataset_average_activation_norm.{place}"] = torch.tensor(mean_norm)
    if pickled:
        torch.save({"sae": held, "version": "2.0"}, folder / "sae_weights.pt")
    else:
        save_file(held, folder / "sae_weights.safetensors")
    cfg = {"sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": act_fn, "top_k": K}
    cfg |= {"norm_activation": mode, "sparsity_include_decoder_norm": norms}
    write_json(folder / "config.json", cfg | {"hook_point_in": place, "hook_point_out": place})
    e = exact(w)
    n = e["W_dec"].norm(dim=1) if norms else torch.ones(F).double()

    def scale(x: Tensor) -> Tensor:
        per_token = math.sqrt(D) / x.norm(dim=1, keepdim=True)
        return {"dataset-wise": math.sqrt(D) / mean_norm, "token-wise": per_token, "inference": 1.0}[mode]

    unit = n if act_fn == "topk" else torch.ones(F).double()  # what codes of a choice among latents are multiplied by

    def encode(x: Tensor) -> Tensor:
        h = (scale(x) * x) @ e["W_enc"] + e["b_enc"]
        chosen = {"relu": h > 0, "jumprelu": h * n > e["threshold"], "topk": top(h * n) != 0}[act_fn]
        return h * chosen * unit

    return Made(
        "openmoss",
        encode,
        lambda z, x: ((z / unit) @ e["W_dec"] + e["b_dec"]) / scale(x),
        {"model": PLACE["model"]},
    )


def llama_scope(folder: Path, transcoder: bool = False) -> Made:
    """z = h (h > s_in theta), y_hat = (z W_D + b_D) / s_out: the threshold is in the activations' units."""
    w, theta, norms = draw(13), 0.4, {"in": 3.0, "out": 0.5 if transcoder else 3.0}
    held = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }
    (folder / "checkpoints").mkdir()
    save_file({name: part.contiguous() for name, part in held.items()}, folder / "checkpoints" / "final.safetensors")
    cfg = {
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": theta,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": norms,
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "hook_point_in": PLACE["hook_point"],
        "hook_point_out": TO["hook_point_out"] if transcoder else PLACE["hook_point"],
    }
    write_json(folder / "hyperparams.json", cfg)
    e = exact(w)
    s_in, s_out = (math.sqrt(D) / norms[side] for side in ("in", "out"))
    return Made(
        "llama_scope",
        lambda x: above((s_in * x) @ e["W_enc"] + e["b_enc"], s_in * theta),
        lambda z, x: (z @ e["W_dec"] + e["b_dec"]) / s_out,
        {"model": PLACE["model"]},
    )


# ---- single files
def openai(folder: Path, activation: str = "TopK") -> Made:
    """TopK files normalize every token; ReLU files do not."""
    w = draw(14)
    held: dict[str, Any] = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.int64),
        "activation": activation,
    }
    if activation == "TopK":
        held["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(held, folder / "autoencoder.pt")
    e, normalizes = exact(w), activation == "TopK"

    def encode(x: Tensor) -> Tensor:
        if normalizes:
            x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
        u = (x - e["b_dec"]) @ e["W_enc"] + e["b_enc"]
        return top(u) if normalizes else u.relu()

    def decode(z: Tensor, x: Tensor) -> Tensor:
        made = z @ e["W_dec"] + e["b_dec"]
        return made * x.std(1, keepdim=True) + x.mean(1, keepdim=True) if normalizes else made

    return Made("openai", encode, decode, PLACE, "autoencoder.pt")


def qwen_scope(folder: Path) -> Made:
    w = draw(15)
    held = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save({name: part.contiguous() for name, part in held.items()}, folder / "layer1.sae.pt")
    e = exact(w)
    return Made(
        "qwen_scope",
        lambda x: top(x @ e["W_enc"] + e["b_enc"]),
        lambda z, x: z @ e["W_dec"] + e["b_dec"],
        PLACE | {"activation": sl.TopK(k=K)},
        "layer1.sae.pt",
    )


def circuit_tracer(folder: Path, jump: bool = False, skip: bool = False) -> Made:
    w = draw(16, OUT)
    held = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if jump:
        w["threshold"] = w["threshold"].abs()
        held["activation_function.threshold"] = w["threshold"]
    if skip:
        held["W_skip"] = torch.randn(OUT, D, generator=torch.Generator().manual_seed(17))
    save_file({name: part.contiguous() for name, part in held.items()}, folder / "layer_3.safetensors")
    settings = ["model_name: some/model", "model_kind: transcoder_set", "feature_input_hook: mlp.hook_in"]
    (folder / "config.yaml").write_text("\n".join([*settings, "feature_output_hook: hook_mlp_out"]))
    e = exact(w)

    def encode(x: Tensor) -> Tensor:
        u = x @ e["W_enc"] + e["b_enc"]
        return u * (u > e["threshold"]) if jump else u.relu()

    def decode(z: Tensor, x: Tensor) -> Tensor:
        return z @ e["W_dec"] + e["b_dec"] + (x @ held["W_skip"].double().T if skip else 0)

    return Made("circuit_tracer", encode, decode, {}, "layer_3.safetensors")


# ---- overcomplete
def overcomplete(folder: Path, kind: str = "topk", said: bool = False) -> Made:
    """A state dict after `eval()`, without a word on what it is but where `said`: then in the middle of training."""
    w, g = draw(18), torch.Generator().manual_seed(18)
    rows = w["W_dec"] if said else w["W_dec"] / (w["W_dec"].norm(dim=1, keepdim=True) + 1e-8)
    held = {"encoder.final_block.0.weight": w["W_enc"].T, "encoder.final_block.0.bias": w["b_enc"]}
    held |= {"dictionary._weights": rows, "dictionary.multiplier": torch.tensor(0.3 if kind == "jump" else 0.0)}
    D_ = rows.double() * held["dictionary.multiplier"].double().exp()
    if said:
        D_ /= D_.norm(dim=1, keepdim=True)
    W, b = w["W_enc"].double(), w["b_enc"].double()
    if kind == "tied":
        held["encoder.tied_to._weights"] = held["dictionary._weights"]
        held["encoder.tied_to.multiplier"] = held["dictionary.multiplier"]
        held["encoder.bias"] = held.pop("encoder.final_block.0.bias")
        del held["encoder.final_block.0.weight"]
        W = D_.T
    if kind == "batch norm":
        norm = {"weight": torch.rand(F, generator=g) - 0.3, "bias": w["threshold"], "running_mean": w["b_enc"].flip(0)}
        norm |= {"running_var": torch.rand(F, generator=g) + 0.1, "num_batches_tracked": torch.tensor(7)}
        held |= {f"encoder.final_block.1.{name}": tensor for name, tensor in norm.items()}
        gain = norm["weight"].double() / (norm["running_var"].double() + 1e-5).sqrt()
        W, b = W * gain, (b - norm["running_mean"].double()) * gain + norm["bias"].double()
    if kind == "archetypal":
        mix = torch.rand(F, 9, generator=g)
        held["dictionary.W"] = mix / mix.sum(1, keepdim=True)
        held["dictionary.C"], held["dictionary.Relax"] = torch.randn(9, D, generator=g), 0.1 * rows
        D_ = held["dictionary.W"].double() @ held["dictionary.C"].double() + held["dictionary.Relax"].double()
        del held["dictionary._weights"]
    if kind == "jump":
        held["thresholds"] = w["threshold"] - 1.5
    activation: dict[str, Any] = {"activation": sl.TopK(k=K)}
    activation = {"jump": {}, "batch": {"activation": sl.BatchTopK(k=K), "threshold": 0.4}}.get(kind, activation)
    if said:
        arguments = {"top_k": K, "dictionary_params": {"normalization": "l2"}}
        write_json(folder / "config.json", {"sae_class": "TopKSAE", "arguments": arguments})
        activation = {}
    torch.save({name: tensor.contiguous() for name, tensor in held.items()}, folder / "trained.pt")

    def encode(x: Tensor) -> Tensor:
        u = x @ W + b
        if kind in ("jump", "batch"):
            return above(u, held["thresholds"].double().exp() if kind == "jump" else 0.4)
        return top(u)

    return Made("overcomplete", encode, lambda z, x: z @ D_, PLACE | activation)


MAKERS: dict[str, Callable[[Path], Made]] = {
    "saelens standard": saelens_standard,
    "saelens standard, reads x": lambda folder: saelens_standard(folder, subtract=False),
    "saelens topk": saelens_topk,
    "saelens topk, rescaled": lambda folder: saelens_topk(folder, rescale=True),
    "saelens abstopk, rescaled": lambda folder: saelens_topk(folder, rescale=True, signed=True),
    "saelens jumprelu": saelens_jumprelu,
    "saelens jumprelu, layer norm": lambda folder: saelens_jumprelu(folder, "layer_norm"),
    "saelens jumprelu, constant norm": lambda folder: saelens_jumprelu(folder, "constant_norm_rescale"),
    "saelens gated": saelens_gated,
    "saelens gated, reads x": lambda folder: saelens_gated(folder, subtract=False),
    "saelens batchtopk checkpoint": saelens_batchtopk,
    "saelens before 6.0": saelens_old,
    "saelens transcoder": saelens_transcoder,
    "saelens skip transcoder": lambda folder: saelens_transcoder(folder, skip=True),
    "saelens matching pursuit": saelens_pursuit,
    "saelens matching pursuit, reads x": lambda folder: saelens_pursuit(folder, subtract=False),
    "sparsify topk": sparsify,
    "sparsify expansion": lambda folder: sparsify(
        folder, num_latents=0, expansion_factor=F / D, normalize_decoder=True
    ),
    "sparsify signed": lambda folder: sparsify(folder, signed=True),
    "sparsify groupmax": lambda folder: sparsify(folder, "groupmax"),
    "sparsify transcoder": lambda folder: sparsify(folder, transcode=True),
    "sparsify skip transcoder": lambda folder: sparsify(folder, transcode=True, skip=True),
    "sparsify skip alone": lambda folder: sparsify(folder, skip=True),
    **{
        f"dictionary_learning {name}": lambda folder, name=name: dictionary(folder, name)
        for name in (
            "AutoEncoder",
            "AutoEncoderNew",
            "GatedAutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
        )
    },
    "gemma scope": gemma_scope,
    "gemma scope, compressed": lambda folder: gemma_scope(folder, compressed=True),
    "gemma scope transcoder": lambda folder: gemma_scope(folder, transcoder=True),
    "gemma scope 2": gemma_scope_2,
    "gemma scope 2 affine": lambda folder: gemma_scope_2(folder, affine=True),
    "openmoss relu": lambda folder: openmoss(folder, "relu"),
    "openmoss jumprelu": lambda folder: openmoss(folder, "jumprelu"),
    "openmoss jumprelu, folded": lambda folder: openmoss(folder, "jumprelu", norms=False, mode="inference"),
    "openmoss topk": lambda folder: openmoss(folder, "topk", pickled=True),
    "openmoss topk, token-wise": lambda folder: openmoss(folder, "topk", norms=False, mode="token-wise"),
    "llama scope": llama_scope,
    "llama scope transcoder": lambda folder: llama_scope(folder, transcoder=True),
    "openai topk": openai,
    "openai relu": lambda folder: openai(folder, "ReLU"),
    "qwen scope": qwen_scope,
    "circuit_tracer relu": circuit_tracer,
    "circuit_tracer jumprelu": lambda folder: circuit_tracer(folder, jump=True),
    "circuit_tracer skip": lambda folder: circuit_tracer(folder, skip=True),
    "overcomplete topk": overcomplete,
    "overcomplete topk in training": lambda folder: overcomplete(folder, said=True),
    **{
        f"overcomplete {kind}": lambda folder, kind=kind: overcomplete(folder, kind)
        for kind in ("jump", "batch", "tied", "batch norm", "archetypal")
    },
}
LIBRARIES = ("saelens", "sparsify", "dictionary_learning", "circuit_tracer", "overcomplete")
WRITABLE = [name for name in MAKERS if name.split()[0] in LIBRARIES]


def load(folder: Path, made: Made, **more: Any) -> sl.SAE:
    """The SAE that a maker wrote."""
    return sl.SAE.from_pretrained(folder, made.file, **{**made.given, **more})


def some_activations(n: int = 64, seed: int = 0) -> Tensor:
    """Not centred, of different norms."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g) * (0.5 + 2 * torch.rand(n, 1, generator=g)) + 0.4


def peer_activations(request: Any, kind: str, width: int = 64) -> Tensor:
    """What SAEs of other libraries are compared on: made up, or of a model."""
    g = torch.Generator().manual_seed(1)
    if kind == "random":
        return torch.randn(300, width, generator=g) * (0.3 + torch.rand(300, 1, generator=g)) + 0.3
    data = request.getfixturevalue("shared_data")
    model = sl.load_model(data / "stories260k", progress=False)
    tokens = sl.tokenize(model, data / "tinystories" / "tinystories.txt", ctx_len=64, n_tokens=320)
    return sl.collect(model, tokens, "blocks.2.hook_resid_post", progress=False)[:].float()
