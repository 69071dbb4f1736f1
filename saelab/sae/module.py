"""`SAEModule`: the torch module of an SAE, with weights, encoding to sparse codes and decoding back."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.functional.autocast import in_own_dtype
from saelab.functional.codes import Entries, SparseCodes, attach_encoder, sparse_decode
from saelab.functional.metrics import exact
from saelab.functional.pruning import needed_codes
from saelab.sae.activation_functions import MIN_THRESHOLD, TopK
from saelab.sae.activation_registry import Activation
from saelab.sae.archetypal import Archetypal, Archetypes
from saelab.sae.competition import activate_among, search_among
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import PursuitEncoder, Refined
from saelab.sae.normalizer import Normalizer
from saelab.training.ranks import ALONE, RankGrid

DENSE_NUMBERS = 2**25  # pre-activations in memory at a time in dense encoding
DRAWN_NUMBERS = 2**22  # random numbers in memory at a time, where most of them are other processes' weights


class SAEModule(nn.Module):
    """Weights of a sparse autoencoder or transcoder, with `encode` and `decode`.

        z     = activation( (normalize(x) - b_dec) W_enc + b_enc )
        x_hat = unnormalize( z W_dec + b_dec )

    With `cfg.d_out` it is a transcoder: it reconstructs other activations y, with a normalizer of their own, and
    nothing is subtracted from its input:

        z     = activation( normalize(x) W_enc + b_enc )
        y_hat = unnormalize_target( z W_dec + b_dec + normalize(x) W_skip )

    W_skip exists with `cfg.skip` only. All weights are in the normalizers' units, and so in the activations' own for
    normalizer "none". Weights are float32 and drawn from `seed` on CPU; None leaves them uninitialized, to be filled by
    loading. Rows of W_dec are random unit directions and W_enc is their transpose (a transcoder's W_enc is drawn
    separately); W_enc is stored latent by latent, so that reading a few latents touches a few rows of memory. A
    pursuit encodes with W_dec: there `W_enc` is its transpose, `b_enc` zero, and neither a parameter.

    With `latents` it holds the weights of these latents alone, the same as in the whole SAE of that seed: one process's
    share in training by several, which is all that it can be used for.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, "d_out"]
    W_skip: Float[Tensor, "d_in d_out"] | None
    threshold: Tensor | None
    r_mag: Float[Tensor, "d_sae"] | None
    b_gate: Float[Tensor, "d_sae"] | None
    archetypes: Archetypes | None
    target_normalizer: Normalizer | None

    def __init__(self, cfg: SAEConfig, seed: int | None = 0, latents: range | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        own = range(cfg.d_sae) if latents is None else latents
        generator = None if seed is None else torch.Generator().manual_seed(int(seed))  # None: weights are loaded later
        directions = _draw_directions(cfg.d_sae, cfg.d_target, generator, own)
        self.archetypes = None
        if isinstance(cfg.dictionary, Archetypal):
            self.archetypes = Archetypes(cfg.dictionary, cfg.d_sae, cfg.d_target, generator)
            self.archetypes.keep(own)
            directions = directions if generator is None else self.archetypes().detach()
        if not isinstance(cfg.encoder, PursuitEncoder):
            read = directions.clone() if cfg.d_out is None else _draw_directions(cfg.d_sae, cfg.d_in, generator, own)
            self.W_enc = nn.Parameter(read.T, requires_grad=cfg.train_encoder)
            self.b_enc = nn.Parameter(torch.zeros(len(own)), requires_grad=cfg.train_encoder)
        learned = cfg.dictionary != "frozen" and self.archetypes is None
        self.W_dec = nn.Parameter(directions, requires_grad=learned)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_target))
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_target)) if cfg.skip else None
        threshold = cfg.activation.initial_threshold(cfg.d_sae)
        if threshold is not None and threshold.ndim:
            threshold = threshold[own.start : own.stop].clone()
        self.r_mag = nn.Parameter(torch.zeros(len(own))) if cfg.activation.gated else None
        self.b_gate = nn.Parameter(torch.full((len(own),), -MIN_THRESHOLD)) if cfg.activation.gated else None
        if cfg.activation.threshold == "learned" and threshold is not None and not cfg.activation.gated:
            self.threshold = nn.Parameter(threshold)
        else:
            self.register_buffer("threshold", threshold)
        self.normalizer = Normalizer(cfg.normalizer, cfg.d_in, cfg.widths)
        self.register_load_state_dict_pre_hook(_read_old_names)
        self.target_normalizer = None if cfg.d_out is None else Normalizer(cfg.normalizer, cfg.d_out)

    def __getattr__(self, name: str) -> Any:
        if name in ("W_enc", "b_enc") and name not in self._parameters:
            return self.W_dec.T if name == "W_enc" else self.W_dec.new_zeros(self.cfg.d_sae)
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_dec.dtype

    @property
    def out_normalizer(self) -> Normalizer:
        """Normalizer of what is reconstructed: a transcoder's `target_normalizer`, an autoencoder's `normalizer`."""
        return self.normalizer if self.target_normalizer is None else self.target_normalizer

    @in_own_dtype
    def fit_normalizers(self, sample: Float[Tensor, "n_tokens width"]) -> None:
        """Fit the normalizers to a sample of inputs, a transcoder's with their targets appended."""
        self.normalizer.fit(sample[:, : self.cfg.d_in])
        if self.target_normalizer is not None:
            self.target_normalizer.fit(sample[:, self.cfg.d_in :])

    @in_own_dtype
    def center(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Input of the encoder: `normalize(x) - b_dec`, or a transcoder's `normalize(x)`."""
        normalized = self.normalizer.normalize(x.to(self.W_dec))
        return normalized - self.b_dec if self.cfg.d_out is None else normalized

    def refine(
        self, centered: Float[Tensor, "n_rows d_in"], activation: Activation | None = None, ranks: RankGrid = ALONE
    ) -> Float[Tensor, "n_rows d_in"]:
        """What W_enc is applied to: the rows that `center` returned, for a `Refined` encoder with a part of the error
        of their first reconstruction added. Differentiable.

        Args:
            centered: rows that `center` returned.
            activation: activation function of a training step; None is that of inference.
            ranks: processes that the rows and latents of a training step are divided among.
        """
        if not isinstance(self.cfg.encoder, Refined):
            return centered
        training, activation = activation is not None, activation or self.cfg.activation
        with torch.no_grad():
            found = search_among(activation, centered, self.W_enc.T, self.b_enc, self.threshold, ranks, training)
        read = ranks.latents.share(centered)
        if found is None:
            u = read @ self.W_enc + self.b_enc
            if training or not ranks.alone:
                z = activate_among(activation, u, self.threshold, ranks, training)
            else:
                z = activation.code(u, centered, self.W_enc.T, self.b_enc, self.threshold)
            decoded = z @ self.W_dec
        else:
            entries = Entries(found.indices, found.rows, found.offsets)
            u = attach_encoder(found.values, read, self.W_enc, self.b_enc, None, entries)
            values = activation.fire(u, self.threshold_of(found.indices))
            decoded = sparse_decode(values, self.W_dec, found.indices, found.rows, found.offsets)
        return centered + self.cfg.encoder.step * (centered - ranks.latents.sum(decoded))

    @in_own_dtype
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense codes z of activations, differentiable; a latent is active where `z != 0` (codes of signed activation
        functions may be negative).
        """
        self._check_width(x)
        centered = self.center(x).reshape(-1, self.cfg.d_in)
        if isinstance(self.cfg.encoder, PursuitEncoder):
            z = self.pursue(centered, self.W_dec).to_dense()
        else:
            flat = self.refine(centered)
            u = flat @ self.W_enc + self.b_enc
            z = self.cfg.activation.code(u, flat, self.W_enc.T, self.b_enc, self.threshold)
        if self.cfg.pruning is not None:
            found = SparseCodes.from_dense(z.detach())
            dropped = ~needed_codes(found, centered.detach(), self.W_dec.detach(), self.cfg.pruning)
            z = z.index_put((found.rows[dropped], found.indices[dropped]), z.new_zeros(()))
        return z.view(*x.shape[:-1], self.cfg.d_sae)

    @in_own_dtype
    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        """Codes of activations in sparse form, indices and values of the non-zero ones; equal to `encode`, without the
        dense tensor and without gradients.
        """
        self._check_width(x)
        flat = x.reshape(-1, self.cfg.d_in)
        centered = self.center(flat)
        finite = bool(centered.sum().isfinite())  # a search drops what is NaN, which `encode` passes on
        codes = self.search(self.refine(centered)) if finite else None
        if codes is None:
            codes = self._encode_by_parts(flat)
        elif self.cfg.pruning is not None:
            codes = codes.keep(needed_codes(codes, centered, self.W_dec, self.cfg.pruning))
        return replace(codes, batch_shape=tuple(x.shape[:-1]))

    @in_own_dtype
    def encode_latents(
        self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int]
    ) -> Float[Tensor, "*batch n_latents"]:
        """Codes of the given latents, equal to `encode(x)[..., latents]`, differentiable; computes only their part of
        the encoder where their codes do not depend on other latents.
        """
        self._check_width(x)
        flat, chosen = x.reshape(-1, self.cfg.d_in), torch.tensor(latents, dtype=torch.long, device=self.device)
        z = None
        if not isinstance(self.cfg.encoder, PursuitEncoder) and self.cfg.pruning is None:
            z = self.cfg.activation.pick(
                self.refine(self.center(flat)), self.W_enc.T, self.b_enc, self.threshold, chosen
            )
        if z is None:
            whole = len(flat) * self.cfg.d_sae <= DENSE_NUMBERS or torch.is_grad_enabled()
            z = self.encode(flat)[:, chosen] if whole else self.encode_sparse(flat).columns(chosen)
        return z.view(*x.shape[:-1], len(latents))

    def search(self, read: Float[Tensor, "n_rows d_in"]) -> SparseCodes | None:
        """Codes in inference, in sparse form, for rows that `refine` returned; None where the dense computation must or
        should be used instead.
        """
        if isinstance(self.cfg.encoder, PursuitEncoder):
            return self.pursue(read, self.W_dec)
        activation = self.cfg.activation
        found = activation.search(read, self.W_enc.T, self.b_enc, self.threshold, training=False)
        if found is None or type(activation).fire is Activation.fire:
            return found
        codes = replace(found, values=activation.fire(found.values, self.threshold_of(found.indices)))
        return codes if bool((codes.values != 0).all()) else codes.keep(codes.values != 0)

    def threshold_of(self, latents: Int[Tensor, "nnz"]) -> Tensor | None:
        """What `Activation.fire` compares pre-activations of these latents with: the threshold of each, a threshold
        that all share, or None.
        """
        threshold = self.threshold
        return threshold if threshold is None or threshold.ndim == 0 else threshold.index_select(0, latents)

    def gate(self, u: Float[Tensor, "*shape"], latents: Int[Tensor, "nnz"] | None = None) -> Float[Tensor, "*shape"]:
        """Pre-activations of the gates of `Gated`, `exp(-r_mag) (u - b_enc) + b_gate`: positive where a latent fires.

        Args:
            u: pre-activations, of all latents in its last axis, or of those that `latents` names one by one.
            latents: (nnz,) latent of each pre-activation; None where u has all of them.
        """
        assert self.r_mag is not None and self.b_gate is not None
        parts = (self.r_mag.neg().exp(), self.b_enc, self.b_gate)
        gain, b_enc, b_gate = parts if latents is None else (part.index_select(0, latents) for part in parts)
        return gain * (u - b_enc) + b_gate

    @torch.no_grad()
    def set_gate(self, threshold: Float[Tensor, "d_sae"] | None = None) -> None:
        """Set the thresholds of `Gated`, at least 1e-4, and the gates' biases that give them, in place.

        Args:
            threshold: thresholds; None takes those of the gates' parameters, after a change of these.
        """
        assert self.r_mag is not None and self.b_gate is not None and self.threshold is not None
        if threshold is None:
            threshold = self.b_enc - self.r_mag.exp() * self.b_gate
        self.threshold.copy_(threshold.clamp(min=MIN_THRESHOLD))
        self.b_gate.copy_((self.b_enc - self.threshold) * self.r_mag.neg().exp())

    def pursue(
        self, centered: Float[Tensor, "n_rows d_in"], W_dec: Float[Tensor, "d_sae d_in"], k: int | None = None
    ) -> SparseCodes:
        """Codes by a pursuit along the rows of `W_dec`, differentiable.

        Args:
            centered: rows that `center` returned.
            W_dec: the dictionary.
            k: latents chosen for each row; None is the activation's k.
        """
        encoder, activation = self.cfg.encoder, self.cfg.activation
        assert isinstance(encoder, PursuitEncoder) and isinstance(activation, TopK)
        return encoder.pursue(centered, W_dec, k or activation.k, activation.signed)

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

    @in_own_dtype
    def decode(
        self,
        z: Float[Tensor, "*batch d_sae"] | SparseCodes,
        prefix: int | None = None,
        *,
        x: Float[Tensor, "*batch d_in"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction of dense or sparse codes, (*batch, d_out).

        Args:
            z: dense (*batch, d_sae) or sparse codes.
            prefix: use only the first `prefix` latents, 1..d_sae; None uses all.
            x: the activations that were encoded. A skip connection's contribution is computed from them, and left out
                without them; a normalizer with per-token statistics needs them.

        Raises:
            ValueError: for a `prefix` out of range, and for a missing `x` that the normalizer needs.
        """
        n = self.cfg.d_sae if prefix is None else prefix
        if not 1 <= n <= self.cfg.d_sae:
            raise ValueError(f"`prefix` must be in 1..d_sae ({self.cfg.d_sae}), got {prefix}.")
        if isinstance(z, SparseCodes):
            summed = (z if prefix is None else z.prefix(n)).decode(self.W_dec)
        else:
            summed = z[..., :n] @ self.W_dec[:n]
        return self.finish_decoding(summed, x)

    @in_own_dtype
    def finish_decoding(
        self, summed: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction from `z W_dec`: bias and skip connection added, in the units of the activations.

        Args:
            summed: the decoded codes.
            x: the activations that were encoded, or None; see `decode`.
        """
        summed = summed + self.b_dec
        if self.W_skip is not None and x is not None:
            summed = summed + self.center(x) @ self.W_skip
        return self.out_normalizer.unnormalize(summed, x)

    @in_own_dtype
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction in the activations' own dtype and on their device; a transcoder's is of its target, skip
        connection included.
        """
        codes = self.encode(x) if torch.is_grad_enabled() else self.encode_sparse(x)
        return self.decode(codes, x=x).to(x)

    def output_scale(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"] | float:
        """Factor for each token: a code of 1 adds its row of `directions` times this to the reconstruction.

        1, unless the normalizer has per-token statistics.
        """
        return self.out_normalizer.output_scale(x)

    @in_own_dtype
    @torch.no_grad()
    def directions(self, features: Sequence[int] | None = None) -> Float[Tensor, "n_features d_out"]:
        """What a code of 1 adds to the reconstruction, per latent: rows of W_dec in the units of the activations that
        are reconstructed.

        A transcoder's have the target's width, and are directions at the hook point of its target. `features` are
        numbers of latents; None takes all.
        """
        rows, normalizer = self.W_dec.detach(), self.out_normalizer
        rows = rows if features is None else rows[list(features)]
        return rows if normalizer.kind == "none" else normalizer.apply_matrix(rows, normalizer.inverse)

    @in_own_dtype
    @torch.no_grad()
    def fold(self) -> "SAEModule":
        """An equal SAE without a normalizer: the same codes and reconstructions from the weights alone.

        With `normalize(x) = (x - mean) M`: W_enc <- M W_enc, W_dec <- W_dec M^-1, b_dec <- b_dec M^-1 + mean; b_enc and
        threshold stay. A transcoder has (mean, M) of its input and (mean', M') of its target: b_enc <- b_enc - mean M
        W_enc, W_dec <- W_dec M'^-1, W_skip <- M W_skip M'^-1, b_dec <- b_dec M'^-1 + mean' - mean W_skip. The rows of
        W_dec are then no longer of unit norm.

        Raises:
            ValueError: for a normalizer with per-token statistics, which no weights can express, and for a pursuit or
                pruning in whitened activations, whose distances are others.
        """
        folded = copy.deepcopy(self)
        if self.cfg.normalizer == "none":
            return folded
        if isinstance(self.cfg.encoder, PursuitEncoder) and self.cfg.normalizer == "whiten":
            raise ValueError(
                "`normalizer` must keep angles to be folded into the weights of a pursuit, got 'whiten'; keep it, or "
                "whiten the activations before they come here."
            )
        if self.cfg.pruning is not None and self.cfg.normalizer == "whiten":
            raise ValueError("`normalizer` must keep angles for a pruned SAE to be folded, got 'whiten'; keep it.")
        read, written = self.normalizer, self.out_normalizer
        folded.W_enc.copy_(read.fold_into(self.W_enc))
        folded.W_dec.copy_(self.directions())
        folded.b_dec.copy_(written.unnormalize(self.b_dec))
        if self.cfg.d_out is not None:
            folded.b_enc.copy_(exact(self.b_enc) - exact(read.mean) @ exact(folded.W_enc))
            folded.target_normalizer = Normalizer("none", self.cfg.d_out)
        if self.W_skip is not None and folded.W_skip is not None:
            folded.W_skip.copy_(written.apply_matrix(read.fold_into(self.W_skip), written.inverse))
            folded.b_dec.copy_(exact(folded.b_dec) - exact(read.mean) @ exact(folded.W_skip))
        if self.threshold is not None and self.cfg.activation.gated:
            folded.set_gate(self.threshold)
        folded.cfg = replace(self.cfg, normalizer="none", dictionary="free", train_encoder=True)
        folded.normalizer = Normalizer("none", self.cfg.d_in)
        folded.archetypes = None  # W and Lambda give the rows in the normalizer's units
        for parameter in folded.parameters():
            parameter.requires_grad_(True)
        return folded

    def _check_width(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"Activations must be a torch.Tensor (*batch, {self.cfg.d_in}), got {type(x).__name__}. Convert them: "
                "torch.as_tensor(x, dtype=torch.float32)."
            )
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"Activations must have d_in ({self.cfg.d_in}) as their last axis, got shape {tuple(x.shape)}; "
                "use the hook point this SAE was made for."
            )


def _read_old_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Tensors of files that spell `normaliser`, under the names of today."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name.removeprefix(prefix)
        if own.startswith(("normaliser.", "target_normaliser.")):
            state[prefix + own.replace("normaliser.", "normalizer.", 1)] = state.pop(name)


def _draw_directions(n: int, d: int, generator: torch.Generator | None, own: range) -> Tensor:
    """Rows `own` of n random unit directions."""
    if generator is None:
        return torch.empty(len(own), d)
    if len(own) == n:
        directions = torch.randn(n, d, generator=generator)
        return directions / directions.norm(dim=1, keepdim=True)
    directions = torch.empty(len(own), d)
    # a generator draws in blocks of 16 numbers: pieces of whole blocks are those of one draw, and the last has one
    size = max(1, DRAWN_NUMBERS // (16 * d)) * 16
    starts = list(range(0, max(1, n - size + 1), size))
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        piece = torch.randn(stop - start, d, generator=generator)
        first, last = max(start, own.start), min(stop, own.stop)
        if first < last:
            rows = piece[first - start : last - start]
            directions[first - own.start : last - own.start] = rows / rows.norm(dim=1, keepdim=True)
    return directions
