"""Interventions: exact against the plainest loop, alike with and without a cache, leaving nothing behind."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import saelab as sl
from saelab.lm.generation import GREEDY
from saelab.lm.hook_points import hook_points_of

PROMPTS = ["Once upon a time there was a girl", "Tom saw a dog.", "One day the big dog ran to the park and"]
POINTS = ["blocks.2.hook_resid_post", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
POINT = POINTS[0]
N = 6


@pytest.fixture(scope="module", params=["tales", "stories260k"])
def model(request: Any) -> Any:
    if request.param == "tales":
        return sl.load_model("tales", progress=False)
    return sl.load_model(request.getfixturevalue("shared_data") / "stories260k", progress=False)


@pytest.fixture(scope="module")
def tales() -> Any:
    return sl.load_model("tales", progress=False)


def make_sae(model: Any, activation: Any = None, seed: int = 0, **options: Any) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=model.cfg.d_model, d_sae=48, activation=activation or sl.AbsTopK(k=6), **options)
    return sl.SAE(cfg, seed=seed)


def size_at(model: Any, point: str) -> float:
    """A strength that matters: the typical norm of activations."""
    tokens = sl.tokenize(model, PROMPTS, 12, packed=False)
    return float(sl.lm.capture(model, tokens.ids, [point])[point][:, 1:].norm(dim=-1).median())


def ids_of(generation: sl.lm.Generation) -> list[tuple[int, ...]]:
    return [sample.ids for sample in generation]


def go_on(model: Any, prompts: Any = PROMPTS, **options: Any) -> list[tuple[int, ...]]:
    return ids_of(sl.generate(model, prompts, N, sampling=GREEDY, stop_at_eos=False, progress=False, **options))


def naive(model: Any, prompt: str, edit: Any, point: str) -> tuple[int, ...]:
    """Greedy, one text, no cache: every step reads all again; `edit` gets (n_tokens, d) and the prompt's n."""
    ids = sl.tokenize(model, [prompt], model.cfg.n_ctx, packed=False, separator=None)
    row = ids.ids[:, : ids.n_tokens].long()
    n_prompt = row.shape[1]

    def run(x: torch.Tensor) -> torch.Tensor:
        return edit(x[0].clone(), n_prompt)[None]

    for _ in range(N):
        with sl.splice(model, {point: run}):
            row = torch.cat([row, sl.lm.logits(model, row)[:, -1:].argmax(-1)], 1)
    return tuple(row[0, n_prompt:].tolist())


def add_by_hand(delta: torch.Tensor, first: int = 1, last: int | None = None) -> Any:
    """Add to the tokens of a stretch; by default to all but BOS."""

    def edit(x: torch.Tensor, n_prompt: int) -> torch.Tensor:
        x[first:last] += delta
        return x

    return edit


@pytest.mark.parametrize("point", POINTS)
def test_steered_texts_are_those_of_the_plainest_loop(model: Any, point: str) -> None:
    sae, size = make_sae(model), 3 * size_at(model, point)
    delta = size * (sae.directions()[3] - sae.directions()[7])
    expected = [naive(model, prompt, add_by_hand(delta), point) for prompt in PROMPTS]
    with sl.steer(model, sae, {3: size, 7: -size}, hook_point=point):
        assert go_on(model) == expected  # padded batch, cache
        assert go_on(model, use_cache=False) == expected
        assert go_on(model, batch_size=1) == expected
        assert go_on(model, batch_size=1, use_cache=False) == expected
    assert expected != go_on(model)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("mode", ["clamp", "floor", "scale", "ablate", "add"])
def test_every_mode_is_alike_with_and_without_cache(model: Any, point: str, mode: str) -> None:
    sae, size = make_sae(model), 3 * size_at(model, point)
    features = dict.fromkeys(range(8), size) if mode != "scale" else dict.fromkeys(range(48), 3.0)
    with sl.steer(model, sae, features, mode=mode, hook_point=point):  # type: ignore[arg-type]
        with_cache, without = go_on(model), go_on(model, use_cache=False, batch_size=1)
    assert with_cache == without


