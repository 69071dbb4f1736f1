"""Pairs of tokens beside a naive search, anchors and what they are invariant to, and scores beside naive ones."""

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import auroc, fit_probe
from saelab.universality.paired_spaces import (
    CHANNELS,
    AlignedActivations,
    Anchors,
    align_activations,
    choose_anchors,
    score_pairs,
)

HOOK = "blocks.1.hook_resid_post"
TEXTS = [f"The {a} {v} the {b}. One {b} was happy." for a in ("cat", "dog", "owl") for b in ("fox", "hen") for v in
         ("saw", "met")]  # fmt: skip


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(draw(seed, d, d).double()).Q


# ---- pairs of tokens
@pytest.fixture(scope="module")
def words():
    return sl.load_model("tales", progress=False)


def collected(model, mask=None, **how):
    tokens = sl.tokenize(model, TEXTS, ctx_len=64, **{"packed": False, **how})
    return tokens, sl.collect(model, tokens, HOOK, mask=mask or sl.TokenMask(), progress=False)


def spans(model, acts, rows=None):
    """Document, first and last character of each row, white space aside, from the strings one by one."""
    ids, docs = acts.token_ids.tolist(), acts.doc_ids.tolist()
    strings = sl.lm.tokenizers.token_strings(model.tokenizer, set(ids))
    found, at = [], {}
    for token, doc in zip(ids, docs, strict=True):
        size = len("".join(strings[token].split()))
        begin = at.get(doc, 0)
        at[doc] = begin + size
        found.append((doc, begin, begin + size) if size else None)
    return found


@pytest.mark.parametrize("match", ["ends", "same"])
def test_tokens_of_two_tokenizers_are_paired_by_their_characters(tiny, words, match) -> None:
    (_, a), (_, b) = collected(words), collected(tiny, packed=True)
    found = align_activations(a, b, (words, tiny), match=match)

    def key(span):
        return span and (span if match == "same" else (span[0], span[2]))

    theirs = {key(span): j for j, span in enumerate(spans(tiny, b)) if span}
    expected = [(i, theirs[key(span)]) for i, span in enumerate(spans(words, a)) if span and key(span) in theirs]
    assert list(zip(found.rows_a.tolist(), found.rows_b.tolist(), strict=True)) == expected
    assert len(expected) == (len(a) if match == "ends" else len(expected)) > 10
    assert torch.equal(found.a[:], a[found.rows_a]) and torch.equal(found.b[:], b[found.rows_b])
    assert torch.equal(found.b.token_ids, found.a.token_ids) and found.b.provenance == b.provenance
    assert found.alignment is not None and "pairs of rows that" in str(found)
    assert found.to_dict()["n_pairs"] == len(found)


def test_a_crosscoder_reads_the_pairs_lazily_or_copied(tiny, words) -> None:
    (_, a), (_, b) = collected(words), collected(tiny, packed=True)
    found = align_activations(a, b, (words, tiny))
    copied = sl.Activations.join({"words": found.a, "bytes": found.b}, {"bytes": torch.arange(len(found))})
    lazy = sl.Activations.join({"words": a, "bytes": b}, {"words": found.rows_a, "bytes": found.rows_b})
    assert torch.equal(copied[:], lazy[:]) and torch.equal(copied.doc_ids, lazy.doc_ids)


def test_the_same_tokens_are_their_own_partners_where_both_masks_kept_them(tiny) -> None:
    tokens, a = collected(tiny)
    _, b = collected(tiny, mask=sl.TokenMask(positions=(4, None)))
    whole = align_activations(a, a, (tiny, tiny))
    assert whole.alignment is None and torch.equal(whole.rows_a, torch.arange(len(a)))
    found = align_activations(a, b, (tiny, tiny), tokens=(tokens, tokens))
    assert len(found) == len(b) and bool((a.positions[found.rows_a] >= 4).all())
    assert torch.equal(found.a[:], found.b[:])


