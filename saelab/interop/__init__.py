"""Other tools' files: activation caches, delphi, SAEDashboard, Neuronpedia, SAEBench."""
