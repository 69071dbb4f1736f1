"""`TrainingCLT`: a cross-layer transcoder with its losses and counters, and what is measured of it after training.

Every layer's codes, thresholds, penalty and dead latents are those of a `TrainingSAE`; the reconstruction is one, to
which all layers add.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import decode_entries, weighted_error
from saelab.functional.metrics import FiringSums, ReconstructionSums
from saelab.functional.sparse_products import SparseGradients
from saelab.sae.cross_layer import CLTModule
from saelab.sae.fitting import PART, REACH, TOLERANCE, cut_to, split_held_out, target_l0
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.terms import TrainingStep
from saelab.sae.placement import SCALE_TOKENS, place_weights
from saelab.sae.step_codes import StepCodes, activate_dense, attach_codes, search_codes, see_dense, see_entries
from saelab.sae.training_sae import StepLosses, TrainingSAE
from saelab.training.config import TrainConfig
from saelab.training.optimizer import differentiate
from saelab.training.ranks import ALONE
from saelab.training.schedules import value_at


@dataclass(frozen=True, eq=False)
class _Losses:
    """Losses of one batch, and what each layer's counters and thresholds are updated from."""

    terms: dict[str, Float[Tensor, ""]]
    l0: Float[Tensor, ""]
    layers: list[StepLosses]

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()


