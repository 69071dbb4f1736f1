"""`Stage`: one hook point of a language model, read and replaced at the tokens that count."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.metrics import kl_divergence
from saelab.lm.hooks import capture, logits, next_token_loss, splice
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.models import Model
from saelab.lm.tokens import Tokens

FORWARD_TOKENS = 4096
FORWARD_LOGITS = 2**25
CALIBRATION_TOKENS = 16384


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
        x = capture(self.model, batch.ids, [self.hook_point])[self.hook_point]
        kept = self._select(batch, x)
        return self._rows(x, kept), kept

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

    def _select(self, batch: Tokens, x: Tensor) -> MaskResult:
        if self.mask.max_norm_ratio is None:
            return self.mask.apply(batch)
        return self.mask.apply(batch, x.float().norm(dim=-1).cpu(), self.median_norm)

    def _rows(self, x: Tensor, kept: MaskResult) -> Tensor:
        rows = x[kept.keep.to(x.device)]
        if not rows.isfinite().all():
            raise ValueError(
                f"Activations must be finite, '{self.hook_point}' has NaN or infinity in {rows.dtype}; "
                "check the model's weights, or load it in bfloat16 or float32."
            )
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
        return self.x[self.keep.to(self.x.device)]

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


def calibrate(stage: Stage, tokens: Tokens, n_seq: int) -> float | None:
    """The median norm of the tokens kept among the first 16384, for a mask with a norm rule; None for one without."""
    if stage.mask.max_norm_ratio is None:
        return None
    others = replace(stage.mask, max_norm_ratio=None)
    plain = Stage(model=stage.model, hook_point=stage.hook_point, mask=others)
    first = tokens[: max(1, CALIBRATION_TOKENS // tokens.ctx_len)]
    return float(torch.cat([plain.read(batch)[0].float().norm(dim=-1) for batch in batches_of(first, n_seq)]).median())


def batches_of(tokens: Tokens, n_seq: int) -> Iterator[Tokens]:
    """The sequences in order, `n_seq` at a time."""
    return (tokens[start : start + n_seq] for start in range(0, len(tokens), n_seq))


def forward_size(model: Model, tokens: Tokens, n_seq: int | None) -> int:
    """Sequences in a forward: `n_seq`, or what makes about 4096 tokens and at most 2^25 logits."""
    if n_seq is not None and n_seq < 1:
        raise ValueError(f"`batch_size` must be at least 1 sequence, got {n_seq}; use None for the default.")
    n_tokens = min(FORWARD_TOKENS, FORWARD_LOGITS // model.cfg.d_vocab)
    return n_seq or max(1, n_tokens // tokens.ctx_len)
