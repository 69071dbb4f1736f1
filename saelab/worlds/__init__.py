"""Synthetic stories ("tales") with known concepts for every token: grammar, vocabulary, concept labels, prompts."""
