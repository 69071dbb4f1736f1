"""`evaluate`: reconstruction, sparsity and spliced-in loss of an SAE, with ablations and baselines.

There are two passes: statistics of the activations, then forward passes with reconstructions spliced in. Metrics and
their intervals come from sums by document; undefined ones are listed with the reason.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.evaluation.results import Evaluation
from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import FiringSums, exact, log_histogram, ratio, read_scores, token_terms
from saelab.functional.statistics import DocumentSums, find_interval
from saelab.lm.hooks import batches_of, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.models import describe_model
from saelab.lm.tokens import Tokens
from saelab.sae.activation_functions import AbsTopK, TopK
from saelab.sae.baselines import check_baselines
from saelab.sae.compatibility import match_model, require_threshold
from saelab.sae.config import RandomPrefixes, SAEConfig
from saelab.sae.initialization import make_untrained, prepare
from saelab.sae.sae import SAE
from saelab.stores.jobs import hidden

Reconstruction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function of activations (n, d_in) that returns reconstructions (n, d_out) and the number of nonzero codes of each
(n)."""
SMALLEST_KL = 1e-6  # below this a KL is the rounding of float32
RECOVERED = {"loss_recovered": "zero", "loss_recovered_mean": "mean"}
OWN_ROWS = ("sae", "untrained", "random", "pca", "linear", "zero", "mean", "prefix")
SAMPLE_TOKENS = 16384  # about what training fits its start to
FORWARD_LOGITS = 2**25  # in a forward at most: several such tensors are held at once


def reconstruct_by(sae: SAE) -> Reconstruction:
    """An SAE as a reconstruction function, with the number of features that fire."""

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(sae.device)
        codes = sae.encode_sparse(x)
        return sae.decode(codes, x=x), codes.l0

    return reconstruct


def make_constant(value: Float[Tensor, "d_out"]) -> Reconstruction:
    """Ablation: a reconstruction function that returns the same vector for every token."""
    return lambda x: (value.to(x).expand(len(x), -1), torch.zeros(len(x), dtype=torch.int64))


def make_baselines(
    sae: SAE, l0: float, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], seed: int
) -> dict[str, Reconstruction]:
    """Baseline reconstruction functions for an SAE by name, fitted to a sample of inputs and targets.

    untrained: the SAE as initialized before training, at the trained SAE's L0. random: the best k = round(l0) of
    `d_sae` random unit directions; the encoder is tied to them, up to a fitted scale (a transcoder's are directions of
    the input, and its decoder to the target is fitted). pca: the sample's first k principal components, which need no
    dictionary wider than d_in. linear, for a transcoder in place of pca: the best affine map of rank k, or of full rank
    where the transcoder has a skip connection.

    Args:
        sae: the trained SAE or transcoder.
        l0: number of features that fire on a token, on average.
        x: inputs of the sample.
        y: targets of the sample; for an autoencoder its inputs.
        seed: of the random directions.
    """
    cfg = sae.cfg
    k = min(max(1, round(l0)), cfg.d_sae)
    activation = AbsTopK(k) if cfg.activation.signed else TopK(k)
    drawn = SAEConfig(d_in=cfg.d_in, d_sae=cfg.d_sae, d_out=cfg.d_out, activation=activation, normalizer="none")
    x, y = x.to(sae.device), y.to(sae.device)
    baselines = {
        "untrained": reconstruct_by(make_untrained(sae, x, y, seed=seed)),
        "random": reconstruct_by(prepare(drawn, x, seed + 1, y)),
    }
    rank = min(round(l0), cfg.d_in, cfg.d_target)
    if cfg.d_out is None:
        return baselines | {"pca": make_pca(x, rank)}
    return baselines | {"linear": make_linear(x, y, min(cfg.d_in, cfg.d_out) if cfg.skip else rank)}


def make_pca(sample: Float[Tensor, "n d_in"], k: int) -> Reconstruction:
    """The reconstruction from the sample's mean and its first k principal components."""
    mean = exact(sample).mean(0)
    centered = exact(sample) - mean
    directions = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :k]

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        x = exact(x)
        return (x - mean) @ directions @ directions.T + mean, torch.full((len(x),), k)

    return reconstruct