@pytest.mark.parametrize("point", POINTS)
def test_neutral_strengths_change_no_bit(model: Any, point: str) -> None:
    sae, ids = make_sae(model), sl.tokenize(model, PROMPTS, 12, packed=False).ids
    clean, texts = sl.lm.logits(model, ids), go_on(model)
    for options in ({"mode": "add"}, {"mode": "floor"}, {"mode": "add", "unit": "norm"}):
        with sl.steer(model, sae, {3: 0.0, 5: -0.0}, hook_point=point, **options):
            assert torch.equal(sl.lm.logits(model, ids), clean) and go_on(model) == texts
            with torch.no_grad():
                steered = model.original_model(ids.long()).logits
        with torch.no_grad():
            assert torch.equal(steered, model.original_model(ids.long()).logits)
    with sl.steer(model, sae, {3: 1.0}, mode="scale", hook_point=point):
        assert torch.equal(sl.lm.logits(model, ids), clean)
    with sl.splice(model, sae, error="keep", hook_point=point):
        assert torch.equal(sl.lm.logits(model, ids), clean)


# transformer-lens 4.3 itself calls a cache by the name that transformers 5.24 gave up.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@contextmanager
def refused_or_alike() -> Iterator[None]:
    """Where a bridge's modules lose the cache, as with transformers 5.24, a forward that has one is refused."""
    try:
        yield
    except ValueError as error:
        assert "a model that loses it" in str(error)


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_beams_are_steered_alike_with_and_without_cache(where: str) -> None:
    model = sl.lm.tiny_model()
    hf_model, ids = model.original_model, torch.tensor([[0, 80, 81, 82, 83, 84]])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def search(strength: float, **how: bool) -> list[list[int]]:
        with sl.steer(model, sl.Direction(direction, "blocks.0.hook_out"), strength, where=where):
            return hf_model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False,
                pad_token_id=1, **how,
            ).tolist()  # fmt: skip

    without = search(30.0, use_cache=False)  # far more than the stream, so that no text stays
    assert without != search(0.0, use_cache=False)
    with refused_or_alike():
        assert search(30.0) == without


def test_rows_that_change_places_go_on_with_their_texts() -> None:
    model, rows, new = sl.lm.tiny_model(), torch.arange(70, 82).view(3, 4), torch.tensor([[90], [91], [92]])
    direction, order = sl.Direction(torch.ones(32), "blocks.1.hook_resid_post"), [2, 0, 1]

    def step(before: Any) -> Any:
        with sl.steer(model, direction, 3.0, where="generated"):
            sl.lm.logits(model, before)
            return sl.lm.logits(model, torch.cat([rows[order], new], 1))

    torch.testing.assert_close(step(rows), step(rows[order]), rtol=0, atol=0)
    assert not torch.equal(step(rows), step(rows + 1))  # whose rows are another text's


def test_another_text_in_the_same_block_begins_anew() -> None:
    model = sl.lm.tiny_model()
    direction, ids = sl.Direction(torch.ones(32), "blocks.1.hook_resid_post"), torch.arange(70, 77)[None]

    def read(*texts: Any) -> Any:
        with sl.steer(model, direction, 3.0, where="prompt"):
            return [sl.lm.logits(model, text) for text in texts][-1]

    torch.testing.assert_close(read(ids[:, :4], ids), read(ids), rtol=0, atol=0)

    def write(*texts: list[int]) -> list[int]:
        with sl.steer(model, direction, 30.0, where="generated"):
            return [
                model.original_model.generate(torch.tensor([text]), max_new_tokens=5, do_sample=False, pad_token_id=1)
                for text in texts
            ][-1][0].tolist()

    with refused_or_alike():
        first = write(ids[0].tolist())
        assert write(ids[0].tolist(), first) == write(first)


def test_the_bridges_own_generate_is_steered_alike_or_refused() -> None:
    tales: Any = sl.load_model("tales", backend="transformer_lens", progress=False)
    sae, size = make_sae(tales), 3 * size_at(tales, POINT)
    tokens = sl.tokenize(tales, [PROMPTS[0]], 64, packed=False)
    ids = tokens.ids[:, : tokens.n_tokens].long()
    for place in ("all", "generated", "prompt", slice(2, 5), [-1]):
        with sl.steer(tales, sae, {3: size}, hook_point=POINT, where=place):  # type: ignore[arg-type]
            expected = go_on(tales, PROMPTS[0])
            for cached in (True, False):
                options = {"do_sample": False, "use_past_kv_cache": cached, "verbose": False, "stop_at_eos": False}
                if cached and hook_points_of(tales).caching.argument is None:
                    with pytest.raises(ValueError, match="model that loses it"):
                        tales.generate(ids, N, **options)
                    continue
                made = tales.generate(ids, N, **options)
                assert tuple(made[0, ids.shape[1] :].tolist()) == expected[0], (place, cached)


