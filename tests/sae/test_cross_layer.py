"""A cross-layer transcoder's formula, its layers by themselves, its settings, and input that is no such thing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from unchecked import unchecked

import saelab as sl
from saelab.sae import CLT, AbsJumpReLU, CLTConfig, Gated, Log1pReLU
from saelab.sae.objectives import OrthogonalLoss

N, D_IN, D_OUT, D_SAE = 3, 6, 5, 24


def make(seed: int = 0, **axes: Any) -> CLT:
    """With biases, and normalizers that are fitted where it has some."""
    base = {"n_layers": N, "d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "activation": sl.TopK(k=3)}
    clt = CLT(CLTConfig(**(base | axes)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (clt.b_dec, *(layer.b_enc for layer in clt.layers)):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
        for layer in clt.layers:
            if layer.threshold is not None:
                layer.threshold.copy_(torch.rand(layer.threshold.shape, generator=generator) / 2 + 0.2)
        for normalizer in (*clt.normalizers, *clt.target_normalizers):
            width = D_IN if normalizer in list(clt.normalizers) else D_OUT
            normalizer.fit(3 * torch.randn(50, width, generator=generator) + 1)
    return clt


def draw(n: int = 40, seed: int = 1) -> Tensor:
    return 3 * torch.randn(n, N * D_IN, generator=torch.Generator().manual_seed(seed)) + 1


def reconstruct(clt: CLT, x: Tensor) -> Tensor:
    """The formula, decoder by decoder."""
    outputs = [part.clone().expand(len(x), -1) for part in clt.b_dec.split(D_OUT)]
    for i, layer in enumerate(clt.layers):
        read = clt.normalizers[i].normalize(x[:, i * D_IN : (i + 1) * D_IN])
        z = clt.cfg.activation(read @ layer.W_enc + layer.b_enc, layer.threshold)
        for m in range(i, N):
            outputs[m] = outputs[m] + z @ layer.W_dec[:, (m - i) * D_OUT : (m - i + 1) * D_OUT]
    return torch.cat([clt.target_normalizers[m].unnormalize(part) for m, part in enumerate(outputs)], dim=1)


ACTIVATIONS = [
    sl.TopK(k=3),
    sl.AbsTopK(k=3),
    sl.BatchTopK(k=3),
    sl.GroupMax(k=3),
    sl.ReLU(target_l0=3.0),
    Log1pReLU(target_l0=3.0),
    sl.JumpReLU(target_l0=3.0),
    AbsJumpReLU(target_l0=3.0),
]


@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_outputs_are_what_the_formula_says(activation: Any, normalizer: str) -> None:
    clt, x = make(activation=activation, normalizer=normalizer), draw()
    wanted = reconstruct(clt, x)
    torch.testing.assert_close(clt(x), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(clt(x), wanted, rtol=1e-4, atol=1e-4)  # by sparse codes
    z = clt.encode(x)
    assert z.shape == (40, N, D_SAE)
    for i, codes in enumerate(clt.encode_sparse(x)):
        torch.testing.assert_close(codes.to_dense(), z[:, i])
    torch.testing.assert_close(clt.decode(z), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clt(x.view(8, 5, -1)).view(40, -1), wanted, rtol=1e-4, atol=1e-4)


def test_no_layer_writes_an_earlier_one() -> None:
    clt, x = make(activation=sl.TopK(k=3)), draw()
    before, changed = clt(x), x.clone()
    changed[:, 2 * D_IN :] += 5  # the input of the last layer
    assert torch.equal(clt(changed)[:, : 2 * D_OUT], before[:, : 2 * D_OUT])
    assert not torch.equal(clt(changed)[:, 2 * D_OUT :], before[:, 2 * D_OUT :])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_layers_by_themselves_add_up(activation: Any) -> None:
    clt, x = make(activation=activation, normalizer="whiten"), draw()
    parts = x.split(D_IN, dim=1)
    total = torch.zeros(40, N * D_OUT)
    for i in range(N):
        whole = clt.layer(i)
        torch.testing.assert_close(whole.encode(parts[i]), clt.encode(x)[:, i], rtol=1e-4, atol=1e-4)
        total[:, i * D_OUT :] += whole(parts[i])
        single = torch.cat([clt.layer(i, writes=m)(parts[i]) for m in range(i, N)], dim=1)
        torch.testing.assert_close(single, whole(parts[i]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, clt(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clt.fold()(x), clt(x), rtol=1e-4, atol=1e-4)
    assert clt.fold().cfg.normalizer == "none"


def test_layers_are_copies_and_know_their_place() -> None:
    clt, x = make(activation=sl.TopK(k=3)), draw()
    before = clt(x)
    with torch.no_grad():
        clt.layer(0).W_dec.zero_()
        clt.fold().layers[0].W_dec.zero_()
    assert torch.equal(clt(x), before)
    for number, writes in ((3, None), (-1, None), (1, 0), (0, 3)):
        with pytest.raises(ValueError, match="must be in"):
            clt.layer(number, writes)


def test_a_seed_gives_the_weights_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        CLT(CLTConfig(n_layers=2, d_in=4, d_sae=8, activation=sl.TopK(k=2)), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.layers[0].W_enc, other.layers[0].W_enc)
    assert not torch.equal(one.layers[0].W_enc, one.layers[1].W_enc)
    norms = one.layers[0].W_dec.norm(dim=1)  # one unit row for all the layers that it writes
    torch.testing.assert_close(norms, torch.ones(8))


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({"n_layers": 1}, "`n_layers` must be at least 2"),
        ({"d_sae": 0}, "`d_sae` must be at least 1"),
        ({"activation": sl.TopK(k=25)}, "`k` must be in"),
        ({"activation": Gated(target_l0=3.0)}, "must not be Gated"),
        ({"normalizer": "layer_norm"}, "`normalizer` must be one of"),
        ({"dictionary": "frozen"}, "`dictionary` must be one of"),
        ({"objective": (sl.ReconstructionLoss(), OrthogonalLoss())}, "`objective` must be of"),
        ({"objective": (sl.AuxK(),)}, "must have a reconstruction term"),
    ],
)
def test_settings_that_are_none(axes: dict[str, Any], complaint: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=complaint):
        make(**axes)


def test_input_that_is_not_that_of_its_layers() -> None:
    clt = make()
    with pytest.raises(ValueError, match="inputs of 3 layers of d_in 6 side by side"):
        clt.encode(torch.zeros(4, 2 * D_IN))
    with pytest.raises(ValueError, match="codes of 3 layers, got 2"):
        clt.decode(clt.encode_sparse(draw())[:2])


def test_settings_survive_json() -> None:
    cfg = make(activation=sl.JumpReLU(target_l0=3.0), objective=(sl.ReconstructionLoss(), sl.AuxK(k=2))).cfg
    assert CLTConfig.from_dict(cfg.to_dict()) == cfg
    with pytest.raises(ValueError, match="d_saw"):
        CLTConfig.from_dict(cfg.to_dict() | {"d_saw": 3})
