"""Analysis of features in a store (examples, dead and similar ones, direct logit effects), and of a model's layers."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.analysis.dashboard import (
        FeatureCard as FeatureCard,
        FeatureSide as FeatureSide,
        FeatureTable as FeatureTable,
        describe_feature as describe_feature,
        describe_features as describe_features,
        list_features as list_features,
    )
    from saelab.analysis.density import (
        DeadFeatures as DeadFeatures,
        dead_feature_changes as dead_feature_changes,
        dead_features as dead_features,
    )
    from saelab.analysis.direct_logits import LogitLens as LogitLens, Promoted as Promoted, logit_lens as logit_lens
    from saelab.analysis.feature_similarity import (
        CoFiring as CoFiring,
        CoFiringFeatures as CoFiringFeatures,
        NearestFeatures as NearestFeatures,
        SimilarFeatures as SimilarFeatures,
        SimilarityMeasure as SimilarityMeasure,
        cofiring_features as cofiring_features,
        nearest_features as nearest_features,
        similar_features as similar_features,
    )
    from saelab.analysis.layer_profiles import (
        LayerMeasure as LayerMeasure,
        LayerProfile as LayerProfile,
        UntoldMeasure as UntoldMeasure,
        layer_profile as layer_profile,
    )
    from saelab.analysis.max_activating import (
        Example as Example,
        ExampleGroup as ExampleGroup,
        FeatureExamples as FeatureExamples,
        max_activating_examples as max_activating_examples,
    )
    from saelab.analysis.prompt_features import (
        PromptFeatures as PromptFeatures,
        PromptRanking as PromptRanking,
        read_prompt as read_prompt,
    )
    from saelab.analysis.pruning import (
        PrunedScore as PrunedScore,
        PruningCurve as PruningCurve,
        prune_dictionary as prune_dictionary,
    )
    from saelab.analysis.sign_balance import (
        OpposedWindows as OpposedWindows,
        SignAudit as SignAudit,
        sign_audit as sign_audit,
    )
    from saelab.analysis.text_features import ReadFeature as ReadFeature, TextFeatures as TextFeatures, read as read
    from saelab.analysis.token_lens import TokenLens as TokenLens, lens as lens
    from saelab.analysis.tuned_lens import (
        LensScore as LensScore,
        LensScores as LensScores,
        TunedLens as TunedLens,
        fit_lens as fit_lens,
    )
    from saelab.analysis.word_vectors import (
        WordGeometry as WordGeometry,
        WordScore as WordScore,
        word_geometry as word_geometry,
    )

__getattr__, __dir__, __all__ = attach(__name__)
