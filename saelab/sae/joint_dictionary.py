"""`fit_joint_dictionary`: a dictionary and a classifier of its codes, learned together from labels."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from saelab.functional.codes import sparse_decode
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import PursuitEncoder
from saelab.sae.fitting import MAX_TOKENS, Data, check_widths, describe_training, finish, hold_out, open_data, open_run
from saelab.sae.objectives.terms import TrainingStep
from saelab.sae.pretrained import WEIGHTS
from saelab.sae.sae import SAE
from saelab.sae.training_sae import StepLosses, TrainingSAE
from saelab.stores.activations import ActivationPairs, Activations
from saelab.stores.files import checksum, save_tensors, to_json
from saelab.stores.jobs import hold_folder
from saelab.stores.tensors import load_tensors, read_header
from saelab.stores.validation import parse_json
from saelab.training.config import TrainConfig
from saelab.training.loop import Sink, train

TERM = "labels"  # name of the loss in the history
CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, eq=False)
class JointDictionary:
    """A dictionary and the classifier that it was learned with, `p(concept | x) = sigmoid(z W + b)`, z the codes of x.

    Neither codes nor predictions of new activations read labels. `save_pretrained` writes a folder that also is one of
    the SAE alone.
    """

    sae: SAE
    W: Float[Tensor, "d_sae n_concepts"]
    b: Float[Tensor, "n_concepts"]
    concepts: tuple[str, ...]

    def __repr__(self) -> str:
        return f"JointDictionary({self.sae}, {len(self.concepts)} concepts)"

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n n_concepts"]:
        """Probability of each concept at each row, from its codes."""
        codes = self.sae.encode_sparse(x)
        return (sparse_decode(codes.values, self.W, codes.indices, codes.rows, codes.offsets) + self.b).sigmoid()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the SAE's files into a folder, and `classifier.safetensors` beside them; ValueError as for an SAE."""
        self.sae.save_pretrained(folder)
        of = {"concepts": to_json(self.concepts, None), "sae": checksum(Path(folder) / WEIGHTS)}
        save_tensors(Path(folder) / CLASSIFIER, {"W": self.W, "b": self.b}, of)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "JointDictionary":
        """The dictionary and classifier of a folder.

        FileNotFoundError for a folder that lacks either, ValueError for damaged files and for a classifier that was
        learned with another SAE.
        """
        sae, place = SAE.from_pretrained(folder), Path(folder) / CLASSIFIER
        found, said = load_tensors(place), read_header(place)[1]
        concepts = parse_json(said.get("concepts", "null"))
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if not isinstance(concepts, list) or shapes != {"W": (sae.cfg.d_sae, len(concepts)), "b": (len(concepts),)}:
            raise ValueError(f"{place} must hold W, b and their concepts for {sae}, got {shapes}. Was it edited?")
        if said.get("sae") != checksum(Path(folder) / WEIGHTS):
            raise ValueError(f"{place} must be of the SAE beside it, which has been replaced since; fit them again.")
        return cls(sae, found["W"], found["b"], tuple(map(str, concepts)))


def fit_joint_dictionary(
    sae: SAE,
    acts: Data,
    labels: LabelsLike,
    cfg: TrainConfig | None = None,
    *,
    coefficient: float = 1.0,
    out: str | Path | None = None,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    progress: bool = True,
) -> JointDictionary:
    """Train an SAE for reconstruction and for the labels of its tokens at once; the same SAE, with a classifier.

        loss = objective(x) + coefficient * mean over concepts of CE(y, sigmoid(z W + b)) / H(y)

    Supervised dictionary learning (arXiv:0809.3083) with the SAE's encoder in place of sparse coding. The cross-entropy
    over the label's entropy H(y) is 1 for a classifier that knows the rate alone, as the reconstruction loss is 1
    without any latent, so that rare concepts count as much as others. It moves dictionary and encoder: directions of
    little variance that tell concepts apart get latents, which reconstruction pays for. With `coefficient=0` the SAE is
    that of `SAE.fit`, to the bit, and the classifier stays at the rates.

    Exclusive values of an attribute are one concept each. `training_` has the concepts and the coefficient.

    Args:
        sae: the SAE, which is changed; one that was trained before continues from its weights.
        acts: (n_tokens, d_in) activations, collected or a tensor.
        labels: of the same tokens. Score the result on others: it has seen these labels.
        cfg: training configuration; None is `TrainConfig()`.
        coefficient: weight of the cross-entropy, xi.
        out: folder for history and checkpoints; None writes nothing.
        resume: continue from the last checkpoint in `out`, on a CPU with the same number of threads bit for bit.
        sinks: loggers that receive each entry of the history.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for labels of other tokens, a concept that is true of all or none, a transcoder, a pursuit whose
            codes have no gradient, and a folder that does not go with `resume`.

    >>> x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2)), seed=0)
    >>> run = sl.TrainConfig(n_tokens=4_000, batch_size=100)
    >>> fit_joint_dictionary(sae, x, {"up": x[:, 0] > 1}, run, progress=False).predict(x).shape
    torch.Size([600, 1])
    """
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"`coefficient` must be at least 0 and finite, got {coefficient}.")
    if (why := refuse_labels(sae.cfg)) is not None:
        raise ValueError(f"`sae` must have codes that labels can move, got {sae}: {why}.")
    if any(term.name == TERM for term in sae.cfg.objective):
        raise ValueError(f"`sae` must have no loss term '{TERM}', the name of the classifier's, got one; rename it.")
    given, data = TokenLabels.of(labels), open_data(acts)
    if not isinstance(data, Activations):
        raise ValueError(f"`acts` must be collected activations, got {type(data).__name__}; a stream has no labels.")
    check_widths(sae, data.d_in, None)
    if given.n_tokens != len(data):
        raise ValueError(f"`labels` must have one for each of the {len(data)} tokens, got {given.n_tokens}.")
    cfg = cfg or TrainConfig()
    marks = torch.from_numpy(given.matrix.toarray()).to(data.dtype)
    rows, kept = hold_out(ActivationPairs(data, Activations.from_tensor(marks)), cfg, None, _needs_neighbors(sae.cfg))
    trainee = _JointTraining(
        sae, cfg, marks[: len(marks) - (0 if kept is None else len(kept))], given.names, coefficient
    )
    with nullcontext() if out is None else hold_folder(out):
        run = open_run([trainee], rows, cfg, kept, out, resume)
        train(run, resume=resume, sinks=sinks, progress=progress)
    trainee.settle()
    held_out = None if kept is None else kept[:, : sae.cfg.d_in]
    others = run.peek(MAX_TOKENS)[:, : sae.cfg.d_in] if kept is None else kept[:0, : sae.cfg.d_in]
    described = describe_training(run, 0, finish(sae, held_out, others))
    sae.training_ = {**described, "label_coefficient": coefficient, "concepts": list(given.names)}
    sae.provenance, sae.history_ = data.provenance, run.history
    classifier = trainee.module.classifier
    return JointDictionary(sae, classifier.W.detach(), classifier.b.detach(), given.names)


