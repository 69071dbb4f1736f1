"""saelab finds, names, compares and moves the features of a language model, with sparse autoencoders."""

from importlib import metadata as _metadata

from saelab.analysis.dashboard import FeatureCard, FeatureTable, describe_feature, list_features
from saelab.analysis.density import DeadUnits, dead_units, drift
from saelab.analysis.direct_logits import LogitLens, logit_lens
from saelab.analysis.feature_similarity import Neighbours, neighbours
from saelab.analysis.max_activating import FeatureExamples, examples
from saelab.analysis.pruning import Progressive, progressive
from saelab.collecting.collection import ActivationStream, collect, stream
from saelab.collecting.harvesting import harvest, harvest_untrained
from saelab.evaluation.concept_units import concept_baselines, read_codes
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.evaluation import evaluate
from saelab.evaluation.results import ConceptScores, Evaluation
from saelab.evaluation.sparse_control import ControlTable, compare_control
from saelab.evaluation.supervised_dictionary import AttributeDictionary, fit_attributes
from saelab.functional.codes import SparseCodes
from saelab.interop.activation_caches import convert_activations
from saelab.interop.delphi import convert_delphi
from saelab.interop.neuronpedia import export_store
from saelab.interop.saebench import save_saebench
from saelab.interventions.attribution import Attribution, attribute
from saelab.interventions.directions import Direction, Subspace, make_random
from saelab.interventions.interventions import Intervention, When, Where
from saelab.interventions.patching import Patching, patch
from saelab.interventions.prototype_steering import Prototypes, find_prototypes, steer_to
from saelab.interventions.resampling import Resampling, resample
from saelab.interventions.steering_hooks import splice, steer, steer_all
from saelab.labels.autointerp.clients import Client, LocalClient, OpenAIClient
from saelab.labels.autointerp.example_windows import CaseConfig
from saelab.labels.autointerp.explainers import (
    Explainer,
    Labelling,
    LLMExplainer,
    estimate_labels,
    explain_features,
    score_labels,
)
from saelab.labels.autointerp.requests import AskConfig, Asker
from saelab.labels.autointerp.response_cache import Exchange
from saelab.labels.autointerp.scorers import Contrast, Detection, Fuzzing, Scorer, Simulation
from saelab.labels.autointerp.token_prediction import TokenSimulation, simulate_by_tokens
from saelab.labels.label import Label
from saelab.labels.label_store import LabelBook
from saelab.labels.rules.predicates import Predicate, Predicates, make_predicates, text_pattern, word_pattern
from saelab.labels.rules.rule_labels import RuleLabels
from saelab.labels.rules.rule_search import label_by_rules
from saelab.lm.generation import Generated, Generation, generate
from saelab.lm.hooks import capture, find_hook_point, logits, next_token_loss
from saelab.lm.masks import MaskResult, TokenMask, tokenize_labelled
from saelab.lm.models import describe_model, load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.lm.verification import HookAgreement, verify_hooks
from saelab.probing.concept_removal import Removal, ablate_concept
from saelab.probing.labeled_activations import LabelledRows, read_labelled
from saelab.probing.linear_directions import find_direction, find_rival
from saelab.probing.sparse_probing import SparseProbes, probe_features
from saelab.sae.activation_functions import (
    AbsTopK,
    Activation,
    BatchAbsTopK,
    BatchTopK,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
    register_activation,
)
from saelab.sae.adapters import hook_sae
from saelab.sae.archetypal import Archetypal
from saelab.sae.config import AuxK, MatchingPursuit, RandomPrefixes, SAEConfig
from saelab.sae.formats.hub import register_release
from saelab.sae.initialization import make_untrained, revive
from saelab.sae.sae import SAE, fit
from saelab.steering.baselines import line_up
from saelab.steering.curves import SteeringCurve
from saelab.steering.dose_response import steering_curve
from saelab.steering.feature_scores import SteeringScores, score_steering
from saelab.steering.target_concepts import ScoredConcept, TokenConcept, make_concept, world_concept
from saelab.steering.text_comparison import SteeredTexts, steer_texts
from saelab.stores.activations import ActivationPairs, Activations
from saelab.stores.feature_store import FeatureStore
from saelab.stores.manifest import Provenance
from saelab.training.config import TrainConfig
from saelab.training.loop import tensorboard_sink, wandb_sink
from saelab.universality.comparison import compare, compare_bases
from saelab.universality.matching import Comparison, Matches
from saelab.universality.representation_similarity import SpaceComparison, compare_spaces
from saelab.universality.seed_comparison import Stability, stability
from saelab.universality.universal_features import (
    Comparisons,
    KeptPairs,
    UniversalTable,
    compare_many,
    find_features,
    keep_concepts,
    keep_one_to_one,
    list_universal,
    match_keywords,
    pair_rows,
)
from saelab.visualization.feature_plots import plot_activations, plot_dead, plot_density, plot_neighbours
from saelab.visualization.intervention_plots import (
    plot_attribution,
    plot_doses,
    plot_patching,
    plot_tradeoff,
    show_curve,
    show_texts,
)
from saelab.visualization.reports import Report, report
from saelab.visualization.training_plots import plot_frontier, plot_prefixes, plot_training
from saelab.visualization.universality_plots import plot_layers, plot_matches

