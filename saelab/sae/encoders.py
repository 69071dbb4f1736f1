"""Encoders other than one linear map: pursuits along the rows of W_dec, and a linear map that reads its own error."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.pursuit import pursue, pursue_least_squares
from saelab.sae.activation_functions import AbsTopK, TopK
from saelab.stores.validation import read_fields, require_object


@dataclass(frozen=True, kw_only=True)
class PursuitEncoder:
    """Base class of encoders that find codes along the rows of W_dec, a few latents at a time.

    The activation sets how many latents are chosen for a token and whether codes may be negative: `TopK(k)` or
    `AbsTopK(k)`. Only W_dec and b_dec are learned.
    """

    name: ClassVar[str]
    learns_through_codes: ClassVar[bool]
    """whether the losses' gradient reaches W_dec through the codes too, or through the reconstruction alone"""
    scalable: ClassVar[bool]
    """whether codes are the same for rows of W_dec of any length, up to a factor"""

    def pursue(
        self, x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], k: int, signed: bool
    ) -> SparseCodes:
        """Codes of `x ~ z W`, differentiable in both.

        Args:
            x: activations to encode.
            W: dictionary, one row per latent.
            k: latents chosen for each row of x.
            signed: whether codes may be negative.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pursue(x, W, k, signed).")

    def check(self, cfg: Any) -> None:
        """Raise ValueError for settings that do not fit the configuration `cfg` of an SAE."""
        if type(cfg.activation) not in (TopK, AbsTopK):
            raise ValueError(f"`activation` of a pursuit must be TopK or AbsTopK, got {cfg.activation}.")
        if cfg.d_out is not None:
            raise ValueError(f"`d_out` must be None for a pursuit, which reads with W_dec, got {cfg.d_out}.")

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as a dictionary, as in config.json."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class MatchingPursuit(PursuitEncoder):
    """Settings of a matching-pursuit encoder: codes are found one latent at a time, each time the one that explains
    most of the residual (arXiv:2506.03093).

    Each step takes the row d of W_dec with the largest product <r, d> with the residual r, adds that product to its
    code and subtracts that product times d from r. The activation sets the maximum number of steps and whether products
    may be negative: `TopK(k)` or `AbsTopK(k)`. Only W_dec and b_dec are learned.

    >>> cfg = {"d_in": 8, "d_sae": 32, "activation": sl.TopK(k=4), "normalizer": "none"}
    >>> sl.SAEConfig(**cfg, encoder=MatchingPursuit()).encoder
    MatchingPursuit(residual_threshold=0.0, stop_on_repeat=True)
    """

    name: ClassVar[str] = "matching_pursuit"
    learns_through_codes: ClassVar[bool] = True
    scalable: ClassVar[bool] = False

    residual_threshold: float = 0.0
    """stop for a token whose residual's norm is below this; in the activations' units"""
    stop_on_repeat: bool = True
    """stop for a token when a latent is selected for the second time, or none is"""

    def __post_init__(self) -> None:
        if not self.residual_threshold >= 0:
            raise ValueError(f"`residual_threshold` must be at least 0, got {self.residual_threshold}; use 0 for none.")

    def pursue(
        self, x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], k: int, signed: bool
    ) -> SparseCodes:
        """Codes of `x ~ z W` by matching pursuit in k steps, see `pursue`."""
        return pursue(x, W, k, signed, self.residual_threshold, self.stop_on_repeat)

    def check(self, cfg: Any) -> None:
        """Raise ValueError for settings that do not fit the configuration `cfg` of an SAE."""
        super().check(cfg)
        if cfg.normalizer != "none":  # its codes are products with rows of any length, so no scale can be folded in
            raise ValueError(f"`normalizer` must be 'none' for matching pursuit, got '{cfg.normalizer}'.")
        if cfg.activation.k < 1:  # k is a number of steps, which may exceed d_sae
            raise ValueError(f"`k` of matching pursuit must be at least 1 step, got {cfg.activation}.")

    def to_dict(self) -> dict[str, Any]:
        """Settings as a dictionary, as in config.json; without the name, as in files of every release."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _LeastSquares(PursuitEncoder):
    """Pursuits whose codes are fitted by least squares, to rows of any length."""

    learns_through_codes: ClassVar[bool] = False
    scalable: ClassVar[bool] = True
    refit: ClassVar[bool]

    latents_per_round: int

    def __post_init__(self) -> None:
        if self.latents_per_round < 1:
            raise ValueError(f"`latents_per_round` must be at least 1, got {self.latents_per_round}.")

    def pursue(
        self, x: Float[Tensor, "n_rows d_in"], W: Float[Tensor, "d_sae d_in"], k: int, signed: bool
    ) -> SparseCodes:
        """Codes of `x ~ z W` by least squares in rounds, see `pursue_least_squares`."""
        return pursue_least_squares(x, W, k, signed, self.latents_per_round, self.refit)

    def check(self, cfg: Any) -> None:
        """Raise ValueError for settings that do not fit the configuration `cfg` of an SAE."""
        super().check(cfg)
        cfg.activation.check(cfg.d_sae)
        if self.latents_per_round > cfg.activation.k:
            raise ValueError(
                f"`latents_per_round` must be at most the activation's k, got {self.latents_per_round} and "
                f"{cfg.activation}."
            )


