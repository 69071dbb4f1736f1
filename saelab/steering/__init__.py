"""Steering experiments: effect and cost over strengths, compared with baselines."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.steering.baselines import steering_baselines as steering_baselines
    from saelab.steering.curves import (
        AnyMeasure as AnyMeasure,
        BestPoint as BestPoint,
        Estimate as Estimate,
        Measure as Measure,
        MeasureName as MeasureName,
        SourceCurve as SourceCurve,
        SteeringCurve as SteeringCurve,
    )
    from saelab.steering.dialogues import Dialogue as Dialogue, DialogueTurn as DialogueTurn, converse as converse
    from saelab.steering.dose_response import (
        EditBlock as EditBlock,
        SteeringSource as SteeringSource,
        steering_curve as steering_curve,
    )
    from saelab.steering.feature_scores import (
        OutputScores as OutputScores,
        SteeringScore as SteeringScore,
        output_scores as output_scores,
    )
    from saelab.steering.monitoring import (
        MessageReading as MessageReading,
        TraitReadings as TraitReadings,
        monitor as monitor,
    )
    from saelab.steering.target_concepts import (
        ConceptLike as ConceptLike,
        ScoredConcept as ScoredConcept,
        TargetConcept as TargetConcept,
        TokenConcept as TokenConcept,
        concept_from_words as concept_from_words,
        synthetic_concept as synthetic_concept,
    )
    from saelab.steering.text_comparison import (
        GenerationComparison as GenerationComparison,
        ScoredText as ScoredText,
        TextRow as TextRow,
        compare_generations as compare_generations,
    )
    from saelab.steering.traits import Trait as Trait, TraitRow as TraitRow, trait_vector as trait_vector

__getattr__, __dir__, __all__ = attach(__name__)
