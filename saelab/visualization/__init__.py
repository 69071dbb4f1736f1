"""Figures, feature cards and HTML reports."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.visualization.feature_plots import (
        plot_activations as plot_activations,
        plot_dead_features as plot_dead_features,
        plot_density as plot_density,
        plot_feature_map as plot_feature_map,
    )
    from saelab.visualization.geometry_plots import (
        plot_crystals as plot_crystals,
        plot_galaxy as plot_galaxy,
        plot_lobes as plot_lobes,
    )
    from saelab.visualization.graph_page import write_graph_page as write_graph_page
    from saelab.visualization.intervention_plots import (
        plot_attribution as plot_attribution,
        plot_dose_response as plot_dose_response,
        plot_patching as plot_patching,
        plot_tradeoff as plot_tradeoff,
        show_curve as show_curve,
        show_generations as show_generations,
    )
    from saelab.visualization.layer_plots import (
        plot_layer_profile as plot_layer_profile,
        plot_lens as plot_lens,
        plot_lens_scores as plot_lens_scores,
        plot_word_geometry as plot_word_geometry,
    )
    from saelab.visualization.pictures import draw_picture as draw_picture, with_picture as with_picture
    from saelab.visualization.reports import Report as Report, report as report
    from saelab.visualization.training_plots import (
        History as History,
        Quality as Quality,
        plot_frontier as plot_frontier,
        plot_prefixes as plot_prefixes,
        plot_training as plot_training,
    )
    from saelab.visualization.trait_plots import plot_levels as plot_levels
    from saelab.visualization.universality_plots import (
        Value as Value,
        plot_layers as plot_layers,
        plot_matches as plot_matches,
    )

__getattr__, __dir__, __all__ = attach(__name__)