@dataclass(frozen=True, kw_only=True)
class OrthogonalMatchingPursuit(_LeastSquares):
    """Settings of an encoder by orthogonal matching pursuit: after each choice the codes of all latents chosen so far
    are fitted again by least squares.

    The latents chosen are those with the largest cosine to the residual, which is then orthogonal to all of them; with
    `TopK` the fit is non-negative. Losses train W_dec through the reconstruction alone: codes are constants, as in
    dictionary learning.

    >>> cfg = sl.SAEConfig(d_in=8, d_sae=32, activation=sl.AbsTopK(k=4), encoder=OrthogonalMatchingPursuit())
    >>> sl.SAE(cfg, seed=0).encode(torch.eye(8)).count_nonzero(1).max()
    tensor(4)
    """

    name: ClassVar[str] = "orthogonal_matching_pursuit"
    refit: ClassVar[bool] = True

    latents_per_round: int = 1
    """latents chosen at a time; more are faster and fit less well"""


@dataclass(frozen=True, kw_only=True)
class ICFL(_LeastSquares):
    """Settings of an encoder by iterative codebook feature learning: rounds of several latents, whose codes are fitted
    to the residual by least squares and then kept (arXiv:2412.16247).

    A latent that several rounds choose has the sum of its codes. The paper has 20 rounds of 5 latents and codes of both
    signs: `AbsTopK(k=100)`. Losses train W_dec through the reconstruction alone.

    >>> cfg = sl.SAEConfig(d_in=8, d_sae=32, activation=sl.AbsTopK(k=6), encoder=ICFL(latents_per_round=3))
    >>> sl.SAE(cfg, seed=0).encode(torch.eye(8)).count_nonzero(1).max()
    tensor(6)
    """

    name: ClassVar[str] = "icfl"
    refit: ClassVar[bool] = False

    latents_per_round: int = 5
    """latents chosen at a time"""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Settings of a linear encoder that is applied twice, as one step of LISTA (Gregor and LeCun, 2010): the second
    time its input has a part of the first reconstruction's error added.

        z_0 = activation(x W_enc + b_enc),   z = activation((x + step (x - z_0 W_dec)) W_enc + b_enc)

    for x without b_dec. What latents that fire together explain twice is thereby taken from all of them. Codes cost two
    searches; gradients go through both.

    >>> sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4), encoder=Refined()).encoder
    Refined(step=0.3)
    """

    name: ClassVar[str] = "refined"

    step: float = 0.3
    """factor on the error"""

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"`step` must be in (0, 1], got {self.step}; use encoder='linear' for none.")

    def check(self, cfg: Any) -> None:
        """Raise ValueError for a transcoder, whose error is no input, and for an activation that does not fit."""
        if cfg.d_out is not None:
            raise ValueError(f"`d_out` must be None for a refined encoder, which reads its own error, got {cfg.d_out}.")
        cfg.activation.check(cfg.d_sae)

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as a dictionary, as in config.json."""
        return {"name": self.name, **asdict(self)}


Encoder: TypeAlias = Literal["linear"] | PursuitEncoder | Refined
ENCODERS: dict[str, type[PursuitEncoder | Refined]] = {
    each.name: each for each in (MatchingPursuit, OrthogonalMatchingPursuit, ICFL, Refined)
}


def read_encoder(plain: Any) -> PursuitEncoder | Refined:
    """Encoder from its `to_dict` form in a file; ValueError for anything else."""
    settings = dict(require_object(plain, "An encoder"))
    name = settings.pop("name", MatchingPursuit.name)
    if not isinstance(name, str) or name not in ENCODERS:
        raise ValueError(f"An encoder must be one of {sorted(ENCODERS)}, got {str(name)[:40]!r}. Was it edited?")
    return read_fields(ENCODERS[name], settings)
