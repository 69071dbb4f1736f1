"""Running models over text to get activations and SAE codes: in memory, as a folder of shards, or as a stream; and
conversion of other tools' caches.
"""
