"""`Stage`: one hook point of a language model, read and replaced at the tokens that count."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.metrics import kl_divergence
from saelab.lm.forwards import find_median_norms, norms_of, require_finite
from saelab.lm.hooks import capture, logits, next_token_loss, splice
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.models import Model
from saelab.lm.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where an SAE is judged: tokens that the mask leaves out are neither measured nor replaced."""

    model: Model
    hook_point: str
    mask: TokenMask
    median_norm: float | None = None
    """what the mask's norm rule is relative to"""

    def read(self, batch: Tokens) -> tuple[Float[Tensor, "n_kept d_in"], MaskResult]:
        """Activations of the tokens kept, from a forward that stops at the hook point."""
        x = self._capture(batch)[self.hook_point]
        kept = self._select(batch, x)
        return self.rows_of(x, kept.keep), kept

    def run(self, batch: Tokens) -> "CleanRun":
        """The untouched model's activations and predictions, from one forward."""
        seen: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            seen.append(x.clone())  # the model may add to what flows on in place
            return x

        with splice(self.model, {self.hook_point: record}):
            clean = logits(self.model, batch.ids)
        keep = self._select(batch, seen[0]).keep
        predicts = torch.zeros_like(keep)
        predicts[:, :-1] = keep[:, :-1] & batch.attention_mask[:, 1:]
        return CleanRun(stage=self, batch=batch, x=seen[0], keep=keep, predicts=predicts, logits=clean)

    def calibrated(self, tokens: Tokens, n_seq: int) -> "Stage":
        """The same stage with the median norm that the mask's norm rule is relative to, where it has that rule."""
        if self.mask.max_norm_ratio is None or self.median_norm is not None:
            return self
        medians = find_median_norms(self._capture, tokens, self.mask, n_seq)
        return replace(self, median_norm=medians[self.hook_point])

    def _capture(self, batch: Tokens) -> dict[str, Tensor]:
        return capture(self.model, batch.ids, [self.hook_point])

    def _select(self, batch: Tokens, x: Tensor) -> MaskResult:
        if self.mask.max_norm_ratio is None:
            return self.mask.apply(batch)
        return self.mask.apply(batch, norms_of(x), self.median_norm)

    def rows_of(self, x: Float[Tensor, "n_seq ctx_len d_in"], keep: Bool[Tensor, "n_seq ctx_len"]) -> Tensor:
        """Activations of the tokens kept; ValueError where one is not finite."""
        rows = x[keep.to(x.device)]
        require_finite(self.hook_point, rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """One batch's activations and predictions in the untouched model, to compare others with."""

    stage: Stage
    batch: Tokens
    x: Float[Tensor, "n_seq ctx_len d_in"]
    keep: Bool[Tensor, "n_seq ctx_len"]
    """tokens that are measured and replaced"""
    predicts: Bool[Tensor, "n_seq ctx_len"]
    """tokens kept whose next token exists"""
    logits: Float[Tensor, "n_seq ctx_len d_vocab"]

    @property
    def rows(self) -> Float[Tensor, "n_kept d_in"]:
        """Activations of the tokens kept."""
        return self.stage.rows_of(self.x, self.keep)

    def losses(self, logits: Float[Tensor, "n_seq ctx_len d_vocab"]) -> Float[Tensor, "n_predictions"]:
        """Cross-entropy of each prediction that counts, in nats."""
        loss = next_token_loss(logits, self.batch.ids)
        return loss[self.predicts[:, :-1].to(loss.device)]

    def splice(self, x_hat: Float[Tensor, "n_kept d_in"]) -> dict[str, Float[Tensor, "n_predictions"]]:
        """`ce` and `kl` of each prediction, with `x_hat` in place of the activations of the tokens kept."""
        keep, predicts = self.keep.to(self.x.device), self.predicts.to(self.x.device)

        def replace_kept(x: Tensor) -> Tensor:
            x[keep] = x_hat.to(x)
            return x

        with splice(self.stage.model, {self.stage.hook_point: replace_kept}):
            spliced = logits(self.stage.model, self.batch.ids)
        return {"ce": self.losses(spliced), "kl": kl_divergence(self.logits[predicts], spliced[predicts])}