def refuse_labels(cfg: SAEConfig) -> str | None:
    """Why an SAE cannot be trained on labels, or None where it can."""
    if cfg.d_out is not None:
        return "it is a transcoder, which has a target already"
    if isinstance(cfg.encoder, PursuitEncoder) and not cfg.encoder.learns_through_codes:
        return f"the codes of {cfg.encoder} are constants in training"
    return None


def _needs_neighbors(cfg: SAEConfig) -> bool:
    return any("neighbors" in term.needs for term in cfg.terms)


class _Classifier(nn.Module):
    """Logistic regressions on codes, which start at the rates of the labels."""

    def __init__(self, d_sae: int, rates: Float[Tensor, "n_concepts"]) -> None:
        super().__init__()
        self.W = nn.Parameter(rates.new_zeros(d_sae, len(rates)))
        self.b = nn.Parameter(rates.logit())


class _Both(nn.Module):
    """What is optimized: the SAE's weights and the classifier's."""

    def __init__(self, sae: SAE, classifier: _Classifier) -> None:
        super().__init__()
        self.sae, self.classifier = sae, classifier


class _JointTraining(TrainingSAE):
    """An SAE and a classifier of its codes, on rows that are activations with their labels appended."""

    def __init__(
        self, sae: SAE, cfg: TrainConfig, marks: Float[Tensor, "n n_concepts"], names: Sequence[str], coefficient: float
    ) -> None:
        super().__init__(sae, cfg, trained=sae.training_ is not None or sae.placed)
        rates = marks.float().mean(0).to(sae.device)
        if bool(((rates == 0) | (rates == 1)).any()):
            wrong = [name for name, rate in zip(names, rates.tolist(), strict=True) if rate in (0, 1)]
            raise ValueError(f"Labels must be true of some and false of other training tokens, not so: {wrong[:5]}.")
        self.both, self.coefficient = _Both(sae, _Classifier(sae.cfg.d_sae, rates)), coefficient
        self.labels = {
            "concepts": list(names),
            "labels": sha256(np.packbits((marks > 0.5).numpy()).tobytes()).hexdigest(),
        }
        self.entropy = -(rates.xlogy(rates) + (1 - rates).xlogy(1 - rates))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run must not change, those of the labels among them."""
        return {**super().settings, "label_coefficient": self.coefficient, **self.labels}

    @property
    def module(self) -> Any:
        """Module whose parameters are optimized."""
        return self.both

    @property
    def normalized_rows(self) -> tuple[str, ...]:
        """Weights whose rows the optimizer divides by their norms after each step."""
        return tuple(f"sae.{name}" for name in super().normalized_rows)

    def objective(self, batch: Float[Tensor, "n_tokens width"]) -> StepLosses:
        """Losses of a batch, and the cross-entropy of its labels."""
        step, seen = self.code(batch)
        losses = self.weigh(step, seen)
        losses.terms[TERM] = self.coefficient * self.cross_entropy(step, batch[:, self.sae.cfg.d_in :].to(step.x))
        return losses

    def cross_entropy(self, step: TrainingStep, y: Float[Tensor, "n_tokens n_concepts"]) -> Float[Tensor, ""]:
        """Mean over concepts of the cross-entropy of the labels, over their entropy."""
        W, b = self.both.classifier.W, self.both.classifier.b
        if step.dense is not None:
            logits = step.dense @ W + b
        else:
            at = step.entries
            logits = sparse_decode(step.values, W, at.indices, at.rows, at.offsets) + b
        return (binary_cross_entropy_with_logits(logits, y, reduction="none").mean(0) / self.entropy).mean()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the latents in their final order, in the classifier too."""
        if (order := self.sae.cfg.reconstruction.final_order(self.state)) is not None:
            self.both.classifier.W.copy_(self.both.classifier.W[order])
        super().settle()

    def recycle_gradients(self) -> None:
        """Clear the gradients, of the classifier too."""
        super().recycle_gradients()
        self.both.classifier.zero_grad(set_to_none=True)

    def held_out_fvu(self, held_out: Float[Tensor, "n_tokens width"]) -> float:
        """FVU on held-out activations, whose labels are not read."""
        return super().held_out_fvu(held_out[:, : self.sae.cfg.d_in])
