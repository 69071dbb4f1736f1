"""Feature labels: automated interpretability with and without a language model, scores, and a database of labels."""
