"""Universal features: which features recur across seeds, layers, sizes and models, compared with null distributions."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.universality.alignment import Alignment as Alignment, Overview as Overview, align_rows as align_rows
    from saelab.universality.comparison import (
        Basis as Basis,
        UntrainedSources as UntrainedSources,
        compare as compare,
        compare_neurons_or_pcs as compare_neurons_or_pcs,
    )
    from saelab.universality.comparison_sources import NullConfig as NullConfig
    from saelab.universality.matching import (
        Comparison as Comparison,
        Matches as Matches,
        MatchingMethod as MatchingMethod,
        RecurrenceWeight as RecurrenceWeight,
        Relation as Relation,
        RelationKind as RelationKind,
        Untrained as Untrained,
    )
    from saelab.universality.model_diffing import (
        LatentKind as LatentKind,
        ModelDiff as ModelDiff,
        diff_models as diff_models,
    )
    from saelab.universality.nearest import Nearest as Nearest
    from saelab.universality.paired_spaces import (
        AlignedActivations as AlignedActivations,
        AnchorChoice as AnchorChoice,
        Anchors as Anchors,
        Channel as Channel,
        PairRule as PairRule,
        PairScores as PairScores,
        align_activations as align_activations,
        choose_anchors as choose_anchors,
        score_pairs as score_pairs,
    )
    from saelab.universality.planted_recovery import (
        Recovery as Recovery,
        RecoveryTable as RecoveryTable,
        score_recovery as score_recovery,
    )
    from saelab.universality.representation_similarity import (
        MEASURES as MEASURES,
        SpaceComparison as SpaceComparison,
        SpaceScore as SpaceScore,
        compare_spaces as compare_spaces,
        linear_cka as linear_cka,
        neighbor_overlap as neighbor_overlap,
        principal_angles as principal_angles,
        procrustes as procrustes,
        relative_agreement as relative_agreement,
        rsa as rsa,
        svcca as svcca,
        svcca_one as svcca_one,
    )
    from saelab.universality.seed_comparison import (
        DictionaryFigures as DictionaryFigures,
        LatentUsage as LatentUsage,
        SeedAgreement as SeedAgreement,
        SeedStability as SeedStability,
        find_core as find_core,
        seed_stability as seed_stability,
    )
    from saelab.universality.similarity import Similarity as Similarity
    from saelab.universality.source_translation import (
        Translation as Translation,
        score_translation as score_translation,
        stitch_sae as stitch_sae,
    )
    from saelab.universality.space_maps import (
        MapMethod as MapMethod,
        SpaceMap as SpaceMap,
        SpaceRows as SpaceRows,
        fit_map as fit_map,
    )
    from saelab.universality.stitching import (
        Readout as Readout,
        RelativeSpace as RelativeSpace,
        StitchTable as StitchTable,
        stitch_heads as stitch_heads,
        stitch_probes as stitch_probes,
    )
    from saelab.universality.universal_features import (
        Comparisons as Comparisons,
        PairFilter as PairFilter,
        Sources as Sources,
        Tops as Tops,
        UniversalTable as UniversalTable,
        compare_many as compare_many,
        filter_one_to_one as filter_one_to_one,
        filter_token_pairs as filter_token_pairs,
        list_universal as list_universal,
        match_keywords as match_keywords,
        matched_decoder_rows as matched_decoder_rows,
        search_labels as search_labels,
    )

__getattr__, __dir__, __all__ = attach(__name__)
