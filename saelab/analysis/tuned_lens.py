"""`fit_lens`: affine maps of each layer to the last, by which the model's last norm and head read every layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saelab.collecting.reader import DEFAULT_MASK, ActivationReader, ForwardRows
from saelab.functional.metrics import kl_divergence
from saelab.functional.statistics import DocumentSums, find_interval
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import batches_of, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.last_layers import LastLayers
from saelab.lm.masks import TokenMask
from saelab.lm.tokens import Tokens
from saelab.lm.verification import find_residuals
from saelab.stores.files import checksum, replace_folder, save_tensors, write_json
from saelab.stores.manifest import Provenance
from saelab.stores.results import Drawn, Result, format_table
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL, naming, read_fields, read_sealed, require_object

TENSORS, FACTS, KIND = "lens.safetensors", "lens.json", "tuned lens"
MOST_TOKENS = 1024
"""of a forward pass: logits of all of them are held"""
READERS = ("logit", "tuned", "permuted", "mean")
"""logit lens; tuned lens; the tuned lens of other tokens' activations; the mean prediction of the training text"""


@dataclass(frozen=True, kw_only=True)
class LensScore:
    """How near predictions read from one layer come to the model's own, on held-out tokens.

    `kl` is the mean of KL(model || lens), nats a token, lower is better; `agreement` the share of tokens with the same
    likeliest next token. Both by what reads: "logit", "tuned", "permuted" and "mean".
    """

    hook_point: str
    kl: dict[str, float]
    kl_interval: dict[str, tuple[float, float]]
    """95 % intervals, by the bootstrap over documents"""
    gain_interval: tuple[float, float]
    """of KL of the logit lens less that of the tuned lens, the same documents for both"""
    agreement: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LensScores(Result):
    """Scores of a tuned lens on held-out documents, beside the logit lens and two nulls."""

    rows: tuple[LensScore, ...]
    n_train: int
    """tokens of the training text, seen several times in a long training"""
    n_tokens: int
    """held-out tokens"""
    n_documents: int
    """held-out documents"""
    source: str
    n_steps: int
    seed: int
    limits: str = (
        "A lens tells what a linear map and the last layers can read from a layer, which later layers need not use. "
        "One as good as the mean prediction reads nothing of the token."
    )

    @property
    def unread(self) -> tuple[str, ...]:
        """Hook points at which the tuned lens is no better than the mean prediction, which knows no token."""
        return tuple(row.hook_point for row in self.rows if not row.kl_interval["tuned"][1] < row.kl["mean"])

    def __str__(self) -> str:
        head = (
            f"{self.source}: fitted to {self.n_train:,} tokens in {self.n_steps:,} steps, scored on {self.n_tokens:,} "
            f"held-out tokens of {self.n_documents:,} documents; seed {self.seed}"
        )
        null = ", ".join(self.unread)
        lines = [head, f"no better than the mean prediction: {null or 'none'}"]
        table = [["", *(f"KL {name}" for name in READERS), "less, 95 %", *(f"same, {name}" for name in READERS)]]
        for row in self.rows:
            low, high = row.gain_interval
            cells = [*(f"{row.kl[name]:.3f}" for name in READERS), f"{low:.3f} to {high:.3f}"]
            table.append([row.hook_point, *cells, *(f"{row.agreement[name]:.3f}" for name in READERS)])
        return "\n".join([*lines, *format_table(table), self.limits])


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedLens(Drawn):
    """Affine maps from layers to the residual stream behind the last block, `x + x W + b`; made by `fit_lens`."""

    hook_points: tuple[str, ...]
    W: Float[Tensor, "n_layers d_model d_model"]
    b: Float[Tensor, "n_layers d_model"]
    scores: LensScores | None = None
    origin: Provenance | None = None
    """model and text that it was fitted on"""

    def apply(self, hook_point: str, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Activations of a layer as the residual stream behind the last block that they lead to on average.

        ValueError for a layer that the lens has no map for.
        """
        if hook_point not in self.hook_points:
            raise ValueError(
                f"`hook_point` must be one of the lens ({', '.join(self.hook_points)}), got '{hook_point}'."
            )
        i = self.hook_points.index(hook_point)
        return x + x @ self.W[i].to(x) + self.b[i].to(x)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `lens.json` and `lens.safetensors` into a folder, both or neither."""
        with replace_folder(folder, last=FACTS, stale=(FACTS, TENSORS)) as temp:
            save_tensors(temp / TENSORS, {"W": self.W, "b": self.b})
            facts = {
                "kind": KIND,
                "hook_points": list(self.hook_points),
                "scores": None if self.scores is None else self.scores.to_dict(),
                "origin": None if self.origin is None else self.origin.to_dict(),
                "tensors": checksum(temp / TENSORS),
            }
            write_json(temp / FACTS, facts, sealed=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TunedLens":
        """The lens of a folder; FileNotFoundError where a file is missing, ValueError for damaged or edited files."""
        path = Path(folder) / FACTS
        found, check_seal = read_sealed(path)
        with naming(path):
            plain = dict(require_object(found, "A lens"))
            plain.pop(SEAL, None)
            if plain.pop("kind", None) != KIND:
                raise ValueError(f"A lens must be of kind '{KIND}', got another; give what `save_pretrained` wrote.")
            if (given := plain.get("scores")) is not None:
                plain["scores"] = _read_scores(require_object(given, "Scores"))
            told = read_fields(_LensFacts, plain)
            origin = None if told.origin is None else Provenance.from_dict(told.origin)
            check_seal()
        tensors = load_tensors(Path(folder) / TENSORS)
        n, d = len(told.hook_points), tensors["b"].shape[-1] if "b" in tensors else 0
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {"W": (n, d, d), "b": (n, d)} or told.tensors != checksum(Path(folder) / TENSORS):
            raise ValueError(f"{Path(folder) / TENSORS} must hold the weights that {FACTS} tells of. Was it replaced?")
        return cls(**tensors, hook_points=told.hook_points, scores=told.scores, origin=origin)

    def __repr__(self) -> str:
        return f"TunedLens({len(self.hook_points)} layers, d_model {self.b.shape[1]})"

    def __str__(self) -> str:
        return repr(self) if self.scores is None else f"{self!r}\n{self.scores}"


def _read_scores(plain: dict[str, Any]) -> LensScores:
    """Scores as `to_dict` wrote them, whose pairs are lists."""
    rows = []
    for row in plain.get("rows") or ():
        fields = dict(require_object(row, "A score"))
        pairs = require_object(fields.get("kl_interval"), "Intervals")
        fields["kl_interval"] = {name: tuple(pair) for name, pair in pairs.items()}
        rows.append(read_fields(LensScore, fields))
    return read_fields(LensScores, plain | {"rows": tuple(rows)})


@dataclass(frozen=True, kw_only=True)
class _LensFacts:
    """What `lens.json` holds."""

    hook_points: tuple[str, ...]
    scores: LensScores | None
    origin: dict[str, Any] | None
    tensors: str


@torch.inference_mode(False)  # gradients are needed wherever it is called
def fit_lens(
    model: AnyModel,
    tokens: Tokens,
    held_out: Tokens | None = None,
    hook_points: Sequence[str] | None = None,
    *,
    n_steps: int = 400,
    batch_size: int | None = None,
    lr: float | None = None,
    mask: TokenMask = DEFAULT_MASK,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """A tuned lens: for each layer an affine map, trained so that the last layers predict from it what the model does.

    The mean of KL(p || q) falls, p what the model predicts at a token and q what its final norm and head make of
    `x + x W + b`, x the layer's activation. W and b begin at 0, so that an untrained lens is the logit lens; Adam, with
    a rate that falls to 0, in units of the layer's deviation. Source: arXiv:2303.08112. Scores on held-out documents
    stand beside the logit lens, the same lens of other tokens' activations, and the mean prediction. The model is not
    changed.

    Args:
        model: the language model.
        tokens: text to train on.
        held_out: text of other documents for the scores; None takes the last fifth of the rows, without documents that
            training has.
        hook_points: layers of the residual stream; None is the input of each block.
        n_steps: steps of training.
        batch_size: sequences in a step; None takes as many as hold about 1,024 tokens.
        lr: learning rate of the first step; None is 0.1 / sqrt(d_model).
        mask: tokens that are read.
        n_bootstrap: draws of documents for the intervals.
        seed: of the batches, the permutations and the bootstrap.
        progress: show progress.

    Raises:
        ValueError: for no held-out rows, a number out of range, hook points that are not as wide as the residual
            stream, and a model whose last layers cannot be told (see `LastLayers`).

    >>> model = sl.lm.tiny_model()
    >>> tokens = sl.tokenize(model, [f"{n} owls see {2 * n} cats" for n in range(10, 40)], ctx_len=24, packed=False)
    >>> lens = fit_lens(model, tokens, n_steps=3, progress=False)
    >>> lens, len(lens.scores.rows)
    (TunedLens(3 layers, d_model 32), 3)
    """
    model = as_model(model)
    lr = 0.1 / math.sqrt(model.cfg.d_model) if lr is None else lr
    if n_steps < 0 or not lr > 0 or n_bootstrap < 1:
        raise ValueError(
            f"`n_steps` must be at least 0, `n_bootstrap` 1 and `lr` positive, got {n_steps}, {n_bootstrap} and {lr}."
        )
    residuals = find_residuals(hook_points_of(model))
    names = tuple(hook_points or residuals[:-1])
    train, test = (tokens, held_out) if held_out is not None else _split(tokens)
    n_seq = forward_size(train, batch_size, MOST_TOKENS)
    last = LastLayers.measure(model)
    points = (*names, *([last.last] if last.last not in names else []))
    reader = ActivationReader.make(model, train, points, mask, torch.float32).calibrated(train, n_seq)
    width = model.cfg.d_model
    if wrong := {name: d for name, d in reader.widths(train).items() if d != width}:
        raise ValueError(f"`hook_points` must be as wide as the residual stream ({width}), got {wrong}.")
    fit = _LensFit(reader, last, names, torch.Generator().manual_seed(seed))
    fit.run(train, n_seq, n_steps, lr, progress)
    scores = _score(fit, train, test, n_seq, n_bootstrap, seed)
    origin = reader.origins(train, reader.count_rows(train), {}, seed)[names[0]]
    made = fit.make()
    return replace(made, scores=replace(scores, n_steps=n_steps), origin=origin)


def _split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """The first four fifths of the rows, and those of the rest that share no document with them."""
    cut = max(1, len(tokens) * 4 // 5)
    train, rest = tokens[:cut], tokens[cut:]
    fresh = [i for i in range(len(rest)) if not torch.isin(rest.doc_ids[i], train.doc_ids[train.attention_mask]).any()]
    if not fresh:
        raise ValueError(
            "`tokens` must hold rows of documents that training has not seen, got none in the last fifth. Give "
            "`held_out`, or more documents."
        )
    return train, rest[fresh]


class _LensFit:
    """Maps in training, of activations whose mean and scale are taken out."""

    def __init__(
        self, reader: ActivationReader, last: LastLayers, names: tuple[str, ...], generator: torch.Generator
    ) -> None:
        self.reader, self.last, self.names, self.generator = reader, last, names, generator
        d, device = reader.model.cfg.d_model, next(reader.model.original_model.parameters()).device
        self.weights = [torch.zeros(d + 1, d, device=device, requires_grad=True) for _ in names]
        self.means = [torch.zeros(d, device=device) for _ in names]
        self.scales = [1.0 for _ in names]

    def run(self, train: Tokens, n_seq: int, n_steps: int, lr: float, progress: bool) -> None:
        """Train all maps."""
        batches = self._draw_batches(train, n_seq)
        self._measure_scales(next(batches))
        if not n_steps:
            return
        optimizer = torch.optim.Adam(self.weights, lr=lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
        for _ in tqdm(range(n_steps), disable=not progress, desc="lens"):
            rows = self.reader.read(next(batches))
            with torch.no_grad():
                target = self.last(rows.acts[self.last.last])
            for i, name in enumerate(self.names):  # one after the other, as each makes logits of all tokens
                with torch.enable_grad():
                    loss = kl_divergence(target, self.last(self._translate(i, rows.acts[name]))).mean()
                # of the map alone: the model's parameters keep the gradients that they have
                (self.weights[i].grad,) = torch.autograd.grad(loss, self.weights[i])
            optimizer.step()
            schedule.step()

    def _translate(self, i: int, x: Tensor) -> Tensor:
        weight = self.weights[i]
        return x + ((x - self.means[i]) / self.scales[i] @ weight[:-1] + weight[-1]) * self.scales[i]

    def _measure_scales(self, batch: Tokens) -> None:
        rows = self.reader.read(batch)
        for i, name in enumerate(self.names):
            x = rows.acts[name]
            self.means[i] = x.mean(0)
            self.scales[i] = max(float((x - x.mean(0)).square().mean().sqrt()), 1e-12)

    def _draw_batches(self, train: Tokens, n_seq: int) -> Iterator[Tokens]:
        """Batches of sequences in random order, epoch after epoch; those without a kept token are passed over."""
        while True:
            order = torch.randperm(len(train), generator=self.generator)
            for part in order.split(n_seq):
                if self.reader.count_rows(batch := train[part.tolist()]):
                    yield batch

    @torch.no_grad()
    def make(self) -> TunedLens:
        """The maps on activations as they are."""
        found = [one.detach() for one in self.weights]
        shifts = [
            one[-1] * scale - mean @ one[:-1] for one, scale, mean in zip(found, self.scales, self.means, strict=True)
        ]
        return TunedLens(
            hook_points=self.names,
            W=torch.stack([one[:-1] for one in found]).cpu(),
            b=torch.stack(shifts).cpu(),
        )


@torch.no_grad()
def _score(fit: _LensFit, train: Tokens, test: Tokens, n_seq: int, n_bootstrap: int, seed: int) -> LensScores:
    """Scores by layer and reader, over the kept tokens of the held-out text."""
    reader, last, names = fit.reader, fit.last, fit.names
    mean = torch.zeros(())
    n_train = 0
    for batch in batches_of(train, n_seq):
        if reader.count_rows(batch):
            rows = reader.read(batch)
            mean = mean + last(rows.acts[last.last]).softmax(-1).double().sum(0).cpu()
            n_train += len(rows.index)
    log_mean = (mean / n_train).clamp(min=1e-300).log().float()
    lens = fit.make()
    generator = torch.Generator().manual_seed(seed)
    read: dict[str, Callable[[str, Tensor], Tensor]] = {
        "logit": lambda name, x: last(x),
        "tuned": lambda name, x: last(lens.apply(name, x)),
        "permuted": lambda name, x: last(lens.apply(name, x[torch.randperm(len(x), generator=generator)])),
        "mean": lambda name, x: log_mean.to(x.device).expand(len(x), -1),
    }
    sums = DocumentSums(test.doc_ids)
    for batch in batches_of(test, n_seq):
        if reader.count_rows(batch):
            rows = reader.read(batch)
            sums.add(rows.columns["doc_ids"].cpu(), _terms(rows, last, names, read))
    totals, draws = sums.total(), sums.resample(n_bootstrap, seed)
    n, n_drawn = float(totals["n_tokens"]), draws["n_tokens"]
    rows_found = []
    for i, name in enumerate(names):
        kl = {kind: float(totals[f"{i} {kind}"]) / n for kind in READERS}
        gain = (draws[f"{i} logit"] - draws[f"{i} tuned"]) / n_drawn
        rows_found.append(
            LensScore(
                hook_point=name,
                kl=kl,
                kl_interval={kind: find_interval(draws[f"{i} {kind}"] / n_drawn) for kind in READERS},
                gain_interval=find_interval(gain),
                agreement={kind: float(totals[f"{i} {kind} same"]) / n for kind in READERS},
            )
        )
    return LensScores(
        rows=tuple(rows_found), n_train=n_train, n_tokens=int(n), n_documents=sums.n_documents, source=train.source,
        n_steps=0, seed=seed,
    )  # fmt: skip


def _terms(
    rows: ForwardRows, last: LastLayers, names: tuple[str, ...], read: dict[str, Callable[[str, Tensor], Tensor]]
) -> dict[str, Tensor]:
    """KL and agreement of every layer and reader at each token."""
    target = last(rows.acts[last.last])
    top = target.argmax(-1)
    terms = {"n_tokens": torch.ones(len(target))}
    for i, name in enumerate(names):
        for kind, reads in read.items():
            made = reads(name, rows.acts[name])
            terms[f"{i} {kind}"] = kl_divergence(target, made).cpu()
            terms[f"{i} {kind} same"] = (made.argmax(-1) == top).double().cpu()
    return terms
