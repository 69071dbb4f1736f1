"""The contract of an SAE, over the product of its axes; a user's own activation keeps it like the others."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from unchecked import unchecked

import saelab as sl
from saelab.sae.activation_functions import AbsJumpReLU, Gated, GroupMax, Log1pReLU
from saelab.sae.config import SAEConfig
from saelab.sae.training_sae import TrainingSAE
from saelab.stores.files import write_json
from saelab.stores.validation import read_json
from saelab.training.optimizer import make_adam, step_adam

D_IN, D_SAE, D_OUT, K = 12, 40, 9, 5


@sl.register_activation("test_soft_topk")
@dataclass(frozen=True)
class SoftTopK(sl.sae.Activation):
    """A user's own: what exceeds the (k+1)-th largest, by how much it does."""

    k: int = K

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return (u - u.topk(self.k + 1, dim=-1).values[..., -1:]).relu()


@sl.register_activation("test_doubled_topk")
@dataclass(frozen=True)
class DoubledTopK(sl.TopK):
    """A user's own, made of another: what TopK finds, twice."""

    def __call__(self, u: Tensor, threshold: Tensor | None = None, training: bool = False) -> Tensor:
        return 2 * super().__call__(u, threshold, training)


ACTIVATIONS = [
    sl.TopK(k=K),
    sl.AbsTopK(k=K),
    sl.BatchTopK(k=K),
    sl.BatchAbsTopK(k=K),
    sl.ReLU(target_l0=float(K)),
    sl.JumpReLU(target_l0=float(K)),
    AbsJumpReLU(target_l0=float(K)),
    Gated(target_l0=float(K)),
    GroupMax(k=K),
    SoftTopK(k=K),
]
PREFIXES = [None, (8, 24, D_SAE), sl.RandomPrefixes(n=3, smallest=6)]
DICTIONARIES = ["unit", "free", "frozen"]
NORMALIZERS = ["none", "scale", "whiten"]
INITS = ["tied", "data", "subspace"]
TARGETS = [{}, {"d_out": D_OUT}, {"d_out": D_OUT, "skip": True}]

PRODUCT = [
    SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=a, prefixes=p, dictionary=d, normalizer=n, init=i, **t)
    for a, p, d, n, i, t in itertools.product(ACTIVATIONS, PREFIXES, DICTIONARIES, NORMALIZERS, INITS, TARGETS)
]
STEP = 31
SOME = PRODUCT[::STEP]  # every two choices on two axes meet in it; the whole product is marked slow
REST = [cfg for i, cfg in enumerate(PRODUCT) if i % STEP]


def name_of(cfg):
    nested = {type(None): "flat", tuple: "fixed"}.get(type(cfg.prefixes), "random")
    target = "" if cfg.d_out is None else "-skip" if cfg.skip else "-transcoder"
    return f"{cfg.activation.name}-{nested}-{cfg.dictionary}-{cfg.normalizer}-{cfg.init}{target}"


some = pytest.mark.parametrize("cfg", SOME, ids=name_of)
fewer = pytest.mark.parametrize("cfg", SOME[::3], ids=name_of)
each_activation = pytest.mark.parametrize(
    "activation", [*ACTIVATIONS, Log1pReLU(target_l0=float(K))], ids=lambda a: a.name
)


