"""What a feature store and a dictionary show: examples, dead latents, direct logit effects, similar features."""
