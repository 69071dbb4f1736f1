"""Universal features: which features recur across seeds, layers, sizes and models, compared with null distributions."""
