"""Attribution graphs: which features cause which, from a prompt to its answer."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.circuits.attention_heads import HeadEffects as HeadEffects, split_by_head as split_by_head
    from saelab.circuits.attention_scores import (
        AttentionScore as AttentionScore,
        ScoreTarget as ScoreTarget,
        attention_score as attention_score,
    )
    from saelab.circuits.graph import AttributionGraph as AttributionGraph, NodeTable as NodeTable
    from saelab.circuits.graph_files import make_node_ids as make_node_ids, write_graph_json as write_graph_json
    from saelab.circuits.graph_reading import (
        GraphFile as GraphFile,
        read_graph_file as read_graph_file,
        read_graph_json as read_graph_json,
        read_view as read_view,
    )
    from saelab.circuits.graph_scores import SupernodeGraph as SupernodeGraph
    from saelab.circuits.graph_validation import (
        EffectAgreement as EffectAgreement,
        GraphValidation as GraphValidation,
        validate as validate,
    )
    from saelab.circuits.graph_views import (
        GraphView as GraphView,
        NodeLabels as NodeLabels,
        group_by_label as group_by_label,
        influence_shares as influence_shares,
    )
    from saelab.circuits.head_classes import (
        ClassifierScore as ClassifierScore,
        HeadClasses as HeadClasses,
        HeadPooling as HeadPooling,
        classify_heads as classify_heads,
    )
    from saelab.circuits.head_overlaps import HeadOverlap as HeadOverlap, Read as Read, head_overlap as head_overlap
    from saelab.circuits.tracing import trace as trace

__getattr__, __dir__, __all__ = attach(__name__)
