"""`LinearEffects`: what each source of a prompt adds to each target, in a model whose patterns and norms are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.circuits.frozen_model import FrozenModel
from saelab.circuits.graph import KINDS
from saelab.circuits.placement import PARTS, PlacedDictionary, Placement
from saelab.lm.freezing import ScoreTerms, ScoreWatch
from saelab.lm.hooks import capture
from saelab.lm.model_checks import Model, find_known_ids
from saelab.lm.unwrapped import Tap
from saelab.sae.sae import SAE

LOGITS = -1
"""in the place of a dictionary"""
EMBEDDING, FEATURE, ERROR, BIAS, LOGIT, SCORE = range(len(KINDS))
TOLERANCE = 1e-4
"""largest difference of a sum of effects from the value, relative to it"""
HALF_TOLERANCE = 0.05
"""the same for models or dictionaries in half precision, whose products are rounded after the third digit"""


@dataclass(frozen=True, eq=False)
class Written:
    """What is written at one hook point: at each token the sum of features, an error and a bias.

    Sources are in the order of their tokens.
    """

    point: str
    layer: int
    """-1 for embeddings"""
    dictionary: PlacedDictionary | None
    """None for embeddings, and for an MLP that no transcoder replaces"""
    constant: Float[Tensor, "n d"]
    """all of it but what a skip connection adds"""
    positions: Int[Tensor, "n_sources"]
    kinds: Int[Tensor, "n_sources"]
    """index in `KINDS`"""
    features: Int[Tensor, "n_sources"]
    """latents; -1 for other kinds"""
    z: Float[Tensor, "n_sources"]
    """codes; 1 for other kinds"""
    vectors: Float[Tensor, "n_sources d"]
    """what each source writes"""
    later: Mapping[str, Float[Tensor, "n_sources d"]] = field(default_factory=dict)
    """what features of a cross-layer transcoder write at later hook points; 0 for other sources"""

    def at(self, point: str) -> Float[Tensor, "n_sources d"] | None:
        """What each source writes at a hook point; None where none does."""
        return self.vectors if point == self.point else self.later.get(point)

    @property
    def counts(self) -> list[int]:
        """Number of sources of each token."""
        return torch.bincount(self.positions, minlength=len(self.constant)).tolist()


@torch.no_grad()
def read_written(model: Model, ids: Int[Tensor, "1 n"], placement: Placement) -> list[Written]:
    """What is written at each place in the unmodified model: embeddings first, then in the order of the model.

    ValueError for a dictionary whose widths are not those of the activations.
    """
    names = [placement.start, *(name for one in placement.dictionaries for name in (one.read, one.write))]
    names += [name for _, name in placement.uncovered]
    acts = {name: x[0] for name, x in capture(model, ids, names, stop=False).items()}
    for one in placement.dictionaries:
        for name, width in ((one.read, one.sae.cfg.d_in), (one.write, one.width)):
            if acts[name].shape[-1] != width:
                raise ValueError(f"A dictionary must fit '{name}', of width {acts[name].shape[-1]}, got {width}.")
    others: dict[str, Tensor] = {}  # what earlier layers of a cross-layer transcoder write
    found = [_write_parts(one, acts[one.read], acts[one.write], others) for one in placement.dictionaries]
    found += [_write_whole(name, layer, acts[name], ERROR) for layer, name in placement.uncovered]
    mlp = PARTS.index("MLP")
    found.sort(key=lambda one: (one.layer, PARTS.index(one.dictionary.place.part) if one.dictionary else mlp))
    return [_write_whole(placement.start, -1, acts[placement.start], EMBEDDING), *found]


def _write_whole(point: str, layer: int, x: Float[Tensor, "n d"], kind: int) -> Written:
    each = torch.arange(len(x), device=x.device)
    return Written(
        point=point,
        layer=layer,
        dictionary=None,
        constant=x,
        positions=each,
        kinds=torch.full_like(each, kind),
        features=torch.full_like(each, -1),
        z=torch.ones(len(x), device=x.device),
        vectors=x.float(),
    )


def _write_parts(
    one: PlacedDictionary, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"], others: dict[str, Tensor]
) -> Written:
    """Features, errors and biases of the activations `y`, encoded from `x`.

    Args:
        one: the dictionary.
        x: what it reads.
        y: what the model computes where it writes.
        others: what earlier layers of the same cross-layer transcoder write, by hook point; what this one writes is
            added.
    """
    sae, device = one.sae, y.device
    x, target = x.to(sae.W_dec), y.to(sae.W_dec)
    codes, skip, scale = sae.encode_sparse(x), one.skip(x, sae.center(x)), sae.output_scale(x)
    zeros = target.new_zeros(len(y), sae.cfg.d_target)
    bias = (sae.finish_decoding(zeros, x) - (0 if skip is None else skip))[:, : one.width]
    scales = scale[codes.rows] if isinstance(scale, Tensor) else scale
    written, *later = (codes.values[:, None] * scales * sae.directions()[codes.indices]).split(one.width, dim=1)
    made, *beyond = sae.decode(codes, x=x).split(one.width, dim=1)
    error = target - made - others.get(one.write, 0)
    for point, part in zip(one.later, beyond, strict=True):
        others[point] = others.get(point, 0) + part
    each = torch.arange(len(y), device=sae.device)
    positions = torch.cat([codes.rows, each, each])
    order = positions.argsort(stable=True)
    kinds = torch.tensor([FEATURE, ERROR, BIAS], device=sae.device)
    counts = torch.tensor([len(codes.rows), len(y), len(y)], device=sae.device)
    rest = torch.ones(2 * len(y), device=sae.device)
    return Written(
        point=one.write,
        layer=one.place.layer,
        dictionary=one,
        constant=(target if skip is None else target - skip).to(y),
        positions=positions[order].to(device),
        kinds=kinds.repeat_interleave(counts)[order].to(device),
        features=torch.cat([codes.indices.long(), -rest.long()])[order].to(device),
        z=torch.cat([codes.values.float(), rest])[order].to(device),
        vectors=torch.cat([written, error, bias])[order].float().to(device),
        later={
            point: torch.cat([part, zeros[:, : one.width], zeros[:, : one.width]])[order].float().to(device)
            for point, part in zip(one.later, later, strict=True)
        },
    )


def allow_error(model: Model, written: Sequence[Written]) -> float:
    """Largest difference of a sum of effects from the value that rounding explains, relative to it."""
    dtypes = [next(model.parameters()).dtype, *(one.dictionary.sae.dtype for one in written if one.dictionary)]
    return HALF_TOLERANCE if any(dtype in (torch.float16, torch.bfloat16) for dtype in dtypes) else TOLERANCE


@dataclass(frozen=True, eq=False)
class Readings:
    """What one frozen forward pass computes."""

    centered: dict[int, Float[Tensor, "n d_in"]]
    """input of the encoder by number of the place"""
    logits: Float[Tensor, "d_vocab"]
    constants: list[Tensor]
    watched: dict[str, Tensor]
    """activations at further hook points"""
    terms: ScoreTerms | None
    """queries and keys of the attention that is watched"""


@dataclass(frozen=True, eq=False)
class Targets:
    """Pre-activations of features of one place at tokens, or logits."""

    place: int
    """number of the place; `LOGITS`"""
    positions: Int[Tensor, "n_targets"]
    features: Int[Tensor, "n_targets"]
    """latents, or token ids"""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: slice | Tensor) -> "Targets":
        return Targets(self.place, self.positions[chosen], self.features[chosen])


@dataclass(frozen=True, eq=False)
class LinearEffects:
    """The frozen model of a prompt: values of targets, and the direct effect of every source on them.

    Sources are numbered place by place as in `Written`.
    """

    frozen: FrozenModel
    written: Sequence[Written]
    known: Int[Tensor, "n_known"]
    """ids that the tokenizer has a token for: a logit is measured from the mean of theirs"""
    watched: tuple[str, ...] = ()
    """hook points whose activations are kept besides"""
    attention: tuple[str, str] | None = None
    """hook points in front of and behind the attention whose queries and keys are kept"""

    @classmethod
    def make(
        cls,
        model: Model,
        ids: Int[Tensor, "1 n"],
        written: Sequence[Written],
        watched: tuple[str, ...] = (),
        attention: tuple[str, str] | None = None,
    ) -> "LinearEffects":
        """The frozen model of a prompt.

        Args:
            model: the language model.
            ids: the prompt.
            written: what is written in it.
            watched: hook points whose activations are kept besides.
            attention: hook points in front of and behind the attention whose queries and keys are kept.
        """
        placed = [one.dictionary for one in written if one.dictionary is not None]
        points = [*(one.point for one in written), *(one.read for one in placed), *watched, *(attention or ())]
        frozen = FrozenModel.make(model, ids, points, [one.neurons for one in placed if one.neurons is not None])
        known = find_known_ids(model).nonzero()[:, 0].to(frozen.ids.device)
        return cls(frozen, written, known, watched, attention)

    @cached_property
    def starts(self) -> list[int]:
        """Number of each place's first source, and of all sources."""
        return [0, *np.cumsum([len(one.positions) for one in self.written]).tolist()]

    @cached_property
    def leaves(self) -> list[Tensor]:
        """What is written, as leaves of the graph of gradients."""
        return [one.constant.clone().requires_grad_() for one in self.written]

    @cached_property
    def readings(self) -> Readings:
        """The frozen forward pass of the prompt, with gradients."""
        with torch.enable_grad():
            return self.read(self.leaves)

    @cached_property
    def at_zero(self) -> Readings:
        """The same with nothing written: what biases of the model and of encoders add up to."""
        with torch.no_grad():
            zeros = [torch.zeros_like(one.constant) for one in self.written]
            return self.read(zeros, self.readings.constants)

    def read(self, written: Sequence[Tensor], constants: Sequence[Tensor] | None = None) -> Readings:
        """A frozen forward pass in which these activations are written, skip connections added.

        Args:
            written: (n, d) by place.
            constants: of an earlier pass; None computes them.
        """
        read = [_Reading(one, x) for one, x in zip(self.written, written, strict=True)]
        taps: list[tuple[str, Tap]] = [
            (one.point, reading.write) for one, reading in zip(self.written, read, strict=True)
        ]
        taps += [(r.dictionary.read, r.keep) for r in read if r.dictionary and r.dictionary.sae.cfg.d_out is not None]
        kept: dict[str, Tensor] = {}
        taps += [(name, partial(_keep, kept, name)) for name in self.watched]
        watch = None if self.attention is None else ScoreWatch()
        if self.attention is not None and watch is not None:
            taps += zip(self.attention, (watch.begin, watch.end), strict=True)
        logits, found = self.frozen.forward(taps, constants, watch=watch)
        centered = {i: reading.centered for i, reading in enumerate(read) if reading.centered is not None}
        return Readings(centered, logits[0], found, kept, watch.found if watch else None)

    def values(self, targets: Targets, readings: Readings) -> Float[np.ndarray, "n_targets"]:
        """Pre-activations, or logits less the mean of all."""
        if targets.place == LOGITS:
            logits = readings.logits.detach().double()
            return (logits[targets.features] - logits[self.known].mean()).cpu().numpy()
        sae = self._sae(targets.place)
        rows, latents = readings.centered[targets.place][targets.positions], targets.features.to(sae.device)
        u = (rows.double() * sae.W_enc.T[latents].double()).sum(1) + sae.b_enc[latents].double()
        return u.detach().cpu().numpy()

    def effects(self, targets: Targets) -> Float[np.ndarray, "n_targets n_sources"]:
        """Direct effect of every source on each target, by one gradient a target, all at the same time."""
        output, rows = self.start(targets)
        return self.effects_on(output, rows, len(self.written) if targets.place == LOGITS else targets.place)

    def effects_on(
        self, output: Tensor, rows: Float[Tensor, "n_targets *output"], last: int
    ) -> Float[np.ndarray, "n_targets n_sources"]:
        """Direct effects of the sources of the first `last` places on products of `output` with each of the rows."""
        grads = torch.autograd.grad(
            output, self.leaves[:last], rows, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        found = np.zeros((len(rows), self.starts[-1]), np.float32)
        for i, (place, grad) in enumerate(zip(self.written, grads, strict=False)):
            for start, one in zip(self.starts, self.written[: i + 1], strict=False):
                if grad is not None and (vectors := one.at(place.point)) is not None:
                    products = [grad[:, p].float() @ of.T for p, of in enumerate(vectors.split(one.counts))]
                    found[:, start : start + len(one.positions)] += torch.cat(products, 1).cpu().numpy()
        return found

    def start(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """What the gradients of targets start from, and the direction of each."""
        each = torch.arange(len(targets), device=self.frozen.ids.device)
        if targets.place == LOGITS:
            output = self.readings.logits
            rows = torch.zeros(len(targets), len(output), device=output.device)
            rows[:, self.known] = -1 / len(self.known)
            rows[each, targets.features] += 1
            return output, rows
        output, sae = self.readings.centered[targets.place], self._sae(targets.place)
        rows = output.new_zeros(len(targets), *output.shape)
        latents = targets.features.to(sae.device)
        rows[each.to(rows.device), targets.positions.to(rows.device)] = sae.W_enc.T[latents].detach()
        return output, rows

    def list_sources(self, points: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of all sources as nodes: kinds, layers, positions, sources, features, activations and slopes.

        `points` are the hook points of the dictionaries, of which `sources` has the index.
        """
        parts: dict[str, list[np.ndarray]] = {}
        ids = self.frozen.ids[0].cpu().numpy()
        for place, one in enumerate(self.written):
            n, kinds, positions = len(one.positions), one.kinds.cpu().numpy(), one.positions.cpu().numpy()
            columns = {
                "kinds": kinds,
                "layers": np.full(n, one.layer),
                "positions": positions,
                "sources": np.full(n, -1 if one.dictionary is None else points.index(one.point)),
                "features": ids[positions] if kinds[0] == EMBEDDING else one.features.cpu().numpy(),
                "activations": one.z.cpu().numpy(),
                "slopes": self._find_slopes(place),
            }
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
        return {name: np.concatenate(columns) for name, columns in parts.items()}

    def _find_slopes(self, place: int) -> Float[np.ndarray, "n_sources"]:
        one = self.written[place]
        slopes, is_feature = np.ones(len(one.positions), np.float32), one.kinds == FEATURE
        if one.dictionary is not None and is_feature.any():
            targets = Targets(place, one.positions[is_feature], one.features[is_feature])
            u = torch.from_numpy(self.values(targets, self.readings)).to(one.dictionary.sae.W_dec)
            found = one.dictionary.find_slopes(u, targets.features.to(one.dictionary.sae.device))
            slopes[is_feature.cpu().numpy()] = found.float().cpu().numpy()
        return slopes

    def _sae(self, place: int) -> SAE:
        dictionary = self.written[place].dictionary
        assert dictionary is not None  # of every target
        return dictionary.sae


def _keep(kept: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A hook function that keeps the activations and hands on a copy, so that no later edit in place changes them."""
    kept[name] = x.clone()
    return kept[name].view_as(x)


class _Reading:
    """The hook functions of one place in one frozen forward pass: what is read there, and what is written."""

    def __init__(self, one: Written, constant: Tensor) -> None:
        self.dictionary, self._constant = one.dictionary, constant
        self.centered: Tensor | None = None
        self._x: Tensor | None = None

    def keep(self, x: Tensor) -> None:
        """Read what a dictionary encodes."""
        assert self.dictionary is not None
        self._x = x.reshape(len(self._constant), -1).to(self.dictionary.sae.W_dec)
        self.centered = self.dictionary.sae.center(self._x)

    def write(self, y: Tensor) -> Tensor:
        """Replace what the model computes."""
        written = self._constant
        if self.dictionary is not None:
            if self.dictionary.sae.cfg.d_out is None:
                self.keep(y)
            assert self._x is not None and self.centered is not None  # it reads before it writes
            skip = self.dictionary.skip(self._x, self.centered)
            written = written if skip is None else written + skip.to(written)
        return written.reshape(y.shape).to(y).clone()