class TrainingCLT:
    """A cross-layer transcoder with what the training loop needs.

        loss = mean over layers m of ||y_m - y_hat_m||^2 / (n_tokens variance_m)  +  mean over layers of the other terms

    A batch's rows are the inputs of all layers with all outputs appended. The decoder rows of a layer's latents, side
    by side, are one matrix, and so a step costs what its codes do: no gradient of (n_layers, d_sae, d_out) for every
    layer is made where codes are sparse.

    Args:
        clt: the transcoder.
        cfg: configuration of the run.
        trained: whether it was trained before and keeps its weights.
    """

    def __init__(self, clt: CLTModule, cfg: TrainConfig, trained: bool = False) -> None:
        self.clt, self.cfg, self.trained = clt, cfg, trained
        self.layers = [TrainingSAE(layer, cfg) for layer in clt.layers]

    @property
    def module(self) -> CLTModule:
        """Module whose parameters are optimized."""
        return self.clt

    @property
    def state(self) -> dict[str, Tensor]:
        """Counters and thresholds' control of all layers, stacked, and so all that a checkpoint holds besides
        weights.
        """
        return {name: torch.stack([one.state[name] for one in self.layers]) for name in self.layers[0].state}

    @state.setter
    def state(self, held: Mapping[str, Tensor]) -> None:
        for i, one in enumerate(self.layers):
            one.state = {name: tensor[i].clone() for name, tensor in held.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must not change."""
        return self.clt.cfg.to_dict()

    @property
    def normalized_rows(self) -> tuple[str, ...]:
        """Weights whose rows the optimizer divides by their norms after each step."""
        unit = self.clt.cfg.dictionary == "unit"
        return tuple(f"layers.{i}.W_dec" for i in range(len(self.layers))) if unit else ()

    @property
    def dead_after_tokens(self) -> int:
        """Number of tokens without firing after which a latent counts as dead."""
        return self.layers[0].dead_after_tokens

    def default_lr(self) -> float:
        """Peak learning rate used where none is given: that of a transcoder of one layer, for TopK and its kind half of
        it (LOG.md).
        """
        activation = self.clt.cfg.activation
        competes = activation.competition in ("token", "batch", "group") and not activation.signed
        return self.layers[-1].default_lr() * (0.5 if competes else 1.0)

    def read(self, batch: Float[Tensor, "n_tokens width"]) -> tuple[list[Tensor], Float[Tensor, "n_tokens d_written"]]:
        """Normalized inputs of each layer, and all normalized outputs side by side."""
        clt = self.clt
        batch = batch.to(clt.b_dec, non_blocking=batch.is_pinned())
        width = clt.cfg.n_layers * clt.cfg.d_in
        parts = zip(clt.target_normalizers, batch[:, width:].split(clt.cfg.d_target, dim=1), strict=True)
        inputs = [part.contiguous() for part in clt.split(batch[:, :width])]
        return inputs, torch.cat([normalizer.normalize(part) for normalizer, part in parts], dim=1)

    @torch.no_grad()
    def prepare(self, sample: Float[Tensor, "n_tokens width"]) -> None:
        """Fit the normalizers and initialize biases, directions and encoder scale from a sample; one that was trained
        before keeps its normalizers and weights.
        """
        clt, cfg, sample = self.clt, self.clt.cfg, sample.to(self.clt.b_dec)
        if not self.trained:
            width = cfg.n_layers * cfg.d_in
            columns = [*sample[:, :width].split(cfg.d_in, dim=1), *sample[:, width:].split(cfg.d_target, dim=1)]
            for normalizer, part in zip([*clt.normalizers, *clt.target_normalizers], columns, strict=True):
                normalizer.fit(part)
        inputs, y = self.read(sample)
        centered = y - y.mean(0)
        for one, part in zip(self.layers, centered.split(cfg.d_target, dim=1), strict=True):
            variance = part.square().sum(1).mean()
            one.state["variance"] = variance if variance > 0 else torch.ones_like(variance)
        if self.trained:
            return
        clt.b_dec.copy_(y.mean(0))
        for one, x, start in zip(self.layers, inputs, cfg.starts, strict=True):
            place_weights(one.sae, x, centered[:, start:].contiguous(), self.cfg.seed)
            one.sae.b_dec.zero_()
        self._match_scale([x[:SCALE_TOKENS] for x in inputs], centered[:SCALE_TOKENS])

    def _match_scale(self, inputs: list[Tensor], centered: Tensor) -> None:
        """Scale all encoders by the c that minimizes the error of c times the sum of what the layers write."""
        written = torch.zeros_like(centered)
        for one, x, start in zip(self.layers, inputs, self.clt.cfg.starts, strict=True):
            u = x @ one.sae.W_enc + one.sae.b_enc
            written[:, start:] += one.activation(u, one.sae.threshold, training=True) @ one.sae.W_dec
        energy = written.square().sum()
        if energy > 0 and (scale := (centered * written).sum() / energy) > 0:
            for one in self.layers:
                one.sae.W_enc.mul_(scale.clamp(0.05, 1.0))
                one.sae.b_enc.mul_(scale.clamp(0.05, 1.0))

    def objective(self, batch: Float[Tensor, "n_tokens width"]) -> _Losses:
        """Losses of one batch. No side effects: counters and thresholds are updated in `observe`."""
        cfg, (inputs, y) = self.clt.cfg, self.read(batch)
        coded = [_LayerCodes.find(one, x) for one, x in zip(self.layers, inputs, strict=True)]
        each = torch.stack([one.state["variance"] for one in self.layers]).reciprocal() / cfg.n_layers
        weights = each.repeat_interleave(cfg.d_target)
        error, residual = weighted_error(y - self.clt.b_dec, weights, [one.part for one in coded], cfg.starts)
        errors, weighted = error.view(1), residual * weights
        penalties = []
        for one, found, start in zip(self.layers, coded, cfg.starts, strict=True):
            codes = StepCodes(errors, weighted[:, start:].contiguous(), found.penalty, found.seen)
            codes = codes.with_silent(found.silent, one.sae, one.sae.W_dec)
            errors = codes.errors
            penalties.append(codes.penalty)
        value = errors[0] / len(y)
        terms = {
            "reconstruction": value_at(self.clt.cfg.layer(0).reconstruction.coefficient, self.layers[0].share) * value
        }
        steps = []
        for one, found, x, start, penalty in zip(self.layers, coded, inputs, cfg.starts, penalties, strict=True):
            codes = StepCodes(errors, residual[:, start:], penalty, found.seen, found.sparse, found.dense)
            step = one.make_step(x, y[:, start:], one.sae.W_dec, codes, weights=weights[start:])
            own = _weigh(one, step)
            for name, loss in own.items():
                terms[name] = terms.get(name, 0) + loss / cfg.n_layers
            steps.append(StepLosses(own, *found.seen, n_tokens=len(y), notes=step.notes))
        return _Losses(terms, torch.stack([found.seen[1] for found in coded]).sum(), steps)

    def differentiate(self, loss: Float[Tensor, ""]) -> SparseGradients:
        """Differentiate a loss: gradients are in `.grad` but for those returned, of wide weights."""
        memories = {getattr(one.sae, name): memory for one in self.layers for name, memory in one.memory.items()}
        return differentiate(loss, memories)

    def recycle_gradients(self) -> None:
        """Clear the gradients, keeping the memory of the large ones."""
        for one in self.layers:
            one.recycle_gradients()
        self.clt.b_dec.grad = None

    def constrain_gradients(self) -> None:
        """Remove each dictionary row's gradient along the row, where rows have norm 1."""
        for one in self.layers:
            one.constrain_gradients()

    def constrain_weights(self) -> None:
        """Keep learned thresholds positive."""
        for one in self.layers:
            one.constrain_weights()

    def observe(self, seen: _Losses) -> None:
        """Update firing counters, running thresholds and sparsity coefficients of all layers; called once per step."""
        for one, losses in zip(self.layers, seen.layers, strict=True):
            one.observe(losses)

    def held_out_fvu(self, held_out: Float[Tensor, "n_tokens width"]) -> float:
        """FVU on held-out activations, with codes as in inference; the mean over layers."""
        return float(measure_clt(self.clt, held_out)["fvu"])


@dataclass(frozen=True, eq=False)
class _LayerCodes:
    """Codes of one layer in one step, and what it writes."""

    part: Float[Tensor, "n_tokens d_out"]
    penalty: Tensor | None
    seen: tuple[Tensor, Tensor, Tensor]
    """latents that fired, L0, smallest code"""
    silent: Any = None
    sparse: Any = None
    dense: Tensor | None = None

    @classmethod
    def find(cls, one: TrainingSAE, x: Float[Tensor, "n_tokens d_in"]) -> "_LayerCodes":
        """In the sparse form where that is possible and faster."""
        sae, activation = one.sae, one.activation
        with torch.no_grad():
            found, silent = search_codes(sae, activation, x, ALONE, unread=True)
        if found is None:
            z, _, penalty = activate_dense(sae, activation, x, ALONE)
            return cls(z @ sae.W_dec, penalty, see_dense(z), dense=z)
        values, entries, penalty = attach_codes(sae, found, (x, None, x), one.memory["W_enc"])
        part = decode_entries(values, sae.W_dec, entries, one.memory["W_dec"])
        seen = see_entries(values, entries, len(sae.W_dec), len(x), one.find_kept(values.detach().abs(), len(x)))
        return cls(part, penalty, seen, silent, (values, entries))


def _weigh(one: TrainingSAE, step: TrainingStep) -> dict[str, Tensor]:
    """Weighted losses of a layer's own terms."""
    found = {}
    for term in one.sae.cfg.terms:
        if not isinstance(term, ReconstructionLoss):
            found[term.name] = value_at(term.coefficient, one.share) * term(step)
    return found


@torch.no_grad()
def measure_clt(clt: CLTModule, rows: Float[Tensor, "n width"]) -> dict[str, Any]:
    """Metrics of a cross-layer transcoder on some tokens: n_tokens; l0 (of all layers together), fvu and dead_frac
    (means over layers); and the three of each layer under "layers".

    Args:
        clt: the transcoder.
        rows: inputs of all layers with all outputs appended.
    """
    cfg = clt.cfg
    width, n = cfg.n_layers * cfg.d_in, cfg.n_layers
    sums, fires = [ReconstructionSums(cfg.d_target) for _ in range(n)], [FiringSums(cfg.d_sae) for _ in range(n)]
    for part in rows.split(PART):
        part = part.to(clt.b_dec)
        codes = clt.encode_sparse(part[:, :width])
        outputs = (t.split(cfg.d_target, dim=1) for t in (part[:, width:], clt.decode(codes)))
        for i, (y, y_hat) in enumerate(zip(*outputs, strict=True)):
            sums[i].add(y, y_hat)
            fires[i].add(codes[i])
    layers = [
        {
            "l0": float(fire.firings.sum()) / max(1, len(rows)),
            "fvu": total.fvu if len(rows) else float("nan"),
            "dead_frac": float((fire.firings == 0).double().mean()),
        }
        for total, fire in zip(sums, fires, strict=True)
    ]
    means = {name: sum(layer[name] for layer in layers) / n for name in ("fvu", "dead_frac")}
    return {"n_tokens": len(rows), "l0": sum(layer["l0"] for layer in layers), **means, "layers": layers}


def finish_clt(
    clt: CLTModule, held_out: Float[Tensor, "n width"] | None, others: Float[Tensor, "m width"]
) -> dict[str, Any]:
    """`measure_clt` on tokens that training has not seen; first adjusts the mean L0 of each layer to its target, in
    place, as `SAE.fit` does.

    Args:
        clt: the trained transcoder; its thresholds or biases may change.
        held_out: rows left out of training, or None.
        others: rows used where none were held out.
    """
    first, second = split_held_out(held_out, others)
    for layer, x in zip(clt.layers, clt.split(first[:, : clt.cfg.n_layers * clt.cfg.d_in]), strict=True):
        target = target_l0(layer)
        if target is not None and len(first):
            running = layer.cfg.activation.threshold == "running"
            cut_to(layer, x, target, float("inf") if running else REACH)
    measured = measure_clt(clt, second)
    unseen = held_out is not None and len(held_out) > 0
    found = [layer["l0"] for layer in measured["layers"]]
    met = None if target is None or not len(second) else all(abs(l0 / target - 1) <= TOLERANCE for l0 in found)
    if met is False:
        warnings.warn(
            f"Each layer must have its target L0 ({target:g}) within {TOLERANCE:.0%}, got "
            f"{[round(l0, 2) for l0 in found]} on {len(second):,} tokens; train on more tokens, or set another target.",
            stacklevel=4,
        )
    return {**measured, "held_out": unseen, "target_l0": target, "met": met}
