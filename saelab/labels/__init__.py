"""Labels of features: short descriptions with author and scores, and the store that keeps them."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.labels import autointerp as autointerp, rules as rules
    from saelab.labels.label import Format as Format, Label as Label, LabelKind as LabelKind, rank_texts as rank_texts
    from saelab.labels.label_store import LabelStore as LabelStore

__getattr__, __dir__, __all__ = attach(__name__)
