"""Files of other tools: activation caches, delphi, SAEDashboard, Neuronpedia, SAEBench."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.interop.activation_caches import convert_activations as convert_activations
    from saelab.interop.delphi import convert_delphi as convert_delphi, write_delphi as write_delphi
    from saelab.interop.neuronpedia import (
        Publication as Publication,
        StoreFormat as StoreFormat,
        export_store as export_store,
    )
    from saelab.interop.neuronpedia_reading import (
        NeuronpediaExport as NeuronpediaExport,
        PublishedExample as PublishedExample,
        PublishedFeature as PublishedFeature,
        read_neuronpedia as read_neuronpedia,
    )
    from saelab.interop.neuronpedia_upload import UploadResult as UploadResult, upload as upload
    from saelab.interop.saebench import save_saebench as save_saebench

__getattr__, __dir__, __all__ = attach(__name__)
