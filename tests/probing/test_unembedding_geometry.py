"""Causal inner product: what whitening must do, its duality, planted independent concepts, and cosines by hand."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from unchecked import unchecked

import saelab as sl
from saelab.lm.unembedding import read_out
from saelab.probing.unembedding_geometry import CausalInnerProduct, causal_inner_product, compare_concepts
from saelab.visualization.linear_concept_plots import plot_concepts
from saelab.visualization.pictures import draw_picture

CASE = [(chr(i), chr(i).upper()) for i in range(ord("a"), ord("k"))]
DIGITS = [(str(i), str(i + 1)) for i in range(0, 8, 2)]


def plant(n=4000, d=6):
    """Rows that are independent concepts in a skewed basis."""
    generator = torch.Generator().manual_seed(0)
    skew = torch.eye(d) + 0.4 * torch.randn(d, d, generator=generator)
    rows = torch.randn(n, d, generator=generator) @ skew
    rows = rows - rows.mean(0)
    return CausalInnerProduct(rows.double().T @ rows.double() / n, rows, torch.arange(n)), skew


def test_independent_concepts_are_orthogonal_by_it_alone():
    product, skew = plant()
    white = normalize(product.whiten(skew), dim=1)
    off = ~torch.eye(6, dtype=torch.bool)
    plain = normalize(skew, dim=1)
    # of 4,000 rows a correlation has a standard error of .016
    assert float((white @ white.T)[off].abs().max()) < 0.08 < float((plain @ plain.T)[off].abs().max())


def test_whitened_rows_have_no_covariance():
    product, _ = plant()
    white = product.whiten(product.unembedding)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(6).double(), rtol=0, atol=1e-6)


def test_the_residual_stream_is_the_dual():
    product, skew = plant()
    a, b = skew[:2]
    torch.testing.assert_close(product.whiten_residual(product.to_residual(a)), product.whiten(a), rtol=1e-4, atol=1e-4)
    assert float(product.to_residual(a) @ b) == pytest.approx(float(product.whiten(a) @ product.whiten(b)), abs=1e-4)
    inverse = torch.linalg.inv(product.covariance)
    assert float(product.whiten(a) @ product.whiten(b)) == pytest.approx(
        float(a.double() @ inverse @ b.double()), abs=1e-6
    )


def test_directions_in_which_nothing_varies_have_no_part():
    product, _ = plant()
    rows = torch.cat([product.unembedding, torch.zeros(4000, 1)], 1)
    wider = CausalInnerProduct(rows.double().T @ rows.double() / 4000, rows, product.token_ids)
    assert (product.rank, wider.rank) == (6, 6) and wider.whiten(torch.eye(7)[6:]).abs().max() == 0


def test_the_model_s_rows_are_those_of_its_head_with_the_norm_folded_in(tiny):
    product = causal_inner_product(tiny)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    logits = read_out(tiny, x)[:, product.token_ids]
    torch.testing.assert_close(x @ product.unembedding.T, logits - logits.mean(1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_cosines_are_those_by_hand(tiny):
    found = compare_concepts(tiny, {"case": CASE, "digits": DIGITS}, n_random=3)
    product = causal_inner_product(tiny)
    ids = {name: torch.tensor([[sl.interventions.prompt_metrics.find_token(tiny, t) for t in pair] for pair in pairs])
           for name, pairs in (("case", CASE), ("digits", DIGITS))}  # fmt: skip
    place = {int(token): i for i, token in enumerate(product.token_ids)}
    apart = {}
    for name, pairs in ids.items():
        rows = product.unembedding[torch.tensor([[place[int(token)] for token in pair] for pair in pairs])]
        apart[name] = rows[:, 1] - rows[:, 0]
    means = torch.stack([apart["case"].mean(0), apart["digits"].mean(0)])
    for space, vectors in (("euclidean", means.double()), ("causal", product.whiten(means))):
        vectors = normalize(vectors, dim=1)
        assert found.cosines[space][0, 1] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-4)
        assert found.between(space) == pytest.approx(abs(found.cosines[space][0, 1]))
    digits = apart["digits"]
    others = [torch.cat([digits[:i], digits[i + 1 :]]).mean(0) for i in range(4)]
    left_out = [torch.cosine_similarity(one, other, dim=0).item() for one, other in zip(digits, others, strict=True)]
    assert found["digits"].euclidean == pytest.approx(np.mean(left_out), abs=1e-4)


def test_turning_a_concept_around_changes_no_agreement(tiny):
    ours = compare_concepts(tiny, {"case": CASE, "digits": DIGITS}, n_random=2)
    turned = compare_concepts(tiny, {"case": [pair[::-1] for pair in CASE], "digits": DIGITS}, n_random=2)
    assert ours["case"].causal == pytest.approx(turned["case"].causal, abs=1e-9)
    assert ours.cosines["causal"][0, 1] == pytest.approx(-turned.cosines["causal"][0, 1], abs=1e-9)


def test_random_pairs_agree_on_nothing(tiny):
    found = compare_concepts(tiny, {"case": CASE, "digits": DIGITS}, n_random=40)
    for space in ("causal", "euclidean", "embedding"):
        values = np.array(found.random_pairs[space])
        assert len(values) == 80 and abs(values.mean()) < 4 * values.std() / 80**0.5


def test_concepts_that_share_a_token_are_not_taken_as_independent(tiny):
    concepts = {"case": CASE, "more": [("a", "1"), ("x", "y")], "digits": DIGITS}
    assert compare_concepts(tiny, concepts, n_random=1).independent == (("case", "digits"),)
    asked = compare_concepts(tiny, concepts, independent=[("more", "case")], n_random=1)
    assert asked.independent == (("more", "case"),)


def test_results_are_saved_and_drawn(tiny, tmp_path):
    found = compare_concepts(tiny, {"<b>": CASE, "digits": DIGITS}, n_random=2)
    found.save(tmp_path / "found.json")
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["limits"] and set(kept["between"]) == {"causal", "euclidean", "embedding"}
    figure = plot_concepts(found)
    assert len(figure.data) == 2 and figure.layout.xaxis.ticktext[0] == "&lt;b&gt;" and draw_picture(figure)
    assert str(found).split("\n")[2].startswith("random concepts")


@unchecked()
@pytest.mark.parametrize(
    ("concepts", "settings", "complaint"),
    [
        ({"case": CASE}, {}, "two or more"),
        ({"case": CASE, "one": [("a", "b")]}, {}, "'one' must have 2 pairs"),
        ({"case": CASE, "same": [("a", "a"), ("b", "c")]}, {}, "different tokens"),
        ({"case": CASE, "digits": DIGITS}, {"independent": [("case", "what")]}, r"name concepts, got \['what'\]"),
    ],
)
def test_what_is_no_concept_is_refused(tiny, concepts, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare_concepts(tiny, concepts, **settings)
