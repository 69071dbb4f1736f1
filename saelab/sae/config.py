"""`SAEConfig`: configuration of an SAE.

Its parts are widths, activation function, Matryoshka prefixes, dictionary, normalizer, initialization, encoder and
AuxK loss.
"""

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from saelab.sae.activation_functions import AbsTopK, Activation, TopK, read_activation
from saelab.sae.archetypal import Archetypal
from saelab.sae.normalizer import KINDS, PER_TOKEN, NormalizerKind
from saelab.stores.validation import read_fields, require_object

MAX_WIDTH = 2**31
Dictionary = Literal["unit", "free", "frozen"]
Init = Literal["tied", "data", "subspace"]


@dataclass(frozen=True, kw_only=True)
class RandomPrefixes:
    """Matryoshka prefixes drawn at random in each training step: sizes log-uniform in [`smallest`, d_sae), and d_sae
    itself (arXiv:2503.17547).
    """

    n: int = 5
    """number of prefixes per step, the whole dictionary included"""
    smallest: int = 16
    """lower bound of the sizes drawn"""


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Settings of the AuxK loss, which revives dead latents by having them reconstruct the residual of the others
    (arXiv:2406.04093, A.2).

    Its value is normalized by the residual's variance, the reconstruction loss by the activations' variance, so
    `coefficient` weighs two numbers of the same kind. Dead latents are ranked by |u| where codes are signed; the
    residual is detached, b_dec left out.
    """

    coefficient: float = 1 / 32
    """weight of the loss"""
    k: int | None = None
    """dead latents used per token; None is half the reconstruction's width"""
    dead_after_tokens: int | None = None
    """tokens without firing after which a latent is dead; None is 10 million, or 5 % of a shorter run"""
    token_frac: float = 0.125
    """fraction of each batch's tokens on which the loss is computed; its gradient stays unbiased, its cost small"""

    def __post_init__(self) -> None:
        if not 0 < self.token_frac <= 1:
            raise ValueError(f"`token_frac` must be in (0, 1], got {self.token_frac}.")
        if self.k is not None and self.k < 1:
            raise ValueError(f"`k` of AuxK must be at least 1, got {self.k}; use aux=None to switch it off.")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise ValueError(f"`dead_after_tokens` must be at least 1, got {self.dead_after_tokens}.")


@dataclass(frozen=True, kw_only=True)
class MatchingPursuit:
    """Settings of a matching-pursuit encoder: codes are found one latent at a time, each time the one that explains
    most of the residual (arXiv:2506.03093).

    Each step takes the row d of W_dec with the largest product <r, d> with the residual r, adds that product to its
    code and subtracts that product times d from r. The activation sets the maximum number of steps and whether products
    may be negative: `TopK(k)` or `AbsTopK(k)`. Only W_dec and b_dec are learned.

    >>> SAEConfig(d_in=8, d_sae=32, activation=TopK(k=4), encoder=MatchingPursuit(), normalizer="none").encoder
    MatchingPursuit(residual_threshold=0.0, stop_on_repeat=True)
    """

    residual_threshold: float = 0.0
    """stop for a token whose residual's norm is below this; in the activations' units"""
    stop_on_repeat: bool = True
    """stop for a token when a latent is selected for the second time, or none is"""

    def __post_init__(self) -> None:
        if not self.residual_threshold >= 0:
            raise ValueError(f"`residual_threshold` must be at least 0, got {self.residual_threshold}; use 0 for none.")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Configuration of an SAE or transcoder: its widths and every architectural choice. Training has its own
    `TrainConfig`.

    With `d_out` it is a transcoder: it reconstructs other activations, of that width, from those it reads.

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
    dictionary: Dictionary | Archetypal = "unit"
    """constraint on rows of W_dec: of unit norm, free, frozen at their initial values (a baseline), or
    `Archetypal(...)`
    """
    normalizer: NormalizerKind = "scale"
    """"none"; "scale": mean-centered, E||x||^2 = d_in; "whiten": principal components of unit variance; "token_norm"
    and "layer_norm": per token, see `Normalizer`
    """
    init: Init = "tied"
    """initial rows of W_dec: "tied": random directions; "data": activations; "subspace": random directions in the
    subspace spanned by the activations; W_enc is tied to them
    """
    aux: AuxK | None = AuxK()
    """auxiliary loss on dead latents, or None"""
    d_out: int | None = None
    """width of the activations that a transcoder reconstructs (arXiv:2406.11944); None for an autoencoder"""
    skip: bool = False
    """whether a transcoder has a linear map from input to reconstruction in addition to the latents, W_skip
    (arXiv:2501.18823)
    """
    encoder: Literal["linear"] | MatchingPursuit = "linear"
    """"linear", or `MatchingPursuit(...)` along the rows of W_dec"""

    def __post_init__(self) -> None:
        if isinstance(self.prefixes, list):
            object.__setattr__(self, "prefixes", tuple(self.prefixes))
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
        self._check_encoder()
        self._check_dictionary()
        _check_choice("normalizer", self.normalizer, KINDS)
        _check_choice("init", self.init, get_args(Init))
        if not isinstance(self.encoder, MatchingPursuit):  # whose k is a number of steps, which may exceed d_sae
            self.activation.check(self.d_sae)
        elif getattr(self.activation, "k", 1) < 1:
            raise ValueError(f"`k` of matching pursuit must be at least 1 step, got {self.activation}.")
        self.activation.check_penalty()
        self._check_prefixes()

    @property
    def d_target(self) -> int:
        """Width of what is reconstructed: `d_out`, or `d_in` for an autoencoder."""
        return self.d_in if self.d_out is None else self.d_out

    def _check_encoder(self) -> None:
        if not isinstance(self.encoder, MatchingPursuit):
            _check_choice("encoder", self.encoder, ("linear",))
            return
        if type(self.activation) not in (TopK, AbsTopK):
            raise ValueError(f"`activation` of matching pursuit must be TopK or AbsTopK, got {self.activation}.")
        if self.d_out is not None:
            raise ValueError(f"`d_out` must be None for matching pursuit, which reads with W_dec, got {self.d_out}.")
        if self.normalizer != "none":  # its codes are products with rows of any length, so no scale can be folded in
            raise ValueError(f"`normalizer` must be 'none' for matching pursuit, got '{self.normalizer}'.")

    def _check_dictionary(self) -> None:
        if not isinstance(self.dictionary, Archetypal):
            _check_choice("dictionary", self.dictionary, get_args(Dictionary))
        elif self.init != "tied":
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
        """Configuration as a dictionary for JSON, the inverse of `from_dict`; `d_out`, `skip` and `encoder` are left
        out at their defaults.
        """
        plain = asdict(self)
        for name in ("d_out", "skip", "encoder"):
            if getattr(self, name) == SAEConfig.__dataclass_fields__[name].default:
                del plain[name]
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
        parts = {"prefixes": RandomPrefixes, "dictionary": Archetypal, "encoder": MatchingPursuit, "aux": AuxK}
        for name, kind in parts.items():
            if isinstance(values.get(name), dict):
                values[name] = read_fields(kind, values[name])
        return read_fields(cls, values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got '{value}'.")
