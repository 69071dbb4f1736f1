"""Labels by a language model (automated interpretability): clients, requests, explainers, scorers."""
