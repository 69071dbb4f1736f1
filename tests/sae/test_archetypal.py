"""The archetypal dictionary: atoms near the hull of the data, trained by the same path as any other."""

from dataclasses import replace

import pytest
import torch
from test_sae import D_IN, D_SAE, data, keeps_the_contract, name_of, prepared
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from unchecked import unchecked

import saelab as sl
from saelab.sae.archetypal import Archetypes, find_points, project_simplex
from saelab.sae.config import SAEConfig

RUN = sl.TrainConfig(n_tokens=12 * 40, batch_size=40, log_every_tokens=80, save_every_tokens=160, n_held_out=50)
AUX = sl.AuxK(dead_after_tokens=120, k=3)


def config(
    activation: sl.sae.Activation | None = None, n_points: int | None = 30, delta: float = 0.1, **axes
) -> SAEConfig:
    dictionary = sl.Archetypal(n_points=n_points, delta=delta)
    return SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=activation or sl.TopK(k=5),
        dictionary=dictionary,
        **{"objective": (sl.ReconstructionLoss(), AUX)} | axes,
    )


CONFIGS = [
    config(),
    config(sl.AbsTopK(k=5), n_points=64),
    config(sl.BatchAbsTopK(k=5), prefixes=(8, 24, D_SAE), normalizer="whiten"),
    config(sl.JumpReLU(target_l0=5.0), n_points=None, delta=0.5),
    config(sl.AbsTopK(k=5), prefixes=sl.RandomPrefixes(n=3, smallest=6), normalizer="none"),
    config(sl.ReLU(target_l0=5.0), n_points=8),
]
each = pytest.mark.parametrize("cfg", CONFIGS, ids=name_of)
few = pytest.mark.parametrize("cfg", CONFIGS[1:4], ids=name_of)


def fit(cfg: SAEConfig, run: sl.TrainConfig = RUN, seed: int = 0, **arguments) -> sl.SAE:
    return sl.SAE(cfg, seed).fit(data(600), run, progress=False, **arguments)


def bits(sae: sl.SAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def same(one: sl.SAE, other: sl.SAE) -> bool:
    one, other = bits(one), bits(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made_of(sae: sl.SAE) -> Archetypes:
    assert sae.archetypes is not None
    return sae.archetypes


def assert_near_the_hull(sae: sl.SAE) -> None:
    """W_dec is what W, Lambda and C say it is, and they keep their bounds."""
    parts, delta = made_of(sae), sae.cfg.dictionary.delta
    W, relaxation = parts.weights.detach(), parts.relaxation.detach()
    assert (W >= 0).all()
    torch.testing.assert_close(W.sum(1), torch.ones(len(W)), rtol=0, atol=1e-5)
    assert (relaxation.norm(dim=1) <= delta * (1 + 1e-5)).all()
    torch.testing.assert_close(sae.W_dec.detach(), normalize(W @ parts.points + relaxation, dim=1))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(W)))


# --- the simplex


def test_projection_is_the_nearest_point_of_the_simplex():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 9, generator=generator) * torch.logspace(-3, 3, 40)[:, None]
    rows = project_simplex(x)
    assert (rows >= 0).all() and torch.allclose(rows.sum(1), torch.ones(40))
    # nearest: no point of the simplex lies on the far side, and it is enough to ask its corners
    slack = ((x - rows)[:, None] * (torch.eye(9) - rows[:, None])).sum(2)
    assert (slack <= 1e-5 * x.abs().amax(1, keepdim=True).clamp(min=1)).all()
    torch.testing.assert_close(project_simplex(rows), rows)


def test_a_weight_at_zero_comes_back():
    W = torch.tensor([[1.0, 0.0, 0.0]])
    for _ in range(5):  # steps that raise the second and lower the third
        W = project_simplex(W + torch.tensor([[0.0, 0.1, -0.1]]))
    assert W[0, 1] > 0.2 and W[0, 2] == 0
    for _ in range(20):
        W = project_simplex(W + torch.tensor([[0.0, 0.0, 0.1]]))
    assert W[0, 2] > 0.9


def test_a_step_does_not_grow_with_the_number_of_points():
    """Dividing by the sum would leave one part in six of the first weight."""
    W = one_hot(torch.tensor([0]), 1001).float()
    noise = 0.01 * torch.where(torch.arange(1001) % 2 == 0, 1.0, -1.0)
    assert project_simplex(W + noise)[0, 0] > 0.98


# --- gradients


