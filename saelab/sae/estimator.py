"""`SparseCoder`: an SAE as a scikit-learn transformer, for arrays and pipelines.

The only module of the package that imports scikit-learn at import time; no other module imports it.
"""

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from saelab.functional.metrics import ReconstructionSums
from saelab.sae.activation_functions import TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.archetypal import Archetypal
from saelab.sae.config import Dictionary, Init, RandomPrefixes, SAEConfig
from saelab.sae.normalizer import NormalizerKind
from saelab.sae.sae import SAE
from saelab.sae.soft_frozen import SoftFrozen
from saelab.training.config import TrainConfig

ROWS = 8192  # encoded at a time


class SparseCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A sparse autoencoder as a scikit-learn transformer: `transform` returns sparse codes of rows, `inverse_transform`
    reconstructions.

    `transform` gives the codes (n_samples, d_sae), a scipy CSR matrix with `sparse_output`; `inverse_transform` their
    reconstructions; `score` the explained variance, so that searches over parameters work. Computes in float32. Fitted,
    it has `sae_` (the `SAE`), `components_` (what a code of 1 adds, by latent) and `n_features_in_`.

    >>> coder = SparseCoder(d_sae=16, activation=TopK(k=2), n_tokens=2000)
    >>> X = np.random.default_rng(0).normal(size=(200, 4))
    >>> coder.fit_transform(X).shape, coder.inverse_transform(coder.transform(X)).shape
    ((200, 16), (200, 4))
    """

    def __init__(
        self,
        d_sae: int | None = None,
        activation: Activation | None = None,
        *,
        prefixes: tuple[int, ...] | RandomPrefixes | None = None,
        dictionary: Dictionary | Archetypal | SoftFrozen = "unit",
        normalizer: NormalizerKind = "scale",
        init: Init = "tied",
        n_tokens: int = 200_000,
        batch_size: int = 1024,
        lr: float | None = None,
        sparse_output: bool = False,
        random_state: Any = 0,
    ) -> None:
        """Store the parameters; `fit` checks them.

        Args:
            d_sae: number of latents; None is 8 per input feature.
            activation: activation function; None is `TopK` with k a quarter of the input features, at most 32.
            prefixes: Matryoshka prefixes, as in `SAEConfig`.
            dictionary: constraint on the dictionary's rows, as in `SAEConfig`.
            normalizer: as in `SAEConfig`.
            init: initial dictionary, as in `SAEConfig`.
            n_tokens: rows to train on in total; shorter data is passed over several times.
            batch_size: rows per step, at most all.
            lr: peak learning rate; None derives it from widths and length, see `TrainingSAE.default_lr`.
            sparse_output: whether `transform` returns a CSR matrix.
            random_state: seed or generator for weights and order of rows.
        """
        self.d_sae = d_sae
        self.activation = activation
        self.prefixes = prefixes
        self.dictionary = dictionary
        self.normalizer = normalizer
        self.init = init
        self.n_tokens = n_tokens
        self.batch_size = batch_size
        self.lr = lr
        self.sparse_output = sparse_output
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "SparseCoder":
        """Train an SAE on the rows of X (n_samples, n_features) and return self; y is ignored."""
        rows = torch.from_numpy(validate_data(self, X, dtype=np.float32, ensure_min_samples=2))
        d_in = rows.shape[1]
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=self.d_sae or 8 * d_in,
            activation=self.activation or TopK(k=min(32, max(1, d_in // 4))),
            prefixes=self.prefixes,
            dictionary=self.dictionary,
            normalizer=self.normalizer,
            init=self.init,
        )
        if self.n_tokens < 1:
            raise ValueError(f"`n_tokens` must be at least 1, got {self.n_tokens}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        size = min(self.batch_size, len(rows))
        budget = TrainConfig(n_tokens=max(self.n_tokens, size), batch_size=size, lr=self.lr, seed=seed, n_held_out=0)
        self.sae_ = SAE(cfg, seed=seed).fit(rows, budget, progress=False)
        self.components_ = self.sae_.directions().numpy()
        self._n_features_out = cfg.d_sae
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> Any:
        """Codes of the rows of X, signed for a signed activation: a dense array, or CSR with `sparse_output`."""
        from scipy.sparse import csr_matrix, vstack

        parts = [self.sae_.encode_sparse(rows) for rows in self._rows(X).split(ROWS)]
        if not self.sparse_output:
            return np.concatenate([codes.to_dense().numpy() for codes in parts])
        columns = [tuple(part.numpy() for part in (codes.values, codes.indices, codes.offsets)) for codes in parts]
        shapes = [(len(codes), codes.d_sae) for codes in parts]
        return vstack([csr_matrix(c, shape=shape) for c, shape in zip(columns, shapes, strict=True)], format="csr")

    @torch.no_grad()
    def inverse_transform(self, Z: Any) -> np.ndarray:
        """Reconstructions (n_samples, n_features) of codes, dense or sparse."""
        check_is_fitted(self)
        codes = check_array(Z, accept_sparse="csr", dtype=np.float32)
        return np.concatenate([self._decode(codes[i : i + ROWS]) for i in range(0, codes.shape[0], ROWS)])

    @torch.no_grad()
    def score(self, X: Any, y: Any = None) -> float:
        """Explained variance of the rows of X, 1 - FVU; at most 1, higher is better, 0 is as good as predicting the
        mean.
        """
        sums = ReconstructionSums(self.n_features_in_)
        for rows in self._rows(X).split(ROWS):
            sums.add(rows, self.sae_(rows))
        return sums.explained_variance

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, dtype=np.float32, reset=False))

    def _decode(self, codes: Any) -> np.ndarray:
        dense = codes.toarray() if hasattr(codes, "toarray") else codes
        return self.sae_.decode(torch.from_numpy(np.ascontiguousarray(dense))).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
