"""Concept vectors against their formula, on a language model, a text encoder of transformers and a vision module."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders_made import make_encoder
from torch import nn
from unchecked import unchecked

import saelab as sl
from saelab.lm.module_inputs import make_inputs
from saelab.lm.text_encoders import make_pooled_encoder

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    return make_encoder()


def make_sae(activation: Any = None, seed: int = 0) -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=16, d_sae=40, activation=activation or sl.TopK(k=4)), seed=seed)


def hidden(encoder: tuple[Any, Any], text: str, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after a layer as transformers gives them, and which are no special tokens."""
    rows = encoder[1]([text], return_special_tokens_mask=True)
    with torch.no_grad():
        out = encoder[0](torch.tensor(rows["input_ids"]), output_hidden_states=True)
    return out.hidden_states[layer][0], torch.tensor(rows["special_tokens_mask"][0]) == 0


@pytest.mark.parametrize("activation", [sl.TopK(k=4), sl.AbsTopK(k=4), sl.ReLU()])
@pytest.mark.parametrize("pooling", ["mean", "max", "last", None])
def test_the_vector_is_the_pooled_codes_times_the_decoder(encoder, activation, pooling) -> None:
    sae, (x, text) = make_sae(activation), hidden(encoder, "the dog sat")
    with torch.no_grad():
        z = sae.encode(x)
    at = encoder[0].encoder.layer[0]
    found = sl.concept_vector(sae, encoder[0], "the dog sat", at=at, pooling=pooling, tokenizer=encoder[1])
    if pooling is None:
        expected = z
    elif pooling == "max":
        expected = torch.stack([column[column.abs().argmax()] for column in z[text].T])
    else:
        expected = z[text].mean(0) if pooling == "mean" else z[text][-1]
    assert torch.allclose(found.codes, expected, atol=1e-5)
    assert torch.allclose(found.vector, expected @ sae.W_dec.detach(), atol=1e-4)
    by_name = sl.concept_vector(
        sae, encoder[0], "the dog sat", at="encoder.layer.0", pooling=pooling, tokenizer=encoder[1]
    )
    assert torch.equal(by_name.vector, found.vector) and encoder[0].training is False


def test_texts_are_averaged_padding_left_out_and_others_taken_away(encoder) -> None:
    sae, how = make_sae(), {"at": "encoder.layer.1", "tokenizer": encoder[1]}
    one, other = (sl.concept_vector(sae, encoder[0], text, **how) for text in ("dog", "the cat sat here"))
    both = sl.concept_vector(sae, encoder[0], ["dog", "the cat sat here"], **how)
    assert torch.allclose(both.codes, (one.codes + other.codes) / 2, atol=1e-5)
    less = sl.concept_vector(sae, encoder[0], "dog", less="the cat sat here", **how)
    assert torch.allclose(less.vector, one.vector - other.vector, atol=1e-4)
    assert str(less).startswith("'dog' less 'the cat sat here'") and "2 features" not in str(both)


@pytest.mark.parametrize("signed", [False, True])
def test_k_keeps_the_largest_and_d_sae_takes_all_positive_ones(encoder, signed) -> None:
    sae = make_sae(sl.AbsTopK(k=4) if signed else sl.TopK(k=4))
    how = {"at": "encoder.layer.0", "tokenizer": encoder[1]}
    x, text = hidden(encoder, "the dog sat")
    with torch.no_grad():
        u = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    u = u if signed else u.relu()
    every = sl.concept_vector(sae, encoder[0], "the dog sat", k=40, **how)
    assert torch.allclose(every.codes, u[text].mean(0), atol=1e-4)
    few = sl.concept_vector(sae, encoder[0], "the dog sat", k=3, **how)
    assert len(few.features) == 3 and few.features == sorted(few.features, key=lambda one: -abs(one[1]))
    z = sae.with_k(3).encode(x)[text].mean(0).detach()
    assert {i for i, _ in few.features} == set(z.abs().topk(3).indices.tolist())
    by_position = sl.concept_vector(sae, encoder[0], "the dog sat", k=3, pooling=None, **how)
    assert ((by_position.codes != 0).sum(1) <= 3).all() and len(by_position.vector) == len(x)


def test_of_a_language_model_it_is_what_steer_adds() -> None:
    model = sl.lm.tiny_model()
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)), seed=0)
    found = sl.concept_vector(sae, model, "a dog", at=POINT)
    ids = sl.tokenize(model, ["a dog"], 16, packed=False).ids[:, :6].long()
    x = sl.lm.capture(model, ids, [POINT])[POINT][0]
    with torch.no_grad():
        z = sae.encode(x[1:])  # without BOS
    assert torch.allclose(found.codes, z.mean(0), atol=1e-5)
    with sl.steer(model, found.direction(POINT), -2.0, unit="max"):
        moved = sl.lm.capture(model, ids, ["blocks.1.hook_out"])["blocks.1.hook_out"][0]
    assert torch.allclose(moved[1:], x[1:] - 2 * found.vector, atol=1e-4)
    with pytest.raises(ValueError, match="must be one vector"):
        sl.concept_vector(sae, model, "a dog", at=POINT, pooling=None).direction(POINT)