def test_text_that_a_mask_left_out_is_read_from_the_tokens(tiny, words) -> None:
    tokens, a = collected(words)
    tokens_b, b = collected(tiny, mask=sl.TokenMask(positions=(8, 30)))
    with pytest.raises(ValueError, match="documents in common"):
        align_activations(a, b, (words, tiny))
    found = align_activations(a, b, (words, tiny), tokens=(tokens, tokens_b))
    whole = align_activations(a, collected(tiny)[1], (words, tiny))
    positions = collected(tiny)[1].positions[whole.rows_b]
    assert torch.equal(found.rows_a, whole.rows_a[(positions >= 8) & (positions < 30)])
    with pytest.raises(ValueError, match="`tokens` must be those that `b` was collected from"):
        align_activations(a, b, (words, tiny), tokens=(tokens, tokens_b[:3]))


def test_what_cannot_be_aligned_is_refused(tiny, words) -> None:
    (_, a), (_, b) = collected(words), collected(tiny)
    with pytest.raises(ValueError, match="`a` must know tokens, documents and positions"):
        align_activations(sl.Activations.from_tensor(a[:]), b, (words, tiny))
    with unchecked(), pytest.raises(ValueError, match="`match` must be one of"):
        align_activations(a, b, (words, tiny), match="begins")  # type: ignore[arg-type]
    assert isinstance(align_activations(a, b, (words, tiny)), AlignedActivations)


# ---- anchors
def naive(x, rows, channel):
    x, rows = x.double().numpy(), rows.double().numpy()
    if channel == "cosine":
        x, rows = x - rows.mean(0), rows - rows.mean(0)
        return [[p @ q / np.linalg.norm(p) / np.linalg.norm(q) for q in rows] for p in x]
    order = {"euclidean": 2, "l1": 1, "linf": np.inf}[channel]
    n = len(rows)
    typical = np.mean([np.linalg.norm(rows[i] - rows[j], order) for i in range(n) for j in range(n) if i != j])
    return [[1 - np.linalg.norm(p - q, order) / typical for q in rows] for p in x]


@pytest.mark.parametrize("channel", CHANNELS)
def test_similarities_are_their_formulas(channel) -> None:
    x = draw(0, 40, 6) + 1
    anchors = Anchors(x[:12])
    found = anchors.relate(x, channel)
    assert np.allclose(found, naive(x, x[:12], channel), atol=1e-6)
    assert np.allclose(found[:12].diagonal(), 1, atol=1e-6)
    scaled = anchors.relate(x[:12], channel, scaled=True)
    others = scaled[~torch.eye(12, dtype=torch.bool)]
    assert abs(float(others.mean())) < 1e-5 and float(others.std()) == pytest.approx(1, abs=1e-5)


def test_a_product_is_its_channels_side_by_side() -> None:
    x = draw(1, 30, 5)
    anchors = Anchors(x[:8])
    together = anchors.relate(x, CHANNELS)
    assert torch.equal(together, torch.cat([anchors.relate(x, name, scaled=True) for name in CHANNELS], 1))
    plain = anchors.relate(x, ("cosine", "l1"), scaled=False)
    assert torch.equal(plain[:, :8], anchors.relate(x)) and plain.shape == (30, 16)


