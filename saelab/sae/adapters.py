"""Adapters of an SAE: run inside any torch module (`hook_sae`), or passed to SAEBench (`SAEBenchSAE`)."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.functional.codes import SparseCodes
from saelab.lm.unwrapped import attach
from saelab.sae.formats.origin import dtype_name
from saelab.sae.module import SAEModule
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable

ModulePort = Literal["input", "output"]


class HookedSAE:
    """Handle of a hooked SAE: `codes` holds the sparse codes of each forward pass, oldest first."""

    def __init__(
        self,
        sae: SAEModule,
        replace: bool,
        edit: Callable[[Tensor], Tensor] | None,
        keep: Bool[Tensor, "*batch"] | None,
    ) -> None:
        """Store the arguments of `hook_sae`.

        Args:
            sae: the SAE or transcoder.
            replace: whether the reconstruction replaces the activations.
            edit: function of the dense codes applied before they are decoded, or None.
            keep: (*batch) tokens at which activations are replaced; None is all.
        """
        self.sae = sae
        self.codes: list[SparseCodes] = []
        self._replace, self._edit, self._keep = replace, edit, keep
        self._inputs: list[Tensor] = []

    def read(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Keep a transcoder's input until the module's output, its target, is computed."""
        self._inputs[:] = [x]

    def change(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"] | None:
        """Activations that replace `y` in the forward pass, or None to leave it unchanged.

        ValueError where the mask of tokens to change has another shape than `y`.
        """
        sae = self.sae
        x = (self._inputs.pop() if sae.cfg.d_out is not None else y).to(sae.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._replace or self._edit is not None)):
            z = sae.encode(x)
            self.codes.append(SparseCodes.from_dense(z.detach()))
            if not self._replace and self._edit is None:
                return None
            y_hat = sae.decode(z if self._edit is None else self._edit(z), x=x)
            if not self._replace:  # the SAE's error is kept, so that only the edit changes y
                y_hat = y + (y_hat - sae.decode(z, x=x)).to(y)
            y_hat = y_hat.to(y)
        if self._keep is None:
            return y_hat
        if self._keep.shape != y.shape[:-1]:
            raise ValueError(
                f"`keep` must be of the tokens' shape {tuple(y.shape[:-1])}, got {tuple(self._keep.shape)}; give one "
                "truth value a token."
            )
        return torch.where(self._keep.to(y.device).unsqueeze(-1), y_hat, y)


@contextmanager
def hook_sae(
    module: nn.Module,
    sae: SAEModule,
    *,
    side: ModulePort = "output",
    replace: bool = True,
    edit: Callable[[Tensor], Tensor] | None = None,
    keep: Bool[Tensor, "*batch"] | None = None,
) -> Iterator[HookedSAE]:
    """Context manager in which the activations at a module pass through an SAE in every forward pass; yields a
    `HookedSAE` that records the codes.

    Gradients flow. Blocks can be nested; all hooks are removed at the end, also after an error. What Hugging Face's
    `output_hidden_states` shows of that module is read by hooks of its own: x where they were attached before the
    block, `x_hat` where the block was first.

    Args:
        module: module whose input or output is read; a transcoder reads its input and replaces its output.
        sae: the SAE or transcoder.
        side: which activations an SAE reads and replaces: the first tensor that goes into the module ("input") or comes
            out of it ("output"); "output" for a transcoder.
        replace: whether the reconstruction `x_hat` replaces x. With False x stays, and codes are only recorded; with
            `edit` the SAE's error is added back then: `x + decode(edit(z)) - decode(z)`.
        edit: function of the dense codes (*batch, d_sae) applied before they are decoded; None decodes them as they
            are.
        keep: (*batch) tokens at which the activations are replaced, such as all but BOS; None is all.

    Raises:
        ValueError: for an unknown `side`, "input" for a transcoder, and, in the forward pass, a `keep` of another shape
            than the tokens.

    >>> layer, sae = torch.nn.Linear(4, 4), sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.TopK(k=2)))
    >>> with hook_sae(layer, sae) as hooked:
    ...     x_hat = layer(torch.ones(3, 4))
    >>> hooked.codes[0].batch_shape
    (3,)
    """
    if side not in ("input", "output"):
        raise ValueError(f"`side` must be 'input' or 'output', got '{side}'.")
    if sae.cfg.d_out is not None and side == "input":
        raise ValueError("`side` must be 'output' for a transcoder, which reads the input, got 'input'; leave it.")
    hooked = HookedSAE(sae, replace, edit, keep)
    with ExitStack() as stack:
        if sae.cfg.d_out is not None:
            stack.enter_context(attach((module, "hook_in"), hooked.read))
        stack.enter_context(attach((module, "hook_in" if side == "input" else "hook_out"), hooked.change))
        yield hooked


@dataclass
class SAEBenchConfig:
    """The fields of a custom SAE's `cfg` that SAEBench reads; not frozen, as SAEBench sets some of them."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None
    architecture: str
    dtype: str
    device: str
    dataset_path: str
    hook_head_index: int | None = None
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int | None = None
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """An SAE with rows of W_dec at unit length, which most of SAEBench's evaluations assume.

    With n_i = ||d_i||, d_i what a code of 1 adds to the reconstruction: codes are n_i z_i, W_dec_i is d_i / n_i, and so
    reconstructions are those of the SAE. W_enc and b_enc apply to activations as they are, normalizer included, and are
    multiplied by n too. Signed codes stay signed; some of SAEBench's evaluations count only positive ones.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    norms: Float[Tensor, "d_sae"]

    def __init__(self, sae: SAEModule, origin: Provenance | None, n_tokens: int | None = None) -> None:
        super().__init__()
        if sae.cfg.d_out is not None:
            raise ValueError(f"SAEBench measures autoencoders, got a transcoder {sae}; it has no measure of those.")
        if origin is None:
            raise ValueError("SAEBench asks for the model and the hook point, got an SAE without provenance; set it.")
        self.sae = sae
        folded = sae.fold()  # ValueError for per-token normalizers, which `decode` cannot undo without x
        norms = folded.W_dec.detach().norm(dim=1).clamp(min=1e-12)
        self.register_buffer("norms", norms)
        self.W_enc = nn.Parameter(folded.W_enc.detach() * norms)
        self.b_enc = nn.Parameter(folded.b_enc.detach() * norms)
        self.W_dec = nn.Parameter(folded.W_dec.detach() / norms[:, None])
        self.b_dec = nn.Parameter(folded.b_dec.detach().clone())
        self.cfg = _describe(sae, origin, n_tokens)
        self.hook_layer = self.cfg.hook_layer

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense codes, scaled for decoder rows of unit length."""
        return self.sae.encode(x) * self.norms

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of dense codes."""
        return z.to(self.W_dec) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction of activations."""
        return self.decode(self.encode(x))


def _describe(sae: SAEModule, origin: Provenance, n_tokens: int | None) -> SAEBenchConfig:
    layer = re.match(r"blocks\.(\d+)\.", origin.hook_point)
    processing = {"center_writing_weights": True, "fold_ln": True} if origin.weight_processing == "folded" else {}
    return SAEBenchConfig(
        model_name=shareable(origin.model),
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        hook_layer=int(layer[1]) if layer else 0,
        hook_name=origin.hook_point,
        context_size=origin.ctx_len,
        architecture=sae.cfg.activation.name,
        dtype=dtype_name(sae.dtype),
        device=str(sae.device),
        dataset_path=origin.text,
        model_from_pretrained_kwargs=processing,
        training_tokens=n_tokens,
    )
