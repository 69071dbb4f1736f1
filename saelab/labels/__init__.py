"""Labels of features: short descriptions with author and scores, and the store that keeps them."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.labels import autointerp as autointerp, rules as rules
    from saelab.labels.annotations import Annotations as Annotations, Change as Change
    from saelab.labels.encoders import (
        EmbeddingFunction as EmbeddingFunction,
        SentenceEncoder as SentenceEncoder,
        VectorIndex as VectorIndex,
        encode_texts as encode_texts,
    )
    from saelab.labels.label import (
        Format as Format,
        Label as Label,
        LabelKind as LabelKind,
        ShownLabel as ShownLabel,
    )
    from saelab.labels.label_store import LabelStore as LabelStore
    from saelab.labels.text_search import TextIndex as TextIndex, rank_texts as rank_texts

__getattr__, __dir__, __all__ = attach(__name__)
