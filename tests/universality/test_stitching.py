"""Stitched probes, directions and heads: planted turns that must cost nothing, chance where nothing is shared."""

import numpy as np
import pytest
import torch
from same_seeds import generator_of
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import auroc, fit_probe
from saelab.stores.corpus import split_documents
from saelab.universality import Anchors, StitchTable, fit_map, stitch_heads, stitch_probes

HOOK = "blocks.1.hook_resid_post"
ONE = {"seeds": (0,)}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(n: int = 2000, d: int = 8, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Rows, their images under a rotation (into more dimensions), a scale and a shift; and concepts of the rows."""
    x = draw(0, n, d)
    turn = torch.linalg.qr(draw(1, width or d, width or d)).Q[:d]
    concepts = {"plane": x[:, 0] + x[:, 1] > 0.5, "axis": x[:, 2] < -0.3}
    return x, 2 * x @ turn + 3, concepts


@pytest.fixture(scope="module")
def table() -> StitchTable:
    x, y, concepts = turned()
    return stitch_probes(x, y, concepts, n_pairs=60, channels=("cosine", "l1", "product"), seeds=(0, 1))


def test_what_turns_only_is_carried_without_loss(table) -> None:
    for name in ("orthogonal map", "anchors map", "linear map"):
        # the map is exact but for the ridge, and a probe's AUROC changes with no monotone step
        assert table.mean(name) == pytest.approx(table.mean("own"), abs=2e-3)
    assert table.mean("relative cosine") == pytest.approx(table.mean("relative cosine, own"), abs=1e-4)
    assert table.mean("own") > 0.98 and table.mean("other's own") > 0.98


def test_without_the_turn_and_with_shuffled_pairs_it_is_chance(table) -> None:
    # an AUROC of 1,000 rows, 300 of them true, has deviation .02; means of four: 5 of them, and what a random
    # direction of 8 has in common with the right one, of deviation 8^-1/2, which an AUROC shows by a quarter
    for name in ("direct", "relative cosine, shuffled anchors", "linear map, shuffled pairs"):
        assert abs(table.mean(name) - 0.5) < 0.35 < table.mean("orthogonal map") - 0.5
    assert table.mean("relative l1") < table.mean("relative l1, own")  # a rotation is not what l1 is invariant to


def test_a_table_tells_columns_and_spread(table) -> None:
    assert table.columns == ("plane", "axis") and table.seeds == (0, 1) and table.n_pairs == 60
    assert table.mean("own") == pytest.approx(np.mean([table.mean("own", one) for one in table.columns]))
    text = str(table)
    assert "AUROC of probes of a on b; 60 pairs, 940 rows to learn from, 1,000 to test, seeds 0, 1" in text
    assert "plane" in text and "mean of 2" in table.format(columns=False)
    assert set(table.to_dict()["figures"]["own"]) == {"plane", "axis"}


def test_figures_are_those_of_a_naive_computation() -> None:
    x, y, concepts = turned(400)
    y = y + draw(5, 400, 8)
    documents = np.arange(40).repeat(10)
    table = stitch_probes(x, y, concepts, n_pairs=50, doc_ids=documents, methods=("orthogonal",), seeds=(3,))
    learns = torch.from_numpy(split_documents(documents, 0.5, 3))
    g = generator_of(3)
    learn, test = (
        rows[torch.randperm(200, generator=g)] for rows in (learns.nonzero()[:, 0], (~learns).nonzero()[:, 0])
    )
    chosen = torch.randperm(200, generator=generator_of(3))[:50].sort().values
    pairs = learn[chosen]
    train = learn[[i for i in range(200) if i not in chosen.tolist()]]
    truth = torch.stack(list(concepts.values()), 1)

    def score(probe, rows):
        scores = probe(rows).double().numpy()
        return [auroc(scores[:, i], truth[test, i].numpy()) for i in range(2)]

    probe = fit_probe(x[train], truth[train].float(), standardize=True)
    back = fit_map(y[pairs], x[pairs], "orthogonal")
    anchors = Anchors(x[pairs]), Anchors(y[pairs])
    relative = fit_probe(anchors[0].relate(x[train]), truth[train].float(), standardize=True)
    expected = {
        "own": score(probe, x[test]),
        "direct": score(probe, y[test]),
        "orthogonal map": score(probe, back.apply(y[test])),
        "relative cosine": score(relative, anchors[1].relate(y[test])),
    }
    for name, values in expected.items():
        # a pair of rows may change places by rounding: of 200 rows one is 1e-4
        assert [table.mean(name, one) for one in table.columns] == pytest.approx(values, abs=5e-4), name


def test_directions_are_differences_of_means_carried_forward() -> None:
    x, y, concepts = turned(3000)
    table = stitch_probes(x, y, concepts, readout="directions", n_pairs=100, **ONE)
    assert table.mean("orthogonal map") == pytest.approx(table.mean("own"), abs=2e-3)
    assert table.mean("own") > 0.9 and "directions" in table.what
    # a stretched space: a direction carried forward is no longer the best one to read, a probe carried back is
    stretch = torch.linspace(0.2, 5, 8)
    probes, directions = (
        stitch_probes(x, x * stretch, concepts, readout=kind, n_pairs=200, methods=("linear",), **ONE).mean(
            "linear map"
        )
        for kind in ("probes", "directions")
    )
    assert probes > 0.98 > directions


def test_each_tokens_rate_stands_beside_where_tokens_are_known() -> None:
    x, y, _ = turned(600)
    ids = torch.arange(600, dtype=torch.int32) % 7
    documents = torch.arange(600, dtype=torch.int32) // 10
    a, b = (sl.Activations.from_tensor(rows, token_ids=ids, doc_ids=documents) for rows in (x, y))
    table = stitch_probes(a, b, {"token": ids < 3, "space": x[:, 0] > 0}, n_pairs=40, **ONE)
    assert table.mean("token alone", "token") == 1
    # chance: 300 rows have deviation .033
    assert abs(table.mean("token alone", "space") - 0.5) < 0.15
    assert "token alone" not in stitch_probes(x, y, {"space": x[:, 0] > 0}, n_pairs=40, **ONE).figures


def test_what_means_nothing_is_nan_and_says_why() -> None:
    x, y, concepts = turned(width=11)
    table = stitch_probes(x, y, concepts | {"never": torch.zeros(2000, dtype=torch.bool)}, n_pairs=60, **ONE)
    assert np.isnan(table.mean("direct")) and table.reasons["direct"] == "widths 8 and 11 differ"
    assert np.isnan(table.mean("own", "never")) and "'never' holds of no row" in table.reasons["own"]
    assert table.mean("own") > 0.98 and "nan" in table.format(columns=True)
    assert table.mean("orthogonal map", "plane") == pytest.approx(table.mean("own", "plane"), abs=2e-3)


def test_the_same_seed_gives_the_same_figures_and_leaves_the_global_state_alone() -> None:
    x, y, concepts = turned(500)
    before = torch.get_rng_state()
    one, other = (stitch_probes(x, y, concepts, n_pairs=40, anchors="kmeans", **ONE) for _ in range(2))
    assert one.figures == other.figures and torch.equal(before, torch.get_rng_state())
    assert stitch_probes(x, y, concepts, n_pairs=40, seeds=(1,)).figures != one.figures


def test_what_cannot_be_stitched_is_refused() -> None:
    x, y, concepts = turned(200)
    with pytest.raises(ValueError, match=r"`n_pairs` must be at least 3 and leave rows to learn from, of the 100 rows"):
        stitch_probes(x, y, concepts, n_pairs=100)
    with pytest.raises(ValueError, match="`labels` must be of the 200 rows, got 3"):
        stitch_probes(x, y, {"a": torch.tensor([True, False, True])})
    with pytest.raises(ValueError, match="must be pairs, row by row"):
        stitch_probes(x, y[1:], concepts)
    for few in ({"n_train": 0}, {"n_test": 0}):
        with pytest.raises(ValueError, match="`n_train` and `n_test` must be at least 1"):
            stitch_probes(x, y, concepts, n_pairs=20, **few)
    with pytest.raises(ValueError, match="`seeds` must have one at least"):
        stitch_probes(x, y, concepts, n_pairs=20, seeds=())
    with unchecked(), pytest.raises(ValueError, match="`readout` must be one of"):
        stitch_probes(x, y, concepts, readout="heads")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(ValueError, match=r"`channels` among .* got 'probes' and \['l3'\]"):
        stitch_probes(x, y, concepts, channels=("l3",))  # type: ignore[arg-type]


# ---- heads
@pytest.fixture(scope="module")
def stories():
    from saelab.synthetic.tales import generate_stories

    return generate_stories(24, first=71_000_000).tokens()


@pytest.fixture(scope="module")
def heads(stories) -> StitchTable:
    model = sl.load_model("tales", progress=False)
    return stitch_heads(model, model, stories, n_pairs=1000, **ONE)


def test_a_model_stitched_with_itself_is_itself(heads, stories) -> None:
    assert heads.figures["direct"] == heads.figures["own"] == heads.figures["other's own"]
    assert heads.mean("orthogonal map", "loss") == pytest.approx(heads.mean("own", "loss"), abs=1e-3)
    assert heads.mean("linear map", "loss") < heads.mean("own", "loss") + 0.1  # the ridge
    assert heads.mean("own", "perplexity") == pytest.approx(np.exp(heads.mean("own", "loss")))
    for name in ("linear map, shuffled pairs", "token frequency"):
        assert heads.mean(name, "loss") > 3 * heads.mean("own", "loss")
        assert heads.mean(name, "top1") < 0.3 < heads.mean("own", "top1")
    order = torch.randperm(24, generator=generator_of(0))
    test = stories[order[12:]]
    model = sl.load_model("tales", progress=False)
    loss = sl.lm.next_token_loss(sl.lm.logits(model, test.ids), test.ids)[test.predicts[:, :-1]]
    assert heads.mean("own", "loss") == pytest.approx(float(loss.mean()), rel=1e-5)
    assert heads.n_test == len(loss) and heads.columns == ("loss", "perplexity", "top1")


def test_models_may_be_cut_anywhere_and_of_two_widths(stories) -> None:
    models = [sl.load_model(name, progress=False) for name in ("tales", "tales-b")]
    points = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    table = stitch_heads(*models, stories, hook_points=points, methods=("linear",), **ONE)
    assert np.isnan(table.mean("direct", "loss")) and table.reasons["direct"] == "widths 128 and 112 differ"
    assert (
        table.mean("own", "loss") < table.mean("linear map", "loss") < table.mean("linear map, shuffled pairs", "loss")
    )
    assert table.mean("linear map", "loss") < table.mean("token frequency", "loss")


def test_heads_of_other_vocabularies_are_refused(tiny, stories) -> None:
    model = sl.load_model("tales", progress=False)
    with pytest.raises(ValueError, match="Models must have one vocabulary"):
        stitch_heads(model, tiny, stories)
    with pytest.raises(ValueError, match="`tokens` must have at least 4 rows, got 3"):
        stitch_heads(model, model, stories[:3])
    with pytest.raises(ValueError, match=r"must be a hook point of this model, got 'blocks\.9"):
        stitch_heads(model, model, stories, hook_points=("blocks.9.hook_resid_post", HOOK))
