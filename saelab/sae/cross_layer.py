"""`CLTModule`: the torch module of a cross-layer transcoder, and `CLTConfig`, its configuration.

A cross-layer transcoder reads the inputs of several MLPs and reconstructs their outputs. Latents of a layer have a
decoder row for its own output and one for every later one, side by side.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from saelab.functional.autocast import in_own_dtype
from saelab.functional.codes import SparseCodes
from saelab.functional.metrics import exact
from saelab.sae.activation_functions import TopK, read_activation
from saelab.sae.activation_registry import Activation
from saelab.sae.config import SAEConfig, read_loss_terms
from saelab.sae.module import SAEModule
from saelab.sae.normalizer import Normalizer
from saelab.sae.objectives.dead_latents import AuxK
from saelab.sae.objectives.reconstruction import ReconstructionLoss
from saelab.sae.objectives.sparsity import SparsityLoss
from saelab.sae.objectives.terms import LossTerm
from saelab.stores.validation import read_fields, require_object

ONE_MAP = Literal["none", "scale", "whiten"]
ROWS = Literal["unit", "free"]
TERMS = (ReconstructionLoss, SparsityLoss, AuxK)


@dataclass(frozen=True, kw_only=True)
class CLTConfig:
    """Configuration of a cross-layer transcoder: its layers and every architectural choice.

    >>> CLTConfig(n_layers=4, d_in=16, d_sae=64).layer(1).d_out
    48
    """

    n_layers: int
    """number of layers, two or more, from whose inputs it reconstructs their outputs"""
    d_in: int
    """width of the input of each layer"""
    d_sae: int
    """number of latents of each layer"""
    d_out: int | None = None
    """width of the output of each layer; None is `d_in`"""
    activation: Activation = TopK()  # noqa: RUF009 - frozen, so it can be shared
    """activation function of each layer, whose latents compete among themselves: L0 is its k or target times the number
    of layers
    """
    dictionary: ROWS = "unit"
    """"unit": the decoder rows of a latent, for all layers together, have norm 1; or "free\""""
    normalizer: ONE_MAP = "scale"
    """normalization of each layer's input and output, by itself; see `SAEConfig`"""
    objective: tuple[LossTerm, ...] = (ReconstructionLoss(), AuxK())
    """`ReconstructionLoss`, and any of `AuxK` and `SparsityLoss`; their values are means over layers"""

    def __post_init__(self) -> None:
        if isinstance(self.objective, list):
            object.__setattr__(self, "objective", tuple(self.objective))
        if self.n_layers < 2:
            raise ValueError(
                f"`n_layers` must be at least 2, got {self.n_layers}; for one take a transcoder: SAEConfig(d_out=)."
            )
        for name, choices in (("normalizer", get_args(ONE_MAP)), ("dictionary", get_args(ROWS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got '{getattr(self, name)}'.")
        if self.activation.gated:
            raise ValueError(
                "`activation` must not be Gated, whose gates have to reconstruct the target by themselves: a layer has "
                "none of its own. Take JumpReLU."
            )
        if wrong := [term for term in self.objective if type(term) not in TERMS]:
            raise ValueError(
                f"`objective` must be of {[kind.__name__ for kind in TERMS]}, got {type(wrong[0]).__name__}; others "
                "read the codes of one dictionary."
            )
        self.layer(0)  # checks the rest

    @property
    def d_target(self) -> int:
        """Width of the output of each layer."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def starts(self) -> list[int]:
        """First column of each layer's output among those of all."""
        return [i * self.d_target for i in range(self.n_layers)]

    def layer(self, number: int) -> SAEConfig:
        """Configuration of the transcoder that one layer's latents are, from its input to its own and all later outputs
        side by side.
        """
        return SAEConfig(
            d_in=self.d_in,
            d_sae=self.d_sae,
            d_out=(self.n_layers - number) * self.d_target,
            activation=self.activation,
            dictionary=self.dictionary,
            normalizer="none",
            objective=self.objective,
        )

    def to_dict(self) -> dict[str, Any]:
        """Configuration as a dictionary for JSON, the inverse of `from_dict`."""
        parts = {"activation": self.activation.to_dict(), "objective": [term.to_dict() for term in self.objective]}
        return asdict(self) | parts

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "CLTConfig":
        """Configuration from `to_dict`'s form; ValueError for an unknown key and for a value of another type."""
        values = dict(require_object(plain, "A cross-layer transcoder's config"))
        values["activation"] = read_activation(values.get("activation"))
        if isinstance(values.get("objective"), list):
            values["objective"] = read_loss_terms(values["objective"])
        return read_fields(cls, values)


class CLTModule(nn.Module):
    """Weights of a cross-layer transcoder, with `encode` and `decode`.

        z_l   = activation( normalize_l(x_l) W_enc_l + b_enc_l )
        y_hat_m = unnormalize_m( sum over l <= m of z_l W_dec_lm + b_dec_m )

    x has the inputs of all layers side by side, y_hat their outputs. Entry l of `layers` is a transcoder of layer l in
    the normalizers' units: its W_dec has W_dec_lm for m = l, l + 1, ... side by side, and its bias is 0. Weights are
    float32 and drawn from `seed` on CPU; None leaves them uninitialized, to be filled by loading.
    """

    b_dec: Float[Tensor, "d_written"]
    layers: Any  # nn.ModuleList of SAEModule
    normalizers: Any  # of Normalizer
    target_normalizers: Any

    def __init__(self, cfg: CLTConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.cfg = cfg
        n = cfg.n_layers
        self.layers = nn.ModuleList(
            SAEModule(cfg.layer(i), None if seed is None else int(seed) * n + i) for i in range(n)
        )
        for layer in self.layers:  # one bias for each output, not one from each layer
            del layer.b_dec
            layer.register_buffer("b_dec", torch.zeros(layer.cfg.d_target), persistent=False)
        self.b_dec = nn.Parameter(torch.zeros(n * cfg.d_target))
        self.normalizers = nn.ModuleList(Normalizer(cfg.normalizer, cfg.d_in) for _ in range(n))
        self.target_normalizers = nn.ModuleList(Normalizer(cfg.normalizer, cfg.d_target) for _ in range(n))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.b_dec.dtype

    def require_inputs(self, x: Any) -> None:
        """Raise TypeError for what is no tensor, ValueError for one that is not the inputs of all layers."""
        cfg = self.cfg
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Activations must be a torch.Tensor, got {type(x).__name__}. Convert them: torch.as_tensor."
            )
        if x.shape[-1] != cfg.n_layers * cfg.d_in:
            raise ValueError(
                f"Activations must have the inputs of {cfg.n_layers} layers of d_in {cfg.d_in} side by side, got shape "
                f"{tuple(x.shape)}; join them in the order of the layers: Activations.join."
            )

    def split(self, x: Float[Tensor, "*batch d_read"]) -> list[Float[Tensor, "*batch d_in"]]:
        """Normalized inputs of each layer, from those of all side by side; ValueError for another width."""
        self.require_inputs(x)
        parts = x.to(self.b_dec).split(self.cfg.d_in, dim=-1)
        return [normalizer.normalize(part) for normalizer, part in zip(self.normalizers, parts, strict=True)]

    @in_own_dtype
    def encode(self, x: Float[Tensor, "*batch d_read"]) -> Float[Tensor, "*batch n_layers d_sae"]:
        """Dense codes of each layer's latents, differentiable."""
        return torch.stack([layer.encode(part) for layer, part in zip(self.layers, self.split(x), strict=True)], dim=-2)

    @in_own_dtype
    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*batch d_read"]) -> list[SparseCodes]:
        """Codes of each layer in sparse form; equal to `encode`, without gradients."""
        return [layer.encode_sparse(part) for layer, part in zip(self.layers, self.split(x), strict=True)]

    @in_own_dtype
    def decode(
        self, z: Float[Tensor, "*batch n_layers d_sae"] | Sequence[SparseCodes]
    ) -> Float[Tensor, "*batch d_written"]:
        """Outputs of all layers side by side from codes, dense or a layer's each.

        Raises:
            ValueError: for codes of another number of layers.
        """
        codes: list[Any] = list(z.unbind(-2)) if isinstance(z, Tensor) else list(z)
        if len(codes) != len(self.layers):
            raise ValueError(f"`z` must have codes of {len(self.layers)} layers, got {len(codes)}.")
        summed = self.b_dec
        for layer, start, of_layer in zip(self.layers, self.cfg.starts, codes, strict=True):
            part = of_layer.decode(layer.W_dec) if isinstance(of_layer, SparseCodes) else of_layer @ layer.W_dec
            summed = summed + pad(part, (start, 0))
        return self.unnormalize(summed)

    def unnormalize(self, y: Float[Tensor, "*batch d_written"]) -> Float[Tensor, "*batch d_written"]:
        """Outputs of all layers in the activations' units, from those in the normalizers'."""
        parts = zip(self.target_normalizers, y.split(self.cfg.d_target, dim=-1), strict=True)
        return torch.cat([normalizer.unnormalize(part) for normalizer, part in parts], dim=-1)

    @in_own_dtype
    def forward(self, x: Float[Tensor, "*batch d_read"]) -> Float[Tensor, "*batch d_written"]:
        """Reconstructed outputs of all layers side by side, in the activations' own dtype and on their device."""
        return self.decode(self.encode(x) if torch.is_grad_enabled() else self.encode_sparse(x)).to(x)

    @in_own_dtype
    @torch.no_grad()
    def fold_layer(self, number: int, copy: bool = True) -> tuple[SAEConfig, dict[str, Tensor]]:
        """Configuration and weights of the transcoder that a layer's latents are, in the activations' units.

        Its bias has `b_dec` for its own output and 0 for later ones, so that the reconstructions of all layers add up
        to those of the whole.

        Args:
            number: number of the layer, counted from the first that is read.
            copy: whether weights that need no folding are copied; else they are this transcoder's own.
        """
        layer, read, cfg = self.layers[number], self.normalizers[number], self.cfg
        held = {name: tensor.clone() if copy else tensor for name, tensor in layer.state_dict().items()}
        if read.kind != "none":
            held["W_enc"] = read.fold_into(layer.W_enc).T.contiguous().T  # latent by latent, as in every SAE
            held["b_enc"] = (exact(layer.b_enc) - exact(read.mean) @ exact(held["W_enc"])).to(layer.b_enc)
        if cfg.normalizer != "none":
            rows = zip(self.target_normalizers[number:], layer.W_dec.split(cfg.d_target, dim=1), strict=True)
            held["W_dec"] = torch.cat([to.apply_matrix(part, to.inverse) for to, part in rows], dim=1).detach()
        own = self.unnormalize(self.b_dec).detach()[number * cfg.d_target : (number + 1) * cfg.d_target]
        held["b_dec"] = pad(own, (0, (cfg.n_layers - number - 1) * cfg.d_target))
        return replace(cfg.layer(number), dictionary="free"), held
