"""`Coder`: the map from activations to sparse codes and back."""

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.functional.codes import SparseCodes
from saelab.sae.archetypes import Archetypal, Archetypes
from saelab.sae.config import SAEConfig
from saelab.sae.normaliser import Normaliser

DENSE_NUMBERS = 2**25  # pre-activations held at a time where codes are found densely


class Coder(nn.Module):
    """A sparse autoencoder's weights and its two directions.

        z     = activation( (normalise(x) - b_dec) W_enc + b_enc )
        x_hat = unnormalise( z W_dec + b_dec )

    Weights are float32 and drawn from `seed` on CPU. What is random is the dictionary: rows of W_dec are random
    directions, W_enc is their transpose, and is stored latent by latent, so that reading a few latents touches a few
    rows of memory.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    threshold: Tensor | None
    archetypes: Archetypes | None

    def __init__(self, cfg: SAEConfig, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.archetypes = None
        if isinstance(cfg.dictionary, Archetypal):
            self.archetypes = Archetypes(cfg.dictionary, cfg.d_sae, cfg.d_in, generator)
            directions = self.archetypes().detach()
        self.W_enc = nn.Parameter(directions.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(directions, requires_grad=cfg.dictionary in ("unit", "free"))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        threshold = cfg.activation.initial_threshold(cfg.d_sae)
        if cfg.activation.threshold == "learned" and threshold is not None:
            self.threshold = nn.Parameter(threshold)
        else:
            self.register_buffer("threshold", threshold)
        self.normaliser = Normaliser(cfg.normaliser, cfg.d_in)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense codes z of activations, differentiable; signed for signed activations, so a latent fires where `z !=
        0`.
        """
        self._check_width(x)
        centred = self.normaliser.normalise(x.to(self.W_enc)) - self.b_dec
        return self.cfg.activation(centred @ self.W_enc + self.b_enc, self.threshold)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        """The non-zero codes only, as indices and values; the same codes as `encode`, without the dense tensor."""
        self._check_width(x)
        flat = x.reshape(-1, self.cfg.d_in)
        centred = self.normaliser.normalise(flat.to(self.W_enc)) - self.b_dec
        codes = self.cfg.activation.search(centred, self.W_enc.T, self.b_enc, self.threshold, training=False)
        if codes is None:
            codes = self._encode_by_parts(flat)
        return replace(codes, batch_shape=tuple(x.shape[:-1]))

    def _encode_by_parts(self, x: Tensor) -> SparseCodes:
        size = max(1, DENSE_NUMBERS // self.cfg.d_sae)
        parts = [SparseCodes.from_dense(self.encode(part)) for part in x.split(size)]
        rows = [part.rows + i * size for i, part in enumerate(parts)]
        return SparseCodes.from_rows(
            torch.cat([part.indices for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat(rows),
            (len(x), self.cfg.d_sae),
        )

    def decode(
        self, z: Float[Tensor, "*batch d_sae"] | SparseCodes, prefix: int | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of dense or sparse codes; with `prefix`, of the first `prefix` latents alone."""
        n = self.cfg.d_sae if prefix is None else prefix
        if not 1 <= n <= self.cfg.d_sae:
            raise ValueError(f"`prefix` must be in 1..d_sae ({self.cfg.d_sae}), got {prefix}.")
        if isinstance(z, SparseCodes):
            summed = (z if prefix is None else z.prefix(n)).decode(self.W_dec)
        else:
            summed = z[..., :n] @ self.W_dec[:n]
        return self.normaliser.unnormalise(summed + self.b_dec)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of activations, in their own dtype and on their own device."""
        codes = self.encode(x) if torch.is_grad_enabled() else self.encode_sparse(x)
        return self.decode(codes).to(x)

    @torch.no_grad()
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What a code of 1 adds to the reconstruction, by latent: rows of W_dec in the activations' own units."""
        rows = self.W_dec.detach()
        return rows if self.normaliser.kind == "none" else self.normaliser.apply_matrix(rows, self.normaliser.inverse)

    @torch.no_grad()
    def fold(self) -> "Coder":
        """An equal SAE without a normaliser: the same codes and reconstructions from W_enc, W_dec and b_dec alone.

        With `normalise(x) = (x - mean) M`: W_enc <- M W_enc, W_dec <- W_dec M^-1, b_dec <- b_dec M^-1 + mean; b_enc
        and threshold stay. The rows of W_dec are then no longer of unit norm.
        """
        folded = copy.deepcopy(self)
        if self.cfg.normaliser == "none":
            return folded
        matrix = self.normaliser.matrix
        folded.W_enc.copy_(matrix @ self.W_enc if matrix.ndim else matrix * self.W_enc)
        folded.W_dec.copy_(self.directions())
        folded.b_dec.copy_(self.normaliser.unnormalise(self.b_dec))
        folded.cfg = replace(self.cfg, normaliser="none", dictionary="free")
        folded.normaliser = Normaliser("none", self.cfg.d_in)
        folded.archetypes = None  # W and Lambda make the rows before they were brought into the activations' units
        folded.W_dec.requires_grad_(True)
        return folded

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"Activations must have d_in ({self.cfg.d_in}) as their last axis, got shape {tuple(x.shape)}; "
                "use the hook point this SAE was made for."
            )
