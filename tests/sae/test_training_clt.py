"""Training of cross-layer transcoders: gradients of the formula, planted features found, runs that are cut off."""

from typing import Any

import pytest
import torch
from torch import Tensor
from unchecked import unchecked

import saelab as sl
from saelab.functional import compiled, sparse_products
from saelab.functional.codes import decode_entries, weighted_error
from saelab.functional.compiled import has_numba
from saelab.functional.sparse_products import Entries, GradientMemory
from saelab.sae import CLT, AbsJumpReLU, CLTConfig, Log1pReLU, Sparsemax, TrainingCLT, TrainingSAE
from saelab.sae.training_clt import _LayerCodes

N, D_IN, D_OUT, D_SAE = 3, 6, 5, 24
RUN = sl.TrainConfig(n_tokens=12 * 40, batch_size=40, log_every_tokens=80, save_every_tokens=160, n_held_out=50)


def draw(n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs, and outputs of another size in every layer, which small networks make of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, N * D_IN, generator=generator) + 1.0
    first = torch.randn(N * D_IN, N * D_OUT, generator=torch.Generator().manual_seed(7))
    sizes = torch.tensor([1.0, 5.0, 0.2]).repeat_interleave(D_OUT)
    return x, (x @ first).relu() * sizes + 2.0


