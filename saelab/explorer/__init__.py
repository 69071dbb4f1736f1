"""The explorer: a local web page to search, read, name and steer the features of a feature store."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.explorer.session import Explorer as Explorer

__getattr__, __dir__, __all__ = attach(__name__)