try:
    __version__ = _metadata.version("saelab")
except _metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

__all__ = [  # noqa: RUF022 - plain order, as the test of exports has it
    "AbsTopK",
    "Activation",
    "ActivationPairs",
    "ActivationStream",
    "Activations",
    "Archetypal",
    "AskConfig",
    "Asker",
    "AttributeDictionary",
    "Attribution",
    "AuxK",
    "BatchAbsTopK",
    "BatchTopK",
    "CaseConfig",
    "Client",
    "Comparison",
    "Comparisons",
    "ConceptScores",
    "Contrast",
    "ControlTable",
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
    "GroupMax",
    "HookAgreement",
    "Intervention",
    "JumpReLU",
    "KeptPairs",
    "LLMExplainer",
    "Label",
    "LabelBook",
    "LabelledRows",
    "Labelling",
    "LocalClient",
    "LogitLens",
    "MaskResult",
    "Matches",
    "MatchingPursuit",
    "Neighbours",
    "OpenAIClient",
    "Patching",
    "Predicate",
    "Predicates",
    "Progressive",
    "Prototypes",
    "Provenance",
    "RandomPrefixes",
    "ReLU",
    "Removal",
    "Report",
    "Resampling",
    "RuleLabels",
    "SAE",
    "SAEConfig",
    "ScoredConcept",
    "Scorer",
    "Simulation",
    "SpaceComparison",
    "SparseCodes",
    "SparseProbes",
    "Stability",
    "SteeredTexts",
    "SteeringCurve",
    "SteeringScores",
    "Subspace",
    "TokenConcept",
    "TokenMask",
    "TokenSimulation",
    "Tokens",
    "TopK",
    "TrainConfig",
    "UniversalTable",
    "When",
    "Where",
    "ablate_concept",
    "attribute",
    "capture",
    "collect",
    "compare",
    "compare_bases",
    "compare_control",
    "compare_many",
    "compare_spaces",
    "concept_baselines",
    "convert_activations",
    "convert_delphi",
    "dead_units",
    "describe_feature",
    "describe_model",
    "drift",
    "estimate_labels",
    "evaluate",
    "examples",
    "explain_features",
    "export_store",
    "find_direction",
    "find_features",
    "find_hook_point",
    "find_prototypes",
    "find_rival",
    "fit",
    "fit_attributes",
    "generate",
    "harvest",
    "harvest_untrained",
    "hook_sae",
    "keep_concepts",
    "keep_one_to_one",
    "label_by_rules",
    "line_up",
    "list_features",
    "list_universal",
    "load_model",
    "logit_lens",
    "logits",
    "make_concept",
    "make_predicates",
    "make_random",
    "make_untrained",
    "match_keywords",
    "neighbours",
    "next_token_loss",
    "pair_rows",
    "patch",
    "plot_activations",
    "plot_attribution",
    "plot_dead",
    "plot_density",
    "plot_doses",
    "plot_frontier",
    "plot_layers",
    "plot_matches",
    "plot_neighbours",
    "plot_patching",
    "plot_prefixes",
    "plot_tradeoff",
    "plot_training",
    "probe_features",
    "progressive",
    "read_codes",
    "read_labelled",
    "register_activation",
    "register_release",
    "report",
    "resample",
    "revive",
    "save_saebench",
    "score_concepts",
    "score_labels",
    "score_steering",
    "show_curve",
    "show_texts",
    "simulate_by_tokens",
    "splice",
    "stability",
    "steer",
    "steer_all",
    "steer_texts",
    "steer_to",
    "steering_curve",
    "stream",
    "tensorboard_sink",
    "text_pattern",
    "tiny_model",
    "tokenize",
    "tokenize_labelled",
    "verify_hooks",
    "wandb_sink",
    "word_pattern",
    "world_concept",
]
