"""A training run that was stopped goes on as if it had not been."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saelab as sl


def assert_resumes(make: Callable[[int], sl.SAE], acts: Any, run: sl.TrainConfig, out: Path, at: int = 5) -> sl.SAE:
    """Train, and again with a stop at a step; weights and history must be equal to the bit. The trained SAE.

    `make` gives a new SAE of a seed; the resumed one has another seed, as all of it comes from the checkpoint.
    """
    whole = make(0).fit(acts, run, progress=False)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(0).fit(acts, run, out=out, sinks=[stop], progress=False)
    cut = make(5).fit(acts, run, out=out, resume=True, progress=False)
    assert cut.history_ == whole.history_
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, cut.state_dict()[name]), name
    return whole
