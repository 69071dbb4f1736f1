"""Untrained dictionaries: the same shape, the same rows, the same number of active codes."""

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.collecting.reader import rebuild_tokens
from saelab.sae.fitting import mean_l0

POINT = "blocks.1.hook_resid_post"
KINDS = [sl.TopK(k=4), sl.AbsTopK(k=4), sl.BatchTopK(k=4), sl.JumpReLU(target_l0=4.0), sl.ReLU(target_l0=4.0)]


@pytest.mark.parametrize("activation", KINDS, ids=lambda one: one.name)
def test_as_many_codes_are_active_as_in_the_trained_one(activation) -> None:
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=48, activation=activation), seed=0)
    sae.fit(x, sl.TrainConfig(n_tokens=20_000, batch_size=256, n_held_out=0), progress=False)
    made = sl.sae.make_untrained(sae, x, seed=3)
    assert mean_l0(made, x) == pytest.approx(mean_l0(sae, x), rel=0.01)
    assert made.cfg.activation == activation and made.cfg.d_sae == 48 and not torch.equal(made.W_dec, sae.W_dec)
    assert torch.equal(made.W_dec, sl.sae.make_untrained(sae, x, seed=3).W_dec)


@pytest.fixture(scope="module")
def pair(tiny, tiny_tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    acts = sl.collect(tiny, tiny_tokens, POINT, progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)), seed=0)
    sae.fit(acts, sl.TrainConfig(n_tokens=10_000, batch_size=256), progress=False)
    sae.save_pretrained(folder / "sae")
    store = sl.harvest(sae, tiny, tiny_tokens, folder / "store", progress=False)
    return sae, store, sl.collecting.harvest_untrained(store, sae, tiny, folder / "untrained", progress=False)


def test_its_store_has_the_rows_of_the_trained_one(pair, tiny, tiny_tokens) -> None:
    sae, store, made = pair
    tokens = rebuild_tokens(store.text)
    kept = tiny_tokens.attention_mask
    assert torch.equal(tokens.ids[tokens.attention_mask], tiny_tokens.ids[kept])
    assert torch.equal(tokens.doc_ids[tokens.attention_mask], tiny_tokens.doc_ids[kept])
    assert np.array_equal(made.places, store.places) and np.array_equal(made.token_ids, store.token_ids)
    assert made.d_sae == store.d_sae and made.l0 == pytest.approx(store.l0) and made.folder != store.folder
    x = sl.collect(tiny, tiny_tokens, POINT, progress=False)[:]
    z = sl.sae.make_untrained(sae, x[:8192]).encode(x).detach().numpy()
    assert np.abs(made.matrix().toarray() - z).max() < 2e-3 * np.abs(z).max()


def test_it_stands_beside_comparisons_and_probes(pair) -> None:
    _, store, made = pair
    found = sl.compare(
        store, store, untrained=(made, made), null=sl.universality.NullConfig(n_shifts=2), progress=False
    )
    assert (
        found.a.untrained is not None and 0 <= found.a.untrained.shares["count"] <= found.a.untrained.trained["count"]
    )
    y = np.asarray(store.token_ids == np.bincount(store.token_ids).argmax())
    probes = sl.probing.probe_features(store, y, untrained=made, ks=(1,), rankings=("f",))
    assert 0 < probes.probes[0].untrained.f1 <= 1


def test_a_text_with_gaps_is_refused(pair, tiny, tmp_path) -> None:
    _, store, _ = pair
    from dataclasses import replace

    text = replace(store.text, token_ids=store.text.token_ids[1:], doc_ids=store.text.doc_ids[1:],
                   positions=store.text.positions[1:])  # fmt: skip
    with pytest.raises(ValueError, match="in whole rows to be encoded again"):
        rebuild_tokens(text)
