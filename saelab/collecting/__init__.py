"""Activations and feature activations of a text: in memory, as a folder of shards, or as a stream."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.collecting.collection import (
        ActivationStream as ActivationStream,
        Rounds as Rounds,
        collect as collect,
        stream as stream,
    )
    from saelab.collecting.embedding import embed as embed
    from saelab.collecting.harvesting import (
        ValueDtype as ValueDtype,
        harvest as harvest,
        harvest_untrained as harvest_untrained,
    )
    from saelab.collecting.reader import ActivationReader as ActivationReader, ForwardRows as ForwardRows
    from saelab.collecting.reading_rounds import StreamPlan as StreamPlan

__getattr__, __dir__, __all__ = attach(__name__)
