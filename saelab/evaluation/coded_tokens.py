"""`CodedTokens`: codes of tokens in one dictionary, one column for each sign, with the vectors that they add up to.

With signs apart, a signed dictionary D with codes z is [D; -D] with codes [max(z, 0), max(-z, 0)], and formulas that
were written for codes of one sign hold for it as they stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evaluation.feature_classifiers import SAMPLE_TOKENS, encode_csr
from saelab.sae.baselines import check_baselines
from saelab.sae.initialization import prepare
from saelab.sae.sae import SAE

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True, eq=False)
class CodedTokens:
    """Sides of features that fire on some tokens: `x_hat = offset + codes rows`, all codes at least 0."""

    codes: "csr_matrix"
    """(n_tokens, n_sides)"""
    rows: Float[np.ndarray, "n_sides d_in"]
    """what a code of 1 adds; those of negative sides are minus the decoder row"""
    offset: Float[np.ndarray, "d_in"]
    """reconstruction of a token on which nothing fires"""
    features: Int[np.ndarray, "n_sides"]
    """feature of each side"""
    signs: Int[np.ndarray, "n_sides"]
    """1 or -1"""

    @classmethod
    def of(cls, sae: SAE, acts: Float[Tensor, "n_tokens d_in"]) -> "CodedTokens":
        """The codes of an SAE; ValueError for a transcoder, and where a feature adds another vector at every token."""
        if sae.cfg.d_in != acts.shape[1] or sae.cfg.d_out is not None:
            raise ValueError(f"An SAE must rebuild activations of width {acts.shape[1]}, got {sae!r}.")
        if isinstance(sae.output_scale(acts[:1].to(sae.device)), Tensor):
            raise ValueError(f"An SAE's features must be the same vectors at every token, got {sae.cfg.normalizer}.")
        with torch.no_grad():
            offset = sae.decode(torch.zeros(1, sae.cfg.d_sae, device=sae.device))[0].float().cpu().numpy()
        return cls.split(encode_csr(sae, acts), sae.directions().float().cpu().numpy(), offset)

    @classmethod
    def neurons(cls, acts: Float[Tensor, "n_tokens d_in"], center: Float[Tensor, "d_in"]) -> "CodedTokens":
        """The coordinates of the centered activations as codes."""
        from scipy.sparse import csr_matrix

        offset = center.float().cpu().numpy()
        return cls.split(csr_matrix(acts.float().cpu().numpy() - offset), np.eye(len(offset), dtype=np.float32), offset)

    @classmethod
    def split(cls, z: Any, rows: Float[np.ndarray, "n_features d_in"], offset: Any) -> "CodedTokens":
        """Codes (n_tokens, n_features) with both signs, one column for each sign that occurs."""
        from scipy.sparse import csr_matrix

        z = csr_matrix(z)
        negative = z.data < 0
        columns = np.where(negative, z.indices.astype(np.int64) + z.shape[1], z.indices)
        both = csr_matrix((np.abs(z.data), columns, z.indptr), shape=(z.shape[0], 2 * z.shape[1]))
        both.eliminate_zeros()
        fire = np.flatnonzero(np.bincount(both.indices, minlength=both.shape[1]))
        features, signs = fire % z.shape[1], np.where(fire < z.shape[1], 1, -1)
        return cls(both[:, fire], rows[features] * signs[:, None], np.asarray(offset), features, signs)

    def name(self, side: int) -> str:
        """A side's feature and sign, such as "12+"."""
        return f"{self.features[side]}{'+' if self.signs[side] > 0 else '-'}"


def code_baselines(
    sae: SAE,
    acts: Float[Tensor, "n_tokens d_in"],
    is_train: Bool[np.ndarray, "n_tokens"],
    seed: int,
    baselines: bool | Mapping[str, SAE],
) -> dict[str, CodedTokens]:
    """The same tokens in other dictionaries, by name.

    random: an SAE of the same configuration before training, with random directions. untrained: the same with training
    activations as directions. neurons: the centered activations.

    Args:
        sae: the SAE that they are compared with.
        acts: activations of the tokens.
        is_train: tokens that baselines may learn from.
        seed: of the sample and the random directions.
        baselines: further SAEs by name; False for none at all.
    """
    if baselines is False:
        return {}
    given = {} if baselines is True else dict(baselines)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(is_train))[:SAMPLE_TOKENS]
    sample = acts[torch.from_numpy(np.sort(rows))].float()
    cfg = replace(sae.cfg, dictionary="unit")
    own = {
        "random": prepare(replace(cfg, init="tied"), sample, seed),
        "untrained": prepare(replace(cfg, init="data"), sample, seed),
    }
    check_baselines(given, sae.cfg, [*own, "neurons"])
    coded = {name: CodedTokens.of(each, acts) for name, each in (own | given).items()}
    return coded | {"neurons": CodedTokens.neurons(acts, sample.mean(0))}
