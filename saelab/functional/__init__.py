"""Tensors in, tensors out: proximal operators, sparse kernels, exact search, losses, metrics. No files, no models."""
