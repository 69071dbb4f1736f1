"""Baselines for concept scores (neurons, PCA, random and untrained dictionary) and a supervised linear probe."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.evaluation.levels import Codes
from saelab.functional.metrics import exact
from saelab.sae.config import SAEConfig
from saelab.sae.sae import SAE
from saelab.sae.untrained import prepare
from saelab.stores.corpus import split_documents

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SAMPLE_TOKENS = 40_000
ENCODE_TOKENS = 2**15
PROBE_STEPS = 30


def concept_baselines(
    acts: Float[Tensor, "n_tokens d_in"],
    cfg: SAEConfig,
    truth: Any,
    story_ids: Shaped[Any, "n_tokens"],
    *,
    train_frac: float = 0.5,
    seed: int = 0,
) -> dict[str, Codes]:
    """Baseline codes of the same tokens by name, for `score_concepts`.

    neurons: the centered activations. pca: their principal components. random: an SAE of `cfg` before training, with
    random unit directions. untrained: the same with training activations as directions. probe: logistic regression on
    the concept labels, one column a concept: the ceiling for linear classifiers. Each is fitted to at most 40,000
    tokens of the training stories that `score_concepts` selects with the same `train_frac` and `seed`.

    Args:
        acts: activations of the tokens.
        cfg: configuration of the untrained SAEs.
        truth: (n_tokens, n_concepts) scipy sparse concept labels.
        story_ids: story of each token.
        train_frac: share of stories for training.
        seed: of the split, the sample and the random directions.
    """
    train = torch.from_numpy(split_documents(story_ids, train_frac, seed)).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    rows = train[torch.randperm(len(train), generator=generator)[:SAMPLE_TOKENS]].sort().values
    sample = acts[rows].float()
    centred = exact(sample) - exact(sample).mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    x = acts.float() - sample.mean(0)
    components = x @ directions.flip(1).to(x)
    scales = variances.flip(0).clamp(min=1e-6 * float(variances[-1]) or 1.0).sqrt().to(x)
    whitened = components / scales
    cfg = replace(cfg, dictionary="unit")  # the directions are random ones and tokens, whatever training makes of them
    labels = torch.from_numpy(truth[rows.numpy()].toarray().astype(np.float32))
    return {
        "neurons": x,
        "pca": components,
        "random": read_codes(prepare(replace(cfg, init="tied"), sample, seed), acts),
        "untrained": read_codes(prepare(replace(cfg, init="data"), sample, seed), acts),
        "probe": fit_probe(whitened[rows], labels)(whitened).sigmoid(),
    }


@torch.no_grad()
def read_codes(sae: SAE, acts: Float[Tensor, "n_tokens d_in"]) -> "csr_matrix":
    """The codes of many tokens as one scipy matrix (n_tokens, d_sae), encoded in batches."""
    from scipy.sparse import csr_matrix, vstack

    parts = []
    for x in acts.split(ENCODE_TOKENS):
        codes = sae.encode_sparse(x.to(sae.device))
        data, indices, offsets = (part.cpu().numpy() for part in (codes.values, codes.indices, codes.offsets))
        parts.append(csr_matrix((data, indices, offsets), shape=(len(x), codes.d_sae)))
    return vstack(parts, format="csr")


def fit_probe(x: Float32[Tensor, "n d"], labels: Float32[Tensor, "n n_concepts"]) -> torch.nn.Linear:
    """A logistic regression on all concepts at once, with half the squared weights added to the summed loss."""
    rate = (labels.sum(0) + 0.5) / (len(x) + 1)
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global generator
        probe = torch.nn.Linear(x.shape[1], labels.shape[1])
    torch.nn.init.zeros_(probe.weight)
    probe.bias.data.copy_(rate.logit())
    optimiser = torch.optim.LBFGS(
        probe.parameters(), max_iter=PROBE_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        fit = binary_cross_entropy_with_logits(probe(x), labels, reduction="sum")
        total = (fit + 0.5 * probe.weight.square().sum()) / len(x)
        total.backward()
        return total

    with torch.enable_grad():
        optimiser.step(loss)
    return probe.requires_grad_(False)
