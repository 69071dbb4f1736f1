"""Labels by rules on tokens, without a language model."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.labels.rules.predicates import (
        Predicate as Predicate,
        Predicates as Predicates,
        make_predicates as make_predicates,
        text_pattern as text_pattern,
        word_pattern as word_pattern,
    )
    from saelab.labels.rules.rule_labels import (
        LabelGroup as LabelGroup,
        RuleLabel as RuleLabel,
        RuleLabels as RuleLabels,
        score_groups as score_groups,
    )
    from saelab.labels.rules.rule_search import label_by_rules as label_by_rules
    from saelab.labels.rules.token_view import TokenView as TokenView, ViewPart as ViewPart

__getattr__, __dir__, __all__ = attach(__name__)
