"""Crosscoders: sparse step, norms per source, a source as an SAE, codes from any source, files, stores, steering."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.fitting import mean_l0
from saelab.sae.objectives import SourceNormsLoss
from saelab.sae.source_views import read_inputs, relative_norms, source_norms
from saelab.sae.training_sae import TrainingSAE
from saelab.stores import JoinedSource

D = (6, 4)
SOURCES = (JoinedSource(name="a", d_in=D[0]), JoinedSource(name="b", d_in=D[1]))


def planted(n: int = 4000, seed: int = 0, scale: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten sparse codes written in both sources; b is many times larger than a."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, sum(D), generator=torch.Generator().manual_seed(9))
    z = (torch.rand(n, 10, generator=g) < 0.15) * (1 + torch.rand(n, 10, generator=g))
    x = z @ rows
    return x[:, : D[0]], scale * x[:, D[0] :]


def joined(**kwargs: float) -> sl.Activations:
    a, b = planted(**kwargs)  # type: ignore[arg-type]
    return sl.Activations.join({"a": sl.Activations.from_tensor(a), "b": sl.Activations.from_tensor(b)})


def config(**changes: object) -> sl.SAEConfig:
    plain = sl.SAEConfig(d_in=sum(D), d_sae=24, sources=SOURCES, activation=sl.TopK(k=3))
    return replace(plain, **changes)


def fit(cfg: sl.SAEConfig, n_tokens: int = 60_000) -> sl.SAE:
    return sl.SAE(cfg, seed=0).fit(joined(), sl.TrainConfig(n_tokens=n_tokens, batch_size=500), progress=False)


@pytest.mark.parametrize("kind", ["scale", "whiten"])
def test_every_source_gets_the_same_mean_squared_norm(kind: str) -> None:
    sae, x = sl.SAE(config(normalizer=kind), seed=0), joined()[:]
    sae.fit_normalizers(x)
    y = sae.normalizer.normalize(x).double()
    assert torch.allclose(y.mean(0), torch.zeros(10, dtype=torch.float64), atol=1e-4)
    squared = torch.stack([part.square().sum(1).mean() for part in y.split(D, dim=1)])
    # whitened coordinates have variance 1 but for the ridge; scaled sources share d_in
    expected = torch.tensor([5.0, 5.0] if kind == "scale" else [6.0, 4.0], dtype=torch.float64)
    assert torch.allclose(squared, expected, rtol=1e-4)
    if kind == "whiten":
        covariance = y.T @ y / len(y)
        assert torch.allclose(covariance[:6, :6], torch.eye(6, dtype=torch.float64), atol=1e-3)
        assert covariance[:6, 6:].abs().max() > 0.05  # between sources nothing is removed
    assert torch.allclose(sae.normalizer.unnormalize(y.float()), x, atol=1e-3)


@pytest.mark.parametrize("kind", ["scale", "whiten"])
def test_a_folded_crosscoder_gives_the_same(kind: str) -> None:
    sae, x = fit(config(normalizer=kind), 10_000), joined()[:64]
    folded = sae.fold()
    assert torch.allclose(folded.encode(x), sae.encode(x), atol=1e-3)
    assert torch.allclose(folded(x), sae(x), atol=1e-2)


@pytest.mark.parametrize("activation", [sl.TopK(k=3), sl.BatchTopK(k=3)])
def test_the_sparse_step_is_the_dense_one(activation: sl.TopK) -> None:
    """Losses and gradients of a step that reads one source are those of plain autograd on the masked rows."""
    cfg = config(activation=activation, encode_from="any", objective=(sl.ReconstructionLoss(),), prefixes=(8, 24))
    sae, x = sl.SAE(cfg, seed=0), joined()[:256]
    trainee = TrainingSAE(sae, sl.TrainConfig(n_tokens=10_000, batch_size=256))
    trainee.prepare(x)
    for number in (0, 1):
        trainee.state["n_steps"].fill_(number)
        sae.zero_grad()
        loss = trainee.objective(x).total
        loss.backward()
        found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
        sae.zero_grad()
        y = sae.normalizer.normalize(x)
        mask = torch.zeros(10)
        mask[: D[0]] = 2.0 * (number == 0)
        mask[D[0] :] = 2.0 * (number == 1)
        u = ((y - sae.b_dec) * mask) @ sae.W_enc + sae.b_enc
        kept = u.relu()
        flat = kept if activation.threshold != "running" else kept.flatten()[None]
        n_kept = 3 if activation.threshold != "running" else 3 * len(x)
        top = flat.topk(n_kept, dim=1)
        z = torch.zeros_like(flat).scatter(1, top.indices, top.values).view_as(u)
        errors = [(y - sae.b_dec - z[:, :n] @ sae.W_dec[:n]).square().sum() for n in (8, 24)]
        naive = sum(errors) / 2 / (len(x) * trainee.state["variance"])
        assert torch.allclose(loss, naive, rtol=1e-5)
        naive.backward()
        for name, p in sae.named_parameters():
            assert p.grad is not None and torch.allclose(found[name], p.grad, atol=2e-6), name
        rest = slice(D[0], None) if number == 0 else slice(0, D[0])
        assert not found["W_enc"][rest].any() and found["W_dec"][:, rest].any()


def test_all_sources_together_read_the_mean_of_each_alone() -> None:
    sae, x = sl.SAE(config(encode_from="any"), seed=0), joined()[:50]
    sae.fit_normalizers(x)
    y = sae.normalizer.normalize(x)
    ranks = TrainingSAE(sae, sl.TrainConfig()).ranks
    each = [read_inputs(sae, y, sae.cfg.activation, ranks, number) for number in (0, 1)]
    assert torch.allclose((each[0] + each[1]) / 2, y - sae.b_dec)  # type: ignore[operator]
    for number, (name, columns) in enumerate((("a", slice(0, 6)), ("b", slice(6, 10)))):
        alone = sae.source(name)
        wanted = sae.cfg.activation.code(
            each[number] @ sae.W_enc + sae.b_enc, each[number], sae.W_enc.T, sae.b_enc, None
        )  # type: ignore[operator]
        assert torch.allclose(alone.encode(x[:, columns]), wanted, atol=1e-5)


def test_a_source_reconstructs_its_columns_and_writes_its_rows() -> None:
    sae, x = fit(config()), joined()[:64]
    z = sae.encode(x)
    whole = sae.decode(z)
    for name, columns in (("a", slice(0, 6)), ("b", slice(6, 10))):
        alone = sae.source(name)
        assert torch.allclose(alone.decode(z), whole[:, columns], rtol=1e-4, atol=1e-3)
        assert torch.allclose(alone.directions(), sae.directions()[:, columns])
        assert alone.cfg.sources is None and alone.cfg.d_in == columns.stop - columns.start
    # the encoder of a source sees the others at their bias
    held = x.clone()
    held[:, 6:] = sae.out_normalizer.unnormalize(sae.b_dec)[6:]
    assert torch.allclose(sae.source("a").encode(x[:, :6]), sae.encode(held), atol=1e-4)


def test_norms_are_shares_of_unit_rows() -> None:
    sae = fit(config())
    norms, shares = source_norms(sae), relative_norms(sae)
    assert torch.allclose(norms.square().sum(0), torch.ones(24), atol=1e-4)
    assert torch.allclose(shares.sum(0), torch.ones(24)) and torch.allclose(shares[0] / shares[1], norms[0] / norms[1])
    # b is 20 times as large as a, and no latent of a shared code leans to it more than the planted rows do
    used = sae.encode(joined()[:]).ne(0).sum(0) > 50
    assert shares[1][used].mean() < 0.65


def test_one_code_from_any_source_reconstructs_all() -> None:
    a, b = planted(seed=7)
    test = torch.cat([a, b], 1)
    sae = fit(config(d_sae=16, encode_from="any", activation=sl.BatchTopK(k=2)), 150_000)
    found = sl.universality.score_translation(sae, joined(seed=7))
    # a has 6 dimensions for 10 sparse codes and b 4, where pairs are confused: what matters is that it beats shuffling
    assert found.fvu[0, 1] < 0.5 and found.fvu[1, 0] < 0.6
    assert found.cofiring[0, 1] > 2 * found.cofiring_shuffled[0, 1]
    assert abs(mean_l0(sae, test) / 2 - 1) < 0.15  # thresholds are set on codes of one source
    alone = sae.source("a")
    fires = alone.encode(a).ne(0)
    both = fires & sae.source("b").encode(b).ne(0)
    assert found.cofiring[0, 1] == pytest.approx(float(both.sum() / fires.sum()), abs=1e-6)


def test_files_keep_the_sources(tmp_path: Path) -> None:
    sae = fit(config(encode_from="any"), 5_000)
    sae.save_pretrained(tmp_path / "sae")
    again = sl.SAE.from_pretrained(tmp_path / "sae")
    assert again.cfg == sae.cfg and torch.equal(again.normalizer.matrix, sae.normalizer.matrix)
    for format in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(ValueError, match="has no crosscoders"):
            sae.save_pretrained(tmp_path / format, format)
    sae.source("a").save_pretrained(tmp_path / "a", "dictionary_learning")
    assert "sources" not in sl.SAEConfig(d_in=4, d_sae=8, activation=sl.TopK(k=2)).to_dict()


def test_store_report_and_steering_at_a_source(tmp_path: Path) -> None:
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, ["Once upon a time there was a cat. The dog sat."] * 16, ctx_len=16)
    points = ["blocks.0.hook_out", "blocks.1.hook_out"]
    sl.collect(model, tokens, points, tmp_path / "acts", progress=False)
    both = sl.Activations.join({point[7]: sl.Activations.load(tmp_path / "acts", point) for point in points})
    cfg = sl.SAEConfig(d_in=both.d_in, d_sae=48, sources=both.sources, activation=sl.TopK(k=4))
    sae = sl.SAE(cfg, seed=0).fit(both, sl.TrainConfig(n_tokens=2_000, batch_size=64), progress=False)
    store = sl.harvest(sae, model, both, tmp_path / "store", progress=False).at_source("1")
    upper = sae.source("1")
    assert store.provenance.hook_point == upper.provenance.hook_point == points[1]  # type: ignore[union-attr]
    assert sl.analysis.dead_features(store, sae, both[:100]).n_tokens == len(both)
    sl.report(store, tmp_path / "page.html", sae=upper, model=model, features=[0, 1], progress=False)
    latent = int(store.statistics.fires.sum(1).argmax())
    add = sl.Intervention(upper, {latent: 3.0}, mode="add")
    x = torch.zeros(1, upper.cfg.d_in)
    moved = add.change(x, x) - x
    assert torch.allclose(moved[0], 3 * sae.directions()[latent, both.sources[0].d_in :], atol=1e-5)  # type: ignore[index]
    assert add.writes_at == points[1]
    for wrong in (
        lambda: sl.evaluate(sae, model, tokens),
        lambda: sl.harvest(sae, model, tokens, tmp_path / "no"),
        lambda: sl.analysis.logit_lens(sae, model, [0]),
        lambda: sl.report(store, tmp_path / "no.html", model, sae=sae, features=[0], progress=False),
    ):
        with pytest.raises(ValueError, match=r"take one of them: sae.source\(name\)"):
            wrong()
    with pytest.raises(ValueError, match="must be the one that was harvested"):
        other = fit(config(), 1_000)
        sl.report(store, tmp_path / "no.html", sae=other.source("a"), features=[0, 1], progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_in": 9}, "sum of the widths"),
        ({"sources": (SOURCES[0],), "d_in": 6}, "at least two"),
        ({"sources": (SOURCES[0], replace(SOURCES[1], name="a"))}, "different names"),
        ({"sources": ("a", "b")}, "names with widths"),
        ({"normalizer": "token_norm"}, "same map for every token"),
        ({"d_out": 10}, "`d_out` must be None"),
        ({"sources": None, "encode_from": "any"}, "give `sources`"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, object], said: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=said):
        config(**changes)


def test_wrong_data_is_refused_before_training() -> None:
    a, b = (sl.Activations.from_tensor(x) for x in planted())
    run = sl.TrainConfig(n_tokens=1_000, batch_size=100)
    with pytest.raises(ValueError, match="must have the sources of the SAE"):
        sl.SAE(config(), seed=0).fit(sl.Activations.join({"b": b, "a": a}), run, progress=False)
    with pytest.raises(ValueError, match="one source, in that order"):
        sl.SAE(sl.SAEConfig(d_in=10, d_sae=24, activation=sl.TopK(k=2)), seed=0).fit(joined(), run, progress=False)
    with pytest.raises(ValueError, match="`d_in` of the SAE"):
        sl.SAE(config(), seed=0).fit(a, run, progress=False)
    with pytest.raises(ValueError, match="one of the sources"):
        sl.SAE(config(), seed=0).source("c")
    with pytest.raises(ValueError, match="`source_norms` must go with `sources`"):
        config(activation=sl.ReLU(target_l0=2.0), sources=None, objective=(sl.ReconstructionLoss(), SourceNormsLoss()))
