"""`TrainingSAE`: an SAE with its losses, weight constraints, dead-latent counters and control of the sparsity penalty.

Before the first step biases, dictionary directions and encoder scale are set from a sample of activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.functional.codes import Entries, SparseCodes, nested_decode_error
from saelab.functional.metrics import ReconstructionSums, nested_error
from saelab.functional.sparse_products import GradientMemory, SparseGradients
from saelab.sae.activation_functions import MIN_THRESHOLD, ReLU
from saelab.sae.activation_registry import Activation
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.module import SAEModule
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep, find_entries, stack_groups
from saelab.sae.objectives.whole_step import STATE_PER_LATENT, WholeStep, group_among
from saelab.sae.placement import normalize_rows, place_weights, reorder_latents
from saelab.sae.sharding import LATENT_AXIS, reconstruct_among
from saelab.sae.soft_frozen import SoftFrozen, project_to_cones
from saelab.sae.source_views import read_inputs
from saelab.sae.step_codes import StepCodes, activate_dense, attach_codes, search_codes, see_dense, see_entries
from saelab.training.config import TrainConfig
from saelab.training.optimizer import differentiate, project_gradient
from saelab.training.ranks import ALONE, RankGrid
from saelab.training.schedules import value_at

THRESHOLD_RATE = 0.01  # of the running threshold's exponential average, after its first 100 steps, which average evenly
STEER_RATE = 0.03  # change of the log sparsity coefficient per step where L0 is off by a factor e
STEER_DAMPING = 1.0  # share of a change in log L0 that the coefficient follows at once, to prevent overshooting
STEER_LIMIT = 2.0  # clamp of the log-ratio of L0 to its target
# The coefficient acts through the optimizer, slowly; near the target all thresholds (ReLU: biases) follow L0 at once.
CUT_LIMIT = 0.5
THRESHOLD_STEP = 0.02  # change of log thresholds per step and unit of log-ratio
BIAS_STEP = 0.003  # change of biases per step and unit of log-ratio, in units of u


@dataclass(frozen=True, eq=False)
class StepLosses:
    """Weighted losses of one batch, and the statistics of its codes that `TrainingSAE.observe` needs."""

    terms: dict[str, Float[Tensor, ""]]
    """weighted losses by the name of their term"""
    fired: Bool[Tensor, "d_sae"]
    """latents that were active in the batch"""
    l0: Float[Tensor, ""]
    """mean number of active latents per token"""
    smallest: Float[Tensor, ""]
    """smallest non-zero magnitude of a code; NaN if none"""
    n_tokens: int
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    """statistics that the terms keep for their state"""

    @property
    def total(self) -> Float[Tensor, ""]:
        """Sum of the losses, which is differentiated."""
        return torch.stack(list(self.terms.values())).sum()


class TrainingSAE:
    """An SAE with what the training loop needs; everything besides the weights that a checkpoint must hold is in
    `state`.

    A batch's rows are activations; for a transcoder inputs with their targets appended, (n_tokens, d_in + d_out).

    Of several processes that train together (`ranks`) each has an SAE with weights of its own latents only, and is
    given its own rows of every batch.

    Args:
        sae: the SAE, whose weights are trained in place.
        cfg: settings of the training.
        trained: whether the SAE was trained before, so that it goes on from its weights.
        ranks: the processes that share the work.
    """

    def __init__(self, sae: SAEModule, cfg: TrainConfig, trained: bool = False, ranks: RankGrid = ALONE) -> None:
        self.sae, self.cfg, self.trained, self.ranks = sae, cfg, trained, ranks
        activation = sae.cfg.activation
        coefficient = activation.penalty_weight
        self.state: dict[str, Tensor] = {
            "n_steps": torch.zeros((), dtype=torch.int64),
            "tokens_since_fired": torch.zeros(len(sae.W_dec), dtype=torch.int64, device=sae.device),
            "variance": torch.tensor(float(sae.cfg.d_target), device=sae.device),
            "off_target": torch.zeros((), device=sae.device),
            "coefficient": torch.tensor(1e-3 if coefficient is None else coefficient, device=sae.device),
        }
        for term in sae.cfg.terms:
            self.state |= {f"{term.name}.{key}": t.to(sae.device) for key, t in term.initial_state(sae.cfg).items()}
        if isinstance(sae.cfg.dictionary, SoftFrozen):
            if getattr(sae, "training_", None) is not None:
                raise ValueError(
                    f"An SAE with {sae.cfg.dictionary} must be trained in one run, got one that was trained before: "
                    "the rows it started from, which bound it, are gone. Train a new one, or go on with resume=True."
                )
            self.state["axes"] = torch.zeros_like(sae.W_dec)
        self.steered = activation.penalty_target is not None
        self.memory = {"W_enc": GradientMemory(), "W_dec": GradientMemory(projected=sae.cfg.dictionary == "unit")}

    @property
    def module(self) -> SAEModule:
        """Module whose parameters are optimized."""
        return self.sae

    @property
    def latent_axes(self) -> Mapping[str, int]:
        """Weights and states of which each process has those of its latents, and which axis that of the latents is."""
        return LATENT_AXIS | dict.fromkeys(STATE_PER_LATENT, 0)

    @property
    def normalized_rows(self) -> tuple[str, ...]:
        """Weights whose rows the optimizer divides by their norms after each step."""
        return ("W_dec",) if self.sae.cfg.dictionary == "unit" else ()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must not change."""
        return self.sae.cfg.to_dict()

    @torch.no_grad()
    def prepare(self, sample: Float[Tensor, "n_tokens width"]) -> None:
        """Fit the normalizers, unless they were before, and initialize biases, directions and encoder scale from a
        sample; an SAE that was trained before keeps its weights.
        """
        sae, sample = self.sae, sample.to(self.sae.W_dec)
        if not self.trained and not sae.out_normalizer.fitted:
            sae.fit_normalizers(sample)
        x, y = self._read(sample)
        variance = (y - y.mean(0)).square().sum(1).mean()
        self.state["variance"].copy_(variance if variance > 0 else torch.ones_like(variance))
        if not self.trained:  # a trained SAE continues from its weights
            place_weights(sae, x, y, self.cfg.seed, self.ranks)
        if "axes" in self.state:
            self.state["axes"].copy_(normalize_rows(sae.W_dec))

    def _read(self, batch: Float[Tensor, "n_tokens width"]) -> tuple[Tensor, Tensor]:
        """Normalized inputs and targets; the same tensor for an autoencoder."""
        sae = self.sae
        batch = batch.to(sae.W_dec, non_blocking=batch.is_pinned())
        x = sae.normalizer.normalize(batch[:, : sae.cfg.d_in])
        if sae.target_normalizer is None:
            return x, x
        return x.contiguous(), sae.target_normalizer.normalize(batch[:, sae.cfg.d_in :])

    @property
    def share(self) -> float:
        """Completed steps over all steps of the run."""
        return min(1.0, int(self.state["n_steps"]) / self.cfg.n_steps)

    @property
    def _factor(self) -> float:
        """Factor on k or target L0 at this step."""
        schedule = self.sae.cfg.sparsity_schedule
        return 1.0 if schedule is None else schedule.at(self.share)

    @property
    def activation(self) -> Activation:
        """Activation function of this step, whose k may differ from that of the trained SAE."""
        activation = self.sae.cfg.activation
        if (k := getattr(activation, "k", None)) is None:
            return activation
        now = self.sae.cfg.reconstruction.training_k(max(1, round(self._factor * k)))
        return activation if now == k else replace(activation, k=min(now, self.sae.cfg.d_sae))  # type: ignore[call-arg]

    def objective(self, batch: Float[Tensor, "n_tokens width"]) -> StepLosses:
        """Losses of one batch. No side effects: counters and thresholds are updated in `observe`, weights by the
        optimizer.
        """
        return self.weigh(*self.code(batch))

    def code(self, batch: Float[Tensor, "n_tokens width"]) -> tuple[TrainingStep, tuple[Tensor, Tensor, Tensor]]:
        """Codes of one batch with all that loss terms read, and which latents fired, L0 and the smallest code."""
        sae = self.sae
        x, y = self._read(batch)
        W_dec = sae.W_dec if sae.archetypes is None else sae.archetypes()
        if sae.W_skip is not None:
            y = y - x @ sae.W_skip  # the part that the latents reconstruct
        b_read = self.ranks.latents.share(sae.b_dec) if sae.cfg.d_out is None else None
        coded = self._code(x, y, W_dec, b_read)
        return self.make_step(x, y, W_dec, coded, b_read), self._seen_by_all(coded.seen)

    def make_step(
        self,
        x: Float[Tensor, "n_tokens d_in"],
        y: Float[Tensor, "n_tokens d_out"],
        W_dec: Float[Tensor, "d_sae d_out"],
        coded: StepCodes,
        b_read: Float[Tensor, "d_in"] | None = None,
        weights: Float[Tensor, "d_out"] | None = None,
    ) -> TrainingStep:
        """What the loss terms of a step read.

        Args:
            x: normalized inputs.
            y: what the latents reconstruct.
            W_dec: the decoder in this step.
            coded: codes of the batch with their reconstruction errors.
            b_read: bias that is subtracted from x; None where nothing is.
            weights: factor on the squared error of each output; None where all are alike.
        """
        return TrainingStep(
            self.sae,
            x,
            y,
            W_dec,
            coded.errors,
            coded.residual,
            coded.penalty,
            self.state,
            share=self.share,
            number=int(self.state["n_steps"]),
            seed=self.cfg.seed,
            dead_after_tokens=self.dead_after_tokens,
            sparse=coded.sparse,
            dense=coded.dense,
            u=coded.u,
            ranks=self.ranks,
            b_read=b_read,
            memory=self.memory,
            weights=weights,
        )

    def weigh(self, step: TrainingStep, seen: tuple[Tensor, Tensor, Tensor]) -> StepLosses:
        """The weighted losses of a step.

        All terms each time, so that all entries of the history have the same keys.
        """
        terms, whole = {}, step if self.ranks.alone else WholeStep(step)
        for term in self.sae.cfg.terms:
            loss = term(step if term.sharded else whole)
            coefficient = value_at(term.coefficient, self.share)
            terms[term.name] = loss if coefficient == 1 else coefficient * loss
        n_tokens = step.n_tokens * self.ranks.data.size
        return StepLosses(terms, *seen, n_tokens=n_tokens, notes=step.notes)

    def _seen_by_all(self, seen: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of this rank that fired for any token of the batch, L0 of the batch, and its smallest code."""
        if self.ranks.alone:
            return seen
        (fired, l0, smallest), data, latents = seen, self.ranks.data, self.ranks.latents
        negative = -smallest.nan_to_num(nan=torch.inf)
        smallest = -data.largest(latents.largest(negative))
        l0 = data.total(latents.total(l0)) / data.size
        return data.largest(fired), l0, torch.where(smallest.isinf(), torch.nan, smallest)

    def _code(self, x: Tensor, y: Tensor, W_dec: Tensor, b_read: Tensor | None) -> StepCodes:
        """Codes of a batch, in the sparse form where that is possible and faster, and their errors."""
        sae, activation = self.sae, self.activation
        if isinstance(sae.cfg.encoder, PursuitEncoder):
            return self._pursuit_step(x, W_dec, sae.cfg.encoder, activation)
        found = silent = centered = None
        read = read_inputs(sae, x, activation, self.ranks, int(self.state["n_steps"]))
        if not any("dense" in term.needs for term in sae.cfg.terms):
            with torch.no_grad():
                centered = x if b_read is None else x - sae.b_dec
                encoded = centered if read is None else read.detach()
                found, silent = search_codes(sae, activation, encoded, self.ranks, self._ignores_zeros)
        if found is None or centered is None:
            return self._dense_step(x, y, W_dec, activation, read, b_read)
        return self._sparse_step(x, y, W_dec, centered, found, read, b_read).with_silent(silent, sae, W_dec)

    def _sparse_step(
        self,
        x: Tensor,
        y: Tensor,
        W_dec: Tensor,
        centered: Tensor,
        found: SparseCodes,
        read: Tensor | None,
        b_read: Tensor | None,
    ) -> StepCodes:
        """Errors of the prefixes from sparse codes, at a cost proportional to the number of active entries; `read` is
        what W_enc is applied to, where that is not `centered`.
        """
        inputs = (x, b_read, centered) if read is None else (read, None, None)
        values, entries, penalty = attach_codes(self.sae, found, inputs, self.memory["W_enc"])
        return self._decode_step(values, entries, y, W_dec, None if self.sae.cfg.d_out else centered, penalty)

    def _pursuit_step(self, x: Tensor, W_dec: Tensor, encoder: PursuitEncoder, activation: Activation) -> StepCodes:
        """Errors of the prefixes for a pursuit, whose codes are differentiable or constants."""
        number = int(self.state["n_steps"])
        visible = self.sae.cfg.reconstruction.visible(self.sae.cfg.d_in, self.cfg.seed, number)
        with torch.set_grad_enabled(encoder.learns_through_codes and torch.is_grad_enabled()):
            centered, rows = x - self.sae.b_dec, W_dec
            if visible is not None:
                centered, rows = centered @ visible.to(x), rows @ visible.to(x)
            codes = self.sae.pursue(centered, rows, getattr(activation, "k", None))
        entries = Entries(codes.indices, codes.rows, codes.offsets).with_columns(len(W_dec))
        return self._decode_step(codes.values, entries, x, W_dec, None, None)

    def _decode_step(
        self,
        values: Tensor,
        entries: Entries,
        y: Tensor,
        W_dec: Tensor,
        centered: Tensor | None,
        penalty: Tensor | None,
    ) -> StepCodes:
        """Errors of the groups from codes at the given entries; `centered` is y - b_dec, if known."""
        sae, n = self.sae, len(y)
        seen = see_entries(values, entries, len(W_dec), n, self.find_kept(values.detach().abs(), n))
        group, n_groups = self._group(values, entries, n)
        parts, ordered = entries, values
        if n_groups > 1:
            ordered, parts = stack_groups(values, entries, group, n_groups, n)
        add = None if self.ranks.latents.size == 1 else self.ranks.latents.add_
        errors, residual = nested_decode_error(
            ordered, W_dec, y, sae.b_dec, parts, n_groups, self.memory["W_dec"], centered, add
        )
        return StepCodes(errors, residual, penalty, seen, (values, entries))

    def find_kept(self, size: Float[Tensor, "nnz"], n_tokens: int) -> Float[Tensor, "m"]:
        """The magnitudes that a running threshold keeps in inference, fewer where training keeps more."""
        k = getattr(self.sae.cfg.activation, "k", None)
        if (
            self.sae.cfg.activation.threshold != "running"
            or k is None
            or self.sae.cfg.reconstruction.training_k(k) <= k
        ):
            return size
        whole = self.ranks.gather_ragged(size)
        return whole.topk(min(k * n_tokens * self.ranks.data.size, len(whole)), sorted=False).values

    @property
    def _ignores_zeros(self) -> bool:
        """Whether codes of 0 are in the reconstruction alone: no term reads codes, and no objective of a subclass."""
        own = type(self).objective is TrainingSAE.objective
        return own and len(self._prefixes()) == 1 and not any(term.reads_codes for term in self.sae.cfg.terms)

    @property
    def _first(self) -> int:
        """Number of this rank's first latent."""
        return self.ranks.latents.index * len(self.sae.W_dec)

    def _group(self, values: Tensor, entries: Entries, n_tokens: int) -> tuple[Tensor, int]:
        """Group of each code, and the number of groups."""
        grouped = group_among(self.sae.cfg, values, entries, n_tokens, self._first, self.ranks)
        if grouped is not None:
            return grouped
        ends = self._prefixes()
        if len(ends) == 1:
            return entries.indices, 1  # whose values do not matter: all codes are of one group
        ends_here = torch.tensor(ends, device=values.device) - self._first
        return torch.bucketize(entries.indices, ends_here, right=True), len(ends)

    def _dense_step(
        self,
        x: Tensor,
        y: Tensor,
        W_dec: Tensor,
        activation: Activation,
        read: Tensor | None,
        b_read: Tensor | None,
    ) -> StepCodes:
        """Errors of the prefixes for any activation, from dense codes."""
        sae = self.sae
        if read is None:
            read = x if b_read is None else x - b_read
        z, u, penalty = activate_dense(sae, activation, read, self.ranks)
        if type(sae.cfg.reconstruction).group is not ReconstructionLoss.group:
            coded = self._decode_step(*find_entries(z), y, W_dec, None, penalty)
            return replace(coded, dense=z, u=u)
        ends = [min(max(end - self._first, 0), len(W_dec)) for end in self._prefixes()]
        groups = zip([0, *ends], ends, strict=False)
        parts = torch.stack([z[:, start:end] @ W_dec[start:end] for start, end in groups])
        errors, residual = nested_error(y - sae.b_dec, self.ranks.latents.sum(parts))
        return StepCodes(errors, residual, penalty, see_dense(z), None, z, u)

    def differentiate(self, loss: Float[Tensor, ""]) -> SparseGradients:
        """Differentiate a loss: gradients are in `.grad` but for those returned, of wide weights of one process."""
        # of several processes gradients are averaged, and those of an archetypal dictionary go on to its points
        free = self.ranks.alone and self.sae.archetypes is None
        weights = dict(self.sae.named_parameters()) if free else {}
        return differentiate(loss, {weights[name]: m for name, m in self.memory.items() if name in weights})

    def recycle_gradients(self) -> None:
        """Clear the gradients, keeping the memory of the two large ones for reuse in the next step."""
        for name, parameter in self.sae.named_parameters():
            if name in self.memory and parameter.grad is not None:
                self.memory[name].spare = parameter.grad.T if name == "W_enc" else parameter.grad
        self.sae.zero_grad(set_to_none=True)

    def _prefixes(self) -> list[int]:
        """Sizes of this step's prefixes."""
        return self.sae.cfg.prefixes_at(self.cfg.seed, int(self.state["n_steps"]))

    @property
    def dead_after_tokens(self) -> int:
        """Number of tokens without firing after which a latent counts as dead."""
        aux = self.sae.cfg.aux
        given = aux.dead_after_tokens if aux is not None else None
        return given or (10_000_000 if self.cfg.n_tokens >= 100_000_000 else max(1, self.cfg.n_tokens // 20))

    @torch.no_grad()
    def observe(self, seen: StepLosses) -> None:
        """Update firing counters, the running threshold, the sparsity coefficient and the terms' own state; called once
        per step.
        """
        sae, state = self.sae, self.state
        state["n_steps"] += 1
        state["tokens_since_fired"] = (state["tokens_since_fired"] + seen.n_tokens).masked_fill_(seen.fired, 0)
        if sae.cfg.activation.threshold == "running" and sae.threshold is not None:
            before = torch.where(sae.threshold.isnan(), seen.smallest, sae.threshold)
            rate = (1 / state["n_steps"]).clamp(min=THRESHOLD_RATE).clamp(max=1.0)
            moved = before + rate * (seen.smallest - before)
            sae.threshold.copy_(torch.where(moved.isnan(), sae.threshold, moved))  # NaN: no active latent in this batch
        if self.steered:
            self._steer(seen.l0)
        if (duplicates := sae.cfg.duplicates) is not None:
            duplicates.replace(sae.W_dec, sae.cfg.activation.signed, int(state["n_steps"]), self.cfg.seed)
        for term in sae.cfg.terms:
            term.observe(seen.notes, state, self.share)

    def _steer(self, l0: Float[Tensor, ""]) -> None:
        """Move the penalty's coefficient, and all thresholds or biases by the same amount, toward the target L0."""
        sae, state, target = self.sae, self.state, self.sae.cfg.activation.penalty_target
        assert target is not None
        off = (l0.clamp(min=1e-3) / (self._factor * target)).log().clamp(-STEER_LIMIT, STEER_LIMIT)
        moved = (off - state["off_target"]) * (state["n_steps"] > 1)
        state["coefficient"] *= (STEER_RATE * off + STEER_DAMPING * moved).exp()
        state["off_target"] = off
        near = off.clamp(-CUT_LIMIT, CUT_LIMIT)
        if sae.cfg.activation.gated and sae.threshold is not None:
            sae.set_gate(sae.threshold + BIAS_STEP * near)
        elif sae.threshold is not None:
            sae.threshold.mul_((THRESHOLD_STEP * near).exp())
        elif isinstance(sae.cfg.activation, ReLU):
            sae.b_enc.sub_(BIAS_STEP * near)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Remove each dictionary row's gradient along the row, which would only change its length."""
        if self.sae.cfg.dictionary == "unit" and "W_dec" not in self.gradient_squares:
            project_gradient(self.sae.W_dec)

    @property
    def gradient_squares(self) -> dict[str, Float[Tensor, ""]]:
        """Squared norms of gradients that are known, by the names of their weights: one kernel computed both."""
        square = self.memory["W_dec"].square_of(self.sae.W_dec.grad)
        return {} if square is None else {"W_dec": square}

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Project dictionary rows to their archetypal constraint or near their initial directions, and keep learned
        thresholds positive.
        """
        if isinstance(self.sae.cfg.dictionary, SoftFrozen):
            self.sae.W_dec.copy_(project_to_cones(self.sae.W_dec, self.state["axes"], self.sae.cfg.dictionary.cosine))
        if self.sae.archetypes is not None:
            self.sae.archetypes.constrain()
            self.sae.W_dec.copy_(self.sae.archetypes())
        if self.sae.cfg.activation.gated:
            self.sae.set_gate()
        elif self.sae.cfg.activation.threshold == "learned" and self.sae.threshold is not None:
            self.sae.threshold.clamp_(min=MIN_THRESHOLD)

    def join_state(self) -> None:
        """Take over the counters of all latents, once the SAE has their weights again."""
        for name in STATE_PER_LATENT:
            if name in self.state:
                self.state[name] = self.ranks.latents.join(self.state[name])
        self.ranks = ALONE

    def settle(self) -> None:
        """Put the latents in the order that the reconstruction term asks for, with their counters; called once, after
        the last step.
        """
        if (order := self.sae.cfg.reconstruction.final_order(self.state)) is not None:
            reorder_latents(self.sae, order)
            self.state["tokens_since_fired"] = self.state["tokens_since_fired"][order]

    @torch.no_grad()
    def held_out_fvu(self, held_out: Float[Tensor, "n_tokens width"]) -> float:
        """FVU on held-out activations, with codes as in inference."""
        cfg, sums = self.sae.cfg, ReconstructionSums(self.sae.cfg.d_target)
        for part in held_out.split(4096):
            sums.add(part[:, -cfg.d_target :], reconstruct_among(self.sae, part[:, : cfg.d_in], self.ranks))
        return sums.fvu

    def default_lr(self) -> float:
        """Peak learning rate used where none is given; depends on widths, batch size and length of the run.

        `0.54 / (d_in^1/2 d_sae^1/4) * (batch_size / 4096)^1/2 * min(1, (500 / n_steps)^1/4)`, fitted to the sweeps of
        LOG.md: unit rows have entries of size d_in^-1/2; wider dictionaries and longer runs need smaller steps. For a
        transcoder d_in is the larger of its two widths. An activation's `lr_scale` multiplies it, and for a transcoder
        also its `transcoder_lr_scale`, reduced (to no less than 1) in runs of fewer than 150 steps.
        """
        cfg = self.sae.cfg
        rate = 0.54 / (max(cfg.d_in, cfg.d_target) ** 0.5 * cfg.d_sae**0.25) * (self.cfg.batch_size / 4096) ** 0.5
        if cfg.d_out is not None:
            rate *= max(1.0, cfg.activation.transcoder_lr_scale * min(1.0, (self.cfg.n_steps / 150) ** 0.5))
        return float(cfg.activation.lr_scale * rate * min(1.0, (500 / self.cfg.n_steps) ** 0.25))
