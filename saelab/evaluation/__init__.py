"""Evaluation of SAEs: reconstruction, sparsity, effect on the language model's loss, scores on known concepts."""
