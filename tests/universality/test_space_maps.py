"""Planted maps found again, fits beside naive ones, and what a map carries: probes, directions and SAEs."""

import json

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import auroc, fit_probe
from saelab.universality.space_maps import RIDGES, SpaceMap, fit_map

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
METHODS = ("linear", "orthogonal", "anchors")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, d, d)).Q


def planted(n: int = 600, d: int = 8, noise: float = 0.05) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, their turned, scaled and shifted images with noise, and the rotation."""
    x, turn = draw(0, n, d) * torch.linspace(2, 0.5, d) + 1, rotation(1, d)
    return x, 3 * x @ turn - 2 + noise * draw(2, n, d), turn


def origin(hook_point: str, model: str = "tiny", **other: object) -> sl.stores.Provenance:
    return sl.stores.Provenance(model=model, weight_processing="none", hook_point=hook_point, text="", mask={},
        tokens_sha256="", dtype="float32", ctx_len=8, n_tokens=0, seed=None, versions={}, **other)  # type: ignore[arg-type]  # fmt: skip


def paired(noise: float = 0.05) -> tuple[sl.Activations, sl.Activations]:
    """The planted rows as activations of two models."""
    x, y, _ = planted(noise=noise)
    return tuple(sl.Activations.from_tensor(rows, origin(HOOK, name)) for rows, name in ((x, "one"), (y, "two")))


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_rotation_is_found_both_ways(method) -> None:
    x, y, turn = planted()
    found = fit_map(x, y, method)
    # noise .05 on n rows whose smallest deviation is .5: a coefficient's deviation is .05 / (.5 sqrt(n)), 6 of them;
    # back, the map and its noise are a third, and the images' smallest deviation is 1.5
    assert float((found.W - 3 * turn).abs().max()) < 6 * 0.05 / (0.5 * 600**0.5) + 1e-3
    assert float((found.W_back - turn.T / 3).abs().max()) < 6 * 0.05 / (1.5 * 600**0.5) + 1e-3
    assert found.n_pairs == 600 and repr(found) == f"SpaceMap({method}, 8 to 8, 600 pairs)"
    scores = found.score(draw(3, 200, 8) + 1, 3 * (draw(3, 200, 8) + 1) @ turn - 2, n_shuffles=20)
    assert scores["r2"].value > 0.99 and scores["top1"].value > 0.95 and scores["mean_rank"].value < 1.1
    assert scores["top1"].chance < 0.05 and scores["r2"].chance < 0
    whole = torch.arange(24).view(3, 8)
    assert torch.equal(found.apply(whole), found.apply(whole.float())) and found.apply(whole).dtype == torch.float32
    assert found.apply(whole.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="`n_shuffles` must be at least 0, got -1"):
        found.score(x, y, n_shuffles=-1)


def test_of_few_pairs_a_rotation_is_found_where_least_squares_is_not() -> None:
    x, y, _ = planted(n=60, d=40, noise=0.5)
    learn, test = slice(0, 45), slice(45, 60)
    r2 = {m: fit_map(x[learn], y[learn], m).score(x[test], y[test], n_shuffles=0)["r2"].value for m in METHODS}
    assert r2["orthogonal"] > 0.8
    plain = fit_map(x[learn], y[learn], ridge=0.0).score(x[test], y[test], n_shuffles=0)["r2"].value
    assert r2["linear"] > plain  # held-out pairs chose a better ridge than none


def test_least_squares_with_a_ridge_is_its_formula() -> None:
    x, y = draw(0, 50, 4), draw(1, 50, 6) + draw(0, 50, 4) @ draw(2, 4, 6)
    a, b = (side.double() - side.double().mean(0) for side in (x, y))
    for ridge in (0.0, 0.3):
        found = fit_map(x, y, ridge=ridge)
        forward = torch.linalg.solve(a.T @ a + ridge * a.square().sum() / 4 * torch.eye(4), a.T @ b)
        back = torch.linalg.solve(b.T @ b + ridge * b.square().sum() / 6 * torch.eye(6), b.T @ a)
        assert torch.allclose(found.W, forward.float(), atol=1e-5)
        assert torch.allclose(found.W_back, back.float(), atol=1e-5)
        assert found.ridge == (ridge, ridge) and not found.ridge_chosen


def test_a_map_by_anchors_gives_the_same_cosines_to_the_pairs() -> None:
    x, y = draw(0, 30, 4), draw(1, 30, 4) + draw(0, 30, 4) @ draw(2, 4, 4)
    a, b = (torch.nn.functional.normalize(side - side.mean(0)) for side in (x, y))
    W = a.T @ torch.linalg.pinv(b).T
    centered, target = x - x.mean(0), y - y.mean(0)
    scale = ((centered @ W) * target).sum() / (centered @ W).square().sum()
    assert torch.allclose(fit_map(x, y, "anchors", ridge=0.0).W, scale * W, atol=1e-4)


def test_the_ridge_is_the_one_of_least_error_on_documents_that_were_held_out() -> None:
    x, y, _ = planted(n=120, d=20, noise=3.0)
    documents = np.arange(30).repeat(4)
    found = fit_map(x, y, doc_ids=documents, n_folds=3, seed=5)
    folds = (np.random.default_rng(5).permutation(30) % 3)[documents]

    def error(a, b, ridge):
        total = 0.0
        for fold in range(3):
            held = folds == fold
            one = fit_map(a[~held], b[~held], ridge=ridge)
            total += float((one.apply(a[held].double()) - b[held]).square().sum())
        return total

    for (a, b), chosen in zip(((x, y), (y, x)), found.ridge, strict=True):
        errors = {ridge: error(a, b, ridge) for ridge in RIDGES}
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-6)
    assert found.ridge_chosen and found.ridge[0] > 1e-8


def test_a_map_of_low_rank_keeps_the_leading_directions() -> None:
    x = draw(0, 300, 6) * torch.tensor([5.0, 4, 0.1, 0.1, 0.1, 0.1])
    y = x @ rotation(1, 6) + 0.01 * draw(2, 300, 6)
    for method in METHODS:
        found = fit_map(x, y, method, rank=2)
        assert int(torch.linalg.matrix_rank(found.W, rtol=1e-3)) == 2 and found.rank == 2
        # all but four coordinates of deviation .1 of the 41 are left
        assert found.score(x, y, n_shuffles=0)["r2"].value > 0.99
    with pytest.raises(ValueError, match=r"`rank` must be in 1\.\.6"):
        fit_map(x, y, rank=7)


def test_the_same_seed_gives_the_same_bits_and_the_global_state_is_left_alone() -> None:
    x, y, _ = planted(n=100)
    before = torch.get_rng_state()
    assert all(torch.equal(fit_map(x, y, m).W, fit_map(x, y, m).W) for m in METHODS)
    assert torch.equal(before, torch.get_rng_state())


def test_directions_that_the_pairs_do_not_have_are_mapped_to_nothing() -> None:
    x = draw(0, 5, 12)  # five pairs span four directions
    found = fit_map(x, x @ rotation(1, 12), "orthogonal")
    assert int(torch.linalg.matrix_rank(found.W, rtol=1e-4)) == 4


# ---- what is carried
@pytest.mark.parametrize("method", METHODS)
def test_a_carried_probe_gives_the_scores_of_mapped_back_activations(method) -> None:
    x, y, _ = planted(noise=1.0)
    found, weight, bias = fit_map(x, y, method), draw(5, 3, 8), draw(6, 3)
    carried, start = found.carry_probe(weight, bias)
    assert torch.allclose(y @ carried.T + start, found.inverse.apply(y) @ weight.T + bias, atol=1e-4)
    assert torch.allclose(found.carry_probe(weight)[1], start - bias, atol=1e-4)
    single, _ = found.carry_probe(weight[0], bias[0])
    assert torch.allclose(single, carried[0])


def test_carried_probes_and_directions_keep_their_auroc() -> None:
    x, y, _ = planted(n=2000)
    truth = x[:, 0] > 1
    probe = fit_probe(x[:1000], truth[:1000, None].float(), standardize=True)
    apart = sl.Direction(x[:1000][truth[:1000]].mean(0) - x[:1000][~truth[:1000]].mean(0), HOOK, peak=2.0)
    found = fit_map(*(side[:300] for side in (x, y)), "orthogonal")

    def score(values):
        return auroc(values.numpy(), truth[1000:].numpy())

    weight, bias = found.carry_probe(probe.weight, probe.bias)
    held_x, held_y = x[1000:], y[1000:]
    # noise .05 against deviations of 1.5 and more moves hardly a row across another
    assert score((held_y @ weight.T + bias)[:, 0]) > score(probe(held_x)[:, 0]) - 0.01 > 0.9
    carried = found.carry_direction(apart, OTHER)
    assert score(held_y @ carried.vector) > score(held_x @ apart.vector) - 0.01 > 0.9
    # a step along the one is a step along the other, three times as long
    step = found.apply(x + apart.vector) - found.apply(x)
    assert torch.allclose(step, carried.vector * step.norm(dim=1, keepdim=True), atol=1e-4)
    assert carried.peak == pytest.approx(2.0 * float(step[0].norm()), rel=1e-3) and carried.hook_point == OTHER


CODERS = {
    "TopK": sl.TopK(k=3),
    "AbsTopK": sl.AbsTopK(k=3),
    "BatchTopK": sl.BatchTopK(k=3),
    "JumpReLU": sl.JumpReLU(target_l0=3.0),
    "Gated": sl.sae.Gated(target_l0=3.0),
}


@pytest.fixture(scope="module")
def coders() -> dict[str, sl.SAE]:
    acts, _ = paired()
    run = sl.TrainConfig(n_tokens=6_000, batch_size=100, n_held_out=0)
    return {
        name: sl.SAE(sl.SAEConfig(d_in=8, d_sae=24, activation=one), seed=0).fit(acts, run, progress=False)
        for name, one in CODERS.items()
    }


@pytest.mark.filterwarnings("ignore:.*L0")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CODERS)
def test_a_carried_sae_encodes_what_is_mapped_back_and_maps_what_it_decodes(name, method, coders, tmp_path) -> None:
    (a, b), sae = paired(noise=0.5), coders[name]
    found = fit_map(a, b, method)
    carried = found.carry_sae(sae)
    y = b[:]
    codes = sae.encode(found.inverse.apply(y))
    same = ((carried.encode(y) - codes).abs() < 1e-3).float().mean()
    assert same > 0.999  # all but ties within rounding
    assert torch.allclose(carried.decode(codes), found.apply(sae.decode(codes)), atol=1e-3)
    assert carried.provenance == b.provenance and carried.cfg.d_in == 8
    assert carried.training_["carried"]["method"] == method
    carried.save_pretrained(tmp_path / "carried")
    again = sl.SAE.from_pretrained(tmp_path / "carried")
    assert torch.equal(again.encode(y), carried.encode(y)) and again.provenance == b.provenance
    assert again.training_["carried"] == json.loads(json.dumps(carried.training_["carried"]))


def test_a_carried_sae_is_used_as_any_other(tiny, tiny_tokens, tmp_path) -> None:
    acts = sl.collect(tiny, tiny_tokens, [OTHER, HOOK], progress=False)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4)), seed=0)
    sae.fit(acts[OTHER], sl.TrainConfig(n_tokens=2_000, batch_size=100), progress=False)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    carried = fit_map(acts[OTHER], acts[HOOK]).carry_sae(sae)
    with sl.splice(tiny, carried):
        sl.lm.logits(tiny, tiny_tokens.ids[:2])
    store = sl.harvest(carried, tiny, tiny_tokens[:4], tmp_path / "store", progress=False)
    assert store.provenance.hook_point == HOOK
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_what_cannot_be_carried_is_refused() -> None:
    a, b = paired()
    found = fit_map(a, b)
    two = tuple(sl.stores.JoinedSource(name=name, d_in=4) for name in "ab")
    plain = {"d_in": 8, "d_sae": 16, "activation": sl.TopK(k=2)}
    for cfg, why in (
        (sl.SAEConfig(**plain, d_out=8), "a transcoder or a crosscoder"),
        (sl.SAEConfig(**plain, sources=two), "a transcoder or a crosscoder"),
        (
            sl.SAEConfig(
                **plain, encoder=sl.MatchingPursuit(), normalizer="none", objective=(sl.ReconstructionLoss(),)
            ),
            "encode by its weights alone",
        ),
        (sl.SAEConfig(**plain, pruning=0.1), "encode by its weights alone"),
        (sl.SAEConfig(**plain, normalizer="layer_norm"), "must be linear to be folded"),
        (sl.SAEConfig(**(plain | {"d_in": 9})), r"width of an SAE must be that of a's space \(8\), got 9"),
    ):
        with pytest.raises(ValueError, match=why):
            found.carry_sae(sl.SAE(cfg, seed=0))
    sae = sl.SAE(sl.SAEConfig(**plain), seed=0)
    sae.provenance = origin(OTHER, "one")
    with pytest.raises(ValueError, match="got another hook point"):
        found.carry_sae(sae)
    assert found.carry_sae(sae, allow_mismatch=True).provenance == b.provenance
    with pytest.raises(ValueError, match=f"must be at the hook point that the map was fitted at, '{HOOK}'"):
        found.carry_direction(sl.Direction(torch.ones(8), OTHER))
    assert found.carry_direction(sl.Direction(torch.ones(8), OTHER), allow_mismatch=True).hook_point == HOOK
    with pytest.raises(ValueError, match="`hook_point` must be given"):
        fit_map(a[:], b[:]).carry_direction(sl.Direction(torch.ones(8), HOOK))
    with pytest.raises(ValueError, match="width of weights of a probe"):
        found.carry_probe(torch.ones(2, 9))


# ---- pairs and files
def test_rows_that_are_no_pairs_are_refused() -> None:
    a, b = paired()
    x, y, _ = planted()
    with pytest.raises(ValueError, match="must be pairs, row by row, got 600 and 599 rows"):
        fit_map(x, y[1:])
    with pytest.raises(ValueError, match="at least 3 pairs, got 2"):
        fit_map(x[:2], y[:2])
    with pytest.raises(ValueError, match="`b` must be finite"):
        fit_map(x, y / 0)
    ids = torch.arange(600, dtype=torch.int32)
    one, other = (sl.Activations.from_tensor(x, token_ids=ids + shift) for shift in (0, 1))
    with pytest.raises(ValueError, match="of the same tokens, row by row, got other token_ids"):
        fit_map(one, other)
    with pytest.raises(ValueError, match="`doc_ids` must be one for each of the 600 rows, got 5"):
        fit_map(x, y, doc_ids=np.zeros(5))
    for how in ({"ridge": -1.0}, {"ridge": 1.0, "method": "orthogonal"}):
        with pytest.raises(ValueError, match="`ridge` must be at least 0, and None for an orthogonal map"):
            fit_map(x, y, **how)
    with unchecked(), pytest.raises(ValueError, match="`method` must be one of"):
        fit_map(x, y, "affine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`n_folds` must be at least 2"):
        fit_map(x, y, n_folds=1)
    found = fit_map(a, b)
    with pytest.raises(ValueError, match="Rows of a must be of the model and hook point"):
        found.score(sl.Activations.from_tensor(x, origin(OTHER, "one")), b)
    with pytest.raises(ValueError, match=r"Rows of b must be as wide as b's space \(8\), got 3"):
        found.score(x, y[:, :3])
    with pytest.raises(ValueError, match=r"Activations must be as wide as a's space \(8\)"):
        found.apply(x[:, :3])


def test_a_saved_map_is_the_same_to_the_bit_and_a_damaged_one_is_refused(tmp_path) -> None:
    found = fit_map(*paired(), "anchors", rank=5)
    found.save_pretrained(tmp_path)
    again = SpaceMap.from_pretrained(tmp_path)
    assert all(torch.equal(getattr(again, name), getattr(found, name)) for name in ("mean_a", "mean_b", "W", "W_back"))
    assert again.describe() == found.describe() and again.origin_b == found.origin_b
    assert {path.name for path in tmp_path.iterdir()} == {"map.json", "map.safetensors"}
    facts = (tmp_path / "map.json").read_text()
    for old, new in (("anchors", "linear"), ('"n_pairs": 600', '"n_pairs": "many"'), ("space map", "sae")):
        (tmp_path / "map.json").write_text(facts.replace(old, new))
        with pytest.raises(ValueError, match=r"map\.json"):
            SpaceMap.from_pretrained(tmp_path)
    (tmp_path / "map.json").write_text(facts)
    other = tmp_path / "other"
    fit_map(*paired()).save_pretrained(other)
    (tmp_path / "map.safetensors").write_bytes((other / "map.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"map\.safetensors must hold the weights that map\.json tells of"):
        SpaceMap.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        SpaceMap.from_pretrained(tmp_path / "nowhere")


def test_the_inverse_is_the_same_map_from_the_other_side() -> None:
    x, y, _ = planted(noise=1.0)
    found, other = fit_map(x, y, seed=1), fit_map(y, x, seed=1)
    assert torch.equal(found.inverse.W, other.W) and torch.equal(found.inverse.W_back, other.W_back)
    assert found.inverse.ridge == other.ridge and torch.equal(found.inverse.inverse.W, found.W)
    half = found.apply(x.bfloat16())
    assert half.dtype == torch.bfloat16 and found.apply(x.view(30, 20, 8)).shape == (30, 20, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_rows_that_do_not_vary_have_no_map(method, side) -> None:
    rows = {"a": draw(0, 20, 3), "b": draw(1, 20, 4)}
    rows[side] = rows[side][:1].expand(20, -1)
    with pytest.raises(ValueError, match=f"`{side}` must vary over rows for a map to be fitted, got 20 equal ones"):
        fit_map(rows["a"], rows["b"], method)


def test_rows_of_another_kind_are_refused() -> None:
    x, y, _ = planted(30)
    for wrong, said in ((x.numpy(), "ndarray"), (x[:, 0], r"a tensor of shape \(30,\)"), (x.tolist(), "list")):
        with unchecked(), pytest.raises(ValueError, match=f"`a` must be .* got {said}"):
            fit_map(wrong, y)  # type: ignore[arg-type]


def test_collected_activations_bring_their_documents() -> None:
    x, y, _ = planted(60, noise=2.0)
    documents = torch.arange(60, dtype=torch.int32) // 12
    a, b = (sl.Activations.from_tensor(rows, doc_ids=documents) for rows in (x, y))
    found = fit_map(a, b)
    assert torch.equal(found.W, fit_map(x, y, doc_ids=documents).W)
    assert found.score(a, b, n_shuffles=2).in_blocks and not found.score(x, y, n_shuffles=2).in_blocks
