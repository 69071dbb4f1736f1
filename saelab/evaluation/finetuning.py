"""`finetune`: a trained SAE trained on with the language model in the loop, so that its predictions change least."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evaluation.splicing import Stage
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import match_model, require_threshold
from saelab.sae.fitting import describe_training, finish, open_run
from saelab.sae.normalizer import PER_TOKEN
from saelab.sae.sae import SAE
from saelab.sae.training_sae import StepLosses, TrainingSAE
from saelab.stores.activations import Activations
from saelab.stores.jobs import hold_folder
from saelab.training.config import TrainConfig
from saelab.training.loop import Sink, train

TERM = "kl"  # name of the divergence in the history
LR_SCALE = 0.1  # of the default learning rate of training from the start
MEASURED_TOKENS = 16_384  # on which the SAE is measured afterward


def finetune(
    sae: SAE,
    model: AnyModel,
    tokens: Tokens,
    cfg: TrainConfig | None = None,
    *,
    kl_coefficient: float = 1.0,
    hook_point: str | tuple[str, str] | None = None,
    mask: TokenMask | None = None,
    allow_mismatch: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    progress: bool = True,
) -> SAE:
    """Train an SAE further on what its reconstruction does to the model's predictions; the same SAE, changed.

    To the losses of `cfg.objective` is added `kl_coefficient` times the KL divergence of the next-token distributions
    with the reconstruction spliced in from those without (arXiv:2503.17272; end-to-end training, arXiv:2405.12241), a
    mean over predictions, in nats. The gradient flows through the model to the SAE alone: the model is not changed, and
    its parameters get no gradient. L0 stays what the activation function fixes; thresholds are learned further.

    A step costs three passes of the model. A tenth of the tokens of the training is a usual length.

    Args:
        sae: a trained SAE or transcoder whose activation function fixes L0: TopK, BatchTopK and their kinds.
        model: the language model it was trained on.
        tokens: text; a step takes `batch_size / ctx_len` rows of it, in random order.
        cfg: configuration of the run; budgets are in tokens. None is a million tokens, 4,096 a step; where it has no
            learning rate, a tenth of the default one is taken.
        kl_coefficient: weight of the KL divergence; the reconstruction loss has weight 1 and is 1 without any latent.
        hook_point: where the SAE reads, for a transcoder a pair (input, target); by default where it was trained.
        mask: tokens that count; by default the mask that the SAE was trained with.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        out: folder for history and checkpoints; None writes nothing.
        resume: continue from the last checkpoint in `out`.
        sinks: loggers that receive each entry of the history.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for an SAE of another model or hook point, an activation function with a sparsity penalty, a loss
            term that compares neighboring tokens, a normalizer with per-token statistics, and a batch size that is no
            multiple of `ctx_len`.
    """
    model = as_model(model)
    cfg = cfg or TrainConfig(n_tokens=1_000_000)
    _check(sae, tokens, cfg, kl_coefficient)
    require_threshold(sae)
    stage = Stage.at(model, sae, match_model(sae, model, hook_point, mask, allow_mismatch))
    stage = stage.calibrated(tokens, cfg.batch_size // tokens.ctx_len)
    trainee = _TrainingInLoop(sae, cfg, stage, tokens, kl_coefficient)
    rows = Activations.from_tensor(torch.arange(len(tokens), dtype=torch.float64)[:, None])
    with nullcontext() if out is None else hold_folder(out):
        batches = rows.batches(cfg.batch_size // tokens.ctx_len, seed=cfg.seed)
        run = open_run([trainee], batches, cfg, None, out, resume)
        train(run, resume=resume, sinks=sinks, progress=progress)
    trainee.settle()
    before = sae.training_
    measured = trainee.read(torch.arange(max(1, min(len(tokens), MEASURED_TOKENS // tokens.ctx_len))))
    described = describe_training(run, 0, finish(sae, None, measured))
    sae.training_ = {**described, "kl_coefficient": kl_coefficient, "before": before}
    sae.history_ = run.history
    return sae


class _TrainingInLoop(TrainingSAE):
    """A trained SAE whose batches are numbers of rows of a text."""

    def __init__(self, sae: SAE, cfg: TrainConfig, stage: Stage, tokens: Tokens, kl_coefficient: float) -> None:
        super().__init__(sae, cfg, trained=True)
        self.stage, self.tokens, self.kl_coefficient = stage, tokens, kl_coefficient

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must not change."""
        return {**super().settings, "kl_coefficient": self.kl_coefficient}

    def read(self, rows: Int[Tensor, "n"]) -> Float[Tensor, "n_tokens width"]:
        """Activations of rows of the text, a transcoder's followed by their targets."""
        x, y, _ = self.stage.read(self.tokens[rows])
        return (x if self.stage.hook_point_out is None else torch.cat([x, y], 1)).float()

    def prepare(self, sample: Float[Tensor, "n 1"]) -> None:
        """Measure the activations' variance on the first rows."""
        n = max(1, min(len(sample), MEASURED_TOKENS // self.tokens.ctx_len))
        super().prepare(self.read(sample[:n, 0].long()))

    def objective(self, batch: Float[Tensor, "n 1"]) -> StepLosses:
        """Losses of the activations of some rows, and the KL divergence of the spliced predictions."""
        clean, sae = self.stage.run(self.tokens[batch[:, 0].long()]), self.sae
        rows = clean.rows if sae.cfg.d_out is None else torch.cat([clean.rows, clean.targets], 1)
        step, seen = self.code(rows.float())
        losses = self.weigh(step, seen)
        y_hat = step.y_hat if sae.W_skip is None else step.y_hat + step.x @ sae.W_skip
        y_hat = sae.out_normalizer.unnormalize(y_hat)
        # The gradient is taken at the reconstruction and goes on from there: no parameter of the model gets one.
        leaf = y_hat.detach().requires_grad_()
        kl = clean.splice(leaf, grad=True)["kl"].float().mean()
        (slope,) = torch.autograd.grad(kl, leaf)
        linear = (y_hat * slope).sum()
        losses.terms[TERM] = self.kl_coefficient * (kl.detach() + linear - linear.detach())
        return losses

    def default_lr(self) -> float:
        """A tenth of that of training from the start."""
        return LR_SCALE * super().default_lr()


def _check(sae: SAE, tokens: Tokens, cfg: TrainConfig, kl_coefficient: float) -> None:
    if not 0 <= kl_coefficient < float("inf"):
        raise ValueError(f"`kl_coefficient` must be at least 0 and finite, got {kl_coefficient}.")
    if sae.cfg.activation.penalized:
        raise ValueError(
            f"`sae` must have an activation function that fixes L0, such as TopK or BatchTopK, got "
            f"{sae.cfg.activation}, whose L0 a penalty would have to hold."
        )
    for term in sae.cfg.terms:
        if term.name == TERM or "neighbors" in term.needs:
            why = "has the name of the divergence's" if term.name == TERM else "compares neighboring tokens"
            raise ValueError(
                f"`sae` must have loss terms that go with batches of whole texts, got '{term.name}', which {why}; "
                "fine-tune a copy without it."
            )
    if sae.cfg.normalizer in PER_TOKEN:
        raise ValueError(f"`normalizer` must be one map for all tokens, got '{sae.cfg.normalizer}'; `fold` has none.")
    if cfg.batch_size % tokens.ctx_len or len(tokens) < cfg.batch_size // tokens.ctx_len:
        raise ValueError(
            f"`batch_size` must be a multiple of ctx_len ({tokens.ctx_len}) and at most the {len(tokens)} rows of the "
            f"text, got {cfg.batch_size}."
        )
