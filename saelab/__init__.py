"""saelab finds, names, compares and moves the features of a language model, with sparse autoencoders."""

from saelab.analyses.cards import FeatureCard, describe_feature
from saelab.analyses.contexts import FeatureExamples, examples
from saelab.analyses.dead import DeadUnits, dead_units, drift
from saelab.analyses.lens import LogitLens, logit_lens
from saelab.analyses.likeness import Neighbours, neighbours
from saelab.analyses.listing import FeatureTable, list_features
from saelab.analyses.pruning import Progressive, progressive
from saelab.collecting.collection import collect
from saelab.collecting.conversion import convert_delphi
from saelab.collecting.harvesting import harvest
from saelab.collecting.streaming import ActivationStream, stream
from saelab.evaluation.concept_scores import ConceptScores
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.evaluation import evaluate
from saelab.evaluation.results import Evaluation
from saelab.evaluation.rivals import concept_baselines, read_codes
from saelab.functional.codes import SparseCodes
from saelab.lm.agreement import HookAgreement, verify_hooks
from saelab.lm.hooks import capture, find_hook_point, logits, next_token_loss, splice
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.models import describe_model, load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.pictures.curves import plot_frontier, plot_prefixes, plot_training
from saelab.pictures.distributions import plot_activations, plot_dead, plot_density
from saelab.pictures.maps import plot_neighbours
from saelab.pictures.reports import Report, report
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
from saelab.sae.reviving import revive
from saelab.sae.sae import SAE, fit
from saelab.stores.activations import Activations
from saelab.stores.features import FeatureStore
from saelab.stores.provenance import Provenance
from saelab.training.config import TrainConfig
from saelab.training.sinks import tensorboard_sink, wandb_sink

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - plain order, as the test of exports has it
    "AbsTopK",
    "Activation",
    "ActivationStream",
    "Activations",
    "AuxK",
    "BatchAbsTopK",
    "BatchTopK",
    "ConceptScores",
    "DeadUnits",
    "Evaluation",
    "FeatureCard",
    "FeatureExamples",
    "FeatureStore",
    "FeatureTable",
    "HookAgreement",
    "JumpReLU",
    "LogitLens",
    "MaskResult",
    "Neighbours",
    "Progressive",
    "Provenance",
    "RandomPrefixes",
    "ReLU",
    "Report",
    "SAE",
    "SAEConfig",
    "SparseCodes",
    "TokenMask",
    "Tokens",
    "TopK",
    "TrainConfig",
    "capture",
    "collect",
    "concept_baselines",
    "convert_delphi",
    "dead_units",
    "describe_feature",
    "describe_model",
    "drift",
    "evaluate",
    "examples",
    "find_hook_point",
    "fit",
    "harvest",
    "list_features",
    "load_model",
    "logit_lens",
    "logits",
    "neighbours",
    "next_token_loss",
    "plot_activations",
    "plot_dead",
    "plot_density",
    "plot_frontier",
    "plot_neighbours",
    "plot_prefixes",
    "plot_training",
    "progressive",
    "read_codes",
    "register_activation",
    "report",
    "revive",
    "score_concepts",
    "splice",
    "stream",
    "tensorboard_sink",
    "tiny_model",
    "tokenize",
    "verify_hooks",
    "wandb_sink",
]