@pytest.mark.parametrize(
    ("place", "output_scale"),
    [
        ("prompt", (1, 0)),
        ("generated", (0, None)),
        (slice(2, 4), (2, 4)),
        (slice(-1, None), (-1, None)),
        ([2, 3], (2, 4)),
    ],
)
def test_places_are_the_same_tokens_in_every_way_of_running(tales: Any, place: Any, output_scale: Any) -> None:
    sae, size = make_sae(tales), 4 * size_at(tales, POINT)
    delta = size * sae.directions()[3]

    def edit(x: torch.Tensor, n_prompt: int) -> torch.Tensor:
        first, last = output_scale
        first, last = {"prompt": (1, n_prompt), "generated": (n_prompt, None)}.get(str(place), (first, last))
        x[first + n_prompt if first < 0 else first : last] += delta
        return x

    expected = [naive(tales, prompt, edit, POINT) for prompt in PROMPTS]
    with sl.steer(tales, sae, {3: size}, hook_point=POINT, where=place):
        assert go_on(tales) == expected and go_on(tales, use_cache=False, batch_size=2) == expected


def test_a_mask_names_tokens_of_the_prompt_and_special_ones_are_spared(tales: Any) -> None:
    sae, ids = make_sae(tales), sl.tokenize(tales, PROMPTS, 8, packed=False).ids
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[0, 0] = mask[1, 2] = True
    changed = [
        differs(tales, sae, ids, place)
        for place in (mask, "all", sl.interventions.TokenSelector(special=True), mask[1])
    ]
    assert torch.equal(changed[0], mask)
    assert torch.equal(changed[1], ~torch.isin(ids, torch.tensor(tales_special(tales))))
    assert changed[2][:, 0].all() and changed[3].nonzero()[:, 1].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="row for each of the 3 texts"):
        differs(tales, sae, ids, mask[:2])


def tales_special(model: Any) -> list[int]:
    return list(sl.tokenize(model, ["a"], 4, packed=False).special_ids)


def differs(model: Any, sae: sl.SAE, ids: torch.Tensor, place: Any) -> torch.Tensor:
    """Which tokens a steered forward changes at the hook point itself."""
    before = sl.lm.capture(model, ids, [POINT])[POINT]
    with sl.steer(model, sae, {3: 5.0}, hook_point=POINT, where=place):
        return (sl.lm.capture(model, ids, [POINT])[POINT] != before).any(-1)


def test_a_condition_is_read_at_its_own_hook_point(tales: Any) -> None:
    sae, other = make_sae(tales), make_sae(tales, seed=1)
    ids = sl.tokenize(tales, PROMPTS, 8, packed=False).ids
    z = other.encode(sl.lm.capture(tales, ids, [POINTS[2]])[POINTS[2]])
    ordinary = ~torch.isin(ids, torch.tensor(tales_special(tales)))
    feature = int((z[ordinary] != 0).float().mean(0).sub(0.5).abs().argmin())
    for side, fires in (("both", z != 0), ("positive", z > 0), ("negative", z < 0)):
        when = sl.interventions.ActivationCondition(other, feature, hook_point=POINTS[2], side=side)  # type: ignore[arg-type]
        assert torch.equal(differs(tales, sae, ids, when), fires[..., feature] & ordinary)
    here = sl.interventions.ActivationCondition(sae, 3, hook_point=POINT)
    fires = sae.encode(sl.lm.capture(tales, ids, [POINT])[POINT])[..., 3] != 0
    assert torch.equal(differs(tales, sae, ids, here), fires & ordinary)
    with pytest.raises(RuntimeError, match="must lie before"):
        differs(tales, sae, ids, sl.interventions.ActivationCondition(other, 0, hook_point="blocks.3.hook_resid_post"))