def make_linear(x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], k: int) -> Reconstruction:
    """The affine map of rank k with the least squared error on the sample's targets (reduced-rank regression).

    It is the least-squares map, projected on the first k principal components of its predictions.
    """
    mean_x, mean_y = exact(x).mean(0), exact(y).mean(0)
    centered, target = exact(x) - mean_x, exact(y) - mean_y
    moments = centered.T @ centered
    ridge = 1e-9 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    whole = torch.linalg.solve(moments + ridge, centered.T @ target)
    directions = torch.linalg.eigh(whole.T @ moments @ whole).eigenvectors.flip(1)[:, :k]
    matrix = whole @ directions @ directions.T

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        return (exact(x) - mean_x) @ matrix + mean_y, torch.full((len(x),), k)

    return reconstruct


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of the SAE by field of `Evaluation`, and of its baselines."""

    sae: dict[str, float]
    baselines: dict[str, dict[str, float]]
    """metrics of each baseline"""
    prefixes: dict[int, float]
    """FVU by prefix length"""
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of the SAE's metrics"""
    reasons: dict[str, str]
    """why a metric is NaN"""


def score(sums: DocumentSums, baselines: Iterable[str], prefixes: Iterable[int], n_bootstrap: int, seed: int) -> Scores:
    """All metrics from the sums, with 95 % intervals of the SAE's.

    Args:
        sums: by document, from `measure`.
        baselines: names of the baselines.
        prefixes: prefix lengths whose FVU is reported.
        n_bootstrap: draws of documents; 0 for no intervals.
        seed: of the draws.
    """
    total = sums.total()
    sae = {name: float(value) for name, value in read_sae(total).items()}
    others = {one: {name: float(v) for name, v in read_baseline(total, one).items()} for one in baselines}
    draws, reasons = {}, {}
    if n_bootstrap and sums.n_documents >= 2:
        draws = read_sae(sums.resample(n_bootstrap, seed))
    elif n_bootstrap:
        reasons["intervals"] = f"The bootstrap draws documents and needs at least 2, got {sums.n_documents}."
    unsure = find_unsure(sae, draws)
    for numbers in (sae, *others.values()):
        numbers.update(dict.fromkeys(unsure, math.nan))
    return Scores(
        sae=sae,
        baselines=others,
        prefixes={n: float(ratio(total[f"prefix.{n}"], total["variance"])) for n in prefixes},
        intervals={name: find_interval(values) for name, values in draws.items() if not math.isnan(sae[name])},
        reasons=reasons | unsure | explain(sae, unsure),
    )


def read_sae(sums: dict[str, Float[Tensor, "*draws"]]) -> dict[str, Float[Tensor, "*draws"]]:
    """The SAE's metrics by field name, with the cross-entropies of the unmodified and the ablated model."""
    scores, n = read_baseline(sums, "sae"), sums["n_predictions"]
    scores["ce_sae"] = scores.pop("ce")
    references = {"ce_clean": "ce_clean", "ce_zero": "zero.ce", "ce_mean": "mean.ce", "kl_zero": "zero.kl"}
    return scores | {field: ratio(sums[name], n) for field, name in references.items()}


def read_baseline(sums: dict[str, Float[Tensor, "*draws"]], name: str) -> dict[str, Float[Tensor, "*draws"]]:
    """The metrics of one reconstruction, given its name in the sums."""
    own = {key.removeprefix(f"{name}."): values for key, values in sums.items() if key.startswith(f"{name}.")}
    ablated = {"ce_zero": sums["zero.ce"], "ce_mean": sums["mean.ce"], "kl_zero": sums["zero.kl"]}
    return read_scores(sums | ablated | own)


def find_unsure(sae: dict[str, float], draws: dict[str, Tensor]) -> dict[str, str]:
    """The ratios to an ablation's damage that are undefined because the damage is within noise, with the reasons."""
    unsure = {}
    for name, ablation in RECOVERED.items():
        damage = sae[f"ce_{ablation}"] - sae["ce_clean"]
        said = f"{ablation.capitalize()} ablation changes the cross-entropy by {damage:+.4g} nats"
        if damage <= 0:
            unsure[name] = f"{said}: it does not hurt, so there is no loss to recover."
        elif draws and (low := find_interval(draws[f"ce_{ablation}"] - draws["ce_clean"])[0]) <= 0:
            unsure[name] = f"{said}, within noise (95 % interval from {low:+.4g}); give more tokens."
    if sae["kl_zero"] <= SMALLEST_KL:
        unsure["kl_score"] = f"Zero ablation changes no prediction (KL {sae['kl_zero']:.2g} nats)."
    return unsure


