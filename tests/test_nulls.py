"""Nulls that are reported beside results: near chance where a structure tempts them, below the result where it is real.

Those of probes, `compare` and rules are tested with them (`-k "null or periodic"` in test_selection, test_compare,
test_rules), those of stability in test_stability, too; those of effects of steering, attribution and patching and of
scores of concepts in test_nulls_of_effects.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from torch.nn.functional import normalize

import saelab as sl
from saelab.functional.indices import permute_within
from saelab.functional.statistics import rank_correlation
from saelab.labels.autointerp.clients import Answer
from saelab.labels.autointerp.example_windows import ExampleConfig, build_case
from saelab.labels.autointerp.requests import RequestConfig, RequestQueue
from saelab.labels.autointerp.response_cache import make_key
from saelab.labels.autointerp.scorers import SCORERS
from saelab.labels.autointerp.token_prediction import token_baseline
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure
from saelab.stores.feature_store import Feature
from saelab.universality.representation_similarity import compare_spaces
from saelab.universality.seed_comparison import seed_stability

N_TOKENS, DOC = 16_000, 80


class Planted(sl.FeatureStore):
    """Codes in memory."""

    def __init__(self, codes: csc_matrix, text: StoredText) -> None:
        self.codes, self._starts, self.folder = codes, [0, codes.shape[0]], Path("planted")
        statistics = measure(codes.shape[1], [(codes.indptr, codes.data)])
        self.__dict__.update(text=text, places=np.arange(len(text), dtype=np.int32), statistics=statistics)

    @property
    def d_sae(self) -> int:
        return int(self.codes.shape[1])

    def columns(self, start: int = 0, stop: int | None = None) -> csc_matrix:
        return self.codes[:, start:stop]

    def feature(self, j: int) -> Feature:
        column = self.codes[:, [j]]
        return Feature(column.indices.astype(np.int64), column.data, self, j)


def planted(codes: np.ndarray, ids: np.ndarray, doc: int = DOC) -> Planted:
    """A store of codes on tokens `w0`, `w1`, ..., in documents of equal length."""
    at = np.arange(len(ids), dtype=np.int32)
    strings = {i: f" w{i}" for i in range(int(ids.max()) + 1)}
    text = StoredText(token_ids=ids.astype(np.int32), doc_ids=at // doc, positions=at % doc, strings=strings)
    return Planted(csc_matrix(codes.astype(np.float32)), text)


# --- codes simulated from tokens


@pytest.mark.parametrize("period", [2, 8, 80])
def test_chance_of_token_tables_falls_on_periodic_text(period):
    """Every document is one template, so that a shift by whole periods puts each code on its own token again."""
    ids = np.arange(N_TOKENS) % period
    codes = np.stack([ids == 1, np.where(ids == 1, 1.0, -0.5 * (ids == 0))], 1)
    found = token_baseline(planted(codes, ids))
    assert found.by_token.min() > 0.99
    # a hundred held-out documents, each turned round by one step: r is 1 in a share 1 / period of them
    bound = 4 * 1.2 / np.sqrt(100 * (period - 1))
    assert np.abs(found.by_token_chance).max() < bound and np.abs(found.by_pair_chance).max() < bound


def test_chance_of_token_tables_is_not_raised_by_frequent_tokens():
    """A feature of the most frequent token, and one of nothing that fires as often."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 51)
    ids = rng.choice(50, N_TOKENS, p=share / share.sum())
    codes = np.stack([ids == 0, rng.random(N_TOKENS) < (ids == 0).mean()], 1)
    found = token_baseline(planted(codes, ids))
    bound = 4 / np.sqrt(N_TOKENS / 2)
    assert found.by_token[0] > 0.99 and abs(found.by_token[1]) < 4 * bound  # fifty means of a table are noise
    assert np.abs(found.by_token_chance).max() < 2 * bound


# --- spaces


