"""Labels of features: what each feature is called, by whom, and how far the label can be trusted."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.labels import autointerp as autointerp, rules as rules
    from saelab.labels.label import Format as Format, Label as Label, LabelKind as LabelKind
    from saelab.labels.label_store import LabelStore as LabelStore, rank_texts as rank_texts

__getattr__, __dir__, __all__ = attach(__name__)
