"""saelab finds, names, compares and moves the features of a language model, with sparse autoencoders."""

from importlib import metadata as _metadata

from saelab.analyses.cards import FeatureCard, describe_feature
from saelab.analyses.contexts import FeatureExamples, examples
from saelab.analyses.dead import DeadUnits, dead_units, drift
from saelab.analyses.lens import LogitLens, logit_lens
from saelab.analyses.likeness import Neighbours, neighbours
from saelab.analyses.listing import FeatureTable, list_features
from saelab.analyses.pruning import Progressive, progressive
from saelab.collecting.collection import collect
from saelab.collecting.conversion import convert_delphi
from saelab.collecting.dense_conversion import convert_activations
from saelab.collecting.harvesting import harvest
from saelab.collecting.streaming import ActivationStream, stream
from saelab.collecting.untrained import harvest_untrained
from saelab.evaluation.concept_scores import ConceptScores
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.evaluation import evaluate
from saelab.evaluation.results import Evaluation
from saelab.evaluation.rivals import concept_baselines, read_codes
from saelab.evaluation.saebench import save_saebench
from saelab.functional.codes import SparseCodes
from saelab.labelling.asking import Asker
from saelab.labelling.book import LabelBook
from saelab.labelling.cases import CaseConfig
from saelab.labelling.clients import Client, LocalClient, OpenAIClient
from saelab.labelling.exchange import Exchange
from saelab.labelling.explainers import Explainer, LLMExplainer
from saelab.labelling.explaining import Labelling, estimate_labels, explain_features, score_labels
from saelab.labelling.exports import export_store
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
from saelab.lm.labelled import tokenize_labelled
from saelab.lm.masks import MaskResult, TokenMask
from saelab.lm.models import describe_model, load_model, tiny_model
from saelab.lm.tokens import Tokens, tokenize
from saelab.pictures.attributions import plot_attribution, plot_patching
from saelab.pictures.comparisons import plot_layers, plot_matches
from saelab.pictures.curves import plot_frontier, plot_prefixes, plot_training
from saelab.pictures.distributions import plot_activations, plot_dead, plot_density
from saelab.pictures.maps import plot_neighbours
from saelab.pictures.reports import Report, report
from saelab.pictures.steering_curves import plot_doses, plot_tradeoff, show_curve
from saelab.pictures.steering_texts import show_texts
from saelab.sae.activations import AbsTopK, BatchAbsTopK, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from saelab.sae.archetypes import Archetypal
from saelab.sae.config import AuxK, MatchingPursuit, RandomPrefixes, SAEConfig
from saelab.sae.formats.releases import register_release
from saelab.sae.hooking import hook_sae
from saelab.sae.registry import Activation, register_activation
from saelab.sae.reviving import revive
from saelab.sae.sae import SAE, fit
from saelab.sae.untrained import make_untrained
from saelab.steering.aims import ScoredConcept, TokenConcept, make_concept, world_concept
from saelab.steering.amplifying import SteeringScores, score_steering
from saelab.steering.attribution import attribute
from saelab.steering.beside import SteeredTexts, steer_texts
from saelab.steering.controlling import ControlTable, compare_control
from saelab.steering.curves import SteeringCurve
from saelab.steering.directions import Direction, make_random
from saelab.steering.dosing import steering_curve
from saelab.steering.effects import Attribution
from saelab.steering.interventions import Intervention
from saelab.steering.labelled import LabelledRows, read_labelled
from saelab.steering.lineup import line_up
from saelab.steering.moving import splice, steer, steer_all
from saelab.steering.patching import Patching, patch
from saelab.steering.places import When, Where
from saelab.steering.prototypes import Prototypes, find_prototypes, steer_to
from saelab.steering.removals import Removal
from saelab.steering.removing import ablate_concept
from saelab.steering.resampling import Resampling, resample
from saelab.steering.rivals import find_direction, find_rival
from saelab.steering.selecting import SparseProbes, probe_features
from saelab.steering.subspaces import Subspace
from saelab.steering.supervised import AttributeDictionary, fit_attributes
from saelab.stores.activations import Activations
from saelab.stores.features import FeatureStore
from saelab.stores.pairs import ActivationPairs
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
