"""Documents as rows: what differs between corpora, what goes together, topics, and search by features."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.corpora.code_index import CodeIndex as CodeIndex, StoredValues as StoredValues
    from saelab.corpora.coded_documents import label_documents as label_documents
    from saelab.corpora.conceptual_space import (
        ConceptBank as ConceptBank,
        ConceptualSpace as ConceptualSpace,
        RepresentativePoints as RepresentativePoints,
        conceptualize as conceptualize,
        neighbors_kept as neighbors_kept,
        representative_points as representative_points,
    )
    from saelab.corpora.corpus_diffing import (
        CorpusDiff as CorpusDiff,
        FeatureDifference as FeatureDifference,
        diff_corpora as diff_corpora,
    )
    from saelab.corpora.document_features import (
        DocumentFeatures as DocumentFeatures,
        DocumentPooling as DocumentPooling,
        pool_documents as pool_documents,
    )
    from saelab.corpora.document_search import (
        DocumentRanking as DocumentRanking,
        FoundDocument as FoundDocument,
        rank_documents as rank_documents,
    )
    from saelab.corpora.document_structure import (
        FeatureCluster as FeatureCluster,
        FeatureClusters as FeatureClusters,
        PropertyCorrelation as PropertyCorrelation,
        PropertyCorrelations as PropertyCorrelations,
        cluster_features as cluster_features,
        correlate_property as correlate_property,
    )
    from saelab.corpora.embedding_search import (
        EditScores as EditScores,
        EmbeddingRanking as EmbeddingRanking,
        EmbeddingSearch as EmbeddingSearch,
        FoundEmbedding as FoundEmbedding,
        rotate_toward as rotate_toward,
        score_edit as score_edit,
    )
    from saelab.corpora.feature_families import (
        Family as Family,
        FamilyScores as FamilyScores,
        FeatureFamilies as FeatureFamilies,
        find_families as find_families,
    )
    from saelab.corpora.hypotheses import (
        Hypotheses as Hypotheses,
        Hypothesis as Hypothesis,
        propose_hypotheses as propose_hypotheses,
    )
    from saelab.corpora.label_attention import (
        Evidence as Evidence,
        ExplainedDocument as ExplainedDocument,
        ExplainedLabel as ExplainedLabel,
        HeadScore as HeadScore,
        LabelFeature as LabelFeature,
        LabelHead as LabelHead,
    )
    from saelab.corpora.label_fitting import label_head as label_head
    from saelab.corpora.topics import (
        TopicMethod as TopicMethod,
        Topics as Topics,
        TopicScores as TopicScores,
        find_topics as find_topics,
        score_topics as score_topics,
    )

__getattr__, __dir__, __all__ = attach(__name__)