@pytest.mark.parametrize(
    "activation", [sl.TopK(k=6), sl.AbsTopK(k=6), sl.BatchAbsTopK(k=6), sl.JumpReLU(), sl.sae.AbsJumpReLU()]
)
@pytest.mark.parametrize("normalizer", ["none", "scale", "whiten", "token_norm", "layer_norm"])
def test_modes_do_what_their_formulas_say(activation: Any, normalizer: Any) -> None:
    model = sl.lm.tiny_model()
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(40, 32, generator=generator) @ torch.randn(32, 32, generator=generator) + 1
    sae = make_sae(model, activation, normalizer=normalizer)
    if normalizer != "none":
        sae.normalizer.fit(x)
    z = sae.encode(x)
    error = x - sae.decode(z, x=x)
    signed = bool((z < 0).any())
    goals = {
        "add": lambda c, s: c + s,
        "clamp": lambda c, s: torch.full_like(c, s),
        "floor": lambda c, s: c.clamp_min(s) if s > 0 else c.clamp_max(s),
        "scale": lambda c, s: s * c,
        "ablate": lambda c, s: 0 * c,
    }
    for mode, goal in goals.items():
        for s in (2.0, -1.5) if signed else (2.0,):
            moved = z.clone()
            moved[:, [3, 9]] = goal(z[:, [3, 9]], s)
            kept = sl.Intervention(sae, {3: s, 9: s}, mode, hook_point=POINT)  # type: ignore[arg-type]
            torch.testing.assert_close(kept.change(x, x), sae.decode(moved, x=x) + error, atol=1e-3, rtol=1e-3)
            dropped = sl.Intervention(sae, {3: s, 9: s}, mode, error="drop", hook_point=POINT)  # type: ignore[arg-type]
            torch.testing.assert_close(dropped.change(x, x), sae.decode(moved, x=x), atol=1e-3, rtol=1e-3)


def test_codes_are_read_alike_densely_and_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.sae import module
    from saelab.sae.activation_functions import GroupMax

    sae = make_sae(sl.lm.tiny_model(), GroupMax(k=6))  # no shortcut to some latents
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = sae.encode_latents(x, [3, 40, 7])
        monkeypatch.setattr(module, "DENSE_NUMBERS", 0)
        sparse = sae.encode_latents(x, [3, 40, 7])
    assert (dense != 0).any(0).all()
    torch.testing.assert_close(sparse, dense)


