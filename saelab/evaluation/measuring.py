"""The two passes over the tokens: one that looks at activations only, one that splices."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.evaluation.baselines import Reconstruction, reconstruct_by
from saelab.evaluation.bootstrap import DocumentSums
from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import FiringSums, exact, token_terms
from saelab.lm.forwards import batches_of
from saelab.lm.tokens import Tokens
from saelab.sae.config import RandomPrefixes
from saelab.sae.sae import SAE

SAMPLE_TOKENS = 16384  # about what training fits its start to


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the first pass finds."""

    mean: Float[Tensor, "d_in"]
    """of the activations, over all tokens kept; float64"""
    sample: Float[Tensor, "n d_in"]
    """activations of sequences spread evenly over the tokens"""
    firings: FiringSums
    removed: dict[str, int]


def survey(sae: SAE, stage: Stage, tokens: Tokens, n_seq: int, progress: bool) -> Survey:
    """Go over the activations once, for what must be known before any are compared: mean, sample, the SAE's L0."""
    stride = max(1, math.ceil(tokens.n_tokens / SAMPLE_TOKENS))
    total, firings = torch.zeros(sae.cfg.d_in, dtype=torch.float64), FiringSums(sae.cfg.d_sae)
    sample: list[Tensor] = []
    removed: Counter[str] = Counter()
    seq = torch.arange(len(tokens))[:, None].expand_as(tokens.ids)
    for start, batch in _watched(tokens, n_seq, "activations", progress):
        x, kept = stage.read(batch)
        removed.update(kept.removed)
        if len(x) == 0:
            continue
        firings.add(sae.encode_sparse(x.to(sae.device)))
        total += exact(x).sum(0).cpu()
        chosen = seq[start : start + n_seq][kept.keep] % stride == 0
        sample.append(x[chosen.to(x.device)])
    if firings.n_tokens == 0:
        raise ValueError(
            f"`mask` must keep at least one token, got none: {stage.mask}; give another mask or more text."
        )
    return Survey(
        mean=total / firings.n_tokens, sample=torch.cat(sample).float(), firings=firings, removed=dict(removed)
    )


def measure(
    sae: SAE,
    stage: Stage,
    tokens: Tokens,
    n_seq: int,
    mean: Float[Tensor, "d_in"],
    rivals: dict[str, Reconstruction],
    progress: bool,
) -> DocumentSums:
    """Sums by document for the SAE and its rivals: shared terms by name, the others as `sae.error`, `pca.ce`, ..."""
    sums = DocumentSums(tokens.doc_ids)
    reconstructions = {"sae": reconstruct_by(sae), **rivals}
    for _, batch in _watched(tokens, n_seq, "splices", progress):
        clean = stage.run(batch)
        docs, docs_predicted = batch.doc_ids[clean.keep], batch.doc_ids[clean.predicts]
        if len(docs) == 0:
            continue
        x = clean.rows
        sums.add(docs, _shared_terms(x, mean) | _prefix_terms(sae, x))
        ce_clean = clean.losses(clean.logits)
        sums.add(docs_predicted, {"n_predictions": torch.ones(len(docs_predicted)), "ce_clean": ce_clean})
        for name, reconstruct in reconstructions.items():
            x_hat, n_used = reconstruct(x)
            x_hat = x_hat.to(x.device)
            sums.add(docs, _named(name, token_terms(x, x_hat) | {"firings": n_used}))
            sums.add(docs_predicted, _named(name, clean.splice(x_hat)))
    return sums


def prefixes_of(sae: SAE) -> tuple[int, ...]:
    """Dictionary sizes to report on; those of random prefixes are spread evenly over the range they are drawn from."""
    prefixes, d_sae = sae.cfg.prefixes, sae.cfg.d_sae
    if not isinstance(prefixes, RandomPrefixes):
        return prefixes or ()
    step = math.log(d_sae / prefixes.smallest) / (prefixes.n - 1)
    return tuple(sorted({round(prefixes.smallest * math.exp(i * step)) for i in range(prefixes.n)}))


def _shared_terms(x: Tensor, mean: Tensor) -> dict[str, Tensor]:
    deviation = exact(x) - mean.to(exact(x).device)
    return {"n_tokens": torch.ones(len(x)), "variance": deviation.square().sum(-1)}


def _prefix_terms(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """Squared error of every prefix's reconstruction."""
    if not (sizes := prefixes_of(sae)):
        return {}
    codes = sae.encode_sparse(x.to(sae.device))
    errors = {n: token_terms(x, sae.decode(codes, prefix=n).to(x.device))["error"] for n in sizes}
    return {f"prefix.{n}": error for n, error in errors.items()}


def _named(name: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{term}": values for term, values in terms.items()}


def _watched(tokens: Tokens, n_seq: int, what: str, progress: bool) -> Iterator[tuple[int, Tokens]]:
    """Batches with the number of their first sequence, under a progress bar in tokens."""
    from tqdm.auto import tqdm

    with tqdm(total=tokens.n_tokens, desc=what, unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for i, batch in enumerate(batches_of(tokens, n_seq)):
            yield i * n_seq, batch
            bar.update(batch.n_tokens)
