"""Labels by rules on tokens, without a language model."""
