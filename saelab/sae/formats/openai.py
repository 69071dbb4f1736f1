"""OpenAI's (arXiv:2406.04093) and Qwen Scope's formats: single PyTorch files that hold only weights."""

from typing import Any

from torch import Tensor

from saelab.sae.activation_functions import Activation, ReLU, TopK
from saelab.sae.formats.conventions import Convention
from saelab.sae.formats.origin import ParsedSAE, SAEFacts, require
from saelab.sae.formats.sources import SAEFiles, require_tensors

OPENAI = {"encoder.weight": "W_enc", "latent_bias": "b_enc", "decoder.weight": "W_dec", "pre_bias": "b_dec"}
QWEN = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognize_openai(source: SAEFiles) -> bool:
    """Whether the file is of OpenAI's sparse_autoencoder."""
    return source.pickle is not None and set(OPENAI) <= set(source.tensors(source.pickle))


def read_openai(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of OpenAI's file: `z = activation((norm(x) - pre_bias) encoder^T + latent_bias)`,
    `x_hat = (z decoder^T + pre_bias) std + mean`.

    TopK files normalize every token by its own mean and deviation, ReLU files do not; the file does not record this.
    """
    assert source.pickle is not None
    place, held = source.folder / source.pickle, source.tensors(source.pickle)
    found = require_tensors(held, tuple(OPENAI), place)
    parts = {ours: found[theirs] for theirs, ours in OPENAI.items()}
    parts["W_enc"], parts["W_dec"] = parts["W_enc"].T, parts["W_dec"].T
    said = held.get("activation", "ReLU")
    how = Convention(
        activation=overrides.activation or _choose_activation(said, held.get("activation_state_dict") or {}, place),
        normalizer="layer_norm" if said == "TopK" else "none",
    )
    return ParsedSAE(format="openai", parts=parts, how=how)


def _choose_activation(said: Any, state: Any, place: Any) -> Activation:
    if said == "ReLU":
        return ReLU()
    if said != "TopK" or state.get("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"`activation` in {place} must be ReLU, or TopK of positive codes, got {said!r} with {state}.")
    return TopK(k=int(require(state.get("k"), "activation", "its k", "saelab.TopK(k=32)")))


def recognize_qwen_scope(source: SAEFiles) -> bool:
    """Whether the file is of Qwen Scope: W_enc is (d_sae, d_in) and W_dec (d_in, d_sae), which no other format uses."""
    if source.pickle is None:
        return False
    held = source.tensors(source.pickle)
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if set(tensors) != set(QWEN):
        return False
    widths = len(tensors["b_enc"].flatten()), len(tensors["b_dec"].flatten())
    return tuple(tensors["W_enc"].shape) == widths and tuple(tensors["W_dec"].shape) == widths[::-1]


def read_qwen_scope(source: SAEFiles, overrides: SAEFacts) -> ParsedSAE:
    """Weights and convention of Qwen Scope's file, `z = TopK(x W_enc^T + b_enc)`; the file does not hold k, and nothing
    is subtracted from the input.
    """
    assert source.pickle is not None
    parts = require_tensors(source.tensors(source.pickle), QWEN, source.folder / source.pickle)
    parts["W_enc"], parts["W_dec"] = parts["W_enc"].T, parts["W_dec"].T
    activation = require(overrides.activation, "activation", "k", "saelab.TopK(k=50)")
    return ParsedSAE(format="qwen_scope", parts=parts, how=Convention(activation=activation, subtracts_b_dec=False))
