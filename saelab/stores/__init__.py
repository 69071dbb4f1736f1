"""Folders on disk: atomic files, activations and their shuffled reading, the ring buffer."""