def test_strengths_in_each_unit_of_measure(tales: Any, tmp_path: Any) -> None:
    sae = make_sae(tales)
    tokens = sl.tokenize(tales, PROMPTS * 4, 16)
    store = sl.harvest(sae, tales, tokens, tmp_path / "store", hook_point=POINT, progress=False)
    j = int(store.statistics.peaks.max(1).argmax())
    peak = float(store.statistics.peaks[j].max())
    assert math.isclose(
        float(sl.Intervention(sae, {j: -2.0}, unit="max", store=store, hook_point=POINT).strengths[j]), -2 * peak
    )
    x = torch.randn(5, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    change = sl.Intervention(sae, {j: 0.5}, unit="norm", hook_point=POINT).change(x, x) - x
    torch.testing.assert_close(change.norm(dim=1), x.norm(dim=1) / 2)
    by_token = make_sae(tales, normalizer="layer_norm")
    change = sl.Intervention(by_token, {j: 0.5}, unit="norm", hook_point=POINT).change(x, x) - x
    torch.testing.assert_close(change.norm(dim=1), x.norm(dim=1) / 2)
    along = sl.Intervention(sl.Direction(torch.ones(sae.cfg.d_in), POINT, peak=4.0), 0.5, unit="max").change(x, x) - x
    torch.testing.assert_close(along.norm(dim=1), torch.full((5,), 2.0))
    with pytest.raises(ValueError, match="need `store`"):
        sl.Intervention(sae, {j: 1.0}, unit="max", hook_point=POINT)
    dead = int(store.statistics.peaks.max(1).argmin())
    if store.statistics.peaks[dead].max() == 0:
        with pytest.raises(ValueError, match=f"feature {dead} has none"):
            sl.Intervention(sae, {dead: 1.0}, unit="max", store=store, hook_point=POINT)


def test_directions_are_moved_and_ablated() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    v = sl.Direction(torch.tensor([1.0, 2.0, 0.0, -1.0]), POINT)
    gone = sl.Intervention(v, (), "ablate").change(x, x)
    torch.testing.assert_close(gone @ v.vector, torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(gone + v.encode(x) * v.vector, x)
    torch.testing.assert_close(sl.Intervention(v, 3.0, "clamp").change(x, x) @ v.vector, torch.full((6,), 3.0))
    torch.testing.assert_close(sl.Intervention(-v, 3.0).change(x, x), x - 3 * v.vector)
    assert not torch.equal(sl.interventions.make_random(v, 0).vector, sl.interventions.make_random(v, 1).vector)


def test_blocks_nest_and_several_saes_stand_side_by_side(model: Any) -> None:
    saes = [make_sae(model, seed=seed) for seed in range(3)]
    sizes = [2 * size_at(model, point) for point in POINTS]
    ids = sl.tokenize(model, PROMPTS, 12, packed=False).ids
    parts = [
        sl.Intervention(sae, {3: size, 4: -size}, mode, hook_point=point)  # type: ignore[arg-type]
        for sae, size, point, mode in zip(saes, sizes, POINTS, ("add", "clamp", "floor"), strict=True)
    ]
    with sl.interventions.steer_all(model, parts):
        together, texts = sl.lm.logits(model, ids), go_on(model)
        assert go_on(model, use_cache=False, batch_size=1) == texts
    with (
        sl.interventions.steer_all(model, parts[:1]),
        sl.interventions.steer_all(model, parts[1:2]),
        sl.interventions.steer_all(model, parts[2:]),
    ):
        assert torch.equal(sl.lm.logits(model, ids), together)
    at = {"hook_point": POINT}
    with sl.steer(model, saes[0], {3: 2.0}, **at), sl.steer(model, saes[0], {3: 3.0}, **at):
        twice = sl.lm.logits(model, ids)
    with sl.steer(model, saes[0], {3: 5.0}, **at):
        torch.testing.assert_close(sl.lm.logits(model, ids), twice, atol=1e-3, rtol=1e-3)
    with sl.steer(model, saes[0], {3: 9.0}, **at), sl.steer(model, saes[0], {3: 2.0}, mode="clamp", **at):
        clamped = saes[0].encode(sl.lm.capture(model, ids, [POINT])[POINT])  # the inner block has the last word
    assert clamped.shape[-1] == 48


def test_nothing_stays_behind_after_an_exception(model: Any) -> None:
    sae, ids = make_sae(model), sl.tokenize(model, PROMPTS, 12, packed=False).ids
    clean, texts, hooks = sl.lm.logits(model, ids), go_on(model), count_hooks(model)
    with pytest.raises(ZeroDivisionError), sl.steer(model, sae, {3: 9.0}, hook_point=POINT):
        1 / 0  # noqa: B018
    with (
        pytest.raises(ValueError, match="width of the hook point"),
        sl.steer(model, sl.Direction(torch.ones(7), POINT), 9.0),
    ):
        sl.lm.logits(model, ids)
    with pytest.raises(ValueError, match="hook point"), sl.steer(model, sae, {3: 9.0}, hook_point="blocks.2.nowhere"):
        pass
    assert count_hooks(model) == hooks and torch.equal(sl.lm.logits(model, ids), clean) and go_on(model) == texts


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_gradients_reach_strengths_and_pass_through_reconstructions(tales: Any) -> None:
    sae, ids = make_sae(tales, sl.TopK(k=6)), sl.tokenize(tales, PROMPTS, 8, packed=False).ids

    def score(strength: Any) -> torch.Tensor:
        with sl.steer(tales, sae, {3: strength}, hook_point=POINT):
            return sl.lm.logits(tales, ids, grad=True).log_softmax(-1)[0, 5, 17]

    s = torch.tensor(4.0, requires_grad=True)
    (slope,) = torch.autograd.grad(score(s), s)
    assert float(slope) == pytest.approx((score(4.05).item() - score(3.95).item()) / 0.1, rel=0.05)
    with sl.steer(tales, sae, {3: s}, hook_point=POINT):  # a step of learning after another, in one block
        slopes = []
        for _ in range(2):
            out = sl.lm.logits(tales, ids, grad=True).log_softmax(-1)[0, 5, 17]
            slopes.append(float(torch.autograd.grad(out, s)[0]))
            s.data += 4.0
    assert slopes[0] == pytest.approx(float(slope)) and slopes[1] != pytest.approx(slopes[0], rel=1e-3)
    with sl.splice(tales, sae, error="keep", hook_point=POINT):
        out = sl.lm.logits(tales, ids, grad=True)[0, 5, 17]
        (through,) = torch.autograd.grad(out, sae.W_dec)
    assert through.count_nonzero() > 0 and not sl.lm.logits(tales, ids).requires_grad
    assert all(p.grad is None for p in tales.parameters())


def test_reconstructions_replace_activations(tales: Any) -> None:
    sae, ids = make_sae(tales), sl.tokenize(tales, PROMPTS, 8, packed=False).ids
    x = sl.lm.capture(tales, ids, [POINT])[POINT]
    with sl.splice(tales, sae, hook_point=POINT, where=slice(2, None)):
        spliced = sl.lm.capture(tales, ids, [POINT])[POINT]
    ordinary = ~torch.isin(ids, torch.tensor(tales_special(tales)))
    changed = ordinary & (torch.arange(8) >= 2)
    torch.testing.assert_close(spliced[changed], sae(x)[changed])
    assert torch.equal(spliced[~changed], x[~changed])


def test_mistakes_are_explained(tales: Any) -> None:
    sae = make_sae(tales)
    at = {"hook_point": POINT}
    for features, options, rule in [
        ({48: 1.0}, at, "in 0..47"),
        ({3: math.nan}, at, "finite"),
        ([3], at, "list for mode 'ablate'"),
        ({3: 1.0}, {}, "`hook_point` must be given"),
        ({3: 1.0}, {**at, "where": slice(4, 0, -1)}, "forwards"),
    ]:
        with pytest.raises(ValueError, match=rule), sl.steer(tales, sae, features, **options):  # type: ignore[arg-type]
            sl.lm.logits(tales, torch.full((1, 5), 60))
    with pytest.raises(ValueError, match="reconstructs nothing"):
        sl.Intervention(sl.Direction(torch.ones(4), POINT), 1.0, error="drop")
    with pytest.raises(ValueError, match="not zero"):
        sl.Direction(torch.zeros(4), POINT)


@pytest.mark.parametrize(
    ("mode", "unit", "strength"),
    [("add", "raw", 4.0), ("clamp", "raw", 3.0), ("add", "norm", 0.5), ("scale", "raw", 5.0)],
)
def test_a_random_direction_moves_every_token_as_far_as_the_features_do(tiny: Any, mode, unit, strength) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=8)), seed=1)
    point, ids = "blocks.1.hook_resid_post", torch.arange(40, 60)[None]
    block = [
        sl.Intervention(
            sae, {3: strength, 5: -strength if mode == "add" else strength}, mode, unit=unit, hook_point=point
        ),
        sl.Intervention(sae, {7: 1.0}, hook_point=point),
    ]
    before = sl.lm.capture(tiny, ids, [point])[point][0]
    with sl.interventions.steer_all(tiny, block):
        steered = sl.lm.capture(tiny, ids, [point])[point][0] - before
    with sl.interventions.steer_randomly(tiny, block, seed=2):
        moved = sl.lm.capture(tiny, ids, [point])[point][0] - before
    assert torch.allclose(moved.norm(dim=1), steered.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert float(steered.norm(dim=1).min()) > 0.1
    unit_vectors = moved / moved.norm(dim=1, keepdim=True)
    assert torch.allclose(unit_vectors, unit_vectors[:1].expand_as(unit_vectors), atol=1e-3)
    with sl.interventions.steer_randomly(tiny, block, seed=3):
        other = sl.lm.capture(tiny, ids, [point])[point][0] - before
    assert not torch.allclose(other, moved, atol=1e-2)
    assert torch.equal(sl.lm.capture(tiny, ids, [point])[point][0], before)


def test_a_text_goes_on_in_a_later_block_with_its_tracker(tiny: Any) -> None:
    """Prompt and generated tokens are told apart although the block was left between them."""
    up = sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    block = [sl.Intervention(up, 9.0, where="generated")]
    with sl.interventions.steer_all(tiny, block):
        whole = sl.generate(tiny, "One", 6, seed=1, progress=False)[0]
    stream, tracker = sl.lm.stream_tokens(tiny, "One", 6, seed=1), sl.lm.TokenTracker(sl.lm.hook_points_of(tiny))
    for _ in range(3):
        with sl.interventions.steer_all(tiny, block, tracker=tracker):
            next(stream), next(stream)
    assert stream.sample == whole
    assert whole != sl.generate(tiny, "One", 6, seed=1, progress=False)[0]
