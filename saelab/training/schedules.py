"""`Schedule`: a number that changes over a training run, such as a loss coefficient."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

Shape = Literal["linear", "cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A number that goes from `start` to `end` between two points of a run, and is constant before and after them.

    >>> warmup = Schedule(start=0.0, end=1.0, until=0.5)
    >>> [warmup.at(share) for share in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.5, 1.0, 1.0]
    """

    start: float
    """value up to `since`"""
    end: float
    """value from `until` on"""
    since: float = 0.0
    """share of the run after which it changes, 0 to 1"""
    until: float = 1.0
    """share of the run after which it is `end`, 0 to 1"""
    shape: Shape = "linear"
    """"linear"; "cosine": half a cosine, slow at both ends; "step": `end` from `until` on, without transition"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"`start` and `end` must be finite, got {self.start} and {self.end}.")
        if not 0 <= self.since <= self.until <= 1:
            raise ValueError(f"0 <= `since` <= `until` <= 1 must hold, got {self.since} and {self.until}.")
        if self.shape not in ("linear", "cosine", "step"):
            raise ValueError(f"`shape` must be 'linear', 'cosine' or 'step', got '{self.shape}'.")

    def at(self, share: float) -> float:
        """Value after a share of the run.

        Args:
            share: completed steps over all steps, 0 to 1.
        """
        if share >= self.until:
            return self.end
        if share <= self.since or self.shape == "step":
            return self.start
        done = (share - self.since) / (self.until - self.since)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + done * (self.end - self.start)


Scheduled: TypeAlias = float | Schedule
"""A number that is constant, or follows a schedule."""


def value_at(number: Scheduled, share: float) -> float:
    """A number that may be scheduled, after a share of the run.

    >>> value_at(0.5, 0.1), value_at(Schedule(start=1.0, end=3.0), 0.5)
    (0.5, 2.0)
    """
    return number.at(share) if isinstance(number, Schedule) else number


def bounds_of(number: Scheduled) -> tuple[float, float]:
    """The smallest and the largest value of a number that may be scheduled."""
    ends = (number.start, number.end) if isinstance(number, Schedule) else (number, number)
    return min(ends), max(ends)
