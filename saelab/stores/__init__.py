"""Data on disk: atomic writing of files and folders, activation stores read in shuffled batches, feature stores."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.stores.activations import ActivationPairs as ActivationPairs, Activations as Activations
    from saelab.stores.corpus import Places as Places, Spelling as Spelling, StoredText as StoredText
    from saelab.stores.feature_names import FeatureNames as FeatureNames, LabelSource as LabelSource
    from saelab.stores.feature_statistics import FeatureStatistics as FeatureStatistics
    from saelab.stores.feature_store import Feature as Feature, FeatureStore as FeatureStore, Firings as Firings
    from saelab.stores.joined import JoinedSource as JoinedSource
    from saelab.stores.manifest import (
        FeatureManifest as FeatureManifest,
        Layout as Layout,
        Manifest as Manifest,
        Provenance as Provenance,
        Shard as Shard,
    )
    from saelab.stores.neighbors import DocumentRows as DocumentRows, NeighborBatches as NeighborBatches
    from saelab.stores.payload import PayloadKinds as PayloadKinds
    from saelab.stores.results import Drawn as Drawn, Result as Result
    from saelab.stores.row_columns import RowColumns as RowColumns
    from saelab.stores.row_words import RowWords as RowWords
    from saelab.stores.shuffling import (
        RingBuffer as RingBuffer,
        RowSource as RowSource,
        ShuffledBatches as ShuffledBatches,
    )
    from saelab.stores.tensors import TensorFile as TensorFile, TensorSpec as TensorSpec

__getattr__, __dir__, __all__ = attach(__name__)
