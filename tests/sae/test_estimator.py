"""An SAE with scikit-learn's manners: its own checks of an estimator, and what they do not look at."""

import pickle

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from saelab.sae.estimator import SparseCoder


def data(n=400, d=6):
    """Rows that are sums of few of ten atoms."""
    generator = np.random.default_rng(0)
    z = generator.exponential(size=(n, 10)) * (generator.random((n, 10)) < 0.2)
    return z @ generator.normal(size=(10, d)) + 3.0


# All checks apply and none is left out. The one that pytest reports as skipped, check_array_api_input, is about arrays
# of other libraries: it runs only where the environment sets SCIPY_ARRAY_API. Types are not checked at run time, for
# scikit-learn wants an estimator to take any value of a parameter until it is fitted. One thread: where several share a
# product, some processors round a row by its place among the others, and the check of row orders allows no rounding.
@parametrize_with_checks([SparseCoder(n_tokens=100)])
@unchecked()
def test_keeps_the_contract_of_scikit_learn(estimator, check):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check(estimator)
    finally:
        torch.set_num_threads(threads)


def test_it_is_the_sae_that_fit_gives():
    X = data()
    coder = SparseCoder(d_sae=20, activation=sl.AbsTopK(k=2), n_tokens=2000, batch_size=100).fit(X)
    assert isinstance(coder.sae_, sl.SAE) and coder.sae_.cfg.activation == sl.AbsTopK(k=2)
    x = torch.from_numpy(X.astype(np.float32))
    with torch.no_grad():
        assert np.array_equal(coder.transform(X), coder.sae_.encode_sparse(x).to_dense().numpy())
        np.testing.assert_allclose(
            coder.inverse_transform(coder.transform(X)), coder.sae_(x).numpy(), rtol=1e-5, atol=1e-6
        )
    assert np.array_equal(coder.components_, coder.sae_.directions().numpy())
    residual = ((X - coder.inverse_transform(coder.transform(X))) ** 2).sum()
    assert coder.score(X) == pytest.approx(1 - residual / ((X - X.mean(0)) ** 2).sum(), abs=1e-4)
    assert coder.score(X) > 0.5


def test_sparse_codes_are_the_dense_ones(monkeypatch):
    monkeypatch.setattr("saelab.sae.estimator.ROWS", 7)  # so that there are several parts
    X = data(50)
    dense = SparseCoder(n_tokens=500).fit(X)
    sparse = clone(dense).set_params(sparse_output=True).fit(X)
    codes = sparse.transform(X)
    assert codes.format == "csr" and np.array_equal(codes.toarray(), dense.transform(X))
    np.testing.assert_allclose(sparse.inverse_transform(codes), dense.inverse_transform(dense.transform(X)), rtol=1e-6)


def test_a_number_of_rows_below_one_is_refused():
    with pytest.raises(ValueError, match="`n_tokens` must be at least 1, got -1"):
        SparseCoder(n_tokens=-1).fit(data(20))


def test_same_seed_same_codes_and_the_global_state_stays():
    X, before = data(100), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    one, same, other = (SparseCoder(n_tokens=500, random_state=seed).fit(X).transform(X) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@unchecked()
def test_in_a_pipeline_a_search_and_a_pickle():
    X = data(200)
    pipeline = make_pipeline(StandardScaler(), SparseCoder(n_tokens=1000))
    names = list(pipeline.fit(X).get_feature_names_out())
    assert names[:2] == ["sparsecoder0", "sparsecoder1"] and len(names) == pipeline.transform(X).shape[1]
    search = GridSearchCV(SparseCoder(d_sae=20, n_tokens=1000), {"activation": [sl.TopK(k=1), sl.TopK(k=5)]}, cv=2)
    assert search.fit(X).best_params_["activation"] == sl.TopK(k=5)
    again = pickle.loads(pickle.dumps(pipeline))
    assert np.array_equal(again.transform(X), pipeline.transform(X))


def test_wrong_use_is_named():
    with pytest.raises(NotFittedError):
        SparseCoder().inverse_transform(np.ones((2, 8)))
    with pytest.raises(ValueError, match=r"`k` must be in 1\.\.d_sae"):
        SparseCoder(d_sae=3, activation=sl.TopK(k=4)).fit(data())
