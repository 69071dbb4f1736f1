"""`Stage`: where an SAE is evaluated (model, hook points, mask); reads activations and splices reconstructions in."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.metrics import kl_divergence
from saelab.interventions.edited_runs import ReadActivations
from saelab.lm.hooks import (
    capture,
    find_median_norms,
    logits,
    next_token_loss,
    norms_of,
    replace_activations,
    require_finite,
)
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import Match
from saelab.sae.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where an SAE is evaluated; tokens that the mask leaves out are neither measured nor replaced.

    A transcoder reads at `hook_point` and its reconstructions replace `hook_point_out`; for an autoencoder both are
    one.
    """

    model: Model
    hook_point: str
    """where the SAE reads"""
    mask: TokenMask
    hook_point_out: str | None = None
    """where a transcoder's reconstructions go; None for an autoencoder"""
    median_norms: dict[str, float] = field(default_factory=dict)
    """median activation norm by hook point, which the mask's norm rule refers to"""

    @classmethod
    def at(cls, model: Model, sae: SAE, place: Match) -> "Stage":
        """The stage for an SAE; ValueError for a transcoder whose target hook point is unknown."""
        if sae.cfg.d_out is not None and place.hook_point_out is None:
            raise ValueError(
                f"`hook_point` must be a pair for a transcoder without provenance, got '{place.hook_point}'; give "
                "(input, target)."
            )
        return cls(
            model=model,
            hook_point=place.hook_point,
            hook_point_out=place.hook_point_out if sae.cfg.d_out is not None else None,
            mask=place.mask,
            median_norms=place.median_norms,
        )

    @property
    def target(self) -> str:
        """The hook point whose activations are reconstructed and replaced."""
        return self.hook_point_out or self.hook_point

    @property
    def places(self) -> list[str]:
        """The hook points read, that of the input first."""
        return list(dict.fromkeys([self.hook_point, self.target]))

    def read(self, batch: Tokens) -> tuple[Float[Tensor, "n_kept d_in"], Float[Tensor, "n_kept d_out"], MaskResult]:
        """Inputs and targets of the tokens kept, from a forward pass that stops after the hook points."""
        acts = self._capture(batch)
        kept = self._select(batch, acts)
        x = self.rows_of(self.hook_point, acts, kept.keep)
        return x, x if self.hook_point_out is None else self.rows_of(self.target, acts, kept.keep), kept

    def run(self, batch: Tokens) -> "CleanRun":
        """Activations and predictions of the unmodified model; a transcoder's inputs take a second, shorter forward."""
        seen = {} if self.hook_point_out is None else capture(self.model, batch.ids, [self.hook_point])
        reading = ReadActivations()
        with replace_activations(self.model, {self.target: reading}):
            clean = logits(self.model, batch.ids)
        seen[self.target] = reading.take()
        keep = self._select(batch, seen).keep
        predicts = keep & batch.predicts
        return CleanRun(stage=self, batch=batch, acts=seen, keep=keep, predicts=predicts, logits=clean)

    def calibrated(self, tokens: Tokens, n_seq: int) -> "Stage":
        """The same stage with median norms filled in, where the mask has a norm rule."""
        if self.mask.max_norm_ratio is None or self.median_norms.keys() >= set(self.places):
            return self
        return replace(self, median_norms=find_median_norms(self._capture, tokens, self.mask, n_seq))

    def _capture(self, batch: Tokens) -> dict[str, Tensor]:
        return capture(self.model, batch.ids, self.places)

    def _select(self, batch: Tokens, acts: dict[str, Tensor]) -> MaskResult:
        """The mask on a batch; an outlier at either hook point counts as one, as in `collect`."""
        if self.mask.max_norm_ratio is None:
            return self.mask.apply(batch)
        if self.hook_point_out is None:
            return self.mask.apply(batch, norms_of(acts[self.hook_point]), self.median_norms.get(self.hook_point))
        ratios = [norms_of(acts[name]) / self.median_norms[name] for name in self.places]
        return self.mask.apply(batch, torch.stack(ratios).amax(0), 1.0)

    @staticmethod
    def rows_of(name: str, acts: dict[str, Tensor], keep: Bool[Tensor, "n_seq ctx_len"]) -> Tensor:
        """Activations of the tokens kept at a hook point; ValueError where one is not finite."""
        rows = acts[name][keep.to(acts[name].device)]
        require_finite(name, rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """Activations and predictions of the unmodified model on one batch, to compare spliced runs with."""

    stage: Stage
    batch: Tokens
    acts: dict[str, Float[Tensor, "n_seq ctx_len _"]]
    """by hook point"""
    keep: Bool[Tensor, "n_seq ctx_len"]
    """tokens that are measured and replaced"""
    predicts: Bool[Tensor, "n_seq ctx_len"]
    """tokens kept whose next token is of the same document"""
    logits: Float[Tensor, "n_seq ctx_len d_vocab"]

    @property
    def rows(self) -> Float[Tensor, "n_kept d_in"]:
        """Inputs of the SAE at the tokens kept."""
        return self.stage.rows_of(self.stage.hook_point, self.acts, self.keep)

    @property
    def targets(self) -> Float[Tensor, "n_kept d_out"]:
        """Activations that are reconstructed at the tokens kept: for an autoencoder `rows`."""
        return self.stage.rows_of(self.stage.target, self.acts, self.keep)

    def losses(self, logits: Float[Tensor, "n_seq ctx_len d_vocab"]) -> Float[Tensor, "n_predictions"]:
        """Cross-entropy of each prediction that counts, in nats."""
        loss = next_token_loss(logits, self.batch.ids)
        return loss[self.predicts[:, :-1].to(loss.device)]

    def splice(
        self, x_hat: Float[Tensor, "n_kept d_out"], grad: bool = False
    ) -> dict[str, Float[Tensor, "n_predictions"]]:
        """Cross-entropy `ce` and KL `kl` of each prediction, with `x_hat` in place of the targets of the tokens kept.

        Both are in nats, and differentiable in `x_hat` with `grad`.
        """
        device = self.acts[self.stage.target].device
        keep, predicts = self.keep.to(device), self.predicts.to(device)

        def replace_kept(x: Tensor) -> Tensor:
            x[keep] = x_hat.to(x)
            return x

        with replace_activations(self.stage.model, {self.stage.target: replace_kept}):
            spliced = logits(self.stage.model, self.batch.ids, grad=grad)
        return {"ce": self.losses(spliced), "kl": kl_divergence(self.logits[predicts], spliced[predicts])}