def test_each_channel_does_not_change_with_what_it_is_invariant_to() -> None:
    x = draw(2, 60, 7).double()
    turned = 3 * x @ rotation(3, 7) + draw(4, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    flipped = 0.5 * x[:, order] * torch.tensor([1, -1, 1, -1, 1, 1, -1]) + draw(6, 7)

    def change(channel, other):
        return float((Anchors(x[:20]).relate(x, channel) - Anchors(other[:20]).relate(other, channel)).abs().max())

    assert change("cosine", turned) < 1e-6 and change("euclidean", turned) < 1e-6
    assert all(change(name, flipped) < 1e-6 for name in CHANNELS)
    assert min(change("l1", turned), change("linf", turned)) > 0.01  # no rotation
    stretched = x.clone()
    stretched[20:] = x[:20].mean(0) + 5 * (x[20:] - x[:20].mean(0))  # rows farther out, anchors as they were
    assert change("cosine", stretched) < 1e-6 < 0.1 < change("euclidean", stretched)


def test_a_product_is_no_worse_than_its_best_channel_where_concepts_need_several() -> None:
    # One concept is an angle, the other the distance from the mean; distances are disturbed in the other space, so
    # that cosines carry the first best, and only distances the second.
    n, d, n_anchors = 4000, 6, 60
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g)
    truth = torch.stack([x[:, 0] / x.norm(dim=1) > 0.3, x.norm(dim=1) > 2.4], 1)
    y = (x * torch.exp(0.35 * torch.randn(n, 1, generator=g))) @ rotation(1, d).float()
    learn, test = slice(n_anchors, n // 2), slice(n // 2, n)

    def score(channels):
        probe = fit_probe(Anchors(x[:n_anchors]).relate(x[learn], channels), truth[learn].float(), standardize=True)
        scores = probe(Anchors(y[:n_anchors]).relate(y[test], channels))
        return np.array([auroc(scores[:, i].numpy(), truth[test, i].numpy()) for i in range(2)])

    single = {name: score(name) for name in CHANNELS}
    product = score(CHANNELS)
    # an AUROC of 2,000 rows has a standard deviation of at most 1 / (2 sqrt(n_true)), .025 for the rarer concept
    assert product.mean() > max(one.mean() for one in single.values()) - 0.025
    assert single["cosine"][1] < 0.6 < product[1] and single["cosine"][0] > single["l1"][0] - 0.025


def test_anchors_are_different_rows_and_reproducible() -> None:
    x = torch.cat([draw(0, 50, 3), torch.zeros(30, 3)])  # equal rows too
    before = torch.get_rng_state()
    for method in ("random", "kmeans", "farthest"):
        found = choose_anchors(x[:52], 51, method)
        assert len(found.unique()) == 51 and torch.equal(found, choose_anchors(x[:52], 51, method))
        assert bool((found.diff() > 0).all())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(choose_anchors(x, 9, seed=0), choose_anchors(x, 9, seed=1))


def test_far_anchors_are_far_and_central_ones_one_of_each_cluster() -> None:
    centers = 10 * torch.eye(5)
    x = centers.repeat_interleave(20, 0) + 0.1 * draw(0, 100, 5)
    for method in ("kmeans", "farthest"):
        assert sorted((choose_anchors(x, 5, method) // 20).tolist()) == [0, 1, 2, 3, 4]
    start = int(choose_anchors(x, 2, "farthest", seed=3)[0])
    assert start in range(100)
    chosen = choose_anchors(draw(1, 40, 2), 6, "farthest").tolist()
    x = draw(1, 40, 2)
    gaps = {i: min(float((x[i] - x[j]).norm()) for j in chosen if j != i) for i in chosen}
    rest = max(min(float((x[i] - x[j]).norm()) for j in chosen) for i in range(40))
    assert min(gaps.values()) >= rest - 1e-6  # no other row was farther from all


def test_wrong_anchors_are_refused() -> None:
    x = draw(0, 10, 3)
    for n in (1, 11):
        with pytest.raises(ValueError, match=r"`n` must be at least 2 and at most the number of rows \(10\)"):
            choose_anchors(x, n)
    with unchecked(), pytest.raises(ValueError, match="`method` must be one of"):
        choose_anchors(x, 3, "best")  # type: ignore[arg-type]
    for rows in (x[:1], x[:1].expand(4, 3), torch.full((3, 3), torch.nan)):
        with pytest.raises(ValueError, match="Anchors must be at least 2 rows"):
            Anchors(rows)
    with pytest.raises(ValueError, match=r"as wide as the anchors \(3\), got 4"):
        Anchors(x).relate(draw(0, 5, 4))
    with unchecked(), pytest.raises(ValueError, match="`channels` must be among"):
        Anchors(x).relate(x, "l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`channels` must be among"):
        Anchors(x).relate(x, ())


# ---- scores of pairs
def test_scores_are_their_formulas() -> None:
    y = draw(0, 60, 5)
    x = y + draw(1, 60, 5)
    found = score_pairs(x, y, n_shuffles=20)
    a, b = x.double().numpy() - y.double().numpy().mean(0), y.double().numpy() - y.double().numpy().mean(0)
    cosines = np.array([[p @ q / np.linalg.norm(p) / np.linalg.norm(q) for q in b] for p in a])
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(cosines)]
    assert found["r2"].value == pytest.approx(1 - ((a - b) ** 2).sum() / (b**2).sum())
    assert found["cosine"].value == pytest.approx(cosines.diagonal().mean())
    assert found["mean_rank"].value == pytest.approx(np.mean(ranks))
    assert found["top1"].value == pytest.approx(np.mean(np.array(ranks) == 1))
    assert all(one.p == 1 / 21 for one in found.scores.values())  # none of 20 shuffles reaches any
    assert found["mean_rank"].chance_95 < found["mean_rank"].chance and "top1" in str(found)


def test_unrelated_rows_score_as_shuffled_ones() -> None:
    found = score_pairs(draw(0, 500, 4), draw(1, 500, 4), n_shuffles=200)
    # of a permutation of n ranks the mean has deviation n / sqrt(12 n): 4 of them
    assert abs(found["mean_rank"].value - 250.5) < 4 * 500 / (12 * 500) ** 0.5
    assert abs(found["mean_rank"].chance - 250.5) < 4 * 500 / (12 * 500 * 200) ** 0.5
    assert found["top1"].value < 0.02 and abs(found["cosine"].value) < 4 / (500 * 4) ** 0.5


def test_ties_share_and_what_means_nothing_is_nan_with_its_reason() -> None:
    y = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -3]])
    found = score_pairs(y, y, n_shuffles=5)
    assert found["top1"].value == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found["mean_rank"].value == pytest.approx((1.5 + 1.5 + 1 + 1) / 4)
    flat = score_pairs(draw(0, 5, 2), torch.ones(5, 2), n_shuffles=5)
    assert np.isnan(flat["r2"].value) and flat["top1"].note == "all rows of y are equal"
    alone = score_pairs(y, y, n_shuffles=0)
    assert alone["r2"].value == 1 and np.isnan(alone["r2"].chance) and alone["r2"].note == "not shuffled"
    for x in (draw(0, 4, 3), y[:2], torch.full((4, 2), torch.nan)):
        with unchecked(), pytest.raises(ValueError, match="`x` and `y` must be"):
            score_pairs(x, y[: len(x)])
    with pytest.raises(ValueError, match="`n_shuffles` must be at least 0, got -3"):
        score_pairs(y, y, n_shuffles=-3)


