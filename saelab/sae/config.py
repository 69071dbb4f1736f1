"""`SAEConfig`: configuration of an SAE.

Its parts are widths, activation function, Matryoshka prefixes, dictionary, normalizer, initialization, encoder and
objective.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from saelab.sae import objectives
from saelab.sae.activation_functions import GroupMax, TopK, read_activation
from saelab.sae.activation_registry import Activation
from saelab.sae.archetypal import Archetypal
from saelab.sae.duplicates import DuplicateReset
from saelab.sae.encoders import Encoder, PursuitEncoder, Refined, read_encoder
from saelab.sae.normalizer import KINDS, PER_TOKEN, NormalizerKind
from saelab.sae.objectives.dead_latents import AuxK
from saelab.sae.objectives.gated import GateReconstructionLoss
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.sparsity import SparsityLoss
from saelab.sae.objectives.terms import LOSS_TERMS, LossTerm, read_loss_term
from saelab.sae.soft_frozen import SoftFrozen
from saelab.stores.joined import JoinedSource, check_sources
from saelab.stores.validation import read_fields, require_object
from saelab.training.schedules import Schedule

MAX_WIDTH = 2**31
LATER = (
    "d_out", "skip", "encoder", "duplicates", "sparsity_schedule", "pruning", "train_encoder", "sources", "encode_from"
)  # fmt: skip
Dictionary = Literal["unit", "free", "frozen"]
Init = Literal["tied", "data", "subspace"]
EncodeFrom = Literal["all", "any"]


@dataclass(frozen=True, kw_only=True)
class RandomPrefixes:
    """Matryoshka prefixes drawn at random in each training step: sizes log-uniform in [`smallest`, d_sae), and d_sae
    itself (arXiv:2503.17547).

    With `smallest=1` any prefix may be drawn, which orders the latents one by one, as sampling an ordered SAE's
    prefixes does (arXiv:2512.02194).
    """

    n: int = 5
    """number of prefixes per step, the whole dictionary included"""
    smallest: int = 16
    """lower bound of the sizes drawn"""

    def draw(self, d_sae: int, seed: int, number: int) -> list[int]:
        """Sizes of a step, increasing up to d_sae.

        Args:
            d_sae: number of latents.
            seed: seed of the run.
            number: number of completed steps.
        """
        # seeded by the step, so that no generator state has to be saved
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        drawn = torch.rand(self.n - 1, generator=generator) * math.log(d_sae / self.smallest)
        return sorted({min(d_sae, int(self.smallest * math.exp(t))) for t in drawn.tolist()} | {d_sae})


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Configuration of an SAE or transcoder: its widths and every architectural choice. Training has its own
    `TrainConfig`.

    With `d_out` it is a transcoder: it reconstructs other activations, of that width, from those it reads. With
    `sources` it is a crosscoder: its activations are those of several sources side by side, as `Activations.join` puts
    them, and each latent has a decoder row for every source.

    >>> SAEConfig(d_in=64, d_sae=1024, activation=TopK(k=16), prefixes=(64, 256, 1024)).prefixes
    (64, 256, 1024)
    """

    d_in: int
    """width of the activations"""
    d_sae: int
    """number of latents"""
    activation: Activation = TopK()  # noqa: RUF009 - frozen, so it can be shared
    """activation function that maps pre-activations to codes"""
    prefixes: tuple[int, ...] | RandomPrefixes | None = None
    """Matryoshka: sizes of dictionary prefixes that must each reconstruct on their own; fixed sizes increase and end at
    d_sae; None trains only the whole dictionary
    """
    dictionary: Dictionary | Archetypal | SoftFrozen = "unit"
    """constraint on rows of W_dec: of unit norm, free, `Archetypal(...)`, or as a baseline frozen at their initial
    values or kept near them, `SoftFrozen(...)`
    """
    normalizer: NormalizerKind = "scale"
    """"none"; "scale": mean-centered, E||x||^2 = d_in; "whiten": principal components of unit variance; "token_norm"
    and "layer_norm": per token, see `Normalizer`
    """
    init: Init = "tied"
    """initial rows of W_dec: "tied": random directions; "data": activations; "subspace": random directions in the
    subspace spanned by the activations; W_enc is tied to them
    """
    objective: tuple[LossTerm, ...] = (ReconstructionLoss(), AuxK())
    """loss terms whose weighted sum is minimized: exactly one reconstruction, and any others of
    `saelab.sae.objectives`; the sparsity penalty of ReLU and JumpReLU is added by itself
    """
    sparsity_schedule: Schedule | None = None
    """factor on the activation's k, or on its target L0, over the run; it must end at 1. A schedule from 4 to 1 starts
    with four times the latents
    """
    d_out: int | None = None
    """width of the activations that a transcoder reconstructs (arXiv:2406.11944); None for an autoencoder"""
    skip: bool = False
    """whether a transcoder has a linear map from input to reconstruction in addition to the latents, W_skip
    (arXiv:2501.18823)
    """
    encoder: Encoder = "linear"
    """"linear", or a pursuit along the rows of W_dec: `MatchingPursuit(...)`, `OrthogonalMatchingPursuit(...)`,
    `ICFL(...)`; or `Refined(...)`, which reads its own error
    """
    duplicates: DuplicateReset | None = None
    """replacement of nearly equal rows of W_dec during training, for pursuits"""
    pruning: float | None = None
    """in inference, codes are dropped while that raises a token's squared error by less than this fraction of it, see
    `SAE.prune`; None keeps all
    """
    train_encoder: bool = True
    """whether W_enc and b_enc are trained; without, they stay at their initial values, a baseline (arXiv:2602.14111),
    but for one shift of all biases where that is how ReLU reaches its target L0
    """
    sources: tuple[JoinedSource, ...] | None = None
    """names and widths of a crosscoder's sources, whose sum is d_in: `Activations.sources`; None for one source"""
    encode_from: EncodeFrom = "all"
    """what a crosscoder's codes are computed from: "all" sources together, or "any" one of them, as in a universal SAE
    (arXiv:2502.03714): each training step reads one source in turn and reconstructs all
    """

    def __post_init__(self) -> None:
        for name in ("prefixes", "objective", "sources"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("d_in", "d_sae", "d_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
            if value is not None and value >= MAX_WIDTH:
                raise ValueError(f"`{name}` must be below 2^31, got {value}.")
        if self.skip and self.d_out is None:
            raise ValueError(
                "`skip` must go with `d_out`: an autoencoder with one would copy its input. Set `d_out`, or leave it."
            )
        if self.d_out is not None and self.normalizer in PER_TOKEN:
            raise ValueError(
                f"`normalizer` of a transcoder must be the same map for every token, got '{self.normalizer}': what it "
                "measures of an input says nothing of the target. Take 'scale', or normalize the inputs before."
            )
        self._check_sources()
        self._check_encoder()
        if self.duplicates is not None:
            self.duplicates.check(self)
        self._check_pruning()
        self._check_dictionary()
        _check_choice("normalizer", self.normalizer, KINDS)
        _check_choice("init", self.init, get_args(Init))
        self.activation.check_penalty()
        self._check_prefixes()
        self._check_objective()

    @cached_property
    def terms(self) -> tuple[LossTerm, ...]:
        """The loss terms of training: `objective`, with the activation's penalty after the first where it has one and
        no sparsity term is given; for `Gated` also with its reconstruction through the gate.
        """
        given = any(isinstance(term, SparsityLoss) for term in self.objective)
        own: tuple[LossTerm, ...] = () if given or not self.activation.penalized else (SparsityLoss(),)
        if self.activation.gated and not any(isinstance(term, GateReconstructionLoss) for term in self.objective):
            own = (*own, GateReconstructionLoss())
        return (*self.objective[:1], *own, *self.objective[1:])

    @property
    def reconstruction(self) -> ReconstructionLoss:
        """The reconstruction term of the objective."""
        return next(term for term in self.objective if isinstance(term, ReconstructionLoss))

    @property
    def aux(self) -> AuxK | None:
        """The AuxK term of the objective, or None."""
        return next((term for term in self.objective if isinstance(term, AuxK)), None)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Widths of a crosscoder's sources; None for one source."""
        return None if self.sources is None else tuple(source.d_in for source in self.sources)

    @property
    def d_target(self) -> int:
        """Width of what is reconstructed: `d_out`, or `d_in` for an autoencoder."""
        return self.d_in if self.d_out is None else self.d_out

    def prefixes_at(self, seed: int, number: int) -> list[int]:
        """Sizes of the prefixes in a training step, increasing up to d_sae.

        Args:
            seed: seed of the run.
            number: number of completed steps.
        """
        if isinstance(self.prefixes, RandomPrefixes):
            return self.prefixes.draw(self.d_sae, seed, number)
        return list(self.prefixes or (self.d_sae,))

    def adapt(self, **changes: Any) -> "SAEConfig":
        """The configuration with other fields; loss terms that do not go with them are left out, and a reconstruction
        term becomes the plain one.

        >>> cfg = SAEConfig(d_in=8, d_sae=32, activation=TopK(k=4), objective=(objectives.HierarchicalLoss(ks=(2, 4)),))
        >>> cfg.adapt(activation=TopK(k=8)).objective
        (ReconstructionLoss(coefficient=1.0),)
        """
        plain = ReconstructionLoss()

        def fits(term: LossTerm) -> bool:
            alone = (term,) if isinstance(term, ReconstructionLoss) else (plain, term)
            try:
                replace(self, **(changes | {"objective": alone}))
            except ValueError:
                return False
            return True

        kept = [term for term in self.objective if fits(term)]
        if not any(isinstance(term, ReconstructionLoss) for term in kept):
            kept.insert(0, plain)
        return replace(self, **(changes | {"objective": tuple(kept)}))

    def _check_objective(self) -> None:
        if wrong := [term for term in self.objective if not isinstance(term, LossTerm)]:
            raise ValueError(f"`objective` must be a tuple of loss terms, got {wrong[0]!r} in it.")
        for term in self.objective:
            kind = LOSS_TERMS.get(getattr(term, "name", ""))
            if kind is None or kind.__qualname__ != type(term).__qualname__:
                raise ValueError(
                    f"A loss term must be registered, so that it can be saved, got {type(term).__name__}; put "
                    '@sl.register_loss_term("a_name_of_its_own") above its class.'
                )
        if not any(isinstance(term, ReconstructionLoss) for term in self.objective):
            raise ValueError(f"`objective` must have a reconstruction term, got {self.objective}.")
        names = [term.name for term in self.objective]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"`objective` must have every term once, got '{twice[0]}' twice.")
        for term in self.objective:
            term.check(self)
        if (schedule := self.sparsity_schedule) is None:
            return
        if schedule.end != 1 or not schedule.start > 0:
            raise ValueError(
                f"`sparsity_schedule` must start above 0 and end at 1, which is the k or target L0 of the trained SAE, "
                f"got {schedule}."
            )
        if isinstance(self.activation, GroupMax):
            raise ValueError("`sparsity_schedule` must be None for GroupMax, whose k is its number of groups.")
        if not hasattr(self.activation, "k") and self.activation.penalty_target is None:
            raise ValueError(
                f"`sparsity_schedule` must have a k or a target L0 to multiply, got {self.activation}; to schedule a "
                "fixed coefficient, give SparsityLoss(coefficient=Schedule(...)) in `objective`."
            )

    def _check_sources(self) -> None:
        _check_choice("encode_from", self.encode_from, get_args(EncodeFrom))
        if self.sources is None:
            if self.encode_from != "all":
                raise ValueError('`encode_from` must be "all" for an SAE of one source; give `sources`.')
            return
        if not all(isinstance(source, JoinedSource) for source in self.sources):
            raise ValueError(
                f"`sources` must be names with widths, as `Activations.join(...).sources`, got {list(self.sources)}."
            )
        check_sources(self.sources, self.d_in)
        if self.d_out is not None:
            raise ValueError("`d_out` must be None for a crosscoder, which reconstructs what it reads.")
        if self.normalizer in PER_TOKEN:
            raise ValueError(
                f"`normalizer` of a crosscoder must be the same map for every token, got '{self.normalizer}', which "
                "would measure a token over all sources. Take 'scale', or normalize the activations before."
            )
        if self.encode_from == "any" and self.encoder != "linear":
            raise ValueError(f"`encoder` must be 'linear' to encode from any source, got {self.encoder}.")

    def _check_encoder(self) -> None:
        if isinstance(self.encoder, PursuitEncoder | Refined):
            self.encoder.check(self)
            return
        _check_choice("encoder", self.encoder, ("linear",))
        self.activation.check(self.d_sae)

    def _check_pruning(self) -> None:
        if self.pruning is None:
            return
        if not 0 <= self.pruning < math.inf:
            raise ValueError(f"`pruning` must be at least 0 and finite, got {self.pruning}; use None for none.")
        if self.d_out is not None:
            raise ValueError("`pruning` must be None for a transcoder, whose error is not known in inference.")

    def _check_dictionary(self) -> None:
        if not (self.train_encoder or self.encoder == "linear"):
            raise ValueError(f"`train_encoder` must be true of encoders other than 'linear', got {self.encoder}.")
        if not isinstance(self.dictionary, Archetypal | SoftFrozen):
            _check_choice("dictionary", self.dictionary, get_args(Dictionary))
        elif isinstance(self.dictionary, Archetypal) and self.init != "tied":
            raise ValueError(
                f"`init` must be 'tied' for an archetypal dictionary, it starts at its points, got '{self.init}'."
            )

    def _check_prefixes(self) -> None:
        if isinstance(self.prefixes, RandomPrefixes):
            if not (self.prefixes.n >= 2 and 1 <= self.prefixes.smallest < self.d_sae):
                raise ValueError(
                    f"Random prefixes need n >= 2 and smallest in 1..d_sae - 1 ({self.d_sae - 1}), got {self.prefixes}."
                )
        elif self.prefixes is not None:
            sizes = self.prefixes
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise ValueError(f"`prefixes` must increase from at least 1, got {sizes}.")
            if sizes[-1] != self.d_sae:
                raise ValueError(f"`prefixes` must end at d_sae ({self.d_sae}), got {sizes}; append d_sae.")

    def to_dict(self) -> dict[str, Any]:
        """Configuration as a dictionary for JSON, the inverse of `from_dict`.

        What later releases added (`d_out`, `skip`, `sources` and others) is left out at its default. An objective of
        reconstruction, with AuxK or without, is written as `aux`, as in files of every release; any other as
        `objective`.
        """
        plain = asdict(self)
        for name in LATER:
            if getattr(self, name) == SAEConfig.__dataclass_fields__[name].default:
                del plain[name]
        if isinstance(self.encoder, PursuitEncoder | Refined):
            plain["encoder"] = self.encoder.to_dict()
        aux = self.aux
        known = aux is None or type(aux) is AuxK
        if known and self.objective == ((ReconstructionLoss(),) if aux is None else (ReconstructionLoss(), aux)):
            plain = {("aux" if key == "objective" else key): value for key, value in plain.items()}
            plain["aux"] = None if aux is None else asdict(aux)
        else:
            plain["objective"] = [term.to_dict() for term in self.objective]
        plain["activation"] = self.activation.to_dict()
        if self.prefixes is not None and not isinstance(self.prefixes, RandomPrefixes):
            plain["prefixes"] = list(self.prefixes)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "SAEConfig":
        """Configuration from `to_dict`'s form.

        Raises:
            ValueError: for an unknown key (with similar names) and for a value of another type.
        """
        values = dict(require_object(plain, "An SAE's config"))
        if "normaliser" in values:  # as releases before 0.1 spelled it
            values["normalizer"] = values.pop("normaliser")
        values["activation"] = read_activation(values.get("activation"))
        if "aux" in values:
            if "objective" in values:
                raise ValueError("`aux` must be left out where `objective` is given, got both; add it to the terms.")
            aux = values.pop("aux")
            terms = [] if aux is None else [{"name": AuxK.name, **require_object(aux, "`aux`")}]
            values["objective"] = [{"name": ReconstructionLoss.name}, *terms]
        if isinstance(values.get("objective"), list):
            values["objective"] = read_loss_terms(values["objective"])
        near = isinstance(plain.get("dictionary"), dict) and "cosine" in plain["dictionary"]
        parts = {
            "prefixes": RandomPrefixes,
            "dictionary": SoftFrozen if near else Archetypal,
            "duplicates": DuplicateReset,
            "sparsity_schedule": Schedule,
        }
        for name, kind in parts.items():
            if isinstance(values.get(name), dict):
                values[name] = read_fields(kind, values[name])
        if isinstance(values.get("sources"), list):
            values["sources"] = tuple(read_fields(JoinedSource, source) for source in values["sources"])
        if isinstance(values.get("encoder"), dict):
            values["encoder"] = read_encoder(values["encoder"])
        return read_fields(cls, values)


def read_loss_terms(plain: Sequence[Any]) -> tuple[LossTerm, ...]:
    """Loss terms from their `to_dict` form, in a file or on the command line; ValueError for anything else."""
    for name in objectives.__all__:  # saelab's own terms register themselves when they are imported
        getattr(objectives, name)
    return tuple(read_loss_term(term) for term in plain)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got '{value}'.")
