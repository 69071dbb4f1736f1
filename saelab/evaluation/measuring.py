"""The two passes of `evaluate`: statistics of the activations, then forward passes with reconstructions spliced in."""

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
from saelab.stores.progress import hidden

SAMPLE_TOKENS = 16384  # about what training fits its start to


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Result of the first pass: statistics of activations and codes."""

    mean: Float[Tensor, "d_out"]
    """mean of the targets over all tokens kept; float64"""
    inputs: Float[Tensor, "n d_in"]
    """activations of a sample of sequences spread evenly over the tokens"""
    targets: Float[Tensor, "n d_out"]
    """targets of a transcoder on the same sample; an autoencoder's inputs"""
    firings: FiringSums
    """firing counts of the latents"""
    removed: dict[str, int]
    """tokens that the mask leaves out, by rule"""


def survey(sae: SAE, stage: Stage, tokens: Tokens, n_seq: int, progress: bool) -> Survey:
    """First pass over the activations: their mean, a sample for fitting baselines, and the SAE's L0 and densities.

    Args:
        sae: SAE or transcoder.
        stage: model, hook points and mask.
        tokens: the text.
        n_seq: sequences in a forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: where the mask keeps no token.
    """
    stride = max(1, math.ceil(tokens.n_tokens / SAMPLE_TOKENS))
    total, firings = torch.zeros(sae.cfg.d_target, dtype=torch.float64), FiringSums(sae.cfg.d_sae)
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    removed: Counter[str] = Counter()
    seq = torch.arange(len(tokens))[:, None].expand_as(tokens.ids)
    for start, batch in _watched(tokens, n_seq, "activations", progress):
        x, y, kept = stage.read(batch)
        removed.update(kept.removed)
        if len(x) == 0:
            continue
        firings.add(sae.encode_sparse(x.to(sae.device)))
        total += exact(y).sum(0).cpu()
        chosen = (seq[start : start + n_seq][kept.keep] % stride == 0).to(x.device)
        inputs.append(x[chosen].float())
        targets.append(inputs[-1] if sae.cfg.d_out is None else y[chosen].float())
    if firings.n_tokens == 0:
        raise ValueError(
            f"`mask` must keep at least one token, got none: {stage.mask}; give another mask or more text."
        )
    read = torch.cat(inputs)
    return Survey(
        mean=total / firings.n_tokens,
        inputs=read,
        targets=read if sae.cfg.d_out is None else torch.cat(targets),
        firings=firings,
        removed=dict(removed),
    )


def measure(
    sae: SAE,
    stage: Stage,
    tokens: Tokens,
    n_seq: int,
    mean: Float[Tensor, "d_out"],
    rivals: dict[str, Reconstruction],
    progress: bool,
) -> DocumentSums:
    """Second pass: sums by document of reconstruction errors and of losses with each reconstruction spliced in.

    Args:
        sae: SAE or transcoder.
        stage: model, hook points and mask.
        tokens: the text.
        n_seq: sequences in a forward pass.
        mean: mean of the targets, from the first pass.
        rivals: baselines and ablations by name.
        progress: show a progress bar.

    Returns:
        terms shared by all under their names, those of one reconstruction under `sae.error`, `pca.ce` and so on.
    """
    sums = DocumentSums(tokens.doc_ids)
    reconstructions = {"sae": reconstruct_by(sae), **rivals}
    for _, batch in _watched(tokens, n_seq, "splices", progress):
        clean = stage.run(batch)
        docs, docs_predicted = batch.doc_ids[clean.keep], batch.doc_ids[clean.predicts]
        if len(docs) == 0:
            continue
        x, y = clean.rows, clean.targets
        sums.add(docs, _shared_terms(y, mean) | _prefix_terms(sae, x, y))
        ce_clean = clean.losses(clean.logits)
        sums.add(docs_predicted, {"n_predictions": torch.ones(len(docs_predicted)), "ce_clean": ce_clean})
        for name, reconstruct in reconstructions.items():
            y_hat, n_used = reconstruct(x)
            y_hat = y_hat.to(y.device)
            sums.add(docs, _named(name, token_terms(y, y_hat) | {"firings": n_used}))
            sums.add(docs_predicted, _named(name, clean.splice(y_hat)))
    return sums


def prefixes_of(sae: SAE) -> tuple[int, ...]:
    """Prefix lengths of a Matryoshka SAE to report on; for random prefixes evenly spaced (in log) over their range."""
    prefixes, d_sae = sae.cfg.prefixes, sae.cfg.d_sae
    if not isinstance(prefixes, RandomPrefixes):
        return prefixes or ()
    step = math.log(d_sae / prefixes.smallest) / (prefixes.n - 1)
    return tuple(sorted({round(prefixes.smallest * math.exp(i * step)) for i in range(prefixes.n)}))


def _shared_terms(y: Tensor, mean: Tensor) -> dict[str, Tensor]:
    deviation = exact(y) - mean.to(exact(y).device)
    return {"n_tokens": torch.ones(len(y)), "variance": deviation.square().sum(-1)}


def _prefix_terms(sae: SAE, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Squared error of every prefix's reconstruction."""
    if not (sizes := prefixes_of(sae)):
        return {}
    read = x.to(sae.device)
    codes = sae.encode_sparse(read)
    errors = {n: token_terms(y, sae.decode(codes, prefix=n, x=read).to(y.device))["error"] for n in sizes}
    return {f"prefix.{n}": error for n, error in errors.items()}


def _named(name: str, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{term}": values for term, values in terms.items()}


def _watched(tokens: Tokens, n_seq: int, what: str, progress: bool) -> Iterator[tuple[int, Tokens]]:
    """Batches with the number of their first sequence, under a progress bar in tokens."""
    from tqdm.auto import tqdm

    with tqdm(total=tokens.n_tokens, desc=what, unit=" tokens", unit_scale=True, disable=hidden(progress)) as bar:
        for i, batch in enumerate(batches_of(tokens, n_seq)):
            yield i * n_seq, batch
            bar.update(batch.n_tokens)
