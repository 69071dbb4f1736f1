"""`evaluate`: reconstruction, sparsity and spliced-in loss of an SAE, with ablations and baselines."""

import torch

from saelab.evaluation.baselines import make_baselines, make_constant
from saelab.evaluation.measuring import measure, prefixes_of, survey
from saelab.evaluation.results import Evaluation
from saelab.evaluation.scoring import score
from saelab.evaluation.splicing import Stage
from saelab.functional.metrics import log_histogram
from saelab.lm.forwards import forward_size
from saelab.lm.masks import TokenMask
from saelab.lm.models import Model, describe_model
from saelab.lm.tokens import Tokens
from saelab.sae.matching import match_model, require_threshold
from saelab.sae.sae import SAE

FORWARD_LOGITS = 2**25  # in a forward at most: several such tensors are held at once


@torch.no_grad()
def evaluate(
    sae: SAE,
    model: Model,
    tokens: Tokens,
    *,
    hook_point: str | tuple[str, str] | None = None,
    mask: TokenMask | None = None,
    batch_size: int | None = None,
    n_bootstrap: int = 1000,
    baselines: bool = True,
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
        baselines: evaluate the untrained SAE, a random dictionary and PCA (a linear map for a transcoder), too.
        seed: of the bootstrap and the baselines.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        progress: show progress bars.

    Raises:
        ValueError: for an SAE of another model, weight processing or hook point (unless `allow_mismatch`), an SAE that
            has no hook point or threshold yet, and activations that are not finite.

    >>> model = sl.tiny_model()
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
    >>> evaluate(sae, model, tokens, hook_point="blocks.1.hook_resid_post", progress=False).n_documents
    8
    """
    place = match_model(sae, model, hook_point, mask, allow_mismatch)
    stage = Stage.at(model, sae, place)
    require_threshold(sae)
    if n_bootstrap < 0:
        raise ValueError(f"`n_bootstrap` must be at least 0, got {n_bootstrap}; use 0 for no intervals.")
    n_seq = forward_size(tokens, batch_size, FORWARD_LOGITS // model.cfg.d_vocab)
    stage = stage.calibrated(tokens, n_seq)
    found = survey(sae, stage, tokens, n_seq, progress)
    rivals = make_baselines(sae, found.firings.l0, found.inputs, found.targets, seed) if baselines else {}
    ablations = {"zero": make_constant(torch.zeros_like(found.mean)), "mean": make_constant(found.mean)}
    sums = measure(sae, stage, tokens, n_seq, found.mean, ablations | rivals, progress)
    scores = score(sums, rivals, prefixes_of(sae), n_bootstrap, seed)
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
        baselines=scores.rivals,
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
