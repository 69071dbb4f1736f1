"""Sparse autoencoders and transcoders: one module for all variants.

Variants differ in activation function, Matryoshka prefixes, dictionary, normalizer and initialization.
"""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.sae import formats as formats, objectives as objectives
    from saelab.sae.activation_functions import (
        AbsJumpReLU as AbsJumpReLU,
        AbsTopK as AbsTopK,
        BatchAbsTopK as BatchAbsTopK,
        BatchTopK as BatchTopK,
        Gated as Gated,
        GroupMax as GroupMax,
        JumpReLU as JumpReLU,
        Log1pReLU as Log1pReLU,
        ReLU as ReLU,
        Sparsemax as Sparsemax,
        TopK as TopK,
    )
    from saelab.sae.activation_registry import Activation as Activation, register_activation as register_activation
    from saelab.sae.adapters import (
        HookedSAE as HookedSAE,
        ModulePort as ModulePort,
        SAEBenchSAE as SAEBenchSAE,
        hook_sae as hook_sae,
    )
    from saelab.sae.archetypal import Archetypal as Archetypal, Archetypes as Archetypes
    from saelab.sae.baselines import fit_baselines as fit_baselines, load_baselines as load_baselines
    from saelab.sae.classical_dictionaries import (
        DictionaryMethod as DictionaryMethod,
        fit_dictionary as fit_dictionary,
    )
    from saelab.sae.clt import CLT as CLT
    from saelab.sae.config import (
        Dictionary as Dictionary,
        Init as Init,
        RandomPrefixes as RandomPrefixes,
        SAEConfig as SAEConfig,
    )
    from saelab.sae.cross_layer import CLTConfig as CLTConfig, CLTModule as CLTModule
    from saelab.sae.duplicates import DuplicateReset as DuplicateReset
    from saelab.sae.encoders import (
        ICFL as ICFL,
        MatchingPursuit as MatchingPursuit,
        OrthogonalMatchingPursuit as OrthogonalMatchingPursuit,
        PursuitEncoder as PursuitEncoder,
        Refined as Refined,
    )
    from saelab.sae.fitting import Data as Data, HeldOut as HeldOut, Pair as Pair, fit_normalizer as fit_normalizer
    from saelab.sae.initialization import (
        make_untrained as make_untrained,
        resample_dead_latents as resample_dead_latents,
        start_from_core as start_from_core,
    )
    from saelab.sae.joint_dictionary import (
        JointDictionary as JointDictionary,
        fit_joint_dictionary as fit_joint_dictionary,
    )
    from saelab.sae.module import SAEModule as SAEModule
    from saelab.sae.normalizer import Normalizer as Normalizer, NormalizerKind as NormalizerKind
    from saelab.sae.planning import (
        StepRates as StepRates,
        TrainingPlan as TrainingPlan,
        measure_rates as measure_rates,
        plan_training as plan_training,
        read_rates as read_rates,
    )
    from saelab.sae.sae import SAE as SAE, fit as fit
    from saelab.sae.soft_frozen import SoftFrozen as SoftFrozen
    from saelab.sae.source_views import relative_norms as relative_norms, source_norms as source_norms
    from saelab.sae.step_codes import StepCodes as StepCodes
    from saelab.sae.training_clt import TrainingCLT as TrainingCLT
    from saelab.sae.training_sae import StepLosses as StepLosses, TrainingSAE as TrainingSAE

__getattr__, __dir__, __all__ = attach(__name__)