def wander(seed: int, n: int, d: int, memory: float = 0.9) -> np.ndarray:
    """Rows of which each is much like the one before."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    for i in range(1, n):
        x[i] = memory * x[i - 1] + np.sqrt(1 - memory**2) * x[i]
    return x


def test_neighboring_rows_are_no_facts_of_their_own():
    """Two unrelated texts whose activations change slowly: pairs shuffled one by one call that alike."""
    n, names = 6_400, ["linear_cka", "procrustes", "svcca"]
    docs = np.arange(n) // 800
    p = {kind: [] for kind in ("single", "blocks")}
    for seed in range(6):
        x, y = wander(2 * seed, n, 3), wander(2 * seed + 1, n, 3)
        for kind, doc_ids in (("single", None), ("blocks", docs)):
            found = compare_spaces(x, y, doc_ids=doc_ids, measures=names, n_shuffles=39, seed=seed, progress=False)
            p[kind] += [score.p for score in found.scores.values()]
    assert np.mean(np.array(p["single"]) <= 0.05) > 0.5  # what tempts
    # three measures of six pairs of spaces, counted as six: of those at most three are below .05 (p < .002)
    assert np.mean(np.array(p["blocks"]) <= 0.05) < 0.5 and np.mean(p["blocks"]) > 0.5 - 4 * 0.29 / np.sqrt(6)
    x = wander(0, n, 3)
    same = compare_spaces(x, x[:, ::-1] + wander(1, n, 3), doc_ids=docs, measures=names, n_shuffles=39, progress=False)
    assert all(score.p == pytest.approx(1 / 40) and score.excess > 0.1 for score in same.scores.values())
    assert "in blocks" in str(same)


def test_documents_of_rows_must_be_as_many():
    with pytest.raises(ValueError, match="`doc_ids` must be one"):
        compare_spaces(wander(0, 20, 2), wander(1, 20, 2), doc_ids=np.arange(3))


# --- stability


def test_crowded_dictionaries_are_no_more_alike_than_chance_says():
    """Untrained dictionaries crowd where the data lie: cosines are high, and `alike` says by how much."""
    g, axes = torch.Generator().manual_seed(0), torch.tensor([6.0, 4.0, 2.0] + [0.3] * 13)
    saes = []
    for _ in range(3):
        sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=64, activation=sl.TopK(k=4), normalizer="none"))
        with torch.no_grad():
            sae.W_dec.copy_(normalize(torch.randn(64, 16, generator=g) * axes, dim=1))
        saes.append(sae)
    found = seed_stability(saes)
    trained, random, alike = (float(one.matched.mean()) for one in (found.trained, found.random, found.matched_random))
    assert trained > random + 0.1  # what tempts
    assert abs(trained - alike) < 4 * float(found.matched_random.features.std()) / np.sqrt(64)


# --- attribution's agreement with exact effects


def test_estimates_of_another_feature_agree_no_more_than_shuffled_ones():
    """Positions differ in how much they matter, which alone makes estimates and effects agree: the null keeps that."""
    rng = np.random.default_rng(0)
    positions = np.repeat(np.arange(8), 60)
    exact = rng.standard_normal(480) + positions
    for estimates, real in ((positions + rng.standard_normal(480), False), (exact + 0.2, True)):
        found = rank_correlation(estimates, exact)
        shuffled = np.mean([rank_correlation(estimates[permute_within(positions, rng)], exact) for _ in range(20)])
        within = [rank_correlation(estimates[positions == i], exact[positions == i]) for i in range(8)]
        assert (found - shuffled > 0.05) == real and (np.mean(within) > 4 / np.sqrt(480)) == real


# --- scores of labels: answers that look at everything but the label


def rows_of(prompt: str) -> list[dict]:
    return [json.loads(line) for line in prompt.splitlines() if line.startswith("{") and '"label"' not in line]


class Cheat:
    """Says yes by something else than what the label says."""

    def __init__(self, name: str) -> None:
        self.name, self.settings = name, {"model": name}

    def complete(self, messages) -> Answer:
        make_key(self.settings, messages)
        prompt = messages[0]["content"]
        rows = rows_of(prompt)
        if "[number, token]" in prompt:
            tokens = [token for row in rows for token in row["text"]]
            words = [word for _, word in tokens]
            said = {
                "most frequent": [words.count(word) == max(map(words.count, words)) for word in words],
                "marks": [i % 24 == 12 for i in range(len(words))],
                "first half": [i < len(words) // 2 for i in range(len(words))],
                "every other": [i % 2 == 0 for i in range(len(words))],
            }[self.name]
            return Answer(text=json.dumps({str(n): 9 for (n, _), yes in zip(tokens, said, strict=True) if yes}))
        if "pairs of texts" in prompt:
            sides = [(self.score(row["first"], i), self.score(row["second"], i + 1)) for i, row in enumerate(rows)]
            return Answer(text=json.dumps([1 if a >= b else 2 for a, b in sides]))
        if "the intruder" in prompt:
            return Answer(
                text=json.dumps([1 + int(np.argmax([self.score(row["text"], i) for i, row in enumerate(rows)]))])
            )
        scores = [self.score(row["text"], i, len(rows)) for i, row in enumerate(rows)]
        return Answer(text=json.dumps([int(score > np.median(scores)) for score in scores]))

    def score(self, text: str, i: int, n: int = 10) -> float:
        words = re.sub(r"<\*|\*>", "", text).split()
        return {
            "most frequent": float(words.count("w0")),
            "marks": float(text.count("<*")) or float(len(words)),
            "first half": float(i < n / 2),
            "every other": float(i % 2),
        }[self.name]


@pytest.fixture(scope="module")
def periodic():
    """Six features, each of one token, that stand at fixed places of every document among frequent fillers."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 41)
    ids = rng.choice(40, N_TOKENS, p=share / share.sum())
    at = np.arange(N_TOKENS) % 40
    codes = np.zeros((N_TOKENS, 6))
    for j in range(6):
        here = (at == 3 * j) & (rng.random(N_TOKENS) < 0.5)
        ids[here] = 40 + j
        codes[here, j] = rng.gamma(4.0, 0.25, here.sum()) + 0.1
    store = planted(codes, ids)
    train = store.split()
    return [build_case(store, j, 1, train, ExampleConfig(n_scored=2)) for j in range(6)]


@pytest.mark.parametrize("cheat", ["most frequent", "marks", "first half", "every other"])
def test_what_is_not_in_the_label_tells_nothing(periodic, cheat, tmp_path):
    queue = RequestQueue(Cheat(cheat), tmp_path / "answers.jsonl", RequestConfig(wait=0.01), progress=False)
    for name, kind in SCORERS.items():
        replies = kind(queue, 0).score([f"w{40 + j}" for j in range(6)], periodic)
        above = np.array([reply.value.value - reply.value.chance for reply in replies])
        # twenty windows or ten pairs a label: .5 / sqrt(10) each at most; tokens of simulation are many more
        assert abs(above.mean()) < 4 * (0.5 / np.sqrt(10) if name != "simulation" else 0.1) / np.sqrt(6), name