def explain(sae: dict[str, float], known: dict[str, str]) -> dict[str, str]:
    """Reasons for the other metrics that are NaN."""
    causes = {
        "fvu": "The activations do not vary.",
        "explained_variance": "The activations do not vary.",
        "bias": "The reconstructions have nothing in common with the activations.",
    }
    if math.isnan(sae["ce_clean"]):
        predicted = [name for name in sae if name.startswith(("ce_", "kl", "loss_"))]
        causes |= dict.fromkeys(predicted, "No token kept has a next token to predict.")
    missing = [name for name, value in sae.items() if math.isnan(value) and name not in known]
    return {name: causes.get(name, "The reconstructions are not finite.") for name in missing}


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
    """firing counts of the features"""
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
    baselines: dict[str, Reconstruction],
    progress: bool,
) -> DocumentSums:
    """Second pass: sums by document of reconstruction errors and of losses with each reconstruction spliced in.

    Args:
        sae: SAE or transcoder.
        stage: model, hook points and mask.
        tokens: the text.
        n_seq: sequences in a forward pass.
        mean: mean of the targets, from the first pass.
        baselines: baselines and ablations by name.
        progress: show a progress bar.

    Returns:
        terms shared by all under their names, those of one reconstruction under `sae.error`, `pca.ce` and so on.
    """
    sums = DocumentSums(tokens.doc_ids)
    reconstructions = {"sae": reconstruct_by(sae), **baselines}
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


@torch.no_grad()
def evaluate(
    sae: SAE,
    model: AnyModel,
    tokens: Tokens,
    *,
    hook_point: str | tuple[str, str] | None = None,
    mask: TokenMask | None = None,
    batch_size: int | None = None,
    n_bootstrap: int = 1000,
    baselines: bool | Mapping[str, SAE] = True,
    seed: int = 0,
    allow_mismatch: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Reconstruction metrics of an SAE, and its language model's loss with the reconstructions spliced in.

    The metrics are explained in `Evaluation`. A transcoder reads at one hook point, and its reconstruction replaces the
    activation at another. Tokens that the mask leaves out are neither measured nor replaced, and the same predictions
    count in every run. Neither the SAE nor the model is changed.

    Args:
        sae: SAE or transcoder.
        model: language model it was trained on.
        tokens: text to evaluate on.
        hook_point: where the SAE reads, for a transcoder a pair (input, target); by default where it was trained.
        mask: tokens that count; by default the mask that the SAE was trained with.
        batch_size: sequences in a forward pass; by default chosen for memory. Results do not depend on it.
        n_bootstrap: draws of documents for the 95 % intervals; 0 for none.
        baselines: evaluate the untrained SAE, a random dictionary and PCA (a linear map for a transcoder), too; or
            SAEs by name, such as those of `fit_baselines`, to evaluate with these three.
        seed: seed of the bootstrap and the baselines.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        progress: show progress bars.

    Raises:
        ValueError: for an SAE of another model, weight processing or hook point (unless `allow_mismatch`), an SAE that
            has no hook point or threshold yet, and activations that are not finite.

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> evaluate(sae, model, tokens, hook_point="blocks.1.hook_resid_post", progress=False).n_documents
    8
    """
    model = as_model(model)
    place = match_model(sae, model, hook_point, mask, allow_mismatch)
    stage = Stage.at(model, sae, place)
    given = {} if isinstance(baselines, bool) else baselines
    check_baselines(given, sae.cfg, OWN_ROWS)
    for each in (sae, *given.values()):
        require_threshold(each)
    if n_bootstrap < 0:
        raise ValueError(f"`n_bootstrap` must be at least 0, got {n_bootstrap}; use 0 for no intervals.")
    n_seq = forward_size(tokens, batch_size, FORWARD_LOGITS // model.cfg.d_vocab)
    stage = stage.calibrated(tokens, n_seq)
    found = survey(sae, stage, tokens, n_seq, progress)
    compared = {}
    if baselines is not False:
        compared = make_baselines(sae, found.firings.l0, found.inputs, found.targets, seed)
        compared |= {name: reconstruct_by(each) for name, each in given.items()}
    ablations = {"zero": make_constant(torch.zeros_like(found.mean)), "mean": make_constant(found.mean)}
    sums = measure(sae, stage, tokens, n_seq, found.mean, ablations | compared, progress)
    scores = score(sums, compared, prefixes_of(sae), n_bootstrap, seed)
    edges, counts = log_histogram(found.firings.density, found.firings.n_tokens)
    described = describe_model(model)
    return Evaluation(
        **scores.sae,
        dead_frac=found.firings.dead_frac,
        n_tokens=found.firings.n_tokens,
        n_predictions=int(sums.total()["n_predictions"]),
        n_documents=sums.n_documents,
        removed=found.removed,
        density_edges=edges,
        density_counts=counts,
        prefixes=scores.prefixes,
        intervals=scores.intervals,
        baselines=scores.baselines,
        reasons=scores.reasons,
        sae=repr(sae),
        hook_point=stage.hook_point,
        hook_point_out=stage.hook_point_out,
        model=described.name,
        text=tokens.source,
        mask=stage.mask.to_dict(),
        provenance=sae.provenance.to_dict() if sae.provenance else None,
        versions=described.versions,
    )