@pytest.mark.parametrize("activation", [sl.TopK(k=5), sl.AbsTopK(k=5)], ids=["topk", "abstopk"])
@pytest.mark.parametrize("prefixes", [None, (8, 24, D_SAE)], ids=["flat", "nested"])
def test_gradients_are_those_of_the_plain_formula(activation, prefixes):
    sae, trainee = prepared(
        config(activation, prefixes=prefixes, normalizer="none", objective=(sl.ReconstructionLoss(),))
    )
    parts = made_of(sae)
    with torch.no_grad():  # away from the start, where Lambda is 0 and W has one entry a row
        parts.weights.add_(torch.rand(parts.weights.shape, generator=torch.Generator().manual_seed(1)))
        parts.relaxation.add_(0.05)
    trainee.constrain_weights()
    x = data(seed=1)
    trainee.objective(x).total.backward()
    found = [parts.weights.grad, parts.relaxation.grad, sae.W_enc.grad, sae.b_dec.grad]

    W, relaxation, W_enc, b_dec = (
        t.detach().double().requires_grad_() for t in (parts.weights, parts.relaxation, sae.W_enc, sae.b_dec)
    )
    atoms = W @ parts.points.double() + relaxation
    W_dec = atoms / atoms.square().sum(1, keepdim=True).sqrt()
    u = (x.double() - b_dec) @ W_enc
    kept = (u.abs() if activation.signed else u).topk(5, dim=1).indices
    z = torch.zeros_like(u).scatter(1, kept, u.gather(1, kept))
    z = z if activation.signed else z.relu()
    ends = prefixes or (D_SAE,)
    errors = torch.stack([(x.double() - b_dec - z[:, :n] @ W_dec[:n]).square().sum() for n in ends])
    (errors.mean() / (len(x) * float(trainee.state["variance"]))).backward()
    for mine, naive in zip(found, (W, relaxation, W_enc, b_dec), strict=True):
        assert naive.grad.abs().max() > 0
        torch.testing.assert_close(mine.double(), naive.grad, rtol=1e-3, atol=1e-5)


def test_dead_atoms_are_brought_back_through_their_archetypes():
    sae, trainee = prepared(config(sl.AbsTopK(k=2)))
    trainee.state["tokens_since_fired"][7] = 10**6
    trainee.objective(data(seed=1)).terms["aux"].backward()
    touched = made_of(sae).weights.grad.abs().sum(1).nonzero().squeeze(1).tolist()
    assert touched == [7] and made_of(sae).relaxation.grad[7].abs().sum() > 0


# --- the axis


@each
def test_keeps_the_contract_of_every_sae(cfg):
    keeps_the_contract(cfg)
    if cfg.normalizer == "none":  # a fold has nothing to do and leaves the archetypes alone
        assert made_of(prepared(cfg)[0].fold()).weights.shape == (D_SAE, 30)


@each
@unchecked()
def test_atoms_stay_near_the_hull(cfg):
    seen = []

    def look(entry):
        assert_near_the_hull(sae)
        seen.append(made_of(sae).weights.detach().clone())

    sae = sl.SAE(cfg)
    assert_near_the_hull(sae)
    sae.fit(data(600), RUN, progress=False, sinks=[look])
    assert len(seen) >= 6 and not torch.equal(seen[0], seen[-1])
    assert made_of(sae).relaxation.abs().sum() > 0


def test_delta_zero_stays_inside():
    sae = fit(config(delta=0.0))
    assert_near_the_hull(sae)
    assert not made_of(sae).relaxation.any() and "archetypes.relaxation" in sae.state_dict()


@unchecked()
def test_training_explains_more_than_the_start():
    cfg = config(sl.TopK(k=5), n_points=60)
    start, _ = prepared(cfg)
    sae = fit(cfg, replace(RUN, n_tokens=6_000))
    x = data(seed=3)
    before, after = ((x - s(x)).square().sum() for s in (start, sae))
    assert after < 0.7 * before


