"""Cross-layer transcoders on disk, from joined activations, and with layers that do not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae import CLT, CLTConfig
from saelab.stores.manifest import Provenance

N, D, D_SAE = 3, 4, 16
RUN = sl.TrainConfig(n_tokens=400, batch_size=40, n_held_out=50)
ORIGIN = Provenance(
    model="tiny",
    weight_processing="none",
    hook_point="",
    text="text",
    tokens_sha256="same",
    mask={},
    dtype="float32",
    ctx_len=8,
    n_tokens=500,
    seed=None,
    versions={},
)
PLACES = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(N)]


def collect(seed: int = 0, places: Any = PLACES, width: int = D) -> tuple[Any, Any]:
    """Inputs and targets of all layers, joined, as `collect` gives them."""
    generator = torch.Generator().manual_seed(seed)
    first = ORIGIN

    def make(name: str) -> sl.Activations:
        x = torch.randn(500, width, generator=generator)
        return sl.Activations.from_tensor(x, provenance=first.at(name))

    sides = zip(*places, strict=True)
    inputs, targets = (sl.Activations.join({name: make(name) for name in side}) for side in sides)
    return inputs, targets


def make(**axes: Any) -> CLT:
    cfg = {"n_layers": N, "d_in": D, "d_sae": D_SAE, "activation": sl.TopK(k=2)} | axes
    return CLT(CLTConfig(**cfg))


def same(one: CLT, other: CLT) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    clt = make().fit(collect(), RUN, progress=False)
    clt.save_pretrained(tmp_path / "clt")
    again = CLT.from_pretrained(tmp_path / "clt")
    x = torch.randn(9, N * D, generator=torch.Generator().manual_seed(1))
    assert same(again, clt) and again.cfg == clt.cfg and torch.equal(again(x), clt(x))
    assert again.places == clt.places == tuple(PLACES) and again.training_ == json.loads(json.dumps(clt.training_))
    assert "tiny" in repr(again) and repr(again).startswith("CLT(TopK(k=2), n_layers=3, d_in=4, d_sae=16")
    assert again.layer(1).provenance.hook_point_out == PLACES[1][1]
    assert again.layer(0, writes=2).provenance.hook_point_out == PLACES[2][1]
    again.fit(collect(seed=2), RUN, progress=False)  # goes on from its weights and normalizers
    assert torch.equal(again.normalizers[0].mean, clt.normalizers[0].mean) and not same(again, clt)


def test_tensors_are_pairs_too() -> None:
    inputs, targets = collect()
    plain = make().fit((inputs[:], targets[:]), RUN, progress=False)
    assert same(plain, make().fit((inputs, targets), RUN, progress=False)) and plain.places is None


def test_layers_that_do_not_fit() -> None:
    inputs, targets = collect()
    two, turned = collect(places=PLACES[:2]), collect(places=[PLACES[1], PLACES[0], PLACES[2]])
    crossed = collect(places=[(PLACES[0][0], PLACES[1][1]), (PLACES[1][0], PLACES[0][1]), PLACES[2]])
    for given, complaint in (
        (two, "of 3 layers side by side, of widths"),
        (inputs, "must be \\(inputs, targets\\)"),
        (collect(width=5), "of widths \\(12, 12\\)"),
        (turned, "in the order of the model"),
        (crossed, "in the order of the model"),
        ((inputs, targets.rows(0, 400)), "as many inputs as targets"),
    ):
        with pytest.raises(ValueError, match=complaint):
            make().fit(given, RUN, progress=False)
    uneven = sl.Activations.join(
        {str(i): sl.Activations.from_tensor(torch.randn(500, width)) for i, width in enumerate((2, 4, 6))}
    )
    with pytest.raises(ValueError, match="Each layer must have a width of 4"):
        make().fit((uneven, targets), RUN, progress=False)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    clt = make().fit(collect(), RUN, progress=False)
    clt.save_pretrained(tmp_path / "clt")
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        CLT.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must have config"):
        CLT.from_pretrained(tmp_path / "empty")
    clt.layer(0).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="must describe a cross-layer transcoder"):
        CLT.from_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match=r"CLT\.from_pretrained"):
        sl.SAE.from_pretrained(tmp_path / "clt")
    config = tmp_path / "clt" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"n_layers": 3', '"n_layers": 2'))
    with pytest.raises(ValueError, match=r"must be of 2 layers|must fit its config"):
        CLT.from_pretrained(tmp_path / "clt")
    config.write_text(text.replace('"normalizer": "scale"', '"normalizer": "none"'))
    with pytest.raises(ValueError, match="must fit its config"):
        CLT.from_pretrained(tmp_path / "clt")
    config.write_text(text.replace('"tiny"', '"tidy"'))
    with pytest.raises(ValueError, match="checksum"):
        CLT.from_pretrained(tmp_path / "clt")
    with pytest.raises(ValueError, match="`format` must be one of"):
        clt.save_pretrained(tmp_path / "x", "saelens")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    clt = make()
    with torch.no_grad():
        clt.layers[1].W_dec[2, 3] = torch.nan
    clt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be finite"):
        CLT.from_pretrained(tmp_path)


def test_thresholds_in_place_of_the_k_largest() -> None:
    clt = make().fit(collect(), RUN, progress=False)
    x = torch.randn(2000, N * D, generator=torch.Generator().manual_seed(3))
    jumps = clt.to_jumprelu(x)
    for mine, others in zip(clt.encode_sparse(x), jumps.encode_sparse(x), strict=True):
        counts = [codes.indices.bincount(minlength=D_SAE) for codes in (mine, others)]
        # folding a normalizer rounds pre-activations, of which two per latent lie next to its threshold
        assert (counts[0] - counts[1]).abs().max() <= 2
    assert jumps.cfg.activation.penalty_target == pytest.approx(2, rel=0.02)  # of each layer, not of all
    assert type(jumps.cfg.activation) is sl.JumpReLU and jumps.places == clt.places
    with pytest.raises(ValueError, match="`to_jumprelu` must be given"):
        make(activation=sl.GroupMax(k=2)).to_jumprelu(x)


def test_a_folder_holds_one_dictionary(tmp_path: Path) -> None:
    clt = make(activation=sl.BatchTopK(k=2)).fit(collect(), RUN, progress=False)
    clt.save_pretrained(tmp_path / "own")
    clt.save_pretrained(tmp_path / "own")  # over an older one
    with pytest.raises(ValueError, match=r"must hold one SAE.*one of cross_layer_transcoder"):
        clt.save_pretrained(tmp_path / "own", "circuit_tracer")
    clt.save_pretrained(tmp_path / "theirs", "circuit_tracer")
    clt.save_pretrained(tmp_path / "theirs", "circuit_tracer")
    sae = clt.layer(0)
    for folder, format, one in (("theirs", "saelab", clt), ("theirs", "saelab", sae), ("own", "saelab", sae)):
        with pytest.raises(ValueError, match="must hold one SAE"):
            one.save_pretrained(tmp_path / folder, format)
    sae.save_pretrained(tmp_path / "sae")
    for format in ("saelab", "circuit_tracer"):
        with pytest.raises(ValueError, match="one of saelab"):
            clt.save_pretrained(tmp_path / "sae", format)
    assert same(CLT.from_pretrained(tmp_path / "own"), clt)


def test_a_threshold_may_be_infinite_or_not_yet_trained(tmp_path: Path) -> None:
    clt = make(activation=sl.JumpReLU(target_l0=2.0))
    with torch.no_grad():
        clt.layers[1].threshold[3] = torch.inf  # never active
    clt.save_pretrained(tmp_path / "inf")
    assert same(CLT.from_pretrained(tmp_path / "inf"), clt)
    make(activation=sl.BatchTopK(k=2)).save_pretrained(tmp_path / "new")
    assert CLT.from_pretrained(tmp_path / "new").layers[0].threshold.isnan()
    with torch.no_grad():
        clt.layers[1].threshold[3] = torch.nan
    clt.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="must be finite"):
        CLT.from_pretrained(tmp_path / "nan")


def test_a_sample_and_held_out_tokens_have_all_layers() -> None:
    clt, x = make(), torch.randn(200, N * D, generator=torch.Generator().manual_seed(1))
    for sample in (x[:, :D], torch.cat([x, x], 1)):
        with pytest.raises(ValueError, match="the inputs of 3 layers of d_in 4 side by side"):
            clt.to_jumprelu(sample)
    inputs, targets = collect()
    with pytest.raises(ValueError, match=r"`held_out` must have the inputs of all layers.* of width 24, got"):
        clt.fit((inputs, targets), RUN, held_out=x, progress=False)


def test_a_layer_goes_on_from_its_weights() -> None:
    clt = make().fit(collect(), RUN, progress=False)
    layer = clt.layer(2)
    before = layer.W_dec.detach().clone()
    inputs, targets = collect(seed=1)
    slow = sl.TrainConfig(n_tokens=40, batch_size=40, lr=1e-9)
    layer.fit((inputs[:][:, 2 * D :], targets[:][:, 2 * D :]), slow, progress=False)
    torch.testing.assert_close(layer.W_dec, before, atol=1e-5, rtol=0)


def test_layers_start_from_different_weights() -> None:
    cfg = make().cfg
    rows = [
        torch.nn.functional.normalize(layer.W_dec[0, :D], dim=0)
        for seed in (0, 1)
        for layer in CLT(cfg, seed=seed).layers
    ]
    assert all(not torch.allclose(one, other) for i, one in enumerate(rows) for other in rows[:i])


def test_a_layer_has_the_norm_of_what_it_writes() -> None:
    clt = make()
    first = [replace(ORIGIN.at(name), median_norm=1.0 + i) for i, pair in enumerate(PLACES) for name in pair[:1]]
    then = [replace(ORIGIN.at(pair[1]), median_norm=10.0 + i) for i, pair in enumerate(PLACES)]
    clt.provenances = tuple(read.paired(written) for read, written in zip(first, then, strict=True))
    origin = clt.layer(0, writes=2).provenance
    assert origin is not None and (origin.median_norm, origin.median_norm_out) == (1.0, 12.0)


def test_a_stream_of_all_layers_is_what_they_were_collected_as_and_leaves_its_origin(
    tiny, tiny_tokens, tmp_path
) -> None:
    places = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(2)]
    acts = sl.collect(tiny, tiny_tokens, [name for pair in places for name in pair], progress=False)
    sides = [sl.Activations.join({pair[side]: acts[pair[side]] for pair in places})[:] for side in (0, 1)]
    sizes = {"buffer_tokens": 1024, "n_seq": 8}
    batches = sl.stream(tiny, tiny_tokens, places, epochs=1, batch_size=1, **sizes)
    rows, collected = torch.cat(list(batches)), torch.cat(sides, dim=1)
    by_first, by_other = (x[x[:, 0].argsort()] for x in (rows, collected))
    torch.testing.assert_close(by_first, by_other, atol=1e-4, rtol=1e-4)
    assert (batches.d_in, batches.d_out, batches.provenance) == (64, 64, None)
    clt = CLT(CLTConfig(n_layers=2, d_in=32, d_sae=48, activation=sl.TopK(k=4)))
    clt.fit(sl.stream(tiny, tiny_tokens, places, batch_size=50, **sizes), sl.TrainConfig(n_tokens=200, batch_size=50),
            progress=False)  # fmt: skip
    assert clt.places == tuple(places) and all(one.n_tokens >= 200 for one in clt.provenances or ())
    clt.save_pretrained(tmp_path / "clt")
    assert CLT.from_pretrained(tmp_path / "clt").provenances == clt.provenances
    with pytest.raises(ValueError, match="in the order of the model"):
        clt.fit(sl.stream(tiny, tiny_tokens, places[::-1], batch_size=50, **sizes), progress=False)
    twice = (places[0][0], places[0][0])
    for wrong, said in (([], "a list of such pairs"), ([twice], "each name once"), (twice, "each name once")):
        with pytest.raises(ValueError, match=said):
            sl.stream(tiny, tiny_tokens, wrong, batch_size=50, **sizes)
    with unchecked(), pytest.raises(ValueError, match="a list of such pairs"):
        sl.stream(tiny, tiny_tokens, (*places[0], places[1][0]), batch_size=50, **sizes)  # type: ignore[arg-type]
