"""Names for features, with and without a language model, and how far each can be trusted."""
