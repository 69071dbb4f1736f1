"""Linear probes of concepts: directions, sparse probes on features, concept erasure, and tests of bias."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.probing.association_tests import (
        Alternative as Alternative,
        AssociationTest as AssociationTest,
        association_test as association_test,
    )
    from saelab.probing.bias_subspaces import (
        BiasSubspace as BiasSubspace,
        bias_subspace as bias_subspace,
        equalize as equalize,
        neutralize as neutralize,
    )
    from saelab.probing.concept_embeddings import (
        ConceptEmbedding as ConceptEmbedding,
        ConceptEmbeddings as ConceptEmbeddings,
        embed_concepts as embed_concepts,
    )
    from saelab.probing.concept_removal import (
        ErasureMethod as ErasureMethod,
        ErasureResult as ErasureResult,
        ProbedConcept as ProbedConcept,
        RemovalScore as RemovalScore,
        erase_concept as erase_concept,
    )
    from saelab.probing.contrast_pairs import (
        ContrastScore as ContrastScore,
        UnsupervisedDirections as UnsupervisedDirections,
        find_unsupervised_directions as find_unsupervised_directions,
        score_contrasts as score_contrasts,
    )
    from saelab.probing.debiasing import (
        Debiasing as Debiasing,
        DebiasingScore as DebiasingScore,
        score_debiasing as score_debiasing,
    )
    from saelab.probing.distributed_alignment import (
        AlignmentSearch as AlignmentSearch,
        InterchangePair as InterchangePair,
        InterchangeScore as InterchangeScore,
        align as align,
    )
    from saelab.probing.feature_ranking import Ranking as Ranking
    from saelab.probing.intrinsic_probing import (
        IntrinsicProbe as IntrinsicProbe,
        probe_intrinsically as probe_intrinsically,
    )
    from saelab.probing.labeled_activations import (
        LabeledActivations as LabeledActivations,
        collect_labeled as collect_labeled,
    )
    from saelab.probing.linear_directions import (
        DirectionMethod as DirectionMethod,
        Edit as Edit,
        To as To,
        density_matched_features as density_matched_features,
        fit_direction as fit_direction,
    )
    from saelab.probing.preference_probes import (
        PreferenceProbe as PreferenceProbe,
        PreferenceScore as PreferenceScore,
        preference_probe as preference_probe,
    )
    from saelab.probing.sparse_probing import (
        ProbedFeature as ProbedFeature,
        SparseProbe as SparseProbe,
        SparseProbes as SparseProbes,
        probe_features as probe_features,
    )
    from saelab.probing.subset_search import (
        Correlations as Correlations,
        best_subset as best_subset,
        grow_subsets as grow_subsets,
    )
    from saelab.probing.unembedding_geometry import (
        CausalInnerProduct as CausalInnerProduct,
        ConceptDirection as ConceptDirection,
        ConceptGeometry as ConceptGeometry,
        ConceptPairs as ConceptPairs,
        causal_inner_product as causal_inner_product,
        compare_concepts as compare_concepts,
    )

__getattr__, __dir__, __all__ = attach(__name__)
