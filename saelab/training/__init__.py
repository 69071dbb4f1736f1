"""The training loop, with its configuration, checkpoints, optimizer and loggers."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.training.config import Batches as Batches, TrainConfig as TrainConfig
    from saelab.training.loop import (
        HistoryEntry as HistoryEntry,
        Sink as Sink,
        tensorboard_sink as tensorboard_sink,
        wandb_sink as wandb_sink,
    )
    from saelab.training.ranks import GridAxis as GridAxis, RankGrid as RankGrid
    from saelab.training.schedules import Schedule as Schedule, Scheduled as Scheduled

__getattr__, __dir__, __all__ = attach(__name__)