def test_neighbors_are_shuffled_in_blocks_where_documents_are_known() -> None:
    # rows that hardly differ from their neighbors: rows of one document agree in any shuffled pairing by blocks
    y = draw(0, 40, 4).repeat_interleave(50, 0) + 0.01 * draw(1, 2000, 4)
    documents = np.arange(40).repeat(50)
    one, blocks = score_pairs(y, y, n_shuffles=20), score_pairs(y, y, doc_ids=documents, n_shuffles=20)
    assert blocks.in_blocks and not one.in_blocks
    assert np.isfinite(blocks["r2"].chance) and blocks["r2"].value == 1


def test_far_anchors_are_different_rows_also_where_rows_are_equal() -> None:
    for rows in (torch.ones(9, 2), torch.eye(3).repeat(3, 1)):
        assert len(set(choose_anchors(rows, 8, "farthest").tolist())) == 8


@pytest.mark.parametrize("method", ["kmeans", "farthest"])
def test_anchors_that_distances_choose_must_be_of_finite_rows(method) -> None:
    x = draw(0, 30, 3)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match=f"`x` must be finite for anchors by '{method}'"):
        choose_anchors(x, 5, method)
    assert len(choose_anchors(x, 5)) == 5


def test_channels_of_anchors_as_far_from_each_other_are_not_blown_up() -> None:
    for rows in (draw(0, 2, 3), torch.eye(3)):
        assert Anchors(rows).relate(rows, CHANNELS).abs().max() < 10