@unchecked()
def test_planted_corners_are_found():
    """Mixtures of few corners: every atom that fires lies in the cone of the data, and each corner is an atom."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(6, D_IN, generator=generator)
    x = corners[torch.randint(6, (4000,), generator=generator)] * (1 + 0.1 * torch.rand(4000, 1, generator=generator))
    cfg = SAEConfig(d_in=D_IN, d_sae=6, activation=sl.TopK(k=1), dictionary=sl.Archetypal(n_points=6, delta=0.0))
    sae = sl.SAE(cfg).fit(x, sl.TrainConfig(n_tokens=4000, batch_size=100), progress=False)
    found = (normalize(corners - x.mean(0), dim=1) @ sae.W_dec.T).amax(1)
    assert (found > 0.98).all()


def test_points_are_centroids_of_the_data_and_follow_the_seed():
    x = data(2000)
    one, same_seed, other = (find_points(x, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same_seed) and not torch.equal(one, other)
    low, high = x.aminmax(dim=0)
    assert one.shape == (20, D_IN) and (one >= low).all() and (one <= high).all()
    spread = torch.cdist(x, one).amin(1).square().mean() / (x - x.mean(0)).square().sum(1).mean()
    assert spread < 0.5


def test_few_different_tokens_are_all_points():
    x = data(5).repeat(10, 1)
    points = find_points(x, 12, 0)
    assert len(points) == 12 and torch.equal(points.unique(dim=0), x.unique(dim=0))
    constant = sl.SAE(config()).fit(torch.ones(600, D_IN), RUN, progress=False)
    assert all(tensor.isfinite().all() for tensor in constant.state_dict().values())


def test_every_atom_starts_at_a_point_of_its_own():
    sae, _ = prepared(config(n_points=64))
    weights = made_of(sae).weights
    assert (weights.amax(1) == 1).all() and len(weights.argmax(1).unique()) == D_SAE
    torch.testing.assert_close(sae.W_dec, normalize(made_of(sae).points[weights.argmax(1)], dim=1))
    few = made_of(prepared(config(n_points=8))[0])  # more atoms than points: no row is empty, no two are alike
    assert few.weights.sum(1).allclose(torch.ones(D_SAE)) and len(few.weights.unique(dim=0)) == D_SAE


# --- its life


@few
@unchecked()
def test_saved_and_loaded_to_the_bit(cfg, tmp_path):
    sae = fit(cfg)
    sae.save_pretrained(tmp_path)
    loaded = sl.SAE.from_pretrained(tmp_path)
    assert loaded.cfg == cfg and same(sae, loaded)
    assert torch.equal(sae(data()), loaded(data()))
    assert [p.requires_grad for p in sae.parameters()] == [p.requires_grad for p in loaded.parameters()]


@few
@unchecked()
def test_resumed_is_uninterrupted(cfg, tmp_path):
    class StopError(Exception):
        pass

    def stop(entry):
        if entry["step"] == 8:
            raise StopError

    whole = fit(cfg, out=tmp_path / "whole")
    with pytest.raises(StopError):
        fit(cfg, out=tmp_path / "parts", sinks=[stop])
    resumed = fit(cfg, seed=1, out=tmp_path / "parts", resume=True)
    assert same(whole, resumed) and whole.history_ == resumed.history_
    with pytest.raises(ValueError, match="must keep `dictionary`"):
        changed = replace(cfg, dictionary=replace(cfg.dictionary, delta=0.7))
        fit(changed, out=tmp_path / "parts", resume=True)


def test_training_goes_on_from_trained_archetypes():
    sae = fit(config())
    points = made_of(sae).points.clone()
    sae.fit(data(600, seed=9), RUN, progress=False)
    assert torch.equal(made_of(sae).points, points)
    assert_near_the_hull(sae)


def test_folded_is_free_and_trains():
    sae = fit(config())
    folded = sae.fold()
    assert folded.cfg.dictionary == "free" and folded.archetypes is None and folded.W_dec.requires_grad
    assert made_of(sae) is not None
    before = folded.W_dec.clone()
    assert not torch.equal(folded.fit(data(600), RUN, progress=False).W_dec, before)


def test_rivals_of_an_archetypal_dictionary_are_those_of_any_other():
    labels = sl.lm.TokenLabels.of(torch.arange(200) % 3 == 0, doc_ids=torch.arange(200) // 10)
    plain = replace(config(), dictionary="unit")
    found, same = (sl.evaluation.concept_baselines(data(200), cfg, labels) for cfg in (config(), plain))
    for name in ("random", "untrained"):
        assert (found[name] != same[name]).nnz == 0


def test_made_on_the_meta_device():
    with torch.device("meta"):
        shell = sl.SAE(config())
    sae = fit(config())
    shell.load_state_dict(sae.state_dict(), assign=True)
    assert torch.equal(shell(data()), sae(data()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sl.Archetypal(n_points=1), "`n_points` must be at least 2, got 1"),
        (lambda: sl.Archetypal(delta=-0.1), "`delta` must be at least 0 and finite, got -0.1"),
        (lambda: sl.Archetypal(delta=float("inf")), "`delta` must be at least 0 and finite"),
        (lambda: config(init="data"), "`init` must be 'tied' for an archetypal dictionary"),
        (lambda: SAEConfig.from_dict(config().to_dict() | {"dictionary": {"points": 3}}), "Archetypal has no key"),
        (lambda: sl.sae.resample_dead_latents(fit(config()), data(), [0]), "got an archetypal one; use AuxK"),
    ],
)
def test_what_cannot_be_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
