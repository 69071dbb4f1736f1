"""Reading and writing SAEs of other libraries.

There is one module per format, and one for the conversion between their conventions and saelab's.
"""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.sae.formats.hub import register_release as register_release

__getattr__, __dir__, __all__ = attach(__name__)
