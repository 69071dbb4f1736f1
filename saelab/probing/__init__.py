"""Linear probes of concepts: directions, sparse probes on features, and concepts erased."""
