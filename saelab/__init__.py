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
from saelab.labelling.asking import Asker
from saelab.labelling.book import LabelBook
from saelab.labelling.cases import CaseConfig
from saelab.labelling.clients import Client, LocalClient, OpenAIClient
from saelab.labelling.exchange import Exchange
from saelab.labelling.explainers import Explainer, LLMExplainer
from saelab.labelling.explaining import Labelling, estimate_labels, explain_features, score_labels
from saelab.labelling.label import Label
from saelab.labelling.predicates import Predicate, Predicates, make_predicates, text_pattern, word_pattern
from saelab.labelling.questions import AskConfig
from saelab.labelling.rule_labels import RuleLabels
from saelab.labelling.rules import label_by_rules
from saelab.labelling.scorers import Contrast, Detection, Fuzzing, Scorer, Simulation
from saelab.labelling.simulators import TokenSimulation, simulate_by_tokens
from saelab.lm.agreement import HookAgreement, verify_hooks
from saelab.lm.generation import Generated, Generation, generate
from saelab.lm.hooks import capture, find_hook_point, logits, next_token_loss
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.models import describe_model, load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.pictures.comparisons import plot_layers, plot_matches
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
from saelab.sae.archetypes import Archetypal
from saelab.sae.config import AuxK, RandomPrefixes, SAEConfig
from saelab.sae.reviving import revive
from saelab.sae.sae import SAE, fit
from saelab.steering.directions import Direction, make_random
from saelab.steering.interventions import Intervention
from saelab.steering.moving import splice, steer, steer_all
from saelab.steering.places import When, Where
from saelab.stores.activations import Activations
from saelab.stores.features import FeatureStore
from saelab.stores.provenance import Provenance
from saelab.training.config import TrainConfig
from saelab.training.sinks import tensorboard_sink, wandb_sink
from saelab.universality.bases import compare_bases
from saelab.universality.comparison import compare
from saelab.universality.many import Comparisons, compare_many
from saelab.universality.matches import Comparison
from saelab.universality.pairs import (
    KeptPairs,
    find_features,
    keep_concepts,
    keep_one_to_one,
    match_keywords,
    pair_rows,
)
from saelab.universality.partners import Matches
from saelab.universality.seeds import Stability, stability
from saelab.universality.spaces import SpaceComparison, compare_spaces
from saelab.universality.table import UniversalTable, list_universal

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - plain order, as the test of exports has it
    "AbsTopK",
    "Activation",
    "ActivationStream",
    "Activations",
    "Archetypal",
    "AskConfig",
    "Asker",
    "AuxK",
    "BatchAbsTopK",
    "BatchTopK",
    "CaseConfig",
    "Client",
    "Comparison",
    "Comparisons",
    "ConceptScores",
    "Contrast",
    "DeadUnits",
    "Detection",
    "Direction",
    "Evaluation",
    "Exchange",
    "Explainer",
    "FeatureCard",
    "FeatureExamples",
    "FeatureStore",
    "FeatureTable",
    "Fuzzing",
    "Generated",
    "Generation",
    "HookAgreement",
    "Intervention",
    "JumpReLU",
    "KeptPairs",
    "LLMExplainer",
    "Label",
    "LabelBook",
    "Labelling",
    "LocalClient",
    "LogitLens",
    "MaskResult",
    "Matches",
    "Neighbours",
    "OpenAIClient",
    "Predicate",
    "Predicates",
    "Progressive",
    "Provenance",
    "RandomPrefixes",
    "ReLU",
    "Report",
    "RuleLabels",
    "SAE",
    "SAEConfig",
    "Scorer",
    "Simulation",
    "SpaceComparison",
    "SparseCodes",
    "Stability",
    "TokenMask",
    "TokenSimulation",
    "Tokens",
    "TopK",
    "TrainConfig",
    "UniversalTable",
    "When",
    "Where",
    "capture",
    "collect",
    "compare",
    "compare_bases",
    "compare_many",
    "compare_spaces",
    "concept_baselines",
    "convert_delphi",
    "dead_units",
    "describe_feature",
    "describe_model",
    "drift",
    "estimate_labels",
    "evaluate",
    "examples",
    "explain_features",
    "find_features",
    "find_hook_point",
    "fit",
    "generate",
    "harvest",
    "keep_concepts",
    "keep_one_to_one",
    "label_by_rules",
    "list_features",
    "list_universal",
    "load_model",
    "logit_lens",
    "logits",
    "make_predicates",
    "make_random",
    "match_keywords",
    "neighbours",
    "next_token_loss",
    "pair_rows",
    "plot_activations",
    "plot_dead",
    "plot_density",
    "plot_frontier",
    "plot_layers",
    "plot_matches",
    "plot_neighbours",
    "plot_prefixes",
    "plot_training",
    "progressive",
    "read_codes",
    "register_activation",
    "report",
    "revive",
    "score_concepts",
    "score_labels",
    "simulate_by_tokens",
    "splice",
    "stability",
    "steer",
    "steer_all",
    "stream",
    "tensorboard_sink",
    "text_pattern",
    "tiny_model",
    "tokenize",
    "verify_hooks",
    "wandb_sink",
    "word_pattern",
]
