"""Evaluation: how well an SAE reconstructs, how sparse it is, and what its language model makes of that."""
