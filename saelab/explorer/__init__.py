"""The explorer: a local web page to search, read, name and steer the features of a feature store."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.explorer.launch import ExplorerServer as ExplorerServer, explore as explore
    from saelab.explorer.live_steering import (
        MovedFeature as MovedFeature,
        SteeringSetup as SteeringSetup,
        steer_live as steer_live,
    )
    from saelab.explorer.prompt_features import PromptQuery as PromptQuery, describe_prompt as describe_prompt
    from saelab.explorer.security import ExplorerLimits as ExplorerLimits
    from saelab.explorer.session import Explorer as Explorer
    from saelab.explorer.widgets import (
        feature_widget as feature_widget,
        prompt_widget as prompt_widget,
        steering_widget as steering_widget,
    )

__getattr__, __dir__, __all__ = attach(__name__)
