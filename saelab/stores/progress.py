"""Progress bars: shown as the caller requests, unless TQDM_DISABLE switches them off."""

import os


def hidden(progress: bool) -> bool:
    """Value for tqdm's `disable`: True without `progress`, or where the environment variable TQDM_DISABLE is set.

    tqdm itself ignores the variable where `disable` is passed.

    >>> hidden(False)
    True
    """
    return not progress or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