def test_a_vision_module_takes_tensors() -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    sae = make_sae()
    found = sl.concept_vector(sae, network, images, at="1", axis=1)
    with torch.no_grad():
        x = network[:2](images).flatten(2).transpose(1, 2)
        assert torch.allclose(found.codes, sae.encode(x).mean(1).mean(0), atol=1e-5)
        plain = network(images)
        with sl.steer_module(network[1], found, 3.0, axis=1):
            moved = network(images)
        assert torch.allclose(moved, network[2:](network[:2](images) + 3 * found.vector[:, None, None]), atol=1e-4)
        assert not torch.allclose(moved, plain) and torch.equal(network(images), plain)


def test_what_does_not_fit_is_refused(encoder) -> None:
    sae, how = make_sae(), {"at": "encoder.layer.0", "tokenizer": encoder[1]}
    wide = sl.SAE(sl.SAEConfig(d_in=8, d_sae=40))
    model = sl.lm.tiny_model()
    for one, other, concept, changed, message in (
        (sae, encoder[0], ["dog", "cat"], {"pooling": None}, "`pooling` must be given for several texts"),
        (sae, encoder[0], "dog", {"pooling": None, "less": "cat"}, "`less` must go with a pooling"),
        (sae, encoder[0], "dog", {"pooling": "median"}, "`pooling` must be one of"),
        (sae, encoder[0], "dog", {"k": 41}, "`k` must be in 1..d_sae"),
        (sae, encoder[0], " ", {}, "none of them blank"),
        (sae, encoder[0], "dog", {"at": "encoder.layers.0"}, "No module 'encoder.layers.0'"),
        (sae, encoder[0], "dog", {"at": None}, "`at` must be the module"),
        (wide, encoder[0], "dog", {}, "must have the width of what it reads, 16"),
        (sae, model, torch.ones(1, 2), {"at": POINT}, "must be text or texts"),
        (sae, nn.Linear(2, 2), "dog", {"at": "", "tokenizer": None}, "`tokenizer` must be given"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            sl.concept_vector(one, other, concept, **(how | changed))
    with pytest.raises(RuntimeError, match="ran 0 times"):
        sl.concept_vector(sae, encoder[0], "dog", at=nn.Linear(16, 16), tokenizer=encoder[1])
    with pytest.raises(TypeError, match="must put out a tensor"):
        sl.concept_vector(sae, encoder[0], "dog", at=encoder[0], tokenizer=encoder[1])


class SentenceTransformer(nn.Sequential):
    """Shaped like a model of sentence-transformers, which is known by its name."""

    tokenizer: Any


def test_a_model_of_sentence_transformers_is_read_in_its_transformer(encoder) -> None:
    sae, part = make_sae(), nn.Module()
    part.auto_model = encoder[0]
    whole = SentenceTransformer(part)
    whole.tokenizer = encoder[1]
    at = encoder[0].encoder.layer[1]
    found = sl.concept_vector(sae, whole, "the dog", at=at)
    assert torch.equal(found.vector, sl.concept_vector(sae, encoder[0], "the dog", at=at, tokenizer=encoder[1]).vector)


@pytest.mark.skipif("SAELAB_MINILM" not in os.environ, reason="SAELAB_MINILM names no folder of all-MiniLM-L6-v2")
def test_minilm_steered_by_a_prompt_moves_its_neighbors() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = Path(os.environ["SAELAB_MINILM"])
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    at, embed = model.encoder.layer[3], make_pooled_encoder(model, "mean", tokenizer=tokenizer).encode
    things = ("dog", "boat", "cake", "violin")
    texts = [f"{who} saw a {thing} {when}." for who in ("Tom", "My aunt") for thing in things for when in ("", "today")]
    inputs = make_inputs(model, texts, tokenizer)
    acts = sl.Activations.from_tensor(inputs.capture(at)[inputs.text])
    cfg = sl.SAEConfig(d_in=384, d_sae=64, activation=sl.TopK(k=8))
    sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=20_000, batch_size=64, n_held_out=0), progress=False)
    known, query = nn.functional.normalize(embed(texts)), ["Tom saw it today."]
    for thing in things:
        vector = sl.concept_vector(sae, model, thing, at=at, less=list(things), tokenizer=tokenizer)
        with sl.steer_module(at, vector, 1.0, unit="norm"):
            near = (nn.functional.normalize(embed(query)) @ known.T)[0].topk(4).indices
        assert sum(thing in texts[i] for i in near) >= 3
