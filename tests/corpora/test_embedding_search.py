"""Edits of features move queries as the formula says, and searches find what a plain comparison finds."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import saelab as sl
from saelab.corpora import EmbeddingSearch, embedding_search, rotate_toward, score_edit

D, M, N, K = 16, 64, 300, 5


def make_sae(activation=None, normalizer="none", seed: int = 0) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=D, d_sae=M, activation=activation or sl.TopK(k=K), normalizer=normalizer)
    return sl.SAE(cfg, seed=seed)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(100))


@pytest.fixture(scope="module")
def search(x) -> EmbeddingSearch:
    return EmbeddingSearch(make_sae(), sl.embed(x, [f"text {i}" for i in range(N)], progress=False))


def plain_edit(sae: sl.SAE, x: torch.Tensor, feature: int, value: float) -> torch.Tensor:
    """One row: set the code, keep the k largest with the set one among them, decode, add the error back."""
    with torch.no_grad():
        z = sae.encode(x[None])[0]
        error = x - sae.decode(z[None], x=x[None])[0]
        n = int((z != 0).sum())
        z[feature] = 0.0
        others = sorted(range(M), key=lambda j: -abs(float(z[j])))[: n - (value != 0)]
        kept = torch.zeros(M)
        kept[others] = z[others]
        kept[feature] = value
        moved = sae.decode(kept[None], x=x[None])[0] + error
    return moved / moved.norm()


@pytest.mark.parametrize("normalizer", ["none", "token_norm", "layer_norm"])
@pytest.mark.parametrize("activation", [sl.TopK(k=K), sl.AbsTopK(k=K)])
@pytest.mark.parametrize("value", [3.0, 0.01, -2.0, 0.0])
def test_an_edit_is_what_the_formula_says(x, activation, normalizer, value) -> None:
    sae = make_sae(activation, normalizer)
    search = EmbeddingSearch(sae, x)
    moved = search.edit(x[:8], {7: value})
    expected = torch.stack([plain_edit(sae, row, 7, value) for row in x[:8]])
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(8))


def test_nothing_edited_is_the_query_itself(search, x) -> None:
    torch.testing.assert_close(search.edit(x, {}), normalize(x))
    with torch.no_grad():
        z = search.sae.encode(x[:1])[0]
    active = z.nonzero()[:, 0].tolist()
    same = search.edit(x[:1], {j: float(z[j]) for j in active})  # codes as they are
    torch.testing.assert_close(same, normalize(x[:1]))


def test_an_sae_without_active_codes_takes_what_is_set(x) -> None:
    sae = make_sae(sl.ReLU())
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    moved = EmbeddingSearch(sae, x).edit(x[:3], {4: 2.0})
    torch.testing.assert_close(moved, normalize(x[:3] + 2.0 * sae.W_dec[4].detach()))


def test_found_rows_are_those_of_a_plain_comparison(search, x, monkeypatch) -> None:
    cosines = normalize(x[:5]) @ normalize(x).T
    rows, values = search.nearest(x[:5], 7)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(values, cosines.topk(7).values, atol=1e-6)
    monkeypatch.setattr(embedding_search, "BLOCK", 41)
    again, _ = search.nearest(x[:5], 7)
    assert np.array_equal(rows, again)
    without, _ = search.nearest(x[:5], 7, exclude=np.arange(5))
    assert np.array_equal(without[:, :6], rows[:, 1:])
    assert search.nearest(x[:2], N + 9)[0].shape == (2, N)


def test_of_equal_documents_the_first_is_found(x) -> None:
    twice = torch.cat([x[:20], x[:20]])
    rows, _ = EmbeddingSearch(make_sae(), twice).nearest(x[:20], 2)
    assert rows.tolist() == [[i, i + 20] for i in range(20)]


def test_a_query_tells_places_before_and_what_was_edited(search, x, tmp_path) -> None:
    found = search.query(3, {7: 6.0}, top=4)
    moved = search.edit(x[3:4], {7: 6.0})
    cosines = (moved @ normalize(x).T)[0]
    cosines[3] = -2
    assert [one.row for one in found.rows] == cosines.topk(4).indices.tolist()
    before = (normalize(x[3:4]) @ normalize(x).T)[0]
    before[3] = -2
    for one in found.rows:
        assert one.rank_before == 1 + int((before > before[one.row]).sum()) and one.text == f"text {one.row}"
        assert one.cosine == pytest.approx(float(cosines[one.row]), abs=1e-5)
    assert found.near_query == pytest.approx(float(moved @ normalize(x[3:4]).T), abs=1e-5)
    assert found.edits[0][0] == 7 and found.edits[0][2] == 6.0 and found.n_documents == N - 1
    unedited = search.query(x[3], top=2)
    assert unedited.rows[0].row == 3 and [one.rank_before for one in unedited.rows] == [1, 2]
    assert unedited.near_query == pytest.approx(1) and "nothing edited" in str(unedited)
    assert "feature 7 from" in str(found) and f"text {found.rows[0].row}" in str(found)
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["row"] == found.rows[0].row


def test_peaks_are_the_largest_codes(x, monkeypatch) -> None:
    sae = make_sae(sl.AbsTopK(k=K))
    monkeypatch.setattr(embedding_search, "BLOCK", 41)
    z = sae.encode(x).detach().numpy()
    np.testing.assert_allclose(EmbeddingSearch(sae, x).peaks, np.stack([z.max(0), -z.min(0)], 1).clip(0), atol=1e-5)


@pytest.mark.parametrize("cosine", [0.95, 0.5, 0.0, 1.0])
def test_a_turn_costs_what_it_is_told(x, cosine) -> None:
    direction = x[-1]
    turned = rotate_toward(x[:9], direction, cosine)
    torch.testing.assert_close((turned * normalize(x[:9])).sum(1), torch.full((9,), cosine), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.norm(dim=1), torch.ones(9))
    gain = turned @ direction - normalize(x[:9]) @ direction
    assert bool((gain > -1e-4).all()) or cosine < 0.9  # from near by, a turn comes nearer
    added = normalize(normalize(x[:1]) + 0.7 * direction)  # adding with some weight is a turn by what that costs
    again = rotate_toward(x[:1], direction, (added * normalize(x[:1])).sum(1))
    torch.testing.assert_close(again, added, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def worded():
    """Documents along random directions; those with the word have a decoder row of the SAE added."""
    sae, rng = make_sae(), np.random.default_rng(1)
    has = rng.random(800) < 0.2
    generator = torch.Generator().manual_seed(1)
    x = normalize(torch.randn(800, D, generator=generator)) + 0.8 * torch.from_numpy(has)[:, None] * sae.W_dec[9]
    return EmbeddingSearch(sae, x.detach()), has


def test_the_edit_of_a_words_feature_finds_the_word(worded) -> None:
    search, has = worded
    found = score_edit(search, {9: float(search.peaks[9, 0])}, has, n_queries=60)
    assert found.n_queries == 60 and found.n_target == has.sum() and found.chance == pytest.approx(has.mean())
    error = (0.25 / (60 * 10)) ** 0.5  # binomial, of the largest variance
    assert found.edited > found.before + 5 * error and found.edited > found.random + 5 * error
    assert found.mean_difference > found.before + 5 * error and found.near_query < 0.99
    other = score_edit(search, {30: float(search.peaks[30, 0])}, has, n_queries=60)
    assert other.edited < found.edited - 5 * error
    assert (
        "toward mean difference" in str(found)
        and score_edit(search, {9: float(search.peaks[9, 0])}, has, n_queries=60) == found
    )


def test_queries_are_those_without_the_target_and_unknown(worded) -> None:
    search, has = worded
    known = np.arange(800) < 700
    asked = search.documents[:][torch.from_numpy(~has & ~known)]
    costs = (search.edit(asked, {9: 2.0}) * normalize(asked)).sum(1)  # at the length that embeddings have
    assert score_edit(search, {9: 2.0}, has, known=known, n_queries=10_000).near_query == pytest.approx(
        float(costs.mean()), abs=1e-5
    )
    found = score_edit(search, {}, has, known=known, n_queries=10_000)
    assert found.n_queries == (~has & ~known).sum() and found.edited == found.before == found.random
    assert found.near_query == pytest.approx(1)


def test_what_does_not_fit_is_refused(search, x, worded) -> None:
    for edits in ({M: 1.0}, {-1: 1.0}, {3: float("nan")}):
        with pytest.raises(ValueError, match="`edits` must"):
            search.edit(x[:1], edits)
    with pytest.raises(ValueError, match="must have width 16"):
        search.edit(x[:1, :3], {1: 1.0})
    with pytest.raises(ValueError, match="`query` must be a row"):
        search.query(N)
    with pytest.raises(ValueError, match="`top` must be at least 1"):
        search.query(0, top=0)
    with pytest.raises(ValueError, match="at least one row of the width"):
        EmbeddingSearch(make_sae(), x[:, :3])
    alone = search.sae.W_dec[7:8].detach()
    with pytest.raises(ValueError, match="must leave something of every embedding, got 1 of 1"):
        search.edit(alone, {int(search.sae.encode(alone)[0].argmax()): 0.0})
    other, has = worded
    with pytest.raises(ValueError, match="masks of the 800 documents"):
        score_edit(other, {}, has[:-1])
    with pytest.raises(ValueError, match="at least one of the target"):
        score_edit(other, {}, np.zeros(800, bool))
    with pytest.raises(ValueError, match="a document without the target"):
        score_edit(other, {}, np.ones(800, bool))


def test_embeddings_of_another_encoder_are_refused(x) -> None:
    acts = sl.embed(x, progress=False)
    sae = make_sae()
    sae.fit(acts, sl.TrainConfig(n_tokens=300, batch_size=100, n_held_out=0), progress=False)
    other = sl.embed(lambda part: x[: len(part)], [f"text {i}" for i in range(N)], progress=False)
    with pytest.raises(ValueError, match="hook point"):
        EmbeddingSearch(sae, other)
    assert len(EmbeddingSearch(sae, other, allow_mismatch=True)) == N
