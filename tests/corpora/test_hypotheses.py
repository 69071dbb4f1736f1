"""Hypotheses of planted differences hold in the other half of documents; those of chance do not."""

import numpy as np
import pytest
from corpora_made import harvest_codes

from saelab.corpora import pool_documents, propose_hypotheses

N, D = 400, 30


def corpora(folder, seed: int = 0, difference: float = 0.5):
    """Documents of two corpora; features 0 and 1 fire more often in b, 2 in a, 3 wherever 0 does."""
    rng = np.random.default_rng(seed)
    in_b = np.arange(N) >= N // 2
    rates = np.full((N, D), 0.3)
    rates[:, 0] += difference * in_b
    rates[:, 1] += difference / 2 * in_b
    rates[:, 2] += difference * ~in_b
    fires = rng.random((N, D)) < rates
    fires[:, 3] = fires[:, 0] ^ (rng.random(N) < 0.02)
    documents = pool_documents(harvest_codes(fires * rng.uniform(1, 2, (N, D)), np.arange(N), folder))
    return documents.rows(~in_b), documents.rows(in_b)


def test_planted_differences_hold_in_held_out_documents(tmp_path) -> None:
    a, b = corpora(tmp_path)
    labels = {0: "rain", 2: "ships", 3: "rain again"}
    found = propose_hypotheses(a, b, labels, names=("old", "new"))
    rows = {row.feature: row for row in found.rows}
    assert set(rows) >= {2} and len(set(rows) & {0, 3}) == 1, "0 and 3 say the same: the surer one stands for both"
    assert all(rows[j].holds for j in set(rows) & {0, 2, 3})
    assert rows[2].more_in == "old" and rows[2].delta.high < 0 and rows[2].rate_a > rows[2].rate_b
    assert rows[2].text.startswith("old has more of: ships (in ")
    assert found.n_chosen_on == (100, 100) and found.n_held_out == (100, 100)
    assert found.auroc > 0.75 > found.auroc_random[0] and found.auroc_random[0] <= found.auroc_random[1]
    assert "hypotheses hold in 200 held-out documents" in str(found) and "ships" in str(found)


def test_scores_are_of_other_documents_than_the_choice(tmp_path) -> None:
    """With every difference left to chance and any level allowed, what was chosen for its size is gone elsewhere."""
    chosen, held_out, areas, n_holds, n = [], [], [], 0, 0
    for seed in range(6):
        a, b = corpora(tmp_path / str(seed), seed + 100, difference=0.0)
        found = propose_hypotheses(a, b, fdr=0.999, n=3, seed=seed)
        chosen += [abs(row.chosen_delta.value) for row in found.rows]
        signs = [np.sign(row.chosen_delta.value) for row in found.rows]
        held_out += [sign * row.delta.value for sign, row in zip(signs, found.rows, strict=True)]
        areas.append(found.auroc)
        n_holds, n = n_holds + sum(row.q <= 0.05 for row in found.rows), n + len(found.rows)
    assert n >= 6 and np.mean(chosen) > 0.1
    # the standard error of one held-out delta is about .07 with 100 documents of each corpus
    assert abs(np.mean(held_out)) < 4 * 0.07 / n**0.5 and n_holds <= 3
    assert abs(np.mean(areas) - 0.5) < 4 * 0.041 / 6**0.5  # and that of one AUROC .041


def test_corpora_of_one_kind_give_no_hypotheses(tmp_path) -> None:
    a, b = corpora(tmp_path, 7, difference=0.0)
    found = propose_hypotheses(a, b, fdr=0.001)
    assert found.rows == () and found.auroc == 0.5 and "0 of 0 hypotheses" in str(found)


def test_larger_codes_in_as_many_documents_are_called_stronger(tmp_path) -> None:
    rng = np.random.default_rng(8)
    sizes = rng.uniform(1, 2, (120, 3))
    sizes[60:, 1] += 1
    documents = pool_documents(harvest_codes(sizes, np.arange(120), tmp_path))
    found = propose_hypotheses(documents.rows(np.arange(60)), documents.rows(np.arange(60, 120)), {1: "rain"})
    assert found.rows[0].text == "b has stronger: rain (in 100% of its documents, as in a)" and found.rows[0].holds


def test_too_few_documents_are_refused(tmp_path) -> None:
    a, b = corpora(tmp_path)
    with pytest.raises(ValueError, match="at least 4 documents of each"):
        propose_hypotheses(a, b.rows(np.arange(3)))
