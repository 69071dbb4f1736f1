"""Analyses of SAEs and feature stores: examples, dead latents, logit effects, similarity of features, pruning."""
