"""saelab finds, names, compares and moves the features of a language model, with sparse autoencoders."""

from saelab.collecting.collect import collect
from saelab.collecting.stream import stream
from saelab.functional.codes import SparseCodes
from saelab.lm.hooks import capture, splice
from saelab.lm.masks import TokenMask
from saelab.lm.models import load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.sae.activations import (
    AbsTopK,
    Activation,
    BatchAbsTopK,
    BatchTopK,
    JumpReLU,
    ReLU,
    TopK,
    register_activation,
)
from saelab.sae.config import AuxK, RandomPrefixes, SAEConfig
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.provenance import Provenance
from saelab.training.config import TrainConfig

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
    "Activations",
    "AuxK",
    "BatchAbsTopK",
    "BatchTopK",
    "JumpReLU",
    "Provenance",
    "RandomPrefixes",
    "ReLU",
    "SAEConfig",
    "SparseCodes",
    "TokenMask",
    "Tokens",
    "TopK",
    "TrainConfig",
    "capture",
    "collect",
    "fit",
    "load_model",
    "register_activation",
    "splice",
    "stream",
    "tiny_model",
    "tokenize",
]
