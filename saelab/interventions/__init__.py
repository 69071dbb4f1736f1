"""Interventions in a running language model: features steered, patched, ablated and attributed."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.interventions.attribution import (
        Attribution as Attribution,
        AttributionAgreement as AttributionAgreement,
        AttributionMethod as AttributionMethod,
        Baseline as Baseline,
        attribute as attribute,
    )
    from saelab.interventions.concept_vectors import (
        ConceptPooling as ConceptPooling,
        ConceptVector as ConceptVector,
        concept_vector as concept_vector,
    )
    from saelab.interventions.directions import Direction as Direction, Subspace as Subspace, make_random as make_random
    from saelab.interventions.interventions import (
        ActivationCondition as ActivationCondition,
        CodeSign as CodeSign,
        Error as Error,
        FeatureStrengths as FeatureStrengths,
        Intervention as Intervention,
        Mode as Mode,
        Strength as Strength,
        TextPart as TextPart,
        TokenSelection as TokenSelection,
        TokenSelector as TokenSelector,
        Unit as Unit,
    )
    from saelab.interventions.learned_directions import (
        DirectionLoss as DirectionLoss,
        LearnedDirection as LearnedDirection,
        learn_direction as learn_direction,
    )
    from saelab.interventions.module_steering import ModuleUnit as ModuleUnit, steer_module as steer_module
    from saelab.interventions.patching import (
        Patching as Patching,
        PatchSource as PatchSource,
        Positions as Positions,
        patch as patch,
    )
    from saelab.interventions.prompt_metrics import Metric as Metric, Prompt as Prompt, TargetToken as TargetToken
    from saelab.interventions.prototype_steering import (
        Loss as Loss,
        Prototypes as Prototypes,
        mean_codes as mean_codes,
        steer_to_prototype as steer_to_prototype,
    )
    from saelab.interventions.resampling import (
        ResampleAblation as ResampleAblation,
        Resampled as Resampled,
        resample_ablation as resample_ablation,
    )
    from saelab.interventions.steering_hooks import (
        splice as splice,
        steer as steer,
        steer_all as steer_all,
        steer_randomly as steer_randomly,
    )

__getattr__, __dir__, __all__ = attach(__name__)
