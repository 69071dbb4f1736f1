"""From tokens to activations: a folder of shards, memory, or a stream."""
