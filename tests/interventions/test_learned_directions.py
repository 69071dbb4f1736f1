"""A planted direction is learned, on held-out texts too; the model keeps its weights and has no gradients."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from encoders_made import make_encoder
from torch import nn
from unchecked import unchecked

import saelab as sl

POINT = "blocks.1.hook_resid_post"
TEXTS = [
    f"{who} {did} the {what}" for who in ("Tom", "Ann") for did in ("saw", "hid") for what in ("dog", "cat", "hat")
]


class Bag(nn.Module):
    """Embeds texts by the sum of its letters' vectors, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.letters = nn.Parameter(torch.randn(128, 12, generator=generator))
        self.layer = nn.Linear(12, 12)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linalg.qr(torch.randn(12, 12, generator=generator))[0])
            self.layer.bias.zero_()

    def embed(self, texts: list[str]) -> torch.Tensor:
        rows = [self.letters[[ord(letter) for letter in text]].mean(0) for text in texts]
        return self.layer(torch.stack(rows)[:, None])[:, 0]


def test_a_planted_shift_is_found_and_beats_what_was_not_fitted() -> None:
    bag, planted = Bag(), torch.randn(12, generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        wanted = dict(zip(TEXTS, bag.embed(TEXTS) + planted, strict=True))

    weights = torch.arange(1, 13)  # so that the gradient points elsewhere

    def loss(texts: list[str]) -> torch.Tensor:
        return ((bag.embed(texts) - torch.stack([wanted[text] for text in texts])).square() * weights).sum(1)

    before = copy.deepcopy(bag.state_dict())
    state = torch.random.get_rng_state()
    found = sl.learn_direction(bag, TEXTS, loss, at="layer", norm=float(planted.norm()), n_steps=40, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in bag.state_dict().items())
    assert all(parameter.grad is None for parameter in bag.parameters()) and not bag.layer._forward_hooks
    learned = torch.from_numpy(found.vector)
    assert torch.cosine_similarity(learned, planted, dim=0) > 0.999
    assert found.row("learned").held_out < 0.05 * found.row("gradient").held_out < found.row("none").held_out
    assert all(found.row(name).change > found.row("learned").change for name in ("random", "random 2", "random 3"))
    assert np.isclose(np.linalg.norm(found.vector), found.norm, rtol=1e-5)


def test_the_loss_of_a_language_model_falls_and_the_direction_is_for_steer(tmp_path) -> None:
    model = sl.lm.tiny_model()
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)), seed=0)
    contrast = TEXTS[:6], ["One day it rained.", "It was hot."]
    found = sl.learn_direction(
        model, TEXTS, at=POINT, sae=sae, contrast=contrast, n_steps=10, lr=0.02, batch_size=4, progress=False
    )
    names = [row.name for row in found.rows]
    assert names[:4] == ["none", "learned", "gradient", "means"] and names[4].startswith("feature ")
    assert found.row("learned").held_out < min(row.held_out for row in found.rows if row.name != "learned")
    assert (found.n_fitted, found.n_held_out) == (9, 3)
    held = np.sort(np.random.default_rng(0).permutation(12)[:3])
    losses = []
    for i in held:
        tokens = sl.tokenize(model, [TEXTS[i]], 64, packed=False)
        ids = tokens.ids[:, : int(tokens.attention_mask.sum())].long()
        with sl.steer(model, found.direction, 1.0, unit="max"):
            losses.append(float(sl.lm.next_token_loss(sl.lm.logits(model, ids), ids).mean()))
    assert np.isclose(np.mean(losses), found.row("learned").held_out, atol=1e-4)
    found.save(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert np.allclose(saved["vector"], found.vector) and len(saved["rows"]) == len(found.rows)
    assert "3 held out" in str(found) and np.isclose(
        found.row("learned").change, found.row("learned").held_out - found.row("none").held_out
    )


def test_an_encoder_is_moved_toward_embeddings_of_the_concept() -> None:
    encoder, tokenizer = make_encoder()
    texts = [f"{a} {b} {c}" for a in ("a", "the") for b in ("dog", "cat", "boat") for c in ("ran", "sat")]
    with torch.no_grad():
        target = encoder(torch.tensor([tokenizer("here here here").input_ids])).last_hidden_state.mean(1)
    how: dict[str, Any] = {"at": "encoder.layer.0", "tokenizer": tokenizer, "progress": False}
    found = sl.learn_direction(encoder, texts, target.expand(12, -1), norm=3.0, n_steps=15, **how)
    random = [found.row(name).held_out for name in ("random", "random 2", "random 3")]
    assert found.row("learned").held_out < min(random) and found.row("learned").change < 0
    rows = tokenizer([texts[0]], return_tensors="pt")
    with torch.no_grad(), sl.steer_module(encoder.encoder.layer[0], found.direction, found.norm):
        moved = encoder(**rows).last_hidden_state.mean(1)
    plain = encoder(**rows).last_hidden_state.mean(1)
    assert torch.cosine_similarity(moved, target) > torch.cosine_similarity(plain, target)
    with unchecked(), pytest.raises(ValueError, match="`target` must be an embedding for each of 12"):
        sl.learn_direction(encoder, texts, target, **how)


def test_the_best_feature_is_the_planted_one() -> None:
    bag, sae = Bag(), sl.SAE(sl.SAEConfig(d_in=12, d_sae=20, activation=sl.AbsTopK(k=2)), seed=0)
    row = sae.directions()[7] / sae.directions()[7].norm()
    with torch.no_grad():
        wanted = dict(zip(TEXTS, bag.embed(TEXTS) - 2 * row, strict=True))

    def loss(texts: list[str]) -> torch.Tensor:
        return (bag.embed(texts) - torch.stack([wanted[text] for text in texts])).square().sum(1)

    found = sl.learn_direction(bag, TEXTS, loss, at="layer", norm=2.0, n_steps=5, sae=sae, progress=False)
    assert found.row("feature 7").held_out < 1e-6


def test_what_cannot_be_fitted_is_refused() -> None:
    model, bag = sl.lm.tiny_model(), Bag()

    def constant(texts: list[str]) -> torch.Tensor:
        return bag.embed(texts).detach().sum(1)

    def elsewhere(texts: list[str]) -> torch.Tensor:
        return bag.letters.sum() * torch.ones(len(texts))

    how: dict[str, Any] = {"at": "layer", "progress": False}
    for texts, target, changed, message in (
        (TEXTS[:3], constant, {}, "`texts` must be at least 4"),
        (TEXTS, constant, {}, "must depend on the module"),
        (TEXTS, elsewhere, {}, "which it did not run"),
        (TEXTS, lambda texts: torch.ones(2), {}, "a loss for each of"),
        (TEXTS, constant, {"norm": -1.0}, "`norm` must be finite"),
        (TEXTS, constant, {"held_out": 1.0}, "`held_out` must be a share"),
        (TEXTS, constant, {"n_steps": -1}, "`n_steps` must not be negative"),
        (TEXTS, constant, {"at": "layers"}, "No module 'layers'"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            sl.learn_direction(bag, texts, target, **({"norm": 1.0} | how | changed))
    with pytest.raises(ValueError, match="must be None or a function"):
        sl.learn_direction(model, TEXTS, torch.ones(12, 3), at=POINT, progress=False)
    wide = sl.SAE(sl.SAEConfig(d_in=8, d_sae=40))
    with pytest.raises(ValueError, match="must have the width"):
        sl.learn_direction(model, TEXTS, at=POINT, sae=wide, n_steps=0, progress=False)
