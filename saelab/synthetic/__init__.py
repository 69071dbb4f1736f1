"""Synthetic text, models and activations whose concepts are known token by token."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.synthetic.othello import Games as Games, generate_games as generate_games
    from saelab.synthetic.planted import (
        PlantedBatches as PlantedBatches,
        PlantedConfig as PlantedConfig,
        PlantedWorld as PlantedWorld,
    )
    from saelab.synthetic.retelling import retell_stories as retell_stories
    from saelab.synthetic.tales import Stories as Stories, generate_stories as generate_stories
    from saelab.synthetic.tasks import Counterfactual as Counterfactual, counterfactuals as counterfactuals

__getattr__, __dir__, __all__ = attach(__name__)
