"""`SAEBenchSAE`: an adapter that gives an SAE the attributes and methods that SAEBench expects of a custom SAE."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.sae.coder import Coder
from saelab.sae.formats.readings import dtype_name
from saelab.stores.names import shareable
from saelab.stores.provenance import Provenance


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
    reconstructions are those of the SAE. W_enc and b_enc apply to activations as they are, normaliser included, and are
    multiplied by n too. Signed codes stay signed; some of SAEBench's evaluations count only positive ones.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    norms: Float[Tensor, "d_sae"]

    def __init__(self, sae: Coder, origin: Provenance | None, n_tokens: int | None = None) -> None:
        super().__init__()
        if sae.cfg.d_out is not None:
            raise ValueError(f"SAEBench measures autoencoders, got a transcoder {sae}; it has no measure of those.")
        if origin is None:
            raise ValueError("SAEBench asks for the model and the hook point, got an SAE without provenance; set it.")
        self.sae = sae
        folded = sae.fold()  # ValueError for per-token normalisers, which `decode` cannot undo without x
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


def _describe(sae: Coder, origin: Provenance, n_tokens: int | None) -> SAEBenchConfig:
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