def make(**axes: Any) -> CLT:
    base = {"n_layers": N, "d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, "activation": sl.TopK(k=3)}
    return CLT(CLTConfig(**(base | {"objective": (sl.ReconstructionLoss(),)} | axes)))


def expect(trainee: TrainingCLT, pairs: Tensor) -> Tensor:
    """The loss by dense products, layer by layer."""
    clt, state = trainee.clt, trainee.state
    inputs, y = trainee.read(pairs)
    outputs, penalties = [part.expand(len(pairs), -1) for part in clt.b_dec.split(D_OUT)], torch.zeros(())
    for i, layer in enumerate(clt.layers):
        u = inputs[i] @ layer.W_enc + layer.b_enc
        z = clt.cfg.activation(u, layer.threshold, training=True)
        for m in range(i, N):
            outputs[m] = outputs[m] + z @ layer.W_dec[:, (m - i) * D_OUT : (m - i + 1) * D_OUT]
        if (penalty := clt.cfg.activation.penalty(u, z, layer.threshold)) is not None:
            penalties = penalties + state["coefficient"][i] * penalty.sum() / len(pairs)
    errors = [
        (part - made).square().sum() / (len(pairs) * state["variance"][m])
        for m, (part, made) in enumerate(zip(y.split(D_OUT, dim=1), outputs, strict=True))
    ]
    return (sum(errors, torch.zeros(())) + penalties) / N


PENALIZED = {"target_l0": 3.0, "coefficient": 0.02}
ACTIVATIONS = [
    *(sl.TopK(k=3), sl.AbsTopK(k=3), sl.BatchTopK(k=3), sl.BatchAbsTopK(k=3), sl.GroupMax(k=3), Sparsemax()),
    *(sl.ReLU(**PENALIZED), Log1pReLU(**PENALIZED)),
    *(kind(bandwidth=0.3, start=0.4, **PENALIZED) for kind in (sl.JumpReLU, AbsJumpReLU)),
]


@pytest.mark.parametrize("kernels", ["torch", "numba", "kept"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_a_step_has_the_gradients_of_the_formula(
    activation: Any, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels != "torch":
        if not has_numba():
            pytest.skip("numba is not installed")
        monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
        monkeypatch.setattr(sparse_products, "MOST_PRODUCTS", 10**6 if kernels == "kept" else 0)
    normalizer = "none" if kernels == "torch" else "scale"  # each layer's error is in units of its own variance
    clt, pairs = make(activation=activation, dictionary="free", normalizer=normalizer), torch.cat(draw(), 1)
    trainee = TrainingCLT(clt, RUN)
    trainee.prepare(pairs)
    with torch.no_grad():
        for i, weight in enumerate(clt.parameters()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
        for layer in clt.layers:
            if layer.cfg.activation.threshold == "learned":
                layer.threshold.clamp_(min=0.1)
    loss = expect(trainee, pairs)
    wanted = torch.autograd.grad(loss, list(clt.parameters()))
    objective = trainee.objective(pairs)
    torch.testing.assert_close(objective.total, loss)
    kept = trainee.differentiate(objective.total)
    for (name, parameter), grad in zip(clt.named_parameters(), wanted, strict=True):
        assert grad.any(), name
        made = parameter.grad
        if parameter in kept:
            dense = kept[parameter].to_dense()
            made = dense.T if name.endswith("W_enc") else dense
        torch.testing.assert_close(made, grad, rtol=1e-4, atol=1e-6, msg=name)
    if kernels == "kept" and activation.name in ("topk", "abstopk"):
        assert len(kept) == 2 * N  # no gradient of a weight's size is made


def test_dead_latents_of_a_layer_hear_of_all_the_layers_it_writes() -> None:
    clt = make(objective=(sl.ReconstructionLoss(), sl.AuxK(k=2, dead_after_tokens=10)))
    trainee, pairs = TrainingCLT(clt, RUN), torch.cat(draw(), 1)
    trainee.prepare(pairs)
    with torch.no_grad():
        clt.layers[1].b_enc[-4:] = -100.0
    state = trainee.state
    state["tokens_since_fired"][1, -4:] = 10
    trainee.state = state
    trainee.objective(pairs).terms["aux"].backward()
    (rows, other) = clt.layers[1].W_dec.grad, clt.layers[0].W_dec.grad
    assert rows[-4:, :D_OUT].any() and rows[-4:, D_OUT:].any() and not rows[:-4].any()
    assert other is None or not other.any()


def test_dead_latents_hear_of_layers_of_every_size_alike() -> None:
    """Outputs of one layer a hundred times as large, and all that writes them: the same losses."""
    x, y = draw()
    factor = torch.tensor([1.0, 1.0, 100.0]).repeat_interleave(D_OUT)
    found = []
    for large in (False, True):
        clt = make(objective=(sl.ReconstructionLoss(), sl.AuxK(k=2, dead_after_tokens=10, token_frac=1.0)),
                   normalizer="none", dictionary="free")  # fmt: skip
        trainee = TrainingCLT(clt, RUN, trained=True)
        if large:
            with torch.no_grad():
                clt.b_dec.mul_(factor)
                for layer in clt.layers:
                    layer.W_dec.mul_(factor[-layer.W_dec.shape[1] :])
        pairs = torch.cat([x, y * factor if large else y], 1)
        trainee.prepare(pairs)
        state = trainee.state
        state["tokens_since_fired"][:, -4:] = 10
        trainee.state = state
        found.append({name: value.item() for name, value in trainee.objective(pairs).terms.items()})
    assert found[0]["aux"] > 0.01 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_parts_that_start_at_different_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    target, weights = torch.randn(7, 6, generator=generator), torch.rand(6, generator=generator)
    parts = [torch.randn(7, width, generator=generator).requires_grad_() for width in (6, 4, 1)]
    target.requires_grad_()
    summed = sum(torch.nn.functional.pad(part, (6 - part.shape[1], 0)) for part in parts)
    wanted = (weights * (target - summed).square()).sum()
    error, residual = weighted_error(target, weights, parts, [0, 2, 5])
    torch.testing.assert_close(error, wanted)
    torch.testing.assert_close(residual, (target - summed).detach())
    for made, grad in zip(
        torch.autograd.grad(3 * error, [target, *parts]), torch.autograd.grad(3 * wanted, [target, *parts]), strict=True
    ):
        torch.testing.assert_close(made, grad)


def test_decoding_writes_its_gradient_into_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 3, generator=generator).requires_grad_()
    values = torch.randn(4, generator=generator).requires_grad_()
    entries = Entries(torch.tensor([0, 3, 3, 1]), torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 3, 4]))
    spare = torch.full_like(W.detach(), torch.nan)
    decode_entries(values, W, entries, GradientMemory(spare=spare)).square().sum().backward()
    z = torch.zeros(3, 5).index_put((entries.rows, entries.indices), values.detach())
    torch.testing.assert_close(W.grad, 2 * z.T @ (z @ W.detach()))
    assert not spare.isnan().any()


def test_the_rate_is_that_of_the_widest_transcoder_and_half_where_latents_compete() -> None:
    for activation, factor in (
        (sl.TopK(k=3), 0.5),
        (sl.BatchTopK(k=3), 0.5),
        (sl.AbsTopK(k=3), 1),
        (sl.ReLU(**PENALIZED), 1),
    ):
        trainee = TrainingCLT(make(activation=activation), RUN)
        last = TrainingSAE(trainee.clt.layers[-1], RUN)
        assert trainee.default_lr() == pytest.approx(factor * last.default_lr())


def test_encoders_start_at_the_scale_that_fits_all_layers_together() -> None:
    clt, pairs = make(), torch.cat(draw(), 1)
    trainee = TrainingCLT(clt, RUN)
    trainee.prepare(pairs)
    inputs, y = trainee.read(pairs)
    torch.testing.assert_close(clt.b_dec, y.mean(0))
    with torch.no_grad():
        codes = [layer.encode(x) for layer, x in zip(clt.layers, inputs, strict=True)]
        parts = [z @ layer.W_dec for layer, z in zip(clt.layers, codes, strict=True)]
    made = sum(torch.nn.functional.pad(part, (i * D_OUT, 0)) for i, part in enumerate(parts))
    best = (made * (y - y.mean(0))).sum() / made.square().sum()
    torch.testing.assert_close(best, torch.tensor(1.0), rtol=1e-4, atol=0)  # codes scale with the encoders


@pytest.mark.parametrize("dictionary", ["unit", "free"])
def test_gradients_turn_rows_of_norm_1(dictionary: str) -> None:
    clt, pairs = make(dictionary=dictionary), torch.cat(draw(), 1)
    trainee = TrainingCLT(clt, RUN)
    trainee.prepare(pairs)
    trainee.differentiate(trainee.objective(pairs).total)
    trainee.constrain_gradients()
    for layer in clt.layers:
        along = (layer.W_dec.grad * layer.W_dec).sum(1).abs() / layer.W_dec.grad.norm(dim=1).clamp(min=1e-12)
        assert (along.max() < 1e-5) == (dictionary == "unit")


def test_codes_just_below_their_threshold_move_it() -> None:
    """Where few codes are near their thresholds, only those are found, and the gradients are those of the formula."""
    activation = sl.JumpReLU(bandwidth=0.05, **PENALIZED)
    clt, pairs = make(activation=activation, dictionary="free"), torch.cat(draw(600), 1)
    trainee = TrainingCLT(clt, RUN)
    trainee.prepare(pairs)
    with torch.no_grad():
        for layer, x in zip(clt.layers, trainee.read(pairs)[0], strict=True):
            layer.threshold.copy_((x @ layer.W_enc + layer.b_enc).quantile(0.98, dim=0))
            found = _LayerCodes.find(TrainingSAE(layer, RUN), x)
            assert found.silent is not None and len(found.silent.rows) > 0
    loss = expect(trainee, pairs)
    objective = trainee.objective(pairs)
    torch.testing.assert_close(objective.total, loss)
    names, weights = zip(*clt.named_parameters(), strict=True)
    made, wanted = (torch.autograd.grad(value, weights) for value in (objective.total, loss))
    for name, one, other in zip(names, made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
    assert all(grad.any() for name, grad in zip(names, wanted, strict=True) if "threshold" in name)


def test_thresholds_stay_positive() -> None:
    clt = make(activation=sl.JumpReLU(target_l0=3.0))
    with torch.no_grad():
        clt.layers[1].threshold[2] = -0.5
    TrainingCLT(clt, RUN).constrain_weights()
    assert all((layer.threshold > 0).all() for layer in clt.layers)


# ---- runs


class StopError(Exception):
    """Ends a run from outside, as a crash would."""


def stop(entry: dict[str, Any]) -> None:
    if entry["step"] == 6:
        raise StopError


@pytest.mark.parametrize(
    "activation", [sl.TopK(k=3), sl.BatchTopK(k=3), sl.JumpReLU(target_l0=3.0)], ids=lambda a: a.name
)
@pytest.mark.filterwarnings("ignore:Each layer must have its target L0")
def test_an_interrupted_run_goes_on_bit_for_bit(activation: Any, tmp_path: Any) -> None:
    def fit(folder: str, seed: int = 0, **more: Any) -> CLT:
        cfg = make(activation=activation, objective=(sl.ReconstructionLoss(), sl.AuxK(dead_after_tokens=80))).cfg
        return CLT(cfg, seed=seed).fit(draw(600), RUN, progress=False, out=tmp_path / folder, **more)

    whole, again = fit("whole"), fit("again")
    with pytest.raises(StopError):
        fit("cut", sinks=[stop])
    cut = fit("cut", seed=5, resume=True)  # all of it comes from the checkpoint
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]) and torch.equal(weight, cut.state_dict()[name]), name
    assert cut.history_ == whole.history_
    with pytest.raises(ValueError, match="must not hold another run"):
        fit("whole")


@unchecked()
def test_what_is_measured_is_what_it_does() -> None:
    x, y = draw(3000)
    clt = make().fit((x, y), sl.TrainConfig(n_tokens=20_000, batch_size=100), progress=False)
    saved = clt.training_["saved"]
    held = slice(2700, 3000)
    with torch.no_grad():
        codes, made = clt.encode(x[held]), clt(x[held])
    l0 = (codes != 0).sum(2).float().mean(0).tolist()
    assert saved["n_tokens"] == 300 and saved["held_out"] and saved["met"] is None
    for i, layer in enumerate(saved["layers"]):
        target, own = (t[..., i * D_OUT : (i + 1) * D_OUT] for t in (y[held], made))
        fvu = (target - own).square().sum() / (target - target.mean(0)).square().sum()
        assert layer["l0"] == pytest.approx(l0[i], rel=1e-5) and layer["fvu"] == pytest.approx(float(fvu), rel=1e-3)
    assert saved["l0"] == pytest.approx(sum(l0), rel=1e-5)
    last = clt.history_[-1]
    assert {"reconstruction", "l0", "dead_frac", "held_out_fvu", "lr"} <= set(last)


# ---- planted features: n of a group, of which one fires on every token

N_EACH, WIDTH = 8, 48
GROUPS = {"skip": (0, 2), "p0": (0,), "p1": (1,), "q1": (1,), "p2": (2,), "q2": (2,)}
"""the layers that each group's features write to; all layers' inputs have the features' directions"""


def plant(n: int, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs and outputs of three layers, and the directions of the skip features: read, and written at 0 and 2."""
    fixed, drawn = torch.Generator().manual_seed(11), torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))[0]

    read, *written = (directions() for _ in range(4))
    x, y = torch.zeros(n, WIDTH), [torch.zeros(n, WIDTH) for _ in range(3)]
    for g, layers in enumerate(GROUPS.values()):
        which = g * N_EACH + torch.randint(N_EACH, (n,), generator=drawn)
        size = 1 + 0.25 * torch.randn(n, 1, generator=drawn).clamp(-2, 2)
        x += size * read[which]
        for i in layers:
            y[i] += size * written[i][which]
    of_skip = slice(0, N_EACH)
    rows = {"read": read[of_skip], "at 0": written[0][of_skip], "at 2": written[2][of_skip]}
    return torch.cat([x, x, x], 1), torch.cat(y, 1), rows


def match(rows: Tensor, directions: Tensor) -> Tensor:
    """Largest cosine of each direction with the rows."""
    return (torch.nn.functional.normalize(rows, dim=1) @ directions.T).max(0).values


@unchecked()
def test_a_skip_is_one_feature_here_and_two_of_transcoders_of_each_layer() -> None:
    x, y, rows = plant(40_000, seed=0)
    run = sl.TrainConfig(n_tokens=160_000, batch_size=400)
    # Two features of each layer's own write and read there, and a third writes at the last one.
    clt = CLT(CLTConfig(n_layers=3, d_in=WIDTH, d_sae=32, activation=sl.TopK(k=2))).fit((x, y), run, progress=False)
    last = slice(2 * WIDTH, None)
    alone = {}
    for k in (2, 3):
        cfg = sl.SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=32, activation=sl.TopK(k=k))
        alone[k] = sl.SAE(cfg).fit((x[:, last], y[:, last]), run, progress=False)
    error = clt.training_["saved"]["layers"][2]["fvu"]
    # With two latents a transcoder of the last layer leaves out one of three features of equal size.
    assert error < 0.08 < 0.12 < alone[2].training_["saved"]["fvu"] and alone[3].training_["saved"]["fvu"] < 0.08
    first = clt.layer(0)
    at_first, at_last = first.directions()[:, :WIDTH], first.directions()[:, last]
    both = torch.nn.functional.normalize(at_first, dim=1) @ rows["at 0"].T
    also = torch.nn.functional.normalize(at_last, dim=1) @ rows["at 2"].T
    assert (torch.minimum(both, also).max(0).values > 0.8).all()  # one latent writes at both
    assert (match(clt.layer(2).directions(), rows["at 2"]) < 0.6).all()  # and none of the last layer has to
    assert (match(alone[3].directions(), rows["at 2"]) > 0.8).all()


@unchecked()
def test_a_chain_is_told_as_a_skip() -> None:
    """The known trap: what layer 2 makes of what layer 0 wrote is explained as written by layer 0, if codes are few.

    Here layer 2 reads what the skip features write at layer 0, and nothing else of them. Without it their answer is
    lost; a cross-layer transcoder of the same activations, with hardly an error, says that it stays.
    """
    x, y, rows = plant(40_000, seed=0)
    sizes = x[:, :WIDTH] @ rows["read"].T  # of the skip features
    wrote = sizes @ rows["at 0"]
    x[:, 2 * WIDTH :] = x[:, 2 * WIDTH :] - sizes @ rows["read"] + wrote  # all that layer 2 sees of them
    run = sl.TrainConfig(n_tokens=160_000, batch_size=400)
    clt = CLT(CLTConfig(n_layers=3, d_in=WIDTH, d_sae=32, activation=sl.TopK(k=2))).fit((x, y), run, progress=False)
    cfg = sl.SAEConfig(d_in=WIDTH, d_out=WIDTH, d_sae=32, activation=sl.TopK(k=3))
    last = slice(2 * WIDTH, None)
    alone = sl.SAE(cfg).fit((x[:, last], y[:, last]), run, progress=False)
    less = x.clone()
    less[:, last] -= wrote
    answer = sizes @ rows["at 2"]

    def find_lost(made: Tensor, without: Tensor) -> float:
        """Share of the answer that is lost; it is 1."""
        return float(((made - without) * answer).sum() / answer.square().sum())

    with torch.no_grad():
        by_clt = find_lost(clt(x)[:, last], clt(less)[:, last])
        by_layer = find_lost(alone(x[:, last]), alone(less[:, last]))
    assert clt.training_["saved"]["layers"][2]["fvu"] < 0.08
    assert by_clt < 0.25 and by_layer > 0.6
