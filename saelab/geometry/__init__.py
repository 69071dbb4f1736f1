"""Geometry of features: lobes of co-firing, the cloud of directions, and relations as differences of vectors."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.geometry.cofiring_lobes import lobes as lobes
    from saelab.geometry.direction_clouds import (
        Cloud as Cloud,
        Galaxy as Galaxy,
        GalaxyRow as GalaxyRow,
        galaxy as galaxy,
    )
    from saelab.geometry.lobe_results import Lobe as Lobe, Lobes as Lobes, LobeScore as LobeScore
    from saelab.geometry.relation_crystals import (
        Crystals as Crystals,
        CrystalScore as CrystalScore,
        RelationScore as RelationScore,
        crystals as crystals,
    )
    from saelab.geometry.spectral_clusters import Affinity as Affinity

__getattr__, __dir__, __all__ = attach(__name__)
