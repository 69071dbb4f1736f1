"""Whether progress bars are shown: as the caller asks, unless the environment has switched all of them off."""

import os


def hidden(progress: bool) -> bool:
    """Whether a bar stays hidden: without `progress`, or with the environment variable TQDM_DISABLE.

    tqdm reads the variable only where nobody says `disable`, and would show the bar.

    >>> hidden(False)
    True
    """
    return not progress or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
