"""Reading and writing SAEs of other libraries.

There is one module per format, and one for the conversion between their conventions and saelab's.
"""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.sae.formats.hub import register_release as register_release
    from saelab.sae.formats.releases import (
        PublishedSAE as PublishedSAE,
        PublishedSAEs as PublishedSAEs,
        list_releases as list_releases,
    )

__getattr__, __dir__, __all__ = attach(__name__)
