"""Feature indices as users pass them (integers of Python, NumPy or torch, ranges, arrays), converted to `int`."""

import operator
from collections.abc import Iterable
from typing import SupportsIndex, TypeAlias

FeatureIds: TypeAlias = Iterable[SupportsIndex]
"""lists, ranges, arrays and tensors of integers"""


def read_feature(value: object, name: str = "feature", d_sae: int | None = None) -> int:
    """A feature index as an `int`.

    Args:
        value: an integer of Python, NumPy or torch.
        name: what error messages call the argument.
        d_sae: number of features; without it the range is not checked.

    Raises:
        TypeError: `value` is not an integer; booleans are refused, too.
        ValueError: `d_sae` is given and the index is not in 0..d_sae - 1.

    >>> import numpy as np
    >>> read_feature(np.int64(3)), read_feature(torch.tensor(4))
    (3, 4)
    """
    try:
        is_boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
        if is_boolean or not isinstance(value, SupportsIndex):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, got {value!r} ({type(value).__name__}). Of a mask give the places that are "
            "true (`mask.nonzero()`)."
        ) from None
    if d_sae is not None and not 0 <= number < d_sae:
        raise ValueError(f"`{name}` must be in 0..{d_sae - 1}, got {number}.")
    return number


def read_features(values: FeatureIds, d_sae: int, name: str = "features") -> list[int]:
    """Feature indices as a list of `int`.

    Raises:
        TypeError: `values` is a single index, or holds something that is not an integer.
        ValueError: an index is not in 0..d_sae - 1.

    >>> import numpy as np
    >>> read_features(np.arange(3), 8)
    [0, 1, 2]
    """
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"`{name}` must be a list of integers, got {values!r}. Of a single one give a list: [3].")
    wanted = [read_feature(value, name) for value in values]
    if bad := [j for j in wanted if not 0 <= j < d_sae]:
        raise ValueError(f"`{name}` must be in 0..{d_sae - 1}, got {bad[:5]}.")
    return wanted