def data(n=256, seed=0):
    """Sparse combinations of planted atoms, off centre and with unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(20, D_IN, generator=generator)
    z = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.15)
    noise = 0.05 * torch.randn(n, D_IN, generator=generator)
    return (z @ atoms + noise) * torch.linspace(0.3, 3, D_IN) + torch.linspace(-2, 5, D_IN)


def rows(cfg, n=256, seed=0):
    """What training reads: activations, of a transcoder each with its target behind it."""
    x = data(n, seed)
    if cfg.d_out is None:
        return x
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randn(D_IN, 20, generator=generator), torch.randn(20, D_OUT, generator=generator)
    return torch.cat([x, ((x - x.mean(0)) @ first).relu() @ second + torch.linspace(-20, 9, D_OUT)], 1)


def prepared(cfg, seed=0):
    """An SAE as training starts from, with a threshold where its activation keeps one."""
    sae = sl.SAE(cfg, seed)
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=256, batch_size=256))
    trainee.prepare(rows(cfg))
    if cfg.activation.threshold == "running":
        trainee.observe(trainee.objective(rows(cfg)))
    return sae, trainee


def test_every_two_choices_meet():
    def axes(cfg):
        return cfg.activation.name, type(cfg.prefixes), cfg.dictionary, cfg.normalizer, cfg.init, (cfg.d_out, cfg.skip)

    def meetings(configs):
        return {(i, a, j, b) for cfg in configs for (i, a), (j, b) in itertools.combinations(enumerate(axes(cfg)), 2)}

    assert meetings(SOME) == meetings(PRODUCT) and len(SOME) + len(REST) == len(PRODUCT) == 2430


@some
def test_directions_gradients_folding_and_config(cfg):
    keeps_the_contract(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", REST, ids=name_of)
def test_the_rest_of_the_product(cfg):
    keeps_the_contract(cfg)


def keeps_the_contract(cfg):
    sae, trainee = prepared(cfg)
    x = data(seed=1)
    if cfg.activation.threshold == "learned":
        sae.threshold.data.copy_(torch.linspace(0.05, 0.4, D_SAE))  # each latent has its own

    # shapes on one to three batch axes
    for batch in ((6,), (2, 3), (1, 2, 3)):
        part = x[:6].view(*batch, D_IN)
        z = sae.encode(part)
        assert z.shape == (*batch, D_SAE) and sae.decode(z).shape == sae(part).shape == (*batch, cfg.d_target)
        codes = sae.encode_sparse(part)
        # dense and sparse are the same codes
        assert codes.batch_shape == batch and torch.equal(codes.to_dense() != 0, z != 0)
        torch.testing.assert_close(codes.to_dense(), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.decode(codes), sae.decode(z), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae.decode(codes, prefix=9), sae.decode(z, prefix=9), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(part), sae.decode(z, x=part), rtol=1e-4, atol=1e-4)

    # some latents are the same codes, with the same gradients
    some = [D_SAE - 1, 0, 7]
    torch.testing.assert_close(
        sae.encode_latents(x[:6].view(2, 3, D_IN), some), sae.encode(x[:6]).view(2, 3, -1)[..., some]
    )
    weights = torch.linspace(-1, 2, len(some))
    ways = ((sae.encode_latents(x, some) * weights).sum(), (sae.encode(x)[:, some] * weights).sum())
    grads = [torch.autograd.grad(way, [sae.W_enc, sae.b_enc]) for way in ways]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    # the loss is a finite number and reaches every parameter but a frozen dictionary
    objective = trainee.objective(rows(cfg, seed=1))
    assert objective.total.isfinite() and objective.l0 > 0
    objective.total.backward()
    for name, parameter in sae.named_parameters():
        if name == "W_dec" and cfg.dictionary not in ("unit", "free"):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} gets no gradient"

    # an equal SAE without a normalizer
    if sae.W_skip is not None:
        torch.nn.init.orthogonal_(sae.W_skip, generator=torch.Generator().manual_seed(0))
    folded = sae.fold()
    assert folded.cfg.normalizer == "none"
    torch.testing.assert_close(folded.encode(x), sae.encode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-3, atol=1e-3)

    # the config goes through JSON
    assert SAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_shortcuts_are_not_inherited_by_other_codes():
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=DoubledTopK(k=K)))
    x = data(seed=1)
    z = sae.encode(x)
    torch.testing.assert_close(z, 2 * sl.TopK(k=K)(sae.center(x) @ sae.W_enc + sae.b_enc))
    torch.testing.assert_close(sae.encode_sparse(x).to_dense(), z)
    torch.testing.assert_close(sae.encode_latents(x, [3, 30]), z[:, [3, 30]])


@each_activation
def test_some_latents_are_found_without_the_others(activation):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    x, some = data(seed=1), [3, 30]
    z = sae.encode(x)[:, some].detach()
    assert (z != 0).any(0).all() or activation.name == "test_soft_topk"
    sae.W_enc.data[:, [j for j in range(D_SAE) if j not in some]] = torch.nan
    alone = activation.name in ("relu", "log1prelu", "jumprelu", "absjumprelu", "gated", "batchtopk", "batchabstopk")
    found = sae.encode_latents(x, some)
    assert torch.allclose(found, z, atol=1e-5) == alone, "others are read, or should have been"


@fewer
def test_saved_and_loaded_to_the_bit(cfg, tmp_path):
    sae, _ = prepared(cfg)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.01)
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == cfg
    state, other = sae.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert torch.equal(sae.encode(data()), loaded.encode(data())) and torch.equal(sae(data()), loaded(data()))
    assert [p.requires_grad for p in sae.parameters()] == [p.requires_grad for p in loaded.parameters()]
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@fewer
def test_folded_saves_loads_and_folds_again(cfg, tmp_path):
    sae, _ = prepared(cfg)
    folded = sae.fold()
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    folded.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert torch.equal(loaded(data()), folded(data()))
    assert torch.equal(loaded.fold()(data()), folded(data()))
    with torch.no_grad():
        loaded.W_dec.zero_()
        folded.W_dec.zero_()
    assert all(torch.equal(before[key], value) for key, value in sae.state_dict().items()), "folding shares memory"


@fewer
def test_construction_is_seeded_and_leaves_the_global_state_alone(cfg):
    before = torch.get_rng_state()
    one, same, other = sl.SAE(cfg, seed=3), sl.SAE(cfg, seed=3), sl.SAE(cfg, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.W_enc, same.W_enc) and torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_enc, other.W_enc) and not torch.equal(one.W_dec, other.W_dec)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("cfg", PRODUCT[::127], ids=name_of)  # each choice twice or more: the gradients are exact
@unchecked()
def test_overfits_one_batch(cfg):
    """One batch again and again: the loss falls far below where it started."""
    if hasattr(cfg.activation, "coefficient"):
        cfg = replace(cfg, activation=replace(cfg.activation, coefficient=1e-4))
    sae, trainee = prepared(cfg)
    x = rows(cfg, n=64)
    optimizer = make_adam(sae, 3e-2, trainee.cfg)
    losses = []
    with torch.no_grad():
        start = float(trainee.objective(x).terms["reconstruction"])
    for _ in range(30):
        objective = trainee.objective(x)
        objective.total.backward()
        trainee.constrain_gradients()
        step_adam(sae, optimizer, trainee.normalized_rows)
        sae.zero_grad()
        trainee.constrain_weights()
        trainee.observe(objective)
        losses.append(float(objective.terms["reconstruction"].detach()))
    # a dictionary that may not move, or small prefixes, cannot explain as much, and least with both
    limits = (cfg.dictionary == "frozen") + (cfg.prefixes is not None)
    assert sum(losses[-5:]) / 5 < (0.4, 0.8, 0.92)[limits] * start


@each_activation
def test_returns_like_its_input(activation):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = data().to(dtype)
        assert sae(x).dtype == dtype and sae.W_dec.dtype == torch.float32
        with torch.no_grad():
            assert sae(x).dtype == dtype
        assert sae.encode(x).dtype == torch.float32
    error = (sae(data().bfloat16()).float() - sae(data())).square().sum() / sae(data()).square().sum()
    assert error < 1e-2  # a rounded input may choose another latent here and there


@each_activation
def test_no_rows(activation):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    empty = torch.zeros(0, D_IN)
    assert sae.encode(empty).shape == (0, D_SAE) and sae(empty).shape == (0, D_IN)
    assert len(sae.encode_sparse(empty)) == 0
    with torch.no_grad():
        assert sae(empty).shape == (0, D_IN)


@each_activation
def test_codes_of_a_token_do_not_depend_on_its_batch(activation):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    x = data(seed=5)
    together, alone = sae.encode(x), torch.cat([sae.encode(row) for row in x.split(1)])
    assert torch.equal(together != 0, alone != 0)
    torch.testing.assert_close(together, alone)


@each_activation
def test_a_row_that_is_not_finite_is_the_same_sparse_and_leaves_the_others_alone(activation):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    x = data(seed=5)
    broken = x.index_fill(0, torch.tensor([3]), torch.nan)
    with torch.no_grad(), unchecked():
        dense, sparse, clean = sae.encode(broken), sae.encode_sparse(broken).to_dense(), sae.encode(x)
    torch.testing.assert_close(sparse, dense, equal_nan=True)
    torch.testing.assert_close(dense[4:], clean[4:])


@pytest.mark.parametrize("signed", [False, True])
def test_signed_codes_have_both_signs_and_only_they(signed):
    for activation in ACTIVATIONS:
        if activation.signed == signed:
            z = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))[0].encode(data())
            assert (z > 0).any() and bool((z < 0).any()) == signed


@each_activation
def test_encoder_by_parts_is_the_whole(activation, monkeypatch):
    sae, _ = prepared(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation))
    whole = sae.encode_sparse(data())
    monkeypatch.setattr("saelab.sae.module.DENSE_NUMBERS", 7 * D_SAE)
    parts = sae.encode_sparse(data())
    assert torch.equal(whole.indices, parts.indices) and torch.equal(whole.offsets, parts.offsets)
    torch.testing.assert_close(whole.values, parts.values)


@each_activation
def test_made_on_the_meta_device(activation):
    """Under a default device of `meta` an SAE is wholly there, and takes its weights by assignment."""
    cfg = SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, normalizer="whiten")
    with torch.device("meta"):
        shell = sl.SAE(cfg)
    assert {tensor.device.type for tensor in (*shell.parameters(), *shell.buffers())} == {"meta"}
    sae, _ = prepared(cfg)
    shell.load_state_dict(sae.state_dict(), assign=True)
    assert torch.equal(shell(data()), sae(data()))


def test_the_users_activation_is_known_by_name(tmp_path):
    cfg = SAEConfig.from_dict({"d_in": D_IN, "d_sae": D_SAE, "activation": {"name": "test_soft_topk", "k": 3}})
    assert cfg.activation == SoftTopK(k=3)
    sae = sl.SAE(cfg).fit(data(2000), sl.TrainConfig(n_tokens=20_000, batch_size=200), progress=False)
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert torch.equal(loaded(data()), sae(data())) and (loaded.encode_sparse(data()).l0 <= 3).all()
    with pytest.raises(ValueError, match="must be free"):
        sl.register_activation("topk")(SoftTopK)


def test_decoding_prefixes():
    sae, _ = prepared(PRODUCT[0])
    z = sae.encode(data())
    masked = z.clone()
    masked[:, 8:] = 0
    torch.testing.assert_close(sae.decode(z, prefix=8), sae.decode(masked))
    for wrong in (0, D_SAE + 1):
        with pytest.raises(ValueError, match=r"`prefix` must be in 1\.\.d_sae"):
            sae.decode(z, prefix=wrong)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation": sl.TopK(k=0)}, r"`k` must be in 1..d_sae \(40\), got 0"),
        ({"activation": sl.AbsTopK(k=41)}, "`k` must be in 1..d_sae"),
        ({"activation": sl.BatchTopK(k=41)}, "`k` must be in 1..d_sae"),
        ({"activation": SoftTopK(k=41)}, "`k` must be in 1..d_sae"),
        ({"activation": sl.ReLU(target_l0=0.0)}, "`target_l0` must be in"),
        ({"activation": sl.JumpReLU(target_l0=50.0)}, "`target_l0` must be in"),
        ({"prefixes": (8, 8, D_SAE)}, "must increase"),
        ({"prefixes": (24, 8, D_SAE)}, "must increase"),
        ({"prefixes": (0, D_SAE)}, "must increase from at least 1"),
        ({"prefixes": ()}, "must increase"),
        ({"prefixes": (8, 24)}, r"must end at d_sae \(40\)"),
        ({"prefixes": (8, 50)}, "must end at d_sae"),
        ({"prefixes": sl.RandomPrefixes(n=1)}, "Random prefixes need"),
        ({"prefixes": sl.RandomPrefixes(smallest=D_SAE)}, "Random prefixes need"),
        ({"d_in": 0}, "`d_in` must be at least 1"),
    ],
)
def test_wrong_configs_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        SAEConfig(**({"d_in": D_IN, "d_sae": D_SAE, "activation": sl.TopK(k=K)} | change))


@pytest.mark.parametrize("key", ["d_saee", "activations", "k"])
def test_unknown_config_keys_are_named(key, tmp_path):
    plain = PRODUCT[0].to_dict()
    with pytest.raises(ValueError, match=f"no key '{key}'. Did you mean"):
        SAEConfig.from_dict(plain | {key: 3})
    prepared(PRODUCT[0])[0].save_pretrained(tmp_path)
    described = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", described | {"config": plain | {key: 3}})
    with pytest.raises(ValueError, match=f"no key '{key}'"):
        sl.SAE.from_pretrained(tmp_path)


def test_unknown_activations_and_settings_are_named():
    plain = PRODUCT[0].to_dict()
    with pytest.raises(ValueError, match=r"got 'tpk'. Did you mean one of \['topk'"):
        SAEConfig.from_dict(plain | {"activation": {"name": "tpk", "k": 3}})
    with pytest.raises(ValueError, match=r"takes \['k'\], got \['kk'\]"):
        SAEConfig.from_dict(plain | {"activation": {"name": "topk", "kk": 3}})


@unchecked()
def test_activations_must_be_tensors():
    sae = sl.SAE(sl.SAEConfig(d_in=12, d_sae=16, activation=sl.TopK(k=2)))
    for use in (sae, sae.encode, sae.encode_sparse):
        for x in (np.zeros((3, 12), np.float32), [[0.0] * 12]):
            with pytest.raises(TypeError, match=r"must be a torch.Tensor \(\*batch, 12\), got (ndarray|list)"):
                use(x)


def test_wrong_width_is_named():
    sae = sl.SAE(PRODUCT[0])
    for call in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(ValueError, match=r"must have d_in \(12\) as their last axis, got shape \(3, 13\)"):
            call(torch.zeros(3, 13))


def test_loading_what_is_no_sae(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        sl.SAE.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        sl.SAE.from_pretrained(tmp_path)
    sae = sl.SAE(PRODUCT[0])
    sae.save_pretrained(tmp_path)
    described = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", described | {"config": described["config"] | {"d_sae": 41, "prefixes": None}})
    with pytest.raises(ValueError, match=r"must fit its config\.json"):
        sl.SAE.from_pretrained(tmp_path)
    for change in ({"kind": "activations"}, {"schema_version": 99}, {"extra": 1}):
        write_json(tmp_path / "config.json", described | change)
        with pytest.raises(ValueError, match=r"config.json|schema_version 1"):
            sl.SAE.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", described)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut off"):
        sl.SAE.from_pretrained(tmp_path)
