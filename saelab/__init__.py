"""Find, label, compare and steer the features of a language model with sparse autoencoders."""

from typing import TYPE_CHECKING, Any as _Any

from saelab._lazy import attach as _attach

if TYPE_CHECKING:
    from saelab import (
        analysis as analysis,
        circuits as circuits,
        collecting as collecting,
        corpora as corpora,
        evaluation as evaluation,
        explorer as explorer,
        functional as functional,
        geometry as geometry,
        interop as interop,
        interventions as interventions,
        labels as labels,
        lm as lm,
        probing as probing,
        sae as sae,
        steering as steering,
        stores as stores,
        synthetic as synthetic,
        training as training,
        universality as universality,
        visualization as visualization,
    )
    from saelab.analysis.text_features import read as read
    from saelab.collecting.collection import collect as collect, stream as stream
    from saelab.collecting.embedding import embed as embed
    from saelab.collecting.harvesting import harvest as harvest
    from saelab.corpora.label_fitting import label_head as label_head
    from saelab.evaluation.dissection import dissect as dissect
    from saelab.evaluation.evaluation import evaluate as evaluate
    from saelab.explorer.launch import explore as explore
    from saelab.geometry.cofiring_lobes import lobes as lobes
    from saelab.geometry.direction_clouds import galaxy as galaxy
    from saelab.geometry.relation_crystals import crystals as crystals
    from saelab.interventions.concept_vectors import concept_vector as concept_vector
    from saelab.interventions.directions import Direction as Direction
    from saelab.interventions.interventions import Intervention as Intervention
    from saelab.interventions.learned_directions import learn_direction as learn_direction
    from saelab.interventions.module_steering import steer_module as steer_module
    from saelab.interventions.steering_hooks import splice as splice, steer as steer
    from saelab.lm.generation import generate as generate
    from saelab.lm.masks import TokenMask as TokenMask
    from saelab.lm.models import load_model as load_model
    from saelab.lm.tokens import Tokens as Tokens, tokenize as tokenize
    from saelab.sae.activation_functions import (
        AbsTopK as AbsTopK,
        BatchAbsTopK as BatchAbsTopK,
        BatchTopK as BatchTopK,
        GroupMax as GroupMax,
        JumpReLU as JumpReLU,
        ReLU as ReLU,
        TopK as TopK,
    )
    from saelab.sae.activation_registry import register_activation as register_activation
    from saelab.sae.archetypal import Archetypal as Archetypal
    from saelab.sae.config import (
        RandomPrefixes as RandomPrefixes,
        SAEConfig as SAEConfig,
    )
    from saelab.sae.encoders import (
        ICFL as ICFL,
        MatchingPursuit as MatchingPursuit,
        OrthogonalMatchingPursuit as OrthogonalMatchingPursuit,
    )
    from saelab.sae.formats.releases import list_releases as list_releases
    from saelab.sae.objectives.dead_latents import AuxK as AuxK
    from saelab.sae.objectives.reconstruction import ReconstructionLoss as ReconstructionLoss
    from saelab.sae.objectives.terms import register_loss_term as register_loss_term
    from saelab.sae.sae import SAE as SAE, fit as fit
    from saelab.stores.activations import Activations as Activations
    from saelab.stores.feature_store import FeatureStore as FeatureStore
    from saelab.training.config import TrainConfig as TrainConfig
    from saelab.training.schedules import Schedule as Schedule
    from saelab.universality.comparison import compare as compare
    from saelab.visualization.reports import report as report

    __version__: str

_get, __dir__, __all__ = _attach(__name__)


def __getattr__(name: str) -> _Any:
    if name != "__version__":
        return _get(name)
    from importlib import metadata  # takes longer than all the rest of this file

    try:
        return metadata.version("saelab")
    except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+unknown"
