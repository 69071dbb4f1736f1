"""Which features recur: across seeds, layers, sizes and models, each beside its chance level."""
